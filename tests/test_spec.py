"""Sweep files: what they say, what the command line changes, how the grid grows, and what every mistake reads like."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_modules.config import AdapterMoEConfig, DenseConfig, TaskMoEConfig
from pipelines.spec import SweepConfig, SweepError, load_sweep

BASE: dict[str, Any] = {
    "name": "try",
    "catalogues": ["toy.yaml"],
    "trial": {"mixture": {"tasks": ["*"]}, "train": {"steps": 10, "lr": 1e-3}},
}
FAMILIES = [{"family": "dense"}, {"family": "task_moe"}, {"family": "adapter_moe"}]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory with an (unread) catalogue and a folder ``sweeps``."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy.yaml").write_text("tasks: []")
    (tmp_path / "sweeps").mkdir()
    return tmp_path


def write(project: Path, **changes: Any) -> str:
    """Write ``sweeps/x.yaml`` from the base with changed top-level keys; None removes a key."""
    plain = {key: value for key, value in {**BASE, **changes}.items() if value is not None}
    (project / "sweeps/x.yaml").write_text(yaml.safe_dump(plain, sort_keys=False))
    return "sweeps/x.yaml"


def load(project: Path, *overrides: str, **changes: Any) -> SweepConfig:
    return load_sweep(write(project, **changes), overrides)


def mistake(project: Path, *overrides: str, **changes: Any) -> str:
    """The message of a sweep that is wrong: one line that starts with the file."""
    with pytest.raises(SweepError) as error:
        load(project, *overrides, **changes)
    text = str(error.value)
    assert "\n" not in text
    assert text.startswith("sweeps/x.yaml: ")
    return text.removeprefix("sweeps/x.yaml: ")


def test_a_file_is_read_as_written(project: Path) -> None:
    sweep = load(project, seeds=3, question="why?", resources={"workers": 2, "gpus": 1}, baselines=["random_routing"])
    assert (sweep.name, sweep.seed_list, sweep.resources.gpus, sweep.retries) == ("try", (0, 1, 2), 1.0, 2)
    assert sweep.baselines == ("random_routing",)
    (point,) = sweep.points()
    assert point.axes == {}
    assert point.config.train.steps == 10


def test_numbers_in_exponent_form_are_numbers(project: Path) -> None:
    (project / "sweeps/x.yaml").write_text("name: x\ncatalogues: [toy.yaml]\ntrial: {train: {lr: 1e-3}}\n")
    assert load_sweep("sweeps/x.yaml").points()[0].config.train.lr == 1e-3


def test_interpolations_are_resolved_after_overrides(project: Path) -> None:
    trial = {"train": {"steps": 10, "eval_every": "${trial.train.steps}"}}
    assert load(project, "trial.train.steps=7", trial=trial).points()[0].config.train.eval_every == 7


def test_a_catalogue_is_found_from_here_then_from_the_file_then_from_the_folder_above(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = project / write(project)
    assert load_sweep(str(file)).catalogues == ("toy.yaml",)
    elsewhere = project / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert load_sweep(str(file)).catalogues == (str(project / "toy.yaml"),)
    (project / "sweeps/toy.yaml").write_text("tasks: []")
    assert load_sweep(str(file)).catalogues == (str(project / "sweeps/toy.yaml"),)
    assert load_sweep(str(file), ["catalogues=[../toy.yaml]"]).catalogues == ("../toy.yaml",)


@pytest.mark.parametrize(
    ("override", "read", "expected"),
    [
        ("seeds=1", lambda s: s.seed_list, (0,)),
        ("seeds=[4,2]", lambda s: s.seed_list, (4, 2)),
        ("trial.train.lr=5e-4", lambda s: s.points()[0].config.train.lr, 5e-4),
        ("trial.backbone.size.num_layers=3", lambda s: s.points()[0].config.backbone.size.num_layers, 3),
        ("trial.mixture.tasks=[a/*, '!a/b.c']", lambda s: s.points()[0].config.mixture.tasks, ("a/*", "!a/b.c")),
        ("trial.mixture.low_resource.a/b.c=5", lambda s: s.points()[0].config.mixture.low_resource, {"a/b.c": 5}),
        ("axes.train.weight_decay=[0,1]", lambda s: [p.config.train.weight_decay for p in s.points()], [0, 1, 0, 1]),
        ("axes.train.steps=[5]", lambda s: [p.config.train.steps for p in s.points()], [5]),
        ("axes={}", lambda s: len(s.points()), 1),
        ("resources.max_concurrent=3", lambda s: s.resources.max_concurrent, 3),
        ("question=how much = enough?", lambda s: s.question, "how much = enough?"),
    ],
)
def test_an_override_sets_its_key(project: Path, override: str, read: Any, expected: Any) -> None:
    assert read(load(project, override, axes={"train.steps": [10, 20]})) == expected


def test_an_override_reaches_into_a_conditional_axis(project: Path) -> None:
    axes = {"model": FAMILIES, "model.num_experts": {"when": {"model.family": "task_moe"}, "values": [2, 4]}}
    assert len(load(project, axes=axes).points()) == 4
    assert len(load(project, "axes.model.num_experts.values=[2,4,8]", axes=axes).points()) == 5
    changed = load(project, "axes.model.num_experts.when.model.family=[task_moe,adapter_moe]", axes=axes)
    assert len(changed.points()) == 5
    assert len(load(project, "axes.model.num_experts={when: {model.family: task_moe}, values: [3]}", axes=axes).points()) == 3


def test_the_last_axis_varies_fastest(project: Path) -> None:
    points = load(project, axes={"train.steps": [1, 2], "train.lr": [0.1, 0.2]}).points()
    assert [tuple(p.axes.values()) for p in points] == [(1, 0.1), (1, 0.2), (2, 0.1), (2, 0.2)]
    assert [(p.config.train.steps, p.config.train.lr) for p in points] == [(1, 0.1), (1, 0.2), (2, 0.1), (2, 0.2)]


def test_another_family_replaces_the_model_and_the_same_family_merges(project: Path) -> None:
    trial = {**BASE["trial"], "model": {"family": "task_moe", "num_experts": 8, "layers": [1]}}
    values = [{"family": "dense"}, {"family": "adapter_moe"}, {"family": "task_moe", "layers": [0]}, {"num_experts": 2}]
    models = [p.config.model for p in load(project, trial=trial, axes={"model": values}).points()]
    assert models == [
        DenseConfig(),
        AdapterMoEConfig(),
        TaskMoEConfig(num_experts=8, layers=(0,)),
        TaskMoEConfig(num_experts=2, layers=(1,)),
    ]
    short = load(project, trial=trial, axes={"model.family": ["dense", "task_moe"]}).points()
    assert [p.config.model for p in short] == [DenseConfig(), TaskMoEConfig(num_experts=8, layers=(1,))]


def test_a_mapping_merges_into_other_groups_and_replaces_the_low_resource_table(project: Path) -> None:
    trial = {**BASE["trial"], "mixture": {"tasks": ["*"], "low_resource": {"a": 3}}}
    axes = {"train": [{"lr": 0.5}], "mixture.low_resource": [{}, {"b": 4}]}
    configs = [p.config for p in load(project, trial=trial, axes=axes).points()]
    assert [(c.train.steps, c.train.lr) for c in configs] == [(10, 0.5)] * 2
    assert [c.mixture.low_resource for c in configs] == [{}, {"b": 4}]


def test_a_conditional_axis_leaves_other_points_alone(project: Path) -> None:
    axes = {"model": FAMILIES, "model.num_experts": {"when": {"model.family": ["task_moe", "adapter_moe"]}, "values": [2, 8]}}
    points = load(project, axes=axes).points()
    assert [(p.config.model.family, p.axes.get("model.num_experts")) for p in points] == [
        ("dense", None),
        ("task_moe", 2),
        ("task_moe", 8),
        ("adapter_moe", 2),
        ("adapter_moe", 8),
    ]


@pytest.mark.parametrize(
    ("when", "points"),
    [
        ({"train.steps": 10}, 2),  # set by the trial
        ({"train.precision": "fp32"}, 2),  # a default
        ({"model.family": "dense"}, 2),  # a default that other defaults hang on
        ({"train.steps": [3, 10], "train.lr": 0.001}, 2),
    ],
)
def test_a_condition_sees_the_trial_and_defaults(project: Path, when: dict[str, Any], points: int) -> None:
    assert len(load(project, axes={"train.clip": {"when": when, "values": [1, None]}}).points()) == points


def test_a_zipped_axis_sets_its_keys_together(project: Path) -> None:
    sizes = [{"train.steps": 5, "train.lr": 0.1}, {"train": {"steps": 6}, "model": {"family": "task_moe"}}]
    points = load(project, axes={"budget": sizes, "train.clip": [1, 2]}).points()
    assert [(p.config.train.steps, p.config.train.lr, p.config.train.clip) for p in points] == [
        (5, 0.1, 1.0), (5, 0.1, 2.0), (6, 0.001, 1.0), (6, 0.001, 2.0),
    ]  # fmt: skip
    assert [p.config.model.family for p in points] == ["dense", "dense", "task_moe", "task_moe"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"name": None}, "name: must be given"),
        ({"name": "../x"}, "name: must be a file name of letters"),
        ({"name": ".."}, "name: must be a file name of letters"),
        ({"name": 7}, "name: must be text, got 7"),
        ({"nmae": "x"}, "nmae: unknown key; did you mean name"),
        ({"file": "x"}, "file: unknown key"),
        ({"catalogues": []}, "catalogues: must list at least one"),
        ({"catalogues": ["gone.yaml"]}, "catalogues: no such file: gone.yaml (looked for "),
        ({"seeds": 0}, "seeds: must be in 1..1000"),
        ({"seeds": [1, 1]}, "seeds: must be different numbers from 0"),
        ({"seeds": "two"}, "seeds: must be a whole number, got 'two' or must be a list"),
        ({"baselines": ["single"]}, "baselines[0]: must be one of single_task, parameter_matched"),
        (
            {"resources": {"gpus": 1.5}},
            "resources.gpus: must be at most 1 (a worker trains on one GPU; workers adds more), got 1.5",
        ),
        ({"resources": {"gpus": 0.5, "workers": 2}}, "resources.gpus: must be a whole number when a trial has several workers"),
        ({"resources": {"workers": 0}}, "resources.workers: must be at least 1, got 0"),
        ({"schedule": {"kind": "asha"}}, "schedule.kind: must be one of grid, got 'asha'"),
        ({"trial": {"seed": 1}}, "trial.seed: must not be set here"),
        ({"trial": {"train": {"steps": "ten"}}}, "trial.train.steps: must be a whole number, got 'ten'"),
        ({"trial": {"train": {"stpes": 1}}}, "trial.train.stpes: unknown key; did you mean steps"),
        ({"trial": {"train": {"steps": "${nowhere}"}}}, "trial.train.steps: Interpolation key 'nowhere' not found"),
        ({"trial": {"model": {"family": "moe"}}}, "trial.model.family: must be one of dense, task_moe, adapter_moe, got 'moe'"),
        ({"axes": {"train.lrr": [1]}}, "axes.train.lrr: unknown key; did you mean train.lr"),
        ({"axes": {"seed": [1]}}, "axes.seed: cannot be an axis"),
        ({"axes": {"train.lr": 0.1}}, "axes.train.lr: must be a list with at least one value, got 0.1"),
        ({"axes": {"train.lr": {"vlaues": [1]}}}, "axes.train.lr: must be a list of values, or a mapping of when and values"),
        ({"axes": {"modle": [{"family": "dense"}]}}, "axes.modle[0].family: unknown key; did you mean model.family"),
        ({"axes": {"train.lr": [0.1, -1]}}, "trial.train.lr (at train.lr=-1): must be positive, got -1.0"),
        (
            {"axes": {"train.lr": {"when": {"model.famly": "dense"}, "values": [1]}}},
            "axes.train.lr.when.model.famly: unknown key; did you mean model.family",
        ),
        (
            {"axes": {"train.lr": {"when": {"model.family": "taks_moe"}, "values": [1]}, "train.clip": [1]}},
            "axes.train.lr.when: must hold at some point of the grid, but model.family is 'dense', not 'taks_moe'",
        ),
        (
            {"axes": {"train.lr": {"when": {"model.family": "dense"}, "values": [1]}, "model": FAMILIES}},
            "axes.train.lr.when.model.family: must be known before this axis; put the axis model first",
        ),
        (
            {"axes": {"train.lr": [0.1], "zip": [{"train.lr": 0.2}]}},
            "axes.train.lr: is undone by the axis zip; put train.lr after it",
        ),
        (
            {"axes": {"model": [{"family": "task_moe", "router": {"top_k": 3}}], "model.num_experts": [4, 2]}},
            "trial.model.router.top_k (at model={family:task_moe,router:{top_k:3}}, model.num_experts=2): "
            "must be in 1..num_experts, got top_k=3, num_experts=2",
        ),
        (
            {"axes": {"train.steps": list(range(1, 200)), "train.lr": list(range(1, 200))}},
            "axes: must make at most 10000 points",
        ),
    ],
)
def test_a_mistake_is_one_line_with_file_key_and_law(project: Path, changes: dict[str, Any], expected: str) -> None:
    assert mistake(project, **changes).startswith(expected)


def test_a_mistake_of_the_trial_itself_is_not_blamed_on_an_axis(project: Path) -> None:
    changes = {"trial": {"train": {"lr": -1}}, "axes": {"train.steps": [1, 2]}}
    assert mistake(project, **changes) == "trial.train.lr: must be positive, got -1.0"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed=1", "seed: unknown key; did you mean seeds?"),
        ("seeds", "an override must be key=value, got 'seeds'"),
        ("trial.train.stpes=1", "trial.train.stpes: unknown key; did you mean trial.train.steps"),
        ("trial.steps=1", "trial.steps: unknown key; did you mean trial.train.steps"),
        ("trial.train.lr=1", "trial.train.lr: has no effect, the axis sets it in every trial; use axes.train.lr=[...]"),
        ("axes.train.lrr=[1]", "axes.train.lrr: unknown key; did you mean axes.train.lr?"),
        ("resources.gpu=1", "resources.gpu: unknown key; did you mean resources.gpus"),
        ("name.x=1", "name.x: unknown key"),
        ("trial.train.steps=[1", "trial.train.steps: value is not valid YAML"),
    ],
)
def test_a_wrong_override_is_refused(project: Path, override: str, expected: str) -> None:
    assert mistake(project, override, axes={"train.lr": [0.1]}).startswith(expected)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "must be a mapping with at least a name"),
        (b"- 1\n", "must be a mapping with at least a name"),
        (b"name: x\ntrial: {a: [1, 2\nseeds: 3\n", "line 3: is not valid YAML: "),
        (b"name: x\nseeds: 1\nname: y\n", "line 3: is not valid YAML: found duplicate key name"),
        (b"name: \xff\n", "must be UTF-8 text"),
    ],
)
def test_a_broken_file_is_refused(project: Path, content: bytes, expected: str) -> None:
    (project / "sweeps/x.yaml").write_bytes(content)
    with pytest.raises(SweepError) as error:
        load_sweep("sweeps/x.yaml")
    assert str(error.value).startswith(f"sweeps/x.yaml: {expected}")
    assert "\n" not in str(error.value)


def test_a_missing_file_is_said_to_be_missing(project: Path) -> None:
    with pytest.raises(SweepError, match=r"^sweeps/gone.yaml: no such file$"):
        load_sweep("sweeps/gone.yaml")
    with pytest.raises(SweepError, match=r"^sweeps: cannot be read: Is a directory$"):
        load_sweep("sweeps")


def test_planning_loads_nothing_heavy() -> None:
    heavy = ["torch", "lightning", "transformers", "ray", "mlflow", "datasets"]
    code = f"import json, sys, pipelines.spec, pipelines.plan; print(json.dumps([m for m in {heavy} if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


@pytest.mark.parametrize(
    ("axes", "override"),
    [
        ({"train.lr": [0.1, 0.2]}, "trial.train.lr=1"),
        ({"length": [{"train.steps": 3, "train.lr": 0.1}, {"train.steps": 6, "train.lr": 0.2}]}, "trial.train.steps=1"),
        ({"mixture": [{"sampling": "uniform"}, {"sampling": "proportional"}]}, "trial.mixture.sampling=uniform"),
    ],
)
def test_an_override_that_an_axis_undoes_is_refused(project: Path, axes: dict[str, Any], override: str) -> None:
    assert "has no effect, the axis" in mistake(project, override, axes=axes)
