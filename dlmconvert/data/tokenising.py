"""Shards of text become shards of tokens, in this process or in others.

A shard is a fixed number of characters, whatever the number of workers, written under another name and then renamed: what
is there is whole, so an interrupted preparation continues with the shards that are missing. This module imports neither
torch nor transformers, so that a worker starts in a fraction of a second.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
import zipfile
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dlmconvert.errors import UserError

PIECE_CHARACTERS = 1 << 18
SHARD_CHARACTERS = 1 << 21
SHARD_PIECES = 4096


class Piece(NamedTuple):
    """A document, or a part of a long one (cut at a line end, so that one file can occupy every worker)."""

    text: str
    held_out: bool
    first: bool
    last: bool
    origin: str


@dataclass(frozen=True)
class ShardFormat:
    """How tokens are put down.

    prefix_id, separator_id: put in front of and behind every document; None for nothing.
    forbidden_id: a token that text must not contain (the mask token).
    """

    dtype: str
    prefix_id: int | None
    separator_id: int | None
    forbidden_id: int | None


class Shard(NamedTuple):
    """What a shard file holds. tokens and document starts (int64, within the shard), to train on and held out."""

    tokens: np.ndarray
    starts: np.ndarray
    held_out_tokens: np.ndarray
    held_out_starts: np.ndarray


def pieces_of(text: str, held_out: bool, origin: str) -> Iterator[Piece]:
    """The pieces of one document."""
    start = 0
    while start < len(text):
        end = start + PIECE_CHARACTERS
        if end < len(text):
            end = text.rfind("\n", start + PIECE_CHARACTERS // 2, end) + 1 or end
        yield Piece(text[start:end], held_out, start == 0, end >= len(text), origin)
        start = end


def shards_of(pieces: Iterable[Piece], max_tokens: int | None = None) -> Iterator[list[Piece]]:
    """Pieces in groups of about `SHARD_CHARACTERS` characters, or of fewer where `max_tokens` are wanted and that is more than enough."""
    # Two characters a token: two shards or so for a small bound, whatever the number of workers.
    enough = SHARD_CHARACTERS if max_tokens is None else min(SHARD_CHARACTERS, 2 * max_tokens)
    shard: list[Piece] = []
    size = 0
    for piece in pieces:
        shard.append(piece)
        size += len(piece.text)
        if size >= enough or len(shard) >= SHARD_PIECES:
            yield shard
            shard, size = [], 0
    if shard:
        yield shard


class Tokeniser:
    """Writes shards with `workers` processes; with one worker, in this process. A context manager.

    A tokenizer without a `tokenizers` backend whose class cannot be sent to another process is used in this one.
    """

    def __init__(self, tokenizer: Any, shard_format: ShardFormat, workers: int):
        self._payload = _payload(tokenizer) if workers > 1 else None
        self._encoder = _Encoder(backend_of(tokenizer) or tokenizer)
        self._format = shard_format
        self._workers = workers
        self._executor: ProcessPoolExecutor | None = None
        self.window = 1 if self._payload is None else 2 * workers
        """Shards that may be under way at once."""

    def submit(self, pieces: list[Piece], path: Path) -> Future[tuple[int, int]]:
        """Write a shard; the result is the number of tokens (to train on, held out). A shard that is there is kept."""
        counts = shard_counts(path)
        if counts is None and self._payload is not None:
            if self._executor is None:
                self._executor = ProcessPoolExecutor(
                    self._workers,
                    mp_context=multiprocessing.get_context("spawn"),  # fork is unsafe beside threads
                    initializer=_start_worker,
                    initargs=(self._payload, self._format),
                )
            return self._executor.submit(_work, pieces, path)
        if counts is None:
            with _single_threaded():
                counts = write_shard(self._encoder, self._format, pieces, path)
        future: Future[tuple[int, int]] = Future()
        future.set_result(counts)
        return future

    def __enter__(self) -> Tokeniser:
        return self

    def __exit__(self, *_: object) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)


def write_shard(encoder: _Encoder, shard_format: ShardFormat, pieces: list[Piece], path: Path) -> tuple[int, int]:
    """Tokenise and write; returns the number of tokens (to train on, held out). Raises UserError for a forbidden token."""
    tokens: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    starts: tuple[list[int], list[int]] = ([], [])
    length = [0, 0]
    for piece, ids in zip(pieces, encoder.encode([piece.text for piece in pieces]), strict=True):
        if shard_format.forbidden_id is not None and shard_format.forbidden_id in ids:
            raise UserError(
                f"{piece.origin}: the text contains the mask token (id {shard_format.forbidden_id})",
                "such a token would look like a gap to be filled in, in training and in sampling",
                "remove it from the text, or set source.mask_token to another token",
            )
        side = int(piece.held_out)
        if piece.first:
            starts[side].append(length[side])
            if shard_format.prefix_id is not None:
                ids = [shard_format.prefix_id, *ids]
        if piece.last and shard_format.separator_id is not None:
            ids = [*ids, shard_format.separator_id]
        tokens[side].append(np.asarray(ids, dtype=shard_format.dtype))
        length[side] += len(ids)
    shard = Shard(
        *(
            array
            for side in (0, 1)
            for array in (np.concatenate([np.zeros(0, shard_format.dtype), *tokens[side]]), np.asarray(starts[side], np.int64))
        )
    )
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        np.savez(file, counts=np.asarray(length), **shard._asdict())
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    return length[0], length[1]


def read_shard(path: Path) -> Shard:
    with np.load(path) as file:
        return Shard(*(file[name] for name in Shard._fields))


def shard_counts(path: Path) -> tuple[int, int] | None:
    """Number of tokens (to train on, held out) of a shard, or None when it is missing or broken."""
    try:
        with np.load(path) as file:  # the directory of a zip file is at its end: a file that was cut short does not open
            train, held_out = file["counts"].tolist()
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return train, held_out


class _Encoder:
    """Texts to lists of token ids, without special tokens. tokenizer: of transformers, or its serialised backend."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer

    def encode(self, texts: list[str]) -> list[list[int]]:
        if hasattr(self._tokenizer, "encode_batch"):  # a bare backend of `tokenizers`
            return [encoding.ids for encoding in self._tokenizer.encode_batch(texts, add_special_tokens=False)]
        with no_length_warning(self._tokenizer):
            return [self._tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


def backend_of(tokenizer: Any) -> Any | None:
    """A copy of the `tokenizers` backend without truncation and padding, or None for a tokenizer in pure Python."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or getattr(tokenizer, "split_special_tokens", False):
        return None
    from tokenizers import Tokenizer

    copy = Tokenizer.from_str(backend.to_str())
    copy.no_truncation()
    copy.no_padding()
    return copy


def _payload(tokenizer: Any) -> bytes | None:
    # A tokenizer class out of a model folder (trust_remote_code) does not exist in a fresh process.
    if type(tokenizer).__module__.startswith("transformers_modules"):
        return None
    try:
        return pickle.dumps(backend_of(tokenizer) or tokenizer)
    except Exception:  # pickling runs foreign code; whatever it raises, the answer is the same
        return None


_worker: tuple[_Encoder, ShardFormat] | None = None


def _start_worker(payload: bytes, shard_format: ShardFormat) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def leave_with_parent() -> None:
        # A parent that is killed cannot say so, and a worker would wait for its next shard for ever.
        parent.join()
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()
    _worker = (_Encoder(pickle.loads(payload)), shard_format)


def _work(pieces: list[Piece], path: Path) -> tuple[int, int]:
    assert _worker is not None
    return write_shard(*_worker, pieces, path)


@contextlib.contextmanager
def _single_threaded() -> Iterator[None]:
    """One worker means one core; and a backend that never ran threads does not complain about forks later on."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


@contextlib.contextmanager
def no_length_warning(tokenizer: Any) -> Iterator[None]:
    """transformers warns of texts that are longer than the model; here they are cut to the row."""
    before = getattr(tokenizer, "model_max_length", None)
    if before is None:
        yield
        return
    tokenizer.model_max_length = int(1e30)
    try:
        yield
    finally:
        tokenizer.model_max_length = before
