"""What published experiments say about a budget, and that nothing is said beyond them."""

from __future__ import annotations

import math
import re

import pytest

from dlmconvert.planning import budget
from dlmconvert.planning.budget import CRITICAL, CROSSOVER, critical_compute, data_budget
from dlmconvert.planning.plan import plan_recipe
from dlmconvert.recipe.load import load_recipe


def kinds(found):
    return [kind for kind, _ in found.sentences]


def text(found):
    return " ".join(sentence for _, sentence in found.sentences)


def test_the_two_published_forms_of_the_critical_compute_agree():
    """C = 2.12 x 10^1.956 U^2.174 and log10(U / 10^6) = 0.460 log10 C - 7.052 are one curve, within the rounding of their digits."""
    for unique in (25e6, 50e6, 100e6):
        other = 10 ** ((math.log10(unique / 1e6) + 7.052) / 0.460)
        assert critical_compute(unique) == pytest.approx(other, rel=0.03)


def test_inside_of_the_fit_it_predicts():
    unique = 50e6
    below, above = (data_budget(1e8, unique, factor * critical_compute(unique) / 6e8) for factor in (0.5, 2.0))
    assert "fit" in kinds(below) and "below" in text(below) and "AR would have" in text(below)
    assert "fit" in kinds(above) and "above" in text(above) and "diffusion would have" in text(above)
    assert all(CRITICAL.arxiv in text(found) for found in (below, above))


@pytest.mark.parametrize(("parameters", "unique"), [(6.7e9, 3e8), (5e6, 50e6), (1e8, 2e8)])
def test_outside_of_all_experiments_no_side_is_taken(parameters, unique):
    found = data_budget(parameters, unique, 20 * unique)
    assert "outside" in kinds(found) and "fit" not in kinds(found)
    assert "was not measured" in text(found) and not re.search("would have the lower", text(found))


def test_every_sentence_of_repetition_names_its_paper():
    for unique, epochs in ((50e6, 40), (1e9, 20), (10e9, 6), (1e12, 3)):
        for kind, sentence in data_budget(1.5e9, unique, epochs * unique).sentences:
            assert kind == "assumed" or re.search(r"arXiv \d{4}\.\d{5}", sentence), sentence


def test_an_ar_baseline_is_warned_of_beyond_four_epochs():
    assert not data_budget(1e9, 1e9, 4e9).warns and data_budget(1e9, 1e9, 5e9).warns
    for epochs, words in ((3, "would not overfit"), (8, "is at risk of overfitting"), (20, "would overfit")):
        assert f"an AR baseline on this text {words}" in text(data_budget(1e9, 1e9, epochs * 1e9))
        assert f"this AR run {words}" in text(data_budget(1e9, 1e9, epochs * 1e9, is_diffusion=False))


def test_measured_at_1b_within_its_training_tokens():
    assert CROSSOVER.arxiv in text(data_budget(1e9, 1e9, 96e9)) and "no side is predicted" in text(data_budget(1e9, 1e9, 96e9))
    assert "outside" in kinds(data_budget(1e9, 10e9, 1e12))


def test_without_repetition_there_is_nothing_to_say():
    assert kinds(data_budget(1e9, 1e9, 9e8)) == ["repetition"]


def test_plan_counts_epochs_of_the_tokens_given():
    plan = plan_recipe(load_recipe("tiny"), gpu="a100-80gb", unique_tokens=100_000)
    assert plan.unique_tokens == 100_000 and plan.unique_tokens_from == "as given"
    assert plan.budget.epochs == pytest.approx(sum(stage.tokens for stage in plan.stages if stage.name != "sft") / 1e5)
    assert plan.budget.warns == (plan.budget.epochs > budget.FRESH_EPOCHS) and ("data", "epochs", f"{plan.budget.epochs:.2g}") in plan.rows
