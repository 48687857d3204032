"""The training loop: rows -> noised batch -> denoiser -> loss -> engine -> checkpoint.

Everything it needs is a pure function of the step, so that a run which is killed and resumed is the run that was not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

from dlmconvert.diffusion.schedules import open_share
from dlmconvert.errors import EXIT_FAILED, SavedAndLeft, UserError
from dlmconvert.training.checkpoint import CheckpointFolder
from dlmconvert.training.engine import SingleDeviceEngine
from dlmconvert.training.losses import LoopSettings, batch_loss, context_of
from dlmconvert.training.metrics import Metrics
from dlmconvert.training.ranks import shares


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
) -> None:
    """Run to `settings.steps`, from the newest checkpoint when there is one.

    identity: hash of everything that the numbers depend on; a checkpoint of another identity is refused.
    Raises SavedAndLeft after a signal, UserError on a non-finite loss or a full disk.
    """
    ranks = engine.ranks
    if ranks.rank == 0:
        checkpoints.clear_unfinished()
    resume(engine, checkpoints, metrics, identity)
    last_save = time.monotonic()
    # Every rank takes the same number of rows of each step, in order; which rows those are decides no number.
    share = shares(settings.rows_per_step, ranks.count)
    first = ranks.rank * share
    num_micro_batches = math.ceil(share / settings.micro_batch) * ranks.count
    for step in range(engine.step, settings.steps):
        started = time.monotonic()
        # Only adapters may have dropout; its draws are keyed by the step like all others.
        torch.manual_seed(settings.seed * 1_000_003 + step)
        context = context_of(settings, step)
        num_eligible = stream.num_eligible(step)
        num_masked = stream.num_masked(step) if settings.normaliser == "masked" else None
        totals: dict[str, float] = {}
        for start in range(first, first + share, settings.micro_batch):
            batch = stream.batch(step, start, min(start + settings.micro_batch, first + share))
            loss, sums = batch_loss(engine, batch, context, settings, num_eligible, num_micro_batches, num_masked)
            require_finite(sums["loss"], "loss", step, batch, checkpoints)
            engine.backward(loss)
            for name, value in sums.items():
                totals[name] = totals.get(name, 0.0) + value
        norm = engine.update(settings.learning_rate_at(step))
        require_finite(norm, "gradient norm", step, batch, checkpoints)

        done = step + 1
        overdue = settings.save_minutes is not None and ranks.rank == 0 and time.monotonic() - last_save > 60 * settings.save_minutes
        totals = ranks.sum(totals | {"stop": float(stop.requested is not None), "overdue": float(overdue)})
        stops, saves = totals.pop("stop") > 0, totals.pop("overdue") > 0  # all ranks decide alike
        masked = max(1.0, totals.pop("masked"))
        totals["cross_entropy"] = totals.pop("ce_sum") / masked
        totals["masked_fraction"] = masked / num_eligible
        totals["gradient_norm"] = norm
        seconds = time.monotonic() - started
        last = {
            "learning_rate": settings.learning_rate_at(step),
            "open_ratio": open_share(context, batch.x_0_BL.shape[1]),
            "tokens_seen": done * settings.rows_per_step * batch.x_0_BL.shape[1],
            "tokens_per_second": settings.rows_per_step * batch.x_0_BL.shape[1] / seconds,
            "seconds_per_step": seconds,
            "memory_bytes": engine.memory_bytes(),
        }
        metrics.record(done, totals, last, is_final=done == settings.steps)
        if settings.validate_steps and (done % settings.validate_steps == 0) and done < settings.steps:
            engine.denoiser.eval()
            metrics.write({"step": done, **{f"validation_{name}": value for name, value in validate().items()}})
            engine.denoiser.train()
        if stops or saves or done % settings.save_steps == 0 or done == settings.steps:
            engine.save(checkpoints, done, {"identity": identity, "metrics": metrics.state()})
            last_save = time.monotonic()
        if stops and done < settings.steps:
            raise SavedAndLeft(done, stop.requested or "a signal to another rank")


def resume(engine: SingleDeviceEngine, checkpoints: CheckpointFolder, metrics: Metrics, identity: str) -> None:
    """Take up the newest whole checkpoint, or start from nothing (and forget lines of a run that never saved)."""
    checkpoint = engine.newest(checkpoints)
    if checkpoint is None:
        metrics.resume({"sums": {}, "num_steps": 0}, 0)
        return
    if checkpoint.state["identity"] != identity:
        raise UserError(
            f"{checkpoints.folder} belongs to another recipe, model or text than the one asked for",
            "its numbers would not be those of either",
            "run the original command, or start anew beside it with --fresh",
        )
    engine.restore(checkpoints, checkpoint)
    metrics.resume(checkpoint.state["metrics"], checkpoint.step)


def require_finite(value: float, name: str, step: int, batch: Any, checkpoints: CheckpointFolder) -> None:
    if math.isfinite(value):
        return
    kept = checkpoints.steps()
    raise UserError(
        f"the {name} is {value} at step {step + 1}; the update was not made",
        f"rows {batch.row_ids[:4]}...; newest checkpoint: " + (f"step {kept[-1]}" if kept else "none"),
        "lower the learning rate or lengthen the warm-up (--fresh starts anew beside this run)",
        exit_code=EXIT_FAILED,
    )
