"""What stands in an export's generation_config.json: what tune-sampler found, and what the recipe says about it."""

from __future__ import annotations

import json

import pytest

from dlmconvert.errors import UserError
from dlmconvert.recipe.load import load_recipe
from dlmconvert.runs.samplers import exported_sampler, saved_sampler

PLAIN = {"max_new_tokens": 64, "temperature": 0.9, "top_p": 0.9, "steps": 64, "alg": "random"}
TUNED = {"threshold": 0.7, "block_length": 16, "cache": "dual", "max_new_tokens": 32, "do_sample": False, "eos_token_id": 2, "bos_token_id": 1}


@pytest.mark.parametrize(
    "changes, saved, expected",
    [
        ([], None, PLAIN),
        (["method.name=bd3lm"], None, {name: value for name, value in PLAIN.items() if name != "steps"}),
        (["export.threshold=0.8"], None, {"max_new_tokens": 64, "temperature": 0.9, "top_p": 0.9, "threshold": 0.8}),
        ([], TUNED, {"threshold": 0.7, "block_length": 16, "cache": "dual", "max_new_tokens": 32, "temperature": 0.0}),
        (["method.name=bd3lm"], {"steps": 8, "alg": "confidence"}, {"steps": 8, "alg": "confidence"}),
        # What the recipe changes comes first, as an option of `sample` does.
        (["export.temperature=0.5", "export.max_new_tokens=16"], TUNED, {"threshold": 0.7, "block_length": 16, "cache": "dual", "max_new_tokens": 16, "temperature": 0.5}),
        (["export.entropy_bound=0.2"], TUNED, {"entropy_bound": 0.2, "block_length": 16, "cache": "dual", "max_new_tokens": 32, "temperature": 0.0}),
        (["export.max_new_tokens=100"], {"steps": 8, "max_new_tokens": 64, "alg": "confidence"}, {"steps": 13, "max_new_tokens": 100, "alg": "confidence"}),
        (["export.order=entropy"], {"steps": 8, "alg": "confidence"}, {"steps": 8, "alg": "entropy"}),
    ],
)
def test_the_tuned_sampler_goes_out_with_the_model(changes, saved, expected, tmp_path):
    if saved is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(saved))
    assert exported_sampler(load_recipe("default", ["source.model=gpt2", *changes]), saved_sampler(tmp_path)) == expected


def test_scaled_steps_go_out_as_a_plain_number(tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps({"steps": 8, "max_new_tokens": 64}))
    recipe = load_recipe("default", ["source.model=gpt2", "export.max_new_tokens=100"])
    assert type(exported_sampler(recipe, saved_sampler(tmp_path))["steps"]) is int


@pytest.mark.parametrize("content", ["{", "[]", '{"steps": "many"}'])
def test_a_broken_file_is_named(tmp_path, content):
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(UserError, match="cannot be read"):
        saved_sampler(tmp_path)
