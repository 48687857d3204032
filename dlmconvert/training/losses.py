"""One micro-batch: noised rows in, its share of the loss and what is logged of it out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from dlmconvert.diffusion.attention import CAUSAL, AttentionContext
from dlmconvert.diffusion.objective import cross_entropy, denoising_loss, token_weights
from dlmconvert.diffusion.schedules import attention_at
from dlmconvert.training.engine import SingleDeviceEngine, batch_to
from dlmconvert.training.optimizer import learning_rate


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
