"""Does the export do what the trained model does? Asked of a fresh process in which this package cannot be imported.

The questions (random states with masks, a padded batch, prompts, gaps) are answered here by the training side, there by the files on
disk, and compared.

Shapes: B rows, L positions, P tokens of the prompts, N wanted tokens, V rows of the output matrix.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dlmconvert.backbone.load import load_config, load_denoiser, load_model
from dlmconvert.backbone.spec import DlmSpec
from dlmconvert.diffusion.alignment import predictable, predicting_positions
from dlmconvert.diffusion.block_attention import BLOCK_PATTERNS, FREE_BLOCKS, clean_seen
from dlmconvert.diffusion.randomness import counter_hash, counter_uniform
from dlmconvert.errors import EXIT_FAILED, UserError
from dlmconvert.exporting.card import LOCAL_PATH
from dlmconvert.exporting.weights import tensor_table
from dlmconvert.sampling.api import diffusion_generate, infill

ROWS, LENGTH, STEPS = 3, 32, 8
TEXTS = ["", "The quick brown fox, 1234 times.", "def f(x):\n    return  x\t# caf\u00e9 \u4e2d\u6587 \U0001f600", " leading and trailing "]
_HEADS = ("lm_head.weight", "embed_out.weight", "output.weight")


@dataclass(frozen=True)
class Tolerance:
    """dtype: the precision in which both sides are run (the weights on disk keep theirs).

    The largest difference of a logit that is allowed, as a share of the largest logit (at least of 1): 1e-5 in float32; 2**-7 in
    bfloat16, one unit in the last place of its 8 bits. Both sides do the same operations in the same order, so 0 is the rule.
    """

    dtype: str = "float32"

    @property
    def share(self) -> float:
        return {"float32": 1e-5, "bfloat16": 2.0**-7}[self.dtype]


def verify_export(
    target: Path, model_folder: Path, *, tolerance: Tolerance | None = None, progress: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Compare the export in `target` with the model in `model_folder`; returns what was found, for dlmconvert.json and the card.

    Runs on the CPU, one side after the other. Raises UserError (exit code 1) that names the first thing that differs.
    """
    target, tolerance = Path(target), tolerance or Tolerance()
    say = progress or (lambda sentence: None)
    checked_files = check_files(target)
    say("asking the trained model")
    denoiser = load_denoiser(model_folder, device="cpu", dtype=getattr(torch, tolerance.dtype))
    questions = make_questions(denoiser.spec, denoiser.model.config, tolerance)
    expected = reference_answers(denoiser, questions)
    spec = denoiser.spec
    if questions["is_gated"]:
        expected["source_BLV"] = source_logits(model_folder, questions)
    del denoiser
    gc.collect()
    say("asking the export, in a fresh process without dlmconvert")
    answers = ask_fresh_process(target, questions)
    return compare(expected, answers, questions, spec, tolerance) | {"files": checked_files}


def make_questions(spec: DlmSpec, config: Any, tolerance: Tolerance) -> dict[str, Any]:
    """The same for every call: tokens and masks are drawn by counter."""
    longest = getattr(config.get_text_config(), "max_position_embeddings", None) or LENGTH
    length = min(LENGTH, longest)
    rows_B, positions_L = torch.arange(ROWS)[:, None], torch.arange(length)[None, :]
    tokens_BL = (counter_hash(101, rows_B, positions_L) >> 1).remainder(spec.vocab_size)
    ordinary = next(t for t in range(spec.vocab_size) if t != spec.mask_token_id)
    tokens_BL = tokens_BL.masked_fill(tokens_BL == spec.mask_token_id, ordinary)
    masked_BL = counter_uniform(102, rows_B, positions_L) < torch.tensor([0.2, 0.5, 0.9])[:, None]
    masked_BL[:, 0] = False
    noised_BL = tokens_BL.masked_fill(masked_BL, spec.mask_token_id)
    plain_BL = positions_L.expand(ROWS, length)
    # Row 0 whole, row 1 padded on the right, row 2 on the left; padding is a document of its own.
    cut = length // 4
    padded_BL = torch.zeros(ROWS, length, dtype=torch.bool)
    padded_BL[1, length - cut :] = True
    padded_BL[2, :cut] = True
    segments_BL = padded_BL.long()
    real_positions_BL = ((~padded_BL).long().cumsum(1) - 1).clamp(min=0)
    everything_BL = predictable(torch.zeros_like(segments_BL), spec.alignment)
    wanted_padded_BL = masked_BL & ~padded_BL & predictable(segments_BL, spec.alignment)
    states = [
        {"name": "masks in several places", "tokens_BL": noised_BL, "wanted_BL": everything_BL, "positions_BL": plain_BL, "segments_BL": None},
        {
            "name": "a padded batch",
            "tokens_BL": noised_BL.masked_fill(padded_BL, ordinary),
            "wanted_BL": wanted_padded_BL,
            "positions_BL": real_positions_BL,
            "segments_BL": segments_BL,
        },
    ]
    is_block = spec.attention in BLOCK_PATTERNS
    if is_block:  # states of clean text: every hidden state is wanted, and no mask stands among them
        states[0] |= {"name": "clean text", "tokens_BL": tokens_BL, "wanted_BL": torch.ones_like(masked_BL)}
        states[1] |= {"name": "a padded batch of clean text", "tokens_BL": tokens_BL.masked_fill(padded_BL, ordinary), "wanted_BL": ~padded_BL}
    prompt = max(2, cut)
    prompts_mask_BP = torch.ones(2, prompt, dtype=torch.int64)
    prompts_mask_BP[1, : prompt // 2] = 0
    gaps = tokens_BL[:2].masked_fill(masked_BL[1:], -1)
    return {
        "states": states,
        "texts": TEXTS,
        "prompts_BP": tokens_BL[:2, :prompt].clone(),
        "prompts_mask_BP": prompts_mask_BP,
        "gaps": [gaps[0].tolist(), gaps[1, : length - cut].tolist()] if not is_block else [row[:prompt] + [-1] * cut for row in tokens_BL[:2].tolist()],
        "is_block": is_block,
        "is_gated": spec.gated_adapter is not None,
        "clean_BL": tokens_BL,
        "another_token": next(t for t in range(spec.vocab_size) if t != spec.mask_token_id and t != ordinary and not bool((states[0]["tokens_BL"][:, -1] == t).any())),
        "max_new_tokens": length // 2,
        "steps": None if is_block else STEPS,
        "dtype": tolerance.dtype,
        "threads": torch.get_num_threads(),
    }


def reference_answers(denoiser: Any, questions: dict[str, Any]) -> dict[str, Any]:
    """What the training side says: any object with `predict`, `mask_token_id`, `vocab_size`, `alignment`, `tokenizer`."""
    greedy = {"alg": "maskgit_plus", "temperature": 0.0, "steps": questions["steps"]}
    with torch.no_grad():
        logits = [questions_of(denoiser, state) for state in questions["states"]]
        generated_BL = diffusion_generate(
            denoiser, questions["prompts_BP"], questions["prompts_mask_BP"], max_new_tokens=questions["max_new_tokens"], **greedy
        )
        infilled = infill(denoiser, [[None if t < 0 else t for t in row] for row in questions["gaps"]], **greedy)
    encoded = [denoiser.tokenizer(text)["input_ids"] for text in questions["texts"]]
    return {"logits": logits, "generated_BL": generated_BL, "infilled": infilled, "encoded": encoded}


def source_logits(model_folder: Path, questions: dict[str, Any]) -> torch.Tensor:
    """logits_BLV of text without masks by the plain autoregressive model whose weights lie in the folder: no adapters, no code of ours."""
    config = load_config(model_folder)
    for name in ("dlm", "is_causal"):
        if hasattr(config, name):
            delattr(config, name)
    model = load_model(model_folder, config, getattr(torch, questions["dtype"])).eval()
    with torch.no_grad():
        return model(input_ids=questions["clean_BL"]).logits


def questions_of(denoiser: Any, state: dict[str, Any]) -> torch.Tensor:
    """logits_NV of a state: the prediction of each wanted token; of a block model, the hidden states of clean text that are wanted."""
    spec = denoiser.spec
    if spec.attention not in BLOCK_PATTERNS:
        return denoiser.predict(state["tokens_BL"], state["wanted_BL"], state["positions_BL"], state["segments_BL"])
    real_BL = torch.ones_like(state["wanted_BL"]) if state["segments_BL"] is None else state["segments_BL"] == 0
    seen_BLL = clean_seen(state["positions_BL"], real_BL, spec.attention, spec.block_length)
    length = real_BL.shape[1]
    columns_BL = torch.arange(length)[None]
    return denoiser.forward_columns(state["tokens_BL"], state["positions_BL"], state["wanted_BL"], seen_BLL, length, None, columns_BL, None)


def ask_fresh_process(target: Path, questions: dict[str, Any]) -> dict[str, Any]:
    """Raises UserError when the folder does not even load."""
    with tempfile.TemporaryDirectory(prefix="dlmconvert-verify-") as scratch:
        asked, answered = Path(scratch, "questions.pt"), Path(scratch, "answers.pt")
        torch.save(questions, asked)
        environment = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            "HF_MODULES_CACHE": str(Path(scratch, "modules")),
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONIOENCODING": "utf-8",
        }
        script = Path(__file__).with_name("fresh_process.py")
        # -P: the script's own folder stays off sys.path. The working directory is empty, for the same reason.
        done = subprocess.run(
            [sys.executable, "-P", str(script), str(target.resolve()), str(asked), str(answered)],
            env=environment, cwd=scratch, capture_output=True, text=True, encoding="utf-8", errors="replace",
        )  # fmt: skip
        if done.returncode != 0:
            last = [line for line in done.stderr.strip().splitlines() if line.strip()][-1:] or [f"exit code {done.returncode}"]
            raise UserError(
                f"{target} does not load and run in a fresh process", last[0][:500], "the folder is kept for a look; export again", exit_code=EXIT_FAILED
            )
        return torch.load(answered, weights_only=True)


def compare(expected: dict[str, Any], answers: dict[str, Any], questions: dict[str, Any], spec: DlmSpec, tolerance: Tolerance) -> dict[str, Any]:
    """The differences, all within bounds. Raises UserError (exit code 1) at the first that is not."""
    report = json.loads(answers["report"])

    def hold(claim: bool, what: str, why: str = "") -> None:
        if not claim:
            raise UserError(f"the export differs from the trained model: {what}", why, "nothing was put under the final name", exit_code=EXIT_FAILED)

    hold(report["from_model_folder"] and not report["dlmconvert_imported"], f"{report['class']} was not loaded from the folder's own code")
    for kind in ("missing", "unexpected", "mismatched"):
        hold(not report[kind], f"{len(report[kind])} {kind} tensors", ", ".join(report[kind][:4]))
    largest = 0.0
    exact = True
    for state, ours_NV, theirs_NV in zip(questions["states"], expected["logits"], answers["logits"], strict=True):
        hold(ours_NV.shape == theirs_NV.shape, f"logits of shape {tuple(theirs_NV.shape)} for {state['name']}, and {tuple(ours_NV.shape)} in training")
        largest = max(largest, _largest_difference(ours_NV, theirs_NV, state["wanted_BL"], state["name"], tolerance, hold))
        exact &= torch.equal(ours_NV, theirs_NV)
    first = questions["states"][0]
    keep_BL = first["wanted_BL"] if questions["is_block"] else predicting_positions(first["wanted_BL"], spec.alignment)
    _largest_difference(expected["logits"][0], answers["plain_BLV"][keep_BL], first["wanted_BL"], "a plain forward", tolerance, hold)

    moved_BL = answers["moved_BL"][:, :-1]
    if questions["is_block"]:  # the last token is seen by its own block, or by nothing before it
        last_block = (first["tokens_BL"].shape[1] - 1) // spec.block_length * spec.block_length
        should_move_BL = (torch.arange(moved_BL.shape[1]) >= last_block).expand_as(moved_BL) & (spec.attention not in FREE_BLOCKS)
        right = torch.equal(moved_BL, should_move_BL)
    else:
        right = 2 * int(moved_BL.sum()) >= moved_BL.numel()
    hold(
        not report["is_causal"] and right,
        f"a change of the last token moved {int(moved_BL.sum())} of {moved_BL.numel()} earlier predictions",
        "the attention of the loaded model is not that of training",
    )
    for name, ours, theirs in (
        ("diffusion_generate", expected["generated_BL"].tolist(), answers["generated_BL"].tolist()),
        ("infill", expected["infilled"], answers["infilled"]),
    ):
        total = sum(len(row) for row in ours)
        same = sum(a == b for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True))
        hold(same == total, f"{name} at temperature 0 gives other tokens at {total - same} of {total} positions")
    new_tokens = answers["generated_BL"][:, questions["prompts_BP"].shape[1] :]
    hold(not bool((new_tokens == spec.mask_token_id).any()), f"the sampler produced the mask token {spec.mask_token_id}")
    hold(
        report["mask_token_id"] == report["mask_round_trip"] == spec.mask_token_id
        and (spec.mask_is_word or report["tokenizer_mask_token_id"] == spec.mask_token_id),
        f"the tokenizer reads the mask token {spec.mask_token_id} as {report['mask_round_trip']} (its own: {report['tokenizer_mask_token_id']})",
    )
    for text, ours, theirs in zip(questions["texts"], expected["encoded"], report["encoded"], strict=True):
        hold(ours == theirs, f"the tokenizer makes {theirs[:12]} of {text!r}, and {ours[:12]} in training")
    hold(report["refuses_generate"] != questions["is_gated"], "generate() decodes from left to right" if report["refuses_generate"] is False else "generate() refuses")
    if questions["is_gated"]:
        hold(torch.equal(expected["source_BLV"], answers["source_BLV"]), "without masks its autoregressive logits are not the source's, bit for bit")
    return {
        "loaded_with": f"transformers AutoModelForCausalLM, {tolerance.dtype}, CPU, in a process without dlmconvert",
        "class": report["class"],
        "largest_logit_difference": largest,
        "logits_exact": exact,
        "allowed_logit_difference": f"{tolerance.share:.1e} of the largest logit ({tolerance.dtype})",
        "states": [state["name"] for state in questions["states"]],
        "positions_compared": sum(int(state["wanted_BL"].sum()) for state in questions["states"]),
        "earlier_predictions_moved_by_a_later_token": [int(moved_BL.sum()), moved_BL.numel()],
        "sampler_parity": "diffusion_generate and infill, confidence order, temperature 0: same tokens",
        "tokenizer_parity": f"{len(questions['texts'])} texts: same tokens",
        "mask_token_round_trip": True,
        **({"autoregressive_logits": "as_source(): bit for bit those of the source's weights"} if questions["is_gated"] else {}),
    }


def check_files(target: Path) -> list[str]:
    """What can be seen from the files alone; returns the claims that hold. Raises UserError (exit code 1) at the first that does not."""
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    generation = json.loads((target / "generation_config.json").read_text(encoding="utf-8"))
    rope = config.get("rope_parameters") or {}
    base = (rope.get("full_attention") or rope).get("rope_theta")
    files = sorted(p.name for p in target.iterdir())
    state = [name for name in files if "optim" in name or "adapter" in name or name.endswith((".pt", ".pth", ".bin"))]
    paths = [value for name in ("config.json", "generation_config.json", "tokenizer_config.json") for value in _local_paths(target / name)]
    absent = [f"{value.split('.')[0]}.py" for value in (config.get("auto_map") or {}).values() if f"{value.split('.')[0]}.py" not in files]
    claims = [
        *([("rope_theta equals rope_parameters.rope_theta", config.get("rope_theta") == base)] if rope else []),
        ("dtype and torch_dtype are both there and agree", config.get("dtype") == config.get("torch_dtype") is not None),
        ("the mask id is the same in config.json, its dlm section and generation_config.json",
         config["mask_token_id"] == config["dlm"]["mask_token_id"] == generation["mask_token_id"]),
        ("attention is not causal and caches are off", config["is_causal"] is False and config["use_cache"] is False),
        ("the code that auto_map names is there", not absent),
        ("the head is a tensor of its own when config.json says that it is not tied", _head_as_said(target, config)),
        ("no optimizer state, adapter or pickle", not state),
        ("no local path in the configs", not paths),
    ]  # fmt: skip
    for claim, holds in claims:
        if not holds:
            raise UserError(f"{target}: it does not hold that {claim}", ", ".join([*state, *paths, *absent][:3]), exit_code=EXIT_FAILED)
    return [claim for claim, _ in claims]


def _head_as_said(target: Path, config: dict[str, Any]) -> bool:
    """An untied model has an output matrix on disk. (A tied one may repeat it: published checkpoints do.)"""
    return config["tie_word_embeddings"] or any(name.endswith(_HEADS) for name in tensor_table(target))


def _largest_difference(ours_NV, theirs_NV, wanted_BL, name, tolerance, hold) -> float:
    ours_NV, theirs_NV = ours_NV.float(), theirs_NV.float()
    difference_N = (ours_NV - theirs_NV).abs().amax(-1)
    worst = int(difference_N.nan_to_num(nan=float("inf")).argmax())
    largest = float(difference_N[worst])
    allowed = tolerance.share * max(1.0, float(ours_NV.abs().max()))
    row, position = wanted_BL.nonzero()[worst].tolist()
    hold(
        largest <= allowed,
        f"the largest difference of a logit is {largest:.3g} ({name}, row {row}, token {position}), and {allowed:.1g} is allowed",
        f"{int((difference_N > allowed).sum())} of {len(difference_N)} predictions differ",
    )
    return largest


def _local_paths(path: Path) -> list[str]:
    def strings(value: Any):
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict | list):
            for item in value.values() if isinstance(value, dict) else value:
                yield from strings(item)

    return [text for text in strings(json.loads(path.read_text(encoding="utf-8"))) if LOCAL_PATH.match(text)] if path.is_file() else []
