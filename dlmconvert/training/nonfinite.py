"""Steps whose loss or gradient is not finite: left out on all ranks alike, counted, and after a few in a row the end of the run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from dlmconvert.errors import EXIT_FAILED, UserError

SHOWN_ROWS = 8


@dataclass(frozen=True)
class LeftOut:
    """How many steps made no update so far. It travels in checkpoints, so that a resumed run stops where the straight one would.

    nonfinite: because the loss or the gradient was not finite; in_a_row: of these, the last ones without a step between. overflows:
    because the loss scale of fp16 was too high, which is how that scale is found.
    """

    nonfinite: int = 0
    in_a_row: int = 0
    overflows: int = 0

    def after(self, problem: Problem | None) -> LeftOut:
        if problem is None:
            return replace(self, in_a_row=0)
        if problem.what == "loss scale":
            return replace(self, overflows=self.overflows + 1)
        return replace(self, nonfinite=self.nonfinite + 1, in_a_row=self.in_a_row + 1)

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


@dataclass(frozen=True)
class MicroBatch:
    """start, stop: its rows within the global batch. row_ids: (source, epoch, row) of each."""

    rank: int
    number: int
    start: int
    stop: int
    row_ids: list[Any]


@dataclass(frozen=True)
class Problem:
    """Why a step made no update. what: `loss`, `gradient norm`, or `loss scale` (fp16 overflowed: the scale is halved, no harm).
    micro_batches: those whose loss is not finite; empty where all losses are and only the gradient is not."""

    what: str
    value: float
    micro_batches: Sequence[MicroBatch] = ()

    def line(self, step: int, left_out: LeftOut) -> dict[str, Any]:
        """For metrics.jsonl. step: from 1."""
        counts = {"skipped_steps": left_out.nonfinite} if self.what != "loss scale" else {"overflow_steps": left_out.overflows}
        where = [{"rank": m.rank, "micro_batch": m.number, "rows": m.row_ids} for m in self.micro_batches]
        return {"step": step, "skipped": f"{self.what} is {self.value}", **counts, **({"where": where} if where else {})}


def rows_text(problem: Problem) -> str:
    """Which rows, for people."""
    if not problem.micro_batches:
        return "the losses of all micro-batches are finite"
    texts = []
    for batch in problem.micro_batches[:SHOWN_ROWS]:
        ids = ", ".join(row_text(row) for row in batch.row_ids[:SHOWN_ROWS]) + (", ..." if len(batch.row_ids) > SHOWN_ROWS else "")
        texts.append(f"rank {batch.rank}, micro-batch {batch.number}: {ids}")
    more = len(problem.micro_batches) - SHOWN_ROWS
    return "\n".join([*texts, *([f"and {more} more micro-batches"] if more > 0 else [])])


def row_text(row: Any) -> str:
    """(0, 2, 17) -> row 17 of source 0 (epoch 2)."""
    if not isinstance(row, tuple | list):
        return f"row {row}"
    source, epoch, number = row
    return f"row {number} of source {source} (epoch {epoch})"


def problem_of(loss_problems: int, norm: float, overflowed: bool) -> tuple[str, float] | None:
    """(what, value) of a step, the same on every rank. loss_problems: micro-batches of all ranks with a loss that is not finite."""
    if loss_problems:
        return "loss", float("nan")
    if math.isfinite(norm):
        return None
    return "loss scale" if overflowed else "gradient norm", norm


def too_many(problem: Problem, step: int, left_out: LeftOut, allowed: int, kept: list[int], reproduce: str, stage: str) -> UserError:
    """The end of the run. step: from 1. reproduce: the command that runs that step alone."""
    before = f", {left_out.in_a_row} steps in a row ({stage}.skip_nonfinite={allowed})" if left_out.in_a_row > 1 else ""
    newest = f"step {kept[-1]}" if kept else "none"
    return UserError(
        f"the {problem.what} is {problem.value} at step {step}{before}; the update was not made",
        f"{rows_text(problem)}\nlast good checkpoint: {newest}",
        f"{reproduce} runs that step alone and says where it breaks; then lower the learning rate or lengthen the warm-up (--fresh starts "
        f"anew beside this run), or leave out more such steps: {stage}.skip_nonfinite={2 * left_out.in_a_row}",
        exit_code=EXIT_FAILED,
    )
