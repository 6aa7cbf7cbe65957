"""Checkpoints as transactions: written aside, synced, renamed; a torn or foreign one is passed over for the one before."""

import pickle
import re
from pathlib import Path
from typing import Any

import torch

from lightning_modules.files import atomic_file

KEEP = 2
"""Checkpoints kept: the last, and the one before in case the last is torn."""


def save_checkpoint(folder: Path, trial_id: str, step: int, state: dict[str, Any]) -> Path:
    """Write ``state`` (tensors and plain values only) as the checkpoint of ``step``, then drop the oldest."""
    final = folder / f"step_{step:09d}.pt"
    with atomic_file(final, "wb") as file:
        torch.save({"trial_id": trial_id, "step": step, **state}, file)
    for old in list_checkpoints(folder)[KEEP:]:
        old.unlink(missing_ok=True)
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint files, newest first (complete ones: a file gets its name by renaming)."""
    return sorted((p for p in folder.glob("step_*.pt") if re.fullmatch(r"step_\d{9}\.pt", p.name)), reverse=True)


def load_newest(folder: Path, trial_id: str) -> tuple[dict[str, Any] | None, list[str]]:
    """The newest usable checkpoint of ``trial_id``, and one line for each that had to be passed over.

    Only tensors and plain values are unpickled (``weights_only``).
    """
    refused = []
    for path in list_checkpoints(folder):
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError) as error:
            refused.append(f"{path.name} cannot be read: {' '.join(str(error).split())[:200]}")
            continue
        if not isinstance(state, dict) or state.get("trial_id") != trial_id:
            refused.append(f"{path.name} belongs to another trial")
            continue
        return state, refused
    return None, refused
