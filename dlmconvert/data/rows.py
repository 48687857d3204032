"""Rows of tokens on disk: memory-mapped, verified when opened, read in any order.

A store is a folder:
    tokens.bin      uint16 or uint32, the flat stream of tokens; row r is tokens[r * row_length : (r + 1) * row_length]
    documents.bin   int64, where each document starts in the stream (packed text)
    eligible.bin    one bit a token, a whole number of bytes a row (conversations)
    padding.bin     int32, the position in each row at which padding starts; row_length where there is none (conversations)
    meta.json       sizes and counts; written last

Shapes: B rows, L tokens a row.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dlmconvert.errors import EXIT_FAILED, UserError

FORMAT = 1


@dataclass(frozen=True)
class Rows:
    """tokens_BL int64. eligible_BL bool: may be masked and scored. segments_BL int64: document number within the row, from 0."""

    tokens_BL: torch.Tensor
    eligible_BL: torch.Tensor
    segments_BL: torch.Tensor


class RowStore:
    """The rows of one source. Open one with `RowStore.open`."""

    def __init__(self, folder: Path, meta: Mapping[str, Any]):
        self.folder = folder
        self.meta = meta
        self.row_length: int = meta["row_length"]
        self.num_rows: int = meta["num_rows"]
        self.num_tokens: int = meta["num_tokens"]
        self._tokens_RL = self._map("tokens.bin", meta["dtype"])[: self.num_rows * self.row_length].reshape(-1, self.row_length)
        self._starts = self._map("documents.bin", "int64") if meta["documents"] == "isolated" else None
        packed = "eligible.bin" in meta["files"]
        self._eligible = self._map("eligible.bin", "uint8").reshape(self.num_rows, -1) if packed else None
        self._padding = self._map("padding.bin", "int32") if packed else None

    @classmethod
    def open(cls, folder: str | Path) -> RowStore:
        """Raises UserError when a file is missing or has another size than meta.json says."""
        folder = Path(folder)
        try:
            meta = json.loads((folder / "meta.json").read_text())
        except (OSError, ValueError):
            raise _damaged(folder, "meta.json is missing or cannot be read") from None
        if meta.get("format") != FORMAT:
            raise _damaged(folder, f"meta.json has format {meta.get('format')!r}, this version reads {FORMAT}")
        for name, size in meta["files"].items():
            file = folder / name
            found = file.stat().st_size if file.is_file() else None
            if found != size:
                raise _damaged(folder, f"{name} has {found} bytes in place of {size}" if found is not None else f"{name} is missing")
        return cls(folder, meta)

    @property
    def all_eligible(self) -> bool:
        """Whether every token may be masked and scored (packed text)."""
        return self._eligible is None

    @property
    def has_segments(self) -> bool:
        """Whether a row can hold more than one segment: isolated documents, or padding behind an answer."""
        return self._starts is not None or self.meta.get("num_padding_tokens", 0) > 0

    def rows(self, indices: np.ndarray) -> Rows:
        """The rows `indices` (B,)."""
        tokens_BL = torch.from_numpy(self._tokens_RL[indices].astype(np.int64))
        return Rows(tokens_BL, self.eligible(indices), self.segments(indices))

    def eligible(self, indices: np.ndarray) -> torch.Tensor:
        """bool (B, L): tokens that may be masked and scored (all of packed text, the last answer of a conversation)."""
        if self._eligible is None:
            return torch.ones(len(indices), self.row_length, dtype=torch.bool)
        bits_BL = np.unpackbits(self._eligible[indices], axis=1, count=self.row_length)
        return torch.from_numpy(bits_BL.astype(bool))

    def segments(self, indices: np.ndarray) -> torch.Tensor:
        """int64 (B, L): document number within the row (0, 1, 2, ...); padding is a segment of its own; zeros when joined."""
        indices = np.asarray(indices, dtype=np.int64)
        segments_BL = np.zeros((len(indices), self.row_length), dtype=np.int64)
        if self._starts is not None:
            first = np.searchsorted(self._starts, indices * self.row_length, side="right")
            last = np.searchsorted(self._starts, (indices + 1) * self.row_length, side="left")
            for row, index in enumerate(indices):
                segments_BL[row, self._starts[first[row] : last[row]] - index * self.row_length] = 1
            segments_BL = np.cumsum(segments_BL, axis=1)
        elif self._padding is not None:
            segments_BL += np.arange(self.row_length) >= self._padding[indices][:, None]
        return torch.from_numpy(segments_BL)

    def _map(self, name: str, dtype: str) -> np.ndarray:
        if not self.meta["files"][name]:
            return np.zeros(0, dtype=dtype)
        return np.memmap(self.folder / name, dtype=dtype, mode="r")


class RowWriter:
    """Writes the files of a store; `close` writes meta.json, without which the folder is no store."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True)
        self.folder = folder
        self._files: dict[str, Any] = {}

    def append(self, name: str, values: np.ndarray) -> None:
        if name not in self._files:
            self._files[name] = (self.folder / name).open("wb")
        self._files[name].write(values.tobytes())

    def close(self, meta: Mapping[str, Any]) -> None:
        sizes = {}
        for name, file in self._files.items():
            file.flush()
            os.fsync(file.fileno())
            sizes[name] = file.tell()
            file.close()
        with (self.folder / "meta.json").open("w") as file:
            json.dump({"format": FORMAT, **meta, "files": sizes}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())


def smallest_dtype(vocab_size: int) -> str:
    """uint16 where every token id fits, else uint32."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def largest_vocabulary(tokenizer: Any) -> int:
    """One more than the largest token id; `len(tokenizer)` is less when added ids leave holes."""
    return max(len(tokenizer), max(tokenizer.get_vocab().values(), default=-1) + 1)


def _damaged(folder: Path, why: str) -> UserError:
    root = folder.parent
    return UserError(
        f"the prepared rows in {folder} are damaged",
        why,
        f"delete the folder {root} and run the same command again: it is made anew",
        exit_code=EXIT_FAILED,
    )
