"""Do a trained mixture's routes matter? ``python pipelines/analyze.py {knockout,swap} TRIAL [options]``.

Routing that goes with tasks need not be of use to them (specs/task_aware_gating.md section 9, causal checks). ``knockout``
takes experts away, ``swap`` gives tasks each other's routes; nothing is trained again. Results go to the trial's
``measurements/``.
Exit status: 0, or 2 when the trial cannot be analysed so.
"""

import argparse
import csv
import io
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from lightning_modules.building import ConfigError
from lightning_modules.files import atomic_file
from lightning_modules.gang import Gang
from lightning_modules.measure.evaluation import evaluate
from lightning_modules.measure.routing import RoutingTally
from lightning_modules.network.routers.routers import Routers
from lightning_modules.router_config import PER_TASK
from pipelines.restore import Restored, restore
from pipelines.stats import Interval, t_interval
from pipelines.store import write_text
from pipelines.transfer import LOWER_IS_BETTER
from pipelines.wording import number, unit_for

LOG_WIDTH = 140
"""Width of tables where the output is not a terminal."""

CANDIDATES = 4000
"""Random routes among which those with the mass nearest to a task's own route are looked for."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status."""
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else LOG_WIDTH)
    try:
        probe = Probe(restore(Path(options.storage).resolve(), options.trial), options.split)
        found = knockout(probe, options.draws, options.seed) if options.check == "knockout" else swap(probe)
    except ConfigError as error:
        print(f"analyze.py: {error}", file=sys.stderr)
        return 2
    found.write(probe.restored.folder.measurements)
    console.print(found.table())
    for line in found.lines():
        console.print(line, markup=False, highlight=False)
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="analyze.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    checks = parser.add_subparsers(dest="check", required=True, metavar="{knockout,swap}")
    for name, what in (("knockout", "mask every expert, and every task's route"), ("swap", "score tasks with others' routes")):
        check = checks.add_parser(name, help=what)
        check.add_argument("trial", metavar="TRIAL", help="id of a finished trial (sweep.py --status lists them)")
        check.add_argument("--storage", default="runs", metavar="DIR", help="where trials live (default: ./runs)")
        check.add_argument("--split", default="test", choices=("dev", "test"))
        check.add_argument("--threads", type=int, default=1, help="of the CPU; small models want one")
        if name == "knockout":
            check.add_argument("--draws", type=int, default=20, help="random routes that each task's own is compared with")
            check.add_argument("--seed", type=int, default=0, help="of the random routes")
    return parser.parse_args(arguments)


class Probe:
    """Scores a trained network whose routers are tampered with."""

    def __init__(self, restored: Restored, split: str) -> None:
        if restored.network.routers is None:
            raise ConfigError(restored.folder.trial_id, "must have a mixture of experts, got a dense model")
        self.restored, self.split = restored, split
        self.routers: Routers = restored.network.routers
        self.tasks = [task.name for task in restored.tasks]
        self.metrics = [task.metric for task in restored.tasks]
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        restored.network.to(self.device)
        tally = RoutingTally(len(self.tasks), self.routers.experts)
        self.base = self._scores(None, tally)
        self.usage = tally.tables()
        """Block -> (T, E) share of each task's weight that an expert carries."""
        if np.isnan(self.base).all():
            raise ConfigError(restored.folder.trial_id, f"no task has a defined score on {split}")

    def without(self, masked: Mapping[int, Collection[int]], only: Collection[int] | None = None) -> np.ndarray:
        """(T,) scores when nobody may choose the ``masked`` experts (block -> experts), everything else being as it was; NaN
        where undefined or not in ``only``.

        Raises:
            ConfigError: a block would have no expert left.
        """
        for block, experts in masked.items():
            left = self.routers.experts[block] - len(set(experts))
            if left < 1:
                raise ConfigError(self.restored.folder.trial_id, f"block {block} must keep an expert, got all of them masked")
        self.routers.masked = {block: set(experts) for block, experts in masked.items()}
        try:
            return self._scores(only)
        finally:
            self.routers.masked = {}

    def with_route_of(self, donor: int) -> np.ndarray:
        """(T,) scores when every task takes the route of task number ``donor``."""
        self.routers.swapped = dict.fromkeys(range(len(self.tasks)), donor)
        try:
            return self._scores(None)
        finally:
            self.routers.swapped = {}

    def _scores(self, only: Collection[int] | None, tally: RoutingTally | None = None) -> np.ndarray:
        """Primary scores, higher is better."""
        restored = self.restored
        split: Any = self.split
        found = evaluate(
            restored.network, restored.config, restored.tasks, split, Gang(), self.device, tally=tally, only=only
        ).scores
        values = [found.get(task, {}).get(metric) for task, metric in zip(self.tasks, self.metrics, strict=True)]
        signs = [-1.0 if metric.partition("(")[0] in LOWER_IS_BETTER else 1.0 for metric in self.metrics]
        return np.array([np.nan if v is None else sign * v for v, sign in zip(values, signs, strict=True)])


# -- knock-out ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Knockout:
    """What experts and routes are worth. Scores are primary scores, higher is better; a loss is the score with all experts
    minus the score without some. T tasks, L routed blocks with a choice, E the most experts of a block, D random routes."""

    tasks: list[str]
    metrics: list[str]
    blocks: list[int]
    base: np.ndarray
    """(T,) scores with all experts."""
    usage: np.ndarray
    """(T, L, E) share of the task's weight; NaN beyond a block's experts."""
    loss: np.ndarray
    """(T, L, E) of the knock-out of one expert."""
    route: np.ndarray
    """(T, L) each task's own route: the expert that it uses most, at each block."""
    own: np.ndarray
    """(T,) loss of the knock-out of the whole route."""
    own_mass: np.ndarray
    """(T,) share of all tasks' weight, mean over blocks, that the route carries."""
    random: np.ndarray
    """(T, D) losses of the knock-out of random routes, one expert per block, nearest in mass; NaN where there are fewer."""
    random_mass: np.ndarray
    """(T, D) their masses."""

    @property
    def difference(self) -> np.ndarray:
        """(T,) loss without the own route minus the mean loss without a random one."""
        return self.own - _means(self.random)

    def interval(self) -> Interval | None:
        """Of the difference over the tasks that have one; tasks that share experts are not independent, so take it as a rough
        one. None without a task."""
        known = self.difference[np.isfinite(self.difference)]
        return t_interval(known.tolist()) if known.size else None

    def table(self) -> Table:
        """One line per task."""
        table = Table(title="Loss of score without ...", title_justify="left")
        for name in ("task", "score", "its route", "a random route", "difference", "its worst single expert"):
            table.add_column(name, justify="left" if name in ("task", "its worst single expert") else "right")
        for t, task in enumerate(self.tasks):
            factor = unit_for([self.metrics[t]])[0]
            values = [self.own[t], _means(self.random)[t], self.difference[t]]
            shown = [number(float(v), factor) if np.isfinite(v) else "-" for v in values]
            worst = "-"
            if np.isfinite(self.loss[t]).any():
                block, expert = np.unravel_index(np.nanargmax(self.loss[t]), self.loss[t].shape)
                worst = f"block {self.blocks[block]} expert {expert} ({number(float(self.loss[t, block, expert]), factor)})"
            table.add_row(task, f"{self.base[t] * factor:.1f}", *shown, worst)
        return table

    def lines(self) -> list[str]:
        """What it says."""
        interval, (factor, unit) = self.interval(), unit_for(self.metrics)
        if interval is None:
            return ["no verdict: no task has a random route of another kind to compare with"]
        match = f"(masses {np.nanmean(self.own_mass):.3f} and {np.nanmean(_means(self.random_mass)):.3f})"
        text = f"a task's own route is worth {_shown(interval, factor)} {unit} more to it than random routes of like mass"
        return [f"{_verdict(interval, 'routes matter', 'routes hurt their own tasks')}: {text} {match}, {interval.n} tasks"]

    def write(self, folder: Path) -> None:
        """Write ``knockout.npz`` (the fields) and ``knockout.csv`` (one row per task and expert, own and random route)."""
        _write_arrays(folder / "knockout.npz", self)
        head = ["task", "metric", "score", "without", "block", "expert", "mass", "loss"]
        rows: list[list[Any]] = []
        for t, (task, metric) in enumerate(zip(self.tasks, self.metrics, strict=True)):
            first = [task, metric, self.base[t]]
            for i, block in enumerate(self.blocks):
                experts = np.flatnonzero(np.isfinite(self.usage[t, i])).tolist()
                rows += [[*first, "expert", block, e, self.usage[t, i, e], self.loss[t, i, e]] for e in experts]
            rows.append([*first, "own route", "", "", self.own_mass[t], self.own[t]])
            pairs = zip(self.random_mass[t], self.random[t], strict=True)
            rows += [[*first, "random route", "", "", mass, loss] for mass, loss in pairs if np.isfinite(mass)]
        _write_rows(folder / "knockout.csv", head, rows)


def knockout(probe: Probe, draws: int = 20, seed: int = 0) -> Knockout:
    """Mask every expert in turn, every task's own route, and for each task ``draws`` random routes of the mass nearest to it.

    Raises:
        ConfigError: no block has a choice between experts, or the router cannot choose again (Soft MoE).
    """
    config, trial = probe.routers.config, probe.restored.folder.trial_id
    if config.selection == "slots":
        raise ConfigError(trial, "must choose between experts, got selection=slots, where every token meets every expert")
    blocks = [block for block, count in sorted(probe.routers.experts.items()) if count > 1]
    if not blocks:
        raise ConfigError(trial, "must have a block with more than one expert, which could be missed")
    if draws < 1:
        raise ConfigError("--draws", f"must be at least 1, got {draws}")
    counts = [probe.routers.experts[block] for block in blocks]
    usage = np.full((len(probe.tasks), len(blocks), max(counts)), np.nan)
    loss = usage.copy()
    for i, (block, count) in enumerate(zip(blocks, counts, strict=True)):
        usage[:, i, :count] = probe.usage[block]
        for expert in range(count):
            loss[:, i, expert] = probe.base - probe.without({block: {expert}})
    route = np.nanargmax(usage, axis=2)
    shares = np.nanmean(usage, axis=0)
    own, own_mass = np.full(len(route), np.nan), _mass(shares, route)
    random, random_mass = np.full((2, len(route), draws), np.nan)
    generator = np.random.default_rng(seed)
    for t in range(len(route)):
        own[t] = probe.base[t] - probe.without(_masks(blocks, route[t]), {t})[t]
        for d, drawn in enumerate(_alike(shares, counts, route[t], draws, generator)):
            random[t, d] = probe.base[t] - probe.without(_masks(blocks, drawn), {t})[t]
            random_mass[t, d] = _mass(shares, drawn)
    return Knockout(
        tasks=probe.tasks, metrics=probe.metrics, blocks=blocks, base=probe.base, usage=usage, loss=loss, route=route, own=own,
        own_mass=own_mass, random=random, random_mass=random_mass,
    )  # fmt: skip


def _masks(blocks: Sequence[int], route: np.ndarray) -> dict[int, set[int]]:
    return {block: {int(expert)} for block, expert in zip(blocks, route, strict=True)}


def _mass(shares: np.ndarray, route: np.ndarray) -> np.ndarray:
    """Mean over blocks of the share of all tasks' weight that the experts of routes (..., L) carry; ``shares`` (L, E)."""
    return shares[np.arange(len(shares)), route].mean(-1)


def _alike(
    shares: np.ndarray, counts: Sequence[int], own: np.ndarray, draws: int, generator: np.random.Generator
) -> np.ndarray:
    """At most ``draws`` different random routes (n, L), one expert per block, other than ``own`` and nearest to it in mass."""
    drawn = np.stack([generator.integers(count, size=CANDIDATES) for count in counts], axis=1)
    routes = generator.permutation(np.unique(drawn, axis=0))
    routes = routes[(routes != own).any(1)]
    nearest = np.argsort(np.round(np.abs(_mass(shares, routes) - _mass(shares, own)), 9), kind="stable")
    return routes[nearest[:draws]]


# -- swap --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Swap:
    """What a task's own route is worth over those of the other T - 1 tasks."""

    tasks: list[str]
    metrics: list[str]
    base: np.ndarray
    """(T,) scores with the own route, higher is better."""
    loss: np.ndarray
    """(T, T) score of task t with its own route minus its score with the route of task s."""

    @property
    def mean(self) -> np.ndarray:
        """(T,) mean loss over the other tasks' routes."""
        return _means(np.where(np.eye(len(self.tasks), dtype=bool), np.nan, self.loss))

    def interval(self) -> Interval | None:
        """Of the mean loss over tasks; None without a task."""
        known = self.mean[np.isfinite(self.mean)]
        return t_interval(known.tolist()) if known.size else None

    def table(self) -> Table:
        """One line per task."""
        table = Table(title="Loss of score with the route of ...", title_justify="left")
        for name in ("task", "score", "another task, mean", "the best other", "the worst other"):
            table.add_column(name, justify="right" if name in ("score", "another task, mean") else "left")
        for t, task in enumerate(self.tasks):
            factor = unit_for([self.metrics[t]])[0]
            others = [s for s in range(len(self.tasks)) if s != t and np.isfinite(self.loss[t, s])]
            ends = [end(others, key=lambda s: self.loss[t, s]) for end in (min, max)] if others else []
            shown = [f"{self.tasks[s]} ({number(float(self.loss[t, s]), factor)})" for s in ends] or ["-", "-"]
            mean = number(float(self.mean[t]), factor) if others else "-"
            table.add_row(task, f"{self.base[t] * factor:.1f}", mean, *shown)
        return table

    def lines(self) -> list[str]:
        """What it says."""
        interval, (factor, unit) = self.interval(), unit_for(self.metrics)
        if interval is None:
            return ["no verdict: no task has a score"]
        text = f"a task's own route is worth {_shown(interval, factor)} {unit} more to it than another task's"
        return [f"{_verdict(interval, 'routes matter', 'tasks do better with others routes')}: {text}, {interval.n} tasks"]

    def write(self, folder: Path) -> None:
        """Write ``swap.npz`` (the fields) and ``swap.csv`` (one row per task and donor of a route)."""
        _write_arrays(folder / "swap.npz", self)
        rows = [
            [task, self.metrics[t], self.base[t], donor, self.loss[t, s]]
            for t, task in enumerate(self.tasks)
            for s, donor in enumerate(self.tasks)
            if s != t
        ]
        _write_rows(folder / "swap.csv", ["task", "metric", "score", "route_of", "loss"], rows)


def swap(probe: Probe) -> Swap:
    """Score every task with the route of every other.

    Raises:
        ConfigError: there is one task only, or routes do not depend on the task.
    """
    config, trial = probe.routers.config, probe.restored.folder.trial_id
    by_task = config.kind in PER_TASK or config.conditioning != "none"
    if not by_task or config.kind == "uniform" or config.selection == "slots":
        found = f"got kind={config.kind!r}, conditioning={config.conditioning!r}, selection={config.selection!r}"
        raise ConfigError(trial, f"its routes must depend on the task, {found}")
    if len(probe.tasks) < 2:
        raise ConfigError(trial, "must have two tasks or more, whose routes could be swapped")
    loss = np.stack([probe.base - probe.with_route_of(donor) for donor in range(len(probe.tasks))], axis=1)
    return Swap(tasks=probe.tasks, metrics=probe.metrics, base=probe.base, loss=loss)


# -- words and files ---------------------------------------------------------------------------------------------------------


def _means(values: np.ndarray) -> np.ndarray:
    """Row means over what is there; NaN for an empty row."""
    there = np.isfinite(values)
    sums, counts = np.where(there, values, 0.0).sum(1), there.sum(1)
    return np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0)


def _shown(interval: Interval, factor: float) -> str:
    if interval.low is None or interval.high is None:
        return f"{number(interval.mean, factor)} (one task, no interval)"
    return f"{number(interval.mean, factor)} [{number(interval.low, factor)}, {number(interval.high, factor)}]"


def _verdict(interval: Interval, above: str, below: str) -> str:
    if not interval.excludes_zero:
        return "not shown that routes matter"
    return above if interval.mean > 0 else below


def _write_arrays(path: Path, found: Any) -> None:
    arrays = {name: np.asarray(value) for name, value in vars(found).items()}
    with atomic_file(path, "wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def _write_rows(path: Path, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    for row in rows:
        writer.writerow([format(value, ".10g") if isinstance(value, float) else value for value in row])
    write_text(path, text.getvalue())


if __name__ == "__main__":
    sys.exit(main())
