"""Following the denoising from outside, as transformers' `generate` does it: GenerationConfig, streamers, stopping criteria.

Tokens settle in any order, but text can be read, and a stop be judged, only as far as it has no hole. So all of this speaks of the
*settled prefix* of a row: its prompt, and what stands between it and the row's first masked position (of a text with gaps, the given
tokens between them as well). Left to right and block by block it grows steadily; in other orders it grows in leaps. Nothing of transformers is imported: a streamer has `put` and `end`, a stopping
criterion is called with (input_ids, scores).

Shapes: B rows, L positions of the canvas, P tokens of a prompt, K tokens that have settled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from .canvas import ROW, Canvas

# What a GenerationConfig carries besides the sampler's options, and what is no setting of the sampler.
_CARRIED = ("bos_token_id", "decoder_start_token_id", "mask_token_id", "transformers_version", "use_cache")


def options_of(generation_config: Any, known: Sequence[str], refuse: Callable[[str], Exception] | None = None) -> dict[str, Any]:
    """The options that a GenerationConfig (or a mapping of its names) sets, without its nulls.

    known: names that are options. refuse: makes the error for a name that is none; None passes over such names (a file on disk may
    carry what other programs read). `do_sample=False` means temperature 0, as in transformers, and True without a temperature 1.
    """
    if isinstance(generation_config, Mapping):
        values = dict(generation_config)
    elif hasattr(generation_config, "to_diff_dict"):
        values = generation_config.to_diff_dict()
    else:
        values = vars(generation_config)
    values = {name: value for name, value in values.items() if value is not None and not name.startswith("_")}
    do_sample = values.pop("do_sample", None)
    if do_sample is False:
        values = {name: value for name, value in values.items() if name not in ("temperature", "top_p", "top_k")} | {"temperature": 0.0}
    elif do_sample:
        values.setdefault("temperature", 1.0)
    for name in [name for name in values if name not in known]:
        if refuse is not None and name not in _CARRIED:
            raise refuse(name)
        del values[name]
    return values


class Follower:
    """Feeds one streamer and asks the stopping criteria, row by row, as the settled prefix grows.

    streamer: gets the prompt (1, P) first, which is all that stands left of the first position to be filled, then each newly settled
        piece of the prefix (K,), up to the end token and with it.
    criteria: each is called with (input_ids (1, P + k), None) for every length k that the prefix takes on, so a stop is found where
        a left-to-right decoder would have found it, and once more when a step did not make it longer, but never about the prompt alone; it returns a boolean or a
        boolean tensor of one element. Padding is not part of input_ids.
    may_change: settled tokens may still change (revision, a tokens hook): then everything is told at the end.
    Raises ValueError for a streamer beside more than one row: transformers' streamers print one text.
    """

    def __init__(
        self, canvas: Canvas, end_ids: Sequence[int], streamer: Any = None, criteria: Iterable[Any] | None = None, may_change: bool = False
    ):
        rows = canvas.tokens_BL.shape[0]
        if streamer is not None and rows > 1:
            raise ValueError(f"a streamer follows one row, and there are {rows}: call once for each prompt, or leave the streamer out")
        self.streamer, self.end_ids, self.may_change = streamer, set(end_ids), may_change
        # A StoppingCriteriaList is a list of criteria as well.
        self.criteria = [] if criteria is None else list(criteria) if isinstance(criteria, Iterable) else [criteria]
        self.device = canvas.tokens_BL.device
        real_BL = torch.ones_like(canvas.masked_BL) if canvas.segments_BL is None else canvas.segments_BL == ROW
        behind_BL = canvas.masked_BL.cumsum(dim=1) > 0
        self.prompts = [tokens_L[real_L & ~behind_L].tolist() for tokens_L, real_L, behind_L in zip(canvas.tokens_BL, real_BL, behind_BL, strict=True)]
        self.columns = [row_L.nonzero()[:, 0].tolist() for row_L in real_BL & behind_BL]
        self.settled: list[list[int]] = [[] for _ in range(rows)]
        self.is_done = [False] * rows
        self.stopped: list[int | None] = [None] * rows
        if streamer is not None:
            streamer.put(torch.tensor([self.prompts[0]], dtype=torch.int64))

    def see(self, tokens_BL: torch.Tensor, masked_BL: torch.Tensor) -> bool:
        """Take in the state after a step. True: every row has come to its end or to a stop, and no more steps are needed."""
        if not self.may_change:
            self._take(tokens_BL, masked_BL)
        return all(self.is_done)

    def close(self, tokens_BL: torch.Tensor) -> list[int | None]:
        """The state after the last step. Returns how many generated tokens of each row a criterion has left, the token that made it
        true included; None for a row that none has stopped."""
        self._take(tokens_BL, torch.zeros_like(tokens_BL, dtype=torch.bool))
        if self.streamer is not None:
            self.streamer.end()
        return self.stopped

    def _take(self, tokens_BL: torch.Tensor, masked_BL: torch.Tensor) -> None:
        for row, (tokens, masked) in enumerate(zip(tokens_BL.tolist(), masked_BL.tolist(), strict=True)):
            if self.is_done[row]:
                continue
            columns, settled = self.columns[row], self.settled[row]
            already = len(settled)
            for column in columns[already:]:
                if masked[column] or self.is_done[row]:
                    break
                settled.append(tokens[column])
                self._judge(row, tokens[column] in self.end_ids)
            if settled and len(settled) == already:  # a criterion may look at the clock
                self._judge(row, False)
            self.is_done[row] = self.is_done[row] or len(settled) == len(columns)
            if len(settled) > already and self.streamer is not None:
                self.streamer.put(torch.tensor(settled[already:]))

    def _judge(self, row: int, is_end: bool) -> None:
        if not is_end and self._stops(row):
            self.stopped[row] = len(self.settled[row])
        self.is_done[row] = is_end or self.stopped[row] is not None

    def _stops(self, row: int) -> bool:
        if not self.criteria:
            return False
        input_ids_1K = torch.tensor([self.prompts[row] + self.settled[row]], device=self.device)
        return any([bool(torch.as_tensor(criterion(input_ids_1K, None)).all()) for criterion in self.criteria])
