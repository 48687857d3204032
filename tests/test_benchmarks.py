"""Benchmarks are run by hand and take from each other and from the package: what they take is there."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


def top_level_names(path: Path) -> set[str]:
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
    return names


@pytest.mark.parametrize("name", sorted(path.name for path in FOLDER.glob("*.py")))
def test_what_a_benchmark_imports_exists(name):
    siblings = {path.stem: path for path in FOLDER.glob("*.py")}
    for node in ast.walk(ast.parse((FOLDER / name).read_text())):
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.module in siblings.keys() - {name.removesuffix(".py")}:  # kills.py takes from a module of the tests with its own name
            missing = {alias.name for alias in node.names} - top_level_names(siblings[node.module])
        elif (node.module or "").startswith("dlmconvert"):
            module = importlib.import_module(node.module)
            missing = {alias.name for alias in node.names if not hasattr(module, alias.name)}
            missing -= {found for found in missing if (Path(module.__file__).parent / f"{found}.py").is_file()}
        else:
            continue
        assert not missing, f"{name}, line {node.lineno}: {node.module} has no {', '.join(sorted(missing))}"
