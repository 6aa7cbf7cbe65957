import csv
import io
import re
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console
from standins import Planned, Task

from lightning_modules.config import AdapterMoEConfig, DenseConfig, MixtureConfig, ModelConfig, TaskMoEConfig, TrialConfig
from pipelines.report import SweepFacts, page_html, write_report
from pipelines.stats import Interval
from pipelines.store import TrialResult
from pipelines.transfer import Comparison, Estimate, compare
from pipelines.wording import print_comparison, show, summary_lines

EVIL = '<script>alert("x & y")</script>'


MODELS: dict[str, ModelConfig] = {
    "dense": DenseConfig(),
    "task_moe num_experts=2": TaskMoEConfig(num_experts=2),
    "task_moe num_experts=4": TaskMoEConfig(num_experts=4),
    f"adapter_moe {EVIL} $x_1$": AdapterMoEConfig(num_experts=4),
}
TASKS = {"toy/a": Task("near"), "toy/b": Task("near"), f"toy/{EVIL}": Task(EVIL), "toy/c $y^2$": Task("")}


def make(seeds: int = 3, tasks: Mapping[str, Task] = TASKS, without: str = "", failures: bool = True) -> Comparison:
    """Gain of the i-th task: 0.01 (i - 1) plus 0.001 per seed; ``without`` names a configuration that has failed."""
    trials, results, failed = [], {}, {}
    for seed in range(seeds):
        single = {task: f"alone-{i}-{seed}" for i, task in enumerate(tasks)}
        for task, trial_id in single.items():
            config = TrialConfig(mixture=MixtureConfig(tasks=(task,)))
            trials.append(Planned(trial_id, "single_task", f"single_task {task}", seed, config, task))
            results[trial_id] = _result(trial_id, {task: 0.5}, tasks)
        for name, model in MODELS.items():
            config = TrialConfig(mixture=MixtureConfig(tasks=tuple(tasks)), model=model)
            trial = Planned(f"{name}-{seed}", "candidate", name, seed, config, baselines={"single_task": single})
            trials.append(trial)
            if name == without:
                failed[trial.trial_id] = f"ran out of memory {EVIL}"
            else:
                scores = {task: 0.5 + 0.01 * (i - 1) + 0.001 * seed for i, task in enumerate(tasks)}
                results[trial.trial_id] = _result(trial.trial_id, scores, tasks)
    return compare(trials, results, tasks, failures=failed if failures else {})


def _result(trial_id: str, scores: Mapping[str, float], tasks: Mapping[str, Task]) -> TrialResult:
    return TrialResult(
        trial_id=trial_id, status="finished", scores={"test": {t: {tasks[t].metric: v} for t, v in scores.items()}}, steps=1,
        primary={t: tasks[t].metric for t in scores}, seconds=1.0, started_ms=1, finished_ms=2,
    )  # fmt: skip


FACTS = SweepFacts(
    name=f"sweep {EVIL}", question=f"Who hurts whom {EVIL}?", settings={f"key {EVIL}": EVIL}, command=f"run {EVIL}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("sweep")
    (made / "report").mkdir()
    (made / "report" / "of_an_older_report.png").write_bytes(b"")
    assert write_report(made, make(without="task_moe num_experts=4"), FACTS) == made / "report" / "index.html"
    return made


class _Page(HTMLParser):
    """Collects tags, what they refer to, and the text; fails on tags that are not closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.references: list[str] = []
        self.text = io.StringIO()
        self.open: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.write(data)


def test_page_is_one_safe_file(folder: Path) -> None:
    text = (folder / "report" / "index.html").read_text()
    page = _Page(text)
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert page.references and all(reference.startswith("data:image/png;base64,") for reference in page.references)
    assert "http" not in re.sub(r'base64,[^"]*', "", text)
    assert EVIL not in text
    assert page.text.getvalue().count(EVIL) > 10


def test_files(folder: Path) -> None:
    names = {path.name for path in (folder / "report").iterdir()}
    assert names == {"index.html", "gains_by_task.png", "mean_gain.png", "gains_by_category.png", "gains_by_num_experts.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (folder / "report").glob("*.png"))
    with (folder / "comparison.csv").open() as file:
        assert {row["configuration"] for row in csv.DictReader(file)} == set(MODELS)


def test_page_says_what_came_out_and_what_failed(folder: Path) -> None:
    text = _Page((folder / "report" / "index.html").read_text()).text.getvalue()
    assert FACTS.question in text
    assert "2 of 4 tasks helped, 1 hurt" in text
    assert f"failed: ran out of memory {EVIL}" in text
    assert "3 seeds screen, they do not conclude" in text


def test_sentence() -> None:
    assert summary_lines(make())[0] == (
        "dense: 2 of 4 tasks helped, 1 hurt; mean gain +0.6 [+0.4, +0.8] points over one model per task; "
        "worst task toy/a (\N{MINUS SIGN}0.9)"
    )


def test_sentence_of_what_is_pending() -> None:
    lines = summary_lines(make(without="dense"))
    assert lines[0].startswith("dense: all 4 tasks pending (seed 0: the trial failed: ran out of memory")
    assert "has not finished" in summary_lines(make(without="dense", failures=False))[0]


@pytest.mark.parametrize(
    ("interval", "factor", "text"),
    [
        (Interval(0.012, 0.003, 0.021, 3), 100.0, "+1.2 [+0.3, +2.1]"),
        (Interval(-0.012, -0.03, 0.00001, 3), 100.0, "\N{MINUS SIGN}1.2 [\N{MINUS SIGN}3.0, 0.0]"),
        (Interval(-0.012, None, None, 1), 100.0, "\N{MINUS SIGN}1.2 (one seed)"),
        (Interval(1.5, 1.25, 1.75, 3), 1.0, "+1.5 [+1.25, +1.75]"),
        (None, 100.0, "pending"),
    ],
)
def test_show(interval: Interval | None, factor: float, text: str) -> None:
    assert show(Estimate(interval=interval), factor) == text


@pytest.mark.parametrize("seeds", [1, 2])
def test_terminal_table(seeds: int) -> None:
    out = io.StringIO()
    print_comparison(Console(file=out, width=200), make(seeds))
    assert "dense" in out.getvalue()
    assert ("one seed" in out.getvalue()) is (seeds == 1)
    assert EVIL in out.getvalue()


def test_terminal_table_shows_brackets_as_they_are() -> None:
    tasks = {"[bold]a": Task("x"), "b": Task("y")}
    out = io.StringIO()
    print_comparison(Console(file=out, width=200), make(tasks=tasks))
    assert "[bold]a" in out.getvalue()


@pytest.mark.parametrize("tasks", [{"only": Task("x")}, {"r": Task("x", "mse"), "s": Task("y")}])
def test_odd_sweeps(tmp_path: Path, tasks: Mapping[str, Task]) -> None:
    page = write_report(tmp_path, make(1, tasks), SweepFacts(name="odd"))
    assert ("mix units" in page.read_text()) is ("r" in tasks)


def test_report_before_anything_has_finished(tmp_path: Path) -> None:
    page = write_report(tmp_path, compare([], {}, {}), SweepFacts(name="empty"))
    assert "nothing to compare" in page.read_text()
    comparison = make()
    trials = [Planned("x", "candidate", "dense", 0, TrialConfig(mixture=MixtureConfig(tasks=("toy/a",))))]
    nothing = compare(trials, {}, TASKS)
    page = write_report(tmp_path, nothing, SweepFacts(name="nothing yet"))
    assert "not finished" in page.read_text()
    assert list((tmp_path / "report").glob("*.png")) == []
    assert page_html(comparison, FACTS, {}).count("<h2>") == 6


def test_report_is_reproducible(tmp_path: Path) -> None:
    first = write_report(tmp_path / "a", make(), FACTS).read_bytes()
    assert write_report(tmp_path / "b", make(), FACTS).read_bytes() == first
