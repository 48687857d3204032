"""metrics.jsonl: averages over intervals, and the same lines after an interruption."""

from __future__ import annotations

import pytest

from dlmconvert.training.metrics import Metrics, read_metrics


def record(metrics, steps, total=10):
    for step in steps:
        metrics.record(step, {"loss": 1.0 / step}, lambda step=step: {"learning_rate": step}, is_final=step == total)


def test_a_line_is_the_mean_of_its_interval(tmp_path):
    heard = []
    metrics = Metrics(tmp_path / "metrics.jsonl", 4, heard.append)
    record(metrics, range(1, 11))
    lines = read_metrics(metrics.path)
    assert lines == heard and [line["step"] for line in lines] == [4, 8, 10]
    assert lines[1]["loss"] == pytest.approx((1 / 5 + 1 / 6 + 1 / 7 + 1 / 8) / 4) and lines[1]["learning_rate"] == 8


def test_interrupted_lines_are_those_of_the_straight_run(tmp_path):
    straight = Metrics(tmp_path / "straight.jsonl", 4)
    record(straight, range(1, 11))
    broken = Metrics(tmp_path / "broken.jsonl", 4)
    record(broken, range(1, 7))
    state = broken.state()
    record(broken, range(7, 10))  # after the checkpoint: forgotten
    broken.path.write_text(broken.path.read_text() + '{"step": 9, "lo')  # and cut short by a kill
    again = Metrics(tmp_path / "broken.jsonl", 4)
    again.resume(state, 6)
    record(again, range(7, 11))
    assert read_metrics(again.path) == read_metrics(straight.path)


def test_starting_anew_forgets_a_run_that_never_saved(tmp_path):
    metrics = Metrics(tmp_path / "metrics.jsonl", 1)
    record(metrics, [1, 2])
    metrics.resume({"sums": {}, "num_steps": 0}, 0)
    assert read_metrics(metrics.path) == []
