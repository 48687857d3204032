"""Variants of one recipe side by side: the same batches, resumable, refused together."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import pytest
from command_line import SMALL, curve, dlmconvert, fails, stage_state, works

from dlmconvert.errors import UserError
from dlmconvert.runs.compare import alternatives

HERE = [*SMALL, "name=one"]
FOLDER = Path("runs/one-compare")


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("method.name=a,b", [("method.name=a",), ("method.name=b",)]),
        ("a.b=none+a.c=null,a.b=random+a.c=4", [("a.b=none", "a.c=null"), ("a.b=random", "a.c=4")]),
        ("a.b=none+a.c=null,random", [("a.b=none", "a.c=null"), ("a.b=random",)]),
        ("a.band=[0.3, 0.8],null", [("a.band=[0.3, 0.8]",), ("a.band=null",)]),
        ("a.rate=1e+3,'x,y'", [("a.rate=1e+3",), ("a.rate='x,y'",)]),
    ],
)
def test_what_is_varied(option, expected):
    assert alternatives(option) == expected


def test_a_list_without_a_key_is_refused():
    with pytest.raises(UserError, match="not key=value"):
        alternatives("dream")


def test_variants_are_trained_as_if_alone_and_tabulated(place, tiny_checkpoints):
    gpt2 = tiny_checkpoints["gpt2"]
    words = ["compare", gpt2, *HERE, "--vary", "method.name=dream,ar", "--vary", "train.schedule=cosine,constant", "--report", "page.html"]
    told = works(*words)
    names = ["dream+schedule-cosine", "dream+schedule-constant", "ar+schedule-cosine", "ar+schedule-constant"]
    data = json.loads((FOLDER / "compare.json").read_text())
    assert [row["variant"] for row in data["variants"]] == names
    assert all(name in told.out and name in told.err for name in names) and "NELBO <= " in told.out
    assert "exact NLL" in data["notes"][0] and len(data["notes"]) == 1, "trained on the same batches, measured alike"
    first, last = data["variants"][0], data["variants"][-1]
    assert (first["after"]["kind"], last["after"]["kind"], last["before"]) == ("nelbo", "nll", None)
    assert first["after"]["standard_error"] > 0 and first["source"] == last["source"]
    assert first["tokens_seen"] == 8 * 4 * 32 and first["tokens_per_second"] == pytest.approx(8 * 4 * 32 / first["training_seconds"])
    assert (FOLDER / "compare.png").read_bytes()[:4] == b"\x89PNG" and "<table>" in Path("page.html").read_text()
    assert len([path for path in (FOLDER / ".tokens").iterdir() if path.is_dir()]) >= 1

    for row in data["variants"]:
        kept = row["retention"]
        assert kept["nats_before"] == pytest.approx(row["source"]["nats_per_token"], abs=1e-5) and kept["weight_drift"] > 0
        assert 0 < kept["acceptance"] < 1 and f"{kept['nats_after']:.3f}" in told.out and f"{kept['acceptance']:.1%}" in told.out
        assert kept["sentence"] in html.unescape(Path("page.html").read_text()) and (FOLDER / row["variant"] / "plots/retention.png").is_file()
    assert last["retention"]["nats_after"] == pytest.approx(last["after"]["nats_per_token"], abs=1e-5), "an AR variant is scored on its causal path anyway"

    works("adapt", gpt2, *SMALL, "name=alone", "method.name=dream", "train.schedule=cosine")
    assert curve(Path("runs/alone/adapt")) == curve(FOLDER / names[0] / "adapt")

    again = works(*words, "--json")
    assert again.err.count("done before") == 4 and json.loads(again.out) == data
    works("status", FOLDER / names[0])


def test_it_continues_where_it_stopped(place, tiny_checkpoints, monkeypatch):
    from dlmconvert.errors import SavedAndLeft
    from dlmconvert.runs import compare

    words = ["compare", tiny_checkpoints["gpt2"], *HERE, "--vary", "method.name=llada,dream"]
    real = compare.run_stages

    def stopped(run, *rest):
        if run.name == "dream":
            raise SavedAndLeft(3, "SIGTERM")
        return real(run, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(compare, "run_stages", stopped)
        told = dlmconvert(*words)
        assert told.code == 75 and "the same command continues" in told.text
    told = works(*words, "--no-retention")
    assert "llada: done before" in told.err and "dream: run folder" in told.err
    assert "accepted" not in told.out and not (FOLDER / "dream/retention.json").exists()
    told = works(*words)
    assert "done already" not in told.out and "accepted" in told.out and "(2/2) dream: what is left" in told.err
    (FOLDER / "dream/retention.json").unlink()
    assert "(1/1) dream: what is left" in works(*words).err, "what is measured is kept"
    told = works(*words)
    assert "done already" in told.out and "what is left" not in told.err

    text = fails(2, *words, "train.steps=9")
    assert "2 of 2 variants" in text and "train.steps: 8 -> 9" in text and "name=OTHER" in text


def test_contradictory_variants_are_refused_together_before_anything_is_trained(place, tiny_checkpoints):
    text = fails(
        2, "compare", tiny_checkpoints["gpt2"], *HERE,
        "--vary", "method.name=ar,dream", "--vary", "method.alignment=shift,in_place", "--vary", "method.attention.anneal=none,window",
    )  # fmt: skip
    lines = re.findall(r"^  (\S+): ", text, re.MULTILINE)
    assert "5 of 8 variants" in text and lines == [
        "ar+alignment-shift+anneal-window", "ar+alignment-in_place+anneal-none", "ar+alignment-in_place+anneal-window",
        "dream+alignment-shift+anneal-window", "dream+alignment-in_place+anneal-window",
    ]  # fmt: skip
    assert "needs method.attention.anneal_steps" in text and "asks each token for itself" in text
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ([], "one variant is no comparison"),
        (["--vary", "method.name=dream"], "one variant is no comparison"),
        (["--vary", "method.name=dream,dream"], "listed twice"),
        (["--vary", "method.name=dream,ar", "--vary", "method.name=llada"], "varied twice"),
        (["--vary", "name=a,b"], "cannot be varied"),
        (["--vary", "train.steps=4,6"], "train.steps=8 has no effect"),
        (["--vary", "method.name=dream,drem"], "drem: method.name='drem' is not a published method"),
        (["data.train=nowhere.jsonl", "--vary", "method.name=dream,ar"], "nowhere.jsonl"),
        (["--vary", "method.name=dream,ar", "--report", "page.txt"], "not an .html file"),
        (["--vary", "method.name=dream,ar", "--report", "mine.html"], "exists already"),
    ],
)
def test_what_cannot_be_compared(words, why, place, tiny_checkpoints):
    Path("mine.html").write_text("mine")
    assert why in fails(2, "compare", tiny_checkpoints["gpt2"], *HERE, *words)
    assert not Path("runs").exists()


def test_the_files_own_choices_stay_with_its_own_method(place, tiny_checkpoints):
    Path("mine.yaml").write_text(f"name: one\nsource: {{model: {tiny_checkpoints['gpt2']}}}\nmethod: {{name: diffullama, attention: {{anneal_steps: 4}}}}\n")
    told = works("compare", "mine.yaml", *SMALL, "train.steps=4", "--vary", "method.name=diffullama,llada", "--json")
    assert [row["method"] for row in json.loads(told.out)["variants"]] == ["diffullama", "llada"]
    keys = {name: stage_state(FOLDER / name, "adapt")["keys"]["method.attention.anneal_steps"] for name in ("diffullama", "llada")}
    assert keys == {"diffullama": 4, "llada": None}


def test_a_recipe_that_makes_its_own_model_makes_it_once(place):
    Path("mine.yaml").write_text(
        "name: one\nmethod: {name: llada}\npretrain: {steps: 4, rows_per_step: 4, micro_batch: 4}\n"
        "source: {scratch_tokenizer: bytes, scratch: {model_type: gpt2, n_embd: 32, n_layer: 2, n_head: 4, n_positions: 64, vocab_size: 260}}\n"
    )
    words = ["compare", "mine.yaml", *SMALL, "train.steps=4", "--vary", "method.name=dream,ar"]
    told = works(*words)
    assert "(1/3) source: run folder" in told.err
    assert sorted(path.parent.name for path in FOLDER.glob("*/pretrain")) == ["source"]
    assert works(*words).err.count("done before") == 3
    assert "pretrain.steps: 4 -> 5" in fails(2, *words, "pretrain.steps=5")
