"""Learning rates point by point, and what decays."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_models import build

from dlmconvert.training.optimizer import clip, gradient_norm, learning_rate, make_adamw

COMMON = {"steps": 100, "peak": 2.0, "final": 0.5, "decay_fraction": 0.2}


@pytest.mark.parametrize("schedule", ["cosine", "constant", "wsd"])
def test_warm_up_is_linear_and_ends_at_the_peak(schedule):
    rates = [learning_rate(step, warmup_steps=10, schedule=schedule, **COMMON) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[10] == pytest.approx(2.0) and max(rates) == pytest.approx(2.0)
    assert learning_rate(0, warmup_steps=0, schedule=schedule, **COMMON) == pytest.approx(2.0)


def test_cosine():
    for step in (10, 33, 55, 99):
        progress = (step - 10) / 90
        expected = 0.5 + 1.5 * (1 + math.cos(math.pi * progress)) / 2
        assert learning_rate(step, warmup_steps=10, schedule="cosine", **COMMON) == pytest.approx(expected)
    assert learning_rate(55, warmup_steps=10, schedule="cosine", **COMMON) == pytest.approx(1.25)


def test_constant():
    assert {learning_rate(step, warmup_steps=10, schedule="constant", **COMMON) for step in range(10, 100)} == {2.0}


def test_warm_up_stable_decay():
    rates = [learning_rate(step, warmup_steps=10, schedule="wsd", **COMMON) for step in range(100)]
    assert set(rates[10:80]) == {2.0}
    assert rates[80:] == pytest.approx([0.5 + 1.5 * left / 20 for left in range(20, 0, -1)])


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_only_matrices_decay(family):
    model = build(family)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, kept = make_adamw(model, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.3).param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.3, 0.0)
    decayed, kept = ({names[id(p)] for p in group["params"]} for group in (decayed, kept))
    assert decayed | kept == set(names.values()) and not decayed & kept
    assert all(word not in name for name in decayed for word in ("bias", "norm", "ln_", "wte", "wpe", "embed"))
    assert all("weight" in name and ("proj" in name or "attn" in name or "mlp" in name or "lm_head" in name) for name in decayed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_is_that_of_all_elements(dtype):
    """A plain float32 sum over a tensor of this size is off by a thousandth, and more in larger ones."""
    draw = torch.Generator().manual_seed(0)
    tensors = [torch.randn(size, generator=draw).to(dtype) for size in (10_000_001, 2 * 4096, 4096, 5, 1)] + [torch.zeros(0, dtype=dtype)]
    expected = math.sqrt(sum(float(t.double().square().sum()) for t in tensors))
    assert float(gradient_norm(tensors)) == pytest.approx(expected, rel=1e-6)
    assert float(gradient_norm([])) == 0
    for value in (math.nan, math.inf):
        tensors[0][7] = value
        assert not math.isfinite(gradient_norm(tensors))


def test_clipping_to_a_norm_and_to_none():
    def parameters():
        model = torch.nn.Linear(3, 2)
        model.weight.grad, model.bias.grad = torch.full((2, 3), 3.0), None
        return list(model.parameters())

    clipped, left = parameters(), parameters()
    assert float(clip(clipped, 0.5)) == pytest.approx(3 * math.sqrt(6)) == pytest.approx(float(clip(left, None)))
    assert float(gradient_norm([clipped[0].grad])) == pytest.approx(0.5, rel=1e-5) and left[0].grad.eq(3).all()
