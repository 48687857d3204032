"""Decoding of this project beside the decoding that one would write first, in one run, side by side.

    python benchmarks/decoding.py --checkpoint MODEL --corpus FOLDER  # all parts; about an hour and a half on two cores
    python benchmarks/decoding.py --only sampler                      # or blocks, or with MODEL and FOLDER checkpoint, speculation
    python benchmarks/decoding.py --smoke ...                         # does it run? a minute

Parts:

  sampler       a bidirectional model of GPT-2 small's shape, random weights: 256 new tokens after a prompt of 256, the same number of
                forwards. Reference: full forward, full logits, softmax over all positions each step, as the papers describe it.
  checkpoint    a real checkpoint, adapted here at a row length that holds prompt and text: 512 new tokens, dual and prefix cache with
                threshold decoding beside the reference with one token a forward; the texts judged by their likelihood under the AR
                source and by distinct 2-grams.
  blocks        a block model (random weights, Llama's shape): seconds a token from 256 to 4096 new tokens, beside AR decoding of the
                same weights with transformers' own KV cache.
  speculation   the same checkpoint, trained here to draft for itself (on text that it wrote): greedy self-speculation beside greedy AR
                decoding of the same weights with transformers' cache: the same tokens, tokens a forward, ratio of time.

Variants take turns (A B A B ...), after one turn that is not counted when there are several; minimum and median over the turns.

Shapes: B rows, L positions, V rows of the output matrix.
"""

from __future__ import annotations

import os

from dlmconvert.threads import spin_briefly

spin_briefly()  # before torch
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import argparse  # noqa: E402
import json  # noqa: E402
import statistics  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402

import dlmconvert  # noqa: E402
from dlmconvert.backbone.denoiser import Denoiser  # noqa: E402
from dlmconvert.backbone.head import compile_for_decoding  # noqa: E402
from dlmconvert.backbone.key_values import cache_argument  # noqa: E402
from dlmconvert.backbone.load import build_model, load_denoiser  # noqa: E402
from dlmconvert.backbone.rewrite import rewrite_config  # noqa: E402
from dlmconvert.backbone.spec import DlmSpec  # noqa: E402
from dlmconvert.evaluation.quality import distinct, source_nats  # noqa: E402
from dlmconvert.sampling.canvas import build_canvas  # noqa: E402
from dlmconvert.sampling.denoise import generate  # noqa: E402

MASK_TOKEN_ID = 3


# --- the reference


@torch.no_grad()
def straightforward(denoiser: Any, prompts_BP: torch.Tensor, num_new: int, block_length: int, num_steps: int) -> torch.Tensor:
    """Semi-autoregressive decoding by confidence, greedy, as the papers' programs do it: every step runs the whole canvas, makes the
    logits of every position, and a softmax of them all. For models of either alignment; the mask token is banned, as ours is."""
    rows, prompt = prompts_BP.shape
    x_BL = torch.cat([prompts_BP, torch.full((rows, num_new), denoiser.mask_token_id)], dim=1)
    positions_BL = torch.arange(x_BL.shape[1]).expand_as(x_BL)
    masked_BL = torch.zeros_like(x_BL, dtype=torch.bool)
    masked_BL[:, prompt:] = True
    num_blocks = num_new // block_length
    for block in range(num_blocks):
        first, end = prompt + block * block_length, prompt + (block + 1) * block_length
        steps = num_steps // num_blocks
        for step in range(steps):
            logits_BLV = denoiser.model(input_ids=x_BL, position_ids=positions_BL, is_causal=False, use_cache=False).logits
            if denoiser.alignment == "shift":
                logits_BLV = torch.cat([logits_BLV[:, :1], logits_BLV[:, :-1]], dim=1)
            logits_BLV[..., denoiser.mask_token_id] = float("-inf")
            logits_BLV[..., denoiser.vocab_size :] = float("-inf")
            p_BLV = torch.softmax(logits_BLV.float(), dim=-1)
            confidence_BL, x_0_BL = p_BLV.max(dim=-1)
            confidence_BL = confidence_BL.masked_fill(~masked_BL, -1.0)
            confidence_BL[:, end:] = -1.0
            count = block_length * (step + 1) // steps - block_length * step // steps
            chosen_BK = confidence_BL.topk(count, dim=1).indices if count else torch.zeros(rows, 0, dtype=torch.int64)
            x_BL = x_BL.scatter(1, chosen_BK, x_0_BL.gather(1, chosen_BK))
            masked_BL = masked_BL.scatter(1, chosen_BK, False)
        assert not bool(masked_BL[:, first:end].any())
    return x_BL


@torch.no_grad()
def autoregressive(model: Any, prompts_BP: torch.Tensor, num_new: int, banned: int | None = None) -> torch.Tensor:
    """Greedy AR decoding with transformers' DynamicCache: the usual loop."""
    from transformers import DynamicCache

    cache, tokens_BL, inputs_BQ = DynamicCache(config=model.config), prompts_BP, prompts_BP
    for _ in range(num_new):
        length = tokens_BL.shape[1]
        positions_BQ = torch.arange(length - inputs_BQ.shape[1], length).expand_as(inputs_BQ)
        logits_BV = model(
            input_ids=inputs_BQ, position_ids=positions_BQ, use_cache=True, is_causal=True, logits_to_keep=1, **{cache_argument(type(model)): cache}
        ).logits[:, -1]
        if banned is not None:
            logits_BV[:, banned] = float("-inf")
        inputs_BQ = logits_BV.argmax(dim=-1, keepdim=True)
        tokens_BL = torch.cat([tokens_BL, inputs_BQ], dim=1)
    return tokens_BL


# --- measuring


def take_turns(variants: dict[str, Callable[[], Any]], turns: int) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Seconds of every turn, and what the last one returned; before several turns there is one that is not counted."""
    seconds, results = {name: [] for name in variants}, {}
    for turn in range(turns + (turns > 1)):
        for name, work in variants.items():
            began = time.perf_counter()
            results[name] = work()
            if turn or turns == 1:
                seconds[name].append(time.perf_counter() - began)
    return seconds, results


def report(seconds: dict[str, list[float]], reference: str, tokens: int, notes: dict[str, str] | None = None) -> None:
    for name, times in seconds.items():
        ratio = statistics.median(seconds[reference]) / statistics.median(times)
        print(
            f"  {name:44s} min {min(times):8.3f} s  median {statistics.median(times):8.3f} s  {tokens / min(times):8.1f} tokens/s"
            f"  reference/this {ratio:6.2f}  {(notes or {}).get(name, '')}"
        )


def ours(denoiser: Any, prompts_BP: torch.Tensor, num_new: int, **settings: Any) -> tuple[torch.Tensor, int]:
    canvas = build_canvas([row + [None] * num_new for row in prompts_BP.tolist()], 0)
    done = generate(denoiser, canvas, **settings)
    return done.tokens_BL, done.nfe


def random_model(model_type: str, attention: str, alignment: str, block_length: int | None, **values: Any) -> Denoiser:
    from transformers import CONFIG_MAPPING

    config = CONFIG_MAPPING[model_type](**values)
    rewrite_config(config)
    spec = DlmSpec(attention=attention, alignment=alignment, block_length=block_length, mask_token_id=MASK_TOKEN_ID, vocab_size=config.vocab_size)
    return Denoiser(build_model(config, seed=0), spec).eval()


def random_prompts(rows: int, length: int, vocabulary: int) -> torch.Tensor:
    return torch.randint(4, vocabulary, (rows, length), generator=torch.Generator().manual_seed(0))


# --- the parts


def sampler(options: argparse.Namespace) -> None:
    prompt, new = (32, 32) if options.smoke else (256, 256)
    layers = 2 if options.smoke else options.layers
    denoiser = random_model("gpt2", "bidirectional", "shift", None, vocab_size=50257, n_layer=layers, n_positions=1024)
    prompts_BP = random_prompts(options.rows, prompt, 50257)
    steps, block = min(options.forwards, new), 32
    print(f"\nsampler: {layers} layers of GPT-2 small, {options.rows} rows, prompt {prompt}, {new} new tokens, {steps} forwards, blocks of {block}")
    shared = {"order": "confidence", "block_length": block, "num_steps": steps, "budget": "even"}
    variants = {
        "reference": lambda: (straightforward(denoiser, prompts_BP, new, block, steps), steps),
        "ours, no cache": lambda: ours(denoiser, prompts_BP, new, **shared),
        "ours, prefix cache": lambda: ours(denoiser, prompts_BP, new, cache="prefix", **shared),
        "ours, dual cache": lambda: ours(denoiser, prompts_BP, new, cache="dual", **shared),
    }
    seconds, results = take_turns(variants, 1 if options.smoke else options.turns)
    same = float((results["reference"][0] == results["ours, no cache"][0]).float().mean())
    assert all(nfe == steps for _, nfe in results.values()), "every variant takes the same number of forwards"
    report(seconds, "reference", options.rows * new, {name: f"{nfe} forwards" for name, (_, nfe) in results.items()})
    print(f"  tokens of reference and of ours without a cache that agree: {same:.1%}; target: dual or prefix at least 3 times the reference")


def checkpoint(options: argparse.Namespace) -> None:
    prompt, new, rows = (32, 64, 2) if options.smoke else (64, 512, options.texts)
    source, denoiser, texts = adapted(options, prompt + new)
    if options.compile:
        compile_for_decoding(denoiser.model)
    prompts_BP = torch.tensor([row[:prompt] for row in texts if len(row) >= prompt][:rows])
    block = options.block_length
    print(f"\ncheckpoint: {options.checkpoint.name} adapted, {len(prompts_BP)} rows, prompt {prompt}, {new} new tokens, blocks of {block}")
    shared = {"order": "confidence", "block_length": block}
    variants: dict[str, Callable[[], Any]] = {
        "reference, one token a forward": lambda: (straightforward(denoiser, prompts_BP, new, block, new), new),
        "ours, dual cache, one token a forward": lambda: ours(denoiser, prompts_BP, new, cache="dual", **shared),
    }
    for cache in options.caches.split(","):
        for tau in (0.9, 0.7):
            variants[f"ours, {cache} cache, threshold {tau}"] = lambda cache=cache, tau=tau: ours(
                denoiser, prompts_BP, new, cache=cache, threshold=tau, **shared
            )
    seconds, results = take_turns(variants, 1 if options.smoke else options.turns)
    notes = {}
    for name, (tokens_BL, nfe) in results.items():
        made = tokens_BL[:, prompt:].tolist()
        nats, error = source_nats(source, prompts_BP.tolist(), made)
        notes[name] = f"{nfe} forwards, {nats:.3f} +- {error or 0:.3f} nats a token under the source, distinct-2 {distinct(made, 2):.3f}"
    report(seconds, "reference, one token a forward", len(prompts_BP) * new, notes)
    print("  target: a cache with a threshold at least 8 times the reference, its nats within the errors")


def adapted(options: argparse.Namespace, length: int) -> tuple[Any, Denoiser, list[list[int]]]:
    """(the AR source, the adapted model, rows of held-out tokens): --adapted, else --checkpoint, adapted (further) by the product's own
    command."""
    steps = 3 if options.smoke else options.adapt_steps
    words = [
        f"data.row_length={128 if options.smoke else 1024}", "train.rows_per_step=4", "train.micro_batch=4", "train.learning_rate=2e-3",
        "train.schedule=wsd", "train.decay_fraction=0.3", "train.betas=[0.8,0.999]", "method.attention.anneal=none",
        "method.attention.anneal_steps=null", "method.objective.weight=unweighted", "method.objective.normaliser=masked",
        "method.corruption.count=exact", "method.corruption.noise_levels=stratified",
    ]  # fmt: skip
    text = source_written(options, "checkpoint", (64,), 512) if options.written else options.corpus / "train.jsonl"
    folder = made(options, "checkpoint", options.adapted or options.checkpoint, text, steps, words, max(1024, length))
    denoiser = load_denoiser(folder, device="cpu")
    return ar_source(options), denoiser, held_out(options, denoiser.tokenizer)


def made(options: argparse.Namespace, name: str, origin: Path, text: Path, steps: int, words: list[str], positions: int) -> Path:
    """The folder of `origin` adapted to `text` by `dlmconvert adapt`, made where --models does not hold it yet."""
    home = options.models / name
    if not (home / "run" / "adapt" / "model" / "config.json").is_file():
        source = home / "source"
        source.mkdir(parents=True, exist_ok=True)
        for file in origin.iterdir():
            if file.is_file():
                (source / file.name).write_bytes(file.read_bytes())
        values = json.loads((source / "config.json").read_text())
        values["max_position_embeddings"] = max(values["max_position_embeddings"], positions)
        (source / "config.json").write_text(json.dumps(values))
        command = [
            sys.executable, "-m", "dlmconvert", "adapt", str(source), f"data.train={text}", f"data.validation={options.corpus / 'validation.jsonl'}",
            *words, "data.workers=1", f"train.steps={steps}", f"train.warmup_steps={max(1, steps // 20)}", "eval.rows=8", "engine.device=cpu",
            f"data.cache={home / 'tokens'}", f"run.folder={home / 'run'}",
        ]  # fmt: skip
        environment = os.environ | {"PYTHONPATH": str(Path(dlmconvert.__file__).parents[1])}
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=home, env=environment)
    return home / "run" / "adapt" / "model"


def ar_source(options: argparse.Namespace) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(options.checkpoint).eval()


def texts_of(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def held_out(options: argparse.Namespace, tokenizer: Any) -> list[list[int]]:
    return [tokenizer(text)["input_ids"] for text in texts_of(options.corpus / "validation.jsonl")[:400]]


def blocks(options: argparse.Namespace) -> None:
    lengths = (32, 64) if options.smoke else tuple(map(int, options.lengths.split(",")))
    block, prompt = 32, 16 if options.smoke else 128
    steps_a_block = 8
    shape = {
        "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 2 if options.smoke else 6, "num_attention_heads": 8, "num_key_value_heads": 4,
        "vocab_size": 8192, "max_position_embeddings": 8192,
    }  # fmt: skip
    denoiser = random_model("llama", "block_causal", "in_place", block, **shape)
    prompts_BP = random_prompts(options.rows, prompt, 8192)
    print(f"\nblocks: Llama shape {shape['num_hidden_layers']} x {shape['hidden_size']}, {options.rows} rows, prompt {prompt}, blocks of {block}, "
          f"{steps_a_block} forwards a block")  # fmt: skip
    first: dict[str, float] = {}
    for new in lengths:
        how = {"order": "confidence", "budget": "even", "num_steps": new // block * steps_a_block}
        variants = {
            "AR with KV cache": lambda new=new: autoregressive(denoiser.model, prompts_BP, new),
            "block model with block cache": lambda new=new, how=how: ours(denoiser, prompts_BP, new, **how),
        }
        seconds, _ = take_turns(variants, 1 if options.smoke else options.turns)
        for name, times in seconds.items():
            cost = min(times) / new * 1e3
            first.setdefault(name, cost)
            print(f"  {new:5d} new tokens  {name:30s} {cost:8.3f} ms a token, {cost - first[name]:+.3f} ms ({cost / first[name]:.2f} times) on {lengths[0]}")
    print("  target: the block model's cost a token grows no faster than AR decoding's")


def drafter(options: argparse.Namespace) -> Denoiser:
    """--model, else --checkpoint trained to draft for itself: on what it writes greedily after beginnings of the training texts."""
    if options.model is not None:
        return load_denoiser(options.model, device="cpu")
    written = source_written(options, "speculation", (16, 48, 80), 256)
    words = [
        f"data.row_length={64 if options.smoke else 256}", "train.rows_per_step=8", "train.micro_batch=8", "train.learning_rate=2e-3",
        "method.name=i-dlm", "method.attention.pattern=context_causal", "method.attention.block_length=4", "method.attention.anneal=none",
        "method.attention.anneal_steps=null", "method.objective.ar_weight=1.0",
    ]  # fmt: skip
    return load_denoiser(made(options, "speculation", options.checkpoint, written, 3 if options.smoke else options.draft_steps, words, 512), device="cpu")


def source_written(options: argparse.Namespace, name: str, lengths: tuple[int, ...], new: int) -> Path:
    """A file of what the AR source writes greedily behind beginnings of the training texts, made where --models does not hold it yet."""
    written = options.models / name / "written.jsonl"
    if not written.is_file():
        written.parent.mkdir(parents=True, exist_ok=True)
        texts = greedy_texts(options, 8 if options.smoke else 1350, (16,) if options.smoke else lengths, 32 if options.smoke else new)
        written.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return written


@torch.no_grad()
def greedy_texts(options: argparse.Namespace, num: int, lengths: tuple[int, ...], new: int) -> list[str]:
    """Beginnings of the training texts, of so many tokens, and what the AR source writes behind them."""
    from transformers import AutoTokenizer

    source, tokenizer, texts = ar_source(options), AutoTokenizer.from_pretrained(options.checkpoint), []
    rows = [tokenizer(text)["input_ids"] for text in texts_of(options.corpus / "train.jsonl")[:num]]
    for length in lengths:
        prompts = [row[:length] for row in rows if len(row) >= length]
        for first in range(0, len(prompts), 128):
            found_BL = source.generate(torch.tensor(prompts[first : first + 128]), max_new_tokens=new, do_sample=False, eos_token_id=None)
            texts += tokenizer.batch_decode(found_BL, skip_special_tokens=True)
    return texts


def speculation(options: argparse.Namespace) -> None:
    new, prompt = (16, 8) if options.smoke else (256, 64)
    denoiser = drafter(options)
    if options.compile:
        compile_for_decoding(denoiser.model)
    prompts_BP = torch.tensor([row[:prompt] for row in held_out(options, denoiser.tokenizer) if len(row) >= prompt][: options.texts])
    print(f"\nspeculation: {options.model or options.checkpoint.name}, {len(prompts_BP)} prompts of {prompt}, one at a time, {new} new tokens, greedy")

    def alone(work: Callable[[torch.Tensor], tuple[torch.Tensor, int]]) -> tuple[torch.Tensor, int]:
        found = [work(prompt_1P[None]) for prompt_1P in prompts_BP]
        return torch.cat([tokens_1L for tokens_1L, _ in found]), sum(nfe for _, nfe in found)

    variants: dict[str, Callable[[], Any]] = {
        "AR with KV cache": lambda: alone(lambda p: (autoregressive(denoiser.model, p, new, denoiser.mask_token_id), new)),
        "AR, transformers' generate": lambda: alone(lambda p: (transformers_generate(denoiser, p, new), new)),
    }
    for draft in (1, 2, 3, 4, 7):
        variants[f"self-speculation, {draft} drafted"] = lambda draft=draft: alone(lambda p: ours(denoiser, p, new, draft_length=draft))
    seconds, results = take_turns(variants, 1 if options.smoke else options.turns)
    expected = results["AR with KV cache"][0]
    for name, (tokens_BL, _) in results.items():
        agree = float((tokens_BL == expected).float().mean())
        assert agree == 1.0 or denoiser.model.dtype != torch.float32, f"{name}: {agree:.1%} of the tokens are the AR tokens"
    made_tokens = new * len(prompts_BP)
    report(seconds, "AR with KV cache", made_tokens, {name: f"{nfe} forwards, {made_tokens / nfe:.2f} tokens a forward" for name, (_, nfe) in results.items()})
    print("  every variant wrote the same tokens; target: faster than AR decoding")


def transformers_generate(denoiser: Denoiser, prompts_BP: torch.Tensor, num_new: int) -> torch.Tensor:
    from transformers import GenerationConfig

    model = denoiser.model
    before, model.config.is_causal = getattr(model.config, "is_causal", None), True
    model.generation_config = GenerationConfig(do_sample=False, use_cache=True, pad_token_id=0, suppress_tokens=[denoiser.mask_token_id])
    try:
        return model.generate(prompts_BP, attention_mask=torch.ones_like(prompts_BP), max_new_tokens=num_new)
    finally:
        model.config.is_causal = before


PARTS = {"sampler": sampler, "checkpoint": checkpoint, "blocks": blocks, "speculation": speculation}
ADAPTING = {"checkpoint": lambda options: adapted(options, 0), "speculation": drafter}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=PARTS, action="append", help="a part; may be given several times")
    parser.add_argument("--smoke", action="store_true", help="small sizes: does it run?")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--forwards", type=int, default=128, help="of every variant of the part `sampler`")
    parser.add_argument("--turns", type=int, default=3, help="counted turns; before several there is one that is not counted")
    parser.add_argument("--texts", type=int, default=8, help="rows of the parts `checkpoint` and `speculation`")
    parser.add_argument("--lengths", default="256,512,1024,2048,4096", help="new tokens of the part `blocks`")
    parser.add_argument("--caches", default="prefix,dual", help="with thresholds, in the part `checkpoint`")
    parser.add_argument("--block-length", type=int, default=32, help="of every variant of the part `checkpoint`, the reference too")
    parser.add_argument("--adapt-steps", type=int, default=600, help="of 4 rows of 1024 tokens, in the part `checkpoint`")
    parser.add_argument("--adapted", type=Path, help="folder of --checkpoint converted already; the part `checkpoint` adapts it further")
    parser.add_argument(
        "--written", action="store_true", help="in the part `checkpoint`, adapt on what the AR source writes greedily, not on the corpus itself"
    )
    parser.add_argument("--draft-steps", type=int, default=400, help="of 8 rows of 256 tokens, in the part `speculation`")
    parser.add_argument("--checkpoint", type=Path, help="AR checkpoint, for the parts `checkpoint` and `speculation`")
    parser.add_argument("--corpus", type=Path, help="folder with train.jsonl and validation.jsonl (a field `text`), for the same parts")
    parser.add_argument("--models", type=Path, help="folder that keeps what these parts adapt, and gives it to the next call")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model of these parts, for the reference, AR decoding and ours")
    parser.add_argument("--prepare", action="store_true", help="adapt the models of these parts, and stop")
    parser.add_argument("--model", type=Path, help="folder of a model with an AR path, instead of one that the part `speculation` adapts")
    options = parser.parse_args()
    names = options.only or list(PARTS)
    adapting = [name for name in names if name in ADAPTING]
    if adapting and (options.checkpoint is None or options.corpus is None):
        parser.error(f"{' and '.join(adapting)}: --checkpoint and --corpus are needed")
    options.corpus = options.corpus and options.corpus.resolve()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads", flush=True)
    with tempfile.TemporaryDirectory(prefix="decoding-") as scratch:
        options.models = (options.models or Path(scratch)).resolve()
        for name in names:
            if not options.prepare:
                PARTS[name](options)
            elif name in ADAPTING:
                ADAPTING[name](options)


if __name__ == "__main__":
    main()
