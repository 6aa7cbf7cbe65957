"""Every shipped sweep file: its header, its plan, and a network for each of its distinct models."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_modules.config import BUILT_IN, to_plain
from lightning_modules.data.tasks import load_catalogues, select
from lightning_modules.network.model import build_network
from lightning_modules.network.task_heads.base import HeadSpec
from pipelines.plan import make_plan
from pipelines.spec import SweepConfig, SweepError, load_sweep
from pipelines.sweep import _parse

REPOSITORY = Path(__file__).resolve().parents[1]
SWEEPS = sorted((REPOSITORY / "sweeps").glob("*.yaml"))


FACTS: dict[str, dict[str, Any]] = {"regression": {"mean": 0.0, "sd": 1.0}, "constituency": {"chains": [[0], [1, 0]]}}
"""What preparing the data would find."""


def missing_files(sweep: SweepConfig) -> list[Path]:
    """What a sweep file names that is not part of the checkout and not here: catalogues, their data, the backbone."""
    catalogues = [Path(path) for path in sweep.catalogues]
    if not all(path.is_file() for path in catalogues):
        return [path for path in catalogues if not path.is_file()]
    specs = load_catalogues(catalogues, Path())
    names = select(specs, sweep.trial["mixture"]["tasks"], "tasks")
    paths = [path for name in names for path in specs[name].files.values()]
    backbone = sweep.trial.get("backbone", {}).get("name", "tiny-encoder")
    paths += [] if backbone in BUILT_IN else [Path(backbone) / "config.json"]
    return [path for path in paths if not path.is_file()]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


@pytest.mark.parametrize("file", SWEEPS, ids=lambda p: p.stem)
def test_header_says_question_source_cost_and_command(file: Path) -> None:
    head = file.read_text().split("\nname:")[0]
    for word in ("Question", "Source", "Cost", "Command"):
        assert re.search(rf"^# {word}:", head, re.MULTILINE), f"{file.name} has no '# {word}:' in its header"
    assert f"python pipelines/sweep.py sweeps/{file.name}" in head


@pytest.mark.parametrize("file", SWEEPS, ids=lambda p: p.stem)
def test_it_plans_and_every_model_can_be_built(file: Path, tmp_path: Path) -> None:
    sweep = load_sweep(file)
    missing = missing_files(sweep)
    if missing:
        pytest.skip(f"{missing[0]} is not beside this checkout")
    plan = make_plan(sweep, tmp_path)
    assert sweep.name == file.stem and sweep.question
    distinct = {json.dumps([to_plain(t.config.model), to_plain(t.config.backbone)]): t.config for t in plan.trials}
    for config in distinct.values():
        specs = [plan.specs[name] for name in config.mixture.tasks]
        kinds = ["text2text" if config.data.form == "text2text" else spec.kind for spec in specs]
        heads = [
            HeadSpec(spec.name, kind, max(1, len(spec.labels)), FACTS.get(kind, {}))
            for spec, kind in zip(specs, kinds, strict=True)
        ]
        vocabulary = 4000 if config.backbone.built_in else None
        router = getattr(config.model, "router", None)
        vectors = torch.randn(len(heads), 6) if router is not None and router.computed_vectors else None
        assert len(build_network(config, heads, vocabulary, vectors).heads) == sum(kind != "text2text" for kind in kinds)


def test_the_options_are_the_documented_ones() -> None:
    options = set(vars(_parse(["x.yaml"])))
    assert options == {"sweep", "overrides", "plan", "status", "report", "track_again", "fresh", "storage", "address"}
    readme = (REPOSITORY / "README.md").read_text()
    for name in options - {"sweep", "overrides"}:
        assert f"--{name.replace('_', '-')}" in readme


def test_files_named_in_the_readme_exist() -> None:
    readme = (REPOSITORY / "README.md").read_text()
    links = re.findall(r"\]\(([^)#]+)\)", readme)
    assert links and all((REPOSITORY / link).exists() for link in links if "://" not in link)


def test_a_sweep_without_a_usable_catalogue_says_what_to_do(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text("name: s\ntrial: {mixture: {tasks: [a]}}\n")
    with pytest.raises(SweepError, match=r"catalogues|no task matches"):
        make_plan(load_sweep(file), tmp_path)
