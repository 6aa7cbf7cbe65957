"""A learned router finds what was planted, and its routes matter: the claim of sweeps/recovery.yaml, on two of its seeds."""

from pathlib import Path

import numpy as np
import pytest

from lightning_modules.data.prepared import prepare
from pipelines import routes
from pipelines.analyze import Probe, knockout
from pipelines.plan import CANDIDATE, make_plan
from pipelines.restore import restore
from pipelines.spec import load_sweep
from pipelines.store import TrialFolder
from pipelines.trial import run_trial

SWEEP = Path(__file__).resolve().parents[1] / "sweeps" / "recovery.yaml"


@pytest.mark.slow
@pytest.mark.parametrize("seed", [10, 11])
def test_soft_routes_are_the_planted_groups_and_their_users_need_them(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(SWEEP.parents[1])
    sweep = load_sweep(SWEEP, [f"seeds=[{seed}]", "axes.model.router=[{selection: soft}]"])
    plan = make_plan(sweep, tmp_path)
    soft = next(trial for trial in plan.trials if trial.role == CANDIDATE)
    random = next(trial for trial in plan.trials if trial.role == "random_routing")
    agreement = {}
    for trial in (soft, random):
        folder = TrialFolder(tmp_path, trial.trial_id)
        folder.write_config(trial.config)
        prepare([trial.config], plan.specs, tmp_path / "prepared")
        run_trial(trial.config, folder, tmp_path / "prepared")
        [found] = routes.collect([trial], tmp_path)
        categories = [plan.tasks[task].category for task in found.last.tasks]
        similar = routes.similarity(found.last.tables.values())
        agreement[trial.role] = routes.agreement(similar, categories, permutations=100).ari
    assert agreement[CANDIDATE] == 1.0 and agreement["random_routing"] < 0.5
    found = knockout(Probe(restore(tmp_path, soft.trial_id), "test"), draws=3)
    assert np.nanmean(found.difference) > 0.05 and (found.difference > 0).sum() >= 7
