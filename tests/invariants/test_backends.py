"""One predicate, several realisations: no mask, boolean for sdpa, additive for eager, FlexAttention. Equal logits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_models import FAMILIES, positions_of, rewritten

from dlmconvert.backbone.rewrite import call_model
from dlmconvert.diffusion.attention import AttentionContext, additive, allowed_matrix

LENGTH = 20
SEGMENTS = torch.tensor([[0] * 7 + [1] * 9 + [2] * 4, [0] * 20])
CONTEXTS = {
    "causal": AttentionContext(0.0),
    "annealed": AttentionContext(0.4, seed=3, step=11),
    "windowed": AttentionContext(1.0, look_ahead=5),
    "windowed and isolated": AttentionContext(1.0, segments_BL=SEGMENTS, look_ahead=3),
    "bidirectional": AttentionContext(1.0),
    "isolated": AttentionContext(1.0, segments_BL=SEGMENTS),
    "annealed and isolated": AttentionContext(0.4, seed=3, step=11, segments_BL=SEGMENTS),
    "causal and isolated": AttentionContext(0.0, segments_BL=SEGMENTS),
}


def tokens():
    return torch.randint(3, 290, (2, LENGTH), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_sdpa_eager_and_no_mask_agree(family):
    tokens_BL = tokens()
    kernels = ("sdpa", "eager") if family != "gemma2" else ("eager",)
    models = {kernel: rewritten(family, attention=kernel) for kernel in kernels}
    for name, context in CONTEXTS.items():
        results = {}
        for kernel, model in models.items():
            results[kernel] = call_model(model, tokens_BL, positions_of(tokens_BL), context).logits
            # The pattern spelled out, whatever `realise` chose.
            mask = additive(allowed_matrix(LENGTH, context), torch.float32)
            model.config.is_causal = False
            spelled = model(
                input_ids=tokens_BL, position_ids=positions_of(tokens_BL), attention_mask=mask, is_causal=False, use_cache=False
            ).logits
            del model.config.is_causal
            results[kernel + ", spelled out"] = spelled
        first = next(iter(results.values()))
        for kernel, logits_BLV in results.items():
            torch.testing.assert_close(logits_BLV, first, rtol=1e-4, atol=2e-5, msg=lambda m, k=kernel, n=name: f"{k}, {n}: {m}")


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "gemma3_text"])
def test_isolated_documents_are_as_if_alone(family):
    """With restarting positions, a document in a packed row has the logits that it has by itself."""
    model = rewritten(family)
    tokens_BL = tokens()[:1]
    alone = call_model(model, tokens_BL[:, 7:16], torch.arange(9)[None], AttentionContext(1.0)).logits
    positions_BL = torch.cat([torch.arange(7), torch.arange(9), torch.arange(4)])[None]
    packed = call_model(model, tokens_BL, positions_BL, AttentionContext(1.0, segments_BL=SEGMENTS[:1])).logits
    torch.testing.assert_close(packed[:, 7:16], alone, rtol=1e-4, atol=2e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention is realised on CUDA")
@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3_text"])
def test_flex_agrees_on_cuda(family):
    tokens_BL = tokens().cuda()
    flex, sdpa = (rewritten(family, attention=kernel).cuda() for kernel in ("flex_attention", "sdpa"))
    for name, context in CONTEXTS.items():
        segments_BL = None if context.segments_BL is None else context.segments_BL.cuda()
        context = replace(context, segments_BL=segments_BL)
        a, b = (call_model(model, tokens_BL, positions_of(tokens_BL), context).logits for model in (flex, sdpa))
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
