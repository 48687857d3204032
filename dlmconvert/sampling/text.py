"""Between text and rows of tokens: gaps in a prompt, encoding around them, and which part of a result was generated.

`tokenizer` is any Hugging Face tokenizer; only `encode`, `decode` and the ids of its special tokens are used.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

_GAP = re.compile(r"\[\[MASK:([0-9]+)(?:-([0-9]+))?\]\]")
_OPENING = re.compile(r"\[\[\s*MASK", re.IGNORECASE)
_UNFINISHED = "\ufffd"  # what decoding shows for the first bytes of a character whose last bytes are missing


def parse_gaps(text: str) -> list[str | int | tuple[int, int]]:
    """Text around gaps and the lengths of the gaps in tokens: "a[[MASK:3]]b" is ["a", 3, "b"]; empty text is left out.
    [[MASK:4-24]] is a gap whose length is chosen between two bounds, here (4, 24).

    Raises ValueError, with the position in the text, for a malformed gap, a gap of no tokens, and a text without a gap.
    """
    parts: list[str | int | tuple[int, int]] = []
    end = 0
    for opening in _OPENING.finditer(text):
        gap = _GAP.match(text, opening.start())
        if gap is None:
            shown = text[opening.start() : opening.start() + 20]
            raise ValueError(f"malformed gap at character {opening.start() + 1}: {shown!r}; write [[MASK:24]] for a gap of 24 tokens, [[MASK:4-24]] for 4 to 24")
        if int(gap[1]) < 1:
            raise ValueError(f"gap at character {gap.start() + 1} is {gap[0]}; a gap has at least 1 token")
        if gap[2] is not None and int(gap[2]) < int(gap[1]):
            raise ValueError(f"gap at character {gap.start() + 1} is {gap[0]}; its bounds must rise")
        parts += [text[end : gap.start()], int(gap[1]) if gap[2] is None else (int(gap[1]), int(gap[2]))]
        end = gap.end()
    if end == 0:
        raise ValueError("no gap in the text; write [[MASK:24]] where 24 tokens are to be filled in")
    return [part for part in [*parts, text[end:]] if part != ""]


def encode_row(tokenizer: Any, parts: Sequence[str | int | tuple[int, int]]) -> tuple[list[int | None | tuple[int, int]], int]:
    """(row, number of start tokens): the row of tokens, None in gaps, special tokens nowhere but in front. A gap whose length is to
    be chosen is one item, its bounds.

    The start token (bos, else eos) stands in front when the tokenizer puts its bos in front of every text, and when nothing else
    would: a model with alignment `shift` cannot predict the first token of a row.
    Raises ValueError when a start token is needed and the tokenizer has none.
    """
    row: list[int | None | tuple[int, int]] = []
    for part in parts:
        if isinstance(part, int):
            row += [None] * part
        elif isinstance(part, tuple):
            row.append(part)
        else:
            row += _encode_inside(tokenizer, part) if row else tokenizer.encode(part, add_special_tokens=False)
    bos = tokenizer.bos_token_id
    if row and isinstance(row[0], int) and (not _begins_with_bos(tokenizer) or row[0] == bos):
        return row, 0
    start = bos if bos is not None else tokenizer.eos_token_id
    if start is None:
        raise ValueError("the text starts with a gap (or is empty), and the tokenizer has neither a bos nor an eos token to start with")
    return [start, *row], 1


def end_ids(tokenizer: Any) -> list[int]:
    """The tokens at which a text is over: eos, and bos where the tokenizer puts it in front of every text: the next one begins there,
    and rows of such texts may hold no eos at all. Empty for a tokenizer without an eos token."""
    if tokenizer.eos_token_id is None:
        return []
    return list(dict.fromkeys([tokenizer.eos_token_id, *([tokenizer.bos_token_id] if _begins_with_bos(tokenizer) else [])]))


def _begins_with_bos(tokenizer: Any) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer.encode("a")[0] == tokenizer.bos_token_id


def _encode_inside(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text that does not start the row: SentencePiece tokenizers would put a space in front of it."""
    plain = tokenizer.encode(text, add_special_tokens=False)
    anchor = tokenizer.encode("\n", add_special_tokens=False)
    if _after(anchor, tokenizer.encode("\nx", add_special_tokens=False)) == tokenizer.encode("x", add_special_tokens=False):
        return plain
    behind = _after(anchor, tokenizer.encode("\n" + text, add_special_tokens=False))
    return plain if behind is None else behind


def _after(prefix: list[int], ids: list[int]) -> list[int] | None:
    return ids[len(prefix) :] if ids[: len(prefix)] == prefix else None


def decode_pieces(tokenizer: Any, tokens: Sequence[int], is_generated: Sequence[bool], num_start: int = 0) -> list[tuple[str, bool]]:
    """The text of a row as (text, was it generated) pieces, without its first `num_start` tokens.

    Each piece is what it adds to the text before it, so spaces and characters of several tokens come out as in the whole text.
    """
    pieces: list[tuple[str, bool]] = []
    shown = ""
    for place in range(num_start, len(tokens)):
        last = place + 1 == len(tokens)
        if not last and is_generated[place + 1] == is_generated[place]:
            continue
        text = _decode(tokenizer, tokens[num_start : place + 1])
        if not last:
            text = text.rstrip(_UNFINISHED)
        pieces.append((text[len(shown) :], bool(is_generated[place])))
        shown = text
    return pieces


def token_text(tokenizer: Any, token: int) -> str:
    """The text of one token as it stands inside a text (with its leading space)."""
    anchor = tokenizer.encode("a", add_special_tokens=False)
    return _decode(tokenizer, [*anchor, token])[len(_decode(tokenizer, anchor)) :]


def _decode(tokenizer: Any, tokens: Sequence[int]) -> str:
    return tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)
