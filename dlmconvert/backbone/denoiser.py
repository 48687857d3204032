"""A Hugging Face AR model as a denoiser: it predicts chosen tokens from everything that the attention pattern shows.

Alignment lives here: callers ask for the prediction of token i and never see from which hidden state it was read.

Shapes: B rows, L positions, N chosen tokens in row-major order, V rows of the output matrix.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dlmconvert.backbone.activations import fuse_activations
from dlmconvert.backbone.extras import Extras
from dlmconvert.backbone.head import plain_head, scoring
from dlmconvert.backbone.key_values import KeyValueStore, forward_columns, new_store, takes_stretches
from dlmconvert.backbone.rewrite import call_model
from dlmconvert.backbone.spec import DlmSpec
from dlmconvert.diffusion.alignment import predicting_positions
from dlmconvert.diffusion.attention import AttentionContext
from dlmconvert.diffusion.block_attention import BLOCK_PATTERNS, with_clean_context
from dlmconvert.diffusion.objective import cross_entropy
from dlmconvert.diffusion.streams import reading_positions, two_streams
from dlmconvert.errors import UserError


class Denoiser(nn.Module):
    """model: any AutoModelForCausalLM of transformers 5.22 or newer, unmodified (or wrapped by peft).

    Satisfies the sampler's `Predictor`: `predict`, `mask_token_id`, `vocab_size`, `alignment`.
    """

    def __init__(self, model: nn.Module, spec: DlmSpec, tokenizer: Any = None, teacher: Any = None, adapters: nn.Module | None = None):
        """teacher: the frozen source that training compares with (backbone/teacher.py), no part of this module's parameters. adapters:
        those that act on masks only, attached to the model already (backbone/gated.py)."""
        super().__init__()
        self.model = model
        fuse_activations(model)
        self.spec = spec
        self.tokenizer = tokenizer
        self.adapters = adapters
        self._teacher = (teacher,)
        self._head: tuple[nn.Linear | None] | None = None  # found at the first loss; a tuple, so that it is no second child module

    def forward(
        self,
        tokens_BL: torch.Tensor,
        targets_BL: torch.Tensor,
        positions_BL: torch.Tensor,
        context: AttentionContext,
        weights_N: torch.Tensor | None = None,
        x_0_N: torch.Tensor | None = None,
        clean_BL: torch.Tensor | None = None,
        clean_targets_BL: torch.Tensor | None = None,
        extras: Extras | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """logits_NV: the prediction of token i for each True in targets_BL, row-major; with weights_N and x_0_N instead
        (sum_i w_i CE_i, CE_N), float32, nats (see `diffusion.fused_head`; CE_N has no gradient), or what `extras` makes of them.

        The output matrix is applied to the chosen hidden states only (transformers' boolean `logits_to_keep`): at a
        vocabulary of 128k the full logits would be most of the memory. Under `shift` targets_BL must be False at position 0.

        Under a two-stream pattern the model runs [tokens_BL | clean_BL]; clean_targets_BL: tokens that the clean copy predicts, from the
        state before. Results and x_0_N, weights_N are then in the row-major order of [targets_BL | clean_targets_BL].
        """
        if context.has_two_streams:
            assert clean_BL is not None and clean_targets_BL is not None
            keep_BL = reading_positions(targets_BL, clean_targets_BL, self.spec.alignment)
            tokens_BL, positions_BL = two_streams(tokens_BL, clean_BL, positions_BL)
        else:
            keep_BL = predicting_positions(targets_BL, self.spec.alignment)
        if weights_N is None:
            return call_model(self.model, tokens_BL, positions_BL, context, logits_to_keep=keep_BL).logits
        assert x_0_N is not None
        (head,) = self._found_head()
        extras = Extras() if extras is None else extras
        with extras.around(self.model) as more:
            if head is None:
                output = call_model(self.model, tokens_BL, positions_BL, context, logits_to_keep=keep_BL, **more)
                logits_NV = output.logits.reshape(-1, output.logits.shape[-1])
                if extras.score is None:
                    values = cross_entropy(logits_NV, x_0_N)
                    loss = (weights_N * values).sum()
                else:
                    loss, values = extras.score(logits_NV.float(), slice(0, logits_NV.shape[0]))
            else:
                with scoring(head, x_0_N, weights_N, extras.score) as found:
                    output = call_model(self.model, tokens_BL, positions_BL, context, logits_to_keep=keep_BL, **more)
                loss, values = output.logits.reshape(()), found[0]
        return loss + extras.added(self.model, output), values.detach()

    def _found_head(self) -> tuple[nn.Linear | None]:
        if self._head is None:
            self._head = (plain_head(self.model),)
        return self._head

    @property
    def teacher(self) -> Any:
        return self._teacher[0]

    @torch.no_grad()
    def predict(
        self,
        tokens_BL: torch.Tensor,
        wanted_BL: torch.Tensor,
        positions_BL: torch.Tensor | None = None,
        segments_BL: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """logits_NV under the pattern that the model was trained for; what samplers and estimators call.

        Raises UserError for a block model: it predicts the tokens of one block, and this function is not told which text is clean.
        """
        if self.spec.attention in BLOCK_PATTERNS:
            raise UserError(
                f"a block model ({self.spec.attention}, blocks of {self.spec.block_length}) predicts one block behind clean text, not a whole row at once",
                "",
                "sample with dlmconvert sample (diffusion_generate, infill), or score rows with predict_blocks",
            )
        if positions_BL is None:
            positions_BL = torch.arange(tokens_BL.shape[1], device=tokens_BL.device).expand_as(tokens_BL)
        context = AttentionContext(open_ratio=0.0 if self.spec.attention == "causal" else 1.0, segments_BL=segments_BL)
        return self(tokens_BL, wanted_BL, positions_BL, context)

    @torch.no_grad()
    def predict_blocks(
        self,
        x_t_BL: torch.Tensor,
        x_0_BL: torch.Tensor,
        targets_BL: torch.Tensor,
        clean_targets_BL: torch.Tensor,
        positions_BL: torch.Tensor,
        segments_BL: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """logits_NV of a block model, all blocks at once, in the row-major order of [targets_BL | clean_targets_BL]; for estimators."""
        return self(x_t_BL, targets_BL, positions_BL, self.block_context(positions_BL, segments_BL), clean_BL=x_0_BL, clean_targets_BL=clean_targets_BL)

    def block_context(self, positions_BL: torch.Tensor, segments_BL: torch.Tensor | None = None) -> AttentionContext:
        """The two-stream pattern that shows each block what decoding shows it; blocks restart wherever positions do."""
        pattern = with_clean_context(self.spec.attention)
        context = AttentionContext(pattern=pattern, block_length=self.spec.block_length, length=positions_BL.shape[1])
        return context.in_documents(segments_BL, positions_BL)

    @property
    def mask_token_id(self) -> int:
        return self.spec.mask_token_id

    @property
    def vocab_size(self) -> int:
        return self.spec.vocab_size

    @property
    def alignment(self) -> str:
        return self.spec.alignment

    @property
    def attention(self) -> str:
        return self.spec.attention

    @property
    def block_length(self) -> int | None:
        return self.spec.block_length

    @property
    def longest(self) -> int | None:
        """The most tokens of a row that the model has positions for; None where its config names no number."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    @property
    def corruption(self) -> str:
        return self.spec.corruption

    def new_store(self, num_rows: int, num_columns: int) -> KeyValueStore:
        """Room for the keys and values of a canvas; what samplers with a cache call, together with `forward_columns`."""
        return new_store(self.model, num_rows, num_columns)

    def forward_columns(self, *args: Any) -> torch.Tensor:
        """See sampling/cache.py, `WindowPredictor`: hidden states are not aligned here, their columns are the sampler's to choose."""
        return forward_columns(self.model, *args)

    @property
    def takes_stretches(self) -> bool:
        """May `forward_columns` be told stretches of queries instead of a mask? See sampling/windows.py, `WindowPredictor`."""
        return takes_stretches(self.model)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device
