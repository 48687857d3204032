"""Shared by all tests: one thread, no network, tiny checkpoints of several families on disk."""

from __future__ import annotations

import os

# Before torch is imported: spin-waiting threads slow a busy machine down tenfold.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def tiny_tokenizer_folder(tmp_path_factory):
    """A byte-level BPE tokenizer of 300 tokens with `<|endoftext|>`, saved."""
    from tiny_models import TEXT, VOCAB

    from dlmconvert.backbone.scratch import train_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = train_tokenizer(TEXT, VOCAB, "bpe")
    assert len(tokenizer) == VOCAB
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_tokenizer(tiny_tokenizer_folder):
    """A fresh copy: tests may add tokens to it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_tokenizer_folder)


@pytest.fixture(scope="session")
def tiny_checkpoints(tmp_path_factory, tiny_tokenizer_folder):
    """{family: folder}: ordinary AR checkpoints with random weights, as transformers itself saves them. Read only."""
    from tiny_models import build
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer_folder)
    folders = {}
    for family in ("gpt2", "llama", "qwen2"):
        folders[family] = tmp_path_factory.mktemp(family)
        build(family).save_pretrained(folders[family])
        tokenizer.save_pretrained(folders[family])
    return folders
