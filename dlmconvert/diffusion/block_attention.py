"""What a block model sees while it decodes: clean text, and the block that is being denoised.

In training a row is run twice, noised and clean (the two-stream patterns of attention.py). Decoding needs one stream only: the clean
columns of the clean copy, and behind them the noised columns of one block, so

    noised -> noised   own block            (causal_in_block: key <= query)
    noised -> clean    earlier blocks
    clean  -> clean    block_causal: blocks up to the own one; context_causal, causal_in_block: key <= query
    clean  -> noised   never

collapses into one comparison a pattern (arXiv 2503.09573, 2512.06776, 2604.11035): the keys and values of clean columns never
depend on what stands behind them, which is what makes their cache exact. `block_causal_noisy` sees what `block_causal` does: it differs in
training only, where the blocks before are as noised as the block itself.

Shapes: queries and keys are columns of a row, tensors that broadcast.
"""

from __future__ import annotations

import torch

# Patterns whose models fill a text block after block, from left to right.
BLOCK_PATTERNS = ("block_causal", "block_causal_noisy", "context_causal", "causal_in_block")
# Of these, where a block may start anywhere and be of any length: clean columns are an ordinary causal context.
FREE_BLOCKS = ("context_causal", "causal_in_block")


def sees_at_inference(
    query: torch.Tensor,
    key: torch.Tensor,
    pattern: str,
    block_length: int,
    origin: torch.Tensor | int,
    noised_from: torch.Tensor | int,
) -> torch.Tensor:
    """bool: may column `query` see column `key` while the block that begins at `noised_from` is denoised?

    origin: the column at which block 0 begins; columns left of it (a prompt) are clean. noised_from: the first column of the block
    that is being denoised; all columns left of it are clean, and none right of its block may be asked about.
    """
    if pattern == "causal_in_block":
        return key <= query
    within_blocks = block_of(key, block_length, origin) <= block_of(query, block_length, origin)
    if with_clean_context(pattern) == "block_causal":
        return within_blocks
    assert pattern == "context_causal", pattern
    return torch.where(query < noised_from, key <= query, within_blocks)


def with_clean_context(pattern: str) -> str:
    """The two-stream pattern that shows each noised block what decoding shows it: clean text before it."""
    return "block_causal" if pattern == "block_causal_noisy" else pattern


def block_of(column: torch.Tensor, block_length: int, origin: torch.Tensor | int) -> torch.Tensor:
    """b(i) = floor((i - origin) / L'), the number of the block in which a column stands; negative left of the origin."""
    return torch.div(column - origin, block_length, rounding_mode="floor")


def clean_seen(positions_BL: torch.Tensor, real_BL: torch.Tensor, pattern: str, block_length: int) -> torch.Tensor:
    """bool (B, L, L): what the queries of clean text see, blocks counted from position 0; padding sees itself and is not seen."""
    query, key = positions_BL[:, :, None], positions_BL[:, None, :]
    seen = sees_at_inference(query, key, pattern, block_length, 0, positions_BL.shape[1]) & real_BL[:, None, :] & real_BL[:, :, None]
    return seen | torch.eye(positions_BL.shape[1], dtype=torch.bool, device=positions_BL.device)
