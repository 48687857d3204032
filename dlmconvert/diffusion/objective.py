"""The denoising loss: weights on masked tokens, summed, divided once.

Shapes: B rows, L tokens a row, N targets (the masked positions of the batch in row-major order), V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def cross_entropy(logits_NV: torch.Tensor, x_0_N: torch.Tensor) -> torch.Tensor:
    """CE_N = -log p(x_0) in nats, float32 whatever the logits are. The mask token stays in the softmax: the model learns that it
    is improbable, so runtimes that do not ban it work too."""
    return F.cross_entropy(logits_NV.float(), x_0_N, reduction="none")


def token_weights(
    t_BL: torch.Tensor, masked_BL: torch.Tensor, weight: str, segments_BL: torch.Tensor | None = None, cart_p: float = 0.1
) -> torch.Tensor:
    """w_N of each masked token.

    t_BL: the noise level that each token was masked at.
    `elbo`: -alpha'_t / (1 - alpha_t) = 1/t for the linear schedule (MDLM, arXiv 2406.07524; DiffuLLaMA, arXiv 2410.17891).
    `unweighted`: 1.
    `cart`: by how near the clean context is, see `cart_weights` (Dream, arXiv 2508.15487).
    segments_BL, cart_p: for `cart` only.
    """
    if weight == "unweighted":
        return torch.ones(int(masked_BL.sum()), dtype=t_BL.dtype, device=masked_BL.device)
    if weight == "cart":
        return cart_weights(masked_BL, cart_p, segments_BL)[masked_BL].to(t_BL.dtype)
    assert weight == "elbo", weight
    return 1 / t_BL[masked_BL]


def cart_weights(masked_BL: torch.Tensor, p: float, segments_BL: torch.Tensor | None = None) -> torch.Tensor:
    """w_BL = 1/2 sum over clean j != i of p (1 - p)^(|i - j| - 1) for masked i, 0 for clean i; it takes the place of 1/t.

    A token in the middle of clean ones weighs 1, a fully masked row nothing; a smaller p looks further (Dream, arXiv 2508.15487).
    At p = 1 only the two neighbours count: half the number of clean ones, the limit of the formula (released code gives NaN there).
    segments_BL: document number of each position. Tokens of other documents cannot be seen, and padding is a document of its own:
    neither counts as clean context (in released code both do). None: all positions of a row belong together.
    """
    length, device = masked_BL.shape[1], masked_BL.device
    dtype = torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    positions_L = torch.arange(length, device=device)
    distance_LL = (positions_L[:, None] - positions_L[None, :]).abs()
    kernel_LL = 0.5 * p * torch.tensor(1.0 - p, dtype=dtype, device=device) ** (distance_LL - 1).clamp(min=0)
    kernel_LL = kernel_LL.masked_fill(distance_LL == 0, 0.0)
    clean_BL = (~masked_BL).to(dtype)
    if segments_BL is None:
        weights_BL = clean_BL @ kernel_LL
    else:  # row by row: a (B, L, L) tensor would be most of the memory of a long row
        rows = zip(clean_BL, segments_BL, strict=True)
        weights_BL = torch.stack([(kernel_LL * (segments_L[:, None] == segments_L)) @ clean_L for clean_L, segments_L in rows])
    return weights_BL * masked_BL


def source_divergence(logits_CV: torch.Tensor, source_logits_CV: torch.Tensor) -> torch.Tensor:
    """KL_C(p_source || p), nats: how far a prediction is from the frozen source's own next-token prediction of the same token.

    Zero gradient where both agree; the forward direction covers all that the source thinks possible (as in distillation, arXiv 1503.02531).
    """
    log_p_CV, log_q_CV = torch.log_softmax(source_logits_CV, dim=1), torch.log_softmax(logits_CV, dim=1)
    return (log_p_CV.exp() * (log_p_CV - log_q_CV)).sum(1)


def denoising_loss(ce_N: torch.Tensor, weights_N: torch.Tensor, normaliser: float) -> torch.Tensor:
    """sum_i w_i CE_i / normaliser; a sum over nothing is 0, never NaN.

    normaliser: the global count of eligible tokens (over ranks and accumulation), so that 1x8, 8x1 and 2 ranks x 4 give one
    gradient; or the global count of masked tokens; or a published form's own count.
    """
    return (weights_N * ce_N).sum() / normaliser
