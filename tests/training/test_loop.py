"""The loop: splits, objectives, errors, adapters, precision."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from memory_stream import LENGTH, ROWS, SETTINGS, MemoryStream, make_engine, run, weights
from tiny_models import VOCAB, rewritten

from dlmconvert.diffusion.attention import AttentionContext
from dlmconvert.errors import EXIT_FAILED, UserError
from dlmconvert.training.losses import batch_loss, context_of


def gradients(engine, settings, stream=None, step=1):
    """The gradient of one whole step, as `train` accumulates it."""
    stream = MemoryStream() if stream is None else stream
    engine.denoiser.zero_grad()
    context, loss = context_of(settings, step), 0.0
    for start in range(0, ROWS, settings.micro_batch):
        batch = stream.batch(step, start, min(start + settings.micro_batch, ROWS))
        counts = stream.num_eligible(step), -(-ROWS // settings.micro_batch), stream.num_masked(step)
        part, sums = batch_loss(engine, batch, context, settings, *counts)
        engine.backward(part)
        loss += sums["loss"]
    return loss, {name: p.grad.clone() for name, p in engine.parameters.items() if p.grad is not None}


def close(a, b, rtol, atol):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def test_ar_loss_is_hugging_faces_own():
    """method ar: the loss that the model computes itself from labels, on the same rows."""
    settings = dataclasses.replace(SETTINGS, causal=True, weight="unweighted", micro_batch=ROWS)
    for family in ("gpt2", "llama", "qwen2"):
        engine, stream = make_engine(family, attention="causal"), MemoryStream(causal=True)
        loss, _ = gradients(engine, settings, stream)
        x_0_BL = stream.batch(1, 0, ROWS).x_0_BL
        expected = engine.denoiser.model(input_ids=x_0_BL, labels=x_0_BL, is_causal=True).loss.item()
        assert loss == pytest.approx(expected, rel=1e-5)


def test_the_ar_objective_splits_too():
    settings = dataclasses.replace(SETTINGS, causal=True, weight="unweighted")
    whole = gradients(make_engine(), dataclasses.replace(settings, micro_batch=8), MemoryStream(causal=True))
    split = gradients(make_engine(), dataclasses.replace(settings, micro_batch=1), MemoryStream(causal=True))
    assert whole[0] == pytest.approx(split[0], rel=1e-6)
    close(whole[1], split[1], 1e-5, 1e-6)


def test_the_published_normaliser_depends_on_the_split():
    """Each micro-batch divided by its masked tokens, as DiffuLLaMA's code does; ours is the default for a reason."""
    losses = {}
    for micro_batch in (1, 8):
        settings = dataclasses.replace(SETTINGS, normaliser="masked_micro_batch", micro_batch=micro_batch)
        losses[micro_batch], _ = gradients(make_engine(), settings)
    assert abs(losses[1] - losses[8]) > 0.1
    stream, engine = MemoryStream(), make_engine()
    batch = stream.batch(1, 0, ROWS)
    ce_N = torch.nn.functional.cross_entropy(
        engine.denoiser(batch.x_t_BL, batch.masked_BL, batch.positions_BL, context_of(SETTINGS, 1)), batch.x_0_BL[batch.masked_BL], reduction="none"
    )  # fmt: skip
    total, num_masked = (ce_N / batch.t_BL[batch.masked_BL]).sum().item(), len(ce_N)
    assert losses[8] == pytest.approx(total / num_masked, rel=1e-5)


def test_the_logged_nelbo_is_per_eligible_token_whatever_the_objective(tmp_path):
    _, elbo = run(tmp_path / "a")
    _, published = run(tmp_path / "b", dataclasses.replace(SETTINGS, normaliser="masked_micro_batch"))
    assert elbo[0]["nelbo"] == pytest.approx(elbo[0]["loss"], rel=1e-6)  # the sum is divided before or after, which rounds differently
    assert elbo[0]["loss"] != published[0]["loss"]
    assert published[0]["nelbo"] == pytest.approx(elbo[0]["nelbo"], rel=1e-6)


def test_annealing_reaches_the_model():
    """Step by step the ratio grows; at the last annealing step the pattern needs no mask any more."""
    ratios = [context_of(SETTINGS, step).open_ratio for step in range(5)]
    assert ratios == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert context_of(dataclasses.replace(SETTINGS, causal=True), 5).open_ratio == 0.0
    assert context_of(dataclasses.replace(SETTINGS, anneal_steps=1), 0).open_ratio == 1.0
    losses = {gradients(make_engine(), SETTINGS, step=0)[0], gradients(make_engine(), dataclasses.replace(SETTINGS, anneal_steps=1), step=0)[0]}
    assert len(losses) == 2


def test_training_lowers_the_loss(tmp_path):
    _, lines = run(tmp_path, dataclasses.replace(SETTINGS, steps=40, learning_rate=1e-2, save_steps=100))
    first, last = (sum(line["nelbo"] for line in part) / 10 for part in (lines[:10], lines[-10:]))
    assert last < first - 0.5


@pytest.mark.parametrize("family", ["gpt2", "llama", "falcon", "qwen2"])
def test_gradient_checkpointing_changes_nothing(family):
    """Also for families that read the direction from the config, which is recomputed after the call has restored it."""
    for settings in (SETTINGS, dataclasses.replace(SETTINGS, anneal_steps=1), dataclasses.replace(SETTINGS, causal=True)):
        plain = gradients(make_engine(family), settings)
        frugal = gradients(make_engine(family, gradient_checkpointing=True), settings)
        assert plain[0] == pytest.approx(frugal[0], rel=1e-6)
        close(plain[1], frugal[1], 1e-5, 1e-6)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_bf16_is_close_to_fp32_with_float32_weights(family, tmp_path):
    """Stated bound: 1.5 percent of the loss in every step of a short run (bfloat16 has 8 bits; the loss is summed in float32)."""
    settings = dataclasses.replace(SETTINGS, learning_rate=1e-3)
    _, full = run(tmp_path / "full", settings, make_engine(family))
    engine, half = run(tmp_path / "half", settings, make_engine(family, precision="bf16"))
    assert {p.dtype for p in engine.parameters.values()} == {torch.float32}
    assert [line["loss"] for line in half] == pytest.approx([line["loss"] for line in full], rel=0.015)
    assert [line["loss"] for line in half] != [line["loss"] for line in full]


def test_a_batch_without_masks_updates_nothing_strange(tmp_path):
    stream = MemoryStream()
    fetch = stream.batch

    def nothing_masked(step, start, stop):
        batch = fetch(step, start, stop)
        batch.masked_BL = torch.zeros_like(batch.masked_BL)
        batch.x_t_BL = batch.x_0_BL
        return batch

    stream.batch = nothing_masked
    engine, lines = run(tmp_path, dataclasses.replace(SETTINGS, steps=1), make_engine(weight_decay=0.0), stream)
    assert lines[0]["loss"] == 0.0 and lines[0]["gradient_norm"] == 0.0
    assert all(bool(torch.isfinite(t).all()) for t in weights(engine).values())


def test_a_non_finite_loss_stops_before_the_update(tmp_path):
    engine = make_engine()
    before = weights(engine)
    with torch.no_grad():
        engine.denoiser.model.transformer.wte.weight[VOCAB - 1] = float("nan")
    with pytest.raises(UserError) as caught:
        run(tmp_path, engine=engine)
    assert caught.value.exit_code == EXIT_FAILED and "nan at step 1" in str(caught.value) and "none" in str(caught.value)
    after = weights(engine)
    assert all(torch.equal(before[name], after[name]) for name in before if "wte" not in name)


def test_a_non_finite_gradient_stops_before_the_update(tmp_path):
    engine = make_engine()
    engine.denoiser.model.transformer.h[0].mlp.c_fc.weight.register_hook(lambda grad: grad * float("inf"))
    before = weights(engine)
    with pytest.raises(UserError, match="gradient norm is (nan|inf) at step 1"):
        run(tmp_path, engine=engine)
    after = weights(engine)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_clipping():
    engine = make_engine(clip_norm=0.01)
    engine.backward(gradients_loss(engine))
    raw = torch.cat([p.grad.flatten() for p in engine.parameters.values() if p.grad is not None]).norm().item()
    assert engine.update(0.0) == pytest.approx(raw, rel=1e-4) and raw > 0.01
    assert all(p.grad is None for p in engine.parameters.values())


def gradients_loss(engine):
    stream = MemoryStream()
    return batch_loss(engine, stream.batch(0, 0, ROWS), context_of(SETTINGS, 0), SETTINGS, stream.num_eligible(0), 1)[0]


def test_isolated_documents_reach_the_model():
    segments_BL = (torch.arange(LENGTH) >= 10).long().expand(ROWS, -1)
    isolated, joined = (gradients(make_engine(), SETTINGS, MemoryStream(segments=s)) for s in (segments_BL, None))
    assert isolated[0] != joined[0]
    # A document's loss does not depend on its neighbour.
    stream = MemoryStream(segments=segments_BL)
    batch = stream.batch(0, 0, ROWS)
    first_BL = batch.masked_BL & (segments_BL == 0)
    values = []
    for other in (batch.x_t_BL, torch.where(segments_BL == 1, 7, batch.x_t_BL)):
        with torch.no_grad():
            values.append(make_engine().denoiser.eval()(other, first_BL, batch.positions_BL, AttentionContext(1.0, segments_BL=segments_BL)))
    torch.testing.assert_close(*values, rtol=0, atol=0)


def test_another_identity_is_refused(tmp_path):
    run(tmp_path, dataclasses.replace(SETTINGS, steps=2))
    with pytest.raises(UserError, match="belongs to another recipe"):
        run(tmp_path, identity="other")


def test_validation_lines_and_mode(tmp_path):
    engine = make_engine()
    modes = []

    def validate():
        modes.append(engine.denoiser.training)
        return {"nelbo": 1.5}

    _, lines = run(tmp_path, dataclasses.replace(SETTINGS, validate_steps=2), engine, validate=validate)
    assert [line["step"] for line in lines if "validation_nelbo" in line] == [2, 4] and modes == [False, False]
    assert engine.denoiser.training


def test_the_model_is_only_as_large_as_its_targets():
    """The head reads the hidden states of the masked positions, not of the row (and two tokens once, to see that it is plain)."""
    engine, stream = make_engine(model=rewritten("llama")), MemoryStream()
    shapes = []
    engine.denoiser.model.lm_head.register_forward_pre_hook(lambda module, inputs: shapes.append(inputs[0].shape))
    batch = stream.batch(0, 0, ROWS)
    batch_loss(engine, batch, context_of(SETTINGS, 0), SETTINGS, stream.num_eligible(0), 1)
    assert [shape[:-1].numel() for shape in shapes] == [2, int(batch.masked_BL.sum())]
