"""Which tasks take the same routes, and what that has to do with what people know of them (specs/task_moe.md section 3).

Everything follows from the arrays that trials write (``measurements/routing/{split}_{step}.npz``). numpy and scipy only.
Legend: T tasks, L routed blocks, E experts of a block; a table is (T, E), its rows sum to 1.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from scipy.special import rel_entr

from lightning_modules.measure.routing import dead, decompose, measure_table
from pipelines.store import TrialFolder
from pipelines.transfer import Planned

PERMUTATIONS = 10_000
"""Permutations of a Mantel test."""

BATCH = 250
"""Of these, how many are computed at once."""

FEATURE_PERMUTATIONS = 2_000
"""Permutations behind the p-value of a feature's correlation."""

FEWEST = 5
"""Tasks that must have a feature, and lack it, for its correlations to be reported."""

DEAD_FOR = 3
"""Evaluations in a row after which an expert without use counts as dead."""


# -- reading -----------------------------------------------------------------------------------------------------------------


def routing_files(measurements: Path) -> dict[int, Path]:
    """Step -> the arrays of that evaluation, in order (the test split's where a step has several); {} for a trial that routes
    nothing."""
    files = sorted((measurements / "routing").glob("*.npz"))
    found = [(re.fullmatch(r"(?:dev|test)_(\d+)\.npz", path.name), path) for path in files]
    return dict(sorted({int(match[1]): path for match, path in found if match}.items()))


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of one evaluation (:meth:`lightning_modules.measure.routing.RoutingTally.arrays`)."""
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """How the tasks were routed at one evaluation."""

    tasks: tuple[str, ...]
    tables: Mapping[int, np.ndarray]
    """Block -> (T, E) combine weights of each task."""
    probabilities: Mapping[int, np.ndarray]
    """Block -> (T, E) mean probabilities before selection."""
    entropies: Mapping[int, np.ndarray]
    """Block -> (T,) mean entropy of a unit's probabilities, nats."""

    def values(self) -> dict[str, float]:
        """``nmi``, ``entropy``, ``effective_experts``, ``dead_experts``, ``h_expert`` and so on: means over blocks, but for
        ``dead_experts``, which adds up."""
        rows = [
            measure_table(self.tables[b]) | decompose(self.probabilities[b], self.entropies[b]) for b in sorted(self.tables)
        ]
        names = [name for name in rows[0] if not name.startswith("utilisation_")]
        means = {name: float(np.mean([row[name] for row in rows])) for name in names}
        return means | {"dead_experts": float(sum(row["dead_experts"] for row in rows))}


def snapshot(arrays: Mapping[str, np.ndarray]) -> Snapshot:
    """What the arrays of one evaluation say of the tasks that were routed, at the blocks that all of these passed: a decoder's
    blocks are left out where some task does not pass them, and so are blocks with one expert, where nothing is routed."""
    routed = {block: arrays[f"weights/{block}"].sum(1) > 0 for block in arrays["blocks"].tolist()}
    met = np.any(list(routed.values()), axis=0)
    blocks = [block for block, tasks in routed.items() if tasks.any() and tasks[met].all()]
    units = {block: arrays[f"units/{block}"][met] for block in blocks}
    return Snapshot(
        tasks=tuple(arrays["tasks"][met].tolist()),
        tables={block: arrays[f"weights/{block}"][met] for block in blocks},
        probabilities={block: arrays[f"q/{block}"][met] / units[block][:, None] for block in blocks},
        entropies={block: arrays[f"entropy/{block}"][met] / units[block] for block in blocks},
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutedTrial:
    """A finished trial with a mixture of experts, and how its tasks were routed over time."""

    trial_id: str
    configuration: str
    seed: int
    steps: Mapping[int, Snapshot]
    """Step -> routing then, in order; the last is that of the trained network."""

    @property
    def last(self) -> Snapshot:
        """The routing of the trained network."""
        return self.steps[max(self.steps)]


def collect(trials: Iterable[Planned], storage: Path) -> list[RoutedTrial]:
    """The finished trials of a plan that choose between experts for several tasks, in the plan's order."""
    found = []
    for trial in trials:
        folder = TrialFolder(storage, trial.trial_id)
        files = routing_files(folder.measurements)
        if not files or len(trial.config.mixture.tasks) < 2 or folder.result() is None:
            continue
        steps = {step: snapshot(read_arrays(path)) for step, path in files.items()}
        # Without a common block the tables are empty, and there is nothing to compare.
        if all(table.shape[1] == 1 for of_step in steps.values() for table in of_step.tables.values()):
            continue
        found.append(RoutedTrial(trial_id=trial.trial_id, configuration=trial.configuration, seed=trial.seed, steps=steps))
    return found


# -- similarity of tasks -----------------------------------------------------------------------------------------------------


def similarity(tables: Iterable[np.ndarray]) -> np.ndarray:
    """(T, T) S(t, u) = mean over blocks of 1 - JS(row t, row u), base 2: 1 the same route, 0 no expert in common. It does not
    change when a block's experts are numbered anew."""
    return np.mean([1 - _divergences(table) for table in tables], axis=0)


def cosine(tables: Iterable[np.ndarray]) -> np.ndarray:
    """(T, T) cosine of the tasks' rows of all blocks, one after the other."""
    flat = np.concatenate(list(tables), axis=1)
    norms = np.linalg.norm(flat, axis=1)
    return flat @ flat.T / np.outer(norms, norms)


def _divergences(table: np.ndarray) -> np.ndarray:
    """(T, T) Jensen-Shannon divergences in bits, in [0, 1] (scipy's function is the root of it)."""
    middle = (table[:, None] + table[None]) / 2
    sides = rel_entr(table[:, None], middle).sum(-1) + rel_entr(table[None], middle).sum(-1)
    return np.clip(sides / (2 * np.log(2)), 0, 1)


# -- agreement with categories -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """How far routes and human categories say the same. None where it is undefined."""

    ari: float
    nmi: float
    """Of average-linkage clusters of the routes, as many as there are categories, with the categories."""
    clusters: int
    """Clusters found: fewer than categories where routes are equal, for equal routes are never parted."""
    silhouette: float | None
    """Of the categories under the distance 1 - S; None when each task, or all of them, has a category of its own."""
    mantel_r: float | None
    """Correlation over pairs of tasks of S with "same category"; None when one of them is constant."""
    mantel_p: float | None
    """Share of permutations of the categories with as high a correlation (one-sided)."""


def agreement(similar: np.ndarray, categories: Sequence[str], permutations: int = PERMUTATIONS, seed: int = 0) -> Agreement:
    """Compare the similarity of routes (T, T) with the tasks' categories."""
    labels = _numbers(categories)
    found = clusters(similar, int(labels.max()) + 1)
    r, p = mantel(similar, categories, permutations, seed)
    return Agreement(
        ari=adjusted_rand(labels, found),
        nmi=cluster_information(labels, found),
        clusters=int(found.max()) + 1,
        silhouette=silhouette(1 - similar, labels),
        mantel_r=r,
        mantel_p=p,
    )


def clusters(similar: np.ndarray, count: int) -> np.ndarray:
    """(T,) cluster numbers from 0: average linkage on 1 - S, cut so that at most ``count`` remain. Equal distances are merged
    together, so nothing depends on the order of the tasks."""
    if len(similar) < 2:
        return np.zeros(len(similar), dtype=int)
    distances = np.round(1 - similar, 12)
    np.fill_diagonal(distances, 0.0)
    merges = linkage(squareform(distances, checks=False), method="average")
    return _numbers(fcluster(merges, count, criterion="maxclust").tolist())


def adjusted_rand(a: Sequence[int] | np.ndarray, b: Sequence[int] | np.ndarray) -> float:
    """Hubert and Arabie's (1985) adjusted Rand index: 1 the same partition, 0 on average by chance."""
    counts = _contingency(a, b)
    pairs, total = _pairs(counts).sum(), _pairs(counts.sum())
    rows, columns = _pairs(counts.sum(1)).sum(), _pairs(counts.sum(0)).sum()
    expected = rows * columns / total if total else 0.0
    most = (rows + columns) / 2
    return float((pairs - expected) / (most - expected)) if most != expected else 1.0


def cluster_information(a: Sequence[int] | np.ndarray, b: Sequence[int] | np.ndarray) -> float:
    """Mutual information of two partitions over the mean of their entropies, in [0, 1]; 1 when neither parts anything."""
    joint = _contingency(a, b) / len(a)
    rows, columns = joint.sum(1), joint.sum(0)
    information = float(rel_entr(joint, np.outer(rows, columns)).sum())
    mean = float(-(rows * np.log(rows)).sum() - (columns * np.log(columns)).sum()) / 2
    return float(np.clip(information / mean, 0, 1)) if mean > 1e-12 else 1.0


def silhouette(distances: np.ndarray, labels: np.ndarray) -> float | None:
    """Rousseeuw's (1987) mean silhouette of a partition, in [-1, 1]; 0 for a task alone in its group. None for one group, or as
    many groups as tasks."""
    groups = np.unique(labels)
    if not 2 <= len(groups) < len(labels):
        return None
    values = []
    for i, own in enumerate(labels):
        same = (labels == own) & (np.arange(len(labels)) != i)
        if not same.any():
            values.append(0.0)
            continue
        inner = distances[i, same].mean()
        outer = min(distances[i, labels == other].mean() for other in groups if other != own)
        values.append((outer - inner) / max(inner, outer) if max(inner, outer) > 0 else 0.0)
    return float(np.mean(values))


def mantel(
    similar: np.ndarray, categories: Sequence[str], permutations: int = PERMUTATIONS, seed: int = 0
) -> tuple[float | None, float | None]:
    """Mantel's (1967) test of S against "same category": (correlation, one-sided p by permuting the tasks' categories).

    (None, None) when all pairs are of one kind or equally similar.
    """
    labels = _numbers(categories)
    tasks = len(labels)
    if tasks < 2:
        return None, None
    upper = np.triu_indices(tasks, 1)
    same = labels[upper[0]] == labels[upper[1]]
    centred = similar - similar[upper].mean()
    np.fill_diagonal(centred, 0.0)
    spread = float(np.sqrt((centred[upper] ** 2).sum() * ((same - same.mean()) ** 2).sum()))
    if spread < 1e-12:
        return None, None
    groups = np.eye(int(labels.max()) + 1)[labels]
    generator = np.random.default_rng(seed)
    observed, hits = float(centred[upper] @ same), 0
    for start in range(0, permutations, BATCH):
        orders = [generator.permutation(tasks) for _ in range(min(BATCH, permutations - start))]
        dealt = groups[np.stack(orders)]
        # Of each permutation the sum of S over pairs of one group: half of sum_g x_g' S x_g, x_g the members of group g.
        found = np.einsum("btg,btg->b", dealt, centred @ dealt) / 2
        hits += int((found >= observed - 1e-9 * spread).sum())
    return observed / spread, (1 + hits) / (1 + permutations)


def seed_stability(similarities: Sequence[np.ndarray]) -> float | None:
    """Mean over pairs of seeds of the correlation of their S over pairs of tasks: 1 when every seed groups the tasks alike,
    however its experts are numbered. None with fewer than two seeds that tell tasks apart."""
    upper = [matrix[np.triu_indices(len(matrix), 1)] for matrix in similarities]
    told = [values for values in upper if len(values) > 1 and values.std() > 1e-9]
    if len(told) < 2:
        return None
    return float(np.mean([np.corrcoef(a, b)[0, 1] for a, b in combinations(told, 2)]))


def _numbers(names: Sequence[str] | Sequence[int]) -> np.ndarray:
    """Numbers from 0 in the order of first appearance."""
    order = {name: i for i, name in enumerate(dict.fromkeys(names))}
    return np.array([order[name] for name in names], dtype=int)


def _contingency(a: Sequence[int] | np.ndarray, b: Sequence[int] | np.ndarray) -> np.ndarray:
    rows, columns = (np.unique(labels, return_inverse=True)[1] for labels in (a, b))
    counts = np.zeros((rows.max() + 1, columns.max() + 1))
    np.add.at(counts, (rows, columns), 1)
    return counts


def _pairs(counts: np.ndarray) -> np.ndarray:
    return counts * (counts - 1) / 2


# -- features of tasks -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Correlation:
    """How one expert's weight goes with one feature of the tasks."""

    feature: str
    block: int
    expert: int
    r: float
    """Point-biserial correlation over tasks, given the controls."""
    p: float
    """Two-sided, by permuting the feature over tasks."""
    q: float
    """p after Benjamini and Hochberg (1995), over all correlations of the call."""


def feature_correlations(
    tables: Mapping[int, np.ndarray],
    features: Mapping[str, Sequence[bool]],
    controls: np.ndarray | None = None,
    permutations: int = FEATURE_PERMUTATIONS,
    seed: int = 0,
) -> list[Correlation]:
    """Correlations of every expert's weight with every feature, the strongest first.

    Experts whose weight does not differ between tasks have none, nor has a feature that fewer than :data:`FEWEST` tasks have
    or lack.

    Args:
        tables: block -> (T, E).
        features: feature -> for each task whether it has it.
        controls: (T, C) numbers whose linear part is taken out of weights and features first, such as the length of the
            answers and the number of training examples (partial correlation).
        permutations: behind the p-values.
        seed: of the permutations.
    """
    weights = np.concatenate([tables[block] for block in sorted(tables)], axis=1)
    where = [(block, expert) for block in sorted(tables) for expert in range(tables[block].shape[1])]
    outcome, known = _standardised(weights, controls)
    generator = np.random.default_rng(seed)
    rows: list[tuple[str, int, int, float, float]] = []
    for name, given in features.items():
        has = np.asarray(given, dtype=float)
        if min(has.sum(), len(has) - has.sum()) < FEWEST:
            continue
        shuffled = np.stack([has, *(generator.permutation(has) for _ in range(permutations))], axis=1)
        predictor, _ = _standardised(shuffled, controls)
        r = outcome.T @ predictor
        p = (1 + (np.abs(r[:, 1:]) >= np.abs(r[:, :1]) - 1e-12).sum(1)) / (1 + permutations)
        rows += [(name, *where[i], float(r[i, 0]), float(p[i])) for i in np.flatnonzero(known)]
    adjusted = benjamini_hochberg([row[-1] for row in rows])
    return sorted((Correlation(*row, q) for row, q in zip(rows, adjusted, strict=True)), key=lambda c: -abs(c.r))


def benjamini_hochberg(p: Sequence[float]) -> list[float]:
    """Adjusted p-values that bound the false discovery rate."""
    order = np.argsort(p)
    scaled = np.asarray(p, dtype=float)[order] * len(p) / np.arange(1, len(p) + 1)
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum.accumulate(scaled[::-1])[::-1]
    return np.minimum(adjusted, 1.0).tolist()


def _standardised(columns: np.ndarray, controls: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Columns without what a constant and the controls explain, of unit length; and which of them vary at all."""
    base = np.ones((len(columns), 1)) if controls is None else np.column_stack([np.ones(len(columns)), controls])
    rest = columns - base @ np.linalg.lstsq(base, columns, rcond=None)[0]
    norms = np.linalg.norm(rest, axis=0)
    known = norms > 1e-9
    return np.where(known, rest / np.where(known, norms, 1.0), 0.0), known


# -- over time ---------------------------------------------------------------------------------------------------------------


def dynamics(trial: RoutedTrial) -> dict[str, list[float]]:
    """Name -> value at each evaluation, in the order of ``trial.steps``; the names of :meth:`Snapshot.values`."""
    values = [snapshot.values() for snapshot in trial.steps.values()]
    return {name: [row[name] for row in values] for name in values[0]}


def first_dead(steps: Mapping[int, Mapping[int, np.ndarray]], evaluations: int = DEAD_FOR) -> dict[tuple[int, int], int]:
    """(block, expert) -> the first step from which it carried less than 0.01 / E for ``evaluations`` evaluations in a row.

    Args:
        steps: step -> block -> (T, E) table.
        evaluations: how long it must last.
    """
    found: dict[tuple[int, int], int] = {}
    runs: dict[tuple[int, int], list[int]] = {}
    for step in sorted(steps):
        for block, table in steps[step].items():
            for expert, gone in enumerate(dead(table).tolist()):
                run = runs.setdefault((block, expert), [])
                if not gone:
                    run.clear()
                    continue
                run.append(step)
                if len(run) == evaluations:
                    found.setdefault((block, expert), run[0])
    return found


# -- a sweep's configurations ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class RouteSummary:
    """One configuration's routing over its seeds."""

    configuration: str
    trials: tuple[RoutedTrial, ...]
    """One per seed."""
    tasks: tuple[str, ...]
    """Tasks that every seed has routed, in the first seed's order."""
    similarity: np.ndarray
    """(T, T) S, mean over seeds."""
    values: Mapping[str, float]
    """:meth:`Snapshot.values`, means over seeds."""
    ari: tuple[float, ...]
    """Adjusted Rand index with the categories, for each seed; () with fewer than two categories."""
    mantel_p: float | None
    """Of the mean S with the categories."""
    stability: float | None
    """:func:`seed_stability`."""


def summarise(
    trials: Sequence[RoutedTrial], categories: Mapping[str, str], permutations: int = PERMUTATIONS
) -> list[RouteSummary]:
    """One summary per configuration, in order. ``categories``: task -> human category; tasks without one are a group."""
    groups: dict[str, list[RoutedTrial]] = {}
    for trial in trials:
        groups.setdefault(trial.configuration, []).append(trial)
    return [_summary(name, members, categories, permutations) for name, members in groups.items()]


def _summary(name: str, members: Sequence[RoutedTrial], categories: Mapping[str, str], permutations: int) -> RouteSummary:
    tasks = [task for task in members[0].last.tasks if all(task in trial.last.tasks for trial in members)]
    found = []
    for trial in members:
        rows = [trial.last.tasks.index(task) for task in tasks]
        found.append(similarity(table[rows] for table in trial.last.tables.values()))
    labels = [categories.get(task, "") for task in tasks]
    mean = np.mean(found, axis=0)
    # With one task in each category any clusters agree, and with one category for all any tasks do.
    told = 1 < len(set(labels)) < len(labels)
    values = [trial.last.values() for trial in members]
    count = len(set(labels))
    return RouteSummary(
        configuration=name,
        trials=tuple(members),
        tasks=tuple(tasks),
        similarity=mean,
        values={key: float(np.mean([row[key] for row in values])) for key in values[0]},
        ari=tuple(adjusted_rand(_numbers(labels), clusters(matrix, count)) for matrix in found) if told else (),
        mantel_p=mantel(mean, labels, permutations)[1] if told else None,
        stability=seed_stability(found),
    )
