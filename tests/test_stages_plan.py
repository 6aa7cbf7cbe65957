"""Plans with stages, dense controls by parameters and by compute, and routers that know the tasks or cannot work with them."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_plan import by_id, candidates, mistake, plan_of, trial
from test_plan_data import T5, change_task, project  # noqa: F401  (a fixture)

from lightning_modules.building import ConfigError, build
from lightning_modules.config import (
    AdapterMoEConfig,
    BackboneConfig,
    DenseConfig,
    MixtureConfig,
    RouterConfig,
    StartConfig,
    TaskMoEConfig,
    TrialConfig,
)
from lightning_modules.data.tasks import TaskSpec
from pipelines.architecture import architecture_of
from pipelines.baselines import compute_matched, parameter_matched, passed, routed, single_task, whole_mixture
from pipelines.plan import Plan, PlannedTrial, describe
from pipelines.routing_laws import Routed, resolve_router
from pipelines.spec import SweepError, load_sweep
from pipelines.store import TrialFolder, TrialResult
from pipelines.transfer import compare

MOE = {"family": "task_moe", "router": {"selection": "soft"}}
CHANGES = {"model.router.selection": "gumbel_st", "train.steps": 30, "train.freeze": []}
START = {"load": ["router"], "changes": CHANGES}


def staged(**changes: Any) -> dict[str, Any]:
    """A second stage whose router was learned by another selection."""
    return {
        "mixture": {"tasks": ["a", "b", "r"], "batch_size": 8, "tasks_per_step": 4},
        "model": MOE,
        "train": {"steps": 100, "freeze": ["router"]},
        "start": START,
        **changes,
    }


def stages_of(plan: Plan) -> list[PlannedTrial]:
    return [t for t in plan.trials if t.role == "stage"]


# The plan of stages


def test_the_earlier_trial_is_planned_a_wave_before(project: Path) -> None:  # noqa: F811
    plan = plan_of(project, trial=staged(), seeds=2)
    assert [(t.wave, t.seed) for t in stages_of(plan)] == [(0, 0), (0, 1)]
    for candidate in candidates(plan):
        (stage,) = [t for t in stages_of(plan) if t.seed == candidate.seed]
        assert candidate.wave == 1 and candidate.config.start.trial == stage.trial_id
        assert stage.config.start == StartConfig() and stage.config.train.freeze == ()
        assert (stage.config.train.steps, candidate.config.train.steps) == (30, 100)
        assert (stage.config.mixture, stage.config.digests) == (candidate.config.mixture, candidate.config.digests)
        assert stage.config.model.router.selection == "gumbel_st"  # type: ignore[union-attr]
    assert [t.wave for t in plan.trials] == sorted(t.wave for t in plan.trials)
    assert f"(starts from {stages_of(plan)[0].trial_id})" in "\n".join(describe(plan))


def test_changes_are_in_the_id_by_the_earlier_trials_id_only(project: Path) -> None:  # noqa: F811
    (first,) = candidates(plan_of(project, trial=staged()))
    same = {"load": ["router"], "changes": {**CHANGES, "train.lr": 1e-3}}  # the default, spelled out
    (second,) = candidates(plan_of(project, trial=staged(start=same)))
    assert first.trial_id == second.trial_id and first.config != second.config
    other = {"load": ["router"], "changes": {**CHANGES, "train.lr": 2e-3}}
    (third,) = candidates(plan_of(project, trial=staged(start=other)))
    assert third.trial_id != first.trial_id
    both = {"load": ["router", "heads"], "changes": CHANGES}
    (fourth,) = candidates(plan_of(project, trial=staged(start=both)))
    assert fourth.config.start.trial == first.config.start.trial and fourth.trial_id != first.trial_id


def test_candidates_share_an_earlier_trial(project: Path) -> None:  # noqa: F811
    changes = {**CHANGES, "model.router.temperature": 1.0}
    axes = {"model.router.temperature": [1.0, 2.0], "start.changes": [changes, {**changes, "train.steps": 20}]}
    plan = plan_of(project, trial=staged(), axes=axes)
    assert (len(candidates(plan)), len(stages_of(plan))) == (4, 2)
    labels = [t.configuration for t in candidates(plan)]
    assert labels == [f"task_moe temperature={t} start:steps={n}" for t in (1, 2) for n in (30, 20)]


def test_an_earlier_trial_may_be_a_candidate_too(project: Path) -> None:  # noqa: F811
    one = {"model.router.selection": "gumbel_st", "train.freeze": [], "start": {"load": [], "changes": {}}}
    two = {"start": {"load": ["router"], "changes": {"model.router.selection": "gumbel_st", "train.freeze": []}}}
    plan = plan_of(project, trial=staged(), axes={"arm": [one, two]})
    assert not stages_of(plan) and [t.wave for t in candidates(plan)] == [0, 1]
    first, second = candidates(plan)
    assert second.config.start.trial == first.trial_id
    assert {role for role, _ in first.uses} == {"candidate", "stage"}


def test_three_stages_make_three_waves(project: Path) -> None:  # noqa: F811
    inner = {"load": ["router"], "changes": {"train.steps": 10, "train.freeze": []}}
    start = {"load": ["router", "experts"], "changes": {"train.steps": 20, "start": inner}}
    plan = plan_of(project, trial=staged(start=start), baselines=[])
    assert [(t.wave, t.config.train.steps, t.role) for t in plan.trials] == [
        (0, 10, "stage"), (1, 20, "stage"), (2, 100, "candidate")]  # fmt: skip
    assert [later.config.start.trial for later in plan.trials[1:]] == [earlier.trial_id for earlier in plan.trials[:-1]]


def test_an_earlier_trial_that_has_finished_is_recognised(project: Path) -> None:  # noqa: F811
    (stage,) = stages_of(plan_of(project, trial=staged()))
    folder = TrialFolder(project / "runs", stage.trial_id)
    folder.write_config(stage.config)
    done = TrialResult(trial_id=stage.trial_id, status="finished", scores={}, steps=30, seconds=1, started_ms=0, finished_ms=0)
    folder.write_result(done)
    (again,) = stages_of(plan_of(project, name="other", trial=staged()))
    assert (again.trial_id, again.state) == (stage.trial_id, "finished")
    assert folder.read_config() == stage.config


def test_the_earlier_trial_reads_the_same_tokens(project: Path) -> None:  # noqa: F811
    changes = {**CHANGES, "mixture.tasks": ["a", "b", "tags"]}
    start = {"load": ["router", "backbone", "heads"], "changes": changes}
    plan = plan_of(project, trial=staged(start=start))
    (stage,) = stages_of(plan)
    assert stage.config.backbone == candidates(plan)[0].config.backbone and "r" in stage.config.digests
    assert {"a", "b", "r", "tags"} == set(plan.tasks)
    own = {**changes, "backbone.size.tokenizer_tasks": ["a"]}
    text = mistake(project, trial=staged(start={"load": ["backbone"], "changes": own}))
    assert text.startswith("trial.start.load: cannot take backbone from a trial with another backbone.size")


def test_stages_are_no_part_of_the_comparison(project: Path) -> None:  # noqa: F811
    plan = plan_of(project, trial=staged())
    compared = compare(plan.trials, {}, plan.tasks)
    assert {summary.role for summary in compared.summaries} == {"candidate"}
    assert stages_of(plan)[0].trial_id in {missing.trial_id for missing in compared.missing}


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        ({"load": [], "changes": {"train.steps": 3}}, "trial.start.load: must name the parts to take"),
        ({"load": ["router", "router"]}, "trial.start.load: must name each part once"),
        ({"load": ["soul"]}, "trial.start.load[0]: must be one of router, experts, backbone, heads, got 'soul'"),
        ({"load": ["router"], "trial": "x"}, "trial.start.trial: must not be set"),
        ({"load": ["router"], "changes": {"train.stepz": 3}},
         "trial.start.changes.train.stepz: unknown key; did you mean train.steps or "),
        ({"load": ["router"], "changes": {"seed": 3}}, "trial.start.changes.seed: must not be set: stages share the seed"),
        ({"load": ["router"], "changes": {"start.load": ["heads"]}}, "trial.start.changes.start.load: must be a mapping under"),
        ({"load": ["router"], "changes": {"train.steps": 0}}, "trial.start.changes.train.steps: must be at least 1, got 0"),
        ({"load": ["router"], "changes": {"model.router": {"top_k": 9, "selection": "top_k"}}},
         "trial.start.changes.model.router.top_k: must be in 1..num_experts"),
        ({"load": ["router"], "changes": {"train.compile": True, "backbone.gradient_checkpointing": True}},
         "trial.start.changes.train.compile: cannot compile a backbone"),
        ({"load": ["router"], "changes": {"model.num_experts": 8}},
         "trial.start.load: cannot take router from a trial with another model.num_experts, got 8 there and 4 here"),
        ({"load": ["router"], "changes": {"model.router.network": "linear", "model.router.task_vectors": "onehot",
                                          "mixture.tasks": ["a"]}},
         "trial.start.load: cannot take router from a trial with another model.router.network"),
        ({"load": ["router"], "changes": {"model.router": {"kind": "task", "selection": "soft"}, "mixture.tasks": ["zz"]}},
         "trial.start.changes.mixture.tasks: (in the earlier trial) no task matches 'zz'"),
        ({"load": ["router"], "changes": {"model.family": "dense"}},
         "trial.start.load: cannot take router from a trial with another model.family"),
    ],
)  # fmt: skip
def test_starts_that_cannot_be_made_are_refused(project: Path, start: Mapping[str, Any], expected: str) -> None:  # noqa: F811
    assert mistake(project, trial=staged(start=start)).startswith(expected)


def test_the_arm_with_a_mistake_is_named(project: Path) -> None:  # noqa: F811
    axes = {"start.changes": [CHANGES, {**CHANGES, "train.steps": 0}]}
    with pytest.raises(SweepError, match=r"trial.start.changes.train.steps \(at start.changes=.*steps:0.*must be at least 1"):
        plan_of(project, trial=staged(), axes=axes)


def test_changes_can_be_overridden_on_the_command_line(project: Path) -> None:  # noqa: F811
    plan_of(project, trial=staged())
    sweep = load_sweep("x.yaml", ["trial.start.changes.train.steps=7", "trial.start.changes.model.router.temperature=3"])
    (point,) = sweep.points()
    assert point.earlier[0].train.steps == 7 and point.earlier[0].model.router.temperature == 3  # type: ignore[union-attr]
    assert point.config.train.steps == 100


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"train": {"freeze": ["experts"]}}, "train.freeze: must not name what a dense network lacks"),
        ({"train": {"freeze": ["heads", "heads"]}}, "train.freeze: must name each part once"),
        ({"model": {"family": "task_moe", "router": {"kind": "random"}}, "train": {"freeze": ["router"]}},
         "train.freeze: must not name the router, which has nothing to learn with kind: random"),
        ({"model": {"family": "task_moe", "router": {"mutual_information": 0.1}}, "train": {"freeze": ["router"]}},
         "train.freeze: must not name a router that losses of its own would train (mutual_information)"),
    ],
)  # fmt: skip
def test_what_cannot_be_frozen_is_refused(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        trial(**settings)
    assert str(error.value).startswith(f"trial.{expected}")


# Baselines


def moe(**model: Any) -> TrialConfig:
    size = {"hidden_size": 16, "num_layers": 3, "num_heads": 2, "ffn_size": 32}
    return trial(model={"family": "task_moe", **model}, backbone={"size": size})


def test_baselines_start_from_nothing() -> None:
    settings: dict[str, Any] = {"model": MOE, "train": {"freeze": ["router", "experts"]}}
    config = trial(**settings, start={"load": ["router"], "trial": "task_moe-0"})
    fresh = trial(**{**settings, "train": {"freeze": []}})
    assert single_task(config, "a", 0.5) == single_task(fresh, "a", 0.5)
    for kind in ("parameter_matched", "compute_matched", "frozen_backbone"):
        assert whole_mixture(config, kind) == whole_mixture(fresh, kind)
    random = routed(config, "random")
    assert random is not None and (random.start, random.train.freeze) == (StartConfig(), ("experts",))
    frozen = trial(model=MOE, train={"freeze": ["backbone"]})
    wide = parameter_matched(frozen)
    assert wide is not None and wide.backbone.frozen and wide.train.freeze == ()


@pytest.mark.parametrize(
    ("model", "parameters", "compute"),
    [
        ({"num_experts": 8}, 8, 1),
        ({"num_experts": 8, "router": {"top_k": 3}}, 8, 3),
        ({"num_experts": 8, "router": {"selection": "soft"}}, 8, 8),
        ({"num_experts": 8, "router": {"selection": "soft", "combine": "parameters"}}, 8, 1),
        ({"num_experts": 8, "router": {"selection": "gumbel_st"}}, 8, 1),
        ({"num_experts": 8, "router": {"kind": "uniform"}}, 8, 8),
        ({"num_experts": 8, "router": {"kind": "random_example"}}, 8, 1),
        ({"num_experts": 8, "shared_experts": 1}, 9, 2),
        ({"num_experts": 8, "shared_experts": 1, "expert": "ffn_split", "router": {"top_k": 2}}, 5, 2),
        ({"num_experts": (2, 4, 8), "router": {"selection": "soft"}}, 5, 5),
        ({"num_experts": (2, 3), "layers": [0, 2], "router": {"selection": "soft"}}, 3, 3),
        # Attention 4 d^2 = 1024, feed-forward 2 d f = 1024: 4 blocks have 8 such parts, 1 of attention and 7 of feed-forward.
        ({"num_experts": 4, "expert": "layer"}, 7, 1),
        ({"num_experts": 4, "expert": "layer", "router": {"selection": "soft"}}, 7, 7),
        ({"num_experts": 8, "router": {"kind": "token", "selection": "expert_choice", "capacity": 1.5}}, 8, 2),
        ({"num_experts": 8, "router": {"kind": "token", "selection": "slots", "slots": 32}}, 8, 2),  # 256 slots, 128 tokens
    ],
)  # fmt: skip
def test_dense_controls_are_as_wide_as_what_they_stand_for(model: dict[str, Any], parameters: int, compute: int) -> None:
    config = moe(**model)
    for control, multiple in ((parameter_matched(config), parameters), (compute_matched(config), compute)):
        layers = tuple(model.get("layers", ())) if multiple > 1 else ()
        assert control == replace(config, model=DenseConfig(ffn_multiple=multiple, layers=layers))


def test_presets_of_layers_become_numbers_in_dense_controls() -> None:
    control = parameter_matched(moe(num_experts=8, layers="last:2"))
    assert control is not None and control.model == DenseConfig(ffn_multiple=8, layers=(1, 2))


def test_adapters_are_matched_by_one_adapter() -> None:
    adapters = trial(
        model={"family": "adapter_moe", "num_experts": 8, "bottleneck": 4, "router": {"selection": "top_k", "top_k": 2}}
    )
    control = compute_matched(adapters)
    assert control is not None and isinstance(control.model, AdapterMoEConfig)
    assert (control.model.num_experts, control.model.bottleneck, control.model.router.kind) == (1, 8, "uniform")
    assert compute_matched(trial()) is None


def test_split_experts_have_no_fixed_routes() -> None:
    split = moe(expert="ffn_split", router={"top_k": 2})
    assert routed(split, "random") is None and routed(split, "uniform") is None


def test_controls_that_need_sizes_of_a_model_that_is_not_here_are_refused() -> None:
    config = trial(model={"family": "task_moe", "expert": "layer"}, backbone={"name": "org/base", "revision": "0" * 40})
    with pytest.raises(
        ConfigError, match=r"^baselines: must not have parameter_matched here: it takes the sizes of 'org/base'"
    ):
        parameter_matched(config)
    assert parameter_matched(replace(config, model=TaskMoEConfig())) is not None


def test_passed_experts_are_never_more_than_there_are() -> None:
    assert passed(TaskMoEConfig(num_experts=2, router=moe(router={"top_k": 2}).model.router).router, 2, 9) == 2  # type: ignore[union-attr]


def test_the_plan_has_compute_matched_baselines(project: Path) -> None:  # noqa: F811
    settings = staged(start={}, train={"steps": 9})
    plan = plan_of(project, trial=settings, baselines=["parameter_matched", "compute_matched"])
    (candidate,) = candidates(plan)
    assert len(set(candidate.baselines.values())) == 1  # soft: every expert runs
    (wide,) = [t for t in plan.trials if t.role != "candidate"]
    assert wide.config.model == DenseConfig(ffn_multiple=4)
    assert {role for role, _ in wide.uses} == {"parameter_matched", "compute_matched"}


@pytest.mark.parametrize(
    ("content", "stacks"),
    [
        ({"model_type": "bert", "num_hidden_layers": 2, "hidden_size": 8, "intermediate_size": 16}, [(2, 256, 256, 16)]),
        ({"model_type": "distilbert", "n_layers": 2, "dim": 8, "hidden_dim": 16}, [(2, 256, 256, 16)]),
        ({"model_type": "modernbert", "num_hidden_layers": 2, "hidden_size": 8, "intermediate_size": 16}, [(2, 256, 384, 16)]),
        ({"model_type": "bart", "encoder_layers": 2, "decoder_layers": 3, "d_model": 8, "encoder_ffn_dim": 16,
          "decoder_ffn_dim": 32}, [(2, 256, 256, 16), (3, 512, 512, 32)]),
        ({"model_type": "t5", "num_layers": 2, "d_model": 8, "d_ff": 16, "num_heads": 2, "d_kv": 8,
          "feed_forward_proj": "gated-gelu"}, [(2, 512, 384, 16), (2, 1024, 384, 16)]),
        ({"model_type": "bert", "num_hidden_layers": 2}, [(2, None, None, None)]),
        ({"model_type": "bert"}, None),
    ],
)  # fmt: skip
def test_sizes_are_read_from_a_folder(tmp_path: Path, content: dict[str, Any], stacks: list[Any] | None) -> None:
    (tmp_path / "config.json").write_text(json.dumps(content))
    found = architecture_of(BackboneConfig(name=str(tmp_path)))
    assert found is not None and found.kind == content["model_type"]
    given = None if found.stacks is None else [(s.blocks, s.attention, s.ffn, s.inner) for s in found.stacks]
    assert given == stacks


# Routers and tasks


def with_router(router: Mapping[str, Any], tasks: list[str] | None = None, **changes: Any) -> dict[str, Any]:
    mixture = {"tasks": tasks or ["a", "b", "r", "tags"], "batch_size": 8, "tasks_per_step": 4}
    model = {"family": "task_moe", "router": dict(router), **changes.pop("model", {})}
    mixture |= changes.pop("mixture", {})
    return {"mixture": mixture, "model": model, "train": {"steps": 10}, **changes}


def router_of(project: Path, **settings: Any) -> Any:  # noqa: F811
    (candidate,) = candidates(plan_of(project, trial=with_router(**settings), baselines=[]))
    return candidate.config.model.router  # type: ignore[union-attr]


def test_categories_become_experts_in_order_of_appearance(project: Path) -> None:  # noqa: F811
    assert router_of(project, router={"kind": "category"}).experts_of == {"a": 0, "b": 0, "r": 1, "tags": 1}


def test_patterns_of_experts_become_names(project: Path) -> None:  # noqa: F811
    router = {"kind": "task_id", "experts_of": {"category:toy/near": 2, "b": 3}}
    assert router_of(project, router=router).experts_of == {"a": 2, "b": 3}
    supervised = {"supervision": 0.1, "experts_of": {"kind:*": 1}}
    assert router_of(project, router=supervised).experts_of == {"a": 1, "b": 1, "r": 1, "tags": 1}
    assert router_of(project, router={"kind": "task_id"}).experts_of == {}


def test_descriptions_come_from_the_catalogue_and_leave_digests_alone(project: Path) -> None:  # noqa: F811
    plain = candidates(plan_of(project, trial=with_router({}), baselines=[]))[0]
    for name in ("a", "b", "r", "tags"):
        change_task(project, name, description=f"Say\n {name}!")
    described = candidates(plan_of(project, trial=with_router({}), baselines=[]))[0]
    assert described.trial_id == plain.trial_id and not described.config.model.router.descriptions  # type: ignore[union-attr]
    router = {"network": "linear", "task_vectors": "description"}
    assert router_of(project, router=router).descriptions == {name: f"Say {name}!" for name in ("a", "b", "r", "tags")}
    own = router_of(project, router={**router, "descriptions": {"a": "mine"}}).descriptions
    assert own["a"] == "mine" and own["b"] == "Say b!"


def test_a_description_must_be_text(project: Path) -> None:  # noqa: F811
    change_task(project, "a", description=["no"])
    assert "must have description as text, got ['no']" in mistake(project, trial=with_router({}))


DESCRIBED = {"network": "linear", "task_vectors": "description"}
HELD = {"held_out": ["q"]}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"router": {"kind": "task_id"}, "model": {"num_experts": 3}},
         "trial.model.num_experts: must be at least 4 with kind: task_id, which gives task number 3 (tags) an expert"),
        ({"router": {"kind": "task_id"}, "model": {"num_experts": [4, 3]}}, "trial.model.num_experts: must be at least 4"),
        ({"router": {"kind": "task_id", "experts_of": {"a": 4}}},
         "trial.model.router.experts_of.a: must be below the number of experts (4), got 4"),
        ({"router": {"kind": "task_id", "experts_of": {"zz": 1}}},
         "trial.model.router.experts_of.zz: must match a task of the mixture, which has a, b, r, tags, got 'zz'"),
        ({"router": {"supervision": 0.1}, "model": {"num_experts": 3}}, "trial.model.num_experts: must be at least 4 with sup"),
        ({"router": {"kind": "category"}, "model": {"num_experts": 1}},
         "trial.model.num_experts: must be at least the 2 categories (toy/near, toy/far) with kind: category, got 1"),
        ({"router": {"kind": "category", "experts_of": {"a": 1}}}, "trial.model.router.experts_of: must be empty with kind"),
        ({"router": DESCRIBED}, "trial.model.router.task_vectors: cannot be description: the task a has none (toy.yaml)"),
        ({"router": {**DESCRIBED, "descriptions": {"zz": "x"}}}, "trial.model.router.descriptions: must name tasks"),
        ({"router": {"kind": "hash_token"}, "backbone": T5}, "trial.model.router.kind: cannot be hash_token in decoder blocks"),
        ({"router": {"kind": "token", "selection": "expert_choice"}, "backbone": T5},
         "trial.model.router.selection: cannot be expert_choice in decoder blocks"),
        ({"router": {"kind": "token", "selection": "slots"}, "backbone": T5, "model": {"layers": "last:1"}},
         "trial.model.router.selection: cannot be slots in decoder blocks"),
        ({"router": {"kind": "token", "capacity": 1.25}, "backbone": T5},
         "trial.model.router.capacity: must be null in decoder"),
        ({"router": {"kind": "token", "balance": "bias"}, "mixture": {"tasks_per_step": 1}},
         "trial.model.router.balance: cannot be bias with one task per step"),
        ({"router": {"top_k": 3}, "model": {"expert": "ffn_split"}},
         "trial.model.router.top_k: must divide the feed-forward layers' inner width 128 with expert: ffn_split, got 3"),
        ({"router": {"kind": "token", "top_k": 32}, "model": {"expert": "ffn_split", "dispatch": "grouped", "num_experts": 64},
          "train": {"precision": "bf16"}}, "trial.model.dispatch: cannot be grouped in bf16 unless widths are multiples of 8"),
        ({"router": {}, "model": {"num_experts": [2, 2, 2]}},
         "trial.model.num_experts: must have one number for each of the 2 routed blocks, got [2, 2, 2]"),
        ({"router": {}, "model": {"layers": "last:3"}}, "trial.model.layers: must be at most the 2 blocks"),
        ({"router": {}, "tasks": ["a", "q"], "mixture": HELD, "backbone": T5},
         "trial.mixture.held_out: must be empty with a learned"),
        ({"router": {"kind": "example", "conditioning": "per_task"}, "tasks": ["a", "q"], "mixture": HELD, "backbone": T5},
         "trial.mixture.held_out: must be empty with a learned"),
        ({"router": {"network": "lstm"}, "tasks": ["a", "q"], "mixture": HELD, "backbone": T5},
         "trial.mixture.held_out: must be empty with a learned"),
        ({"router": {"kind": "task_id"}, "tasks": ["a", "q"], "mixture": HELD, "backbone": T5},
         "trial.mixture.held_out: must share an expert with a trained task under kind: task_id, got expert 1 for q alone"),
        ({"router": {"unseen": "nearest_category"}, "tasks": ["a", "q"], "mixture": HELD, "backbone": T5},
         "trial.model.router.unseen: cannot be nearest_category: no trained task has the category of q (toy/text)"),
        ({"router": {"unseen": "nearest_category", "donors": {"q": "q"}}, "tasks": ["a", "q"], "mixture": HELD, "backbone": T5},
         "trial.model.router.donors: must map held-out tasks (q) to trained ones (a), got q: q"),
    ],
)  # fmt: skip
def test_routers_that_cannot_work_are_refused(project: Path, settings: dict[str, Any], expected: str) -> None:  # noqa: F811
    assert mistake(project, trial=with_router(**settings), baselines=[]).startswith(expected)


def test_answers_without_a_distribution_cannot_be_compared() -> None:
    specs = {"s": TaskSpec(name="s", kind="spans", metric="span_f1")}
    model = TaskMoEConfig(router=RouterConfig(kind="random_example", consistency=1.0))
    with pytest.raises(ConfigError, match=r"router.consistency: must be 0 with tasks of the kinds .*: s is spans, got 1"):
        resolve_router(Routed(model, MixtureConfig(tasks=("s",)), specs, None))


@pytest.mark.parametrize(
    ("router", "changes", "expected"),
    [
        ({"network": "linear", "task_vectors": "onehot"}, {"mixture.tasks": ["a", "b"]}, "cannot take a router with one-hot"),
        ({"kind": "token"}, {"model.router.balance": "bias"}, "cannot take a router whose selection is biased"),
    ],
)
def test_routers_whose_routes_would_change_are_not_taken(
    project: Path,  # noqa: F811
    router: dict[str, Any],
    changes: dict[str, Any],
    expected: str,
) -> None:
    settings = with_router(router, start={"load": ["router"], "changes": changes})
    assert mistake(project, trial=settings).startswith(f"trial.start.load: {expected}")


def test_adapters_have_the_same_laws(project: Path) -> None:  # noqa: F811
    model = {"family": "adapter_moe", "num_experts": 3, "router": {"kind": "task_id", "selection": "top_k"}}
    text = mistake(project, trial=with_router({}) | {"model": model})
    assert text.startswith("trial.model.num_experts: must be at least 4 with kind: task_id")


@pytest.mark.parametrize(
    "router",
    [
        {"kind": "random"},
        {"kind": "example"},
        {"kind": "hash_token"},
        {"unseen": "uniform"},
        {"kind": "task_id", "experts_of": {"*": 0}},
        {"network": "lstm", "task_vectors": "random"},
        {"kind": "example", "conditioning": "film", "task_vectors": "random"},
        {"unseen": "nearest_category", "donors": {"q": "a"}},
    ],
    ids=lambda router: "-".join(map(str, router.values())),
)  # fmt: skip
def test_held_out_tasks_may_have_routes_that_need_no_training(project: Path, router: dict[str, Any]) -> None:  # noqa: F811
    model = {"layers": [0]}  # the encoder's block of the tiny T5
    settings = with_router(router, ["a", "q"], mixture=HELD, backbone=T5, model=model)
    assert candidates(plan_of(project, trial=settings, baselines=[]))


def test_donors_are_the_first_trained_tasks_of_the_category(project: Path) -> None:  # noqa: F811
    settings = {"router": {"unseen": "nearest_category"}, "tasks": ["a", "q", "closed"], "mixture": HELD, "backbone": T5}
    assert router_of(project, **settings).donors == {"q": "closed"}


def test_a_plan_reads_no_router_twice(project: Path) -> None:  # noqa: F811
    """What the plan fills in can be read back, and means the same trial."""
    settings = with_router({"kind": "category"})
    (candidate,) = candidates(plan_of(project, trial=settings, baselines=[]))
    folder = TrialFolder(project / "runs", candidate.trial_id)
    folder.write_config(candidate.config)
    assert folder.read_config().trial_id == candidate.trial_id
    assert build(TrialConfig, yaml.safe_load((folder.path / "config.yaml").read_text())) == candidate.config
    assert by_id(plan_of(project, trial=settings, baselines=[])).keys() == {candidate.trial_id}
