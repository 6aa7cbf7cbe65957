"""Family ``adapter_moe``: bottleneck adapters after the FFN sub-layer, mixed per task (specs/adapter_moe.md 4.1, R1)."""

from lightning_modules.config import AdapterMoEConfig
from lightning_modules.network.backbones import Backbone, seams_at
from lightning_modules.network.dispatch import RoutedExperts
from lightning_modules.network.experts import Bottleneck
from lightning_modules.seeds import derive


def install(backbone: Backbone, config: AdapterMoEConfig, seed: int) -> dict[int, int]:
    """Put adapters that change nothing at first behind the FFN sub-layers of ``config.layers``. Block -> number of adapters."""
    placed = {}
    for layer, seam in seams_at(backbone, config.layers).items():
        streams = [derive(seed, "expert", layer, e) for e in range(config.num_experts)]
        adapters = [Bottleneck(backbone.hidden_size, config.bottleneck, stream) for stream in streams]
        seam.follow(RoutedExperts(layer, adapters, config.router.combine))
        placed[layer] = config.num_experts
    return placed
