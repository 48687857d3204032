"""The frozen source beside the model in training: its hidden states and its next-token predictions on the clean text.

Shapes: B rows, L positions, N chosen positions, D width, K layers, V rows of the output matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from dlmconvert.backbone.head import passing, plain_head
from dlmconvert.backbone.load import load_config, load_model
from dlmconvert.backbone.rewrite import call_model, rewrite_config
from dlmconvert.diffusion.attention import CAUSAL


def load_source(folder: Path, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    """The AR model of a folder, rewritten as training rewrites it."""
    config = load_config(folder, trust_remote_code)
    for name in ("dlm", "is_causal"):
        if hasattr(config, name):
            delattr(config, name)
    rewrite_config(config)
    return load_model(folder, config, dtype, trust_remote_code)


class Teacher:
    """load: makes the model when it is first asked. It is no module of the model that learns, so no checkpoint and no optimizer holds
    it; it takes the memory of its weights, without gradients."""

    def __init__(self, load: Callable[[], Any]):
        self._load = load
        self._model: Any = None
        self._head: Any = None

    def _loaded(self, device: torch.device) -> Any:
        if self._model is None:
            self._model = self._load().eval().requires_grad_(False).to(device)
            self._head = plain_head(self._model)
        return self._model

    @torch.no_grad()
    def look(
        self, x_0_BL: torch.Tensor, positions_BL: torch.Tensor, segments_BL: torch.Tensor | None, at_BL: torch.Tensor, layers: bool
    ) -> tuple[list[torch.Tensor], Callable[[slice], torch.Tensor]]:
        """(hidden states (N, D) behind each layer, chunk -> logits_CV float32) at the positions at_BL of the clean text, read from left to right.

        layers: whether hidden states are wanted. The logits of a chunk are made when they are asked for.
        """
        model = self._loaded(x_0_BL.device)
        context = replace(CAUSAL, segments_BL=segments_BL)
        head = self._head

        def call():
            return call_model(model, x_0_BL, positions_BL, context, logits_to_keep=at_BL, output_hidden_states=layers)

        if head is None:
            output = call()
        else:
            with passing(head):
                output = call()
        kept_ND = output.logits.reshape(-1, output.logits.shape[-1])

        def logits(chunk: slice) -> torch.Tensor:
            return (kept_ND[chunk] if head is None else F.linear(kept_ND[chunk].to(head.weight.dtype), head.weight, head.bias)).float()

        return [h_BLD[at_BL] for h_BLD in output.hidden_states[1:]] if layers else [], logits
