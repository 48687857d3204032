"""The picture in docs/architecture.md stays true: who imports whom, who prints, how long a file may be."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "dlmconvert"
# A folder imports only from those listed before it.
ORDER = (
    "errors", "threads", "methods", "recipe", "diffusion", "backbone", "data", "training", "sampling", "evaluation", "exporting", "planning", "runs", "cli",
)  # fmt: skip
# Mathematics, and what an export carries: torch and the standard library.
TORCH_ONLY = ("diffusion", "sampling")
FILES = sorted(PACKAGE.rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def imports(path: Path):
    """(absolute module name, line) of every import, also those inside functions."""
    inside = ("dlmconvert", *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = inside[: len(inside) - node.level + 1] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            if base == "dlmconvert":
                yield from ((f"dlmconvert.{alias.name}", node.lineno) for alias in node.names)
            else:
                yield base, node.lineno


def test_every_folder_has_its_place():
    found = {module_of(path) for path in FILES} - {"__init__", "__main__"}
    assert found <= set(ORDER), found - set(ORDER)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_upwards(path):
    own = module_of(path)
    if own in ("__init__", "__main__"):
        return
    for name, line in imports(path):
        if not name.startswith("dlmconvert."):
            continue
        other = name.split(".")[1]
        if other.startswith("__"):
            continue
        assert ORDER.index(other) <= ORDER.index(own), f"{path}:{line}: {own} imports {other}, which stands below it"


@pytest.mark.parametrize("path", [p for p in FILES if module_of(p) in TORCH_ONLY], ids=lambda p: str(p.relative_to(PACKAGE)))
def test_mathematics_needs_torch_and_nothing_else(path):
    for name, line in imports(path):
        top = name.split(".")[0]
        own = name.split(".")[:2] in (["dlmconvert", module_of(path)], ["dlmconvert", "diffusion"], ["dlmconvert", "errors"])
        assert top in sys.stdlib_module_names or top == "torch" or own, f"{path}:{line}: imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_the_console_prints(path):
    if module_of(path) == "cli":
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", f"{path}:{node.lineno} prints"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_are_ascii_and_short(path):
    text = path.read_text(encoding="utf-8")
    assert text.isascii(), f"{path}: not ASCII"
    assert len(text.splitlines()) <= 400, f"{path}: wants a second name"


def test_no_module_outside_the_deepspeed_engine_imports_deepspeed():
    for path in FILES:
        if path.name in ("deepspeed.py", "deepspeed_check.py"):
            continue
        assert not any(name.split(".")[0] == "deepspeed" for name, _ in imports(path)), path


def test_nothing_heavy_is_imported_for_help():
    """cli modules import torch and its friends inside functions only: `--help` answers at once."""
    heavy = {"torch", "transformers", "datasets", "peft", "matplotlib", "deepspeed", "numpy"}
    for path in (p for p in FILES if module_of(p) in ("cli", "recipe", "errors", "methods")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not {name.split(".")[0] for name in names} & heavy, f"{path}:{node.lineno}"
