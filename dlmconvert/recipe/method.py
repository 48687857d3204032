"""The `method` section of a recipe: the four choices of a conversion. The docstring below a field is what users read."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dlmconvert.recipe.section import Section


class Attention(Section):
    """Which positions may see which, and the path there from causal attention."""

    pattern: Literal["bidirectional", "causal"] = "bidirectional"
    """The pattern at the end of training."""
    anneal: Literal["none", "random", "window"] = "none"
    """`none`: at once. `random`: a drawn share of the non-causal pairs is open, growing to all (arXiv 2410.17891). `window`: each position sees so many positions ahead, growing to the whole row."""
    anneal_steps: Annotated[float, Field(gt=0)] | None = None
    """Optimizer steps until everything is open; below 1 a fraction of the stage's steps."""


class Corruption(Section):
    """q(x_t given x_0)."""

    kind: Literal["masking", "none"] = "masking"
    """Each eligible token becomes the mask token with probability t; `none` leaves the row clean (the AR objective)."""
    eps: Annotated[float, Field(gt=0, lt=0.5)] = 1e-3
    """Lower end of the noise level t in [eps, 1]."""
    noise_levels: Literal["uniform", "stratified", "offset", "antithetic"] = "uniform"
    """One independent t a row, or spread over the global batch (lower variance, same mean): one a stratum, evenly spaced from one drawn `offset`, or rows 2j and 2j + 1 at opposite ends (`antithetic`)."""
    band: tuple[float, float] | None = None
    """[low, high] in place of [eps, 1], the weight kept (arXiv 2503.09573): no longer a bound. Validation uses the full range."""
    count: Literal["bernoulli", "at_least_one", "exact"] = "bernoulli"
    """How many tokens of a row of n are masked: each with probability t; the same but never none; or l, uniform on 1..n, in place of t (weight n/l, the lowest variance; `eps` is not used)."""
    views: Literal["single", "complementary"] = "single"
    """`complementary`: rows 2j and 2j + 1 of the global batch are one row of text, and what one masks the other shows (arXiv 2509.26328): each token is predicted once, from half as much text."""


class Objective(Section):
    """How denoising errors are weighed and summed."""

    weight: Literal["elbo", "unweighted", "cart"] = "elbo"
    """`elbo`: 1/t on masked tokens (arXiv 2406.07524); `unweighted`: 1; `cart`: by the distance to clean tokens (arXiv 2508.15487)."""
    cart_p: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Of `cart` only: 1 counts the two neighbours, smaller values look further."""
    normaliser: Literal["eligible", "masked", "masked_micro_batch"] = "eligible"
    """Divide the sum once by the global count of eligible tokens or of masked tokens, or, as DiffuLLaMA's code does, each micro-batch by its masked tokens."""


class Method(Section):
    """The four choices of a conversion. A `name` fills in the row of a published method; single keys override it."""

    name: str = "diffullama"
    """A row of `dlmconvert/methods.py`."""
    attention: Attention = Attention()
    alignment: Literal["shift", "in_place"] = "shift"
    """Which hidden state predicts token i: i-1, as the AR model did, or i."""
    corruption: Corruption = Corruption()
    objective: Objective = Objective()


def anneal_steps_of(attention: Attention, steps: int) -> int:
    """Annealing steps as a whole number: 1 (open at once) without annealing, fractions resolved against `steps`."""
    if attention.anneal == "none":
        return 1
    assert attention.anneal_steps is not None
    if attention.anneal_steps < 1:
        return max(1, round(attention.anneal_steps * steps))
    return int(attention.anneal_steps)
