"""Revision inside the blocks of a block model: against slow decoders that share no code with it, and what must never change."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial

import pytest
import torch
from tiny_decoders import MASK, denoiser_of, penalise, sees

from dlmconvert.sampling import polish
from dlmconvert.sampling.cache import BlockReader
from dlmconvert.sampling.canvas import build_canvas
from dlmconvert.sampling.denoise import denoise, generate

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14, 15], [16]]
NEW, LENGTH = 20, 11
MODELS = [(pattern, alignment) for pattern in ("block_causal", "context_causal", "causal_in_block") for alignment in ("shift", "in_place")]
SETTINGS = [
    dict(revision="remdm", revision_strength=0.4, repetition_penalty=1.5),
    dict(revision="remdm", num_steps=24, cfg_scale=0.5),
    dict(revision="p2"),
    dict(revision="p2", num_steps=12, repetition_penalty=1.5),
    dict(revision="wino", threshold=0.002, revision_strength=0.3),
    dict(revision="wino", threshold=0.002, revision_strength=0.3, cfg_scale=0.5, repetition_penalty=1.5),
    dict(revision="gidd", order="confidence"),
    dict(revision="gidd", order="random", num_steps=14, revision_strength=0.8, cfg_scale=0.5),
    dict(revision="edits", revision_strength=0.004, order="entropy", threshold=0.003, repetition_penalty=1.2),
]


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch):
    """A random model is never content with its text."""
    monkeypatch.setattr(polish, "MOST_ROUNDS", 10)


def doubting(*choices, **more):
    denoiser = denoiser_of(*choices, **more)
    denoiser.spec = replace(denoiser.spec, corruption="gidd")
    return denoiser



@torch.no_grad()
def log_p(denoiser, tokens: list[int], positions: list[int], seen: list[list[bool]], judged: list[int], penalty: float) -> torch.Tensor:
    mask = torch.zeros(len(tokens), len(tokens)).masked_fill(~torch.tensor(seen), torch.finfo(torch.float32).min)
    logits = denoiser.model(input_ids=torch.tensor([tokens]), position_ids=torch.tensor([positions]), attention_mask=mask[None, None], use_cache=False).logits[0]
    logits[:, MASK] = float("-inf")
    penalise(logits, judged, tokens, penalty)
    return torch.log_softmax(logits, -1)


def slow(denoiser, prompt: list[int], revise, penalty: float) -> list[int]:
    """Block after block; revise(ask, state, todo) fills the places `todo` of the block at the end of `state`. ask(state, held): log p of
    each column, then of a mask for each of the columns `held` that sees what its place sees but that column."""
    pattern, lag = denoiser.spec.attention, int(denoiser.spec.alignment == "shift")
    origin, end = 0 if pattern == "block_causal" else len(prompt), len(prompt) + NEW
    tokens = list(prompt)
    while len(tokens) < end:
        start = origin + (len(tokens) - origin) // LENGTH * LENGTH
        stop = min(start + LENGTH, end)

        def ask(state, held=(), start=start):
            places = [*range(len(state)), *(i - lag for i in held)]
            seen = [[sees(pattern, q, k, origin, LENGTH, start) for k in range(len(state))] for q in places]
            for number, i in enumerate(held, start=len(state)):
                seen[number][i] = False
            seen = [row + [number == len(state) + shadow for shadow in range(len(held))] for number, row in enumerate(seen)]
            return log_p(denoiser, state + [MASK] * len(held), places, seen, [*range(lag, len(state) + lag), *held], penalty)

        if len(tokens) == start and lag:  # the first token of a block: from the clean text
            seen = [[sees(pattern, q, k, origin, LENGTH, len(tokens)) for k in range(len(tokens))] for q in range(len(tokens))]
            tokens.append(int(log_p(denoiser, tokens, list(range(len(tokens))), seen, list(range(1, len(tokens) + 1)), penalty)[-1].argmax()))
        todo = list(range(len(tokens), stop))
        tokens = tokens + [MASK] * len(todo)
        if todo:
            tokens = revise(ask, tokens, todo, lag)
    return tokens


def slow_p2(ask, state, todo, lag):
    for step in range(len(todo)):
        p = ask(state)
        tokens = {i: int(p[i - lag].argmax()) if state[i] == MASK else state[i] for i in todo}
        ranked = sorted(todo, key=lambda i: -float(p[i - lag, tokens[i]]))
        for rank, i in enumerate(ranked):
            state[i] = tokens[i] if rank <= step else MASK
    return state


def slow_wino(ask, state, todo, lag, threshold=0.002, doubt=0.3):
    last = 30
    while any(state[i] == MASK for i in todo):
        holes, standing = [i for i in todo if state[i] == MASK], [i for i in todo if state[i] != MASK]
        p = ask(state, standing).exp()
        order = sorted(holes, key=lambda i: -float(p[i - lag].max()))
        count = min(max(sum(float(p[i - lag].max()) > threshold for i in holes), 1), min(max(len(holes) * 7 // 10, 5), 20), len(holes))
        back = {i: float(p[len(state) + number, state[i]]) for number, i in enumerate(standing)}
        doubted = sorted((i for i in standing if back[i] < doubt), key=lambda i: back[i])[: last - 1] if count > 1 else []
        for i in order[:count]:
            state[i] = int(p[i - lag].argmax())
        for i in doubted:
            state[i] = MASK
        last = count
    return state


def slow_polish(ask, state, todo, lag, revision, strength):
    """Most confident first, then rounds on the finished block."""
    while holes := [i for i in todo if state[i] == MASK]:
        p = ask(state)
        best = max(holes, key=lambda i: float(p[i - lag].max()))
        state[best] = int(p[best - lag].argmax())
    most, since = -1.0, 0
    for _ in range(polish.MOST_ROUNDS):
        p = ask(state)
        other = {i: (float(p[i - lag].max().exp()), int(p[i - lag].argmax())) for i in todo if int(p[i - lag].argmax()) != state[i]}
        accuracy = 1 - len(other) / len(todo)
        since = 0 if accuracy > most + 1e-9 else since + 1
        most = max(most, accuracy)
        changes = [i for i in other if other[i][0] >= strength] if revision == "edits" else [max(other, key=lambda i: (other[i][0], -i))] if other and since < 32 else []
        if not changes:
            break
        for i in changes:
            state[i] = other[i][1]
    return state


SLOW = [
    (dict(revision="p2"), slow_p2),
    (dict(revision="wino", threshold=0.002, revision_strength=0.3), slow_wino),
    *((dict(revision=name, revision_strength=strength, order="confidence"), partial(slow_polish, revision=name, strength=strength)) for name, strength in (("gidd", 0.0), ("edits", 0.004))),
]


@pytest.mark.parametrize("pattern, alignment", MODELS)
def test_they_are_the_slow_ones(pattern, alignment):
    denoiser = doubting("llama", pattern, alignment, LENGTH)
    canvas = build_canvas([prompt + [None] * NEW for prompt in PROMPTS], 0)
    for (settings, revise), penalty in itertools.product(SLOW, (1.0, 1.5)):
        filled = canvas.rows(generate(denoiser, canvas, repetition_penalty=penalty, **settings).tokens_BL)
        assert filled == [slow(denoiser, prompt, revise, penalty) for prompt in PROMPTS], (settings, penalty)


@pytest.mark.parametrize("pattern, alignment", MODELS)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_rows_caches_and_earlier_blocks(pattern, alignment, settings):
    """A row of a batch is the row alone, with the cache and without; a step changes nothing outside of the block under work."""
    denoiser = doubting("gpt2" if alignment == "shift" else "llama", pattern, alignment, LENGTH)
    rows = [prompt + [None] * NEW for prompt in PROMPTS] + [[3, 4]]
    canvas = build_canvas(rows, 0, row_keys=[7, 8, 9, 10])
    how = dict(temperature=0.8, seed=2, end_ids=list(range(0, 290, 12)), **settings)
    steps = list(denoise(denoiser, canvas, **how))
    assert not bool(steps[-1].masked_BL.any())
    for number, row in enumerate(rows):
        origin = 0 if pattern == "block_causal" else next((i for i, token in enumerate(row) if token is None), 0)
        latest = -1
        for before, after in itertools.pairwise(steps):
            changed_L = (before.tokens_BL != after.tokens_BL)[number] & ~after.given_back_BL[number]
            blocks = {(column - origin) // LENGTH for column in changed_L.nonzero()[:, 0].tolist()}
            assert len(blocks) <= 1 and min(blocks, default=latest) >= latest
            latest = max(blocks, default=latest)
    filled = canvas.rows(steps[-1].tokens_BL)
    assert canvas.rows(generate(denoiser, canvas, cache="none", **how).tokens_BL) == filled
    for number, row in enumerate(rows):
        alone = build_canvas([row], 0, row_keys=[7 + number])
        assert alone.rows(generate(denoiser, alone, **how).tokens_BL) == [filled[number]]


def test_tokens_of_the_block_do_change_again():
    denoiser = denoiser_of("llama", "block_causal", "in_place", LENGTH)
    for settings in (SETTINGS[0], SETTINGS[2], SETTINGS[4], SETTINGS[5]):
        steps = list(denoise(denoiser, build_canvas([[5] + [None] * 32], 0), temperature=1.0, **settings))
        assert any(bool((after.masked_BL & ~before.masked_BL).any()) for before, after in itertools.pairwise(steps)), settings
    denoiser.spec = replace(denoiser.spec, corruption="gidd")
    for settings in SETTINGS[6:]:
        steps = list(denoise(denoiser, build_canvas([[5] + [None] * 32], 0), temperature=1.0, **settings))
        changed = [((before.tokens_BL != after.tokens_BL) & ~before.masked_BL & ~after.masked_BL).nonzero()[:, 1] // LENGTH for before, after in itertools.pairwise(steps)]
        assert {int(block) for blocks in changed for block in blocks} == {0, 1, 2}, "each block is polished"


def test_a_row_ends_with_the_block_that_holds_its_end():
    denoiser = doubting("llama", "block_causal", "in_place", LENGTH)
    canvas = build_canvas([[5] + [None] * 43], 0)
    for settings in SETTINGS[:6]:
        whole = generate(denoiser, canvas, **settings)
        end = int(whole.tokens_BL[0, LENGTH + 1])  # of the second block
        *_, last = denoise(denoiser, canvas, end_ids=[end], **settings)
        first = whole.tokens_BL[0].tolist().index(end, 1)
        kept = (first // LENGTH + 1) * LENGTH
        assert last.tokens_BL[0, :kept].tolist() == whole.tokens_BL[0, :kept].tolist()
        assert set(last.tokens_BL[0, kept:].tolist()) == {end} and last.nfe < whole.nfe


@pytest.mark.parametrize("alignment", ["shift", "in_place"])
@pytest.mark.parametrize("settings", [dict(revision="gidd"), dict(revision="edits", revision_strength=0.004)], ids=str)
def test_polishing_stops_at_the_end_of_a_text(settings, alignment):
    """The block that holds the end token is polished left of it and has no other one; nothing right of it is asked for."""
    denoiser = doubting("llama", "block_causal", alignment, LENGTH)
    canvas = build_canvas([[5] + [None] * 43, [6, 7] + [None] * 43], 0)
    whole = generate(denoiser, canvas, order="left_to_right")
    end = int(whole.tokens_BL[0, LENGTH + 5])
    steps = list(denoise(denoiser, canvas, order="left_to_right", end_ids=[end], **settings))
    plain = list(denoise(denoiser, canvas, order="left_to_right", end_ids=[end]))
    assert not bool(steps[-1].masked_BL.any()) and [step.index for step in steps] == list(range(len(steps))) and steps[-1].nfe > plain[-1].nfe
    row = steps[-1].tokens_BL[0].tolist()
    first = row.index(end, 1)
    assert set(row[first:44]) == {end}
    given_back_BL = torch.stack([step.given_back_BL for step in steps]).any(0)
    assert given_back_BL[0].nonzero()[:, 0].tolist() == list(range(first + 1, 44))
    assert bool((torch.stack([step.committed_BL for step in steps]).any(0) | given_back_BL)[canvas.masked_BL].all())


@pytest.mark.parametrize("pattern, alignment", MODELS)
def test_what_polishing_reads_is_a_state_of_training(pattern, alignment, monkeypatch):
    """A block full of tokens behind clean text: the logits of the two-stream forward, whose noised copy holds those tokens."""
    denoiser = doubting("llama", pattern, alignment, LENGTH)
    length = 3 * LENGTH  # a prompt of whole blocks: where they begin is the same for all patterns
    canvas = build_canvas([PROMPTS[0] + PROMPTS[1] + [None] * (length - LENGTH)], 0)
    told, read = [], BlockReader.read

    def listen(reader, tokens_BL, asked):
        logits_NV = read(reader, tokens_BL, asked)
        if not bool((tokens_BL == MASK)[asked.mask_BL].any()):
            told.append((tokens_BL.clone(), asked.mask_BL.clone(), logits_NV))
        return logits_NV

    monkeypatch.setattr(BlockReader, "read", listen)
    x_0_BL = generate(denoiser, canvas, revision="gidd", order="confidence").tokens_BL
    positions_BL, seen_blocks = torch.arange(length)[None], set()
    for x_BL, mask_BL, logits_NV in told:
        assert bool((x_BL < MASK)[mask_BL].all())
        expected_NV = denoiser.predict_blocks(x_BL, x_0_BL, mask_BL, torch.zeros_like(mask_BL), positions_BL)
        torch.testing.assert_close(logits_NV, expected_NV, atol=1e-5, rtol=1e-5)
        blocks = set((mask_BL.nonzero()[:, 1] // LENGTH).tolist())
        assert len(blocks) == 1 and not (alignment == "shift" and bool(mask_BL[:, ::LENGTH].any()))
        seen_blocks |= blocks
    assert seen_blocks == {1, 2}


@pytest.mark.parametrize("settings", SETTINGS[:6], ids=str)
def test_a_bidirectional_model_may_be_revised_in_blocks(settings):
    denoiser = denoiser_of("llama")
    rows = [[5, 6] + [None] * 12, [7, None, None, 8, None, None, None, 9], [1] + [None] * 3]
    canvas = build_canvas(rows, 0, row_keys=[4, 5, 6])
    how = dict(block_length=5, temperature=0.7, **settings)
    steps = list(denoise(denoiser, canvas, **how))
    for before, after in itertools.pairwise(steps):
        number_BL = (canvas.masked_BL.cumsum(1) - 1) // 5
        block_B = number_BL.masked_fill(~(canvas.masked_BL & (before.masked_BL | (before.tokens_BL != after.tokens_BL))), 99).min(1).values
        assert bool(((before.tokens_BL != after.tokens_BL) <= (number_BL == block_B[:, None])).all())
    for number, row in enumerate(rows):
        alone = build_canvas([row], 0, row_keys=[4 + number])
        assert alone.rows(generate(denoiser, alone, **how).tokens_BL) == [canvas.rows(steps[-1].tokens_BL)[number]]


@pytest.mark.parametrize(
    "settings, message",
    [(dict(revision="p2", cache="dual"), "block model has an exact one"), (dict(revision="p2", block_length=3), "trained with blocks of 4")],
)
def test_what_a_block_model_cannot_do_is_refused(settings, message):
    denoiser = doubting("llama", "block_causal", "in_place", 4)
    with pytest.raises(ValueError, match=message):
        denoise(denoiser, build_canvas([[1, None]], 0), **settings)
