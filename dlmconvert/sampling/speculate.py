"""Self-speculation: the diffusion model drafts several tokens at once, its own causal pass verifies them.

A model whose clean context is causal (`context_causal`, `causal_in_block`), trained with the AR loss or with frozen AR weights, is an
AR model as well. With x_m the last token that stands, a round is two forwards against the stored keys of the text before it:

    draft    d_1 .. d_g ~ q_1 .. q_g,  independently, one forward over [x_m, M, .., M]
    verify   p_1 .. p_{g+1},  one causal forward over [x_m, d_1, .., d_g]
    accept d_j from the left with probability min(1, p_j(d_j) / q_j(d_j));
    the first one that is refused is replaced by a draw from max(p_j - q_j, 0), normalised; when none is, p_{g+1} gives one more

(arXiv 2211.17192, algorithm 1; I-DLM 2604.11035, TiDAR 2511.08923). What comes out has exactly the distribution of AR sampling with
the same temperature and filters, because q_j depends on nothing but the text before the draft; at temperature 0 it is the AR text,
token for token, whatever was drafted. Only the verifying forward's keys are kept, and what was refused is written over.

Under `shift` the block that drafts begins at x_m, as in training, where the first token of a block is never masked; under `in_place`
it begins behind x_m. The AR prediction of a token is read from the hidden state before it under either alignment.

Shapes: B rows, L positions of the canvas, G drafted tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.nn.functional import one_hot, pad

from ..diffusion.alignment import predicting_positions
from ..diffusion.block_attention import FREE_BLOCKS
from ..diffusion.randomness import SAMPLE_ORDER, SAMPLE_TOKEN, counter_gumbel, counter_uniform
from .blocks import masked_places, row_begins, row_lengths
from .canvas import Canvas
from .draw import draw_tokens
from .filters import apply_filters, ban
from .step import Step
from .windows import WindowPredictor, Windows

_ACCEPT, _REPLACE = 2, 3  # further keys, so that these draws are other streams than those of the draft and of the order


def accept(
    p_BGV: torch.Tensor, q_BGV: torch.Tensor, drafted_BG: torch.Tensor, num_drafted_B: torch.Tensor, u_BG: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(accepted_B, next_BV): how many drafted tokens stand, and the distribution of the token behind them.

    p_BGV: (B, G+1, V), the verifier's distributions, the last one after all drafted tokens. q_BGV: (B, G, V). num_drafted_B: how many
    of the G are meant. u_BG: uniform draws in [0, 1).
    """
    num_places = drafted_BG.shape[1]
    p_BG, q_BG = (x[:, :num_places].gather(2, drafted_BG[..., None])[..., 0] for x in (p_BGV, q_BGV))
    places_G = torch.arange(num_places, device=p_BGV.device)
    stands_BG = (u_BG * q_BG < p_BG) & (places_G < num_drafted_B[:, None])
    accepted_B = stands_BG.to(torch.int64).cumprod(dim=1).sum(dim=1)
    rows_B = torch.arange(len(accepted_B), device=p_BGV.device)
    p_BV = p_BGV[rows_B, accepted_B]
    rest_BV = (p_BV - q_BGV[rows_B, accepted_B.clamp(max=num_places - 1)]).clamp(min=0)
    mass_B1 = rest_BV.sum(dim=1, keepdim=True)
    # p = q up to rounding is never refused but for a last bit; then any draw from p is right.
    refused_B1 = (accepted_B < num_drafted_B)[:, None] & (mass_B1 > 0)
    return accepted_B, torch.where(refused_B1, rest_BV / mass_B1.clamp(min=torch.finfo(rest_BV.dtype).tiny), p_BV)


def check_speculation(predictor: WindowPredictor, canvas: Canvas, draft_length: int) -> None:
    """Raises ValueError for a model without an AR path, for gaps with text behind them, and for rows without a first token."""
    pattern = getattr(predictor, "attention", "bidirectional")
    if draft_length < 1:
        raise ValueError(f"draft_length is {draft_length}; a round drafts at least 1 token")
    if pattern not in FREE_BLOCKS:
        raise ValueError(
            f"this model has attention {pattern!r}: self-speculation needs a model that is an AR model over clean text as well"
            f" ({', '.join(FREE_BLOCKS)}, trained with the AR loss)"
        )
    ends = [begin + length for begin, length in zip(row_begins(canvas), row_lengths(canvas), strict=True)]
    for row, (masked, begin, end) in enumerate(zip(masked_places(canvas.masked_BL), row_begins(canvas), ends, strict=True)):
        if masked and masked != list(range(masked[0], end)):
            raise ValueError(f"row {row} has text right of a gap, and speculation writes from the left: put the gap at the end")
        if masked and masked[0] == begin:
            raise ValueError(f"row {row} has no token to start from: begin it with the tokenizer's bos or eos token")


def speculate(
    predictor: WindowPredictor,
    canvas: Canvas,
    draft_length: int,
    *,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int = 0,
    banned_ids: Sequence[int] = (),
    end_ids: Sequence[int] = (),
) -> Iterator[Step]:
    """Fill the rows from the left; a Step a round (two forwards), which settles 1 .. draft_length + 1 tokens of each row.

    The canvas has been checked (check_speculation). Other arguments as in `denoise`. Step.confidence_BL is the AR probability.
    """
    rounds = _Rounds(predictor, canvas, draft_length)
    how = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed}
    tokens_BL = canvas.tokens_BL.masked_fill(canvas.masked_BL, predictor.mask_token_id)
    masked_BL, length = canvas.masked_BL.clone(), canvas.tokens_BL.shape[1]
    columns_L = torch.arange(length, device=tokens_BL.device)
    ends = torch.tensor(list(end_ids), dtype=torch.int64, device=tokens_BL.device)
    step = 0
    while rounds.rows:
        rows_R = torch.tensor(rounds.rows, device=tokens_BL.device)
        keys_R1, last_R1 = canvas.row_keys_B[rows_R][:, None], torch.tensor(rounds.last_of_rows(), device=tokens_BL.device)[:, None]
        # Columns of the drafted tokens and of the one behind them; what lies outside of a row is not meant.
        columns_RG = last_R1 + 1 + torch.arange(draft_length + 1, device=tokens_BL.device)
        drafted_R = torch.tensor(rounds.num_drafted(), device=tokens_BL.device)
        inside_RG = columns_RG.clamp(max=length - 1)
        positions_RG = canvas.positions_BL[rows_R].gather(1, inside_RG)
        keys_RG = keys_R1.expand(columns_RG.shape)

        q_RGV = _distributions(rounds.draft(tokens_BL), predictor, banned_ids, how)
        drafts_RG = _draw(q_RGV, keys_RG[:, :-1], positions_RG[:, :-1], step, how)
        # What is not meant is written behind the canvas.
        slots_RG = torch.where(columns_RG[:, :-1] <= last_R1 + drafted_R[:, None], columns_RG[:, :-1], length)
        drafted_BL = pad(tokens_BL, (0, 1)).index_put((rows_R[:, None], slots_RG), drafts_RG)[:, :length]
        p_RGV = _distributions(rounds.verify(drafted_BL), predictor, banned_ids, how)
        u_RG = counter_uniform(SAMPLE_ORDER, seed, keys_RG[:, :-1], step, positions_RG[:, :-1], _ACCEPT)
        accepted_R, next_RV = accept(p_RGV, q_RGV, drafts_RG, drafted_R, u_RG)
        behind_R = _categorical(next_RV, keys_R1[:, 0], positions_RG.gather(1, accepted_R[:, None])[:, 0], step, how)

        # What settles: the accepted ones, and the one behind them where the row has room for it.
        new_RG = torch.cat([drafts_RG, behind_R[:, None]], dim=1).scatter(1, accepted_R[:, None], behind_R[:, None])
        places_G = torch.arange(draft_length + 1, device=tokens_BL.device)
        room_R = torch.tensor(rounds.room(), device=tokens_BL.device)
        settles_RG = (places_G <= accepted_R[:, None]) & (places_G < room_R[:, None])
        is_end_RG = torch.isin(new_RG, ends) & settles_RG
        settles_RG = settles_RG & (is_end_RG.cumsum(dim=1) - is_end_RG.to(torch.int64) == 0)
        # The one place of a round where the host waits.
        counts, ended = torch.stack([settles_RG.sum(dim=1), is_end_RG.any(dim=1).to(torch.int64)]).tolist()

        committed_BL = torch.zeros_like(masked_BL)
        confidence_BL = torch.zeros(masked_BL.shape, device=tokens_BL.device)
        given_back_BL = torch.zeros_like(masked_BL)
        p_new_RG = p_RGV.gather(2, new_RG[..., None])[..., 0].to(confidence_BL.dtype)
        for place, (row, count, is_ended) in enumerate(zip(rounds.rows, counts, ended, strict=True)):
            here = slice(rounds.last[row] + 1, rounds.last[row] + 1 + count)
            tokens_BL[row, here], confidence_BL[row, here] = new_RG[place, :count], p_new_RG[place, :count]
            committed_BL[row, here], masked_BL[row, here] = True, False
            if is_ended:
                given_back_BL[row] = masked_BL[row] & (columns_L >= here.stop)
                tokens_BL[row] = tokens_BL[row].masked_fill(given_back_BL[row], end_ids[0])
                masked_BL[row] = False
        rounds.settle(counts, ended)
        yield Step(step, tokens_BL.clone(), masked_BL.clone(), committed_BL, confidence_BL, given_back_BL, 2 * (step + 1))
        step += 1


class _Rounds:
    """Where the rows stand, and their two forwards. last: the column of each row's last settled token."""

    def __init__(self, predictor: WindowPredictor, canvas: Canvas, draft_length: int):
        self.predictor, self.draft_length = predictor, draft_length
        self.length, self.device = canvas.tokens_BL.shape[1], canvas.tokens_BL.device
        self.begins = row_begins(canvas)
        self.ends = [begin + count for begin, count in zip(self.begins, row_lengths(canvas), strict=True)]
        places = masked_places(canvas.masked_BL)
        self.last = [(masked[0] if masked else end) - 1 for masked, end in zip(places, self.ends, strict=True)]
        self.num_stored = list(self.begins)
        self.rows = [row for row, masked in enumerate(places) if masked]
        self.windows = Windows(predictor, canvas, predictor.new_store(len(places), self.length))
        if len(self.rows) < len(places):
            self.windows.store.keep_rows(torch.tensor(self.rows, device=self.device))

    def last_of_rows(self) -> list[int]:
        return [self.last[row] for row in self.rows]

    def room(self) -> list[int]:
        return [self.ends[row] - 1 - self.last[row] for row in self.rows]

    def num_drafted(self) -> list[int]:
        return [min(self.draft_length, room) for room in self.room()]

    def draft(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """logits_RGV of the masks behind each row's last token, G = draft_length; 0 behind the end of a row."""
        counts = self.num_drafted()
        first_noised = [self.last[row] + (0 if self.predictor.alignment == "shift" else 1) for row in self.rows]
        windows = [(self.num_stored[row], self.last[row] + 1 + count) for row, count in zip(self.rows, counts, strict=True)]
        rule = (self.predictor.attention, self.draft_length + 1, first_noised, first_noised)
        logits_RGV = self._read(windows, rule, tokens_BL, counts, self.draft_length, self.predictor.alignment)
        for row, noised in zip(self.rows, first_noised, strict=True):
            self.num_stored[row] = min(noised, self.last[row])
        return logits_RGV

    def verify(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """logits_RGV of the drafted tokens and of the one behind them, G = draft_length + 1, by the causal pass."""
        counts = [min(self.draft_length + 1, room) for room in self.room()]
        windows = [(self.last[row], self.last[row] + 1 + drafted) for row, drafted in zip(self.rows, self.num_drafted(), strict=True)]
        nowhere = [self.length] * len(self.rows)
        rule = ("causal_in_block", 1, nowhere, nowhere)
        return self._read(windows, rule, tokens_BL, counts, self.draft_length + 1, "shift")

    def _read(self, windows, rule, tokens_BL, counts: list[int], width: int, alignment: str) -> torch.Tensor:
        wanted_BL = torch.zeros(tokens_BL.shape, dtype=torch.bool)
        all_counts = [0] * tokens_BL.shape[0]
        for row, count in zip(self.rows, counts, strict=True):
            wanted_BL[row, self.last[row] + 1 : self.last[row] + 1 + count] = True
            all_counts[row] = count
        reading_BL = predicting_positions(wanted_BL, alignment).to(self.device)
        logits_NV = self.windows.forward(self.rows, windows, [end for _, end in windows], rule, tokens_BL, reading_BL, all_counts)
        places = [place * width + at for place, count in enumerate(counts) for at in range(count)]
        logits_MV = logits_NV.new_zeros(len(counts) * width, logits_NV.shape[1])
        logits_MV[torch.tensor(places, device=self.device)] = logits_NV
        return logits_MV.view(len(counts), width, -1)

    def settle(self, counts: list[int], ended: list[int]) -> None:
        """Move on by the settled tokens. The keys up to the accepted ones are those of the verifying forward: clean."""
        live = []
        for place, (row, count, is_ended) in enumerate(zip(self.rows, counts, ended, strict=True)):
            self.last[row] += count
            self.num_stored[row] = self.last[row]
            if not is_ended and self.last[row] + 1 < self.ends[row]:
                live.append(place)
        if len(live) < len(self.rows) and live:
            self.windows.store.keep_rows(torch.tensor(live, device=self.device))
        self.rows = [self.rows[place] for place in live]


def _distributions(logits_RGV: torch.Tensor, predictor: WindowPredictor, banned_ids: Sequence[int], how: dict) -> torch.Tensor:
    """p_RGV in double precision, after ban, temperature and filters; temperature 0 puts everything on the most probable token."""
    rows, places, vocabulary = logits_RGV.shape
    logits_NV = ban(logits_RGV.flatten(0, 1), predictor.mask_token_id, predictor.vocab_size, banned_ids)
    if how["temperature"] == 0:
        p_NV = one_hot(logits_NV.argmax(dim=-1), vocabulary).to(torch.float32)
    else:
        p_NV = torch.softmax(apply_filters(logits_NV, how["temperature"], how["top_p"], how["top_k"]).to(torch.float64), dim=-1)
    return p_NV.view(rows, places, vocabulary)


def _draw(q_RGV: torch.Tensor, keys_RG: torch.Tensor, positions_RG: torch.Tensor, step: int, how: dict) -> torch.Tensor:
    """One draw from each distribution."""
    if how["temperature"] == 0:
        return q_RGV.argmax(dim=-1)
    plain = {"temperature": 1.0, "top_p": None, "top_k": None, "seed": how["seed"]}
    return draw_tokens(q_RGV.flatten(0, 1).log(), keys_RG.flatten(), positions_RG.flatten(), step=step, **plain).view(keys_RG.shape)


def _categorical(p_RV: torch.Tensor, keys_R: torch.Tensor, positions_R: torch.Tensor, step: int, how: dict) -> torch.Tensor:
    if how["temperature"] == 0:
        return p_RV.argmax(dim=-1)
    ids_V = torch.arange(p_RV.shape[1], device=p_RV.device)
    noise_RV = counter_gumbel(SAMPLE_TOKEN, how["seed"], keys_R[:, None], step, positions_R[:, None], ids_V, _REPLACE)
    return (p_RV.to(noise_RV.dtype).log() + noise_RV).argmax(dim=-1)
