"""Balance and information losses: their values at known routings, and gradients that do not depend on how a step is cut."""

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from lightning_modules.building import ConfigError
from lightning_modules.network.routers.balance import (
    RunningTables,
    auxiliary_loss,
    cv_squared,
    diversity,
    entropy,
    exact_loss,
    load_balance,
    mutual_information,
    shares_of,
    z_loss,
)
from lightning_modules.network.routers.record import Routing, Units
from lightning_modules.network.routers.selection import choose, limit
from lightning_modules.router_config import RouterConfig

TASKS, EXPERTS = 5, 8
OWN = torch.arange(TASKS)
GLUE = {
    "proportional": [0.009, 0.071, 0.004, 0.006, 0.383, 0.414, 0.111, 0.003],
    "temperature_2": [0.044, 0.124, 0.029, 0.036, 0.288, 0.300, 0.155, 0.024],
}


def routing_of(logits: Tensor, top_k: int = 1) -> Routing:
    return choose(RouterConfig(kind="token", top_k=top_k), logits, temperature=1.0, training=True)


def one_to_one(tasks: Tensor, experts: int) -> Routing:
    return routing_of(functional.one_hot(tasks, experts) * 200.0)


def units_of(task: Tensor, weight: Tensor | None = None) -> Units:
    """Units in groups by task; equal weights of 1 in all if not given."""
    weight = torch.full((len(task),), 1 / len(task)) if weight is None else weight
    starts = [0, *(i for i in range(1, len(task)) if task[i] != task[i - 1]), len(task)]
    groups = tuple((int(task[a]), a, b) for a, b in pairwise(starts))
    return Units("token", task, torch.arange(len(task)), weight, groups=groups)


def part_of(units: Units, where: Tensor) -> Units:
    return units_of(units.task[where], units.weight[where])


def totals_of(units: Units, num_tasks: int = TASKS) -> Tensor:
    return torch.zeros(num_tasks).index_add(0, units.task, units.weight)


def same(step: Tensor) -> Tensor:
    """All-reduce of one worker."""
    return step


def settled(units: Units, routing: Routing, num_tasks: int = TASKS) -> RunningTables:
    """Tables that have seen nothing but this."""
    tables = RunningTables(num_tasks, routing.weights.shape[1], window=4)
    for _ in range(3):
        tables.observe(units, routing)
        tables.update(same)
    return tables


def random_step(seed: int, top_k: int = 1, size: int = 60, tasks: int = 4) -> tuple[Units, Tensor]:
    """Units of 4 of the 5 tasks in skewed numbers with uneven weights, and their logits (a leaf)."""
    generator = torch.Generator().manual_seed(seed)
    task = (torch.rand(size, generator=generator).square() * tasks).long().sort().values
    weight = torch.rand(size, generator=generator)
    logits = torch.randn(size, EXPERTS, generator=generator) + torch.randn(TASKS, EXPERTS, generator=generator)[task]
    return units_of(task, weight / weight.sum()), logits.requires_grad_()


# -- values ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_load_balance_is_that_of_transformers_over_k(top_k: int) -> None:
    logits = torch.randn(300, EXPERTS, generator=torch.Generator().manual_seed(0)) * 2
    routing = routing_of(logits, top_k)
    shares = shares_of(routing, units_of(torch.zeros(300, dtype=torch.int64)), EXPERTS)
    theirs = load_balancing_loss_func((logits,), EXPERTS, top_k)
    assert load_balance(shares, routing.probabilities.mean(0)).item() == pytest.approx(float(theirs) / top_k, rel=1e-5)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_balanced_is_one_and_collapsed_is_e_over_k_or_less(top_k: int) -> None:
    everyone = torch.eye(EXPERTS) + sum(torch.eye(EXPERTS).roll(i, 1) for i in range(1, top_k))
    units = units_of(torch.zeros(EXPERTS, dtype=torch.int64))
    balanced = routing_of(everyone * 200.0, top_k)
    assert load_balance(shares_of(balanced, units, EXPERTS), balanced.probabilities.mean(0)).item() == pytest.approx(1)
    collapsed = routing_of(everyone[:1].expand(EXPERTS, -1) * 200.0, top_k)
    value = load_balance(shares_of(collapsed, units, EXPERTS), collapsed.probabilities.mean(0)).item()
    assert value == pytest.approx(EXPERTS / top_k)


def test_shares_count_units_by_their_weight_and_assignments_before_capacity() -> None:
    chosen = torch.tensor([[0, 1], [0, -1], [2, 1]])
    weights = torch.zeros(3, 4)
    units = units_of(torch.zeros(3, dtype=torch.int64), torch.tensor([0.5, 0.25, 0.25]))
    routing = Routing(weights, chosen, weights, weights)
    torch.testing.assert_close(shares_of(routing, units, 4), torch.tensor([0.75, 0.75, 0.25, 0.0]) / 1.75)
    config = RouterConfig(kind="token", capacity=0.5)
    free = routing_of(torch.randn(40, 4, generator=torch.Generator().manual_seed(0)))
    units = units_of(torch.zeros(40, dtype=torch.int64))
    assert (limit(config, free, units).chosen < 0).any()
    assert torch.equal(shares_of(limit(config, free, units), units, 4), shares_of(free, units, 4))


def microbatch_value(routing: Routing, units: Units) -> float:
    config = RouterConfig(kind="token", balance="load", balance_weight=1.0, balance_scope="microbatch")
    return auxiliary_loss(config, units, routing, None, totals_of(units, EXPERTS), torch.arange(EXPERTS)).item()


def test_the_multi_task_trap() -> None:
    tasks = torch.arange(EXPERTS)
    assert microbatch_value(one_to_one(tasks, EXPERTS), units_of(tasks)) == pytest.approx(1.00)
    homogeneous = torch.full((8,), 3)
    assert microbatch_value(one_to_one(homogeneous, EXPERTS), units_of(homogeneous)) == pytest.approx(8.00)
    for mixture, value in {"proportional": 2.69, "temperature_2": 1.74}.items():
        shares = torch.tensor(GLUE[mixture])
        units, routing = units_of(tasks, shares / shares.sum()), one_to_one(tasks, EXPERTS)
        assert microbatch_value(routing, units) == pytest.approx(value, abs=0.02)
        balanced = RouterConfig(kind="token", balance="load", balance_weight=1.0)
        tables, totals = settled(units, routing, EXPERTS), totals_of(units, EXPERTS)
        assert auxiliary_loss(balanced, units, routing, tables, totals, tasks).item() == pytest.approx(1, abs=1e-5)
        over_all = replace(balanced, balance_scope="global")
        assert auxiliary_loss(over_all, units, routing, tables, totals, tasks).item() == pytest.approx(value, abs=0.02)
        each = replace(balanced, balance_scope="per_task")
        assert auxiliary_loss(each, units, routing, tables, totals, tasks).item() == pytest.approx(8, abs=1e-4)


def test_cv_is_the_squared_coefficient_of_variation() -> None:
    p = torch.tensor([0.5, 0.25, 0.25, 0.0])
    assert cv_squared(p).item() == pytest.approx((p.std(correction=0) / p.mean()).item() ** 2)
    assert cv_squared(torch.full((4,), 0.25)).item() == pytest.approx(0, abs=1e-12)
    assert cv_squared(torch.tensor([0.0, 0.0, 7.0, 0.0])).item() == pytest.approx(3)


def test_mutual_information_at_its_extremes() -> None:
    assert mutual_information(torch.eye(4)).item() == pytest.approx(math.log(4))
    assert mutual_information(torch.eye(8)[:3]).item() == pytest.approx(math.log(3))
    assert mutual_information(torch.full((4, 6), 1 / 6)).item() == pytest.approx(0, abs=1e-7)
    collapsed = torch.zeros(4, 6).index_fill(1, torch.tensor([2]), 1.0)
    assert mutual_information(collapsed).item() == pytest.approx(0, abs=1e-7)
    table = torch.rand(5, 6, generator=torch.Generator().manual_seed(0)).softmax(-1)
    assert mutual_information(table[:, torch.randperm(6)]).item() == pytest.approx(mutual_information(table).item(), abs=1e-7)
    joint = table / 5
    expected = (joint * (joint / (joint.sum(0) * joint.sum(1, keepdim=True))).log()).sum()
    assert mutual_information(table).item() == pytest.approx(expected.item(), abs=1e-6)


def test_entropy_and_z_loss_are_weighted_means() -> None:
    logits, weight = torch.tensor([[0.0, 0.0], [3.0, -500.0]]), torch.tensor([0.75, 0.25])
    assert entropy(logits.softmax(-1), weight).item() == pytest.approx(0.75 * math.log(2))
    assert z_loss(logits, weight).item() == pytest.approx(0.75 * math.log(2) ** 2 + 0.25 * 9)


# -- a step in parts ---------------------------------------------------------------------------------------------------

SETTINGS: dict[str, dict] = {
    f"{balance}-{scope}": {"balance": balance, "balance_scope": scope, "balance_weight": 1.0}
    for balance in ("load", "cv")
    for scope in ("global", "per_task", "task_balanced")
} | {
    "mutual_information": {"mutual_information": 1.0},
    "direct": {"z_loss": 0.5, "entropy": -0.3, "supervision": 0.2},
}
CUTS: dict[str, Callable[[Units], Tensor]] = {
    "one unit each": lambda units: torch.arange(len(units.task)),
    "one task each": lambda units: units.task,
    "across tasks": lambda units: torch.arange(len(units.task)) % 3,
}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", SETTINGS)
def test_neither_loss_nor_gradient_depends_on_how_a_step_is_cut(name: str, cut: str) -> None:
    config = RouterConfig(kind="token", top_k=2, **SETTINGS[name])
    before, earlier = random_step(1)
    tables = settled(before, routing_of(earlier.detach(), 2))
    units, logits = random_step(2)
    totals, parts = totals_of(units), CUTS[cut](units)

    def loss_of(pieces: list[Tensor]) -> Tensor:
        losses = [
            auxiliary_loss(config, part_of(units, where), routing_of(logits[where], 2), tables, totals, OWN) for where in pieces
        ]
        return torch.stack(losses).sum()

    whole = loss_of([torch.ones(len(parts), dtype=torch.bool)])
    in_parts = loss_of([parts == part for part in parts.unique()])
    torch.testing.assert_close(in_parts, whole)
    grads = [torch.autograd.grad(loss, logits)[0] for loss in (whole, in_parts)]
    torch.testing.assert_close(*grads)
    assert grads[0].abs().max() > 1e-5


def test_a_microbatch_loss_depends_on_the_cut_but_counts_parts_by_their_weight() -> None:
    config = RouterConfig(kind="token", balance="load", balance_scope="microbatch", balance_weight=1.0)
    units, logits = random_step(2)
    parts = [units.task == task for task in units.task.unique()]
    each = [auxiliary_loss(config, part_of(units, w), routing_of(logits[w]), None, totals_of(units), OWN).item() for w in parts]
    whole = auxiliary_loss(config, units, routing_of(logits), None, totals_of(units), OWN).item()
    alone = [
        auxiliary_loss(config, units_of(units.task[w], units.weight[w] / units.weight[w].sum()), routing_of(logits[w]), None,
                       totals_of(units), OWN).item() for w in parts
    ]  # fmt: skip
    assert sum(each) > whole + 0.05
    assert each == pytest.approx([value * float(units.weight[w].sum()) for value, w in zip(alone, parts, strict=True)])


def update_together(workers: list[RunningTables], rate: float = 0.0) -> None:
    """:meth:`RunningTables.update` on workers whose all-reduce sums what each of them hands in."""
    handed: list[Tensor] = []
    for worker in workers:
        deepcopy(worker).update(lambda step: handed.append(step.clone()) or step)
    for worker in workers:
        worker.update(lambda step: torch.stack(handed).sum(0), rate)


def test_tables_are_the_same_however_a_step_is_cut_over_forwards_and_workers() -> None:
    alone, workers = RunningTables(TASKS, EXPERTS, 4), [RunningTables(TASKS, EXPERTS, 4) for _ in range(3)]
    for seed in range(3):
        units, logits = random_step(seed)
        alone.observe(units, routing_of(logits))
        alone.update(same, rate=0.1)
        for part in range(6):
            where = torch.arange(len(units.task)) % 6 == part
            # The third worker never has anything.
            workers[part % 2].observe(part_of(units, where), routing_of(logits[where]))
        update_together(workers, rate=0.1)
    assert alone.bias.abs().max() > 0
    for worker in workers:
        for name, table in alone.named_buffers():
            torch.testing.assert_close(worker.get_buffer(name), table)


def test_rows_average_over_the_steps_that_held_their_task() -> None:
    tables = RunningTables(3, 2, window=4)
    to = torch.tensor([[200.0, 0.0], [0.0, 200.0]])
    for step, expert in enumerate([0, 1, 1, 0]):
        tables.observe(units_of(torch.tensor([0])), routing_of(to[[expert]]))
        tables.update(same)
        if step == 0:
            assert tables.share.tolist() == [[1, 0], [0, 0], [0, 0]] and tables.mass.tolist() == tables.share.tolist()
            tables.observe(units_of(torch.tensor([1])), routing_of(to[[1]]))
            tables.update(same)
    decays = torch.tensor([0.75**3, 0.75**2, 0.75, 1.0])
    first = ((decays * torch.tensor([1.0, 0, 0, 1])).sum() / decays.sum()).item()
    torch.testing.assert_close(tables.share, torch.tensor([[first, 1 - first], [0, 1], [0, 0]]))
    assert tables.seen.tolist() == [4, 1, 0]


def test_tables_are_in_the_checkpoint() -> None:
    tables = settled(*((u := random_step(0))[0], routing_of(u[1])))
    other = RunningTables(TASKS, EXPERTS, 4)
    other.load_state_dict(tables.state_dict())
    assert set(tables.state_dict()) == {"share", "mass", "seen", "weight", "bias"}
    for copy in (tables, other):
        copy.observe(u[0], routing_of(-u[1]))
        copy.update(same, rate=0.1)
    assert all(torch.equal(other.get_buffer(name), table) for name, table in tables.named_buffers())


@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "direct"])
def test_before_anything_was_seen_balance_is_neutral(name: str) -> None:
    config = RouterConfig(kind="token", **SETTINGS[name])
    units, logits = random_step(0)
    tables = RunningTables(TASKS, EXPERTS, 4)
    loss = auxiliary_loss(config, units, routing_of(logits), tables, totals_of(units), OWN)
    assert loss.item() == pytest.approx(1.0 if config.balance == "load" else 0.0, abs=1e-6)
    loss.backward()
    assert logits.grad is not None and logits.grad.abs().max() < 1e-6


# -- linear losses are the real ones where the tables agree with the step ----------------------------------------------


def means_of(units: Units, routing: Routing, scope: str) -> list[tuple[float, Tensor, Tensor]]:
    """(weight, f, P) of every table that ``scope`` balances, directly."""
    per_task = []
    for task in units.task.unique():
        own = units.task == task
        weight = units.weight[own].unsqueeze(-1)
        part = Routing(*(getattr(routing, name)[own] for name in ("weights", "chosen", "probabilities", "logits")))
        share = shares_of(part, part_of(units, own), EXPERTS)
        per_task.append((float(weight.sum()), share, (weight * part.probabilities).sum(0) / weight.sum()))
    if scope == "per_task":
        return per_task
    each = [w if scope == "global" else 1 / len(per_task) for w, _, _ in per_task]
    share, mass = (sum(w * row[i] for w, row in zip(each, per_task, strict=True)) for i in (1, 2))
    return [(1.0, share, mass)]  # type: ignore[list-item]


@pytest.mark.parametrize("scope", ["global", "per_task", "task_balanced"])
@pytest.mark.parametrize("balance", ["load", "cv"])
def test_settled_tables_give_the_functions_own_value_and_gradient(balance: str, scope: str) -> None:
    config = RouterConfig(kind="token", balance=balance, balance_scope=scope, balance_weight=0.3)  # type: ignore[arg-type]
    units, logits = random_step(3)
    routing = routing_of(logits)
    linear = auxiliary_loss(config, units, routing, settled(units, routing), totals_of(units), OWN)
    direct = 0.3 * sum(
        w * (load_balance(f, p) if balance == "load" else cv_squared(p)) for w, f, p in means_of(units, routing, scope)
    )
    torch.testing.assert_close(linear, direct)
    grads = [torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (linear, direct)]
    torch.testing.assert_close(*grads)


def test_settled_tables_give_the_information_and_its_gradient() -> None:
    config = RouterConfig(kind="token", mutual_information=0.3)
    units, logits = random_step(3)
    routing = routing_of(logits)
    linear = auxiliary_loss(config, units, routing, settled(units, routing), totals_of(units), OWN)
    table = torch.stack([mass for _, _, mass in means_of(units, routing, "per_task")])
    direct = -0.3 * mutual_information(table)
    torch.testing.assert_close(linear, direct)
    grads = [torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (linear, direct)]
    torch.testing.assert_close(*grads)


def test_a_task_not_yet_seen_has_no_say_in_the_information() -> None:
    config = RouterConfig(kind="token", mutual_information=1.0)
    units, logits = random_step(3)
    tables = settled(units, routing_of(logits))
    new = units_of(torch.full((6,), 4))
    fresh = torch.randn(6, EXPERTS, requires_grad=True)
    auxiliary_loss(config, new, routing_of(fresh), tables, totals_of(new), OWN).backward()
    assert fresh.grad is not None and fresh.grad.abs().max() < 1e-7


def test_tables_are_needed_only_where_they_are_read() -> None:
    units, logits = random_step(0)
    for settings in (SETTINGS["load-global"], SETTINGS["mutual_information"]):
        with pytest.raises(ValueError, match="running tables"):
            auxiliary_loss(RouterConfig(kind="token", **settings), units, routing_of(logits), None, totals_of(units), OWN)
    direct = RouterConfig(kind="token", **SETTINGS["direct"])
    routing, own = routing_of(logits), OWN[units.task]
    expected = (
        0.5 * z_loss(logits, units.weight)
        - 0.3 * entropy(routing.probabilities, units.weight)
        + 0.2 * (units.weight * functional.cross_entropy(logits, own, reduction="none")).sum()
    )
    torch.testing.assert_close(auxiliary_loss(direct, units, routing, None, totals_of(units), OWN), expected)


@pytest.mark.parametrize("name", ["load-task_balanced", "cv-task_balanced", "mutual_information", "direct"])
@pytest.mark.parametrize("selection, top_k", [("top_k", 1), ("top_k", 2), ("soft", 1)])
def test_the_exact_loss_of_tasks_is_the_settled_one(name: str, selection: str, top_k: int) -> None:
    config = RouterConfig(kind="task", selection=selection, top_k=top_k, **SETTINGS[name])  # type: ignore[arg-type]
    tasks = torch.tensor([3, 0, 4])
    logits = torch.randn(3, EXPERTS, generator=torch.Generator().manual_seed(0)).requires_grad_()
    routing = choose(config, logits, temperature=1.0, training=True)
    units = units_of(tasks)
    settled_loss = auxiliary_loss(config, units, routing, settled(units, routing), totals_of(units), OWN)
    exact = exact_loss(config, routing, OWN[tasks])
    torch.testing.assert_close(exact, settled_loss)
    grads = [torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (exact, settled_loss)]
    torch.testing.assert_close(*grads)


def test_information_sends_tasks_to_experts_of_their_own_step_by_step() -> None:
    config = RouterConfig(kind="token", mutual_information=1.0)
    task = torch.arange(4).repeat_interleave(8)
    units, tables = units_of(task), RunningTables(4, 4, 5)
    logits = (torch.randn(4, 4, generator=torch.Generator().manual_seed(0)) * 0.5).requires_grad_()
    for _ in range(250):
        for only in range(4):
            where = task == only
            routing = routing_of(logits[task[where]])
            auxiliary_loss(config, part_of(units, where), routing, tables, totals_of(units, 4), torch.arange(4)).backward()
            tables.observe(part_of(units, where), routing)
        tables.update(same)
        with torch.no_grad():
            logits -= 5 * logits.grad  # type: ignore[operator]
        logits.grad = None
    assert sorted(logits.argmax(-1).tolist()) == [0, 1, 2, 3]
    assert mutual_information(logits.softmax(-1)).item() > 0.9 * math.log(4)


# -- balance without a loss --------------------------------------------------------------------------------------------


def max_violation(routing: Routing, experts: int) -> float:
    counts = routing.chosen.flatten().bincount(minlength=experts).float()
    return float(counts.max() / counts.mean() - 1)


@pytest.mark.parametrize("scope", ["global", "task_balanced"])
def test_a_bias_balances_a_skewed_router_within_a_hundred_steps(scope: str) -> None:
    config = RouterConfig(kind="token", balance="bias", balance_scope=scope, score="sigmoid", weighting="raw")  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    preference = torch.randn(16, generator=generator) * 1.5
    units, tables = units_of(torch.arange(2).repeat_interleave(2048)), RunningTables(2, 16, 20)
    violations = []
    for _ in range(101):
        logits = torch.randn(4096, 16, generator=generator) + preference
        routing = choose(config, logits, temperature=1.0, training=True, bias=tables.bias)
        violations.append(max_violation(routing, 16))
        tables.observe(units, routing)
        tables.update(same, rate=1e-2, scope=config.balance_scope)
        assert tables.bias.mean().abs() < 1e-6
    assert violations[0] > 4 and violations[-1] < 0.5
    free = choose(config, logits, temperature=1.0, training=True)
    assert torch.equal(routing.probabilities, free.probabilities) and not torch.equal(routing.chosen, free.chosen)
    torch.testing.assert_close(routing.weights.amax(-1), logits.sigmoid().gather(-1, routing.chosen).squeeze(-1))


def test_the_bias_weighs_tasks_alike_or_by_their_size() -> None:
    to = torch.tensor([[200.0, 0.0, 0.0], [0.0, 200.0, 0.0]])
    units = units_of(torch.tensor([0, 1]), torch.tensor([0.9, 0.1]))
    moves = {}
    for scope in ("task_balanced", "global"):
        tables = RunningTables(3, 3, 20)
        tables.observe(units, routing_of(to))
        tables.update(same, rate=0.3, scope=scope)  # type: ignore[arg-type]
        moves[scope] = tables.bias.tolist()
    assert moves["task_balanced"] == pytest.approx([-0.2, -0.2, 0.4])
    assert moves["global"] == pytest.approx([-0.4, 0.2, 0.2])


def test_a_step_without_units_moves_nothing() -> None:
    units, logits = random_step(0)
    tables = settled(units, routing_of(logits))
    before = deepcopy(tables.state_dict())
    tables.update(same, rate=0.1)
    for name in ("share", "mass", "seen", "bias"):
        assert torch.equal(tables.state_dict()[name], before[name])


def test_one_bias_for_all_tasks_has_no_scope_of_one() -> None:
    for scope in ("per_task", "microbatch"):
        with pytest.raises(ConfigError, match="balance_scope"):
            RouterConfig(kind="token", balance="bias", balance_scope=scope)  # type: ignore[arg-type]


# -- diversity ---------------------------------------------------------------------------------------------------------


def test_diversity_is_the_mean_squared_cosine_of_what_was_learned() -> None:
    generator = torch.Generator().manual_seed(0)
    deltas = [[torch.randn(3, 4, generator=generator) * 1e-5, torch.randn(7, generator=generator) * 1e-5] for _ in range(4)]
    flat = torch.stack([torch.cat([part.flatten() for part in parts]) for parts in deltas])
    cosines = functional.cosine_similarity(flat.unsqueeze(0) * 1e5, flat.unsqueeze(1) * 1e5, dim=-1)
    expected = cosines[tuple(torch.triu_indices(4, 4, 1))].square().mean()
    torch.testing.assert_close(diversity(deltas), expected)
    assert diversity([deltas[0], deltas[0]]).item() == pytest.approx(1)
    assert diversity([deltas[0], [-2 * part for part in deltas[0]]]).item() == pytest.approx(1)
    assert diversity(deltas[:1]).item() == 0


def test_experts_that_have_not_moved_are_left_alone() -> None:
    moved, still = torch.randn(5, requires_grad=True), torch.zeros(5, requires_grad=True)
    also = torch.randn(5, requires_grad=True)
    loss = diversity([[moved], [still], [also]])
    loss.backward()
    assert loss.item() > 0 and moved.grad is not None and moved.grad.abs().sum() > 0
    assert still.grad is not None and (still.grad == 0).all()
    start = [torch.zeros(5, requires_grad=True) for _ in range(3)]
    diversity([[delta] for delta in start]).backward()
    assert all(delta.grad is not None and (delta.grad == 0).all() for delta in start)
