"""A tiny tokenizer, and a small corpus on disk."""

import pytest
from data_examples import story, write_jsonl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dlmconvert.data.packing import prepare_rows
from dlmconvert.recipe.schema import TextSource


@pytest.fixture(scope="session")
def base_tokenizer_json():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), ["<|end|>", "<|mask|>", "<|bos|>"]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([story(i) for i in range(50)] + ["User: \n\nAssistant:\n"] * 5, trainer)
    return tokenizer.to_str()


@pytest.fixture
def tokenizer(base_tokenizer_json):
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(base_tokenizer_json), eos_token="<|end|>", mask_token="<|mask|>", bos_token="<|bos|>"
    )


@pytest.fixture
def stories(tmp_path):
    """A JSONL corpus of 60 documents."""
    return write_jsonl(tmp_path / "stories.jsonl", [{"text": story(i)} for i in range(60)])


@pytest.fixture
def stores(tmp_path, tokenizer):
    """Two small sources with isolated documents."""
    paths = [write_jsonl(tmp_path / f"{k}.jsonl", [{"text": story(100 * k + i, 12 + 8 * k)} for i in range(20)]) for k in (0, 1)]
    return prepare_rows(
        [TextSource(path=str(path)) for path in paths], tokenizer=tokenizer, tokenizer_fingerprint="t", row_length=16,
        cache_folder=tmp_path / "cache", separator_id=0, validation=0, documents="isolated", workers=1,
    )[0]  # fmt: skip
