"""Choices of a method that cannot both be meant, each refused with the reason."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dlmconvert.recipe.method import Attention, Corruption, Objective
    from dlmconvert.recipe.schema import Recipe


def method_contradictions(recipe: Recipe):
    """Of the four choices: sentences that begin with the key. No semicolons: they separate the sentences of a list."""
    attention, corruption, objective = recipe.method.attention, recipe.method.corruption, recipe.method.objective
    yield from _annealing_contradictions(attention, recipe.train.steps)
    if attention.pattern == "causal" and corruption.kind != "none":
        yield "method.attention.pattern=causal is the AR objective: it needs method.corruption.kind=none (method.name=ar)"
    yield from _block_contradictions(recipe)
    if attention.pattern != "causal" and corruption.kind == "none":
        yield f"method.corruption.kind=none shows the answer to a {attention.pattern} model: it needs method.attention.pattern=causal"
    if corruption.kind == "none" and recipe.method.alignment != "shift":
        yield "method.corruption.kind=none with method.alignment=in_place asks each token for itself: use alignment=shift"
    if corruption.kind == "none" and objective.weight == "elbo":
        yield "method.objective.weight=elbo weighs by noise level, and method.corruption.kind=none has none: use unweighted"
    if corruption.kind == "none" and objective.weight == "cart":
        yield "method.objective.weight=cart weighs masked tokens, and method.corruption.kind=none has none: use unweighted"
    yield from _gidd_contradictions(recipe)
    if corruption.band_search_steps is not None and recipe.data.validation == 0:
        yield "method.corruption.band_search_steps looks at held-out text, and data.validation=0 holds none back"
    yield from _source_contradictions(recipe)
    yield from _gated_contradictions(recipe)
    if corruption.edit_share and corruption.kind not in ("masking", "all_masked"):
        yield f"method.corruption.edit_share replaces tokens beside masks: method.corruption.kind={corruption.kind} has none, or random tokens already"
    if not corruption.edit_share and _is_set(corruption, "edit_steps"):
        yield "method.corruption.edit_steps says when edits begin, and method.corruption.edit_share=0 makes none: set both, or neither"
    if objective.weight != "cart" and _is_set(objective, "cart_p"):
        yield f"method.objective.cart_p is for method.objective.weight=cart, not for {objective.weight}"
    if (corruption.embedding_noise > 0) != (corruption.embedding_noise_steps is not None):
        yield "method.corruption.embedding_noise and method.corruption.embedding_noise_steps belong together: set both, or neither"
    if corruption.embedding_noise and corruption.kind == "none":
        yield "method.corruption.embedding_noise falls on masks, and method.corruption.kind=none has none: leave it out"
    if corruption.kind in ("none", "all_masked"):
        masks = "none" if corruption.kind == "none" else "all of them"
        for name in ("noise_levels", "band", "rise_steps", "count", "views", "levels_per", "half_life"):
            if _is_set(corruption, name):
                yield f"method.corruption.{name} says how tokens are masked, and method.corruption.kind={corruption.kind} masks {masks}: leave it out"
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


def _is_set(section: Corruption | Objective, name: str) -> bool:
    """Not what it is by default. (What a row or a file said for a choice that is made anew is gone by now: recipe/load.py.)"""
    return getattr(section, name) != type(section).model_fields[name].default


def _gidd_contradictions(recipe: Recipe):
    corruption, objective = recipe.method.corruption, recipe.method.objective
    weights = ("elbo", "gidd_clamped", "gidd_dynamic")
    if corruption.kind != "gidd":
        if objective.weight in weights[1:]:
            yield f"method.objective.weight={objective.weight} is for method.corruption.kind=gidd, not for {corruption.kind}"
        if _is_set(corruption, "uniform_share"):
            yield f"method.corruption.uniform_share is for method.corruption.kind=gidd, not for {corruption.kind}"
        return
    if objective.weight not in weights:
        yield f"method.objective.weight={objective.weight} weighs masked tokens, and under method.corruption.kind=gidd all tokens are targets: use {', '.join(weights)}"
    for name in ("count", "views", "half_life"):
        if _is_set(corruption, name):
            yield f"method.corruption.{name} says which tokens are masked, and method.corruption.kind=gidd draws each by itself: leave it out"


def _source_contradictions(recipe: Recipe):
    objective, pattern = recipe.method.objective, recipe.method.attention.pattern
    for name in ("alignment_weight", "teacher_kl"):
        if not getattr(objective, name):
            continue
        if pattern in TWO_STREAMS:
            yield (
                f"method.objective.{name} compares one copy of a row with the source, and method.attention.pattern={pattern} reads two: it needs "
                "bidirectional or block_causal_noisy"
            )
        if recipe.engine.name == "deepspeed" and recipe.engine.zero_stage == 3:
            yield f"method.objective.{name} needs the frozen source whole on each rank: use engine.zero_stage=2 (or less) under DeepSpeed"
    if objective.teacher_kl and recipe.method.corruption.kind == "gidd":
        yield "method.objective.teacher_kl speaks of masked tokens, and method.corruption.kind=gidd asks for all: use alignment_weight"


def _gated_contradictions(recipe: Recipe):
    for section, values in (("pretrain", recipe.pretrain), ("train", recipe.train), ("sft", recipe.sft)):
        if values is None or values.lora is None or not values.lora.gated:
            continue
        if section == "pretrain" or recipe.method.corruption.kind == "none":
            yield f"{section}.lora.gated=true opens at masks, and this training has none: leave it out"
        if values.lora.dropout:
            yield f"{section}.lora.dropout={values.lora.dropout:g} is not for gated adapters: leave it out"
        if recipe.engine.name == "deepspeed" and recipe.engine.zero_stage == 3:
            yield f"{section}.lora.gated=true under DeepSpeed needs engine.zero_stage=2 or less: adapters lie beside the layers that use them"
        if recipe.method.corruption.kind == "gidd":
            yield f"{section}.lora.gated=true opens at masks, and method.corruption.kind=gidd asks about random tokens as well: leave it out, or mask only"
        if recipe.method.corruption.edit_share:
            yield f"{section}.lora.gated=true opens at masks, and edited rows have none: leave method.corruption.edit_share out"
        if section == "train" and recipe.method.objective.ar_weight:
            yield (
                f"method.objective.ar_weight={recipe.method.objective.ar_weight:g} has no gradient under train.lora.gated=true: the clean copy has no masks, so "
                "adapters leave its next-token path as it is, bit for bit. Use method.objective.ar_weight=0"
            )


TWO_STREAMS = ("block_causal", "context_causal", "causal_in_block")
BLOCK_PATTERNS = (*TWO_STREAMS, "block_causal_noisy")


def _block_contradictions(recipe: Recipe):
    attention, corruption, objective = recipe.method.attention, recipe.method.corruption, recipe.method.objective
    is_block = attention.pattern in BLOCK_PATTERNS
    blocks = " or ".join(BLOCK_PATTERNS)
    if is_block and attention.block_length is None:
        yield f"method.attention.pattern={attention.pattern} needs method.attention.block_length (4 to 32 are usual)"
    if not is_block and attention.block_length is not None:
        yield f"method.attention.block_length={attention.block_length} is for {blocks}, not for method.attention.pattern={attention.pattern}"
    if is_block and attention.anneal in ("random", "window", "pieces"):
        yield f"method.attention.anneal={attention.anneal} opens a one-stream pattern: with {attention.pattern} use block_growth, warm_up_stable_decay or none"
    if not is_block and attention.anneal in ("block_growth", "warm_up_stable_decay"):
        yield f"method.attention.anneal={attention.anneal} changes the blocks of {blocks}: with {attention.pattern} use random, window, pieces or none"
    if attention.anneal == "pieces":
        if recipe.data.row_length % 8 or recipe.data.row_length < 32:
            yield f"method.attention.anneal=pieces cuts rows into eighths: data.row_length={recipe.data.row_length} is no multiple of 8 from 32 on"
        for name in ("embedding_noise", "band_search_steps"):
            if _is_set(corruption, name):
                yield f"method.corruption.{name} goes by whole rows, and method.attention.anneal=pieces cuts them: leave one of them out"
    if (attention.anneal == "warm_up_stable_decay") != (attention.decay_steps is not None):
        yield "method.attention.decay_steps and anneal=warm_up_stable_decay belong together: set both, or neither"
    elif attention.anneal == "warm_up_stable_decay" and attention.anneal_steps is not None:
        steps = recipe.train.steps
        up, down = (round(n * steps) if n < 1 else n for n in (attention.anneal_steps, attention.decay_steps))
        if up + down > steps:
            yield f"method.attention.anneal_steps and decay_steps are {up + down:g} steps together, more than train.steps={steps}"
    stages = attention.block_stages
    if stages is not None:
        if attention.anneal != "block_growth":
            yield "method.attention.block_stages needs method.attention.anneal=block_growth"
        if not stages or stages[0][0] != 0 or any(b[0] <= a[0] for a, b in zip(stages, stages[1:], strict=False)):
            yield f"method.attention.block_stages={stages} must begin at step 0 and go on to later steps, as in [[0, 1], [500, 4]]"
        elif stages[-1][1] != attention.block_length:
            yield f"method.attention.block_stages ends with blocks of {stages[-1][1]}, and method.attention.block_length is {attention.block_length}"
        elif stages[-1][0] >= recipe.train.steps:
            yield f"method.attention.block_stages begins its last stage at step {stages[-1][0]}, and train.steps={recipe.train.steps} ends before"
    for name in ("levels_per", "half_life"):
        if not is_block and _is_set(corruption, name):
            yield f"method.corruption.{name} speaks of blocks: it needs method.attention.pattern={blocks}"
    if corruption.half_life is not None:
        if corruption.count != "bernoulli" or corruption.views != "single":
            yield "method.corruption.half_life draws its own number of masks: leave method.corruption.count and views out"
        if objective.weight == "elbo":
            yield "method.corruption.half_life masks some places more often than others, so 1/t makes no bound: use method.objective.weight=unweighted"
    if corruption.kind == "all_masked":
        if attention.pattern not in TWO_STREAMS:
            yield f"method.corruption.kind=all_masked leaves a {attention.pattern} model nothing to read: it needs {' or '.join(TWO_STREAMS)}"
        if objective.weight != "unweighted":
            yield f"method.corruption.kind=all_masked has one noise level only: method.objective.weight={objective.weight} means nothing, use unweighted"
    if is_block and objective.weight == "cart":
        yield f"method.objective.weight=cart looks for clean tokens on both sides, and a block sees none to its right: with {attention.pattern} use elbo or unweighted"
    if objective.ar_weight > 0 and attention.pattern not in ("context_causal", "causal_in_block"):
        why = "a clean token sees the rest of its block there, and so the answer" if attention.pattern == "block_causal" else "there is no clean copy"
        yield f"method.objective.ar_weight needs method.attention.pattern=context_causal or causal_in_block, not {attention.pattern}: {why}"
    if objective.ar_schedule != "fixed" and objective.ar_weight == 0:
        yield f"method.objective.ar_schedule={objective.ar_schedule} needs method.objective.ar_weight"
    if objective.ar_schedule == "annealed" and attention.anneal == "none":
        yield "method.objective.ar_schedule=annealed follows method.attention.anneal: set anneal=block_growth, or ar_schedule=fixed"


def _annealing_contradictions(attention: Attention, steps: int):
    anneal_steps = attention.anneal_steps
    if attention.anneal == "none":
        if anneal_steps is not None:
            yield "method.attention.anneal_steps is set but method.attention.anneal=none: set anneal=random, or leave anneal_steps out"
        return
    if anneal_steps is None and attention.block_stages is not None:
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
    if corruption.band_search_steps is not None and (corruption.kind, corruption.count, corruption.views, corruption.half_life) != ("masking", "bernoulli", "single", None):
        yield "method.corruption.band_search_steps judges levels of independent masks: it needs kind=masking, count=bernoulli, views=single and no half_life"
    if corruption.rise_steps is None and _is_set(corruption, "rise_from"):
        yield "method.corruption.rise_from says where noise begins to rise, and method.corruption.rise_steps is not set: set both, or neither"
    if corruption.views != "complementary":
        return
    if corruption.rise_steps is not None:
        yield "method.corruption.views=complementary puts the second view at 1 - t, which is high where t is low: leave method.corruption.rise_steps out"
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
