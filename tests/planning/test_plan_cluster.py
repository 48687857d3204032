"""Plans for machines that are not here: processes, nodes, GPUs by name, ZeRO stages, prices."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from dlmconvert.backbone.load import scratch_config
from dlmconvert.errors import UserError
from dlmconvert.planning.architecture import describe
from dlmconvert.planning.gpus import GPUS, find_gpu
from dlmconvert.planning.memory import memory_of
from dlmconvert.planning.plan import plan_recipe
from dlmconvert.planning.settings import recommended
from dlmconvert.planning.text import settings_rows
from dlmconvert.planning.time import row_work
from dlmconvert.planning.zero import Zero, zero_states
from dlmconvert.recipe.load import load_recipe
from dlmconvert.training.throughput import model_flops

CLUSTER = {"gpu": "h100-80gb", "processes": 64, "nodes": 8}
LLAMA = {
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 176,
    "vocab_size": 500, "max_position_embeddings": 256,
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_hub(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def on_cluster():
    return plan_recipe(load_recipe("llama2-7b"), **CLUSTER, price=2.5)


def test_llama2_7b_on_64_gpus(on_cluster):
    [stage] = on_cluster.stages
    assert on_cluster.fits() and stage.setting.stage == 2 and stage.setting.name == "deepspeed"
    # 12 bytes a parameter of master weights and moments, dealt to 64; bfloat16 weights whole.
    assert stage.memory.optimizer == round(12 * 6_738_415_616 / 64) and stage.memory.weights == 2 * 6_738_415_616
    assert on_cluster.gpu_hours == pytest.approx(64 * stage.seconds / 3600) and on_cluster.cost == pytest.approx(2.5 * on_cluster.gpu_hours)
    assert stage.seconds == pytest.approx((stage.flops + stage.recomputed_flops) / (0.4 * 989e12 * 64))


def test_every_stage_and_power_of_two_is_there(on_cluster):
    [stage] = on_cluster.stages
    assert {option.micro_batch for option in stage.options} == {2**power for power in range(8)}  # 240 rows a process
    found = {(option.engine.stage, option.engine.offload) for option in stage.options}
    assert found == {(1, "none"), (2, "none"), (3, "none"), (1, "optimizer"), (2, "optimizer"), (3, "optimizer"), (3, "all")}  # bf16: 0 runs as 1
    fp32 = plan_recipe(load_recipe("llama2-7b", ["engine.precision=fp32"]), **CLUSTER).stages[0]
    assert {option.engine.stage for option in fp32.options} == {0, 1, 2, 3}


def test_the_recommended_words_fit_and_recommend_nothing_else():
    for machine in ({"gpu": "h100-80gb"}, {"gpu": "a100-40gb", "processes": 4}, {"gpu": "rtx4090", "processes": 8}):
        plan = plan_recipe(load_recipe("llama2-7b"), **machine)
        assert plan.words, machine
        again = plan_recipe(load_recipe("llama2-7b", plan.words), **machine)
        assert again.fits() and not again.words, (machine, plan.words, again.words)


def test_nothing_fits(on_cluster):
    plan = plan_recipe(load_recipe("llama2-7b"), gpu="l4", memory_bytes=4_000_000_000)
    assert plan.fits() is False and plan.words == [] and any("no setting fits" in line for line in plan.advice)


def test_more_of_anything_never_takes_less():
    """More rows, longer rows, a lower ZeRO stage or fewer processes: at least as much memory."""
    shape = describe(scratch_config(LLAMA))
    base = {"row_length": 128, "accumulates": True, "precision": "bf16", "gradient_checkpointing": False, "device": "cuda"}

    def peak(**changes):
        values = base | {"micro_batch": 4, "zero": Zero(2, 8)} | changes
        return memory_of(shape, **values).peak_bytes

    assert peak(micro_batch=8) > peak() > peak(micro_batch=2)
    assert peak(row_length=256) > peak() and peak(streams=2) > peak()
    assert peak(gradient_checkpointing=True) < peak()
    parts = [zero_states(shape, Zero(stage, 8), 2, True) for stage in (1, 2, 3)]
    assert all(a.gradients >= b.gradients and a.weights >= b.weights for a, b in itertools.pairwise(parts))
    fewer, more = zero_states(shape, Zero(2, 2), 2, False), zero_states(shape, Zero(2, 8), 2, False)
    assert fewer.optimizer == 4 * more.optimizer


def test_offloading_moves_and_loses_nothing():
    shape = describe(scratch_config(LLAMA))
    for stage, offload in ((2, "optimizer"), (3, "optimizer"), (3, "all")):
        here, moved = zero_states(shape, Zero(stage, 4), 2, False), zero_states(shape, Zero(stage, 4, offload), 2, False)
        assert moved.optimizer == 0 and moved.host >= here.optimizer and moved.weights <= here.weights


def test_buckets_are_those_of_the_recipe_and_no_larger_than_the_model():
    keys = "engine.deepspeed.zero_optimization.reduce_bucket_size"
    plans = [plan_recipe(load_recipe("gpt2", [f"{keys}={size}"]), gpu="a100-80gb", processes=8) for size in (10**6, 10**7, 10**9)]
    small, larger, whole = (plan.stages[0].memory.buffers for plan in plans)
    assert larger - small == 2 * 2 * (10**7 - 10**6)  # what is collected, and what is sent of it, in two bytes
    assert 2 * 2 * 120e6 < whole - small < 2 * 2 * 130e6


def test_frozen_parameters_are_not_trained():
    whole = describe(scratch_config(LLAMA))
    frozen = describe(scratch_config(LLAMA), rates={"embeddings": 0.0, "mlp": 0.0})
    layers, d, f, v = 3, 64, 176, 500
    assert whole.num_trainable - frozen.num_trainable == v * d + layers * 3 * d * f
    assert not frozen.embedding_trained and frozen.head_trained and frozen.num_parameters == whole.num_parameters
    assert frozen.flops_per_token < whole.flops_per_token
    recipe = load_recipe("gpt2", ["train.rates.embeddings=0"])
    with pytest.raises(UserError, match="train: rates.head"):
        plan_recipe(recipe, gpu="a100-80gb")


def test_flops_are_those_that_a_run_logs():
    """The numerator of the MFU in metrics.jsonl, of a row with half of its tokens masked."""
    from transformers import AutoModelForCausalLM

    config = scratch_config(LLAMA)
    counted = model_flops(AutoModelForCausalLM.from_config(config), 128)
    assert row_work(describe(config), 128).model == pytest.approx(counted.of(128, 64))


def test_two_streams_pay_for_their_tokens_and_for_one_rows_pairs():
    shape = describe(scratch_config(LLAMA))
    one, two = row_work(shape, 128), row_work(shape, 128, streams=2)
    assert two.model - one.model == pytest.approx(128 * shape.flops_per_token)


def test_a_given_mfu_is_of_model_flops_alone():
    recipe = load_recipe("llama2-7b")
    [with_checkpointing] = plan_recipe(recipe, **CLUSTER, mfu=0.3).stages
    assert with_checkpointing.seconds == pytest.approx(with_checkpointing.flops / (0.3 * 989e12 * 64))


def test_gpus_by_name():
    assert all(gpu.tflops("bf16") > gpu.tflops("fp32") > 0 or gpu.name.startswith("v100") for gpu in GPUS.values())
    assert find_gpu("H100_80GB").name == "h100-80gb" and find_gpu("h200").name == "h200-141gb"
    assert (find_gpu("a100-40gb").tflops("bf16"), find_gpu("h100-80gb").tflops("bf16"), find_gpu("b200").tflops("bf16")) == (312, 989, 2250)
    assert find_gpu("h100-pcie-80gb").tflops("bf16") == 756
    for wrong, near in (("h100-81gb", "h100-80gb"), ("a100", "a100-40gb"), ("", "h100-80gb")):
        with pytest.raises(UserError) as caught:
            find_gpu(wrong)
        assert near in str(caught.value)


@pytest.mark.parametrize(
    ("machine", "message"),
    [
        ({"processes": 9, "nodes": 2}, "cannot be spread over --nodes 2"),
        ({"nodes": 2}, "--nodes 2 without --processes"),
        ({"processes": 7}, "cannot be dealt to 7 processes"),
    ],
)
def test_processes_that_cannot_be_had(machine, message):
    with pytest.raises(UserError, match=message):
        plan_recipe(load_recipe("llama2-7b"), gpu="h100-80gb", **machine)


def test_the_table_shows_what_is_recommended(on_cluster):
    [stage] = on_cluster.stages
    heads, rows, unit = settings_rows(stage, on_cluster.machine)
    assert unit == "GB" and all(len(row) == len(heads) for row in rows)
    assert sum(cell.startswith("[") for row in rows for cell in row) == 1
    assert str(stage.recommended.micro_batch) in heads and str(stage.micro_batch) in heads


def test_one_engine_setting_for_all_stages():
    recipe = load_recipe("tiny")
    plan = plan_recipe(recipe, gpu="rtx4090", processes=2)
    assert len(plan.stages) > 1 and len({stage.recommended.engine for stage in plan.stages}) == 1
    options = {stage.name: stage.options for stage in plan.stages}
    only = {name: [dataclasses.replace(o, fits=o.engine.stage == number) for o in found] for number, (name, found) in enumerate(options.items())}
    assert recommended(only, plan.stages[0].setting) is None


def test_what_a_method_adds_is_paid_for():
    """A frozen source beside the model takes its weights; training on edits goes through two forwards; GIDD predicts every token."""
    what = ["engine.precision=bf16"]

    def stage(*words):
        return plan_recipe(load_recipe("tiny", [*what, *words]), gpu="l4", processes=2, targets=["adapt"]).stages[-1]

    plain, taught, edited = stage(), stage("method.objective.teacher_kl=0.1"), stage("method.corruption.edit_share=0.1", "method.corruption.edit_steps=0.5")
    gidd = stage("method.corruption.kind=gidd", "method.objective.weight=gidd_clamped")
    parameters = plain.num_trainable
    assert taught.memory.weights - plain.memory.weights == 2 * parameters and taught.recomputed_flops > plain.recomputed_flops and taught.flops == plain.flops
    assert edited.memory.activations == 2 * plain.memory.activations and 1.5 < edited.flops / plain.flops < 1.65
    assert gidd.flops > plain.flops
