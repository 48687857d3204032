"""How good generated text is, cheaply: its likelihood under an AR model, how much it repeats itself, whether it holds the right answer.

Shapes: B rows, L positions, V vocabulary.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import torch

from dlmconvert.diffusion.likelihood import mean_and_standard_error

_ROWS_AT_ONCE = 8


@torch.no_grad()
def source_nats(source: Any, prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]]) -> tuple[float | None, float | None]:
    """(nats a token of the texts after their prompts under an AR model, its standard error over rows).

    source: a causal model of transformers that shares the tokens. Low means fluent in the eyes of the source; text that repeats
    itself is likely as well, so read it beside `distinct`. (None, None) without a token to score; the error is None for one row.
    """
    nats, counts = [], []
    for first in range(0, len(prompts), _ROWS_AT_ONCE):
        batch = list(zip(prompts[first : first + _ROWS_AT_ONCE], texts[first : first + _ROWS_AT_ONCE], strict=True))
        longest = max(len(prompt) + len(text) for prompt, text in batch)
        # Padding on the right: a causal model sees nothing of it.
        tokens_BL = torch.tensor([[*prompt, *text] + [0] * (longest - len(prompt) - len(text)) for prompt, text in batch], device=source.device)
        columns_L = torch.arange(longest, device=source.device)
        starts_B, ends_B = (
            torch.tensor(numbers, device=source.device)[:, None]
            for numbers in ([max(1, len(prompt)) for prompt, _ in batch], [len(prompt) + len(text) for prompt, text in batch])
        )
        scored_BL = (columns_L >= starts_B) & (columns_L < ends_B)
        log_p_BLV = torch.log_softmax(source(input_ids=tokens_BL, use_cache=False).logits[:, :-1].float(), dim=-1)
        nats_BL = -log_p_BLV.gather(-1, tokens_BL[:, 1:, None])[..., 0]
        nats.append((nats_BL * scored_BL[:, 1:]).sum(1).double().cpu())
        counts.append(scored_BL.sum(1).cpu())
    nats_B, counts_B = torch.cat(nats), torch.cat(counts)
    if not int(counts_B.sum()):
        return None, None
    mean, error = mean_and_standard_error(nats_B, counts_B)
    return mean, None if math.isnan(error) else error


def distinct(texts: Sequence[Sequence[int]], n: int) -> float | None:
    """Different n-grams over all n-grams of the texts together (arXiv 1510.03055), in (0, 1]; None where no text has n tokens."""
    grams = [tuple(text[i : i + n]) for text in texts for i in range(len(text) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def holds_answer(text: str, answer: str) -> bool:
    """Whether the answer stands in the text as whole words; case and white space do not matter."""
    plain, wanted = (" ".join(part.casefold().split()) for part in (text, answer))
    return re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", plain) is not None


def accuracy(texts: Sequence[str], answers: Sequence[str]) -> tuple[float, float]:
    """(share of texts that hold their answer, its standard error)."""
    right = [holds_answer(text, answer) for text, answer in zip(texts, answers, strict=True)]
    share = sum(right) / len(right)
    return share, math.sqrt(share * (1 - share) / len(right))
