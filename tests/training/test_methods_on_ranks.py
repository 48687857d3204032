"""What methods add beside the masked cross-entropy, on two processes under DeepSpeed: the single engine's numbers."""

from __future__ import annotations

import json
import shutil

import pytest
from command_line import SMALL, curve, write_corpus
from tiny_models import build

WORDS = [*SMALL, "train.steps=3", "train.log_steps=1", "train.adam_eps=1e-4", "eval.rows=4", "eval.draws=4", "run.folder=run"]
CASES = {
    "gidd, weights dealt out": ["method.name=gidd", "engine.zero_stage=3"],
    "the frozen source beside the model, a band that is looked for": [
        "method.name=repr-align", "method.objective.teacher_kl=0.5", "method.corruption.band_search_steps=1", "engine.zero_stage=2",
    ],
    "losses balanced by those of the step before, rates by kind, weights dealt out": [
        "method.name=i-dlm", "method.objective.ar_schedule=balanced", "method.objective.ar_weight=1", "train.rates={attention: 2, mlp: 0.3}", "engine.zero_stage=3",
    ],
    "experts kept in balance, weights dealt out": ["method.name=llada", "engine.zero_stage=3"],
}  # fmt: skip
CLOSE = ("loss", "nelbo", "alignment", "teacher_kl", "gradient_norm", "band_low", "band_high", "ar_nll", "router_balance")


@pytest.fixture(scope="module")
def zygote():
    from zygote import Zygote

    zygote = Zygote()
    yield zygote
    zygote.close()


@pytest.mark.parametrize("case", CASES)
def test_two_processes(case, zygote, tmp_path, tiny_checkpoints):
    curves, checkpoint = [], tiny_checkpoints["llama"]
    if case.startswith("experts"):
        checkpoint = tmp_path / "experts"
        build("qwen3_moe").save_pretrained(checkpoint)
        for file in tiny_checkpoints["llama"].glob("tokenizer*"):
            shutil.copy(file, checkpoint)
    for kind in (["engine.name=single"], ["engine.name=deepspeed", "--processes", "2"]):
        folder = tmp_path / str(len(curves))
        folder.mkdir()
        write_corpus(folder)
        status, text = zygote.run(folder, "adapt", checkpoint, *WORDS, *CASES[case], *kind)
        assert status == 0, text
        curves.append(curve(folder / "run" / "adapt"))
    one, two = curves
    assert len(one) == len(two) >= 3, json.dumps(two)
    assert ("router_balance" in one[1]) == case.startswith("experts") and ("ar_nll" in one[1]) == case.startswith("losses")
    for line, other in zip(one, two, strict=True):
        names = [name for name in CLOSE if name in line]
        assert names and [other[name] for name in names] == pytest.approx([line[name] for name in names], rel=1e-5, abs=1e-6), line["step"]
