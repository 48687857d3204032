"""The files of this package that an export carries, flattened into one folder.

transformers' loader copies a model folder's code by following `from .name import x`, in one folder only; so every import of
`dlmconvert.<room>.<name>` becomes `.name`, and a check makes sure that nothing but torch, transformers and the standard library is left.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from pathlib import Path

ALLOWED = {"torch", "transformers"} | set(sys.stdlib_module_names)  # transformers runs the model anyhow


def standalone_files(entry: str = "dlmconvert.exporting.standalone") -> dict[str, str]:
    """File name -> source text, of `entry` and of every module of this package that it imports, directly or not."""
    files: dict[str, str] = {}
    origins: dict[str, str] = {}
    waiting = [entry]
    while waiting:
        module = waiting.pop()
        name = module.rpartition(".")[2] + ".py"
        assert origins.setdefault(name, module) == module, f"{module} and {origins[name]} would be one file"
        if name in files:
            continue
        files[name], needed = flatten(_source(module), module)
        waiting += needed
    for name, text in files.items():
        check_standalone(name, text, set(files), ALLOWED)
    return dict(sorted(files.items()))


def flatten(text: str, module: str) -> tuple[str, list[str]]:
    """The source with imports of this package made flat, and the modules that it imports."""
    lines = text.splitlines(keepends=True)
    needed = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.ImportFrom):
            continue
        target = importlib.util.resolve_name("." * node.level + (node.module or ""), module.rpartition(".")[0])
        if target.split(".")[0] != "dlmconvert":
            continue
        if _is_package(target):
            # `from dlmconvert.sampling import api`: the flat form of a module import is `from . import api`, which the loader
            # does not follow; so a module is imported through a name of its own folder.
            raise AssertionError(f"{module}: import names from modules ({target}.x), not modules from packages")
        needed.append(target)
        line = lines[node.lineno - 1]
        flat, count = re.subn(r"from\s+\S+\s+import", f"from .{target.rpartition('.')[2]} import", line, count=1)
        assert count == 1, (module, line)
        lines[node.lineno - 1] = flat
    return "".join(lines), needed


def check_standalone(name: str, text: str, siblings: set[str], allowed: set[str]) -> None:
    """Assert that a file imports nothing but `allowed` packages and flat siblings that lie beside it."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                assert alias.name.split(".")[0] in allowed, f"{name} imports {alias.name}"
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            assert node.module.split(".")[0] in allowed, f"{name} imports {node.module}"
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 1 and f"{node.module}.py" in siblings, f"{name} imports {'.' * node.level}{node.module}"


def _source(module: str) -> str:
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None, module
    return Path(spec.origin).read_text(encoding="utf-8")


def _is_package(module: str) -> bool:
    spec = importlib.util.find_spec(module)
    assert spec is not None, module
    return spec.submodule_search_locations is not None
