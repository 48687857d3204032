"""Objectives, normalisers and paths of attention through the loop; learning rates by kind of parameter."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from memory_stream import LENGTH, ROWS, SETTINGS, MemoryStream, make_engine, run, weights
from test_loop import close
from test_loop import gradients as gradients_of
from tiny_models import build, denoiser

from dlmconvert.diffusion.objective import cart_weights
from dlmconvert.errors import UserError
from dlmconvert.training.losses import context_of
from dlmconvert.training.optimizer import freeze, make_adamw, parameter_kinds, set_learning_rate

SEGMENTS = (torch.arange(LENGTH)[None] >= torch.arange(4, 20, 2)[:, None]).long()


@pytest.mark.parametrize("alignment", ["shift", "in_place"])
@pytest.mark.parametrize(
    "changes",
    [
        {"weight": "cart", "normaliser": "masked"},
        {"weight": "cart", "cart_p": 1.0},
        {"weight": "unweighted", "normaliser": "masked", "anneal": "window", "row_length": LENGTH},
        {"anneal": "none"},
    ],
)
def test_one_gradient_under_any_split(alignment, changes):
    settings = dataclasses.replace(SETTINGS, **changes)
    engine, stream = make_engine("llama", alignment=alignment), MemoryStream(alignment=alignment, segments=SEGMENTS)
    whole = gradients_of(engine, dataclasses.replace(settings, micro_batch=ROWS), stream)
    for micro_batch in (1, 3):
        split = gradients_of(engine, dataclasses.replace(settings, micro_batch=micro_batch), stream)
        assert split[0] == pytest.approx(whole[0], rel=1e-6)
        close(split[1], whole[1], 1e-5, 1e-6)


def test_the_cart_loss_is_weights_times_cross_entropy_over_masked_tokens():
    settings = dataclasses.replace(SETTINGS, weight="cart", cart_p=0.3, normaliser="masked", micro_batch=2)
    engine, stream = make_engine(), MemoryStream()
    batch = stream.batch(1, 0, ROWS)
    with torch.no_grad():
        logits_NV = engine.denoiser(batch.x_t_BL, batch.masked_BL, batch.positions_BL, context_of(settings, 1))
    ce_N = torch.nn.functional.cross_entropy(logits_NV, batch.x_0_BL[batch.masked_BL], reduction="none")
    expected = (cart_weights(batch.masked_BL, 0.3)[batch.masked_BL] * ce_N).sum() / batch.masked_BL.sum()
    assert gradients_of(engine, settings, stream)[0] == pytest.approx(float(expected), rel=1e-5)


def test_unweighted_over_masked_tokens_is_the_mean_cross_entropy(tmp_path):
    _, lines = run(tmp_path, dataclasses.replace(SETTINGS, weight="unweighted", normaliser="masked"))
    assert [line["loss"] for line in lines] == pytest.approx([line["cross_entropy"] for line in lines], rel=1e-6)


def test_the_window_reaches_the_model_and_the_log(tmp_path):
    settings = dataclasses.replace(SETTINGS, anneal="window", row_length=LENGTH)
    assert [context_of(settings, step).look_ahead for step in range(5)] == [6, 12, 18, None, None]
    assert context_of(dataclasses.replace(settings, causal=True), 0).open_ratio == 0.0
    _, lines = run(tmp_path / "window", settings)
    _, open_lines = run(tmp_path / "open", dataclasses.replace(SETTINGS, anneal_steps=1))
    assert 0 < lines[0]["open_ratio"] < lines[1]["open_ratio"] < 1 == lines[3]["open_ratio"]
    assert lines[0]["loss"] != open_lines[0]["loss"]


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "opt", "falcon", "qwen3_moe"])
def test_kinds_of_parameters(family):
    kinds = parameter_kinds(build(family))
    assert {"embeddings", "norm", "attention", "mlp"} <= set(kinds.values())
    for name, kind in kinds.items():
        is_head = name in ("lm_head.weight", "embed_out.weight")
        if is_head:
            assert kind == "head"
        elif any(word in name for word in ("embed", "wte", "wpe")):
            assert kind == "embeddings", name
        elif "norm" in name or "ln_" in name:
            assert kind == "norm", name
        else:
            assert kind == ("attention" if any(word in name for word in (".attn.", "self_attn", "attention.")) else "mlp"), name


def test_each_kind_has_its_rate():
    model = build("llama")
    rates = {"attention": 2.0, "mlp": 0.5, "embeddings": 1.0, "head": 0.1}
    optimizer = make_adamw(model, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.3, rates=rates)
    set_learning_rate(optimizer, 1e-3)
    kinds, names = parameter_kinds(model), {id(p): name for name, p in model.named_parameters()}
    seen = set()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            seen.add(name)
            assert group["lr"] == pytest.approx(1e-3 * rates.get(kinds[name], 1.0))
            assert group["weight_decay"] == (0.3 if parameter.ndim >= 2 and kinds[name] != "embeddings" else 0.0)
    assert seen == set(names.values())


def test_a_rate_of_zero_freezes(tmp_path):
    model = denoiser(build("llama"))
    rates = {"embeddings": 0.0, "head": 0.0}
    freeze(model, rates)
    engine = make_engine(model=model.model, rates=rates)
    frozen = [model.model.model.embed_tokens.weight, model.model.lm_head.weight]
    before = [p.detach().clone() for p in frozen]
    others = weights(engine)
    run(tmp_path, dataclasses.replace(SETTINGS, steps=2), engine)
    assert all(torch.equal(a, b) for a, b in zip(before, frozen, strict=True))
    assert not any("embed" in name or "lm_head" in name for name in engine.parameters)
    assert any(not torch.equal(others[name], tensor) for name, tensor in weights(engine).items() if name in others)


def test_a_tied_output_matrix_has_one_rate():
    with pytest.raises(UserError, match="is its embedding matrix"):
        freeze(build("gpt2"), {"embeddings": 0.0, "head": 1.0})
    model = build("gpt2")
    freeze(model, {"embeddings": 0.0, "head": 0.0})
    assert not model.transformer.wte.weight.requires_grad
