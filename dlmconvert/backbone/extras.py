"""What a training forward is asked for besides the cross-entropy: hidden states near the source's, balanced experts, noise on mask embeddings.

All of it through hooks that live for one call: the unmodified model is left as it was.

Shapes: B rows, S positions of what the model runs, D width, N chosen positions, K layers, E experts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from dlmconvert.diffusion.fused_head import Score


@dataclass
class Extras:
    """score: the loss of the chosen tokens in place of the weighted cross-entropy (`diffusion.fused_head.linear_scored`).

    aligned_KND: hidden states of the frozen source behind each layer, at the positions `aligned_at_BS`; alignment_weight: of the sum over
    positions, divided by alignment_normaliser, of the mean of 1 - cos over the layers.
    balance_weight: of the router balance loss; real_BS: positions that are no padding (None: all are).
    noise: width -> noise_ND, added to the embeddings at `noised_BS`.
    found: what the forward has measured, by name, as tensors of no dimension without gradient.
    """

    score: Score | None = None
    aligned_KND: list[torch.Tensor] | None = None
    aligned_at_BS: torch.Tensor | None = None
    alignment_weight: float = 0.0
    alignment_normaliser: float = 1.0
    balance_weight: float = 0.0
    real_BS: torch.Tensor | None = None
    noise: Callable[[int], torch.Tensor] | None = None
    noised_BS: torch.Tensor | None = None
    found: dict[str, torch.Tensor] = field(default_factory=dict)

    @contextmanager
    def around(self, model: Any) -> Iterator[dict[str, Any]]:
        """Hooks for one call of the model; what is yielded are more arguments of the call."""
        with ExitStack() as stack:
            if self.noise is not None:
                stack.enter_context(_added_to_embeddings(model, self.noise, self.noised_BS))
            self._routed = stack.enter_context(_router_logits(model)) if self.balance_weight else []
            yield {"output_hidden_states": True} if self.aligned_KND is not None else {}

    def added(self, model: Any, output: Any) -> torch.Tensor:
        """The terms that are added to the loss, after the call."""
        total = torch.zeros((), device=output.logits.device)
        if self.aligned_KND is not None:
            distance = misalignment(output.hidden_states[1:], self.aligned_KND, self.aligned_at_BS) / self.alignment_normaliser
            self.found["alignment"] = distance.detach()
            total = total + self.alignment_weight * distance
        if self.balance_weight:
            balance = router_balance(model, self._routed, self.real_BS)
            self.found["router_balance"] = balance.detach()
            total = total + self.balance_weight * balance
        return total


def misalignment(hidden_KBSD: Any, aligned_KND: list[torch.Tensor], at_BS: torch.Tensor) -> torch.Tensor:
    """sum over positions of mean over layers of 1 - cos(h, h_source) (REPR-ALIGN, arXiv 2605.06885), float32."""
    layers = [1 - F.cosine_similarity(h_BSD[at_BS].float(), other_ND.float(), dim=-1) for h_BSD, other_ND in zip(hidden_KBSD, aligned_KND, strict=True)]
    return torch.stack(layers).mean(0).sum()


@contextmanager
def _added_to_embeddings(model: Any, noise: Callable[[int], torch.Tensor], noised_BS: torch.Tensor) -> Iterator[None]:
    def add(module: Any, inputs: Any, embedded_BSD: torch.Tensor) -> torch.Tensor:
        noise_ND = noise(embedded_BSD.shape[-1]).to(embedded_BSD.dtype)
        noise_BSD = torch.zeros_like(embedded_BSD).masked_scatter(noised_BS[..., None], noise_ND)
        return embedded_BSD + noise_BSD

    handle = model.get_input_embeddings().register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


# Experts


def balance_coefficient(model: Any) -> float:
    """What the source was trained with: config.router_aux_loss_coef of a family whose balance loss is known; 0 elsewhere."""
    config = model.config.get_text_config()
    return float(getattr(config, "router_aux_loss_coef", 0.0) or 0.0) if _balance_function(model) is not None else 0.0


def _balance_function(model: Any):
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return getattr(sys.modules[type(base).__module__], "load_balancing_loss_func", None)


def _router_kinds(model: Any) -> list[tuple[type, int]]:
    """(class of the router, place of its logits in what it returns), as the family itself records them."""
    for module in model.modules():
        recorded = getattr(module, "_can_record_outputs", None) or {}
        if "router_logits" in recorded:
            found = recorded["router_logits"]
            return [(item.target_class, item.index) for item in (found if isinstance(found, list) else [found])]
    return []


@contextmanager
def _router_logits(model: Any) -> Iterator[list[torch.Tensor]]:
    """Inside, the list receives the logits of each router, layer after layer."""
    seen: list[torch.Tensor] = []
    handles = []
    for kind, index in _router_kinds(model):
        def look(module: Any, inputs: Any, output: Any, index: int = index) -> None:
            seen.append(output[index] if isinstance(output, tuple) else output)

        handles += [module.register_forward_hook(look) for module in model.modules() if isinstance(module, kind)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def router_balance(model: Any, routed: list[torch.Tensor], real_BS: torch.Tensor | None) -> torch.Tensor:
    """The family's own balance loss (Switch Transformers, arXiv 2101.03961): E sum_e (share of tokens) (mean probability), padding left out.

    transformers computes it inside the model from a 2-D padding mask only; patterns here are 4-D, so it is called from outside.
    """
    config = model.config.get_text_config()
    num_experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    assert routed, "a family with a balance loss and without routers"
    balance = _balance_function(model)(tuple(r.reshape(-1, r.shape[-1]) for r in routed), num_experts, config.num_experts_per_tok, real_BS)
    return balance
