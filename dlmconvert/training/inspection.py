"""One step under a lens: the loss of each row, the gradient of each layer, the first module whose output is not finite."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from dlmconvert.training.engine import SingleDeviceEngine
from dlmconvert.training.loop import Stream, accumulate
from dlmconvert.training.losses import LoopSettings, batch_loss, context_of


@dataclass(frozen=True)
class RowLoss:
    """place: within the global batch. row_id: (source, epoch, row). t: lowest noise level of its masked tokens, 1 where there are none. loss: its share of the step's, under the normaliser
    `eligible`. cross_entropy: mean over its masked tokens."""

    place: int
    row_id: Any
    t: float
    masked: int
    loss: float
    cross_entropy: float


@dataclass
class Inspected:
    """gradient_norms: of each layer, in the order of the model, before clipping. first_nonfinite: name and class of the first module (in
    the order in which they finish) whose output holds a NaN or an infinity. nonfinite_weights, nonfinite_gradients: parameter names."""

    loss: float = 0.0
    learning_rate: float = 0.0
    gradient_norm: float = 0.0
    rows: list[RowLoss] = field(default_factory=list)
    gradient_norms: dict[str, float] = field(default_factory=dict)
    first_nonfinite: str | None = None
    nonfinite_weights: list[str] = field(default_factory=list)
    nonfinite_gradients: list[str] = field(default_factory=list)


def inspect_step(engine: SingleDeviceEngine, stream: Stream, settings: LoopSettings, step: int, balance: float | None = None) -> Inspected:
    """Forward and backward of a step (from 0), rows one by one and then the whole; nothing is updated. The engine is not used after it.
    Collective: each rank looks at its own rows, and all are told everything.

    balance: as for `accumulate`.
    """
    found = Inspected(learning_rate=settings.learning_rate_at(step))
    found.nonfinite_weights = [name for name, p in engine.model.named_parameters() if not is_finite(p)]
    found.rows = [row for rows in engine.ranks.gather(list(row_losses(engine, stream, settings, step))) for row in rows]
    with first_nonfinite_output(engine.model) as seen:
        part = accumulate(engine, stream, settings, step, balance)
    found.first_nonfinite = next((seen[0] for seen in engine.ranks.gather(seen) if seen), None)
    found.loss = engine.ranks.sum({"loss": part.sums["loss"]})["loss"]
    squares: dict[str, float] = {}
    for name, gradient in engine.gradients():
        if gradient is None:
            continue
        square = float(gradient.double().square().sum())
        squares[layer_of(name)] = squares.get(layer_of(name), 0.0) + square
        if not math.isfinite(square):
            found.nonfinite_gradients.append(name)
    found.gradient_norms = {layer: math.sqrt(square) for layer, square in squares.items()}
    found.gradient_norm = math.sqrt(sum(squares.values()))
    return found


def row_losses(engine: SingleDeviceEngine, stream: Stream, settings: LoopSettings, step: int) -> Iterator[RowLoss]:
    """Each of this rank's rows of the global batch by itself, without gradients."""
    settings = replace(settings, normaliser="eligible")
    context, num_eligible = context_of(settings, step), stream.num_eligible(step)
    share = settings.rows_per_step // engine.ranks.count
    for place in range(engine.ranks.rank * share, (engine.ranks.rank + 1) * share):
        torch.manual_seed(settings.seed * 1_000_003 + step)
        batch = stream.batch(step, place, place + 1)
        with torch.no_grad():
            _, sums = batch_loss(engine, batch, context, settings, num_eligible, 1)
        masked = int(sums["masked"])
        t = float(batch.t_BL[batch.masked_BL].min()) if masked else 1.0
        yield RowLoss(place, batch.row_ids[0], t, masked, sums["loss"], sums["ce_sum"] / max(1, masked))


@contextmanager
def first_nonfinite_output(model: torch.nn.Module) -> Iterator[list[str]]:
    """Inside, the list receives the name of the first module that puts out something that is not finite."""
    seen: list[str] = []

    def hook(name: str):
        def look(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            if not seen and any(not is_finite(t) for t in tensors_in(output)):
                seen.append(f"{name or 'the model'} ({type(module).__name__})")

        return look

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """All tensors of an output, whatever it is made of."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)


def is_finite(tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor.detach()).all())


def layer_of(name: str) -> str:
    """model.layers.3.mlp.up_proj.weight -> model.layers.3; what is in no numbered layer keeps its module's name."""
    numbered = re.match(r"(.*?\.\d+)\.", name)
    return numbered[1] if numbered else name.rpartition(".")[0] or name
