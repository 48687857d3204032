"""A stream of noised batches from rows in memory, and a training run around it: what data/loader.py gives the loop, without files."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from tiny_models import VOCAB, denoiser, rewritten

from dlmconvert.diffusion.alignment import predictable
from dlmconvert.diffusion.corruption import draw_masks
from dlmconvert.diffusion.randomness import MASK, counter_uniform
from dlmconvert.diffusion.schedules import noise_levels
from dlmconvert.training.checkpoint import CheckpointFolder
from dlmconvert.training.engine import SingleDeviceEngine
from dlmconvert.training.loop import train
from dlmconvert.training.losses import LoopSettings
from dlmconvert.training.metrics import CLOCK, Metrics, read_metrics

ROWS, LENGTH = 8, 24
SETTINGS = LoopSettings(
    steps=6, rows_per_step=ROWS, micro_batch=4, learning_rate=3e-3, final_learning_rate=0.0, warmup_steps=2, schedule="cosine",
    decay_fraction=0.1, seed=0, causal=False, anneal_steps=4, weight="elbo", normaliser="eligible", save_steps=2, save_minutes=None,
    validate_steps=None,
)  # fmt: skip


class MemoryStream:
    """segments: None, or (ROWS, LENGTH) document numbers of every row."""

    def __init__(self, causal=False, alignment="shift", segments=None):
        self.causal, self.alignment, self.segments = causal, alignment, segments
        # Text with structure, so that there is something to learn.
        generator = torch.Generator().manual_seed(11)
        start = torch.randint(3, 100, (64, 1), generator=generator)
        self.rows = (start + torch.arange(LENGTH) * torch.randint(1, 4, (64, 1), generator=generator)) % (VOCAB - 8) + 3

    def batch(self, step, start, stop):
        ids_B = (torch.arange(start, stop) + step * ROWS) % 64
        x_0_BL = self.rows[ids_B]
        segments_BL = torch.zeros_like(x_0_BL) if self.segments is None else self.segments[start:stop]
        eligible_BL = predictable(segments_BL, self.alignment)
        if self.causal:
            t_BL, x_t_BL, masked_BL = torch.ones(x_0_BL.shape), x_0_BL, eligible_BL
        else:
            t_B = noise_levels(0, step, ROWS, 1e-3, "uniform")[start:stop]
            u_BL = counter_uniform(MASK, 0, step, ids_B[:, None], torch.arange(LENGTH))
            masked_BL, t_BL = draw_masks(eligible_BL, t_B[:, None], u_BL, "bernoulli")
            x_t_BL = x_0_BL.masked_fill(masked_BL, VOCAB - 1)
        return SimpleNamespace(
            step=step, eligible_BL=eligible_BL, x_edit_BL=None, x_0_BL=x_0_BL, x_t_BL=x_t_BL, masked_BL=masked_BL, t_BL=t_BL.float(), starts_BL=None, positions_BL=torch.arange(LENGTH).expand_as(x_0_BL),
            segments_BL=None if self.segments is None else segments_BL, row_ids=ids_B.tolist(),
        )  # fmt: skip

    def num_eligible(self, step):
        if self.segments is not None:
            return int(predictable(self.segments, self.alignment).sum())
        return ROWS * (LENGTH - (self.alignment == "shift"))

    def num_masked(self, step):
        return int(MemoryStream.batch(self, step, 0, ROWS).masked_BL.sum())


def make_engine(family="gpt2", model=None, alignment="shift", attention="bidirectional", **changes):
    values = {"precision": "fp32", "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "clip_norm": 1.0} | changes
    wrapped = denoiser(rewritten(family) if model is None else model, alignment, attention)
    return SingleDeviceEngine(wrapped, device=torch.device("cpu"), **values)


class Stop:
    """Asks the run to leave after the batch of a step has been fetched."""

    def __init__(self, stream=None, at=None):
        self.requested = None
        if at is not None:
            fetch = stream.batch

            def batch(step, start, stop):
                if step == at:
                    self.requested = "SIGTERM"
                return fetch(step, start, stop)

            stream.batch = batch


def run(folder, settings=SETTINGS, engine=None, stream=None, stop=None, identity="same", warn=None, validate=dict, log_steps=1):
    engine = make_engine() if engine is None else engine
    stream = MemoryStream() if stream is None else stream
    folder.mkdir(parents=True, exist_ok=True)
    checkpoints = CheckpointFolder(folder / "checkpoints", 2, (lambda line: None) if warn is None else warn)
    metrics = Metrics(folder / "metrics.jsonl", log_steps)
    train(engine, stream, settings, checkpoints, metrics, validate, stop or Stop(), identity)
    return engine, lines(folder)


def lines(folder):
    """The metrics without what the clock and the machine put there."""
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in read_metrics(folder / "metrics.jsonl")]


def weights(engine):
    return {name: tensor.clone() for name, tensor in engine.tensors().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
