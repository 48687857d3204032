"""The gap that `run` shows: chosen before any model has seen it, filled by both models in the same place."""

from __future__ import annotations

import ast

import torch
from tiny_models import VOCAB, build, denoiser

from dlmconvert.evaluation.generation import continue_prefix, fill_gap, held_out_function
from dlmconvert.sampling.text import parse_gaps


def test_a_held_out_function_has_one_gap_and_is_held_out(tiny_tokenizer):
    text = held_out_function(tiny_tokenizer, 0.05, 4000)
    assert text is not None and text == held_out_function(tiny_tokenizer, 0.05, 4000)
    before, gap, after = parse_gaps(text)
    assert before.startswith("def ") and gap >= 6 and after.strip().startswith("return")
    assert held_out_function(tiny_tokenizer, 0.0, 4000) is None
    assert held_out_function(tiny_tokenizer, 0.05, 8) is None
    ast.parse(before + "    pass\n" + after)


def test_the_ar_parent_sees_the_prefix_only(tiny_tokenizer):
    model = denoiser(build("gpt2"), attention="causal")
    model.tokenizer = tiny_tokenizer
    one, other = (continue_prefix(model, f"the quick[[MASK:5]]{behind}") for behind in (" fox", " dog sleeps"))
    assert one == other
    tokens = tiny_tokenizer("the quick")["input_ids"]
    with torch.no_grad():
        for _ in range(5):
            logits_V = model.model(torch.tensor([tokens])).logits[0, -1]
            logits_V[VOCAB - 1] = -torch.inf
            tokens.append(int(logits_V.argmax()))
    assert one == tiny_tokenizer.decode(tokens[-5:])


def test_the_converted_model_sees_both_sides(tiny_tokenizer):
    model = denoiser(build("gpt2"))
    model.tokenizer = tiny_tokenizer
    one, other = (fill_gap(model, f"the quick[[MASK:5]]{behind}") for behind in (" fox", " dog sleeps"))
    assert one != other and one == fill_gap(model, "the quick[[MASK:5]] fox")
    assert len(fill_gap(model, "a[[MASK:2]]b[[MASK:3]]c").split("\n")) >= 2
