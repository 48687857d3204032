"""The table of published methods: a row names its choice on each of the four axes. Plain data, no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class PublishedMethod:
    """One row. `choices` holds values of the recipe's `method` section; `departs` says where we differ from the paper, and why."""

    name: str
    paper: str
    summary: str
    choices: dict[str, Any] = field(default_factory=dict)
    departs: str = ""


METHODS = {
    row.name: row
    for row in (
        PublishedMethod(
            name="diffullama",
            paper="arXiv 2410.17891",
            summary="bidirectional attention annealed from causal at random pairs, shift, uniform-t masking, 1/t",
            choices={
                "attention": {"pattern": "bidirectional", "anneal": "random", "anneal_steps": 10_000},
                "alignment": "shift",
                "corruption": {"kind": "masking", "eps": 1e-3, "noise_levels": "uniform"},
                "objective": {"weight": "elbo", "normaliser": "eligible"},
            },
            departs=(
                "The sum is divided once by the global count of eligible tokens; the paper's code divides each micro-batch by its "
                "masked tokens on top of the weight 1/t (objective.normaliser=masked_micro_batch), which depends on the micro-batch size."
            ),
        ),
        PublishedMethod(
            name="ar",
            paper="the baseline of every paper",
            summary="causal attention, next-token cross-entropy on the same rows",
            choices={
                "attention": {"pattern": "causal", "anneal": "none"},
                "alignment": "shift",
                "corruption": {"kind": "none"},
                "objective": {"weight": "unweighted", "normaliser": "eligible"},
            },
        ),
    )
}
