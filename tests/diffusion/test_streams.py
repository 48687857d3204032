"""Two streams: the masks of the papers, and what may depend on what."""

from __future__ import annotations

import pytest
import torch
from tiny_models import FAMILIES, build, denoiser, known_answers, rewritten

from dlmconvert.backbone.rewrite import call_model
from dlmconvert.data.loader import positions
from dlmconvert.diffusion.attention import TWO_STREAMS, AttentionContext, allowed_matrix, realise
from dlmconvert.diffusion.block_attention import sees_at_inference
from dlmconvert.diffusion.likelihood import block_nelbo_draw
from dlmconvert.diffusion.objective import cross_entropy
from dlmconvert.diffusion.streams import block_starts, two_streams

PICTURES = {  # queries n0 n1 n2 n3 c0 c1 c2 c3; keys the same: BD3-LM, NBDiff, I-DLM for L = 4, L' = 2
    "block_causal": "11000000 11000000 00111100 00111100 00001100 00001100 00001111 00001111",
    "context_causal": "11000000 11000000 00111100 00111100 00001000 00001100 00001110 00001111",
    "causal_in_block": "10000000 11000000 00101100 00111100 00001000 00001100 00001110 00001111",
}


@pytest.mark.parametrize("pattern", TWO_STREAMS)
def test_the_pictures(pattern):
    matrix = allowed_matrix(8, AttentionContext(pattern=pattern, block_length=2, length=4))[0, 0]
    assert [int(x) for row in PICTURES[pattern].split() for x in row] == matrix.long().flatten().tolist()


def test_against_the_released_implementations():
    answers = known_answers("03_block_diffusion_mask.json")
    names = {"block_causal": "mask_xt_x0", "context_causal": "mask_context_causal", "causal_in_block": "mask_causal_in_block"}
    for case in answers["cases"]:
        length = case["inputs"]["L"]
        for pattern, name in ((p, n) for p, n in names.items() if n in case["expected"]):
            context = AttentionContext(pattern=pattern, block_length=case["inputs"]["block"], length=length)
            expected = [[int(x) for x in row] for row in case["expected"][name]]
            assert allowed_matrix(2 * length, context)[0, 0].long().tolist() == expected


def test_packed_documents_against_the_released_implementation():
    """Documents of 5 and 7 tokens in blocks of 4, which begin anew with each (SDAR's mask, in the order of our rows)."""
    for case in known_answers("03_block_diffusion_mask.json")["packed_cases"]:
        lengths, expected = case["inputs"]["doc_lengths"], case["expected"]
        segments_BL = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
        positions_BL = positions(segments_BL, isolated=True)
        x_BL = torch.zeros_like(segments_BL)
        assert two_streams(x_BL, x_BL, positions_BL)[1][0].tolist() == expected["position_ids_whole_row"]
        context = AttentionContext(pattern="block_causal", block_length=case["inputs"]["block"], length=sum(lengths))
        matrix = allowed_matrix(2 * sum(lengths), context.in_documents(segments_BL, positions_BL))[0, 0].long()
        assert matrix.tolist() == expected["mask_whole_row"]


@pytest.mark.parametrize("pattern", TWO_STREAMS)
def test_blocks_of_documents_are_those_of_the_documents_alone(pattern):
    lengths = (5, 7)
    segments_BL = torch.repeat_interleave(torch.arange(2), torch.tensor(lengths))[None]
    positions_BL = torch.cat([torch.arange(n) for n in lengths])[None]
    context = AttentionContext(pattern=pattern, block_length=3, length=12).in_documents(segments_BL, positions_BL)
    whole = allowed_matrix(24, context)[0, 0]
    expected = torch.zeros_like(whole)
    first = 0
    for n in lengths:
        alone = allowed_matrix(2 * n, AttentionContext(pattern=pattern, block_length=3, length=n))[0, 0]
        places = torch.cat([torch.arange(n) + first, torch.arange(n) + first + 12])
        expected[places[:, None], places] = alone
        first += n
    assert torch.equal(whole, expected)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_both_dense_masks_give_the_same_logits_in_every_family(family):
    """Boolean for sdpa, additive for eager; packed documents, blocks that restart with them; no clean state sees noise."""
    length, cut = 20, 9
    segments_BL = (torch.arange(length) >= cut).long().expand(2, length)
    positions_BL = torch.arange(length) - cut * segments_BL
    x_0_BL = torch.randint(3, 200, (2, length), generator=torch.Generator().manual_seed(1))
    x_t_BL = x_0_BL.masked_fill(torch.rand(2, length, generator=torch.Generator().manual_seed(2)) < 0.5, 290)
    kernels = ("sdpa", "eager") if family != "gemma2" else ("eager",)
    models = [rewritten(family, attention=kernel) for kernel in kernels]
    for pattern in TWO_STREAMS:
        context = AttentionContext(pattern=pattern, block_length=4, length=length).in_documents(segments_BL, positions_BL)
        logits = [call_model(model, *two_streams(x_t_BL, x_0_BL, positions_BL), context).logits for model in models]
        torch.testing.assert_close(logits[0], logits[-1], rtol=1e-4, atol=2e-5)
        clean = call_model(models[0], *two_streams(x_0_BL, x_0_BL, positions_BL), context).logits
        torch.testing.assert_close(clean[:, length:], logits[0][:, length:], rtol=1e-4, atol=2e-5)
        assert not torch.allclose(clean[:, :length], logits[0][:, :length], atol=1e-3)


@pytest.mark.parametrize("isolated", [False, True])
@pytest.mark.parametrize("pattern", TWO_STREAMS)
def test_a_flex_attention_mask_attends_as_a_dense_one(pattern, isolated):
    """The BlockMask and the matrix of one pattern in torch's own kernels, forward, on the CPU; 2L is no multiple of its tiles."""
    from torch.nn.attention.flex_attention import flex_attention

    length = 75
    context = AttentionContext(pattern=pattern, block_length=8, length=length)
    if isolated:
        segments_BL = (torch.arange(length) >= torch.tensor([[30], [41]])).long()
        positions_BL = torch.arange(length) - segments_BL * torch.tensor([[30], [41]])
        context = context.in_documents(segments_BL, positions_BL)
    q, k, v = torch.randn(3, 2, 2, 2 * length, 16, generator=torch.Generator().manual_seed(0)).unbind(0)
    flex, dense = (realise(context, 2 * length, kind, torch.float32, "cpu").mask for kind in ("flex_attention", "sdpa"))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=dense)
    torch.testing.assert_close(flex_attention(q, k, v, block_mask=flex), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("alignment", ["in_place", "shift"])
@pytest.mark.parametrize("pattern", TWO_STREAMS)
def test_training_sees_the_logits_of_decoding(pattern, alignment, family):
    """A block in training, beside all others: the same logits as in decoding, where it stands behind clean text; block starts included."""
    length, block_length = 12, 4
    model = denoiser(build(family), alignment, pattern, block_length=block_length)
    x_0_BL = torch.randint(3, 200, (2, length), generator=torch.Generator().manual_seed(1))
    positions_BL = torch.arange(length).expand(2, length)
    starts_BL = block_starts(positions_BL, block_length) & (positions_BL > 0)
    masked_BL = torch.rand(2, length, generator=torch.Generator().manual_seed(2)) < 0.6
    if alignment == "shift":
        masked_BL &= ~block_starts(positions_BL, block_length)
        clean_targets_BL = starts_BL
    else:
        clean_targets_BL = torch.zeros_like(masked_BL)
    x_t_BL = x_0_BL.masked_fill(masked_BL, model.mask_token_id)
    trained_NV = model.predict_blocks(x_t_BL, x_0_BL, masked_BL, clean_targets_BL, positions_BL)
    chosen_BS = torch.cat([masked_BL, clean_targets_BL], 1)
    rows = torch.zeros(2, 2 * length, trained_NV.shape[1]).masked_scatter(chosen_BS[..., None], trained_NV)
    trained_BLV, trained_starts_BLV = rows[:, :length], rows[:, length:]
    for first in range(0, length, block_length):
        stop = first + block_length
        state_BL = torch.cat([x_0_BL[:, :first], x_t_BL[:, first:stop]], 1)
        columns = torch.arange(stop)
        mask = sees_at_inference(columns[:, None], columns[None], pattern, block_length, 0, first)
        logits_BLV = model.model(input_ids=state_BL, position_ids=positions_BL[:, :stop], attention_mask=mask[None, None].expand(2, 1, -1, -1), use_cache=False).logits
        if alignment == "shift":
            if first:
                torch.testing.assert_close(trained_starts_BLV[:, first], logits_BLV[:, first - 1], rtol=1e-5, atol=1e-5)
            logits_BLV = logits_BLV.roll(1, 1)
        inside = masked_BL.clone()
        inside[:, :first], inside[:, stop:] = False, False
        torch.testing.assert_close(trained_BLV[inside], logits_BLV[inside[:, :stop]], rtol=1e-5, atol=1e-5)


def test_blocks_of_one_token_under_shift_are_the_ar_model():
    model = denoiser(build("llama"), "shift", "context_causal", block_length=1)
    x_0_BL = torch.randint(3, 200, (3, 10), generator=torch.Generator().manual_seed(1))
    positions_BL = torch.arange(10).expand(3, 10)
    targets_BL = positions_BL > 0
    logits_NV = model.predict_blocks(x_0_BL, x_0_BL, torch.zeros_like(targets_BL), targets_BL, positions_BL)
    causal = denoiser(model.model, "shift", "causal").predict(x_0_BL, targets_BL)
    torch.testing.assert_close(logits_NV, causal, rtol=1e-5, atol=1e-5)
    nats_B = block_nelbo_draw(
        model.predict_blocks, x_0_BL, targets_BL, targets_BL, positions_BL, torch.arange(3), 3, draw=0, num_draws=1, seed=0, positions_BL=positions_BL
    )
    torch.testing.assert_close(nats_B.float(), cross_entropy(causal, x_0_BL[targets_BL]).view(3, 9).sum(1), rtol=1e-5, atol=1e-4)


def test_the_block_bound_is_unbiased():
    """All draws of a whole period against enumerated subsets: blocks of two tokens, each conditioned on clean blocks before it."""
    model = denoiser(build("llama"), "in_place", "block_causal", block_length=2)
    x_0_BL = torch.randint(3, 200, (1, 4), generator=torch.Generator().manual_seed(1))
    positions_BL = torch.arange(4)[None]
    none_BL = torch.zeros(1, 4, dtype=torch.bool)
    exact = 0.0
    for block in (0, 2):
        for subset, weight in (((0, 1), 0.5), ((0,), 0.5), ((1,), 0.5)):
            masked_BL = none_BL.clone()
            masked_BL[0, [block + i for i in subset]] = True
            logits = model.predict_blocks(x_0_BL.masked_fill(masked_BL, model.mask_token_id), x_0_BL, masked_BL, none_BL, positions_BL)
            # l in {1, 2}, each with probability 1/2: weight n/l, and each subset of one with probability 1/2.
            exact += weight * (2 / len(subset)) * (0.5 if len(subset) == 1 else 1.0) * float(cross_entropy(logits, x_0_BL[masked_BL]).sum())
    rows, draws = 300, 2
    many = [t.expand(rows, 4) for t in (x_0_BL, torch.ones_like(none_BL), none_BL, block_starts(positions_BL, 2).cumsum(1) - 1)]
    nats_B = sum(
        block_nelbo_draw(
            model.predict_blocks, *many, torch.arange(rows), model.mask_token_id, draw=draw, num_draws=draws, seed=0, positions_BL=positions_BL.expand(rows, 4)
        )
        for draw in range(draws)
    ) / draws
    error = float(nats_B.std()) / rows**0.5
    assert abs(float(nats_B.mean()) - exact) < 5 * error + 1e-4
