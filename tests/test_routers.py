"""Every router keeps the record's laws."""

import math

import pytest
import torch
from helpers import LEARNED, ROUTERS

from lightning_modules.config import RouterConfig
from lightning_modules.measure import routing as measure
from lightning_modules.network.routers import Routing, TaskRouter, build_router, mutual_information_loss, select

TASKS, EXPERTS = 5, 4
IDS = torch.arange(TASKS)


def route(config: RouterConfig, seed: int = 0, tasks: int = TASKS, layer: int = 0) -> Routing:
    return build_router(config, tasks, EXPERTS, layer, seed)(torch.arange(tasks))


@pytest.mark.parametrize("name", ROUTERS)
def test_rows_are_distributions_over_the_chosen(name: str) -> None:
    routing = route(ROUTERS[name])
    for rows in (routing.weights, routing.probabilities):
        assert rows.shape == (TASKS, EXPERTS) and rows.dtype == torch.float32
        torch.testing.assert_close(rows.sum(-1), torch.ones(TASKS))
        assert (rows >= 0).all()
    chosen = torch.zeros(TASKS, EXPERTS).scatter(-1, routing.chosen, 1.0)
    assert torch.equal(chosen.bool(), routing.weights > 0)
    temperature = ROUTERS[name].temperature
    torch.testing.assert_close((routing.logits / temperature).softmax(-1), routing.probabilities)


@pytest.mark.parametrize("name, count", [("top_1", 1), ("top_2", 2), ("soft", 4), ("random", 1), ("uniform", 4)])
def test_as_many_experts_run_as_the_selection_says(name: str, count: int) -> None:
    routing = route(ROUTERS[name])
    assert routing.chosen.shape == (TASKS, count)
    assert ((routing.weights > 0).sum(-1) == count).all()


@pytest.mark.parametrize("name", ROUTERS)
def test_a_row_depends_on_its_task_alone(name: str) -> None:
    router = build_router(ROUTERS[name], TASKS, EXPERTS, 0, seed=0)
    whole, some = router(IDS), router(torch.tensor([3, 1, 3]))
    torch.testing.assert_close(some.weights, whole.weights[[3, 1, 3]])
    torch.testing.assert_close(some.chosen, whole.chosen[[3, 1, 3]])


@pytest.mark.parametrize("name", ROUTERS)
def test_the_seed_decides_and_other_tasks_do_not_matter(name: str) -> None:
    routing = route(ROUTERS[name])
    torch.testing.assert_close(route(ROUTERS[name]).weights, routing.weights)
    torch.testing.assert_close(route(ROUTERS[name], tasks=TASKS + 20).weights[:TASKS], routing.weights)
    if name != "uniform":
        assert not torch.equal(route(ROUTERS[name], seed=1, tasks=20).logits, route(ROUTERS[name], tasks=20).logits)
        assert not torch.equal(route(ROUTERS[name], layer=1, tasks=20).logits, route(ROUTERS[name], tasks=20).logits)


@pytest.mark.parametrize("name", ROUTERS)
def test_learned_routers_have_one_parameter_and_the_controls_none(name: str) -> None:
    router = build_router(ROUTERS[name], TASKS, EXPERTS, 0, seed=0)
    sizes = [tuple(p.shape) for p in router.parameters()]
    assert sizes == ([(TASKS, EXPERTS)] if name in LEARNED else [])


@pytest.mark.parametrize("name", LEARNED)
def test_the_gradient_reaches_the_routed_tasks_only(name: str) -> None:
    router = build_router(LEARNED[name], TASKS, EXPERTS, 0, seed=0)
    values = torch.arange(float(EXPERTS)).square()
    (router(torch.tensor([2])).weights @ values).sum().backward()
    assert isinstance(router, TaskRouter) and router.logits.grad is not None
    assert router.logits.grad[2].abs().sum() > 1e-3
    assert router.logits.grad[[0, 1, 3, 4]].abs().sum() == 0


def test_the_straight_through_weight_is_one_with_the_gradient_of_the_probability() -> None:
    probabilities = torch.tensor([[0.1, 0.6, 0.3]], requires_grad=True)
    weights, chosen = select(probabilities, 1)
    assert weights.tolist() == [[0.0, 1.0, 0.0]] and chosen.tolist() == [[1]]
    weights.sum().backward()
    assert probabilities.grad is not None and probabilities.grad.tolist() == [[0.0, 1.0, 0.0]]


def test_two_chosen_are_renormalised() -> None:
    weights, chosen = select(torch.tensor([[0.1, 0.6, 0.3]]), 2)
    torch.testing.assert_close(weights, torch.tensor([[0.0, 2 / 3, 1 / 3]]))
    assert chosen.tolist() == [[1, 2]]


def test_all_experts_chosen_is_soft() -> None:
    soft = route(LEARNED["soft"])
    everyone = route(RouterConfig(init_std=1.0, top_k=EXPERTS))
    torch.testing.assert_close(everyone.weights, soft.weights)
    assert torch.equal(everyone.chosen, soft.chosen)


def test_a_low_temperature_sharpens() -> None:
    assert (route(LEARNED["soft_cold"]).weights.amax(-1) > route(LEARNED["soft"]).weights.amax(-1)).all()


def test_routing_stays_float32_under_autocast() -> None:
    router = build_router(LEARNED["top_2"], TASKS, EXPERTS, 0, seed=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = router(IDS)
    assert routing.weights.dtype == routing.logits.dtype == torch.float32
    assert torch.equal(routing.weights, router(IDS).weights)


def routing_of(probabilities: torch.Tensor) -> Routing:
    return Routing(probabilities, probabilities.argsort(-1, descending=True), probabilities, probabilities.log())


def test_mutual_information_at_its_extremes() -> None:
    assert mutual_information_loss(routing_of(torch.eye(4))).item() == pytest.approx(-math.log(4))
    assert mutual_information_loss(routing_of(torch.full((4, 4), 0.25))).item() == pytest.approx(0, abs=1e-7)
    collapsed = torch.zeros(4, 4).index_fill(1, torch.tensor([2]), 1.0)
    assert mutual_information_loss(routing_of(collapsed)).item() == pytest.approx(0, abs=1e-7)


def test_mutual_information_is_that_of_the_measurement_and_its_gradient_separates_tasks() -> None:
    router = build_router(RouterConfig(init_std=0.5, selection="soft"), 4, 4, 0, seed=0)
    assert isinstance(router, TaskRouter)
    routing = router(torch.arange(4))
    table = measure.table_of(routing)
    assert mutual_information_loss(routing).item() == pytest.approx(-measure.mutual_information(table), abs=1e-6)
    for _ in range(300):
        router.logits.grad = None
        mutual_information_loss(router(torch.arange(4))).backward()
        with torch.no_grad():
            router.logits -= 5 * router.logits.grad  # type: ignore[operator]
    assert sorted(router(torch.arange(4)).probabilities.argmax(-1).tolist()) == [0, 1, 2, 3]


def test_one_task_has_no_mutual_information() -> None:
    router = build_router(LEARNED["soft"], TASKS, EXPERTS, 0, seed=0)
    loss = mutual_information_loss(router(IDS[:1]))
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-7)
    assert all(p.grad is not None and p.grad.abs().max() < 1e-7 for p in router.parameters())
