"""The recipes of published conversions: what was published stands in them, and they can be planned without weights."""

from __future__ import annotations

import pytest

from dlmconvert.planning.architecture import KNOWN_SHAPES, describe, find_config
from dlmconvert.recipe.load import load_recipe, recipe_text

# recipe: (method, mask token, billions of tokens, learning rate, billions of parameters)
PUBLISHED = {
    "qwen2.5-7b-dream": ("dream", 151666, 580, 1e-5, 7.616),
    "qwen3-8b-sdar": ("sdar", 151669, 50, 1e-5, 8.191),
    "qwen3-8b-nbdiff": ("nbdiff", 151669, 33.5, 1e-5, 8.191),
    "qwen3-8b-i-dlm": ("i-dlm", 151669, 4.5, 1e-5, 8.191),
    "qwen3-0.6b": ("bd3lm", 151669, 0.4, 5e-5, 0.596),
    "llama3-8b": ("diffullama", 128002, 65, 2e-5, 8.030),
    "qwen3-30b-a3b": ("diffullama", 151669, 500, 1e-5, 30.532),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_says_what_was_published_and_what_was_run(name):
    method, mask, billions, rate, _ = PUBLISHED[name]
    text, recipe = recipe_text(name), load_recipe(name)
    header = " ".join(text.partition("name:")[0].replace("#", " ").split())
    assert text.isascii() and max(map(len, text.splitlines())) <= 150
    assert "Run by us: nothing of this size." in header and "dlmconvert plan " in header and ("ours" in header or "Ours" in header)
    train = recipe.train
    assert (recipe.name, recipe.method.name, recipe.source.mask_token, train.learning_rate) == (name, method, mask, rate)
    assert train.steps * train.rows_per_step * recipe.data.row_length / 1e9 == pytest.approx(billions, rel=0.04)
    assert recipe.engine.precision == "bf16" and train.gradient_checkpointing and recipe.data.max_tokens


def test_single_choices_of_the_papers():
    nbdiff, i_dlm, sdar, moe, dream = (load_recipe(name) for name in ("qwen3-8b-nbdiff", "qwen3-8b-i-dlm", "qwen3-8b-sdar", "qwen3-30b-a3b", "qwen2.5-7b-dream"))
    attention = nbdiff.method.attention
    assert (attention.anneal_steps, nbdiff.train.steps, nbdiff.train.rows_per_step, nbdiff.data.row_length, attention.block_length) == (2500, 4000, 1024, 8192, 32)
    assert (i_dlm.train.rows_per_step, i_dlm.data.row_length, i_dlm.train.weight_decay, i_dlm.train.schedule) == (32, 4096, 0, "cosine")
    assert i_dlm.train.warmup_steps == pytest.approx(0.03 * i_dlm.train.steps, abs=1) and i_dlm.train.lora is not None
    assert sdar.method.attention.block_length == 4 and sdar.method.alignment == "in_place"
    assert moe.method.attention.anneal == "none" and moe.train.rates.attention > moe.train.rates.mlp and moe.method.objective.router_weight is None
    assert dream.method.objective.weight == "cart"


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_built_in_shapes_are_those_of_the_models(name):
    """Parameters as the model cards say, on the meta device; the mask token has a row (or would get one)."""
    recipe = load_recipe(name)
    source = recipe.source.model.removesuffix("-Base")
    config, _ = find_config(recipe.source.model_copy(update={"model": None, "scratch": KNOWN_SHAPES[source]}))
    shapes = describe(config)
    assert shapes.num_parameters / 1e9 == pytest.approx(PUBLISHED[name][4], rel=1e-3)
    assert recipe.source.mask_token < shapes.vocab_size and recipe.data.row_length <= shapes.max_positions
