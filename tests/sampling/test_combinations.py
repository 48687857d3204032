"""Whatever is combined: drawn settings on tiny real models. Nothing given changes, no mask is left or written, a row of a batch is the
row alone, and a block model gives the same tokens with its cache and without."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from tiny_decoders import denoiser_of

from dlmconvert.sampling import polish
from dlmconvert.sampling.canvas import build_canvas
from dlmconvert.sampling.denoise import denoise, generate

_MODELS: dict = {}
ENDS = list(range(0, 290, 9))


def _model(key: tuple):
    if key not in _MODELS:
        _MODELS[key] = denoiser_of(*key)
        _MODELS[key].spec = replace(_MODELS[key].spec, corruption="gidd")
    return _MODELS[key]


def drawn(seed: int):
    """(model, rows, settings): some rows have nothing to fill, one token, or gaps."""
    r = random.Random(seed)
    pattern = r.choice(["bidirectional", "block_causal", "context_causal", "causal_in_block"])
    key = (r.choice(["gpt2", "llama", "qwen3"]), pattern, r.choice(["shift", "in_place"]), None if pattern == "bidirectional" else r.choice([2, 3, 7]))
    model = _model(key)
    rows = []
    for _ in range(r.randint(1, 4)):
        row = [r.randint(0, 290) for _ in range(r.randint(1, 9))] + [None] * r.randint(0, 12)
        if pattern == "bidirectional":
            row[1:] = [r.choice([None, r.randint(0, 290)]) if r.random() < 0.2 else token for token in row[1:]]
        rows.append(row)
    how = {"order": r.choice(["random", "confidence", "entropy", "margin", "left_to_right", "first_hitting"]), "seed": seed}
    how |= r.choice([{}, {}, {"temperature": 0.7, "top_p": r.choice([None, 0.9]), "top_k": r.choice([None, 20])}])
    how |= r.choice([{}, {"threshold": 0.05}, {"factor": 1.5}, {"entropy_bound": 4.0}, *({"budget": b} for b in ("even", "ancestral", "dream", "llada"))])
    how |= r.choice([{}, {}, {"cfg_scale": 0.7}, {"repetition_penalty": 1.3}]) | r.choice([{}, {"end_ids": ENDS}])
    if pattern == "bidirectional":
        how |= {"block_length": r.choice([None, 2, 5]), "cache": r.choice([None, "prefix", "dual"])}
    elif pattern != "block_causal":
        how |= {"block_length": r.choice([None, 1, 6])}
        if r.random() < 0.3:
            how = {"draft_length": r.choice([1, 2, 5]), "seed": seed, "temperature": r.choice([0.0, 0.7])} | r.choice([{}, {"end_ids": ENDS}])
            how |= r.choice([{}, {"repetition_penalty": 1.3}])
    if "draft_length" not in how and r.random() < 0.35:
        polishing = r.choice([None, {"revision": "gidd"}, {"revision": "edits", "revision_strength": 0.005}])
        if polishing is not None:
            return model, rows, how | polishing
        how = {name: how[name] for name in ("seed", "temperature", "top_p", "top_k", "block_length", "cache", "cfg_scale", "repetition_penalty", "end_ids") if name in how}
        how |= r.choice([{"revision": "remdm", "revision_strength": 0.3}, {"revision": "p2"}, {"revision": "p2", "cfg_scale": 0.7}, {"revision": "wino", "threshold": 0.002}])
    return model, rows, how


def drawn_from_the_left(seed: int):
    """The same of a bidirectional model with an AR helper, or of answers that grow."""
    r = random.Random(seed)
    model = _model((r.choice(["gpt2", "llama", "qwen3"]), "bidirectional", r.choice(["shift", "in_place"]), None))
    rows = [[r.randint(0, 290) for _ in range(r.randint(1, 9))] + [None] * r.choice([0, 1, 12, r.randint(2, 20)]) for _ in range(r.randint(1, 4))]
    how = {"seed": seed} | r.choice([{}, {"temperature": 0.7, "top_p": r.choice([None, 0.9]), "top_k": r.choice([None, 20])}])
    how |= r.choice([{}, {"repetition_penalty": 1.3}])
    if r.random() < 0.4:
        helper = _model((r.choice(["gpt2", "mistral"]), "causal", "shift", None))
        return model, rows, how | {"helper": helper, "helper_weight": r.choice([0.3, 0.9])} | r.choice([{}, {"draft_length": 3}]) | r.choice([{}, {"end_ids": ENDS}]) | r.choice([{}, {"cfg_scale": 0.7}])
    how |= {"initial_length": r.choice([1, 4]), "end_ids": r.choice([ENDS, [7]]), "threshold": r.choice([0.05, 0.9]), "block_length": r.choice([2, 32])}
    return model, rows, how | r.choice([{}, {"cfg_scale": 0.7}]) | r.choice([{}, {"revision": "gidd"}, {"revision": "edits", "revision_strength": 0.005}])


@pytest.mark.parametrize("draws, first_seed", [(drawn, seed) for seed in (0, 10, 20, 30, 40, 320)] + [(drawn_from_the_left, seed) for seed in (0, 10, 20)])
def test_any_combination(draws, first_seed, monkeypatch):
    monkeypatch.setattr(polish, "MOST_ROUNDS", 6)  # a random model is never content with its text
    for seed in range(first_seed, first_seed + 10):
        model, rows, how = draws(seed)
        keys = [100 + seed + i for i in range(len(rows))]
        canvas = build_canvas(rows, 0, row_keys=keys)
        tokens_BL, masked_BL = canvas.tokens_BL, canvas.masked_BL
        for step in denoise(model, canvas, **how):
            tokens_BL, masked_BL = step.tokens_BL, step.masked_BL
        filled = canvas.rows(tokens_BL)
        assert not bool(masked_BL.any()), (seed, how)
        for number, (row, tokens) in enumerate(zip(rows, filled, strict=True)):
            assert model.mask_token_id not in tokens and all(given in (None, token) for given, token in zip(row, tokens, strict=True)), (seed, how)
            alone = build_canvas([row], 0, row_keys=[keys[number]])
            assert alone.rows(generate(model, alone, **how).tokens_BL) == [tokens], (seed, number, how)
        if model.attention != "bidirectional" and "draft_length" not in how:
            assert canvas.rows(generate(model, canvas, cache="none", **how).tokens_BL) == filled, (seed, how)
