"""One micro-batch: noised rows in, its share of the loss and what is logged of it out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from dlmconvert.backbone.extras import Extras, balance_coefficient
from dlmconvert.diffusion import gidd
from dlmconvert.diffusion.alignment import predictable
from dlmconvert.diffusion.attention import CAUSAL, AttentionContext
from dlmconvert.diffusion.objective import denoising_loss, token_weights
from dlmconvert.diffusion.schedules import attention_at, block_length_at
from dlmconvert.training.engine import SingleDeviceEngine, batch_to
from dlmconvert.training.optimizer import learning_rate
from dlmconvert.training.terms import add_source, embedding_noise, gidd_mixture, gidd_score, real_positions


@dataclass(frozen=True)
class LoopSettings:
    """Plain values of one stage. Units: steps are optimizer steps, rates are per update.

    causal: the AR objective (no annealing). anneal_steps: 1 opens everything at once. anneal: the path there, which for `window`
    depends on the row_length. cart_p: of weight `cart` only. pattern, block_stages: of block models, see `schedules.block_length_at`.
    ar_weight, ar_schedule: of the next-token loss on the clean copy, see `ar_weight_at`. corruption: its kind; uniform_share: of `gidd`.
    alignment_weight, teacher_kl: of the comparison with the frozen source. router_weight: of the balance loss of experts, None for the source's own.
    embedding_noise:
    its standard deviation in the first embedding_noise_steps. skip_nonfinite: steps in a row that may be left out because something is
    not finite. overlap_saving: checkpoints are written while training goes on.
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
    pattern: str = "bidirectional"
    block_stages: tuple[tuple[int, int], ...] = ()
    ar_weight: float = 0.0
    ar_schedule: str = "fixed"
    corruption: str = "masking"
    uniform_share: float = 0.1
    alignment_weight: float = 0.0
    teacher_kl: float = 0.0
    router_weight: float | None = 0.0
    embedding_noise: float = 0.0
    embedding_noise_steps: int = 0
    skip_nonfinite: int = 0
    overlap_saving: bool = False

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
    if settings.block_stages:
        return AttentionContext(pattern=settings.pattern, block_length=block_length_at(step, settings.block_stages), length=settings.row_length)
    return attention_at(step, anneal=settings.anneal, anneal_steps=settings.anneal_steps, length=settings.row_length, seed=settings.seed)


def ar_weight_at(settings: LoopSettings, step: int, ratio: float | None) -> float:
    """Weight of the next-token loss on the clean copy at optimizer step `step` (from 0).

    `fixed`: ar_weight. `annealed`: falls linearly to 0 over anneal_steps, while the blocks grow (NBDiff, arXiv 2512.06776). `balanced`:
    ar_weight x the ratio of the two losses, CE of masked tokens / CE of next tokens (I-DLM, arXiv 2604.11035), in the step before:
    known to all ranks and micro-batches alike. ratio: that one, None at the first step.
    """
    if settings.ar_schedule == "annealed":
        return settings.ar_weight * max(0.0, 1 - step / settings.anneal_steps)
    if settings.ar_schedule == "balanced" and ratio is not None:
        return settings.ar_weight * ratio
    return settings.ar_weight


def batch_loss(
    engine: SingleDeviceEngine,
    batch: Any,
    context: AttentionContext,
    settings: LoopSettings,
    num_eligible: int,
    num_micro_batches: int,
    num_masked_global: int | None = None,
    ar_weight: float = 0.0,
) -> tuple[torch.Tensor, dict[str, float]]:
    """The micro-batch's share of the loss, and what is logged of it.

    `eligible`: sum_i w_i CE_i / (eligible tokens of the global batch), so that any split into micro-batches gives one gradient.
    `masked`: the same over the targets of the global batch (num_masked_global; None: of this micro-batch, which is all of it).
    `masked_micro_batch`: each micro-batch divided by its own targets, then averaged, as DiffuLLaMA's released code does.
    In a block model under `shift` the first tokens of blocks are targets with weight 1 (streams.py). ar_weight: what the next-token
    loss on the clean copy, divided by the eligible tokens, is added with. `predicted`: tokens that went through the output matrix.
    """
    x_0_BL, x_t_BL, masked_BL, t_BL, positions_BL, segments_BL, starts_BL, eligible_BL, x_edit_BL = batch_to(
        engine.device, batch.x_0_BL, batch.x_t_BL, batch.masked_BL, batch.t_BL, batch.positions_BL, batch.segments_BL, batch.starts_BL,
        batch.eligible_BL, batch.x_edit_BL,
    )  # fmt: skip
    denoiser = engine.denoiser
    context = context.in_documents(segments_BL, positions_BL)
    x_0_N, mixture = x_0_BL[masked_BL], None
    if settings.corruption == "gidd":
        mixture, seen = gidd_mixture(settings, denoiser), (x_t_BL[masked_BL], x_0_N, t_BL[masked_BL])
        weights_N = gidd.training_weights(*seen, mixture, denoiser.mask_token_id, settings.weight)
    else:
        weights_N = token_weights(t_BL, masked_BL, settings.weight, segments_BL, settings.cart_p)
    num_targets = weights_N.numel() + (0 if starts_BL is None else int(starts_BL.sum()))
    if settings.normaliser == "masked_micro_batch":
        normaliser = float(max(1, num_targets) * num_micro_batches)
    elif settings.normaliser == "masked":
        normaliser = float(max(1, num_targets if num_masked_global is None else num_masked_global))
    else:
        normaliser = float(num_eligible)
    weights_N = weights_N / normaliser

    router_weight = balance_coefficient(denoiser.model) if settings.router_weight is None else settings.router_weight
    extras = Extras(balance_weight=router_weight / num_micro_batches)
    if router_weight:
        extras.real_BS = real_positions(segments_BL, eligible_BL, 2 if context.has_two_streams else 1)
    if batch.step < settings.embedding_noise_steps:
        masks_BL = masked_BL & (x_t_BL == denoiser.mask_token_id)
        extras.noise = embedding_noise(settings, batch.step, batch.row_ids, masks_BL)
        extras.noised_BS = torch.cat([masks_BL, torch.zeros_like(masks_BL)], dim=1) if context.has_two_streams else masks_BL
    if settings.alignment_weight or settings.teacher_kl:
        add_source(extras, settings, denoiser, x_0_BL, positions_BL, segments_BL, masked_BL, eligible_BL, weights_N, num_eligible)

    if context.has_two_streams:
        loss, sums = _two_stream_loss(
            engine, context, (x_0_BL, x_t_BL, positions_BL), (masked_BL, starts_BL, eligible_BL), weights_N, t_BL, normaliser,
            num_eligible, ar_weight, extras, mixture,
        )  # fmt: skip
    else:
        if mixture is not None:
            extras.score = gidd_score(mixture, x_0_N, *seen[::2], weights_N, denoiser.mask_token_id, denoiser.vocab_size)
        with engine.autocast():
            loss, values = denoiser(x_t_BL, masked_BL, positions_BL, context, weights_N, x_0_N, extras=extras)
        with torch.no_grad():
            if mixture is not None:
                divergence_N, ce_N = values
                elbo_N, is_mask_N = gidd.elbo_weights(*seen, mixture, denoiser.mask_token_id), seen[0] == denoiser.mask_token_id
            else:
                ce_N = divergence_N = values if values.ndim == 1 else values[0]
                elbo_N, is_mask_N = token_weights(t_BL, masked_BL, "elbo"), torch.ones_like(x_0_N, dtype=torch.bool)
            nelbo = denoising_loss(divergence_N, elbo_N, float(num_eligible))
            found = torch.stack([loss.detach(), nelbo, (ce_N * is_mask_N).sum(), is_mask_N.sum()]).tolist()
        sums = dict(zip(("loss", "nelbo", "ce_sum", "masked"), found, strict=True)) | {"predicted": float(x_0_N.numel())}
        if settings.teacher_kl:
            sums["teacher_kl"] = float(values[1].sum()) / num_eligible
    sums |= {name: float(value) for name, value in extras.found.items()}
    if router_weight:
        sums["router_balance"] /= num_micro_batches
    if x_edit_BL is None:
        return loss, sums
    # Edits (Seed Diffusion, arXiv 2508.02193): every token of a row with some wrong ones is asked for, the right ones too. A block model
    # reads edited blocks behind clean ones; first tokens that the clean copy predicts are never edited.
    asked_BL = eligible_BL if starts_BL is None else eligible_BL & ~starts_BL
    weights_N = torch.full((int(asked_BL.sum()),), 1 / num_eligible, device=engine.device)
    clean = (x_0_BL, torch.zeros_like(asked_BL)) if context.has_two_streams else ()
    with engine.autocast():
        edit_loss, _ = denoiser(x_edit_BL, asked_BL, positions_BL, context, weights_N, x_0_BL[asked_BL], *clean)
    sums["edit_loss"] = float(edit_loss.detach())
    return loss + edit_loss, sums | {"loss": sums["loss"] + sums["edit_loss"], "predicted": sums["predicted"] + weights_N.numel()}


def _two_stream_loss(
    engine: SingleDeviceEngine,
    context: AttentionContext,
    rows: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    targets: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor],
    weights_N: torch.Tensor,
    t_BL: torch.Tensor,
    normaliser: float,
    num_eligible: int,
    ar_weight: float,
    extras: Extras,
    mixture: gidd.Mixture | None,
) -> tuple[torch.Tensor, dict[str, float]]:
    """rows: x_0_BL, x_t_BL, positions_BL. targets: masked_BL, starts_BL, eligible_BL. weights_N: of the masked ones, normalised.
    mixture: of `gidd`, whose divergences take the place of CE in the noised copy.

    One forward and one head for both copies: the weights say what a prediction of the clean copy counts for.
    """
    (x_0_BL, x_t_BL, positions_BL), (masked_BL, starts_BL, eligible_BL) = rows, targets
    next_BL = eligible_BL & predictable(context.segments_BL if context.segments_BL is not None else torch.zeros_like(x_0_BL), "shift")
    starts_BL = torch.zeros_like(masked_BL) if starts_BL is None else starts_BL
    clean_BL = starts_BL | next_BL if ar_weight > 0 else starts_BL
    weights_BL = torch.zeros(x_0_BL.shape, dtype=weights_N.dtype, device=weights_N.device).masked_scatter(masked_BL, weights_N)
    clean_weights_BL = starts_BL.to(weights_N.dtype) / normaliser + next_BL * (ar_weight / num_eligible)
    chosen_BS = torch.cat([masked_BL, clean_BL], dim=1)
    weights_S, x_0_S = torch.cat([weights_BL, clean_weights_BL], dim=1)[chosen_BS], torch.cat([x_0_BL, x_0_BL], dim=1)[chosen_BS]
    mask_id, is_mask_BL, elbo_BL = engine.denoiser.mask_token_id, masked_BL, 1 / t_BL
    if mixture is not None:
        x_t_S, t_S = (torch.cat(pair, dim=1)[chosen_BS] for pair in ((x_t_BL, x_0_BL), (t_BL, torch.full_like(t_BL, 0.5))))
        noised_S = torch.cat([masked_BL, torch.zeros_like(masked_BL)], dim=1)[chosen_BS]
        extras.score = gidd_score(mixture, x_0_S, x_t_S, t_S, weights_S, mask_id, engine.denoiser.vocab_size, noised_S)
        is_mask_BL, elbo_BL = masked_BL & (x_t_BL == mask_id), gidd.elbo_weights(x_t_BL, x_0_BL, t_BL, mixture, mask_id)
    with engine.autocast():
        loss, values = engine.denoiser(x_t_BL, masked_BL, positions_BL, context, weights_S, x_0_S, x_0_BL, clean_BL, extras)
    with torch.no_grad():
        loss_N, ce_N = (values, values) if mixture is None else values
        (loss_BL, _), (ce_BL, clean_ce_BL) = (torch.zeros(chosen_BS.shape, device=x.device).masked_scatter(chosen_BS, x).chunk(2, dim=1) for x in (loss_N, ce_N))
        nelbo = ((loss_BL * elbo_BL).sum() + (clean_ce_BL * starts_BL).sum()) / num_eligible
        found = [loss.detach(), nelbo, (ce_BL * is_mask_BL).sum(), is_mask_BL.sum(), (clean_ce_BL * next_BL).sum() / num_eligible]
        *values, ar_nll = torch.stack(found).tolist()
    sums = dict(zip(("loss", "nelbo", "ce_sum", "masked"), values, strict=True)) | {"predicted": float(ce_N.numel())}
    return loss, sums | ({"ar_nll": ar_nll} if ar_weight > 0 else {})
