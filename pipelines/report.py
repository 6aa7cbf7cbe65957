"""A comparison for people: sentences, a table for the terminal, plots, and one self-contained HTML page."""

import base64
import html
import io
import os
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_modules.config import AdapterMoEConfig, DenseConfig
from pipelines.stats import sd
from pipelines.store import sync_folder, write_atomic
from pipelines.transfer import LOWER_IS_BETTER, Cell, Comparison, Estimate, Summary, metric_range, write_csv

HELPED, HURT, UNCLEAR = "#1f5fa8", "#b5311c", "#5f6368"
COLOURS = {"dense": "#0072B2", "task_moe": "#D55E00", "adapter_moe": "#009E73"}
"""Family -> colour (Okabe and Ito's palette, told apart by colour-blind readers)."""
MARKS = {"dense": "o", "task_moe": "s", "adapter_moe": "D"}
DPI = 144
SIGNS = {"helped": "▲", "hurt": "▼", "unclear": "", "pending": ""}


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepFacts:
    """What the report says about the sweep besides its numbers."""

    name: str
    question: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Dotted key -> value that all trials share."""
    command: str = ""
    """How to run or continue the sweep."""


def write_report(folder: Path, comparison: Comparison, facts: SweepFacts) -> Path:
    """Write comparison.csv, report/*.png and report/index.html under the sweep's folder; returns the page's path."""
    write_csv(folder / "comparison.csv", comparison)
    images = {}
    for name, (title, figure) in figures(comparison).items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
        images[name] = (title, buffer.getvalue())
        _write_bytes(folder / "report" / f"{name}.png", buffer.getvalue())
    for stale in set((folder / "report").glob("*.png")) - {folder / "report" / f"{name}.png" for name in images}:
        stale.unlink()
    page = folder / "report" / "index.html"
    write_atomic(page, page_html(comparison, facts, images))
    return page


def _write_bytes(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_bytes(content)
    os.replace(temporary, path)
    sync_folder(path.parent)


# -- words ---------------------------------------------------------------------------------------------------------------------


def _unit(metrics: Iterable[str]) -> tuple[float, str]:
    """Factor and unit in which differences of these metrics are shown: points (hundredths) if all are bounded, else as is."""
    return (100.0, "points") if all(metric_range(metric) is not None for metric in metrics) else (1.0, "score units")


def _unit_of(comparison: Comparison) -> tuple[float, str]:
    return _unit(cell.metric for cell in comparison.cells.values())


def _number(value: float, factor: float) -> str:
    shown = value * factor
    text = f"{shown:+.1f}" if factor == 100.0 else f"{shown:+.3g}"
    return text.replace("-", "\N{MINUS SIGN}") if float(text) else text.lstrip("+-")


def show(estimate: Estimate, factor: float = 100.0) -> str:
    """``+1.2 [+0.3, +2.1]``, ``+1.2 (one seed)`` or ``pending``."""
    interval = estimate.interval
    if interval is None:
        return "pending"
    if interval.low is None or interval.high is None:
        return f"{_number(interval.mean, factor)} (one seed)"
    return f"{_number(interval.mean, factor)} [{_number(interval.low, factor)}, {_number(interval.high, factor)}]"


def summary_lines(comparison: Comparison) -> list[str]:
    """One sentence per configuration, candidates first."""
    return [f"{summary.configuration}: {_sentence(summary, comparison)}" for summary in _ordered(comparison)]


def _ordered(comparison: Comparison) -> list[Summary]:
    return sorted(comparison.summaries, key=lambda summary: summary.role != "candidate")


def _sentence(summary: Summary, comparison: Comparison) -> str:
    cells = _cells_of(comparison, summary)
    factor, unit = _unit_of(comparison)
    counts = f"{len(summary.helped)} of {len(cells)} tasks helped, {len(summary.hurt)} hurt"
    if summary.pending:
        counts += f", {len(summary.pending)} pending"
    if len(summary.pending) == len(cells):
        return f"all {len(cells)} tasks pending ({_brief(summary.mean_gain.reason)})"
    interval = summary.mean_gain.interval
    if interval is None:
        return f"{counts}; mean gain pending ({_brief(summary.mean_gain.reason)})"
    text = f"{counts}; mean gain {show(summary.mean_gain, factor)} {unit} over one model per task"
    if interval.n < len(summary.seeds):
        text += f", from {interval.n} of {len(summary.seeds)} seeds"
    if summary.worst:
        worst = next(cell for cell in cells if cell.task == summary.worst[0])
        text += f"; worst task {worst.task} ({_number(summary.worst[1], _unit([worst.metric])[0])})"
    return text


def _brief(reason: str, limit: int = 160) -> str:
    return textwrap.shorten(reason, limit, placeholder=" ...") or "no result yet"


def _name(summary: Summary) -> str:
    said = summary.role == "candidate" or summary.role in summary.configuration
    return summary.configuration + ("" if said else f" ({summary.role})")


def _cells_of(comparison: Comparison, summary: Summary) -> list[Cell]:
    keys = ((summary.configuration, task) for task in comparison.tasks)
    return [comparison.cells[key] for key in keys if key in comparison.cells]


def result_table(comparison: Comparison) -> Table:
    """The comparison as a table for the terminal: one line per configuration."""
    factor, unit = _unit_of(comparison)
    table = Table(
        title=f"Gain over one model per task, {comparison.split} scores, {unit} [95 % interval over seeds]",
        title_justify="left",
    )
    table.add_column("configuration", overflow="fold")
    for name in ("seeds", "mean gain", "relative", "helped", "hurt", "pending", "worst task"):
        table.add_column(name, justify="left" if name == "worst task" else "right")
    for summary in _ordered(comparison):
        worst = f"{summary.worst[0]} {_number(summary.worst[1], _worst_factor(comparison, summary))}" if summary.worst else ""
        relative = summary.delta_m.interval
        table.add_row(
            Text(_name(summary)),
            str(len(summary.seeds)),
            Text(show(summary.mean_gain, factor), style=_style(summary.mean_gain)),
            f"{_number(relative.mean, 100)} %" if relative else "pending",
            str(len(summary.helped)),
            str(len(summary.hurt)),
            str(len(summary.pending)),
            Text(worst),
        )
    return table


def print_comparison(console: Console, comparison: Comparison) -> None:
    """Print the table and one sentence per configuration."""
    console.print(result_table(comparison), soft_wrap=False)
    for line in summary_lines(comparison):
        console.print(line, markup=False, highlight=False)


def _worst_factor(comparison: Comparison, summary: Summary) -> float:
    assert summary.worst is not None
    return _unit([comparison.cells[summary.configuration, summary.worst[0]].metric])[0]


def _style(estimate: Estimate) -> str:
    return {"helped": "bold blue", "hurt": "bold red", "pending": "dim"}.get(estimate.verdict, "")


# -- plots ---------------------------------------------------------------------------------------------------------------------


def figures(comparison: Comparison) -> dict[str, tuple[str, Figure]]:
    """File name without suffix -> title and figure, for those the comparison has values for."""
    made: dict[str, tuple[str, Figure]] = {}
    if any(cell.gain.interval for cell in comparison.cells.values()):
        made["gains_by_task"] = ("Gain of every task in every configuration", _heat_map(comparison))
    if any(summary.mean_gain.interval for summary in comparison.summaries):
        made["mean_gain"] = ("Mean gain over all tasks", _mean_gain(comparison))
    if any(e.interval for s in comparison.summaries for e in s.categories.values()) and len(_categories(comparison)) > 1:
        made["gains_by_category"] = ("Gain by category of task", _by_category(comparison))
    counts = {_experts(summary, comparison) for summary in comparison.summaries} - {1}
    if len(counts) > 1 and any(summary.mean_gain.interval for summary in comparison.summaries):
        made["gains_by_num_experts"] = ("Gain against the number of experts", _against_experts(comparison))
    return made


def _categories(comparison: Comparison) -> list[str]:
    order = {task: i for i, task in enumerate(comparison.tasks)}
    first: dict[str, int] = {}
    for cell in comparison.cells.values():
        first[cell.category] = min(first.get(cell.category, len(order)), order[cell.task])
    return sorted(first, key=lambda name: first[name])


def _experts(summary: Summary, comparison: Comparison) -> int:
    """Number of experts, or for a parameter-matched baseline the number whose parameters it has; 1 for dense."""
    model = summary.config.model
    if summary.role != "parameter_matched":
        return 1 if isinstance(model, DenseConfig) else model.num_experts
    if isinstance(model, DenseConfig):
        return model.ffn_multiple
    candidates = [s.config.model for s in comparison.summaries if s.role == "candidate"]
    width = model.bottleneck if isinstance(model, AdapterMoEConfig) else 0
    same = [m.num_experts for m in candidates if isinstance(m, AdapterMoEConfig) and m.num_experts * m.bottleneck == width]
    return same[0] if same else model.num_experts


def _short_names(names: Sequence[str]) -> list[str]:
    """Without the folder that all of them share (``planted/``)."""
    folders = {name.rpartition("/")[0] for name in names}
    return [name.rpartition("/")[2] if len(folders) == 1 else name for name in names]


def _wrap(text: str, width: int) -> str:
    return "\n".join(line.replace("/ ", "/") for line in textwrap.wrap(text, width, max_lines=3, placeholder=" ...")) or text


def _literal(text: str) -> str:
    """Text that matplotlib must not read as mathematics."""
    return text.replace("$", r"\$")


def _label(summary: Summary, width: int = 34) -> str:
    return _literal(_wrap(_name(summary), width))


def _heat_map(comparison: Comparison) -> Figure:
    summaries = _ordered(comparison)
    categories = _categories(comparison)
    category = {cell.task: cell.category for cell in comparison.cells.values()}
    tasks = sorted(comparison.tasks, key=lambda task: categories.index(category[task]))
    limit = _colour_limit(comparison)
    figure = Figure(figsize=(max(3.2, 0.66 * len(tasks)) + 3.6, 0.5 * len(summaries) + 2.9), layout="constrained")
    axes = figure.add_subplot()
    colours = _diverging()
    for y, summary in enumerate(summaries):
        for x, task in enumerate(tasks):
            _heat_cell(axes, x, y, comparison.cells.get((summary.configuration, task)), limit, colours)
    axes.set_xlim(-0.5, len(tasks) - 0.5)
    axes.set_ylim(len(summaries) - 0.5, -0.5)
    axes.set_xticks(
        range(len(tasks)),
        [_literal(_wrap(n, 24)) for n in _short_names(tasks)],
        rotation=40,
        ha="right",
        rotation_mode="anchor",
        fontsize=9,
    )
    axes.set_yticks(range(len(summaries)), [_label(summary) for summary in summaries], fontsize=9)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    _category_brackets(axes, [category[task] for task in tasks])
    bar = figure.colorbar(
        ScalarMappable(Normalize(-limit, limit), colours), ax=axes, shrink=0.9, pad=0.01, aspect=18, extend="both"
    )
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    bar.set_label("hurt        gain in points        helped", fontsize=9)
    return figure


def _colour_limit(comparison: Comparison) -> float:
    sizes = [abs(cell.gain.interval.mean) * 100 for cell in comparison.cells.values() if cell.gain.interval and _bounded(cell)]
    return max(1.0, float(np.quantile(sizes, 0.95))) if sizes else 1.0


def _bounded(cell: Cell) -> bool:
    return metric_range(cell.metric) is not None


def _diverging() -> Any:
    return LinearSegmentedColormap.from_list("hurt_helped", ["#8c1d10", "#d9705a", "#f7f5f2", "#6a9fd0", "#123f7a"])


def _heat_cell(axes: Axes, x: int, y: int, cell: Cell | None, limit: float, colours: Callable[[float], Any]) -> None:
    if cell is None:
        return
    box: dict[str, Any] = {"facecolor": "#ececec", "edgecolor": "white", "linewidth": 2}
    if cell.gain.interval is None:
        axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, hatch="////", **{**box, "edgecolor": "#c4c4c4", "linewidth": 0}))
        axes.text(
            x,
            y,
            "pending",
            ha="center",
            va="center",
            fontsize=7,
            color="#333333",
            bbox={"fc": "#ececec", "ec": "none", "pad": 1},
        )
        return
    factor = 100.0 if _bounded(cell) else 1.0
    relative = cell.gain_rel.interval.mean * 100 if cell.gain_rel.interval else 0.0
    strength = cell.gain.interval.mean * 100 if _bounded(cell) else relative
    colour = colours(0.5 + 0.5 * max(-1.0, min(1.0, strength / limit)))
    axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, **{**box, "facecolor": colour}))
    dark = _luminance(colour) < 0.179  # where white and black text have the same contrast (WCAG 2)
    verdict = cell.gain.verdict
    text = f"{_number(cell.gain.interval.mean, factor)}{SIGNS[verdict]}"
    weight = "normal" if verdict == "unclear" else "bold"
    axes.text(x, y, text, ha="center", va="center", fontsize=8.5, color="white" if dark else "#1a1a1a", weight=weight)


def _luminance(colour: Sequence[float]) -> float:
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3])
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _category_brackets(axes: Axes, categories: Sequence[str]) -> None:
    """Name runs of equal categories above the columns, with a gap between them."""
    starts = [i for i, name in enumerate(categories) if i == 0 or categories[i - 1] != name]
    for start, stop in zip(starts, [*starts[1:], len(categories)], strict=True):
        if start:
            axes.axvline(start - 0.5, color="white", linewidth=6)
        top = axes.get_xaxis_transform()
        axes.plot([start - 0.42, stop - 0.58], [1.02, 1.02], transform=top, color="#555555", linewidth=1, clip_on=False)
        name = _literal(_wrap(categories[start].replace("/", "/ ") or "no category", 11 * (stop - start)))
        axes.text((start + stop - 1) / 2, 1.03, name, transform=top, ha="center", va="bottom", fontsize=7.5, color="#333333")


def _ranges(axes: Axes, items: Sequence[tuple[Summary, Estimate]], factor: float) -> None:
    """Points with their intervals, one row per configuration, best on top as given."""
    for y, (summary, estimate) in enumerate(items):
        if estimate.interval is None:
            axes.text(0, y, " pending", va="center", fontsize=8, color=UNCLEAR, style="italic")
            continue
        _point(
            axes,
            estimate,
            factor,
            y,
            _colour(summary),
            MARKS.get(summary.config.model.family, "o"),
            horizontal=True,
            hollow=summary.role != "candidate",
        )
    axes.axvline(0, color="#444444", linewidth=0.9, zorder=1)
    axes.set_ylim(len(items) - 0.4, -0.6)
    axes.grid(axis="x", color="#e4e4e4", linewidth=0.7)
    _plain(axes)


def _point(
    axes: Axes, estimate: Estimate, factor: float, at: float, colour: str, mark: str, *, horizontal: bool, hollow: bool = False
) -> None:
    interval = estimate.interval
    if interval is None:
        return
    ends = [[at, at], [(interval.low or 0) * factor, (interval.high or 0) * factor]]
    if interval.low is not None:
        axes.plot(*(ends[::-1] if horizontal else ends), color=colour, linewidth=1.8, zorder=2, solid_capstyle="butt")
    spot = (interval.mean * factor, at) if horizontal else (at, interval.mean * factor)
    axes.plot(*([v] for v in spot), mark, color=colour, markersize=6.5, markerfacecolor="white" if hollow else colour, zorder=3)


def _colour(summary: Summary) -> str:
    return COLOURS.get(summary.config.model.family, "#444444") if summary.role == "candidate" else "#6b6b6b"


def _plain(axes: Axes) -> None:
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(labelsize=9, length=0)


def _mean_gain(comparison: Comparison) -> Figure:
    factor, unit = _unit_of(comparison)
    summaries = _ordered(comparison)
    figure = Figure(figsize=(8.2, 0.46 * len(summaries) + 1.3), layout="constrained")
    axes = figure.add_subplot()
    _ranges(axes, [(summary, summary.mean_gain) for summary in summaries], factor)
    axes.set_yticks(range(len(summaries)), [_label(summary, 40) for summary in summaries])
    axes.set_xlabel(f"mean gain over one model per task ({unit}), 95 % interval over seeds", fontsize=9)
    return figure


def _by_category(comparison: Comparison) -> Figure:
    """One panel per category, configurations as rows."""
    factor, unit = _unit_of(comparison)
    summaries, categories = _ordered(comparison), _categories(comparison)
    columns = min(3, len(categories))
    lines = -(-len(categories) // columns)
    figure = Figure(figsize=(3.1 * columns + 2.6, lines * (0.3 * len(summaries) + 0.9) + 0.5), layout="constrained")
    grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for axes, name in zip(grid.flat, categories, strict=False):
        pending = Estimate(interval=None)
        _ranges(axes, [(summary, summary.categories.get(name, pending)) for summary in summaries], factor)
        axes.set_title(_literal(_wrap(name or "no category", 34)), fontsize=9.5, loc="left")
        axes.set_yticks(range(len(summaries)), [_label(summary, 30) for summary in summaries], fontsize=8)
    for axes in list(grid.flat)[len(categories) :]:
        axes.set_visible(False)
    figure.supxlabel(f"mean gain ({unit}), 95 % interval over seeds", fontsize=9)
    return figure


def _series(summary: Summary, comparison: Comparison) -> str:
    """What a configuration shares with those that differ from it in the number of experts only: its family and role."""
    return summary.config.model.family if summary.role == "candidate" else summary.role


def _against_experts(comparison: Comparison) -> Figure:
    """Mean gain against the number of experts, over all tasks and per category; configurations that differ in more than family
    and number of experts stand side by side."""
    factor, unit = _unit_of(comparison)
    panels = ["", *(_categories(comparison) if len(_categories(comparison)) > 1 else [])]
    columns = 2 if len(panels) == 4 else min(3, len(panels))
    figure = Figure(figsize=(3.3 * columns + 1.2, 2.6 * -(-len(panels) // columns) + 0.6), layout="constrained")
    grid = figure.subplots(-(-len(panels) // columns), columns, sharey=True, squeeze=False)
    counts = sorted({_experts(summary, comparison) for summary in comparison.summaries})
    names = list(dict.fromkeys(_series(summary, comparison) for summary in _ordered(comparison)))
    for i, axes in enumerate(grid.flat):
        axes.set_visible(i < len(panels))
        if i >= len(panels):
            continue
        for number, name in enumerate(names):
            _experts_series(
                axes, comparison, name, (number - (len(names) - 1) / 2) * 0.14, panels[i] if i else None, counts, factor
            )
        axes.axhline(0, color="#444444", linewidth=0.9, zorder=1)
        axes.set_title(
            _literal(_wrap(panels[i] or ("no category" if i else "all tasks"), 34)),
            fontsize=9.5,
            loc="left",
            weight="normal" if i else "bold",
        )
        axes.set_xticks(range(len(counts)), [str(count) for count in counts])
        axes.set_xlim(-0.5, len(counts) - 0.5)
        axes.grid(axis="y", color="#e4e4e4", linewidth=0.7)
        _plain(axes)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(5, len(labels)), frameon=False, fontsize=9)
    figure.supxlabel("number of experts (dense: 1; parameter-matched: the number that it matches)", fontsize=9)
    figure.supylabel(f"mean gain ({unit})", fontsize=9)
    return figure


def _experts_series(
    axes: Axes, comparison: Comparison, name: str, shift: float, category: str | None, counts: Sequence[int], factor: float
) -> None:
    members = [summary for summary in comparison.summaries if _series(summary, comparison) == name]
    nothing = Estimate(interval=None)
    for place in counts:
        same = [summary for summary in members if _experts(summary, comparison) == place]
        for i, summary in enumerate(same):
            estimate = summary.mean_gain if category is None else summary.categories.get(category, nothing)
            at = counts.index(place) + shift + 0.05 * (i - (len(same) - 1) / 2)
            _point(
                axes,
                estimate,
                factor,
                at,
                _colour(summary),
                MARKS.get(summary.config.model.family, "o"),
                horizontal=False,
                hollow=summary.role != "candidate",
            )
    if members:
        mark = MARKS.get(members[0].config.model.family, "o")
        hollow = members[0].role != "candidate"
        axes.plot(
            [],
            [],
            mark,
            color=_colour(members[0]),
            markerfacecolor="white" if hollow else _colour(members[0]),
            label=_literal(name),
        )


# -- page ----------------------------------------------------------------------------------------------------------------------

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


def page_html(comparison: Comparison, facts: SweepFacts, images: Mapping[str, tuple[str, bytes]]) -> str:
    """The whole report as one HTML page: pictures inside, no script, nothing fetched; every name is escaped."""
    sections = {
        "What came out": _verdicts_html(comparison) + "".join(_figure_html(title, png) for title, png in images.values()),
        "Configurations": _configurations_html(comparison),
        "Every task": _tasks_html(comparison),
        "Not finished or failed": _missing_html(comparison),
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
    items = (f"<li><strong>{_name_html(s)}</strong>: {_esc(_sentence(s, comparison))}.</li>" for s in _ordered(comparison))
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
    factor, unit = _unit_of(comparison)
    summaries = _ordered(comparison)
    kinds = list(dict.fromkeys(kind for summary in summaries for kind in summary.versus))
    head = ["configuration", "seeds", f"mean gain ({unit})", "mean relative gain", "helped", "hurt", "pending"]
    rows = []
    for s in summaries:
        gains = [_estimate_html(s.mean_gain, factor), _estimate_html(s.delta_m, 100, " %")]
        counts = [str(len(names)) for names in (s.helped, s.hurt, s.pending)]
        versus = [_estimate_html(s.versus[kind], factor) if kind in s.versus else "" for kind in kinds]
        rows.append(_row_html(_name_html(s), [str(len(s.seeds)), *gains, *counts, *versus]))
    return _table_html([*head, *(f"vs {_words(kind)}" for kind in kinds)], rows) + _categories_html(comparison)


def _categories_html(comparison: Comparison) -> str:
    factor, unit = _unit_of(comparison)
    categories = _categories(comparison)
    if len(categories) < 2:
        return ""
    rows = (
        _row_html(_name_html(s), [_estimate_html(s.categories[c], factor) if c in s.categories else "" for c in categories])
        for s in _ordered(comparison)
    )
    table = _table_html(["configuration", *(name or "no category" for name in categories)], rows)
    return f"<h3>Mean gain by category ({unit})</h3>{table}"


def _tasks_html(comparison: Comparison) -> str:
    head = ["task", "metric", "score, mean ± sd", "alone", "gain", "relative", "note"]
    parts = []
    for i, summary in enumerate(_ordered(comparison)):
        rows = (_row_html(_esc(cell.task), *_task_fields(cell)) for cell in _cells_of(comparison, summary))
        title = f"<summary>{_name_html(summary)}</summary>"
        parts.append(f"<details{' open' if i == 0 else ''}>{title}{_table_html(head, rows)}</details>")
    return "".join(parts)


def _task_fields(cell: Cell) -> tuple[list[str], list[str]]:
    factor = 100.0 if _bounded(cell) else 1.0
    digits = ".1f" if _bounded(cell) else ".3g"
    scores, alone = list(cell.scores.values()), list(cell.baseline.values())
    spread = sd(scores) if scores else None
    score = format(mean(scores) * factor, digits) if scores else ""
    score += f" ± {format(spread * factor, digits)}" if spread is not None else ""
    lower = " (negated)" if cell.metric.partition("(")[0] in LOWER_IS_BETTER else ""
    relative = cell.gain_rel.interval
    percent = f"{_number(relative.mean, 100)} %{' (floored)' if cell.floored else ''}" if relative else "pending"
    reference = format(mean(alone) * factor, digits) if alone else ""
    note = f'<span class="note">{_esc(_brief(cell.gain.reason))}</span>' if cell.gain.reason else ""
    return [_esc(cell.metric + lower), score, reference, _estimate_html(cell.gain, factor), percent], [note]


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
    if _unit_of(comparison)[0] == 1.0:
        notes.append("Some metric has no bound and is negated (lower is better): means mix units, so prefer relative gains.")
    return "<ul>" + "".join(f"<li>{note}</li>" for note in notes) + "</ul>"


def _settings_html(facts: SweepFacts) -> str:
    rows = (_row_html(f"<code>{_esc(key)}</code>", [], [_esc(value)]) for key, value in facts.settings.items())
    command = f"<p>Run again or go on: <code>{_esc(facts.command)}</code></p>" if facts.command else ""
    return f"{command}<details><summary>What all trials share</summary>{_table_html(['key', 'value'], rows)}</details>"
