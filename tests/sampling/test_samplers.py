"""Every order with every budget with every block length: against a slow, obvious sampler, in a batch and alone, and at the ends
of each budget's range."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from tiny_predictors import HashPredictor

from dlmconvert.diffusion.randomness import SAMPLE_ORDER, counter_uniform
from dlmconvert.sampling.canvas import build_canvas
from dlmconvert.sampling.denoise import denoise, generate
from dlmconvert.sampling.order import ORDERS

ROWS = [[3, 4] + [None] * 9, [5, None, None, 6, 7, None, 8], [2] + [None] * 4, [1, 1, 1, None, 1]]
# name -> (settings, steps). The bounds are such that hash logits give neither one token nor everything.
BUDGETS = {
    "even": ({"budget": "even"}, 5),
    "ancestral": ({"budget": "ancestral"}, 6),
    "bernoulli": ({"budget": "bernoulli"}, 6),
    "dream": ({"budget": "dream"}, 5),
    "llada": ({"budget": "llada"}, 5),
    "threshold": ({"threshold": 0.3}, None),
    "threshold, at most 5 steps": ({"threshold": 0.6}, 5),
    "factor": ({"factor": 2.2}, None),
    "entropy_bound": ({"entropy_bound": 2.0}, None),
}


def _softmax(logits: list[float]) -> list[float]:
    weights = [math.exp(x - max(logits)) for x in logits]
    return [w / sum(weights) for w in weights]


def _prefix(budget: str, bound: float, candidates: list[dict]) -> int:
    """The longest prefix that a reading budget allows, tried one after the other."""
    longest = 0
    for k in range(1, len(candidates) + 1):
        c, h = [x["c"] for x in candidates[:k]], [x["h"] for x in candidates[:k]]
        allowed = {"threshold": min(c) >= bound, "factor": (k + 1) * (1 - min(c)) < bound, "entropy_bound": sum(h) - max(h) <= bound}[
            budget
        ]
        if not allowed:
            break
        longest = k
    return longest


def slow_sampler(row, order, settings, num_steps, block_length, seed=0, key=0, eps=1e-3) -> tuple[list[int], int]:
    """(tokens, forwards) at temperature 0: one row, lists and loops, no tensor arithmetic but the predictor's."""
    predictor = HashPredictor()
    state = [predictor.mask_token_id if token is None else token for token in row]
    todo = [place for place, token in enumerate(row) if token is None]
    n, tick, nfe = len(todo), 0, 0
    num_steps = num_steps or n
    for start in range(0, n, block_length or n):
        block = todo[start : start + (block_length or n)]
        end = start + len(block)
        steps_here, done = num_steps * end // n - num_steps * start // n, 0
        for j in range(steps_here):
            left = [place for place in block if state[place] == predictor.mask_token_id]
            if not left:
                break
            u = {place: float(counter_uniform(SAMPLE_ORDER, seed, torch.tensor(key), tick, place)) for place in left}
            wanted = torch.tensor([[place in left for place in range(len(row))]])
            logits = predictor.predict(torch.tensor([state]), wanted, torch.arange(len(row))[None], None).tolist()
            candidates = []
            for place, logit_V in zip(left, logits, strict=True):
                p = _softmax(logit_V[: predictor.vocab_size])
                first, second = sorted(p, reverse=True)[:2]
                entropy = -sum(x * math.log(x) for x in p)
                score = {
                    "random": -u[place],
                    "first_hitting": float(counter_uniform(SAMPLE_ORDER, seed, torch.tensor(key), -1, place)),
                    "left_to_right": -place,
                    "confidence": first,
                    "entropy": -entropy,
                    "margin": first - second,
                }[order]
                candidates.append({"place": place, "token": p.index(first), "score": score, "c": first, "h": entropy})
            candidates.sort(key=lambda x: -x["score"])
            even = len(block) * (j + 1) // steps_here - len(block) * j // steps_here
            s, t = (1 - (1 - eps) * (j + 1) / steps_here), (1 - (1 - eps) * j / steps_here)
            budget = settings.get("budget")
            if budget == "even":
                count = even
            elif budget == "ancestral":
                count = sum(x < 1 / (steps_here - j) for x in u.values())
            elif budget == "bernoulli":
                count = sum(x < 1 - s / t for x in u.values()) if j + 1 < steps_here else len(left)
            elif budget == "dream":
                count = int(len(left) * (1 - s / t)) if j + 1 < steps_here else len(left)
            elif budget == "llada":
                count = len(block) // steps_here + (j < len(block) % steps_here)
            else:
                ((budget, bound),) = settings.items()
                count = max(_prefix(budget, bound, candidates), 1, len(block) * (j + 1) // steps_here - done)
            count = min(count, len(left))
            for chosen in candidates[:count]:
                state[chosen["place"]] = chosen["token"]
            done, tick, nfe = done + count, tick + 1, nfe + (count > 0)
        assert not any(state[place] == predictor.mask_token_id for place in block)
    return state, nfe


@pytest.mark.parametrize("order, budget, block_length", itertools.product(ORDERS, BUDGETS, (None, 4)))
def test_the_slow_sampler_agrees(order, budget, block_length):
    settings, num_steps = BUDGETS[budget]
    canvas = build_canvas(ROWS[:2], 0, row_keys=[3, 4])
    done = generate(HashPredictor(), canvas, num_steps=num_steps, order=order, block_length=block_length, seed=9, **settings)
    for number, (row, filled) in enumerate(zip(ROWS[:2], canvas.rows(done.tokens_BL), strict=True)):
        expected, nfe = slow_sampler(row, order, settings, num_steps, block_length, seed=9, key=3 + number)
        assert filled == expected
        assert nfe <= done.nfe


@pytest.mark.parametrize("order, budget, block_length", itertools.product(ORDERS, BUDGETS, (None, 2)))
def test_a_row_of_a_batch_is_the_row_alone_and_every_step_keeps_what_stands(order, budget, block_length):
    settings, num_steps = BUDGETS[budget]
    how = dict(num_steps=num_steps, order=order, block_length=block_length, seed=11, temperature=0.9, top_p=0.95, **settings)
    together, predictor = build_canvas(ROWS, 0, row_keys=[10, 11, 12, 13]), HashPredictor(favourite=23)
    before_BL, masked_BL, nfe = together.tokens_BL.masked_fill(together.masked_BL, 23), together.masked_BL, 0
    for step in denoise(predictor, together, **how):
        assert torch.equal(step.masked_BL, masked_BL & ~step.committed_BL) and not bool((step.committed_BL & ~masked_BL).any())
        assert torch.equal(step.tokens_BL[~step.committed_BL], before_BL[~step.committed_BL])
        assert bool((step.tokens_BL[step.committed_BL] < predictor.vocab_size).all())
        assert step.nfe - nfe == int(bool(step.committed_BL.any()))
        before_BL, masked_BL, nfe = step.tokens_BL, step.masked_BL, step.nfe
    assert not bool(masked_BL.any()) and len(predictor.asked) == nfe
    filled = together.rows(before_BL)
    for number, row in enumerate(ROWS[:3]):
        alone = build_canvas([row], 0, row_keys=[10 + number])
        assert alone.rows(generate(HashPredictor(favourite=23), alone, **how).tokens_BL)[0] == filled[number]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("block_length", [None, 4])
def test_the_ends_of_each_range(order, block_length):
    canvas = build_canvas([[3, 4] + [None] * 9], 0)

    def commits(**settings) -> list[int]:
        return [
            int(step.committed_BL.sum()) for step in denoise(HashPredictor(), canvas, order=order, block_length=block_length, **settings)
        ]

    everything = [9] if block_length is None else [4, 4, 1]
    for all_at_once in (dict(threshold=0.0), dict(factor=math.inf), dict(entropy_bound=math.inf)):
        assert commits(**all_at_once) == everything
    for one_by_one in (dict(threshold=1.01), dict(factor=0.0), dict(entropy_bound=0.0), dict(budget="even")):
        assert commits(**one_by_one) == [1] * 9
    # Steps bound the forwards of a reading budget: never behind `even`.
    bounded = commits(threshold=1.01, num_steps=3)
    assert bounded == ([3, 3, 3] if block_length is None else everything)


def test_tokens_that_are_certain_are_free_for_the_entropy_bound():
    class Certain(HashPredictor):
        def predict(self, *arguments):
            return super().predict(*arguments).masked_fill_(torch.arange(self.rows_of_output) != 2, float("-inf"))

    assert generate(Certain(), build_canvas([[1] + [None] * 9], 0), order="entropy", entropy_bound=0.0).nfe == 1


def test_a_counted_budget_with_a_known_order_asks_for_the_chosen_positions_only():
    for order in ("random", "left_to_right", "first_hitting"):
        predictor = HashPredictor()
        generate(predictor, build_canvas([[1] + [None] * 20], 0), order=order)
        assert predictor.asked == [1] * 20 or (order == "random" and sum(predictor.asked) == 20)
    predictor = HashPredictor()  # and a block is asked for alone
    generate(predictor, build_canvas([[1] + [None] * 6], 0), order="entropy", block_length=3)
    assert predictor.asked == [3, 2, 1, 3, 2, 1]


def test_a_hook_that_masks_earlier_blocks_again_leaves_no_mask_at_the_end():
    def hook(step, x_BL, logits_BLV):
        if step == 4:
            x_BL[:, 1:] = 23
        return x_BL

    for settings in (dict(budget="even"), dict(threshold=1.01)):
        canvas = build_canvas([[1] + [None] * 6], 0)
        tokens_BL = generate(HashPredictor(), canvas, order="confidence", block_length=2, tokens_hook=hook, **settings).tokens_BL
        assert 23 not in tokens_BL[0].tolist()


def test_left_to_right_one_by_one_is_autoregressive_decoding_of_the_canvas():
    steps = list(denoise(HashPredictor(), build_canvas([[1, None, 2, None, None]], 0), order="left_to_right"))
    assert [step.committed_BL[0].nonzero()[:, 0].tolist() for step in steps] == [[1], [3], [4]]


# Stopping early.

END = 7


class EndsAt(HashPredictor):
    """Predicts the end token at the positions `ends` of the row and 2 elsewhere, surer the further right (or left)."""

    def __init__(self, ends, rightmost_first=True):
        super().__init__()
        self.ends, self.rightmost_first, self.rows_asked = ends, rightmost_first, []

    def predict(self, tokens_BL, wanted_BL, positions_BL, segments_BL):
        self.asked.append(int(wanted_BL.sum()))
        self.rows_asked.append(tokens_BL.shape[0])
        positions_N = positions_BL[wanted_BL]
        logits_NV = torch.zeros(len(positions_N), self.rows_of_output)
        token_N = torch.where(torch.isin(positions_N, torch.tensor(self.ends)), END, 2)
        sure_N = positions_N if self.rightmost_first else 30 - positions_N
        return logits_NV.scatter_(1, token_N[:, None], 1.0 + sure_N[:, None] / 4)


def test_a_row_stops_when_its_end_and_everything_left_of_it_is_settled():
    how = dict(order="confidence", end_ids=[END])
    canvas = build_canvas([[1] + [None] * 8], 0)
    steps = list(denoise(EndsAt([4, 6], rightmost_first=False), canvas, **how))
    assert len(steps) == steps[-1].nfe == 4
    assert steps[-1].tokens_BL.tolist() == [[1, 2, 2, 2, END, END, END, END, END]]
    assert steps[-1].given_back_BL[0].nonzero()[:, 0].tolist() == [5, 6, 7, 8] and not bool(steps[-1].masked_BL.any())
    # From the right: the end is settled long before what stands left of it, so nothing is given back.
    assert len(list(denoise(EndsAt([4]), canvas, **how))) == 8
    # An end token of the prompt is none.
    assert len(list(denoise(EndsAt([]), build_canvas([[END, None, None]], 0), **how))) == 2


def test_a_row_that_has_ended_leaves_the_batch_and_the_others_do_not_notice():
    predictor = EndsAt([4], rightmost_first=False)
    together = build_canvas([[1] + [None] * 8, [1, 2, 3, 4, 5, None, None, None, None, None, None]], 0)
    how = dict(order="left_to_right", end_ids=[END])
    steps = list(denoise(predictor, together, **how))
    assert predictor.rows_asked == [2, 2, 2, 2, 1, 1]
    alone = generate(EndsAt([4]), build_canvas([[1, 2, 3, 4, 5] + [None] * 6], 0), **how)
    assert together.rows(steps[-1].tokens_BL)[1] == alone.tokens_BL[0].tolist()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("settings", [dict(budget="even"), dict(threshold=0.3), dict(entropy_bound=1.0, block_length=3)])
def test_stopping_early_changes_nothing_before_the_end(order, settings):
    rows = [[3, 4] + [None] * 12, [5] + [None] * 12, [6, 1] + [None] * 12]
    how = dict(order=order, temperature=1.0, seed=3, **settings)
    whole, cut = (generate(HashPredictor(vocab_size=6), build_canvas(rows, 0), **how, end_ids=ends) for ends in ([], [2]))
    for row, full, short in zip(rows, whole.tokens_BL.tolist(), cut.tokens_BL.tolist(), strict=True):
        start = row.index(None)
        end = full.index(2, start) if 2 in full[start:] else len(full)
        assert full[: end + 1] == short[: end + 1] and set(short[end + 1 :]) <= {2, *full[end + 1 :]}
    assert cut.nfe <= whole.nfe


# Guidance and the penalty.


def test_guidance_is_the_formula_and_its_prompt_is_masked():
    class Linear(HashPredictor):
        seen = None

        def predict(self, tokens_BL, wanted_BL, positions_BL, segments_BL):
            self.seen = tokens_BL.tolist()
            return super().predict(tokens_BL, wanted_BL, positions_BL, segments_BL)

    rows = [[5, None, 6, None], [7, 8, None]]
    predictor, taken = Linear(), []
    canvas = build_canvas(rows, 0)

    def hook(step, x_BL, logits_BLV):
        taken.append(logits_BLV[canvas.masked_BL])
        return logits_BLV

    (step,) = denoise(predictor, canvas, num_steps=1, order="entropy", cfg_scale=1.5, logits_hook=hook)
    assert step.nfe == 2
    m = 23
    assert predictor.seen == [[5, m, 6, m], [7, 8, m, 0], [m, m, m, m], [m, m, m, 0]]
    states = torch.tensor([[5, m, 6, m], [7, 8, m, 0]]), torch.tensor([[m, m, m, m], [m, m, m, 0]])
    cond_NV, un_NV = (HashPredictor().predict(x, canvas.masked_BL, canvas.positions_BL, canvas.segments_BL) for x in states)
    torch.testing.assert_close(taken[0], un_NV + 2.5 * (cond_NV - un_NV))


@pytest.mark.parametrize(
    "settings", [dict(cfg_scale=0.7), dict(repetition_penalty=1.4), dict(cfg_scale=2.0, repetition_penalty=3.0, block_length=3)]
)
def test_guidance_and_penalty_in_a_batch_are_those_of_the_row_alone(settings):
    how = dict(order="confidence", threshold=0.4, temperature=1.0, seed=5, **settings)
    together = build_canvas(ROWS, 0)
    filled = together.rows(generate(HashPredictor(), together, **how).tokens_BL)
    assert filled != together.rows(
        generate(HashPredictor(), together, order="confidence", threshold=0.4, temperature=1.0, seed=5).tokens_BL
    )
    for number, row in enumerate(ROWS):
        alone = build_canvas([row], 0, row_keys=[number])
        assert alone.rows(generate(HashPredictor(), alone, **how).tokens_BL)[0] == filled[number]


def test_a_strong_penalty_never_repeats():
    class Positive(HashPredictor):
        def predict(self, *arguments):
            return super().predict(*arguments) + 0.1

    tokens = (
        generate(Positive(), build_canvas([[1, 2] + [None] * 12], 0), order="left_to_right", repetition_penalty=1e6).tokens_BL[0].tolist()
    )
    assert len(set(tokens)) == len(tokens)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(threshold=0.9, factor=1.0), "threshold and factor"),
        (dict(budget="even", entropy_bound=0.1), "budget and entropy_bound"),
        (dict(threshold=-0.1), "threshold is -0.1"),
        (dict(entropy_bound=math.nan), "entropy_bound is nan"),
        (dict(block_length=0), "block_length"),
        (dict(block_length=2, num_steps=2), "too few"),
        (dict(order="first_hitting", num_steps=3), "first_hitting"),
        (dict(cfg_scale=-1), "cfg_scale"),
        (dict(repetition_penalty=0), "repetition_penalty"),
        (dict(eps=1.0), "eps"),
    ],
)
def test_settings_that_contradict_are_refused_at_once(settings, message):
    with pytest.raises(ValueError, match=message):
        denoise(HashPredictor(), build_canvas([[1] + [None] * 6], 0), **settings)
