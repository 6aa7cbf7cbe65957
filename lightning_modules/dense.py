"""Family ``dense``: every task uses every weight of the encoder."""

from lightning_modules.config import DenseConfig
from lightning_modules.network.backbones import Encoder, seams_at
from lightning_modules.network.experts import widen
from lightning_modules.seeds import derive

WIDENING_NOISE = 0.01
"""Relative noise that tells the copies of a hidden unit apart: the default of ``TaskMoEConfig.expert_noise``."""


def install(encoder: Encoder, config: DenseConfig, num_tasks: int, seed: int) -> None:
    """Widen the FFN sub-layers of ``config.layers`` to ``config.ffn_multiple`` of their size; 1 leaves the encoder as it is."""
    if config.ffn_multiple == 1:
        return
    for layer, seam in seams_at(encoder, config.layers).items():
        ffn = seam.take_ffn()
        ffn.up, ffn.down = widen(ffn.up, ffn.down, config.ffn_multiple, WIDENING_NOISE, derive(seed, "widen", layer))
