"""Which families can be turned around, and that the rewritten config really turns them."""

from __future__ import annotations

import pytest
import torch
from tiny_models import FAMILIES, REFUSED, config_of, positions_of, rewritten

from dlmconvert.backbone import rewrite
from dlmconvert.backbone.rewrite import call_model, influence, probe_family, rewrite_config
from dlmconvert.diffusion.attention import BIDIRECTIONAL, CAUSAL, AttentionContext
from dlmconvert.errors import EXIT_WRONG_INPUT, UserError


@pytest.mark.parametrize("family", FAMILIES)
def test_accepted(family):
    config = config_of(family)
    before = config.to_json_string()
    generator = torch.get_rng_state()
    probe_family(config, family)
    assert config.to_json_string() == before  # a copy is probed
    assert torch.equal(generator, torch.get_rng_state())


@pytest.mark.parametrize("family", REFUSED)
def test_refused_by_name_with_a_reason(family):
    with pytest.raises(UserError) as caught:
        probe_family(config_of(family), "some/checkpoint")
    error = caught.value
    assert error.exit_code == EXIT_WRONG_INPUT
    assert "some/checkpoint" in error.what and family in error.what
    assert REFUSED[family][1] in str(error)
    assert "convert a decoder-only attention model instead" in error.next_step
    for word in ("Traceback", "Error:", "File \""):
        assert word not in str(error)


@pytest.mark.parametrize("family", FAMILIES)
def test_bidirectional_reaches_past_every_window(family):
    """Under no mask at all, position 0 sees position 20, with windows of 4 in the checkpoint's config."""
    model = rewritten(family)
    tokens_BL = torch.randint(3, 200, (2, 24), generator=torch.Generator().manual_seed(0))
    tokens_BL[1] = tokens_BL[0]
    tokens_BL[1, 20] += 50
    with torch.no_grad():
        for context, sees in ((BIDIRECTIONAL, True), (CAUSAL, False)):
            logits_BLV = call_model(model, tokens_BL, positions_of(tokens_BL), context).logits
            assert bool((logits_BLV[0, 0] != logits_BLV[1, 0]).any()) is sees
            assert bool((logits_BLV[0, 23] != logits_BLV[1, 23]).any())
            before_BLV = call_model(model, tokens_BL.flip(1), positions_of(tokens_BL), context).logits
            assert bool((before_BLV[0, 22] != before_BLV[1, 22]).any())  # 19 tokens back


@pytest.mark.parametrize("family", FAMILIES)
def test_noise_windows_and_caches_are_off(family):
    config = config_of(family)
    for name in ("attn_pdrop", "resid_pdrop", "attention_dropout", "hidden_dropout", "router_jitter_noise", "layerdrop"):
        if hasattr(config, name):
            setattr(config, name, 0.1)
    notes = rewrite_config(config)
    for name, value in vars(config).items():
        if any(word in name for word in ("drop", "jitter")) and isinstance(value, float):
            assert value == 0.0, name
    assert getattr(config, "sliding_window", None) in (None, config.max_position_embeddings)
    assert not config.use_cache
    if FAMILIES[family].get("sliding_window"):
        assert any("sliding_window" in note for note in notes)
    assert [n for n in rewrite_config(config) if "use_cache" not in n] == []  # once is enough


def test_gemma3_keeps_its_layer_types():
    """The label of a layer also chooses its rotary base."""
    config = config_of("gemma3_text")
    before = list(config.layer_types)
    rewrite_config(config)
    assert config.layer_types == before and "sliding_attention" in before


def test_the_call_leaves_the_config_as_it_was():
    model = rewritten("llama")
    tokens_BL = torch.arange(6)[None] + 5
    for value in (None, True):
        if value is not None:
            model.config.is_causal = value
        before = dict(vars(model.config))
        call_model(model, tokens_BL, positions_of(tokens_BL), BIDIRECTIONAL)
        with pytest.raises(TypeError):
            call_model(model, tokens_BL, positions_of(tokens_BL), BIDIRECTIONAL, no_such_argument=object(), attention_mask=1)
        assert vars(model.config) == before


def test_the_probe_sees_attention_that_ignores_its_mask(monkeypatch):
    """A boolean mask for eager attention does nothing: the probe must notice."""
    real = rewrite.realise
    monkeypatch.setattr(rewrite, "realise", lambda context, length, implementation, dtype, device: real(context, length, "sdpa", dtype, device))
    config = config_of("llama")
    config._attn_implementation = "eager"
    with pytest.raises(UserError, match="fails the annealed probe"):
        probe_family(config, "x")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_influence_is_the_pattern(attention):
    from dlmconvert.diffusion.attention import allowed_matrix

    model = rewritten("qwen2", attention=attention)
    context = AttentionContext(open_ratio=0.3, seed=4)
    pattern = allowed_matrix(12, context)[0, 0].float()
    assert torch.equal(influence(model, context), (pattern @ pattern) > 0)
