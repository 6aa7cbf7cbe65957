"""The gate's formulas, its gradients by task, and its numerics."""

from collections.abc import Callable
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_modules.building import ConfigError
from lightning_modules.network.routers.gates import Gate
from lightning_modules.router_config import CONDITIONED, RouterConfig

WIDTH, EXPERTS, TASKS, VECTOR = 12, 5, 4, 3
GROUPS = ((2, 0, 3), (0, 3, 4), (3, 4, 9))
UNITS = 9
PRESENT = {2, 0, 3}
TASK_OF = torch.tensor([2] * 3 + [0] + [3] * 5)
CONDITIONINGS = get_args(get_type_hints(RouterConfig)["conditioning"])
LEARNING = [(c, {}) for c in CONDITIONINGS] + [
    ("none", {"normalise": True}),
    ("per_task", {"normalise": True}),
    ("film", {"noise": "jitter", "noise_scale": 0.1}),
    ("hyper", {"noise": "gaussian"}),
]


class Embedding(nn.Module):
    """Task vectors as a table."""

    def __init__(self, table: Tensor, learned: bool = True) -> None:
        super().__init__()
        self.table = nn.Parameter(table, requires_grad=learned)

    def forward(self, task_ids: Tensor) -> Tensor:
        return self.table[task_ids]


def config(conditioning: str, **settings: Any) -> RouterConfig:
    defaults: dict[str, Any] = {"kind": "token", "conditioning": conditioning, "init_std": 0.3}
    if conditioning == "mlp":
        defaults["hidden_size"] = 7
    return RouterConfig(**defaults | settings)


def gate(conditioning: str, *, tasks: int = TASKS, vector: int = VECTOR, seed: int = 0, **settings: Any) -> Gate:
    return Gate(config(conditioning, **settings), WIDTH, EXPERTS, tasks, vector, block=1, seed=seed)


def states(units: int = UNITS, seed: int = 0) -> Tensor:
    return torch.randn(units, WIDTH, generator=torch.Generator().manual_seed(seed))


def vectors(width: int = VECTOR) -> Embedding:
    return Embedding(torch.randn(TASKS, width, generator=torch.Generator().manual_seed(1)))


def set_(module: nn.Module, name: str, value: Tensor) -> None:
    with torch.no_grad():
        module.get_parameter(name).copy_(value)


@pytest.mark.parametrize("conditioning, settings", LEARNING)
def test_every_parameter_learns_and_absent_tasks_get_no_gradient(conditioning: str, settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    own, table = gate(conditioning, **settings), vectors()
    logits = own(states(), GROUPS, table if conditioning in CONDITIONED else None)
    assert logits.shape == (UNITS, EXPERTS)
    (logits.softmax(-1) * torch.arange(EXPERTS)).sum().backward()
    for name, parameter in own.named_parameters():
        if name.startswith(("weights.", "biases.")) and int(name.split(".")[1]) not in PRESENT:
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    if conditioning in CONDITIONED:
        assert table.table.grad is not None
        assert [bool(row.any()) for row in table.table.grad] == [t in PRESENT for t in range(TASKS)]


def test_rows_of_tasks_are_the_parameters_of_per_task_and_nothing_else() -> None:
    for conditioning in CONDITIONINGS:
        own = gate(conditioning, noise="gaussian")
        rows = own.rows_of_tasks()
        if conditioning != "per_task":
            assert rows == []
            continue
        assert [[tuple(row.shape) for row in part] for part in rows] == [[(EXPERTS, WIDTH)] * TASKS, [(EXPERTS,)] * TASKS]
        listed = {id(row) for part in rows for row in part}
        assert {name for name, p in own.named_parameters() if id(p) not in listed} == {"noise_weight"}


def test_equation_of_each_conditioning() -> None:
    """The formulas of ``RouterConfig.conditioning``, unit by unit."""
    x, table = states(), vectors()
    u = table.table[TASK_OF]
    reference: dict[str, Callable[[Gate, int], Tensor]] = {
        "none": lambda g, i: g.weight @ x[i],
        "per_task": lambda g, i: g.weights[int(TASK_OF[i])] @ x[i] + g.biases[int(TASK_OF[i])],
        "additive": lambda g, i: g.weight @ x[i] + g.shift @ u[i],
        "mlp": lambda g, i: g.weight @ functional.gelu(g.inner @ torch.cat([x[i], u[i]])),
        "film": lambda g, i: g.weight @ (x[i] * (1 + g.scale @ u[i]) + g.offset @ u[i]),
        "hyper": lambda g, i: (g.weight + torch.einsum("r,red->ed", u[i], g.bank)) @ x[i],
    }
    assert set(reference) == set(CONDITIONINGS)
    for conditioning, formula in reference.items():
        own = gate(conditioning)
        if conditioning == "per_task":
            for task in range(TASKS):
                set_(own, f"biases.{task}", torch.randn(EXPERTS, generator=torch.Generator().manual_seed(task)))
        expected = torch.stack([formula(own, i) for i in range(UNITS)])
        torch.testing.assert_close(own(x, GROUPS, table), expected, msg=conditioning)


def test_a_gate_on_the_concatenation_is_the_agnostic_gate_and_a_bias_per_task() -> None:
    """specs/task_aware_gating.md 2.4: ``additive`` has no interaction of task and state."""
    agnostic, additive, table = gate("none"), gate("additive"), vectors()
    assert torch.equal(agnostic.weight, additive.weight), "the shared part has its own stream"
    x = states()
    shift = additive(x, GROUPS, table) - agnostic(x, GROUPS, None)
    for task, start, stop in GROUPS:
        own = additive.shift @ table.table[task]
        torch.testing.assert_close(shift[start:stop], own.expand(stop - start, -1), atol=1e-6, rtol=0)
    concatenated = torch.cat([x, table.table[TASK_OF]], -1) @ torch.cat([additive.weight, additive.shift], -1).T
    torch.testing.assert_close(additive(x, GROUPS, table), concatenated)


@pytest.mark.parametrize("conditioning", ["mlp", "film", "hyper", "per_task"])
def test_the_other_conditionings_let_task_and_state_interact(conditioning: str) -> None:
    own, table, x = gate(conditioning, init_std=1.0), vectors(), states(1).expand(2, -1) * torch.tensor([[1.0], [-1.0]])
    first, second = (own(x, ((task, 0, 2),), table) for task in (0, 1))
    difference = first - second
    assert (difference[0] - difference[1]).abs().max() > 0.1


def test_hyper_on_one_hot_vectors_is_a_gate_per_task() -> None:
    per_task, hyper = gate("per_task"), gate("hyper", vector=TASKS)
    set_(hyper, "weight", torch.zeros(EXPERTS, WIDTH))
    set_(hyper, "bank", torch.stack(list(per_task.weights)))
    x = states()
    torch.testing.assert_close(hyper(x, GROUPS, Embedding(torch.eye(TASKS))), per_task(x, GROUPS, None))


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_logits_are_float32_whatever_the_states_and_autocast(conditioning: str) -> None:
    own, table = gate(conditioning), vectors()
    x = states().bfloat16()
    expected = own(x.float(), GROUPS, table)
    with torch.autocast("cpu", torch.bfloat16):
        logits = own(x, GROUPS, table)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_a_unit_does_not_depend_on_its_batch_mates(conditioning: str) -> None:
    own, table, x = gate(conditioning), vectors(), states()
    whole = own(x, GROUPS, table)
    torch.testing.assert_close(own(x[4:6], ((3, 0, 2),), table), whole[4:6])
    twice = own(x[[0, 3, 1]], ((2, 0, 1), (0, 1, 2), (2, 2, 3)), table)
    torch.testing.assert_close(twice, whole[[0, 3, 1]])


@pytest.mark.parametrize("conditioning", ["additive", "film", "hyper"])
def test_tasks_start_close_to_the_agnostic_gate(conditioning: str) -> None:
    x, table = states(), Embedding(torch.eye(TASKS))
    agnostic = gate("none", init_std=0.02)(x, GROUPS, None)
    own = gate(conditioning, vector=TASKS, init_std=0.02)(x, GROUPS, table)
    gap = (own - agnostic).norm() / agnostic.norm()
    assert 0 < gap < 0.5


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_zero_start_gives_equal_logits_and_can_learn(conditioning: str) -> None:
    own, table, x = gate(conditioning, init_std=0, selection="soft"), vectors(), states()
    assert not own(x, GROUPS, table).any()
    optimiser = torch.optim.SGD(own.parameters(), lr=1.0)
    target = torch.arange(UNITS) % EXPERTS
    losses = []
    for _ in range(30):
        loss = functional.cross_entropy(own(x, GROUPS, table), target)
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[-1] < 0.7 * losses[0]


def test_the_seed_the_block_and_the_task_decide_the_start() -> None:
    for conditioning in CONDITIONINGS:
        own, same, other = gate(conditioning), gate(conditioning), gate(conditioning, seed=1)
        for (name, a), b, c in zip(own.named_parameters(), same.parameters(), other.parameters(), strict=True):
            assert torch.equal(a, b), name
            assert torch.equal(a, c) == name.startswith("biases"), name
    few, many = gate("per_task"), gate("per_task", tasks=TASKS + 20)
    assert all(torch.equal(a, b) for a, b in zip(few.weights, many.weights, strict=False))
    assert not torch.equal(few.weights[0], few.weights[1])
    elsewhere = Gate(config("none"), WIDTH, EXPERTS, TASKS, VECTOR, block=2, seed=0)
    assert not torch.equal(elsewhere.weight, gate("none").weight)


def test_building_draws_nothing_from_the_global_state() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for conditioning in CONDITIONINGS:
        gate(conditioning, noise="gaussian")
    Gate(config("none", kind="example", selection="sampled"), WIDTH, EXPERTS, TASKS, 0, 0, 0)
    gate("per_task", normalise=True)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("conditioning", ["none", "per_task"])
def test_normalised_gates_ignore_the_scale_of_states_and_of_weights(conditioning: str) -> None:
    own, x = gate(conditioning, normalise=True), states()
    expected = own(x, GROUPS, None)
    torch.testing.assert_close(own(3 * x + 2, GROUPS, None), expected, atol=1e-4, rtol=1e-4)
    for name, parameter in own.named_parameters():
        if name.startswith("weight"):
            set_(own, name, parameter * torch.arange(1.0, EXPERTS + 1).unsqueeze(-1))
    torch.testing.assert_close(own(x, GROUPS, None), expected)
    if conditioning == "none":
        directions = own.weight / own.weight.norm(dim=-1, keepdim=True)
        torch.testing.assert_close(expected, functional.layer_norm(x, (WIDTH,)) @ directions.T)


@pytest.mark.parametrize("noise", [{"noise": "jitter", "noise_scale": 0.1}, {"noise": "gaussian"}])
def test_noise_is_drawn_in_training_only(noise: dict[str, Any]) -> None:
    plain, own, x = gate("none"), gate("none", **noise), states()
    torch.manual_seed(3)
    first, second = own(x, GROUPS, None), own(x, GROUPS, None)
    torch.manual_seed(3)
    assert torch.equal(own(x, GROUPS, None), first)
    assert not torch.equal(first, second)
    own.eval()
    before = torch.get_rng_state()
    assert torch.equal(own(x, GROUPS, None), plain(x, GROUPS, None))
    assert torch.equal(torch.get_rng_state(), before)


def test_sizes_of_the_noise() -> None:
    torch.manual_seed(0)
    ones = torch.ones(20_000, WIDTH)
    groups = ((0, 0, 20_000),)
    jitter = gate("none", noise="jitter", noise_scale=0.1)
    set_(jitter, "weight", torch.eye(EXPERTS, WIDTH))
    factor = jitter(ones, groups, None)
    assert 0.9 <= factor.min() < 0.901 and 1.099 < factor.max() <= 1.1
    gaussian = gate("none", noise="gaussian", init_std=0)
    set_(gaussian, "noise_weight", torch.arange(EXPERTS).float().unsqueeze(-1).expand(-1, WIDTH) / WIDTH)
    torch.testing.assert_close(
        gaussian(ones, groups, None).std(0), functional.softplus(torch.arange(EXPERTS).float()), rtol=0.02, atol=0
    )


def test_the_baseline_exists_for_sampled_only_and_leaves_the_backbone_alone() -> None:
    own = Gate(config("none", kind="example", selection="sampled"), WIDTH, EXPERTS, TASKS, 0, 0, 0)
    x = states().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        value = own.value(x)
    assert value.shape == (UNITS,) and value.dtype == torch.float32 and not value.any()
    (value - 1).square().sum().backward()
    assert x.grad is None
    assert own.baseline is not None and own.baseline.weight.grad is not None and own.baseline.weight.grad.any()
    assert own.get_parameter("weight").grad is None
    plain = gate("none")
    assert not any("baseline" in name for name, _ in plain.named_parameters())
    with pytest.raises(ValueError, match="sampled"):
        plain.value(states())


def test_a_conditioned_gate_without_vectors_is_refused() -> None:
    with pytest.raises(ValueError, match="needs task vectors"):
        gate("film")(states(), GROUPS, None)


def test_normalised_gates_need_a_start() -> None:
    with pytest.raises(ConfigError, match="init_std: must be positive with normalise"):
        config("none", normalise=True, init_std=0, selection="soft")
