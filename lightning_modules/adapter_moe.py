"""Family ``adapter_moe``: bottleneck adapters after the FFN sub-layer, mixed per task (specs/adapter_moe.md 4.1, R1)."""

from lightning_modules.config import AdapterMoEConfig
from lightning_modules.network.backbones import Backbone, seams_at
from lightning_modules.network.dispatch import RoutedExperts
from lightning_modules.network.experts import Bottleneck
from lightning_modules.network.routers import build_router
from lightning_modules.seeds import derive


def install(backbone: Backbone, config: AdapterMoEConfig, num_tasks: int, seed: int) -> None:
    """Put adapters that change nothing at first behind the FFN sub-layers of ``config.layers``."""
    for layer, seam in seams_at(backbone, config.layers).items():
        streams = [derive(seed, "expert", layer, e) for e in range(config.num_experts)]
        adapters = [Bottleneck(backbone.hidden_size, config.bottleneck, stream) for stream in streams]
        router = build_router(config.router, num_tasks, config.num_experts, layer, seed)
        seam.follow(RoutedExperts(adapters, router, config.router.combine))
