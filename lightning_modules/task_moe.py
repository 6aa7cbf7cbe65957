"""Family ``task_moe``: feed-forward experts in place of the FFN sub-layer, chosen per task (Ye et al. 2022)."""

from lightning_modules.config import TaskMoEConfig
from lightning_modules.network.backbones import Backbone, seams_at
from lightning_modules.network.dispatch import RoutedExperts
from lightning_modules.network.experts import upcycle
from lightning_modules.network.routers import build_router
from lightning_modules.seeds import derive


def install(backbone: Backbone, config: TaskMoEConfig, num_tasks: int, seed: int) -> None:
    """Replace the FFN sub-layers of ``config.layers`` by experts that start as noisy copies of them."""
    for layer, seam in seams_at(backbone, config.layers).items():
        ffn = seam.take_ffn()
        experts = [upcycle(ffn, config.expert_noise, derive(seed, "expert", layer, e)) for e in range(config.num_experts)]
        router = build_router(config.router, num_tasks, config.num_experts, layer, seed)
        seam.replace(RoutedExperts(experts, router, config.router.combine))
