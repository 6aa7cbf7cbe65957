"""Random streams as pure functions of (seed, stream): nothing random here depends on history (DESIGN 4.1)."""

import hashlib


def derive(seed: int, *stream: str | int) -> int:
    """A 63-bit seed for one named stream of a trial, e.g. ``derive(seed, "dropout", step, rank)``.

    Different streams are independent; the same stream gives the same seed on every machine and Python version.
    """
    text = "/".join([str(seed), *map(str, stream)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
