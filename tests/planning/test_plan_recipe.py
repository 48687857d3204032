"""`plan_recipe`: shipped recipes without a network, and the numbers of DiffuLLaMA."""

from __future__ import annotations

import pytest

from dlmconvert.errors import UserError
from dlmconvert.planning import machine as planning
from dlmconvert.planning.architecture import KNOWN_SHAPES, find_config
from dlmconvert.planning.plan import plan_recipe
from dlmconvert.planning.text import count, size, span
from dlmconvert.recipe.load import load_recipe, recipe_names
from dlmconvert.recipe.schema import Source

SPEED = 1e14


@pytest.fixture(autouse=True)
def no_hub(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.parametrize("name", [name for name in recipe_names() if name != "default"])
def test_every_shipped_recipe_can_be_planned(name):
    plan = plan_recipe(load_recipe(name), memory_bytes=10**15, flops_per_second=SPEED)
    assert plan.fits() and plan.stages and not plan.advice
    assert {section for section, _, _ in plan.rows} >= {"recipe", "model", "adapt", "disk", "memory", "time"}


def test_llama2_7b_is_the_papers():
    plan = plan_recipe(load_recipe("llama2-7b"), memory_bytes=80_000_000_000, flops_per_second=SPEED)
    assert plan.architecture.num_parameters == 6_738_415_616
    [adapt] = plan.stages
    assert adapt.tokens_per_step == 31_457_280
    assert 64.9e9 < adapt.tokens < 65.1e9
    assert "built-in table" in plan.config_from
    assert plan.fits() is False and "108 GB" in plan.advice[0]
    # 6 N D alone is 2.6e21; attention and half of the head come on top, and the recomputed layers beside it.
    assert 2.6e21 < adapt.flops < 3.2e21 and 0.25 < adapt.recomputed_flops / adapt.flops < 0.34
    assert plan.disk["checkpoints"] == 3 * 3 * 4 * 6_738_415_616


def test_lora_makes_it_fit():
    plan = plan_recipe(load_recipe("llama2-7b", ["train.lora={rank: 16}", "train.micro_batch=1"]), memory_bytes=80_000_000_000, flops_per_second=SPEED)
    assert plan.fits()
    # rank x (in + out) of the seven linear layers of a block
    assert plan.stages[0].num_trainable == 32 * 16 * (4 * 2 * 4096 + 3 * (4096 + 11008))


def test_the_advice_fits():
    what = ["method.objective.normaliser=eligible"]
    plan = plan_recipe(load_recipe("gpt2", what), memory_bytes=8_000_000_000, flops_per_second=SPEED)
    assert plan.fits() is False
    words = plan.advice[0].removeprefix("it fits with ").split()
    assert words == plan.words and plan_recipe(load_recipe("gpt2", what + words), memory_bytes=8_000_000_000, flops_per_second=SPEED).fits()


def test_a_row_is_added_for_the_mask_token_behind_the_last():
    plan = plan_recipe(load_recipe("gpt2-medium"), memory_bytes=10**15, flops_per_second=SPEED)
    assert plan.architecture.vocab_size == 50258
    assert plan.architecture.num_parameters == 354_823_168 + 1024


def test_rows_longer_than_the_model_are_said(tmp_path):
    recipe = load_recipe("tiny", ["data.row_length=512"])
    plan = plan_recipe(recipe, memory_bytes=10**15, flops_per_second=SPEED)
    assert any("data.row_length=128" in note for note in plan.notes)


def test_no_speed_without_a_device(monkeypatch):
    monkeypatch.setattr(planning, "device_memory", lambda wanted: ("cuda", None, "cuda (not on this machine)"))
    plan = plan_recipe(load_recipe("gpt2"))
    assert plan.fits() is None and plan.stages[0].seconds is None


def test_unknown_model_is_an_error_with_a_next_step():
    with pytest.raises(UserError) as caught:
        find_config(Source(model="nobody/nothing"))
    assert "source.model=FOLDER" in str(caught.value)


def test_missing_model_falls_back_to_scratch_where_the_recipe_says_so():
    config, where = find_config(Source(model="gpt2", if_missing="scratch", scratch={"model_type": "gpt2", "n_layer": 3}))
    assert config.n_layer == 3 and where.startswith("source.scratch")


def test_unique_tokens_of_local_text(tmp_path):
    (tmp_path / "text.txt").write_text("word " * 8000)
    plan = plan_recipe(load_recipe("gpt2", [f"data.train={tmp_path / 'text.txt'}", "data.max_tokens=null"]), memory_bytes=1, flops_per_second=SPEED)
    assert plan.unique_tokens == 10_000 and "estimate" in plan.unique_tokens_from
    assert plan.disk["tokens"] == 20_000


def test_known_shapes_are_those_of_their_names():
    assert set(KNOWN_SHAPES) >= {"gpt2", "gpt2-medium", "meta-llama/Llama-2-7b-hf"}


def test_numbers_for_people():
    assert [size(n) for n in (5, 1234, 1.5e9, 2.34e14)] == ["5 bytes", "1.23 kB", "1.5 GB", "234 TB"]
    assert [count(n) for n in (12, 124_439_808, 65e9)] == ["12", "124.4M", "65B"]
    assert [span(s) for s in (0.2, 80, 600, 86400 * 3)] == ["1 seconds", "80 seconds", "10 minutes", "3.0 days"]
