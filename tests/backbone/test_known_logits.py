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


def context_of(case, monkeypatch):
    """The pattern of a case in our words; a given mask is put in place of our draws."""
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
        if case["name"] == "two_stream_block":
            continue
        tokens_BL, positions_BL = torch.tensor(case["inputs"]["input_ids"]), torch.tensor(case["inputs"]["position_ids"])
        with torch.no_grad(), monkeypatch.context() as patch:
            context = context_of(case, patch)
            logits_BLV = call_model(model, tokens_BL, positions_BL, context).logits
            wanted_BL = torch.tensor([[row is not None for row in logits] for logits in case["expected"]["logits"]])
            expected_NV = torch.tensor([row for logits in case["expected"]["logits"] for row in logits if row is not None])
            torch.testing.assert_close(logits_BLV[wanted_BL], expected_NV, rtol=1e-4, atol=2e-4)
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
    assert len(done) == 6
