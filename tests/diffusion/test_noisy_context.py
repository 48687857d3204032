"""Noisy context: block models trained on x_t alone. The mask, what decoding and the likelihood see of it, and the command line."""

from __future__ import annotations

import json
import random

import pytest
import torch
from command_line import SMALL, curve, works, write_corpus
from tiny_models import build, denoiser, rewritten
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

from dlmconvert.backbone.rewrite import call_model
from dlmconvert.diffusion.attention import BIDIRECTIONAL, CAUSAL, AttentionContext, allowed_matrix, realise
from dlmconvert.diffusion.schedules import open_share
from dlmconvert.diffusion.streams import block_starts

MASK = 299


def noisy(block_length):
    return AttentionContext(pattern="block_causal_noisy", block_length=block_length)


def documents(lengths):
    """(segments_BL, positions_BL) of one row."""
    segments = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    return segments, torch.cat([torch.arange(n) for n in lengths])[None]


@pytest.mark.parametrize("case", range(20))
def test_a_token_sees_its_block_and_the_blocks_before_it(case):
    """Pair by pair, in one document and in packed ones; and the share of open future pairs, counted."""
    draw = random.Random(case)
    lengths, block = [draw.randint(1, 9) for _ in range(draw.randint(1, 3))], draw.randint(1, 6)
    context = noisy(block).in_documents(*documents(lengths)) if case % 2 else noisy(block)
    documents_of = [(d, i) for d, n in enumerate(lengths) for i in range(n)] if case % 2 else [(0, i) for i in range(sum(lengths))]
    expected = [[d == e and k // block <= q // block for e, k in documents_of] for d, q in documents_of]
    matrix = allowed_matrix(sum(lengths), context)[0, 0]
    assert matrix.tolist() == expected
    if not case % 2 and sum(lengths) > 1:
        future = torch.ones_like(matrix).triu(1)
        assert open_share(context, sum(lengths)) == pytest.approx(float(matrix[future].double().mean()))


def test_every_realisation_attends_alike():
    length = 75
    context = noisy(8).in_documents(*(t.expand(2, -1) for t in documents([30, 45])))
    q, k, v = torch.randn(3, 2, 2, length, 16, generator=torch.Generator().manual_seed(0)).unbind(0)
    flex, dense, added = (realise(context, length, kind, torch.float32, "cpu").mask for kind in ("flex_attention", "sdpa", "eager"))
    expected = scaled_dot_product_attention(q, k, v, attn_mask=dense)
    torch.testing.assert_close(flex_attention(q, k, v, block_mask=flex), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scaled_dot_product_attention(q, k, v, attn_mask=added), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_blocks_of_one_are_causal_and_a_block_of_the_row_is_bidirectional():
    model, tokens_BL = rewritten("gpt2"), torch.randint(3, 200, (2, 12), generator=torch.Generator().manual_seed(1))
    positions_BL = torch.arange(12).expand(2, 12)
    for block, same in ((1, CAUSAL), (12, BIDIRECTIONAL)):
        logits, expected = (call_model(model, tokens_BL, positions_BL, context).logits for context in (noisy(block), same))
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("alignment", ["in_place", "shift"])
def test_behind_clean_text_training_sees_the_logits_of_decoding_and_of_the_likelihood(alignment):
    """Block after block: x_t with clean blocks before it. Under shift the first token of a block is read from the state before, as ever."""
    length, block = 12, 4
    model = denoiser(build("llama"), alignment, "block_causal_noisy", block_length=block)
    x_0_BL = torch.randint(3, 200, (2, length), generator=torch.Generator().manual_seed(1))
    positions_BL = torch.arange(length).expand(2, length)
    noise_BL = torch.rand(2, length, generator=torch.Generator().manual_seed(2)) < 0.6
    starts_BL = block_starts(positions_BL, block) & (positions_BL > 0)
    for first in range(0, length, block):
        inside_BL = (positions_BL >= first) & (positions_BL < first + block)
        masked_BL = noise_BL & (positions_BL >= first) & (positions_BL > 0)
        x_t_BL = x_0_BL.masked_fill(masked_BL, MASK)
        targets_BL = masked_BL & inside_BL
        trained_NV = model(x_t_BL, targets_BL, positions_BL, noisy(block))
        end = first + block
        logits_NV = model.forward_columns(  # what the sampler calls
            x_t_BL[:, :end], positions_BL[:, :end], (targets_BL.roll(-1, 1) if alignment == "shift" else targets_BL)[:, :end],
            allowed_matrix(end, noisy(block))[:, 0], end, None, torch.arange(end)[None],
        )  # fmt: skip
        torch.testing.assert_close(trained_NV, logits_NV, rtol=1e-5, atol=1e-5)
        read_clean_BL = targets_BL & starts_BL if alignment == "shift" else torch.zeros_like(targets_BL)
        found_NV = model.predict_blocks(x_t_BL, x_0_BL, targets_BL & ~read_clean_BL, read_clean_BL, positions_BL)
        chosen_BS = torch.cat([targets_BL & ~read_clean_BL, read_clean_BL], 1)
        noised, clean = torch.zeros(*chosen_BS.shape, found_NV.shape[1]).masked_scatter(chosen_BS[..., None], found_NV).chunk(2, 1)
        torch.testing.assert_close(trained_NV, (noised + clean)[targets_BL], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("alignment", ["in_place", "shift"])
def test_adapt_sample_and_eval(alignment, tmp_path, tiny_checkpoints, monkeypatch):
    """Blocks that grow, packed documents; held-out text is scored behind clean blocks, as decoding goes, with and without its cache."""
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path)
    words = ["method.name=bd3lm", "method.attention={pattern: block_causal_noisy, block_length: 8, anneal: block_growth, anneal_steps: 4}"]
    words += [f"method.alignment={alignment}", "data.documents=isolated", "run.folder=noisy", "train.steps=6", "train.log_steps=1"]
    works("adapt", tiny_checkpoints["llama"], *SMALL, *words)
    lines = [line for line in curve(tmp_path / "noisy" / "adapt") if "loss" in line]
    assert [line["open_ratio"] > 0 for line in lines] == [False] + 5 * [True] and all(line["gradient_norm"] > 0 for line in lines)
    model = tmp_path / "noisy" / "adapt" / "model"
    spec = json.loads((model / "config.json").read_text())["dlm"]
    assert (spec["attention"], spec["block_length"], spec["annealing"]["block_stages"][-1][1]) == ("block_causal_noisy", 8, 8)
    texts = [works("sample", model, "-p", "the quick", "--max-new-tokens", 20, "--temperature", 0, "--json", *how).out for how in ((), ("--cache", "none"))]
    assert json.loads(texts[0])["text"] == json.loads(texts[1])["text"]
    how = ["--data", "text.jsonl", "--row-length", 32, "--rows", 4, "--draws", 2, "--json"]
    found, twin = (json.loads(works("eval", folder, *how).out)[0] for folder in (model, clean_twin(model)))
    assert found["kind"] == "nelbo" and found["nats_per_token"] == twin["nats_per_token"]


def clean_twin(model):
    """The same weights as a model of clean context."""
    twin = model.parent / "twin"
    twin.mkdir()
    for file in model.iterdir():
        (twin / file.name).write_bytes(file.read_bytes())
    config = json.loads((twin / "config.json").read_text())
    config["dlm"]["attention"] = "block_causal"
    (twin / "config.json").write_text(json.dumps(config))
    return twin
