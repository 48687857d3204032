"""Checkpoints that are written while training goes on.

What a checkpoint holds is copied to host memory, which stops training for the time of the copy; a thread writes the copy. The next
checkpoint waits for the one before, so there is never more than one copy. What makes a checkpoint whole (checkpoint.py) is the same:
without COMPLETE it does not exist, so that a kill in the middle loses nothing but the steps since the checkpoint before.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dlmconvert.training.checkpoint import CheckpointFolder


class Saving:
    """The checkpoints of a run, at most one on its way. Collective where it says so.

    overlaps: write in the background; else `begin` returns when the checkpoint is whole.
    """

    def __init__(self, checkpoints: CheckpointFolder, ranks: Any, overlaps: bool):
        self._checkpoints, self._ranks, self._overlaps = checkpoints, ranks, overlaps
        self._pending: tuple[int, dict[str, Any], Path] | None = None  # parts are being written
        self._task: _Task | None = None
        self._step: int | None = None  # of what is on its way

    def begin(self, engine: Any, step: int, state: dict[str, Any]) -> None:
        """Save the engine as it is now. Waits for the checkpoint before. Collective. Raises UserError when the disk is full."""
        self.finish()
        state = state | engine.state()
        if not self._overlaps:
            self._checkpoints.write(step, state, lambda folder: engine.capture(folder, False)(), self._ranks)
            return
        with self._checkpoints.whole_or_nothing(step, self._ranks):
            temporary = self._checkpoints.open(step, self._ranks)
            if temporary is None:
                return
            write = engine.capture(temporary, True)
        self._pending, self._step = (step, state, temporary), step
        self._task = _Task(lambda: self._guarded(step, write))

    def flags(self) -> dict[str, bool]:
        """What the ranks sum up in every step for `advance`: is this rank's part in its files, did writing it fail."""
        is_over = self._task is not None and not self._task.is_running()
        return {"written": is_over and self._pending is not None and self._task.error is None, "failed": is_over and self._task.error is not None}

    def advance(self, num_written: float, num_failed: float) -> None:
        """The sums of `flags` over the ranks. When all have written, rank 0 marks and renames, in the background as well. All ranks call
        it with the same numbers. Raises what went wrong."""
        if num_failed:
            self._fail()
        if num_written == self._ranks.count:
            self._mark()

    def finish(self) -> None:
        """Wait until nothing is on its way any more. Collective. Raises what went wrong."""
        if not self._overlaps:
            return
        for _ in range(2):  # its parts, and then its mark, which is rank 0's alone
            if self._task is not None:
                self._task.wait()
            flags = {name: float(value) for name, value in self.flags().items()}
            totals = self._ranks.sum(flags)
            self.advance(totals["written"], totals["failed"])
        self._task = None

    def _fail(self) -> None:
        # No rank writes any more when the folder goes; the one that failed says why, and the others see it leave.
        if self._task is not None:
            self._task.wait()
        self._ranks.barrier()
        error, step = (None, None) if self._task is None else (self._task.error, self._step)
        if self._ranks.rank == 0 and step is not None:
            self._checkpoints.discard(step)
        if error is not None:
            raise error
        self._ranks.barrier()
        raise AssertionError("a rank that could not write its part of a checkpoint went on")

    def abandon(self) -> None:
        """Wait for this process's thread and forget what it did: the run is ending with an error of its own."""
        if self._task is not None:
            self._task.wait()

    def _mark(self) -> None:
        assert self._pending is not None
        step, state, temporary = self._pending
        self._pending = None
        self._task = None
        if self._ranks.rank == 0:
            self._task = _Task(lambda: self._guarded(step, lambda: self._checkpoints.publish(step, state, temporary)))

    def _guarded(self, step: int, work: Callable[[], None]) -> None:
        with self._checkpoints.whole_or_nothing(step, self._ranks):
            work()


class _Task:
    """A function in a thread of its own. error: what it raised."""

    def __init__(self, work: Callable[[], None]):
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(work,), name="checkpoint")
        self._thread.start()

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # told to the thread that waits
            self.error = error

    def is_running(self) -> bool:
        return self._thread.is_alive()

    def wait(self) -> None:
        self._thread.join()


def host_copy(value: Any, memo: dict[Any, torch.Tensor] | None = None) -> Any:
    """A copy of nested containers that later changes do not reach, tensors in host memory. Tensors that were one stay one."""
    memo = {} if memo is None else memo
    if isinstance(value, torch.Tensor):
        key = (value.untyped_storage().data_ptr(), value.storage_offset(), tuple(value.shape), value.stride(), value.dtype)
        if value.numel() == 0:
            return value.detach().to("cpu", copy=True)
        if key not in memo:
            memo[key] = value.detach().to("cpu", copy=True)
        return memo[key]
    if isinstance(value, dict):
        result = copy.copy(value)  # of its own class, which may be an OrderedDict with attributes
        for key, item in value.items():
            result[key] = host_copy(item, memo)
        return result
    if isinstance(value, list | tuple) and type(value) in (list, tuple):
        return type(value)(host_copy(item, memo) for item in value)
    return copy.deepcopy(value)
