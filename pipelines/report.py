"""A comparison for people: comparison.csv, pictures, and one self-contained HTML page."""

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.figure import Figure

from lightning_modules.files import atomic_file
from pipelines.plots import DPI, figures, route_figures
from pipelines.routes import RoutedTrial, RouteSummary, first_dead, summarise
from pipelines.stats import sd, t_interval
from pipelines.store import write_text
from pipelines.transfer import LOWER_IS_BETTER, Cell, Comparison, Estimate, Summary, write_csv
from pipelines.wording import (
    FLOOR_NOTE,
    SIGNS,
    brief,
    categories_of,
    cells_of,
    floor_mark,
    is_bounded,
    number,
    ordered,
    sentence,
    show,
    unit_of,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepFacts:
    """What the report says about the sweep besides its numbers."""

    name: str
    question: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Dotted key -> value that all trials share."""
    command: str = ""
    """How to run or continue the sweep."""
    notes: tuple[str, ...] = ()
    """What is doubtful about the data: duplicates, what was cut and the like."""
    routes: tuple[RoutedTrial, ...] = ()
    """The finished trials that route tasks to experts (``pipelines.routes.collect``)."""


def write_report(folder: Path, comparison: Comparison, facts: SweepFacts) -> Path:
    """Write comparison.csv, report/*.png and report/index.html under the sweep's folder; returns the page's path."""
    write_csv(folder / "comparison.csv", comparison)
    categories = {cell.task: cell.category for cell in comparison.cells.values()}
    routed = summarise(facts.routes, categories)
    images = {}
    for name, (title, figure) in (figures(comparison) | route_figures(routed, categories)).items():
        images[name] = (title, png_of(figure))
        with atomic_file(folder / "report" / f"{name}.png", "wb") as file:
            file.write(images[name][1])
    for stale in set((folder / "report").glob("*.png")) - {folder / "report" / f"{name}.png" for name in images}:
        stale.unlink()
    page = folder / "report" / "index.html"
    write_text(page, page_html(comparison, facts, images, routed))
    return page


def png_of(figure: Figure) -> bytes:
    """The figure as a PNG; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


STYLE = """
:root { --ink: #1c1e21; --soft: #5f6368; --line: #dfe1e5; --helped: #1f5fa8; --hurt: #b5311c }
body { font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; color: var(--ink); background: #fff;
  margin: 0 auto; max-width: 78rem; padding: 2rem 1.25rem 4rem }
h1 { font-size: 1.9rem; line-height: 1.2; margin: .2rem 0; overflow-wrap: anywhere }
h2 { font-size: 1.25rem; margin: 2.4rem 0 .6rem; border-bottom: 1px solid var(--line); padding-bottom: .3rem }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem }
.kicker, .note, figcaption { color: var(--soft); font-size: .9rem }
.kicker { margin: 0 }
.question { font-size: 1.15rem; max-width: 50rem; white-space: pre-line }
.verdicts li { margin: .45rem 0; overflow-wrap: anywhere }
figure { margin: 1.4rem 0; overflow-x: auto }
figure img { display: block; height: auto }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { padding: .35rem .7rem; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top }
thead th { font-weight: 600; white-space: nowrap }
tbody th { font-weight: 500; overflow-wrap: break-word; min-width: 13rem; max-width: 22rem }
td.n { white-space: nowrap }
.helped { color: var(--helped); font-weight: 600 }
.hurt { color: var(--hurt); font-weight: 600 }
.pending { color: var(--soft); font-style: italic }
code { background: #f3f4f5; padding: .1em .3em; border-radius: 3px; overflow-wrap: anywhere }
details { margin: .8rem 0 }
summary { cursor: pointer }
"""


def page_html(
    comparison: Comparison,
    facts: SweepFacts,
    images: Mapping[str, tuple[str, bytes]],
    routed: Sequence[RouteSummary] = (),
) -> str:
    """The whole report as one HTML page: pictures inside, no script, nothing fetched; every name is escaped."""
    main = [image for name, image in images.items() if not name.startswith("route")]
    sections = {
        "What came out": _verdicts_html(comparison) + "".join(_figure_html(title, png) for title, png in main),
        "Configurations": _configurations_html(comparison),
        **({"Routing": _routing_html(routed, images)} if routed else {}),
        "Every task": _tasks_html(comparison),
        "Not finished or failed": _missing_html(comparison),
        **({"The data": f"<ul>{''.join(f'<li>{_esc(note)}</li>' for note in facts.notes)}</ul>"} if facts.notes else {}),
        "How to read this": _reading_html(comparison),
        "Settings": _settings_html(facts),
    }
    kicker = '<p class="kicker">Crosstalk: transfer and interference between tasks</p>'
    question = f'<p class="question">{_esc(facts.question)}</p>' if facts.question else ""
    body = f"{kicker}<h1>{_esc(facts.name)}</h1>{question}" + "".join(f"\n<h2>{k}</h2>\n{v}" for k, v in sections.items())
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{_esc(facts.name)} - Crosstalk</title><style>{STYLE}</style>"
    )
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n'


def _esc(text: object) -> str:
    return html.escape(str(text), quote=True)


def _figure_html(title: str, png: bytes) -> str:
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    width = int.from_bytes(png[16:20], "big") * 96 // DPI  # from the PNG's header: shown at the size it was drawn for
    image = f'<img width="{width}" alt="{_esc(title)}; the numbers are in the tables below" src="{source}">'
    return f"<figure><figcaption>{_esc(title)}</figcaption>{image}</figure>"


def _verdicts_html(comparison: Comparison) -> str:
    if not comparison.summaries:
        return '<p class="note">No trial with several tasks is planned, so there is nothing to compare.</p>'
    items = (f"<li><strong>{_name_html(s)}</strong>: {_esc(sentence(s, comparison))}.</li>" for s in ordered(comparison))
    return f'<ul class="verdicts">{"".join(items)}</ul>'


def _name_html(summary: Summary) -> str:
    kind = f' <span class="note">(baseline: {_esc(_words(summary.role))})</span>' if summary.role != "candidate" else ""
    return _esc(summary.configuration) + kind


def _words(identifier: str) -> str:
    return identifier.replace("_", " ")


def _estimate_html(estimate: Estimate, factor: float, unit: str = "") -> str:
    title = f' title="{_esc(estimate.reason)}"' if estimate.reason else ""
    sign = (
        f' <span role="img" aria-label="{estimate.verdict}">{SIGNS[estimate.verdict]}</span>' if SIGNS[estimate.verdict] else ""
    )
    text = show(estimate, factor) + (unit if estimate.interval else "")
    return f'<span class="{estimate.verdict}"{title}>{_esc(text)}{sign}</span>'


def _table_html(head: Sequence[str], rows: Iterable[str]) -> str:
    names = "".join(f"<th>{_esc(name)}</th>" for name in head)
    return f'<div class="scroll"><table><thead><tr>{names}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _row_html(first: str, cells: Sequence[str], wide: Sequence[str] = ()) -> str:
    """A table row from HTML; ``wide`` cells come last and may break lines."""
    narrow = "".join(f'<td class="n">{cell}</td>' for cell in cells)
    return f'<tr><th scope="row">{first}</th>{narrow}{"".join(f"<td>{cell}</td>" for cell in wide)}</tr>'


def _configurations_html(comparison: Comparison) -> str:
    factor, unit = unit_of(comparison)
    summaries = ordered(comparison)
    kinds = list(dict.fromkeys(kind for summary in summaries for kind in summary.versus))
    head = ["configuration", "seeds", f"mean gain ({unit})", "mean relative gain", "helped", "hurt", "pending"]
    rows = []
    for s in summaries:
        gains = [_estimate_html(s.mean_gain, factor), _estimate_html(s.delta_m, 100, f" %{floor_mark(s, comparison)}")]
        counts = [str(len(names)) for names in (s.helped, s.hurt, s.pending)]
        versus = [_estimate_html(s.versus[kind], factor) if kind in s.versus else "" for kind in kinds]
        rows.append(_row_html(_name_html(s), [str(len(s.seeds)), *gains, *counts, *versus]))
    return _table_html([*head, *(f"vs {_words(kind)}" for kind in kinds)], rows) + _categories_html(comparison)


def _categories_html(comparison: Comparison) -> str:
    factor, unit = unit_of(comparison)
    categories = categories_of(comparison)
    if len(categories) < 2:
        return ""
    rows = (
        _row_html(_name_html(s), [_estimate_html(s.categories[c], factor) if c in s.categories else "" for c in categories])
        for s in ordered(comparison)
    )
    table = _table_html(["configuration", *(name or "no category" for name in categories)], rows)
    return f"<h3>Mean gain by category ({unit})</h3>{table}"


def _tasks_html(comparison: Comparison) -> str:
    head = ["task", "metric", "score, mean ± sd", "alone", "floor", "gain", "relative", "note"]
    parts = []
    for i, summary in enumerate(ordered(comparison)):
        rows = (_row_html(_esc(cell.task), *_task_fields(cell)) for cell in cells_of(comparison, summary))
        title = f"<summary>{_name_html(summary)}</summary>"
        parts.append(f"<details{' open' if i == 0 else ''}>{title}{_table_html(head, rows)}</details>")
    return "".join(parts)


def _task_fields(cell: Cell) -> tuple[list[str], list[str]]:
    factor = 100.0 if is_bounded(cell) else 1.0
    digits = ".1f" if is_bounded(cell) else ".3g"
    scores, alone = list(cell.scores.values()), list(cell.baseline.values())
    spread = sd(scores) if scores else None
    score = format(mean(scores) * factor, digits) if scores else ""
    score += f" ± {format(spread * factor, digits)}" if spread is not None else ""
    lower = " (negated)" if cell.metric.partition("(")[0] in LOWER_IS_BETTER else ""
    relative = cell.gain_rel.interval
    percent = f"{number(relative.mean, 100)} %{' (floored)' if cell.floored else ''}" if relative else "pending"
    reference = format(mean(alone) * factor, digits) if alone else ""
    trivial = format(cell.floor * factor, digits) if cell.floor is not None else ""
    note = f'<span class="note">{_esc(brief(cell.gain.reason))}</span>' if cell.gain.reason else ""
    return [_esc(cell.metric + lower), score, reference, trivial, _estimate_html(cell.gain, factor), percent], [note]


def _routing_html(routed: Sequence[RouteSummary], images: Mapping[str, tuple[str, bytes]]) -> str:
    """What the routers of the sweep have learned, over all tasks of a trial."""
    head = ["configuration", "seeds", "task-expert NMI", "agreement with categories (ARI)", "Mantel p", "effective experts",
            "dead experts", "seed stability"]  # fmt: skip
    rows = []
    for summary in routed:
        values = summary.values
        cells = [
            str(len(summary.trials)),
            f"{values['nmi']:.2f}",
            _ari_text(summary.ari),
            "" if summary.mantel_p is None else f"{summary.mantel_p:.2g}",
            f"{values['effective_experts']:.1f}",
            _dead_text(summary),
            "" if summary.stability is None else f"{summary.stability:.2f}",
        ]
        rows.append(_row_html(_esc(summary.configuration), [_esc(cell) for cell in cells]))
    notes = "".join(f"<li>{note}</li>" for note in ROUTING_NOTES)
    shared = [images[name] for name in ("route_entropy", "route_dynamics") if name in images]
    maps = [images[name] for name in images if name.startswith(("routes_", "route_similarity_"))]
    return (
        _table_html(head, rows)
        + f"<ul>{notes}</ul>"
        + "".join(_figure_html(*image) for image in shared)
        + f"<details><summary>Who uses which expert</summary>{''.join(_figure_html(*image) for image in maps)}</details>"
    )


ROUTING_NOTES = (
    "<b>Task-expert NMI</b>: how much the task says about the expert, 0 nothing, 1 all (so it is when every task has one fixed "
    "expert, learned or random); mean over blocks and seeds. It is not use: whether a route matters is for "
    "<code>pipelines/analyze.py knockout</code> to say.",
    "<b>Agreement with categories</b>: adjusted Rand index of the clusters of similar routes with the human categories (1 the "
    "same groups, 0 chance), mean [95 % interval] over seeds; <b>Mantel p</b>: how often categories dealt to the tasks at "
    "random agree as well with the similarity of the routes.",
    "<b>Effective experts</b>: exp of the entropy of their use, mean over blocks. <b>Dead</b>: experts of all blocks with less "
    "than a hundredth of an equal share, mean over seeds; (since step): the first of three evaluations in a row without use.",
    "<b>Seed stability</b>: correlation between seeds of which tasks share routes: near 0, the groups are accidents of a seed.",
)


def _ari_text(values: Sequence[float]) -> str:
    if not values:
        return ""
    interval = t_interval(values)
    bounds = "" if interval.low is None or interval.high is None else f" [{interval.low:.2f}, {interval.high:.2f}]"
    return f"{interval.mean:.2f}{bounds}"


def _dead_text(summary: RouteSummary) -> str:
    since = [
        step
        for trial in summary.trials
        for step in first_dead({step: snapshot.tables for step, snapshot in trial.steps.items()}).values()
    ]
    return f"{summary.values['dead_experts']:.1f}" + (f" (since step {min(since)})" if since else "")


def _missing_html(comparison: Comparison) -> str:
    if not comparison.missing:
        return "<p>Every trial of the plan has finished.</p>"
    rows = (
        _row_html(_esc(m.trial_id), [_esc(_words(m.role)), str(m.seed)], [_esc(m.task or m.configuration), _esc(m.reason)])
        for m in comparison.missing
    )
    return _table_html(["trial", "role", "seed", "task or configuration", "why"], rows)


def _reading_html(comparison: Comparison) -> str:
    intervals = [cell.gain.interval for cell in comparison.cells.values() if cell.gain.interval]
    decided = sum(interval.low is not None for interval in intervals)
    seeds = max((len(summary.seeds) for summary in comparison.summaries), default=0)
    notes = [
        f"<b>Gain</b>: the task's {_esc(comparison.split)} score in the shared model minus the score of a model that learns "
        "this task alone, with as many updates on the task and from the same seed. Above zero the other tasks help (transfer), "
        "below zero they hurt (interference). One point is 0.01 of the score.",
        "<b>Floor</b>: what the task scores without looking at the input: the most frequent class, tag or answer of the "
        "training data, the mean, the most frequent distance to the head, right-branching trees, no spans.",
        "<b>Interval</b>: 95 % Student interval of the paired differences over seeds. <b>Helped</b> ▲ and <b>hurt</b> ▼ mean "
        "that it lies on one side of zero; without a mark it does not, or there is one seed only.",
        f"{decided} task gains have an interval here. Were there no effect at all, about {decided / 20:.1f} of them would be "
        "marked by chance.",
        "<b>Relative gain</b>: the gain over the absolute value of the score alone, or over 1 % of the metric's range where "
        "that is larger (floored).",
        "<b>Pending</b>: a trial that the number needs has not finished, has failed, or has an undefined score. A mean that "
        "needs it is pending too: no task is left out of a mean.",
        "Hollow grey marks are baselines that train several tasks themselves.",
    ]
    if 1 < seeds < 6:
        notes.append(f"{seeds} seeds screen, they do not conclude: with fewer than six no exact test reaches p &lt; 0.05.")
    if unit_of(comparison)[0] == 1.0:
        notes.append("Some metric has no bound and is negated (lower is better): means mix units, so prefer relative gains.")
    if any(floor_mark(summary, comparison) for summary in comparison.summaries):
        notes.append(f"{_esc(FLOOR_NOTE)}.")
    return "<ul>" + "".join(f"<li>{note}</li>" for note in notes) + "</ul>"


def _settings_html(facts: SweepFacts) -> str:
    rows = (_row_html(f"<code>{_esc(key)}</code>", [], [_esc(value)]) for key, value in facts.settings.items())
    command = f"<p>Run again or go on: <code>{_esc(facts.command)}</code></p>" if facts.command else ""
    return f"{command}<details><summary>What all trials share</summary>{_table_html(['key', 'value'], rows)}</details>"
