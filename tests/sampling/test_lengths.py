"""DAEDAL against the decisions of its program; gaps whose length is chosen."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_decoders import denoiser_of
from tiny_predictors import HashPredictor, vectors

from dlmconvert.sampling import polish
from dlmconvert.sampling.canvas import build_canvas
from dlmconvert.sampling.denoise import denoise, generate
from dlmconvert.sampling.length import Growth, candidates, choose_lengths, daedal, eos_confidence

GREEDY = {"temperature": 0.0, "top_p": None, "top_k": None, "seed": 0}
EOS, MASK = 62, 63


class Standing:
    """Predicts by absolute position alone, as the vectors' stand-in does."""

    alignment, mask_token_id, vocab_size = "in_place", MASK, 64

    def __init__(self, given):
        self.rows = []
        for token, p, second, share in zip(given["pred_token"], given["pred_conf"], given["second_token"], given["second_share"], strict=True):
            p_V = torch.full((64,), (1 - p) * (1 - share) / 62, dtype=torch.float64)
            p_V[token], p_V[second] = p, (1 - p) * share
            self.rows.append(p_V.log())
        self.table = torch.stack(self.rows)

    def predict(self, tokens_BL, wanted_BL, positions_BL, segments_BL):
        return self.table[positions_BL[wanted_BL].clamp(max=len(self.table) - 1)].float()


def test_eos_confidence_is_the_programs():
    for case in vectors("09_daedal_decisions.json")["eos_confidence_cases"]:
        given = case["inputs"]
        p_GV = Standing(given).table[given["prompt_length"] : given["total_length"]].exp()
        ours = eos_confidence(p_GV[:, EOS], p_GV.argmax(-1) == EOS, given["W"])
        assert math.isclose(ours, case["expected"]["eos_confidence_released"], rel_tol=1e-5, abs_tol=1e-6)
        # What the paper writes, for the record: the mean over the last W positions.
        assert math.isclose(float(p_GV[-given["W"] :, EOS].mean()), case["expected"]["eos_confidence_paper"], rel_tol=1e-5, abs_tol=1e-6)


def test_daedal_decides_as_its_program():
    compared = 0
    for case in vectors("09_daedal_decisions.json")["run_cases"]:
        given, expected = case["inputs"], case["expected"]
        if MASK in given["pred_token"]:
            continue  # a model that predicts the mask token: we ban it, see the next test
        growth = Growth(
            initial=given["initial_gen_length"], block=given["block_length"], factor=given["expansion_factor"], window=given["eos_check_tokens"],
            tau_eos=given["eos_confidence_threshold"], tau_expand=given["expand_eos_confidence_threshold"], tau_high=given["high_conf_threshold"],
            tau_low=given["low_conf_threshold"],
        )  # fmt: skip
        canvas = build_canvas([given["prompt"] + [None] * given["max_gen_length"]], 0)
        steps = list(daedal(Standing(given), canvas, growth, draw=GREEDY, banned_ids=(), end_ids=(EOS,), stops=False))
        after_stage_1 = steps[: len(expected["stage1"])]
        for step, decision in zip(after_stage_1[:-1], expected["stage1"][1:], strict=True):
            assert int(step.masked_BL.sum()) == decision["gen_length"]
        assert len(steps) == len(expected["stage1"]) + len(expected["stage2"])
        for step, decision in zip(steps[len(expected["stage1"]) :], expected["stage2"], strict=True):
            shown = step.tokens_BL[0].tolist()
            assert shown[: len(decision["x_after"])] == decision["x_after"]
            assert set(shown[len(decision["x_after"]) :]) <= {EOS}
            compared += 1
    assert compared > 30


def test_daedal_never_writes_a_mask():
    for case in vectors("09_daedal_decisions.json")["run_cases"]:
        given = case["inputs"]
        canvas = build_canvas([given["prompt"] + [None] * given["max_gen_length"]], 0)
        last = list(denoise(Standing(given), canvas, initial_length=given["initial_gen_length"], block_length=4, end_ids=[EOS]))[-1]
        assert MASK not in last.tokens_BL[0].tolist() and not bool(last.masked_BL.any())


def test_growing_answers_in_a_batch_are_those_alone():
    rows = [[1, 2] + [None] * 30, [3] + [None] * 40, [4, 5, 6] + [None] * 5]
    how = dict(initial_length=8, block_length=8, threshold=0.5, temperature=0.7, seed=2, end_ids=[7], repetition_penalty=1.3)
    together = build_canvas(rows, 0, row_keys=[4, 5, 6])
    steps = list(denoise(HashPredictor(), together, **how))
    filled = together.rows(steps[-1].tokens_BL)
    for number, row in enumerate(rows):
        alone = build_canvas([row], 0, row_keys=[4 + number])
        assert alone.rows(generate(HashPredictor(), alone, **how).tokens_BL) == [filled[number]]
    assert int(steps[0].masked_BL[1].sum()) <= 16 and any(int(step.masked_BL[1].sum()) > 8 for step in steps)


class Ends(HashPredictor):
    """Rather sure that the text is over from position 21 on, the surer the further right, and not before."""

    def predict(self, tokens_BL, wanted_BL, positions_BL, segments_BL):
        logits_NV = super().predict(tokens_BL, wanted_BL, positions_BL, segments_BL)
        behind_N = positions_BL[wanted_BL] - 20
        logits_NV[:, 7] += torch.where(behind_N > 0, 3 + behind_N / 8, -6)
        return logits_NV


def slow_daedal(prompt: list[int], most: int, initial: int, block: int, tau_high: float, penalty: float = 1.0, scale: float = 0.0) -> list[int]:
    """One row, greedy, as length.py describes it: E 8, W 32, tau_eos 0.5, tau_expand 0.9, tau_low 0.1; 7 is the end."""

    def read(answer):
        row = [23 if token is None else token for token in prompt + answer]
        here = range(len(prompt), len(row))
        predictor = Ends(alignment="in_place")

        def logits_of(tokens):
            wanted = torch.tensor([[i in here for i in range(len(row))]])
            return predictor.predict(torch.tensor([tokens]), wanted, torch.arange(len(row))[None], None)[:, :23]

        logits = logits_of(row)
        if scale:
            without = logits_of([23] * len(prompt) + row[len(prompt) :])
            logits = without + (scale + 1) * (logits - without)
        for place, logits_V in zip(here, logits, strict=True):
            for token in {t for i, t in enumerate(row) if i != place} - {7, 23}:
                logits_V[token] = logits_V[token] / penalty if logits_V[token] > 0 else logits_V[token] * penalty
        p = torch.softmax(logits, -1)
        sure = sum(float(p_V[7]) for p_V in [p_V for p_V in p if int(p_V.argmax()) == 7][-32:]) / 32
        return p.argmax(-1).tolist(), p.max(-1).values.tolist(), sure

    answer = [None] * min(initial, most)
    while read(answer)[2] < 0.5 and len(answer) < most:
        answer = (answer + [None] * 8)[:most]
    answer = (answer + [7] * 16)[:most]
    start = 0
    while None in answer and 7 not in answer[: answer.index(None)]:
        while None not in answer[start : start + block]:
            start += block
        x, c, sure = read(answer)
        holes = [i for i in range(start, min(start + block, len(answer))) if answer[i] is None]
        settles = [i for i in holes if c[i] > tau_high] or [max(holes, key=lambda i: c[i])]
        for i in settles:
            answer[i] = x[i]
        doubtful = [i for i in holes if i not in settles and c[i] < 0.1]
        if sure < 0.9 and len(answer) < most and doubtful:
            at = min(doubtful, key=lambda i: c[i])
            answer = (answer[:at] + [None] * 8 + answer[at + 1 :])[:most]
    return answer[: answer.index(7)] if 7 in answer else answer


@pytest.mark.parametrize("penalty, scale", [(1.0, 0.0), (1.6, 0.0), (1.0, 0.7), (1.3, 0.7)])
def test_a_growing_answer_is_the_slow_one(penalty, scale):
    rows, lengths = [[1, 2, 2], [3, 7], [4, 5, 6]], [90, 60, 12]
    canvas = build_canvas([prompt + [None] * most for prompt, most in zip(rows, lengths, strict=True)], 0)
    how = dict(initial_length=8, block_length=16, threshold=0.6, end_ids=[7])

    def texts(**more):
        filled = canvas.rows(generate(Ends(alignment="in_place"), canvas, **how, **more).tokens_BL)
        answers = [row[len(prompt) :] for prompt, row in zip(rows, filled, strict=True)]
        return [answer[: answer.index(7)] if 7 in answer else answer for answer in answers]

    expected = [slow_daedal(prompt, most, 8, 16, 0.6, penalty, scale) for prompt, most in zip(rows, lengths, strict=True)]
    assert texts(repetition_penalty=penalty, cfg_scale=scale) == expected
    assert (expected == texts()) == (penalty == 1 and scale == 0)


def test_guidance_costs_a_growing_answer_two_forwards_a_step():
    canvas = build_canvas([[1, 2] + [None] * 20, [3] + [None] * 9], 0)
    steps = list(denoise(HashPredictor(), canvas, initial_length=4, end_ids=[7], cfg_scale=1.0))
    assert [step.nfe for step in steps] == [2 * (step.index + 1) for step in steps]


class Doubts(Ends):
    corruption = "edit"


def slow_edits(row: list[int], first: int, strength: float, rounds: int) -> list[int]:
    """Change all from `first` to the end token where another token, no end and no mask, has p >= strength."""
    stop = row.index(7, first) if 7 in row[first:] else len(row)
    for _ in range(rounds):
        wanted = torch.tensor([[first <= i < stop for i in range(len(row))]])
        if not bool(wanted.any()):
            break
        logits = Doubts(alignment="in_place").predict(torch.tensor([row]), wanted, torch.arange(len(row))[None], None)[:, :23]
        logits[:, 7] = -torch.inf
        sure = torch.softmax(logits, -1).max(-1)
        changed = [int(x) if p >= strength else t for p, x, t in zip(*sure, row[first:stop], strict=True)]
        if changed == row[first:stop]:
            break
        row = row[:first] + changed + row[stop:]
    return row


def test_a_finished_answer_is_polished_as_it_was_written(monkeypatch):
    monkeypatch.setattr(polish, "MOST_ROUNDS", 5)
    rows = [[1, 2, 2] + [None] * 90, [3, 7] + [None] * 60, [4, 5, 6] + [None] * 12, [8, 9]]
    canvas, how = build_canvas(rows, 0), dict(initial_length=8, block_length=16, threshold=0.6, end_ids=[7])
    grown = list(denoise(Doubts(alignment="in_place"), canvas, **how))[-1]
    steps = list(denoise(Doubts(alignment="in_place"), canvas, revision="edits", revision_strength=0.5, **how))
    before, after = canvas.rows(grown.tokens_BL), canvas.rows(steps[-1].tokens_BL)
    assert before != after and grown.nfe < steps[-1].nfe <= grown.nfe + 5 and not bool(steps[-1].masked_BL.any())
    for number, row in enumerate(rows):
        behind = grown.given_back_BL[number, : len(row)].tolist()
        length = max(i for i, given_back in enumerate(behind) if not given_back) + 1
        if number == 0:
            assert length < len(row)  # what the answer might have become is not read
        first = row.index(None) if None in row else len(row)
        assert after[number] == slow_edits(before[number][:length], first, 0.5, 5) + before[number][length:]


@pytest.mark.parametrize("revision", ["gidd", "edits"])
def test_polishing_a_growing_answer_in_a_batch_is_polishing_it_alone(revision, monkeypatch):
    monkeypatch.setattr(polish, "MOST_ROUNDS", 5)
    rows = [[1, 2] + [None] * 30, [3] + [None] * 40, [4, 5, 6] + [None] * 5]
    how = dict(initial_length=8, block_length=8, threshold=0.5, temperature=0.7, seed=2, end_ids=[7], revision=revision, revision_strength=0.4, cfg_scale=0.5)
    together = build_canvas(rows, 0, row_keys=[4, 5, 6])
    filled = together.rows(generate(Doubts(), together, **how).tokens_BL)
    for number, row in enumerate(rows):
        alone = build_canvas([row], 0, row_keys=[4 + number])
        assert alone.rows(generate(Doubts(), alone, **how).tokens_BL) == [filled[number]]


@pytest.mark.parametrize("revision", ["remdm", "p2", "wino"])
def test_a_revision_with_a_schedule_of_its_own_is_refused_where_an_answer_grows(revision):
    with pytest.raises(ValueError, match="schedule of its own.*gidd or edits"):
        denoise(denoiser_of("llama"), build_canvas([[1, None]], 0), initial_length=4, end_ids=[7], revision=revision)
    with pytest.raises(ValueError, match="belongs to a revision"):
        denoise(denoiser_of("llama"), build_canvas([[1, None]], 0), initial_length=4, end_ids=[7], revision_strength=0.5)


@pytest.mark.parametrize(
    "row, settings, message",
    [
        ([1, None], dict(), "eos_token_id"),
        ([1, None, 2], dict(end_ids=[7]), "behind its gap"),
        ([1, None, 2, None], dict(end_ids=[7]), "several gaps"),
        ([1, None], dict(end_ids=[7], num_steps=3), "steps"),
        ([1, None], dict(end_ids=[7], initial_length=0), "at least 1"),
    ],
)
def test_what_cannot_grow_is_refused(row, settings, message):
    with pytest.raises(ValueError, match=message):
        denoise(HashPredictor(), build_canvas([row], 0), **{"initial_length": 4, **settings})


# Gaps of unknown length.


class Counts(HashPredictor):
    """Sure of 2 everywhere, except that the token after the gap fits only when the gap has `right` tokens."""

    def __init__(self, right):
        super().__init__(alignment="in_place")
        self.right = right

    def predict(self, tokens_BL, wanted_BL, positions_BL, segments_BL):
        rows_N, columns_N = wanted_BL.nonzero(as_tuple=True)
        logits_NV = torch.zeros(len(rows_N), self.rows_of_output)
        logits_NV[:, 2] = 4.0
        lengths_B = (tokens_BL == 2).sum(dim=1)
        fits_N = (lengths_B[rows_N] == self.right) & ~(tokens_BL == 9).any(dim=1)[rows_N]
        logits_NV[fits_N, 9] = 9.0
        return logits_NV


@pytest.mark.parametrize("right", [2, 4, 5])
def test_the_length_that_lets_the_text_join_is_chosen(right):
    def fill(rows):
        filled = [[2 if token is None else token for token in row] for row in rows]
        return filled, [[0.9] * len(row) for row in rows]

    rows = [[1, (2, 6), 9, 9], [1, (3, 3), 9, (2, 6)]]
    first, second = choose_lengths(Counts(right), rows, fill, "cpu")
    assert first == [1] + [None] * right + [9, 9]
    assert second[:5] == [1, None, None, None, 9] and 2 <= len(second) - 5 <= 6


def test_candidates_are_few_and_hold_both_ends():
    assert candidates(3, 3) == [3] and candidates(4, 7) == [4, 5, 6, 7]
    spread = candidates(4, 240)
    assert spread[0] == 4 and spread[-1] == 240 and len(spread) <= 8
    for low, high in ((0, 3), (5, 4)):
        with pytest.raises(ValueError, match="bounds"):
            candidates(low, high)


def test_a_gap_with_bounds_is_filled_with_as_many_tokens_as_fit():
    from dlmconvert.sampling.api import infill

    rows = [[1, (2, 6), 9, 9], [1, 4, None, 5]]
    first, second = infill(Counts(4), rows, device="cpu")
    assert first == [1, 2, 2, 2, 2, 9, 9] and len(second) == 4 and second[:2] == [1, 4]
    alone = infill(HashPredictor(), [[1, (2, 9), 3, 4, (1, 4)]], device="cpu")[0]
    assert alone == infill(HashPredictor(), [[1, (2, 9), 3, 4, (1, 4)], [5, None, 6]], device="cpu")[0]
    assert 1 + 2 + 2 + 1 <= len(alone) <= 1 + 9 + 2 + 4


def test_bounds_in_a_text():
    from dlmconvert.sampling.text import parse_gaps

    assert parse_gaps("a[[MASK:4-24]]b[[MASK:2]]") == ["a", (4, 24), "b", 2]
    for text, message in (("[[MASK:5-4]]", "must rise"), ("[[MASK:0-4]]", "at least 1"), ("[[MASK:4-]]", "malformed")):
        with pytest.raises(ValueError, match=message):
            parse_gaps(text)


def test_a_row_with_nothing_to_grow_stands_beside_one_that_grows():
    canvas = build_canvas([[1, 2], [3] + [None] * 12], 0)
    last = list(denoise(HashPredictor(), canvas, initial_length=4, end_ids=[7]))[-1]
    assert canvas.rows(last.tokens_BL)[0] == [1, 2] and not bool(last.masked_BL.any())
