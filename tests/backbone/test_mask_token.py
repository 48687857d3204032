"""Which id stands for [MASK], and what installing it does to the model and the tokenizer."""

from __future__ import annotations

import pytest
import torch
from tiny_models import VOCAB, build
from transformers import AutoTokenizer

from dlmconvert.backbone.mask_token import RUNTIME_IDS, choose_mask_token, install_mask_token
from dlmconvert.errors import UserError


def installed(model, tokenizer, requested=None, init="mean", model_type="llama"):
    choice = choose_mask_token(requested, tokenizer, model.get_input_embeddings().weight.shape[0], model_type)
    install_mask_token(model, tokenizer, choice, init, seed=0)
    return choice


def reloaded(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return AutoTokenizer.from_pretrained(tmp_path / "tokenizer")


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
def test_a_full_tokenizer_gets_a_row(family, tiny_tokenizer, tmp_path):
    model = build(family)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tokens_BL = torch.arange(10)[None] + 5
    logits = model(tokens_BL).logits
    choice = installed(model, tiny_tokenizer, model_type=family)
    assert (choice.id, choice.adds_row, choice.is_word) == (VOCAB, True, False) and "one is added" in choice.reason
    for matrix in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
        assert matrix.shape[0] == VOCAB + 1
        torch.testing.assert_close(matrix[VOCAB], matrix[:VOCAB].mean(0))
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) is tied
    for name, value in model.state_dict().items():
        assert torch.equal(value[: len(before[name])], before[name]), name
    assert torch.equal(model(tokens_BL).logits[..., :VOCAB], logits)
    assert model.config.vocab_size == VOCAB + 1
    assert reloaded(tiny_tokenizer, tmp_path).mask_token_id == VOCAB


def test_spare_rows_are_used_before_rows_are_added(tiny_tokenizer, tmp_path):
    model = build("llama", vocab_size=VOCAB + 20)
    choice = installed(model, tiny_tokenizer)
    assert (choice.id, choice.adds_row) == (VOCAB, False) and "first of 20 unused rows" in choice.reason
    for matrix in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
        assert matrix.shape[0] == VOCAB + 20
        torch.testing.assert_close(matrix[VOCAB], matrix[:VOCAB].mean(0))  # of the rows that are tokens
    assert reloaded(tiny_tokenizer, tmp_path).mask_token_id == VOCAB


def test_the_tokenizers_own(tiny_tokenizer):
    tiny_tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    model = build("llama", vocab_size=VOCAB + 20)
    choice = installed(model, tiny_tokenizer)
    assert (choice.id, choice.text, choice.adds_row) == (VOCAB, "[MASK]", False)


def test_the_tokenizers_own_may_lie_beyond_the_embedding(tiny_tokenizer):
    """As may others: no row is shared with another token."""
    tiny_tokenizer.add_special_tokens({"pad_token": "<pad>"})
    model = build("llama")
    choice = installed(model, tiny_tokenizer)
    assert (choice.id, choice.adds_row) == (VOCAB + 1, True)
    matrix = model.get_input_embeddings().weight
    assert matrix.shape[0] == VOCAB + 2
    torch.testing.assert_close(matrix[VOCAB:], matrix[:VOCAB].mean(0).expand(2, -1))
    assert choose_mask_token(None, tiny_tokenizer, VOCAB, "llama").id == tiny_tokenizer.mask_token_id == VOCAB + 1


def test_a_token_called_mask_is_the_mask_token(tiny_tokenizer):
    tiny_tokenizer.add_tokens(["<|mask|>", "<|other|>"], special_tokens=True)
    choice = installed(build("llama", vocab_size=VOCAB + 8), tiny_tokenizer)
    assert choice.id == VOCAB == tiny_tokenizer.mask_token_id
    other = choose_mask_token(VOCAB + 5, tiny_tokenizer, VOCAB + 8, "llama")
    assert other.text not in tiny_tokenizer.get_vocab()


@pytest.mark.parametrize("text", ["<|reserved_special_token_3|>", "<unused7>", "<|extra_0|>"])
def test_a_reserved_token(text, tiny_tokenizer, tmp_path):
    tiny_tokenizer.add_tokens(["<|im_start|>", text], special_tokens=True)
    model = build("llama", vocab_size=VOCAB + 2)
    choice = installed(model, tiny_tokenizer)
    assert (choice.id, choice.text, choice.adds_row) == (VOCAB + 1, text, False) and "reserved" in choice.reason
    again = reloaded(tiny_tokenizer, tmp_path)
    assert again.mask_token_id == VOCAB + 1 and len(again) == VOCAB + 2


@pytest.mark.parametrize("family", sorted(RUNTIME_IDS))
def test_the_id_that_runtimes_expect(family, tiny_tokenizer, tmp_path, monkeypatch):
    """Scaled down: the unused ids between the tokenizer's end and the runtime's id are filled, so that the mask lands on it."""
    monkeypatch.setitem(RUNTIME_IDS, family, VOCAB + 3)
    model = build("qwen2", vocab_size=VOCAB + 8)
    choice = installed(model, tiny_tokenizer, model_type=family)
    assert (choice.id, choice.adds_row) == (VOCAB + 3, False) and family in choice.reason
    again = reloaded(tiny_tokenizer, tmp_path)
    assert again.mask_token_id == VOCAB + 3 and len(again) == VOCAB + 4
    assert again("<|mask|>")["input_ids"] == [VOCAB + 3]
    # Not when the id is taken, or outside the matrix.
    for rows, used_id in ((VOCAB + 3, VOCAB + 3), (VOCAB + 8, VOCAB - 1)):
        monkeypatch.setitem(RUNTIME_IDS, family, used_id)
        fresh = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
        fresh._mask_token = None
        assert choose_mask_token(None, fresh, rows, family).reason.find("runtimes") == -1


def test_the_real_runtime_ids():
    assert RUNTIME_IDS == {"qwen2": 151666, "qwen3": 151669, "qwen3_moe": 151669}


@pytest.mark.parametrize("as_text", [True, False])
def test_a_word_piece(as_text, tiny_tokenizer):
    """DiffuGPT-S and DiffuLLaMA: an ordinary token. Nothing changes in the model or the tokenizer."""
    model = build("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    vocabulary, word_id = tiny_tokenizer.get_vocab(), VOCAB - 4
    word = tiny_tokenizer.convert_ids_to_tokens(word_id)
    choice = installed(model, tiny_tokenizer, requested=word if as_text else word_id)
    assert (choice.id, choice.is_word, choice.adds_row) == (word_id, True, False) and "booleans" in choice.reason
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert tiny_tokenizer.get_vocab() == vocabulary and tiny_tokenizer.mask_token is None
    assert word_id in tiny_tokenizer(tiny_tokenizer.decode([word_id]))["input_ids"]  # text may still contain it


def test_text_that_is_one_piece_only_after_tokenising(tiny_tokenizer):
    word = next(t for t in tiny_tokenizer.get_vocab() if t.startswith("\u0120") and len(t) > 3)
    choice = choose_mask_token(word.replace("\u0120", " "), tiny_tokenizer, VOCAB, "gpt2")
    assert choice.id == tiny_tokenizer.convert_tokens_to_ids(word) and choice.is_word


def test_a_new_token_by_name_and_an_unused_id(tiny_tokenizer):
    choice = installed(build("llama", vocab_size=VOCAB + 4), tiny_tokenizer, requested="<blank>")
    assert (choice.id, choice.text) == (VOCAB, "<blank>") and tiny_tokenizer.mask_token_id == VOCAB
    fresh = choose_mask_token(VOCAB + 2, tiny_tokenizer, VOCAB + 4, "llama")
    assert (fresh.id, fresh.adds_row, fresh.is_word) == (VOCAB + 2, False, False)
    added = choose_mask_token(VOCAB + 4, tiny_tokenizer, VOCAB + 4, "llama")
    assert (added.id, added.adds_row) == (VOCAB + 4, True)


def test_mask_ids_that_cannot_be(tiny_tokenizer):
    end = tiny_tokenizer.eos_token_id
    for requested in (end, tiny_tokenizer.eos_token):
        with pytest.raises(UserError, match="begin, end or padding"):
            choose_mask_token(requested, tiny_tokenizer, VOCAB, "gpt2")
    for requested in (-1, VOCAB + 1):
        with pytest.raises(UserError, match="ids 0 to 299"):
            choose_mask_token(requested, tiny_tokenizer, VOCAB, "gpt2")
    with pytest.raises(UserError, match="is not one token"):
        choose_mask_token("several words in a row", tiny_tokenizer, VOCAB, "gpt2")


def test_an_unknown_word_is_not_the_unknown_token():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    with pytest.raises(UserError, match="is not one token"):
        choose_mask_token("gap", tokenizer, 4, "gpt2")
    assert choose_mask_token("<gap>", tokenizer, 4, "gpt2").id == 2


@pytest.mark.parametrize("init", ["mean", "normal", "keep"])
def test_how_the_row_starts(init, tiny_tokenizer):
    model = build("llama", vocab_size=VOCAB + 4)
    matrix = model.get_input_embeddings().weight
    before = matrix[VOCAB].clone()
    installed(model, tiny_tokenizer, init=init)
    mean = matrix[:VOCAB].mean(0)
    assert torch.equal(matrix[VOCAB], before) is (init == "keep")
    if init == "mean":
        torch.testing.assert_close(matrix[VOCAB], mean)
    if init == "normal":
        assert 0.3 < ((matrix[VOCAB] - mean) / matrix[:VOCAB].std(0)).std().item() < 2


def test_bfloat16_rows(tiny_tokenizer):
    model = build("llama").bfloat16()
    installed(model, tiny_tokenizer)
    matrix = model.get_input_embeddings().weight
    assert matrix.dtype == torch.bfloat16
    torch.testing.assert_close(matrix[VOCAB].float(), matrix[:VOCAB].float().mean(0), rtol=1e-2, atol=1e-3)
