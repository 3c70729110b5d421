"""The arrows of the architecture: who may import whom, and what may not be imported early."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.stages import STAGES

ROOT = Path(__file__).parents[2]
# package -> packages of ours that it may import
ALLOWED = {
    "cluster": set[str](),
    "pipelines": {"cluster"},
    "tune": {"cluster", "pipelines"},
    "serving": {"cluster", "pipelines"},
}
HEAVY = {"torch", "ray", "transformers", "deepspeed"}
SOURCES = sorted(f for package in ALLOWED for f in (ROOT / package).rglob("*.py"))


def imports(tree: ast.AST, *, early: bool = False) -> Iterator[str]:
    """Dotted names that a module imports; `early` only those that run when it is imported."""
    for node in ast.iter_child_nodes(tree):
        if early and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if early and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from (f"{module}.{alias.name}" for alias in node.names)
        yield from imports(node, early=early)


def against_the_arrows(package: str, tree: ast.AST) -> list[str]:
    """Imports that the architecture does not allow in a module of a package."""
    wrong = []
    for name in imports(tree):
        top = name.split(".")[0]
        other = top in ALLOWED and top != package and top not in ALLOWED[package]
        # Serving opens what was trained through the families; it knows no stage.
        past_the_door = package == "serving" and (
            top == "pipelines" and not f"{name}.".startswith("pipelines.families.")
        )
        if other or past_the_door or name.startswith("."):
            wrong.append(name)
    return wrong


def heavy(tree: ast.AST) -> set[str]:
    return {name.split(".")[0] for name in imports(tree, early=True)} & HEAVY


def parsed(path: Path) -> ast.AST:
    return ast.parse(path.read_text("utf-8"), filename=str(path))


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_follow_the_arrows(path: Path) -> None:
    assert against_the_arrows(path.relative_to(ROOT).parts[0], parsed(path)) == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_ray_is_never_imported_from(path: Path) -> None:
    """`from ray import tune` would bind the name of our own package."""
    tree = parsed(path)
    nodes = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module == "ray"]
    assert nodes == []


@pytest.mark.parametrize(
    ("package", "code"),
    [
        ("cluster", "import pipelines.prepare"),
        ("cluster", "def f():\n    from serving.app import run"),
        ("pipelines", "from tune import space"),
        ("pipelines", "import serving"),
        ("pipelines", "from .data import corpus"),
        ("tune", "import serving.app"),
        ("serving", "from tune.space import draw"),
        ("serving", "from pipelines.training import loop"),
        ("serving", "from pipelines import prepare"),
        ("serving", "import pipelines.families_of_others"),
        ("serving", "try:\n    import tune\nexcept ImportError:\n    pass"),
    ],
)
def test_a_planted_violation_is_caught(package: str, code: str) -> None:
    assert against_the_arrows(package, ast.parse(code))


@pytest.mark.parametrize(
    ("package", "code"),
    [
        ("serving", "from pipelines import families"),
        ("serving", "from pipelines.families.base import Family"),
        ("tune", "from pipelines.pretrain import run\nfrom cluster.config import RunConfig"),
        ("cluster", "import tunes, servings"),
        ("cluster", "from cluster import loading"),
    ],
)
def test_what_is_allowed_is_not_caught(package: str, code: str) -> None:
    assert against_the_arrows(package, ast.parse(code)) == []


def test_early_imports_are_told_from_late_ones() -> None:
    late = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\n"
    late += "def f():\n    import ray\nclass C:\n    def g(self):\n        import deepspeed\n"
    assert heavy(ast.parse(late)) == set()
    early = "import torch.nn as nn\nif True:\n    from ray.train import report\n"
    early += "class C:\n    import transformers\n"
    assert heavy(ast.parse(early)) == {"torch", "ray", "transformers"}


def doors() -> list[Path]:
    """The modules that the command line imports before a stage runs, and all of cluster."""
    stages = [ROOT / f"{stage.module.replace('.', '/')}.py" for stage in STAGES]
    return [*stages, *sorted((ROOT / "cluster").rglob("*.py"))]


@pytest.mark.parametrize("path", doors(), ids=lambda p: str(p.relative_to(ROOT)))
def test_doors_import_nothing_heavy(path: Path) -> None:
    assert heavy(parsed(path)) == set()


def loaded_by(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after running `code`."""
    script = f"{code}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    answer = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return set(answer.stdout.split())


def test_all_of_cluster_loads_without_the_training_stack() -> None:
    """Beyond what the source says: nothing that it imports drags the training stack in."""
    modules = [
        ".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for f in sorted((ROOT / "cluster").rglob("*.py"))
    ]
    loaded = loaded_by("import " + ", ".join(modules))
    assert "cluster" in loaded and loaded & HEAVY == set()


def test_stage_modules_load_without_the_training_stack() -> None:
    modules = ", ".join(stage.module for stage in STAGES)
    loaded = loaded_by(f"import {modules}")
    assert "pipelines" in loaded and loaded & HEAVY == set()


def test_the_ingress_loads_without_a_model_stack() -> None:
    loaded = loaded_by("import serving.ingress")
    assert "fastapi" in loaded and loaded & HEAVY == {"ray"}
