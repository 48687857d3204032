"""Methods by name, single choices on top of them, and choices that cannot both be meant."""

from __future__ import annotations

import pytest
from test_recipe import refused, with_keys

from dlmconvert.methods import METHODS
from dlmconvert.recipe.load import validate

CONTRADICTIONS = {
    "corrects twice": ["method.objective.normaliser=masked"],
    "is not 0 < low": ["method.corruption.band=[0.8, 0.3]"],
    "is not 0 < low <=": ["method.corruption.band=[0, 1]"],
    "holds for one view only": ["method.corruption.views=complementary", "method.corruption.count=exact"],
    "would pair the pairs": ["method.corruption.views=complementary", "method.corruption.noise_levels=antithetic"],
    "symmetric around 0.5": ["method.corruption.views=complementary", "method.corruption.band=[0.3, 0.8]"],
    "train.rows_per_step=5 is odd": ["method.corruption.views=complementary", "train.rows_per_step=5", "train.micro_batch=5"],
    "anneal=window needs method.attention.anneal_steps": ["method.attention.anneal=window", "method.attention.anneal_steps="],
    "weighs masked tokens": ["method.name=ar", "method.attention.anneal_steps=", "method.objective.weight=cart"],
    "method.corruption.count says how": ["method.name=ar", "method.attention.anneal_steps=", "method.corruption.count=exact"],
    "method.objective.cart_p": ["method.objective.cart_p=1.5"],
}


@pytest.mark.parametrize("sentence", CONTRADICTIONS)
def test_contradictions(sentence):
    error = refused(with_keys(*CONTRADICTIONS[sentence]), sentence)
    assert "mistakes" not in error.what, error


@pytest.mark.parametrize(
    "words",
    [
        ["method.attention.anneal=window"],
        ["method.corruption.band=[0.3, 0.8]", "method.corruption.count=exact"],
        ["method.corruption.views=complementary", "method.corruption.band=[0.25, 0.75]", "method.objective.weight=unweighted"],
        ["method.corruption.count=at_least_one", "method.objective.weight=cart", "method.objective.normaliser=masked"],
        ["method.alignment=in_place", "method.corruption.noise_levels=antithetic", "train.rates.attention=2", "train.rates.head=0"],
    ],
)
def test_choices_that_go_together(words):
    validate(with_keys(*words), "x")


def test_each_method_says_where_it_stands():
    for name, row in METHODS.items():
        assert row.name == name and row.paper and row.summary and set(row.choices) == {"attention", "alignment", "corruption", "objective"}
        assert row.departs or name == "ar"


def test_a_method_with_one_choice_changed():
    values = {"source": {"model": "gpt2"}, "method": {"name": "dream", "objective": {"cart_p": 0.3}, "attention": {"anneal": "window", "anneal_steps": 5}}}
    method = validate(values, "x").method
    assert (method.objective.weight, method.objective.cart_p, method.objective.normaliser) == ("cart", 0.3, "masked")
    assert method.attention.anneal == "window" and method.alignment == "shift"
    assert METHODS["dream"].choices["objective"]["cart_p"] == 0.1
