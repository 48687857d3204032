"""The memory formula against traced allocations of real training steps, and the arithmetic of one against a count by hand."""

from __future__ import annotations

import pytest
import torch
from planned_steps import loss_of, traced_peak

from dlmconvert.backbone.adapters import attach_lora
from dlmconvert.backbone.denoiser import Denoiser
from dlmconvert.backbone.load import build_model, scratch_config
from dlmconvert.backbone.rewrite import rewrite_config
from dlmconvert.backbone.spec import DlmSpec
from dlmconvert.planning.architecture import describe
from dlmconvert.planning.memory import memory_of
from dlmconvert.planning.time import row_work
from dlmconvert.recipe.optimization import Lora
from dlmconvert.training.engine import SingleDeviceEngine

ROWS, LENGTH = 4, 128
# Measured when this was written: 0.97 to 1.02 of the traced peak in the cases below.
TOLERANCE = 0.08

GPT2 = {"model_type": "gpt2", "n_embd": 128, "n_layer": 4, "n_head": 4, "vocab_size": 1000, "n_positions": 256, "bos_token_id": 0, "eos_token_id": 0}
LLAMA = {
    "model_type": "llama", "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 352, "vocab_size": 1000, "max_position_embeddings": 256,
}  # fmt: skip
QWEN3 = LLAMA | {"model_type": "qwen3", "head_dim": 32}
PHI3 = LLAMA | {"model_type": "phi3", "pad_token_id": 0}
NEOX = {
    "model_type": "gpt_neox", "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512, "vocab_size": 1000,
    "max_position_embeddings": 256,
}  # fmt: skip
LORA = Lora(rank=16)

CASES = [
    (GPT2, {}),
    (GPT2, {"precision": "bf16"}),
    (GPT2, {"checkpointing": True}),
    (GPT2, {"accumulation": 2}),
    (GPT2, {"open_ratio": 0.5}),
    (GPT2 | {"vocab_size": 20000}, {}),
    (GPT2 | {"vocab_size": 20000}, {"rows": 1}),
    (GPT2 | {"vocab_size": 150_000}, {"precision": "bf16"}),  # logits in two chunks
    (LLAMA | {"vocab_size": 50000}, {"lora": LORA}),
    (LLAMA, {}),
    (LLAMA, {"precision": "bf16", "checkpointing": True}),
    (LLAMA, {"lora": LORA}),
    (LLAMA | {"hidden_size": 256, "intermediate_size": 704}, {"lora": LORA, "precision": "bf16", "checkpointing": True}),
    (QWEN3, {"precision": "bf16"}),
    (LLAMA, {"streams": 2}),
    (PHI3, {}),
    (NEOX, {}),
]


def train_two_steps(fields, *, precision="fp32", checkpointing=False, accumulation=1, open_ratio=1.0, lora=None, rows=ROWS, streams=1):
    config = scratch_config(fields)
    rewrite_config(config)
    model = build_model(config, seed=0)
    if lora is not None:
        model = attach_lora(
            model, rank=lora.rank, alpha=lora.alpha, dropout=0.0, target_modules=lora.target_modules, mask_token_id=None, seed=0
        )
    engine = SingleDeviceEngine(
        Denoiser(model, DlmSpec(mask_token_id=1, vocab_size=config.vocab_size)), device=torch.device("cpu"), precision=precision,
        betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, clip_norm=1.0, gradient_checkpointing=checkpointing,
    )  # fmt: skip
    for step in range(2):  # the moments appear with the first update, so the second step is the larger one
        for _ in range(accumulation):
            engine.backward(loss_of(engine, step, rows, LENGTH, open_ratio, streams))
        engine.update(1e-4)
    return engine


def planned(fields, *, precision="fp32", checkpointing=False, accumulation=1, open_ratio=1.0, lora=None, rows=ROWS, streams=1):
    return memory_of(
        describe(scratch_config(fields), lora=lora), micro_batch=rows, row_length=LENGTH, accumulates=accumulation > 1, precision=precision,
        gradient_checkpointing=checkpointing, has_mask=open_ratio < 1 or streams > 1, streams=streams, targets_per_token=streams,
    )  # fmt: skip


@pytest.mark.parametrize(("fields", "settings"), CASES, ids=lambda value: value.get("model_type") or "-".join(value) or "plain")
def test_peak_is_the_traced_one(fields, settings):
    measured = traced_peak(lambda: train_two_steps(fields, **settings))
    ratio = planned(fields, **settings).peak_bytes / measured
    assert 1 - TOLERANCE < ratio < 1 + TOLERANCE, ratio


def test_mixture_of_experts_is_near():
    fields = LLAMA | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    measured = traced_peak(lambda: train_two_steps(fields))
    assert 0.85 < planned(fields).peak_bytes / measured < 1.15


@pytest.mark.parametrize("lora", [None, LORA])
def test_parameters_are_those_of_the_real_model(lora):
    for fields in (GPT2, LLAMA):
        engine = train_two_steps(fields, lora=lora, rows=1)
        shape = describe(scratch_config(fields), lora=lora)
        real = list(engine.denoiser.parameters())
        assert shape.num_parameters == sum(p.numel() for p in real)
        assert shape.num_trainable == sum(p.numel() for p in real if p.requires_grad)


def test_tied_embeddings_are_counted_once():
    shape = describe(scratch_config({"model_type": "gpt2"}))
    assert shape.num_parameters == 124_439_808 and shape.is_tied


def test_the_mask_tokens_row_is_trained_beside_adapters():
    without = describe(scratch_config(LLAMA), lora=LORA)
    with_row = describe(scratch_config(LLAMA), lora=LORA, mask_token_id=0)
    assert with_row.num_trainable - without.num_trainable == 128


def test_flops_are_six_a_matrix_element():
    shape = describe(scratch_config(GPT2))
    layers, d, length = 4, 128, 256
    matrices = layers * 12 * d * d
    work = row_work(shape, length)
    assert work.model == pytest.approx(length * (6 * matrices + 12 * layers * length * d + 6 * 0.5 * 1000 * d)) and work.recomputed == 0
    again = row_work(shape, length, gradient_checkpointing=True)
    assert again.model == work.model and again.recomputed == pytest.approx(length * (2 * matrices + 4 * layers * length * d))
