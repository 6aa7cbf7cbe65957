"""Family ``dense``: every task uses every weight of the backbone."""

from lightning_modules.config import DenseConfig
from lightning_modules.network.backbones import Backbone, seams_at
from lightning_modules.network.experts import widen
from lightning_modules.seeds import derive

WIDENING_NOISE = 0.01
"""Relative noise that tells the copies of a hidden unit apart: the default of ``TaskMoEConfig.expert_noise``."""


def install(backbone: Backbone, config: DenseConfig, seed: int) -> None:
    """Widen the FFN sub-layers of ``config.layers`` to ``config.ffn_multiple`` of their size; 1: leave it as it is."""
    if config.ffn_multiple == 1:
        return
    for layer, seam in seams_at(backbone, config.layers).items():
        ffn = seam.take_ffn()
        stream = derive(seed, "widen", layer)
        ffn.up, ffn.gate, ffn.down = widen(ffn.up, ffn.gate, ffn.down, config.ffn_multiple, WIDENING_NOISE, stream)
