"""The mask token: which id, why that one, and what its embedding starts as.

Choosing is a pure function of the config and the tokenizer; `install` changes the model and the tokenizer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dlmconvert.errors import UserError, nearest

# Ids that serving runtimes hard-code for a family (docs/formats.md): the exported model then needs no remapping.
RUNTIME_IDS = {"qwen2": 151666, "qwen3": 151669, "qwen3_moe": 151669}
_RESERVED = ("<|reserved_special_token_", "<|reserved_", "<unused", "[unused", "<|extra_", "<extra_id_", "<reserved")
DEFAULT_TEXT = "<|mask|>"


@dataclass(frozen=True)
class MaskChoice:
    """id, text: of the token. is_word: the text that the model is trained on may contain it. adds_row: the embedding grows up to the id (by
    one row, or by more when the tokenizer has tokens beyond the embedding). reason: a sentence for the user."""

    id: int
    text: str
    is_word: bool
    adds_row: bool
    reason: str


def choose_mask_token(requested: int | str | None, tokenizer: Any, embedding_rows: int, model_type: str) -> MaskChoice:
    """The policy: the recipe's token; else the tokenizer's own; else the id that a runtime expects for the family; else a reserved
    token; else an unused row of the embedding; else a new row.

    Raises UserError when the requested id or text does not exist, or is the padding or end token.
    """
    if requested is not None:
        return _requested(requested, tokenizer, embedding_rows)
    if tokenizer.mask_token_id is not None:
        token_id, text = tokenizer.mask_token_id, tokenizer.mask_token
        return MaskChoice(token_id, text, False, token_id >= embedding_rows, f"the tokenizer has a mask token of its own, {text!r}")
    if DEFAULT_TEXT in tokenizer.get_vocab():
        token_id = tokenizer.convert_tokens_to_ids(DEFAULT_TEXT)
        return MaskChoice(token_id, DEFAULT_TEXT, False, token_id >= embedding_rows, f"the tokenizer has a token {DEFAULT_TEXT!r}")
    used = len(tokenizer)
    runtime_id = RUNTIME_IDS.get(model_type)
    if runtime_id is not None and used <= runtime_id < embedding_rows:
        return MaskChoice(runtime_id, DEFAULT_TEXT, False, False, f"the unused id that runtimes expect for {model_type}")
    for token_id, token in sorted(tokenizer.added_tokens_decoder.items()):
        text = str(token)
        if text.startswith(_RESERVED) and token_id < embedding_rows:
            return MaskChoice(token_id, text, False, False, f"{text!r} is a reserved token that no text uses")
    if used < embedding_rows:
        return MaskChoice(used, DEFAULT_TEXT, False, False, f"the first of {embedding_rows - used} unused rows of the embedding")
    return MaskChoice(used, DEFAULT_TEXT, False, True, f"the tokenizer fills all {embedding_rows} rows: one is added")


def _requested(requested: int | str, tokenizer: Any, embedding_rows: int) -> MaskChoice:
    used = len(tokenizer)
    if isinstance(requested, str):
        token_id = tokenizer.get_vocab().get(requested)
        if token_id is None:
            pieces = tokenizer.tokenize(requested)
            if len(pieces) == 1 and pieces[0] != tokenizer.unk_token:
                token_id = tokenizer.convert_tokens_to_ids(pieces[0])
            elif requested.startswith(("<", "[")):
                # A new special token by name: it takes the next free row, or a new one.
                return MaskChoice(used, requested, False, used >= embedding_rows, "the recipe names a new token")
            else:
                raise UserError(
                    f"source.mask_token={requested!r} is not one token: the tokenizer makes {pieces} of it",
                    nearest(requested, list(tokenizer.get_vocab())[:50_000]),
                    "name one piece, an id, or a new token in angle brackets such as '<|mask|>'",
                )
    else:
        token_id = requested
    first_new = max(used, embedding_rows)
    if token_id == first_new:
        return MaskChoice(token_id, _new_text(tokenizer, token_id), False, True, "the recipe names the id after the last row: a row is added")
    if not 0 <= token_id < embedding_rows:
        raise UserError(
            f"source.mask_token={requested}: the embedding has ids 0 to {embedding_rows - 1}",
            f"{first_new} would add a row",
            "leave source.mask_token out to have one chosen",
        )
    if token_id in (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id):
        raise UserError(
            f"source.mask_token={requested!r} is the tokenizer's begin, end or padding token", "the model could not tell a gap from an end",
            "leave source.mask_token out to have one chosen",
        )
    text = tokenizer.convert_ids_to_tokens(token_id)
    if text is None or token_id >= used:
        return MaskChoice(token_id, _new_text(tokenizer, token_id), False, False, "the recipe names this unused id")
    is_word = token_id not in tokenizer.all_special_ids and token_id not in tokenizer.added_tokens_decoder
    why = "an ordinary word piece, so masks are tracked as booleans" if is_word else "a special token"
    return MaskChoice(token_id, text, is_word, False, f"the recipe names it ({why})")


def _new_text(tokenizer: Any, token_id: int) -> str:
    return f"<|mask_{token_id}|>" if DEFAULT_TEXT in tokenizer.get_vocab() else DEFAULT_TEXT


def install_mask_token(model: Any, tokenizer: Any, choice: MaskChoice, init: str, seed: int) -> None:
    """Grow the embedding if needed, start the mask token's rows, and tell the tokenizer.

    init: `mean` of the existing rows, `normal` with their mean and spread, `keep`. A word keeps its row. An unused row of an AR
    checkpoint has decayed to about 0, where gradients explode at high noise (LLaDA2.0, arXiv 2512.15745); hence `mean`.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    existing = min(len(tokenizer), rows)
    if choice.adds_row:
        model.resize_token_embeddings(choice.id + 1, mean_resizing=False)
    matrices = [model.get_input_embeddings().weight]
    head = model.get_output_embeddings()
    if head is not None and head.weight.data_ptr() != matrices[0].data_ptr():
        matrices.append(head.weight)
    with torch.no_grad():
        for matrix_VD in matrices:
            matrix_VD.copy_(with_mask_row(matrix_VD[:rows], choice, init, seed, existing))
    tell_tokenizer(tokenizer, choice)


def with_mask_row(matrix_VD: torch.Tensor, choice: MaskChoice, init: str, seed: int, existing: int) -> torch.Tensor:
    """The embedding (or head) before the mask token -> the one with its row, as `init` says; the same tensor when no row is started.

    existing: how many rows are tokens; the mean is taken over them.
    """
    if choice.is_word or (init == "keep" and not choice.adds_row):
        return matrix_VD
    real_VD = matrix_VD[:existing].float()
    row_D = real_VD.mean(0)
    if init == "normal":
        generator = torch.Generator().manual_seed(seed)
        row_D = row_D + real_VD.std(0) * torch.randn(row_D.shape, generator=generator)
    rows = len(matrix_VD)
    found_VD = matrix_VD.new_empty((max(rows, choice.id + 1), *matrix_VD.shape[1:]))
    found_VD[:rows] = matrix_VD
    found_VD[rows if choice.adds_row else choice.id : choice.id + 1] = row_D.to(matrix_VD.dtype)
    return found_VD


def tell_tokenizer(tokenizer: Any, choice: MaskChoice) -> None:
    """The tokenizer knows the mask token under its id; a word stays what it is."""
    if choice.is_word:
        return
    if choice.id >= len(tokenizer):
        # Tokenizers number new tokens consecutively: fill the ids between, so that the mask token lands on its own.
        fillers = [f"<|unused_{token_id}|>" for token_id in range(len(tokenizer), choice.id)]
        if fillers:
            tokenizer.add_tokens(fillers, special_tokens=True)
    tokenizer.add_special_tokens({"mask_token": choice.text})
    assert tokenizer.mask_token_id == choice.id, (tokenizer.mask_token_id, choice)
