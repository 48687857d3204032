"""The training loop: rows -> noised batch -> denoiser -> loss -> engine -> checkpoint.

Everything it needs is a pure function of the step, so that a run which is killed and resumed is the run that was not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from dlmconvert.diffusion.attention import AttentionContext
from dlmconvert.diffusion.schedules import open_share, piece_share
from dlmconvert.errors import SavedAndLeft, UserError
from dlmconvert.training.bands import BandSearch
from dlmconvert.training.checkpoint import CheckpointFolder
from dlmconvert.training.engine import SingleDeviceEngine, seed_dropout
from dlmconvert.training.losses import LoopSettings, ar_weight_at, batch_loss, context_of
from dlmconvert.training.metrics import Metrics
from dlmconvert.training.nonfinite import LeftOut, MicroBatch, Problem, problem_of, too_many
from dlmconvert.training.ranks import shares
from dlmconvert.training.saving import Saving
from dlmconvert.training.throughput import Speed


class Stop(Protocol):
    """Whether a signal has asked the run to save and leave."""

    requested: str | None


class Stream(Protocol):
    """What the loop asks of the data: see data/loader.py."""

    def batch(self, step: int, start: int, stop: int) -> Any: ...

    def num_eligible(self, step: int) -> int: ...

    def num_masked(self, step: int) -> int: ...


def train(
    engine: SingleDeviceEngine,
    stream: Stream,
    settings: LoopSettings,
    checkpoints: CheckpointFolder,
    metrics: Metrics,
    validate: Callable[[], dict[str, float]],
    stop: Stop,
    identity: str,
    speed: Speed | None = None,
    reproduce: str = "dlmconvert replay RUN {step}",
    section: str = "train",
    search: BandSearch | None = None,
) -> None:
    """Run to `settings.steps`, from the newest checkpoint when there is one.

    identity: hash of everything that the numbers depend on; a checkpoint of another identity is refused. reproduce: the command that
    runs one step alone, with `{step}` in it. section: of the recipe, for messages. search: sets the stream's band of noise levels anew.
    Raises SavedAndLeft after a signal, UserError when too many steps in a row are not finite, or on a full disk.
    """
    ranks, speed = engine.ranks, speed or Speed()
    if ranks.rank == 0:
        checkpoints.clear_unfinished()
    left_out, balance, band = resume(engine, checkpoints, metrics, identity)
    if search is not None and band is not None:
        stream.band = tuple(band)
    saving = Saving(checkpoints, ranks, settings.overlap_saving)
    last_save, is_due = time.monotonic(), False
    try:
        for step in range(engine.step, settings.steps):
            started, done = time.monotonic(), step + 1
            part = accumulate(engine, stream, settings, step, balance)
            overdue = settings.save_minutes is not None and ranks.rank == 0 and started - last_save > 60 * settings.save_minutes
            said = {"stop": stop.requested is not None, "overdue": overdue, "broken": bool(part.broken), **saving.flags()}
            totals = ranks.sum(part.sums | {name: float(value) for name, value in said.items()})  # all ranks decide alike
            stops, saves = totals.pop("stop") > 0, totals.pop("overdue") > 0
            saving.advance(totals.pop("written"), totals.pop("failed"))
            is_broken = totals.pop("broken") > 0
            norm = engine.update(settings.learning_rate_at(step))
            masked = max(1.0, totals.pop("masked"))
            num_tokens = settings.rows_per_step * part.row_length
            speed.add(time.monotonic() - started, num_tokens, totals.pop("predicted"), passes=2 if "edit_loss" in totals else 1)

            problem = None
            if found := problem_of(is_broken, norm, engine.overflowed):
                problem = Problem(*found, broken_micro_batches(engine, stream, settings, step, part.broken) if is_broken else ())
            left_out = left_out.after(problem)
            totals["cross_entropy"] = totals.pop("ce_sum") / masked
            totals["masked_fraction"] = masked / part.num_eligible
            totals["gradient_norm"] = norm
            balance = balance if problem else balance_of(totals, totals["cross_entropy"], balance)

            def last(step=step, part=part, left_out=left_out, num_tokens=num_tokens) -> dict[str, Any]:
                scale = {} if engine.loss_scale is None else {"loss_scale": engine.loss_scale, "overflow_steps": left_out.overflows}
                return {
                    "learning_rate": settings.learning_rate_at(step),
                    "open_ratio": open_share(part.context, part.piece_length) * piece_share(part.piece_length, part.row_length),
                    "tokens_seen": (step + 1) * num_tokens,
                    "skipped_steps": left_out.nonfinite,
                    **scale,
                    **speed.line(settings.steps - step - 1),
                    "memory_bytes": engine.memory_bytes(),
                }

            if problem is not None:
                metrics.write(problem.line(done, left_out))
            metrics.record(done, None if problem else totals, last, is_final=done == settings.steps)
            if left_out.in_a_row > settings.skip_nonfinite:
                saving.finish()
                if ranks.rank > 0:
                    ranks.barrier()  # rank 0 says it and leaves, which ends this
                raise too_many(problem, done, left_out, settings.skip_nonfinite, checkpoints.steps(), reproduce.format(step=done), section)
            if settings.validate_steps and (done % settings.validate_steps == 0) and done < settings.steps:
                engine.denoiser.eval()
                metrics.write({"step": done, **{f"validation_{name}": value for name, value in validate().items()}})
                engine.denoiser.train()
            if search is not None and done % search.every == 0 and done < settings.steps:
                engine.denoiser.eval()
                found = search.look(engine, settings, done)
                engine.denoiser.train()
                stream.band = found["band_low"], found["band_high"]
                metrics.write({"step": done, **found})
            leaves = stops or done == settings.steps
            # While steps are left out nothing new is saved: the checkpoints from before stay.
            is_due = is_due or saves or done % settings.save_steps == 0
            if leaves or (is_due and not left_out.in_a_row):
                saving.begin(engine, done, {"identity": identity, "metrics": metrics.state(), "left_out": left_out.to_dict(), "balance": balance, "band": search and stream.band})
                last_save, is_due = time.monotonic(), False
            if leaves:
                saving.finish()
            if stops and done < settings.steps:
                raise SavedAndLeft(done, stop.requested or "a signal to another rank")
    finally:
        saving.abandon()


@dataclass(frozen=True)
class Part:
    """What this rank has summed up of a step. broken: its micro-batches, by number, whose loss is not finite. piece_length: of the pieces that rows are cut into."""

    sums: dict[str, float]
    broken: list[int]
    context: AttentionContext
    row_length: int
    piece_length: int
    num_eligible: int


def accumulate(engine: SingleDeviceEngine, stream: Stream, settings: LoopSettings, step: int, balance: float | None = None) -> Part:
    """Forward and backward of this rank's rows of a step; the gradient waits in the engine. Collective where the engine is.

    balance: see `ar_weight_at`.
    """
    # Only adapters may have dropout; its draws are keyed by the step like all others.
    seed_dropout(engine.device, settings.seed * 1_000_003 + step)
    context = context_of(settings, step)
    num_eligible = stream.num_eligible(step)
    starts = own_micro_batches(settings, engine.ranks)
    is_whole = starts == [(0, settings.rows_per_step)]  # one micro-batch counts its own targets
    num_masked = stream.num_masked(step) if settings.normaliser == "masked" and not is_whole else None
    ar_weight = ar_weight_at(settings, step, balance)
    sums: dict[str, float] = {}
    broken = []
    for number, (start, stop) in enumerate(starts):
        batch = stream.batch(step, start, stop)
        loss, values = batch_loss(engine, batch, context, settings, num_eligible, len(starts) * engine.ranks.count, num_masked, ar_weight)
        if not math.isfinite(values["loss"]):
            # Through the sum over ranks, every rank sees that this step must not be made.
            loss = loss * float("nan")
            broken.append(number)
        engine.backward(loss)
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + value
    return Part(sums, broken, context, batch.x_0_BL.numel() // (stop - start), batch.x_0_BL.shape[1], num_eligible)


def balance_of(totals: dict[str, float], cross_entropy: float, before: float | None) -> float | None:
    """CE of masked tokens / CE of next tokens on the clean copy, where there is such a loss: see `ar_weight_at`."""
    return cross_entropy / totals["ar_nll"] if totals.get("ar_nll") else before


def micro_batches(settings: LoopSettings, rank: int, count: int) -> list[tuple[int, int]]:
    """(start, stop) of a rank's rows in the global batch. Every rank takes the same number of rows of each step, in order; which rows
    those are decides no number."""
    share = shares(settings.rows_per_step, count)
    first = rank * share
    return [(start, min(start + settings.micro_batch, first + share)) for start in range(first, first + share, settings.micro_batch)]


def own_micro_batches(settings: LoopSettings, ranks: Any) -> list[tuple[int, int]]:
    """Of the rank that this process is, or of all those that it stands for."""
    if ranks.count > 1:
        return micro_batches(settings, ranks.rank, ranks.count)
    return [rows for rank in range(ranks.stands_for) for rows in micro_batches(settings, rank, ranks.stands_for)]


def broken_micro_batches(engine: SingleDeviceEngine, stream: Stream, settings: LoopSettings, step: int, mine: list[int]) -> list[MicroBatch]:
    """Of all ranks: those whose loss is not finite. Collective."""
    ranks = engine.ranks
    every = [(rank, number, *rows) for rank in range(ranks.count) for number, rows in enumerate(micro_batches(settings, rank, ranks.count))]
    flags = ranks.sum({f"{rank} {number}": float(rank == ranks.rank and number in mine) for rank, number, _, _ in every})
    return [
        MicroBatch(rank, number, start, stop, stream.batch(step, start, stop).row_ids)
        for rank, number, start, stop in every
        if flags[f"{rank} {number}"]
    ]


def resume(engine: SingleDeviceEngine, checkpoints: CheckpointFolder, metrics: Metrics, identity: str) -> tuple[LeftOut, float | None, Any]:
    """Take up the newest whole checkpoint, or start from nothing (and forget lines of a run that never saved).

    Returns what was left out before, the balance of the two losses at the last step, and the band of noise levels that a search had found.
    """
    checkpoint = engine.newest(checkpoints)
    if checkpoint is None:
        metrics.resume({"sums": {}, "num_steps": 0}, 0)
        return LeftOut(), None, None
    if checkpoint.state["identity"] != identity:
        raise UserError(
            f"{checkpoints.folder} belongs to another recipe, model or text than the one asked for",
            "its numbers would not be those of either",
            "run the original command, or start anew beside it with --fresh",
        )
    engine.restore(checkpoints, checkpoint)
    metrics.resume(checkpoint.state["metrics"], checkpoint.step)
    return LeftOut(**checkpoint.state.get("left_out", {})), checkpoint.state.get("balance"), checkpoint.state.get("band")
