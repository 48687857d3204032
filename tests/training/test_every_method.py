"""Each published method through the parts that a run is made of: batches, loss, gradient; and one by one through the command line."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from command_line import SMALL, curve, works, write_corpus
from memory_stream import make_engine
from test_loop import close
from tiny_models import VOCAB, rewritten

from dlmconvert.data.rows import Rows
from dlmconvert.methods import METHODS
from dlmconvert.recipe.load import validate
from dlmconvert.runs.models import TrainingJob, batch_stream, loop_settings_of
from dlmconvert.training.loop import accumulate

ROWS, LENGTH, MASK = 8, 24, VOCAB - 1


class Store:
    """Rows in memory with all that a row store on disk has. kind: `joined`, `isolated` documents, `padded` conversations."""

    def __init__(self, kind="joined", row_length=LENGTH):
        self.row_length, self.num_rows, self.kind = row_length, 32, kind
        self.has_segments, self.all_eligible, self.meta = kind != "joined", kind != "padded", {}
        generator = torch.Generator().manual_seed(11)
        self.tokens_RL = torch.randint(3, 200, (self.num_rows, row_length), generator=generator)
        self.cuts_R = torch.randint(5, row_length - 5, (self.num_rows,), generator=generator)

    def rows(self, indices):
        return Rows(self.tokens_RL[torch.from_numpy(np.asarray(indices))], self.eligible(indices), self.segments(indices))

    def eligible(self, indices):
        places_L, cuts_B = torch.arange(self.row_length), self.cuts_R[torch.from_numpy(np.asarray(indices))]
        if self.kind != "padded":
            return torch.ones(len(indices), self.row_length, dtype=torch.bool)
        return (places_L >= 3) & (places_L < cuts_B[:, None])  # the answer, behind a prompt of three tokens

    def segments(self, indices):
        if self.kind == "joined":
            return torch.zeros(len(indices), self.row_length, dtype=torch.int64)
        return (torch.arange(self.row_length) >= self.cuts_R[torch.from_numpy(np.asarray(indices))][:, None]).long()


def job_of(name, store, micro_batch=ROWS, row_length=LENGTH, **method):
    """What a recipe with this method trains. Blocks of 8 at most, so that a row has several."""
    attention = METHODS[name].choices["attention"]
    choices = {"name": name, **method}
    if attention.get("block_length", 0) > 8:
        choices = {"attention": {"block_length": 8}, **choices}
    train = {"steps": 8, "rows_per_step": ROWS, "micro_batch": micro_batch, "learning_rate": 3e-3}
    if attention["anneal"] != "none" and (attention.get("anneal_steps") or 0) >= 1:
        choices["attention"] = {"anneal_steps": 4, **choices.get("attention", {})}
    recipe = validate({"source": {"model": "x"}, "method": choices, "train": train}, "x")
    return TrainingJob("adapt", recipe.train, recipe.method, None, "adapt", [store], [1.0], None, isolated=store.kind == "isolated")


def prepared(name, store=None, micro_batch=ROWS, family="llama", **method):
    job = job_of(name, store or Store(), micro_batch, **method)
    engine = make_engine(family, alignment=job.method.alignment)
    return engine, batch_stream(job, MASK), loop_settings_of(job, LENGTH)


def gradient(engine, stream, settings, step, rank=0, count=1):
    engine.denoiser.zero_grad()
    engine.ranks = SimpleNamespace(rank=rank, count=count)
    part = accumulate(engine, stream, settings, step)
    return part.sums, {name: p.grad.clone() for name, p in engine.parameters.items() if p.grad is not None}


@pytest.mark.parametrize("kind", ["joined", "isolated", "padded"])
@pytest.mark.parametrize("name", METHODS)
def test_one_gradient_under_any_split_and_any_number_of_ranks(name, kind):
    """1 x 8, 8 x 1, 2 ranks x 4 and 2 ranks x 3 + 1: the same sums and the same gradient, in the middle of its schedule."""
    engine, stream, settings = prepared(name, Store(kind))
    step = 3
    whole_sums, whole = gradient(engine, stream, settings, step)
    assert any(float(g.abs().max()) > 0 for g in whole.values())
    for micro_batch, count in ((1, 1), (3, 2)):
        settings_split = type(settings)(**{**vars(settings), "micro_batch": micro_batch})
        parts = [gradient(engine, stream, settings_split, step, rank, count) for rank in range(count)]
        for key, value in whole_sums.items():
            assert sum(sums[key] for sums, _ in parts) == pytest.approx(value, rel=2e-5, abs=1e-6), key
        close({key: sum(grads[key] for _, grads in parts) for key in whole}, whole, 2e-5, 2e-6)


@pytest.mark.parametrize("name", ["bd3lm", "nbdiff", "i-dlm", "fast-dllm-v2"])
def test_padding_is_seen_by_no_loss_of_a_block_model(name):
    """The tokens behind a conversation's end may be anything."""
    store = Store("padded")
    results = []
    for word in (7, 123):
        store.tokens_RL = torch.where(torch.arange(LENGTH) >= store.cuts_R[:, None], word, store.tokens_RL)
        results.append(gradient(*prepared(name, store), 3))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    names = [key for key in results[0][1] if "embed" not in key]
    close({key: results[0][1][key] for key in names}, {key: results[1][1][key] for key in names}, 1e-5, 1e-7)


@pytest.mark.parametrize("pattern", ["block_causal", "context_causal", "causal_in_block"])
@pytest.mark.parametrize("alignment", ["shift", "in_place"])
def test_a_document_in_a_packed_row_has_the_predictions_that_it_has_alone(pattern, alignment):
    from dlmconvert.data.loader import positions
    from dlmconvert.diffusion.streams import block_starts
    from tiny_models import denoiser

    store, cut = Store("isolated"), 10
    model = denoiser(rewritten("llama"), alignment, pattern, block_length=4)
    store.cuts_R[:] = cut
    rows = store.rows(np.arange(2))
    positions_BL = positions(rows.segments_BL, isolated=True)
    starts_BL = block_starts(positions_BL, 4) & (positions_BL > 0) & torch.tensor(alignment == "shift")
    masked_BL = (torch.rand(2, LENGTH, generator=torch.Generator().manual_seed(3)) < 0.5) & (positions_BL > 0) & ~starts_BL
    x_t_BL = rows.tokens_BL.masked_fill(masked_BL, MASK)

    def predictions(first, stop, segments_BL):
        part = [t[:, first:stop] for t in (x_t_BL, rows.tokens_BL, masked_BL, starts_BL, positions_BL)]
        logits_NV = model.predict_blocks(*part, segments_BL)
        chosen_BS = torch.cat([part[2], part[3]], 1)
        return torch.zeros(*chosen_BS.shape, VOCAB).masked_scatter(chosen_BS[..., None], logits_NV).view(2, 2, stop - first, VOCAB)

    packed = predictions(0, LENGTH, rows.segments_BL)
    torch.testing.assert_close(packed[:, :, :cut], predictions(0, cut, None), rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(packed[:, :, cut:], predictions(cut, LENGTH, None), rtol=1e-4, atol=2e-5)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("methods")
    write_corpus(folder)
    return folder


@pytest.mark.parametrize("name", METHODS)
def test_each_method_trains_from_the_command_line(name, place, tiny_checkpoints, monkeypatch):
    """Two steps; the model folder says which choices it was trained with."""
    monkeypatch.chdir(place)
    words = ["adapt", tiny_checkpoints["llama"], *SMALL, f"method.name={name}", "train.steps=2", "train.log_steps=1", "eval.rows=1", "eval.draws=1"]
    attention = METHODS[name].choices["attention"]
    if attention["anneal"] != "none" and (attention.get("anneal_steps") or 0) >= 1:
        words.append("method.attention.anneal_steps=2")
    works(*words, f"run.folder={name}")
    lines = curve(place / name / "adapt")
    assert len(lines) >= 2 and all(np.isfinite(line["loss"]) and line["gradient_norm"] > 0 for line in lines if "loss" in line)
    spec = json.loads((place / name / "adapt" / "model" / "config.json").read_text())["dlm"]
    choices = METHODS[name].choices
    assert (spec["method"], spec["attention"], spec["alignment"]) == (name, attention["pattern"], choices["alignment"])
    assert spec["block_length"] == attention.get("block_length") and spec["corruption"] == choices["corruption"]["kind"]
