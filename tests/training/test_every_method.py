"""Each published method through the parts that a run is made of: batches, loss, gradient; and one by one through the command line."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from command_line import SMALL, curve, works, write_corpus
from memory_stream import make_engine
from test_loop import close
from tiny_models import VOCAB, build, config_of, denoiser, rewritten

from dlmconvert.backbone.adapters import attach_lora
from dlmconvert.backbone.rewrite import rewrite_config
from dlmconvert.backbone.teacher import Teacher
from dlmconvert.data.loader import positions
from dlmconvert.data.rows import Rows
from dlmconvert.diffusion.attention import CAUSAL
from dlmconvert.diffusion.streams import block_starts
from dlmconvert.methods import METHODS
from dlmconvert.recipe.load import validate
from dlmconvert.runs.models import TrainingJob, batch_stream, loop_settings_of
from dlmconvert.training.engine import enable_gradient_checkpointing
from dlmconvert.training.loop import accumulate
from dlmconvert.training.losses import ar_weight_at, batch_loss, context_of
from dlmconvert.training.terms import embedding_noise

ROWS, LENGTH, MASK = 8, 24, VOCAB - 1


class Store:
    """Rows in memory with all that a row store on disk has. kind: `joined`, `isolated` documents, `padded` conversations."""

    def __init__(self, kind="joined", row_length=LENGTH):
        self.row_length, self.num_rows, self.kind = row_length, 32, kind
        self.has_segments, self.all_eligible, self.meta = kind != "joined", kind != "padded", {}
        generator = torch.Generator().manual_seed(11)
        self.tokens_RL = torch.randint(3, 200, (self.num_rows, row_length), generator=generator)
        self.cuts_R = torch.randint(5, row_length - 5, (self.num_rows,), generator=generator)

    def rows(self, indices):
        return Rows(self.tokens_RL[torch.from_numpy(np.asarray(indices))], self.eligible(indices), self.segments(indices))

    def eligible(self, indices):
        places_L, cuts_B = torch.arange(self.row_length), self.cuts_R[torch.from_numpy(np.asarray(indices))]
        if self.kind != "padded":
            return torch.ones(len(indices), self.row_length, dtype=torch.bool)
        return (places_L >= 3) & (places_L < cuts_B[:, None])  # the answer, behind a prompt of three tokens

    def segments(self, indices):
        if self.kind == "joined":
            return torch.zeros(len(indices), self.row_length, dtype=torch.int64)
        return (torch.arange(self.row_length) >= self.cuts_R[torch.from_numpy(np.asarray(indices))][:, None]).long()


def job_of(name, store, micro_batch=ROWS, row_length=LENGTH, **method):
    """What a recipe with this method trains. Blocks of 8 at most, so that a row has several."""
    attention = METHODS[name].choices["attention"]
    choices = {"name": name, **method}
    if attention.get("block_length", 0) > 8:
        choices = {"attention": {"block_length": 8}, **choices}
    train = {"steps": 8, "rows_per_step": ROWS, "micro_batch": micro_batch, "learning_rate": 3e-3}
    if attention["anneal"] != "none" and (attention.get("anneal_steps") or 0) >= 1:
        choices["attention"] = {"anneal_steps": 4, **choices.get("attention", {})}
    recipe = validate({"source": {"model": "x"}, "method": choices, "train": train}, "x")
    return TrainingJob("adapt", recipe.train, recipe.method, None, "adapt", [store], [1.0], None, isolated=store.kind == "isolated")


def prepared(name, store=None, micro_batch=ROWS, family="llama", **method):
    job = job_of(name, store or Store(), micro_batch, **method)
    engine = make_engine(family, alignment=job.method.alignment)
    engine.denoiser._teacher = (Teacher(lambda: build(family, seed=5)),)
    return engine, batch_stream(job, engine.denoiser.spec), loop_settings_of(job, LENGTH)


def gradient(engine, stream, settings, step, rank=0, count=1):
    engine.denoiser.zero_grad()
    engine.ranks = SimpleNamespace(rank=rank, count=count, stands_for=1)
    part = accumulate(engine, stream, settings, step)
    return part.sums, {name: p.grad.clone() for name, p in engine.parameters.items() if p.grad is not None}


KINDS = [(name, "isolated") for name in METHODS] + [(name, kind) for name in ("efficient-dlm", "nbdiff", "i-dlm") for kind in ("joined", "padded")]


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_one_gradient_under_any_split_and_any_number_of_ranks(name, kind):
    """1 x 8, 8 x 1, 2 ranks x 4 and 2 ranks x 3 + 1: the same sums and the same gradient, in the middle of its schedule."""
    engine, stream, settings = prepared(name, Store(kind))
    step = 3
    whole_sums, whole = gradient(engine, stream, settings, step)
    assert any(float(g.abs().max()) > 0 for g in whole.values())
    for micro_batch, count in ((1, 1), (3, 2)):
        settings_split = replace(settings, micro_batch=micro_batch)
        parts = [gradient(engine, stream, settings_split, step, rank, count) for rank in range(count)]
        for key, value in whole_sums.items():
            assert sum(sums[key] for sums, _ in parts) == pytest.approx(value, rel=2e-5, abs=1e-6), key
        close({key: sum(grads[key] for _, grads in parts) for key in whole}, whole, 2e-5, 2e-6)


EXTRAS = {
    "kl to the source": ("llada", {"objective": {"teacher_kl": 0.7}}),
    "both comparisons": ("dream", {"objective": {"teacher_kl": 0.7, "alignment_weight": 2.0}}),
    "edits from the first step": ("seed-edit", {"corruption": {"edit_steps": 8}}),
    "noise on mask embeddings": ("nbdiff", {"corruption": {"embedding_noise": 0.3, "embedding_noise_steps": 4}}),
    "blocks behind noised ones": ("bd3lm", {"attention": {"pattern": "block_causal_noisy", "block_length": 8}, "alignment": "shift"}),
    "blocks behind noised ones, near the source": (
        "bd3lm", {"attention": {"pattern": "block_causal_noisy", "block_length": 8}, "objective": {"teacher_kl": 0.7, "alignment_weight": 2.0}},
    ),
    "gidd clamped": ("gidd", {"objective": {"weight": "gidd_clamped"}, "corruption": {"uniform_share": 0.4}}),
}


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("kind", ["isolated", "padded"])
def test_one_gradient_with_what_can_be_added(extra, kind):
    name, choices = EXTRAS[extra]
    plain, _ = gradient(*prepared(name, Store(kind)), 3)
    engine, stream, settings = prepared(name, Store(kind), **choices)
    sums, whole = gradient(engine, stream, settings, 3)
    assert sums["loss"] != plain["loss"]
    split = replace(settings, micro_batch=3)
    found, grads = gradient(engine, stream, split, 3)
    assert found == pytest.approx(sums, rel=2e-5, abs=1e-6)
    close(grads, whole, 2e-5, 2e-6)


def test_a_model_that_is_the_source_is_near_it():
    """Without masks and from left to right, hidden states and predictions are the source's: both distances are 0; else they are not."""
    engine, stream, settings = prepared("dream", objective={"alignment_weight": 1.0, "teacher_kl": 1.0})
    engine.denoiser._teacher = (Teacher(lambda: engine.denoiser.model),)
    batch = stream.batch(0)
    sums = batch_loss(engine, batch, context_of(settings, 0), settings, 100, 1, 50)[1]
    assert sums["alignment"] > 0.05 and sums["teacher_kl"] > 0.05
    clean = replace(batch, x_t_BL=batch.x_0_BL)
    sums = batch_loss(engine, clean, CAUSAL, settings, 100, 1, 50)[1]
    assert sums["alignment"] == pytest.approx(0, abs=1e-5) and sums["teacher_kl"] == pytest.approx(0, abs=1e-5)


def test_edits_begin_with_the_last_phase():
    """The rows of the last fifth have substitutions and no masks, at most a tenth of each; the steps before have none."""
    _, stream, _ = prepared("seed-edit")
    assert stream.batch(5).x_edit_BL is None
    edited = torch.cat([(stream.batch(step).x_edit_BL != stream.batch(step).x_0_BL).sum(1) for step in range(6, 8)])
    assert 0 < int(edited.max()) <= LENGTH // 10 and not bool((stream.batch(7).x_edit_BL == MASK).any())


def test_noise_is_on_masks_only_and_ends():
    noisy = {"embedding_noise": 0.3, "embedding_noise_steps": 2}
    losses = []
    for choices in ({}, {"corruption": noisy}, {"corruption": {**noisy, "embedding_noise": 0.31}}):
        engine, stream, settings = prepared("llada", **choices)
        losses.append([gradient(engine, stream, settings, step)[0]["loss"] for step in (1, 2)])
    assert len({first for first, _ in losses}) == 3 and len({second for _, second in losses}) == 1
    noise_ND = embedding_noise(settings, 0, [(0, 0, 4), (0, 0, 5)], torch.eye(2, 9, dtype=torch.bool))(20000)
    assert noise_ND.shape == (2, 20000) and float(noise_ND.std()) == pytest.approx(0.31, rel=0.02) and not torch.equal(noise_ND[0], noise_ND[1])


def test_the_weight_of_the_next_token_loss():
    """Fixed, falling with the growth of blocks, or balanced by the losses of the step before, None of which is the first step's."""
    _, _, settings = prepared("nbdiff", attention={"anneal_steps": 4})
    assert [ar_weight_at(settings, step, None) for step in range(5)] == [0.5, 0.375, 0.25, 0.125, 0.0]
    engine, stream, settings = prepared("i-dlm", objective={"ar_schedule": "balanced", "ar_weight": 2.0})
    assert ar_weight_at(settings, 3, None) == 2.0 and ar_weight_at(settings, 3, 0.25) == 0.5
    by_balance = []
    for balance in (None, 0.25):
        engine.denoiser.zero_grad()
        by_balance.append(accumulate(engine, stream, settings, 3, balance).sums)
    (first, second), ar_nll = by_balance, by_balance[0]["ar_nll"]
    assert first["loss"] - second["loss"] == pytest.approx(1.5 * ar_nll, rel=1e-4) and ar_nll == second["ar_nll"]


def test_adapters_and_noise_on_the_trained_row_of_the_mask():
    """peft wraps the embedding then."""
    model = attach_lora(rewritten("llama"), rank=2, alpha=4.0, dropout=0.0, target_modules="all-linear", mask_token_id=MASK, seed=0)
    job = job_of("nbdiff", Store(), corruption={"embedding_noise": 0.3, "embedding_noise_steps": 4})
    engine = make_engine(model=model, alignment=job.method.alignment)
    stream, settings = batch_stream(job, engine.denoiser.spec), loop_settings_of(job, LENGTH)
    sums, grads = gradient(engine, stream, settings, 3)
    assert sums["loss"] != gradient(engine, stream, replace(settings, embedding_noise_steps=0), 3)[0]["loss"] and grads


def test_a_source_that_asks_for_its_own_balance_loss_is_told_not_to():
    """transformers would compute it from a mask that it cannot read."""
    config = config_of("mixtral", output_router_logits=True)
    notes = rewrite_config(config)
    assert config.output_router_logits is False and any("output_router_logits" in note for note in notes) and config.router_aux_loss_coef > 0


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe"])
@pytest.mark.parametrize("name", ["llada", "nbdiff"])
def test_the_balance_of_experts_is_the_familys_own(family, name):
    """On rows without padding, under a mask that transformers takes: the value that the family's own forward returns."""
    store = Store("joined")
    engine, stream, settings = prepared(name, store, family=family)
    weight = engine.denoiser.model.config.router_aux_loss_coef
    assert settings.router_weight is None and weight > 0
    with_it, grads = gradient(engine, stream, settings, 3)
    without, plain = gradient(engine, stream, replace(settings, router_weight=0.0), 3)
    assert with_it["loss"] == pytest.approx(without["loss"] + weight * with_it["router_balance"], rel=1e-5) and "router_balance" not in without
    routers = [key for key in grads if key.endswith(("gate.weight", "router.weight"))]
    assert routers and all(float((grads[key] - plain[key]).abs().max()) > 0 for key in routers)
    if name == "llada":
        batch = stream.batch(3)
        config = engine.denoiser.model.config
        config.is_causal = False
        try:
            expected = engine.denoiser.model(input_ids=batch.x_t_BL, output_router_logits=True, is_causal=False).aux_loss
        finally:
            del config.is_causal
        assert with_it["router_balance"] == pytest.approx(float(expected), rel=1e-4)
    padded = gradient(*prepared(name, Store("padded"), family=family), 3)[0]["router_balance"]
    store = Store("padded")
    store.tokens_RL = torch.where(torch.arange(LENGTH) >= store.cuts_R[:, None], 7, store.tokens_RL)
    assert gradient(*prepared(name, store, family=family), 3)[0]["router_balance"] == pytest.approx(padded, rel=1e-5)


@pytest.mark.parametrize(("name", "family"), [("gidd", "llama"), ("repr-align", "gpt2"), ("llada", "qwen3_moe"), ("seed-edit", "llama"), ("i-dlm", "mixtral")])
def test_recomputed_activations_change_nothing(name, family):
    """Hidden states and routers that are looked at lie inside of what is recomputed."""
    engine, stream, settings = prepared(name, family=family)
    sums, full = gradient(engine, stream, settings, 6)
    enable_gradient_checkpointing(engine.model)
    other, frugal = gradient(engine, stream, settings, 6)
    assert other == pytest.approx(sums, rel=1e-6)
    close(frugal, full, 1e-5, 1e-6)


@pytest.mark.parametrize("name", ["gidd", "repr-align", "seed-edit", "nbdiff"])
def test_half_precision_gives_nearly_the_same_gradient(name):
    """bfloat16 forward and backward, float32 losses and weights: 2 percent of the loss, and the direction of the gradient."""
    choices = {"objective": {"teacher_kl": 0.5}} if name == "repr-align" else {}
    found = []
    for precision in ("fp32", "bf16"):
        engine, stream, settings = prepared(name, **choices)
        engine.precision = precision
        found.append(gradient(engine, stream, settings, 6))
    (sums, full), (other, half) = found
    assert other["loss"] == pytest.approx(sums["loss"], rel=0.02) and {g.dtype for g in half.values()} == {torch.float32}
    flat, flat_half = (torch.cat([g.flatten() for g in grads.values()]) for grads in (full, half))
    assert float(torch.nn.functional.cosine_similarity(flat, flat_half, dim=0)) > 0.99 and float(flat_half.norm() / flat.norm()) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("name", ["bd3lm", "nbdiff", "i-dlm", "fast-dllm-v2"])
def test_padding_is_seen_by_no_loss_of_a_block_model(name):
    """The tokens behind a conversation's end may be anything."""
    store = Store("padded")
    results = []
    for word in (7, 123):
        store.tokens_RL = torch.where(torch.arange(LENGTH) >= store.cuts_R[:, None], word, store.tokens_RL)
        results.append(gradient(*prepared(name, store), 3))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    names = [key for key in results[0][1] if "embed" not in key]
    close({key: results[0][1][key] for key in names}, {key: results[1][1][key] for key in names}, 1e-5, 1e-7)


@pytest.mark.parametrize("pattern", ["block_causal", "context_causal", "causal_in_block"])
@pytest.mark.parametrize("alignment", ["shift", "in_place"])
def test_a_document_in_a_packed_row_has_the_predictions_that_it_has_alone(pattern, alignment):
    store, cut = Store("isolated"), 10
    model = denoiser(rewritten("llama"), alignment, pattern, block_length=4)
    store.cuts_R[:] = cut
    rows = store.rows(np.arange(2))
    positions_BL = positions(rows.segments_BL, isolated=True)
    starts_BL = block_starts(positions_BL, 4) & (positions_BL > 0) & torch.tensor(alignment == "shift")
    masked_BL = (torch.rand(2, LENGTH, generator=torch.Generator().manual_seed(3)) < 0.5) & (positions_BL > 0) & ~starts_BL
    x_t_BL = rows.tokens_BL.masked_fill(masked_BL, MASK)

    def predictions(first, stop, segments_BL):
        part = [t[:, first:stop] for t in (x_t_BL, rows.tokens_BL, masked_BL, starts_BL, positions_BL)]
        logits_NV = model.predict_blocks(*part, segments_BL)
        chosen_BS = torch.cat([part[2], part[3]], 1)
        return torch.zeros(*chosen_BS.shape, VOCAB).masked_scatter(chosen_BS[..., None], logits_NV).view(2, 2, stop - first, VOCAB)

    packed = predictions(0, LENGTH, rows.segments_BL)
    torch.testing.assert_close(packed[:, :, :cut], predictions(0, cut, None), rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(packed[:, :, cut:], predictions(cut, LENGTH, None), rtol=1e-4, atol=2e-5)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("methods")
    write_corpus(folder)
    return folder


TYPED_ELSEWHERE = ("diffullama", "dream", "llada", "ar", "bd3lm", "i-dlm", "gidd", "repr-align")  # thin line, compare, ranks, bands, gated adapters


@pytest.mark.parametrize("name", [name for name in METHODS if name not in TYPED_ELSEWHERE])
def test_each_method_trains_from_the_command_line(name, place, tiny_checkpoints, monkeypatch):
    """Two steps; the model folder says which choices it was trained with."""
    monkeypatch.chdir(place)
    words = ["adapt", tiny_checkpoints["llama"], *SMALL, f"method.name={name}", "train.steps=2", "train.log_steps=1", "eval.rows=1", "eval.draws=1"]
    attention = METHODS[name].choices["attention"]
    if attention["anneal"] != "none" and (attention.get("anneal_steps") or 0) >= 1:
        words.append("method.attention.anneal_steps=2")
    works(*words, f"run.folder={name}")
    lines = curve(place / name / "adapt")
    assert len(lines) >= 2 and all(np.isfinite(line["loss"]) and line["gradient_norm"] > 0 for line in lines if "loss" in line)
    spec = json.loads((place / name / "adapt" / "model" / "config.json").read_text())["dlm"]
    choices = METHODS[name].choices
    assert (spec["method"], spec["attention"], spec["alignment"]) == (name, attention["pattern"], choices["alignment"])
    assert spec["block_length"] == attention.get("block_length") and spec["corruption"].split("+")[0] == choices["corruption"]["kind"]
