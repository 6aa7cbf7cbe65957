"""The grid of a sweep: axes -> points, each a checked ``TrialConfig``.

Three forms under ``axes:``, combined with each other in file order, the last varying fastest:

* ``train.lr: [1e-3, 3e-4]``: a key of the trial and its values. A value that is a mapping is merged into what the trial has at
  that key (``model: [{family: dense}, {family: task_moe}]``). Naming another ``family`` replaces the whole ``model`` instead:
  settings of one family say nothing about another. ``mixture.low_resource`` and ``start.changes``, tables and no settings, are
  replaced too.
* ``model.num_experts: {when: {model.family: task_moe}, values: [2, 4]}``: varies only at the points where each key of ``when``
  has the given value (or one of a list); elsewhere the key is left alone. ``when`` sees the trial's values, what earlier axes
  have set, and defaults.
* ``size: [{train.steps: 100, train.lr: 1e-3}, {train.steps: 400, train.lr: 5e-4}]``: zipped, a name that is no key of the
  trial; each value sets several keys together.
"""

import copy
import dataclasses
import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, get_type_hints

from lightning_modules.building import ConfigError, build
from lightning_modules.config import FAMILIES, TrialConfig, flatten, to_plain

MAX_POINTS = 10_000
"""More grid points than this is taken for a slip."""

MAX_STAGES = 8
"""More trials than this, each starting from the one before, are taken for a slip."""

_TABLES = ("mixture.low_resource", "start.changes")
_NOT_BY_HAND = ("seed", "digests", "start.trial")
_MISSING = object()


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """One entry under ``axes:``."""

    name: str
    values: tuple[Mapping[str, Any], ...]
    """What each value sets: key path of the trial -> value."""
    shown: tuple[Any, ...]
    """The values as the file has them."""
    when: Mapping[str, tuple[Any, ...]]
    """Key path -> values at which the axis applies; empty: always."""

    def covers(self, key: str) -> bool:
        """Whether the axis can set ``key``, something inside it or something around it."""
        return any(_overlap(key, own) for value in self.values for own in value)


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One point of the grid."""

    axes: Mapping[str, Any]
    """Axis name -> value, of the axes that apply here."""
    config: TrialConfig
    """Checked; tasks still as patterns, no digests, seed 0."""
    earlier: tuple[TrialConfig, ...] = ()
    """The trial that it starts from, the one that this starts from, and so on; as ``config``."""


@cache
def trial_keys() -> frozenset[str]:
    """Every key path that can be set under ``trial:``, groups (``train``) and settings (``train.lr``) alike."""
    return frozenset(key for key in _keys_of(TrialConfig, "") if key not in _NOT_BY_HAND)


def _keys_of(cls: Any, prefix: str) -> Iterator[str]:
    hints = get_type_hints(cls)
    for f in dataclasses.fields(cls):
        yield f"{prefix}{f.name}"
        inner = FAMILIES.values() if prefix == "" and f.name == "model" else [hints[f.name]]
        for option in inner:
            if dataclasses.is_dataclass(option):
                yield from _keys_of(option, f"{prefix}{f.name}.")


def is_trial_key(key: str) -> bool:
    """Whether ``key`` can be set under ``trial:``; ``mixture.low_resource.TASK`` can for every task, and ``start.changes.KEY``
    for every other key."""
    table, name = _in_table(key)
    return key in trial_keys() or (bool(name) and (table == "mixture.low_resource" or is_trial_key(name)))


def _in_table(key: str) -> tuple[str, str]:
    """The table that ``key`` names an entry of, and the entry; empty where it names none."""
    table = next((table for table in _TABLES if key.startswith(f"{table}.")), "")
    return table, key[len(table) + 1 :] if table else ""


def key_parts(key: str) -> list[str]:
    """The mappings that lead to ``key``: what names an entry of a table is one part, whatever dots it has."""
    table, name = _in_table(key)
    return [*table.split("."), name] if table else key.split(".")


def unknown_key(key: str, known: Sequence[str] | None) -> ConfigError:
    """The error for a key that does not exist, with the nearest that do (``known``; None: the keys under ``trial.``)."""
    names = known if known is not None else sorted(f"trial.{name}" for name in trial_keys())
    near = difflib.get_close_matches(key, names, 3, 0.6) or [n for n in names if n.split(".")[-1] == key.split(".")[-1]][:3]
    hint = f"did you mean {' or '.join(near)}?" if near else f"keys here: {', '.join(names)}" if len(names) <= 15 else ""
    return ConfigError(key, f"unknown key{'; ' if hint else ''}{hint}")


def parse_axes(axes: Mapping[str, Any]) -> list[Axis]:
    """The entries under ``axes:``, checked.

    Raises:
        ConfigError: an entry is malformed, sets an unknown key, or has a condition on an axis that comes later.
    """
    parsed = [_parse_axis(str(name), entry) for name, entry in axes.items()]
    for i, axis in enumerate(parsed):
        for key in axis.when:
            later = [other.name for other in parsed[i:] if other.covers(key)]
            if later:
                law = "must be known before this axis; " + (
                    "an axis cannot depend on itself" if later[0] == axis.name else f"put the axis {later[0]} first"
                )
                raise ConfigError(f"axes.{axis.name}.when.{key}", law)
    return parsed


def _parse_axis(name: str, entry: Any) -> Axis:
    key = f"axes.{name}"
    if isinstance(entry, Mapping):
        wrong = set(entry) - {"when", "values"}
        if wrong or "values" not in entry:
            raise ConfigError(key, f"must be a list of values, or a mapping of when and values, got {sorted(map(str, entry))}")
        when, values = entry.get("when") or {}, entry["values"]
    else:
        when, values = {}, entry
    if not isinstance(values, list) or not values:
        raise ConfigError(key, f"must be a list with at least one value, got {values!r}")
    return Axis(name=name, values=_assignments(name, values), shown=tuple(values), when=_conditions(key, when))


def _conditions(key: str, when: Any) -> dict[str, tuple[Any, ...]]:
    if not isinstance(when, Mapping):
        raise ConfigError(f"{key}.when", f"must be a mapping of key: value, got {when!r}")
    for condition in when:
        if not is_trial_key(str(condition)):
            error = unknown_key(str(condition), sorted(trial_keys()))
            raise ConfigError(f"{key}.when.{condition}", error.law)
    return {str(k): tuple(v) if isinstance(v, list) else (v,) for k, v in when.items()}


def _assignments(name: str, values: list[Any]) -> tuple[Mapping[str, Any], ...]:
    if is_trial_key(name):
        return tuple({name: value} for value in values)
    if name.split(".")[0] in _NOT_BY_HAND:
        raise ConfigError(f"axes.{name}", "cannot be an axis; the key seeds lists the seeds of all trials")
    if not all(isinstance(value, Mapping) for value in values):
        error = unknown_key(name, sorted(trial_keys()))
        raise ConfigError(f"axes.{name}", f"{error.law} (a zipped axis, under a name of its own, has mappings as values)")
    for i, value in enumerate(values):
        for key in value:
            if not is_trial_key(str(key)):
                near = difflib.get_close_matches(name, sorted(trial_keys()), 1, 0.6)
                also = f" (or is the axis {name} meant to be {near[0]}?)" if near else ""
                raise ConfigError(f"axes.{name}[{i}].{key}", unknown_key(str(key), sorted(trial_keys())).law + also)
    return tuple(values)


def expand_axes(trial: Mapping[str, Any], axes: Sequence[Axis]) -> list[Point]:
    """All points of the grid over ``trial``, in order.

    Raises:
        ConfigError: a point breaks a law of ``TrialConfig`` (the key is followed by the point's axis values), an axis applies
            nowhere, or a later axis undoes an earlier one.
    """
    drafts: list[tuple[dict[str, Any], dict[str, Any]]] = [({}, dict(trial))]
    for axis in axes:
        grown = []
        for chosen, plain in drafts:
            if not _applies(axis, plain):
                grown.append((chosen, plain))
                continue
            for assignments, shown in zip(axis.values, axis.shown, strict=True):
                grown.append(({**chosen, axis.name: shown}, _assign_all(plain, assignments)))
        if not any(axis.name in chosen for chosen, _ in grown):
            raise _never_applies(axis, [plain for _, plain in drafts])
        if len(grown) > MAX_POINTS:
            raise ConfigError("axes", f"must make at most {MAX_POINTS} points, got {len(grown)} up to {axis.name}")
        drafts = grown
    for chosen, plain in drafts:
        _check_survives(chosen, plain, axes)
    return [
        Point(axes=chosen, config=_checked(trial, chosen, plain), earlier=_earlier(chosen, plain)) for chosen, plain in drafts
    ]


def _earlier(chosen: Mapping[str, Any], plain: Mapping[str, Any]) -> tuple[TrialConfig, ...]:
    """The trials that a point starts from, the latest first.

    Raises:
        ConfigError: one of them breaks a law; the key is that of the change at fault, where one is.
    """
    configs: list[TrialConfig] = []
    prefix = "trial"
    while (plain.get("start") or {}).get("load"):
        if len(configs) == MAX_STAGES:
            raise ConfigError(f"{prefix}.start", f"must make at most {MAX_STAGES} stages")
        prefix = f"{prefix}.start.changes"
        changes = plain["start"].get("changes") or {}
        try:
            plain = _changed(plain, changes, prefix)
            configs.append(build(TrialConfig, plain, "trial"))
        except ConfigError as error:
            error = _of_changes(error, changes, prefix)
            raise (ConfigError(f"{error.key} (at {show_axes(chosen)})", error.law) if chosen else error) from None
    return tuple(configs)


def _changed(plain: Mapping[str, Any], changes: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    for key in map(str, changes):
        if key.split(".")[0] == "start" and key != "start":
            raise ConfigError(f"{prefix}.{key}", "must be a mapping under start: the earlier trial has a start of its own")
        if not is_trial_key(key):
            law = "must not be set: stages share the seed" if key == "seed" else ""
            raise ConfigError(f"{prefix}.{key}", law or unknown_key(key, sorted(trial_keys())).law)
    before = {key: value for key, value in plain.items() if key != "start"}
    # What a later stage keeps still is what the earlier one is there to train.
    before["train"] = {key: value for key, value in (plain.get("train") or {}).items() if key != "freeze"}
    return _assign_all(before, changes)


def _of_changes(error: ConfigError, changes: Mapping[str, Any], prefix: str) -> ConfigError:
    """A mistake of an earlier trial as one of the change that has made it."""
    if error.key.startswith(prefix):
        return error
    key = error.key.removeprefix("trial.")
    guilty = [str(change) for change in changes if _overlap(key, str(change))]
    if guilty:
        change = max(guilty, key=len)
        inner = key[len(change) :] if key.startswith(change) else ""
        return ConfigError(f"{prefix}.{change}{inner}", error.law)
    return ConfigError(prefix, f"must make a trial that can be run, but {error.key} {error.law}")


def _never_applies(axis: Axis, plains: Sequence[Mapping[str, Any]]) -> ConfigError:
    parts = []
    for key, wanted in axis.when.items():
        found = dict.fromkeys(repr(v) for plain in plains if (v := _value_at(plain, key)) is not _MISSING)
        parts.append(f"{key} is {' or '.join(found) or 'never set'}, not {' or '.join(map(repr, wanted))}")
    return ConfigError(f"axes.{axis.name}.when", f"must hold at some point of the grid, but {'; '.join(parts)}")


def _checked(trial: Mapping[str, Any], chosen: Mapping[str, Any], plain: Mapping[str, Any]) -> TrialConfig:
    try:
        return build(TrialConfig, plain, "trial")
    except ConfigError as error:
        if not chosen or _same_error(trial, error):
            raise
        raise ConfigError(f"{error.key} (at {show_axes(chosen)})", error.law) from None


def _same_error(trial: Mapping[str, Any], error: ConfigError) -> bool:
    """Whether the trial without any axis breaks the same law: then the axis values have no part in it."""
    try:
        build(TrialConfig, trial, "trial")
    except ConfigError as base:
        return (base.key, base.law) == (error.key, error.law)
    return False


def show_axes(axes: Mapping[str, Any]) -> str:
    """``model.num_experts=2, train.lr=0.001``."""
    return ", ".join(f"{name}={show_value(value)}" for name, value in axes.items())


def show_value(value: Any) -> str:
    """A setting's value in a label or message, without spaces."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{k}:{show_value(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "+".join(map(show_value, value)) if len(value) <= 3 else f"{show_value(value[0])}+{len(value) - 1}more"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


def _applies(axis: Axis, plain: Mapping[str, Any]) -> bool:
    for key, wanted in axis.when.items():
        value = _value_at(plain, key)
        if value is _MISSING or not (value in wanted or value == list(wanted)):
            return False
    return True


def _value_at(plain: Mapping[str, Any], key: str) -> Any:
    """The value that ``key`` has at a point, defaults included; missing where the point's family has no such key."""
    value = _get(plain, key)
    if value is not _MISSING:
        return value
    model = plain.get("model")
    family = model.get("family", "dense") if isinstance(model, Mapping) else "dense"
    return _defaults(family).get(key, _MISSING) if family in FAMILIES else _MISSING


@cache
def _defaults(family: str) -> dict[str, Any]:
    return flatten(to_plain(TrialConfig(model=FAMILIES[family]())))


def _get(plain: Mapping[str, Any], key: str) -> Any:
    value: Any = plain
    for part in key_parts(key):
        if not isinstance(value, Mapping) or part not in value:
            return _MISSING
        value = value[part]
    return value


def _assign_all(plain: Mapping[str, Any], assignments: Mapping[str, Any]) -> dict[str, Any]:
    result = copy.deepcopy(dict(plain))
    for key, value in assignments.items():
        _assign(result, str(key), value)
    return result


def _assign(plain: dict[str, Any], key: str, value: Any) -> None:
    *outer, last = key_parts(key)
    target = plain
    for i, part in enumerate(outer):
        target = target.setdefault(part, {})
        if not isinstance(target, dict):
            raise ConfigError(f"trial.{'.'.join(outer[: i + 1])}", f"must be a mapping, got {target!r}")
    present = target.get(last)
    if key == "model.family" and value != target.get(last, "dense"):
        plain["model"] = {"family": value}
    elif isinstance(value, Mapping) and isinstance(present, Mapping) and not _replaces(key, present, value):
        for name, inner in value.items():
            _assign(plain, f"{key}.{name}", inner)
    else:
        target[last] = copy.deepcopy(value)


def _replaces(key: str, present: Mapping[str, Any], value: Mapping[str, Any]) -> bool:
    return key in _TABLES or (key == "model" and "family" in value and value["family"] != present.get("family", "dense"))


def _check_survives(chosen: Mapping[str, Any], plain: Mapping[str, Any], axes: Sequence[Axis]) -> None:
    """A later axis must not undo an earlier one: its values would silently count for nothing."""
    for axis in axes:
        if axis.name not in chosen:
            continue
        values = axis.values[axis.shown.index(chosen[axis.name])]
        for key, value in values.items():
            if not _contains(_get(plain, str(key)), value):
                later = [a.name for a in axes if a is not axis and a.covers(str(key)) and a.name in chosen]
                raise ConfigError(f"axes.{axis.name}", f"is undone by the axis {', '.join(later)}; put {axis.name} after it")


def _contains(found: Any, value: Any) -> bool:
    if isinstance(value, Mapping) and isinstance(found, Mapping):
        return all(_contains(found.get(k, _MISSING), v) for k, v in value.items())
    return found is not _MISSING and (found == value or (_is_nan(found) and _is_nan(value)))


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _overlap(a: str, b: str) -> bool:
    return a == b or a.startswith(f"{b}.") or b.startswith(f"{a}.")
