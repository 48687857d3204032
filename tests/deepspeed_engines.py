"""DeepSpeed engines on the tiny models of the other tests, solo or in processes of their own."""

from __future__ import annotations

import torch
from memory_stream import ROWS
from tiny_models import VOCAB, build, denoiser, rewritten

from dlmconvert.training.deepspeed import DeepSpeedEngine, built_in_parts, whole_embeddings
from dlmconvert.training.deepspeed_config import derived_config, effective_stage, merged_config
from dlmconvert.training.ranks import Solo

VALUES = {"betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


def deepspeed_config(stage, ranks=None, micro_batch=4, precision="fp32", clip_norm=1.0, user=None, **changes):
    ranks = ranks or Solo()
    share = ROWS // ranks.count
    derived = derived_config(
        zero_stage=effective_stage(stage, precision), precision=precision, clip_norm=clip_norm, micro_batch=micro_batch,
        num_micro_batches=-(-share // micro_batch), num_ranks=ranks.count, **changes,
    )  # fmt: skip
    return merged_config(derived, user or {})


def make_deepspeed(stage, family="gpt2", ranks=None, model=None, micro_batch=4, precision="fp32", clip_norm=1.0, gradient_checkpointing=False, offload="none", **changes):
    ranks = ranks or Solo()
    config = deepspeed_config(stage, ranks, micro_batch, precision, clip_norm, offload_optimizer=offload)
    wrapped = denoiser(rewritten(family) if model is None else model)
    return DeepSpeedEngine(
        wrapped, ranks=ranks, config=config, device=torch.device("cpu"), precision=precision, gradient_checkpointing=gradient_checkpointing, **(VALUES | changes)
    )


def make_in_parts(stage, folder, ranks=None, lora=False, **changes):
    """As a run builds it: from a folder, dealt to the ranks while it is loaded."""
    ranks = ranks or Solo()
    config = deepspeed_config(stage, ranks, **changes)
    with built_in_parts(config, ranks):
        model = loaded(folder)
    if lora:
        with whole_embeddings(model):
            model = attached(model)
    return DeepSpeedEngine(denoiser(model), ranks=ranks, config=config, device=torch.device("cpu"), precision=changes.get("precision", "fp32"), **VALUES)


def loaded(folder, lora=False):
    from dlmconvert.backbone.load import load_config, load_model
    from dlmconvert.backbone.rewrite import rewrite_config

    config = load_config(folder)
    rewrite_config(config)
    model = load_model(folder, config, torch.float32)
    return attached(model) if lora else model


def attached(model):
    from dlmconvert.backbone.adapters import attach_lora

    return attach_lora(model, rank=4, alpha=8.0, dropout=0.0, target_modules="all-linear", mask_token_id=VOCAB - 1, seed=0)


def save_source(folder, family):
    build(family).save_pretrained(folder)
    return folder


def plain_weights(engine, build_again):
    """{name: whole float32 tensor} of what was trained; None on other ranks than 0."""
    result = engine.plain(build_again)
    return None if result is None else {name: p.detach().clone() for name, p in result.named_parameters()}
