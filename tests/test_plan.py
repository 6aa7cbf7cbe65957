"""Plans: ids that follow content, baselines that match their candidates, what a plan says, and what it refuses."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import yaml

from lightning_modules.building import build
from lightning_modules.config import (
    FAMILIES,
    NOT_IN_IDENTITY,
    AdapterMoEConfig,
    DenseConfig,
    RouterConfig,
    TaskMoEConfig,
    TrialConfig,
    flatten,
    to_plain,
)
from pipelines.baselines import parameter_matched, routed, single_task
from pipelines.cost import Machine, check_resources, local_resources
from pipelines.plan import Plan, PlannedTrial, describe, make_plan
from pipelines.spec import SweepConfig, SweepError, load_sweep
from pipelines.store import TrialFolder, TrialResult

GOLDEN = Path(__file__).parent / "golden"
MACHINE = Machine(cpus=4, gpus=0)
SIZES = {"a": 40, "b": 10, "c": 90}
FAMILY_AXIS = [{"family": "dense"}, {"family": "task_moe"}, {"family": "adapter_moe"}]


def golden(name: str, lines: Sequence[str]) -> None:
    """Compare with ``tests/golden/<name>``; with ``ACCEPT_GOLDEN=1`` write it instead."""
    path = GOLDEN / name
    text = "".join(f"{line}\n" for line in lines)
    if os.environ.get("ACCEPT_GOLDEN") == "1":
        path.write_text(text)
    wanted = path.read_text()
    changed = [f"- {line}" for line in wanted.splitlines() if line not in text.splitlines()]
    changed += [f"+ {line}" for line in text.splitlines() if line not in wanted.splitlines()]
    assert text == wanted, (
        f"{path.name} no longer fits:\n"
        + "\n".join(changed)
        + "\nTrials that stores hold under the old ids would train again, or "
        "worse, old numbers would pass for new ones. If numbers really change, raise NUMERICS_VERSION in "
        "lightning_modules/config.py; then accept: ACCEPT_GOLDEN=1 pytest tests/test_plan.py, and look at the diff."
    )


# Identity


def trial(**plain: Any) -> TrialConfig:
    base: dict[str, Any] = {"mixture": {"tasks": ["a", "b"]}, "digests": {"a": "00aa", "b": "00bb"}}
    return build(TrialConfig, {**base, **plain}, "trial")


HAND_WRITTEN: dict[str, dict[str, Any]] = {
    "defaults": {},
    "steps_50": {"train": {"steps": 50}},
    "seed_1": {"seed": 1},
    "task_moe": {"model": {"family": "task_moe"}},
    "task_moe_8_top_2": {"model": {"family": "task_moe", "num_experts": 8, "router": {"top_k": 2}}},
    "adapter_moe": {"model": {"family": "adapter_moe"}},
    "adapter_moe_top_1": {"model": {"family": "adapter_moe", "router": {"selection": "top_k"}}},
    "low_resource": {"mixture": {"tasks": ["a", "b"], "low_resource": {"b": 5}}},
    "hub": {
        "backbone": {"name": "org/base", "revision": "0" * 40},
        "digests": {"a": "00aa", "b": "00bb", "backbone": f"hub:org/base@{'0' * 40}"},
    },
}


def test_golden_ids() -> None:
    lines = [f"{name} {trial(**plain).trial_id}" for name, plain in HAND_WRITTEN.items()]
    # Ids leave out values equal to their default: a default that changes would put new numbers under old ids.
    for family, cls in FAMILIES.items():
        lines += [f"default {key}={value!r}" for key, value in flatten(to_plain(TrialConfig(model=cls()))).items()
                  if family == "dense" or key.startswith("model.")]  # fmt: skip
    golden("trial_ids.txt", lines)


def reversed_keys(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: reversed_keys(v) for k, v in reversed(list(value.items()))}
    return value


def as_tuples(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: as_tuples(v) for k, v in value.items()}
    return tuple(map(as_tuples, value)) if isinstance(value, list) else value


def whole_floats_as_ints(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: whole_floats_as_ints(v) for k, v in value.items()}
    return int(value) if isinstance(value, float) and value == int(value) else value


@pytest.mark.parametrize("name", HAND_WRITTEN)
def test_the_same_content_has_the_same_id_however_it_is_written(name: str) -> None:
    config = trial(**HAND_WRITTEN[name])
    spelled_out = to_plain(config)
    ways = [
        spelled_out,
        reversed_keys(spelled_out),
        as_tuples(spelled_out),
        whole_floats_as_ints(spelled_out),
        json.loads(json.dumps(spelled_out)),
        yaml.safe_load(yaml.safe_dump(spelled_out)),
        {**spelled_out, "train": {**spelled_out["train"], "log_every": 3, "checkpoint_every": 7}},
    ]
    assert {build(TrialConfig, way, "trial").trial_id for way in ways} == {config.trial_id}


def test_lists_in_place_of_tuples_have_the_same_id() -> None:
    lists: Any = []
    assert (
        replace(trial(), model=DenseConfig(layers=lists, ffn_multiple=2)).trial_id == trial(model={"ffn_multiple": 2}).trial_id
    )


def other_values(annotation: Any, value: Any) -> Iterator[Any]:
    """Candidates for another value of a field; the first that its class accepts is taken."""
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, (int, float)):
        yield from (other for other in (value + 1, value * 2, value / 2, 1, 3, 0.5) if other != value)
    elif isinstance(value, str):
        options = get_args(annotation) if get_origin(annotation) is Literal else (f"{value}x",)
        yield from (option for option in options if option != value)
    elif isinstance(value, (tuple, list)):
        yield from ([0], ["c"], ["a"], ["heads"])
    elif isinstance(value, Mapping):
        yield from ({"a": 1}, {"a": "00cc"}, {"train.steps": 9})
    else:
        yield from (3, 0.3, 64, "0" * 40, True)


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(key path, annotation, value) of every setting."""
    hints = get_type_hints(type(config))
    for f in fields(config):
        value = getattr(config, f.name)
        if is_dataclass(value):
            yield from leaves(value, f"{prefix}{f.name}.")
        elif f.name != "family":
            literal = next((a for a in (hints[f.name], *get_args(hints[f.name])) if get_origin(a) is Literal), hints[f.name])
            yield f"{prefix}{f.name}", literal, value


NEEDS: dict[str, dict[str, Any]] = {
    "mixture.cap": {"mixture.sampling": "capped"},
    "mixture.max_epochs": {"mixture.sampling": "unimax"},
    "mixture.weights": {"mixture.sampling": "weights"},
    "mixture.adapt_every": {"mixture.sampling": "adaptive"},
    "data.draw": {"data.few_shot": 4},
    "model.dispatch": {"model.router.kind": "token"},
    "start.trial": {"start.load": ["backbone"]},
    "start.changes": {"start.load": ["backbone"]},
    **{
        f"model.router.{name}": {f"model.router.{key}": value for key, value in needed.items()}
        for names, needed in {
            "conditioning noise normalise": {"kind": "example"},
            "noise_scale": {"kind": "example", "noise": "jitter"},
            "task_vectors task_vector_size": {"network": "linear"},
            "train_task_vectors": {"network": "linear", "task_vectors": "random"},
            "hidden_size": {"network": "linear"},
            "descriptions": {"network": "linear", "task_vectors": "description"},
            "draw": {"selection": "gumbel_st"},
            "weighting score": {"selection": "top_k"},
            "top_k": {"selection": "top_k"},
            "capacity": {"kind": "token", "selection": "top_k"},
            "priority": {"kind": "token", "selection": "top_k", "capacity": 1.5},
            "slots": {"kind": "token", "selection": "slots"},
            "experts_of": {"kind": "task_id", "selection": "top_k"},
            "balance_weight": {"balance": "load"},
            "balance_scope balance_window": {"kind": "example", "balance": "load"},
            "bias_rate": {"kind": "example", "selection": "top_k", "balance": "bias"},
            "policy policy_entropy value": {"kind": "example", "selection": "sampled"},
            "consistency": {"kind": "random_example", "selection": "top_k"},
            "donors": {"unseen": "nearest_category"},
            "temperature_decay": {"temperature_min": 0.1},
            "temperature_min": {"temperature_decay": 0.1},
            "combine": {"selection": "soft"},
        }.items()
        for name in names.split()
    },
}
"""Setting -> what must be set for it to be allowed."""


def with_settings(config: TrialConfig, settings: Mapping[str, Any]) -> TrialConfig:
    plain = to_plain(config)
    for key, value in settings.items():
        *outer, last = key.split(".")
        target = plain
        for part in outer:
            target = target[part]
        target[last] = value
    return build(TrialConfig, plain, "trial")


def changed(config: TrialConfig, key: str, value: Any) -> tuple[TrialConfig, TrialConfig]:
    """The trial with another value, and the same without it (or the base, where that is not allowed)."""
    needs = NEEDS.get(key, {})
    other = with_settings(config, {**needs, key: value})
    try:
        return other, with_settings(config, needs)
    except ValueError:
        return other, config


@pytest.mark.parametrize(
    "base",
    [
        trial(),
        trial(model={"family": "task_moe"}),
        trial(model={"family": "adapter_moe"}),
        trial(backbone={"name": "org/base", "revision": "1" * 40}),
    ],
    ids=["dense", "task_moe", "adapter_moe", "hub"],
)
def test_every_setting_is_part_of_the_id_unless_it_is_listed(base: TrialConfig) -> None:
    seen: dict[str, str] = {base.trial_id: "the base"}
    for key, annotation, value in leaves(base):
        if base.backbone.name != "tiny-encoder" and key.startswith("backbone.size."):
            continue
        if base.backbone.name == "tiny-encoder" and key in ("backbone.revision", "backbone.name"):
            continue
        found = None
        for candidate in other_values(annotation, value):
            try:
                found = changed(base, key, candidate)
                break
            except ValueError:
                continue
        assert found is not None, f"no other value was found for {key}; extend other_values"
        other, reference = found
        if key in NOT_IN_IDENTITY:
            assert other.trial_id == reference.trial_id, key
        else:
            assert other.trial_id != reference.trial_id, key
            assert other.trial_id not in seen, f"{key} and {seen[other.trial_id]}"
            seen[other.trial_id] = key


def test_a_folder_counts_by_content_and_not_by_its_path() -> None:
    digests = {"a": "1", "backbone": "2"}
    here, there = (trial(backbone={"name": name}, digests=digests) for name in ("./here", "/there"))
    assert here.trial_id == there.trial_id
    assert here.trial_id != trial(backbone={"name": "./here"}, digests={**digests, "backbone": "3"}).trial_id


# A project with three small tasks


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory with a catalogue of the tasks a, b, c and an empty storage folder."""
    monkeypatch.chdir(tmp_path)
    entries = []
    for name, n in SIZES.items():
        files = {}
        for split, size in {"train": n, "dev": 4, "test": 6}.items():
            rows = [{"text": f"{name} {split} {i}", "label": "yn"[i % 2]} for i in range(size)]
            (tmp_path / f"{name}.{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            files[split] = f"{name}.{split}.jsonl"
        entries.append(
            {"name": name, "kind": "classification", "category": f"toy/{name}", "labels": ["y", "n"], "files": files}
        )
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump({"tasks": entries}, sort_keys=False))
    return tmp_path


def sweep_of(project: Path, **changes: Any) -> SweepConfig:
    plain: dict[str, Any] = {
        "name": "try",
        "catalogues": ["toy.yaml"],
        "trial": {"mixture": {"tasks": ["*"], "batch_size": 8, "tasks_per_step": 4}, "train": {"steps": 100}},
        **changes,
    }
    (project / "x.yaml").write_text(yaml.safe_dump(plain, sort_keys=False))
    return load_sweep("x.yaml")


def plan_of(project: Path, fresh: bool = False, **changes: Any) -> Plan:
    return make_plan(sweep_of(project, **changes), project / "runs", fresh=fresh, machine=MACHINE)


def candidates(plan: Plan) -> list[PlannedTrial]:
    return [t for t in plan.trials if t.role == "candidate"]


def by_id(plan: Plan) -> dict[str, PlannedTrial]:
    return {t.trial_id: t for t in plan.trials}


def mistake(project: Path, **changes: Any) -> str:
    with pytest.raises(SweepError) as error:
        plan_of(project, **changes)
    text = str(error.value)
    assert "\n" not in text
    assert text.startswith("x.yaml: ")
    return text.removeprefix("x.yaml: ")


def test_a_resolved_trial_says_everything_it_reads(project: Path) -> None:
    mixture = {"tasks": ["!c", "*", "!c"], "low_resource": {"a": 7}}
    (only,) = candidates(plan_of(project, trial={"mixture": {**mixture, "tasks": ["*", "!c"]}}))
    config = only.config
    assert config.mixture.tasks == ("a", "b")
    assert config.backbone.size.tokenizer_tasks == ("a", "b")
    assert config.mixture.low_resource == {"a": 7}
    assert sorted(config.digests) == ["a", "b"]
    assert all(len(digest) == 16 for digest in config.digests.values())


def test_tokenizer_tasks_are_patterns_too_and_are_read(project: Path) -> None:
    backbone = {"size": {"tokenizer_tasks": ["*"]}}
    plan = plan_of(project, trial={"backbone": backbone, "mixture": {"tasks": ["a"]}})
    assert candidates(plan)[0].config.backbone.size.tokenizer_tasks == ("a", "b", "c")
    assert sorted(candidates(plan)[0].config.digests) == ["a", "b", "c"]
    assert (list(plan.tasks), sorted(plan.specs)) == (["a"], ["a", "b", "c"])


def test_the_catalogues_low_resource_is_the_default_of_the_mixtures(project: Path) -> None:
    catalogue = yaml.safe_load((project / "toy.yaml").read_text())
    catalogue["tasks"][0]["low_resource"] = 5
    catalogue["tasks"][1]["low_resource"] = 6
    (project / "toy.yaml").write_text(yaml.safe_dump(catalogue))
    plan = plan_of(project, trial={"mixture": {"tasks": ["*"], "low_resource": {"category:toy/b": 9, "c": 8}}})
    assert candidates(plan)[0].config.mixture.low_resource == {"a": 5, "b": 9, "c": 8}
    alone = next(t for t in plan.trials if t.task == "b")
    assert alone.config.mixture.low_resource == {"b": 9}


def test_data_that_changes_gives_other_ids_only_where_it_is_read(project: Path) -> None:
    backbone = {"size": {"tokenizer_tasks": ["a"]}}
    before = plan_of(project, trial={"backbone": backbone, "mixture": {"tasks": ["*"]}})
    rows = [f'{{"text": "new {i}", "label": "{"yn"[i % 2]}"}}\n' for i in range(SIZES["c"])]
    (project / "c.train.jsonl").write_text("".join(rows))
    after = plan_of(project, trial={"backbone": backbone, "mixture": {"tasks": ["*"]}})
    assert candidates(before)[0].trial_id != candidates(after)[0].trial_id
    alone = [{t.task: t.trial_id for t in plan.trials if t.task} for plan in (before, after)]
    assert {task for task in SIZES if alone[0][task] != alone[1][task]} == {"c"}


# Baselines


@pytest.mark.parametrize("share", [0.01, 0.1, 0.25, 0.3, 0.5, 0.77, 1.0])
@pytest.mark.parametrize("groups", [1, 4, 8])
def test_a_single_task_baseline_sees_as_much_of_its_task_as_the_mixture_shows(share: float, groups: int) -> None:
    config = trial(mixture={"tasks": ["a", "b"], "batch_size": 8 * groups, "tasks_per_step": groups}, train={"steps": 1000})
    alone = single_task(config, "a", share)
    assert alone.mixture.group_size == config.mixture.group_size
    met = 1000 * groups * share
    assert abs(alone.train.steps * alone.mixture.tasks_per_step - met) <= max(1, alone.mixture.tasks_per_step / 2)


def test_a_single_task_baseline_keeps_what_matters_and_drops_the_rest() -> None:
    config = trial(
        model={"family": "task_moe"},
        backbone={"max_length": 32, "size": {"tokenizer_tasks": ["a", "b"]}},
        mixture={
            "tasks": ["a", "b", "c"],
            "batching": "mixed",
            "sampling": "capped",
            "cap": 9,
            "low_resource": {"a": 3, "b": 4},
        },
        data={"max_eval": 50},
        train={"lr": 0.5, "eval_every": 10, "log_every": 3, "checkpoint_every": 9},
        seed=4,
        digests={"a": "1", "b": "2", "c": "3", "backbone": "4"},
    )
    alone = single_task(config, "a", 0.5)
    assert (alone.model, alone.backbone, alone.data, alone.seed) == (DenseConfig(), config.backbone, config.data, 4)
    assert (alone.mixture.tasks, alone.mixture.batching, alone.mixture.sampling) == (("a",), "single_task", "uniform")
    assert (alone.mixture.cap, alone.mixture.temperature, alone.mixture.low_resource) == (None, 2.0, {"a": 3})
    assert (alone.train.eval_every, alone.train.lr, alone.train.log_every, alone.train.checkpoint_every) == (None, 0.5, 3, 9)
    assert alone.digests == {"a": "1", "b": "2", "backbone": "4"}


def test_parameter_matched_has_the_experts_width_in_one_piece() -> None:
    moe = trial(model={"family": "task_moe", "num_experts": 8, "layers": [1]})
    assert parameter_matched(moe) == replace(moe, model=DenseConfig(ffn_multiple=8, layers=(1,)))
    adapters = trial(model={"family": "adapter_moe", "num_experts": 8, "bottleneck": 4, "layers": [1]})
    uniform = RouterConfig(kind="uniform", selection="soft")
    wide = AdapterMoEConfig(num_experts=1, bottleneck=32, layers=(1,), router=uniform)
    assert parameter_matched(adapters) == replace(adapters, model=wide)
    assert parameter_matched(trial()) is None


def test_routed_controls_keep_the_experts_and_forget_the_learned_router() -> None:
    router = {"top_k": 2, "temperature": 0.5, "mutual_information": 0.1, "combine": "parameters"}
    moe = trial(model={"family": "task_moe", "num_experts": 8, "layers": [1], "router": router})
    random, uniform = routed(moe, "random"), routed(moe, "uniform")
    assert random is not None and uniform is not None
    assert random.model == TaskMoEConfig(num_experts=8, layers=(1,), router=RouterConfig(kind="random"))
    assert isinstance(uniform.model, TaskMoEConfig)
    assert uniform.model.router == RouterConfig(kind="uniform", selection="soft", combine="parameters")
    assert routed(trial(), "random") is None


ALL_BASELINES = ["single_task", "parameter_matched", "random_routing", "uniform_routing"]


def test_every_candidate_finds_its_baselines_in_the_plan_with_its_own_seed(project: Path) -> None:
    plan = plan_of(project, axes={"model": FAMILY_AXIS}, seeds=2, baselines=ALL_BASELINES)
    trials = by_id(plan)
    assert len(candidates(plan)) == 6
    for candidate in candidates(plan):
        wanted = ["single_task"] if candidate.config.model.family == "dense" else ALL_BASELINES
        assert list(candidate.baselines) == wanted
        assert list(candidate.baselines["single_task"]) == ["a", "b", "c"]
        for task, trial_id in candidate.baselines["single_task"].items():
            found = trials[trial_id]
            assert (found.task, found.role, found.seed) == (task, "single_task", candidate.seed)
        for kind in wanted[1:]:
            found = trials[candidate.baselines[kind]]
            assert (found.role, found.seed, found.config.mixture) == (kind, candidate.seed, candidate.config.mixture)


def test_candidates_share_baselines_and_so_do_sweeps(project: Path) -> None:
    axes = {"model": FAMILY_AXIS[1:], "model.num_experts": [2, 4]}
    plan = plan_of(project, axes=axes, seeds=2)
    assert Counter(t.role for t in plan.trials) == {"candidate": 8, "single_task": 6}
    assert len({t.trial_id for t in plan.trials}) == len(plan.trials)
    other = plan_of(project, name="other", seeds=2, axes={"model.router.top_k": [1, 2]}, trial={
        "model": {"family": "task_moe"}, "mixture": {"tasks": ["*"], "batch_size": 8, "tasks_per_step": 4},
        "train": {"steps": 100, "log_every": 1},
    })  # fmt: skip
    alone = [{t.trial_id for t in p.trials if t.role == "single_task"} for p in (plan, other)]
    assert alone[0] == alone[1]


def test_a_baseline_that_is_a_candidate_too_is_planned_once(project: Path) -> None:
    axes = {"model": [{"family": "dense"}, {"family": "dense", "ffn_multiple": 4}, {"family": "task_moe"}]}
    plan = plan_of(project, axes=axes, baselines=["parameter_matched"])
    assert [t.role for t in plan.trials] == ["candidate"] * 3
    wide = by_id(plan)[next(t for t in plan.trials if t.baselines).baselines["parameter_matched"]]
    assert wide.configuration == "dense ffn_multiple=4"
    assert wide.uses == (("candidate", "dense ffn_multiple=4"), ("parameter_matched", "parameter_matched dense"))


def test_grid_points_that_come_to_the_same_are_planned_once(project: Path) -> None:
    plan = plan_of(project, axes={"mixture.tasks": [["*"], ["a", "b", "c"], ["c", "b", "a"]]})
    assert len(candidates(plan)) == 1
    assert len(candidates(plan)[0].uses) == 3


def test_a_candidate_is_not_its_own_baseline(project: Path) -> None:
    trial_ = {"mixture": {"tasks": ["*"]}, "model": {"family": "task_moe", "router": {"kind": "random"}}}
    plan = plan_of(project, trial=trial_, baselines=["random_routing", "uniform_routing"])
    assert list(candidates(plan)[0].baselines) == ["uniform_routing"]


# The plan


def test_labels_name_what_differs_and_all_seeds_share_them(project: Path) -> None:
    axes = {
        "model": FAMILY_AXIS,
        "model.num_experts": {"when": {"model.family": "task_moe"}, "values": [2, 4]},
        "train.lr": [1e-3, 5e-4],
    }
    plan = plan_of(project, axes=axes, seeds=2)
    labels = Counter(t.configuration for t in candidates(plan))
    assert labels == dict.fromkeys(
        [f"{model} lr={lr}" for model in ("dense", "task_moe num_experts=2", "task_moe num_experts=4", "adapter_moe")
         for lr in ("0.001", "0.0005")], 2)  # fmt: skip


def test_configurations_that_a_label_cannot_tell_apart_are_numbered(project: Path) -> None:
    axes = {"mixture.low_resource": [{}, {"a": 3}], "backbone.size.tokenizer_tasks": [["a"], ["b"]]}
    labels = [t.configuration for t in candidates(plan_of(project, axes=axes))]
    assert len(set(labels)) == 4


def test_baselines_come_first_and_the_most_shared_before_others(project: Path) -> None:
    axes = {"model": FAMILY_AXIS, "model.router.lr_scale": {"when": {"model.family": "task_moe"}, "values": [1, 2]}}
    plan = plan_of(project, axes=axes, seeds=2, baselines=ALL_BASELINES)
    users = Counter(
        trial_id
        for c in candidates(plan)
        for found in c.baselines.values()
        for trial_id in (found.values() if isinstance(found, dict) else [found])
    )
    order = [(t.seed, t.role == "candidate", -users[t.trial_id]) for t in plan.trials]
    assert all(before <= after for before, after in pairwise(order))
    assert {t.wave for t in plan.trials} == {0}


def finish(storage: Path, planned: PlannedTrial, seconds: float) -> None:
    folder = TrialFolder(storage, planned.trial_id)
    folder.write_config(planned.config)
    steps = planned.config.train.steps
    folder.write_result(
        TrialResult(
            trial_id=planned.trial_id, status="finished", scores={}, steps=steps, seconds=seconds, started_ms=0, finished_ms=0
        )
    )


def test_states_come_from_the_store(project: Path) -> None:
    first, second, *others = plan_of(project).trials
    finish(project / "runs", first, 3.0)
    checkpoints = TrialFolder(project / "runs", second.trial_id).checkpoints
    checkpoints.mkdir(parents=True)
    for step in (10, 20):
        (checkpoints / f"step_{step:09d}.pt").touch()
    plan = plan_of(project)
    states = {t.trial_id: (t.state, t.remaining) for t in plan.trials}
    assert states.pop(first.trial_id) == ("finished", 0)
    assert states.pop(second.trial_id) == ("resume", second.config.train.steps - 20)
    assert set(states.values()) == {("new", t.config.train.steps) for t in others}
    assert [plan.count(state) for state in ("finished", "resume", "new")] == [1, 1, len(others)]
    assert plan_of(project, fresh=True).count("new") == len(plan.trials)


def test_the_cost_is_rough_until_something_has_been_measured(project: Path) -> None:
    axes = {"model": FAMILY_AXIS[:2]}
    plan = plan_of(project, axes=axes, baselines=[], seeds=2)
    assert plan.cost.sources == {"rough": 4}
    assert plan.cost.slots == 4
    dense = next(t for t in plan.trials if t.config.model.family == "dense")
    finish(project / "runs", dense, seconds=50.0)  # 0.5 s per step
    plan = plan_of(project, axes=axes, baselines=[], seeds=2)
    assert plan.cost.sources == {"measured": 1, "rough": 2}
    wide = {"model": {"ffn_multiple": 2}, **sweep_of(project).trial}
    elsewhere = plan_of(project, name="other", trial=wide, baselines=[], seeds=5)
    assert elsewhere.cost.sources == {"same family": 5}
    assert elsewhere.cost.seconds == pytest.approx(5 * 50)
    assert elsewhere.cost.wall_seconds == pytest.approx(5 * 50 / 4)


def test_nothing_is_left_to_pay_for_when_all_is_finished(project: Path) -> None:
    for planned in plan_of(project).trials:
        finish(project / "runs", planned, 1.0)
    plan = plan_of(project)
    assert (plan.cost.trials, plan.cost.seconds) == (0, 0)
    assert "cost: nothing left to train" in describe(plan)


def test_plan_json_is_enough_for_a_comparison(project: Path) -> None:
    plan = plan_of(project, axes={"model": FAMILY_AXIS}, seeds=2, baselines=ALL_BASELINES, question="who helps?")
    content = json.loads(plan.to_json())
    assert [row["trial_id"] for row in content["trials"]] == [trial.trial_id for trial in plan.trials]
    assert content["trials"][0]["config"] == to_plain(plan.trials[0].config)
    assert [task["name"] for task in content["tasks"]] == list(plan.tasks)
    assert (content["sweep"], content["question"], content["seeds"]) == ("try", "who helps?", [0, 1])
    assert content["cost"] == asdict(plan.cost)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("plain", {}),
        ("families", {"axes": {"model": FAMILY_AXIS, "model.num_experts": {
            "when": {"model.family": ["task_moe", "adapter_moe"]}, "values": [2, 4]}}, "seeds": 2, "baselines": ALL_BASELINES}),
    ],
)  # fmt: skip
def test_golden_plans(project: Path, name: str, changes: dict[str, Any]) -> None:
    plan = plan_of(project, **changes)
    lines = describe(plan)
    lines += ["", *(f"{t.trial_id} {json.dumps(t.baselines)}" for t in candidates(plan))]
    golden(f"plan_{name}.txt", lines)


# What a plan refuses


@pytest.mark.parametrize(
    ("trial", "expected"),
    [
        ({"mixture": {"tasks": ["aa"]}}, "trial.mixture.tasks: no task matches 'aa' in toy.yaml; did you mean a?"),
        ({"mixture": {"tasks": []}}, "trial.mixture.tasks: must name at least one task, got []"),
        ({"mixture": {"tasks": ["*"], "low_resource": {"b": 11}}},
         "trial.mixture.low_resource.b: must be at most the 10 training examples of b, got 11"),
        ({"mixture": {"tasks": ["a"], "low_resource": {"b": 1}}},
         "trial.mixture.low_resource: 'b' must match a task of the mixture, which has a"),
        ({"mixture": {"tasks": ["*"]}, "backbone": {"name": "./gone"}}, "trial.backbone.name: no such folder: ./gone"),
        ({"mixture": {"tasks": ["*"]}, "backbone": {"name": "a/b/c"}}, "trial.backbone.name: no such folder: a/b/c"),
        ({"mixture": {"tasks": ["*"]}, "backbone": {"name": "org/model"}},
         "trial.backbone.revision: must be a commit for the Hub model 'org/model' (there is no folder of that name), got null"),
        ({"mixture": {"tasks": ["*"]}, "backbone": {"name": "org/model", "revision": "main"}},
         "trial.backbone.revision: must be a commit, 40 hex digits (a branch can change under a trial's id), got 'main'"),
        ({"mixture": {"tasks": ["*"]}, "backbone": {"size": {"tokenizer_tasks": ["z"]}}},
         "trial.backbone.size.tokenizer_tasks: no task matches 'z'"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_the_data_are_refused(project: Path, trial: dict[str, Any], expected: str) -> None:
    assert mistake(project, trial=trial).startswith(expected)


def test_the_grid_point_at_fault_is_named(project: Path) -> None:
    text = mistake(project, axes={"train.lr": [0.1], "mixture.low_resource": [{"a": 3}, {"a": 50}]})
    assert text.startswith(
        "trial.mixture.low_resource.a (at mixture.low_resource={a:50}): must be at most the 40 training examples"
    )
    zipped = {"size": [{"mixture.tasks": ["a"]}, {"mixture": {"tasks": ["z"]}}]}
    assert mistake(project, axes=zipped).startswith("trial.mixture.tasks (at size={mixture:{tasks:z}}): no task matches 'z'")


def test_a_task_may_not_take_the_name_of_the_backbone(project: Path) -> None:
    text = (project / "toy.yaml").read_text().replace("name: a\n", "name: backbone\n")
    (project / "toy.yaml").write_text(text)
    assert mistake(project).startswith("toy.yaml: task backbone: must have another name")


def test_a_torn_line_is_named_by_file_and_number(project: Path) -> None:
    with (project / "b.dev.jsonl").open("a") as file:
        file.write('{"text": "torn')
    assert mistake(project).startswith(f"{project / 'b.dev.jsonl'}:5: must be one JSON object per line, got ")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"kind": "poetry"}, "toy.yaml: task a: kind must be one of classification, regression, choice, tagging, spans, "),
        ({"metric": "f2"}, "toy.yaml: task a: metric must be one of accuracy"),
        ({"labels": ["y", "x"]}, "{folder}/a.train.jsonl:2: label must be one of y, x, got 'n'"),
        ({"files": {"train": "a.train.jsonl"}}, "toy.yaml: task a: files must have train, dev and test (or splits: "),
        ({"low_resource": 41}, "toy.yaml: task a: low_resource: must be at most the 40 training examples of a, got 41"),
    ],
)
def test_a_task_that_cannot_be_used_is_refused(project: Path, change: dict[str, Any], expected: str) -> None:
    catalogue = yaml.safe_load((project / "toy.yaml").read_text())
    catalogue["tasks"][0].update(change)
    (project / "toy.yaml").write_text(yaml.safe_dump(catalogue))
    assert mistake(project).startswith(expected.format(folder=project))


def test_a_task_that_no_trial_reads_may_be_unusable(project: Path) -> None:
    (project / "c.train.jsonl").write_text("torn")
    assert [t.role for t in plan_of(project, trial={"mixture": {"tasks": ["a", "b"]}}).trials].count("single_task") == 2


def test_a_missing_catalogue_is_refused_when_it_has_gone_since_loading(project: Path) -> None:
    sweep = sweep_of(project)
    (project / "toy.yaml").unlink()
    with pytest.raises(SweepError, match=r"^x.yaml: catalogues: no such file: toy.yaml"):
        make_plan(sweep, project / "runs", machine=MACHINE)


def test_more_workers_than_examples_in_a_group_are_refused(project: Path) -> None:
    assert mistake(project, resources={"workers": 3}) == (
        "resources.workers: must be at most the examples of a group (batch_size / tasks_per_step), got workers=3, group of 2"
    )


def test_resources_that_the_machine_lacks_are_refused(project: Path) -> None:
    check_resources(sweep_of(project, resources={"cpus": 4}), MACHINE)
    with pytest.raises(SweepError) as error:
        check_resources(sweep_of(project, resources={"gpus": 1}), MACHINE)
    assert str(error.value) == (
        "x.yaml: resources.gpus: must be at most what the machine has, got gpus=1 x workers=1, machine has 0"
    )
    with pytest.raises(SweepError, match=r"resources.cpus: must be at most what the machine has, got cpus=3 x workers=2"):
        check_resources(sweep_of(project, resources={"cpus": 3, "workers": 2}), MACHINE)


def test_local_resources_obey_cuda_visible_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    machine = local_resources()
    assert machine.gpus == 0
    assert machine.cpus >= 1


# Backbones in folders


@pytest.fixture
def backbone(project: Path) -> Path:
    """A folder that looks like a Hugging Face model."""
    folder = project / "model"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors", "README.md"):
        (folder / name).write_text('{"model_type": "bert"}' if name == "config.json" else name)
    return folder


def test_a_folder_is_identified_by_what_a_trial_loads_from_it(project: Path, backbone: Path) -> None:
    def plan_id(name: str) -> str:
        plan = plan_of(project, trial={"mixture": {"tasks": ["*"]}, "backbone": {"name": name}})
        assert Path(candidates(plan)[0].config.backbone.name).is_absolute()
        return candidates(plan)[0].trial_id

    first = plan_id("model")
    (backbone / "README.md").write_text("changed")
    backbone.rename(project / "moved")
    assert plan_id("./moved") == first
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        before = plan_id("moved")
        (project / "moved" / name).write_text('{"model_type": "bert", "changed": true}')
        assert plan_id("moved") != before


def test_a_folder_without_a_model_is_refused(project: Path, backbone: Path) -> None:
    change = {"mixture": {"tasks": ["*"]}, "backbone": {"name": "model"}}
    assert mistake(project, trial={**change, "backbone": {"name": "model", "revision": "1" * 40}}).startswith(
        "trial.backbone.revision: must be null for a folder"
    )
    for content, expected in (
        ("{", "is not valid JSON"),
        ('{"model_type": "gpt2"}', "must be one of bert, roberta"),
        (
            '{"model_type": "bert", "max_position_embeddings": 64}',
            "trial.backbone.max_length: must be at most the backbone's 64",
        ),
    ):
        (backbone / "config.json").write_text(content)
        assert expected in mistake(project, trial=change)
    (backbone / "config.json").write_text('{"model_type": "bert", "num_hidden_layers": 2}')
    layers = {**change, "model": {"family": "task_moe", "layers": [0, 2]}}
    assert mistake(project, trial=layers).startswith("trial.model.layers: must be below the backbone's 2 blocks")
    tokenizer = (backbone / "tokenizer.json").rename(project / "tokenizer.json")
    assert mistake(project, trial=change).startswith("trial.backbone.name: must be a folder with a tokenizer")
    tokenizer.rename(backbone / "tokenizer.json")
    (backbone / "model.safetensors").unlink()
    assert mistake(project, trial=change).startswith("trial.backbone.name: must be a folder with config.json and *.safetensors")


def test_single_task_baselines_of_a_folder_keep_its_digest(project: Path, backbone: Path) -> None:
    plan = plan_of(project, trial={"mixture": {"tasks": ["*"]}, "backbone": {"name": str(backbone)}})
    read: Callable[[PlannedTrial], set[str]] = lambda t: {"backbone", *t.config.mixture.tasks}  # noqa: E731
    assert all(set(t.config.digests) == read(t) for t in plan.trials)
