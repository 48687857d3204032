"""Self-speculation: the diffusion model drafts several tokens at once, its own causal pass verifies them, in one forward.

A model whose clean context is causal (`context_causal`, `causal_in_block`), trained with the AR loss or with frozen AR weights, is an
AR model as well. With x_m the last token that stands and d_1 .. d_g drafted behind it, one forward against the stored keys of the
text before computes

    verify    p_1 .. p_{g+1}, the causal predictions over [x_m, d_1 .. d_g]
    draft     for every outcome k = 0 .. g (d_1 .. d_k stand): q^k_1 .. q^k_g, the denoising predictions of the tokens that would be
              drafted next, from masks behind d_k

and then

    accept d_j from the left with probability min(1, p_j(d_j) / q_j(d_j));
    the first one that is refused is replaced by a draw from max(p_j - q_j, 0), normalised; when none is, p_{g+1} gives one more;
    with k accepted, the next round's d ~ q^k, independently

(arXiv 2211.17192, algorithm 1; drafting for every outcome: TiDAR, arXiv 2511.08923). What comes out has exactly the distribution of
AR sampling with the same temperature and filters, because q^k_j depends on nothing but the text up to d_k; at temperature 0 it is the
AR text, token for token, whatever was drafted. A round is one forward and settles 1 .. g + 1 tokens, so it never takes more forwards
than AR decoding does. The token behind d_k is not known yet when q^k is computed: it is one of the masks.

A repetition penalty is that of AR decoding as well: p_j is penalised by all that stands left of its token, d_1 .. d_{j-1} included, and
q^k by the text up to d_k.

Under `shift` a block that drafts begins at d_k, as in training, where the first token of a block is never masked; under `in_place` it
begins behind d_k. The AR prediction of a token is read from the hidden state before it under either alignment. Keys of drafted and
masked columns are written over in the next round; only what was accepted stays, computed by the causal pass.

Shapes: B rows, R of them still open, L positions of the canvas, G drafted tokens, Q columns of a forward, K keys, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch.nn.functional import pad

from ..diffusion.block_attention import FREE_BLOCKS
from ..diffusion.randomness import SAMPLE_ORDER, SAMPLE_TOKEN, counter_gumbel, counter_uniform
from .blocks import masked_places, row_begins, row_lengths
from .canvas import Canvas
from .draw import draw_tokens
from .filters import apply_filters, ban, count_tokens, penalise
from .step import Step
from .transfer import double, on_device
from .windows import WindowPredictor

MOST_DRAFTED = 64  # a round of g drafts computes up to (g + 1)(g + 2) columns
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
    if draft_length > MOST_DRAFTED:
        raise ValueError(f"draft_length is {draft_length}; a round drafts at most {MOST_DRAFTED} tokens, what pays is the length of the training's blocks")
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
    repetition_penalty: float = 1.0,
    banned_ids: Sequence[int] = (),
    end_ids: Sequence[int] = (),
) -> Iterator[Step]:
    """Fill the rows from the left; a Step a forward, which settles 1 .. draft_length + 1 tokens of each row (the first one 1).

    The canvas has been checked (check_speculation). Other arguments as in `denoise`. Step.confidence_BL is the AR probability.
    """
    draft_length = min(draft_length, max(1, int(canvas.masked_BL.sum(dim=1).max())))  # what is drafted behind all rows is thrown away
    rounds = _Rounds(predictor, canvas, draft_length, banned_ids, repetition_penalty)
    hot = temperature > 0
    how = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed}
    device, (num_rows, length) = canvas.tokens_BL.device, canvas.tokens_BL.shape
    # A few more columns than the canvas has: what is drafted behind the end of a row falls there.
    text_BL = pad(canvas.tokens_BL.masked_fill(canvas.masked_BL, predictor.mask_token_id), (0, draft_length + 2))
    masked_BL = canvas.masked_BL.clone()
    ends = on_device(list(end_ids), device, torch.int64)
    places_G = torch.arange(draft_length + 1, device=device)
    drafts_RG = q_RGV = last_token_R1 = None
    step = 0
    while rounds.rows:
        num_drafts = 0 if drafts_RG is None else draft_length
        last_R1, room_R1, rows_R1, begins_R1 = rounds.standing()
        rows_R = rows_R1[:, 0]
        known_RC = None if drafts_RG is None else torch.cat([last_token_R1, drafts_RG], dim=1)
        p_logits_RGV, next_logits_RKGV = rounds.forward(text_BL, known_RC, last_R1, room_R1, rows_R1, begins_R1)
        columns_RG = last_R1 + 1 + places_G[: num_drafts + 1]
        if hot:
            keys_R1 = canvas.row_keys_B[rows_R1]
            positions_RG = canvas.positions_BL[rows_R].gather(1, columns_RG.clamp(max=length - 1))
            p_RGV = _distributions(p_logits_RGV, how)
            accepted_R, next_RV = torch.zeros_like(rows_R), p_RGV[:, 0]
            if drafts_RG is not None:
                u_RG = counter_uniform(SAMPLE_ORDER, seed, keys_R1, step, positions_RG[:, :-1], _ACCEPT)
                accepted_R, next_RV = accept(p_RGV, q_RGV, drafts_RG, room_R1[:, 0].clamp(max=num_drafts), u_RG)
            behind_R1 = _categorical(next_RV, keys_R1, positions_RG.gather(1, accepted_R[:, None]), step, seed)[:, None]
        else:
            # p and q put everything on one token: accepting is comparing, and the AR token stands in either case.
            best_RG = p_logits_RGV.argmax(dim=-1)
            accepted_R = torch.zeros_like(rows_R)
            if drafts_RG is not None:
                stands_RG = (drafts_RG == best_RG[:, :-1]) & (places_G[:-1] < room_R1)
                accepted_R = stands_RG.to(torch.int64).cumprod(dim=1).sum(dim=1)
            behind_R1 = best_RG.gather(1, accepted_R[:, None])

        # What settles: the accepted ones, and the one behind them where the row has room for it.
        new_RG = behind_R1 if drafts_RG is None else torch.cat([drafts_RG, behind_R1], dim=1).scatter(1, accepted_R[:, None], behind_R1)
        settles_RG = places_G[: num_drafts + 1] <= torch.minimum(accepted_R[:, None], room_R1 - 1)
        ended_R = torch.zeros_like(accepted_R)
        if end_ids:
            is_end_RG = torch.isin(new_RG, ends) & settles_RG
            settles_RG = settles_RG & (is_end_RG.cumsum(dim=1) - is_end_RG.to(torch.int64) == 0)
            ended_R = is_end_RG.any(dim=1).to(torch.int64)
        # The one place of a round where the host waits.
        counts, ended = torch.stack([settles_RG.sum(dim=1), ended_R]).tolist()

        places_RG = columns_RG.masked_fill(~settles_RG, length)  # behind the canvas: not settled
        text_BL[rows_R1, places_RG] = new_RG
        committed_BL = torch.zeros(num_rows, length + 1, dtype=torch.bool, device=device)
        committed_BL[rows_R1, places_RG] = True
        confidence_BL = torch.zeros(num_rows, length + 1, device=device)
        confidence_BL[rows_R1, places_RG] = torch.softmax(p_logits_RGV, dim=-1).gather(2, new_RG[..., None])[..., 0]
        committed_BL = committed_BL[:, :length]
        masked_BL = masked_BL & ~committed_BL
        given_back_BL = torch.zeros_like(masked_BL)
        if any(ended):
            has_ended_B = torch.zeros(num_rows, dtype=torch.bool, device=device).index_fill(0, rows_R[on_device([place for place, is_ended in enumerate(ended) if is_ended], device)], True)
            given_back_BL = masked_BL & has_ended_B[:, None]
            masked_BL = masked_BL & ~given_back_BL
            text_BL[:, :length] = text_BL[:, :length].masked_fill(given_back_BL, end_ids[0])
        live = rounds.settle(counts, ended)
        yield Step(step, text_BL[:, :length].clone(), masked_BL, committed_BL, confidence_BL[:, :length], given_back_BL, step + 1)
        if live:
            last_token_R1 = behind_R1  # of a row that goes on, what was accepted settled whole
            if len(live) < len(counts):
                kept = on_device(live, device)
                next_logits_RKGV, accepted_R, last_R1, last_token_R1 = (x[kept] for x in (next_logits_RKGV, accepted_R, last_R1, last_token_R1))
                if hot:
                    keys_R1, rows_R = keys_R1[kept], rows_R[kept]
            chosen_RGV = next_logits_RKGV[torch.arange(len(live), device=device), accepted_R]
            if hot:
                first_RG = last_R1 + accepted_R[:, None] + 2 + torch.arange(draft_length, device=device)
                next_positions_RG = canvas.positions_BL[rows_R].gather(1, first_RG.clamp(max=length - 1))
                q_RGV = _distributions(chosen_RGV, how)
                drafts_RG = _draw(q_RGV, keys_R1.expand_as(next_positions_RG), next_positions_RG, step, seed)
            else:
                drafts_RG = chosen_RGV.argmax(dim=-1)
        step += 1


class _Shape(NamedTuple):
    """What does not change from round to round, relative to the last settled column.

    key: what it was made for. num_behind: columns behind the last settled one. Of each query: its column (columns_Q), its slot (slots_Q),
    up to where it sees clean columns (limits_Q), from and before which slot it sees its own block (own_Q, own_ends_Q), whether it is a
    mask, whether it is clean text. kept_N: the queries that are read. known_Q: of each query its place among [last token, drafts, mask].
    seen_QD: which slot each query sees, by the slot's distance from the last settled column, from -L on.
    """

    key: tuple[int, int]
    num_behind: int
    columns_Q: torch.Tensor
    slots_Q: torch.Tensor
    limits_Q: torch.Tensor
    own_Q: torch.Tensor
    own_ends_Q: torch.Tensor
    is_mask_Q: torch.Tensor
    is_clean_Q: torch.Tensor
    kept_N: torch.Tensor
    known_Q: torch.Tensor
    seen_QD: torch.Tensor


class _Rounds:
    """Where the rows stand, and their forwards. last: the column of each row's last settled token. num_stored: columns left of it are
    clean and stored."""

    def __init__(self, predictor: WindowPredictor, canvas: Canvas, draft_length: int, banned_ids: Sequence[int], repetition_penalty: float):
        self.predictor, self.draft_length, self.banned_ids, self.repetition_penalty = predictor, draft_length, banned_ids, repetition_penalty
        self.lag = int(predictor.alignment == "shift")
        self.device, self.length = canvas.tokens_BL.device, canvas.tokens_BL.shape[1]
        self.begins = row_begins(canvas)
        self.ends = [begin + count for begin, count in zip(self.begins, row_lengths(canvas), strict=True)]
        places = masked_places(canvas.masked_BL)
        self.last = [(masked[0] if masked else end) - 1 for masked, end in zip(places, self.ends, strict=True)]
        self.num_stored = list(self.begins)
        self.rows = [row for row, masked in enumerate(places) if masked]
        # Behind the canvas there is room for the drafted tokens and for a block of masks for each outcome.
        self.nowhere = self.length + draft_length + 1 + (draft_length + 1) ** 2
        self.store = predictor.new_store(len(self.rows), self.nowhere)
        self.shape: _Shape | None = None

    def standing(self) -> torch.Tensor:
        """(last_R1, room_R1, rows_R1, begins_R1): the last settled column of each open row, the columns behind it, which row it is, and
        where it begins."""
        stand = [(self.last[row], self.ends[row] - 1 - self.last[row], row, self.begins[row]) for row in self.rows]
        return on_device(stand, self.device).T[..., None]

    def forward(
        self, text_BL: torch.Tensor, known_RC: torch.Tensor | None, last_R1: torch.Tensor, room_R1: torch.Tensor, rows_R1: torch.Tensor,
        begins_R1: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(logits_RGV of the drafted tokens and of the one behind them, by the causal pass; logits_RKGV of the G tokens that would be
        drafted next for each outcome), banned and penalised. Columns: the text that is not stored yet, the drafts, then a block for each outcome.

        known_RC: the last settled token, which is all that is not stored yet, and the drafts behind it; None in the first forward."""  # fmt: skip
        drafted = 0 if known_RC is None else self.draft_length
        num_clean = max(self.last[row] - self.num_stored[row] for row in self.rows) + 1 + drafted
        if self.shape is None or self.shape.key != (num_clean, drafted):
            self.shape = self._shape(num_clean, drafted)
        shape = self.shape
        columns_RQ = last_R1 + shape.columns_Q
        if known_RC is None:
            tokens_RQ = text_BL[rows_R1, columns_RQ.clamp(0, text_BL.shape[1] - 1)].masked_fill(shape.is_mask_Q, self.predictor.mask_token_id)
        else:
            tokens_RQ = pad(known_RC, (0, 1), value=self.predictor.mask_token_id)[:, shape.known_Q]
        # Behind a row's end stands its last position: some models have no further ones, and a row must be what it is alone.
        positions_RQ = (torch.minimum(columns_RQ, last_R1 + room_R1) - begins_R1).clamp(min=0)
        slots_RQ = last_R1 + shape.slots_Q
        furthest = max(self.last[row] for row in self.rows)
        num_keys = furthest + 1 + shape.num_behind
        if not any(self.begins) and len({(self.last[row], self.num_stored[row]) for row in self.rows}) == 1:
            seen_RQK = shape.seen_QD[None, :, self.length - furthest : self.length - furthest + num_keys]
        else:
            slots_RQ, seen_RQK = self._ragged(shape, columns_RQ, slots_RQ, last_R1, num_keys)
        kept_RN = shape.kept_N.expand(len(self.rows), -1)
        logits_RNV = self.predictor.forward_columns(tokens_RQ, positions_RQ, kept_RN, seen_RQK, num_keys, self.store, slots_RQ, None)
        logits_RNV = ban(logits_RNV.flatten(0, 1), self.predictor.mask_token_id, self.predictor.vocab_size, self.banned_ids).view(logits_RNV.shape)
        p_RGV, next_RKGV = logits_RNV[:, : drafted + 1], logits_RNV[:, drafted + 1 :].unflatten(1, (drafted + 1, self.draft_length))
        if self.repetition_penalty == 1:
            return p_RGV, next_RKGV
        # What stands when d_1 .. d_k do, which is what stands left of d_{k+1} as well.
        column_L = torch.arange(text_BL.shape[1], device=self.device)
        standing_RKV = torch.zeros_like(p_RGV, dtype=torch.int32)
        standing_RKV[:, 0] = count_tokens(text_BL[rows_R1[:, 0]], (column_L >= begins_R1) & (column_L <= last_R1), p_RGV.shape[2])
        if known_RC is not None:
            standing_RKV[:, 1:].scatter_(2, known_RC[:, 1:, None], 1)
        seen_RKV = standing_RKV.cumsum(dim=1) > 0
        return penalise(p_RGV, seen_RKV, self.repetition_penalty), penalise(next_RKGV, seen_RKV[:, :, None], self.repetition_penalty)

    def _ragged(
        self, shape: _Shape, columns_RQ: torch.Tensor, slots_RQ: torch.Tensor, last_R1: torch.Tensor, num_keys: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(slots_RQ, seen_RQK) where rows stand at different columns: what `seen_QD` says, row by row."""
        key_K = torch.arange(num_keys, device=self.device)
        limits_RQ1, own_RQ1, own_ends_RQ1 = ((last_R1 + x)[..., None] for x in (shape.limits_Q, shape.own_Q, shape.own_ends_Q))
        if any(self.num_stored[row] != self.last[row] for row in self.rows):
            # The first forward: rows with shorter prompts have nothing in the first columns.
            stored_R1 = on_device([[self.num_stored[row]] for row in self.rows], self.device)
            is_padding_RQ = (columns_RQ < stored_R1) & shape.is_clean_Q
            slots_RQ = slots_RQ.masked_fill(is_padding_RQ, self.nowhere)
            # Their queries stand for nothing, and softmax wants a key.
            limits_RQ1 = torch.where(is_padding_RQ[..., None], stored_R1[..., None], limits_RQ1)
        seen_RQK = (key_K <= limits_RQ1) | ((key_K >= own_RQ1) & (key_K < own_ends_RQ1))
        if any(self.begins):
            begins_R11 = on_device([self.begins[row] for row in self.rows], self.device)[:, None, None]
            seen_RQK = seen_RQK & (key_K >= begins_R11)
        return slots_RQ, seen_RQK

    def _shape(self, num_clean: int, drafted: int) -> _Shape:
        # Under shift a drafting block begins with d_k, which stands: inside a causal block it sees and is what the clean d_k sees and is,
        # so that column is left out there.
        starts = int(self.lag and self.predictor.attention != "causal_in_block")
        width = self.draft_length + (starts if self.lag else 1)
        clean_C = torch.arange(num_clean) - (num_clean - 1 - drafted)
        outcome_W, at_W = (x.flatten() for x in torch.meshgrid(torch.arange(drafted + 1), torch.arange(width), indexing="ij"))
        drafting_W = outcome_W + 1 - starts + at_W
        slots_W = 1 + drafted + torch.arange(len(at_W))
        nothing_C, own_W = torch.full_like(clean_C, 1 << 40), 1 + drafted + outcome_W * width
        own_ends_W = slots_W + 1 if self.predictor.attention == "causal_in_block" else own_W + width
        is_mask_W = ~((at_W == 0) & bool(starts))
        # Under in_place the first mask stands for the token that the causal pass predicts.
        first_read = width - self.draft_length
        read = [*range(num_clean - 1 - drafted, num_clean), *(num_clean + i for i in range(len(at_W)) if i % width >= first_read)]
        columns_Q = torch.cat([clean_C, drafting_W])
        limits_Q, own_Q = torch.cat([clean_C, outcome_W - starts]), torch.cat([nothing_C, own_W])
        own_ends_Q, is_mask_Q = torch.cat([nothing_C, own_ends_W]), torch.cat([torch.zeros_like(clean_C, dtype=torch.bool), is_mask_W])
        num_behind = len(at_W) + drafted
        distance_D = torch.arange(-self.length, num_behind + 1)
        seen_QD = (distance_D <= limits_Q[:, None]) | ((distance_D >= own_Q[:, None]) & (distance_D < own_ends_Q[:, None]))
        known_Q = columns_Q.masked_fill(is_mask_Q, drafted + 1).clamp(min=0)
        tensors = (columns_Q, torch.cat([clean_C, slots_W]), limits_Q, own_Q, own_ends_Q, is_mask_Q, torch.arange(len(columns_Q)) < num_clean, torch.tensor(read), known_Q, seen_QD)
        return _Shape((num_clean, drafted), num_behind, *(x.to(self.device) for x in tensors))

    def settle(self, counts: list[int], ended: list[int]) -> list[int]:
        """Move on by the settled tokens, the last of which is not stored yet. Returns the places of the rows that are still open."""
        live = []
        for place, (row, count, is_ended) in enumerate(zip(self.rows, counts, ended, strict=True)):
            self.last[row] += count
            self.num_stored[row] = self.last[row]
            if not is_ended and self.last[row] + 1 < self.ends[row]:
                live.append(place)
        if len(live) < len(self.rows) and live:
            self.store.keep_rows(on_device(live, self.device))
        self.rows = [self.rows[place] for place in live]
        return live


def _distributions(logits_RGV: torch.Tensor, how: dict) -> torch.Tensor:
    """p_RGV in double precision, of banned logits after temperature and filters."""
    kept_NV = apply_filters(logits_RGV.flatten(0, 1), how["temperature"], how["top_p"], how["top_k"])
    return torch.softmax(double(kept_NV), dim=-1).view(logits_RGV.shape)


def _draw(q_RGV: torch.Tensor, keys_RG: torch.Tensor, positions_RG: torch.Tensor, step: int, seed: int) -> torch.Tensor:
    """One draw from each distribution."""
    plain = {"temperature": 1.0, "top_p": None, "top_k": None, "seed": seed}
    return draw_tokens(q_RGV.flatten(0, 1).log(), keys_RG.flatten(), positions_RG.flatten(), step=step, **plain).view(keys_RG.shape)


def _categorical(p_RV: torch.Tensor, keys_R1: torch.Tensor, positions_R1: torch.Tensor, step: int, seed: int) -> torch.Tensor:
    ids_V = torch.arange(p_RV.shape[1], device=p_RV.device)
    noise_RV = counter_gumbel(SAMPLE_TOKEN, seed, keys_R1, step, positions_R1, ids_V, _REPLACE)
    return (p_RV.to(noise_RV.dtype).log() + noise_RV).argmax(dim=-1)
