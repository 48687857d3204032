"""`builtin:python-docstrings`: instruction pairs out of the standard library of the running interpreter."""

from __future__ import annotations

import ast
import sysconfig
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from dlmconvert.data.readers import decode
from dlmconvert.data.sources import content_hash, standard_library_files

BUILTIN_DOCSTRINGS = "builtin:python-docstrings"
LONGEST_RESPONSE = 600
LONGEST_PROMPT = 400


class Pair(NamedTuple):
    """prompt: the first paragraph of the docstring, and the signature. response: the body without its docstring.

    group: the hash of the file, the same as that of its document in `builtin:python`: held-out files stay apart.
    """

    prompt: str
    response: str
    group: str
    origin: str


def docstring_pairs() -> Iterator[Pair]:
    """Every documented function with a short body, once, in the order of `standard_library_files`."""
    root = Path(sysconfig.get_paths()["stdlib"])
    seen: set[tuple[str, str]] = set()
    for path in standard_library_files():
        text = decode(path.read_bytes(), path)
        if not text.strip():
            continue
        try:
            tree = ast.parse(text)
        except SyntaxError:  # templates and code of other versions
            continue
        lines, group = text.split("\n"), content_hash(text)  # not splitlines(): ast does not count form feeds
        for node in ast.walk(tree):
            pair = _pair(node, lines) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else None
            if pair is not None and pair not in seen:
                seen.add(pair)
                yield Pair(*pair, group, f"{path.relative_to(root)}, line {node.lineno}")


def _pair(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> tuple[str, str] | None:
    documentation = ast.get_docstring(node)
    if not documentation or len(node.body) < 2:
        return None
    docstring, body_end = node.body[0], node.body[-1].end_lineno
    assert docstring.end_lineno is not None and body_end is not None
    # The signature, the docstring and the body must each have lines of their own.
    if docstring.lineno <= node.lineno or node.body[1].lineno <= docstring.end_lineno:
        return None
    signature = textwrap.dedent("\n".join(lines[node.lineno - 1 : docstring.lineno - 1])).strip()
    response = textwrap.dedent("\n".join(lines[docstring.end_lineno : body_end])).strip("\n").rstrip()
    summary = " ".join(documentation.split("\n\n")[0].split())
    prompt = f"{summary}\n\n{signature}"
    if not summary or not response or len(response) > LONGEST_RESPONSE or len(prompt) > LONGEST_PROMPT:
        return None
    return prompt, response
