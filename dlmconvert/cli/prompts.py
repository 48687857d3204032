"""Files of prompts and of answers, and files of results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dlmconvert.errors import UserError


def read_prompts(path: Path | None, option: str = "--prompts", fields: tuple[str, ...] = ("prompt", "text")) -> list[str]:
    """A prompt a line; in a .jsonl file the first of `fields` that its objects have. Raises UserError that names file and line."""
    if path is None:
        return []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{option} {path} cannot be read", str(error)) from error
    prompts = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            prompts.append(_field(line, f"{path}:{number}", fields) if path.suffix == ".jsonl" else line)
    if not prompts:
        raise UserError(f"{option} {path} holds no prompt" if fields[0] == "prompt" else f"{option} {path} is empty")
    return prompts


def _field(line: str, where: str, fields: tuple[str, ...]) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not a JSON object with a field `{fields[0]}`", str(error)) from error
    for field in fields:
        if isinstance(record, dict) and isinstance(record.get(field), str):
            return record[field]
    there = f"fields there: {', '.join(record) or 'none'}" if isinstance(record, dict) else "it is no object"
    raise UserError(f"{where} is not a JSON object with a field `{fields[0]}`", there)


def refuse_existing(path: Path | None, option: str) -> None:
    """Raises UserError when a file that a command is to write is there already, or has no folder."""
    if path is None:
        return
    if path.exists():
        raise UserError(f"{path} exists already", "nothing is overwritten", f"name another file for {option}, or remove this one")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{option} {path}: there is no folder {path.parent}", "", f"mkdir -p {path.parent}")


class ResultsFile:
    """JSON lines, written as results come, so that what was made stays when the command is stopped. None writes nowhere."""

    def __init__(self, path: Path | None):
        refuse_existing(path, "--out")
        self.path, self.file, self.count = path, None, 0

    def add(self, record: dict[str, Any]) -> None:
        if self.path is None:
            return
        try:
            if self.file is None:
                self.file = open(self.path, "x", encoding="utf-8")  # noqa: SIM115 - one file for the whole command
            self.file.write(json.dumps(record, ensure_ascii=False) + "\n")
            self.file.flush()
        except OSError as error:
            raise UserError(f"--out {self.path} cannot be written", str(error)) from error
        self.count += 1
