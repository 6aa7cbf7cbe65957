"""Who may import whom, read from the syntax trees; and that planning stays light."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
HEAVY = {"torch", "lightning", "transformers", "ray", "mlflow", "datasets", "tokenizers"}
LIGHT = {
    "lightning_modules/building.py",
    "lightning_modules/config.py",
    "lightning_modules/router_config.py",
    "lightning_modules/seeds.py",
    "lightning_modules/data/tasks.py",
    "lightning_modules/data/catalogues.py",
    "lightning_modules/data/forms.py",
    "lightning_modules/data/hub.py",
    "lightning_modules/data/kinds.py",
    "lightning_modules/data/posing.py",
    "lightning_modules/data/sources.py",
    "lightning_modules/data/splits.py",
    "lightning_modules/data/planted.py",
    "lightning_modules/data/mixtures.py",
    "pipelines/spec.py",
    "pipelines/axes.py",
    "pipelines/plan.py",
    "pipelines/resolve.py",
    "pipelines/architecture.py",
    "pipelines/routing_laws.py",
    "pipelines/baselines.py",
    "pipelines/cost.py",
    "pipelines/store.py",
    "pipelines/transfer.py",
    "pipelines/stats.py",
}
FAMILIES = {"dense", "task_moe", "adapter_moe"}
PARTS = {"backbones", "experts", "routers"}


def files() -> list[Path]:
    return [p for package in ("lightning_modules", "pipelines") for p in sorted((REPOSITORY / package).rglob("*.py"))]


def imports(path: Path, at_start: bool = False) -> Iterator[str]:
    """Modules that a file imports; ``at_start``: only those it imports when it is itself imported."""
    tree = ast.parse(path.read_text())
    for node in tree.body if at_start else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules_of(path: Path, package: str) -> set[str]:
    return {name.removeprefix(package).split(".")[0] for name in imports(path) if name.startswith(package)}


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_imports_keep_to_the_rooms(path: Path) -> None:
    name = str(path.relative_to(REPOSITORY))
    roots = {module.split(".")[0] for module in imports(path)}
    if name.startswith("lightning_modules/"):
        assert not roots & {"pipelines", "ray", "mlflow"}
    assert "ray" not in roots or name == "pipelines/runner.py"
    assert "mlflow" not in roots or name == "pipelines/tracking.py"
    if name in LIGHT:
        assert not {module.split(".")[0] for module in imports(path, at_start=True)} & HEAVY
    if path.stem in FAMILIES and path.parent.name == "lightning_modules":
        assert not modules_of(path, "lightning_modules.") & (FAMILIES - {path.stem})
    part = path.parent.name if path.parent.name == "routers" else path.stem
    if part in PARTS and "network" in path.parts:
        assert not modules_of(path, "lightning_modules.network.") & (PARTS - {part})


def test_package_files_are_empty() -> None:
    assert all(path.stat().st_size == 0 for path in files() if path.name == "__init__.py")


def test_no_file_shadows_a_module() -> None:
    """``python pipelines/sweep.py`` puts ``pipelines/`` first on the path."""
    taken = set(sys.stdlib_module_names) | HEAVY | {"numpy", "scipy", "yaml", "rich", "matplotlib", "omegaconf", "pytest"}
    assert not {path.stem for path in (REPOSITORY / "pipelines").glob("*.py")} & taken


def test_planning_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['sweep.py', 'sweeps/num_experts.yaml', '--plan']\n"
        "from pipelines.sweep import main\n"
        "status = main()\n"
        f"loaded = {sorted(HEAVY | {'matplotlib', 'scipy', 'pandas'})}\n"
        "print([name for name in loaded if name in sys.modules], file=sys.stderr)\n"
        "sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == "[]"
