"""The DeepSpeed engine in one process: the same numbers as the single-device engine, under every ZeRO stage."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from deepspeed_engines import deepspeed_config, loaded, make_deepspeed, make_in_parts, plain_weights, save_source
from memory_stream import SETTINGS, MemoryStream, Stop, make_engine, run
from tiny_models import denoiser, rewritten

from dlmconvert.errors import SavedAndLeft, UserError
from dlmconvert.recipe.optimization import Engine, Optimization
from dlmconvert.runs.engines import engine_config
from dlmconvert.training.checkpoint import CheckpointFolder
from dlmconvert.training.deepspeed import checkpoint_tensors, leave_zero_3
from dlmconvert.training.deepspeed_config import NO_CLIPPING, effective_stage, with_bucket_for
from dlmconvert.training.loop import accumulate
from dlmconvert.training.ranks import Solo

STEPS = dataclasses.replace(SETTINGS, micro_batch=2)  # four micro-batches a step
NUMBERS = ("loss", "nelbo", "cross_entropy", "masked_fraction", "gradient_norm", "learning_rate")
EVERYTHING_IN_PARTS = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}  # else small tensors stay whole
# AdamW divides by second moments near 0 in its first steps, which blows up the last bits of a few weights.
WEIGHTS = 2e-3


@pytest.fixture(autouse=True)
def torch_as_it_was():
    linear = torch.nn.functional.linear
    yield
    leave_zero_3()
    assert torch.nn.functional.linear is linear


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return {family: save_source(tmp_path_factory.mktemp(family), family) for family in ("gpt2", "llama", "qwen2")}


@pytest.fixture(scope="module")
def single(tmp_path_factory, sources):
    """(metrics lines, weights) of the single-device engine."""
    results = {}

    def get(family, lora=False):
        if (family, lora) not in results:
            engine, lines = run(tmp_path_factory.mktemp("single"), STEPS, make_engine(model=loaded(sources[family], lora)))
            results[family, lora] = lines, {name: p.detach().clone() for name, p in engine.parameters.items()}
        return results[family, lora]

    return get


def agree(lines, expected, bound=1e-5):
    for line, other in zip(lines, expected, strict=True):
        for name in NUMBERS:
            assert line[name] == pytest.approx(other[name], rel=bound, abs=bound), (line["step"], name)


def worst(weights, expected):
    return max(float((weights[name] - tensor).abs().max()) for name, tensor in expected.items())


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_one_curve_under_every_stage(stage, single, sources, tmp_path):
    expected, expected_weights = single("gpt2")
    user = EVERYTHING_IN_PARTS if stage == 3 else None
    engine, lines = run(tmp_path, STEPS, make_in_parts(stage, sources["gpt2"], micro_batch=2, user=user))
    agree(lines, expected)
    assert worst(plain_weights(engine, lambda: denoiser(loaded(sources["gpt2"]))), expected_weights) < WEIGHTS


@pytest.mark.parametrize("family", ["llama", "qwen2"])  # untied, tied
def test_a_model_that_no_process_ever_holds(family, single, sources, tmp_path):
    """zero.Init: the parameters are dealt out while the folder is read."""
    engine = make_in_parts(3, sources[family], micro_batch=2, user=EVERYTHING_IN_PARTS)
    assert all(p.numel() == 0 and p.ds_numel > 0 for p in engine.module.parameters())
    engine, lines = run(tmp_path, STEPS, engine)
    expected, expected_weights = single(family)
    agree(lines, expected)
    assert worst(plain_weights(engine, lambda: denoiser(loaded(sources[family]))), expected_weights) < WEIGHTS


@pytest.mark.parametrize(("stage", "family"), [(0, "gpt2"), (1, "llama"), (2, "gpt2"), (3, "gpt2"), (3, "llama")])
def test_adapters(stage, family, single, sources, tmp_path):
    """The mask token's row is trained beside them; peft reads it past ZeRO-3, which has to be told. Frozen weights are not saved."""
    user = EVERYTHING_IN_PARTS if stage == 3 else None
    engine, lines = run(tmp_path, STEPS, make_in_parts(stage, sources[family], lora=True, micro_batch=2, user=user))
    expected, expected_weights = single(family, lora=True)
    agree(lines, expected)
    weights = plain_weights(engine, lambda: denoiser(loaded(sources[family], lora=True)))
    assert worst(weights, expected_weights) < WEIGHTS
    if stage > 0:
        saved = checkpoint_tensors(tmp_path / "checkpoints" / "step-000006", stage)
        assert saved.keys() >= expected_weights.keys() and len(saved) <= len(expected_weights) + 1  # a tied row has two names
        assert all(torch.equal(saved[name], weights[name]) for name in expected_weights)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16_keeps_float32_masters(stage, tmp_path):
    """Stage 0 runs as stage 1. Beside the single engine's autocast: within 0.02 a step (measured: 0.006)."""
    assert effective_stage(stage, "bf16") == max(1, stage)
    _, expected = run(tmp_path / "single", STEPS, make_engine("llama", precision="bf16"))
    engine, lines = run(tmp_path / "zero", STEPS, make_deepspeed(stage, "llama", micro_batch=2, precision="bf16"))
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in expected], abs=0.02)
    assert all(p.dtype == torch.bfloat16 for p in engine.module.parameters())
    weights = plain_weights(engine, lambda: denoiser(rewritten("llama")))
    assert any(not torch.equal(t, t.bfloat16().float()) for t in weights.values())


@pytest.mark.parametrize(
    ("stage", "changes"), [(0, {}), (1, {}), (2, {"gradient_checkpointing": True}), (3, {}), (2, {"precision": "bf16"}), (2, {"offload": "cpu"})]
)
def test_killed_and_resumed_to_the_last_bit(stage, changes, tmp_path):
    make = lambda: make_deepspeed(stage, micro_batch=2, **changes)  # noqa: E731
    build = lambda: denoiser(rewritten("gpt2"))  # noqa: E731
    engine, lines = run(tmp_path / "straight", STEPS, make())
    straight = plain_weights(engine, build)
    stream = MemoryStream()
    stop = Stop(stream, 2)
    with pytest.raises(SavedAndLeft):
        run(tmp_path / "killed", STEPS, make(), stream, stop)
    engine, again = run(tmp_path / "killed", STEPS, make())
    weights = plain_weights(engine, build)
    assert again == lines and all(torch.equal(t, weights[name]) for name, t in straight.items())


def test_gradient_checkpointing_and_offloading_change_nothing(single, tmp_path):
    expected, _ = single("gpt2")
    for name, changes in (("checkpointing", {"gradient_checkpointing": True}), ("offload", {"offload": "cpu"})):
        _, lines = run(tmp_path / name, STEPS, make_deepspeed(2, micro_batch=2, **changes))
        agree(lines, expected)


def test_without_clipping_the_norm_is_still_told(single, tmp_path):
    _, expected = run(tmp_path / "single", STEPS, make_engine(clip_norm=None))
    for stage in (0, 2, 3):
        _, lines = run(tmp_path / str(stage), STEPS, make_deepspeed(stage, micro_batch=2, clip_norm=None))
        agree(lines, expected)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_gradient_that_is_not_finite_updates_nothing(stage):
    engine = make_deepspeed(stage, micro_batch=8)
    before = {name: t.clone() for name, t in engine.trained_tensors()}
    tokens_BL = torch.arange(20)[None] + 5
    from dlmconvert.diffusion.attention import AttentionContext

    logits_NV = engine.denoiser(tokens_BL, torch.arange(20)[None] > 9, torch.arange(20)[None], AttentionContext(1.0))
    engine.backward(logits_NV.sum() * float("inf"))
    norm = engine.update(1e-3)
    assert not norm < float("inf") and engine.step == 1  # the step is over, without an update
    assert all(torch.equal(t, before[name]) for name, t in engine.trained_tensors())


def test_a_damaged_shard_falls_back_to_the_checkpoint_before(tmp_path):
    make = lambda: make_deepspeed(2, micro_batch=2)  # noqa: E731
    _, lines = run(tmp_path, STEPS, make())
    (shard,) = (tmp_path / "checkpoints" / "step-000006").rglob("zero_pp_rank_0*optim_states.pt")
    shard.write_bytes(shard.read_bytes()[:-7])
    warnings = []
    _, again = run(tmp_path, STEPS, make(), warn=warnings.append)
    assert again == lines and len(warnings) == 1 and "optim_states.pt has" in warnings[0]
    assert CheckpointFolder(tmp_path / "checkpoints").damage(6) is None


def test_another_stage_is_refused(tmp_path):
    run(tmp_path, dataclasses.replace(STEPS, steps=2), make_deepspeed(2, micro_batch=2))
    with pytest.raises(UserError, match="engine.zero_stage=2, this is engine.zero_stage=3"):
        run(tmp_path, STEPS, make_deepspeed(3, micro_batch=2))


def test_nothing_is_compiled_on_a_cpu(tmp_path, monkeypatch):
    """DeepSpeed would build a shared-memory kernel at the first start; the switch is a private dictionary of its."""
    import deepspeed.ops
    from deepspeed.ops.op_builder import builder

    monkeypatch.setattr(builder.OpBuilder, "jit_load", lambda self, *a, **k: pytest.fail(f"{self.name} would be compiled"))
    assert deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] is False or not torch.cuda.is_available()
    make_deepspeed(2, "llama")
    assert deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] is False


# the derived JSON


def test_the_json_follows_from_the_recipe():
    config = deepspeed_config(3, micro_batch=2, precision="bf16", clip_norm=None, user={"comms_logger": {"enabled": True}, "bf16": {"enabled": "auto"}})
    assert config["zero_optimization"]["stage"] == 3 and config["bf16"] == {"enabled": True} and config["comms_logger"] == {"enabled": True}
    assert (config["train_batch_size"], config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]) == (8, 2, 4)
    assert config["gradient_clipping"] == NO_CLIPPING
    nvme = deepspeed_config(3, offload_parameters="nvme", offload_optimizer="cpu", nvme="/fast")["zero_optimization"]
    assert nvme["offload_param"] == {"device": "nvme", "nvme_path": "/fast"} and nvme["offload_optimizer"] == {"device": "cpu"}


@pytest.mark.parametrize(
    ("user", "message"),
    [
        ({"zero_optimization": {"stage": 1}}, "zero_optimization.stage=1 contradicts 2, which follows from engine.zero_stage"),
        ({"gradient_clipping": 0.5}, "gradient_clipping=0.5 contradicts 1.0, which follows from clip_norm"),
        ({"bf16": {"enabled": True}}, "bf16.enabled=True contradicts False, which follows from engine.precision"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "device=cpu contradicts engine.offload_optimizer=none"),
        ({"optimizer": {"type": "Lion"}}, "engine.deepspeed.optimizer is not taken"),
        ({"train_batch_size": 3, "scheduler": {}}, "in 2 places"),
    ],
)
def test_a_contradiction_names_both_values(user, message):
    with pytest.raises(UserError) as caught:
        deepspeed_config(2, user=user)
    assert message in str(caught.value)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_in_float32_the_masters_are_the_weights(stage):
    """Alone under stages 1 and 2, always under 3: neither held twice nor copied back, and the norm is still that of the gradients."""
    engine = make_deepspeed(stage)
    accumulate(engine, MemoryStream(), dataclasses.replace(SETTINGS, micro_batch=4), 0)
    whole = [gradient for _, gradient in engine.gradients()]
    expected = sum(float(gradient.double().square().sum()) for gradient in whole) ** 0.5
    assert engine.update(1e-3) == pytest.approx(expected, rel=1e-6) and len(whole) == len(engine.parameters)
    inner = engine._engine.optimizer
    groups = (inner.fp32_partitioned_groups_flat, inner.fp16_partitioned_groups_flat) if stage == 3 else (inner.single_partition_of_fp32_groups, inner.bit16_groups_flat)
    assert all(master.data_ptr() == weights.data_ptr() for master, weights in zip(*groups, strict=True))


def test_buckets_are_no_larger_than_the_model():
    config = deepspeed_config(2)
    assert with_bucket_for(config, 1000)["zero_optimization"]["reduce_bucket_size"] == 1000
    assert with_bucket_for(config, 10**12)["zero_optimization"]["reduce_bucket_size"] == 500_000_000
    given = deepspeed_config(2, user={"zero_optimization": {"reduce_bucket_size": 7}})
    assert with_bucket_for(given, 1000) == given and "reduce_bucket_size" not in config["zero_optimization"]


def test_one_process_stands_for_several():
    """Where the loss depends on the micro-batches, as the published normaliser does, a replay must cut them as the ranks did."""
    settings = dataclasses.replace(SETTINGS, normaliser="masked_micro_batch", micro_batch=8)
    losses = {}
    for name, stands_for, micro_batch in (("two ranks", 2, 8), ("by hand", 1, 4), ("one", 1, 8)):
        engine = make_engine()
        engine.ranks = Solo(stands_for)
        losses[name] = accumulate(engine, MemoryStream(), dataclasses.replace(settings, micro_batch=micro_batch), 1).sums["loss"]
    assert losses["two ranks"] == losses["by hand"] != losses["one"]
    optimization = Optimization(rows_per_step=8, micro_batch=3)
    assert [engine_config(Engine(), optimization, 1, "adapt", n)["gradient_accumulation_steps"] for n in (1, 2)] == [3, 4]
