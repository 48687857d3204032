"""One token a position: the argmax, or a categorical draw by Gumbel noise.

    x_hat = argmax_v (logit_v / temperature + g_v),   g_v = -log(-log u_v)

is a draw from softmax(logit / temperature). The noise is double precision: float32 noise truncates the tail and acts like a lower
temperature (arXiv 2409.02908). g_v is a pure function of (seed, row key, step, position, v), so a row draws the same alone and in
a batch, on every device.

Shapes: N masked positions, V vocabulary, K the tokens that the filters leave, over all N.
"""

from __future__ import annotations

import torch

from ..diffusion.randomness import SAMPLE_TOKEN, counter_gumbel
from .filters import REMOVED, apply_filters
from .transfer import waits_for_counts

_TOKENS_AT_ONCE = 1 << 22  # of the N x V noise; bounds the memory that 64-bit keys and noise take


def draw_tokens(
    logits_NV: torch.Tensor,
    row_keys_N: torch.Tensor,
    positions_N: torch.Tensor,
    *,
    temperature: float,
    top_p: float | None,
    top_k: int | None,
    seed: int,
    step: int | torch.Tensor,
) -> torch.Tensor:
    """x_hat_N from banned logits. Temperature 0 is the argmax, for which filters change nothing. step: of all of them, or of each (N)."""
    if temperature == 0:
        return logits_NV.argmax(dim=-1)
    rows_at_once = max(1, _TOKENS_AT_ONCE // logits_NV.shape[1])
    parts = []
    for start in range(0, logits_NV.shape[0], rows_at_once):
        part = slice(start, start + rows_at_once)
        kept_NV = apply_filters(logits_NV[part], temperature, top_p, top_k)
        parts.append(_gumbel_argmax(kept_NV, row_keys_N[part], positions_N[part], seed, step if isinstance(step, int) else step[part]))
    return torch.cat(parts) if parts else logits_NV.new_zeros(0, dtype=torch.int64)


def _gumbel_argmax(kept_NV: torch.Tensor, row_keys_N: torch.Tensor, positions_N: torch.Tensor, seed: int, step: int | torch.Tensor) -> torch.Tensor:
    of_each = not isinstance(step, int)
    if waits_for_counts(kept_NV.device):
        ids_V = torch.arange(kept_NV.shape[1], device=kept_NV.device)
        noise_NV = counter_gumbel(SAMPLE_TOKEN, seed, row_keys_N[:, None], step[:, None] if of_each else step, positions_N[:, None], ids_V)
        return (kept_NV.to(noise_NV.dtype) + noise_NV).argmax(dim=-1)  # what was removed stays minus infinity
    # Only the tokens that are left get noise: after top-p that is a small share of the vocabulary.
    rows_K, ids_K = torch.nonzero(kept_NV > REMOVED, as_tuple=True)
    noise_K = counter_gumbel(SAMPLE_TOKEN, seed, row_keys_N[rows_K], step[rows_K] if of_each else step, positions_N[rows_K], ids_K)
    noisy_NV = torch.full(kept_NV.shape, REMOVED, dtype=noise_K.dtype, device=kept_NV.device)
    noisy_NV[rows_K, ids_K] = kept_NV[rows_K, ids_K].to(noise_K.dtype) + noise_K
    return noisy_NV.argmax(dim=-1)
