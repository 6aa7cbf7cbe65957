"""Laws that every router keeps, whatever its kind: one contract over the whole catalogue (helpers.CATALOGUE)."""

from dataclasses import replace

import pytest
import torch
from helpers import CATALOGUE, HEADS, losses, one_group, shake, tiny_batch, tiny_network, wider

from lightning_modules.config import AdapterMoEConfig, DenseConfig, ModelConfig, RouterConfig, TaskMoEConfig
from lightning_modules.network.model import MultiTaskNetwork, count_parameters
from lightning_modules.network.routers.record import Record
from lightning_modules.router_config import LEARNED

MODELS: dict[str, ModelConfig] = {
    f"{family}-{name}": config(router=router, **sizes)
    for family, config, sizes in (("task_moe", TaskMoEConfig, {}), ("adapter_moe", AdapterMoEConfig, {"bottleneck": 3}))
    for name, router in CATALOGUE.items()
}
REFORMS = ("mod_squad", "token_capacity", "expert_choice", "task_expert_choice", "soft_moe")
"""What does not compute a dense block with equal experts: raw weights, dropped tokens, mixed tokens."""
TASKS = [0, 1, 2, 3]


def name_of(model: str) -> str:
    return model.partition("-")[2]


def scored(network: MultiTaskNetwork) -> MultiTaskNetwork:
    return network.eval()


def routed(network: MultiTaskNetwork, tasks: list[int] = TASKS) -> list[Record]:
    records: list[Record] = []
    network.losses(tiny_batch(tasks), records)
    return records


@pytest.mark.parametrize("name", CATALOGUE)
def test_equal_experts_compute_what_dense_computes(name: str) -> None:
    if name in REFORMS:
        pytest.skip("reforms the block by its definition")
    model = TaskMoEConfig(expert_noise=0.0, router=CATALOGUE[name])
    batch = tiny_batch(TASKS)
    for training in (False, True):
        network, dense = tiny_network(model).train(training), tiny_network(DenseConfig()).train(training)
        torch.testing.assert_close(losses(network, batch), losses(dense, batch), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", CATALOGUE)
def test_one_expert_is_dense(name: str) -> None:
    router = replace(CATALOGUE[name], top_k=1, experts_of={})
    if router.weighting == "renormalise":
        pytest.skip("refused with one expert")
    model = TaskMoEConfig(num_experts=1, expert_noise=0.0, router=router)
    if router.kind in ("task_id", "category"):
        model = replace(model, router=replace(router, experts_of={head.name: 0 for head in HEADS}))
    batch = tiny_batch(TASKS)
    torch.testing.assert_close(losses(tiny_network(model), batch), losses(tiny_network(DenseConfig()), batch))


@pytest.mark.parametrize("model", MODELS)
def test_the_record_keeps_its_laws(model: str) -> None:
    network = tiny_network(MODELS[model])
    shake(network)
    batch = tiny_batch(TASKS)
    real = int(batch.attention_mask.sum())
    for training in (True, False):
        records = routed(network.train(training))
        assert [record.block for record in records] == [0, 1]
        for record in records:
            units, routing = record.units, record.routing
            assert len(units.task) == {"task": 4, "example": 8, "token": real}[units.kind]
            assert units.weight.sum().item() == pytest.approx(1.0, abs=1e-5)
            assert routing.weights.dtype == routing.probabilities.dtype == torch.float32
            torch.testing.assert_close(routing.probabilities.sum(-1), torch.ones(len(units.task)), atol=1e-5, rtol=0)
            assert (routing.weights >= 0).all() and (routing.probabilities >= 0).all()
            ran = torch.zeros(len(units.task), 5).scatter(-1, routing.chosen % 5, 1.0)[:, :4].bool()
            assert not (routing.weights[~ran] != 0).any()
            covered = [range(start, stop) for _, start, stop in units.groups]
            assert [u for group in covered for u in group] == list(range(len(units.task)))
            for task, start, stop in units.groups:
                assert (units.task[start:stop] == task).all()


@pytest.mark.parametrize("model", MODELS)
def test_scoring_draws_nothing(model: str) -> None:
    network = scored(tiny_network(MODELS[model]))
    shake(network)
    state = torch.get_rng_state()
    batch = tiny_batch(TASKS)
    first, second = losses(network, batch), losses(network, batch)
    assert torch.equal(first, second)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("model", MODELS)
def test_padding_changes_nothing(model: str) -> None:
    network = scored(tiny_network(MODELS[model]))
    shake(network)
    batch = tiny_batch(TASKS)
    torch.testing.assert_close(losses(network, wider(batch, 5)), losses(network, batch), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("model", MODELS)
def test_batch_mates_change_nothing_when_scoring(model: str) -> None:
    network = scored(tiny_network(MODELS[model]))
    shake(network)
    batch = tiny_batch(TASKS)
    apart = torch.cat([losses(network, one_group(batch, i)) for i in range(len(TASKS))])
    torch.testing.assert_close(losses(network, batch), apart, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("model", MODELS)
def test_learned_routers_have_a_gradient_and_the_others_nothing_to_learn(model: str) -> None:
    network, config = tiny_network(MODELS[model]), CATALOGUE[name_of(model)]
    shake(network)
    own = [parameter for key, parameter in network.named_parameters() if key.startswith("routers.")]
    assert bool(own) == (config.kind in LEARNED)
    assert network.routers is not None
    network.routers.begin(0)
    torch.manual_seed(0)
    records: list[Record] = []
    each = network.losses(tiny_batch(TASKS), records)
    total = torch.cat(each).sum()
    if config.selection == "sampled":
        total = total + sum(network.routers.policy_loss(record, torch.cat(each)[record.units.example]) for record in records)
    total.backward()
    for parameter in own:
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0


@pytest.mark.parametrize("model", MODELS)
def test_a_masked_expert_gets_nothing(model: str) -> None:
    network = scored(tiny_network(MODELS[model]))
    shake(network)
    if name_of(model) == "soft_moe":
        pytest.skip("its slots cannot be masked one by one")
    assert network.routers is not None
    before = [record.routing.weights for record in routed(network)]
    network.routers.masked = {0: {1}, 1: {0, 2}}
    after = [record.routing.weights for record in routed(network)]
    assert (after[0][:, 1] == 0).all() and (after[1][:, [0, 2]] == 0).all()
    if name_of(model) not in REFORMS:
        torch.testing.assert_close(after[0].sum(-1), before[0].sum(-1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("model", MODELS)
def test_a_saved_network_comes_back(model: str) -> None:
    network, other = tiny_network(MODELS[model]), tiny_network(MODELS[model], seed=5)
    shake(network)
    assert network.routers is not None and other.routers is not None
    network.routers.begin(17)
    other.load_state_dict(network.state_dict())
    assert other.routers.temperature == network.routers.temperature
    batch = tiny_batch(TASKS)
    assert torch.equal(losses(scored(other), batch), losses(scored(network), batch))


@pytest.mark.parametrize("model", MODELS)
def test_building_leaves_the_global_stream_alone(model: str) -> None:
    state = torch.get_rng_state()
    tiny_network(MODELS[model])
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("model", MODELS)
def test_parameters_are_counted(model: str) -> None:
    network = tiny_network(MODELS[model])
    counts = count_parameters(network, len(HEADS))
    assert 0 < counts["active"] <= counts["total"] == sum(p.numel() for p in network.parameters())


def test_the_temperature_is_a_function_of_the_step_alone() -> None:
    router = RouterConfig(temperature=300.0, temperature_min=1.0, temperature_decay=1e-4)
    assert router.temperature_at(15000) == pytest.approx(66.9, abs=0.1)
    assert router.temperature_at(45000) == pytest.approx(3.33, abs=0.01) and router.temperature_at(60000) == 1.0


@pytest.mark.parametrize("name", ["random", "hash_token", "hash_example", "task_id", "cluster", "category"])
def test_who_did_not_use_a_masked_expert_keeps_the_route(name: str) -> None:
    network = scored(tiny_network(TaskMoEConfig(router=CATALOGUE[name])))
    assert network.routers is not None
    before = [record.routing for record in routed(network)]
    network.routers.masked = {0: {1}, 1: {1}}
    for was, record in zip(before, routed(network), strict=True):
        kept = was.chosen[:, 0] != 1
        assert kept.any() and torch.equal(record.routing.weights[kept], was.weights[kept])


def test_the_load_of_tasks_is_that_of_all_that_are_trained() -> None:
    """Over the two tasks of a step, four experts could not be balanced without every task using all of them."""
    router = RouterConfig(balance="load", balance_weight=1.0)
    network = tiny_network(TaskMoEConfig(router=router))
    assert network.routers is not None and network.routers.network is not None
    with torch.no_grad():
        for rows in network.routers.network.parameters():
            rows.copy_(30 * torch.eye(4))
    own = network.routers.step_loss(TASKS)
    assert own is not None and own.item() == pytest.approx(1.0, abs=1e-5)
    few = network.routers.step_loss([0, 1])
    assert few is not None and few.item() == pytest.approx(2.0, abs=1e-5)


@pytest.mark.parametrize("selection", ["soft", "gumbel", "skills"])
def test_the_load_of_soft_weights_is_what_each_expert_contributes(selection: str) -> None:
    network = tiny_network(TaskMoEConfig(router=RouterConfig(selection=selection, balance="load", balance_weight=1.0)))
    assert network.routers is not None and network.routers.network is not None
    with torch.no_grad():
        for rows in network.routers.network.parameters():
            rows.copy_(torch.tensor([30.0, -30.0, -30.0, -30.0]).expand(4, -1))
    loss = network.routers.eval().step_loss(TASKS)
    assert loss is not None and loss.item() == pytest.approx(4.0, abs=1e-4)
