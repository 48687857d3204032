"""Revision: each against a slow, obvious sampler of one row, ReMDM against its enumerated distribution."""

from __future__ import annotations

import itertools

import pytest
import torch
from tiny_decoders import MASK, denoiser_of, penalise
from tiny_predictors import HashPredictor, TablePredictor, chi_square_limit

from dlmconvert.sampling.canvas import build_canvas
from dlmconvert.sampling.denoise import denoise, generate

ROWS = [[3, 4] + [None] * 9, [5, None, None, 6, 7, None, 8], [2] + [None] * 4, [1, 1, 1, None, 1]]
M = 23


def hash_predictor(corruption="masking"):
    predictor = HashPredictor(favourite=M)
    predictor.corruption = corruption
    return predictor


def distribution(state: list[int], place: int, penalty: float = 1.0) -> torch.Tensor:
    """p_V of the hash predictor, over the tokens that exist."""
    wanted = torch.tensor([[i == place for i in range(len(state))]])
    logits_V = HashPredictor().predict(torch.tensor([state]), wanted, torch.arange(len(state))[None], None)[0, :M]
    penalise(logits_V[None], [place], [MASK if token == M else token for token in state], penalty)
    return torch.softmax(logits_V, -1)


@pytest.mark.parametrize("settings", [dict(revision="remdm", num_steps=6), dict(revision="p2", num_steps=5), dict(revision="gidd"), dict(revision="edits")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_of_a_batch_is_the_row_alone_and_given_tokens_stay(settings, temperature):
    how = dict(temperature=temperature, seed=3, order="confidence" if settings["revision"] in ("gidd", "edits") else None, **settings)
    how |= {"revision_strength": 0.3} if settings["revision"] in ("remdm", "edits") else {}
    together = build_canvas(ROWS, 0, row_keys=[10, 11, 12, 13])
    steps = list(denoise(hash_predictor("gidd"), together, **how))
    assert not bool(steps[-1].masked_BL.any())
    before_BL = together.tokens_BL.masked_fill(together.masked_BL, M)
    for step in steps:
        given_BL = ~together.masked_BL
        assert torch.equal(step.tokens_BL[given_BL], together.tokens_BL[given_BL])
        assert bool((step.tokens_BL[step.masked_BL] == M).all()) and bool((step.tokens_BL[~step.masked_BL & together.masked_BL] < M).all())
        changed_BL = (step.tokens_BL != before_BL) & ~step.masked_BL
        assert bool((changed_BL <= step.committed_BL).all())
        before_BL = step.tokens_BL
    filled = together.rows(steps[-1].tokens_BL)
    for number, row in enumerate(ROWS):
        alone = build_canvas([row], 0, row_keys=[10 + number])
        assert alone.rows(generate(hash_predictor("gidd"), alone, **how).tokens_BL)[0] == filled[number]


@pytest.mark.parametrize("revision, strength", [("gidd", 1.0), ("edits", 0.01)])
@pytest.mark.parametrize("pattern, block_length", [("bidirectional", None), ("block_causal", 3)])
def test_polishing_asks_the_logits_hook_as_well(revision, strength, pattern, block_length):
    from dataclasses import replace

    model, asked = denoiser_of("gpt2", pattern, "in_place", block_length), []
    model.spec = replace(model.spec, corruption="gidd")

    def hook(step, x_BL, logits_BLV):
        asked.append((step, bool((x_BL == MASK).any())))
        logits_BLV[..., :150] = float("-inf")
        return logits_BLV

    how = dict(order="confidence", revision=revision, revision_strength=strength, logits_hook=hook)
    steps = list(denoise(model, build_canvas([[5, 6] + [None] * 7], 0), **how))
    assert all(bool((step.tokens_BL[:, 2:] >= 150).all()) for step in steps)
    assert any(not has_masks for _, has_masks in asked), "in rounds of polishing"
    assert {step.index for step in steps} <= {step for step, _ in asked}


@pytest.mark.parametrize("revision, strength", [("gidd", 1.0), ("edits", 0.01)])
def test_what_a_tokens_hook_gives_is_not_polished(revision, strength):
    def hook(step, x_BL, logits_BLV):
        if step is None:
            x_BL[:, 4] = 9
        if step == 3:
            x_BL[:, 2:4] = 7
        return x_BL

    how = dict(order="left_to_right", revision=revision, revision_strength=strength, tokens_hook=hook)
    steps = list(denoise(hash_predictor("gidd"), build_canvas([[5, 6] + [None] * 9], 0), **how))
    assert all(step.tokens_BL[0, 4] == 9 for step in steps)
    assert all(step.tokens_BL[0, 2:4].tolist() == [7, 7] for step in steps[3:]) and len(steps) > 8


def test_tokens_do_change_again():
    for settings in (dict(revision="remdm", num_steps=9, revision_strength=0.5), dict(revision="p2", num_steps=9), dict(revision="edits", revision_strength=0.2)):
        seen, changed = {}, 0
        for step in denoise(hash_predictor("edits"), build_canvas([[1] + [None] * 12], 0), **settings):
            for column, (token, masked) in enumerate(zip(step.tokens_BL[0].tolist(), step.masked_BL[0].tolist(), strict=True)):
                changed += column in seen and (masked or token != seen[column])
                if masked:
                    seen.pop(column, None)
                else:
                    seen[column] = token
        assert changed > 0


# ReMDM.

NUM_ROWS, LENGTH, V = 8000, 3, 2


def _exact_remdm(predictor: TablePredictor, num_steps: int, cap: float) -> torch.Tensor:
    """Each state's mass flows to its successors, all positions independently."""
    mask = predictor.mask_token_id
    mass = {(mask,) * LENGTH: 1.0}
    for step in range(num_steps):
        t, s = 1 - step / num_steps, 1 - (step + 1) / num_steps
        alpha_t, alpha_s = 1 - t, 1 - s
        sigma = min(cap, 1.0, (1 - alpha_s) / alpha_t if alpha_t > 0 else 1.0)
        reveal = (alpha_s - (1 - sigma) * alpha_t) / (1 - alpha_t)
        after = {}
        for state, weight in mass.items():
            options = []
            for place, token in enumerate(state):
                if token == mask:
                    p = predictor.conditional(state, place).tolist()
                    options.append([(mask, 1 - reveal)] + [(v, reveal * q) for v, q in enumerate(p)])
                else:
                    options.append([(token, 1 - sigma), (mask, sigma)])
            for choice in itertools.product(*options):
                share = weight
                for _, q in choice:
                    share *= q
                if share > 0:
                    successor = tuple(token for token, _ in choice)
                    after[successor] = after.get(successor, 0.0) + share
        mass = after
    result = torch.zeros(V, V, V, dtype=torch.float64)
    for state, weight in mass.items():
        result[state] += weight
    return result


@pytest.mark.parametrize("num_steps, cap", [(2, 1.0), (4, 0.3), (4, 0.0)])
def test_remdm_has_its_exact_distribution(num_steps, cap):
    weights = torch.tensor([5.0, 1.0, 1.0, 3.0, 2.0, 0.5, 0.5, 6.0], dtype=torch.float64).reshape(V, V, V)
    predictor = TablePredictor(weights / weights.sum())
    exact = _exact_remdm(predictor, num_steps, cap)
    assert abs(float(exact.sum()) - 1) < 1e-9
    canvas = build_canvas([[0] + [None] * LENGTH] * NUM_ROWS, 0)
    tokens_BL = generate(predictor, canvas, revision="remdm", revision_strength=cap, num_steps=num_steps, temperature=1.0, seed=4).tokens_BL
    codes_B = tokens_BL[:, 1] * V * V + tokens_BL[:, 2] * V + tokens_BL[:, 3]
    counts, expected = torch.bincount(codes_B, minlength=V**LENGTH).double(), exact.flatten() * NUM_ROWS
    assert float(((counts - expected) ** 2 / expected).sum()) < chi_square_limit(V**LENGTH - 1)


def test_remdm_keeps_the_marginals_of_training():
    canvas = build_canvas([[1] + [None] * 20] * 300, 0)
    num_steps = 5
    for step in denoise(HashPredictor(), canvas, revision="remdm", revision_strength=0.4, num_steps=num_steps, temperature=1.0):
        share = float(1 - step.masked_BL[:, 1:].double().mean())
        expected = (step.index + 1) / num_steps
        assert abs(share - expected) < 5 * (expected * (1 - expected) / 6000) ** 0.5 + 1e-9


# P2, GIDD, edits, WINO: one row, lists and loops.


@pytest.mark.parametrize("penalty", [1.0, 1.5])
@pytest.mark.parametrize("num_steps", [1, 4, 9, 20])
def test_p2_is_the_slow_one(num_steps, penalty):
    row = ROWS[0]
    state, open_places = [M if t is None else t for t in row], [i for i, t in enumerate(row) if t is None]
    n = len(open_places)
    for j in range(num_steps):
        scored = []
        for place in open_places:
            p = distribution(state, place, penalty)
            token = int(p.argmax()) if state[place] == M else state[place]
            scored.append((float(p[token]), -place, token))
        kept = n - n * (num_steps - j - 1) // num_steps
        after = list(state)
        for rank, (_, place, token) in enumerate(sorted(scored, reverse=True)):
            after[-place] = token if rank < kept else M
        state = after
    how = dict(revision="p2", num_steps=num_steps, repetition_penalty=penalty)
    assert generate(HashPredictor(), build_canvas([row], 0), **how).tokens_BL[0].tolist() == state


@pytest.mark.parametrize("penalty", [1.0, 1.5])
@pytest.mark.parametrize("revision", ["gidd", "edits"])
def test_polishing_is_the_slow_one(revision, penalty):
    strength = {"gidd": 0.0, "edits": 0.25}[revision]
    row = ROWS[0]
    open_places = [i for i, t in enumerate(row) if t is None]
    how = dict(order="entropy", repetition_penalty=penalty)
    state = generate(HashPredictor(), build_canvas([row], 0), **how).tokens_BL[0].tolist()
    best, since = -1.0, 0
    for _ in range(128):
        opinions = {place: distribution(state, place, penalty) for place in open_places}
        other = {p: (float(d.max()), int(d.argmax())) for p, d in opinions.items() if int(d.argmax()) != state[p]}
        accuracy = 1 - len(other) / len(open_places)
        since = 0 if accuracy > best + 1e-9 else since + 1
        best = max(best, accuracy)
        if revision == "gidd":
            changes = [max(other, key=lambda p: (other[p][0], -p))] if other and since < 32 else []
        else:
            changes = [p for p in other if other[p][0] >= strength]
        if not changes:
            break
        state = [other[p][1] if p in changes else t for p, t in enumerate(state)]
    predictor = hash_predictor(revision)
    assert generate(predictor, build_canvas([row], 0), **how, revision=revision, revision_strength=strength).tokens_BL[0].tolist() == state


@pytest.mark.parametrize("settings", [dict(revision="remdm", num_steps=4, revision_strength=0.3), dict(revision="p2", num_steps=4), dict(revision="gidd", num_steps=2), dict(revision="edits", num_steps=2)], ids=str)
def test_a_penalty_leaves_fewer_repeats(settings):
    canvas = build_canvas([[1, 2] + [None] * 10] * 8, 0)

    def num_distinct(**how):
        rows = generate(hash_predictor("gidd"), canvas, temperature=1.0, **settings, **how).tokens_BL.tolist()
        return sum(len(set(row)) for row in rows)

    assert num_distinct(repetition_penalty=3.0) > num_distinct(repetition_penalty=1.0) == num_distinct()


@torch.no_grad()
def slow_wino(denoiser, row: list[int | None], block_length: int, threshold: float, doubt: float) -> list[int]:
    lag = int(denoiser.alignment == "shift")
    state = [MASK if t is None else t for t in row]
    todo = [i for i, t in enumerate(row) if t is None]
    for start in range(0, len(todo), block_length):
        block, last = todo[start : start + block_length], 30
        while any(state[i] == MASK for i in block):
            standing = [i for i in block if state[i] != MASK]
            holes = [i for i in block if state[i] == MASK]
            tokens, positions = state + [MASK] * len(standing), list(range(len(state))) + [i - lag for i in standing]
            seen = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
            seen[:, : len(state)] = True
            for number, held in enumerate(standing, start=len(state)):
                seen[number, held], seen[number, number] = False, True
            mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
            logits = denoiser.model(
                input_ids=torch.tensor([tokens]), position_ids=torch.tensor([positions]), attention_mask=mask[None, None], use_cache=False
            ).logits[0]
            logits[:, MASK] = float("-inf")
            p = torch.softmax(logits, -1)
            order = sorted(holes, key=lambda i: -float(p[i - lag].max()))
            count = sum(float(p[i - lag].max()) > threshold for i in holes)
            count = min(max(count, 1), min(max(len(holes) * 7 // 10, 5), 20), len(holes))
            back = {i: float(p[len(state) + number, state[i]]) for number, i in enumerate(standing)}
            doubted = sorted((i for i in standing if back[i] < doubt), key=lambda i: back[i])[: max(last - 1, 0)] if count > 1 else []
            for i in order[:count]:
                state[i] = int(p[i - lag].argmax())
            for i in doubted:
                state[i] = MASK
            last = count
    return state


@pytest.mark.parametrize("family, alignment", [("gpt2", "shift"), ("llama", "shift"), ("llama", "in_place")])
@pytest.mark.parametrize("threshold, doubt", [(0.02, 0.05), (0.02, 0.3)])
def test_wino_is_the_slow_one_in_a_batch_as_well(family, alignment, threshold, doubt):
    denoiser = denoiser_of(family, alignment=alignment)
    rows = [[5, 6] + [None] * 12, [7, None, None, 8, None, None, None, 9], [1] + [None] * 3]
    canvas = build_canvas(rows, 0)
    steps = list(denoise(denoiser, canvas, revision="wino", threshold=threshold, revision_strength=doubt, block_length=7))
    assert canvas.rows(steps[-1].tokens_BL) == [slow_wino(denoiser, row, 7, threshold, doubt) for row in rows]
    assert any(bool((after.masked_BL & ~before.masked_BL).any()) for before, after in itertools.pairwise(steps)), "nothing was ever doubted"


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(revision="polish"), "unknown revision"),
        (dict(revision="gidd"), "never learned to doubt"),
        (dict(revision="edits"), "never learned to doubt"),
        (dict(revision="p2", revision_strength=0.5), "p2 has none"),
        (dict(revision="remdm", revision_strength=1.5), "lie in"),
        (dict(revision="remdm", threshold=0.9), "threshold"),
        (dict(revision="p2", cache="dual"), "cache"),
        (dict(revision_strength=0.1), "belongs to a revision"),
        (dict(revision="wino"), "single columns"),
    ],
)
def test_what_does_not_fit_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        denoise(HashPredictor(), build_canvas([[1, None]], 0), **settings)
