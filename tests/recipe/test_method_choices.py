"""Methods by name, single choices on top of them, and choices that cannot both be meant."""

from __future__ import annotations

import pytest
from test_recipe import refused, with_keys

from dlmconvert.errors import UserError
from dlmconvert.methods import METHODS
from dlmconvert.recipe.load import load_recipe, validate
from dlmconvert.recipe.method import doubling_stages, warm_up_stable_decay_stages

CONTRADICTIONS = {
    "corrects twice": ["method.objective.normaliser=masked"],
    "is not 0 < low": ["method.corruption.band=[0.8, 0.3]"],
    "is not 0 < low <=": ["method.corruption.band=[0, 1]"],
    "holds for one view only": ["method.corruption.views=complementary", "method.corruption.count=exact"],
    "would pair the pairs": ["method.corruption.views=complementary", "method.corruption.noise_levels=antithetic"],
    "which is high where t is low": ["method.corruption.views=complementary", "method.corruption.rise_steps=0.4"],
    "rise_from says where": ["method.corruption.rise_from=0.5"],
    "rise_steps says how tokens": ["method.name=ar", "method.attention.anneal_steps=", "method.corruption.rise_steps=5"],
    "goes by whole rows": ["method.attention.anneal=pieces", "method.corruption.band_search_steps=5"],
    "cuts rows into eighths": ["method.attention.anneal=pieces", "data.row_length=100"],
    "symmetric around 0.5": ["method.corruption.views=complementary", "method.corruption.band=[0.3, 0.8]"],
    "train.rows_per_step=5 is odd": ["method.corruption.views=complementary", "train.rows_per_step=5", "train.micro_batch=5"],
    "anneal=window needs method.attention.anneal_steps": ["method.attention.anneal=window", "method.attention.anneal_steps="],
    "weighs masked tokens": ["method.name=ar", "method.attention.anneal_steps=", "method.objective.weight=cart"],
    "method.corruption.count says how": ["method.name=ar", "method.attention.anneal_steps=", "method.corruption.count=exact"],
    "needs method.attention.block_length": ["method.name=sdar", "method.attention.block_length=", "method.attention.anneal_steps="],
    "all_masked leaves a block_causal_noisy model": ["method.name=tidar", "method.attention.anneal_steps=", "method.attention.pattern=block_causal_noisy", "method.objective.ar_weight=0"],
    "not block_causal_noisy: there is no clean copy": ["method.name=nemotron", "method.attention.anneal_steps=", "method.attention.pattern=block_causal_noisy"],
    "with block_causal_noisy use block_growth": ["method.name=bd3lm", "method.attention.pattern=block_causal_noisy", "method.attention.anneal=window"],
    "is for block_causal": ["method.attention.block_length=8"],
    "opens a one-stream pattern": ["method.name=bd3lm", "method.attention.anneal=random"],
    "changes the blocks of": ["method.attention.anneal=block_growth"],
    "begin at step 0": ["method.name=nbdiff", "method.attention.anneal_steps=", "method.attention.block_stages=[[5, 1], [9, 32]]"],
    "ends with blocks of 16": ["method.name=nbdiff", "method.attention.anneal_steps=", "method.attention.block_stages=[[0, 1], [9, 16]]"],
    "more than train.steps": ["method.name=llada2", "method.attention.anneal_steps=0.8", "method.attention.decay_steps=0.5"],
    "speaks of blocks": ["method.corruption.levels_per=block"],
    "makes no bound": ["method.name=efficient-dlm", "method.attention.anneal_steps=", "method.objective.weight=elbo", "method.objective.normaliser=eligible"],
    "nothing to read": ["method.corruption.kind=all_masked", "method.objective.weight=unweighted"],
    "one noise level only": ["method.name=i-dlm", "method.objective.weight=elbo"],
    "and so the answer": ["method.name=bd3lm", "method.attention.anneal_steps=", "method.objective.ar_weight=0.5"],
    "there is no clean copy": ["method.objective.ar_weight=0.5"],
    "ar_schedule=balanced needs": ["method.objective.ar_schedule=balanced"],
    "follows method.attention.anneal": ["method.name=tidar", "method.attention.anneal_steps=", "method.objective.ar_schedule=annealed"],
    "is for method.corruption.kind=gidd": ["method.objective.weight=gidd_dynamic"],
    "uniform_share is for": ["method.corruption.uniform_share=0.2"],
    "under method.corruption.kind=gidd all tokens are targets": ["method.name=gidd", "method.attention.anneal_steps=", "method.objective.weight=unweighted"],
    "draws each by itself": ["method.name=gidd", "method.attention.anneal_steps=", "method.corruption.count=exact"],
    "or random tokens already": ["method.name=gidd", "method.attention.anneal_steps=", "method.corruption.edit_share=0.1"],
    "belong together: set both": ["method.corruption.embedding_noise=0.1"],
    "judges levels of independent masks": ["method.corruption.band_search_steps=5", "method.corruption.count=exact"],
    "holds none back": ["method.corruption.band_search_steps=5", "data.validation=0"],
    "opens at masks, and this training has none": ["method.name=ar", "method.attention.anneal_steps=", "train.lora={gated: true}"],
    "has no gradient under train.lora.gated=true": ["method.name=i-dlm", "method.attention.anneal_steps=3", "train.lora={gated: true}", "method.objective.ar_weight=0.2"],
    "asks about random tokens as well": ["method.name=gidd", "method.attention.anneal_steps=", "train.lora={gated: true}"],
    "is not for gated adapters": ["train.lora={gated: true, dropout: 0.1}"],
    "lie beside the layers": ["train.lora={gated: true}", "engine.name=deepspeed", "engine.zero_stage=3"],
    "compares one copy": ["method.name=nbdiff", "method.objective.alignment_weight=1"],
    "frozen source whole on each rank": ["method.objective.teacher_kl=1", "engine.name=deepspeed", "engine.zero_stage=3"],
    "speaks of masked tokens": ["method.name=gidd", "method.attention.anneal_steps=", "method.objective.teacher_kl=1"],
    "method.objective.cart_p": ["method.objective.cart_p=1.5"],
    "cart_p is for method.objective.weight=cart": ["method.objective.cart_p=0.3"],
    "edit_steps says when edits begin": ["method.corruption.edit_steps=10"],
    "method.corruption.noise_levels says how": ["method.name=i-dlm", "method.corruption.noise_levels=stratified"],
}


@pytest.mark.parametrize("sentence", CONTRADICTIONS)
def test_contradictions(sentence):
    error = refused(with_keys(*CONTRADICTIONS[sentence]), sentence)
    assert "mistakes" not in error.what, error


@pytest.mark.parametrize(
    "words",
    [
        ["method.attention.anneal=window"],
        ["method.corruption.band=[0.3, 0.8]", "method.corruption.count=exact"],
        ["method.corruption.views=complementary", "method.corruption.band=[0.25, 0.75]", "method.objective.weight=unweighted"],
        ["method.corruption.count=at_least_one", "method.objective.weight=cart", "method.objective.normaliser=masked"],
        ["method.objective.teacher_kl=1", "method.objective.alignment_weight=2", "engine.name=deepspeed", "engine.zero_stage=2"],
        ["method.corruption.edit_share=0.1", "method.corruption.embedding_noise=0.1", "method.corruption.embedding_noise_steps=0.1"],
        ["method.name=nbdiff", "method.corruption.embedding_noise=0.1", "method.corruption.embedding_noise_steps=5"],
        ["method.name=nbdiff", "method.attention.anneal_steps=3", "method.corruption.edit_share=0.1"],
        ["method.name=i-dlm", "method.attention.anneal_steps=3", "method.corruption.edit_share=0.1"],
        ["method.name=bd3lm", "method.attention.anneal_steps=", "method.attention.pattern=block_causal_noisy", "method.corruption.edit_share=0.1"],
        ["method.name=bd3lm", "method.attention.anneal_steps=", "method.corruption.kind=gidd", "method.corruption.levels_per=block", "method.objective.weight=gidd_clamped"],
        ["method.name=nbdiff", "method.attention.anneal_steps=3", "method.corruption.kind=gidd"],
        ["method.name=efficient-dlm", "method.attention.anneal_steps=", "method.corruption.kind=gidd", "method.objective={weight: gidd_dynamic, normaliser: eligible}"],
        ["method.name=fast-dllm-v2", "method.attention.pattern=block_causal_noisy", "method.attention.anneal=block_growth", "method.attention.anneal_steps=5"],
        ["method.alignment=in_place", "method.corruption.noise_levels=antithetic", "train.rates.attention=2", "train.rates.head=0"],
        ["method.name=bd3lm", "method.attention.anneal_steps=", "method.attention.pattern=block_causal_noisy", "method.objective.teacher_kl=1", "method.objective.alignment_weight=1"],
        # What a row said for its own choice goes with that choice.
        ["method.name=nbdiff", "method.attention.anneal_steps=3", "train.lora={gated: true}"],
        ["method.name=nemotron", "method.attention.anneal_steps=", "method.corruption.kind=all_masked", "method.objective.weight=unweighted"],
        ["method.name=llada2", "method.attention.anneal=block_growth", "method.attention.anneal_steps=5"],
        ["method.name=fast-dllm-v2", "method.attention.anneal_steps=", "method.attention.pattern=bidirectional"],
        ["method.name=efficient-dlm", "method.attention.anneal_steps=", "method.attention.pattern=bidirectional"],
        ["method.name=fast-dllm-v2", "method.attention.anneal_steps=", "method.attention.pattern=bidirectional", "method.corruption.kind=gidd", "method.objective={weight: gidd_dynamic}"],
    ],
)
def test_choices_that_go_together(words):
    validate(with_keys(*words), "x")


def test_what_belonged_to_a_choice_goes_with_it(tmp_path):
    """Of the row and of the file; what the command line itself says stays, and is refused."""
    file = tmp_path / "mine.yaml"
    file.write_text("source: {model: gpt2}\nmethod: {name: nbdiff, attention: {anneal_steps: 0.3}, corruption: {levels_per: row}, objective: {ar_weight: 0, ar_schedule: fixed}}\n")
    plain = load_recipe(str(file), ["method.attention.anneal=none", "method.attention.pattern=bidirectional"]).method.attention
    assert (plain.anneal, plain.anneal_steps, plain.block_length) == ("none", None, None)
    assert load_recipe(str(file), ["method.attention.anneal=none"]).method.attention.block_length == 32
    for said in ("anneal_steps=0.5", "block_length=8"):
        with pytest.raises(UserError, match=said.partition("=")[0]):
            load_recipe(str(file), ["method.attention.anneal=none", "method.attention.pattern=bidirectional", f"method.attention.{said}"])


def test_adapters_on_masks_only_need_no_loss_that_holds_the_next_token_path():
    """It would have no gradient: the row's goes, and so does the file's when the command line asks for such adapters."""
    for what, words in (("qwen3-8b-i-dlm", ["train.lora.gated=true"]), ("default", ["source.model=x", "method.name=tidar", "train.lora={gated: true}"])):
        assert load_recipe(what, words[:-1]).method.objective.ar_weight > 0
        assert load_recipe(what, words).method.objective.ar_weight == 0
        with pytest.raises(UserError, match="has no gradient"):
            load_recipe(what, [*words, "method.objective.ar_weight=0.2"])


def test_each_method_says_where_it_stands():
    for name, row in METHODS.items():
        assert row.name == name and row.paper and row.summary and set(row.choices) == {"attention", "alignment", "corruption", "objective"}
        assert row.departs or name == "ar"


def test_a_method_with_one_choice_changed():
    values = {"source": {"model": "gpt2"}, "method": {"name": "dream", "objective": {"cart_p": 0.3}, "attention": {"anneal": "window", "anneal_steps": 5}}}
    method = validate(values, "x").method
    assert (method.objective.weight, method.objective.cart_p, method.objective.normaliser) == ("cart", 0.3, "masked")
    assert method.attention.anneal == "window" and method.alignment == "shift"
    assert METHODS["dream"].choices["objective"]["cart_p"] == 0.1


def test_blocks_grow_by_doubling():
    """NBDiff: 1, 2, 4, ... 32, at its full length from step 2,499 (from 0) of 4,000; I-DLM: 1, 2, 3 in equal parts."""
    stages = doubling_stages(32, 2500)
    assert [length for _, length in stages] == [1, 2, 4, 8, 16, 32] and stages[0][0] == 0 and stages[-1][0] == 2499
    assert len({b[0] - a[0] for a, b in zip(stages, stages[1:], strict=False)}) <= 2, "equally long, but for rounding"
    assert doubling_stages(3, 301) == ((0, 1), (150, 2), (300, 3)) and doubling_stages(1, 10) == ((0, 1),)
    assert doubling_stages(32, 1) == ((0, 32),), "of stages without a step the last counts"


def test_blocks_grow_to_the_row_stay_and_shrink():
    """LLaDA2.0: 1, 4, 32, 64, 4096, and 4096, 2048, ... 32; half of the decay trains the blocks of decoding."""
    stages = warm_up_stable_decay_stages(32, 4096, steps=1000, anneal_steps=201, decay_steps=200)
    assert stages == (
        (0, 1), (50, 4), (100, 32), (150, 64), (200, 4096), (814, 2048), (828, 1024), (842, 512), (857, 256), (871, 128), (885, 64), (900, 32),
    )  # fmt: skip
    assert [length for _, length in warm_up_stable_decay_stages(8, 24, 100, 21, 20)] == [1, 4, 24, 12, 8], "rows shorter than the path"
