"""Time to quality: tokens and seconds until a converted model reaches a held-out NELBO, variant against variant.

Each variant is an `adapt` run of its own, resumable: run the same command again after an interruption. The first one is the yardstick
(`diffullama`); what it reaches at its end is the target of the others. Prints a table and writes a plot of the curves.

    python benchmarks/time_to_nelbo.py --checkpoint MODEL --train TEXT --validation TEXT --to FOLDER [--only NAME,NAME] [--seeds 0,1,2]
        [--scale 0.3] [--plot FILE]

With several seeds (order of the rows, noise) each line is their mean, and the NELBO of each stands behind it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

AT_ONCE = ("method.attention.anneal=none", "method.attention.anneal_steps=null")
UNWEIGHTED = (*AT_ONCE, "method.objective.weight=unweighted", "method.objective.normaliser=masked")
STABLE = ("train.schedule=wsd", "train.decay_fraction=0.3")
QUIET = ("method.corruption.count=exact", "method.corruption.noise_levels=stratified", "train.betas=[0.8,0.999]")

WINDOW = ("method.attention.anneal=window", "method.attention.anneal_steps=0.6")
PIECES = ("method.attention.anneal=pieces", "method.attention.anneal_steps=0.56")
RISING = ("method.corruption.rise_steps=0.375",)
NOISY_BLOCKS = ("method.attention.pattern=block_causal_noisy", "method.attention.block_length=16")
AR_BLOCKS = ("method.attention.pattern=context_causal", "method.attention.block_length=16", "method.objective.ar_weight=0.5")


def small(steps: int, rows: int = 4) -> tuple[str, ...]:
    return (f"train.rows_per_step={rows}", f"train.micro_batch={rows}", f"train.steps={steps}", "train.warmup_steps=100")


# A variant a line: what it adds to the line before, so that each part shows what it brings. Rows x steps x row length are its tokens.
VARIANTS: dict[str, tuple[str, ...]] = {
    "diffullama": ("train.steps=1000", "train.learning_rate=4e-3", "method.attention.anneal_steps=200"),
    "a third of the steps": ("train.steps=333", "train.learning_rate=4e-3", "method.attention.anneal_steps=67"),
    "+ open at once": ("train.steps=333", "train.learning_rate=4e-3", *AT_ONCE),
    "+ unweighted": ("train.steps=333", "train.learning_rate=4e-3", *UNWEIGHTED),
    "+ 4 rows a step": (*small(1332), "train.learning_rate=4e-3", *UNWEIGHTED),
    "+ warm-up stable decay": (*small(1332), "train.learning_rate=3e-3", *UNWEIGHTED, *STABLE),
    "+ exact counts and beta 0.8": (*small(1332), "train.learning_rate=3e-3", *UNWEIGHTED, *STABLE, *QUIET),
    "the same from half the tokens": (*small(2000), "train.learning_rate=3e-3", *UNWEIGHTED, *STABLE, *QUIET),
    "+ a window over 0.6": (*small(1332), "train.learning_rate=3e-3", *UNWEIGHTED, *STABLE, *QUIET, *WINDOW),
    "+ noise that rises": (*small(1332), "train.learning_rate=3e-3", *UNWEIGHTED, *STABLE, *QUIET, *WINDOW, *RISING),
    "pieces for the window": (*small(1332), "train.learning_rate=3e-3", *UNWEIGHTED, *STABLE, *QUIET, *PIECES),
    "pieces and rising noise": (*small(1332), "train.learning_rate=3e-3", *UNWEIGHTED, *STABLE, *QUIET, *PIECES, *RISING),
    "pieces in 1200 steps": (*small(1200), "train.learning_rate=3e-3", *UNWEIGHTED, *STABLE, *QUIET, *PIECES, *RISING),
    "pieces in 1100 steps": (*small(1100), "train.learning_rate=3e-3", *UNWEIGHTED, *STABLE, *QUIET, *PIECES, *RISING),
    "pieces with 8 rows a step": (*small(665, 8), "train.learning_rate=5e-3", *UNWEIGHTED, *STABLE, *QUIET, *PIECES, *RISING),
    # Block models: another bound (each block behind clean text), and another kind of model.
    "blocks of 16 (noisy context)": (*small(1332), "train.learning_rate=3e-3", *UNWEIGHTED, *STABLE, *QUIET, *NOISY_BLOCKS),
    "the same in 1100 steps": (*small(1100), "train.learning_rate=3e-3", *UNWEIGHTED, *STABLE, *QUIET, *NOISY_BLOCKS),
    "blocks of 16 (AR loss)": (*small(600), "train.learning_rate=3e-3", *UNWEIGHTED, *STABLE, *QUIET, *AR_BLOCKS),
}
COMMON = (
    "data.row_length=128", "train.rows_per_step=16", "train.micro_batch=16", "train.warmup_steps=50", "train.schedule=cosine",
    "train.save_steps=1000000", "train.save_minutes=1000", "eval.rows=128", "eval.draws=8",
)  # fmt: skip
START = "import runpy, sys; sys.argv[0] = 'dlmconvert'; runpy.run_module('dlmconvert', run_name='__main__')"


def scaled(words: tuple[str, ...], scale: float) -> tuple[str, ...]:
    """The same with so many times the steps: of training, warm-up and annealing."""
    counts = ("train.steps", "train.warmup_steps", "method.attention.anneal_steps")
    pairs = [word.split("=", 1) for word in words]
    return tuple(f"{key}={max(1, round(int(value) * scale)) if key in counts and value.isdigit() else value}" for key, value in pairs)


def train_seeds(name: str, words: tuple[str, ...], arguments: argparse.Namespace) -> dict:
    """The mean over the seeds; the error is the largest standard error over rows of one of them."""
    found = [train(name, words, arguments, seed) for seed in arguments.seeds.split(",")]
    mean = {key: sum(one[key] for one in found) / len(found) for key in ("nelbo", "tokens", "seconds")}
    curve = [(points[0][0], sum(value for _, value in points) / len(points)) for points in zip(*(one["curve"] for one in found), strict=True)]
    return {"name": name, **mean, "error": max(one["error"] for one in found), "curve": curve, "each": [one["nelbo"] for one in found]}


def train(name: str, words: tuple[str, ...], arguments: argparse.Namespace, seed: str) -> dict:
    """Run (or continue, or read) one variant: its curve, seconds of training without validation, tokens."""
    folder = Path(arguments.to) / ("".join(c if c.isalnum() else "-" for c in name).strip("-") + ("" if seed == "0" else f"-seed-{seed}"))
    rows = int(dict(word.split("=", 1) for word in (*COMMON, *words))["train.rows_per_step"])
    validate = f"train.validate_steps={arguments.validate_steps * 16 // rows}"  # after so many tokens
    common = [word for word in COMMON if word.split("=")[0] not in {w.split("=")[0] for w in words}]
    common, words = scaled(tuple(common), arguments.scale), scaled(words, arguments.scale)
    command = [
        sys.executable, "-c", START, "adapt", arguments.checkpoint, f"data.train={arguments.train}", f"data.validation={arguments.validation}",
        *common, *words, *arguments.words, validate, f"train.seed={seed}", f"run.folder={folder}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    if done.returncode:
        sys.exit(f"{name} failed ({done.returncode}):\n{done.stderr}")
    lines = [json.loads(line) for line in (folder / "adapt" / "metrics.jsonl").read_text().splitlines()]
    training = [line for line in lines if "loss" in line]
    seconds_per_step = sum(line["seconds_per_step"] for line in training) / len(training)
    tokens_per_step = training[-1]["tokens_seen"] / training[-1]["step"]
    measured = json.loads((folder / "run.json").read_text())["stages"]["adapt"]["facts"]["measured"]
    before, after = (next(row for row in measured if row["what"].startswith(f"NELBO {when}")) for when in ("before", "after"))
    steps = training[-1]["step"]
    curve = [(0, before["nats_per_token"]), *((line["step"], line["validation_nelbo"]) for line in lines if "validation_nelbo" in line), (steps, after["nats_per_token"])]
    return {
        "name": name, "steps": steps, "nelbo": after["nats_per_token"], "error": after["standard_error"], "tokens": steps * tokens_per_step,
        "seconds": steps * seconds_per_step, "curve": [(step * tokens_per_step, value) for step, value in curve],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("checkpoint", "train", "validation", "to"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--only", help="names of variants, with a comma between")
    parser.add_argument("--seeds", default="0", help="of train.seed, with a comma between")
    parser.add_argument("--validate-steps", type=int, default=50)
    parser.add_argument("--scale", type=float, default=1.0, help="times the steps of every variant, for a smaller budget")
    parser.add_argument("--plot", help="a PNG")
    parser.add_argument("words", nargs="*", help="recipe keys for all variants, key=value")
    arguments = parser.parse_args()
    chosen = list(VARIANTS) if not arguments.only else [name for name in VARIANTS if name in arguments.only.split(",")]
    results = []
    print(f"{'variant':28} {'NELBO':>8} {'+-':>6} {'tokens':>10} {'of first':>9} {'seconds':>8} {'of first':>9}")
    for name in chosen:
        found = train_seeds(name, VARIANTS[name], arguments)
        results.append(found)
        first = results[0]
        print(
            f"{name:28} {found['nelbo']:8.3f} {found['error']:6.3f} {found['tokens']:10,.0f} {found['tokens'] / first['tokens']:9.3f} "
            f"{found['seconds']:8.1f} {found['seconds'] / first['seconds']:9.3f}"
            + ("  " + " ".join(f"{value:.3f}" for value in found["each"]) if len(found["each"]) > 1 else ""),
            flush=True,
        )
    if arguments.plot:
        plot(results, Path(arguments.plot))


def plot(results: list[dict], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axis = figure.subplots()
    for found in results:
        axis.plot([tokens / 1e6 for tokens, _ in found["curve"]], [value for _, value in found["curve"]], "o-", markersize=3, label=found["name"])
    axis.axhline(results[0]["nelbo"], linestyle=":", color="grey")
    axis.set(xlabel="million tokens", ylabel="held-out NELBO, nats a token")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
