"""The pictures of a comparison."""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from lightning_modules.config import AdapterMoEConfig, DenseConfig
from pipelines.routes import RouteSummary, Snapshot, dynamics
from pipelines.transfer import Cell, Comparison, Estimate, Summary
from pipelines.wording import SIGNS, categories_of, is_bounded, name_of, number, ordered, unit_of

COLOURS = {"dense": "#0072B2", "task_moe": "#D55E00", "adapter_moe": "#009E73"}
"""Family -> colour (Okabe and Ito's palette, told apart by colour-blind readers)."""
MARKS = {"dense": "o", "task_moe": "s", "adapter_moe": "D"}
UNCLEAR = "#5f6368"
DPI = 144


def figures(comparison: Comparison) -> dict[str, tuple[str, Figure]]:
    """File name without suffix -> title and figure, for those the comparison has values for."""
    made: dict[str, tuple[str, Figure]] = {}
    if any(cell.gain.interval for cell in comparison.cells.values()):
        made["gains_by_task"] = ("Gain of every task in every configuration", _heat_map(comparison))
    if any(summary.mean_gain.interval for summary in comparison.summaries):
        made["mean_gain"] = ("Mean gain over all tasks", _mean_gain(comparison))
    if any(e.interval for s in comparison.summaries for e in s.categories.values()) and len(categories_of(comparison)) > 1:
        made["gains_by_category"] = ("Gain by category of task", _by_category(comparison))
    counts = {_experts(summary, comparison) for summary in comparison.summaries} - {1}
    if len(counts) > 1 and any(summary.mean_gain.interval for summary in comparison.summaries):
        made["gains_by_num_experts"] = ("Gain against the number of experts", _against_experts(comparison))
    return made


def _experts(summary: Summary, comparison: Comparison) -> int:
    """Number of experts (the mean where blocks have different numbers), or for a parameter-matched baseline the number whose
    parameters it has; 1 for dense."""
    model = summary.config.model
    if isinstance(model, DenseConfig):
        return model.ffn_multiple if summary.role == "parameter_matched" else 1
    own = round(float(np.mean(model.num_experts)))
    if summary.role != "parameter_matched":
        return own
    candidates = [s.config.model for s in comparison.summaries if s.role == "candidate"]
    width = model.bottleneck if isinstance(model, AdapterMoEConfig) else 0
    same = [m.num_experts for m in candidates if isinstance(m, AdapterMoEConfig) and m.num_experts * m.bottleneck == width]
    return same[0] if same else own


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
    return _literal(_wrap(name_of(summary), width))


def _heat_map(comparison: Comparison) -> Figure:
    summaries = ordered(comparison)
    categories = categories_of(comparison)
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
    sizes = [
        abs(cell.gain.interval.mean) * 100 for cell in comparison.cells.values() if cell.gain.interval and is_bounded(cell)
    ]
    return max(1.0, float(np.quantile(sizes, 0.95))) if sizes else 1.0


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
    factor = 100.0 if is_bounded(cell) else 1.0
    relative = cell.gain_rel.interval.mean * 100 if cell.gain_rel.interval else 0.0
    strength = cell.gain.interval.mean * 100 if is_bounded(cell) else relative
    colour = colours(0.5 + 0.5 * max(-1.0, min(1.0, strength / limit)))
    axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, **{**box, "facecolor": colour}))
    dark = _luminance(colour) < 0.179  # where white and black text have the same contrast (WCAG 2)
    verdict = cell.gain.verdict
    text = f"{number(cell.gain.interval.mean, factor)}{SIGNS[verdict]}"
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
        _point(axes, summary, estimate, factor, y, horizontal=True)
    axes.axvline(0, color="#444444", linewidth=0.9, zorder=1)
    axes.set_ylim(len(items) - 0.4, -0.6)
    axes.grid(axis="x", color="#e4e4e4", linewidth=0.7)
    _plain(axes)


def _point(axes: Axes, summary: Summary, estimate: Estimate, factor: float, at: float, *, horizontal: bool) -> None:
    """An estimate with its interval in the colour and mark of its configuration, hollow for a baseline."""
    interval = estimate.interval
    if interval is None:
        return
    colour, mark = _colour(summary), MARKS.get(summary.config.model.family, "o")
    hollow = summary.role != "candidate"
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
    factor, unit = unit_of(comparison)
    summaries = ordered(comparison)
    figure = Figure(figsize=(8.2, 0.46 * len(summaries) + 1.3), layout="constrained")
    axes = figure.add_subplot()
    _ranges(axes, [(summary, summary.mean_gain) for summary in summaries], factor)
    axes.set_yticks(range(len(summaries)), [_label(summary, 40) for summary in summaries])
    axes.set_xlabel(f"mean gain over one model per task ({unit}), 95 % interval over seeds", fontsize=9)
    return figure


def _by_category(comparison: Comparison) -> Figure:
    """One panel per category, configurations as rows."""
    factor, unit = unit_of(comparison)
    summaries, categories = ordered(comparison), categories_of(comparison)
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
    factor, unit = unit_of(comparison)
    panels = ["", *(categories_of(comparison) if len(categories_of(comparison)) > 1 else [])]
    columns = 2 if len(panels) == 4 else min(3, len(panels))
    figure = Figure(figsize=(3.3 * columns + 1.2, 2.6 * -(-len(panels) // columns) + 0.6), layout="constrained")
    grid = figure.subplots(-(-len(panels) // columns), columns, sharey=True, squeeze=False)
    counts = sorted({_experts(summary, comparison) for summary in comparison.summaries})
    names = list(dict.fromkeys(_series(summary, comparison) for summary in ordered(comparison)))
    for i, axes in enumerate(grid.flat):
        axes.set_visible(i < len(panels))
        if i >= len(panels):
            continue
        for rank, name in enumerate(names):
            _experts_series(
                axes, comparison, name, (rank - (len(names) - 1) / 2) * 0.14, panels[i] if i else None, counts, factor
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
            _point(axes, summary, estimate, factor, at, horizontal=False)
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


# -- routing -----------------------------------------------------------------------------------------------------------------

PARTS = {
    "i_task": ("decided by the task", "#0072B2"),
    "i_input": ("decided by the input", "#E69F00"),
    "h_residual": ("undecided", "#c9ccd1"),
}
"""Part of the entropy over experts -> what it says, and its colour."""


def route_figures(summaries: Sequence[RouteSummary], categories: Mapping[str, str]) -> dict[str, tuple[str, Figure]]:
    """File name without suffix -> title and figure: the routes and the similarity of routes of every configuration (its first
    seed), the entropy decomposition, and routing over time where it was measured more than once.

    Args:
        summaries: of a sweep's configurations.
        categories: task -> human category.
    """
    made: dict[str, tuple[str, Figure]] = {}
    for i, summary in enumerate(summaries, 1):
        first = summary.trials[0]
        title = f"{summary.configuration}: experts that each task uses, seed {first.seed}"
        made[f"routes_{i}"] = (title, route_map(first.last, categories))
        title = f"{summary.configuration}: similarity of routes, mean over {len(summary.trials)} seeds"
        made[f"route_similarity_{i}"] = (title, _similarity_map(summary, categories))
    if summaries:
        made["route_entropy"] = ("What decides the expert", _entropy_bars(summaries))
    if any(len(trial.steps) > 1 for summary in summaries for trial in summary.trials):
        made["route_dynamics"] = ("Routing over training", _route_dynamics(summaries))
    return made


def route_map(snapshot: Snapshot, categories: Mapping[str, str]) -> Figure:
    """Weight of every expert (rows, by block) for every task (columns, by category)."""
    order = _by_category_first(snapshot.tasks, categories)
    blocks = sorted(snapshot.tables)
    rows = sum(snapshot.tables[block].shape[1] for block in blocks)
    figure = Figure(figsize=(max(3.0, 0.34 * len(order)) + 2.4, 0.16 * rows + 0.06 * len(blocks) + 2.3), layout="constrained")
    axes = figure.add_subplot()
    weights = np.concatenate([snapshot.tables[block][order].T for block in blocks])
    image = axes.imshow(weights, cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="none")
    edges = np.cumsum([0, *(snapshot.tables[block].shape[1] for block in blocks)])
    for edge in edges[1:-1]:
        axes.axhline(edge - 0.5, color="#555555", linewidth=0.8)
    axes.set_yticks((edges[:-1] + edges[1:] - 1) / 2, [f"block {block}" for block in blocks], fontsize=8)
    _task_axis(axes, [snapshot.tasks[i] for i in order], categories)
    bar = figure.colorbar(image, ax=axes, pad=0.01, aspect=24)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    bar.set_label("weight of the expert", fontsize=8)
    return figure


def _similarity_map(summary: RouteSummary, categories: Mapping[str, str]) -> Figure:
    order = _by_category_first(summary.tasks, categories)
    side = max(2.6, 0.3 * len(order))
    figure = Figure(figsize=(side + 2.4, side + 1.6), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(summary.similarity[np.ix_(order, order)], cmap="viridis", vmin=0, vmax=1, interpolation="none")
    tasks = [summary.tasks[i] for i in order]
    _task_axis(axes, tasks, categories)
    axes.set_yticks(range(len(tasks)), [_literal(_wrap(name, 24)) for name in _short_names(tasks)], fontsize=7)
    bar = figure.colorbar(image, ax=axes, shrink=0.8, pad=0.02)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    bar.set_label("1: the same route, 0: no expert in common", fontsize=8)
    return figure


def _by_category_first(tasks: Sequence[str], categories: Mapping[str, str]) -> list[int]:
    """Places of the tasks, those of a category together, categories in the order of their first tasks."""
    names = list(dict.fromkeys(categories.get(task, "") for task in tasks))
    return sorted(range(len(tasks)), key=lambda i: names.index(categories.get(tasks[i], "")))


def _task_axis(axes: Axes, tasks: Sequence[str], categories: Mapping[str, str]) -> None:
    """Tasks as columns, under brackets that name their categories."""
    names = [_literal(_wrap(name, 24)) for name in _short_names(tasks)]
    axes.set_xticks(range(len(tasks)), names, rotation=40, ha="right", rotation_mode="anchor", fontsize=7)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if any(categories.get(task) for task in tasks):
        _category_brackets(axes, [categories.get(task, "") for task in tasks])


def _entropy_bars(summaries: Sequence[RouteSummary]) -> Figure:
    """One stacked bar per configuration: H(E) = I(T; E) + I(X; E | T) + H(E | X, T), means over blocks and seeds, nats."""
    figure = Figure(figsize=(8.2, 0.42 * len(summaries) + 1.5), layout="constrained")
    axes = figure.add_subplot()
    left = np.zeros(len(summaries))
    for part, (label, colour) in PARTS.items():
        # Up to rounding no part is negative.
        widths = np.array([max(0.0, summary.values[part]) for summary in summaries])
        axes.barh(range(len(summaries)), widths, left=left, color=colour, label=label, height=0.62)
        left += widths
    axes.set_yticks(range(len(summaries)), [_literal(_wrap(s.configuration, 40)) for s in summaries])
    axes.set_ylim(len(summaries) - 0.4, -0.6)
    axes.set_xlabel("entropy over experts (nats), mean over blocks and seeds", fontsize=9)
    axes.grid(axis="x", color="#e4e4e4", linewidth=0.7)
    _plain(axes)
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    return figure


def _route_dynamics(summaries: Sequence[RouteSummary]) -> Figure:
    """One row per configuration: NMI, entropy and effective experts at every evaluation, one line per seed."""
    shown = [summary for summary in summaries if any(len(trial.steps) > 1 for trial in summary.trials)]
    names = {"nmi": "task-expert NMI", "entropy": "entropy of a route", "effective_experts": "effective experts"}
    figure = Figure(figsize=(9.0, 1.55 * len(shown) + 0.9), layout="constrained")
    grid = figure.subplots(len(shown), len(names), sharex=True, squeeze=False)
    for axes, label in zip(grid[0], names.values(), strict=True):
        axes.set_title(label, fontsize=9)
    for row, summary in zip(grid, shown, strict=True):
        for axes, name in zip(row, names, strict=True):
            for trial in summary.trials:
                axes.plot(list(trial.steps), dynamics(trial)[name], color="#0072B2", linewidth=1.1, alpha=0.75)
            axes.set_ylim(0, None if name == "effective_experts" else 1.03)
            axes.grid(color="#e4e4e4", linewidth=0.7)
            _plain(axes)
        row[0].set_ylabel(_literal(_wrap(summary.configuration, 20)), fontsize=8)
    figure.supxlabel("step; one line per seed", fontsize=9)
    return figure
