"""A training step of this project beside the step that one would write first, in one run, side by side.

    python benchmarks/train_step.py                       # GPT-2 small, 4 rows x 512, half of the tokens masked
    python benchmarks/train_step.py --model llama-1b --layers 2 --rows 1
    python benchmarks/train_step.py --layers 2 --length 64 --rows 2 --steps 2 --precision fp32     # does it run?

`reference` is DiffuLLaMA's step as the paper describes it (arXiv 2410.17891), written below without anything of this project but the
optimizer: logits at every position, a dense float mask, the loss at the masked ones. `dlmconvert` is the product's own step: a
`Batch`, `loop.batch_loss`, `SingleDeviceEngine`. Weights, tokens, masks, optimizer and precision are the same, and the two losses
are compared before anything is timed.

Two kinds of rows. Full rows: both steps read the same rows, of real tokens throughout. Documents: both train on the same documents in one
update, the product packed into full rows (attention stops at documents), the reference a document a row, padded to the longest; lengths
are log-normal with a median of 250 tokens and a mean of 427, the mean of C4 (156 billion tokens in 365 million documents, arXiv
2104.08758; the shape is an assumption), and documents longer than a row are cut into rows. Tokens a second count real tokens only.

Time: the variants take turns (A B A B ...) on one set of weights; minimum and median over the turns. MFU: floating-point operations that
the mathematics needs (`training.throughput.model_flops`: the output matrix at the masked positions only) over those of a matrix product
timed in the same run. Memory: every variant in a process of its own; the peak of torch's allocations during a step above what stands
before it (weights, AdamW moments), summed from the profiler's record of each allocation and release, and the peak resident set of that
process beside it.

Shapes: B rows, L tokens a row, V rows of the output matrix.
"""

from __future__ import annotations

import os

from dlmconvert.threads import spin_briefly

spin_briefly()  # before torch
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import argparse  # noqa: E402
import copy  # noqa: E402
import gc  # noqa: E402
import json  # noqa: E402
import math  # noqa: E402
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
from dlmconvert.training.engine import SingleDeviceEngine  # noqa: E402
from dlmconvert.training.losses import LoopSettings, batch_loss  # noqa: E402
from dlmconvert.training.optimizer import make_adamw  # noqa: E402
from dlmconvert.training.throughput import matrix_product_flops, model_flops  # noqa: E402

warnings.filterwarnings("ignore", category=FutureWarning)  # names that transformers is about to change

MASK_TOKEN_ID = 10541  # an existing word piece, as in DiffuGPT-S
ADAMW = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
LEARNING_RATE = 1e-4
CLIP_NORM = 1.0
ANNEALED = AttentionContext(open_ratio=0.5, seed=0, step=1)
OPEN = AttentionContext(open_ratio=1.0)
MEDIAN_DOCUMENT, DOCUMENT_SIGMA = 250, 1.035  # tokens; of their logarithm: a mean of 427
Step = Callable[[], float]


def gpt2(num_layers: int) -> Any:
    """GPT-2 small at 12 layers: 124M parameters."""
    from transformers import GPT2Config

    return GPT2Config(vocab_size=50257, n_layer=num_layers)


def llama_1b(num_layers: int) -> Any:
    """The shape of Llama-3.2-1B at 16 layers: 1.24B parameters, head and embedding tied."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_attention_heads=32, num_key_value_heads=8, head_dim=64,
        num_hidden_layers=num_layers, max_position_embeddings=8192, rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=True,
    )  # fmt: skip


MODELS = {"gpt2": (gpt2, 12), "llama-1b": (llama_1b, 16)}


def random_model(name: str, num_layers: int) -> Any:
    """Random weights, as the product would hold them."""
    config = MODELS[name][0](num_layers)
    rewrite_config(config)
    return build_model(config, seed=0)


def as_batch(x_0_BL: torch.Tensor, masked_BL: torch.Tensor, eligible_BL: torch.Tensor, share: float, segments_BL: Any = None, positions_BL: Any = None) -> Batch:
    """A `Batch` as the loader makes it, at t = share."""
    num_rows, length = x_0_BL.shape
    x_t_BL = x_0_BL.masked_fill(masked_BL, MASK_TOKEN_ID)
    if positions_BL is None:
        positions_BL = torch.arange(length).expand(num_rows, length).contiguous()
    rows = [(0, 0, row) for row in range(num_rows)]
    return Batch(0, x_0_BL, x_t_BL, masked_BL, eligible_BL, torch.full(x_0_BL.shape, share), segments_BL, positions_BL, rows)


def full_rows(num_rows: int, length: int, vocab_size: int, share: float = 0.5) -> Batch:
    """One document a row; exactly that share of the eligible tokens is masked (the first of a document is never one)."""
    generator = torch.Generator().manual_seed(0)
    x_0_BL = torch.randint(0, vocab_size, (num_rows, length), generator=generator)
    eligible_BL = torch.ones_like(x_0_BL, dtype=torch.bool)
    eligible_BL[:, 0] = False
    order_BL = torch.rand(x_0_BL.shape, generator=generator).masked_fill(~eligible_BL, 2.0).argsort(1).argsort(1)
    return as_batch(x_0_BL, (order_BL < round(share * (length - 1))) & eligible_BL, eligible_BL, share)


def drawn_pieces(total: int, length: int, seed: int) -> tuple[list[int], list[tuple[int, int]]]:
    """(where documents start in a stream of `total` tokens, the last one cut at its end; (start, tokens) of their pieces of a row at most)."""
    generator = torch.Generator().manual_seed(seed)
    first, pieces, filled = [], [], 0
    while filled < total:
        drawn = round(float(torch.empty(()).log_normal_(math.log(MEDIAN_DOCUMENT), DOCUMENT_SIGMA, generator=generator)))
        size = min(max(2, drawn), total - filled)
        first.append(filled)
        pieces += [(filled + cut, min(length, size - cut)) for cut in range(0, size, length)]
        filled += size
    return first, pieces


def documents(num_rows: int, length: int, vocab_size: int, share: float = 0.5) -> tuple[Batch, Batch, str]:
    """The same documents twice, and what they are: packed into `num_rows` full rows, a document that does not fit going on in the next row; and
    a row each, padded to the longest, cut only where they are longer than a row. Padding is a document of its own, number 1. Of 500 draws,
    the one whose share of real tokens is nearest to the mean of all."""
    generator = torch.Generator().manual_seed(0)
    total = num_rows * length
    draws = [drawn_pieces(total, length, seed) for seed in range(500)]
    real = [total / (len(pieces) * max(size for _, size in pieces)) for _, pieces in draws]
    first, pieces = draws[min(range(500), key=lambda n: abs(real[n] - statistics.mean(real)))]
    x_0_T = torch.randint(0, vocab_size, (total,), generator=generator)
    starts = {start for start, _ in pieces} | set(range(0, total, length))  # nothing is predicted there, in either form
    eligible_T = torch.ones(total, dtype=torch.bool)
    eligible_T[list(starts)] = False
    masked_T = (torch.rand(total, generator=generator) < share) & eligible_T

    is_start_BL = torch.zeros(total, dtype=torch.bool)
    is_start_BL[first] = True
    is_start_BL = is_start_BL.view(num_rows, length)
    is_start_BL[:, 0] = True
    columns_BL = torch.arange(length).expand(num_rows, length)
    positions_BL = columns_BL - torch.where(is_start_BL, columns_BL, 0).cummax(1).values
    packed = as_batch(
        *(x_T.view(num_rows, length) for x_T in (x_0_T, masked_T, eligible_T)), share, is_start_BL.long().cumsum(1) - 1, positions_BL.contiguous()
    )
    longest = max(size for _, size in pieces)
    places_BL = torch.stack([torch.arange(start, start + longest).clamp(max=total - 1) for start, _ in pieces])
    is_padding_BL = torch.arange(longest)[None] >= torch.tensor([size for _, size in pieces])[:, None]
    padded = as_batch(x_0_T[places_BL].masked_fill(is_padding_BL, 0), masked_T[places_BL] & ~is_padding_BL, eligible_T[places_BL] & ~is_padding_BL, share, is_padding_BL.long())
    said = f"{len(first)} documents of {total} tokens; packed: {num_rows} rows; padded: {len(pieces)} rows of {longest}, {total / is_padding_BL.numel():.0%} of the tokens real (mean of the draws: {statistics.mean(real):.0%})"
    return packed, padded, said


# The product's step


def our_settings(num_rows: int) -> LoopSettings:
    return LoopSettings(
        steps=1000, rows_per_step=num_rows, micro_batch=num_rows, learning_rate=LEARNING_RATE, final_learning_rate=0.0, warmup_steps=0,
        schedule="constant", decay_fraction=0.1, seed=0, causal=False, anneal_steps=1, weight="elbo", normaliser="eligible",
        save_steps=1000, save_minutes=None, validate_steps=None,
    )  # fmt: skip


def our_engine(model: Any, precision: str, is_checkpointed: bool) -> SingleDeviceEngine:
    spec = DlmSpec(mask_token_id=MASK_TOKEN_ID, vocab_size=model.config.vocab_size, mask_is_word=True)
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


def reference_mask(batch: Batch) -> torch.Tensor:
    """(B, 1, L, L) float32, 0 where attention is open and the lowest number elsewhere: drawn with probability 1, the last of the annealing
    steps, and closed to padding."""
    num_rows, length = batch.x_0_BL.shape
    is_open_LL = torch.ones(length, length).tril().bool() | (torch.rand(length, length) < 1.0)
    closed = 1.0 - is_open_LL[None, None].expand(num_rows, 1, length, length).float()
    if batch.segments_BL is not None:
        closed = closed.masked_fill((batch.segments_BL > 0)[:, None, None, :], 1.0)
    return closed.masked_fill(closed.bool(), torch.finfo(torch.float32).min)


def reference_step(model: Any, optimizer: torch.optim.Optimizer, precision: str, batch: Batch) -> float:
    """Logits at all positions, cross-entropy at all positions, weighed and summed where masked. Returns the loss.

    The targets are shifted rather than the logits, which saves the reference one copy of the full logits.
    """
    with torch.autocast("cpu", dtype=torch.bfloat16) if precision == "bf16" else nullcontext():
        logits_BLV = model(input_ids=batch.x_t_BL, position_ids=batch.positions_BL, attention_mask=reference_mask(batch), use_cache=False).logits
        x_0_BL = torch.roll(batch.x_0_BL, -1, dims=1)  # hidden state i-1 predicts token i
        ce_BL = F.cross_entropy(logits_BLV.flatten(0, 1).float(), x_0_BL.flatten(), reduction="none").view(x_0_BL.shape)
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
    """Seconds of each variant in each turn; the first, untimed turn warms up."""
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
    num_rows, length = arguments.rows, arguments.length
    model = random_model(arguments.model, arguments.layers)
    vocab_size, parameters = model.config.vocab_size, list(model.parameters())
    # The same weights in a model of its own, which stays as its family wrote it.
    twin = copy.deepcopy(model, {id(p): p for p in parameters}).train()
    engine = our_engine(model, "fp32", False)
    batch = full_rows(num_rows, length, vocab_size)
    packed, padded, said = documents(num_rows, length, vocab_size)
    blocks = AttentionContext(pattern="block_causal", block_length=16, length=length)
    share = int(batch.masked_BL.sum()) / batch.masked_BL.numel()
    needed = model_flops(model, length).of(num_rows * length, int(batch.masked_BL.sum()))
    peak = {precision: matrix_product_flops(torch.device("cpu"), precision, budget_s=2.0) for precision in arguments.precision}
    print(
        f"{arguments.model}, {arguments.layers} layers, {sum(p.numel() for p in parameters) / 1e6:.0f}M parameters, vocabulary {vocab_size}; {num_rows} rows x {length} tokens, "
        f"{share:.1%} masked; {torch.get_num_threads()} threads; torch {torch.__version__}; {arguments.steps} turns\n"
        f"documents: {said}\n"
        f"{needed / 1e12:.3g} TFLOP a step of full rows; matrix product: {', '.join(f'{precision} {flops / 1e12:.3g} TFLOP/s' for precision, flops in peak.items())}\n"
    )

    def ours(precision: str, rows: Batch, context: AttentionContext = OPEN) -> Step:
        def step() -> float:
            engine.precision = precision
            return our_step(engine, rows, context)

        return step

    def reference(precision: str, rows: Batch) -> Step:
        return lambda: reference_step(twin, engine.optimizer, precision, rows)

    fastest: dict[tuple[str, bool], float] = {}
    for is_checkpointed in arguments.checkpointing:
        checkpointed(model, is_checkpointed)
        checkpointed(twin, is_checkpointed)
        kinds: dict[str, Callable[[str], Step]] = {
            "dlmconvert": lambda precision: ours(precision, batch),
            "reference": lambda precision: reference(precision, batch),
            "dlmconvert, annealed": lambda precision: ours(precision, batch, ANNEALED),
            "dlmconvert, blocks": lambda precision: ours(precision, batch, blocks),
            "dlmconvert, documents packed": lambda precision: ours(precision, packed),
            "reference, documents padded": lambda precision: reference(precision, padded),
        }
        steps = {f"{precision} {kind}": make(precision) for precision in arguments.precision for kind, make in kinds.items() if kind in arguments.variants}
        if not fastest and {"dlmconvert", "reference"} <= set(arguments.variants):
            first = arguments.precision[0]
            before = [p.detach().clone() for p in parameters]
            found = steps[f"{first} dlmconvert"]()
            with torch.no_grad():
                for parameter, value in zip(parameters, before, strict=True):
                    parameter.copy_(value)
            del before
            expected = steps[f"{first} reference"]()
            assert abs(found - expected) < (1e-4 if first == "fp32" else 2e-2) * expected, (found, expected)
            print(f"loss of the first {first} step: dlmconvert {found:.5f}, reference {expected:.5f}\n")
        seconds = timed(steps, arguments.steps)
        best = {name: min(values) for name, values in seconds.items()}
        middle = {name: statistics.median(values) for name, values in seconds.items()}
        print(f"speed, activation checkpointing {'on' if is_checkpointed else 'off'}")
        print(f"  {'':34} {'min s':>8} {'median s':>9} {'tokens/s':>9} {'MFU':>6}   (at the minimum)")
        for name in steps:
            precision, _, kind = name.partition(" ")
            mfu = f"{needed / best[name] / peak[precision]:6.1%}" if kind in ("dlmconvert", "reference") else ""
            print(f"  {name:34} {best[name]:8.3f} {middle[name]:9.3f} {num_rows * length / best[name]:9,.0f} {mfu}")

        def ratio(label: str, over: str, under: str, target: str = "", best=best, middle=middle) -> None:
            if over in best and under in best:
                print(f"  {label:50} {best[over] / best[under]:5.2f} at the minimum, {middle[over] / middle[under]:5.2f} at the median{target}")

        for precision in arguments.precision:
            name = f"{precision} dlmconvert"
            if name in best:
                fastest[precision, is_checkpointed] = best[name]
            target = "" if is_checkpointed else f"   target >= {1.3 if precision == 'fp32' else 1.6}"
            ratio(f"{precision} reference / dlmconvert, full rows:", f"{precision} reference", name, target)
            ratio(f"{precision} padded reference / packed dlmconvert:", f"{precision} reference, documents padded", f"{name}, documents packed", target)
            ratio(f"{precision} annealed / unmasked:", f"{name}, annealed", name, "   target <= 1.10")
            ratio(f"{precision} blocks (two streams) / one:", f"{name}, blocks", name, "   target <= 2.2")
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


def measure_memory(variant: str, arguments: argparse.Namespace) -> dict[str, int]:
    """In a process of its own: {step, standing, resident} in bytes."""
    precision, is_checkpointed = arguments.precision[0], arguments.checkpointing[0]
    model = random_model(arguments.model, arguments.layers)
    vocab_size = model.config.vocab_size
    share = float(variant.removeprefix("masked ").rstrip("%")) / 100 if variant.startswith("masked") else 0.5
    batch = full_rows(arguments.rows, arguments.length, vocab_size, share)
    packed, padded, _ = documents(arguments.rows, arguments.length, vocab_size)
    if variant.startswith("reference"):
        model.train()
        checkpointed(model, is_checkpointed)
        optimizer = make_adamw(model, **ADAMW)
        rows = padded if variant == "reference, padded" else batch

        def step(rows: Batch = rows) -> float:
            return reference_step(model, optimizer, precision, rows)
    else:
        engine = our_engine(model, precision, is_checkpointed)
        rows = packed if variant == "dlmconvert, packed" else batch

        def step(rows: Batch = rows) -> float:
            return our_step(engine, rows, ANNEALED if variant == "dlmconvert, annealed" else OPEN)

    step(full_rows(1, 8, vocab_size))  # makes the moments of AdamW
    gc.collect()
    standing = sum(p.numel() * p.element_size() for p in model.parameters()) * 3  # weights and two moments, all float32
    return {"step": peak_of(step), "standing": standing, "resident": peak_resident_bytes()}


def compare_memory(arguments: argparse.Namespace) -> None:
    variants = ("dlmconvert", "reference", "dlmconvert, annealed", "dlmconvert, packed", "reference, padded", "masked 25%", "masked 100%")
    for is_checkpointed in arguments.checkpointing:
        print(f"memory, activation checkpointing {'on' if is_checkpointed else 'off'} (GiB; `step`: above weights and moments; `masked`: dlmconvert with another share)")
        print(f"  {'':28} {'step':>7} {'standing':>9} {'resident':>9}")
        target = 45 if is_checkpointed else 75
        for precision in arguments.precision:
            found = {}
            for variant in variants:
                job = ["--memory-of", variant, "--precision", precision, "--checkpointing", "on" if is_checkpointed else "off", "--model", arguments.model]
                size = ["--layers", str(arguments.layers), "--rows", str(arguments.rows), "--length", str(arguments.length)]
                done = subprocess.run([sys.executable, __file__, *job, *size], capture_output=True, text=True)
                if done.returncode:
                    sys.exit(f"{variant}, {precision} failed ({done.returncode}):\n{done.stderr}")
                found[variant] = row = json.loads(done.stdout.splitlines()[-1])
                print(f"  {precision + ' ' + variant:28} {row['step'] / 2**30:7.2f} {row['standing'] / 2**30:9.2f} {row['resident'] / 2**30:9.2f}", flush=True)

            def ratio(label: str, variant: str, reference: str, note: str = "", found=found) -> None:
                step, whole = (found[variant][key] / found[reference][key] for key in ("step", "resident"))
                print(f"  {label:46} {step:6.1%} of the step, {whole:6.1%} of the resident set{note}")

            ratio(f"{precision} dlmconvert / reference, full rows:", "dlmconvert", "reference", f"   target <= {target}% of the step")
            ratio(f"{precision} packed / padded reference:", "dlmconvert, packed", "reference, padded", f"   target <= {target}% of the step")
            ratio(f"{precision} annealed / reference:", "dlmconvert, annealed", "reference")
            ratio(f"{precision} 100% masked / 25%:", "masked 100%", "masked 25%")
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


VARIANTS = ("dlmconvert", "reference", "dlmconvert, annealed", "dlmconvert, blocks", "dlmconvert, documents packed", "reference, documents padded")
SHORT = {"full": VARIANTS[:2], "annealed": VARIANTS[2:3], "blocks": VARIANTS[3:4], "documents": VARIANTS[4:]}


def parsed(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=tuple(MODELS), default="gpt2", help="whose shape; weights are random")
    parser.add_argument("--rows", type=int, default=4, help="rows in the batch")
    parser.add_argument("--length", type=int, default=512, help="tokens in a row")
    parser.add_argument("--layers", type=int, help="layers of the model, for fewer than it has")
    parser.add_argument("--precision", default="fp32,bf16", help="fp32, bf16, or both with a comma between")
    parser.add_argument("--checkpointing", default="off,on", help="activation checkpointing in both steps: off, on, or both with a comma between")
    parser.add_argument("--variants", default=",".join(SHORT), help="what is timed: some of " + ", ".join(SHORT))
    parser.add_argument("--steps", type=int, default=7, help="turns that are timed")
    parser.add_argument("--only", choices=("speed", "memory"), help="one half; the other is skipped")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    arguments.layers = arguments.layers or MODELS[arguments.model][1]
    arguments.precision = arguments.precision.split(",")
    choices = {"off": False, "on": True}
    if not set(arguments.precision) <= {"fp32", "bf16"} or not set(arguments.checkpointing.split(",")) <= set(choices):
        parser.error("--precision takes fp32 and bf16, --checkpointing off and on")
    arguments.checkpointing = [choices[word] for word in arguments.checkpointing.split(",")]
    if not set(arguments.variants.split(",")) <= set(SHORT):
        parser.error("--variants takes " + ", ".join(SHORT))
    arguments.variants = [name for word in arguments.variants.split(",") for name in SHORT[word]]
    return arguments


def main() -> None:
    arguments = parsed()
    if arguments.memory_of:
        print(json.dumps(measure_memory(arguments.memory_of, arguments)))
        return
    if arguments.only != "memory":
        fastest = compare_speed(arguments)
        compare_loading(arguments, fastest)
        print(flush=True)
    if arguments.only != "speed":
        compare_memory(arguments)


if __name__ == "__main__":
    main()
