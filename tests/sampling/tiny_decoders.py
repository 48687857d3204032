"""Tiny real models for cache tests, and a slow, obvious decoder of block models that shares no code with the sampler."""

from __future__ import annotations

import torch
from tiny_models import VOCAB, rewritten

MASK = VOCAB - 1


def denoiser_of(
    family: str, pattern: str = "bidirectional", alignment: str = "shift", block_length: int | None = None, kernel: str | None = None
):
    from dlmconvert.backbone.denoiser import Denoiser
    from dlmconvert.backbone.spec import DlmSpec

    spec = DlmSpec(attention=pattern, alignment=alignment, block_length=block_length, mask_token_id=MASK, vocab_size=VOCAB)
    return Denoiser(rewritten(family, attention=kernel), spec).eval()


def sees(pattern: str, query: int, key: int, origin: int, block_length: int, noised_from: int) -> bool:
    """The table of the patterns, word by word: who is clean, who is noised, which block."""
    block_q, block_k = (query - origin) // block_length, (key - origin) // block_length
    clean_q, clean_k = query < noised_from, key < noised_from
    if clean_q:
        if not clean_k:
            return False
        return block_k <= block_q if pattern in ("block_causal", "block_causal_noisy") else key <= query
    if clean_k:
        return True
    return block_k == block_q and (pattern != "causal_in_block" or key <= query)


def penalise(logits_QV: torch.Tensor, judged: list[int], state: list[int], penalty: float) -> None:
    """CTRL's penalty on what stands elsewhere than at the position that each row of logits judges."""
    for logits_V, place in zip(logits_QV, judged, strict=True):
        seen = sorted({token for other, token in enumerate(state) if other != place and token != MASK})
        logits_V[seen] = torch.where(logits_V[seen] > 0, logits_V[seen] / penalty, logits_V[seen] * penalty)


@torch.no_grad()
def logits_of(denoiser, tokens: list[int], seen: list[list[bool]]) -> torch.Tensor:
    """logits_LV of stock transformers under an explicit mask."""
    mask = torch.zeros(len(tokens), len(tokens)).masked_fill(~torch.tensor(seen), torch.finfo(torch.float32).min)
    return denoiser.model(
        input_ids=torch.tensor([tokens]), position_ids=torch.arange(len(tokens))[None], attention_mask=mask[None, None], use_cache=False
    ).logits[0]


def slow_block_decoder(denoiser, prompt: list[int], num_new: int, block_length: int) -> tuple[list[int], list[torch.Tensor]]:
    """(tokens, the logits each token was taken from), greedy, most confident first, one token a forward, no cache."""
    pattern, alignment = denoiser.spec.attention, denoiser.spec.alignment
    tokens, end, used = list(prompt), len(prompt) + num_new, {}
    origin = 0 if pattern in ("block_causal", "block_causal_noisy") else len(prompt)
    while len(tokens) < end:
        start = origin + (len(tokens) - origin) // block_length * block_length
        stop = min(start + block_length, end)

        def predictions(state, first_noised, start=start):
            seen = [
                [sees(pattern, q, k, origin, block_length, first_noised) for k in range(len(state))] for q in range(len(state))
            ]
            logits = logits_of(denoiser, state, seen)
            logits[:, MASK] = float("-inf")
            return logits

        if len(tokens) == start and alignment == "shift":  # the first token of a block: from the clean text
            logits = predictions(tokens, len(tokens))[-1]
            used[start] = logits
            tokens.append(int(logits.argmax()))
        holes = list(range(len(tokens), stop))
        state = tokens + [MASK] * len(holes)
        while holes:
            logits = predictions(state, start)
            best = max(holes, key=lambda i: float(torch.softmax(logits[i - (alignment == "shift")], -1).max()))
            used[best] = logits[best - (alignment == "shift")]
            state[best] = int(used[best].argmax())
            holes.remove(best)
        tokens = state
    return tokens, [used[i] for i in range(len(prompt), end)]
