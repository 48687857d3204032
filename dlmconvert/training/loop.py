"""The training loop: rows -> noised batch -> denoiser -> loss -> engine -> checkpoint.

Everything it needs is a pure function of the step, so that a run which is killed and resumed is the run that was not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from dlmconvert.diffusion.attention import CAUSAL, AttentionContext
from dlmconvert.diffusion.objective import cross_entropy, denoising_loss, token_weights
from dlmconvert.diffusion.schedules import attention_at, open_share
from dlmconvert.errors import EXIT_FAILED, SavedAndLeft, UserError
from dlmconvert.training.checkpoint import CheckpointFolder
from dlmconvert.training.engine import SingleDeviceEngine, batch_to
from dlmconvert.training.metrics import Metrics
from dlmconvert.training.optimizer import learning_rate
from dlmconvert.training.ranks import shares


@dataclass(frozen=True)
class LoopSettings:
    """Plain values of one stage. Units: steps are optimizer steps, rates are per update.

    causal: the AR objective (no annealing). anneal_steps: 1 opens everything at once. anneal: the path there, which for `window`
    depends on the row_length. cart_p: of weight `cart` only.
    """

    steps: int
    rows_per_step: int
    micro_batch: int
    learning_rate: float
    final_learning_rate: float
    warmup_steps: int
    schedule: str
    decay_fraction: float
    seed: int
    causal: bool
    anneal_steps: int
    weight: str
    normaliser: str
    save_steps: int
    save_minutes: float | None
    validate_steps: int | None
    anneal: str = "random"
    row_length: int = 0
    cart_p: float = 0.1

    def learning_rate_at(self, step: int) -> float:
        return learning_rate(
            step,
            steps=self.steps,
            peak=self.learning_rate,
            final=self.final_learning_rate,
            warmup_steps=self.warmup_steps,
            schedule=self.schedule,
            decay_fraction=self.decay_fraction,
        )


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


def context_of(settings: LoopSettings, step: int) -> AttentionContext:
    """Which pairs are open at this step. The draw is keyed by (seed, step): every rank and every micro-batch sees the same one."""
    if settings.causal:
        return replace(CAUSAL, seed=settings.seed, step=step)
    return attention_at(step, anneal=settings.anneal, anneal_steps=settings.anneal_steps, length=settings.row_length, seed=settings.seed)


def batch_loss(
    engine: SingleDeviceEngine,
    batch: Any,
    context: AttentionContext,
    settings: LoopSettings,
    num_eligible: int,
    num_micro_batches: int,
    num_masked_global: int | None = None,
) -> tuple[torch.Tensor, dict[str, float]]:
    """The micro-batch's share of the loss, and what is logged of it.

    `eligible`: sum_i w_i CE_i / (eligible tokens of the global batch), so that any split into micro-batches gives one gradient.
    `masked`: the same over the masked tokens of the global batch (num_masked_global), whose number is known before the forward.
    `masked_micro_batch`: each micro-batch divided by its own masked tokens, then averaged, as DiffuLLaMA's released code does.
    """
    x_0_BL, x_t_BL, masked_BL, t_B, positions_BL, segments_BL = batch_to(
        engine.device, batch.x_0_BL, batch.x_t_BL, batch.masked_BL, batch.t_B, batch.positions_BL, batch.segments_BL
    )
    if segments_BL is not None:
        context = replace(context, segments_BL=segments_BL)
    with engine.autocast():
        logits_NV = engine.denoiser(x_t_BL, masked_BL, positions_BL, context)
        ce_N = cross_entropy(logits_NV, x_0_BL[masked_BL])
    weights_N = token_weights(t_B, masked_BL, settings.weight, segments_BL, settings.cart_p)
    num_masked = ce_N.numel()
    if settings.normaliser == "masked_micro_batch":
        normaliser = float(max(1, num_masked) * num_micro_batches)
    elif settings.normaliser == "masked":
        assert num_masked_global is not None
        normaliser = float(max(1, num_masked_global))
    else:
        normaliser = float(num_eligible)
    loss = denoising_loss(ce_N, weights_N, normaliser)
    with torch.no_grad():
        elbo_N = token_weights(t_B, masked_BL, "elbo") if settings.weight != "elbo" else weights_N
        nelbo = denoising_loss(ce_N, elbo_N, float(num_eligible))
        values = torch.stack([loss.detach(), nelbo, ce_N.sum().to(loss.dtype)]).tolist()
    return loss, {"loss": values[0], "nelbo": values[1], "ce_sum": values[2], "masked": float(num_masked)}


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
