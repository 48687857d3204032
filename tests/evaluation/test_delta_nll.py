"""measure_delta_nll: the truth against continuations of other rows, given the same prefix and under the same masks."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from command_line import SMALL, fails, works, write_corpus
from tiny_models import VOCAB, build, denoiser

from dlmconvert.evaluation.delta_nll import measure_delta_nll
from dlmconvert.evaluation.nelbo import measure_likelihood

HOW = {"num_rows": 6, "num_distractors": 2, "prefix_length": 5, "draws": 4, "seed": 0}


class Rows:
    def __init__(self, tokens_BL):
        self.tokens_BL, self.num_rows = tokens_BL, len(tokens_BL)

    def rows(self, indices):
        x = self.tokens_BL[torch.from_numpy(indices)]
        return SimpleNamespace(tokens_BL=x, eligible_BL=torch.ones_like(x).bool(), segments_BL=torch.zeros_like(x))


@pytest.fixture(scope="module")
def model():
    return build("llama")


@pytest.fixture(scope="module")
def rows():
    return Rows(torch.randint(0, VOCAB - 1, (6, 12), generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_the_difference_of_its_parts_whatever_the_batch(model, rows, attention):
    found = [measure_delta_nll(denoiser(model, attention=attention), rows, batch=batch, **HOW) for batch in (1, 4, 9)]
    assert all(one.delta == pytest.approx(found[0].delta, abs=1e-5) for one in found)
    one = found[0]
    assert one.delta == pytest.approx(one.distractors - one.truth) and one.standard_error > 0 and 0 <= one.accuracy <= 1
    assert (one.kind, one.draws) == (("nll", 1) if attention == "causal" else ("nelbo", 4))


def test_under_the_causal_pattern_it_is_the_models_own_loss(model, rows):
    """Against logits of the model, without any code of ours."""
    found = measure_delta_nll(denoiser(model, attention="causal"), rows, batch=3, **HOW)
    losses = []
    for offset in (0, 2, 4):
        x = torch.cat([rows.tokens_BL[:, :5], rows.tokens_BL.roll(-offset, 0)[:, 5:]], dim=1)
        with torch.no_grad():
            logits = model(x).logits[:, 4:-1]
        losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), x[:, 5:].flatten(), reduction="none").view(6, 7).sum(1))
    truth, *others = losses
    assert found.truth == pytest.approx(float(truth.sum()) / 42, rel=1e-5)
    assert found.delta == pytest.approx(float((torch.stack(others).mean(0) - truth).sum()) / 42, abs=1e-5)
    assert found.accuracy == pytest.approx(float(((truth < others[0]) & (truth < others[1])).float().mean()))


def test_equal_continuations_differ_by_nothing(model):
    """The masks of a row are those of its distractors: with equal texts the difference is zero, not noise."""
    same = torch.randint(0, VOCAB - 1, (6, 12), generator=torch.Generator().manual_seed(2))
    same[:, 5:] = same[:1, 5:]
    found = measure_delta_nll(denoiser(model, attention="bidirectional"), Rows(same), batch=4, **HOW)
    assert found.delta == pytest.approx(0.0, abs=1e-6) and found.accuracy == 0.0


def test_one_target_needs_one_draw(model, rows):
    """A single target is masked by every draw: the bound is the exact conditional likelihood."""
    how = HOW | {"prefix_length": 11}
    few, many = (measure_delta_nll(denoiser(model, attention="bidirectional"), rows, batch=6, **how | {"draws": draws}) for draws in (1, 3))
    assert few.delta == pytest.approx(many.delta, abs=1e-6)
    whole = measure_likelihood(denoiser(model, attention="causal"), rows, num_rows=6, draws=1, batch=6, seed=0)
    truth = measure_delta_nll(denoiser(model, attention="causal"), rows, batch=6, **HOW | {"prefix_length": 1}).truth
    assert truth == pytest.approx(whole.nats_per_token, rel=1e-5), "behind a prefix of one token it is the likelihood of the row"


def test_the_command(tiny_checkpoints, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path)
    works("adapt", tiny_checkpoints["gpt2"], *SMALL, "run.folder=runs/tiny")
    told = works("eval", "--delta-nll")
    model, source = json.loads(works("eval", "--delta-nll", "--json").out)
    assert (model["kind"], source["kind"], model["rows"], model["num_distractors"]) == ("nelbo", "nll", 4, 3)
    assert all(f"{row[name]:.4f}" in told.out for row in (model, source) for name in ("delta", "truth", "distractors"))
    assert "at least 4 rows" in fails(2, "eval", "--delta-nll", "--rows", 3)
    assert "one at a time" in fails(2, "eval", "--delta-nll", "--retention")
