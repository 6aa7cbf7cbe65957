"""Loss weighting: the formulas by hand, their gradients, and that neither workers nor a checkpoint change a weight."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_modules.weighting import WINDOW, LossWeights

SIZES = [600, 300, 90]
RULES: list[Any] = ["uniform", "size", "balance", "uncertainty"]


def observed(rule: Any = "balance", steps: int = 9) -> LossWeights:
    """Weights that have seen ``steps`` steps; task 2 is in every third only."""
    weights = LossWeights(rule, SIZES)
    for step in range(steps):
        weights.observe({0: 0.5 + step, 1: 2.0 / (1 + step), **({2: 7.0} if step % 3 == 0 else {})})
    return weights


def weighed(weights: LossWeights, task: int, loss: float) -> float:
    return float(weights(task, torch.tensor(loss, dtype=torch.float64)))


def test_uniform_returns_the_loss_itself() -> None:
    weights, loss = LossWeights("uniform", SIZES), torch.rand((), requires_grad=True)
    assert weights(1, loss) is loss
    assert weights.state_dict() == {} and list(weights.parameters()) == []


def test_size_weighs_by_examples_with_mean_one() -> None:
    weights = LossWeights("size", SIZES)
    values = [weighed(weights, task, 2.0) for task in range(3)]
    assert values == pytest.approx([2 * n / 330 for n in SIZES])
    assert sum(values) / 3 == pytest.approx(2.0)


def test_balance_is_one_until_a_task_has_had_a_loss() -> None:
    weights = LossWeights("balance", SIZES)
    assert [weighed(weights, task, 3.0) for task in range(3)] == [3.0] * 3
    weights.observe({1: 4.0})
    assert [weighed(weights, task, 3.0) for task in range(3)] == [3.0] * 3  # one task alone: its mean over itself
    weights.observe({0: 1.0})
    assert [weighed(weights, task, 1.0) for task in range(3)] == pytest.approx([5 / (2 * 1), 5 / (2 * 4), 1.0])


def test_balance_averages_the_last_five_losses() -> None:
    weights, history = LossWeights("balance", SIZES), {task: [] for task in range(3)}
    generator = torch.Generator().manual_seed(0)
    for step in range(25):
        losses = {t: float(torch.rand((), generator=generator)) * 10**t for t in range(3) if (step + t) % (t + 1) == 0}
        weights.observe(losses)
        for task, loss in losses.items():
            history[task].append(loss)
        means = {t: sum(h[-5:]) / len(h[-5:]) for t, h in history.items() if h}
        for task in range(3):
            expected = sum(means.values()) / (len(means) * means[task]) if task in means else 1.0
            assert weighed(weights, task, 1.0) == pytest.approx(expected)
    assert any(len(h) > 2 * WINDOW for h in history.values())


def test_balance_gives_every_task_the_same_expected_loss() -> None:
    weights = observed()
    means = weights.recent.sum(1) / weights.counts.clamp(max=WINDOW)
    weighted = [weighed(weights, task, float(means[task])) for task in range(3)]
    assert weighted == pytest.approx([float(means.mean())] * 3)


def test_balance_stays_finite_for_a_task_without_loss() -> None:
    weights = LossWeights("balance", SIZES)
    weights.observe({0: 0.0, 1: 1.0})
    assert weighed(weights, 0, 0.0) == 0.0
    assert math.isfinite(weighed(weights, 0, 1e-3)) and weighed(weights, 1, 1.0) == pytest.approx(0.5)


def test_only_balance_observes() -> None:
    for rule in RULES:
        weights, before = observed(rule), LossWeights(rule, SIZES)
        changed = any(not torch.equal(a, b) for a, b in zip(weights.buffers(), before.buffers(), strict=True))
        assert weights.observes == changed == (rule == "balance")


def test_weights_carry_no_gradient_of_their_own() -> None:
    for rule in ("size", "balance"):
        weights, loss = observed(rule), torch.tensor(0.3, requires_grad=True)
        weights.observe({0: loss * 2})
        [gradient] = torch.autograd.grad(weights(0, loss), loss)
        assert float(gradient) == pytest.approx(float(weights.weight(0)))
        assert not any(buffer.requires_grad for buffer in weights.buffers())


def test_uncertainty_and_its_gradient_are_the_formula() -> None:
    weights, loss = LossWeights("uncertainty", SIZES), torch.tensor(1.7, requires_grad=True)
    s = 0.4
    with torch.no_grad():
        weights.log_variances[1].fill_(s)
    value = weights(1, loss)
    value.backward()
    assert float(value.detach()) == pytest.approx(math.exp(-s) * 1.7 + s / 2)
    assert float(gradient(weights.log_variances[1])) == pytest.approx(-math.exp(-s) * 1.7 + 0.5)
    assert float(gradient(loss)) == pytest.approx(math.exp(-s)) == float(weights.weight(1))
    assert weights.log_variances[0].grad is None and weights.log_variances[2].grad is None


def test_uncertainty_learns_the_loss_level() -> None:
    """At the minimum exp(-s) L = 1/2, so sigma^2 = 2 L."""
    weights = LossWeights("uncertainty", SIZES)
    optimizer = torch.optim.SGD(weights.parameters(), lr=0.5)
    for _ in range(300):
        optimizer.zero_grad()
        torch.stack([weights(task, torch.tensor(level)) for task, level in enumerate([0.1, 1.0, 4.0])]).sum().backward()
        optimizer.step()
    assert [math.exp(float(s.detach())) for s in weights.log_variances] == pytest.approx([0.2, 2.0, 8.0], rel=1e-3)


def test_tasks_that_a_step_does_not_hold_stand_still() -> None:
    weights = LossWeights("uncertainty", SIZES)
    optimizer = torch.optim.AdamW(weights.parameters(), lr=0.1, weight_decay=0.0)
    moved = []
    for task in (0, 0, 2):
        optimizer.zero_grad(set_to_none=True)
        before = [float(s.detach()) for s in weights.log_variances]
        weights(task, torch.tensor(3.0)).backward()
        optimizer.step()
        moved.append([float(s.detach()) != b for s, b in zip(weights.log_variances, before, strict=True)])
    assert moved == [[True, False, False], [True, False, False], [False, False, True]]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_workers_add_up_to_one_worker(rule: Any, world_size: int) -> None:
    """Values and gradients; with eight workers, three of them have no row of the group."""
    weights = observed(rule).double()
    for parameter in weights.parameters():
        torch.nn.init.constant_(parameter, -0.7)
    rows = torch.rand(5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def step(parts: list[Tensor], share: float) -> tuple[float, list[float], list[float]]:
        scale = torch.ones((), dtype=torch.float64, requires_grad=True)
        weights.zero_grad()
        total = 0.0
        for part in parts:
            value = weights(1, (scale * part).sum() / len(rows), share)
            value.backward()
            total += float(value.detach())
        found = [float(p.grad) for p in weights.parameters() if p.grad is not None]
        return total, found, [float(gradient(scale))]

    one = step([rows], 1.0)
    several = step([rows[rank::world_size] for rank in range(world_size)], 1 / world_size)
    for a, b in zip(one, several, strict=True):
        assert a == pytest.approx(b)
    assert len(one[1]) == (1 if rule == "uncertainty" else 0)


@pytest.mark.parametrize("rule", RULES)
def test_a_checkpoint_restores_the_weights_to_the_bit(rule: Any) -> None:
    weights = observed(rule)
    for i, parameter in enumerate(weights.parameters()):
        torch.nn.init.constant_(parameter, 0.1 * i)
    other = LossWeights(rule, SIZES)
    other.load_state_dict(weights.state_dict())
    for step in range(4):
        for each in (weights, other):
            each.observe({step % 3: 0.123 * step})
        assert all(torch.equal(weights.weight(task), other.weight(task)) for task in range(3))


def test_weighted_losses_keep_their_type() -> None:
    for rule in RULES:
        assert observed(rule)(0, torch.tensor(1.0)).dtype == torch.float32


def gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad
