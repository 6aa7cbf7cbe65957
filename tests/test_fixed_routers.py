"""Routers that learn nothing: what they choose, and that nothing moves them but what should."""

from threading import Barrier, Thread
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_modules.building import ConfigError
from lightning_modules.network.routers.fixed import (
    ClusterRouter,
    FixedTaskRouter,
    HashExampleRouter,
    HashTokenRouter,
    RandomExampleRouter,
)
from lightning_modules.network.routers.record import Routing
from lightning_modules.router_config import RouterConfig
from lightning_modules.seeds import derive

NAMES = tuple("abcdefgh")
BLOCKS = {1: 4, 3: 2}
WIDTH = 16


def fixed(kind: Any, names: tuple[str, ...] = NAMES, seed: int = 0, **settings: Any) -> FixedTaskRouter:
    blocks = settings.pop("blocks", BLOCKS)
    return FixedTaskRouter(RouterConfig(kind=kind, **settings), names, blocks, seed)


def every() -> dict[str, tuple[nn.Module, tuple[Any, ...]]]:
    """Name -> router and an input of 6 units."""
    ids = torch.arange(24).reshape(6, 4)
    task_ids = torch.arange(6)
    full = {f"{n}": i % 2 for i, n in enumerate(NAMES)}
    return {
        "uniform": (fixed("uniform"), (task_ids,)),
        "random": (fixed("random"), (task_ids,)),
        "task_id": (fixed("task_id", experts_of=full), (task_ids,)),
        "category": (fixed("category", experts_of=full), (task_ids,)),
        "hash_token": (HashTokenRouter(100, 4, 1, 0), (torch.arange(6),)),
        "hash_example": (HashExampleRouter(4, 1, 0), (ids, torch.ones(6, 4, dtype=torch.bool))),
        "random_example": (RandomExampleRouter(4), (6, torch.device("cpu"))),
        "cluster": (ClusterRouter(4, WIDTH, 1, 0), (torch.randn(6, WIDTH),)),
    }


def routings(router: nn.Module, inputs: tuple[Any, ...]) -> list[Routing]:
    answer = router(*inputs)
    return list(answer.values()) if isinstance(answer, dict) else [answer]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", every())
def test_the_record_is_lawful_and_nothing_is_learned(name: str, training: bool) -> None:
    router, inputs = every()[name]
    assert not list(router.parameters())
    router.train(training)
    for routing in routings(router, inputs):
        units, experts = routing.weights.shape
        assert units == 6 and routing.chosen.dtype == torch.int64
        for rows in (routing.weights, routing.probabilities):
            assert rows.dtype == torch.float32 and not rows.requires_grad
            torch.testing.assert_close(rows.sum(-1), torch.ones(units))
        torch.testing.assert_close(routing.logits.softmax(-1), routing.probabilities)
        marked = torch.zeros(units, experts).scatter(-1, routing.chosen, 1.0)
        assert torch.equal(marked.bool(), routing.weights > 0)


@pytest.mark.parametrize("name", [n for n in every() if n != "random_example"])
def test_calls_move_nothing_and_the_state_restores_the_routes(name: str) -> None:
    router, inputs = every()[name]
    before = {key: value.clone() for key, value in router.state_dict().items()}
    first = routings(router, inputs)
    assert all(torch.equal(a.weights, b.weights) for a, b in zip(first, routings(router, inputs), strict=True))
    assert all(torch.equal(value, before[key]) for key, value in router.state_dict().items())
    other = {
        "uniform": fixed("uniform", seed=9),
        "random": fixed("random", seed=9),
        "task_id": fixed("task_id", experts_of=dict.fromkeys(NAMES, 0)),
        "category": fixed("category", experts_of=dict.fromkeys(NAMES, 0)),
        "hash_token": HashTokenRouter(100, 4, 1, 9),
        "hash_example": HashExampleRouter(4, 1, 9),
        "cluster": ClusterRouter(4, WIDTH, 1, 9),
    }[name]
    other.load_state_dict(before)
    assert all(torch.equal(a.weights, b.weights) for a, b in zip(first, routings(other, inputs), strict=True))


@pytest.mark.parametrize(
    "experts, block, seed, expected",
    [
        (4, 0, 0, [2, 1, 3, 1, 0, 2, 3, 1]),
        (4, 3, 0, [3, 1, 3, 0, 0, 0, 3, 1]),
        (8, 1, 7, [3, 4, 6, 5, 5, 5, 0, 6]),
        (3, 11, 123, [0, 0, 0, 0, 2]),
    ],
)
def test_random_draws_stay_what_they_were(experts: int, block: int, seed: int, expected: list[int]) -> None:
    """Numbers of the class that this one replaced: trials with random routes keep their numbers."""
    names = NAMES[: len(expected)]
    router = fixed("random", names, seed, blocks={block: experts, 40: 2})
    routing = router(torch.arange(len(names)))[block]
    assert routing.chosen.squeeze(-1).tolist() == expected
    assert torch.equal(routing.weights, torch.eye(experts)[expected])
    assert torch.equal(routing.probabilities, routing.weights)
    more = fixed("random", (*names, "more", "tasks"), seed, blocks={block: experts})
    assert more(torch.arange(len(names)))[block].chosen.squeeze(-1).tolist() == expected


def test_uniform_weighs_all_experts_alike() -> None:
    routes = fixed("uniform")(torch.tensor([5, 0]))
    assert list(routes) == [1, 3]
    assert torch.equal(routes[1].weights, torch.full((2, 4), 0.25)) and routes[1].chosen.tolist() == [[0, 1, 2, 3]] * 2
    assert torch.equal(routes[3].weights, torch.full((2, 2), 0.5))
    assert not fixed("uniform").state_dict()


@pytest.mark.parametrize("kind", ["task_id", "category"])
def test_task_id_follows_the_map_or_the_task_number(kind: str) -> None:
    router = fixed(kind, ("x", "y", "z"), experts_of={"z": 0}, blocks={1: 2, 3: 4})
    for routing in router(torch.tensor([2, 1, 0])).values():
        assert routing.chosen.tolist() == [[0], [1], [0]]


@pytest.mark.parametrize("kind", ["task_id", "category"])
def test_an_expert_that_a_block_lacks_is_refused(kind: str) -> None:
    with pytest.raises(ConfigError, match=r"below the 2 of block 3 .*got c: 2") as error:
        fixed(kind, ("a", "b", "c"))
    assert error.value.key == "model.router.experts_of"
    with pytest.raises(ConfigError, match="got a: 7"):
        fixed(kind, ("a",), experts_of={"a": 7})


@pytest.mark.parametrize("vocabulary, experts", [(1000, 8), (1001, 3), (5, 4)])
def test_hash_token_table_is_balanced_and_frozen(vocabulary: int, experts: int) -> None:
    router = HashTokenRouter(vocabulary, experts, 1, 0)
    assert [name for name, _ in router.named_buffers()] == ["table"]
    counts = torch.bincount(router.table, minlength=experts)
    assert counts.max() - counts.min() <= 1
    ids = torch.tensor([3, 1, 3, 0])
    chosen = router(ids).chosen.squeeze(-1)
    assert torch.equal(chosen, router.table[ids]) and chosen[0] == chosen[2]
    if vocabulary == 1000:
        for other in (HashTokenRouter(vocabulary, experts, 2, 0), HashTokenRouter(vocabulary, experts, 1, 1)):
            assert 0.05 < (other.table == router.table).float().mean() < 0.25, "1/E agree by chance"


def rows_of(count: int, length: int = 12) -> Tensor:
    return torch.randint(5, 300, (count, length), generator=torch.Generator().manual_seed(0))


def chosen_by(router: HashExampleRouter, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    return router(ids, torch.ones_like(ids, dtype=torch.bool) if mask is None else mask).chosen.squeeze(-1)


def test_hash_example_reads_content_and_neither_padding_nor_batch_mates() -> None:
    router, ids = HashExampleRouter(1000, 1, 0), rows_of(50)
    plain = chosen_by(router, ids)
    for left, right, fill in ((0, 7, 0), (5, 0, 0), (2, 3, 77)):
        mask = functional.pad(torch.ones_like(ids, dtype=torch.bool), (left, right))
        assert torch.equal(chosen_by(router, functional.pad(ids, (left, right), value=fill), mask), plain)
    assert torch.equal(chosen_by(router, ids[[7, 3]]), plain[[7, 3]])
    assert torch.equal(chosen_by(router, ids.clone()), plain)


def test_hash_example_tells_order_tokens_and_length_apart() -> None:
    router, ids = HashExampleRouter(1000, 1, 0), rows_of(200)
    plain = chosen_by(router, ids)
    changed = ids.clone()
    changed[:, 6] += 1
    swapped = ids[:, [1, 0, *range(2, 12)]]
    for other in (ids.flip(-1), swapped, changed, ids[:, :-1]):
        assert (chosen_by(router, other) == plain).float().mean() < 0.03


def test_hash_example_spreads_rows_evenly_by_seed_and_block() -> None:
    ids = rows_of(8000)
    first, elsewhere, seeded = (chosen_by(HashExampleRouter(8, b, s), ids) for b, s in ((1, 0), (2, 0), (1, 1)))
    shares = torch.bincount(first, minlength=8) / len(ids)
    assert (shares - 1 / 8).abs().max() < 0.015  # four standard errors
    for other in (elsewhere, seeded):
        assert abs((other == first).float().mean() - 1 / 8) < 0.015
    neighbours = torch.arange(8000).unsqueeze(-1).expand(-1, 3)
    shares = torch.bincount(chosen_by(HashExampleRouter(8, 1, 0), neighbours), minlength=8) / 8000
    assert (shares - 1 / 8).abs().max() < 0.015


def splitmix(x: int) -> int:
    word = (1 << 64) - 1
    x &= word
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & word
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & word
    return x ^ (x >> 31)


def test_hash_example_computes_its_formula_in_unbounded_integers_too() -> None:
    ids, salt = rows_of(100), derive(5, "router", 3)
    expected = []
    for row in ids.tolist():
        total = sum(splitmix(token + place * 0x9E3779B97F4A7C15 + salt) for place, token in enumerate(row, 1))
        expected.append((splitmix(total + salt) & ((1 << 63) - 1)) % 7)
    assert chosen_by(HashExampleRouter(7, 3, 5), ids).tolist() == expected
    assert chosen_by(HashExampleRouter(8, 1, 0), torch.arange(24).reshape(6, 4)).tolist() == [6, 4, 0, 6, 1, 0]


def test_random_example_draws_afresh_in_training_and_averages_when_scoring() -> None:
    router, cpu = RandomExampleRouter(4), torch.device("cpu")
    torch.manual_seed(0)
    routing = router(20_000, cpu)
    second = routing.terms["second"]
    for weights in (routing.weights, second):
        assert set(weights.unique().tolist()) == {0.0, 1.0} and (weights.sum(-1) == 1).all()
        assert (weights.mean(0) - 0.25).abs().max() < 0.0125  # four standard errors
    assert abs((routing.weights * second).sum(-1).mean() - 0.25) < 0.0125, "independent"
    assert not torch.equal(router(20_000, cpu).weights, routing.weights)
    torch.manual_seed(0)
    assert torch.equal(router(20_000, cpu).weights, routing.weights)
    router.eval()
    before = torch.get_rng_state()
    scoring = router(3, cpu)
    assert torch.equal(scoring.weights, torch.full((3, 4), 0.25)) and not scoring.terms
    assert torch.equal(torch.get_rng_state(), before)


def itself(tensor: Tensor) -> Tensor:
    return tensor


def clusters(step: int, rows: int = 30, count: int = 3) -> tuple[Tensor, Tensor]:
    """Rows around ``count`` directions, all far along one common direction as the states of an encoder are; true numbers."""
    fixed_ = torch.Generator().manual_seed(11)
    common = 5 * torch.randn(WIDTH, generator=fixed_)
    centres = common + 3 * torch.randn(count, WIDTH, generator=fixed_)
    generator = torch.Generator().manual_seed(100 + step)
    true = torch.randint(count, (rows,), generator=generator)
    return centres[true] + 0.3 * torch.randn(rows, WIDTH, generator=generator), true


def same_partition(chosen: Tensor, true: Tensor, count: int = 3) -> bool:
    pairs = {(int(c), int(t)) for c, t in zip(chosen, true, strict=True)}
    return len(pairs) == count and len({c for c, _ in pairs}) == count


def trained(router: ClusterRouter, steps: range) -> ClusterRouter:
    router.train()
    for step in steps:
        router.observe(clusters(step)[0])
        router.update(itself)
    return router


@pytest.mark.parametrize("seed", range(20))
def test_cluster_recovers_separated_clusters_and_its_state_survives(seed: int) -> None:
    x, true = clusters(99, rows=60)
    router = ClusterRouter(3, WIDTH, 1, seed)
    assert not same_partition(router(x).chosen.squeeze(-1), true)
    trained(router, range(5))
    assert same_partition(router(x).chosen.squeeze(-1), true)
    cosines = functional.cosine_similarity(x.unsqueeze(1), router.centroids.unsqueeze(0), dim=-1)
    assert torch.equal(router(x).chosen.squeeze(-1), cosines.argmax(-1))
    banned = cosines.clone()
    banned[:, 0] = -2
    assert torch.equal(router(x, {0}).chosen.squeeze(-1), banned.argmax(-1))

    other = ClusterRouter(3, WIDTH, 1, seed + 1)
    other.load_state_dict(router.state_dict())
    assert torch.equal(other(x).weights, router(x).weights)
    trained(other, range(5, 8))
    trained(router, range(5, 8))
    assert torch.equal(other.centroids, router.centroids)


def test_a_centroid_moves_a_hundredth_of_the_way_to_the_mean_of_what_it_won() -> None:
    router = trained(ClusterRouter(3, WIDTH, 1, 0), range(3))
    before = router.centroids.clone()
    x, _ = clusters(50)
    chosen = router(x).chosen.squeeze(-1)
    won = int(chosen[0])
    mine = x[chosen == won]
    router.observe(mine[:1])
    router.observe(mine[1:])
    router.update(itself)
    torch.testing.assert_close(router.centroids[won], 0.99 * before[won] + 0.01 * mine.mean(0))
    rest = [e for e in range(3) if e != won]
    assert torch.equal(router.centroids[rest], before[rest]), "a centroid that won nothing stays"
    after = router.centroids.clone()
    router.update(itself)
    assert torch.equal(router.centroids, after), "a step's sums are used once"


def test_scoring_observes_nothing_and_a_first_step_without_rows_is_no_first_step() -> None:
    router = ClusterRouter(3, WIDTH, 1, 0)
    start = router.centroids.clone()
    router.update(itself)
    router.eval()
    router.observe(clusters(0)[0])
    router.update(itself)
    assert torch.equal(router.centroids, start) and not router.initialised
    trained(router, range(1))
    assert router.initialised
    moved = router.centroids.clone()
    router.eval()
    router.observe(clusters(1)[0])
    router.update(itself)
    assert torch.equal(router.centroids, moved)


def test_equal_rows_leave_no_two_centroids_equal() -> None:
    router = ClusterRouter(4, WIDTH, 1, 0)
    router.observe(torch.ones(3, WIDTH))
    router.update(itself)
    assert router.centroids.isfinite().all() and len(router.centroids.unique(dim=0)) == 4


def test_cluster_computes_in_float32_under_autocast() -> None:
    router = trained(ClusterRouter(3, WIDTH, 1, 0), range(3))
    x, true = clusters(9)
    expected = router(x.bfloat16().float()).logits
    with torch.autocast("cpu", torch.bfloat16):
        router.observe(x.bfloat16())
        assert torch.equal(router(x.bfloat16()).logits, expected)
    router.update(itself)
    assert router.centroids.dtype == torch.float32
    assert same_partition(router(x).chosen.squeeze(-1), true)


def test_workers_agree_with_one_that_sees_all() -> None:
    """Two workers, one without rows in the first step, each with a share of the others."""
    alone = ClusterRouter(4, WIDTH, 1, 0)
    workers = [ClusterRouter(4, WIDTH, 1, 0) for _ in range(2)]
    barrier, slots = Barrier(2, timeout=60), [torch.empty(0)] * 2

    def work(rank: int) -> None:
        def reduce(tensor: Tensor) -> Tensor:
            slots[rank] = tensor
            barrier.wait()
            total = slots[0] + slots[1]
            barrier.wait()
            return total

        for step in range(3):
            x = clusters(step)[0]
            if step > 0 or rank == 0:
                share = x if step == 0 else x[rank::2]
                workers[rank].observe(share[:4])
                workers[rank].observe(share[4:])
            workers[rank].update(reduce)

    threads = [Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    trained(alone, range(3))
    for thread in threads:
        thread.join()
    assert torch.equal(workers[0].centroids, workers[1].centroids)
    torch.testing.assert_close(workers[0].centroids, alone.centroids)
