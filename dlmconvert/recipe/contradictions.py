"""Choices of a method that cannot both be meant, each refused with the reason."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dlmconvert.recipe.method import Attention, Corruption
    from dlmconvert.recipe.schema import Recipe


def method_contradictions(recipe: Recipe):
    """Of the four choices: sentences that begin with the key. No semicolons: they separate the sentences of a list."""
    attention, corruption, objective = recipe.method.attention, recipe.method.corruption, recipe.method.objective
    yield from _annealing_contradictions(attention, recipe.train.steps)
    if attention.pattern == "causal" and corruption.kind != "none":
        yield "method.attention.pattern=causal is the AR objective: it needs method.corruption.kind=none (method.name=ar)"
    if attention.pattern == "bidirectional" and corruption.kind == "none":
        yield "method.corruption.kind=none shows the answer to a bidirectional model: it needs method.attention.pattern=causal"
    if corruption.kind == "none" and recipe.method.alignment != "shift":
        yield "method.corruption.kind=none with method.alignment=in_place asks each token for itself: use alignment=shift"
    if corruption.kind == "none" and objective.weight == "elbo":
        yield "method.objective.weight=elbo weighs by noise level, and method.corruption.kind=none has none: use unweighted"
    if corruption.kind == "none" and objective.weight == "cart":
        yield "method.objective.weight=cart weighs masked tokens, and method.corruption.kind=none has none: use unweighted"
    if corruption.kind == "none":
        for name, default in (("band", None), ("count", "bernoulli"), ("views", "single")):
            if getattr(corruption, name) != default:
                yield f"method.corruption.{name} says how tokens are masked, and method.corruption.kind=none masks none: leave it out"
    yield from _corruption_contradictions(corruption)
    if corruption.views == "complementary":
        for section, values in (("train", recipe.train), ("sft", recipe.sft)):
            if values.rows_per_step % 2:
                yield f"method.corruption.views=complementary takes rows in pairs: {section}.rows_per_step={values.rows_per_step} is odd"
    if objective.weight == "elbo" and objective.normaliser == "masked":
        yield (
            "method.objective.weight=elbo with method.objective.normaliser=masked corrects twice for how much is masked (about twice the "
            "bound): use normaliser=eligible, or weight=unweighted, or the published form, normaliser=masked_micro_batch"
        )


def _annealing_contradictions(attention: Attention, steps: int):
    anneal_steps = attention.anneal_steps
    if attention.anneal == "none":
        if anneal_steps is not None:
            yield "method.attention.anneal_steps is set but method.attention.anneal=none: set anneal=random, or leave anneal_steps out"
        return
    if anneal_steps is None:
        yield f"method.attention.anneal={attention.anneal} needs method.attention.anneal_steps (steps, or a fraction of train.steps)"
    elif anneal_steps >= 1 and anneal_steps != int(anneal_steps):
        yield f"method.attention.anneal_steps={anneal_steps} is neither a whole number of steps nor a fraction below 1"
    elif anneal_steps > steps:
        yield (
            f"method.attention.anneal_steps={anneal_steps:g} leaves no step of train.steps={steps} fully bidirectional: "
            "lower it, or give a fraction such as 0.5"
        )
    if attention.pattern == "causal":
        yield "method.attention.anneal leads away from causal attention: it contradicts method.attention.pattern=causal"


def _corruption_contradictions(corruption: Corruption):
    band = corruption.band
    if band is not None and not 0 < band[0] <= band[1] <= 1:
        yield f"method.corruption.band={list(band)} is not 0 < low <= high <= 1 (the weight is 1/t)"
    if corruption.views != "complementary":
        return
    if corruption.count != "bernoulli":
        yield (
            f"method.corruption.count={corruption.count} holds for one view only (the complement of l tokens of n has n - l, and may be "
            "empty): with views=complementary use count=bernoulli"
        )
    if corruption.noise_levels == "antithetic":
        yield "method.corruption.views=complementary is at t and 1 - t already: noise_levels=antithetic would pair the pairs, use uniform, stratified or offset"
    if band is not None and abs(band[0] + band[1] - 1) > 1e-9:
        yield (
            f"method.corruption.views=complementary puts the second view at 1 - t, outside of method.corruption.band={list(band)}: "
            "give a band that is symmetric around 0.5"
        )
