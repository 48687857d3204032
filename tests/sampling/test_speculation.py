"""Self-speculation: at temperature 0 the AR text, token for token; above it the AR distribution."""

from __future__ import annotations

import itertools

import pytest
import torch
from tiny_decoders import MASK, denoiser_of, penalise
from tiny_predictors import TableWindowPredictor, chi_square_limit, vectors

from dlmconvert.sampling.canvas import build_canvas, canvas_after_prompts
from dlmconvert.sampling.denoise import denoise, generate
from dlmconvert.sampling.speculate import accept

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14, 15], [16]]
NEW = 11


@torch.no_grad()
def autoregressive(denoiser, prompt: list[int], num_new: int, penalty: float = 1.0) -> list[int]:
    """Greedy decoding by transformers alone: whole rows, causal, no cache."""
    state = list(prompt)
    for _ in range(num_new):
        logits_1V = denoiser.model(torch.tensor([state]), is_causal=True).logits[0, -1:]
        logits_1V[:, MASK] = float("-inf")
        penalise(logits_1V, [len(state)], state, penalty)
        state.append(int(logits_1V.argmax()))
    return state


@pytest.mark.parametrize("pattern", ["context_causal", "causal_in_block"])
@pytest.mark.parametrize("family, alignment", [("gpt2", "shift"), ("llama", "in_place"), ("qwen3", "shift")])
@pytest.mark.parametrize("draft_length", [1, 3, 20])
def test_greedy_speculation_is_greedy_ar_decoding(pattern, family, alignment, draft_length):
    denoiser = denoiser_of(family, pattern, alignment, 4)
    canvas = build_canvas([p + [None] * NEW for p in PROMPTS], 0)
    steps = list(denoise(denoiser, canvas, draft_length=draft_length))
    expected = [autoregressive(denoiser, p, NEW) for p in PROMPTS]
    assert canvas.rows(steps[-1].tokens_BL) == expected
    assert not bool(steps[-1].masked_BL.any()) and steps[-1].nfe == len(steps) <= NEW
    assert sum(step.committed_BL for step in steps).equal(canvas.masked_BL.long())
    longest = max(map(len, PROMPTS))
    inputs_BP = torch.tensor([[0] * (longest - len(p)) + p for p in PROMPTS])
    seen_BP = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in PROMPTS])
    left = canvas_after_prompts(inputs_BP, seen_BP, NEW)
    assert left.rows(generate(denoiser, left, draft_length=draft_length).tokens_BL) == expected


@pytest.mark.parametrize("pattern", ["context_causal", "causal_in_block"])
@pytest.mark.parametrize("family, alignment", [("gpt2", "shift"), ("llama", "in_place"), ("qwen3", "shift")])
def test_a_repetition_penalty_is_that_of_ar_decoding(pattern, family, alignment):
    denoiser = denoiser_of(family, pattern, alignment, 4)
    prompts = [[5, 6, 7, 5, 9, 10, 11], [12, 13, 14, 15], [16]]
    canvas = build_canvas([p + [None] * 24 for p in prompts], 0)
    differ = 0
    for penalty in (1.3, 0.8):
        expected = [autoregressive(denoiser, p, 24, penalty) for p in prompts]
        differ += expected != [autoregressive(denoiser, p, 24) for p in prompts]
        for p, row in zip(prompts, expected, strict=True):
            own = denoiser.model.generate(
                torch.tensor([p]), attention_mask=torch.ones(1, len(p), dtype=torch.int64), max_new_tokens=24, do_sample=False, repetition_penalty=penalty,
                suppress_tokens=[MASK], pad_token_id=0,
            )  # fmt: skip
            assert own[0].tolist() == row
        for draft_length in (1, 3, 20):
            done = generate(denoiser, canvas, draft_length=draft_length, repetition_penalty=penalty)
            assert canvas.rows(done.tokens_BL) == expected
        alone = build_canvas([prompts[1] + [None] * 24], 0)
        assert alone.rows(generate(denoiser, alone, draft_length=3, repetition_penalty=penalty).tokens_BL) == [expected[1]]
    assert differ  # the penalty had something to do
    longest = max(map(len, prompts))
    inputs_BP = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    seen_BP = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    left = canvas_after_prompts(inputs_BP, seen_BP, 24)  # padding with a token of the vocabulary, which stands nowhere
    assert left.rows(generate(denoiser, left, draft_length=3, repetition_penalty=1.3).tokens_BL) == [autoregressive(denoiser, p, 24, 1.3) for p in prompts]


def test_a_drafter_that_is_right_settles_everything_it_drafts():
    # Every token is 1 with certainty, so the draft is the truth: one token first, then draft_length + 1 a forward.
    joint = torch.zeros(3, 3, 3, 3, 3, 3, dtype=torch.float64)
    joint[1, 1, 1, 1, 1, 1] = 1.0
    predictor = TableWindowPredictor(joint + 1e-12)
    for draft_length, expected in ((1, [1, 2, 2, 1]), (2, [1, 3, 2]), (4, [1, 5]), (9, [1, 5])):
        steps = list(denoise(predictor, build_canvas([[0] + [None] * 6], 0), draft_length=draft_length))
        assert [int(step.committed_BL.sum()) for step in steps] == expected and steps[-1].tokens_BL[0, 1:].tolist() == [1] * 6


@pytest.mark.parametrize("penalty", [1.0, 1.5])
@pytest.mark.parametrize("alignment", ["shift", "in_place"])
def test_a_row_of_a_batch_is_the_row_alone_above_temperature_0(alignment, penalty):
    denoiser = denoiser_of("llama", "context_causal", alignment, 4)
    how = dict(draft_length=4, temperature=0.3, top_k=20, seed=3, repetition_penalty=penalty)
    together = build_canvas([p + [None] * NEW for p in PROMPTS], 0, row_keys=[7, 8, 9])
    filled = together.rows(generate(denoiser, together, **how).tokens_BL)
    assert filled != together.rows(generate(denoiser, together, **how | {"seed": 4}).tokens_BL)
    for row, prompt in enumerate(PROMPTS):
        alone = build_canvas([prompt + [None] * NEW], 0, row_keys=[7 + row])
        assert alone.rows(generate(denoiser, alone, **how).tokens_BL) == [filled[row]]


def test_a_row_ends_with_its_end_token():
    denoiser = denoiser_of("llama", "context_causal", "shift", 4)
    whole = [autoregressive(denoiser, p, NEW) for p in PROMPTS]
    end = whole[0][len(PROMPTS[0]) + 4]
    canvas = build_canvas([p + [None] * NEW for p in PROMPTS], 0)
    last = list(denoise(denoiser, canvas, draft_length=3, end_ids=[end]))[-1]
    for row, full, prompt in zip(canvas.rows(last.tokens_BL), whole, PROMPTS, strict=True):
        stop = full.index(end, len(prompt)) if end in full[len(prompt) :] else len(full)
        assert row[: stop + 1] == full[: stop + 1] and set(row[stop + 1 :]) <= {end}
    assert not bool(last.masked_BL.any())


# Distributions.

V, LENGTH, ROWS = 3, 4, 6000


def _joint() -> torch.Tensor:
    weights = torch.rand(*[V] * LENGTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64) ** 3
    return weights / weights.sum()


def _chi_square(tokens_BL: torch.Tensor, joint: torch.Tensor) -> float:
    codes_B = torch.zeros(ROWS, dtype=torch.int64)
    for place in range(LENGTH):
        codes_B = codes_B * V + tokens_BL[:, place + 1]
    expected = joint.flatten() * ROWS
    counts = torch.bincount(codes_B, minlength=V**LENGTH).double()
    return float(((counts - expected) ** 2 / expected.clamp(min=1e-9)).sum())


@pytest.mark.parametrize("alignment", ["shift", "in_place"])
@pytest.mark.parametrize("draft_length", [1, 2, 4])
def test_speculation_samples_the_ar_distribution(alignment, draft_length):
    joint = _joint()
    joint = (joint + 0.01) / (joint + 0.01).sum()
    predictor = TableWindowPredictor(joint, "context_causal", 2, alignment)
    canvas = build_canvas([[0] + [None] * LENGTH] * ROWS, 0)
    steps = list(denoise(predictor, canvas, draft_length=draft_length, temperature=1.0, seed=2))
    assert _chi_square(steps[-1].tokens_BL, joint) < chi_square_limit(V**LENGTH - 1)
    if draft_length == 4:  # the test has power: without verification the draft is the product of the marginals
        product = joint
        for place in range(LENGTH):
            marginal = joint.sum(dim=[axis for axis in range(LENGTH) if axis != place])
            product = marginal.view([V if axis == place else 1 for axis in range(LENGTH)]) * (product if place else 1.0)
        assert _chi_square(steps[-1].tokens_BL, product / product.sum()) > 3 * chi_square_limit(V**LENGTH - 1)


@pytest.mark.parametrize("alignment, draft_length", [("shift", 2), ("in_place", 3)])
def test_a_penalty_is_that_of_ar_sampling(alignment, draft_length):
    joint = (_joint() + 0.01) / (_joint() + 0.01).sum()
    penalised, penalty = torch.zeros_like(joint), 2.5
    for text in itertools.product(range(V), repeat=LENGTH):
        probability = 1.0
        for place, token in enumerate(text):
            left = joint[text[:place]].flatten(1).sum(dim=1) if place + 1 < LENGTH else joint[text[:place]]
            log_p_V = (left / left.sum()).log()
            log_p_V[sorted({0, *text[:place]})] *= penalty  # they are negative; 0 is the token that stands in front
            probability *= float(torch.softmax(log_p_V, -1)[token])
        penalised[text] = probability
    assert abs(float(penalised.sum()) - 1) < 1e-9
    predictor = TableWindowPredictor(joint, "context_causal", 2, alignment)
    canvas = build_canvas([[0] + [None] * LENGTH] * ROWS, 0)
    tokens_BL = generate(predictor, canvas, draft_length=draft_length, temperature=1.0, seed=2, repetition_penalty=penalty).tokens_BL
    assert _chi_square(tokens_BL, penalised) < chi_square_limit(V**LENGTH - 1)
    assert _chi_square(tokens_BL, joint) > 3 * chi_square_limit(V**LENGTH - 1)


def test_a_temperature_is_that_of_ar_sampling():
    joint = (_joint() + 0.01) / (_joint() + 0.01).sum()
    tempered, temperature = torch.ones_like(joint), 0.6
    for place in range(LENGTH):  # p(x_i | x_<i)^(1/T), normalised, one after the other
        left = joint.sum(dim=list(range(place + 1, LENGTH))) if place + 1 < LENGTH else joint
        conditional = (left / left.sum(dim=-1, keepdim=True)) ** (1 / temperature)
        conditional = conditional / conditional.sum(dim=-1, keepdim=True)
        tempered = tempered * conditional.view(*conditional.shape, *[1] * (LENGTH - place - 1))
    predictor = TableWindowPredictor(joint, "causal_in_block")
    canvas = build_canvas([[0] + [None] * LENGTH] * ROWS, 0)
    tokens_BL = generate(predictor, canvas, draft_length=3, temperature=temperature, seed=5).tokens_BL
    assert _chi_square(tokens_BL, tempered) < chi_square_limit(V**LENGTH - 1)


@pytest.mark.parametrize("pattern", ["block_causal", "context_causal"])
@pytest.mark.parametrize("alignment", ["shift", "in_place"])
def test_block_decoding_one_token_a_step_samples_the_joint(pattern, alignment):
    joint = (_joint() + 0.01) / (_joint() + 0.01).sum()
    canvas = build_canvas([[0] + [None] * LENGTH] * ROWS, 0)
    predictor = TableWindowPredictor(joint, pattern, 2, alignment)
    tokens_BL = generate(predictor, canvas, order="entropy", budget="even", temperature=1.0, seed=6).tokens_BL
    assert _chi_square(tokens_BL, joint) < chi_square_limit(V**LENGTH - 1)


def test_acceptance_is_the_published_rule():
    data = vectors("14_speculative_acceptance.json")
    for case in data["cases"]:
        given, expected = case["inputs"], case["expected"]
        p, q = (torch.tensor(given[name], dtype=torch.float64)[None] for name in ("p_target", "q_draft"))
        drafted, u = torch.tensor([given["draft_tokens"]]), torch.tensor([given["u"]], dtype=torch.float64)
        accepted, following = accept(p, q, drafted, torch.tensor([drafted.shape[1]]), u)
        assert int(accepted) == expected["n_accepted"]
        torch.testing.assert_close(following[0], torch.tensor(expected["next_distribution"], dtype=torch.float64), rtol=1e-6, atol=1e-9)
        token = int((following[0].cumsum(0) > given["v"]).int().argmax())
        assert [*given["draft_tokens"][: int(accepted)], token] == expected["tokens_out"]
        if "greedy_n_accepted" not in expected:
            continue
        hard = torch.nn.functional.one_hot(p.argmax(-1), p.shape[-1]).double()
        accepted, following = accept(hard, torch.nn.functional.one_hot(drafted, p.shape[-1]).double(), drafted, torch.tensor([drafted.shape[1]]), u)
        assert int(accepted) == expected["greedy_n_accepted"]
        assert [*given["draft_tokens"][: int(accepted)], int(following.argmax())] == expected["greedy_tokens_out"]


@pytest.mark.parametrize(
    "pattern, row, settings, message",
    [
        ("block_causal", [1, None], {}, "AR model over clean text"),
        ("context_causal", [1, None, 2], {}, "right of a gap"),
        ("context_causal", [None, None], {}, "no token to start from"),
        ("context_causal", [1, None], {"threshold": 0.9}, "threshold"),
        ("context_causal", [1, None], {"draft_length": 0}, "at least 1"),
    ],
)
def test_what_cannot_be_verified_is_refused(pattern, row, settings, message):
    with pytest.raises(ValueError, match=message):
        denoise(denoiser_of("llama", pattern, "in_place", 4), build_canvas([row], 0), **{"draft_length": 3, **settings})


def test_a_draft_is_as_long_as_it_can_be_used():
    """Columns grow with its square; what is drafted behind the end of all rows is thrown away."""
    model = denoiser_of("llama", "context_causal", "shift", 4)
    canvas = build_canvas([[3, 4, 5] + [None] * 6, [6, 7] + [None] * 4], 0)
    for temperature in (0.0, 0.8):
        texts = [generate(model, canvas, draft_length=length, temperature=temperature).tokens_BL for length in (6, 60)]
        assert torch.equal(*texts)
    with pytest.raises(ValueError, match="at most 64"):
        generate(model, canvas, draft_length=500)
