"""APD against a slow one, and its AR helper read against stored keys."""

from __future__ import annotations

import pytest
import torch
from tiny_decoders import denoiser_of
from tiny_predictors import HashPredictor

from dlmconvert.sampling.canvas import build_canvas, canvas_after_prompts
from dlmconvert.sampling.denoise import denoise, generate


class Causal(HashPredictor):
    """An AR model: logits are a hash of what stands left of the position."""

    def __init__(self, salt=3):
        super().__init__()
        self.salt = salt

    def predict(self, tokens_BL, wanted_BL, positions_BL, segments_BL):
        rows_N, columns_N = wanted_BL.nonzero(as_tuple=True)
        logits = []
        for row, column in zip(rows_N.tolist(), columns_N.tolist(), strict=True):
            left = [int(t) for t, real in zip(tokens_BL[row, :column], _real(segments_BL, tokens_BL)[row, :column], strict=True) if real]
            generator = torch.Generator().manual_seed(hash((self.salt, *left)) % (1 << 31))
            logits.append(4 * torch.rand(self.rows_of_output, generator=generator))
        return torch.stack(logits)


def _real(segments_BL, tokens_BL):
    return torch.ones_like(tokens_BL, dtype=torch.bool) if segments_BL is None else segments_BL == 0


def slow_apd(row: list[int | None], lookahead: int, weight: float, penalty: float = 1.0, scale: float = 0.0) -> list[int]:
    state = [23 if t is None else t for t in row]
    diffusion, small = HashPredictor(), Causal()
    while 23 in state:
        holes = [i for i, t in enumerate(state) if t == 23][:lookahead]

        def log_p(model, tokens, place, read, scale=0.0):
            wanted = torch.tensor([[i == place for i in range(len(tokens))]])
            hidden = [23 if given is not None else t for given, t in zip(row, tokens, strict=True)]
            logits, un = (model.predict(torch.tensor([x]), wanted, torch.arange(len(tokens))[None], None)[0, :23] for x in (tokens, hidden))
            logits = un + (scale + 1) * (logits - un) if scale else logits
            for token in set(read) - {23}:
                logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
            return torch.log_softmax(logits, -1)

        of_diffusion = [log_p(diffusion, state, i, state, scale) for i in holes]
        drafted = list(state)
        for i, p in zip(holes, of_diffusion, strict=True):
            drafted[i] = int(p.argmax())
        for number, (i, p) in enumerate(zip(holes, of_diffusion, strict=True)):
            target = weight * p + (1 - weight) * log_p(small, drafted, i, drafted[:i])
            if number and int(target.argmax()) != drafted[i]:
                break
            state[i] = drafted[i]
    return state


@pytest.mark.parametrize("penalty, scale", [(1.0, 0.0), (2.0, 0.0), (1.0, 0.8), (1.5, 1.5)])
@pytest.mark.parametrize("weight", [0.0, 0.6, 1.0])
def test_apd_is_the_slow_one(weight, penalty, scale):
    rows = [[3, 4, 4] + [None] * 14, [2] + [None] * 4, [5, 6]]
    canvas = build_canvas(rows, 0)
    done = generate(HashPredictor(), canvas, helper=Causal(), helper_weight=weight, draft_length=4, repetition_penalty=penalty, cfg_scale=scale)
    expected = [slow_apd(row, 4, weight, penalty, scale) for row in rows]
    assert canvas.rows(done.tokens_BL) == expected
    assert penalty == 1 or scale or expected != [slow_apd(row, 4, weight) for row in rows]
    if weight == 1.0:
        assert done.nfe == (8 if scale else 4)


def test_apd_above_temperature_0_in_a_batch_is_the_row_alone():
    rows = [[3, 4] + [None] * 9, [2] + [None] * 4]
    how = dict(helper=Causal(), draft_length=4, temperature=1.0, seed=1, end_ids=[7], repetition_penalty=1.5)
    together = build_canvas(rows, 0, row_keys=[2, 3])
    filled = together.rows(generate(HashPredictor(), together, **how).tokens_BL)
    for number, row in enumerate(rows):
        alone = build_canvas([row], 0, row_keys=[2 + number])
        assert alone.rows(generate(HashPredictor(), alone, **how).tokens_BL) == [filled[number]]


# A helper that computes windows.

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14, 15], [16]]
NEW = 11


class OnlyPredicts:
    """A helper that is asked by a mask."""

    def __init__(self, helper):
        self.predict = helper.predict


class Counted:
    """A helper that counts the columns which it computes."""

    attention, alignment, num_columns = "causal", "shift", 0

    def __init__(self, helper):
        self.helper, self.new_store = helper, helper.new_store

    def forward_columns(self, tokens_BQ, *rest):
        self.num_columns += tokens_BQ.numel()
        return self.helper.forward_columns(tokens_BQ, *rest)


HOW = {
    "greedy": dict(draft_length=4),
    "one at a time": dict(draft_length=1, helper_weight=0.0),
    "longer than the gap": dict(draft_length=30, helper_weight=0.8),
    "hot": dict(draft_length=4, temperature=0.7, seed=3, repetition_penalty=1.4),
    "hot, with ends": dict(draft_length=3, temperature=1.0, top_p=0.9, seed=5, helper_weight=0.9, end_ids=list(range(0, 290, 7))),
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("family, helper_family, alignment", [("llama", "gpt2", "shift"), ("gpt2", "mistral", "in_place")])
def test_a_helper_with_stored_keys_says_what_it_says_without(family, helper_family, alignment, how):
    model, helper = denoiser_of(family, "bidirectional", alignment), denoiser_of(helper_family, "causal")
    rows = [p + [None] * (NEW - 2 * number) for number, p in enumerate(PROMPTS)] + [[3, 4]]
    canvas = build_canvas(rows, 0, row_keys=[7, 8, 9, 10])
    expected = [step.tokens_BL for step in denoise(model, canvas, helper=OnlyPredicts(helper), **HOW[how])]
    steps = list(denoise(model, canvas, helper=helper, **HOW[how]))
    assert len(steps) == len(expected) >= 2 and not bool(steps[-1].masked_BL.any())
    assert all(torch.equal(step.tokens_BL, tokens_BL) for step, tokens_BL in zip(steps, expected, strict=True))
    filled = canvas.rows(steps[-1].tokens_BL)
    for number, row in enumerate(rows[:3]):
        alone = build_canvas([row], 0, row_keys=[7 + number])
        assert alone.rows(generate(model, alone, helper=helper, **HOW[how]).tokens_BL) == [filled[number]]


def test_a_helper_with_stored_keys_reads_rows_padded_on_the_left():
    model, helper = denoiser_of("llama"), denoiser_of("qwen3", "causal")
    longest = max(map(len, PROMPTS))
    inputs_BP = torch.tensor([[0] * (longest - len(p)) + p for p in PROMPTS])
    seen_BP = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in PROMPTS])
    left, right = canvas_after_prompts(inputs_BP, seen_BP, NEW), build_canvas([p + [None] * NEW for p in PROMPTS], 0)
    how = dict(helper=helper, draft_length=5, temperature=0.5)
    assert left.rows(generate(model, left, **how).tokens_BL) == right.rows(generate(model, right, **how).tokens_BL)


def test_a_step_computes_as_many_columns_of_the_helper_as_it_drafts():
    model, helper = denoiser_of("llama"), Counted(denoiser_of("llama", "causal"))
    prompt = PROMPTS[0]
    steps = list(denoise(model, build_canvas([prompt + [None] * NEW], 0), helper=helper, draft_length=3, helper_weight=0.0))
    left = [NEW, *(int(step.masked_BL.sum()) for step in steps[:-1])]
    assert helper.num_columns == len(prompt) - 1 + sum(min(3, n) for n in left)  # the prompt once; whole rows would be len(steps) * 18


def test_a_row_needs_a_token_for_the_helper_to_start_from():
    with pytest.raises(ValueError, match="starts with a masked position"):
        denoise(denoiser_of("llama", "bidirectional", "in_place"), build_canvas([[None, None]], 0), helper=denoiser_of("gpt2", "causal"))
