"""Which masked positions are committed first: a score for each, high = first.

All scores come from the model's own distribution p = softmax(logits) at temperature 1, over the allowed tokens, BEFORE temperature,
top-p and top-k, as in LLaDA (arXiv 2502.09992). Dream (arXiv 2508.15487) scores after its filters; the two agree at temperature 0
without filters. Only the candidate token x_hat is drawn with temperature and filters.

| order | score | reads |
| random | -u, one uniform draw a position | nothing: chosen before the forward, which is then asked for the chosen positions only |
| confidence | p(x_hat) | the candidate token |
| entropy | sum_v p_v log p_v = -H | the distribution |
| margin | p_1 - p_2, the two most probable tokens | the distribution |

Shapes: B rows, L positions of the canvas, N masked positions, V vocabulary.
"""

from __future__ import annotations

import torch

ORDERS = ("random", "confidence", "entropy", "margin")


def confidence(log_p_NV: torch.Tensor, x_hat_N: torch.Tensor) -> torch.Tensor:
    """p(x_hat), in [0, 1]."""
    return log_p_NV.gather(-1, x_hat_N[:, None])[:, 0].exp()


def negative_entropy(log_p_NV: torch.Tensor) -> torch.Tensor:
    """sum_v p_v log p_v in nats, with 0 log 0 = 0."""
    return (log_p_NV.exp() * log_p_NV.clamp(min=torch.finfo(log_p_NV.dtype).min)).sum(dim=-1)


def margin(log_p_NV: torch.Tensor) -> torch.Tensor:
    """p_1 - p_2, in [0, 1]."""
    top_N2 = torch.topk(log_p_NV, 2, dim=-1).values.exp()
    return top_N2[:, 0] - top_N2[:, 1]


def best(scores_BL: torch.Tensor, candidates_BL: torch.Tensor, count_B: torch.Tensor) -> torch.Tensor:
    """bool (B, L): in each row the `count_B` candidates with the highest scores, exactly that many.

    Equal scores are taken from left to right, so ties commit nothing extra. A row with fewer candidates gives all of them.
    """
    scores_BL = scores_BL.masked_fill(~candidates_BL, float("-inf"))
    order_BL = torch.sort(scores_BL, dim=1, descending=True, stable=True).indices
    places_BL = torch.arange(scores_BL.shape[1], device=scores_BL.device).expand_as(order_BL)
    rank_BL = torch.empty_like(order_BL).scatter(1, order_BL, places_BL)
    return (rank_BL < count_B[:, None]) & candidates_BL
