"""The canvas: the rows of tokens that the sampler works on, and the small protocol of whoever predicts them.

What is still to be filled is a boolean array, never `x == mask_token_id`: the mask token may be an ordinary word that a prompt
contains as well.

Shapes: B rows, L positions of the canvas, N positions asked for (in row-major order), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from .transfer import on_device

ROW, PADDING = 0, 1


class Predictor(Protocol):
    """What a sampler needs of a model.

    mask_token_id: the id that the model reads at masked positions; never produced.
    vocab_size: tokens that exist; ids from here on are padding rows of the embedding, never produced.
    alignment: `shift` or `in_place`. Predictions come aligned either way; it only matters for position 0.
    longest: of predictors that have it, the most tokens of a row; None or not there: any number.
    """

    mask_token_id: int
    vocab_size: int
    alignment: str

    def predict(
        self, tokens_BL: torch.Tensor, wanted_BL: torch.Tensor, positions_BL: torch.Tensor, segments_BL: torch.Tensor | None
    ) -> torch.Tensor:
        """logits_NV: the prediction of token i for each True in wanted_BL, row-major. Positions of different segments do not see
        each other; segments_BL is None when there is no padding."""
        ...


@dataclass(frozen=True)
class Canvas:
    """tokens_BL: int64; what stands at masked positions has no meaning, the sampler puts the mask token there.
    masked_BL: bool, positions to be filled.
    segments_BL: int64, 0 the row, 1 padding; None when no row is padded.
    positions_BL: int64, position ids from 0 at the first real token of each row.
    row_keys_B: int64, the key of each row's random draws: a row draws the same whatever stands beside it in the batch.
    """

    tokens_BL: torch.Tensor
    masked_BL: torch.Tensor
    segments_BL: torch.Tensor | None
    positions_BL: torch.Tensor
    row_keys_B: torch.Tensor

    def visible(self, masked_BL: torch.Tensor) -> torch.Tensor:
        """bool (B, L): the tokens of each row that stand, given or settled, when `masked_BL` are the positions still masked."""
        return ~masked_BL if self.segments_BL is None else ~masked_BL & (self.segments_BL == ROW)

    def rows(self, tokens_BL: torch.Tensor | None = None) -> list[list[int]]:
        """The tokens of each row without its padding (of `tokens_BL` when given, else of the canvas)."""
        tokens_BL = self.tokens_BL if tokens_BL is None else tokens_BL
        if self.segments_BL is None:
            return tokens_BL.tolist()
        return [row_L[real_L].tolist() for row_L, real_L in zip(tokens_BL, self.segments_BL == ROW, strict=True)]


def build_canvas(
    rows: Sequence[Sequence[int | None]],
    pad_token_id: int,
    device: torch.device | str = "cpu",
    row_keys: Sequence[int] | None = None,
) -> Canvas:
    """A canvas of rows in which None marks a position to be filled. Shorter rows are padded on the right.

    pad_token_id: any id of the vocabulary; padding is a segment of its own, so nothing sees it.
    row_keys: default 0 .. B-1.
    Raises ValueError for no rows, for an empty row, and for row keys of another number.
    """
    if not rows:
        raise ValueError("a canvas needs at least one row")
    for number, row in enumerate(rows):
        if not row:
            raise ValueError(f"row {number} of the canvas is empty")
    if row_keys is not None and len(row_keys) != len(rows):
        raise ValueError(f"{len(row_keys)} row keys for {len(rows)} rows")
    lengths = [len(row) for row in rows]
    longest = max(lengths)
    tokens = [[pad_token_id if token is None else int(token) for token in row] + [pad_token_id] * (longest - len(row)) for row in rows]
    masked = [[token is None for token in row] + [False] * (longest - len(row)) for row in rows]
    positions_L = torch.arange(longest, device=device)
    segments_BL = None
    if min(lengths) < longest:
        padded_BL = positions_L[None, :] >= on_device(lengths, device)[:, None]
        segments_BL = torch.where(padded_BL, PADDING, ROW)
    return Canvas(
        tokens_BL=on_device(tokens, device, torch.int64),
        masked_BL=on_device(masked, device, torch.bool),
        segments_BL=segments_BL,
        positions_BL=positions_L.repeat(len(rows), 1),
        row_keys_B=_keys(row_keys, len(rows), device),
    )


def canvas_after_prompts(
    inputs_BP: torch.Tensor, attention_mask_BP: torch.Tensor | None, num_new: int, row_keys: Sequence[int] | None = None
) -> Canvas:
    """The canvas of prompts that stand in a tensor, padded on the left or on the right, with `num_new` positions to be filled.

    attention_mask_BP: 1 for tokens, 0 for padding; None when there is none. The padding stays on the side where it was: on the left
    the new positions are the last columns; on the right each row's new positions follow its own prompt.
    Raises ValueError for inputs that are no rows of tokens, and for a mask with holes or with padding on both sides.
    """
    if not torch.is_tensor(inputs_BP):
        raise ValueError(f"inputs must be a tensor of tokens, not a {type(inputs_BP).__name__}: tokenizer(text, return_tensors='pt') makes one")
    if inputs_BP.ndim != 2:
        raise ValueError(f"inputs must have two dimensions (rows, tokens), not {inputs_BP.ndim}")
    if inputs_BP.shape[0] == 0:
        raise ValueError("a canvas needs at least one row")
    rows, device = inputs_BP.shape[0], inputs_BP.device
    if attention_mask_BP is None:
        attention_mask_BP = torch.ones_like(inputs_BP)
    if attention_mask_BP.shape != inputs_BP.shape:
        raise ValueError(f"attention_mask has shape {tuple(attention_mask_BP.shape)}, the inputs {tuple(inputs_BP.shape)}")
    real_BP = attention_mask_BP.to(device).bool()
    new_BN = torch.ones(rows, num_new, dtype=torch.bool, device=device)
    real_BL = torch.cat([real_BP, new_BN], dim=1)
    masked_BL = torch.cat([torch.zeros_like(real_BP), new_BN], dim=1)
    tokens_BL = torch.cat([inputs_BP.to(torch.int64), torch.zeros(rows, num_new, dtype=torch.int64, device=device)], dim=1)
    if not _on_one_side(real_BP.flip(1)):
        if not _on_one_side(real_BP):
            raise ValueError("attention_mask must pad every row on the left, or every row on the right, without holes")
        # A stable sort brings each row's padding behind its new positions and keeps every other order.
        order_BL = torch.sort((~real_BL).to(torch.int8), dim=1, stable=True).indices
        tokens_BL, real_BL, masked_BL = (x.gather(1, order_BL) for x in (tokens_BL, real_BL, masked_BL))
    return Canvas(
        tokens_BL=tokens_BL,
        masked_BL=masked_BL,
        segments_BL=None if bool(real_BL.all()) else torch.where(real_BL, ROW, PADDING),
        positions_BL=(real_BL.cumsum(1) - 1).clamp(min=0),
        row_keys_B=_keys(row_keys, rows, device),
    )


def check_length(canvas: Canvas, longest: int | None) -> None:
    """Raises ValueError for a row with more tokens than the model has positions for."""
    most = int(canvas.positions_BL.max()) + 1
    if longest is not None and most > longest:
        raise ValueError(
            f"the longest row of the canvas has {most} tokens, given and to be filled, and the model was made for {longest}"
            " (config.max_position_embeddings): shorten it"
        )


def check_predictable(canvas: Canvas, alignment: str) -> None:
    """Under `shift` the hidden state before a token predicts it, so the first token of a row must be given.

    Raises ValueError that names the first row for which it is not.
    """
    if alignment != "shift":
        return
    first_BL = torch.zeros_like(canvas.masked_BL)
    first_BL[:, 0] = True
    if canvas.segments_BL is not None:
        first_BL[:, 1:] = canvas.segments_BL[:, 1:] != canvas.segments_BL[:, :-1]
    bad_B = (canvas.masked_BL & first_BL).any(dim=1)
    if bool(bad_B.any()):
        raise ValueError(
            f"row {int(bad_B.nonzero()[0])} of the canvas starts with a masked position: this model predicts a token from the one before"
            " it (alignment 'shift'), so each row must start with a given token, for example the tokenizer's bos or eos"
        )


def cut_at(tokens: Sequence[int], eos_id: int | Sequence[int] | None) -> list[int]:
    """The tokens before the first end token: a bidirectional model fills its whole canvas, and what follows the end is dropped."""
    ends = set() if eos_id is None else {eos_id} if isinstance(eos_id, int) else set(eos_id)
    for index, token in enumerate(tokens):
        if token in ends:
            return list(tokens[:index])
    return list(tokens)


def _on_one_side(real_BP: torch.Tensor) -> bool:
    """Is every row tokens first, then padding?"""
    return bool((real_BP[:, 1:] <= real_BP[:, :-1]).all())


def _keys(row_keys: Sequence[int] | None, rows: int, device: torch.device | str) -> torch.Tensor:
    if row_keys is None:
        return torch.arange(rows, device=device)
    if len(row_keys) != rows:
        raise ValueError(f"{len(row_keys)} row keys for {rows} rows")
    return on_device(list(row_keys), device, torch.int64)
