"""Imports run one way and without a circle, and the parent stays light: the shape of the code, held by a test."""

import ast
import json
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = (ROOT / "schemas" / "mistudio_schemas", ROOT / "service" / "mistudio_train")
LAYERS = [
    ("mistudio_schemas",),
    ("mistudio_train.sae",),
    ("mistudio_train.training",),
    ("mistudio_train.worker",),
    ("mistudio_train.cli",),
]
"""Lowest first; what is in none of them (`mistudio_train.errors` and the like) stands between the first two."""
DEFERRED = {("mistudio_train.worker.child_main", "mistudio_train.training.run")}
"""The one step from `worker` into `training`, inside the child's entry function."""


def module_of(path: Path) -> str:
    parts = path.relative_to(path.parents[len(path.parts) - len(ROOT.parts) - 2]).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules() -> dict[str, Path]:
    return {module_of(path): path for source in SOURCES for path in source.rglob("*.py")}


def imports_of(name: str, path: Path, *, deferred: bool) -> set[str]:
    """Our modules that this one imports; those inside functions only when `deferred`."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    known, found = modules(), set()
    tree = ast.parse(path.read_text())
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if id(node) in inside and not deferred:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            up = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*up, *([node.module] if node.module else [])])
            found |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base for alias in node.names}
    return {one for one in found if one in known and one != name}


def layer(name: str) -> int:
    for rank, prefixes in enumerate(LAYERS):
        if any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes):
            return rank * 2
    return 1


def test_every_module_is_seen() -> None:
    assert {"mistudio_schemas.events", "mistudio_train.settings", "mistudio_train.worker.app"} <= set(modules())


def test_imports_run_one_way() -> None:
    against = {
        (name, there)
        for name, path in modules().items()
        for there in imports_of(name, path, deferred=True)
        if layer(there) > layer(name)
    }
    assert against == set()


def test_the_worker_reaches_into_training_in_one_place() -> None:
    steps = {
        (name, there)
        for name, path in modules().items()
        if layer(name) == layer("mistudio_train.worker")
        for there in imports_of(name, path, deferred=True)
        if layer(there) in (layer("mistudio_train.sae"), layer("mistudio_train.training"))
    }
    assert steps == DEFERRED


def test_there_is_no_circle() -> None:
    graph = {name: imports_of(name, path, deferred=False) for name, path in modules().items()}
    order = list(TopologicalSorter(graph).static_order())
    assert len(order) == len(graph)


@pytest.mark.parametrize("module", ["mistudio_train.worker.app", "mistudio_train.cli"])
def test_the_parent_never_loads_what_belongs_to_the_child(module: str) -> None:
    code = f"import sys, json, {module}; print(json.dumps(sorted(sys.modules)))"
    loaded = set(json.loads(subprocess.check_output([sys.executable, "-c", code])))
    assert loaded & {"torch", "transformers", "matplotlib", "accelerate", "bitsandbytes"} == set()
