"""What users call: diffusion_generate with Dream's conventions, and infill."""

from __future__ import annotations

import pytest
import torch
from tiny_decoders import denoiser_of
from tiny_predictors import HashPredictor

from dlmconvert.sampling.api import diffusion_generate, infill
from dlmconvert.sampling.canvas import build_canvas
from dlmconvert.sampling.denoise import denoise
from dlmconvert.sampling.options import ALGORITHMS, saved_options, with_defaults

PROMPTS = [[3, 4, 5, 6], [7, 8]]
LEFT = (torch.tensor([[3, 4, 5, 6], [0, 0, 7, 8]]), torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]]))
RIGHT = (torch.tensor([[3, 4, 5, 6], [7, 8, 0, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]))


@pytest.mark.parametrize("alg", ALGORITHMS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_padding_on_either_side_and_rows_alone_agree(alg, temperature):
    how = dict(max_new_tokens=6, steps=None if alg == "first_hitting" else 4, alg=alg, temperature=temperature, seed=2)
    left = diffusion_generate(HashPredictor(), *LEFT, **how)
    right = diffusion_generate(HashPredictor(), *RIGHT, **how)
    assert left.shape == right.shape == (2, 10)
    assert torch.equal(left[:, :4], LEFT[0])
    assert left[1, 2:].tolist() == right[1, :8].tolist() and right[1, 8:].tolist() == [0, 0]
    for number, prompt in enumerate(PROMPTS):
        alone = diffusion_generate(HashPredictor(), torch.tensor([prompt]), row_keys=[number], **how)
        assert alone[0].tolist() == left[number, 4 - len(prompt) :].tolist()


def test_hooks_see_what_dreams_hooks_see_and_may_change_it():
    seen = []

    def tokens_hook(step, x_BL, logits_BLV):
        seen.append((step, None if logits_BLV is None else tuple(logits_BLV.shape)))
        if step is None:
            x_BL[:, 5] = 9  # given from now on
        return x_BL

    def logits_hook(step, x_BL, logits_BLV):
        assert bool((x_BL[:, 4] == 23).any()) or step > 0
        logits_BLV[:, :, 2] = 99.0
        return logits_BLV

    predictor = HashPredictor()
    result = diffusion_generate(
        predictor,
        *LEFT,
        max_new_tokens=4,
        steps=3,
        alg="entropy",
        generation_tokens_hook_func=tokens_hook,
        generation_logits_hook_func=logits_hook,
    )
    assert result[:, 4:].tolist() == [[2, 9, 2, 2]] * 2
    assert seen == [(None, None), (0, (2, 8, 26)), (1, (2, 8, 26)), (2, (2, 8, 26))]


@pytest.mark.parametrize("alg", ["origin", "entropy"])
def test_hooks_that_change_nothing_change_nothing(alg):
    how = dict(max_new_tokens=8, steps=5, alg=alg, temperature=1.0)
    plain = diffusion_generate(HashPredictor(), *LEFT, **how)
    same = {"generation_tokens_hook_func": lambda step, x, logits: x, "generation_logits_hook_func": lambda step, x, logits: logits}
    assert torch.equal(plain, diffusion_generate(HashPredictor(), *LEFT, **how, **same))


def test_a_hook_may_mask_again():
    def hook(step, x_BL, logits_BLV):
        if step == 0:
            x_BL[:, -3:] = 23
        return x_BL

    result = diffusion_generate(
        HashPredictor(), torch.tensor([[1]]), max_new_tokens=5, steps=3, alg="entropy", generation_tokens_hook_func=hook
    )
    assert 23 not in result[0].tolist()


def test_what_a_hook_masks_again_has_no_confidence():
    def hook(step, x_BL, logits_BLV):
        if step == 1:
            x_BL[:, 3] = 23
        return x_BL

    for step in denoise(HashPredictor(), build_canvas([[5, 6] + [None] * 6], 0), tokens_hook=hook, order="left_to_right"):
        assert bool(((step.confidence_BL > 0) == step.committed_BL).all())


def test_history_and_dict():
    output = diffusion_generate(
        HashPredictor(), *LEFT, max_new_tokens=4, steps=4, alg="entropy", output_history=True, return_dict_in_generate=True
    )
    assert output.nfe == len(output.history) == 4
    assert torch.equal(output.history[-1], output.sequences)
    assert int((output.history[0] == 23).sum()) == 6


def test_text_after_the_end_becomes_padding():
    result = diffusion_generate(HashPredictor(favourite=1), torch.tensor([[1, 4]]), max_new_tokens=3, eos_token_id=[1, 2], pad_token_id=0)
    assert result[0].tolist() == [1, 4, 1, 0, 0]


@pytest.mark.parametrize(
    "option, hint",
    [({"temprature": 1}, "temperature"), ({"step": 3}, "steps"), ({"alg": "entropie"}, "entropy"), ({"max_new_tokens": 0}, "at least 1")]
    + [
        ({"treshold": 0.9}, "threshold"),
        ({"threshold": 0.9, "budget": "even"}, "give one of them"),
        ({"budget": "all"}, "even, ancestral"),
    ],
)
def test_unknown_options_are_refused_with_the_nearest_name(option, hint):
    with pytest.raises(ValueError, match=hint):
        diffusion_generate(HashPredictor(), torch.tensor([[1]]), **{"max_new_tokens": 2, **option})


def test_none_is_the_default_and_no_number_is_refused():
    def made(**options):
        return diffusion_generate(HashPredictor(), torch.tensor([[1]]), **{"max_new_tokens": 4, **options}).tolist()

    assert made(temperature=None, seed=None, steps=None, top_p=None) == made()
    for name, value in [("steps", "4"), ("steps", 2.5), ("temperature", "hot"), ("seed", 1.5), ("block_length", 2.0), ("max_new_tokens", "4"), ("threshold", [0.9])]:
        with pytest.raises(ValueError, match=f"{name} is .*number"):
            made(**{name: value})
    with pytest.raises(ValueError, match="steps is '16'"):
        saved_options({"steps": "16", "max_new_tokens": 32})
    for inputs, words in [([[1]], "a tensor"), (torch.zeros(0, 3, dtype=torch.int64), "one row")]:
        with pytest.raises(ValueError, match=words):
            diffusion_generate(HashPredictor(), inputs, max_new_tokens=2)
    for rows in ([1, None], torch.tensor([[1, 2]])):
        with pytest.raises(ValueError, match="lists of tokens"):
            infill(HashPredictor(), rows)


def test_a_budget_without_an_alg_brings_its_order():
    def run(**options):
        return diffusion_generate(HashPredictor(), *LEFT, max_new_tokens=8, **options).tolist()

    for budget in ({"threshold": 0.3}, {"factor": 2.2}):
        assert run(**budget) == run(**budget, alg="confidence") != run(**budget, alg="origin")
    assert run(entropy_bound=1.5) == run(entropy_bound=1.5, alg="entropy") != run(entropy_bound=1.5, alg="left_to_right")
    assert run() == run(alg="origin")


def test_a_row_that_has_ended_costs_nothing_and_is_padded():
    how = dict(max_new_tokens=6, alg="left_to_right", eos_token_id=1, pad_token_id=0, return_dict_in_generate=True)
    output = diffusion_generate(HashPredictor(favourite=1), *LEFT, **how)
    assert output.nfe == 1 and output.sequences[:, 4:].tolist() == [[1, 0, 0, 0, 0, 0]] * 2


def test_a_call_over_the_saved_defaults():
    saved = {"steps": 64, "alg": "origin", "top_p": 0.9}
    assert with_defaults({"steps": 8}, saved) == {"steps": 8, "alg": "origin", "top_p": 0.9}
    assert with_defaults({"threshold": 0.9}, saved) == {"threshold": 0.9, "top_p": 0.9}
    assert with_defaults({"threshold": 0.9, "steps": 8, "alg": "entropy"}, saved) == {
        "threshold": 0.9,
        "top_p": 0.9,
        "steps": 8,
        "alg": "entropy",
    }
    assert with_defaults({"alg": "first_hitting"}, saved) == {"alg": "first_hitting", "top_p": 0.9}
    assert with_defaults({"revision_strength": 0.1}, {"revision": "remdm", "steps": 9}) == {"revision": "remdm", "steps": 9, "revision_strength": 0.1}
    tuned = {"threshold": 0.9, "alg": "confidence", "block_length": 32}
    assert with_defaults({"factor": 1.0}, tuned) == {"factor": 1.0, "block_length": 32}
    assert with_defaults({"alg": "entropy", "steps": 4}, tuned) == {"alg": "entropy", "steps": 4, "block_length": 32}
    saved |= {"cache": "dual", "repetition_penalty": 1.2, "cfg_scale": 1.0}
    assert with_defaults({"revision": "p2"}, saved) == {"revision": "p2", "top_p": 0.9, "repetition_penalty": 1.2, "cfg_scale": 1.0}
    assert with_defaults({"draft_length": 3}, saved) == {"draft_length": 3, "top_p": 0.9, "repetition_penalty": 1.2}
    assert with_defaults({"initial_length": 8}, saved) == {"initial_length": 8, "top_p": 0.9, "repetition_penalty": 1.2, "cfg_scale": 1.0}
    assert with_defaults({"initial_length": 8, "revision": "gidd"}, saved).keys() == {"initial_length", "revision", "top_p", "repetition_penalty", "cfg_scale"}
    assert with_defaults({"revision": "gidd"}, {"draft_length": 3, "top_p": 0.9}) == {"revision": "gidd", "top_p": 0.9}
    assert with_defaults({"revision": "gidd"}, tuned) == {"revision": "gidd"} | tuned
    assert with_defaults({"block_length": None}, tuned) == {"threshold": 0.9, "alg": "confidence", "block_length": None}


def test_infill_fills_gaps_of_rows_of_different_length():
    rows = [[1, None, None, 2, None, 3], [4, None, 5]]
    filled = infill(HashPredictor(), rows, alg="confidence")
    assert [len(row) for row in filled] == [6, 3]
    for row, done in zip(rows, filled, strict=True):
        assert all(given is None or given == token for given, token in zip(row, done, strict=True)) and max(done) < 23
    assert (
        infill(HashPredictor(), rows[1:], alg="confidence", steps=3, row_keys=[1])[0]
        == infill(HashPredictor(), rows, alg="confidence", steps=3)[1]
    )
    assert 1 not in infill(HashPredictor(favourite=1), [[2, None, None, 3]], eos_token_id=1)[0]
    with pytest.raises(ValueError, match="seed"):
        infill(HashPredictor(), rows, sead=1)


def test_saved_steps_are_a_share_of_each_rows_length():
    rows = [[1, *[None] * 12, 3], [4, None, 5], [6, None, None, None]]
    for share, most in ((3, 9), (1, 3), (8, 24)):  # of 12 positions; a step a token is the most
        options = with_defaults({}, saved_options({"steps": share, "max_new_tokens": 4, "alg": "confidence", "temperature": 1.0}))
        options.pop("max_new_tokens")
        found = infill(HashPredictor(), rows, **options, return_dict_in_generate=True)
        assert found.nfe == min(most, 12)
        for number, row in enumerate(rows):
            steps = min(-(-share * row.count(None) // 4), row.count(None))
            alone = infill(HashPredictor(), [row], **options, row_keys=[number], return_dict_in_generate=True)
            assert alone.sequences == [found.sequences[number]] and alone.nfe == steps
    saved = saved_options({"steps": 4, "max_new_tokens": 64})
    assert with_defaults({"max_new_tokens": 128}, saved) == {"steps": 8, "max_new_tokens": 128}
    assert with_defaults({"max_new_tokens": 65}, with_defaults({"max_new_tokens": 1}, saved))["steps"] == 5  # of the saved ones, not of those between
    assert with_defaults({"max_new_tokens": 128, "steps": 3}, saved)["steps"] == 3
    assert with_defaults({"max_new_tokens": 128}, saved_options({"steps": 4}))["steps"] == 4


def test_a_real_model_gives_each_row_what_it_gives_alone():
    from transformers import GPT2Config, GPT2LMHeadModel

    denoiser_module = pytest.importorskip("dlmconvert.backbone.denoiser")
    from dlmconvert.backbone.spec import DlmSpec

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=40, n_positions=32, n_embd=32, n_layer=2, n_head=2, initializer_range=0.5)
    model = GPT2LMHeadModel(config).eval()
    predictor = denoiser_module.Denoiser(model, DlmSpec(mask_token_id=39, vocab_size=40))
    how = dict(max_new_tokens=6, steps=3, alg="confidence")
    left, right = diffusion_generate(predictor, *LEFT, **how), diffusion_generate(predictor, *RIGHT, **how)
    assert left[1, 2:].tolist() == right[1, :8].tolist() and torch.equal(left[0], right[0])
    for number, prompt in enumerate(PROMPTS):
        assert diffusion_generate(predictor, torch.tensor([prompt]), **how)[0].tolist() == left[number, 4 - len(prompt) :].tolist()


def test_an_exported_model_takes_the_same_options():
    from transformers import GPT2Config, GPT2LMHeadModel

    from dlmconvert.exporting.standalone import DiffusionMixin

    class Exported(DiffusionMixin, GPT2LMHeadModel):
        pass

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=40, n_positions=64, n_embd=32, n_layer=2, n_head=2, initializer_range=0.5, bos_token_id=None, eos_token_id=None
    )
    config.dlm = {"mask_token_id": 39, "vocab_size": 40, "alignment": "shift"}
    model = Exported(config).eval()
    for name, value in {"steps": 3, "alg": "origin", "max_new_tokens": 8}.items():
        setattr(model.generation_config, name, value)
    prompt, mask = LEFT

    def nfe(**options):
        output = model.diffusion_generate(prompt, mask, return_dict_in_generate=True, **options)
        rows = model.infill([[5, None, None, 6, None], [7, None]], return_dict_in_generate=True, **options)
        assert output.sequences.shape == (2, 12) and not bool((output.sequences == 39).any())
        assert [len(row) for row in rows.sequences] == [5, 2] and max(max(row) for row in rows.sequences) < 39
        return output.nfe, rows.nfe

    assert max(nfe()) <= 3
    assert nfe(threshold=0.0) == nfe(factor=float("inf")) == nfe(entropy_bound=float("inf")) == (1, 1)
    assert nfe(threshold=1.1) == nfe(alg="first_hitting") == nfe(threshold=1.1, block_length=2) == (8, 3)
    assert nfe(threshold=0.0, block_length=2) == (4, 2) and nfe(alg="left_to_right", steps=2) == (2, 2)
    assert nfe(entropy_bound=0.0, cfg_scale=1.0, repetition_penalty=1.2) == (16, 6)
    with pytest.raises(ValueError, match="give one of them"):
        nfe(threshold=0.9, entropy_bound=0.1)
    with pytest.raises(ValueError, match="did you mean 'threshold'"):
        nfe(treshold=0.9)


@pytest.mark.parametrize(
    "kind", [dict(draft_length=3), dict(initial_length=4, eos_token_id=1), dict(revision="remdm"), dict(revision="p2"), dict(revision="wino")], ids=str
)
@pytest.mark.parametrize("option", [dict(alg="entropy"), dict(alg="origin"), dict(alg_temp=0.5)], ids=str)
def test_an_order_beside_a_sampler_with_its_own_is_refused(kind, option):
    """Not ignored in silence."""
    model = denoiser_of("llama", "context_causal" if "draft_length" in kind else "bidirectional", "shift", 4 if "draft_length" in kind else None)
    prompts = torch.tensor([[3, 4, 5]])
    assert diffusion_generate(model, prompts, max_new_tokens=6, **kind).shape == (1, 9)
    with pytest.raises(ValueError, match="decides by itself what order"):
        diffusion_generate(model, prompts, max_new_tokens=6, **kind, **option)


def test_a_weight_of_a_helper_needs_a_helper():
    with pytest.raises(ValueError, match="name a helper"):
        diffusion_generate(denoiser_of("llama"), torch.tensor([[3, 4, 5]]), max_new_tokens=6, helper_weight=0.7)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_more_tokens_than_the_model_has_positions_for_are_refused(family):
    model = denoiser_of(family)
    prompts = torch.tensor([[3, 4, 5]])
    room = model.longest - 3
    assert diffusion_generate(model, prompts, max_new_tokens=room, steps=1).shape == (1, model.longest)
    with pytest.raises(ValueError, match=f"{model.longest + 1} tokens.*made for {model.longest}"):
        diffusion_generate(model, prompts, max_new_tokens=room + 1, steps=1)
    with pytest.raises(ValueError, match="made for"):
        infill(model, [[3, *[None] * model.longest]])


@pytest.mark.parametrize("ends", ["x", [1, "x"], 1.5, True], ids=str)
def test_an_end_that_is_no_id_is_refused(ends):
    with pytest.raises(ValueError, match="the id of a token"):
        diffusion_generate(HashPredictor(), torch.tensor([[3, 4]]), max_new_tokens=3, eos_token_id=ends)
    with pytest.raises(ValueError, match="the id of a token"):
        saved_options({"eos_token_id": ends})
