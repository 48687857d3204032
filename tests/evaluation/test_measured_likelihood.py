"""measure_likelihood: fixed noise, any batch, the same tokens under either kind."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_models import VOCAB, build, denoiser

from dlmconvert.evaluation.nelbo import measure_likelihood

LENGTH = 12


class Rows:
    """Rows of random tokens. segments: rows of a store whose documents are isolated."""

    def __init__(self, num_rows=7, isolated=False, eligible=None):
        draw = torch.Generator().manual_seed(3)
        self.num_rows = num_rows
        self.tokens_BL = torch.randint(0, VOCAB - 1, (num_rows, LENGTH), generator=draw)
        self.segments_BL = torch.zeros(num_rows, LENGTH, dtype=torch.long)
        if isolated:
            self.segments_BL[:, 5:] = 1
        self.eligible_BL = torch.ones(num_rows, LENGTH, dtype=torch.bool) if eligible is None else eligible

    def rows(self, indices: np.ndarray):
        at = torch.from_numpy(np.asarray(indices))
        return SimpleNamespace(tokens_BL=self.tokens_BL[at], eligible_BL=self.eligible_BL[at], segments_BL=self.segments_BL[at])


@pytest.fixture(scope="module")
def model():
    return build("llama")


def measure(model, rows, attention="bidirectional", **changes):
    how = {"num_rows": 7, "draws": 3, "batch": 4, "seed": 0} | changes
    return measure_likelihood(denoiser(model, attention=attention), rows, **how)


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_the_batch_changes_nothing(model, attention):
    rows = Rows()
    results = [measure(model, rows, attention, batch=batch) for batch in (1, 3, 7, 50)]
    assert all(found.nats_per_token == pytest.approx(results[0].nats_per_token, rel=1e-5) for found in results)
    assert all(found.standard_error == pytest.approx(results[0].standard_error, rel=1e-4) for found in results)
    assert {found.tokens for found in results} == {7 * (LENGTH - 1)}


def test_fixed_noise_and_another_seed(model):
    rows = Rows()
    assert measure(model, rows) == measure(model, rows)
    assert measure(model, rows, seed=1).nats_per_token != measure(model, rows).nats_per_token


def test_nll_is_the_sum_of_next_token_losses(model):
    """Against the model's own loss, without any code of ours."""
    rows = Rows()
    found = measure(model, rows, "causal")
    with torch.no_grad():
        logits_BLV = model(rows.tokens_BL).logits
    expected = torch.nn.functional.cross_entropy(logits_BLV[:, :-1].flatten(0, 1).double(), rows.tokens_BL[:, 1:].flatten())
    assert found.kind == "nll" and found.draws == 1
    assert found.nats_per_token == pytest.approx(float(expected), rel=1e-5)


def test_position_0_is_scored_under_neither(model):
    rows = Rows()
    assert measure(model, rows).tokens == measure(model, rows, "causal").tokens == 7 * (LENGTH - 1)
    isolated = Rows(isolated=True)  # nor is the first token of any document in the row
    assert measure(model, isolated).tokens == measure(model, isolated, "causal").tokens == 7 * (LENGTH - 2)


def test_documents_that_are_isolated_are_scored_alone(model):
    rows = Rows(isolated=True)
    found = measure(model, rows, "causal")
    nats = 0.0
    with torch.no_grad():
        for part in (rows.tokens_BL[:, :5], rows.tokens_BL[:, 5:]):
            logits = model(part).logits[:, :-1].flatten(0, 1).double()
            nats += float(torch.nn.functional.cross_entropy(logits, part[:, 1:].flatten(), reduction="sum"))
    assert found.nats_per_token * found.tokens == pytest.approx(nats, rel=1e-5)


def test_rows_without_targets_and_single_rows(model):
    eligible = torch.ones(7, LENGTH, dtype=torch.bool)
    eligible[2] = False
    found = measure(model, Rows(eligible=eligible))
    assert found.tokens == 6 * (LENGTH - 1) and math.isfinite(found.nats_per_token)
    one = measure(model, Rows(), num_rows=1)
    assert one.rows == 1 and one.standard_error is None and one.to_dict()["standard_error"] is None
    assert measure(model, Rows(), num_rows=99).rows == 7


def test_an_untrained_model_is_near_uniform():
    """-log p of a model that knows nothing is log V, under both kinds."""
    model = build("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    for attention in ("bidirectional", "causal"):
        assert measure(model, Rows(), attention, draws=64).nats_per_token == pytest.approx(math.log(VOCAB), rel=1e-5)


def test_bits_a_byte(model, tiny_tokenizer):
    rows = Rows()
    text_bytes = sum(len(tiny_tokenizer.decode(row[1:], skip_special_tokens=True).encode()) for row in rows.tokens_BL.tolist())
    scored = denoiser(model)
    assert measure(model, rows).bits_per_byte is None
    scored.tokenizer = tiny_tokenizer
    found = measure_likelihood(scored, rows, num_rows=7, draws=2, batch=4, seed=0)
    assert found.bits_per_byte == pytest.approx(found.nats_per_token * found.tokens / math.log(2) / text_bytes)


def test_progress_and_mode_are_left_as_they_were(model):
    done = []
    scored = denoiser(model).train()
    measure_likelihood(scored, Rows(), num_rows=7, draws=3, batch=4, seed=0, advance=done.append)
    assert sum(done) == 21 and scored.training
