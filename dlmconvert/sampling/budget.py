"""How many positions are committed at a step, for each row by itself, and never from a mean over the batch.

Counted budgets know it before the forward. n: masked positions of the block when it began; step j = 0 .. S-1 of its S steps.

| budget | positions at step j | source |
| even | floor(n (j+1) / S) - floor(n j / S): sums to n, never 0 while S <= n | |
| ancestral | each masked one with probability 1 - s/t = 1/(S-j) on the grid t = (S-j)/S -> s = (S-j-1)/S | DiffuLLaMA, Algorithm 2 (2410.17891) |
| bernoulli | each masked one with probability 1 - s/t on linspace(1, eps, S+1), the last step all | Dream's `origin` (2508.15487) |
| dream | floor(n_left (1 - s/t)) on the same grid, the last step all: rounds down, so S = n commits 0 first and 2 last | Dream's other algorithms |
| llada | floor(n / S), the remainder one each to the first steps | LLaDA (2502.09992) |

In `ancestral` and `bernoulli` the count is #{i masked: u_i < p}; the `random` order scores with -u from the same draws, so the
positions that it commits are exactly those with u_i < p. With S > n some steps commit nothing and cost no forward.

Reading budgets look at the predictions: they decide how far down the order (best first) a step goes, and always take the first one.

| budget | the longest prefix of the order in which | source |
| threshold tau | every confidence c = p(x_hat) >= tau | Fast-dLLM, Algorithm 1 (2505.22618) |
| factor f | (k+1) (1 - min c) < f, k the length of the prefix | Fast-dLLM, section 3.3 (the paper; the released code takes one more when only the last one fails) |
| entropy_bound gamma | sum H - max H <= gamma, in nats | EB-Sampler, equation 2 (2505.24857) |

In `confidence` order the first two are the published rules: all c >= tau, and the largest k with (k+1)(1 - c_(k)) < f.
A step of a reading budget commits at least what keeps it from falling behind `even` over the same S (`least`): so S bounds the
forwards, and S = n, the default, bounds nothing (SDAR's dynamic rule, 2510.06303).

Shapes: B rows, L positions of the canvas.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from .transfer import double


class Plan(NamedTuple):
    """What a counted budget knows. masked_BL: masked positions of each row's block. num_masked_B: how many they were when the block
    began. step_B: steps since then. num_steps_B: steps of the block. u_BL: a uniform draw for each position and step, None where
    neither order nor budget reads it. eps: the end of Dream's grid."""

    masked_BL: torch.Tensor
    num_masked_B: torch.Tensor
    step_B: torch.Tensor
    num_steps_B: torch.Tensor
    u_BL: torch.Tensor | None
    eps: float = 1e-3

    @property
    def left_B(self) -> torch.Tensor:
        return self.masked_BL.sum(dim=1)


def even(plan: Plan) -> torch.Tensor:
    """count_B: the same share at every step."""
    n_B, j_B, S_B = plan.num_masked_B, plan.step_B, plan.num_steps_B
    return _last_takes_all(plan, torch.minimum(n_B * (j_B + 1) // S_B - n_B * j_B // S_B, plan.left_B))


def ancestral(plan: Plan) -> torch.Tensor:
    """count_B: as many as draws fall below 1/(S-j)."""
    p_B = 1 / (plan.num_steps_B - plan.step_B).clamp(min=1).to(plan.u_BL.dtype)
    return ((plan.u_BL < p_B[:, None]) & plan.masked_BL).sum(dim=1)


def grid_probability(plan: Plan) -> torch.Tensor:
    """p_B = 1 - s/t on t_j = linspace(1, eps, S+1)_j, and 1 at the last step."""
    j_B = double(plan.step_B)
    t_B, s_B = (1 - (1 - plan.eps) * i_B / plan.num_steps_B for i_B in (j_B, j_B + 1))
    return torch.where(plan.step_B + 1 >= plan.num_steps_B, 1.0, 1 - s_B / t_B)


def bernoulli(plan: Plan) -> torch.Tensor:
    """count_B: as many as draws fall below 1 - s/t."""
    return ((plan.u_BL < grid_probability(plan)[:, None]) & plan.masked_BL).sum(dim=1)


def dream(plan: Plan) -> torch.Tensor:
    """count_B: 1 - s/t of what is left, rounded down."""
    return (plan.left_B * grid_probability(plan)).to(torch.int64)


def llada(plan: Plan) -> torch.Tensor:
    """count_B: n // S, and one more at the first n % S steps."""
    n_B, S_B = plan.num_masked_B, plan.num_steps_B
    return _last_takes_all(plan, torch.minimum(n_B // S_B + (plan.step_B < n_B % S_B).to(n_B.dtype), plan.left_B))


def least(plan: Plan) -> torch.Tensor:
    """count_B of a reading budget at least: one, and enough to have committed floor(n (j+1) / S) after this step."""
    done_B = plan.num_masked_B - plan.left_B
    due_B = plan.num_masked_B * (plan.step_B + 1) // plan.num_steps_B - done_B
    return _last_takes_all(plan, torch.minimum(due_B.clamp(min=1), plan.left_B))


def _last_takes_all(plan: Plan, count_B: torch.Tensor) -> torch.Tensor:
    return torch.where(plan.step_B + 1 >= plan.num_steps_B, plan.left_B, count_B)


# Reading budgets: (values of the candidates, best first, the rest filled with what no prefix reaches; bound) -> length of the prefix.


def threshold(confidence_BL: torch.Tensor, tau: float) -> torch.Tensor:
    """count_B, 0 when the first one is below tau. Fill: -inf."""
    return (confidence_BL >= tau).to(torch.int64).cumprod(dim=1).sum(dim=1)


def factor(confidence_BL: torch.Tensor, f: float) -> torch.Tensor:
    """count_B: (k+1)(1 - min of the first k) never decreases with k, so counting is enough. Fill: -inf."""
    after_L = torch.arange(2, confidence_BL.shape[1] + 2, device=confidence_BL.device)
    return (after_L * (1 - confidence_BL.cummin(dim=1).values) < f).sum(dim=1)


def entropy_bound(entropy_BL: torch.Tensor, gamma: float) -> torch.Tensor:
    """count_B: cumsum - cummax, both along the sequence axis, never decreases. Fill: inf."""
    entropy_BL = double(entropy_BL)
    return (entropy_BL.cumsum(dim=1) - entropy_BL.cummax(dim=1).values <= gamma).sum(dim=1)


BUDGETS: dict[str, Callable[[Plan], torch.Tensor]] = {
    "even": even,
    "ancestral": ancestral,
    "bernoulli": bernoulli,
    "dream": dream,
    "llada": llada,
}


READS_U = frozenset({ancestral, bernoulli})


class Reading(NamedTuple):
    """A reading budget. fill: of positions that are no candidates. reads_candidate: it needs the drawn token."""

    count: Callable[[torch.Tensor, float], torch.Tensor]
    fill: float
    reads_candidate: bool


READING = {
    "threshold": Reading(threshold, float("-inf"), True),
    "factor": Reading(factor, float("-inf"), True),
    "entropy_bound": Reading(entropy_bound, float("inf"), False),
}


def default_budget(order: str) -> str:
    """`random` order is the ancestral sampler; the other orders spread their positions evenly."""
    return "ancestral" if order == "random" else "even"


def check_budget(budget: str | None, bounds: dict[str, float | None]) -> tuple[str | None, tuple[str, float] | None]:
    """(name of a counted budget or None, (name, bound) of a reading budget or None). Raises ValueError for two, and for no meaning."""
    given = [(name, value) for name, value in bounds.items() if value is not None]
    named = ([] if budget is None else [("budget", budget)]) + given
    if len(named) > 1:
        raise ValueError(f"{named[0][0]} and {named[1][0]} both say how many tokens a step commits; give one of them")
    if budget is not None and budget not in BUDGETS:
        raise ValueError(f"unknown budget {budget!r}; valid: {', '.join(BUDGETS)}, or one of the options {', '.join(READING)}")
    for name, value in given:
        if not value >= 0:
            raise ValueError(f"{name} is {value}; it must be 0 or positive")
    return budget, given[0] if given else None
