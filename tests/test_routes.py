"""Similarity of routes, its agreement with categories, stability over seeds, and features of tasks."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import scipy.spatial.distance
import sklearn.metrics
from standins import Planned, Task

from lightning_modules.config import MixtureConfig, TrialConfig
from pipelines import routes
from pipelines.report import SweepFacts, write_report
from pipelines.store import TrialFolder, TrialResult
from pipelines.tracking import Tracker, metric_name
from pipelines.transfer import Comparison, compare

CATEGORIES = ["a"] * 4 + ["b"] * 3 + ["c"] * 3


def tables(seed: int, concentration: float = 0.5, tasks: int = 10, shape: tuple[int, ...] = (4, 5)) -> dict[int, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {block: generator.dirichlet(np.full(experts, concentration), size=tasks) for block, experts in enumerate(shape)}


def planted(seed: int, noise: float = 0.1) -> dict[int, np.ndarray]:
    """Tasks of a category share an expert, up to noise; which one is drawn anew for each seed and block."""
    generator = np.random.default_rng(seed)
    found = {}
    for block in range(2):
        expert = dict(zip("abc", generator.permutation(5), strict=False))
        own = np.eye(5)[[expert[name] for name in CATEGORIES]]
        found[block] = (1 - noise) * own + noise * generator.dirichlet(np.ones(5), size=len(CATEGORIES))
    return found


def test_similarity_is_one_minus_the_divergence_and_stays_in_its_bounds() -> None:
    found = tables(0, 0.2)
    s = routes.similarity(found.values())
    assert (s >= 0).all() and (s <= 1).all() and np.allclose(np.diag(s), 1) and np.allclose(s, s.T)
    expected = np.mean([1 - scipy.spatial.distance.jensenshannon(t[1], t[2], base=2) ** 2 for t in found.values()])
    assert s[1, 2] == pytest.approx(expected)
    assert routes.similarity([np.eye(3)])[0, 1] == 0


def test_similarity_does_not_depend_on_the_experts_numbers() -> None:
    found = tables(1)
    anew = [table[:, np.random.default_rng(block).permutation(table.shape[1])] for block, table in found.items()]
    np.testing.assert_allclose(routes.similarity(anew), routes.similarity(found.values()))
    np.testing.assert_allclose(routes.cosine(anew), routes.cosine(found.values()))


@pytest.mark.parametrize("seed", range(20))
def test_partitions_are_compared_as_scikit_learn_does(seed: int) -> None:
    generator = np.random.default_rng(seed)
    a, b = generator.integers(0, generator.integers(1, 6), size=(2, 17))
    assert routes.adjusted_rand(a, b) == pytest.approx(sklearn.metrics.adjusted_rand_score(a, b), abs=1e-12)
    assert routes.cluster_information(a, b) == pytest.approx(sklearn.metrics.normalized_mutual_info_score(a, b), abs=1e-12)
    assert routes.adjusted_rand(a, a) == 1


def test_silhouette_is_scikit_learns() -> None:
    distances = 1 - routes.similarity(tables(3).values())
    np.fill_diagonal(distances, 0)
    for labels in ([0, 0, 0, 1, 1, 1, 2, 2, 2, 2], [0, 1, 1, 1, 1, 1, 2, 2, 2, 2]):
        expected = sklearn.metrics.silhouette_score(distances, labels, metric="precomputed")
        assert routes.silhouette(distances, np.array(labels)) == pytest.approx(expected)
    assert routes.silhouette(distances, np.zeros(10, dtype=int)) is None
    assert routes.silhouette(distances, np.arange(10)) is None


def test_planted_groups_are_found() -> None:
    found = routes.agreement(routes.similarity(planted(0).values()), CATEGORIES, permutations=999)
    assert found.ari == 1 and found.nmi == pytest.approx(1) and found.clusters == 3
    assert found.mantel_p == 0.001 and found.mantel_r is not None and found.mantel_r > 0.9
    assert found.silhouette is not None and found.silhouette > 0.8


def test_equal_routes_are_never_parted_whatever_the_order_of_the_tasks() -> None:
    """One expert for all: tasks in the order of their categories must not look as if the routes knew them."""
    found = routes.agreement(np.ones((10, 10)), CATEGORIES, permutations=10)
    assert found.clusters == 1 and found.ari == 0 and found.mantel_r is None and found.mantel_p is None


def test_mantel_p_is_uniform_under_the_null() -> None:
    p = [routes.mantel(routes.similarity(tables(seed).values()), CATEGORIES, 199, seed)[1] for seed in range(60)]
    values = np.array([x for x in p if x is not None])
    assert len(values) == 60
    assert 0.35 < values.mean() < 0.65 and (values <= 0.1).mean() < 0.25 and (values > 0.5).mean() > 0.3


def test_mantel_r_is_the_correlation_over_pairs() -> None:
    s, labels = routes.similarity(tables(5).values()), np.array(CATEGORIES)
    upper = np.triu_indices(10, 1)
    expected = np.corrcoef(s[upper], labels[upper[0]] == labels[upper[1]])[0, 1]
    assert routes.mantel(s, CATEGORIES, 9)[0] == pytest.approx(expected)


def test_stability_over_seeds() -> None:
    same = [routes.similarity(planted(seed).values()) for seed in range(3)]
    chance = [routes.similarity(tables(seed).values()) for seed in range(3)]
    found, by_chance = routes.seed_stability(same), routes.seed_stability(chance)
    assert found is not None and found > 0.95
    assert by_chance is not None and abs(by_chance) < 0.4
    assert routes.seed_stability(same[:1]) is None
    assert routes.seed_stability([np.ones((4, 4)), np.ones((4, 4))]) is None


def test_feature_correlations() -> None:
    generator = np.random.default_rng(0)
    table = generator.dirichlet(np.ones(4), size=40)
    has = table[:, 2] > np.median(table[:, 2])
    features = {"long": has, "rare": np.arange(40) < 4, "chance": generator.random(40) < 0.5}
    found = routes.feature_correlations({3: table}, features, permutations=400)
    best = found[0]
    assert (best.feature, best.block, best.expert) == ("long", 3, 2) and best.r > 0.6 and best.q < 0.02
    assert best.r == pytest.approx(np.corrcoef(table[:, 2], has)[0, 1])
    assert {c.feature for c in found} == {"long", "chance"} and len(found) == 8
    assert all(c.q >= c.p - 1e-12 for c in found)


def test_controls_are_taken_out_of_a_feature_correlation() -> None:
    length = np.linspace(0, 1, 40)
    table = np.stack([length, 1 - length], axis=1)
    noisy = table + np.random.default_rng(1).normal(0, 0.05, (40, 1)) * [1, -1]
    plain = routes.feature_correlations({0: noisy}, {"long": length > 0.5}, permutations=99)
    partial = routes.feature_correlations({0: noisy}, {"long": length > 0.5}, length[:, None], permutations=99)
    assert abs(plain[0].r) > 0.8 and abs(partial[0].r) < 0.4


def test_benjamini_hochberg() -> None:
    p = [0.01, 0.04, 0.03, 0.5]
    assert routes.benjamini_hochberg(p) == pytest.approx([0.04, 0.16 / 3, 0.16 / 3, 0.5])
    assert routes.benjamini_hochberg([]) == []


def test_first_dead_needs_three_evaluations_in_a_row() -> None:
    used, unused = np.full((2, 2), 0.5), np.array([[1.0, 0.0], [1.0, 0.0]])
    steps = dict(zip(range(10, 90, 10), [used, unused, unused, used, unused, unused, unused, unused], strict=True))
    assert routes.first_dead({step: {4: table} for step, table in steps.items()}) == {(4, 1): 50}


def arrays_of(tables: Mapping[int, np.ndarray], tasks: list[str]) -> dict[str, np.ndarray]:
    """What a trial writes of task-level routes."""
    arrays: dict[str, np.ndarray] = {"tasks": np.array(tasks), "blocks": np.array(sorted(tables))}
    for block, table in tables.items():
        arrays |= {f"{name}/{block}": table for name in ("weights", "n", "q", "w")}
        arrays[f"units/{block}"] = np.ones(len(table))
        arrays[f"entropy/{block}"] = -np.where(table > 0, table * np.log(np.where(table > 0, table, 1)), 0).sum(1)
    return arrays


def write_trial(storage: Path, name: str, seed: int, steps: Mapping[int, Mapping[int, np.ndarray]]) -> Planned:
    """A finished trial of the configuration ``name`` with the routes of each step."""
    tasks = [f"toy/{i}" for i in range(len(CATEGORIES))]
    trial = Planned(f"{name}-{seed}", "candidate", name, seed, TrialConfig(mixture=MixtureConfig(tasks=tuple(tasks))))
    folder = TrialFolder(storage, trial.trial_id)
    (folder.measurements / "routing").mkdir(parents=True)
    for step, found in steps.items():
        split = "test" if step == max(steps) else "dev"
        np.savez(folder.measurements / "routing" / f"{split}_{step:09d}.npz", allow_pickle=False, **arrays_of(found, tasks))
    result = TrialResult(
        trial_id=trial.trial_id, status="finished", scores={}, steps=max(steps), seconds=1.0, started_ms=1, finished_ms=2
    )
    folder.write_result(result)
    return trial


def test_a_sweeps_routes_are_collected_and_summed_up(tmp_path: Path) -> None:
    trials = [write_trial(tmp_path, "grouped", seed, {5: tables(seed, shape=(5, 5)), 10: planted(seed)}) for seed in range(3)]
    trials += [write_trial(tmp_path, "random", seed, {10: tables(seed)}) for seed in range(3)]
    trials.append(Planned("unfinished-0", "candidate", "unfinished", 0, TrialConfig()))
    found = routes.collect(trials, tmp_path)
    assert [(trial.configuration, trial.seed, list(trial.steps)) for trial in found][:4] == [
        ("grouped", 0, [5, 10]), ("grouped", 1, [5, 10]), ("grouped", 2, [5, 10]), ("random", 0, [10])
    ]  # fmt: skip
    categories = dict(zip(found[0].last.tasks, CATEGORIES, strict=True))
    grouped, random = routes.summarise(found, categories, permutations=199)
    assert grouped.ari == (1.0, 1.0, 1.0) and grouped.mantel_p == 0.005
    assert grouped.stability is not None and grouped.stability > 0.9
    assert grouped.values["nmi"] > random.values["nmi"] and grouped.values["dead_experts"] >= 0
    assert random.mantel_p is not None and max(random.ari) < 0.8
    moving = routes.dynamics(found[0])
    assert len(moving["nmi"]) == 2 and moving["nmi"][1] == pytest.approx(found[0].last.values()["nmi"])


def test_tasks_without_categories_have_no_agreement(tmp_path: Path) -> None:
    found = routes.collect([write_trial(tmp_path, "one", 0, {1: planted(0)})], tmp_path)
    (summary,) = routes.summarise(found, {})
    assert summary.ari == () and summary.mantel_p is None and summary.stability is None


def comparison_of(trials: list[Planned]) -> Comparison:
    tasks = trials[0].config.mixture.tasks
    specs = {task: Task(f"<{name}>") for task, name in zip(tasks, CATEGORIES, strict=True)}
    return compare(trials, {}, specs)


def test_the_report_has_a_section_on_routing(tmp_path: Path) -> None:
    trials = [
        write_trial(tmp_path, "<grouped> $x$", seed, {5: tables(seed, shape=(5, 5)), 9: planted(seed)}) for seed in range(2)
    ]
    trials.append(write_trial(tmp_path, "random", 0, {9: tables(0)}))
    facts = SweepFacts(name="s", routes=tuple(routes.collect(trials, tmp_path)))
    page = write_report(tmp_path / "sweep", comparison_of(trials), facts).read_text()
    assert "<h2>Routing</h2>" in page and "&lt;grouped&gt;" in page and "<grouped>" not in page
    assert "1.00 [1.00, 1.00]" in page and "Mantel" in page
    names = {path.name for path in (tmp_path / "sweep" / "report").glob("route*.png")}
    assert names == {
        "routes_1.png", "routes_2.png", "route_similarity_1.png", "route_similarity_2.png", "route_entropy.png",
        "route_dynamics.png",
    }  # fmt: skip
    assert write_report(tmp_path / "again", comparison_of(trials), facts).read_text() == page


def test_a_report_without_routed_trials_has_no_such_section(tmp_path: Path) -> None:
    trials = [Planned("dense-0", "candidate", "dense", 0, TrialConfig(mixture=MixtureConfig(tasks=("a", "b"))))]
    facts = SweepFacts(name="s", routes=tuple(routes.collect(trials, tmp_path)))
    page = write_report(tmp_path / "sweep", compare(trials, {}, {"a": Task("x"), "b": Task("x")}), facts).read_text()
    assert "Routing" not in page


def test_nothing_here_needs_torch() -> None:
    code = (
        "import sys, pipelines.routes, pipelines.plots, pipelines.report, pipelines.tracking; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_tracked_trial_has_a_picture_of_its_routes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial, seen = write_trial(tmp_path, "grouped", 0, {9: planted(0)}), []
    tracker = Tracker("sqlite://", tmp_path, "s")
    monkeypatch.setattr(tracker, "_attach", lambda run, path: seen.append((run, path.name, path.read_bytes()[:4])))
    tracker._attach_routes("run", TrialFolder(tmp_path, trial.trial_id))
    tracker._attach_routes("run", TrialFolder(tmp_path, "dense"))
    assert seen == [("run", "routes.png", b"\x89PNG")]
    assert metric_name("route/task/toy/a b/eff_experts") == "route/task/toy/a b/eff_experts"
    assert metric_name("route/3/mi_null_p") == "route/3/mi_null_p"


def test_blocks_that_some_routed_task_does_not_pass_are_left_out() -> None:
    both, half, none = (
        np.array([[0.5, 0.5], [1.0, 0.0], [0.0, 0.0]]),
        np.array([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]),
        np.zeros((3, 2)),
    )
    arrays = {"tasks": np.array(["a", "b", "c"]), "blocks": np.array([0, 1, 2])}
    for block, table in enumerate((both, half, none)):
        units = table.sum(1)
        arrays |= {f"weights/{block}": table, f"q/{block}": table, f"units/{block}": units, f"entropy/{block}": units * 0}
    found = routes.snapshot(arrays)
    assert found.tasks == ("a", "b") and list(found.tables) == [0]
    np.testing.assert_array_equal(found.tables[0], both[:2])
