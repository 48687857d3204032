"""One rank of a process group that traces what torch's allocator hands out while the DeepSpeed engine trains.

    python deepspeed_memory.py RANK COUNT FOLDER

FOLDER holds cases.json and takes out.json. A case is (model folder, settings); the answer is its peak in bytes: what is held when the training begins, and the most on top.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from types import SimpleNamespace

if __name__ == "__main__":  # in the tests pytest has done so
    import conftest  # noqa: F401

import torch
import torch.distributed as dist
from planned_steps import loss_of, traced_peak

from dlmconvert.backbone.denoiser import Denoiser
from dlmconvert.backbone.load import build_model, load_config, load_model
from dlmconvert.backbone.rewrite import rewrite_config
from dlmconvert.backbone.spec import DlmSpec
from dlmconvert.training.deepspeed import DeepSpeedEngine, built_in_parts, leave_zero_3, load_deepspeed
from dlmconvert.training.deepspeed_config import derived_config, effective_stage, merged_config


def measure(ranks, folder, *, stage, precision="fp32", offload="none", checkpointing=False, accumulation=1, rows=1, length=16, keys=()):
    config = merged_config(
        derived_config(
            zero_stage=effective_stage(stage, precision), precision=precision, clip_norm=1.0, micro_batch=rows, num_micro_batches=accumulation,
            num_ranks=ranks.count, offload_optimizer="none" if offload == "none" else "cpu", offload_parameters="cpu" if offload == "all" else "none",
        ),
        {"zero_optimization": dict(keys)},
    )  # fmt: skip
    settings = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "gradient_checkpointing": checkpointing, "precision": precision}
    load_deepspeed(ranks)
    model_config = load_config(folder)
    rewrite_config(model_config)

    def begin():
        if stage == 3:  # dealt out while it is loaded, as a run does
            with built_in_parts(config, ranks):
                model = load_model(folder, model_config, torch.float32)
        else:  # weights from a file would be mapped, not allocated
            model = build_model(model_config, seed=0)
        denoiser = Denoiser(model, DlmSpec(mask_token_id=1, vocab_size=model_config.vocab_size))
        return DeepSpeedEngine(denoiser, ranks=ranks, config=config, device=torch.device("cpu"), **settings)

    def train(engine):
        for step in range(2):  # the moments appear with the first update
            for _ in range(accumulation):
                engine.backward(loss_of(engine, step, rows, length))
            engine.update(1e-4)

    peak = traced_peak(begin, train)
    leave_zero_3()
    return peak


def main(rank, count, folder):
    ranks = SimpleNamespace(rank=int(rank), count=int(count), local_rank=int(rank))
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=ranks.rank, world_size=ranks.count)
    found = []
    for model, settings in json.loads((folder / "cases.json").read_text()):
        found.append(measure(ranks, folder / model, **settings))
        gc.collect()
    if ranks.rank == 0:
        (folder / "out.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
