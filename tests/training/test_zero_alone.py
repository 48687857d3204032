"""ZeRO 1 and 2 in one process: gradients stay where the backward pass leaves them, and the update is the single engine's."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from deepspeed_engines import make_deepspeed
from memory_stream import SETTINGS, MemoryStream, make_engine, run
from tiny_models import denoiser, rewritten

from dlmconvert.training import deepspeed as deepspeed_engine
from dlmconvert.training import zero_alone
from dlmconvert.training.loop import accumulate

STEPS = dataclasses.replace(SETTINGS, micro_batch=2)  # four micro-batches a step


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("family", ["gpt2", "llama"])  # tied, untied
def test_gradients_and_weights_to_the_last_bit(stage, family):
    """Without clipping; the last bits of a clipped step differ, because it divides where the single engine multiplies."""
    single, alone = make_engine(family, clip_norm=None), make_deepspeed(stage, family, micro_batch=2, clip_norm=None)
    for step in range(2):
        for engine in (single, alone):
            accumulate(engine, MemoryStream(), STEPS, step)
        assert all(torch.equal(mine, other) for (_, mine), (_, other) in zip(alone.gradients(), single.gradients(), strict=True))
        assert alone._engine.optimizer.averaged_gradients == {}  # no partition beside them
        assert alone.update(1e-3) == pytest.approx(single.update(1e-3), rel=1e-6)
        assert all(torch.equal(weight, single.parameters[name]) for name, weight in alone.trained_tensors())


def test_half_precision_is_copied_in_pieces(monkeypatch):
    """Their size changes no more than last bits, which AdamW's kernel rounds differently at the end of a tensor."""
    weights = []
    for piece in (zero_alone.PIECE, 100):
        monkeypatch.setattr(zero_alone, "PIECE", piece)
        engine = make_deepspeed(2, micro_batch=8, precision="bf16")
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            accumulate(engine, MemoryStream(), dataclasses.replace(SETTINGS, micro_batch=8), 0)
            for parameter in engine.parameters.values():
                parameter.grad = torch.randn(parameter.shape, generator=generator).bfloat16()
            engine.update(1e-2)
        weights.append(dict(engine.trained_tensors()))
    assert all(torch.allclose(tensor, weights[1][name], atol=1e-6) for name, tensor in weights[0].items())


def test_a_parameter_without_a_gradient_is_updated_as_by_one_of_zeros():
    """As in several processes, where DeepSpeed's partition holds zeros for it."""
    engine = make_deepspeed(2, micro_batch=8)
    accumulate(engine, MemoryStream(), dataclasses.replace(SETTINGS, micro_batch=8), 0)
    name = next(name for name, p in engine.parameters.items() if p.dim() == 2 and "wte" not in name and "wpe" not in name)
    before = engine.parameters[name].detach().clone()
    engine.parameters[name].grad = None
    assert dict(engine.gradients())[name] is None
    engine.update(1e-2)
    assert torch.allclose(engine.parameters[name], before * (1 - 1e-2 * 0.1)) and not torch.equal(engine.parameters[name], before)  # the decay


@pytest.mark.parametrize("stage", [1, 2])
def test_what_was_saved_the_other_way_goes_on(stage, tmp_path, monkeypatch):
    """DeepSpeed's own way and this one hold the same in a checkpoint."""
    steps = dataclasses.replace(STEPS, schedule="constant")
    half = dataclasses.replace(steps, steps=4)
    _, expected = run(tmp_path / "straight", steps, make_deepspeed(stage, micro_batch=2))
    with monkeypatch.context() as patch:
        patch.setattr(deepspeed_engine, "spare_copies", lambda *about: False)
        run(tmp_path / "run", half, make_deepspeed(stage, micro_batch=2))
    _, lines = run(tmp_path / "run", steps, make_deepspeed(stage, micro_batch=2))
    assert [line["step"] for line in lines] == [line["step"] for line in expected]
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in expected], rel=1e-5)


def test_gradients_summed_in_another_type_are_left_to_deepspeed(tmp_path):
    from deepspeed_engines import VALUES, deepspeed_config

    from dlmconvert.training.ranks import Solo

    _, expected = run(tmp_path / "single", STEPS, make_engine("llama", precision="bf16"))
    config = deepspeed_config(2, micro_batch=2, precision="bf16", user={"data_types": {"grad_accum_dtype": "fp32"}})
    engine = deepspeed_engine.DeepSpeedEngine(denoiser(rewritten("llama")), ranks=Solo(), config=config, device=torch.device("cpu"), precision="bf16", **VALUES)
    assert not engine._gradients_stay
    _, lines = run(tmp_path / "fp32", STEPS, engine)
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in expected], abs=0.02)
