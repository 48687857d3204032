"""Which masked positions are committed first: a score for each, high = first.

All scores come from the model's own distribution p = softmax(logits) at temperature 1, over the allowed tokens, BEFORE temperature,
top-p and top-k, as in LLaDA (arXiv 2502.09992). Dream (arXiv 2508.15487) scores after its filters; the two agree at temperature 0
without filters. Only the candidate token x_hat is drawn with temperature and filters.

| order | score | reads |
| random | -u, one uniform draw a position and step | nothing |
| first_hitting | tau, one uniform draw a position: the time at which it is revealed | nothing |
| left_to_right | minus the position | nothing |
| confidence | p(x_hat) | the candidate token |
| entropy | sum_v p_v log p_v = -H | the distribution |
| margin | p_1 - p_2, the two most probable tokens | the distribution |

Orders that read nothing are known before the forward: with a counted budget the model is then asked for the chosen positions only.

First-hitting (arXiv 2409.02908): under the linear schedule the time at which a masked token is revealed, t running from 1 to 0, is
uniform, so the n times sorted from late to early have the law t <- t u^{1/n}, n <- n - 1, and one token an event is the sampler
with infinitely many steps, in n forwards.

Shapes: B rows, L positions of the canvas, N masked positions, V vocabulary.
"""

from __future__ import annotations

import torch

from ..diffusion.randomness import SAMPLE_ORDER, counter_uniform

ORDERS = ("random", "confidence", "entropy", "margin", "left_to_right", "first_hitting")
BLIND_ORDERS = ("random", "left_to_right", "first_hitting")

_EVENT_TIMES = -1  # stands where the other draws have their step


def event_times(seed: int, keys_BL: torch.Tensor, positions_BL: torch.Tensor) -> torch.Tensor:
    """tau_BL in [0, 1): the time at which each position is revealed, the same at every step."""
    return counter_uniform(SAMPLE_ORDER, seed, keys_BL, _EVENT_TIMES, positions_BL)


def blind_scores(order: str, u_BL: torch.Tensor | None, seed: int, keys_BL: torch.Tensor, positions_BL: torch.Tensor) -> torch.Tensor | None:
    """scores_BL of an order that reads nothing; None for the others. u_BL: this step's uniform draws, for `random`."""
    if order == "random":
        assert u_BL is not None
        return -u_BL
    if order == "first_hitting":
        return event_times(seed, keys_BL, positions_BL)
    return -positions_BL.to(torch.float32) if order == "left_to_right" else None


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


def ranked(scores_BL: torch.Tensor, candidates_BL: torch.Tensor) -> torch.Tensor:
    """columns_BL: the columns of each row, candidates by falling score and ties from left to right, then the rest."""
    scores_BL = scores_BL.masked_fill(~candidates_BL, float("-inf"))
    return torch.sort(scores_BL, dim=1, descending=True, stable=True).indices


def best(scores_BL: torch.Tensor, candidates_BL: torch.Tensor, count_B: torch.Tensor) -> torch.Tensor:
    """bool (B, L): in each row the `count_B` candidates with the highest scores, exactly that many.

    Equal scores are taken from left to right, so ties commit nothing extra. A row with fewer candidates gives all of them.
    """
    return first_of(ranked(scores_BL, candidates_BL), candidates_BL, count_B)


def first_of(order_BL: torch.Tensor, candidates_BL: torch.Tensor, count_B: torch.Tensor) -> torch.Tensor:
    """The same from the columns in their order (`ranked`)."""
    places_BL = torch.arange(order_BL.shape[1], device=order_BL.device).expand_as(order_BL)
    rank_BL = torch.empty_like(order_BL).scatter(1, order_BL, places_BL)
    return (rank_BL < count_B[:, None]) & candidates_BL
