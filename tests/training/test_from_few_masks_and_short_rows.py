"""Noise that rises and rows in pieces, through the command line; both end before the stage does."""

from __future__ import annotations

import pytest
from command_line import SMALL, curve, works, write_corpus


@pytest.mark.parametrize("documents", ["joined", "isolated"])
def test_adapt_from_few_masks_and_short_rows(documents, tmp_path, tiny_checkpoints, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path)
    words = ["method.attention={anneal: pieces, anneal_steps: 6}", "method.corruption={rise_steps: 6, rise_from: 0.1, noise_levels: offset}"]
    words += [f"data.documents={documents}", "train.steps=8", "train.log_steps=1"]
    lines = {}
    for name, more in {"whole": [], "split": ["train.micro_batch=1"], "masked": ["method.objective.weight=unweighted", "method.objective.normaliser=masked"]}.items():
        works("adapt", tiny_checkpoints["gpt2"], *SMALL, *words, *more, f"run.folder={name}")
        lines[name] = [line for line in curve(tmp_path / name / "adapt") if "loss" in line]
    whole = lines["whole"]
    # Rows of 32: pieces of 4, 8 and 16 for two steps each.
    assert [line["open_ratio"] for line in whole] == pytest.approx([3 / 31] * 2 + [7 / 31] * 2 + [15 / 31] * 2 + [1, 1])
    assert whole[0]["masked_fraction"] < 0.15 and min(line["masked_fraction"] for line in whole[-2:]) > 0.3
    assert [line["loss"] for line in lines["split"]] == pytest.approx([line["loss"] for line in whole], rel=1e-4)
    # One micro-batch counts its own targets: the mean over them.
    assert all(line["loss"] == pytest.approx(line["cross_entropy"], rel=1e-5) for line in lines["masked"])
    assert {line["tokens_seen"] / line["step"] for line in whole} == {whole[0]["tokens_seen"]}
