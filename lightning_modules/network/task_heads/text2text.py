"""Text answers: the decoder's own output layer is the head; here is its loss."""

import torch
from torch import Tensor
from torch.nn import functional

from lightning_modules.network.task_heads.base import symmetric_divergence


def sequence_loss(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of logits (n, T, V) with target token ids (n, T), -100: padding; mean over each target's tokens -> (n,)
    float32. The mean, where Ye et al. 2022 sum: long answers would decide the direction of a step. ``smoothing`` spreads that
    share of each token's probability over the vocabulary."""
    with torch.autocast(logits.device.type, enabled=False):
        flat = functional.cross_entropy(
            logits.float().flatten(0, 1), labels.flatten(), reduction="none", label_smoothing=smoothing, ignore_index=-100
        )
    losses = flat.view_as(labels)
    return losses.sum(-1) / (labels >= 0).sum(-1).clamp_min(1)


def sequence_divergence(first: Tensor, second: Tensor, labels: Tensor) -> Tensor:
    """Symmetric KL divergence between the token distributions of two passes, (n, T, V) each, mean over each target's tokens ->
    (n,) float32."""
    real = labels >= 0
    apart = symmetric_divergence(first.float(), second.float()) * real
    return apart.sum(-1) / real.sum(-1).clamp_min(1)
