"""Shipped recipes are valid, complete and commented; `dlmconvert recipes` lists, shows, copies and explains them."""

from __future__ import annotations

import json

import pytest
import yaml

from dlmconvert.cli.app import app, guarded
from dlmconvert.cli.recipes import recipe_keys, summary
from dlmconvert.recipe.load import flat, load_recipe, recipe_names, recipe_text
from dlmconvert.recipe.method import anneal_steps_of
from dlmconvert.recipe.schema import Recipe

SHIPPED = {"default", "gpt2", "gpt2-medium", "gpt2-smoke", "llama2-7b", "tiny"}


def dlmconvert(*words):
    return guarded(lambda: app(list(words), standalone_mode=False))


def test_they_are_all_there():
    assert set(recipe_names()) >= SHIPPED


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_a_recipe_validates_and_says_how_it_is_run(name):
    text = recipe_text(name)
    recipe = load_recipe(name, ["source.model=gpt2"] if name == "default" else None)
    assert recipe.name == name
    assert summary(text) and len(summary(text)) < 160
    header = text.partition("name:")[0]
    assert "dlmconvert run " in header or "dlmconvert adapt " in header
    assert text.isascii() and max(map(len, text.splitlines())) <= 150


def test_diffugpt_and_diffullama_are_the_published_settings():
    small, medium, large = (load_recipe(name) for name in ("gpt2", "gpt2-medium", "llama2-7b"))
    assert [r.source.mask_token for r in (small, medium, large)] == [10541, 50257, 811]
    assert [(r.train.steps, r.train.rows_per_step, r.data.row_length) for r in (small, medium, large)] == [
        (1_000_000, 256, 512), (160_000, 1280, 1024), (2066, 15360, 2048),
    ]  # fmt: skip
    for recipe in (small, medium):
        train = recipe.train
        assert (train.learning_rate, train.schedule, train.warmup_steps, train.betas, train.weight_decay) == (3e-4, "cosine", 2000, (0.9, 0.999), 0)
        assert anneal_steps_of(recipe.method.attention, train.steps) == 10_000
        assert recipe.method.objective.normaliser == "masked_micro_batch"
    train = large.train
    assert (train.learning_rate, train.schedule, train.warmup_steps, train.betas, train.weight_decay) == (2e-5, "constant", 0, (0.9, 0.95), 0.1)
    assert anneal_steps_of(large.method.attention, train.steps) == 200
    assert all(r.engine.precision == "bf16" and r.method.name == "diffullama" for r in (small, medium, large))


def test_the_papers_way_at_7b_is_one_key_away():
    assert load_recipe("llama2-7b", ["method.attention={anneal: none}"]).method.attention.anneal_steps is None


def test_a_checkpoint_folder_takes_default(tmp_path):
    recipe = load_recipe(str(tmp_path), ["data.train=text.txt"])
    assert recipe.source.model == str(tmp_path) and 0 < recipe.method.attention.anneal_steps < 1


def test_listing(capsys):
    assert dlmconvert("recipes", "--json") == 0
    listed = json.loads(capsys.readouterr().out)
    assert {row["name"] for row in listed} >= SHIPPED and all(row["summary"] for row in listed)
    assert dlmconvert("recipes") == 0
    assert "llama2-7b" in capsys.readouterr().out


def test_show_is_the_file(capsys):
    assert dlmconvert("recipes", "show", "gpt2") == 0
    assert capsys.readouterr().out == recipe_text("gpt2")


def test_an_unknown_name_names_the_nearest(capsys):
    assert dlmconvert("recipes", "show", "gpt2-medum") == 2
    assert "gpt2-medium" in capsys.readouterr().err


def test_copy_never_overwrites(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert dlmconvert("recipes", "copy", "gpt2", "mine.yaml") == 0
    assert (tmp_path / "mine.yaml").read_text() == recipe_text("gpt2")
    (tmp_path / "mine.yaml").write_text("changed")
    assert dlmconvert("recipes", "copy", "gpt2", "mine.yaml") == 2
    assert (tmp_path / "mine.yaml").read_text() == "changed"
    assert "exists already" in capsys.readouterr().err
    assert dlmconvert("recipes", "copy", "gpt2") == 0 and (tmp_path / "gpt2.yaml").is_file()
    assert dlmconvert("recipes", "copy", "gpt2", "mine.txt") == 2


def test_keys_are_the_schemas(capsys):
    keys = {row["key"]: row for row in recipe_keys()}
    every = flat(Recipe.model_construct().model_dump(mode="json"))
    assert set(every) <= set(keys) | {"source.scratch"}
    assert keys["train.log_steps"]["safe_to_change"] and not keys["train.steps"]["safe_to_change"]
    assert keys["train.steps"]["type"] == "int > 0" and keys["train.steps"]["default"] == "1000"
    assert keys["data.train[].path"]["default"] == "required"
    assert dlmconvert("recipes", "keys", "method.attention") == 0
    assert "method.attention.anneal: none | random" in capsys.readouterr().out
    assert dlmconvert("recipes", "keys", "metod") == 2
    assert "'method'" in capsys.readouterr().err


def test_comments_of_a_copy_survive_as_yaml():
    for name in SHIPPED:
        assert isinstance(yaml.safe_load(recipe_text(name)), dict)
