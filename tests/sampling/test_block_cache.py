"""Block models: the cached sampler, the uncached one and a slow, obvious one give the same tokens and logits."""

from __future__ import annotations

import pytest
import torch
from tiny_decoders import denoiser_of, sees, slow_block_decoder
from tiny_models import FAMILIES
from tiny_predictors import vectors

from dlmconvert.diffusion.block_attention import BLOCK_PATTERNS, sees_at_inference
from dlmconvert.sampling.canvas import build_canvas, canvas_after_prompts
from dlmconvert.sampling.denoise import denoise, generate

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14, 15], [16]]
NEW, LENGTH = 10, 4
CASES = [
    (family, pattern, alignment)
    for family in ("gpt2", "llama", "qwen3", "gemma3_text")
    for pattern in BLOCK_PATTERNS
    for alignment in ("shift", "in_place")
    if family in ("gpt2", "llama") or (pattern == "block_causal") == (alignment == "in_place")
]


def traced(denoiser, canvas, **settings):
    """(tokens, {(row, column): the logits it was committed from}, forwards)."""
    seen, before = {}, []

    def hook(step, x_BL, logits_BLV):
        before.append(logits_BLV)
        return logits_BLV

    for step in denoise(denoiser, canvas, logits_hook=hook, **settings):
        for row, column in step.committed_BL.nonzero().tolist():
            seen[row, column] = before[-1][row, column]
    return step.tokens_BL, seen, step.nfe


@pytest.mark.parametrize("family, pattern, alignment", CASES)
def test_cached_and_uncached_are_the_slow_decoder(family, pattern, alignment):
    denoiser = denoiser_of(family, pattern, alignment, LENGTH)
    canvas = build_canvas([prompt + [None] * NEW for prompt in PROMPTS], 0)
    cached_BL, cached, nfe = traced(denoiser, canvas, order="confidence", budget="even")
    plain_BL, plain, plain_nfe = traced(denoiser, canvas, order="confidence", budget="even", cache="none")
    assert torch.equal(cached_BL, plain_BL) and nfe == plain_nfe == NEW
    assert cached.keys() == plain.keys()
    for place in plain:
        torch.testing.assert_close(cached[place], plain[place], atol=1e-5, rtol=1e-5)
    for row, (prompt, tokens) in enumerate(zip(PROMPTS, canvas.rows(cached_BL), strict=True)):
        expected, logits = slow_block_decoder(denoiser, prompt, NEW, LENGTH)
        assert tokens == expected
        for column, logits_V in enumerate(logits, start=len(prompt)):
            keep = logits_V > float("-inf")
            torch.testing.assert_close(cached[row, column][keep], logits_V[keep], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pattern", BLOCK_PATTERNS)
@pytest.mark.parametrize("alignment", ["shift", "in_place"])
@pytest.mark.parametrize(
    "settings",
    [
        dict(order="entropy", threshold=0.05),
        dict(order="random", num_steps=8, temperature=0.8, top_p=0.9),
        dict(order="margin", factor=1.2, cfg_scale=0.5),
        dict(order="left_to_right", entropy_bound=3.0, repetition_penalty=1.3),
    ],
    ids=str,
)
def test_a_row_of_a_batch_is_the_row_alone_whatever_is_combined(pattern, alignment, settings):
    denoiser = denoiser_of("llama", pattern, alignment, LENGTH)
    longest = max(map(len, PROMPTS))
    inputs_BP = torch.tensor([[0] * (longest - len(p)) + p for p in PROMPTS])
    seen_BP = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in PROMPTS])
    left = canvas_after_prompts(inputs_BP, seen_BP, NEW, row_keys=[4, 5, 6])
    right = build_canvas([p + [None] * NEW for p in PROMPTS], 0, row_keys=[4, 5, 6])
    of_left, of_right = (canvas.rows(generate(denoiser, canvas, seed=3, **settings).tokens_BL) for canvas in (left, right))
    uncached = right.rows(generate(denoiser, right, seed=3, cache="none", **settings).tokens_BL)
    assert of_left == of_right == uncached
    for row, prompt in enumerate(PROMPTS):
        alone = build_canvas([prompt + [None] * NEW], 0, row_keys=[4 + row])
        assert alone.rows(generate(denoiser, alone, seed=3, **settings).tokens_BL) == [of_right[row]]


def test_eager_attention_decodes_the_same():
    for pattern in BLOCK_PATTERNS:
        canvas = build_canvas([p + [None] * NEW for p in PROMPTS], 0)
        tokens = [
            generate(denoiser_of("qwen3", pattern, "in_place", LENGTH, kernel=a), canvas, order="confidence").tokens_BL
            for a in ("sdpa", "eager")
        ]
        assert torch.equal(*tokens)


def test_rows_leave_when_their_text_ends_and_blocks_after_the_end_are_given_back():
    denoiser = denoiser_of("llama", "block_causal", "in_place", LENGTH)
    canvas = build_canvas([p + [None] * NEW for p in PROMPTS], 0)
    whole = canvas.rows(generate(denoiser, canvas, order="left_to_right").tokens_BL)
    end = whole[1][len(PROMPTS[1]) + 2]  # the third new token of the second row
    last = None
    for last in denoise(denoiser, canvas, order="left_to_right", end_ids=[end]):
        assert bool((last.tokens_BL[~last.masked_BL] != denoiser.mask_token_id).all())
    for row, full in zip(canvas.rows(last.tokens_BL), whole, strict=True):
        start = len(row) - NEW
        stop = full.index(end, start) if end in full[start:] else len(full)
        assert row[: stop + 1] == full[: stop + 1] and set(row[stop + 1 :]) <= {end}


def test_an_end_in_the_first_block_saves_the_other_blocks():
    denoiser = denoiser_of("gpt2", "context_causal", "shift", LENGTH)
    canvas = build_canvas([PROMPTS[0] + [None] * 40], 0)
    end = int(next(iter(denoise(denoiser, canvas, order="left_to_right"))).tokens_BL[0, len(PROMPTS[0])])
    assert generate(denoiser, canvas, order="confidence", end_ids=[end]).nfe == 1


@pytest.mark.parametrize("pattern", ["context_causal", "causal_in_block"])
@pytest.mark.parametrize("length", [1, 3, 16])
def test_block_length_is_free_where_the_context_is_causal(pattern, length):
    denoiser = denoiser_of("llama", pattern, "shift", LENGTH)
    canvas = build_canvas([PROMPTS[0] + [None] * NEW], 0)
    expected, _ = slow_block_decoder(denoiser, PROMPTS[0], NEW, length)
    assert generate(denoiser, canvas, order="confidence", block_length=length).tokens_BL[0].tolist() == expected


def test_one_token_a_block_is_autoregressive_decoding_token_for_token():
    denoiser = denoiser_of("llama", "causal_in_block", "shift", LENGTH)
    canvas = build_canvas([p + [None] * NEW for p in PROMPTS], 0)
    tokens = canvas.rows(generate(denoiser, canvas, order="left_to_right", block_length=1).tokens_BL)
    for prompt, row in zip(PROMPTS, tokens, strict=True):
        state = list(prompt)
        for _ in range(NEW):
            with torch.no_grad():
                logits_V = denoiser.model(torch.tensor([state]), is_causal=True).logits[0, -1]
            logits_V[denoiser.mask_token_id] = float("-inf")
            state.append(int(logits_V.argmax()))
        assert row == state


def test_a_gap_before_more_text_is_filled_inside_its_block_or_refused():
    bidirectional_inside = denoiser_of("llama", "block_causal", "in_place", LENGTH)
    row = [5, 6, 7, 8, 9, None, 11, None, None, None]  # the given 11 stands in the block of the first gap
    tokens = generate(bidirectional_inside, build_canvas([row], 0), order="confidence").tokens_BL[0].tolist()
    assert tokens[6] == 11 and None not in tokens
    for denoiser, row in (
        (bidirectional_inside, [5, 6, None, None, 9, 10, None]),
        (denoiser_of("llama", "causal_in_block", "shift", LENGTH), [5, 6, None, 7]),
        (denoiser_of("llama", "context_causal", "shift", LENGTH), [5, 6] + [None] * 5 + [7]),
    ):
        with pytest.raises(ValueError, match="right of a gap"):
            denoise(denoiser, build_canvas([row], 0))


@pytest.mark.parametrize(
    "pattern, settings, message",
    [
        ("block_causal", dict(block_length=8), "trained with blocks of 4"),
        ("context_causal", dict(block_length=0), "block_length is 0"),
        ("block_causal", dict(cache="dual"), "exact one"),
        ("block_causal", dict(num_steps=2), "too few"),
        ("context_causal", dict(num_steps=5), "too few"),
        ("block_causal", dict(tokens_hook=lambda step, x, logits: x), "tokens hook"),
        ("bidirectional", dict(cache="block"), "block models only"),
        ("bidirectional", dict(cache="all"), "unknown cache"),
    ],
)
def test_what_does_not_fit_is_refused(pattern, settings, message):
    with pytest.raises(ValueError, match=message):
        denoise(denoiser_of("llama", pattern, "shift", LENGTH), build_canvas([PROMPTS[0] + [None] * NEW], 0), **settings)


@pytest.mark.parametrize("num_steps", [3, 5, 7, 10, 40])
def test_steps_bound_the_forwards_and_every_part_gets_one(num_steps):
    denoiser = denoiser_of("llama", "block_causal", "in_place", LENGTH)
    canvas = build_canvas([[5, 6] + [None] * 9], 0)  # blocks 2 | 4 | 3
    steps = list(denoise(denoiser, canvas, order="confidence", num_steps=num_steps))
    assert len(steps) <= num_steps and not bool(steps[-1].masked_BL.any())
    parts = [{(column // LENGTH) for _, column in step.committed_BL.nonzero().tolist()} for step in steps]
    assert all(len(part) <= 1 for part in parts)


def test_the_predicate_is_the_published_decode_mask_and_the_words():
    data = vectors("03_block_diffusion_mask.json")
    for case in data["cases"]:
        length, block = case["inputs"]["L"], case["inputs"]["block"]
        grid = torch.arange(length)
        if "decode_mask" in case["expected"]:
            ours = sees_at_inference(grid[:, None], grid[None], "block_causal", block, 0, 0)
            assert ours.int().tolist() == case["expected"]["decode_mask"]
    for pattern in BLOCK_PATTERNS:
        for origin in (0, 3):
            for noised_from in (range(0, 12, 4) if origin == 0 else range(3, 12, 4)):
                end = min(noised_from + 4, 12)
                grid = torch.arange(end)
                ours = sees_at_inference(grid[:, None], grid[None], pattern, 4, origin, noised_from)
                assert ours.tolist() == [[sees(pattern, q, k, origin, 4, noised_from) for k in range(end)] for q in range(end)]


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"gpt2", "llama", "qwen3", "gemma3_text"}))
def test_every_family_decodes_with_its_keys_stored(family):
    for pattern, alignment in (("block_causal", "in_place"), ("context_causal", "shift")):
        denoiser = denoiser_of(family, pattern, alignment, LENGTH)
        canvas = build_canvas([p + [None] * NEW for p in PROMPTS[:2]], 0)
        cached_BL, cached, _ = traced(denoiser, canvas, order="entropy", budget="even", num_steps=8)
        plain_BL, plain, _ = traced(denoiser, canvas, order="entropy", budget="even", num_steps=8, cache="none")
        assert torch.equal(cached_BL, plain_BL) and cached.keys() == plain.keys()
        for place in plain:
            torch.testing.assert_close(cached[place], plain[place], atol=2e-5, rtol=1e-5)
    bidirectional = denoiser_of(family)
    canvas = build_canvas([p + [None] * NEW for p in PROMPTS[:2]], 0)
    plain, dual = (generate(bidirectional, canvas, order="left_to_right", block_length=1, cache=cache).tokens_BL for cache in ("none", "dual"))
    assert torch.equal(plain, dual)
