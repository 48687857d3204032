"""FLOPs of a step against torch's own counter; speed that no number of the run depends on."""

from __future__ import annotations

import pytest
import torch
from memory_stream import LENGTH, ROWS, SETTINGS, MemoryStream, make_engine
from test_every_method import prepared
from tiny_models import VOCAB, rewritten
from torch.utils.flop_counter import FlopCounterMode

from dlmconvert.backbone.adapters import attach_lora
from dlmconvert.training.losses import batch_loss, context_of
from dlmconvert.training.throughput import GPU_TFLOPS, Speed, matrix_product_flops, model_flops, peak_flops


def counted(engine, stream=None, settings=SETTINGS, ar_weight=0.0):
    """FLOPs of the matrix products of one forward and backward, and how many predictions were made."""
    stream = MemoryStream() if stream is None else stream
    batch = stream.batch(1, 0, ROWS)
    in_place = {torch.ops.aten.addmm_: lambda into, a, b, *_, **__: 2 * a[0] * a[1] * b[1]}  # which the counter does not know
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        loss, sums = batch_loss(engine, batch, context_of(settings, 1), settings, stream.num_eligible(1), 1, ar_weight=ar_weight)
        engine.backward(loss)
    return counter.get_total_flops(), sums["predicted"]


def lora(family):
    return attach_lora(rewritten(family), rank=4, alpha=8.0, dropout=0.0, target_modules="all-linear", mask_token_id=VOCAB - 1, seed=0)


# The first layer's frozen matrices need no gradient of their input, which two layers of LoRA show more than many would.
@pytest.mark.parametrize(("family", "adapters", "bound"), [("gpt2", False, 0.02), ("llama", False, 0.02), ("qwen2", False, 0.02), ("llama", True, 0.12)])
def test_flops_are_those_that_torch_counts(family, adapters, bound):
    model = lora(family) if adapters else rewritten(family)
    (model.base_model.model if adapters else model).set_attn_implementation("eager")  # whose products the counter sees
    engine = make_engine(model=model)
    flops, targets = counted(engine)
    assert model_flops(engine.model, LENGTH).of(ROWS * LENGTH, targets) == pytest.approx(flops, rel=bound)


@pytest.mark.parametrize(("name", "ar_weight"), [("nbdiff", 1.0), ("gidd", 0.0)])
def test_all_predictions_are_counted(name, ar_weight):
    """Next tokens of the clean copy; under GIDD right tokens too. Of two streams' pairs a dense mask computes all four quarters, the model needs one."""
    engine, stream, settings = prepared(name, micro_batch=ROWS)
    engine.model.set_attn_implementation("eager")
    flops, targets = counted(engine, stream, settings, ar_weight)
    streams, attention = (2, model_flops(engine.model, LENGTH).per_token - model_flops(engine.model, 0).per_token) if name == "nbdiff" else (1, 0.0)
    assert model_flops(engine.model, LENGTH, streams=streams).of(ROWS * LENGTH, targets) + 3 * ROWS * LENGTH * attention == pytest.approx(flops, rel=0.03)


def test_what_is_not_needed_is_not_counted():
    """Checkpointing recomputes, which is no use of the machine; a frozen matrix has no gradient; the AR objective attends to half."""
    full = model_flops(rewritten("llama"), LENGTH)
    assert model_flops(make_engine("llama", gradient_checkpointing=True).model, LENGTH) == full
    assert model_flops(lora("llama"), LENGTH).per_token < full.per_token
    assert model_flops(rewritten("llama"), LENGTH, causal=True).per_token < full.per_token
    assert full.per_target == 6 * rewritten("llama").lm_head.weight.numel()
    frozen = rewritten("gpt2")
    for parameter in frozen.parameters():
        parameter.requires_grad_(False)
    assert model_flops(frozen, 1).per_target == 4 * frozen.lm_head.weight.numel()


def test_speed_is_of_the_interval():
    speed = Speed(model_flops(rewritten("llama"), LENGTH), peak=1e9)
    for _ in range(4):
        speed.add(0.5, 100, 50)
    line = speed.line(steps_left=10)
    assert line["tokens_per_second"] == 200 and line["seconds_per_step"] == 0.5 and line["seconds_left"] >= 0
    assert line["mfu"] == pytest.approx(model_flops(rewritten("llama"), LENGTH).of(200, 100) / 1e9)
    speed.add(1.0, 100, 50, passes=2)
    assert speed.line(0)["mfu"] == pytest.approx(model_flops(rewritten("llama"), LENGTH).of(200, 50) / 1e9)
    speed.add(1.0, 100, 50)
    assert speed.line(0) == pytest.approx({"tokens_per_second": 100, "seconds_per_step": 1.0, "seconds_left": 0.0, "mfu": line["mfu"] / 2})
    assert "mfu" not in Speed().line(3)


def test_the_peak_is_known_or_timed(monkeypatch):
    state = torch.get_rng_state()
    peak, source = peak_flops(torch.device("cpu"), "fp32", processes=2)
    assert 1e8 < peak < 1e15 and "timed" in source and torch.equal(torch.get_rng_state(), state)
    monkeypatch.setattr("dlmconvert.training.throughput.matrix_product_flops", lambda *_: 7e12)
    for name, tflops in (("NVIDIA H100 PCIe", 756), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H200", 989), ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA L4", 121), ("NVIDIA L40S", 362), ("NVIDIA GB200", 2500), ("something", 7)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(torch.device("cuda"), "bf16", processes=4)[0] == 4e12 * tflops, name
    assert peak_flops(torch.device("cuda"), "fp32")[0] == 7e12
    assert matrix_product_flops(torch.device("cpu"), "bf16", budget_s=0.0) > 0
    for number, (words, _) in enumerate(GPU_TFLOPS):  # a shorter name that stands before a longer one would hide it
        assert not any(before in words for before, _ in GPU_TFLOPS[:number]), words
