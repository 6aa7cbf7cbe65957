"""Family ``task_moe``: experts in place of the FFN sub-layer or of the whole block, chosen per task, example or token
(Ye et al. 2022; Gupta et al. 2022; specs/task_moe.md 1.1, 1.2, specs/task_aware_gating.md 2.2, 2.3).

Legend: E experts of a block, K experts that a unit chooses, n shared experts, f inner width of the FFN.
"""

import copy

from torch import nn

from lightning_modules.building import ConfigError
from lightning_modules.config import TaskMoEConfig
from lightning_modules.network.backbones import Backbone, seams_at
from lightning_modules.network.dispatch import RoutedExperts
from lightning_modules.network.experts import drawn_from, scaled, split, upcycle
from lightning_modules.network.seams import FeedForward
from lightning_modules.seeds import derive


def install(backbone: Backbone, config: TaskMoEConfig, seed: int) -> dict[int, int]:
    """Put experts at the blocks that ``config.layers`` stands for.

    Returns:
        Block number -> number of experts there.

    Raises:
        ConfigError: layers, numbers of experts or FFN widths do not fit the backbone.
    """
    if config.expert == "layer":
        return _install_layers(backbone, config, seed)
    seams = seams_at(backbone, config.layers)
    numbers = _numbers(config, list(seams))
    for block, seam in seams.items():
        ffn = seam.take_ffn()
        experts = [_ffn(backbone, config, block, ffn, e, derive(seed, "expert", block, e)) for e in range(numbers[block])]
        shared = [_ffn(backbone, config, block, ffn, i, derive(seed, "shared", block, i)) for i in range(config.shared_experts)]
        combine, dispatch = config.router.combine, config.dispatch
        seam.replace(RoutedExperts(block, experts, combine=combine, shared=shared, dispatch=dispatch))
    return numbers


def _install_layers(backbone: Backbone, config: TaskMoEConfig, seed: int) -> dict[int, int]:
    seams = seams_at(backbone, config.layers, "layer")
    numbers = _numbers(config, list(seams))
    for block, seam in seams.items():
        layer, experts = seam.take_layer(), []
        for e in range(numbers[block]):
            stream = derive(seed, "expert", block, e)
            if config.init == "fresh":
                with drawn_from(stream):
                    expert = backbone.fresh_layer(block)
            else:
                expert = upcycle(layer, config.expert_noise, stream)
            if block >= backbone.num_encoder_blocks:
                expert.keep_apart(e * backbone.stack_sizes[-1])
            experts.append(expert)
        caches = config.router.per_task or numbers[block] == 1
        seam.replace(RoutedExperts(block, experts, combine=config.router.combine, dispatch=config.dispatch), caches=caches)
    return numbers


def _numbers(config: TaskMoEConfig, blocks: list[int]) -> dict[int, int]:
    """Block number -> number of experts; a list's numbers go with ``config.layers`` as they stand there."""
    if isinstance(config.num_experts, int):
        return dict.fromkeys(blocks, config.num_experts)
    if len(config.num_experts) != len(blocks):
        law = f"must have one number for each of the routed blocks {blocks}, got {list(config.num_experts)}"
        raise ConfigError("model.num_experts", law)
    listed = config.layers if isinstance(config.layers, tuple) and config.layers else blocks
    given = dict(zip(listed, config.num_experts, strict=True))
    return {block: given[block] for block in blocks}


def _ffn(backbone: Backbone, config: TaskMoEConfig, block: int, ffn: FeedForward, e: int, stream: int) -> nn.Module:
    """Routed or shared expert number ``e`` of a block.

    ``ffn_split``: units of the (e mod K)-th K-th of the FFN, with K times their output, so that K experts that cover all parts
    are the whole FFN under weights 1/K; where a unit's choices overlap they are not. With n shared experts the output of all
    is divided by n + 1 (n a multiple of K under ``ffn_split``: the sum is then the FFN).
    """
    if config.init == "fresh":
        with drawn_from(stream):
            ffn = backbone.fresh_ffn(block)
    parts = config.router.top_k if config.expert == "ffn_split" else 1
    if parts > 1 or config.shared_experts:
        ffn = copy.deepcopy(ffn)
    if parts > 1:
        width = ffn.up.out_features
        if width % parts:
            law = f"must not be ffn_split where router.top_k does not divide the FFN's inner width, got {width} and {parts}"
            raise ConfigError("model.expert", law)
        ffn.up, ffn.gate, ffn.down = split(ffn.up, ffn.gate, ffn.down, e % parts, parts)
    if config.shared_experts:
        ffn.down = scaled(ffn.down, 1 / (config.shared_experts + 1))
    return ffn if config.init == "fresh" else upcycle(ffn, config.expert_noise, stream)
