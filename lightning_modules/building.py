"""Plain data (YAML) as checked dataclasses, and the error that says what is wrong with it. No torch here."""

import dataclasses
import difflib
import math
import types
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


class ConfigError(ValueError):
    """A setting breaks a law. ``key`` is the dotted path of the culprit, ``law`` says what must hold and what was given."""

    def __init__(self, key: str, law: str) -> None:
        super().__init__(f"{key}: {law}" if key else law)
        self.key = key
        self.law = law

    def __reduce__(self) -> Any:
        return type(self), (self.key, self.law)  # exceptions are rebuilt from `args`, which holds the one text

    def under(self, prefix: str) -> "ConfigError":
        """The same error, its key path seen from one level further out."""
        return ConfigError(f"{prefix}.{self.key}" if self.key else prefix, self.law)


def require(condition: bool, key: str, law: str) -> None:
    """Raise :class:`ConfigError` with ``key`` and ``law`` unless ``condition`` holds."""
    if not condition:
        raise ConfigError(key, law)


def build(cls: Any, value: Any, key: str = "") -> Any:
    """``value`` (plain YAML data) as an instance of ``cls``, checked.

    ``cls`` is one of this file's dataclasses or any annotation they use (``int``, ``float | None``, ``Literal[...]``,
    ``tuple[str, ...]``, ``Mapping[str, int]``). A union of dataclasses is chosen by the value's ``family``.

    Raises:
        ConfigError: unknown key (with the nearest names), wrong type, or a law of the class broken; its ``key`` starts with
            ``key``.
    """
    if dataclasses.is_dataclass(cls):
        return _build_dataclass(cls, value, key)
    origin, args = get_origin(cls), get_args(cls)
    if origin in (Union, types.UnionType):
        return _build_union(args, value, key)
    if origin is Literal:
        require(value in args, key, f"must be one of {', '.join(map(str, args))}, got {value!r}")
        return value
    if origin is tuple:
        require(isinstance(value, (list, tuple)), key, f"must be a list, got {value!r}")
        return tuple(build(args[0], v, f"{key}[{i}]") for i, v in enumerate(value))
    if origin is Mapping:
        require(isinstance(value, Mapping), key, f"must be a mapping, got {value!r}")
        return {build(args[0], k, key): build(args[1], v, f"{key}.{k}") for k, v in value.items()}
    if cls is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if cls is Any:
        return value
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", types.NoneType: "null"}
    require(type(value) is cls, key, f"must be {names[cls]}, got {value!r}")
    require(cls is not float or math.isfinite(value), key, f"must be finite, got {value!r}")
    return value


def _build_union(options: tuple[Any, ...], value: Any, key: str) -> Any:
    if value is None and types.NoneType in options:
        return None
    options = tuple(o for o in options if o is not types.NoneType)
    if all(dataclasses.is_dataclass(o) for o in options):
        if any(isinstance(value, o) for o in options):
            return value
        if not isinstance(value, Mapping):
            raise ConfigError(key, f"must be a mapping, got {value!r}")
        families = {get_args(get_type_hints(o)["family"])[0]: o for o in options}
        family = value.get("family", next(iter(families)))
        path = f"{key}.family" if key else "family"
        require(isinstance(family, str) and family in families, path, f"must be one of {', '.join(families)}, got {family!r}")
        return _build_dataclass(families[family], value, key)
    errors = []
    for option in options:
        try:
            return build(option, value, key)
        except ConfigError as error:
            errors.append(error.law)
    raise ConfigError(key, " or ".join(errors))


def _build_dataclass(cls: Any, value: Any, key: str) -> Any:
    if isinstance(value, cls):
        return value
    require(isinstance(value, Mapping), key, f"must be a mapping, got {value!r}")
    hints = get_type_hints(cls)
    names = [f.name for f in fields(cls)]
    prefix = f"{key}." if key else ""
    for name in value:
        if name not in names:
            near = difflib.get_close_matches(str(name), names, 3, 0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"keys here: {', '.join(names)}"
            raise ConfigError(f"{prefix}{name}", f"unknown key; {hint}")
    defaults = {f.name: f.default_factory() for f in fields(cls) if f.default_factory is not dataclasses.MISSING}
    arguments = {}
    for name, given in value.items():
        default = defaults.get(name)
        if dataclasses.is_dataclass(hints[name]) and dataclasses.is_dataclass(default) and isinstance(given, Mapping):
            given = {**{f.name: getattr(default, f.name) for f in fields(default)}, **given}
        arguments[name] = build(hints[name], given, f"{prefix}{name}")
    try:
        return cls(**arguments)
    except ConfigError as error:
        raise (error.under(key) if key else error) from None
    except TypeError as error:
        raise ConfigError(key, str(error)) from None
