"""Revision: tokens that have settled may change again; given tokens never change.

| revision | a step, for each row by itself | source | strength |
| remdm | masked tokens are revealed with probability r, settled ones masked again with probability sigma (below) | ReMDM (2503.00307) | the cap of sigma, 0.02 |
| p2 | score every position: a masked one its candidate, a settled one the token that stands there; keep the best n - floor((1 - (j+1)/S) n), mask the rest | P2 (2502.03540), section 3 | |
| wino | in a block: settle all with c > `threshold` (0.6), and mask again what the others of the block doubt: p(x_i without x_i) < strength | WINO (2507.18578) | 0.9 |
| gidd | on the finished text: of the positions whose draw differs from what stands there, change the surest one | GIDD (2503.04482), self-correction | temperature of the draws, 0.1 |
| edits | on the finished text: change every position where another token has p >= strength | Seed Diffusion (2508.02193) trains for it | 0.9 |

ReMDM, on the linear grid t = (S-j)/S -> s = (S-j-1)/S, alpha_t = 1 - t:

    sigma = min(cap, 1, (1 - alpha_s) / alpha_t),    r = (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t)

so that the expected share of settled tokens stays alpha_s, as in training; at the last step sigma = 0 and r = 1.

`remdm`, `p2` and `wino` work with every masked model, though one that was trained on masks alone has never been asked to doubt a
visible token. `gidd` and `edits` read the model's opinion of visible tokens and refuse models that were not trained for it. They
first fill the canvas as the other settings say (loop.py), and then polish it (polish.py).

In blocks (a block model's own, or those that a bidirectional one is given) `remdm`, `p2` and `wino` run in one part of the row after
the other (blocks.py), n and S being those of the part. What stands in earlier parts is final: in a block model its keys are stored, and
all that came after was read from them; so do the keys that `prefix` and `dual` keep of a bidirectional model, until the next part begins
with a full forward (cache.py). A row ends with the part that holds its end token.

WINO asks a second time in the same forward (shadow.py). Released settings are kept: at most clamp(0.7 n, 5, 20) tokens settle a step,
none is doubted in a step that settles one, and fewer are masked again than settled in the step before, so that every block ends.

A repetition penalty acts in every draw, score and doubt, of masked and of settled positions (filters.py): a settled token counts for
the other positions of its row, and where it is judged itself it does not, as if it were masked.

Shapes: B rows, L positions of the canvas, N positions asked for (row-major), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from ..diffusion.randomness import SAMPLE_ORDER, counter_uniform
from .blocks import Layout
from .cache import Asked, Reader
from .canvas import Canvas, Predictor
from .draw import draw_tokens
from .filters import ban, penalise_repetition
from .order import best, confidence
from .predictions import Hook, after_logits_hook, places
from .shadow import Shadow
from .step import Step
from .transfer import double, on_device

REVISIONS = {"remdm": 0.02, "p2": None, "wino": 0.9, "gidd": 0.1, "edits": 0.9}  # name -> default strength
POLISHING = ("gidd", "edits")
_REMASK = 4  # one more key, so that these draws are another stream than those of the order
_DOUBTERS = ("gidd", "uniform", "edit")  # corruptions whose models have learned to doubt visible tokens


def check_revision(revision: str, strength: float | None, predictor: Predictor) -> float | None:
    """The strength to use. Raises ValueError for an unknown revision, a strength without meaning, and a model that cannot do it."""
    if revision not in REVISIONS:
        raise ValueError(f"unknown revision {revision!r}; valid: {', '.join(REVISIONS)}")
    default = REVISIONS[revision]
    if strength is not None and (default is None or not 0 <= strength <= 1):
        raise ValueError(f"revision_strength is {strength}; " + ("p2 has none" if default is None else "it must lie in [0, 1]"))
    trained = str(getattr(predictor, "corruption", "masking"))
    if revision in POLISHING and not any(word in trained for word in _DOUBTERS):
        raise ValueError(
            f"revision {revision!r} reads what the model thinks of visible tokens, and this one was trained with corruption {trained!r}:"
            " masks only, so it has never learned to doubt them; use remdm, p2 or wino"
        )
    if revision == "wino" and not hasattr(predictor, "forward_columns"):
        raise ValueError("revision 'wino' asks masks beside the canvas, and this predictor cannot compute single columns; use remdm or p2")
    return default if strength is None else strength


class Now(NamedTuple):
    """Where the rows stand at a step of `remdm` or `p2`. part_BL: positions of each row's part, none when the row is done. n_B: how many
    they are. step_B: steps since the part began. num_steps_B: steps of the part."""

    part_BL: torch.Tensor
    n_B: torch.Tensor
    step_B: torch.Tensor
    num_steps_B: torch.Tensor


@dataclass
class Reviser:
    """What all revisions need: who answers (None: not known yet), how tokens are drawn, and the state. draw: arguments of draw_tokens.
    end_ids: a row is done with the part that holds one of these. logits_hook: of the user, in polishing."""

    predictor: Predictor
    canvas: Canvas
    layout: Layout
    reader: Reader | None
    draw: dict
    banned_ids: Sequence[int]
    repetition_penalty: float
    end_ids: Sequence[int] = ()
    forwards_each: int = 1  # with guidance, 2
    logits_hook: Hook | None = None
    nfe: int = 0
    parts: list[int] = field(default_factory=list)  # the part of each row
    is_alive: list[bool] = field(default_factory=list)  # of each row when it was last asked: has it a part under work?

    def __post_init__(self):
        self.open_BL = self.canvas.masked_BL  # positions that the sampler fills, and may change
        self.keys_BL = self.canvas.row_keys_B[:, None].expand(self.open_BL.shape)
        self.masked_BL = self.open_BL.clone()
        self.tokens_BL = self.canvas.tokens_BL.masked_fill(self.open_BL, self.predictor.mask_token_id)
        self.has_ended_B = torch.zeros_like(self.canvas.row_keys_B, dtype=torch.bool)
        self.parts = [0] * len(self.has_ended_B)
        self.last_steps_BK = self.layout.steps_BK.cumsum(dim=1)  # the step at which each part is over
        self.last_steps = self.last_steps_BK.tolist()

    @property
    def num_steps(self) -> int:
        return max(map(max, self.last_steps))

    def now(self, step: int) -> Now:
        """Every part takes its share of the row's steps, so where a row stands depends on the step alone."""
        part_B = (step >= self.last_steps_BK).sum(dim=1)
        self.parts = [sum(step >= last for last in row) for row in self.last_steps]
        part_BL = self.open_BL & (self.layout.number_BL == part_B[:, None]) & ~self.has_ended_B[:, None]
        at_B1 = part_B.clamp(max=self.last_steps_BK.shape[1] - 1)[:, None]
        num_steps_B = self.layout.steps_BK.gather(1, at_B1)[:, 0].clamp(min=1)
        step_B = step - self.last_steps_BK.gather(1, at_B1)[:, 0] + num_steps_B
        return Now(part_BL, part_BL.sum(dim=1), step_B, num_steps_B)

    def ask(
        self, wanted_BL: torch.Tensor, step: int, live_BL: torch.Tensor | None = None, counts: list[int] | None = None, index: int = 0, **draw
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """(log p_NV, x_hat_N, places_N) of the wanted positions; None when there are none. The host waits for their number, where it does
        not know the `counts` of each row.

        step: keys the draws. live_BL: the positions of each row's part; default the wanted ones. A row without any is done. index: of the
        Step, for the logits hook."""
        alive = counts
        if counts is None:
            counts, alive = torch.stack([wanted_BL.sum(dim=1), (wanted_BL if live_BL is None else live_BL).sum(dim=1)]).tolist()
        self.is_alive = [n > 0 for n in alive]
        if not any(counts):
            return None
        flat_N = places(wanted_BL, sum(counts))
        asked = Asked(wanted_BL, flat_N, counts, self.parts, self.is_alive)
        logits_NV = self.reader.read(self.tokens_BL, asked)
        self.nfe += self.forwards_each
        if self.logits_hook is not None:
            logits_NV = after_logits_hook(self.logits_hook, index, logits_NV, asked, self.tokens_BL)
        return self.judge(logits_NV, flat_N, step, **draw)

    def judge(self, logits_NV: torch.Tensor, flat_N: torch.Tensor, step: int, **draw):
        logits_NV = ban(logits_NV, self.predictor.mask_token_id, self.predictor.vocab_size, self.banned_ids)
        visible_BL = self.canvas.visible(self.masked_BL)
        logits_NV = penalise_repetition(logits_NV, flat_N, self.tokens_BL, visible_BL, self.repetition_penalty)
        keys_N, positions_N = self.keys_BL.flatten()[flat_N], self.canvas.positions_BL.flatten()[flat_N]
        x_hat_N = draw_tokens(logits_NV, keys_N, positions_N, step=step, **(self.draw | draw))
        return torch.log_softmax(logits_NV, dim=-1), x_hat_N, flat_N

    def spread(self, values_N: torch.Tensor, flat_N: torch.Tensor, rest_BL: torch.Tensor) -> torch.Tensor:
        """rest_BL with `values_N` at their places."""
        return rest_BL.flatten().scatter(0, flat_N, values_N.to(rest_BL.dtype)).view(rest_BL.shape)

    def settle(self, index: int, tokens_BL: torch.Tensor, masked_BL: torch.Tensor, confidence_BL: torch.Tensor, final_BL: torch.Tensor) -> Step:
        """Take the new state over; a Step in which what changed counts as committed. final_BL: the positions of parts that are over
        after this step; what stands right of an end token among them is given back."""
        given_back_BL = torch.zeros_like(masked_BL)
        if self.end_ids:
            is_end_BL = torch.isin(tokens_BL, on_device(list(self.end_ids), tokens_BL.device)) & final_BL
            self.has_ended_B = self.has_ended_B | is_end_BL.any(dim=1)
            given_back_BL = masked_BL & self.has_ended_B[:, None]
            masked_BL = masked_BL & ~given_back_BL
        tokens_BL = tokens_BL.masked_fill(masked_BL, self.predictor.mask_token_id)
        if self.end_ids:
            tokens_BL = tokens_BL.masked_fill(given_back_BL, self.end_ids[0])
        committed_BL = ~masked_BL & (self.masked_BL | (tokens_BL != self.tokens_BL)) & self.open_BL & ~given_back_BL
        self.tokens_BL, self.masked_BL = tokens_BL, masked_BL
        return Step(
            index, tokens_BL.clone(), masked_BL.clone(), committed_BL, confidence_BL.masked_fill(~committed_BL, 0.0), given_back_BL, self.nfe
        )


def remdm(reviser: Reviser, cap: float) -> Iterator[Step]:
    """S steps a part of the reverse process with remasking; see the table above. A step that reveals nothing costs no forward."""
    for step in range(reviser.num_steps):
        now = reviser.now(step)
        t_B, s_B = (double((now.num_steps_B - now.step_B - at).clamp(min=0)) / now.num_steps_B for at in (0, 1))
        sigma_B = (s_B / (1 - t_B).clamp(min=1e-12)).clamp(max=min(cap, 1.0))
        sigma_B = torch.where(t_B >= 1, min(cap, 1.0), sigma_B)  # nothing has settled yet: sigma changes nothing
        reveal_B = torch.where(s_B > 0, (1 - s_B - (1 - sigma_B) * (1 - t_B)) / t_B.clamp(min=1e-12), 1.0)
        u_BL = counter_uniform(SAMPLE_ORDER, reviser.draw["seed"], reviser.keys_BL, step, reviser.canvas.positions_BL, _REMASK)
        wanted_BL = now.part_BL & reviser.masked_BL & (u_BL < reveal_B[:, None])
        again_BL = now.part_BL & ~reviser.masked_BL & (u_BL < sigma_B[:, None])
        answer = reviser.ask(wanted_BL, step, now.part_BL)
        if not any(reviser.is_alive):  # every row has ended
            return
        tokens_BL, c_BL = reviser.tokens_BL, torch.zeros(wanted_BL.shape, device=wanted_BL.device)
        if answer is not None:
            log_p_NV, x_hat_N, flat_N = answer
            tokens_BL = reviser.spread(x_hat_N, flat_N, tokens_BL)
            c_BL = reviser.spread(confidence(log_p_NV, x_hat_N), flat_N, c_BL)
        masked_BL = (reviser.masked_BL & ~wanted_BL) | again_BL
        yield reviser.settle(step, tokens_BL, masked_BL, c_BL, _over(now))


def p2(reviser: Reviser) -> Iterator[Step]:
    """S steps a part; after step j the best n - floor((1 - (j+1)/S) n) positions of it stand, whatever stood before."""
    for step in range(reviser.num_steps):
        now = reviser.now(step)
        answer = reviser.ask(now.part_BL, step)
        if answer is None:
            return
        log_p_NV, x_hat_N, flat_N = answer
        standing_N = torch.where(reviser.masked_BL.flatten()[flat_N], x_hat_N, reviser.tokens_BL.flatten()[flat_N])
        tokens_BL = reviser.spread(standing_N, flat_N, reviser.tokens_BL)
        c_BL = reviser.spread(confidence(log_p_NV, standing_N), flat_N, torch.zeros(now.part_BL.shape, device=flat_N.device))
        kept_B = now.n_B - now.n_B * (now.num_steps_B - now.step_B - 1).clamp(min=0) // now.num_steps_B
        again_BL = now.part_BL & ~best(c_BL, now.part_BL, kept_B)
        yield reviser.settle(step, tokens_BL, (reviser.masked_BL & ~now.part_BL) | again_BL, c_BL, _over(now))


def _over(now: Now) -> torch.Tensor:
    """The positions of the parts whose last step this is."""
    return now.part_BL & (now.step_B + 1 >= now.num_steps_B)[:, None]


def wino(reviser: Reviser, shadow: Shadow, threshold: float, doubt: float) -> Iterator[Step]:
    """Parts from the left, each until it has no mask; see the table above."""
    number_BL, length = reviser.layout.number_BL, reviser.open_BL.shape[1]
    last_B = torch.full_like(reviser.canvas.row_keys_B, 30)
    part_B, step = torch.full_like(last_B, -1), 0
    while True:
        now_B = number_BL.masked_fill(~reviser.masked_BL, length).min(dim=1).values
        last_B = torch.where(now_B == part_B, last_B, 30)
        part_B = now_B
        part_BL = reviser.open_BL & (number_BL == now_B[:, None])
        open_BL, stands_BL = part_BL & reviser.masked_BL, part_BL & ~reviser.masked_BL
        # The one place of a step where the host waits.
        numbers, num_open, num_standing = torch.stack([now_B, open_BL.sum(dim=1), stands_BL.sum(dim=1)]).tolist()
        if all(number >= length for number in numbers):
            return
        logits_NV = shadow.read(reviser.tokens_BL, open_BL, stands_BL, numbers, num_open, num_standing)
        reviser.nfe += reviser.forwards_each
        # Row-major places of the masked positions, then of the settled ones: the shadow's order.
        flat_N = torch.cat([places(open_BL, sum(num_open)), places(stands_BL, sum(num_standing))])
        log_p_NV, x_hat_N, flat_N = reviser.judge(logits_NV, flat_N, step)
        c_N = confidence(log_p_NV, torch.where(open_BL.flatten()[flat_N], x_hat_N, reviser.tokens_BL.flatten()[flat_N]))
        c_BL = reviser.spread(c_N, flat_N, torch.zeros(open_BL.shape, device=flat_N.device))
        tokens_BL = torch.where(open_BL, reviser.spread(x_hat_N, flat_N, reviser.tokens_BL), reviser.tokens_BL)
        most_B = (open_BL.sum(dim=1) * 7 // 10).clamp(5, 20)
        count_B = (open_BL & (c_BL > threshold)).sum(dim=1).clamp(min=1).minimum(most_B).minimum(open_BL.sum(dim=1))
        settles_BL = best(c_BL, open_BL, count_B)
        doubted_BL = stands_BL & (c_BL < doubt) & (count_B > 1)[:, None]
        doubted_BL = best(-c_BL, doubted_BL, torch.minimum(doubted_BL.sum(dim=1), (last_B - 1).clamp(min=0)))
        last_B = torch.where(now_B < length, count_B, last_B)
        masked_BL = (reviser.masked_BL & ~settles_BL) | doubted_BL
        over_BL = part_BL & ~(part_BL & masked_BL).any(dim=1, keepdim=True)
        yield reviser.settle(step, torch.where(settles_BL, tokens_BL, reviser.tokens_BL), masked_BL, c_BL, over_BL)
        step += 1
