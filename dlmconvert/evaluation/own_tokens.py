"""Whether a converted model still agrees with itself: what its AR path makes of the tokens that it fills in by denoising.

    acceptance = mean of min(1, p(x_i | x_<i) / q(x_i | state))

x_i drawn from q, the denoising prediction in the state in which it was filled in (one token a forward, left to right, temperature 1,
behind the first half of a held-out row; a model that was trained on blocks of masks alone drafts a block a forward, as it is used: token by
token, the q of `causal_in_block` under `shift` is p); p the same model's prediction of x_i from what stands left of it, read causally with `shift`.
It is what speculative decoding accepts when a model drafts for itself (arXiv 2211.17192; I-DLM, arXiv 2604.11035).

Shapes: B rows, L columns of the canvas, N tokens that were filled in, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from dlmconvert.backbone.denoiser import Denoiser
from dlmconvert.backbone.rewrite import call_model
from dlmconvert.diffusion.alignment import predicting_positions
from dlmconvert.diffusion.attention import AttentionContext
from dlmconvert.evaluation.nelbo import RowSource
from dlmconvert.sampling.canvas import canvas_after_prompts
from dlmconvert.sampling.denoise import denoise
from dlmconvert.sampling.filters import ban

MOST_TOKENS = 16  # a row


@dataclass(frozen=True)
class OwnTokens:
    """tokens: how many were filled in. acceptance: see above. greedy: share of them that are the AR path's most probable token."""

    tokens: int
    acceptance: float
    greedy: float


@torch.no_grad()
def own_acceptance(
    denoiser: Denoiser, rows: RowSource, *, num_rows: int, batch: int, seed: int = 0, advance: Callable[[int], None] = lambda rows: None
) -> OwnTokens:
    """denoiser: under the pattern that it was trained for. Of each row the document in which its first half ends is the prompt.

    Neither p nor q gives the mask token or rows behind the text's any probability.
    """
    num_rows, num_tokens, accepted, greedy = min(num_rows, rows.num_rows), 0, 0.0, 0
    for first in range(0, num_rows, batch):
        found = rows.rows(np.arange(first, min(first + batch, num_rows)))
        length = found.tokens_BL.shape[1]
        prompt, num_new = length // 2, min(MOST_TOKENS, length - length // 2)
        tokens_BP, segments_BP = (t[:, :prompt].to(denoiser.device) for t in (found.tokens_BL, found.segments_BL))
        real_BP = (segments_BP == segments_BP[:, -1:]).long()
        canvas = canvas_after_prompts(tokens_BP, real_BP, num_new, list(range(first, first + len(tokens_BP))))
        tokens_BL, q_BL = canvas.tokens_BL, torch.zeros(canvas.tokens_BL.shape, device=denoiser.device)
        everything = 0.0 if denoiser.spec.corruption == "all_masked" else None
        for step in denoise(denoiser, canvas, order="left_to_right", temperature=1.0, seed=seed, threshold=everything):
            tokens_BL, q_BL = step.tokens_BL, torch.where(step.committed_BL, step.confidence_BL, q_BL)
        context = AttentionContext(open_ratio=0.0, segments_BL=canvas.segments_BL)
        # The first of a document has no predictor on the AR path; a prompt has one token at least, so none of these is.
        logits_NV = call_model(
            denoiser.model, tokens_BL, canvas.positions_BL, context, logits_to_keep=predicting_positions(canvas.masked_BL, "shift")
        ).logits
        log_p_NV = ban(logits_NV, denoiser.mask_token_id, denoiser.vocab_size).log_softmax(-1)
        x_N = tokens_BL[canvas.masked_BL]
        p_N = log_p_NV.gather(1, x_N[:, None])[:, 0].exp()
        accepted += float((p_N / q_BL[canvas.masked_BL]).clamp(max=1.0).sum())
        greedy += int((log_p_NV.argmax(-1) == x_N).sum())
        num_tokens += len(x_N)
        advance(len(tokens_BP))
    return OwnTokens(num_tokens, accepted / num_tokens, greedy / num_tokens)
