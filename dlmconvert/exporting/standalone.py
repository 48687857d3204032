"""What an exported model can do, as mixins over the source family's own classes.

This file, and the files of `sampling/` and `diffusion/` that it imports, are copied into every export with code
(`copying.py` flattens the imports), so what users run with `trust_remote_code=True` is what is tested here. torch and transformers only.

Shapes: B rows, L positions, N wanted tokens in row-major order, V rows of the output matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from dlmconvert.backbone.gated import GatedAdapters
from dlmconvert.backbone.key_values import KeyValueStore, forward_columns, new_store, realised_mask, takes_stretches
from dlmconvert.diffusion.alignment import predicting_positions
from dlmconvert.diffusion.attention import BIDIRECTIONAL, AttentionContext, realise
from dlmconvert.diffusion.block_attention import BLOCK_PATTERNS, clean_seen
from dlmconvert.sampling.api import DiffusionOutput, diffusion_generate, infill
from dlmconvert.sampling.options import configured
from dlmconvert.sampling.text import encode_row, parse_gaps


class BidirectionalMixin:
    """Attention as it was trained: both sides in the config (masks are made from it) and in every attention module (kernels read
    it); of a block model, the mask of clean text."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any):
        config.is_causal = False
        config.use_cache = False
        super().__init__(config, *args, **kwargs)
        self._opened = [module for module in self.modules() if getattr(module, "is_causal", None) is True]
        self._is_source = False  # see DiffusionMixin.as_source
        for module in self._opened:
            module.is_causal = False

    def forward(self, input_ids: torch.Tensor | None = None, attention_mask: torch.Tensor | None = None, **kwargs: Any):
        """As the source family's. For a block model that is given no mask of its own (none, or one of padding), every token sees
        what it sees as clean text."""
        section = self.config.dlm
        # The sampler's forwards say the direction, and with or without a mask what is seen.
        is_told = "is_causal" in kwargs or (attention_mask is not None and attention_mask.ndim != 2)
        is_block = section.get("attention") in BLOCK_PATTERNS and not self._is_source
        continues = kwargs.get("cache", kwargs.get("past_key_values")) is not None  # transformers 5.24 renamed it
        if is_block and input_ids is not None and not is_told and not continues:
            real_BL = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
            if kwargs.get("position_ids") is None:
                kwargs["position_ids"] = (real_BL.cumsum(1) - 1).clamp(min=0)
            seen_BLL = clean_seen(kwargs["position_ids"].expand_as(input_ids), real_BL, section["attention"], section["block_length"])
            attention_mask = realised_mask(self, seen_BLL)
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)


class DiffusionMixin(BidirectionalMixin):
    """A causal-LM class as a masked diffusion language model. Alignment and mask come from `config.dlm`.

    `model(input_ids).logits` is the plain forward (bidirectional; of a block model, over clean text): row i is hidden state i,
    whatever the alignment. `predict` speaks of tokens: it returns the prediction of token i.

    Where adapters act on masks only (`config.dlm["gated_adapter"]`), they are the part `gated` of this model, all other weights are those of the
    autoregressive source, and `as_source` and `generate` are that source, to the last bit.
    """

    def __init__(self, config: Any, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        described = config.dlm.get("gated_adapter")
        if described is not None:
            self.gated = GatedAdapters(self, **described, mask_token_id=config.dlm["mask_token_id"], seed=None)

    @contextmanager
    def as_source(self) -> Iterator[None]:
        """Inside, `model(input_ids)` is the autoregressive source: causal attention, its own logits. Only where the weights are still the
        source's; raises NotImplementedError elsewhere."""
        if self.config.dlm.get("gated_adapter") is None:
            raise NotImplementedError("this is a diffusion language model: call model.diffusion_generate(...) or model.infill(...), not generate()")
        self._is_source = self.config.is_causal = True
        for module in self._opened:
            module.is_causal = True
        try:
            yield
        finally:
            self._is_source = self.config.is_causal = False
            for module in self._opened:
                module.is_causal = False

    @torch.no_grad()
    def predict(
        self,
        tokens_BL: torch.Tensor,
        wanted_BL: torch.Tensor | None = None,
        positions_BL: torch.Tensor | None = None,
        segments_BL: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """logits_NV: the prediction of each wanted token (default: of each mask token), row-major.

        segments_BL: document number of each position, padding being a document of its own; None when all positions of a row
        belong together. Under `shift` nothing predicts the first token of a row: it must not be wanted.
        """
        section = self.config.dlm
        if section.get("attention") in BLOCK_PATTERNS:
            raise NotImplementedError(
                f"a block model ({section['attention']}, blocks of {section['block_length']}) predicts one block after clean text: call"
                " diffusion_generate or infill; model(input_ids) is its forward over clean text"
            )
        if wanted_BL is None:
            wanted_BL = tokens_BL == section["mask_token_id"]
        if positions_BL is None:
            positions_BL = torch.arange(tokens_BL.shape[1], device=tokens_BL.device).expand_as(tokens_BL)
        if section["alignment"] == "shift" and bool(wanted_BL[:, 0].any()):
            raise ValueError("this model predicts token i from position i-1: the first token of a row cannot be predicted; begin with a token")
        context = BIDIRECTIONAL if segments_BL is None else AttentionContext(open_ratio=1.0, segments_BL=segments_BL)
        kernel = getattr(self.config, "_attn_implementation", None) or "eager"
        if segments_BL is not None and kernel.startswith("flash"):
            raise ValueError(f"{kernel} takes no mask for padded rows: give rows of one length, or load with attn_implementation='sdpa'")
        realised = realise(context, tokens_BL.shape[1], kernel, self.dtype, tokens_BL.device)
        return self(
            input_ids=tokens_BL,
            position_ids=positions_BL,
            attention_mask=realised.mask,
            is_causal=realised.is_causal,
            use_cache=False,
            logits_to_keep=predicting_positions(wanted_BL, section["alignment"]),
        ).logits

    def diffusion_generate(
        self,
        inputs: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        generation_config: Any = None,
        streamer: Any = None,
        stopping_criteria: Any = None,
        **kwargs: Any,
    ):
        """Continue each prompt by denoising. Keywords of Dream's sampler: max_new_tokens, steps, temperature, top_p, top_k,
        alg (origin, maskgit_plus, topk_margin, entropy, left_to_right, first_hitting), alg_temp, seed, output_history,
        return_dict_in_generate and the two hooks. How many tokens a step commits: steps, or threshold=, factor=, entropy_bound=
        (at most one; they look at how sure the model is) or budget=. And block_length=, cache= (none, prefix, dual; block for block
        models), revision=, initial_length=, draft_length=, repetition_penalty=, cfg_scale=.
        `Options` in options.py explains them all; what is left out comes from generation_config.json. After the first end token there
        is padding, and a row that has reached it costs no more forwards (eos_token_id=None: everything is filled and stays).

        As in transformers' generate: generation_config, a GenerationConfig whose settings stand between the call's and those of
        generation_config.json; streamer, for one prompt, fed as the text settles from the left; stopping_criteria, a list.
        inputs: token ids (B, L); `input_ids=` is accepted as well, so `diffusion_generate(**tokenizer(...))` works.
        """
        input_ids = kwargs.pop("input_ids", None)
        kwargs.pop("token_type_ids", None)
        if inputs is not None and input_ids is not None:
            raise ValueError("`inputs` and `input_ids` are two names of one thing: give one of them")
        inputs = input_ids if inputs is None else inputs
        if inputs is None:
            raise ValueError("diffusion_generate needs `inputs`: token ids of shape (rows, length)")
        options = configured("diffusion_generate", kwargs, generation_config, self.generation_config)
        return diffusion_generate(_Predictor(self), inputs, attention_mask, streamer=streamer, stopping_criteria=stopping_criteria, **options)

    def infill(self, rows: Any, tokenizer: Any = None, generation_config: Any = None, streamer: Any = None, **kwargs: Any):
        """Fill gaps, seeing both sides.

        rows: token rows, lists of ids with None where a token is wanted; or a text or a list of texts with gaps such as
        `[[MASK:24]]` (24 tokens), which needs `tokenizer` and returns text. Keywords as in `diffusion_generate`; end tokens
        are not put into gaps (eos_token_id=None: they may). streamer: for one row or text; it is fed what stands left of the first
        gap, and then the rest as far as it has no hole.
        """
        texts = [rows] if isinstance(rows, str) else list(rows)
        as_text = bool(texts) and isinstance(texts[0], str)
        if as_text and tokenizer is None:
            raise ValueError("infilling a text needs the tokenizer: model.infill(text, tokenizer=tokenizer)")
        encoded = [encode_row(tokenizer, parse_gaps(text)) for text in texts] if as_text else [(row, 0) for row in texts]
        options = configured("infill", kwargs, generation_config, self.generation_config)
        options.pop("max_new_tokens", None)
        filled = infill(_Predictor(self), [row for row, _ in encoded], streamer=streamer, **options)
        if not as_text:
            return filled
        output = filled if isinstance(filled, DiffusionOutput) else None
        sequences = output.sequences if output else filled
        answers = [
            tokenizer.decode(ids[num_start:], skip_special_tokens=True) for ids, (_, num_start) in zip(sequences, encoded, strict=True)
        ]
        answer = answers[0] if isinstance(rows, str) else answers
        return replace(output, sequences=answer) if output else answer

    def generate(self, *args: Any, **kwargs: Any):
        """transformers' generate with the autoregressive source, where its weights are still there (`as_source`); elsewhere it refuses:
        token-by-token decoding from the left is not what this model was trained for. The temperature of generation_config.json is the
        denoiser's: here it is greedy unless the call says otherwise."""
        from transformers import GenerationConfig

        with self.as_source():
            if len(args) < 2 and kwargs.get("generation_config") is None:
                # What is left open here would come from generation_config.json.
                own = {name: getattr(self.generation_config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
                kwargs["generation_config"] = GenerationConfig(do_sample=False, temperature=1.0, top_p=1.0, use_cache=True, **own)
            return super().generate(*args, **kwargs)

    @property
    def loss_function(self):
        raise NotImplementedError(
            "labels= would compute the autoregressive loss, which a bidirectional model satisfies by copying; "
            "train with dlmconvert, or compute a denoising loss from model.predict"
        )

    @loss_function.setter
    def loss_function(self, value):
        self._loss_function = value


class _Predictor:
    """The model as the sampler sees it."""

    def __init__(self, model: Any):
        section = model.config.dlm
        self.model = model
        self.predict = model.predict
        self.mask_token_id = section["mask_token_id"]
        self.vocab_size = section["vocab_size"]
        self.alignment = section["alignment"]
        self.attention = section.get("attention", "bidirectional")
        self.block_length = section.get("block_length")
        self.corruption = section.get("corruption", "masking")
        self.longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.device = model.device

    def new_store(self, num_rows: int, num_columns: int) -> KeyValueStore:
        return new_store(self.model, num_rows, num_columns)

    def forward_columns(self, *args: Any) -> torch.Tensor:
        return forward_columns(self.model, *args)

    @property
    def takes_stretches(self) -> bool:
        return takes_stretches(self.model)
