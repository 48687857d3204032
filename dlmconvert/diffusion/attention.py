"""Attention patterns: one pure predicate, and its realisations.

`allowed(query, key, context)` says which positions see which. `realise` turns it into what the unmodified model takes: no mask
at all (the kernel's own bidirectional or causal path), a dense 4-D mask, or a FlexAttention BlockMask. Tests hold them equal.

One-stream patterns (`bidirectional`, and `causal` with everything between) see one copy of a row. Two-stream patterns train a model
that fills a text block after block: they run [x_t | x_0], the noised copy and the clean one, under one mask (streams.py). The third kind
of one stream, `block_causal_noisy`, trains such a model on x_t alone: a block sees itself and the noised blocks before it.

Shapes: B rows, L positions of a row, S positions of what the model runs (L, or 2L with two streams); masks are (B or 1, 1, S, S),
query before key.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from dlmconvert.diffusion.randomness import ATTENTION_PAIR, counter_uniform

ONE_STREAM = ("bidirectional", "causal", "block_causal_noisy")
TWO_STREAMS = ("block_causal", "context_causal", "causal_in_block")
PATTERNS = ONE_STREAM + TWO_STREAMS


@dataclass(frozen=True)
class AttentionContext:
    """What a pattern depends on besides the two positions.

    open_ratio: share of the non-causal pairs that is open; 0 is causal attention, 1 fully bidirectional.
    seed, step: key of the drawn pairs; one draw a step, shared by rows, heads and layers (arXiv 2410.17891).
    segments_BL: document number of each position, or None when all positions of a row belong together. Padding is a
        document of its own, so a padding query keeps itself as a key and softmax stays finite.
    look_ahead: the furthest key that a query sees lies so many positions ahead of it; None is no limit.
        The numbers are tensors of no dimension only inside a compiled kernel.
    pattern: `bidirectional` covers `causal` and all between, by its open_ratio; else a block pattern, for which the fields above,
        but segments_BL, mean nothing.
    block_length: of a block pattern, None for the others. blocks_BL: block number of each position, counted from the start of its document; None
        counts from the start of the row. length: L, where the clean copy begins, of a two-stream pattern.
    """

    open_ratio: float | torch.Tensor = 1.0
    seed: int | torch.Tensor = 0
    step: int | torch.Tensor = 0
    segments_BL: torch.Tensor | None = None
    look_ahead: int | torch.Tensor | None = None
    pattern: str = "bidirectional"
    block_length: int | torch.Tensor | None = None
    blocks_BL: torch.Tensor | None = None
    length: int | None = None

    @property
    def has_two_streams(self) -> bool:
        return self.pattern in TWO_STREAMS

    def in_documents(self, segments_BL: torch.Tensor | None, positions_BL: torch.Tensor) -> AttentionContext:
        """The same pattern within documents; position ids restart with them, and so do blocks. None: each row is one document."""
        if segments_BL is None:
            return self
        blocks_BL = None if self.block_length is None else positions_BL // self.block_length
        return replace(self, segments_BL=segments_BL, blocks_BL=blocks_BL)


CAUSAL = AttentionContext(open_ratio=0.0)
BIDIRECTIONAL = AttentionContext(open_ratio=1.0)


def pair_open(query: torch.Tensor, key: torch.Tensor, context: AttentionContext) -> torch.Tensor:
    """The annealed pattern without documents: causal OR (near AND drawn).

    The causal part is always open. A future key is open when it lies within `look_ahead` and the hash of (seed, step, query,
    key) falls below the ratio: no L x L matrix is stored or sent, and every rank and backend draws the same pairs.
    """
    causal = key <= query
    near = key > query if context.look_ahead is None else (key > query) & (key <= query + context.look_ahead)
    if isinstance(context.open_ratio, float):  # shortcuts; the draw is in [0, 1), so the rule below says the same
        if context.open_ratio <= 0:
            return causal
        if context.open_ratio >= 1:
            return causal | near
    return causal | (near & (counter_uniform(ATTENTION_PAIR, context.seed, context.step, query, key) < context.open_ratio))


def allowed(batch: torch.Tensor, query: torch.Tensor, key: torch.Tensor, context: AttentionContext) -> torch.Tensor:
    """bool: may position `query` of row `batch` see position `key`? The arguments broadcast."""
    if context.has_two_streams:
        return _allowed_two_streams(batch, query, key, context)
    if context.pattern == "block_causal_noisy":
        result = _blocks(batch, key, context) <= _blocks(batch, query, context)
    else:
        result = pair_open(query, key, context)
    if context.segments_BL is not None:
        result = result & (context.segments_BL[batch, query] == context.segments_BL[batch, key])
    return result


def _allowed_two_streams(batch: torch.Tensor, query: torch.Tensor, key: torch.Tensor, context: AttentionContext) -> torch.Tensor:
    """[x_t | x_0]: a noised position sees its own noised block and the clean blocks before it, a clean one sees clean ones only.

                    block_causal        context_causal      causal_in_block
    noised, noised  b(q) = b(k)         b(q) = b(k)         b(q) = b(k) and k <= q
    noised, clean   b(k) < b(q)         b(k) < b(q)         b(k) < b(q)
    clean, clean    b(k) <= b(q)        k <= q              k <= q
    clean, noised   never               never               never

    (BD3-LM, arXiv 2503.09573; NBDiff, arXiv 2512.06776; I-DLM, arXiv 2604.11035.) Clean states so never depend on noise, and a
    noised block depends on its own noised tokens and on clean blocks before it: all blocks are trained in one forward.
    """
    length = context.length
    is_clean_q, is_clean_k = query >= length, key >= length
    q, k = query % length, key % length
    block_q, block_k = _blocks(batch, q, context), _blocks(batch, k, context)
    in_block = block_q == block_k
    if context.pattern == "causal_in_block":
        in_block = in_block & (k <= q)
    in_clean = (block_k <= block_q) if context.pattern == "block_causal" else (k <= q)
    result = (~is_clean_q & ~is_clean_k & in_block) | (~is_clean_q & is_clean_k & (block_k < block_q)) | (is_clean_q & is_clean_k & in_clean)
    if context.segments_BL is not None:
        result = result & (context.segments_BL[batch, q] == context.segments_BL[batch, k])
    return result


def _blocks(batch: torch.Tensor, position: torch.Tensor, context: AttentionContext) -> torch.Tensor:
    return position // context.block_length if context.blocks_BL is None else context.blocks_BL[batch, position]


def allowed_matrix(length: int, context: AttentionContext, device: torch.device | str = "cpu") -> torch.Tensor:
    """The predicate on the index grid: bool (B or 1, 1, L, L)."""
    positions_L = torch.arange(length, device=device)
    rows = _num_rows(context) or 1
    batch_B = torch.arange(rows, device=device)
    matrix_BLL = allowed(batch_B[:, None, None], positions_L[None, :, None], positions_L[None, None, :], context)
    return matrix_BLL.expand(rows, length, length)[:, None]


@dataclass(frozen=True)
class RealisedAttention:
    """What the model is called with. `mask` is None exactly when the kernel's own path expresses the pattern."""

    mask: object | None
    is_causal: bool


def realise(
    context: AttentionContext, length: int, implementation: str, dtype: torch.dtype, device: torch.device | str
) -> RealisedAttention:
    """The cheapest exact realisation of the pattern.

    implementation: the model's attention implementation (`sdpa`, `eager`, `flex_attention`, `flash_attention_2`).
    dtype: of the hidden states. A dense mask is boolean for sdpa and additive (0 / lowest finite number) for all others:
    eager adds the mask to the scores, where a boolean one would silently do nothing.
    """
    if context.segments_BL is None and context.pattern == "bidirectional" and (context.open_ratio == 0.0 or (context.open_ratio == 1.0 and context.look_ahead is None)):
        return RealisedAttention(mask=None, is_causal=context.open_ratio == 0.0)
    if implementation == "flex_attention":
        return RealisedAttention(mask=_block_mask(context, length, device), is_causal=False)
    matrix = allowed_matrix(length, context, device)
    if implementation != "sdpa":
        matrix = additive(matrix, dtype)
    return RealisedAttention(mask=matrix, is_causal=False)


def _num_rows(context: AttentionContext) -> int | None:
    """Rows of the mask; None where all rows have the same one."""
    per_row = context.segments_BL if context.segments_BL is not None else context.blocks_BL
    return None if per_row is None else per_row.shape[0]


def additive(allowed_mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """0 where allowed, the lowest finite number of `dtype` elsewhere (-inf would give NaN in a row without keys)."""
    mask = torch.zeros(allowed_mask.shape, dtype=dtype, device=allowed_mask.device)
    return mask.masked_fill(~allowed_mask, torch.finfo(dtype).min)


def _block_mask(context: AttentionContext, length: int, device: torch.device | str):
    from torch.nn.attention.flex_attention import create_block_mask

    rows = _num_rows(context)
    # Tensors in place of numbers: the kernel is compiled once, not once a step.
    traced = replace(
        context,
        open_ratio=torch.tensor(context.open_ratio, dtype=torch.float32 if torch.device(device).type == "mps" else torch.float64, device=device),
        seed=torch.tensor(context.seed, device=device),
        step=torch.tensor(context.step, device=device),
        look_ahead=None if context.look_ahead is None else torch.tensor(context.look_ahead, device=device),
        block_length=None if context.block_length is None else torch.tensor(context.block_length, device=device),
    )

    def mask_mod(batch, head, query, key):
        return allowed(batch, query, key, traced)

    return create_block_mask(mask_mod, B=rows, H=None, Q_LEN=length, KV_LEN=length, device=device)
