"""Checkpoints that are whole or do not exist.

Payload, then COMPLETE (every file's size and hash), then rename, then prune. A folder without COMPLETE is not a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dlmconvert.errors import EXIT_FAILED, UserError
from dlmconvert.training.ranks import Solo

COMPLETE = "COMPLETE"
_DISK_WORDS = ("No space left", "I/O error", "PytorchStreamWriter failed", "file write failed")


@dataclass(frozen=True)
class Checkpoint:
    """tensors: everything that training changed, by name. state: JSON values (step, metrics in flight, what it belongs to)."""

    step: int
    tensors: dict[str, torch.Tensor]
    state: dict[str, Any]


class CheckpointFolder:
    """`checkpoints/step-000500/`, ... of one stage. `warn` receives one line for each damaged checkpoint that is passed over."""

    def __init__(self, folder: Path, keep: int = 2, warn: Callable[[str], None] = lambda line: None):
        assert keep >= 2
        self.folder = folder
        self.keep = keep
        self.warn = warn
        self._damaged: set[int] = set()
        self._checked: set[int] = set()  # found whole by this process: gigabytes are not hashed twice

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        found = [p for p in self.folder.glob("step-*") if (p / COMPLETE).is_file()]
        return sorted(int(p.name.removeprefix("step-")) for p in found)

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}"

    def write(self, step: int, state: dict[str, Any], payload: Callable[[Path], None], ranks: Any = None) -> Path:
        """Write, mark, rename, prune. On failure the temporary folder is removed and older checkpoints stand.

        payload: puts files into a folder. With several ranks every one of them calls this and its payload writes its part; rank 0
        does the rest. Raises UserError when the disk is full or not writable.
        """
        ranks = ranks or Solo()
        with self.whole_or_nothing(step, ranks):
            temporary = self.open(step, ranks)
            if temporary is not None:
                payload(temporary)
                ranks.barrier()
                if ranks.rank == 0:
                    self.publish(step, state, temporary)
                ranks.barrier()
        return self.path(step)

    def open(self, step: int, ranks: Any) -> Path | None:
        """An empty folder that all ranks write their parts into; None when that step is saved already. Collective."""
        final = self.path(step)
        if ranks.share((final / COMPLETE).is_file() and step not in self._damaged):
            return None
        temporary = self._temporary(step)
        if ranks.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        ranks.barrier()
        return temporary

    def publish(self, step: int, state: dict[str, Any], temporary: Path) -> None:
        """All parts are written: mark, rename, prune. Rank 0 alone."""
        self._publish(step, state, temporary, self.path(step))
        self._prune()

    @contextmanager
    def whole_or_nothing(self, step: int, ranks: Any) -> Iterator[None]:
        """Whatever fails inside leaves no half-written folder; with several ranks, of which others may still be writing, `clear_unfinished`
        removes it when the run starts again. Raises UserError for a disk that is full or not writable."""
        try:
            yield
        except Exception as error:
            if ranks.count == 1:
                self.discard(step)
            if isinstance(error, OSError) or any(words in str(error) for words in _DISK_WORDS):
                kept = self.steps()
                stands = f"the checkpoint of step {kept[-1]} stands" if kept else "no checkpoint was written yet"
                raise UserError(
                    f"checkpoint of step {step} could not be written to {self.folder}: {error}",
                    f"nothing is lost but the steps since then: {stands}",
                    "free some space (or lower keep_checkpoints) and run the same command again",
                    exit_code=EXIT_FAILED,
                ) from error
            raise

    def discard(self, step: int) -> None:
        """Remove what was written of a checkpoint that will not be whole."""
        shutil.rmtree(self._temporary(step), ignore_errors=True)

    def _temporary(self, step: int) -> Path:
        return self.folder / f".writing-{self.path(step).name}"

    def _publish(self, step: int, state: dict[str, Any], temporary: Path, final: Path) -> None:
        (temporary / "state.json").write_text(json.dumps({"step": step, **state}, indent=1))
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        listing = {p.relative_to(temporary).as_posix(): {"bytes": p.stat().st_size, "blake2b": file_hash(p)} for p in files}
        for name in listing:
            _flush(temporary / name)
        (temporary / COMPLETE).write_text(json.dumps(listing, indent=1))
        _flush(temporary / COMPLETE)
        self._remove(step)  # a damaged one of that step, or a folder without COMPLETE
        os.rename(temporary, final)
        self._damaged.discard(step)
        _flush(self.folder)

    def load_newest(self) -> Checkpoint | None:
        """The newest checkpoint that is whole, with its tensors."""
        step = self.newest_whole()
        return None if step is None else self.load(step)

    def newest_whole(self, before: int | None = None) -> int | None:
        """The newest checkpoint (of a step below `before`) whose files are what COMPLETE says; damaged ones are passed over with a
        warning."""
        left = [step for step in self.steps() if (before is None or step < before) and step not in self._damaged]
        while left:
            step = left.pop()
            damage = None if step in self._checked else self.damage(step)
            if damage is None:
                self._checked.add(step)
                return step
            self._damaged.add(step)
            instead = "falling back to the one before it" if left else "there is none before it, so this starts from the beginning"
            self.warn(f"checkpoint {self.path(step).name} is damaged ({damage}): {instead}")
        return None

    def load(self, step: int) -> Checkpoint:
        from safetensors.torch import load_file

        return Checkpoint(step, load_file(self.path(step) / "tensors.safetensors"), self.state(step))

    def state(self, step: int) -> dict[str, Any]:
        """The JSON values of a checkpoint, without the step."""
        state = json.loads((self.path(step) / "state.json").read_text())
        del state["step"]
        return state

    def damage(self, step: int) -> str | None:
        """What is wrong with a checkpoint, or None. Compares every file's size and hash with COMPLETE."""
        folder = self.path(step)
        try:
            listing = json.loads((folder / COMPLETE).read_text())
        except (OSError, ValueError):
            return "COMPLETE cannot be read"
        for name, expected in listing.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} of {expected['bytes']} bytes"
            if file_hash(path) != expected["blake2b"]:
                return f"{name} has other content than when it was written"
        return None

    def clear_unfinished(self) -> None:
        """Remove what a killed process left half-written."""
        for leftover in [*self.folder.glob(".writing-*"), *self.folder.glob(".universal")]:
            shutil.rmtree(leftover, ignore_errors=True)

    def _prune(self) -> None:
        # A damaged checkpoint does not count as one of those that are kept: it must not push out a whole one.
        whole = [step for step in self.steps() if step not in self._damaged]
        for step in [*self._damaged, *whole[: -self.keep]]:
            self._remove(step)
        self._damaged.clear()

    def _remove(self, step: int) -> None:
        # Unmark first: a removal that is killed half-way must not leave a folder that looks whole.
        (self.path(step) / COMPLETE).unlink(missing_ok=True)
        shutil.rmtree(self.path(step), ignore_errors=True)


def write_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """tensors.safetensors, which `CheckpointFolder.load` reads."""
    from safetensors.torch import save_file

    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, folder / "tensors.safetensors")


def file_hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:32]


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
