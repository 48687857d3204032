"""Training and sampling see the same logits: each state that a block decoder passes through, against the two-stream forward
[x_t | x_0] of training under the published mask, written down word by word."""

from __future__ import annotations

import pytest
import torch
from tiny_decoders import MASK, denoiser_of
from tiny_predictors import vectors

from dlmconvert.diffusion.attention import TWO_STREAMS, AttentionContext, allowed_matrix
from dlmconvert.errors import UserError
from dlmconvert.sampling.canvas import build_canvas
from dlmconvert.sampling.denoise import denoise

PATTERNS = ("block_causal", "context_causal", "causal_in_block")  # those that train on clean context
LENGTH, BLOCK, PROMPT = 14, 4, 4  # the last block is shorter


def two_stream_mask(pattern: str, length: int, block: int) -> torch.Tensor:
    """bool (2L, 2L), queries before keys; x_t first."""
    seen = torch.zeros(2 * length, 2 * length, dtype=torch.bool)
    for q in range(length):
        for k in range(length):
            same, earlier = k // block == q // block, k // block < q // block
            seen[q, k] = same and (pattern != "causal_in_block" or k <= q)
            seen[q, length + k] = earlier
            seen[length + q, length + k] = (same or earlier) if pattern in ("block_causal", "block_causal_noisy") else k <= q
    return seen


def test_the_two_stream_mask_is_the_published_one():
    for case in vectors("03_block_diffusion_mask.json")["cases"]:
        length, block = case["inputs"]["L"], case["inputs"]["block"]
        for pattern, name in (("block_causal", "mask_xt_x0"), ("causal_in_block", "mask_causal_in_block"), ("context_causal", "mask_context_causal")):
            if name in case["expected"]:
                assert two_stream_mask(pattern, length, block).int().tolist() == case["expected"][name]


@pytest.mark.parametrize("pattern", TWO_STREAMS)
def test_training_uses_this_mask(pattern):
    context = AttentionContext(pattern=pattern, block_length=BLOCK, length=LENGTH)
    assert torch.equal(allowed_matrix(2 * LENGTH, context)[0, 0], two_stream_mask(pattern, LENGTH, BLOCK))


def test_a_block_model_is_not_asked_about_whole_rows():
    denoiser, tokens_BL = denoiser_of("llama", "block_causal", "in_place", BLOCK), torch.zeros(1, 8, dtype=torch.int64)
    with pytest.raises(UserError, match="block_causal, blocks of 4") as refused:
        denoiser.predict(tokens_BL, tokens_BL == 0)
    assert "dlmconvert sample" in refused.value.next_step


@torch.no_grad()
def two_stream_logits(denoiser, x_t: list[int], x_0: list[int], pattern: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(of the noised copy, of the clean copy), each (L, V)."""
    seen = two_stream_mask(pattern, len(x_0), BLOCK)
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    positions = torch.arange(len(x_0)).repeat(2)[None]
    logits = denoiser.model(input_ids=torch.tensor([x_t + x_0]), position_ids=positions, attention_mask=mask[None, None], use_cache=False).logits[0]
    return logits[: len(x_0)], logits[len(x_0) :]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("alignment", ["shift", "in_place"])
@pytest.mark.parametrize("cache", ["block", "none"])
def test_every_state_of_the_decoder_is_a_state_of_training(family, pattern, alignment, cache):
    denoiser = denoiser_of(family, pattern, alignment, BLOCK)
    x_0 = torch.randint(0, MASK, (LENGTH,), generator=torch.Generator().manual_seed(3)).tolist()
    canvas = build_canvas([x_0[:PROMPT] + [None] * (LENGTH - PROMPT)], 0)
    told = []

    def force(step, x_BL, logits_BLV):
        told.append((x_BL[0].tolist(), logits_BLV[0].clone()))
        forced = torch.full_like(logits_BLV, -30.0)
        return forced.scatter(2, torch.tensor(x_0)[None, :, None], 30.0)

    # In random order masks stand left of settled tokens as well; `force` decides the tokens.
    for order in ("left_to_right", "random"):
        told.clear()
        last = list(denoise(denoiser, canvas, order=order, budget="even", logits_hook=force, cache=cache))[-1]
        assert last.tokens_BL[0].tolist() == x_0 and len(told) == LENGTH - PROMPT
        for state, logits_LV in told:
            left = [i for i in range(LENGTH) if state[i] == MASK]
            block = left[0] // BLOCK
            first, end = block * BLOCK, min((block + 1) * BLOCK, LENGTH)
            asked = [first] if alignment == "shift" and state[first] == MASK else [i for i in left if i < end]
            x_t = [*x_0[:first], *state[first:end], *x_0[end:]]
            noised_LV, clean_LV = two_stream_logits(denoiser, x_t, x_0, pattern)
            for i in asked:
                if alignment == "in_place":
                    expected_V = noised_LV[i]
                else:
                    expected_V = clean_LV[i - 1] if i == first else noised_LV[i - 1]
                torch.testing.assert_close(logits_LV[i], expected_V, atol=1e-5, rtol=1e-5)
