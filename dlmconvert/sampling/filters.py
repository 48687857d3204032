"""Which tokens may be drawn: the ban, the repetition penalty, temperature, top-p, top-k. Removed tokens have logit -inf.

The ban comes before everything else: before temperature, filters, softmax and scores (an argmax of the mask token would leave a
position masked for ever, or put the mask token into the text). Then temperature, top-p, top-k, in this order (DiffuLLaMA
arXiv 2410.17891; Dream arXiv 2508.15487). The penalty changes the model's distribution itself, so the scores see it.

Shapes: B rows, L positions of the canvas, N positions judged, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

REMOVED = float("-inf")


def ban(logits_NV: torch.Tensor, mask_token_id: int, vocab_size: int, extra: Sequence[int] = ()) -> torch.Tensor:
    """float32 logits in which the mask token, the ids from `vocab_size` on and the ids in `extra` are impossible."""
    logits_NV = logits_NV.to(torch.float32, copy=True)
    logits_NV[:, vocab_size:] = REMOVED
    for token in (mask_token_id, *extra):
        if 0 <= token < logits_NV.shape[1]:
            logits_NV[:, token] = REMOVED
    return logits_NV


def penalise_repetition(
    logits_NV: torch.Tensor, flat_N: torch.Tensor, tokens_BL: torch.Tensor, visible_BL: torch.Tensor, penalty: float
) -> torch.Tensor:
    """Tokens that stand elsewhere in the row lose: logit / penalty where it is positive, logit * penalty where it is negative
    (CTRL, arXiv 1909.05858, equation 2, as in transformers). A token that is judged where it stands does not repeat itself.
    flat_N: the place of each logit in the flattened canvas. visible_BL: given or settled."""
    if penalty == 1:
        return logits_NV
    num_ids = logits_NV.shape[1]
    counts_BL = visible_BL.to(torch.int32)
    elsewhere_NV = count_tokens(tokens_BL, visible_BL, num_ids)[flat_N // tokens_BL.shape[1]]
    elsewhere_NV.scatter_add_(1, tokens_BL.clamp(max=num_ids - 1).flatten()[flat_N, None], -counts_BL.flatten()[flat_N, None])
    return penalise(logits_NV, elsewhere_NV > 0, penalty)


def count_tokens(tokens_BL: torch.Tensor, visible_BL: torch.Tensor, num_ids: int) -> torch.Tensor:
    """int32 (B, V): how often each id stands among the visible tokens of a row."""
    counts_BV = torch.zeros(tokens_BL.shape[0], num_ids, dtype=torch.int32, device=tokens_BL.device)
    return counts_BV.scatter_add_(1, tokens_BL.clamp(max=num_ids - 1), visible_BL.to(torch.int32))


def penalise(logits: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """logits (..., V) with those lowered that are `seen`: / penalty where positive, * penalty where negative."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_p(logits_NV: torch.Tensor, top_p: float) -> torch.Tensor:
    """Nucleus filter: keep each token whose more probable tokens together have probability at most `top_p`.

    So the token that crosses top_p is kept, and the most probable one always (Algorithm 2's filter, arXiv 2410.17891).
    """
    if top_p >= 1:
        return logits_NV
    sorted_NV, order_NV = torch.sort(logits_NV, dim=-1, descending=True, stable=True)
    mass_NV = torch.softmax(sorted_NV.to(torch.float32), dim=-1).cumsum(dim=-1)
    removed_NV = torch.zeros_like(mass_NV, dtype=torch.bool)
    removed_NV[:, 1:] = mass_NV[:, :-1] > top_p
    return logits_NV.masked_fill(torch.zeros_like(removed_NV).scatter(-1, order_NV, removed_NV), REMOVED)


def keep_top_k(logits_NV: torch.Tensor, top_k: int) -> torch.Tensor:
    """Keep the `top_k` largest logits, and what is equal to the last of them."""
    if top_k >= logits_NV.shape[1]:
        return logits_NV
    last_N1 = torch.topk(logits_NV, top_k, dim=-1).values[:, -1:]
    return logits_NV.masked_fill(logits_NV < last_N1, REMOVED)


def apply_filters(logits_NV: torch.Tensor, temperature: float, top_p: float | None, top_k: int | None) -> torch.Tensor:
    """Temperature (> 0), then top-p, then top-k, on banned logits."""
    logits_NV = logits_NV / temperature
    if top_p is not None:
        logits_NV = keep_top_p(logits_NV, top_p)
    if top_k is not None:
        logits_NV = keep_top_k(logits_NV, top_k)
    return logits_NV


def check_filters(temperature: float, top_p: float | None, top_k: int | None, repetition_penalty: float = 1.0) -> None:
    """Raises ValueError for values that have no meaning."""
    if not temperature >= 0:
        raise ValueError(f"temperature is {temperature}; it must be 0 (the most probable token) or positive")
    if 0 < temperature < 1e-6:
        raise ValueError(f"temperature is {temperature}; below 1e-6 float32 has no room for logits / temperature: use 0, the most probable token")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; it must lie in (0, 1]")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}; it must be at least 1")
    if not repetition_penalty > 0:
        raise ValueError(f"repetition_penalty is {repetition_penalty}; it must be positive, and 1 is none")
