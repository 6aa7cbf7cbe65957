"""Routers in a decoder: no token is routed by a later one, and what is generated is what teacher forcing would say."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import CATALOGUE, TINY, VOCAB, shake
from torch import Tensor, nn

from lightning_modules.config import AdapterMoEConfig, DenseConfig, ModelConfig, TaskMoEConfig, TrialConfig
from lightning_modules.data.batches import IGNORE, Batch, TaskRows
from lightning_modules.network.model import MultiTaskNetwork, build_network
from lightning_modules.network.routers.record import Record
from lightning_modules.network.routers.routers import Routers
from lightning_modules.network.routers.traffic import Traffic
from lightning_modules.network.task_heads.base import HeadSpec
from lightning_modules.router_config import ENCODER_ONLY

TASKS = tuple(HeadSpec(name, "text2text", 1) for name in ("pets", "stars", "names", "mood"))
BACKBONES = ("tiny-bart", "tiny-t5")
WHOLE_ROWS = ("expert_choice", "task_expert_choice", "slots")
ROUTERS = {
    name: router
    for name, router in CATALOGUE.items()
    if router.kind not in ENCODER_ONLY and router.selection not in WHOLE_ROWS and router.capacity is None
}
"""What may stand in a decoder: its tokens' routes depend on nothing that comes after them."""
REFORMS = ("mod_squad",)
"""Raw weights: not a dense block with equal experts."""
LENGTH = 7


def network_of(backbone: str, model: ModelConfig) -> MultiTaskNetwork:
    """One whose answers differ from row to row and end early here and there."""
    config = TrialConfig(backbone=replace(TINY, name=backbone, max_target_length=8), model=model)
    network = build_network(config, TASKS, VOCAB).eval()
    for name, parameter in network.backbone.named_parameters():
        # Otherwise BART would say the same token again and again, whatever its layers see.
        parameter.data.mul_(8 if "embed_positions" in name else 4 if "norm" not in name else 1)
    return network


def batch_of(tasks: Sequence[int], rows: int = 2) -> Batch:
    generator = torch.Generator().manual_seed(3)
    size = rows * len(tasks)
    lengths = torch.randint(4, 9, (size, 1), generator=generator)
    lengths[0] = 8
    mask = (torch.arange(8) < lengths).long()
    ids = torch.randint(5, VOCAB, (size, 8), generator=generator) * mask
    targets = torch.randint(5, VOCAB, (size, LENGTH), generator=generator)
    targets[1::2, 4:] = IGNORE
    groups = tuple(
        TaskRows(task, i * rows, (i + 1) * rows, targets[i * rows : (i + 1) * rows], torch.full((rows,), 1 / size))
        for i, task in enumerate(tasks)
    )
    return Batch(ids, mask, torch.zeros_like(ids), torch.full_like(ids, -1), groups)


class Part:
    """The decoder at work on one task of a batch."""

    def __init__(self, network: MultiTaskNetwork, batch: Batch, which: int) -> None:
        self.network, self.rows = network, batch.tasks[which]
        self.states = network._states(batch, None)[which][1]

    def handed(self, mask: Tensor | None, beams: int = 1) -> tuple[Traffic | None, dict[int, Any]]:
        traffic = self.network._decoder_traffic(self.rows, self.states, mask, beams)
        return traffic, self.network._handed(traffic)

    def forced(self, targets: Tensor) -> tuple[Tensor, list[Record]]:
        """Logits (n, T, V) at the targets, and what was routed."""
        traffic, handed = self.handed(targets >= 0)
        logits = self.network.backbone.decode(self.states.hidden, self.states.mask, targets, handed)
        return logits, [] if traffic is None else traffic.records

    def generated(self, beams: int, use_cache: bool) -> Tensor:
        _, handed = self.handed(None, beams)
        found = self.network.backbone.generate(
            self.states.hidden,
            self.states.mask,
            handed,
            beams=beams,
            max_new_tokens=LENGTH,
            length_penalty=0.7,
            use_cache=use_cache,
        )
        return nn.functional.pad(found, (0, LENGTH - found.shape[1]), value=special(self.network, "pad"))


def special(network: MultiTaskNetwork, which: str) -> int:
    return getattr(network.backbone.model.config, f"{which}_token_id")


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_beams_are_the_same_with_and_without_a_cache_and_plain_with_equal_experts(backbone: str, name: str) -> None:
    network = network_of(backbone, TaskMoEConfig(num_experts=4, expert_noise=0.0, router=CATALOGUE[name]))
    plain = network_of(backbone, DenseConfig())
    batch = batch_of([0, 2])
    for which in (0, 1):
        for beams in (1, 3):
            found = Part(network, batch, which).generated(beams, True)
            assert torch.equal(found, Part(network, batch, which).generated(beams, False))
            if name not in REFORMS:
                assert torch.equal(found, Part(plain, batch, which).generated(beams, True))
    for module in network.routed().values():
        for e, expert in enumerate(module.experts):
            shake_apart(expert, e)
    answers = [Part(network, batch, which).generated(3, True) for which in (0, 1)]
    for which, found in enumerate(answers):
        assert torch.equal(found, Part(network, batch, which).generated(3, False))


def shake_apart(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)


@pytest.mark.parametrize("model", ["task_moe", "adapter_moe"])
@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_what_is_generated_is_what_teacher_forcing_says(backbone: str, name: str, model: str) -> None:
    network = network_of(backbone, model_of(model, name))
    shake(network)
    end = special(network, "eos")
    for which, part in enumerate(Part(network, batch_of([0, 2]), which) for which in (0, 1)):
        found = part.generated(1, True)
        logits, records = part.forced(found)
        for row, said in zip(logits.argmax(-1).tolist(), found.tolist(), strict=True):
            until = said.index(end) + 1 if end in said else len(said)
            assert row[:until] == said[:until]
        assert {record.block for record in records} == {2, 3}
        assert all((record.units.task == (0, 2)[which]).all() for record in records)


def model_of(family: str, name: str) -> ModelConfig:
    if family == "adapter_moe":
        return AdapterMoEConfig(num_experts=4, bottleneck=3, router=CATALOGUE[name])
    return TaskMoEConfig(num_experts=4, router=CATALOGUE[name])


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_no_token_is_routed_by_a_later_one(backbone: str, name: str) -> None:
    network = network_of(backbone, model_of("task_moe", name))
    shake(network)
    part = Part(network, batch_of([0, 2]), 1)
    targets = part.rows.labels.clone()
    logits, records = part.forced(targets)
    later = targets.clone()
    later[:, 3:] = torch.where(later[:, 3:] >= 0, 17, later[:, 3:])
    shorter = targets.clone()
    shorter[:, 3:] = IGNORE
    for changed in (later, shorter):
        found, again = part.forced(changed)
        torch.testing.assert_close(found[:, :3], logits[:, :3], atol=1e-4, rtol=1e-4)
        for a, b in zip(records, again, strict=True):
            routes = [weights_at(record, first) for record, first in ((a, targets), (b, changed))]
            torch.testing.assert_close(*routes, atol=1e-4, rtol=1e-4)
    assert (part.forced(later)[0][0, 5] - logits[0, 5]).abs().max() > 1e-3


def weights_at(record: Record, targets: Tensor) -> Tensor:
    """Combine weights of the first three tokens of every row, or of its route where all tokens share it."""
    if record.units.kind != "token":
        return record.routing.weights
    assert record.units.index is not None
    return record.routing.weights[record.units.index % targets.shape[1] < 3]


def test_a_capacity_looks_at_later_tokens() -> None:
    """Why a decoder's blocks may not have one: how much room there is depends on what comes later."""
    network = network_of("tiny-bart", model_of("task_moe", "token_capacity"))
    shake(network)
    part = Part(network, batch_of([0, 2]), 0)
    shorter = part.rows.labels.clone()
    shorter[:, 3:] = IGNORE
    logits, found = part.forced(part.rows.labels)[0], part.forced(shorter)[0]
    assert (found[:, :3] - logits[:, :3]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["top_1", "token_per_task", "token_film", "example_per_task", "lstm"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_beam_is_routed_as_its_task(backbone: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network = network_of(backbone, model_of("task_moe", name))
    shake(network)
    batch = batch_of([0, 2])
    alone = [Part(network, batch, which).generated(3, True) for which in (0, 1)]
    tasks: set[int] = set()
    asked = Traffic.route

    def route(self: Traffic, block: int, hidden: Tensor) -> Any:
        found = asked(self, block, hidden)
        if block >= 2:
            assert [stop - start for _, start, stop in found.rows] == [len(hidden)] == [2 * 3]
            tasks.update(found.units.task.tolist())
        return found

    monkeypatch.setattr(Traffic, "route", route)
    for which, task in enumerate((0, 2)):
        tasks.clear()
        assert torch.equal(Part(network, batch, which).generated(3, True), alone[which])
        assert tasks == {task}
    as_other = replace(batch, tasks=tuple(replace(rows, task=2 - rows.task) for rows in batch.tasks))
    other = [Part(network, as_other, which).generated(3, True) for which in (0, 1)]
    routers = network.routers
    assert isinstance(routers, Routers)
    routers.swapped = {0: 2, 2: 0}
    monkeypatch.undo()
    assert all(torch.equal(Part(network, batch, which).generated(3, True), other[which]) for which in (0, 1))


@pytest.mark.parametrize("name", ROUTERS)
def test_records_of_a_text_task_cover_both_stacks(name: str) -> None:
    network = network_of("tiny-bart", model_of("task_moe", name))
    batch = batch_of([0, 2, 1])
    for training in (True, False):
        records: list[Record] = []
        network.train(training).losses(batch, records)
        assert sorted((record.block, record.part) for record in records if record.part is not None) == [
            (block, part) for block in (2, 3) for part in (0, 1, 2)
        ]
        assert [record.block for record in records if record.part is None] == [0, 1]
        for blocks in ((0,), (1,), (2,), (3,)):
            own = [record for record in records if record.block in blocks]
            if own[0].units.kind != "task":
                assert sum(float(record.units.weight.sum()) for record in own) == pytest.approx(1.0, abs=1e-5)
            if own[0].units.kind == "token" and blocks[0] >= 2:
                real = [int((rows.labels >= 0).sum()) for rows in batch.tasks]
                assert [len(record.units.task) for record in sorted(own, key=lambda r: r.part or 0)] == real


def test_generating_keeps_no_records(monkeypatch: pytest.MonkeyPatch) -> None:
    network = network_of("tiny-t5", model_of("task_moe", "token_top_1"))
    made: list[Traffic] = []
    real = Traffic.__init__

    def init(self: Traffic, *args: Any, **kwargs: Any) -> None:
        real(self, *args, **kwargs)
        made.append(self)

    monkeypatch.setattr(Traffic, "__init__", init)
    generation = TrialConfig().generation
    records: list[Record] = []
    network.answers(batch_of([0]), generation, LENGTH, records)
    assert [record.block for record in records] == [0, 1]
    assert [len(traffic.records) for traffic in made] == [2, 0]
