"""Clipped schedules: the band of least variance, found while training, and the same after an interruption."""

from __future__ import annotations

import pytest
import torch
from command_line import SMALL, curve, dlmconvert, works, write_corpus
from memory_stream import make_engine
from test_every_method import Store, job_of

from dlmconvert.runs.models import batch_stream, loop_settings_of
from dlmconvert.training.bands import BandSearch, bands, variances
from dlmconvert.training.losses import batch_loss, context_of


def test_the_grid():
    assert (0.0, 1.0) in bands() and (0.3, 0.8) in bands() and (0.5, 1.0) in bands() and (0.05, 0.95) in bands()
    assert all(0 <= low < high <= 1 and high - low >= 0.5 - 1e-9 for low, high in bands()) and len(set(bands())) == len(bands())


def test_the_band_of_least_variance_is_found():
    """Losses that are noisy below 0.3 and above 0.85 and calm between: the calm part wins; few samples judge nothing."""
    generator = torch.Generator().manual_seed(0)
    t_N = torch.rand(20000, generator=generator)
    noise_N = torch.randn(20000, generator=generator)
    loss_N = 2 + noise_N * torch.where((t_N < 0.3) | (t_N > 0.85), 3.0, 0.1)
    measured = variances(t_N, loss_N, 1e-3)
    low, high = min(measured, key=measured.get)
    assert 0.3 <= low and high <= 0.85 and measured[(low, high)] == pytest.approx(0.01, rel=0.2)
    assert measured[(1e-3, 1.0)] == pytest.approx(0.45 * 9 + 0.55 * 0.01, rel=0.1)
    assert variances(t_N[:10], loss_N[:10], 1e-3) == {}


@pytest.mark.parametrize("name", ["bd3lm", "llada", "nbdiff"])
def test_the_losses_of_groups_are_those_of_training(name):
    """Their mean, weighted by eligible tokens, is the nelbo that training logs of the same batch."""
    job = job_of(name, Store("isolated"))
    engine = make_engine("llama", alignment=job.method.alignment)
    stream, settings = batch_stream(job, engine.denoiser.spec), loop_settings_of(job, 24)
    search = BandSearch(stream, 4, 5, 1e-3)
    context = context_of(settings, 6)  # blocks have grown
    assert set(search.look(engine, settings, 6)) >= {"band_low", "band_high", "band_variance", "full_variance"}
    batch = stream.batch(0)
    t_N, loss_N = search._groups(engine, settings, context, 0, 0)
    groups_BL = stream.groups(0, batch.positions_BL)
    maskable_BL = batch.eligible_BL if batch.starts_BL is None else batch.eligible_BL & ~batch.starts_BL
    sizes = torch.zeros(8, int(groups_BL.max()) + 1, dtype=torch.int64).scatter_add_(1, groups_BL, maskable_BL.long())
    total = float((loss_N * sizes[sizes > 0]).sum())
    if batch.starts_BL is None:
        expected = batch_loss(engine, batch, context, settings, 1, 1)[1]["nelbo"]
        assert total == pytest.approx(expected, rel=1e-4)
    assert t_N.shape == loss_N.shape and bool((t_N >= 1e-3).all()) and (len(t_N) > 8) == (name != "llada")


def test_an_interrupted_search_goes_on_as_if_nothing_had_been(tmp_path, monkeypatch, tiny_checkpoints):
    write_corpus(tmp_path)
    monkeypatch.chdir(tmp_path)
    words = ["adapt", tiny_checkpoints["llama"], *SMALL, "method.name=bd3lm", "method.corruption.band_search_steps=2", "train.log_steps=1", "train.save_steps=3"]
    works(*words, "run.folder=straight")
    lines = curve(tmp_path / "straight" / "adapt")
    found = [line for line in lines if "band_low" in line]
    assert [line["step"] for line in found] == [2, 4, 6] and all(line["band_variance"] <= line["full_variance"] for line in found)

    import dlmconvert.training.loop as loop

    real = loop.accumulate

    def stops_once(engine, stream, settings, step, balance=None):
        if step == 5:
            raise KeyboardInterrupt
        return real(engine, stream, settings, step, balance)

    monkeypatch.setattr(loop, "accumulate", stops_once)
    assert dlmconvert(*words, "run.folder=cut").code != 0
    monkeypatch.setattr(loop, "accumulate", real)
    works(*words, "run.folder=cut")
    assert curve(tmp_path / "cut" / "adapt") == lines
    told = works("replay", "straight", "6", "--json")
    assert '"step": 6' in told.out
