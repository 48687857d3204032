"""Stretches of queries in place of a mask: the same numbers, and no mask is made where the rows of a batch stand alike."""

from __future__ import annotations

import pytest
import torch
from tiny_decoders import denoiser_of, slow_block_decoder
from tiny_models import FAMILIES, VOCAB

from dlmconvert.backbone import key_values
from dlmconvert.diffusion.block_attention import sees_at_inference
from dlmconvert.sampling.canvas import build_canvas
from dlmconvert.sampling.denoise import generate
from dlmconvert.sampling.windows import stretches

LENGTH = 4


@pytest.mark.parametrize("origin", [0, 3, 9])
def test_stretches_are_the_pattern(origin):
    for first in range(12):
        for end in range(first + 1, 17):
            query, key = torch.arange(first, end), torch.arange(end)
            expected = sees_at_inference(query[:, None], key[None], "block_causal", LENGTH, origin, max(end - LENGTH, 0))
            found = torch.cat([(key < num_keys).expand(num_queries, -1) for num_queries, num_keys in stretches(first, end, LENGTH, origin)])
            assert torch.equal(found, expected), (first, end)


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("is_stored", [False, True])
def test_a_forward_in_stretches_is_the_forward_under_their_mask(family, is_stored):
    denoiser = denoiser_of(family, "block_causal", "in_place", LENGTH)
    if not denoiser.takes_stretches:
        pytest.skip(f"{family} has attention of its own, or eager attention")
    columns_BQ, spans = torch.arange(11)[None], stretches(0, 11, LENGTH, 0)
    seen_BQK = (torch.arange(11)[None] < torch.tensor([keys for queries, keys in spans for _ in range(queries)])[:, None])[None]
    tokens_BQ = torch.randint(0, VOCAB - 1, (2, 11), generator=torch.Generator().manual_seed(0))
    answers, stores = [], []
    for seen in (spans, seen_BQK):
        stores.append(denoiser.new_store(2, 11) if is_stored else None)
        kept_BM = torch.tensor([[0, 3, 4, 10], [1, 2, 7, 9]])
        answers.append(denoiser.forward_columns(tokens_BQ, columns_BQ.expand(2, -1), kept_BM, seen, 11, stores[-1], columns_BQ, None))
    torch.testing.assert_close(answers[0], answers[1], atol=1e-5, rtol=1e-5)
    for one, other in zip(*(store.layers for store in stores), strict=True) if is_stored else ():
        torch.testing.assert_close(one.keys, other.keys, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(one.values, other.values, atol=1e-5, rtol=1e-5)
    assert denoiser.model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3_text"])
@pytest.mark.parametrize("alignment", ["shift", "in_place"])
def test_rows_that_stand_alike_are_decoded_without_a_mask(family, alignment, monkeypatch):
    prompts = [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14, 15, 16, 17, 18]]
    denoiser = denoiser_of(family, "block_causal", alignment, LENGTH, kernel="sdpa")
    expected = [slow_block_decoder(denoiser, prompt, 14, LENGTH)[0] for prompt in prompts]

    def refuse(*args):
        raise AssertionError("a mask was made")

    monkeypatch.setattr(key_values, "realised_mask", refuse)
    canvas = build_canvas([prompt + [None] * 14 for prompt in prompts], 0)
    assert generate(denoiser, canvas, order="confidence", num_steps=14).tokens_BL.tolist() == expected


def test_a_long_prompt_is_read_under_a_mask():
    """A call of the kernel for each of its blocks would cost more than the mask."""
    denoiser = denoiser_of("llama", "block_causal", "in_place", LENGTH, kernel="sdpa")
    prompt = list(range(3, 3 + 9 * LENGTH))
    canvas = build_canvas([prompt + [None] * 6], 0)
    assert generate(denoiser, canvas, order="confidence").tokens_BL.tolist() == [slow_block_decoder(denoiser, prompt, 6, LENGTH)[0]]


def test_the_model_is_as_it_was_after_an_error():
    denoiser = denoiser_of("llama", "block_causal", "in_place", LENGTH, kernel="sdpa")
    columns_BQ = torch.arange(6)[None]
    with pytest.raises((IndexError, RuntimeError)):
        denoiser.forward_columns(torch.full((1, 6), 10**6), columns_BQ, columns_BQ, ((4, 4), (2, 6)), 6, None, columns_BQ, None)
    assert denoiser.model.config._attn_implementation == "sdpa" and denoiser.takes_stretches


def test_other_kernels_take_masks():
    assert not denoiser_of("llama", "block_causal", "in_place", LENGTH, kernel="eager").takes_stretches
