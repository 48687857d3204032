"""Gaps in a text, encoding around them, and the text of a result."""

from __future__ import annotations

from pathlib import Path

import pytest

from dlmconvert.sampling.text import decode_pieces, encode_row, end_ids, parse_gaps, token_text

CHECKPOINTS = Path(__file__).parents[2].parent / "shared" / "checkpoints"


@pytest.fixture(scope="module", params=["gpt2-tokenizer", "stories260K"])
def tokenizer(request):
    from transformers import AutoTokenizer

    folder = CHECKPOINTS / request.param
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    return AutoTokenizer.from_pretrained(folder)


def test_gaps():
    assert parse_gaps("a[[MASK:3]]b") == ["a", 3, "b"]
    assert parse_gaps("[[MASK:1]][[MASK:2]]") == [1, 2]
    assert parse_gaps("x[[1, 2]] [[MASK:5]]") == ["x[[1, 2]] ", 5]


@pytest.mark.parametrize(
    "text, message",
    [
        ("ab[[MASK]]", "character 3"),
        ("[[MASK:4]] [[MASK:x]]", "character 12"),
        ("[[MASK:-1]]", "character 1"),
        ("[[mask:3]]", "character 1"),
        ("[[MASK:3]", "character 1"),
        ("a[[MASK:0]]", "at least 1"),
        ("plain", "no gap"),
    ],
)
def test_malformed_gaps_name_their_position(text, message):
    with pytest.raises(ValueError, match=message):
        parse_gaps(text)


def test_a_filled_row_reads_like_the_text(tokenizer):
    # Fill the gap with what the whole text has there: the decoded pieces join to the whole text again.
    before, middle, after = "Once upon a time", " there was a", " little girl. She"
    num_middle = len(encode_row(tokenizer, ["x", middle])[0]) - len(encode_row(tokenizer, ["x"])[0])
    row, num_start = encode_row(tokenizer, [before, num_middle, after])
    filler = [token for token in encode_row(tokenizer, [before, middle, after])[0]]
    assert len(filler) == len(row)
    assert all(given is None or given == token for given, token in zip(row, filler, strict=True))
    pieces = decode_pieces(tokenizer, filler, [token is None for token in row], num_start)
    assert pieces == [(before, False), (middle, True), (after, False)]


def test_no_special_token_in_the_middle_and_no_space_that_was_not_there(tokenizer):
    row, num_start = encode_row(tokenizer, ["(", 1, "x)"])
    assert row.count(None) == 1 and row[num_start + 1] is None or tokenizer.bos_token_id == row[0]
    inner = [token for token in row[num_start:] if token is not None]
    assert not set(inner) & set(tokenizer.all_special_ids)
    assert decode_pieces(tokenizer, inner, [False] * len(inner)) == [("(x)", False)]


def test_start_tokens(tokenizer):
    bos = tokenizer.bos_token_id
    adds_bos = tokenizer.encode("a")[0] == bos
    assert encode_row(tokenizer, ["", 3]) == ([bos, None, None, None], 1)
    assert encode_row(tokenizer, [2, "a"])[0][:3] == [bos, None, None]
    row, num_start = encode_row(tokenizer, ["a", 1])
    assert num_start == int(adds_bos) and (row[0] == bos) == adds_bos


def test_without_bos_the_end_token_starts_and_without_both_it_is_refused():
    class Bare:
        bos_token_id, eos_token_id = None, 7

        def encode(self, text, add_special_tokens=True):
            return [ord(letter) for letter in text]

    assert encode_row(Bare(), [2]) == ([7, None, None], 1)
    assert encode_row(Bare(), ["a", 2]) == ([97, None, None], 0)
    Bare.eos_token_id = None
    with pytest.raises(ValueError, match="neither"):
        encode_row(Bare(), [2])


def test_characters_of_several_tokens(tokenizer):
    text = "caf\u00e9 \u4e2d"
    ids = [token for token in encode_row(tokenizer, [text])[0] if token != tokenizer.bos_token_id]
    for cut in range(1, len(ids)):
        pieces = decode_pieces(tokenizer, ids, [place >= cut for place in range(len(ids))])
        assert "".join(piece for piece, _ in pieces) == text


def test_token_text_keeps_its_space(tokenizer):
    ids = tokenizer.encode("say hello there", add_special_tokens=False)
    assert "".join(token_text(tokenizer, token) for token in ids).strip() == "say hello there"
    assert any(token_text(tokenizer, token).startswith(" ") for token in ids)


def test_a_text_is_over_where_the_next_one_would_begin():
    class Marked:
        eos_token_id, bos_token_id = 7, 5

        def encode(self, text, add_special_tokens=True):
            return [self.bos_token_id, 9]

    assert end_ids(Marked()) == [7, 5]
    Marked.encode = lambda self, text, add_special_tokens=True: [9]  # bos stands nowhere
    assert end_ids(Marked()) == [7]
    Marked.bos_token_id = 7  # one token for both, as in GPT-2
    assert end_ids(Marked()) == [7]
    Marked.eos_token_id = None
    assert end_ids(Marked()) == []
