"""Revision beside the prefix and dual cache of bidirectional models: against slow ones on plain forwards of transformers."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial

import pytest
import torch
from test_approximate_cache import StaleModel
from tiny_decoders import MASK, denoiser_of, penalise

from dlmconvert.diffusion.randomness import SAMPLE_ORDER, SAMPLE_TOKEN, counter_gumbel, counter_uniform
from dlmconvert.sampling import polish
from dlmconvert.sampling.canvas import build_canvas, canvas_after_prompts
from dlmconvert.sampling.denoise import denoise, generate

BLOCK = 4
ROWS = [[5, None, None, 6, 7, None, None, None, 8, 9, None], [1, 2] + [None] * 9, [3] + [None] * 4]
MODELS = [("gpt2", "shift"), ("llama", "in_place"), ("llama", "shift")]
KINDS = ("prefix", "dual")
SETTINGS = [
    dict(revision="remdm", revision_strength=0.5, num_steps=12, repetition_penalty=1.5),
    dict(revision="remdm", revision_strength=0.5, cfg_scale=0.5),
    dict(revision="p2", repetition_penalty=1.5),
    dict(revision="p2", num_steps=7, cfg_scale=0.5),
    dict(revision="wino", threshold=0.002, revision_strength=0.3),
    dict(revision="wino", threshold=0.002, revision_strength=0.3, cfg_scale=0.5, repetition_penalty=1.5),
    dict(revision="gidd", order="confidence", repetition_penalty=1.5),
    dict(revision="edits", revision_strength=0.004, threshold=0.003),
]


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch):
    """A random model is never content with its text."""
    monkeypatch.setattr(polish, "MOST_ROUNDS", 10)


def doubting(family, alignment):
    denoiser = denoiser_of(family, alignment=alignment)
    denoiser.spec = replace(denoiser.spec, corruption="gidd")
    return denoiser


class Guided(StaleModel):
    """un + (s + 1) (cond - un), by a model asked twice: un does not see the given tokens of the row."""

    def __init__(self, denoiser, row, scale):
        super().__init__(denoiser)
        self.row, self.scale, self.other = row, scale, StaleModel(denoiser)

    def logits(self, state, window, held=()):
        un = [token if given is None else MASK for token, given in zip(state, self.row, strict=True)]
        cond, un = super().logits(state, window, held), self.other.logits(un, window, held)
        return un + (self.scale + 1) * (cond - un)


def slow(denoiser, row, kind, revise, length, scale=0.0, penalty=1.0) -> list[int]:
    """Part after part; revise(ask, state, block, lag). ask(held): p of each column, then of a mask that does not see column i of `held`. The
    first question of a part is a full forward, and without a cache (kind None) each."""
    lag = int(denoiser.alignment == "shift")
    state = [MASK if token is None else token for token in row]
    holes = [i for i, token in enumerate(row) if token is None]
    model = Guided(denoiser, row, scale) if scale else StaleModel(denoiser)
    for start in range(0, len(holes), length):
        block = holes[start : start + length]
        fresh = [True]

        def ask(held=(), block=block, fresh=fresh):
            window = None if fresh or kind is None else range(max(block[0] - lag, 0), len(row) if kind == "prefix" else block[-1] + 1)
            fresh.clear()
            logits = model.logits(state, window, tuple(held))
            logits[:, MASK] = float("-inf")
            penalise(logits, [*range(lag, len(state) + lag), *held], state, penalty)
            return torch.softmax(logits, -1)

        revise(ask, state, block, lag)
    return state


def slow_p2(ask, state, block, lag):
    for step in range(len(block)):
        p = ask()
        tokens = {i: int(p[i - lag].argmax()) if state[i] == MASK else state[i] for i in block}
        for rank, i in enumerate(sorted(block, key=lambda i: -float(p[i - lag, tokens[i]]))):
            state[i] = tokens[i] if rank <= step else MASK


def slow_wino(ask, state, block, lag, threshold=0.02, doubt=0.3):
    last, length = 30, len(state)
    while any(state[i] == MASK for i in block):
        holes, standing = [i for i in block if state[i] == MASK], [i for i in block if state[i] != MASK]
        p = ask(standing)
        order = sorted(holes, key=lambda i: -float(p[i - lag].max()))
        count = min(max(sum(float(p[i - lag].max()) > threshold for i in holes), 1), min(max(len(holes) * 7 // 10, 5), 20), len(holes))
        back = {i: float(p[length + number, state[i]]) for number, i in enumerate(standing)}
        doubted = sorted((i for i in standing if back[i] < doubt), key=lambda i: back[i])[: last - 1] if count > 1 else []
        for i in order[:count]:
            state[i] = int(p[i - lag].argmax())
        for i in doubted:
            state[i] = MASK
        last = count


def slow_remdm(ask, state, block, lag, row, key, clock, cap, num_steps=None, temperature=0.0):
    """clock: the steps of the row, of which a block has its share."""
    holes = [i for i, token in enumerate(row) if token is None]
    first, all_steps = holes.index(block[0]), num_steps or len(holes)
    steps_of_block = all_steps * (first + len(block)) // len(holes) - all_steps * first // len(holes)
    for j in range(steps_of_block):
        step, alpha_t, alpha_s = next(clock), j / steps_of_block, (j + 1) / steps_of_block
        sigma = min(cap, 1, (1 - alpha_s) / alpha_t if alpha_t else 1)
        r = (alpha_s - (1 - sigma) * alpha_t) / (1 - alpha_t)
        u = {i: float(counter_uniform(SAMPLE_ORDER, 0, key, step, i, 4)) for i in block}
        shown = [i for i in block if state[i] == MASK and u[i] < r]
        hidden = [i for i in block if state[i] != MASK and u[i] < sigma]
        p = ask() if shown else None
        tokens = {}
        for i in shown:
            noise = [counter_gumbel(SAMPLE_TOKEN, 0, key, step, i, v) for v in range(p.shape[1])] if temperature else None
            tokens[i] = int((p[i - lag].log() / temperature + torch.stack(noise)).argmax() if temperature else p[i - lag].argmax())
        for i in hidden:
            state[i] = MASK
        for i in shown:
            state[i] = tokens[i]


GAPS = [*ROWS, [5, None, None, 6, *[None] * 16, 7, None]]


@pytest.mark.parametrize("length", [8, 30])
@pytest.mark.parametrize("kind", [None, *KINDS])
@pytest.mark.parametrize("family, alignment", MODELS)
def test_remdm_is_the_slow_one(kind, family, alignment, length):
    denoiser, canvas = denoiser_of(family, alignment=alignment), build_canvas(GAPS, 0)
    for scale, penalty, how in ((0.0, 1.0, dict(num_steps=11, temperature=0.7)), (0.0, 1.5, {}), (0.5, 1.0, dict(num_steps=30))):
        both = dict(cfg_scale=scale, repetition_penalty=penalty, **how)
        steps = list(denoise(denoiser, canvas, revision="remdm", revision_strength=0.6, block_length=length, cache=kind, **both))
        slow_ones = [partial(slow_remdm, row=row, key=key, clock=itertools.count(), cap=0.6, **how) for key, row in enumerate(GAPS)]
        expected = [slow(denoiser, row, kind, revise, length, scale, penalty) for row, revise in zip(GAPS, slow_ones, strict=True)]
        assert canvas.rows(steps[-1].tokens_BL) == expected, (scale, how)
        assert any(bool((after.masked_BL & ~before.masked_BL).any()) for before, after in itertools.pairwise(steps)), "nothing was masked again"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family, alignment", MODELS)
def test_the_slow_ones_agree_also_for_gaps(kind, family, alignment):
    denoiser = denoiser_of(family, alignment=alignment)
    canvas = build_canvas(GAPS, 0)
    for settings, revise in ((dict(revision="p2"), slow_p2), (dict(revision="wino", threshold=0.02, revision_strength=0.3), slow_wino)):
        for scale, penalty in ((0.5, 1.0), (0.5, 1.5), (0.0, 1.0), (0.0, 1.5)):
            steps = list(denoise(denoiser, canvas, block_length=8, cache=kind, cfg_scale=scale, repetition_penalty=penalty, **settings))
            expected = [slow(denoiser, row, kind, revise, 8, scale, penalty) for row in GAPS]
            assert canvas.rows(steps[-1].tokens_BL) == expected, (settings, scale, penalty)
    assert any(bool((after.masked_BL & ~before.masked_BL).any()) for before, after in itertools.pairwise(steps)), "nothing was ever doubted"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family, alignment", MODELS)
def test_a_block_that_is_the_whole_canvas_is_the_uncached_one(kind, family, alignment):
    """The window then holds every column, and nothing is ever stale."""
    denoiser = doubting(family, alignment)
    row = [5] + [None] * 10 if alignment == "shift" else [None, 5, None, 6, *[None] * 7]
    for settings in (*SETTINGS[:6], SETTINGS[7]):
        plain, cached = (generate(denoiser, build_canvas([row], 0), cache=cache, temperature=0.7, **settings) for cache in ("none", kind))
        assert torch.equal(plain.tokens_BL, cached.tokens_BL) and plain.nfe == cached.nfe, settings


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("alignment", ["shift", "in_place"])
def test_a_row_of_a_batch_is_the_row_alone_and_other_blocks_stay(kind, settings, alignment):
    denoiser = doubting("llama", alignment)
    rows = [*ROWS, [4, 5]]
    canvas = build_canvas(rows, 0, row_keys=[4, 5, 6, 7])
    how = dict(block_length=BLOCK, temperature=0.7, cache=kind, end_ids=list(range(0, 290, 40)), **settings)
    steps = list(denoise(denoiser, canvas, **how))
    assert not bool(steps[-1].masked_BL.any())
    number_BL = (canvas.masked_BL.cumsum(1) - 1) // BLOCK
    latest = torch.full((len(rows),), -1)
    for before, after in itertools.pairwise(steps):
        changed_BL = (before.tokens_BL != after.tokens_BL) & ~after.given_back_BL
        assert bool((changed_BL <= canvas.masked_BL).all())
        if settings["revision"] in ("gidd", "edits"):  # the finished text
            continue
        first_B, last_B = number_BL.masked_fill(~changed_BL, 99).amin(1), number_BL.masked_fill(~changed_BL, -1).amax(1)
        assert bool(((first_B == last_B) | (last_B == -1)).all()) and bool((last_B[last_B >= 0] >= latest[last_B >= 0]).all())
        latest = torch.maximum(latest, last_B)
    filled = canvas.rows(steps[-1].tokens_BL)
    assert all(MASK not in row for row in filled)
    for number, row in enumerate(rows):
        alone = build_canvas([row], 0, row_keys=[4 + number])
        assert alone.rows(generate(denoiser, alone, **how).tokens_BL) == [filled[number]]


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_padded_on_the_left_are_those_on_the_right(kind):
    denoiser, prompts = denoiser_of("llama"), [[5, 6, 7, 8, 9], [12, 13], [16]]
    longest = max(map(len, prompts))
    inputs_BP = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    seen_BP = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    left, right = canvas_after_prompts(inputs_BP, seen_BP, 9), build_canvas([p + [None] * 9 for p in prompts], 0)
    for settings in SETTINGS[:6]:
        of_left, of_right = (c.rows(generate(denoiser, c, cache=kind, block_length=BLOCK, **settings).tokens_BL) for c in (left, right))
        assert of_left == of_right, settings


def test_guidance_of_wino_is_that_of_the_logits():
    """Of masks and of the shadow."""
    denoiser = denoiser_of("llama", alignment="in_place")
    for row in ROWS:
        found = generate(denoiser, build_canvas([row], 0), revision="wino", threshold=0.02, revision_strength=0.3, cfg_scale=0.5)
        assert found.tokens_BL.tolist() == [slow(denoiser, row, None, slow_wino, len(row), 0.5)]
