"""Keys and values of an unmodified transformers model, kept by column, so that a forward may recompute any columns and read all.

transformers' own layers only append (`DynamicLayer`) or wrap around. Decoding by diffusion overwrites: the block that is being
denoised is computed again and again at the same columns, over stored ones. So these layers hold one slot a column of the canvas;
a forward writes the slots of its own columns and attends to the slots from the first up to `num_keys`. Which of them a query may
see, the caller's mask says. A slot holds what was written last: whoever reads it must know that it is what he wants.

`export` copies this file beside a model: torch and transformers only.

Shapes: B rows of a forward, R rows of the store, Q columns of a forward, L slots, H heads of keys, D their width, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward

Stretches = tuple[tuple[int, int], ...]


class KeyValueStore(Cache):
    """Slots for `num_rows` rows of `num_columns` columns, in every layer of a model, allocated at the first forward.

    `place` says where the next forward writes and how far it reads. There is one more slot than columns: padding of a forward
    (queries that stand for nothing) writes there, and nothing reads it.
    """

    def __init__(self, num_layers: int, num_rows: int, num_columns: int):
        self.num_columns = num_columns
        self.where = _Where()
        super().__init__(layers=[_SlotLayer(self.where, num_rows, num_columns + 1) for _ in range(num_layers)])

    def place(self, columns_BQ: torch.Tensor, num_keys: int, rows_B: torch.Tensor | None) -> None:
        """columns_BQ: the slot of each query, `num_columns` for padding; one row of it stands for all rows. rows_B: which rows of
        the store these are; None: all of them, in order."""
        self.where.columns_BQ, self.where.num_keys, self.where.rows_B = columns_BQ, num_keys, rows_B

    def keep_rows(self, rows: torch.Tensor) -> None:
        """Forget all rows but these."""
        for layer in self.layers:
            layer.num_rows = rows.shape[0]
            if layer.is_initialized:
                layer.keys, layer.values = layer.keys[rows], layer.values[rows]


class _Where:
    columns_BQ: torch.Tensor
    num_keys: int
    rows_B: torch.Tensor | None


class _SlotLayer(CacheLayerMixin):
    is_sliding = False

    def __init__(self, where: _Where, num_rows: int, num_slots: int):
        super().__init__()
        self.where, self.num_rows, self.num_slots = where, num_rows, num_slots

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        # Zeros, not whatever the memory held: a masked NaN is still a NaN.
        self.keys, self.values = (x.new_zeros(self.num_rows, x.shape[1], self.num_slots, x.shape[3]) for x in (key_states, value_states))
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return self._write(self.keys, key_states), self._write(self.values, value_states)

    def _write(self, store_RHLD: torch.Tensor, new_BHQD: torch.Tensor) -> torch.Tensor:
        columns_BQ, num_keys, rows_B = self.where.columns_BQ, self.where.num_keys, self.where.rows_B
        if rows_B is None and columns_BQ.shape[0] == 1:
            store_RHLD.index_copy_(2, columns_BQ[0], new_BHQD)
        elif rows_B is None:
            store_RHLD.scatter_(2, columns_BQ[:, None, :, None].expand(new_BHQD.shape), new_BHQD)
        else:
            store_RHLD[rows_B[:, None], :, columns_BQ] = new_BHQD.transpose(1, 2)
            return store_RHLD[rows_B, :, :num_keys]
        return store_RHLD[:, :, :num_keys]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.where.num_keys, 0

    def get_seq_length(self) -> int:
        return self.where.num_keys - self.where.columns_BQ.shape[1] if self.is_initialized else 0

    def get_max_length(self) -> int:
        return self.num_slots


def new_store(model: torch.nn.Module, num_rows: int, num_columns: int) -> KeyValueStore:
    return KeyValueStore(model.config.get_text_config().num_hidden_layers, num_rows, num_columns)


@cache
def cache_argument(family: type) -> str:
    """What this class's forward calls its cache: `cache` from transformers 5.24 on, `past_key_values` before and in older remote code."""
    for ancestor in family.__mro__:
        parameters = inspect.signature(ancestor.__dict__["forward"]).parameters if "forward" in ancestor.__dict__ else {}
        for name in ("cache", "past_key_values"):
            if name in parameters:
                return name
    raise ValueError(f"{family.__name__}.forward takes no cache: decode with cache 'none'")


@torch.no_grad()
def forward_columns(
    model: torch.nn.Module,
    tokens_BQ: torch.Tensor,
    positions_BQ: torch.Tensor,
    kept_BQ: torch.Tensor,
    seen: torch.Tensor | Stretches | None,
    num_keys: int,
    store: KeyValueStore | None,
    columns_BQ: torch.Tensor,
    rows_B: torch.Tensor | None = None,
) -> torch.Tensor:
    """logits_NV of the hidden states where kept_BQ is True (row-major), of one forward of chosen columns.

    seen: which of the `num_keys` keys each query sees: bool (B, Q, K), one row of it for all rows; where `takes_stretches(model)`, also
    stretches, see `stretched`; None: all. store, columns_BQ, rows_B: see `KeyValueStore.place`; without a store the columns of this
    forward are all that there is, and K = Q.
    """
    config = model.config
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # inside of peft's wrapper
    is_compiled = base.base_model._compiled_call_impl is not None
    if is_compiled:
        # One graph for all windows: expanded tensors have other strides than whole ones, and a single row of columns another shape.
        num_rows = tokens_BQ.shape[0]
        positions_BQ, columns_BQ = positions_BQ.contiguous(), columns_BQ.expand(num_rows, -1).contiguous()
        seen = None if seen is None else seen.expand(num_rows, -1, -1).contiguous()
    cached = {"use_cache": False}
    if store is not None:
        store.place(columns_BQ, num_keys, rows_B)
        cached = {"use_cache": True, cache_argument(type(base)): store}
    is_stretched = isinstance(seen, tuple)
    mask = None if seen is None or is_stretched else realised_mask(model, seen)
    # Some families read the direction from the config and ignore the argument, others the reverse (see rewrite.call_model).
    missing = object()
    before = getattr(config, "is_causal", missing)
    config.is_causal = False
    try:
        with _eager_while_empty(store) if is_compiled else stretched(config, seen) if is_stretched else nullcontext():
            return model(
                input_ids=tokens_BQ, position_ids=positions_BQ, attention_mask=mask, is_causal=False, logits_to_keep=kept_BQ, **cached
            ).logits
    finally:
        if before is missing:
            del config.is_causal
        else:
            config.is_causal = before


def _eager_while_empty(store: KeyValueStore | None) -> Any:
    """A compiled model allocates the store outside of its graphs: else one more would be made for an empty store."""
    return nullcontext() if store is None or store.layers[0].is_initialized else torch.compiler.set_stance("force_eager")


_STRETCHES: ContextVar[Stretches] = ContextVar("stretches")
_STRETCHED = f"{__name__}.stretched"  # an export in the same process has a function of its own


def takes_stretches(model: torch.nn.Module) -> bool:
    """Can `forward_columns` be told stretches instead of a mask? Not where the graph is compiled, for it would be one more a pattern."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    has_interface = getattr(type(base), "_supports_attention_backend", False)
    return has_interface and model.config._attn_implementation == "sdpa" and base.base_model._compiled_call_impl is None


@contextmanager
def stretched(config: Any, stretches: Stretches) -> Iterator[None]:
    """Inside, attention goes stretch by stretch: ((num_queries, num_keys), ...), the first num_queries queries see the first num_keys
    keys, the next queries the first so many, and so on. Every stretch sees all that it is given, so the kernel needs no mask: no keys
    are computed that are then thrown away, grouped keys are not repeated, and the fastest kernels take it."""
    token = _STRETCHES.set(stretches)
    config._attn_implementation = _STRETCHED
    try:
        yield
    finally:
        config._attn_implementation = "sdpa"
        _STRETCHES.reset(token)


def _stretched_attention(
    module: torch.nn.Module, query_BHQD: torch.Tensor, key_BHKD: torch.Tensor, value_BHKD: torch.Tensor, mask: None, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    assert mask is None, "stretches stand in place of a mask"
    kwargs["is_causal"] = False
    answers, begin = [], 0
    for num_queries, num_keys in _STRETCHES.get():
        seen = query_BHQD[:, :, begin : begin + num_queries], key_BHKD[:, :, :num_keys], value_BHKD[:, :, :num_keys]
        answers.append(sdpa_attention_forward(module, *seen, None, **kwargs)[0])
        begin += num_queries
    return torch.cat(answers, dim=1), None


AttentionInterface.register(_STRETCHED, _stretched_attention)


def realised_mask(model: torch.nn.Module, seen_BQK: torch.Tensor) -> Any:
    """bool (B, Q, K) as the model's attention takes it. Raises ValueError for kernels that take none."""
    implementation = getattr(model.config, "_attn_implementation", None) or "eager"
    if implementation.startswith("flash"):
        raise ValueError(f"{implementation} takes no mask, and this step needs one: load the model with attn_implementation='sdpa'")
    if implementation == "flex_attention":
        from torch.nn.attention.flex_attention import create_block_mask

        rows, num_queries, num_keys = seen_BQK.shape

        def mask_mod(batch, head, query, key):
            return seen_BQK[batch if rows > 1 else 0, query, key]

        return create_block_mask(mask_mod, B=rows, H=None, Q_LEN=num_queries, KV_LEN=num_keys, device=seen_BQK.device)
    if implementation == "sdpa":
        return seen_BQK[:, None]
    dtype = getattr(model, "dtype", torch.float32)
    return torch.zeros_like(seen_BQK[:, None], dtype=dtype).masked_fill(~seen_BQK[:, None], torch.finfo(dtype).min)
