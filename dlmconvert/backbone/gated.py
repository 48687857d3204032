"""Low-rank adapters that act on masks only: where no mask is, the model computes the source's numbers, bit for bit.

    y = W x + [input token is a mask] (alpha / r) B A x

A mask's state goes through the adapters, every other state through the source's weights alone. A text without masks never meets them, so the
autoregressive model is still there, unchanged (Uno, Orthrus, I-DLM with adapters: arXiv 2604.11035). The mask token's embedding is a
parameter of its own, so the embedding matrix, and a head that is tied to it, stay as they were.

The model is not changed: forward hooks add what the adapters say, and the hook on the embedding sees which tokens are masks. Adapters cannot be
merged: weights have no gate. An export carries this very file (`exporting/copying.py`), so it imports torch and transformers only; files are
read and written in gated_files.py.

Shapes: B rows, S positions, D features in, E features out, r rank.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn


class GatedAdapters(nn.Module):
    """Parameters `mask_row`, and A and B of each adapted layer. Attached to a model by hooks; not a part of it.

    seed: of A (B starts at 0, so that nothing changes at first); None leaves A at 0, where both will be read from a file. Raises ValueError
    when no layer has a name of target_modules.
    """

    def __init__(self, model: Any, *, rank: int, alpha: float, target_modules: str | list[str], mask_token_id: int, seed: int | None):
        super().__init__()
        self.rank, self.alpha, self.target_modules, self.mask_token_id = rank, alpha, target_modules, mask_token_id
        self._is_mask: torch.Tensor | None = None
        layers = _adapted_layers(model, target_modules)
        if not layers:
            raise ValueError(f"no linear layer is called {target_modules!r}")
        embedding = model.get_input_embeddings()
        self.mask_row = nn.Parameter(embedding.weight.detach()[mask_token_id].clone())
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        for name, layer in layers.items():
            inner, outer = _features(layer)
            key = name.replace(".", "/")
            down = torch.zeros(rank, inner)
            self.down[key] = nn.Parameter(down if seed is None else down.uniform_(-1 / math.sqrt(inner), 1 / math.sqrt(inner), generator=generator))
            self.up[key] = nn.Parameter(torch.zeros(outer, rank))
            layer.register_forward_hook(self._hook(key))
        embedding.register_forward_hook(self._look)

    def describe(self) -> dict[str, Any]:
        """What `attach` needs to build it again; goes into the `dlm` section."""
        return {"rank": self.rank, "alpha": self.alpha, "target_modules": self.target_modules}

    def _look(self, embedding: Any, inputs: Any, embedded_BSD: torch.Tensor) -> torch.Tensor:
        self._is_mask = (inputs[0] == self.mask_token_id)[..., None]
        return torch.where(self._is_mask, self.mask_row.to(embedded_BSD.dtype), embedded_BSD)

    def _hook(self, key: str):
        def add(layer: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
            x = inputs[0]
            gate = self._is_mask if x.ndim == 3 else self._is_mask.reshape(-1, 1)
            down, up = self.down[key].to(x.dtype), self.up[key].to(x.dtype)
            delta = (x @ down.t()) @ up.t() * (self.alpha / self.rank)
            return torch.where(gate, output + delta.to(output.dtype), output)

        return add


def _adapted_layers(model: Any, target_modules: str | list[str]) -> dict[str, Any]:
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not head}
    if target_modules == "all-linear":
        return linears
    wanted = [target_modules] if isinstance(target_modules, str) else target_modules
    return {name: m for name, m in linears.items() if name.rsplit(".", 1)[-1] in wanted}


def _features(layer: Any) -> tuple[int, int]:
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    inner, outer = layer.weight.shape  # GPT-2 keeps its weights transposed
    return inner, outer
