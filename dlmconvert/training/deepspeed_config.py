"""The DeepSpeed JSON of a recipe. It is derived: there is no second source of truth, and a user's own keys may add to it but not
contradict it. Plain data; nothing is imported."""

from __future__ import annotations

import math
from typing import Any

from dlmconvert.errors import UserError

NO_CLIPPING = 1e30  # DeepSpeed computes the gradient norm only when it clips
# Of fp16, in both engines: halved at every overflow, doubled after so many steps without one.
INITIAL_LOSS_SCALE, LOSS_SCALE_WINDOW, MIN_LOSS_SCALE = 2.0**16, 2000, 1.0
REDUCE_BUCKET = 500_000_000  # DeepSpeed's own reduce_bucket_size
_FROM = {  # where a derived value comes from, for the message about a contradiction
    "train_batch_size": "rows_per_step",
    "train_micro_batch_size_per_gpu": "micro_batch",
    "gradient_accumulation_steps": "rows_per_step, micro_batch and the number of processes",
    "gradient_clipping": "clip_norm",
    "bf16": "engine.precision",
    "fp16": "engine.precision",
    "zero_optimization.stage": "engine.zero_stage",
    "zero_optimization.offload_optimizer": "engine.offload_optimizer",
    "zero_optimization.offload_param": "engine.offload_parameters",
}
_OURS = {
    "optimizer": "the optimizer is AdamW with the stage's betas, adam_eps and weight_decay",
    "scheduler": "the learning rate follows the stage's schedule",
    "torch_autocast": "engine.precision decides the precision",
}


def derived_config(
    *,
    zero_stage: int,
    precision: str,
    clip_norm: float | None,
    micro_batch: int,
    num_micro_batches: int,
    num_ranks: int,
    offload_optimizer: str = "none",
    offload_parameters: str = "none",
    nvme: str | None = None,
) -> dict[str, Any]:
    """What the recipe says, in DeepSpeed's words. num_micro_batches: of one rank in one step."""
    zero: dict[str, Any] = {"stage": zero_stage}
    if num_ranks == 1 and zero_stage > 0:
        zero["contiguous_gradients"] = False  # a copy into the buffer from which gradients are sent to others
    for key, place in (("offload_optimizer", offload_optimizer), ("offload_param", offload_parameters)):
        if place != "none":
            zero[key] = {"device": place} | ({"nvme_path": nvme} if place == "nvme" else {})
    return {
        "train_batch_size": micro_batch * num_micro_batches * num_ranks,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": num_micro_batches,
        "gradient_clipping": NO_CLIPPING if clip_norm is None else clip_norm,
        "zero_optimization": zero,
        "bf16": {"enabled": precision == "bf16"},
        "fp16": _fp16() if precision == "fp16" else {"enabled": False},
        # torch's own AdamW, in the ZeRO stages and on the CPU: nothing is compiled when a run starts.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }


def with_bucket_for(config: dict[str, Any], num_trained: int) -> dict[str, Any]:
    """The JSON with a `reduce_bucket_size` (elements; gradients are sent in such pieces) that is no larger than the model: DeepSpeed
    allocates it whole. A size that the user has given stays."""
    zero = dict(config["zero_optimization"])
    if zero.get("reduce_bucket_size", "auto") == "auto":
        zero["reduce_bucket_size"] = min(REDUCE_BUCKET, num_trained)
    return config | {"zero_optimization": zero}


def _fp16() -> dict[str, Any]:
    power = round(math.log2(INITIAL_LOSS_SCALE))
    # loss_scale 0 is dynamic. Without hysteresis every overflow halves the scale, as torch's GradScaler does.
    return {"enabled": True, "loss_scale": 0, "initial_scale_power": power, "loss_scale_window": LOSS_SCALE_WINDOW, "hysteresis": 1, "min_loss_scale": MIN_LOSS_SCALE}


def effective_stage(zero_stage: int, precision: str) -> int:
    """bf16 and fp16 under stage 0 would take another optimizer and another curve than stages 1 to 3: they run as stage 1."""
    return 1 if precision != "fp32" and zero_stage == 0 else zero_stage


def merged_config(derived: dict[str, Any], user: dict[str, Any]) -> dict[str, Any]:
    """The derived JSON with the user's keys (`engine.deepspeed`). Raises UserError that names both values of every contradiction."""
    problems = [f"engine.deepspeed.{key} is not taken: {why}" for key, why in _OURS.items() if key in user]
    merged = _merge(derived, {key: value for key, value in user.items() if key not in _OURS}, "", problems)
    if problems:
        one = len(problems) == 1
        raise UserError(
            problems[0] if one else f"engine.deepspeed contradicts the recipe in {len(problems)} places",
            "" if one else "\n".join(f"  {problem}" for problem in problems),
            "say it in the recipe's own keys, and leave it out of engine.deepspeed",
        )
    return merged


def _merge(derived: dict[str, Any], user: dict[str, Any], path: str, problems: list[str]) -> dict[str, Any]:
    merged = dict(derived)
    for key, value in user.items():
        here = f"{path}{key}"
        known = derived.get(key)
        if isinstance(known, dict) and isinstance(value, dict):
            merged[key] = _merge(known, value, here + ".", problems)
        elif key not in derived:
            # A whole offloading section that the recipe does not ask for is a contradiction of `none`.
            if here in _FROM and isinstance(value, dict) and value.get("device", "none") != "none":
                problems.append(f"engine.deepspeed.{here}.device={value['device']} contradicts {_FROM[here]}=none")
            merged[key] = value
        elif value != known and value != "auto":
            source = _FROM.get(here) or _FROM.get(path.rstrip(".")) or "dlmconvert"
            shown = "no clipping" if known == NO_CLIPPING else known
            problems.append(f"engine.deepspeed.{here}={value} contradicts {shown}, which follows from {source}")
    return merged
