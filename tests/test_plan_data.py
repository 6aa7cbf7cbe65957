"""Plans over mixtures with roles, samples and forms: what is resolved, refused, warned of, carried into baselines, compared."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from standins import Planned, Task
from test_plan import by_id, candidates, mistake, plan_of

from lightning_modules.config import DenseConfig, MixtureConfig, TrialConfig
from lightning_modules.data.prepared import prepare
from pipelines.baselines import single_task, whole_mixture
from pipelines.plan import Plan, describe
from pipelines.store import TrialFolder, TrialResult
from pipelines.transfer import UNRELATED, Comparison, compare
from pipelines.trial import run_trial

SIZE = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "ffn_size": 32, "vocab_size": 320}
T5 = {"name": "tiny-t5", "max_length": 48, "max_target_length": 4, "size": SIZE}
WORDS = ("one", "two", "three", "four", "five")


def _row(kind: str, name: str, split: str, i: int) -> dict[str, Any]:
    text = f"{name} {split} {WORDS[i % 5]} {i}"
    match kind:
        case "classification":
            return {"text": text, "label": "y" if i % 3 else "n"}
        case "regression":
            return {"text": text, "label": float(i % 4)}
        case "tagging":
            return {"tokens": text.split(), "tags": ["A", "B", "A", "B"]}
        case _:
            return {"text": text, "target": WORDS[i % 3]}


ENTRIES: list[dict[str, Any]] = [
    {"name": "a", "kind": "classification", "category": "toy/near", "labels": ["y", "n"]},
    {"name": "b", "kind": "classification", "category": "toy/near", "labels": ["y", "n"]},
    {"name": "r", "kind": "regression", "category": "toy/far"},
    {"name": "tags", "kind": "tagging", "category": "toy/far", "labels": ["A", "B"]},
    {"name": "q", "kind": "text2text", "category": "toy/text"},
    {"name": "closed", "kind": "text2text", "category": "toy/text", "metric": "accuracy", "labels": list(WORDS[:3])},
]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory with a catalogue of tasks of several kinds: 30 training, 10 dev and 6 test examples each."""
    monkeypatch.chdir(tmp_path)
    entries = []
    for entry in ENTRIES:
        files = {}
        for split, n in {"train": 30, "dev": 10, "test": 6}.items():
            files[split] = f"{entry['name']}.{split}.jsonl"
            rows = [_row(entry["kind"], entry["name"], split, i) for i in range(n)]
            (tmp_path / files[split]).write_text("".join(json.dumps(row) + "\n" for row in rows))
        entries.append({**entry, "files": files})
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump({"tasks": entries}, sort_keys=False))
    return tmp_path


def change_task(project: Path, name: str, **changes: Any) -> None:
    catalogue = yaml.safe_load((project / "toy.yaml").read_text())
    next(entry for entry in catalogue["tasks"] if entry["name"] == name).update(changes)
    (project / "toy.yaml").write_text(yaml.safe_dump(catalogue, sort_keys=False))


def trial(mixture: Mapping[str, Any], **groups: Any) -> dict[str, Any]:
    return {"mixture": {"batch_size": 8, "tasks_per_step": 4, **mixture}, "train": {"steps": 100}, **groups}


def only(plan: Plan) -> TrialConfig:
    (candidate,) = candidates(plan)
    return candidate.config


# Roles and shares


def test_patterns_of_roles_become_names_of_the_mixture(project: Path) -> None:
    mixture = {
        "tasks": ["a", "b", "q", "closed"],
        "held_out": ["category:toy/text", "!closed"],
        "unrelated": ["kind:class*", "!a"],
    }
    plan = plan_of(project, trial=trial(mixture, backbone=T5))
    config = only(plan).mixture
    assert (config.tasks, config.held_out, config.unrelated) == (("a", "b", "q", "closed"), ("q",), ("b",))
    (candidate,) = candidates(plan)
    assert list(candidate.shares) == list(candidate.sizes) == ["a", "b", "closed"]
    assert "q" in plan.tasks and "q" in only(plan).digests
    assert [t.task for t in plan.trials if t.task] == list(candidate.baselines["single_task"]) == ["a", "b", "closed"]


def test_weights_by_pattern_become_shares_of_the_trained_tasks(project: Path) -> None:
    weights = {"*": 1.0, "category:toy/near": 2.0, "b": 5.0}
    mixture = {"tasks": ["a", "b", "r", "q"], "sampling": "weights", "weights": weights, "held_out": ["q"]}
    plan = plan_of(project, trial=trial(mixture, backbone=T5))
    assert only(plan).mixture.weights == {"a": 2.0, "b": 5.0, "r": 1.0}
    assert candidates(plan)[0].shares == pytest.approx({"a": 2 / 8, "b": 5 / 8, "r": 1 / 8})


def test_names_and_patterns_of_the_same_roles_are_the_same_trial(project: Path) -> None:
    first, second = (
        plan_of(project, trial=trial({"tasks": ["a", "b", "q"], "held_out": held, "unrelated": [unrelated]}, backbone=T5))
        for held, unrelated in ((["q"], "b"), (["kind:text2text"], "b*"))
    )
    assert [t.trial_id for t in first.trials] == [t.trial_id for t in second.trials]
    trained = plan_of(project, trial=trial({"tasks": ["a", "b", "q"]}, backbone=T5))
    assert candidates(trained)[0].trial_id != candidates(first)[0].trial_id


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (trial({"tasks": ["a", "b"], "held_out": ["b"]}),
         "trial.mixture.held_out: must be text2text tasks: b is classification, whose head would never train"),
        (trial({"tasks": ["a", "q"]}),
         "trial.backbone.name: must have a decoder (bart, t5, tiny-bart, tiny-t5) for the text2text task q, got "
         "'tiny-encoder', which is bert"),
        (trial({"tasks": ["a", "r"]}, data={"form": "text2text"}),
         "trial.backbone.name: must have a decoder (bart, t5, tiny-bart, tiny-t5) for the text2text task a"),
        (trial({"tasks": ["a", "tags"]}, data={"form": "text2text"}, backbone=T5),
         "trial.data.form: must be native for tags: only classification, regression, choice can be posed as text to text, "
         "it is tagging"),
        (trial({"tasks": ["a", "b", "r"], "sampling": "weights", "weights": {"category:toy/far": 1.0, "a": 2.0}}),
         "trial.mixture.weights: must give every trained task a share, none for b"),
        (trial({"tasks": ["a"], "sampling": "weights", "weights": {"b": 1.0}}),
         "trial.mixture.weights: must name tasks of the mixture, which has a, got b"),
        (trial({"tasks": ["a"], "sampling": "unimax", "max_epochs": 2, "batch_tokens": 64}),
         "trial.mixture.batch_tokens: must be null with sampling: unimax, whose plan counts examples, got 64"),
        (trial({"tasks": ["a", "b"], "held_out": ["z*"]}, backbone=T5),
         "trial.mixture.held_out: must name tasks of the mixture, which has a, b, got z*"),
        (trial({"tasks": ["a", "b"], "unrelated": ["tags"]}),
         "trial.mixture.unrelated: must name tasks of the mixture, which has a, b, got tags"),
        (trial({"tasks": ["q", "closed"], "held_out": ["*"]}, backbone=T5),
         "trial.mixture.held_out: must leave at least one task to train on, got ['*']"),
        (trial({"tasks": ["a", "q"], "held_out": ["q"], "unrelated": ["q"]}, backbone=T5),
         "trial.mixture.unrelated: must not name held-out tasks, got q"),
        (trial({"tasks": ["a"]}, data={"draw": 1}),
         "trial.data.draw: applies with few_shot only, got few_shot=null, draw=1"),
        (trial({"tasks": ["a"]}, data={"few_shot": 2, "draw": 5}), "trial.data.draw: must be in 0..4, got 5"),
        (trial({"tasks": ["a"], "sampling": "adaptive"}),
         "trial.mixture.adapt_every: must be at least 1 for sampling: adaptive, got None"),
    ],
    ids=["held_out_with_a_head", "no_decoder", "posed_without_decoder", "posed_tagging", "weights_lack_one",
         "weights_of_others", "unimax_tokens", "unknown_held_out",
         "unrelated_of_others", "nothing_left", "both_roles", "draw_alone", "draw_5",
         "adaptive_alone"],
)  # fmt: skip
def test_a_mistake_costs_one_clear_line(settings: dict[str, Any], expected: str, project: Path) -> None:
    assert mistake(project, trial=settings).startswith(expected)


def test_a_posed_task_may_be_held_out(project: Path) -> None:
    plan = plan_of(project, trial=trial({"tasks": ["a", "b"], "held_out": ["b"]}, data={"form": "text2text"}, backbone=T5))
    assert only(plan).mixture.held_out == ("b",) and list(candidates(plan)[0].shares) == ["a"]


# Comparison

TASKS = {"a": Task("near"), "b": Task("near"), "c": Task("far"), "held": Task("text")}
GAINS = {"a": 0.1, "b": -0.3, "c": 0.2}


def comparison_with_roles(lost: str | None = None) -> Comparison:
    """Two seeds; a gains .1, c .2, the unrelated b loses .3; ``held`` is scored and has no baseline. ``lost``: a baseline
    without a result."""
    mixture = MixtureConfig(tasks=tuple(TASKS), held_out=("held",), unrelated=("b",))
    trials: list[Planned] = []
    results: dict[str, TrialResult] = {}

    def add(planned: Planned, scores: Mapping[str, float]) -> None:
        trials.append(planned)
        if planned.trial_id != lost:
            results[planned.trial_id] = TrialResult(
                trial_id=planned.trial_id, status="finished", steps=1, seconds=1.0, started_ms=0, finished_ms=1,
                scores={"test": {task: {"accuracy": score} for task, score in scores.items()}},
                primary=dict.fromkeys(scores, "accuracy"),
            )  # fmt: skip

    for seed in (0, 1):
        alone = {task: f"alone-{task}-{seed}" for task in GAINS}
        for task, trial_id in alone.items():
            config = TrialConfig(mixture=MixtureConfig(tasks=(task,)))
            add(Planned(trial_id, "single_task", f"single_task {task}", seed, config, task=task), {task: 0.5})
        scores = {task: 0.5 + gain + 0.001 * seed for task, gain in GAINS.items()} | {"held": 0.3 + 0.1 * seed}
        add(Planned(f"frozen-{seed}", "frozen_backbone", "frozen", seed, TrialConfig(mixture=mixture)),
            dict.fromkeys(TASKS, 0.4))  # fmt: skip
        baselines = {"single_task": alone, "frozen_backbone": f"frozen-{seed}"}
        add(Planned(f"all-{seed}", "candidate", "all", seed, TrialConfig(mixture=mixture), baselines=baselines), scores)
    return compare(trials, results, TASKS)


def test_unrelated_tasks_are_a_group_of_their_own_and_not_in_the_means() -> None:
    comparison = comparison_with_roles()
    frozen, summary = comparison.summaries
    assert frozen.role == "frozen_backbone"
    mean = summary.mean_gain.interval
    assert mean is not None and mean.mean == pytest.approx(0.15 + 0.0005)  # a and c
    relative = summary.delta_m.interval
    assert relative is not None and relative.mean == pytest.approx(2 * mean.mean)
    assert {name: round(e.interval.mean, 3) for name, e in summary.categories.items() if e.interval} == {
        "near": 0.1, "far": 0.2, UNRELATED: pytest.approx(-0.2995, abs=1e-3),
    }  # fmt: skip
    assert comparison.cells["all", "b"].category == UNRELATED
    assert comparison.cells["all", "b"].gain.verdict == "hurt"
    assert (summary.hurt, summary.below, summary.helped) == ((), (), ("a", "c"))
    assert summary.worst is not None and summary.worst[0] == "a"
    versus = summary.versus["frozen_backbone"].interval
    assert versus is not None and versus.mean == pytest.approx((0.6 + 0.7) / 2 - 0.4 + 0.0005)


def test_held_out_tasks_have_scores_and_no_gain_and_nobody_waits_for_one() -> None:
    comparison = comparison_with_roles()
    summary = comparison.summaries[1]
    cell = comparison.cells["all", "held"]
    assert cell.scores == pytest.approx({0: 0.3, 1: 0.4}) and not cell.baseline
    assert cell.category == "held out" and "held out" not in summary.categories
    assert cell.gain.interval is None and "held is held out: no gain" in cell.gain.reason
    assert summary.pending == () and summary.mean_gain.interval is not None and not summary.mean_gain.reason
    figures = comparison.figures()
    assert figures["neg_count/all"] == 0 and figures["worst_gain/all"] == pytest.approx(0.1005)
    gains = next(comparison.trial_gains[trial] for trial in comparison.trial_gains if trial == "all-0")
    assert gains["worst_gain"] == pytest.approx(0.1) and gains["neg_count"] == 0 and "gain_abs/held" not in gains


def test_a_lost_control_leaves_the_means_and_a_lost_task_does_not() -> None:
    assert comparison_with_roles("alone-b-0").summaries[1].mean_gain.reason == ""
    waiting = comparison_with_roles("alone-a-0").summaries[1].mean_gain
    assert "alone-a-0" in waiting.reason and waiting.interval is not None and waiting.interval.n == 1


# Baselines


def alone(plan: Plan, task: str) -> TrialConfig:
    (candidate,) = candidates(plan)
    return by_id(plan)[candidate.baselines["single_task"][task]].config


def test_a_baseline_keeps_the_token_budget_of_a_group_and_how_groups_are_cut(project: Path) -> None:
    mixture = {"tasks": ["a", "b"], "batch_tokens": 400, "bucketing": False, "sampling": "weights", "weights": {"a": 3, "b": 1}}
    plan = plan_of(project, trial=trial(mixture, train={"steps": 100, "loss_weighting": "balance", "eval_every": 10}))
    config = only(plan)
    assert config.mixture.group_tokens == 100
    for task, groups in (("a", 3), ("b", 1)):
        baseline = alone(plan, task)
        assert baseline.mixture.group_tokens == 100 and not baseline.mixture.bucketing
        assert (baseline.mixture.tasks_per_step, baseline.train.steps) == (groups, 100)
        assert baseline.mixture.sampling == "uniform" and not baseline.mixture.weights
        assert (baseline.train.loss_weighting, baseline.train.eval_every) == ("uniform", None)


def test_a_baseline_of_unimax_makes_as_many_updates_as_the_cap_allows_its_task(project: Path) -> None:
    """800 examples are drawn in all; b is capped at 2 passes over its 10 examples, a gets the rest, 60 at most."""
    mixture = {"tasks": ["a", "b"], "sampling": "unimax", "max_epochs": 2, "low_resource": {"b": 10}}
    plan = plan_of(project, trial=trial(mixture))
    assert candidates(plan)[0].shares == pytest.approx({"a": 60 / 80, "b": 20 / 80})
    for task, share in (("a", 0.75), ("b", 0.25)):
        baseline = alone(plan, task)
        assert baseline.train.steps * baseline.mixture.tasks_per_step == 100 * 4 * share
        assert (baseline.mixture.sampling, baseline.mixture.max_epochs) == ("uniform", None)
    assert alone(plan, "b").mixture.low_resource == {"b": 10} and not alone(plan, "a").mixture.low_resource


def test_a_few_shot_baseline_has_the_same_sample(project: Path) -> None:
    mixture = {"tasks": ["a", "b", "q"], "low_resource": {"b": 2}, "held_out": ["q"], "unrelated": ["b"]}
    data = {"few_shot": 2, "draw": 3, "max_eval": 5, "form": "text2text"}
    plan = plan_of(project, trial=trial(mixture, data=data, backbone=T5))
    for task in ("a", "b"):
        baseline = alone(plan, task)
        assert baseline.data == only(plan).data
        assert (baseline.mixture.held_out, baseline.mixture.unrelated, baseline.mixture.tasks) == ((), (), (task,))
        assert set(baseline.digests) == {"a", "b", "q"}, "the tokenizer reads all of them"
    planned = by_id(plan)
    sizes = {t.task: t.sizes for t in planned.values() if t.task}
    assert sizes == {"a": {"a": 4}, "b": {"b": 2}}


def test_the_same_baseline_serves_mixtures_that_differ_in_what_it_does_not_read(project: Path) -> None:
    base = {"tasks": ["a", "b"], "sampling": "uniform"}
    plain = plan_of(project, trial=trial(base))
    for changes, train in (
        ({"unrelated": ["b"]}, {}),
        ({"sampling": "adaptive", "adapt_every": 5}, {}),
        ({"sampling": "weights", "weights": {"*": 2.0}}, {"loss_weighting": "uncertainty"}),
        ({"batching": "mixed"}, {"loss_weighting": "size"}),
    ):
        other = plan_of(project, trial=trial({**base, **changes}, train={"steps": 100, **train}))
        assert (candidates(other)[0].trial_id == candidates(plain)[0].trial_id) == ("unrelated" in changes)  # a way of reading
        assert candidates(other)[0].baselines == candidates(plain)[0].baselines


def test_a_single_task_baseline_is_a_trial_like_any_other() -> None:
    """What the rule of the mixture needs does not stay behind where it would be refused."""
    for settings in (
        {"sampling": "unimax", "max_epochs": 2.0}, {"sampling": "weights", "weights": {"a": 1.0, "b": 2.0}},
        {"sampling": "adaptive", "adapt_every": 3}, {"batch_tokens": 64, "bucketing": False},
    ):  # fmt: skip
        config = TrialConfig(mixture=MixtureConfig(tasks=("a", "b"), **settings))
        for share in (0.01, 0.5, 0.99):
            found = single_task(config, "a", share)
            assert replace(found) == found and found.mixture.group_tokens == config.mixture.group_tokens
            assert found.mixture.group_size == config.mixture.group_size


def test_the_frozen_backbone_is_one_dense_trial_per_configuration_and_seed(project: Path) -> None:
    axes = {"model": [{"family": "dense"}, {"family": "task_moe"}, {"family": "adapter_moe"}], "train.lr": [1e-3, 1e-4]}
    settings = trial({"tasks": ["a", "b"], "batch_tokens": 64})
    plan = plan_of(project, trial=settings, axes=axes, seeds=2, baselines=["frozen_backbone"])
    frozen = [t for t in plan.trials if t.role == "frozen_backbone"]
    assert len(candidates(plan)) == 12 and len(frozen) == 4, "one for each learning rate and seed, whatever the family"
    for candidate in candidates(plan):
        baseline = by_id(plan)[candidate.baselines["frozen_backbone"]]
        assert baseline.seed == candidate.seed and baseline.role == "frozen_backbone"
        config, model = baseline.config, candidate.config
        assert config.backbone == replace(model.backbone, frozen=True) and config.model == DenseConfig()
        assert (config.mixture, config.train, config.data) == (model.mixture, model.train, model.data)
    assert len({t.configuration for t in frozen}) == 2


def test_a_frozen_dense_candidate_is_not_its_own_baseline(project: Path) -> None:
    settings = trial({"tasks": ["a"]}, backbone={"frozen": True})
    (candidate,) = candidates(plan_of(project, trial=settings, baselines=["frozen_backbone"]))
    assert not candidate.baselines
    assert whole_mixture(candidate.config, "frozen_backbone") == candidate.config


@pytest.mark.parametrize("names", [("q",), ("a", "q"), ("q", "closed")], ids="+".join)
def test_a_backbone_that_answers_itself_is_not_frozen_bare(names: tuple[str, ...], project: Path) -> None:
    """Its decoder is its head: frozen, nothing would train. Adapters may."""
    settings = trial({"tasks": list(names)}, backbone=T5)
    plan = plan_of(project, trial=settings, baselines=["frozen_backbone"])
    assert [t.role for t in plan.trials] == ["candidate"]
    frozen = trial({"tasks": list(names)}, backbone={**T5, "frozen": True})
    assert mistake(project, trial=frozen).startswith("trial.backbone.frozen: must be false for text2text tasks")
    assert plan_of(project, trial=frozen | {"model": {"family": "adapter_moe"}}, baselines=[]).trials


def test_a_frozen_backbone_trains_its_heads(project: Path) -> None:
    settings = trial({"tasks": ["a", "r"]}, data={"max_eval": 2}, backbone=T5) | {"train": {"steps": 4}}
    plan = plan_of(project, trial=settings, baselines=["frozen_backbone"])
    (frozen,) = [t for t in plan.trials if t.role == "frozen_backbone"]
    prepare([frozen.config], plan.specs, project / "prepared")
    result = run_trial(frozen.config, TrialFolder(project / "runs", frozen.trial_id), project / "prepared")
    assert result is not None and set(result.scores["test"]) == {"a", "r"}


# Warnings


def test_warnings_of_the_data_are_told_and_kept(project: Path) -> None:
    shared = [json.dumps(_row("classification", "a", "train", i)) for i in (4, 5)]
    with (project / "a.test.jsonl").open("a") as file:
        file.write("".join(f"{line}\n" for line in shared))
    long = {"text": " ".join(["far"] * 21), "label": 2.0}
    for split, n in (("train", 2), ("test", 1)):
        with (project / f"r.{split}.jsonl").open("a") as file:
            file.write((json.dumps(long) + "\n") * n)
    settings = trial({"tasks": ["a", "b", "r"]}, backbone={"max_length": 20})
    plan = plan_of(project, trial=settings, axes={"model": [{"family": "dense"}, {"family": "task_moe"}]}, seeds=2)
    expected = [
        "a: 2 of 8 test examples also stand in train",
        "r: 1 of 7 test examples also stand in train",
        "r: 3 examples have more words than backbone.max_length=20; they are read in windows",
    ]
    assert list(plan.warnings) == expected, "each once, however many trials share it; none for b"
    assert [line for line in describe(plan) if line.startswith("warning: ")] == [f"warning: {line}" for line in expected]
    assert json.loads(plan.to_json())["warnings"] == expected
    quiet = plan_of(project, trial=trial({"tasks": ["b"]}, backbone={"max_length": 20}))
    assert not quiet.warnings and not [line for line in describe(quiet) if "warning" in line]


# Forms


def posed_ids(project: Path, form: str = "text2text") -> dict[str | None, str]:
    """Task (None: the mixture) -> trial id, where the tokenizer reads another task only."""
    backbone = {**T5, "size": {**SIZE, "tokenizer_tasks": ["closed"]}}
    plan = plan_of(project, trial=trial({"tasks": ["a", "b", "r"]}, data={"form": form}, backbone=backbone))
    return {t.task: t.trial_id for t in plan.trials}


def differing(before: Mapping[str | None, str], after: Mapping[str | None, str]) -> set[str | None]:
    assert before.keys() == after.keys()
    return {task for task in before if before[task] != after[task]}


@pytest.mark.parametrize(
    ("task", "change"),
    [
        ("a", {"prompt": "say y or n: {text}"}),
        ("a", {"answers": {"y": "yes"}}),
        ("r", {"prompt": "how much? {text}"}),
        ("r", {"answers": {"decimals": 2}}),
    ],
)
def test_ids_follow_prompts_and_answers_where_they_are_used(task: str, change: dict[str, Any], project: Path) -> None:
    native, posed = posed_ids(project, "native"), posed_ids(project)
    assert differing(native, posed) == {None, "a", "b", "r"}
    change_task(project, task, **change)
    assert differing(posed, posed_ids(project)) == {None, task}
    assert not differing(native, posed_ids(project, "native"))


# Sizes


@pytest.mark.parametrize(
    ("names", "data"),
    [
        (("a", "b", "r", "tags"), {"few_shot": 3}),
        (("a", "b", "r", "tags"), {"few_shot": 3, "max_train": 4}),
        (("a", "b", "r", "tags"), {"few_shot": 12, "draw": 2}),
        (("a", "b", "r", "q"), {"few_shot": 3, "form": "text2text"}),
        (("a", "closed"), {"few_shot": 3}),
    ],
    ids=["few", "capped", "fewer_of_a_class", "posed", "closed_text2text"],
)
def test_the_plan_knows_how_many_examples_a_trial_will_use(names: tuple[str, ...], data: dict[str, Any], project: Path) -> None:
    """Of 30 examples 10 are of class n: k = 12 finds 22. b keeps 5 of its sample."""
    settings = trial({"tasks": list(names), "low_resource": {"b": 5} if "b" in names else {}}, data={**data, "max_eval": 4},
                     backbone=T5)  # fmt: skip
    settings["train"]["steps"] = 1
    settings["generation"] = {"beams": 1}
    plan = plan_of(project, trial=settings, baselines=[])
    (candidate,) = candidates(plan)
    prepare([candidate.config], plan.specs, project / "prepared")
    folder = TrialFolder(project / "runs", candidate.trial_id)
    result = run_trial(candidate.config, folder, project / "prepared")
    assert result is not None
    assert {task: facts["train"] for task, facts in result.data.items()} == dict(candidate.sizes)
    if data["few_shot"] == 12:
        assert candidate.sizes == {"a": 22, "b": 5, "r": 24, "tags": 24}


def test_what_unimax_cannot_keep_is_told(project: Path) -> None:
    settings = trial({"tasks": ["a", "b"], "sampling": "unimax", "max_epochs": 1.0}) | {"train": {"steps": 100}}
    [warning] = [line for line in plan_of(project, trial=settings).warnings if "max_epochs" in line]
    assert warning.startswith("mixture.max_epochs=1 allows ") and "the trial draws 800: every task is repeated " in warning
    few = settings | {"train": {"steps": 2}}
    assert not [line for line in plan_of(project, trial=few).warnings if "max_epochs" in line]


def test_roles_are_no_axis(project: Path) -> None:
    """They change no training, so the points would be one trial."""
    axes = {"mixture.unrelated": [[], ["b"]]}
    assert mistake(project, trial=trial({"tasks": ["a", "b"]}), axes=axes).startswith(
        "trial.mixture.unrelated: must be the same at every point of the axes"
    )


def test_a_learned_router_has_no_route_for_a_held_out_task(project: Path) -> None:
    settings = trial({"tasks": ["a", "q"], "held_out": ["q"]}, backbone=T5)
    assert plan_of(project, trial=settings, baselines=[]).trials
    routed = settings | {"model": {"family": "task_moe"}}
    assert "must be empty with a learned router whose routes of q would never train" in mistake(
        project, trial=routed, baselines=[]
    )
    fixed = settings | {"model": {"family": "task_moe", "router": {"kind": "uniform"}}}
    assert plan_of(project, trial=fixed, baselines=[]).trials
