"""The terms of a loss beyond the weighted cross-entropy: GIDD's divergences, the frozen source, balanced experts, noisy mask embeddings.

Shapes: B rows, L tokens, N targets, C targets of a chunk, V rows of the output matrix, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dlmconvert.backbone.extras import Extras
from dlmconvert.diffusion import gidd
from dlmconvert.diffusion.alignment import predictable, predicting_positions
from dlmconvert.diffusion.fused_head import Score
from dlmconvert.diffusion.objective import cross_entropy, source_divergence
from dlmconvert.diffusion.randomness import EMBEDDING_NOISE, counter_normal


def gidd_mixture(settings: Any, denoiser: Any) -> gidd.Mixture:
    """The mixture of masks and random tokens of a stage."""
    in_text = 0 <= denoiser.mask_token_id < denoiser.vocab_size
    return gidd.Mixture(settings.uniform_share, denoiser.vocab_size - in_text)


def gidd_score(
    mixture: gidd.Mixture, x_0_N: torch.Tensor, x_t_N: torch.Tensor, t_N: torch.Tensor, weights_N: torch.Tensor, mask_token_id: int, vocab_size: int,
    noised_N: torch.Tensor | None = None,
) -> Score:  # fmt: skip
    """sum_i w_i (KL_i + IS_i); values: (KL + IS, CE). noised_N: which targets are noised tokens (None: all); the others are next tokens of a
    clean copy, sum_i w_i CE_i as everywhere else, the mask in the softmax; values: CE twice."""

    def score(logits_CV: torch.Tensor, chunk: slice) -> tuple[torch.Tensor, torch.Tensor]:
        kl_C, is_C, ce_C = gidd.divergences(logits_CV, x_0_N[chunk], x_t_N[chunk], t_N[chunk], mixture, mask_token_id, vocab_size)
        loss_C = kl_C + is_C
        if noised_N is not None:
            next_C = cross_entropy(logits_CV, x_0_N[chunk])
            loss_C, ce_C = (torch.where(noised_N[chunk], of_noised_C, next_C) for of_noised_C in (loss_C, ce_C))
        return (weights_N[chunk] * loss_C).sum(), torch.stack([loss_C, ce_C])

    return score


def taught_score(x_0_N: torch.Tensor, weights_N: torch.Tensor, source_logits: Any, rank_N: torch.Tensor, kl_weight: float) -> Score:
    """sum_i w_i CE_i + kl_weight sum_i KL(p_source || p); values: (CE, KL).

    rank_N: the place of each target among those that the source predicts, -1 where it predicts none (their KL is 0).
    """

    def score(logits_CV: torch.Tensor, chunk: slice) -> tuple[torch.Tensor, torch.Tensor]:
        ce_C = cross_entropy(logits_CV, x_0_N[chunk])
        known_C = rank_N[chunk] >= 0
        kl_C = torch.zeros_like(ce_C)
        if bool(known_C.any()):
            ranks = rank_N[chunk][known_C]  # ascending and without gaps
            part = source_logits(slice(int(ranks[0]), int(ranks[-1]) + 1))
            kl_C = kl_C.masked_scatter(known_C, source_divergence(logits_CV[known_C], part))
        return (weights_N[chunk] * ce_C).sum() + kl_weight * kl_C.sum(), torch.stack([ce_C, kl_C])

    return score


def add_source(
    extras: Extras, settings: Any, denoiser: Any, x_0_BL: torch.Tensor, positions_BL: torch.Tensor, segments_BL: torch.Tensor | None,
    masked_BL: torch.Tensor, eligible_BL: torch.Tensor, weights_N: torch.Tensor, num_eligible: int,
) -> None:  # fmt: skip
    """What is compared with the frozen source, both divided by the global count of eligible tokens.

    Hidden states: those that predict eligible tokens. Predictions: of masked tokens that the source predicts from the state before.
    """
    if settings.alignment_weight:
        at_BL = predicting_positions(eligible_BL, denoiser.alignment)
        extras.aligned_KND, _ = denoiser.teacher.look(x_0_BL, positions_BL, segments_BL, at_BL, layers=True)
        extras.aligned_at_BS, extras.alignment_weight, extras.alignment_normaliser = at_BL, settings.alignment_weight, num_eligible
    if settings.teacher_kl:
        known_BL = masked_BL & predictable(torch.zeros_like(x_0_BL) if segments_BL is None else segments_BL, "shift")
        _, logits = denoiser.teacher.look(x_0_BL, positions_BL, segments_BL, predicting_positions(known_BL, "shift"), layers=False)
        known_N = known_BL[masked_BL]
        rank_N = torch.where(known_N, known_N.cumsum(0) - 1, -1)
        extras.score = taught_score(x_0_BL[masked_BL], weights_N, logits, rank_N, settings.teacher_kl / num_eligible)


def embedding_noise(settings: Any, step: int, row_ids: Any, masked_BL: torch.Tensor) -> Callable[[int], torch.Tensor]:
    """width -> noise_ND on the masks: Gaussian, keyed by (seed, step, row, position, dimension)."""
    rows_BK = torch.as_tensor(row_ids, device=masked_BL.device).reshape(masked_BL.shape[0], -1)
    row_N, position_N = masked_BL.nonzero(as_tuple=True)
    keys = [*rows_BK[row_N].unbind(1), position_N]

    def draw(width: int) -> torch.Tensor:
        dimensions_D = torch.arange(width, device=masked_BL.device)
        noise_ND = counter_normal(EMBEDDING_NOISE, settings.seed, step, *(key_N[:, None] for key_N in keys), dimensions_D)
        return settings.embedding_noise * noise_ND.float()

    return draw


def real_positions(segments_BL: torch.Tensor | None, eligible_BL: torch.Tensor, streams: int) -> torch.Tensor | None:
    """bool (B, S): what is no padding, that is, stands in a document with anything to predict; None where all rows are one document."""
    if segments_BL is None:
        return None
    counts_BG = torch.zeros((segments_BL.shape[0], int(segments_BL.max()) + 1), dtype=torch.int64, device=segments_BL.device)
    counts_BG.scatter_add_(1, segments_BL, eligible_BL.long())
    return torch.cat([counts_BG.gather(1, segments_BL) > 0] * streams, dim=1)
