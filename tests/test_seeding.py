"""Tasks that were never trained take the routes of those that were (specs/task_aware_gating.md 6.2; section 11, test 11)."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_modules.network.routers.seeding import Seeding, donor_shares, seed_rows
from lightning_modules.network.routers.task_networks import build_task_network
from lightning_modules.network.routers.vectors import TaskVectors
from lightning_modules.router_config import RouterConfig

TASKS, WIDTH = 6, 9
TRAINED, UNSEEN = [0, 2, 3, 5], [4, 1]
VECTORS = torch.tensor([[1.0, 0.0], [2.0, 0.2], [0.0, 1.0], [-1.0, 0.0], [0.1, 3.0], [1.0, 1.0]])
"""Task 4 points where task 2 does, task 1 where task 0 does."""
DONORS = {4: 3, 1: 5}
KINDS: tuple[Seeding, ...] = ("uniform", "nearest_category", "nearest_vector", "soft_vector")


def gates(seed: int = 0) -> Tensor:
    """(T, experts, width): a weight matrix for each task."""
    return torch.randn(TASKS, 3, WIDTH, generator=torch.Generator().manual_seed(seed))


def shares_of(kind: Seeding) -> Tensor:
    return donor_shares(kind, TRAINED, UNSEEN, vectors=VECTORS, donors=DONORS)


@pytest.mark.parametrize("kind", KINDS)
def test_shares_are_distributions_over_the_trained(kind: Seeding) -> None:
    shares = shares_of(kind)
    assert shares.shape == (2, 4) and shares.dtype == torch.float32 and (shares >= 0).all()
    torch.testing.assert_close(shares.sum(-1), torch.ones(2))


def test_who_the_donors_are() -> None:
    assert shares_of("uniform").tolist() == [[0.25] * 4] * 2
    assert shares_of("nearest_category").tolist() == [[0, 0, 1, 0], [0, 0, 0, 1]]
    assert shares_of("nearest_vector").tolist() == [[0, 1, 0, 0], [1, 0, 0, 0]]
    cosines = [[VECTORS[u] @ VECTORS[s] / VECTORS[u].norm() / VECTORS[s].norm() for s in TRAINED] for u in UNSEEN]
    torch.testing.assert_close(shares_of("soft_vector"), (torch.tensor(cosines) / 0.1).softmax(-1))


@pytest.mark.parametrize("kind, donors", [("nearest_category", {4: 3, 1: 5}), ("nearest_vector", {4: 2, 1: 0})])
@pytest.mark.parametrize("as_list", [False, True])
def test_nearest_copies_the_donors_gate_bit_by_bit(kind: Seeding, donors: dict[int, int], as_list: bool) -> None:
    before = gates()
    rows = nn.Parameter(gates())
    seed_rows([*rows.unbind()] if as_list else rows, TRAINED, UNSEEN, shares_of(kind))
    states = torch.randn(20, WIDTH, generator=torch.Generator().manual_seed(1))
    for task, donor in donors.items():
        assert torch.equal(rows[task], before[donor])
        assert torch.equal(states @ rows[task].T, states @ before[donor].T)
    assert torch.equal(rows[TRAINED], before[TRAINED])


def test_uniform_is_the_mean_of_the_trained() -> None:
    before, rows = gates(), nn.Parameter(gates())
    seed_rows(rows, TRAINED, UNSEEN, shares_of("uniform"))
    torch.testing.assert_close(rows[UNSEEN].detach(), before[TRAINED].mean(0).expand(2, -1, -1))
    assert torch.equal(rows[TRAINED], before[TRAINED])
    assert rows.requires_grad and rows.is_leaf and rows.grad is None


def test_soft_is_the_weighted_sum() -> None:
    before, rows = gates(), gates()
    seed_rows(rows, TRAINED, UNSEEN, shares_of("soft_vector"))
    torch.testing.assert_close(rows[UNSEEN], torch.einsum("us,s...->u...", shares_of("soft_vector"), before[TRAINED]))


@pytest.mark.parametrize("network, kind", [("logits", "id"), ("linear", "id"), ("gru", "id"), ("transformer", "onehot")])
def test_a_task_with_its_donors_row_is_routed_as_its_donor(network: str, kind: str) -> None:
    settings: dict[str, Any] = {} if network == "logits" else {"task_vectors": kind}
    tasks = 8
    config = RouterConfig(**{"network": network, **settings})
    vectors = TaskVectors(config, tasks, None, 0) if config.reads_vectors else None
    module = build_task_network(config, tasks, {0: 3, 2: 4}, vectors, 0)
    tables = [vectors.rows] if vectors is not None else list(module.parameters())
    before = module(torch.tensor([4]))
    for rows in tables:
        seed_rows(rows, [0, 2, 3], [4], donor_shares("nearest_category", [0, 2, 3], [4], vectors=None, donors={4: 2}))
    donor, seeded = module(torch.tensor([2])), module(torch.tensor([4]))
    for block, logits in donor.items():
        assert torch.equal(seeded[block], logits) and not torch.equal(before[block], logits)


def test_rows_that_no_step_asked_for_are_still_the_draw_of_the_start() -> None:
    """Why the control ``random`` has nothing to write."""
    config = RouterConfig(network="linear")
    vectors = TaskVectors(config, TASKS, None, 0)
    module = build_task_network(config, TASKS, {0: 3}, vectors, 0)
    before = vectors.rows.detach().clone()
    optimizer = torch.optim.AdamW([*module.parameters(), *vectors.parameters()], lr=0.1, weight_decay=0.0)
    for task in TRAINED:
        optimizer.zero_grad()
        module(torch.tensor([task]))[0][:, 0].sum().backward()
        optimizer.step()
    assert torch.equal(vectors.rows[UNSEEN], before[UNSEEN])
    assert (vectors.rows[TRAINED] != before[TRAINED]).any(-1).all()


@pytest.mark.parametrize(
    "kind, trained, vectors, donors, law",
    [
        ("uniform", [], None, {}, "come from trained tasks"),
        ("nearest_category", TRAINED, None, {4: 3}, "task 1 needs a donor"),
        ("nearest_category", TRAINED, None, {4: 3, 1: 4}, "task 1 needs a donor among the trained .* got 4"),
        ("nearest_vector", TRAINED, None, {}, "compares task vectors, got none"),
        ("soft_vector", TRAINED, torch.eye(TASKS), {}, "task 4 has cosine 0 to all"),
    ],
)
def test_a_seeding_without_what_it_reads_is_refused(
    kind: Seeding, trained: list[int], vectors: Tensor | None, donors: dict[int, int], law: str
) -> None:
    with pytest.raises(ValueError, match=law):
        donor_shares(kind, trained, UNSEEN, vectors=vectors, donors=donors)


def test_rows_must_not_be_given_and_taken_at_once() -> None:
    with pytest.raises(ValueError, match=r"tasks \[2\] are both"):
        seed_rows(gates(), TRAINED, [2], torch.ones(1, 4) / 4)
    with pytest.raises(ValueError, match=r"shares must be \(2, 4\), got \(4, 2\)"):
        seed_rows(gates(), TRAINED, UNSEEN, shares_of("uniform").T)
