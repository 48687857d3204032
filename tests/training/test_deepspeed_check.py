"""What DeepSpeed would refuse with a traceback, ignore in silence, or fail to build, is told beforehand and in words."""

from __future__ import annotations

import pytest
from command_line import SMALL, fails, works, write_corpus
from deepspeed_engines import deepspeed_config

from dlmconvert.errors import UserError
from dlmconvert.training.deepspeed_check import check_config
from dlmconvert.training.ranks import Solo

KNOWN = {
    "comms_logger": {"enabled": False}, "wall_clock_breakdown": False, "flops_profiler": {"enabled": False}, "aio": {"block_size": 1048576}, "data_types": {},
    "checkpoint": {}, "activation_checkpointing": {}, "communication_data_type": "fp32", "memory_breakdown": False, "compile": {}, "timers": {},
}  # fmt: skip


@pytest.mark.parametrize("stage", [0, 3])
def test_every_key_is_one_that_deepspeed_asks_for(stage):
    assert check_config(deepspeed_config(stage, user=KNOWN), Solo()) == []
    assert check_config(deepspeed_config(stage, user=KNOWN | {"gradient_cliping": 2}), Solo()) == ["gradient_cliping"]


@pytest.mark.parametrize(
    ("user", "message"),
    [
        ({"zero_optimization": {"reduce_buckets": 5}}, "reduce_buckets: Extra inputs are not permitted"),
        ({"zero_optimization": {"reduce_bucket_size": "large"}}, "reduce_bucket_size: Input should be a valid integer"),
        ({"elasticity": {"enabled": True}}, "Elastic training has been removed"),
    ],
)
def test_what_deepspeed_refuses_is_told(user, message):
    with pytest.raises(UserError, match="DeepSpeed does not take the JSON of this recipe") as caught:
        check_config(deepspeed_config(2, user=user), Solo())
    assert message in caught.value.why


def test_nvme_where_its_writer_cannot_be_built(monkeypatch):
    from deepspeed.ops.op_builder.cpu import AsyncIOBuilder

    config = deepspeed_config(3, offload_optimizer="nvme", nvme="/fast")
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose=False: True)
    assert check_config(config, Solo()) == []
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose=False: False)
    with pytest.raises(UserError, match="cannot build its asynchronous I/O on this machine") as caught:
        check_config(config, Solo())
    assert "libaio" in caught.value.why


def test_a_run_says_it(tmp_path, monkeypatch, tiny_checkpoints):
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path)
    words = ["adapt", tiny_checkpoints["gpt2"], *SMALL, "train.steps=1", "train.warmup_steps=0", "engine.name=deepspeed", "run.folder=run"]
    assert "reduce_buckets: Extra inputs are not permitted" in fails(2, *words, "engine.deepspeed.zero_optimization.reduce_buckets=5")
    assert "engine.deepspeed.gradient_cliping: DeepSpeed knows no such key and ignores it" in works(*words, "engine.deepspeed.gradient_cliping=2").err
