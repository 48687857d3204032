"""The search for the fastest setting, on numbers instead of models."""

from __future__ import annotations

import pytest

from dlmconvert.evaluation.benchmark import Result, mark_front, name_of
from dlmconvert.evaluation.tuning import Floor, coarse_grid, neighbours, tune


def result(speed: float, nats: float | None = None, accuracy: float | None = None, settings: dict | None = None) -> Result:
    settings = {} if settings is None else settings
    return Result(name_of(settings), settings, 100, 1.0, 1.0, [100 / speed], [0.1], None, nats_per_token=nats, accuracy=accuracy)


def test_a_floor_speaks_in_the_terms_of_the_quality():
    results = [result(1, 2.0), result(2, 2.2), result(3, 3.0)]
    assert [Floor(0.1, True).allows(r, results) for r in results] == [True, True, False]
    assert [Floor(2.1, False).allows(r, results) for r in results] == [True, False, False]
    by_accuracy = [result(1, accuracy=0.8), result(2, accuracy=0.75), result(3, accuracy=0.5)]
    assert [Floor(0.1, True).allows(r, by_accuracy) for r in by_accuracy] == [True, True, False]
    assert not Floor(0.1, True).allows(result(1, accuracy=0.0), [result(1, accuracy=0.0)])
    assert [Floor(0.78, False).allows(r, by_accuracy) for r in by_accuracy] == [True, False, False]


def test_the_front_leaves_the_source_out_and_keeps_ties():
    ar = result(9, 1.0)
    ar.settings = None
    results = [ar, result(1, 2.0), result(2, 2.0), result(3, 3.0), result(3, 3.0), result(2.5, 3.5)]
    mark_front(results)
    assert [r.is_on_front for r in results] == [False, False, True, True, True, False]


@pytest.mark.parametrize(
    "chosen, tried, middle",
    [
        ({"threshold": 0.9}, [{"threshold": 0.9}, {"threshold": 0.8}, {"threshold": 0.6}], {"threshold": 0.85}),
        ({"threshold": 0.6}, [{"threshold": 0.9}, {"threshold": 0.6}], {"threshold": 0.3}),
        ({"threshold": 0.9, "cache": "dual"}, [{"threshold": 0.9, "cache": "dual"}, {"threshold": 0.8}], {"threshold": 0.45, "cache": "dual"}),
        ({"entropy_bound": 0.2}, [{"entropy_bound": 0.2}, {"entropy_bound": 0.8}], {"entropy_bound": 0.5}),
        ({"alg": "confidence", "steps": 16}, [{"alg": "confidence", "steps": 8}, {"alg": "confidence", "steps": 16}], {"alg": "confidence", "steps": 12}),
        ({"alg": "confidence", "steps": 9}, [{"alg": "confidence", "steps": 8}, {"alg": "confidence", "steps": 9}], None),
        ({"draft_length": 4}, [{"draft_length": 4}], None),
    ],
)
def test_the_next_try_lies_half_way_to_the_next_faster_one(chosen, tried, middle):
    assert neighbours(chosen, tried, 64) == middle


def test_the_search_ends_at_the_fastest_that_is_good_enough(monkeypatch):
    """Models whose speed and quality are a formula: the threshold is pressed down until the quality breaks, at 0.7."""
    raced = []

    def formula(denoiser, source, samplers, task, *, repeats, decode_source, measure_memory, advance):
        found = []
        for sampler in samplers:
            tau = sampler.settings.get("threshold", 1.0)
            fast = 2 if sampler.settings.get("cache") == "dual" else 1
            found.append(result((2 - tau) * fast, 2.0 if tau >= 0.7 else 5.0, settings=sampler.settings))
        raced.append((repeats, len(samplers)))
        return found

    class Job:
        num_new = 64

    monkeypatch.setattr("dlmconvert.evaluation.tuning.benchmark", formula)
    tuned = tune(None, None, Job, Floor(0.05, True), base={"temperature": 0.5}, works=lambda settings: settings.get("cache") != "prefix", repeats=4)
    assert tuned.chosen.settings["cache"] == "dual" and 0.7 <= tuned.chosen.settings["threshold"] <= 0.75 and tuned.chosen.settings["temperature"] == 0.5
    assert raced[0] == (1, len(coarse_grid(64, lambda settings: settings.get("cache") != "prefix"))) and raced[-1] == (4, 3)
    assert tune(None, None, Job, Floor(0.5, False), base={}, works=lambda settings: True).chosen is None
