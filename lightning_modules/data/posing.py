"""Classification, regression and choice tasks as text to text: the prompt is the input, the answer's text the target.

The forms follow T5 (Raffel et al. 2020) and the CrossFit gym (Ye et al. 2021): the task's name and its fields by name, a
class by its name, a number with fixed decimals, an option by its text with all options in the input. No torch here.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lightning_modules.building import ConfigError
from lightning_modules.data.sources import fill, placeholders, shorten

if TYPE_CHECKING:
    from lightning_modules.data.tasks import TaskSpec

PROMPTS: dict[str, str] = {
    "classification": "{name}: text: {text}",
    "regression": "{name}: text: {text}",
    "choice": "{name}: text: {text} options: {options}",
}
"""kind -> its default prompt; an example with a second text adds :data:`PAIR` to it."""
PAIR = " text_pair: {text_pair}"

PLACEHOLDERS: dict[str, tuple[str, ...]] = {
    "classification": ("name", "text", "text_pair"),
    "regression": ("name", "text", "text_pair"),
    "choice": ("name", "text", "options"),
}
"""kind -> what a prompt may name; ``{options}`` is ``(A) first (B) second ...``."""

DECIMALS = 1


def check_prompt(kind: str, prompt: str) -> None:
    """Raise ValueError unless ``prompt`` can pose a task of ``kind``."""
    known = PLACEHOLDERS.get(kind)
    if known is None:
        raise ValueError(f"prompt applies to {', '.join(PLACEHOLDERS)}, got kind {kind}")
    names = placeholders(prompt)
    unknown = [name for name in names if name not in known]
    if unknown or not set(names) - {"name"}:
        given = f"{{{unknown[0]}}}" if unknown else repr(prompt)
        raise ValueError(f"prompt must name the example by {', '.join(f'{{{name}}}' for name in known)}, got {given}")


def check_answers(kind: str, answers: Mapping[str, Any]) -> None:
    """Raise ValueError unless ``answers`` can stand in an entry of ``kind``: label -> text (classification) or ``decimals``
    (regression)."""
    if kind == "regression":
        right = set(answers) <= {"decimals"} and all(type(n) is int and 0 <= n <= 6 for n in answers.values())
        law = "answers must be {decimals: 0 to 6} for regression"
    else:
        right = kind == "classification" and all(isinstance(text, str) and text.strip() for text in answers.values())
        law = "answers must be texts by label, for classification"
    if not right:
        raise ValueError(f"{law}, got {dict(answers)!r} for kind {kind}")


def formed(spec: "TaskSpec", form: str) -> "TaskSpec":
    """The task in the form in which it is trained: ``native``, with all its labels, or posed (``text2text``).

    Raises:
        ConfigError: it is to be posed and its kind cannot be.
    """
    return pose(spec) if form == "text2text" else spec.complete()


def pose(spec: "TaskSpec") -> "TaskSpec":
    """The text2text form of a task; one of kind text2text is its own.

    Its ``labels`` are the answers to a classification task, and () for other kinds; its metric keeps its name. A number's first
    reference is the exact one, so that correlations are those of the native form; the target is the rounded one.

    Raises:
        ConfigError: the kind, or its metric, has no text2text form, or ``answers`` does not fit the labels.
    """
    if spec.kind == "text2text":
        return spec
    key = f"{spec.catalogue}: task {spec.name}"
    if spec.kind not in PROMPTS:
        raise ConfigError(key, f"form text2text applies to {', '.join(PROMPTS)} and text2text, got kind {spec.kind}")
    if spec.kind == "choice" and spec.metric not in ("accuracy", "micro_f1"):
        raise ConfigError(key, f"metric must be accuracy or micro_f1 to pose a choice task as text2text, got {spec.metric!r}")
    spec = spec.complete()
    unknown = [label for label in spec.answers if spec.kind == "classification" and label not in spec.labels]
    if unknown:
        raise ConfigError(key, f"answers must be of the labels {', '.join(spec.labels[:12])}, got {unknown[0]!r}")
    labels = tuple(_answer(spec, label) for label in spec.labels)
    if len({label.strip().lower() for label in labels}) < len(labels):
        raise ConfigError(key, f"answers must differ, beyond case, for every label, got {', '.join(labels)}")
    return replace(spec, kind="text2text", metric=_metric(spec), labels=labels, native=spec)


def _answer(spec: "TaskSpec", label: str) -> str:
    return str(spec.answers.get(label, label))


def _metric(spec: "TaskSpec") -> str:
    """The metric, with the answer for the label that it names."""
    name, _, argument = spec.metric.removesuffix(")").partition("(")
    without = "without " if argument.startswith("without ") else ""
    return f"{name}({without}{_answer(spec, argument.removeprefix(without))})" if argument else name


def render(spec: "TaskSpec", row: Mapping[str, Any]) -> dict[str, Any]:
    """An example of the native task ``spec`` as ``{text, target, targets}``.

    Raises:
        ConfigError: the prompt names a second text and the example has none.
    """
    values = {"name": spec.name} | {name: row[name] for name in ("text", "text_pair") if name in row}
    if spec.kind == "choice":
        values["options"] = " ".join(f"({_letter(i)}) {option}" for i, option in enumerate(row["options"]))
    prompt = spec.prompt or PROMPTS[spec.kind] + (PAIR if "text_pair" in row else "")
    try:
        text = fill(prompt, values)
    except KeyError as error:
        law = f"prompt names {{{error.args[0]}}}, which an example lacks: {shorten(row)}"
        raise ConfigError(f"{spec.catalogue}: task {spec.name}", law) from None
    targets = _targets(spec, row)
    return {"text": text, "target": targets[-1], "targets": targets}


def _letter(i: int) -> str:
    return chr(ord("A") + i) if i < 26 else str(i + 1)


def _targets(spec: "TaskSpec", row: Mapping[str, Any]) -> list[str]:
    if spec.kind == "choice":
        return [row["options"][row["label"]]]
    if spec.kind == "classification":
        return [_answer(spec, row["label"])]
    rounded = f"{row['label']:.{spec.answers.get('decimals', DECIMALS)}f}"
    if float(rounded) == 0:
        rounded = rounded.removeprefix("-")
    return list(dict.fromkeys([repr(float(row["label"])), rounded]))
