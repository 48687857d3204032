"""What is left of the source: known drifts, a model beside itself, and the command on a tiny conversion."""

from __future__ import annotations

import dataclasses
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from command_line import SMALL, fails, works, write_corpus
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, VOCAB, build, denoiser

from dlmconvert.backbone.rewrite import call_model
from dlmconvert.backbone.spec import DlmSpec
from dlmconvert.diffusion.attention import CAUSAL
from dlmconvert.errors import UserError
from dlmconvert.evaluation.nelbo import measure_likelihood
from dlmconvert.evaluation.own_tokens import own_acceptance
from dlmconvert.evaluation.retention import Retention, causal_agreement, layer_and_kind, sentence, weight_drift
from dlmconvert.sampling.canvas import canvas_after_prompts
from dlmconvert.sampling.denoise import denoise

LENGTH = 12
SPEC = DlmSpec(attention="causal", mask_token_id=VOCAB - 1, vocab_size=VOCAB)


class Rows:
    """Rows of random tokens, the second half of each a document of its own when isolated."""

    def __init__(self, num_rows=5, isolated=False):
        self.num_rows = num_rows
        self.tokens_BL = torch.randint(0, VOCAB - 1, (num_rows, LENGTH), generator=torch.Generator().manual_seed(3))
        self.segments_BL = (torch.arange(LENGTH) >= 5).long().expand(num_rows, LENGTH) * int(isolated)

    def rows(self, indices: np.ndarray):
        at = torch.from_numpy(np.asarray(indices))
        eligible_BL = torch.ones(len(at), LENGTH, dtype=torch.bool)
        return SimpleNamespace(tokens_BL=self.tokens_BL[at], eligible_BL=eligible_BL, segments_BL=self.segments_BL[at])


def saved(folder, model=None, **changes):
    """A folder with the tensors of a model, some of them changed."""
    tensors = {name: t.clone().contiguous() for name, t in (model or build("llama")).state_dict().items()}
    folder.mkdir()
    save_file(tensors | {name.replace("__", "."): t for name, t in changes.items()}, folder / "model.safetensors")
    return folder


def agreement(model, other, rows=None, **changes):
    pair = denoiser(model, attention="causal"), denoiser(other, attention="causal")
    return causal_agreement(*pair, rows or Rows(), **({"num_rows": 5, "batch": 2} | changes))


def test_a_model_beside_itself(tmp_path):
    folder = saved(tmp_path / "same")
    weights = weight_drift(folder, folder, SPEC)
    assert weights.total.relative == 0.0 and {part.relative for part in weights.parts} == {0.0} and not weights.not_compared
    model = build("llama")
    found = agreement(model, model)
    assert found.greedy == 1.0 and found.acceptance == pytest.approx(1.0, abs=1e-6)
    assert found.cosine == pytest.approx([1.0, 1.0, 1.0], abs=1e-6)  # embeddings and two layers
    assert found.perplexity_before == found.perplexity_after == math.exp(found.nats_after)
    said = sentence(Retention(weights, found))
    assert "100.0% of positions" in said and "0.00%" in said and said.count(". ") == 0 and said.endswith(".")


def test_known_drifts(tmp_path):
    """(1 + s) W is s away from W; a group is one long vector."""
    before = saved(tmp_path / "before")
    tensors = load_file(before / "model.safetensors")
    names = [name for name in tensors if name.startswith("model.layers.1.mlp.")]
    after = saved(tmp_path / "after", **{name.replace(".", "__"): tensors[name] * 1.25 for name in names})
    weights = weight_drift(after, before, SPEC)
    drift = {(part.layer, part.kind): part.relative for part in weights.parts}
    assert drift.pop((1, "MLP")) == pytest.approx(0.25, rel=1e-5)
    assert set(drift) == {(0, "attention"), (0, "MLP"), (0, "norm"), (1, "attention"), (1, "norm"), (None, "norm"), (None, "embedding"), (None, "head")}
    assert set(drift.values()) == {0.0}

    def norm(chosen):
        return math.sqrt(sum(float(tensors[name].double().square().sum()) for name in chosen))

    everything = norm(name for name in tensors if name not in ("model.embed_tokens.weight", "lm_head.weight"))
    words = math.sqrt(sum(float(tensors[name][: VOCAB - 1].double().square().sum()) for name in ("model.embed_tokens.weight", "lm_head.weight")))
    assert weights.total.relative == pytest.approx(0.25 * norm(names) / math.hypot(everything, words), rel=1e-5)
    (mlp,) = [part for part in weights.by_kind if part.kind == "MLP"]
    assert mlp.relative == pytest.approx(0.25 * norm(names) / norm(name for name in tensors if ".mlp." in name), rel=1e-5)


def test_a_mask_row_is_not_the_sources(tmp_path):
    """Neither a row that was added, nor one inside of the embedding that now stands for the mask; other rows are."""
    before = saved(tmp_path / "before")
    grown = {}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        grown[name.replace(".", "__")] = torch.cat([load_file(before / "model.safetensors")[name], torch.ones(1, 32)])
    added = DlmSpec(mask_token_id=VOCAB, vocab_size=VOCAB)
    assert weight_drift(saved(tmp_path / "grown", **grown), before, added).total.relative == 0.0
    inside = {name: table[:VOCAB].clone() for name, table in grown.items()}
    for table in inside.values():
        table[7] = 1.0
    moved = saved(tmp_path / "moved", **inside)
    assert weight_drift(moved, before, DlmSpec(mask_token_id=7, vocab_size=VOCAB)).total.relative == 0.0
    assert weight_drift(moved, before, DlmSpec(mask_token_id=7, vocab_size=VOCAB, mask_is_word=True)).total.relative > 0
    assert weight_drift(moved, before, added).total.relative > 0


def test_published_names_without_the_prefix_and_strangers(tmp_path):
    model = build("gpt2")
    after = saved(tmp_path / "after", model)
    (tmp_path / "hub").mkdir()
    tensors = {name.removeprefix("transformer."): t.clone() for name, t in model.state_dict().items() if name != "lm_head.weight"}
    save_file(tensors | {"h.0.attn.masked_bias": torch.tensor(-1e4)}, tmp_path / "hub" / "model.safetensors")
    weights = weight_drift(after, tmp_path / "hub", SPEC)
    assert weights.total.relative == 0.0 and weights.not_compared == ["h.0.attn.masked_bias"]
    llama = saved(tmp_path / "llama")
    narrow, short = saved(tmp_path / "narrow", build("llama", intermediate_size=40)), saved(tmp_path / "short", build("llama", num_hidden_layers=1))
    for model, source, why in (
        (after, llama, "it has no transformer.h.0"), (llama, narrow, "] there and ["), (llama, short, "it has no model.layers.1"),
        (short, llama, "another number of layers"),
    ):  # fmt: skip
        with pytest.raises(UserError, match="is not of the architecture of") as caught:
            weight_drift(model, source, SPEC)
        assert why in caught.value.why and "--source MODEL" in caught.value.next_step


def test_every_tensor_of_every_family_has_a_kind():
    for family in FAMILIES:
        with torch.device("meta"):
            model = build_empty(family)
        found = {name: layer_and_kind(name) for name in model.state_dict()}
        assert not [name for name, (_, kind) in found.items() if kind == "other"], family
        for layer in (0, 1):
            assert {"attention", "MLP", "norm"} <= {kind for at, kind in found.values() if at == layer}, family
        assert {"embedding", "head", "norm"} == {kind for at, kind in found.values() if at is None}, family


def build_empty(family):
    from tiny_models import config_of
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(config_of(family))


@pytest.mark.parametrize("isolated", [False, True])
def test_the_numbers_are_those_of_plain_transformers(isolated):
    """Without any code of ours: documents one by one, all logits, all hidden states."""
    model, other = build("llama"), build("llama", seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # near enough to agree now and then
            other.get_parameter(name).copy_(parameter + 0.03 * other.get_parameter(name))
    rows = Rows(isolated=isolated)
    found = agreement(model, other, rows)
    logits, hidden = [], []
    cuts = (slice(0, 5), slice(5, LENGTH)) if isolated else (slice(0, LENGTH),)
    with torch.no_grad():
        for one in (model, other):
            outputs = [one(rows.tokens_BL[:, cut], output_hidden_states=True) for cut in cuts]
            logits.append(torch.cat([o.logits[:, :-1].flatten(0, 1) for o in outputs])[:, : VOCAB - 1])
            hidden.append([torch.cat([o.hidden_states[i][:, :-1].flatten(0, 1) for o in outputs]) for i in range(3)])
    p, q = (one.double().softmax(-1) for one in logits)
    assert found.tokens == len(p) and 0 < found.greedy < 1
    assert found.greedy == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert found.acceptance == pytest.approx(float(1 - (p - q).abs().sum(-1).mean() / 2), abs=1e-5)
    assert found.cosine == pytest.approx([float(torch.cosine_similarity(a, b, dim=-1).mean()) for a, b in zip(*hidden, strict=True)], abs=1e-5)
    for one, nats in ((model, found.nats_after), (other, found.nats_before)):
        measured = measure_likelihood(denoiser(one, attention="causal"), rows, num_rows=5, draws=1, batch=4, seed=0)
        assert nats == pytest.approx(measured.nats_per_token, rel=1e-5)


def test_the_batch_changes_nothing_and_progress_is_told():
    model, other = build("llama"), build("llama", seed=1)
    one, all_at_once = agreement(model, other, batch=1), agreement(model, other, batch=50)
    assert one.acceptance == pytest.approx(all_at_once.acceptance, rel=1e-5) and one.greedy == all_at_once.greedy
    done = []
    assert agreement(model, other, num_rows=3, advance=done.append).rows == 3 and done == [2, 1]


def test_a_model_whose_denoising_is_its_ar_path_accepts_itself():
    """Blocks of one token under shift are predicted from clean text: p is q."""
    model = denoiser(build("llama"), "shift", "context_causal", block_length=1)
    found = own_acceptance(model, Rows(), num_rows=5, batch=2)
    assert found.tokens == 5 * 6 and found.acceptance == pytest.approx(1.0, abs=1e-5)
    assert own_acceptance(denoiser(build("llama")), Rows(), num_rows=5, batch=2).acceptance < 0.9


@torch.no_grad()
@pytest.mark.parametrize(("pattern", "alignment"), [("causal_in_block", "shift"), ("context_causal", "in_place")])
def test_a_model_that_drafts_blocks_in_one_step_is_judged_by_its_drafts(pattern, alignment):
    """Trained on blocks of masks alone (I-DLM, TiDAR): q of all tokens of a block from one forward. (Token by token, the first of the two would be its own AR path.)"""
    model, rows, block = denoiser(build("llama"), alignment, pattern, block_length=3), Rows(), 3
    model.spec = dataclasses.replace(model.spec, corruption="all_masked")
    found = own_acceptance(model, rows, num_rows=5, batch=50)
    ratios = []
    for row in range(5):
        canvas = canvas_after_prompts(rows.tokens_BL[row, : LENGTH // 2][None], None, LENGTH - LENGTH // 2, [row])
        steps = list(denoise(model, canvas, order="left_to_right", temperature=1.0, seed=0, threshold=0.0))
        text = steps[-1].tokens_BL[0]
        p_LV = call_model(model.model, text[None], torch.arange(LENGTH)[None], CAUSAL).logits[0, :, : VOCAB - 1].softmax(-1)
        places_L = torch.arange(LENGTH)
        new_L = places_L >= LENGTH // 2
        starts_L = new_L & (places_L % block == 0) & torch.tensor(alignment == "shift")  # read from the clean copy
        q_NV = model.predict_blocks(text.masked_fill(new_L & ~starts_L, VOCAB - 1)[None], text[None], (new_L & ~starts_L)[None], starts_L[None], places_L[None])
        at_N = torch.cat([places_L[new_L & ~starts_L], places_L[starts_L]])
        q_N = q_NV[:, : VOCAB - 1].softmax(-1)[torch.arange(len(at_N)), text[at_N]]
        ratios += (p_LV[at_N - 1, text[at_N]] / q_N).clamp(max=1.0).tolist()
    assert found.acceptance == pytest.approx(sum(ratios) / len(ratios), rel=1e-4) and 0.1 < found.acceptance < 0.99


@torch.no_grad()
@pytest.mark.parametrize("isolated", [False, True])
def test_own_tokens_are_judged_in_the_state_in_which_they_were_filled_in(isolated):
    """Token by token, row by row, without the sampler: q from a row of masks, p from plain transformers."""
    model, rows, length = denoiser(build("llama"), "in_place"), Rows(isolated=isolated), LENGTH
    found = own_acceptance(model, rows, num_rows=5, batch=50)
    ratios = []
    for row in range(5):
        begin = 5 if isolated else 0
        prompt = rows.tokens_BL[row, begin : length // 2]
        canvas = canvas_after_prompts(prompt[None], None, length - length // 2, [row])
        (*_, last) = denoise(model, canvas, order="left_to_right", temperature=1.0, seed=0)
        text = last.tokens_BL[0]
        p_LV = model.model(text[None]).logits[0, :, : VOCAB - 1].softmax(-1)
        for place in range(len(prompt), len(text)):
            x_t = text.clone()
            x_t[place:] = VOCAB - 1
            wanted = torch.arange(len(text))[None] == place
            q_V = model.predict(x_t[None], wanted)[0, : VOCAB - 1].softmax(-1)
            ratios.append(min(1.0, float(p_LV[place - 1, text[place]] / q_V[text[place]])))
    assert found.tokens == len(ratios) and found.acceptance == pytest.approx(sum(ratios) / len(ratios), rel=1e-4)


def test_the_command(tiny_checkpoints, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path)
    source = tiny_checkpoints["gpt2"]
    works("adapt", source, *SMALL, "run.folder=runs/tiny")
    told = works("eval", "--retention")
    for word in ("attention moved", "MLP moved", "hidden cosine", "AR perplexity", "accepted by the source", "own tokens accepted by its AR path", "Read from left to right"):
        assert word in " ".join(told.out.split()), told.out
    picture = tmp_path / "runs" / "tiny" / "plots" / "retention.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    found = json.loads(works("eval", "--retention", "--json", "--plot", "mine.png").out)
    assert (tmp_path / "mine.png").is_file() and found["sentence"] in told.out
    assert found["own"]["tokens"] == 4 * 16 and 0 < found["own"]["acceptance"] < 1 and f"{found['own']['acceptance']:.1%} of the tokens" in found["sentence"]
    assert 0 < found["weights"]["total"]["relative"] < 1 and 0 < found["agreement"]["acceptance"] < 1
    nll = json.loads(works("eval", "--json").out)[1]
    assert nll["kind"] == "nll" and found["agreement"]["nats_before"] == pytest.approx(nll["nats_per_token"], rel=1e-5)
    # The run's source has a mask row more than the checkpoint that it was made from; the numbers are the same.
    original = json.loads(works("eval", "--retention", "--json", "--source", source).out)
    assert original["weights"]["total"] == found["weights"]["total"]
    assert original["agreement"]["acceptance"] == pytest.approx(found["agreement"]["acceptance"], abs=1e-6)
    itself = json.loads(works("eval", "runs/tiny/source", "--retention", "--json", "--rows", 2).out)
    assert itself["own"] is None and itself["weights"]["total"]["relative"] == 0 and itself["agreement"]["greedy"] == 1 and itself["agreement"]["rows"] == 2
    assert "nothing is overwritten" in fails(2, "eval", "--retention", "--plot", "mine.png")
    assert "--source MODEL" in fails(2, "eval", source, "--retention", "--data", "text.jsonl")
    assert "belongs to --retention" in works("eval", "--plot", "other.png").err
