"""The plan of a sweep: which trials it needs, what each is for, where each stands, and what they will cost. No torch, no Ray.

A trial that several candidates need (a shared baseline), or that two grid points turn out to be, is planned once: its id is its
content. Trials run seed by seed, and within a seed the baselines that most candidates share come first, so that a sweep that
is cut short has complete comparisons for its first seeds. Trials that others start from (``trial.start``) run in earlier waves.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from lightning_modules.building import ConfigError
from lightning_modules.config import TrialConfig, flatten, to_plain
from lightning_modules.data.tasks import TaskSpec, load_catalogues
from pipelines.axes import Point, is_trial_key, show_axes, show_value
from pipelines.baselines import single_task, whole_mixture
from pipelines.cost import CostEstimate, Machine, estimate, foreign_results, local_resources, slots
from pipelines.resolve import PlannedTask, Resolver
from pipelines.spec import SweepConfig
from pipelines.store import TrialFolder, TrialResult

CANDIDATE = "candidate"
SINGLE_TASK = "single_task"
STAGE = "stage"
State = Literal["new", "resume", "finished"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedTrial:
    """One trial of a plan."""

    trial_id: str
    config: TrialConfig
    role: str
    """``candidate``, the kind of baseline it is, or ``stage``: others start from it. A trial that is several of them is a
    candidate, else a baseline."""
    configuration: str
    """Label that all seeds of a configuration share, e.g. ``task_moe num_experts=4``."""
    seed: int
    wave: int = 0
    """A trial starts after all trials of earlier waves. 0: it starts from no other trial's weights."""
    state: State = "new"
    """From the store: has a result, has a checkpoint to go on from, or neither."""
    remaining: int = 0
    """Optimiser steps left to train."""
    task: str | None = None
    """The task of a ``single_task`` baseline."""
    axes: Mapping[str, Any] = field(default_factory=dict)
    """Axis name -> value of a candidate's grid point; empty for baselines."""
    shares: Mapping[str, float] = field(default_factory=dict)
    """Task -> share of the groups of a step, of the tasks that are trained; with adaptive sampling at the start."""
    sizes: Mapping[str, int] = field(default_factory=dict)
    """Task -> training examples that are used."""
    baselines: Mapping[str, Any] = field(default_factory=dict)
    """``{"single_task": {task: trial_id}, other kind: trial_id}`` of a candidate."""
    uses: tuple[tuple[str, str], ...] = ()
    """(role, configuration) of everything this trial serves as, the one shown above first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """All trials of a sweep in the order in which they run."""

    sweep: SweepConfig
    trials: tuple[PlannedTrial, ...]
    tasks: Mapping[str, PlannedTask]
    """The tasks that are trained and scored, in catalogue order."""
    specs: Mapping[str, TaskSpec]
    """Task name -> where its examples are, of every task that a trial reads (tokenizer texts included)."""
    cost: CostEstimate
    warnings: tuple[str, ...] = ()
    """What the user should know of the data."""

    def count(self, state: State) -> int:
        """Trials in that state."""
        return sum(trial.state == state for trial in self.trials)

    def to_json(self) -> str:
        """The content of ``plan.json``: the sweep, its tasks, and of each trial everything a comparison needs."""
        sweep = self.sweep
        content = {
            "sweep": sweep.name,
            "file": sweep.file,
            "question": sweep.question,
            "seeds": list(sweep.seed_list),
            "baselines": list(sweep.baselines),
            "tasks": [to_plain(task) for task in self.tasks.values()],
            "trials": [to_plain(trial) for trial in self.trials],
            "warnings": list(self.warnings),
            "cost": to_plain(self.cost),
        }
        return json.dumps(content, indent=1)


@dataclass(slots=True)
class _Draft:
    """A trial while the plan is being made."""

    trial_id: str
    config: TrialConfig
    role: str
    raw: TrialConfig
    """What the label is made from: patterns instead of lists of tasks."""
    wave: int = 0
    task: str | None = None
    axes: Mapping[str, Any] = field(default_factory=dict)
    baselines: dict[str, Any] = field(default_factory=dict)


def make_plan(sweep: SweepConfig, storage: Path, *, fresh: bool = False, machine: Machine | None = None) -> Plan:
    """The plan of ``sweep`` against what ``storage`` holds. Reads every example of every task it uses, once.

    Args:
        sweep: from :func:`pipelines.spec.load_sweep`.
        storage: folder with ``trials/``; need not exist.
        fresh: treat finished trials and checkpoints as absent.
        machine: what trials run on, for the estimate; None: this machine.

    Raises:
        SweepError: a catalogue, task or backbone cannot be used, or settings do not fit the data.
    """
    points = sweep.points()
    try:
        specs = load_catalogues(sweep.catalogues, Path())
        resolver = Resolver(specs)
        drafts = _drafts(sweep, points, resolver)
        _check_workers(sweep, drafts)
    except ConfigError as error:
        raise sweep.error(error) from None
    trials = _merge(drafts, resolver, storage, fresh)
    read = {name for trial in trials for name in (*trial.config.mixture.tasks, *trial.config.backbone.size.tokenizer_tasks)}
    trained = {name for trial in trials for name in trial.config.mixture.tasks}
    return Plan(
        sweep=sweep,
        trials=trials,
        tasks={name: task for name, task in resolver.tasks().items() if name in trained},
        specs={name: spec for name, spec in specs.items() if name in read},
        cost=_cost(trials, storage, slots(sweep.resources, machine or local_resources())),
        warnings=tuple(dict.fromkeys(warning for draft in drafts for warning in resolver.warnings(draft.config))),
    )


def _drafts(sweep: SweepConfig, points: Sequence[Point], resolver: Resolver) -> list[_Draft]:
    drafts: list[_Draft] = []
    if len({point.config.mixture.unrelated for point in points}) > 1:
        law = "must be the same at every point of the axes: it says how tasks are compared and changes no training"
        raise ConfigError("trial.mixture.unrelated", law)
    for point in points:
        try:
            chain = _resolve_stages(point, resolver)
        except ConfigError as error:
            raise _at_point(error, point, len(points)) from None
        raws = (*reversed(point.earlier), point.config)
        for seed in sweep.seed_list:
            configs = _linked(chain, seed)
            config, wave = configs[-1], len(configs) - 1
            for depth, (stage, raw) in enumerate(zip(configs[:-1], raws[:-1], strict=True)):
                drafts.append(_Draft(stage.trial_id, stage, STAGE, raw, depth))
            candidate = _Draft(config.trial_id, config, CANDIDATE, point.config, wave, axes=point.axes)
            drafts.append(candidate)
            # A frozen backbone whose decoder answers has nothing to train.
            floor = not resolver.decodes(config, config.mixture)
            kinds = [kind for kind in sweep.baselines if kind != "frozen_backbone" or floor]
            drafts.extend(_baselines(candidate, kinds, resolver.shares(config)))
    return drafts


def _resolve_stages(point: Point, resolver: Resolver) -> list[TrialConfig]:
    """The point's trials in the order in which they train, the candidate last."""
    later = resolver.resolve(point.config)
    chain, prefix = [later], "trial"
    for config in point.earlier:
        prefix = f"{prefix}.start.changes"
        try:
            later = resolver.resolve_earlier(config, later)
        except ConfigError as error:
            if error.key in ("trial.start.load", "") or not error.key.startswith("trial."):
                raise
            raise ConfigError(error.key.replace("trial", prefix, 1), f"(in the earlier trial) {error.law}") from None
        chain.insert(0, later)
    return chain


def _linked(chain: Sequence[TrialConfig], seed: int) -> list[TrialConfig]:
    """The stages with their seed, each with the id of the one that it starts from."""
    linked: list[TrialConfig] = []
    for config in chain:
        start = replace(config.start, trial=linked[-1].trial_id) if linked else config.start
        linked.append(replace(config, seed=seed, start=start))
    return linked


def _at_point(error: ConfigError, point: Point, points: int) -> ConfigError:
    """Name the values of the axes that set something in the group of settings (``mixture``) where the mistake is."""
    group = error.key.removeprefix("trial.").split(".")[0]
    guilty = {
        name: value
        for name, value in point.axes.items()
        if any(key.split(".")[0] == group for key in _axis_settings(name, value))
    }
    if points == 1 or not guilty:
        return error
    return ConfigError(f"{error.key} (at {show_axes(guilty)})", error.law)


def _baselines(candidate: _Draft, kinds: Iterable[str], shares: Mapping[str, float]) -> list[_Draft]:
    """The candidate's baselines, without itself; their ids are noted in the candidate."""
    drafts: list[_Draft] = []
    for kind in kinds:
        found = _alone(candidate, shares) if kind == SINGLE_TASK else _whole(candidate, kind)
        found = [draft for draft in found if draft.trial_id != candidate.trial_id]
        if kind == SINGLE_TASK:
            candidate.baselines[kind] = {draft.task: draft.trial_id for draft in found}
        elif found:
            candidate.baselines[kind] = found[0].trial_id
        drafts += found
    return drafts


def _alone(candidate: _Draft, shares: Mapping[str, float]) -> list[_Draft]:
    configs = {task: single_task(candidate.config, task, share) for task, share in shares.items()}
    return [_Draft(config.trial_id, config, SINGLE_TASK, config, task=task) for task, config in configs.items()]


def _whole(candidate: _Draft, kind: str) -> list[_Draft]:
    config, raw = whole_mixture(candidate.config, kind), whole_mixture(candidate.raw, kind)
    return [] if config is None or raw is None else [_Draft(config.trial_id, config, kind, raw)]


def _check_workers(sweep: SweepConfig, drafts: Sequence[_Draft]) -> None:
    workers = sweep.resources.workers
    for draft in drafts:
        mixture, size = draft.config.mixture, draft.config.mixture.group_size
        if workers > size and mixture.batch_tokens is None:
            law = "must be at most the examples of a group (batch_size / tasks_per_step)"
            raise ConfigError("resources.workers", f"{law}, got workers={workers}, group of {size}")


def _merge(drafts: Sequence[_Draft], resolver: Resolver, storage: Path, fresh: bool) -> tuple[PlannedTrial, ...]:
    """One planned trial per id, in the order in which they run."""
    labels = _labels(drafts)
    groups: dict[str, list[_Draft]] = {}
    for draft in drafts:
        groups.setdefault(draft.trial_id, []).append(draft)
    users = Counter(draft.trial_id for draft in drafts if draft.role != CANDIDATE)
    trials = []
    for trial_id, group in groups.items():
        group.sort(key=lambda draft: (draft.role != CANDIDATE, draft.role == STAGE))
        main = group[0]
        state, remaining = _state(TrialFolder(storage, trial_id), main.config, fresh)
        trials.append(
            PlannedTrial(
                trial_id=trial_id,
                config=main.config,
                role=main.role,
                configuration=labels[id(main)],
                seed=main.config.seed,
                wave=main.wave,
                state=state,
                remaining=remaining,
                task=main.task,
                axes=main.axes,
                shares=resolver.shares(main.config),
                sizes=resolver.sizes(main.config),
                baselines=main.baselines,
                uses=tuple(dict.fromkeys((draft.role, labels[id(draft)]) for draft in group)),
            )
        )
    return tuple(sorted(trials, key=lambda t: (t.wave, t.seed, t.role == CANDIDATE, -users[t.trial_id])))


def _state(folder: TrialFolder, config: TrialConfig, fresh: bool) -> tuple[State, int]:
    """Where the trial stands, and how many steps are left."""
    if fresh:
        return "new", config.train.steps
    if folder.result() is not None:
        return "finished", 0
    steps = [int(p.stem.removeprefix("step_")) for p in folder.checkpoints.glob("step_*.pt") if p.stem[5:].isdigit()]
    return ("resume", max(0, config.train.steps - max(steps))) if steps else ("new", config.train.steps)


def _cost(trials: Sequence[PlannedTrial], storage: Path, at_once: int) -> CostEstimate:
    left = [(trial.config, trial.remaining) for trial in trials if trial.state != "finished"]
    measured: list[tuple[TrialConfig, TrialResult]] = []
    if left:
        results = ((t.config, TrialFolder(storage, t.trial_id).result()) for t in trials if t.state == "finished")
        measured = [(config, result) for config, result in results if result is not None]
        measured += foreign_results(storage, {t.trial_id for t in trials})
    return estimate(left, measured, at_once)


def _labels(drafts: Sequence[_Draft]) -> dict[int, str]:
    """``id(draft)`` -> label: role (of a baseline), family, and the settings that differ within this role and family."""
    flats = {id(d): _label_settings(d.raw) for d in drafts}
    groups: dict[tuple[str, str, str | None], list[_Draft]] = {}
    for draft in drafts:
        groups.setdefault((draft.role, draft.raw.model.family, draft.task), []).append(draft)
    labels: dict[int, str] = {}
    for (role, family, task), group in groups.items():
        keys = list(dict.fromkeys(key for d in group for key in flats[id(d)]))
        staged = [d for d in group if d.raw.start.load]
        varying = [key for key in keys if _differs(key, [flats[id(d)] for d in (staged if _is_change(key) else group)])]
        names = _short_names(varying)
        start = family if role == CANDIDATE else f"{role} {task or family}"
        seen: dict[str, list[str]] = {}
        for draft in group:
            flat = flats[id(draft)]
            keys = [key for key in varying if key in flat and key in _labelled(draft, varying)]
            shown = [f"{names[key]}={show_value(flat[key])}" for key in keys]
            label = " ".join([start, *shown])
            same = seen.setdefault(label, [])
            if (content := repr(flat)) not in same:
                same.append(content)
            labels[id(draft)] = label if same.index(content) == 0 else f"{label} #{same.index(content) + 1}"
    return labels


def _is_change(key: str) -> bool:
    """Whether it is a setting of an earlier trial, to be told apart from those of other earlier trials only."""
    return key.startswith("start.changes.")


def _differs(key: str, flats: Sequence[Mapping[str, Any]]) -> bool:
    return len({repr(flat.get(key)) for flat in flats}) > 1


def _labelled(draft: _Draft, varying: Sequence[str]) -> set[str]:
    """The settings that a label may show: those that the sweep's axes name, or for any other trial all that vary."""
    if draft.role != CANDIDATE:
        shown = set(varying) - set(_UNLABELLED)
    else:
        shown = {key for axis, value in draft.axes.items() for key in _axis_settings(axis, value)}
    return {key for key in shown if not key.startswith(_MAPS)}


def _axis_settings(axis: str, value: Any) -> dict[str, Any]:
    """Key path -> value of one axis value; a zipped axis, named freely, holds key paths."""
    return flatten({axis: value} if is_trial_key(axis) else dict(value))


_UNLABELLED = ("backbone.size.tokenizer_tasks",)
"""Settings that follow from others and are too long for a label; a number tells configurations that differ in them apart."""

_MAPS = ("model.router.experts_of.", "model.router.descriptions.", "model.router.donors.")
"""Settings with an entry for each task: too long for a label, too."""


def _label_settings(config: TrialConfig) -> dict[str, Any]:
    plain = to_plain(config)
    del plain["seed"], plain["digests"], plain["start"]["trial"]
    return flatten(plain)


def _short_names(keys: Sequence[str]) -> dict[str, str]:
    """Key paths -> their last part, or as many parts as it takes to tell them apart; those of an earlier trial begin with
    ``start:``."""
    names = {}
    for key in keys:
        prefix = "start:" if _is_change(key) else ""
        others = [other for other in keys if _is_change(other) == _is_change(key)]
        parts = key.removeprefix("start.changes.").split(".")
        suffixes = (".".join(parts[i:]) for i in range(len(parts) - 1, -1, -1))
        unique = (s for s in suffixes if sum(other == s or other.endswith(f".{s}") for other in others) == 1)
        names[key] = prefix + next(unique, key)
    return names


def show_seconds(seconds: float) -> str:
    """``40 s``, ``12 min``, ``3.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def describe(plan: Plan, *, trials: bool = True) -> list[str]:
    """The plan as lines of text: counts, configurations, tasks, cost, and (``trials``) one line per trial."""
    sweep = plan.sweep
    head = f"{sweep.name}: {len(plan.trials)} trials, {plan.count('new')} new, {plan.count('resume')} to resume, "
    lines = [head + f"{plan.count('finished')} finished"]
    lines += [f"question: {' '.join(sweep.question.split())}"] if sweep.question else []
    lines += [f"seeds: {', '.join(map(str, sweep.seed_list))}", "", *_configuration_lines(plan), "", *_task_lines(plan), ""]
    lines += [*(f"warning: {warning}" for warning in plan.warnings), *([""] if plan.warnings else [])]
    lines += [*_cost_lines(plan.cost), ""]
    if trials:
        lines += _table([("trial", "state", "seed", "steps", "configuration"), *map(_trial_row, plan.trials)])
    return lines


def _trial_row(trial: PlannedTrial) -> tuple[str, ...]:
    also = [label for _, label in trial.uses if label != trial.configuration]
    shown = trial.configuration + (f" (also {', '.join(also)})" if also else "")
    shown += f" (starts from {trial.config.start.trial})" if trial.config.start.trial else ""
    steps = trial.config.train.steps
    done = steps - trial.remaining
    return trial.trial_id, trial.state, str(trial.seed), f"{done}/{steps}" if trial.state == "resume" else str(steps), shown


def _configuration_lines(plan: Plan) -> list[str]:
    counts: dict[tuple[str, str], Counter[str]] = {}
    for trial in plan.trials:
        label = SINGLE_TASK if trial.role == SINGLE_TASK else trial.configuration
        counts.setdefault((trial.role, label), Counter())[trial.state] += 1
    rows: list[tuple[str, ...]] = [("role", "configuration", "trials", "new", "resume", "finished")]
    for (role, label), states in sorted(counts.items(), key=lambda item: item[0][0] != CANDIDATE):
        rows.append((role, label, str(states.total()), *(str(states[s]) for s in ("new", "resume", "finished"))))
    return _table(rows)


def _task_lines(plan: Plan) -> list[str]:
    rows: list[tuple[str, ...]] = [("task", "kind", "metric", "train", "dev", "test", "train used", "share of groups")]
    for name, task in plan.tasks.items():
        candidates = [t for t in plan.trials if t.role == CANDIDATE and name in t.shares]
        shares = sorted({round(100 * t.shares[name], 1) for t in candidates})
        used = sorted({t.sizes[name] for t in candidates})
        sizes = [str(task.sizes[split]) for split in ("train", "dev", "test")]
        starts = any(t.config.mixture.sampling == "adaptive" for t in candidates)
        share = _span(shares, "%") + (" at the start" if starts else "")
        rows.append((name, task.kind, task.metric, *sizes, _span(used, ""), share))
    return _table(rows)


def _span(values: Sequence[float], unit: str) -> str:
    if not values:
        return "-"
    low, high = f"{values[0]:g}{unit}", f"{values[-1]:g}{unit}"
    return low if low == high else f"{low}..{high}"


def _cost_lines(cost: CostEstimate) -> list[str]:
    if not cost.trials:
        return ["cost: nothing left to train"]
    sources = ", ".join(f"{n} {source}" for source, n in sorted(cost.sources.items()))
    line = f"cost: about {show_seconds(cost.wall_seconds)} with {cost.slots} trials at a time "
    return [line + f"({show_seconds(cost.seconds)} one after the other; step times: {sources})"]


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
