"""Documents out of files, folders, Hub datasets and the standard library of the running interpreter.

A source is a `TextSource` of the recipe; only its values are used here. Whatever looks local never goes to the Hub.
"""

from __future__ import annotations

import glob
import hashlib
import json
import re
import sysconfig
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlmconvert.data.readers import (
    KNOWN_SUFFIXES,
    TEXT_SUFFIXES,
    Record,
    hub_records,
    load_hub,
    read_records,
    read_texts,
    suffix_of,
    text_of,
)
from dlmconvert.errors import UserError, nearest
from dlmconvert.recipe.schema import TextSource

BUILTIN_PYTHON = "builtin:python"

# Tests, tables and code that is not part of the library: long literals teach a language model nothing.
_NOT_LIBRARY = {
    "test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data", "msilib",
    "_bundled", "turtledemo", "lib-dynload", "_vendor",
}  # fmt: skip
_TABLES = re.compile(r"^(_sysconfigdata.*|stringprep|entities|_build_.*|sitecustomize|usercustomize)$")
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[\w.-]+)?$")
_REMEMBER_BYTES = 64 << 20  # files from this size on are not hashed again while their size and time stand


@dataclass(frozen=True)
class Document:
    """A text, and the group that decides its side of the held-out split.

    group: content hash (hex): of the text itself, or of the file it was taken from.
    origin: file and line, for error messages.
    """

    text: str
    group: str
    origin: str = ""


def content_hash(text: str) -> str:
    """The group of a text: 128 bits of its SHA-256 in hex."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def read_documents(source: TextSource) -> Iterator[Document]:
    """The documents of a source, in an order that depends on the content of the disk only. Empty ones are passed over.

    Raises UserError with file and line for an empty file, invalid UTF-8, broken JSON, a missing field, a field that is no
    string; and for a path that does not exist or a Hub dataset that cannot be loaded.
    """
    if not is_local(source.path):
        dataset = load_hub(
            source.path,
            name=source.name,
            split=source.split,
            streaming=source.streaming,
            revision=_hub_revision(source.path) if source.streaming else None,
        )
        for record in hub_records(dataset, source.path):
            yield from _document(record, source.text_field)
        return
    files = local_files(source.path)
    for path in files:
        num_documents = 0
        if suffix_of(path) in KNOWN_SUFFIXES and suffix_of(path) not in TEXT_SUFFIXES:
            found: Iterable[Document] = (d for record in read_records(path) for d in _document(record, source.text_field))
        else:
            found = (Document(text, content_hash(text), origin) for text, origin in read_texts(path, source.separator))
        for document in found:
            num_documents += 1
            yield document
        # An empty __init__.py in a folder is ordinary; an empty file that was asked for by name is a mistake.
        if not num_documents and len(files) == 1:
            raise UserError(f"{path}: empty file", "it holds no text", "give another path, or leave this source out of data.train")


def _document(record: Record, field: str) -> Iterator[Document]:
    text = text_of(record, field, "text_field of the source in data.train")
    if text.strip():
        yield Document(text, content_hash(text), record.origin)


def is_local(path: str) -> bool:
    """Whether a path string means this machine: builtin, existing, shaped like a path, or with a known extension."""
    if path.startswith("builtin:") or path.startswith((".", "/", "~")) or any(c in path for c in "*?["):
        return True
    return suffix_of(Path(path)) in KNOWN_SUFFIXES or Path(path).exists() or not _HUB_ID.match(path)


def local_files(path: str) -> list[Path]:
    """The files that a local path string names, sorted: one file, a folder (searched whole), a glob, or a builtin."""
    if path.startswith("builtin:"):
        if path != BUILTIN_PYTHON:
            raise UserError(f"there is no source {path!r}", nearest(path, [BUILTIN_PYTHON]))
        return standard_library_files()
    expanded = Path(path).expanduser()
    if expanded.is_file():
        return [expanded]
    if expanded.is_dir():
        return _files_with_known_suffix(expanded.rglob("*"), path, f"the folder {path}")
    if any(c in path for c in "*?["):
        return _files_with_known_suffix(map(Path, glob.glob(str(expanded), recursive=True)), path, f"the pattern {path}")
    raise UserError(f"no such file or folder: {path}", _neighbours(expanded), "check data.train, data.validation and sft.data")


def _files_with_known_suffix(found: Iterable[Path], path: str, label: str) -> list[Path]:
    files = []
    for file in found:
        hidden = any(part.startswith(".") and part not in (".", "..") for part in file.parts[len(Path(path).expanduser().parts) :])
        if file.is_file() and not hidden and suffix_of(file) in KNOWN_SUFFIXES:
            files.append(file)
    if not files:
        raise UserError(f"{label} matches no file that can be read", f"known extensions: {', '.join(KNOWN_SUFFIXES)} (and .gz)")
    return sorted(files)


def _neighbours(path: Path) -> str:
    parent = path.parent
    while not parent.is_dir() and parent != parent.parent:
        path, parent = parent, parent.parent
    try:
        names = sorted(entry.name for entry in parent.iterdir() if not entry.name.startswith("."))
    except OSError:
        names = []
    return f"in {parent.absolute()}: " + (nearest(path.name, names[:1000]) if names else "nothing")[:400]


def standard_library_files() -> list[Path]:
    """Every .py file of the running interpreter's standard library but tests and generated tables, sorted by name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).parts
        if _NOT_LIBRARY.isdisjoint(parts[:-1]) and not parts[0].startswith("config-") and not _TABLES.match(path.stem):
            files.append(path)
    if len(files) < 20:
        raise UserError(
            f"the standard library of this interpreter is not there as source files ({root})",
            f"{len(files)} .py files found",
            "use a Python whose library is not zipped away, or set data.train to a text of your own",
        )
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def content_fingerprint(sources: Iterable[TextSource], settings: Any = None, memory: Path | None = None) -> str:
    """SHA-256 (hex) over the content of the sources and the settings: it changes when a byte of either does.

    sources: their `weight` has no part in it, because prepared rows do not depend on it.
    settings: anything `json.dumps` takes.
    memory: a JSON file that remembers the hashes of large files (by path, size and time) and the last seen revisions of
        streamed Hub datasets, so that a finished preparation is found again quickly, and without a network.
    """
    state = [json.dumps(settings, sort_keys=True)]
    for source in sources:
        state.append(json.dumps(source.model_dump(exclude={"weight", "path"}), sort_keys=True))
        if not is_local(source.path):
            state.append(_hub_fingerprint(source, memory))
            continue
        # Not the paths: the same corpus in another folder gives the same rows.
        state += [f"{suffix_of(path)} {_file_hash(path, memory)}" for path in local_files(source.path)]
    return hashlib.sha256("\n".join(state).encode()).hexdigest()


def total_bytes(sources: Iterable[TextSource]) -> int | None:
    """Size of the plain text files behind the sources; None where it cannot be known beforehand (Hub, Parquet, gzip)."""
    total = 0
    for source in sources:
        if not is_local(source.path):
            return None
        for path in local_files(source.path):
            if path.suffix.lower() in (".gz", ".parquet"):
                return None
            total += path.stat().st_size
    return total


def _hub_fingerprint(source: TextSource, memory: Path | None) -> str:
    if not source.streaming:
        dataset = load_hub(source.path, name=source.name, split=source.split, streaming=False)
        return f"{source.path} {dataset._fingerprint}"
    revision = _hub_revision(source.path)
    key = f"hub {source.path}"
    if revision is None:
        revision = _remembered(memory).get(key)
        if revision is None:
            load_hub(source.path, name=source.name, split=source.split, streaming=True)  # says what is wrong
    else:
        _remember(memory, key, revision)
    return f"{source.path} {revision}"


def _hub_revision(path: str) -> str | None:
    """The newest commit of a Hub dataset, or None when the Hub cannot be reached."""
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(path).sha
    except Exception:  # every HTTP library has its own errors; loading the dataset reports the cause
        return None


def _file_hash(path: Path, memory: Path | None) -> str:
    try:
        stat = path.stat()
        key = f"{path.absolute()} {stat.st_size} {stat.st_mtime_ns}"
        large = stat.st_size >= _REMEMBER_BYTES
        if large and (known := _remembered(memory).get(key)):
            return known
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read", error.strerror or str(error)) from None
    # A file written within the last seconds may change again without a new time stamp.
    if large and time.time() - stat.st_mtime > 3:
        _remember(memory, key, digest)
    return digest


def _remembered(memory: Path | None) -> dict[str, str]:
    try:
        return json.loads(memory.read_text()) if memory is not None else {}
    except (OSError, ValueError):
        return {}


def _remember(memory: Path | None, key: str, value: str) -> None:
    if memory is None:
        return
    known = _remembered(memory) | {key: value}
    temporary = memory.with_name(f"{memory.name}.{time.time_ns()}")
    memory.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_text(json.dumps(known, indent=0))
    temporary.replace(memory)
