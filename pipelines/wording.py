"""A comparison in words and numbers: sentences, estimates, and a table for the terminal."""

import textwrap
from collections.abc import Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipelines.transfer import Cell, Comparison, Estimate, Summary, metric_range

SIGNS = {"helped": "▲", "hurt": "▼", "unclear": "", "pending": ""}


def unit_for(metrics: Iterable[str]) -> tuple[float, str]:
    """Factor and unit in which differences of these metrics are shown: points (hundredths) if all are bounded, else as is."""
    return (100.0, "points") if all(metric_range(metric) is not None for metric in metrics) else (1.0, "score units")


def unit_of(comparison: Comparison) -> tuple[float, str]:
    """Factor and unit in which the comparison's differences are shown."""
    return unit_for(cell.metric for cell in comparison.cells.values())


def number(value: float, factor: float) -> str:
    """A difference with its sign, in points or units of the score."""
    shown = value * factor
    text = f"{shown:+.1f}" if factor == 100.0 else f"{shown:+.3g}"
    return text.replace("-", "\N{MINUS SIGN}") if float(text) else text.lstrip("+-")


def show(estimate: Estimate, factor: float = 100.0) -> str:
    """``+1.2 [+0.3, +2.1]``, ``+1.2 (one seed)`` or ``pending``."""
    interval = estimate.interval
    if interval is None:
        return "pending"
    if interval.low is None or interval.high is None:
        return f"{number(interval.mean, factor)} (one seed)"
    return f"{number(interval.mean, factor)} [{number(interval.low, factor)}, {number(interval.high, factor)}]"


def summary_lines(comparison: Comparison) -> list[str]:
    """One sentence per configuration, candidates first."""
    return [f"{summary.configuration}: {sentence(summary, comparison)}" for summary in ordered(comparison)]


def ordered(comparison: Comparison) -> list[Summary]:
    """The configurations, candidates first."""
    return sorted(comparison.summaries, key=lambda summary: summary.role != "candidate")


def sentence(summary: Summary, comparison: Comparison) -> str:
    """What came out for one configuration, in words."""
    cells = cells_of(comparison, summary)
    factor, unit = unit_of(comparison)
    out = (*summary.config.mixture.held_out, *summary.config.mixture.unrelated)
    counted = [cell for cell in cells if cell.task not in out]
    counts = f"{len(summary.helped)} of {len(counted)} tasks helped, {len(summary.hurt)} hurt"
    if summary.pending:
        counts += f", {len(summary.pending)} pending"
    if len(summary.pending) == len(counted):
        return f"all {len(counted)} tasks pending ({brief(summary.mean_gain.reason)})"
    interval = summary.mean_gain.interval
    if interval is None:
        return f"{counts}; mean gain pending ({brief(summary.mean_gain.reason)})"
    text = f"{counts}; mean gain {show(summary.mean_gain, factor)} {unit} over one model per task"
    if interval.n < len(summary.seeds):
        text += f", from {interval.n} of {len(summary.seeds)} seeds"
    if summary.worst:
        worst = next(cell for cell in cells if cell.task == summary.worst[0])
        text += f"; worst task {worst.task} ({number(summary.worst[1], unit_for([worst.metric])[0])})"
    return text


def brief(reason: str, limit: int = 160) -> str:
    """A reason, cut to one line."""
    return textwrap.shorten(reason, limit, placeholder=" ...") or "no result yet"


def name_of(summary: Summary) -> str:
    """The configuration's label, with its role unless the label says it."""
    said = summary.role == "candidate" or summary.role in summary.configuration
    return summary.configuration + ("" if said else f" ({summary.role})")


def cells_of(comparison: Comparison, summary: Summary) -> list[Cell]:
    """The configuration's cells in task order."""
    keys = ((summary.configuration, task) for task in comparison.tasks)
    return [comparison.cells[key] for key in keys if key in comparison.cells]


def result_table(comparison: Comparison) -> Table:
    """The comparison as a table for the terminal: one line per configuration."""
    factor, unit = unit_of(comparison)
    table = Table(
        title=f"Gain over one model per task, {comparison.split} scores, {unit} [95 % interval over seeds]",
        title_justify="left",
    )
    table.add_column("configuration", overflow="fold")
    for name in ("seeds", "mean gain", "relative", "helped", "hurt", "pending", "worst task"):
        table.add_column(name, justify="left" if name == "worst task" else "right")
    for summary in ordered(comparison):
        worst = f"{summary.worst[0]} {number(summary.worst[1], _worst_factor(comparison, summary))}" if summary.worst else ""
        relative = summary.delta_m.interval
        table.add_row(
            Text(name_of(summary)),
            str(len(summary.seeds)),
            Text(show(summary.mean_gain, factor), style=_style(summary.mean_gain)),
            f"{number(relative.mean, 100)} %{floor_mark(summary, comparison)}" if relative else "pending",
            str(len(summary.helped)),
            str(len(summary.hurt)),
            str(len(summary.pending)),
            Text(worst),
        )
    return table


FLOOR_NOTE = "† a task's baseline is near zero and was floored at 1 % of the metric's range: read its gain in points"


def floor_mark(summary: Summary, comparison: Comparison) -> str:
    """A dagger where a relative gain has a floored denominator, so that its mean says little (:data:`FLOOR_NOTE`)."""
    return " †" if any(cell.floored for cell in cells_of(comparison, summary)) else ""


def print_comparison(console: Console, comparison: Comparison) -> None:
    """Print the table and one sentence per configuration."""
    console.print(result_table(comparison), soft_wrap=False)
    if any(floor_mark(summary, comparison) for summary in comparison.summaries):
        console.print(FLOOR_NOTE, markup=False, highlight=False)
    for line in summary_lines(comparison):
        console.print(line, markup=False, highlight=False)


def _worst_factor(comparison: Comparison, summary: Summary) -> float:
    assert summary.worst is not None
    return unit_for([comparison.cells[summary.configuration, summary.worst[0]].metric])[0]


def _style(estimate: Estimate) -> str:
    return {"helped": "bold blue", "hurt": "bold red", "pending": "dim"}.get(estimate.verdict, "")


def categories_of(comparison: Comparison) -> list[str]:
    """The tasks' categories in the order of their first tasks."""
    order = {task: i for i, task in enumerate(comparison.tasks)}
    first: dict[str, int] = {}
    for cell in comparison.cells.values():
        first[cell.category] = min(first.get(cell.category, len(order)), order[cell.task])
    return sorted(first, key=lambda name: first[name])


def is_bounded(cell: Cell) -> bool:
    """Whether the cell's metric has a bounded range, so that differences can be shown in points."""
    return metric_range(cell.metric) is not None
