"""The table of published methods: a row names its choice on each of the four axes. Plain data, no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class PublishedMethod:
    """One row.

    choices: values of the recipe's `method` section. departs: where we differ from the paper, and why. unverified: what the paper
    or its code leaves open, so that the row is our reading.
    """

    name: str
    paper: str
    summary: str
    choices: dict[str, Any] = field(default_factory=dict)
    departs: str = ""
    unverified: str = ""


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
            name="dream",
            paper="arXiv 2508.15487",
            summary="bidirectional attention at once, shift, masking at evenly spaced t, CART weights",
            choices={
                "attention": {"pattern": "bidirectional", "anneal": "none"},
                "alignment": "shift",
                "corruption": {"kind": "masking", "eps": 1e-3, "noise_levels": "offset"},
                "objective": {"weight": "cart", "cart_p": 0.1, "normaliser": "masked"},
            },
            departs=(
                "The sum is divided by the masked tokens of the global batch, the code's by those of each rank, which depends on the "
                "number of ranks. Only tokens of the same document count as clean context, and no padding does (the code counts both). "
                "Position 0 is never a target; the code scores it with its own hidden state."
            ),
            unverified=(
                "That attention is bidirectional from the first step; p of pretraining (0.1 is the shipped configuration of Dream-Coder, "
                "its function's default is 0.8); how t was spread over the batch in pretraining."
            ),
        ),
        PublishedMethod(
            name="llada",
            paper="arXiv 2502.09992",
            summary="bidirectional attention at once, in place, uniform-t masking, 1/t",
            choices={
                "attention": {"pattern": "bidirectional", "anneal": "none"},
                "alignment": "in_place",
                "corruption": {"kind": "masking", "eps": 1e-3, "noise_levels": "uniform"},
                "objective": {"weight": "elbo", "normaliser": "eligible"},
            },
            departs=(
                "The paper trains from random weights; here its objective starts from an AR checkpoint. One row in a hundred is cut to a "
                "random length there, none here (documents mixed in a row have all lengths, and LLaDA2.0 gained more from document masks). In fine-tuning "
                "the paper divides each row by its answer's length, which gives tokens of short answers more weight; here all tokens count alike."
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
