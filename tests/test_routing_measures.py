"""The routing measurements keep their definitions, and the tally of a pass gives what its records say."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers import CATALOGUE, HEADS, tiny_batch, tiny_network

from lightning_modules.config import TaskMoEConfig
from lightning_modules.measure import routing as measure
from lightning_modules.measure.routing import RoutingTally, churn, merge
from lightning_modules.network.routers.record import Record, Routing, Unit, Units

SPECIALISTS, UNIFORM = np.eye(4), np.full((4, 4), 0.25)
COLLAPSED = np.zeros((4, 4))
COLLAPSED[:, 0] = 1


@pytest.mark.parametrize(
    "table, expected",
    [
        (SPECIALISTS, {"entropy": 0, "nmi": 1, "dead_experts": 0, "max_violation": 0, "cv": 0, "effective_experts": 4}),
        (UNIFORM, {"entropy": 1, "nmi": 0, "dead_experts": 0, "max_violation": 0, "cv": 0, "effective_experts": 4}),
        (COLLAPSED, {"entropy": 0, "nmi": 0, "dead_experts": 3, "max_violation": 3, "cv": 3**0.5, "effective_experts": 1}),
        (np.ones((3, 1)), {"entropy": 0, "nmi": 0, "dead_experts": 0, "max_violation": 0, "cv": 0, "effective_experts": 1}),
    ],
    ids=["specialists", "uniform", "collapsed", "one_expert"],
)
def test_measurements_of_known_tables(table: np.ndarray, expected: dict[str, float]) -> None:
    values = measure.measure_table(table)
    assert {name: values[name] for name in expected} == pytest.approx(expected, abs=1e-12)
    assert sum(value for name, value in values.items() if name.startswith("utilisation_")) == pytest.approx(1)


@pytest.mark.parametrize("share, dead", [(0.0024, 1), (0.0026, 0)])
def test_an_expert_is_dead_below_a_hundredth_of_an_equal_share(share: float, dead: int) -> None:
    row = np.array([share, 0.4, 0.3, 0.3 - share])
    assert measure.dead_experts(np.stack([row, row])) == dead


def test_a_dense_network_has_no_routing_measurements() -> None:
    assert RoutingTally(3, {}).measure(["a", "b", "c"]) == {}


def record(
    p: torch.Tensor, tasks: torch.Tensor, *, k: int = 1, kind: Unit = "token", per_example: int = 1, block: int = 0, **more: Any
) -> Record:
    """Top-``k`` routing by (U, E) probabilities; ``per_example`` units in a row are one example."""
    chosen = p.topk(k, -1).indices
    kept = torch.zeros_like(p).scatter(-1, chosen, p.gather(-1, chosen))
    weights = more.pop("weights", kept / kept.sum(-1, keepdim=True))
    routing = Routing(weights, more.pop("chosen", chosen), p, p.log(), **more)
    units = Units(kind, tasks, torch.arange(len(p)) // per_example, torch.full((len(p),), 1 / len(p)))
    return Record(block, units, routing)


def tally_of(*records: Record, tasks: int = 3, experts: int = 4) -> RoutingTally:
    tally = RoutingTally(tasks, dict.fromkeys({r.block for r in records}, experts))
    for each in records:
        tally.add(each)
    return tally


def drawn(units: int, experts: int, seed: int = 0, sharpness: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (sharpness * torch.randn(units, experts, generator=generator)).softmax(-1)


def names(count: int) -> list[str]:
    return [f"toy/{task}" for task in range(count)]


def test_tables_are_the_shares_of_each_task() -> None:
    p, tasks = drawn(300, 4), torch.arange(300) % 3
    arrays = tally_of(record(p, tasks)).arrays(names(3))
    top = p.argmax(-1)
    for task in range(3):
        counts = torch.bincount(top[tasks == task], minlength=4).numpy()
        assert (arrays["n/0"][task] == counts).all()
        np.testing.assert_allclose(arrays["weights/0"][task], counts / counts.sum())
        np.testing.assert_allclose(arrays["q/0"][task], p[tasks == task].double().sum(0).numpy())
    assert arrays["units/0"].tolist() == [100, 100, 100]
    assert arrays["n/0"].dtype == np.float64 and arrays["tasks"].tolist() == names(3)


@pytest.mark.parametrize("kind, k", [("token", 1), ("token", 2), ("example", 1), ("task", 1), ("task", 4)])
def test_the_entropy_decomposition_is_exact(kind: Unit, k: int) -> None:
    p, tasks = drawn(3 if kind == "task" else 400, 4, sharpness=2.0), torch.arange(3 if kind == "task" else 400) % 3
    values = tally_of(record(p, tasks, k=k, kind=kind)).measure(names(3), draws=5)
    parts = [values[f"route/0/{name}"] for name in ("i_task", "i_input", "h_residual")]
    assert sum(parts) == pytest.approx(values["route/0/h_expert"], abs=1e-12)
    assert min(parts) > -1e-9
    by_task = torch.stack([p[tasks == task].double().mean(0) for task in range(3)])
    assert values["route/0/h_expert"] == pytest.approx(float(torch.special.entr(by_task.mean(0)).sum()))
    if kind == "task":
        assert values["route/0/i_input"] == pytest.approx(0, abs=1e-12)


def test_a_router_that_ignores_its_input_has_only_the_last_term() -> None:
    values = tally_of(record(torch.full((60, 4), 0.25), torch.arange(60) % 3, k=4)).measure(names(3), draws=5)
    assert values["route/0/h_residual"] == pytest.approx(math.log(4)) == values["route/0/h_expert"]
    assert values["route/0/entropy"] == pytest.approx(1) and values["route/0/margin"] == pytest.approx(0)


@pytest.mark.parametrize("per_task", [64, 512])
def test_the_bias_of_mutual_information_is_that_of_theory_and_of_what_is_found(per_task: int) -> None:
    tasks = experts = 8
    theory = (tasks - 1) * (experts - 1) / (2 * tasks * per_task)
    found, estimated = [], []
    for seed in range(12):
        p = drawn(tasks * per_task, experts, seed, sharpness=5.0)
        of = torch.arange(len(p)) % tasks
        values = tally_of(record(p, of), tasks=tasks, experts=experts).measure(names(tasks), draws=0)
        found.append(values["route/0/mi"])
        estimated.append(values["route/0/mi_bias"])
        assert values["route/0/mi_corrected"] == pytest.approx(found[-1] - estimated[-1])
    assert np.mean(estimated) == pytest.approx(theory, rel=0.2)
    assert np.mean(found) == pytest.approx(theory, rel=0.2)


def test_tokens_of_an_example_are_not_taken_for_independent() -> None:
    """Examples of 20 tokens that all choose alike: the bias is that of the examples, 20 times that of the tokens."""
    tasks, experts, examples = 4, 8, 400
    p = drawn(examples, experts, sharpness=5.0).repeat_interleave(20, 0)
    of = (torch.arange(examples) % tasks).repeat_interleave(20)
    values = tally_of(record(p, of, per_example=20), tasks=tasks, experts=experts).measure(names(tasks), draws=0)
    assert values["route/0/mi_bias"] == pytest.approx((tasks - 1) * (experts - 1) / (2 * examples), rel=0.2)


def test_the_permutation_null_knows_chance_from_specialisation() -> None:
    of = torch.arange(200) % 4
    by_chance = [
        tally_of(record(drawn(200, 6, seed, 5.0), of), tasks=4, experts=6).measure(names(4), draws=50)["route/0/mi_null_p"]
        for seed in range(20)
    ]
    assert min(by_chance) < 0.3 and max(by_chance) > 0.7 and sum(p <= 0.1 for p in by_chance) <= 6
    own = torch.nn.functional.one_hot(of, 6) * 2.0
    skewed = (own + torch.randn(200, 6, generator=torch.Generator().manual_seed(0))).softmax(-1)
    values = tally_of(record(skewed, of), tasks=4, experts=6).measure(names(4), draws=99)
    assert values["route/0/mi_null_p"] == pytest.approx(0.01)
    assert values == tally_of(record(skewed, of), tasks=4, experts=6).measure(names(4), draws=99)


def test_a_task_level_table_is_exact_and_keeps_its_values() -> None:
    """Whatever the number of forwards, the measurements are those of the table of the tasks' weights."""
    p = drawn(3, 4, sharpness=2.0)
    whole = record(p, torch.arange(3), k=2, kind="task")
    tally = tally_of(*(record(p[[task]], torch.tensor([task]), k=2, kind="task") for task in (0, 1, 1, 2, 2, 2)))
    values = tally.measure(names(3))
    for name, value in measure.measure_table(whole.routing.weights.numpy().astype(float)).items():
        assert values[f"route/0/{name}"] == pytest.approx(value, abs=1e-6), name  # float32 rows sum to 1 up to rounding
    assert values["route/0/mi_bias"] == 0 and values["route/0/mi_corrected"] == values["route/0/mi"]
    assert "route/0/mi_null_p" not in values


def test_effective_experts_of_a_task() -> None:
    p = torch.tensor([[1.0, 0, 0, 0], [0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 0, 0]])
    values = tally_of(record(p, torch.arange(3), k=4, kind="task")).measure(names(3))
    found = [values[f"route/task/toy/{task}/eff_experts"] for task in range(3)]
    assert found == pytest.approx([1, 4, 2])


def test_drops_of_the_tasks_add_up_to_all() -> None:
    p, tasks = drawn(90, 4), torch.arange(90) % 3
    wanted = p.topk(2, -1).indices
    lost = torch.rand(90, 2, generator=torch.Generator().manual_seed(3)) < torch.tensor([0.1, 0.4, 0.7])[tasks][:, None]
    chosen = wanted.masked_fill(lost, -1)
    weights = torch.zeros(90, 5).scatter(-1, chosen % 5, p.gather(-1, wanted))[:, :4]
    tally = tally_of(record(p, tasks, chosen=chosen, wanted=wanted, weights=weights))
    arrays, values = tally.arrays(names(3)), tally.measure(names(3), draws=5)
    assert arrays["dropped/0"].tolist() == [int(lost[tasks == task].sum()) for task in range(3)]
    assert arrays["unrouted/0"].sum() == int(lost.all(-1).sum())
    assert values["route/0/dropped"] == pytest.approx(float(lost.float().mean()))
    shares = [values[f"route/task/toy/{task}/dropped"] for task in range(3)]
    assert np.mean(shares) == pytest.approx(values["route/0/dropped"]) and shares == sorted(shares)
    assert values["route/0/unrouted"] == pytest.approx(float(lost.all(-1).float().mean()))
    np.testing.assert_allclose(arrays["weights/0"].sum(1), 1)


def test_the_size_of_logits_leaves_masked_experts_out() -> None:
    z = torch.tensor([[3.0, -4.0, float("-inf"), torch.finfo(torch.float32).min]])
    routing = Routing(z.softmax(-1), torch.tensor([[0]]), z.softmax(-1), z)
    values = tally_of(Record(0, Units("task", torch.tensor([0]), torch.tensor([0]), torch.ones(1)), routing)).measure(names(3))
    assert values["route/0/z_max"] == 4
    assert values["route/0/z_mean"] == pytest.approx(float(z[0, :2].logsumexp(-1)) ** 2)


def test_two_tallies_merged_are_one() -> None:
    of = torch.arange(120) % 3
    parts = [record(drawn(120, 4, seed), of, per_example=3, k=2, block=block) for seed in (1, 2) for block in (0, 2)]
    tallies = [RoutingTally(3, {0: 4, 2: 4}) for _ in range(3)]
    for i, part in enumerate(parts):
        tallies[0].add(part)
        tallies[1 + i // 2].add(part)
    one, two = tallies[0], merge(tallies[1:])
    assert two.measure(names(3)) == pytest.approx(one.measure(names(3)), abs=1e-12)
    for name, array in one.arrays(names(3)).items():
        np.testing.assert_allclose(two.arrays(names(3))[name], array) if array.dtype.kind == "f" else None
        assert array.dtype.kind == "f" or (two.arrays(names(3))[name] == array).all()


def test_tasks_that_were_not_met_do_not_count() -> None:
    p, of = drawn(80, 4), torch.arange(80) % 2
    values = tally_of(record(p, of)).measure(names(3), draws=5)
    assert values["route/0/nmi"] == pytest.approx(tally_of(record(p, of), tasks=2).measure(names(2), draws=5)["route/0/nmi"])
    assert "route/task/toy/2/eff_experts" not in values


def test_one_expert_and_one_task_are_not_special() -> None:
    values = tally_of(record(torch.ones(5, 1), torch.zeros(5, dtype=torch.int64)), tasks=1, experts=1).measure(["a"], draws=3)
    assert values["route/0/entropy"] == values["route/0/nmi"] == values["route/0/mi_bias"] == 0
    assert values["route/0/effective_experts"] == 1 and all(map(math.isfinite, values.values()))


def test_churn_is_the_share_of_probed_units_that_moved() -> None:
    p, of = drawn(90, 4, sharpness=3.0), torch.arange(90) % 3
    moved = p.clone()
    moved[:30] = moved[:30].roll(1, -1)
    before, now = (tally_of(record(x, of)).arrays(names(3)) for x in (p, moved))
    assert churn(before, now) == {"route/0/churn": pytest.approx(1 / 3)}
    assert churn(before, before) == {"route/0/churn": 0}
    assert churn(tally_of(record(p, of, block=1)).arrays(names(3)), now) == {}


def test_measuring_needs_no_autocast_precision_of_its_own() -> None:
    p, of = drawn(60, 4), torch.arange(60) % 3
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = tally_of(record(p, of)).measure(names(3), draws=3)
    assert inside == tally_of(record(p, of)).measure(names(3), draws=3)


@pytest.mark.parametrize("name", CATALOGUE)
def test_measurements_keep_their_ranges_for_every_router(name: str) -> None:
    experts = 4
    network = tiny_network(TaskMoEConfig(num_experts=experts, router=CATALOGUE[name])).eval()
    batch = tiny_batch(range(len(HEADS)), rows=3)
    records: list[Record] = []
    with torch.no_grad():
        network.losses(batch, records)
    tally = tally_of(*records, tasks=len(HEADS), experts=experts)
    tasks = [head.name for head in HEADS]
    values, arrays = tally.measure(tasks, draws=9), tally.arrays(tasks)
    assert all(map(math.isfinite, values.values()))
    for block in (0, 1):
        found = {key.rpartition("/")[2]: value for key, value in values.items() if key.startswith(f"route/{block}/")}
        assert found["i_task"] + found["i_input"] + found["h_residual"] == pytest.approx(found["h_expert"], abs=1e-9)
        assert min(found["i_task"], found["i_input"], found["h_residual"]) > -1e-5
        for share in ("entropy", "nmi", "margin", "dropped", "unrouted"):
            assert -1e-6 <= found[share] <= 1 + 1e-6, share
        assert 1 <= found["effective_experts"] <= experts + 1e-9 and 0 <= found["max_violation"] <= experts - 1 + 1e-9
        assert sum(found[f"utilisation_{e}"] for e in range(experts)) == pytest.approx(1)
        np.testing.assert_allclose(arrays[f"q/{block}"].sum(1), arrays[f"units/{block}"], rtol=1e-5)
        kinds = {record.units.kind for record in records if record.block == block}
        if kinds == {"token"}:
            assert arrays[f"units/{block}"].sum() == batch.attention_mask.sum()  # padding is never counted
        assert ("mi_null_p" in found) == (kinds != {"task"})
    if CATALOGUE[name].capacity is None:
        assert values["route/0/dropped"] == 0
