"""Forwards over windows of columns, against the stored keys of the others: what caches and speculation are made of.

Shapes: B rows of the canvas, R rows of a forward, L columns, Q columns of a forward, K keys, N hidden states that are read, V
vocabulary.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch.nn.functional import pad

from ..diffusion.block_attention import sees_at_inference, with_clean_context
from .canvas import ROW, Canvas, Predictor
from .transfer import on_device, waits_for_counts


class WindowPredictor(Predictor, Protocol):
    """A model that computes chosen columns against stored keys.

    attention: its pattern, `bidirectional` or one of BLOCK_PATTERNS. block_length: of its training, None for bidirectional.
    """

    attention: str
    block_length: int | None

    def new_store(self, num_rows: int, num_columns: int) -> Any:
        """Room for the keys and values of a canvas; `keep_rows(rows)` forgets the others."""
        ...

    def forward_columns(
        self,
        tokens_BQ: torch.Tensor,
        positions_BQ: torch.Tensor,
        kept: torch.Tensor,
        seen: torch.Tensor | tuple[tuple[int, int], ...] | None,
        num_keys: int,
        store: Any,
        columns_BQ: torch.Tensor,
        rows_B: torch.Tensor | None,
    ) -> torch.Tensor:
        """Logits of the hidden states (not aligned) that `kept` names: a boolean (B, Q), giving (N, V), or positions among the Q
        columns, integers (B, M), giving (B, M, V). Written to the store at columns_BQ (one row of it stands for all; L is nowhere)
        of its rows rows_B (None: all). The keys are the store's first `num_keys` columns, or without a store the Q columns
        themselves. seen: bool (B, Q, K); None: every query sees all of them; and where the predictor says `takes_stretches`, also
        ((num_queries, num_keys), ...): the first num_queries queries see the first num_keys keys, and so on, in all rows."""
        ...


_MOST_STRETCHES = 4  # each is a call of the attention kernel in every layer


def stretches(first: int, end: int, block_length: int, origin: int) -> tuple[tuple[int, int], ...]:
    """((num_queries, num_keys), ...): the columns [first, end) under `block_causal`, block after block."""
    cuts = [column for column in range(first + 1, end) if (column - origin) % block_length == 0]
    return tuple((stop - start, stop) for start, stop in zip([first, *cuts], [*cuts, end], strict=True))


def places_in_rows(chosen_RQ: torch.Tensor, most: int) -> torch.Tensor:
    """Integers (R, most): where each row's True stand, then others, for rows with fewer. Unlike a mask, they need not be counted."""
    return torch.sort((~chosen_RQ).to(torch.int8), dim=1, stable=True).indices[:, :most]


class Windows:
    """One forward of a window [first, end) of columns in each row: gathering, padding, masks. Windows that are the same as last
    time keep their index tensors and their mask."""

    def __init__(self, predictor: WindowPredictor, canvas: Canvas, store: Any):
        self.predictor, self.canvas, self.store = predictor, canvas, store
        self.length = canvas.tokens_BL.shape[1]
        self.device = canvas.tokens_BL.device
        self.positions_BL = pad(canvas.positions_BL, (0, 1))
        self.padding_BL = None if canvas.segments_BL is None else canvas.segments_BL != ROW
        self.key, self.prepared = None, None

    def forward(
        self,
        rows: list[int],
        windows: list[tuple[int, int]],
        reach: list[int],
        rule: Any,
        tokens_BL: torch.Tensor,
        reading_BL: torch.Tensor,
        counts: list[int],
        slots: list[int] | None = None,
    ) -> torch.Tensor:
        """logits_NV of the hidden states in `rows` where reading_BL is True, `counts` in each row of the canvas, row-major.

        reach: of each of `rows`, the end of the columns that it sees. rule: None where each query sees all of these; else (pattern,
        block length, origins, first noised columns), the arguments of sees_at_inference. slots: rows of the store when they are not
        all of it."""
        columns_RQ, index_R, seen, num_keys = self._prepare(rows, windows, reach, rule)
        tokens_RQ, positions_RQ, kept_RQ = (
            self._take(x, index_R, columns_RQ, len(rows)) for x in (pad(tokens_BL, (0, 1)), self.positions_BL, pad(reading_BL, (0, 1)))
        )
        asked = [counts[row] for row in rows]
        equal, most, kept = len(set(asked)) == 1, max(asked), kept_RQ
        # Places instead of a mask, which would make the host wait for the device to count.
        by_places = equal or waits_for_counts(self.device)
        if by_places:
            kept = places_in_rows(kept_RQ, most)
        logits = self.predictor.forward_columns(
            tokens_RQ, positions_RQ, kept, seen, num_keys, self.store, columns_RQ, None if slots is None else on_device(slots, self.device)
        )
        if not by_places:
            return logits
        logits = logits.flatten(0, 1)
        return logits if equal else logits[on_device([row * most + i for row, count in enumerate(asked) for i in range(count)], self.device)]

    def _take(self, x_BL: torch.Tensor, index_R: torch.Tensor | None, columns_RQ: torch.Tensor, rows: int) -> torch.Tensor:
        x_RL = x_BL if index_R is None else x_BL[index_R]
        return x_RL.gather(1, columns_RQ.expand(rows, -1))

    def _prepare(self, rows: list[int], windows: list[tuple[int, int]], reach: list[int], rule: Any) -> tuple:
        key = (tuple(rows), tuple(windows), tuple(reach), None if rule is None else (*rule[:2], *map(tuple, rule[2:])))
        if key == self.key:
            return self.prepared
        width, num_keys = max(end - first for first, end in windows), max(reach)
        same = len(set(windows)) == 1
        listed = [
            list(range(first, end)) + [self.length] * (width - end + first) for first, end in (windows[:1] if same else windows)
        ]
        columns_RQ = on_device(listed, self.device)
        index_R = None if rows == list(range(self.canvas.tokens_BL.shape[0])) else on_device(rows, self.device)
        seen = self._seen(rows, windows, reach, rule, columns_RQ, index_R, num_keys)
        self.key, self.prepared = key, (columns_RQ, index_R, seen, num_keys)
        return self.prepared

    def _seen(self, rows, windows, reach, rule, columns_RQ, index_R, num_keys: int) -> torch.Tensor | tuple[tuple[int, int], ...] | None:
        """None when every query sees every key, stretches when those of a few blocks do: then the kernel needs no mask."""
        if len(set(reach)) == 1 and self.padding_BL is None:
            if rule is None:
                return None
            if getattr(self.predictor, "takes_stretches", False) and with_clean_context(rule[0]) == "block_causal":
                alike = set(zip(windows, reach, rule[2], strict=True))
                (first, end), sees_to, origin = next(iter(alike))
                found = stretches(first, end, rule[1], origin)
                # Without a store the keys are the window's own columns.
                if len(alike) == 1 and sees_to == end and (self.store is not None or first == 0) and len(found) <= _MOST_STRETCHES:
                    return found
        keys_RK = torch.arange(num_keys, device=self.device)[None] if self.store is not None else columns_RQ
        query, key = columns_RQ[:, :, None], keys_RK[:, None, :]
        seen = key < on_device(reach, self.device)[:, None, None]
        if rule is not None:
            pattern, block_length, origins, noised_from = rule
            origin, noised = (on_device(x, self.device)[:, None, None] for x in (origins, noised_from))
            # Padding queries stand for nothing; the first column of the window in their place keeps a key for softmax.
            real = torch.minimum(query, on_device([end - 1 for _, end in windows], self.device)[:, None, None])
            seen = seen & sees_at_inference(real, key, pattern, block_length, origin, noised)
        if self.padding_BL is not None:
            padding_BL = pad(self.padding_BL, (0, 1), value=True)
            padding_RK = (padding_BL if index_R is None else padding_BL[index_R]).gather(1, keys_RK.expand(len(rows), -1))
            seen = seen & ~padding_RK[:, None, :]
        return seen.expand(seen.shape[0], columns_RQ.shape[1], keys_RK.shape[1])
