"""Recipes: all mistakes at once, each with the nearest valid name; who wins over whom; what contradicts what."""

from __future__ import annotations

import pytest
import yaml

from dlmconvert.errors import EXIT_WRONG_INPUT, UserError
from dlmconvert.methods import METHODS
from dlmconvert.recipe.load import (
    dump_recipe,
    flat,
    load_recipe,
    parse_yaml,
    recipe_names,
    recipe_text,
    safe_keys,
    section_at,
    set_key,
    validate,
)
from dlmconvert.recipe.method import anneal_steps_of
from dlmconvert.recipe.schema import Recipe, text_sources
from dlmconvert.recipe.section import Section

SMALL = {"source": {"model": "gpt2"}, "data": {"train": "x.txt"}, "method": {"attention": {"anneal_steps": 0.5}}}


def refused(values, *sentences):
    with pytest.raises(UserError) as caught:
        validate(values, "here.yaml")
    text = str(caught.value)
    assert caught.value.exit_code == EXIT_WRONG_INPUT and "here.yaml" in caught.value.what
    for sentence in sentences:
        assert sentence in text, text
    return caught.value


def with_keys(*words, base=SMALL):
    values = yaml.safe_load(yaml.safe_dump(base))
    for word in words:
        set_key(values, word)
    return values


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_are_valid(name):
    recipe = load_recipe(name, [] if recipe_needs_nothing(name) else ["source.model=gpt2"])
    assert recipe.name == name
    # What is written out resolves to itself, and nothing is lost.
    assert validate(yaml.safe_load(dump_recipe(recipe)), name) == recipe


def recipe_needs_nothing(name):
    source = yaml.safe_load(recipe_text(name)).get("source") or {}
    return bool(source.get("model") or source.get("scratch"))


def test_every_mistake_at_once_with_the_nearest_names():
    error = refused(
        with_keys("train.stepps=5", "train.learning_rate=fast", "data.row_length=2", "method.alignment=shfit", "engin.name=single", "train.save_steps=0"),
        "6 mistakes", "train.stepps: no such key; did you mean 'steps'", "train.learning_rate='fast'", "data.row_length=2", "method.alignment='shfit'",
        "'shift' or 'in_place'", "engin: no such key; did you mean 'engine'", "train.save_steps=0",
    )  # fmt: skip
    assert "dlmconvert recipes keys" in error.next_step


def test_keys_of_optional_sections():
    refused(with_keys("train.lora={rank: 0}"), "train.lora.rank=0")
    refused(with_keys("train.lora={rnak: 4}"), "train.lora.rnak: no such key; did you mean 'rank'")


def test_keys_inside_lists():
    error = refused(with_keys("data.train=[{path: a.txt, wieght: 2}]"), "wieght: no such key; did you mean 'weight'")
    assert "mistakes" not in error.what


@pytest.mark.parametrize("method", [5, ["a"], {"name": [1]}])
def test_a_method_that_is_no_section(method):
    refused({"source": {"model": "gpt2"}, "method": method}, "method")


def test_unknown_names_of_things():
    refused(with_keys("method.name=difullama"), "method.name='difullama'", "did you mean 'diffullama'")
    with pytest.raises(UserError, match="neither a recipe.*\n.*did you mean 'default'"):
        load_recipe("defalt")
    with pytest.raises(UserError, match="no such recipe file"):
        load_recipe("nowhere/default.yaml")
    with pytest.raises(UserError, match="there is no recipe"):
        recipe_text("nothing")


def test_broken_words_and_files(tmp_path):
    for word in ("train.steps", "=5"):
        with pytest.raises(UserError, match="is not key=value"):
            set_key({}, word)
    with pytest.raises(UserError, match="is a value, not a section"):
        set_key({"train": {"steps": 5}}, "train.steps.more=1")
    with pytest.raises(UserError, match="line 3: not valid YAML"):
        parse_yaml("train:\n  steps: [1\n", "x.yaml")
    with pytest.raises(UserError, match="empty or not a mapping"):
        parse_yaml("", "x.yaml")


def test_precedence(tmp_path):
    """Command line > file > the method's row > the schema's defaults."""
    file = tmp_path / "mine.yaml"
    file.write_text("source: {model: gpt2}\nmethod: {name: diffullama, attention: {anneal_steps: 30}}\ntrain: {steps: 100, rows_per_step: 32}\n")
    recipe = load_recipe(str(file))
    assert recipe.method.attention.anneal == METHODS["diffullama"].choices["attention"]["anneal"] == "random"  # the row, over the default `none`
    assert recipe.method.attention.anneal_steps == 30  # the file, over the row's 10,000
    assert recipe.train.rows_per_step == 32 and recipe.train.micro_batch == Recipe.model_fields["train"].default.micro_batch
    recipe = load_recipe(str(file), ["method.attention.anneal_steps=40", "train.rows_per_step=64", "train.rows_per_step=128"])
    assert recipe.method.attention.anneal_steps == 40 and recipe.train.rows_per_step == 128  # the last word counts


def test_a_method_by_its_name_alone():
    recipe = validate({"source": {"model": "gpt2"}, "method": "ar"}, "x")
    assert (recipe.method.attention.pattern, recipe.method.corruption.kind, recipe.method.objective.weight) == ("causal", "none", "unweighted")


def test_a_checkpoint_folder_is_a_recipe(tmp_path):
    (tmp_path / "my-model").mkdir()
    recipe = load_recipe(str(tmp_path / "my-model"))
    assert recipe.source.model == str(tmp_path / "my-model") and recipe.name == "my-model"
    assert load_recipe("openai-community/gpt2").source.model == "openai-community/gpt2"


def test_annealing_steps():
    recipe = validate(with_keys("train.steps=200", "method.attention.anneal_steps=0.25"), "x")
    assert anneal_steps_of(recipe.method.attention, 200) == 50
    assert anneal_steps_of(validate(with_keys("method.attention.anneal_steps=7"), "x").method.attention, 200) == 7
    none = validate({"source": {"model": "gpt2"}, "method": {"attention": {"anneal": "none"}}}, "x")
    assert none.method.attention.anneal_steps is None and anneal_steps_of(none.method.attention, 200) == 1
    assert anneal_steps_of(validate(with_keys("method.attention.anneal_steps=0.001"), "x").method.attention, 100) == 1
    refused(with_keys("method.attention.anneal_steps=300", "train.steps=200"), "leaves no step of train.steps=200")
    refused(with_keys("method.attention.anneal_steps=1.5"), "neither a whole number")
    refused(with_keys("method.attention.anneal_steps=0"), "anneal_steps=0")
    # The last step is the first that is fully open: r(step) = (step + 1) / anneal_steps.
    validate(with_keys("method.attention.anneal_steps=200", "train.steps=200"), "x")


CONTRADICTIONS = {
    "source.model is empty": ["source.model="],
    "needs source.scratch (the config": ["source.if_missing=scratch"],
    "source.scratch needs `model_type`": ["source.model=", "source.scratch={n_layer: 2}"],
    "are both set": ["source.scratch={model_type: gpt2}"],
    "pretrain trains random weights": ["pretrain.steps=5"],
    "needs method.attention.anneal_steps": ["method.attention.anneal_steps="],
    "leads away from causal": ["method.attention.pattern=causal"],
    "is set but method.attention.anneal=none": ["method.attention.anneal=none"],
    "is the AR objective": ["method.name=ar", "method.attention.anneal_steps=", "method.corruption.kind=masking"],
    "shows the answer": ["method.corruption.kind=none"],
    "asks each token for itself": ["method.name=ar", "method.attention.anneal_steps=", "method.alignment=in_place"],
    "and method.corruption.kind=none has none": ["method.name=ar", "method.attention.anneal_steps=", "method.objective.weight=elbo"],
    "is larger than train.rows_per_step": ["train.rows_per_step=4", "train.micro_batch=8"],
    "is longer than sft.steps": ["sft.steps=10", "sft.warmup_steps=11"],
    "names a stage twice": ["stages=[adapt, adapt]"],
    "bound it with data.max_tokens": ["data.train=[{path: some/set, streaming: true}]"],
}


@pytest.mark.parametrize("sentence", CONTRADICTIONS)
def test_contradictions(sentence):
    refused(with_keys(*CONTRADICTIONS[sentence]), sentence)


def test_contradictions_are_all_told():
    refused(with_keys("source.model=", "train.rows_per_step=1", "stages=[sft, sft]"), "source.model is empty", "train.micro_batch", "a stage twice")


@pytest.mark.parametrize("text", ["1e-3", "1E-3", ".001", "0.001", "1.0e-3"])
def test_floats_as_people_write_them(text):
    assert validate(with_keys(f"train.learning_rate={text}"), "x").train.learning_rate == 1e-3
    assert validate(parse_yaml(f"source: {{model: gpt2}}\nmethod: {{attention: {{anneal_steps: 0.5}}}}\ntrain: {{learning_rate: {text}}}", "x"), "x").train.learning_rate == 1e-3


def test_a_fraction_where_text_is_allowed_too():
    assert validate(with_keys("data.validation=1e-2"), "x").data.validation == 0.01


def test_values_are_frozen():
    recipe = validate(SMALL, "x")
    with pytest.raises(Exception, match="frozen"):
        recipe.train.steps = 5


def test_validating_leaves_its_input_alone():
    values = with_keys()
    before = yaml.safe_dump(values)
    validate(values, "x")
    assert yaml.safe_dump(values) == before and METHODS["diffullama"].choices["attention"]["anneal_steps"] == 10_000


def test_every_method_is_a_valid_recipe():
    for name, method in METHODS.items():
        recipe = validate({"source": {"model": "gpt2"}, "method": name, "train": {"steps": 20_000}}, name)
        resolved = flat(recipe.method.model_dump())
        assert {key: resolved[key] for key in flat(method.choices)} == flat(method.choices)


def test_every_field_says_what_it_is():
    """The docstring is what `recipes keys` prints; a name that says it all may go without, few do."""
    silent = []

    def walk(section, prefix=""):
        for name, field in section.model_fields.items():
            inner = section_at([*prefix.rstrip(".").split("."), name] if prefix else [name])
            if inner is not None and issubclass(inner, Section):
                walk(inner, f"{prefix}{name}.")
            elif not field.description:
                silent.append(f"{prefix}{name}")

    walk(Recipe)
    assert len(silent) < 40 and not any(word in name for name in silent for word in ("anneal", "normaliser", "mask")), silent


def test_safe_keys_have_no_influence_on_the_numbers():
    safe = safe_keys()
    assert {"train.save_steps", "sft.log_steps", "run.folder", "data.workers"} <= safe
    for key in ("train.steps", "train.micro_batch", "train.seed", "data.row_length", "method.alignment", "engine.precision", "source.mask_token"):
        assert key not in safe


def test_text_sources():
    assert text_sources(0.02) == [] and text_sources(None) == []
    assert [s.path for s in text_sources("a.txt")] == ["a.txt"]
    recipe = validate(with_keys("data.train=[a.txt, {path: b.jsonl, weight: 3}]"), "x")
    assert [(s.path, s.weight) for s in text_sources(recipe.data.train)] == [("a.txt", 1.0), ("b.jsonl", 3.0)]
