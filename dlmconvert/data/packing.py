"""Text is tokenised and packed into rows, once: parallel, resumable, cached by content.

    sources -> documents -> held-out split -> shards of tokens -> one stream a source -> rows (consecutive cuts of it)

Under `<cache>/<fingerprint>/`: `train-0/`, `train-1/`, ... (one store a source) and `validation/`. The folder appears by a
rename when everything in it is written; until then the shards lie in `<cache>/<fingerprint>.shards/`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import math
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np

from dlmconvert.data.rows import FORMAT, RowStore, RowWriter, largest_vocabulary, smallest_dtype
from dlmconvert.data.sources import Document, content_fingerprint, read_documents, total_bytes
from dlmconvert.data.splits import Split, split_rule
from dlmconvert.data.tokenising import Piece, ShardFormat, Tokeniser, pieces_of, read_shard, shards_of
from dlmconvert.errors import EXIT_FAILED, UserError
from dlmconvert.recipe.schema import TextSource

Progress = Callable[[int, float | None], None]
"""progress(tokens so far, fraction done in [0, 1], or None where the size of the corpus is not known)."""

_CHARACTERS_A_TOKEN = 64  # far more than any tokenizer reaches on text
_SMALL_CORPUS_BYTES = 4 << 20  # below this, starting processes takes longer than tokenising


def prepare_rows(
    sources: Sequence[TextSource],
    *,
    tokenizer: Any,
    tokenizer_fingerprint: str,
    row_length: int,
    cache_folder: str | Path,
    documents: str = "joined",
    prefix_id: int | None = None,
    separator_id: int | None = None,
    forbidden_id: int | None = None,
    max_tokens: int | None = None,
    validation: float | Sequence[TextSource] = 0.02,
    workers: int | None = None,
    progress: Progress | None = None,
) -> tuple[list[RowStore], RowStore | None]:
    """Packed rows: one store a source, and one of the held-out text (None when `validation` is 0).

    tokenizer_fingerprint: changes whenever the tokenizer does; it stands for it in the name of the cache folder.
    row_length: tokens in a row.
    documents: `isolated` makes `Rows.segments_BL` number the documents in a row; `joined` leaves it at zero.
    prefix_id, separator_id: token put in front of (bos) and behind (eos) each document; None for nothing.
    forbidden_id: token that text must not contain; None when the mask token is an ordinary word.
    max_tokens: the first so many tokens of each source are trained on, and of what `validation` as a fraction holds out of it no
        more than that fraction's share beside them (`held_out_bound`). Little more than this is read and tokenised.
    validation: fraction that is held out of `sources`, or sources of its own (whose documents are then not trained on,
        should they also be in `sources`).
    workers: processes that tokenise; None for one a core. The result does not depend on it.

    Raises UserError for what `read_documents` finds, for a corpus smaller than one row, and for the forbidden token.
    """
    assert sources and documents in ("joined", "isolated"), (sources, documents)
    cache = Path(cache_folder)
    validation_sources = [] if isinstance(validation, int | float) else list(validation)
    fraction = float(validation) if isinstance(validation, int | float) else 0.0
    settings = {
        "format": FORMAT, "tokenizer": tokenizer_fingerprint, "row_length": row_length, "documents": documents, "prefix_id": prefix_id,
        "separator_id": separator_id, "forbidden_id": forbidden_id, "max_tokens": max_tokens, "fraction": fraction,
        "num_sources": len(sources),
    }  # fmt: skip
    held_tokens = held_out_bound(max_tokens, fraction, row_length)
    if held_tokens is not None:
        settings["held_tokens"] = held_tokens
    fingerprint = content_fingerprint([*sources, *validation_sources], settings, memory=cache / "hashes.json")[:24]
    final = cache / fingerprint

    def opened() -> tuple[list[RowStore], RowStore | None]:
        train = [RowStore.open(final / f"train-{number}") for number in range(len(sources))]
        return train, RowStore.open(final / "validation") if fraction or validation_sources else None

    if final.is_dir():
        return opened()
    shard_format = ShardFormat(smallest_dtype(largest_vocabulary(tokenizer)), prefix_id, separator_id, forbidden_id)
    with told_as_user_errors(cache), locked(cache / f".{fingerprint}.lock"):
        if final.is_dir():  # another process made it while this one waited
            return opened()
        excluded = {document.group for source in validation_sources for document in _bounded(source, max_tokens)}
        rule = split_rule((read_documents(source) for source in sources), fraction, excluded)
        size = total_bytes([*sources, *validation_sources])
        if size is not None and size < _SMALL_CORPUS_BYTES:
            workers = 1
        report = _Report(progress, size, max_tokens and max_tokens * (len(sources) + len(validation_sources)))
        parts = [(source, rule) for source in sources] + [(source, None) for source in validation_sources]
        shards_folder = cache / f"{fingerprint}.shards"
        paths = []
        with Tokeniser(tokenizer, shard_format, workers or os.cpu_count() or 1) as tokeniser:
            for number, (source, split) in enumerate(parts):
                pieces = _pieces(source, split, held_tokens)
                folder = shards_folder / f"part-{number}"
                paths.append(_tokenise(pieces, folder, tokeniser, max_tokens, report, split is None, row_length if split and held_tokens else 0))
        meta = {
            "kind": "text", "fingerprint": fingerprint, "row_length": row_length, "dtype": shard_format.dtype, "documents": documents,
        }  # fmt: skip
        try:
            with published(final) as folder:
                _write_stores(folder, paths, list(sources), validation_sources, meta, max_tokens, held_tokens, fraction)
        except UserError:
            shutil.rmtree(shards_folder, ignore_errors=True)  # nothing to resume: other settings have other shards
            raise
        except FileNotFoundError:
            if not final.is_dir():  # else, where locks do not work, a faster process is done and has removed the shards
                raise
        shutil.rmtree(shards_folder, ignore_errors=True)
        report.done()
    return opened()


def _bounded(source: TextSource, max_tokens: int | None) -> Iterator[Document]:
    """The documents of a source; of an endless one only as many as `max_tokens` may come from."""
    characters = 0
    for document in read_documents(source):
        yield document
        characters += len(document.text)
        if source.streaming and max_tokens is not None and characters > _CHARACTERS_A_TOKEN * max_tokens:
            return


def held_out_bound(max_tokens: int | None, fraction: float, row_length: int) -> int | None:
    """Tokens of a source that are held out at most when `max_tokens` of it are trained on: the same share of both, and a whole row."""
    if max_tokens is None or not fraction:
        return None
    return max(row_length, math.ceil(max_tokens * fraction / (1 - fraction)))


def _pieces(source: TextSource, split: Split | None, held_tokens: int | None) -> Iterator[Piece]:
    """split: None for a source that is held out whole. held_tokens: what is held out beyond them is not needed."""
    held_characters = 0
    for document in read_documents(source):
        train, held = ("", document.text) if split is None else split.parts(document)
        # The held-out part first: `max_tokens` may end the source inside this document.
        if held:
            for piece in pieces_of(held, True, document.origin):
                if split is not None and held_tokens is not None and held_characters > _CHARACTERS_A_TOKEN * held_tokens:
                    break
                yield piece
                held_characters += len(piece.text)
        if train:
            yield from pieces_of(train, False, document.origin)


def _tokenise(
    pieces: Iterable[Piece], folder: Path, tokeniser: Tokeniser, max_tokens: int | None, report: _Report, held_out: bool, least_held: int
) -> list[Path]:
    """The shard files of a source in order, up to the one in which `max_tokens`, and `least_held` tokens of held-out text, are reached.

    What is under way ends where `max_tokens` are to be expected, by the tokens a character so far: about one shard too many is made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    waiting: deque = deque()
    done: list[Path] = []
    num_tokens = num_held = num_characters = under_way = 0

    def enough() -> bool:
        nonlocal num_tokens, num_held, num_characters, under_way
        path, future, size = waiting.popleft()
        counts = future.result()
        done.append(path)
        num_tokens += counts[int(held_out)]
        num_held += counts[1]
        num_characters += size
        under_way -= size
        report.shard(size, sum(counts))
        return max_tokens is not None and num_tokens >= max_tokens and num_held >= least_held

    def full() -> bool:
        if max_tokens is None or len(waiting) >= tokeniser.window:
            return len(waiting) >= tokeniser.window
        # Before the first shard is back, a token a character: most texts have fewer.
        return num_tokens + under_way * (num_tokens / num_characters if num_characters else 1.0) >= max_tokens

    for number, shard in enumerate(shards_of(pieces, max_tokens)):
        path = folder / f"{number:06d}.npz"
        size = sum(len(piece.text) for piece in shard)
        waiting.append((path, tokeniser.submit(shard, path), size))
        under_way += size
        while waiting and full():
            if enough():
                return done
    while waiting:
        if enough():
            break
    return done


def _write_stores(
    folder: Path,
    paths: list[list[Path]],
    sources: list[TextSource],
    validation_sources: list[TextSource],
    meta: dict[str, Any],
    max_tokens: int | None,
    held_tokens: int | None,
    fraction: float,
) -> None:
    """All stores of a preparation. paths: the shards of each of `sources` and then of each of `validation_sources`."""
    row_length, total = meta["row_length"], 0
    for number, source in enumerate(sources):
        store = folder / f"train-{number}"
        num_tokens = _concatenate(paths[number : number + 1], 0, store, meta | {"source": source.path}, max_tokens)
        if num_tokens < row_length:
            raise _too_short(source.path, num_tokens, row_length, is_a_rest=bool(fraction or validation_sources))
        total += num_tokens
    if fraction:
        num_tokens = _concatenate(paths, 1, folder / "validation", meta | {"source": "held out"}, held_tokens)
        if num_tokens < row_length:
            raise _too_little_held_out(num_tokens, total, row_length, fraction)
    elif validation_sources:
        label = ", ".join(source.path for source in validation_sources)
        num_tokens = _concatenate(paths[len(sources) :], 1, folder / "validation", meta | {"source": label}, max_tokens)
        if num_tokens < row_length:
            raise _too_short(f"data.validation {label}", num_tokens, row_length, is_a_rest=False)


def _concatenate(paths: list[list[Path]], side: int, folder: Path, meta: dict[str, Any], max_tokens: int | None) -> int:
    """The shards of some sources become one store; returns its number of tokens.

    paths: the shards of each source. side: 0 what is trained on, 1 what is held out. max_tokens: taken of each source.
    """
    row_length = meta["row_length"]
    writer = RowWriter(folder)
    writer.append("tokens.bin", np.zeros(0, meta["dtype"]))
    writer.append("documents.bin", np.zeros(0, np.int64))
    offset = num_documents = num_split = 0
    last_start = 0
    for source in paths:
        left = max_tokens
        for path in source:
            shard = read_shard(path)
            tokens, starts = (shard.held_out_tokens, shard.held_out_starts) if side else (shard.tokens, shard.starts)
            if left is not None:
                tokens = tokens[:left]
                starts = starts[starts < len(tokens)]
                left -= len(tokens)
            starts = starts + offset
            writer.append("tokens.bin", tokens)
            writer.append("documents.bin", starts)
            num_split += int(np.sum(np.diff(np.concatenate([[last_start], starts])) > row_length))
            last_start = int(starts[-1]) if len(starts) else last_start
            num_documents += len(starts)
            offset += len(tokens)
    num_split += int(offset - last_start > row_length)
    counts = {
        "num_tokens": offset,
        "num_rows": offset // row_length,
        "num_documents": num_documents,
        "num_tokens_dropped": offset % row_length,
        "num_documents_split": num_split,
    }
    writer.close(meta | counts)
    return offset


def _too_short(label: str, num_tokens: int, row_length: int, is_a_rest: bool) -> UserError:
    return UserError(
        f"{label}: {num_tokens} tokens are fewer than one row of data.row_length={row_length}",
        "this is what is left to train on when the held-out text is taken away" if is_a_rest else "",
        "give more text, or lower " + (f"data.row_length to {num_tokens} or less" if num_tokens >= 8 else "data.row_length"),
    )


def _too_little_held_out(num_tokens: int, num_train_tokens: int, row_length: int, fraction: float) -> UserError:
    enough = min(0.5, max(2 * fraction, 2 * row_length / (num_tokens + num_train_tokens)))
    return UserError(
        f"the held-out text has {num_tokens} tokens, fewer than one row of data.row_length={row_length}",
        f"data.validation={fraction:g} of this corpus is too little",
        f"try data.validation={enough:.2g}, lower data.row_length, or set data.validation=0 (nothing is held out)",
    )


class _Report:
    """Turns finished shards into calls of `progress`."""

    def __init__(self, progress: Progress | None, total_characters: int | None, total_tokens: int | None):
        self._progress = progress
        self._total_characters = total_characters
        self._total_tokens = total_tokens
        self._characters = self._tokens = 0

    def shard(self, num_characters: int, num_tokens: int) -> None:
        self._characters += num_characters
        self._tokens += num_tokens
        if self._progress is None:
            return
        shares = []
        if self._total_characters:
            shares.append(self._characters / self._total_characters)
        if self._total_tokens:
            shares.append(self._tokens / self._total_tokens)
        self._progress(self._tokens, min(1.0, max(shares)) if shares else None)

    def done(self) -> None:
        if self._progress is not None:
            self._progress(self._tokens, 1.0)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file; the system lets go of it when the process ends, however it ends.

    Where the file system has no locks the work is done twice, into folders of their own: slower, never wrong.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            pass
        else:
            # Nobody else works on it, so what a killed process left half-written is of no use to anybody.
            for leftover in path.parent.glob(f"{path.stem.lstrip('.')}.*.tmp"):
                shutil.rmtree(leftover, ignore_errors=True)
        yield


@contextlib.contextmanager
def published(final: Path) -> Iterator[Path]:
    """A folder to write into that takes the name `final` at the end, or vanishes when something goes wrong."""
    temporary = final.with_name(f"{final.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        try:
            temporary.rename(final)
        except OSError:
            if not final.is_dir():  # else another process was faster; its content is the same
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def told_as_user_errors(cache: Path) -> Iterator[None]:
    """A full disk, a folder that may not be written and a killed worker are told as UserError."""
    try:
        yield
    except BrokenProcessPool as error:
        raise UserError(
            "a process that tokenises was killed",
            "most often the machine ran out of memory",
            "run the same command again with a smaller data.workers: what is tokenised already is kept",
            exit_code=EXIT_FAILED,
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM, errno.EEXIST, errno.ENOTDIR):
            raise
        raise UserError(
            f"prepared rows cannot be written to {cache}: {error.strerror}",
            f"{shutil.disk_usage(cache).free / 2**30:.1f} GiB free there" if cache.is_dir() else "",
            "make room, or set data.cache to a folder on another disk; what is tokenised already is kept",
            exit_code=EXIT_FAILED,
        ) from error
