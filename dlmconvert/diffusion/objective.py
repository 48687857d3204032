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


def token_weights(t_B: torch.Tensor, masked_BL: torch.Tensor, weight: str) -> torch.Tensor:
    """w_N of each masked token.

    `elbo`: -alpha'_t / (1 - alpha_t) = 1/t for the linear schedule (MDLM, arXiv 2406.07524; DiffuLLaMA, arXiv 2410.17891).
    `unweighted`: 1.
    """
    if weight == "unweighted":
        return torch.ones(int(masked_BL.sum()), dtype=t_B.dtype, device=masked_BL.device)
    assert weight == "elbo", weight
    return (1 / t_B)[:, None].expand(masked_BL.shape)[masked_BL]


def denoising_loss(ce_N: torch.Tensor, weights_N: torch.Tensor, normaliser: float) -> torch.Tensor:
    """sum_i w_i CE_i / normaliser; a sum over nothing is 0, never NaN.

    normaliser: the global count of eligible tokens (over ranks and accumulation), so that 1x8, 8x1 and 2 ranks x 4 give one
    gradient; or a published form's own count.
    """
    return (weights_N * ce_N).sum() / normaliser
