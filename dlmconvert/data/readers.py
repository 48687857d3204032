"""Files become records and texts, and every complaint names the file and the line.

Text and JSONL have a small reader of our own, because `datasets` reports neither; Parquet goes through pyarrow and Hub
datasets through `datasets`. An `origin` is where something stands, for error messages: `corpus/a.jsonl, line 17`.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlmconvert.errors import EXIT_FAILED, UserError, nearest

TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", ".py")
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
PARQUET_SUFFIXES = (".parquet",)
KNOWN_SUFFIXES = TEXT_SUFFIXES + JSON_SUFFIXES + PARQUET_SUFFIXES

_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Record:
    """One JSON object, Parquet row or Hub row, and where it stands."""

    value: dict[str, Any]
    origin: str


def suffix_of(path: Path) -> str:
    """The extension that decides the format: `.jsonl` for both `a.jsonl` and `a.jsonl.gz`."""
    return path.with_suffix("").suffix.lower() if path.suffix.lower() == ".gz" else path.suffix.lower()


def read_records(path: Path) -> Iterator[Record]:
    """The records of a JSONL, JSON (lines, or one array) or Parquet file, plain or gzipped. Blank lines are passed over."""
    if suffix_of(path) in PARQUET_SUFFIXES:
        yield from _parquet_records(path)
    elif suffix_of(path) == ".json" and _first_character(path) == "[":
        yield from _array_records(path)
    else:
        for number, line in _lines(path):
            if not line.strip():
                continue
            origin = f"{path}, line {number}"
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{origin}: broken JSON",
                    f"{error.msg} at column {error.colno}: {_clip(line)}",
                    "a .jsonl file holds one whole JSON object a line; mend or remove this line",
                ) from None
            yield _record(value, origin)


def read_texts(path: Path, separator: str | None) -> Iterator[tuple[str, str]]:
    """(text, origin) of a text file: the whole file, or what stands between `separator`s. Empty texts are passed over.

    With a separator the file is read piece by piece, so that it may be larger than memory.
    """
    if not separator:
        text = decode(b"".join(_chunks(path)), path)
        if text.strip():
            yield text, str(path)
        return
    pending, line, first_line = "", 1, 1
    for piece in _decoded_chunks(path):
        parts = (pending + piece).split(separator)
        pending = parts.pop()
        for part in parts:
            if part.strip():
                yield part, f"{path}, line {first_line}"
            line += part.count("\n") + separator.count("\n")
            first_line = line
    if pending.strip():
        yield pending, f"{path}, line {first_line}"


def decode(data: bytes, path: Path | str, first_line: int = 1) -> str:
    """UTF-8 text (without a byte-order mark); invalid bytes are a UserError that names the line."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        raise UserError(
            f"{path}, line {line}: invalid UTF-8",
            f"byte 0x{data[error.start]:02x} cannot be decoded ({error.reason})",
            f"convert the file first, for example: iconv -f latin1 -t utf-8 {path}",
        ) from None
    return text.removeprefix("\ufeff")


def text_of(record: Record, field: str, setting: str) -> str:
    """The string in `field` of a record. setting: the recipe key that names the field, for the message."""
    if field not in record.value:
        raise UserError(
            f"{record.origin}: no field {field!r}",
            f"fields there: {', '.join(map(repr, record.value)) or 'none'}; {nearest(field, record.value)}",
            f"name the field with {setting}",
        )
    value = record.value[field]
    if not isinstance(value, str):
        raise UserError(
            f"{record.origin}: field {field!r} is {_kind(value)}, not a string",
            f"value: {_clip(repr(value))}",
            f"name another field with {setting}, or mend the record",
        )
    return value


def hub_records(dataset: Any, label: str) -> Iterator[Record]:
    """The rows of a loaded Hub dataset (see `load_hub`). A connection that breaks half-way is a UserError."""
    rows, number = iter(dataset), 0
    while True:
        try:
            value = next(rows)
        except StopIteration:
            return
        except Exception as error:
            raise UserError(
                f"{label}: reading stopped at row {number}",
                _first_line(error),
                "run the same command again: what is tokenised already is kept",
                exit_code=EXIT_FAILED,
            ) from error
        yield Record(value, f"{label}, row {number}")
        number += 1


def load_hub(path: str, *, name: str | None, split: str, streaming: bool, revision: str | None = None) -> Any:
    """`datasets.load_dataset`, with its many exceptions told as one UserError."""
    import datasets  # heavy: only when a Hub dataset is named

    try:
        return datasets.load_dataset(path, name, split=split, streaming=streaming, revision=revision)
    except Exception as error:
        raise UserError(
            f"the dataset {path!r} cannot be loaded from the Hub" + (f" (split {split!r})" if split != "train" else ""),
            f"{_first_line(error)}; and there is no file or folder of that name here",
            "check the spelling, the network and (for a private dataset) `hf auth login`, or give the path of a local file",
        ) from error


def _parquet_records(path: Path) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        row = 0
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                for value in batch.to_pylist():
                    row += 1
                    yield Record(value, f"{path}, row {row}")
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable Parquet file", _first_line(error), "download or write the file again") from None


def _array_records(path: Path) -> Iterator[Record]:
    text = decode(b"".join(_chunks(path)), path)
    decoder, position, line, counted = json.JSONDecoder(), text.index("[") + 1, 1, 0
    while True:
        while position < len(text) and text[position] in " \t\r\n,":
            position += 1
        line, counted = line + text.count("\n", counted, position), position
        if text.startswith("]", position):
            return
        try:
            value, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {error.lineno}: broken JSON", f"{error.msg} at column {error.colno}") from None
        yield _record(value, f"{path}, line {line}")


def _record(value: Any, origin: str) -> Record:
    if not isinstance(value, dict):
        raise UserError(f"{origin}: {_kind(value)}, not a JSON object", f"value: {_clip(repr(value))}")
    return Record(value, origin)


def _open(path: Path):
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")


def _chunks(path: Path) -> Iterator[bytes]:
    try:
        with _open(path) as file:
            while chunk := file.read(_READ_BYTES):
                yield chunk
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read", _first_line(error)) from None


def _line_blocks(path: Path) -> Iterator[bytes]:
    """Blocks of whole lines, so that a character is never cut in two."""
    pending: list[bytes] = []
    for chunk in _chunks(path):
        head, newline, tail = chunk.rpartition(b"\n")
        if newline:
            yield b"".join(pending) + head + newline
            pending = [tail]
        else:
            pending.append(chunk)
    if any(pending):
        yield b"".join(pending)


def _decoded_chunks(path: Path) -> Iterator[str]:
    line = 1
    for block in _line_blocks(path):
        yield decode(block, path, line)
        line += block.count(b"\n")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    number = 0
    for text in _decoded_chunks(path):
        # Not splitlines(): it also cuts at U+2028, which is legal inside a JSON string.
        for line in text.removesuffix("\n").split("\n"):
            number += 1
            yield number, line


def _first_character(path: Path) -> str:
    for text in _decoded_chunks(path):
        if text.strip():
            return text.strip()[0]
    return ""


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number", type(None): "null"}
    return names.get(type(value), type(value).__name__)


def _clip(text: str, length: int = 80) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
