"""AdamW with decoupled decay, and learning rates as pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from dlmconvert.errors import UserError


def learning_rate(
    step: int, *, steps: int, peak: float, final: float, warmup_steps: int, schedule: str, decay_fraction: float
) -> float:
    """The learning rate of optimizer step `step` (from 0) of `steps`.

    Linear warm-up to `peak`, then `cosine` to `final`, `constant`, or `wsd`: constant and then linear to `final` over the last
    `decay_fraction` of all steps.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    if schedule == "wsd":
        decay_steps = max(1, round(decay_fraction * steps))
        left = steps - step
        return peak if left > decay_steps else final + (peak - final) * left / decay_steps
    assert schedule == "cosine", schedule
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * progress))


def parameter_kinds(model: nn.Module) -> dict[str, str]:
    """`embeddings` (also of positions, and the trained row of a mask token), `head` (an untied output matrix), `norm`, `attention`
    or `mlp` (all other parts of a layer, routers and experts among them), for each parameter by name. model: a causal LM, wrapped or not."""
    language_model = model if hasattr(model, "get_output_embeddings") else model.model
    head = language_model.get_output_embeddings()
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    heads = {id(p) for p in head.parameters()} if head is not None else set()
    norms = {id(p) for m in model.modules() if "norm" in type(m).__name__.lower() for p in m.parameters(recurse=False)}

    def kind(name: str, parameter: nn.Parameter) -> str:
        # peft keeps the trained embedding rows (the mask token's) outside of the embedding, whole.
        if id(parameter) in embeddings or "trainable_tokens" in name or name.endswith("mask_row"):
            return "embeddings"
        if id(parameter) in heads or id(parameter) in norms:
            return "head" if id(parameter) in heads else "norm"
        return "attention" if any("attn" in word or "attention" in word for word in name.split(".")) else "mlp"

    return {name: kind(name, parameter) for name, parameter in model.named_parameters()}


def freeze(model: nn.Module, rates: dict[str, float]) -> None:
    """Stop the gradients of the kinds whose rate is 0. Raises UserError for a tied output matrix that is told apart."""
    kinds = parameter_kinds(model)
    if "head" not in kinds.values() and rates.get("head", 1.0) != rates.get("embeddings", 1.0):
        raise UserError(
            f"rates.head={rates.get('head', 1.0):g} and rates.embeddings={rates.get('embeddings', 1.0):g}",
            "the output matrix of this model is its embedding matrix: it has one learning rate",
            "give both the same value",
        )
    for name, parameter in model.named_parameters():
        if rates.get(kinds[name], 1.0) == 0:
            parameter.requires_grad_(False)


def make_adamw(
    model: nn.Module, *, betas: tuple[float, float], eps: float, weight_decay: float, rates: dict[str, float] | None = None
) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101) over the trainable parameters; biases, norms and embeddings do not decay.

    A decayed mask row would shrink to 0, where gradients explode at high noise (arXiv 2512.15745).
    rates: learning rate of a kind of `parameter_kinds`, as a multiple of the common one (`set_learning_rate`); 1 where left out.
    """
    rates = rates or {}
    kinds = parameter_kinds(model)
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            num_dimensions = len(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO-3 leaves an empty tensor in its place
            decays = num_dimensions >= 2 and kinds[name] != "embeddings"
            groups.setdefault((decays, rates.get(kinds[name], 1.0)), []).append(parameter)
    # Matrices first, as ever: the fused kernel goes through the groups in order.
    ordered = sorted(groups.items(), key=lambda item: not item[0][0])
    # The fused kernel exists for these devices; it is the same arithmetic in one pass over memory.
    fused = next(model.parameters()).device.type in ("cpu", "cuda")
    return torch.optim.AdamW(
        [{"params": found, "weight_decay": weight_decay if decays else 0.0, "rate": rate} for (decays, rate), found in ordered],
        lr=0.0, betas=betas, eps=eps, fused=fused,
    )  # fmt: skip


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The common learning rate of the next update, times each group's own multiple."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("rate", 1.0)


def clip(parameters: Iterable[nn.Parameter], max_norm: float | None) -> torch.Tensor:
    """Scale the gradients so that their norm is at most `max_norm` (None: as they are). Returns the norm before."""
    parameters = [p for p in parameters if p.grad is not None]
    norm = gradient_norm(p.grad for p in parameters)
    if max_norm is not None and parameters:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def gradient_norm(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """The 2-norm of all elements of all tensors, a float32 scalar; not finite when one of them is not.

    Rows of 4096 first, then the rows: on a CPU torch sums the squares of a whole tensor in a few float32 numbers, which is off by 0.3
    percent for 40 million elements (this: by 1e-7), and a float64 copy of them all takes many times as long.
    """
    flats = [_row_norms(piece) for tensor in tensors for piece in _float_pieces(tensor.detach())]
    return torch.linalg.vector_norm(_row_norms(torch.stack(torch._foreach_norm(flats)))) if flats else torch.zeros(())


def _float_pieces(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    flat = tensor.reshape(-1)
    if flat.dtype == torch.float32:
        yield flat
        return
    for piece in flat.split(1 << 22):  # no float32 copy of a whole matrix
        yield piece.float()


def _row_norms(flat: torch.Tensor) -> torch.Tensor:
    """Numbers with the same norm, few of them: one a row of 4096, and what is left over."""
    rows = flat.numel() // 4096
    if rows < 2:
        return flat
    cut = rows * 4096
    return torch.cat([torch.linalg.vector_norm(flat[:cut].view(rows, 4096), dim=1), flat[cut:]])
