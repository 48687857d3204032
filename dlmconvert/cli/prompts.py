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
        # A line ends where a file's lines end: JSON strings and prompts may hold U+2028 and form feeds.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{option} {path} cannot be read", str(error)) from error
    prompts = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{path}:{number}"
            prompts.append(checked_text(_field(line, where, fields) if path.suffix == ".jsonl" else line, where))
    if not prompts:
        raise UserError(f"{option} {path} holds no prompt" if fields[0] == "prompt" else f"{option} {path} is empty")
    return prompts


def checked_text(text: str, where: str) -> str:
    """The text. Raises UserError for half a character (bytes of a command line that are no UTF-8, \\ud83d in JSON): no tokenizer reads it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{where} is no text: character {error.start + 1} is half of one", ascii(text[:60]), "write it as UTF-8") from error
    return text


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


def refuse_same(first: Path | None, option: str, second: Path | None, other_option: str) -> None:
    """Raises UserError when two results would be written to one file."""
    if first is not None and second is not None and first.absolute().resolve() == second.absolute().resolve():
        raise UserError(f"{option} and {other_option} name one file, {first}", "nothing is overwritten", "name two")


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
