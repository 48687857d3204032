"""Logits of tiny models under explicit masks, against an independent implementation (shared/vectors/15)."""

from __future__ import annotations

import pytest
import torch
from tiny_models import SHARED, denoiser, known_answers

from dlmconvert.backbone.load import load_config, load_model
from dlmconvert.backbone.rewrite import call_model, rewrite_config
from dlmconvert.diffusion import attention
from dlmconvert.diffusion.attention import BIDIRECTIONAL, CAUSAL, AttentionContext

FAMILIES = ("gpt2", "llama", "qwen2", "qwen3")


def load(family, implementation):
    folder = SHARED / "vectors" / f"15_tiny_{family}"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    config = load_config(folder)
    rewrite_config(config)
    config._attn_implementation = implementation
    return load_model(folder, config).eval()


def context_of(case, block, monkeypatch):
    """The pattern of a case in our words; a given mask is put in place of our draws."""
    if case["name"] == "two_stream_block":
        return AttentionContext(pattern="block_causal", block_length=block, length=len(case["inputs"]["allowed"]) // 2)
    if case["name"] == "full":
        return BIDIRECTIONAL
    if case["name"] == "causal":
        return CAUSAL
    if "padding" in case["name"]:
        return AttentionContext(1.0, segments_BL=torch.tensor([case["inputs"]["valid"]]))
    future_LL = 1.0 - torch.tensor(case["inputs"]["allowed"], dtype=torch.float64)
    monkeypatch.setattr(attention, "counter_uniform", lambda purpose, seed, step, query, key: future_LL[query, key])
    return AttentionContext(0.5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits(family, implementation, monkeypatch):
    answers = known_answers(f"15_tiny_{family}.json")
    model = load(family, implementation)
    done = []
    for case in answers["cases"]:
        tokens_BL, positions_BL = torch.tensor(case["inputs"]["input_ids"]), torch.tensor(case["inputs"]["position_ids"])
        with torch.no_grad(), monkeypatch.context() as patch:
            context = context_of(case, answers["block"], patch)
            logits_BLV = call_model(model, tokens_BL, positions_BL, context).logits
            wanted_BL = torch.tensor([[row is not None for row in logits] for logits in case["expected"]["logits"]])
            expected_NV = torch.tensor([row for logits in case["expected"]["logits"] for row in logits if row is not None])
            torch.testing.assert_close(logits_BLV[wanted_BL], expected_NV, rtol=1e-4, atol=2e-4)
            if context.has_two_streams:  # block starts included: tests/diffusion/test_streams.py
                _the_noised_copy_of_a_block_model(model, tokens_BL, positions_BL, answers, expected_NV)
                done.append(case["name"])
                continue
            # The denoiser reads the same hidden states, from the one that its alignment names.
            for alignment in ("in_place", "shift"):
                targets_BL = wanted_BL.roll(1, 1) if alignment == "shift" else wanted_BL
                if alignment == "shift":
                    targets_BL = targets_BL.clone()
                    targets_BL[:, 0] = False
                predicted_NV = denoiser(model, alignment)(tokens_BL, targets_BL, positions_BL, context)
                read_BL = targets_BL.roll(-1, 1) if alignment == "shift" else targets_BL
                torch.testing.assert_close(predicted_NV, logits_BLV[read_BL], rtol=1e-5, atol=1e-5)
        done.append(case["name"])
    assert len(done) == 7


def _the_noised_copy_of_a_block_model(model, tokens_BS, positions_BS, answers, expected_SV):
    """What the denoiser of a block model predicts at the masks is the noised half of the row."""
    x_t_BL, x_0_BL = tokens_BS.chunk(2, dim=1)
    masked_BL = x_t_BL == answers["mask_token_id"]
    predicted_NV = denoiser(model, "in_place", "block_causal", block_length=answers["block"]).predict_blocks(
        x_t_BL, x_0_BL, masked_BL, torch.zeros_like(masked_BL), positions_BS.chunk(2, dim=1)[0], None
    )
    torch.testing.assert_close(predicted_NV, expected_SV[: x_t_BL.shape[1]][masked_BL[0]], rtol=1e-4, atol=2e-4)
