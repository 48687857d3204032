"""Training block models to doubt: GIDD's mixture and edits in the noised copy, behind clean text. Against a slow loss, one block at a time."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from command_line import SMALL, curve, works, write_corpus
from test_every_method import LENGTH, MASK, Store, gradient, prepared
from tiny_models import denoiser, rewritten

from dlmconvert.diffusion.attention import TWO_STREAMS
from dlmconvert.training.losses import batch_loss, context_of
from dlmconvert.training.terms import gidd_mixture

BLOCK = 4
ROWS_OF = {"block_causal": "bd3lm", "context_causal": "nbdiff", "causal_in_block": "i-dlm"}
GIDD = {"corruption": {"kind": "gidd", "levels_per": "block", "uniform_share": 0.3, "eps": 0.05}, "objective": {"weight": "elbo", "normaliser": "eligible", "ar_weight": 0.0, "ar_schedule": "fixed"}}
EDITS = {"corruption": {"kind": "masking", "edit_share": 0.6, "edit_steps": 8}, "objective": {"weight": "elbo", "normaliser": "eligible", "ar_weight": 0.0, "ar_schedule": "fixed"}}
MODELS = [(pattern, alignment) for pattern in TWO_STREAMS for alignment in ("shift", "in_place")]


def of_pattern(pattern, alignment, choices, **more):
    name = ROWS_OF.get(pattern, "bd3lm")
    return prepared(name, attention={"pattern": pattern, "block_length": BLOCK, "anneal": "none"}, alignment=alignment, **choices, **more)


@torch.no_grad()
def slow_logits(model, noised: list[int], clean: list[int], pattern: str, block: int) -> torch.Tensor:
    """logits of the columns of one block and of the clean text before it, in a row of their own."""
    first, end = block * BLOCK, min((block + 1) * BLOCK, len(clean))
    tokens = clean[:first] + noised[first:end]

    def sees(q, k):
        if q >= first:  # noised
            return k < first or pattern != "causal_in_block" or k <= q
        return k < first and (k // BLOCK <= q // BLOCK if pattern == "block_causal" else k <= q)

    seen = torch.tensor([[sees(q, k) for k in range(end)] for q in range(end)])
    mask = torch.zeros(end, end).masked_fill(~seen, torch.finfo(torch.float32).min)
    return model(input_ids=torch.tensor([tokens]), position_ids=torch.arange(end)[None], attention_mask=mask[None, None], use_cache=False).logits[0]


def slow_divergence(logits_V, x, z, t, share, vocab):
    """w_t(z, x) (KL + r - log r - 1), whole vectors."""
    ratio = 2 * share / (1 - share) * math.sqrt(t * (1 - t))

    def q(p_V):
        whole = (1 - t) * p_V + ratio / (vocab - 1)  # u is over the tokens of text, MASK is one of the ids
        whole[MASK] = t
        return whole / (1 + ratio)

    logits_V = logits_V.double().clone()
    logits_V[MASK], logits_V[vocab:] = -math.inf, -math.inf
    ours, theirs = q(torch.nn.functional.one_hot(torch.tensor(x), len(logits_V)).double())[:vocab], q(torch.softmax(logits_V, 0))[:vocab]
    r = float(ours[z] / theirs[z])
    weight = 1 / (t * (1 - t))
    weight *= 1 if z == MASK else 0.5 * (ratio / ((vocab - 1) * (1 - t) + ratio) if z == x else 1)
    return weight * (float((ours * (ours / theirs).log()).sum()) + r - math.log(r) - 1)


@pytest.mark.parametrize("pattern, alignment", MODELS)
@pytest.mark.parametrize("choices", [GIDD, EDITS], ids=["gidd", "edits"])
def test_the_loss_is_the_slow_one(pattern, alignment, choices):
    engine, stream, settings = of_pattern(pattern, alignment, choices)
    batch = stream.batch(3, 0, 2)
    shift = alignment == "shift"
    num_eligible = int(batch.eligible_BL.sum())
    sums = batch_loss(engine, batch, context_of(settings, 3), settings, num_eligible, 1)[1]
    model, vocab, total = engine.denoiser.model, engine.denoiser.vocab_size, 0.0
    for row in range(2):
        x_0, x_t = batch.x_0_BL[row].tolist(), batch.x_t_BL[row].tolist()
        edited = None if batch.x_edit_BL is None else batch.x_edit_BL[row].tolist()
        for place in range(LENGTH):
            block = place // BLOCK
            if place == 0 and shift:
                assert not bool(batch.eligible_BL[row, 0])
            elif shift and place % BLOCK == 0:  # from the clean text before it, whatever the corruption
                assert x_t[place] == x_0[place] and (edited is None or edited[place] == x_0[place])
                total -= float(torch.log_softmax(slow_logits(model, x_0, x_0, pattern, block - 1)[-1] if pattern == "block_causal" else clean_logits(model, x_0, place), -1)[x_0[place]])
            else:
                logits_V = slow_logits(model, x_t, x_0, pattern, block)[place - shift]
                t = float(batch.t_BL[row, place])
                if choices is GIDD:
                    total += slow_divergence(logits_V, x_0[place], x_t[place], t, 0.3, vocab)
                elif x_t[place] == MASK:
                    total -= float(torch.log_softmax(logits_V, -1)[x_0[place]]) / t
                if edited is not None:
                    total -= float(torch.log_softmax(slow_logits(model, edited, x_0, pattern, block)[place - shift], -1)[x_0[place]])
    assert sums["loss"] == pytest.approx(total / num_eligible, rel=1e-4)
    assert sums["nelbo"] + sums.get("edit_loss", 0.0) == pytest.approx(sums["loss"], rel=1e-5)
    assert sums["masked"] == int((batch.masked_BL & (batch.x_t_BL == MASK)).sum())


@torch.no_grad()
def clean_logits(model, x_0, place):
    """The next-token prediction of `place` under causal attention."""
    seen = torch.ones(place, place, dtype=torch.bool).tril()
    mask = torch.zeros(place, place).masked_fill(~seen, torch.finfo(torch.float32).min)
    return model(input_ids=torch.tensor([x_0[:place]]), position_ids=torch.arange(place)[None], attention_mask=mask[None, None], use_cache=False).logits[0, -1]


def test_where_a_token_is_predicted_from_clean_text_the_bound_is_the_likelihood():
    """Blocks of 2 under shift, causal: the second token is read from the first, which stays clean. Whatever noise falls on it, the expectation
    over noise, by quadrature over t and by enumeration of what stands there, is -log p: the sum is the AR likelihood of the row."""
    engine, stream, settings = of_pattern("causal_in_block", "shift", GIDD)
    engine.denoiser.spec = replace(engine.denoiser.spec, vocab_size=6)
    settings = replace(settings, block_stages=((0, 2),))
    vocab, mask = 6, MASK
    generator = torch.Generator().manual_seed(2)
    x_0_BL = torch.randint(0, vocab, (1, LENGTH), generator=generator)
    places_L = torch.arange(LENGTH)
    starts_BL, noised_BL = (places_L % 2 == 0)[None] & (places_L > 0), (places_L % 2 == 1)[None]
    mixture = gidd_mixture(settings, engine.denoiser)
    nodes, weights = np.polynomial.legendre.leggauss(24)
    total = 0.0
    for node, weight in zip(nodes, weights, strict=True):
        angle = (node + 1) / 2 * math.pi
        t, dt = (1 - math.cos(angle)) / 2, math.sin(angle) / 2 * math.pi / 2 * weight
        kept, masked, uniform = (float(x) for x in mixture.masses(torch.tensor(t, dtype=torch.float64)))
        for offset in (None, *range(vocab)):
            z_BL = torch.full_like(x_0_BL, mask) if offset is None else (x_0_BL + offset) % vocab
            share = masked if offset is None else uniform / vocab + kept * (offset == 0)
            batch = replace(
                stream.batch(0, 0, 1), x_0_BL=x_0_BL, x_t_BL=torch.where(noised_BL, z_BL, x_0_BL), masked_BL=noised_BL, starts_BL=starts_BL,
                eligible_BL=noised_BL | starts_BL, t_BL=torch.full((1, LENGTH), t), x_edit_BL=None,
            )  # fmt: skip
            total += dt * share * batch_loss(engine, batch, context_of(settings, 0), settings, LENGTH - 1, 1)[1]["nelbo"]
    expected = 0.0
    for place in range(1, LENGTH):
        logits_V = clean_logits(engine.denoiser.model, x_0_BL[0].tolist(), place)
        expected -= float(torch.log_softmax(logits_V[:vocab] if place % 2 else logits_V, -1)[x_0_BL[0, place]])
    assert total == pytest.approx(expected / (LENGTH - 1), rel=2e-3)


@pytest.mark.parametrize("pattern, alignment", MODELS)
def test_a_wrong_token_is_shown_and_the_right_one_is_not(pattern, alignment):
    """x_t stays, x_0 changes at one place: the predictions of its block and of those before do not; those of later blocks do."""
    model = denoiser(rewritten("llama"), alignment, pattern, block_length=BLOCK)
    generator = torch.Generator().manual_seed(5)
    x_0_BL, noise_BL = (torch.randint(3, 200, (1, LENGTH), generator=generator) for _ in range(2))
    x_t_BL = torch.where(torch.rand(1, LENGTH, generator=generator) < 0.4, noise_BL, x_0_BL)
    places_BL = torch.arange(LENGTH)[None]
    starts_BL = (places_BL % BLOCK == 0) & (places_BL > 0) & (alignment == "shift")
    noised_BL = (places_BL > 0) & ~starts_BL
    place = 9  # of block 2
    found = []
    for word in (7, 8):
        clean_BL = torch.where(places_BL == place, word, x_0_BL)
        logits_NV = model.predict_blocks(x_t_BL, clean_BL, noised_BL, starts_BL, places_BL)
        chosen_BS = torch.cat([noised_BL, starts_BL], 1)
        found.append(torch.zeros(*chosen_BS.shape, logits_NV.shape[1]).masked_scatter(chosen_BS[..., None], logits_NV)[0].chunk(2))
    for before, after, targets_BL in zip(*found, (noised_BL, starts_BL), strict=True):
        changed_L = (before != after).any(-1)
        assert not bool(changed_L[: 3 * BLOCK].any()) and bool(changed_L[3 * BLOCK :][targets_BL[0, 3 * BLOCK :]].all())


CHOICES = {
    "gidd": GIDD,
    "gidd beside the next-token loss": {**GIDD, "objective": {"weight": "gidd_dynamic", "normaliser": "masked", "ar_weight": 0.5, "ar_schedule": "balanced"}},
    "edits": EDITS,
    "drafts and edits": {"corruption": {"kind": "all_masked", "edit_share": 0.6, "edit_steps": 8}, "objective": {"weight": "unweighted", "normaliser": "eligible", "ar_weight": 0.0, "ar_schedule": "fixed"}},
}


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("kind", ["isolated", "padded"])
@pytest.mark.parametrize("alignment", ["shift", "in_place"])
def test_one_gradient_under_any_split(choice, kind, alignment):
    engine, stream, settings = of_pattern("context_causal", alignment, CHOICES[choice], store=Store(kind))
    sums, whole = gradient(engine, stream, settings, 3)
    assert all(math.isfinite(value) for value in sums.values()) and any(float(g.abs().max()) > 0 for g in whole.values())
    found, grads = gradient(engine, stream, replace(settings, micro_batch=3), 3)
    assert found == pytest.approx(sums, rel=5e-5, abs=1e-6)
    for name, expected in whole.items():
        torch.testing.assert_close(grads[name], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("choices", [GIDD, EDITS], ids=["gidd", "edits"])
def test_blocks_of_one_token_have_nothing_to_noise_under_shift(choices):
    """The first stage of growing blocks: every token is read from the clean copy, and the step is finite."""
    engine, stream, settings = of_pattern("context_causal", "shift", choices)
    stream.block_length, settings = (lambda step: 1), replace(settings, block_stages=((0, 1),))
    sums, grads = gradient(engine, stream, settings, 3)
    assert sums["masked"] == 0 and math.isfinite(sums["loss"]) and all(bool(g.isfinite().all()) for g in grads.values())


@pytest.mark.parametrize("alignment", ["shift", "in_place"])
@pytest.mark.parametrize("choices", [GIDD, EDITS], ids=["gidd", "edits"])
def test_noisy_context_trains_on_one_copy(alignment, choices):
    """block_causal_noisy: the noised row alone; every eligible token is a target, and later blocks are not seen."""
    engine, stream, settings = of_pattern("block_causal_noisy", alignment, choices)
    batch = stream.batch(3, 0, 2)
    assert batch.starts_BL is None
    sums, grads = gradient(engine, stream, settings, 3)
    assert math.isfinite(sums["loss"]) and any(float(g.abs().max()) > 0 for g in grads.values())
    changed = replace(batch, x_t_BL=batch.x_t_BL.clone())
    changed.x_t_BL[:, -1] = torch.where(batch.x_t_BL[:, -1] == 5, 6, 5)
    targets_BL = batch.eligible_BL & (torch.arange(LENGTH) < LENGTH - BLOCK)
    context = context_of(settings, 3)
    before, after = (engine.denoiser(b.x_t_BL, targets_BL, b.positions_BL, context) for b in (batch, changed))
    assert torch.equal(before, after)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("doubt")
    write_corpus(folder)
    return folder


WORDS = {
    "gidd": ["method.name=bd3lm", "method.attention.block_length=4", "method.corruption.kind=gidd", "method.objective.weight=gidd_dynamic"],
    "edits": ["method.name=nbdiff", "method.attention.anneal=none", "method.objective.ar_schedule=fixed", "method.attention.block_length=4", "method.corruption.edit_share=0.2", "method.corruption.edit_steps=2"],
}


@pytest.mark.parametrize("revision", WORDS)
def test_from_the_command_line(revision, place, tiny_checkpoints, monkeypatch):
    """Trained for four steps, and sampled with the revision that it was trained for."""
    monkeypatch.chdir(place)
    works("adapt", tiny_checkpoints["llama"], *SMALL, *WORDS[revision], "train.steps=4", "train.log_steps=1", "eval.rows=1", "eval.draws=1", f"run.folder={revision}")
    lines = [line for line in curve(place / revision / "adapt") if "loss" in line]
    assert len(lines) == 4 and all(math.isfinite(line["loss"]) and line["gradient_norm"] > 0 for line in lines)
    assert ("edit_loss" in lines[-1]) == (revision == "edits")
    model = place / revision / "adapt" / "model"
    spec = json.loads((model / "config.json").read_text())["dlm"]
    assert spec["corruption"] == {"gidd": "gidd", "edits": "masking+edits"}[revision] and spec["block_length"] == 4
    words = ["sample", model, "--prompt", "the", "--max-new-tokens", 10, "--steps", 10, "--revision", revision, "--revision-strength", 0.01, "--temperature", 0, "--json"]
    texts = [json.loads(works(*words, "--cache", cache).out)["text"] for cache in ("block", "none")]
    assert texts[0] == texts[1]
    if revision == "gidd":  # without --prompts: beginnings of the held-out rows
        found = json.loads(works("bench", revision, "--new-tokens", 4, "--repeats", 1, "--samplers", "revision=gidd+threshold=0.9", "--json").out)
        assert found["samplers"][1]["num_tokens"] == 4 * found["prompts"] > 0
