"""A training step of this project beside the step that one would write first, in one run, side by side.

    python benchmarks/train_step.py                       # GPT-2 small, 4 rows x 512, half of the tokens masked
    python benchmarks/train_step.py --layers 2 --length 64 --rows 2 --steps 2 --precision fp32     # does it run?

`reference` is DiffuLLaMA's step as the paper describes it (arXiv 2410.17891), written below without anything of this project but the
optimizer: logits at every position, a dense float mask, the loss at the masked ones. `dlmconvert` is the product's own step: a
`Batch`, `loop.batch_loss`, `SingleDeviceEngine`. Weights, tokens, masks, optimizer and precision are the same, and the two losses
are compared before anything is timed.

Time: the variants take turns (A B A B ...); minimum and median over the turns. Memory: every variant in a process of its own; the
peak of torch's allocations during a step above what stands before it (weights, AdamW moments), summed from the profiler's record
of each allocation and release, and the peak resident set of that process beside it.

Shapes: B rows, L tokens a row, V rows of the output matrix.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: threads that spin make a busy machine ten times slower
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import argparse  # noqa: E402
import copy  # noqa: E402
import gc  # noqa: E402
import json  # noqa: E402
import resource  # noqa: E402
import statistics  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
import warnings  # noqa: E402
from collections.abc import Callable  # noqa: E402
from contextlib import nullcontext  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from dlmconvert.backbone.denoiser import Denoiser  # noqa: E402
from dlmconvert.backbone.load import build_model  # noqa: E402
from dlmconvert.backbone.rewrite import rewrite_config  # noqa: E402
from dlmconvert.backbone.spec import DlmSpec  # noqa: E402
from dlmconvert.data.loader import Batch, BatchStream, Mixture  # noqa: E402
from dlmconvert.diffusion.attention import AttentionContext  # noqa: E402
from dlmconvert.diffusion.corruption import draw_masks  # noqa: E402
from dlmconvert.training.engine import SingleDeviceEngine  # noqa: E402
from dlmconvert.training.losses import LoopSettings, batch_loss  # noqa: E402
from dlmconvert.training.optimizer import make_adamw  # noqa: E402

warnings.filterwarnings("ignore", category=FutureWarning)  # names that transformers is about to change

VOCABULARY = 50257
MASK_TOKEN_ID = 10541  # an existing word piece, as in DiffuGPT-S
ADAMW = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
LEARNING_RATE = 1e-4
CLIP_NORM = 1.0
ANNEALED = AttentionContext(open_ratio=0.5, seed=0, step=1)
OPEN = AttentionContext(open_ratio=1.0)
Step = Callable[[], float]


def gpt2(num_layers: int) -> Any:
    """GPT-2 small (124M parameters at 12 layers) with random weights, as the product would hold it."""
    from transformers import GPT2Config

    config = GPT2Config(vocab_size=VOCABULARY, n_layer=num_layers)
    rewrite_config(config)
    return build_model(config, seed=0)


def half_masked_batch(num_rows: int, length: int) -> Batch:
    """A `Batch` as the loader makes it, at t = 0.5 with exactly half of the eligible tokens masked (position 0 is never one)."""
    generator = torch.Generator().manual_seed(0)
    x_0_BL = torch.randint(0, VOCABULARY, (num_rows, length), generator=generator)
    eligible_BL = torch.ones_like(x_0_BL, dtype=torch.bool)
    eligible_BL[:, 0] = False
    order_BL = torch.rand(x_0_BL.shape, generator=generator).masked_fill(~eligible_BL, 2.0).argsort(1).argsort(1)
    t_B = torch.full((num_rows,), 0.5)
    masked_BL, _ = draw_masks(eligible_BL, t_B[:, None], order_BL / (length - 1), "bernoulli")
    x_t_BL = x_0_BL.masked_fill(masked_BL, MASK_TOKEN_ID)
    positions_BL = torch.arange(length).expand(num_rows, length).contiguous()
    return Batch(0, x_0_BL, x_t_BL, masked_BL, eligible_BL, t_B[:, None].expand(x_0_BL.shape), None, positions_BL, [(0, 0, row) for row in range(num_rows)])


# The product's step


def our_settings(num_rows: int) -> LoopSettings:
    return LoopSettings(
        steps=1000, rows_per_step=num_rows, micro_batch=num_rows, learning_rate=LEARNING_RATE, final_learning_rate=0.0, warmup_steps=0,
        schedule="constant", decay_fraction=0.1, seed=0, causal=False, anneal_steps=1, weight="elbo", normaliser="eligible",
        save_steps=1000, save_minutes=None, validate_steps=None,
    )  # fmt: skip


def our_engine(model: Any, precision: str, is_checkpointed: bool) -> SingleDeviceEngine:
    spec = DlmSpec(mask_token_id=MASK_TOKEN_ID, vocab_size=VOCABULARY, mask_is_word=True)
    return SingleDeviceEngine(
        Denoiser(model, spec), device=torch.device("cpu"), precision=precision, clip_norm=CLIP_NORM, gradient_checkpointing=is_checkpointed, **ADAMW
    )  # fmt: skip


def our_step(engine: SingleDeviceEngine, batch: Batch, context: AttentionContext) -> float:
    """What `training.loop.train` does with a micro-batch that is the whole batch. Returns the loss."""
    loss, sums = batch_loss(engine, batch, context, our_settings(len(batch.t_BL)), int(batch.eligible_BL.sum()), 1)
    engine.backward(loss)
    engine.update(LEARNING_RATE)
    return sums["loss"]


# The reference: the paper's Algorithm 1, as one would write it


def reference_mask(num_rows: int, length: int, ratio: float) -> torch.Tensor:
    """(B, 1, L, L) float32, 0 where attention is open and the lowest number elsewhere: causal, or drawn with probability `ratio`."""
    is_open_LL = torch.ones(length, length).tril().bool() | (torch.rand(length, length) < ratio)
    closed = 1.0 - is_open_LL[None, None].expand(num_rows, 1, length, length).float()
    return closed.masked_fill(closed.bool(), torch.finfo(torch.float32).min)


def reference_step(model: Any, optimizer: torch.optim.Optimizer, precision: str, batch: Batch, ratio: float) -> float:
    """Logits at all positions, cross-entropy at all positions, weighed and summed where masked. Returns the loss.

    The targets are shifted rather than the logits, which saves the reference one copy of the full logits.
    """
    num_rows, length = batch.x_0_BL.shape
    with torch.autocast("cpu", dtype=torch.bfloat16) if precision == "bf16" else nullcontext():
        logits_BLV = model(
            input_ids=batch.x_t_BL, position_ids=batch.positions_BL, attention_mask=reference_mask(num_rows, length, ratio), use_cache=False
        ).logits
        x_0_BL = torch.roll(batch.x_0_BL, -1, dims=1)  # hidden state i-1 predicts token i
        ce_BL = F.cross_entropy(logits_BLV.flatten(0, 1).float(), x_0_BL.flatten(), reduction="none").view(num_rows, length)
    is_target_BL = torch.roll(batch.masked_BL, -1, dims=1)
    loss = (ce_BL.masked_fill(~is_target_BL, 0.0) / batch.t_BL).sum() / batch.eligible_BL.sum()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
    for group in optimizer.param_groups:
        group["lr"] = LEARNING_RATE
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


def checkpointed(model: Any, wanted: bool) -> None:
    if wanted:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_disable()


# Time


def timed(steps: dict[str, Step], num_turns: int) -> dict[str, list[float]]:
    """Seconds of each variant in each turn; the first, untimed turn makes the moments and warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(num_turns + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def compare_speed(arguments: argparse.Namespace) -> dict[tuple[str, bool], float]:
    """Print the tables; return the minimum of our step by (precision, is_checkpointed)."""
    batch = half_masked_batch(arguments.rows, arguments.length)
    model = gpt2(arguments.layers)
    twin = copy.deepcopy(model).train()
    engine = our_engine(model, "fp32", False)
    optimizer = make_adamw(twin, **ADAMW)
    parameters = sum(p.numel() for p in model.parameters())
    share = int(batch.masked_BL.sum()) / batch.masked_BL.numel()
    print(
        f"GPT-2, {arguments.layers} layers, {parameters / 1e6:.0f}M parameters, vocabulary {VOCABULARY}; {arguments.rows} rows x {arguments.length} tokens, "
        f"{share:.1%} masked; {torch.get_num_threads()} threads; torch {torch.__version__}; {arguments.steps} turns\n"
    )

    def ours(precision: str, context: AttentionContext) -> float:
        engine.precision = precision
        return our_step(engine, batch, context)

    fastest: dict[tuple[str, bool], float] = {}
    for is_checkpointed in arguments.checkpointing:
        checkpointed(model, is_checkpointed)
        checkpointed(twin, is_checkpointed)
        steps: dict[str, Step] = {}
        for precision in arguments.precision:
            steps[f"{precision} dlmconvert"] = lambda precision=precision: ours(precision, OPEN)
            steps[f"{precision} reference"] = lambda precision=precision: reference_step(twin, optimizer, precision, batch, 1.0)
            steps[f"{precision} dlmconvert, annealed"] = lambda precision=precision: ours(precision, ANNEALED)
            blocks = AttentionContext(pattern="block_causal", block_length=16, length=arguments.length)
            steps[f"{precision} dlmconvert, blocks"] = lambda precision=precision, blocks=blocks: ours(precision, blocks)
        if not fastest:
            # Both models still have the same weights: the two steps must be the same mathematics.
            first = next(iter(arguments.precision))
            pair = steps[f"{first} dlmconvert"](), steps[f"{first} reference"]()
            assert abs(pair[0] - pair[1]) < (1e-4 if first == "fp32" else 2e-2) * pair[1], pair
            print(f"loss of the first {first} step: dlmconvert {pair[0]:.5f}, reference {pair[1]:.5f}\n")
        seconds = timed(steps, arguments.steps)
        best = {name: min(values) for name, values in seconds.items()}
        middle = {name: statistics.median(values) for name, values in seconds.items()}
        tokens = arguments.rows * arguments.length
        print(f"speed, activation checkpointing {'on' if is_checkpointed else 'off'}")
        print(f"  {'':28} {'min s':>8} {'median s':>9} {'tokens/s':>9}   (at the minimum)")
        for name in steps:
            print(f"  {name:28} {best[name]:8.3f} {middle[name]:9.3f} {tokens / best[name]:9,.0f}")

        def ratio(label: str, over: str, under: str, target: str = "", best=best, middle=middle) -> None:
            print(f"  {label:42} {best[over] / best[under]:5.2f} at the minimum, {middle[over] / middle[under]:5.2f} at the median{target}")

        for precision in arguments.precision:
            name = f"{precision} dlmconvert"
            fastest[precision, is_checkpointed] = best[name]
            target = "   target >= 1.15" if not is_checkpointed else ""
            ratio(f"{precision} reference / dlmconvert:", f"{precision} reference", name, target)
            ratio(f"{precision} annealed / unmasked:", f"{name}, annealed", name, "   target <= 1.10")
            ratio(f"{precision} blocks (two streams) / one:", f"{name}, blocks", name, "   target <= 2.2")
        if {"fp32", "bf16"} <= set(arguments.precision):
            ratio("fp32 / bf16, dlmconvert:", "fp32 dlmconvert", "bf16 dlmconvert")
            ratio("fp32 / bf16, reference:", "fp32 reference", "bf16 reference")
        print(flush=True)
    return fastest


# Memory


def peak_of(step: Step) -> int:
    """Peak of torch's CPU allocations during `step`, in bytes above what is allocated when it starts."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorder:
        step()
    events = [event for event in recorder.profiler.kineto_results.events() if event.name() == "[memory]"]
    level = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak


def peak_resident_bytes() -> int:
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would count what the parent process held when it started this one
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS, in bytes


def measure_memory(variant: str, precision: str, is_checkpointed: bool, num_layers: int, num_rows: int, length: int) -> dict[str, int]:
    """In a process of its own: {step, standing, resident} in bytes."""
    batch = half_masked_batch(num_rows, length)
    model = gpt2(num_layers)
    if variant == "reference":
        model.train()
        checkpointed(model, is_checkpointed)
        optimizer = make_adamw(model, **ADAMW)

        def step() -> float:
            return reference_step(model, optimizer, precision, batch, 1.0)
    else:
        engine = our_engine(model, precision, is_checkpointed)

        def step() -> float:
            return our_step(engine, batch, ANNEALED if variant == "annealed" else OPEN)

    step()  # makes the moments of AdamW
    step()
    gc.collect()
    resident = peak_resident_bytes()
    standing = sum(p.numel() * p.element_size() for p in model.parameters()) * 3  # weights and two moments, all float32
    return {"step": peak_of(step), "standing": standing, "resident": resident}


def compare_memory(arguments: argparse.Namespace) -> None:
    gigabytes = 1 / 2**30
    for is_checkpointed in arguments.checkpointing:
        print(f"memory, activation checkpointing {'on' if is_checkpointed else 'off'} (GiB; `step`: above weights and moments)")
        print(f"  {'':28} {'step':>7} {'standing':>9} {'resident':>9}")
        target = 45 if is_checkpointed else 75
        for precision in arguments.precision:
            found = {}
            for variant in ("dlmconvert", "reference", "annealed"):
                job = ["--memory-of", variant, "--precision", precision, "--checkpointing", "on" if is_checkpointed else "off"]
                size = ["--layers", str(arguments.layers), "--rows", str(arguments.rows), "--length", str(arguments.length)]
                done = subprocess.run([sys.executable, __file__, *job, *size], capture_output=True, text=True)
                if done.returncode:
                    sys.exit(f"{variant}, {precision} failed ({done.returncode}):\n{done.stderr}")
                found[variant] = json.loads(done.stdout.splitlines()[-1])
                name = "dlmconvert, annealed" if variant == "annealed" else variant
                row = found[variant]
                print(
                    f"  {precision + ' ' + name:28} {row['step'] * gigabytes:7.2f} {row['standing'] * gigabytes:9.2f} {row['resident'] * gigabytes:9.2f}", flush=True
                )

            def ratio(label: str, variant: str, note: str, found=found) -> None:
                step, whole = (found[variant][key] / found["reference"][key] for key in ("step", "resident"))
                print(f"  {label:42} {step:5.1%} of the step, {whole:5.1%} of the resident set{note}")

            ratio(f"{precision} dlmconvert / reference:", "dlmconvert", f"   target <= {target}% of the step")
            ratio(f"{precision} annealed / reference:", "annealed", "")
        print(flush=True)


# Data loading


def compare_loading(arguments: argparse.Namespace, fastest: dict[tuple[str, bool], float]) -> None:
    """Rows out of a prepared store (the standard library's source, byte tokens), noised, as the loop asks for them."""
    from dlmconvert.backbone.scratch import train_tokenizer
    from dlmconvert.data.packing import prepare_rows
    from dlmconvert.recipe.schema import TextSource

    tokenizer = train_tokenizer([], 257, "bytes")
    with tempfile.TemporaryDirectory(prefix="dlmconvert-benchmark-") as folder:
        stores, _ = prepare_rows(
            [TextSource(path="builtin:python")], tokenizer=tokenizer, tokenizer_fingerprint="bytes", row_length=arguments.length,
            cache_folder=Path(folder), separator_id=tokenizer.eos_token_id, max_tokens=4_000_000, validation=0.0, workers=1,
        )  # fmt: skip
        stream = BatchStream(
            Mixture(stores, [1.0], seed=0), rows_per_step=arguments.rows, seed=0, corruption_kind="masking", eps=1e-3, noise_levels="uniform",
            mask_token_id=MASK_TOKEN_ID, alignment="shift", isolated=False,
        )  # fmt: skip
        seconds = []
        for step in range(200):
            began = time.perf_counter()
            stream.num_eligible(step)
            stream.batch(step, 0, arguments.rows)
            seconds.append(time.perf_counter() - began)
        best, middle = min(seconds), statistics.median(seconds)
        print(f"data loading, {stores[0].num_rows:,} prepared rows: {1000 * best:.2f} ms a step at the minimum, {1000 * middle:.2f} ms at the median")
    for (precision, is_checkpointed), step in fastest.items():
        name = f"{precision}, checkpointing {'on' if is_checkpointed else 'off'}"
        print(f"  {name:28} {middle / step:.3%} of a step (median over minimum)   target < 1%")


def parsed(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4, help="rows in the batch")
    parser.add_argument("--length", type=int, default=512, help="tokens in a row")
    parser.add_argument("--layers", type=int, default=12, help="layers of the model; 12 is GPT-2 small")
    parser.add_argument("--precision", default="fp32,bf16", help="fp32, bf16, or both with a comma between")
    parser.add_argument("--checkpointing", default="off,on", help="activation checkpointing in both steps: off, on, or both with a comma between")
    parser.add_argument("--steps", type=int, default=7, help="turns that are timed")
    parser.add_argument("--only", choices=("speed", "memory"), help="one half; the other is skipped")
    parser.add_argument("--memory-of", choices=("dlmconvert", "reference", "annealed"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    arguments.precision = arguments.precision.split(",")
    choices = {"off": False, "on": True}
    if not set(arguments.precision) <= {"fp32", "bf16"} or not set(arguments.checkpointing.split(",")) <= set(choices):
        parser.error("--precision takes fp32 and bf16, --checkpointing off and on")
    arguments.checkpointing = [choices[word] for word in arguments.checkpointing.split(",")]
    return arguments


def main() -> None:
    arguments = parsed()
    if arguments.memory_of:
        found = measure_memory(
            arguments.memory_of, arguments.precision[0], arguments.checkpointing[0], arguments.layers, arguments.rows, arguments.length
        )
        print(json.dumps(found))
        return
    if arguments.only != "memory":
        fastest = compare_speed(arguments)
        compare_loading(arguments, fastest)
        print(flush=True)
    if arguments.only != "speed":
        compare_memory(arguments)


if __name__ == "__main__":
    main()
