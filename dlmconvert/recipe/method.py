"""The `method` section of a recipe: the four choices of a conversion. The docstring below a field is what users read."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dlmconvert.recipe.section import Section


class Attention(Section):
    """Which positions may see which, and the path there from causal attention."""

    pattern: Literal["bidirectional", "causal", "block_causal", "context_causal", "causal_in_block", "block_causal_noisy"] = "bidirectional"
    """The pattern at the end of training. The last four train for decoding block after block. Three of them on [noised | clean] copies of each row: clean text sees whole blocks (`block_causal`, arXiv 2503.09573), or what is left of it (`context_causal`, arXiv 2512.06776), and so do the noised tokens among themselves (`causal_in_block`, arXiv 2604.11035). `block_causal_noisy` on the noised row alone, at the cost of one copy: in training a block sees the blocks before it as noised as itself, in decoding clean (the noisy context of arXiv 2512.14067's ablation)."""
    block_length: Annotated[int, Field(gt=0)] | None = None
    """Tokens in a block, of a block pattern: at the end of training, and in decoding."""
    anneal: Literal["none", "random", "window", "pieces", "block_growth", "warm_up_stable_decay"] = "none"
    """`none`: at once. `random`: a drawn share of the non-causal pairs is open, growing to all (arXiv 2410.17891). `window`: each position sees so many positions ahead, growing to the whole row. `pieces`: rows are cut into eighths, then quarters, then halves, open within each and closed between them (short rows first, arXiv 2108.06084), for a third of `anneal_steps` each: also less work. Of block patterns: `block_growth`: blocks of 1, 2, 4, ... tokens (arXiv 2512.06776), `warm_up_stable_decay`: blocks of 1, 4, 32, 64 tokens and then the whole row, which stays, and shrinks to `block_length` by halves (arXiv 2512.15745)."""
    anneal_steps: Annotated[float, Field(gt=0)] | None = None
    """Optimizer steps until everything is open; below 1 a fraction of the stage's steps."""
    decay_steps: Annotated[float, Field(gt=0)] | None = None
    """Of `warm_up_stable_decay`: the last so many steps, in which blocks shrink; below 1 a fraction."""
    block_stages: list[tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(gt=0)]]] | None = None
    """Of `block_growth`: pairs [first step, block length] in place of doubling, from step 0 to `block_length`."""


class Corruption(Section):
    """q(x_t given x_0)."""

    kind: Literal["masking", "gidd", "all_masked", "none"] = "masking"
    """Each eligible token becomes the mask token with probability t; or the mask token or a random one (`gidd`, arXiv 2503.04482: every token is then a target); all of them do (`all_masked`, for blocks that are drafted in one step); `none` leaves the row clean (the AR objective)."""
    uniform_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Of `gidd`: the share of random tokens where it is largest, at t = 1/2."""
    eps: Annotated[float, Field(gt=0, lt=0.5)] = 1e-3
    """Lower end of the noise level t in [eps, 1] (`gidd`: [eps, 1 - eps])."""
    noise_levels: Literal["uniform", "stratified", "offset", "antithetic"] = "uniform"
    """One independent t a row, or spread over the global batch (lower variance, same mean): one a stratum, evenly spaced from one drawn `offset`, or rows 2j and 2j + 1 at opposite ends (`antithetic`)."""
    levels_per: Literal["row", "block"] = "row"
    """One noise level a row, or one a block of a block pattern, spread over all blocks of the global batch."""
    half_life: Annotated[float, Field(gt=0)] | None = None
    """Masks fall on later tokens of a block more often, at low noise twice as often every `half_life` block lengths (arXiv 2512.14067; no bound then)."""
    band: tuple[float, float] | None = None
    """[low, high] in place of [eps, 1], the weight kept (arXiv 2503.09573): no longer a bound. Validation uses the full range."""
    band_search_steps: Annotated[int, Field(gt=0)] | None = None
    """Every so many steps the band in which held-out text (`eval.rows` rows, `eval.draws` draws) has the loss of least variance is looked for and taken from there on (arXiv 2503.09573)."""
    rise_steps: Annotated[float, Field(gt=0)] | None = None
    """The first so many optimizer steps of `adapt` mask less: the highest noise level rises in a straight line from `rise_from` of the range to all of it. Below 1 a fraction. No bound until then; validation uses the full range."""
    rise_from: Annotated[float, Field(gt=0, lt=1)] = 0.3
    """Share of the range of noise levels that the first step draws from, of `rise_steps`."""
    count: Literal["bernoulli", "at_least_one", "exact"] = "bernoulli"
    """How many tokens of a row of n are masked: each with probability t; the same but never none; or l, uniform on 1..n, in place of t (weight n/l, the lowest variance; `eps` is not used)."""
    views: Literal["single", "complementary"] = "single"
    """`complementary`: rows 2j and 2j + 1 of the global batch are one row of text, and what one masks the other shows (arXiv 2509.26328): each token is predicted once, from half as much text."""
    edit_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Largest share of a row's tokens that random ones replace in the last phase, which also asks for the right tokens of such rows (arXiv 2508.02193); a row draws its own from 0 up. 0: no such phase."""
    edit_steps: Annotated[float, Field(gt=0)] = 0.2
    """The last so many steps of a stage train on edits as well, in a second forward of each micro-batch; below 1 a fraction."""
    embedding_noise: Annotated[float, Field(ge=0)] = 0.0
    """Standard deviation of Gaussian noise on the embeddings of masks in the first steps (arXiv 2512.15745): an unused row is near 0, where gradients explode. Not in sampling."""
    embedding_noise_steps: Annotated[float, Field(gt=0)] | None = None
    """Optimizer steps with that noise; below 1 a fraction."""


class Objective(Section):
    """How denoising errors are weighed and summed."""

    weight: Literal["elbo", "unweighted", "cart", "gidd_clamped", "gidd_dynamic"] = "elbo"
    """`elbo`: 1/t on masked tokens (arXiv 2406.07524), under `gidd` its bound's weights; `unweighted`: 1; `cart`: by the distance to clean tokens (arXiv 2508.15487); `gidd_clamped`: the bound's weights, at most 2; `gidd_dynamic`: 2 on masks, 1 on random tokens, little on right ones (arXiv 2503.04482)."""
    cart_p: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Of `cart` only: 1 counts the two neighbours, smaller values look further."""
    ar_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the next-token loss on the clean copy (`context_causal`, `causal_in_block`): keeps the autoregressive path."""
    ar_schedule: Literal["fixed", "annealed", "balanced"] = "fixed"
    """`annealed`: the weight falls to 0 while blocks grow (arXiv 2512.06776). `balanced`: times the ratio of the denoising loss to the next-token loss, of the step before (arXiv 2604.11035)."""
    alignment_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of 1 - cosine between hidden states and those of the frozen source on the clean text, mean over layers and tokens (arXiv 2605.06885). Takes a second copy of the model, without gradients."""
    teacher_kl: Annotated[float, Field(ge=0)] = 0.0
    """Weight of KL(frozen source's next-token prediction || prediction) of masked tokens. Takes a second copy of the model, without gradients."""
    router_weight: Annotated[float, Field(ge=0)] | None = None
    """Weight of the balance loss of mixture-of-experts models (arXiv 2101.03961). Empty: what the source was trained with (router_aux_loss_coef)."""
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
    if attention.block_stages is not None:
        return attention.block_stages[-1][0] + 1
    assert attention.anneal_steps is not None
    return _whole_steps(attention.anneal_steps, steps)


def block_stages_of(attention: Attention, steps: int, row_length: int, is_annealed: bool = True) -> tuple[tuple[int, int], ...]:
    """(first step, block length) of each stage of a block pattern, ascending from step 0; empty for the others."""
    length = attention.block_length
    if length is None:
        return ()
    if not is_annealed or attention.anneal == "none":
        return ((0, length),)
    if attention.block_stages is not None:
        return tuple((first, size) for first, size in attention.block_stages)
    if attention.anneal == "block_growth":
        return doubling_stages(length, anneal_steps_of(attention, steps))
    assert attention.decay_steps is not None
    return warm_up_stable_decay_stages(length, row_length, steps, anneal_steps_of(attention, steps), _whole_steps(attention.decay_steps, steps))


def piece_stages_of(attention: Attention, steps: int, row_length: int, is_annealed: bool = True) -> tuple[tuple[int, int], ...]:
    """(first step, tokens in a piece) of each stage of `pieces`, ascending from step 0; empty where rows stay whole."""
    if attention.anneal != "pieces" or not is_annealed:
        return ()
    anneal_steps = anneal_steps_of(attention, steps)
    return tuple({i * anneal_steps // 3: row_length >> (3 - i) for i in range(4)}.items())  # of stages without a step the last counts


def edits_from(corruption: Corruption, steps: int) -> int:
    """The first step (from 0) that trains on edits."""
    return max(0, steps - _whole_steps(corruption.edit_steps, steps))


def rise_steps_of(corruption: Corruption, steps: int) -> int:
    """Steps until the full range of noise levels is drawn from; 0: from the first on."""
    return 0 if corruption.rise_steps is None else _whole_steps(corruption.rise_steps, steps)


def embedding_noise_steps_of(corruption: Corruption, steps: int) -> int:
    """Steps with noise on the embeddings of masks."""
    if corruption.embedding_noise == 0 or corruption.embedding_noise_steps is None:
        return 0
    return _whole_steps(corruption.embedding_noise_steps, steps)


def _whole_steps(value: float, steps: int) -> int:
    return max(1, round(value * steps)) if value < 1 else int(value)


def doubling_stages(block_length: int, anneal_steps: int) -> tuple[tuple[int, int], ...]:
    """1, 2, 4, ... L': equally long stages, the last of which, L', begins at step `anneal_steps` - 1 (NBDiff, arXiv 2512.06776)."""
    lengths = [1]
    while lengths[-1] < block_length:
        lengths.append(min(2 * lengths[-1], block_length))
    growths = max(1, len(lengths) - 1)
    stages = {i * (anneal_steps - 1) // growths: length for i, length in enumerate(lengths)}  # of stages without a step the last counts
    return tuple(sorted(stages.items()))


def warm_up_stable_decay_stages(
    block_length: int, row_length: int, steps: int, anneal_steps: int, decay_steps: int
) -> tuple[tuple[int, int], ...]:
    """1, 4, 32, 64, the row: blocks grow over `anneal_steps`, stay, and halve to L' over the last `decay_steps` (LLaDA2.0, arXiv 2512.15745).

    L' itself is reached in the middle of the decay, so that half of it trains the blocks that decoding will use.
    """
    up, down = [*(length for length in (1, 4, 32, 64) if length < row_length), row_length], [row_length]
    while down[-1] > block_length:
        down.append(max(-(-down[-1] // 2), block_length))
    begin = steps - decay_steps
    stages = {i * (anneal_steps - 1) // max(1, len(up) - 1): length for i, length in enumerate(up)}
    stages |= {begin + i * (decay_steps // 2) // max(1, len(down) - 1): length for i, length in enumerate(down) if i}
    return tuple(sorted(stages.items()))
