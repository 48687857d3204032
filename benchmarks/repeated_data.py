"""Repeated data: few unique tokens, many epochs, under the diffusion and the AR objective (arXiv 2511.03276).

For each number of unique tokens both objectives train on the same rows in the same order, from the same checkpoint, with one learning rate.
At evenly spaced checkpoints the held-out loss is measured (NELBO, an upper bound, beside the exact NLL of the AR model), and delta-NLL: the
NLL of continuations of other held-out rows minus that of the true continuation. Prints a table and where the curves cross; writes results.json
and a plot. Every part is resumable: run the same command again after an interruption.

    python benchmarks/repeated_data.py --checkpoint MODEL --train TEXT --validation TEXT --to FOLDER [--unique 50000,200000] [--steps N]
        [--plot FILE] [KEY=VALUE ...]

From random weights of an architecture, as in the paper: --checkpoint default 'source.scratch={model_type: llama, ...}' source.tokenizer=...
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

DIFFUSION = (
    "method.name=diffullama", "method.attention.anneal=none", "method.attention.anneal_steps=null", "method.objective.weight=unweighted",
    "method.objective.normaliser=masked",
)  # fmt: skip
OBJECTIVES = {"diffusion": DIFFUSION, "AR": ("method.name=ar",)}
COMMON = (
    "data.row_length=128", "data.workers=1", "train.rows_per_step=8", "train.micro_batch=8", "train.learning_rate=2e-3", "train.schedule=constant",
    "train.warmup_steps=20", "train.keep_checkpoints=1000", "train.save_minutes=100000", "train.log_steps=20", "eval.rows=64", "eval.draws=4", "engine.device=cpu",
)  # fmt: skip
START = "import runpy, sys; sys.argv[0] = 'dlmconvert'; runpy.run_module('dlmconvert', run_name='__main__')"


class Quiet:
    """A reporter that says nothing but warnings."""

    def say(self, text: str) -> None:
        pass

    def warn(self, text: str) -> None:
        print(text, file=sys.stderr)

    def progress(self, label: str, total: float, done: float = 0) -> Any:
        class Bar:
            def advance(self, amount: float, text: str = "") -> None:
                pass

        return nullcontext(Bar())


def train(folder: Path, unique: int, objective: str, arguments: argparse.Namespace) -> None:
    """Run, continue, or find finished: one `dlmconvert adapt`."""
    every = max(1, arguments.steps // arguments.points)
    own = (*OBJECTIVES[objective], *arguments.words)
    common = [word for word in COMMON if word.split("=")[0] not in {w.split("=")[0] for w in own}]
    command = [
        sys.executable, "-c", START, "adapt", arguments.checkpoint, f"data.train={arguments.train}", f"data.validation={arguments.validation}",
        f"data.max_tokens={unique}", f"train.steps={arguments.steps}", f"train.save_steps={every}", *common, *own, f"run.folder={folder}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    if done.returncode:
        sys.exit(f"{folder.name} stopped ({done.returncode}):\n{done.stderr}")


def measure(folder: Path, objective: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Held-out loss and delta-NLL of each kept checkpoint, in order; what was measured before is read back."""
    from dlmconvert.runs.folder import RunFolder
    from dlmconvert.runs.stage import StageContext, StopFlag
    from dlmconvert.runs.stages import adapt_job
    from dlmconvert.training.checkpoint import CheckpointFolder

    run = RunFolder(folder)
    context = StageContext(run, run.recipe(), Quiet(), StopFlag())
    job = adapt_job(context)
    row_length = context.recipe.data.row_length
    unique = sum(store.num_rows for store in job.stores) * row_length
    settings = {"rows": arguments.rows, "draws": arguments.draws, "distractors": arguments.distractors}
    file = folder / "repeated_data.json"
    known = json.loads(file.read_text()) if file.is_file() else {}
    points = known.get("points", []) if known.get("settings") == settings else []
    for step in [0, *CheckpointFolder(run.stage_folder("adapt") / "checkpoints").steps()]:
        if step in {point["step"] for point in points}:
            continue
        with model_at(context, step, objective) as denoiser:
            tokens = step * context.recipe.train.rows_per_step * row_length
            points.append({"step": step, "tokens": tokens, "epochs": tokens / unique, **score(denoiser, job.validation, row_length, arguments)})
        file.write_text(json.dumps({"settings": settings, "points": points}, indent=1))
    return {"objective": objective, "unique": unique, "points": points}


def score(denoiser: Any, rows: Any, row_length: int, arguments: argparse.Namespace) -> dict[str, Any]:
    from dlmconvert.evaluation.delta_nll import measure_delta_nll
    from dlmconvert.evaluation.nelbo import measure_likelihood

    how = {"num_rows": arguments.rows, "draws": arguments.draws, "batch": 16, "seed": 0}
    held = measure_likelihood(denoiser, rows, **how)
    delta = measure_delta_nll(denoiser, rows, num_distractors=arguments.distractors, prefix_length=row_length // 2, **how)
    return {"loss": held.nats_per_token, "loss_error": held.standard_error, **{f"delta_{k}": v for k, v in delta.to_dict().items()}}


@contextmanager
def model_at(context: Any, step: int, objective: str):
    from dlmconvert.backbone.load import load_denoiser
    from dlmconvert.runs.models import consolidate

    if step == 0:
        yield load_denoiser(context.run.model_folder("prepare"), "cpu", attention="causal" if objective == "AR" else "bidirectional")
        return
    folder = context.run.path / "measured"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        consolidate(context, "adapt", step, folder)
        yield load_denoiser(folder, "cpu")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def crossing(upper: list[dict], lower: list[dict], value: str, sign: int) -> float | None:
    """Epochs at which `upper` has come to where `lower` is, linearly between the points; None when it never does. sign: -1 where more is better."""
    gaps = [(a["epochs"], sign * (a[value] - b[value])) for a, b in zip(upper, lower, strict=True)]
    for (x_0, gap_0), (x_1, gap_1) in zip(gaps, gaps[1:], strict=False):
        if gap_0 > 0 >= gap_1:
            return x_0 + (x_1 - x_0) * gap_0 / (gap_0 - gap_1)
    return None


def table(results: list[dict]) -> str:
    lines = [
        f"{'unique':>8} {'objective':10} {'epochs':>7} | {'loss at 0':>9} {'lowest':>7} {'at epoch':>8} {'last':>7} | "
        f"{'delta at 0':>10} {'highest':>8} {'at epoch':>8} {'last':>7} {'+-':>6} {'chosen':>7}"
    ]
    for found in results:
        points = found["points"]
        least, most = min(points, key=lambda p: p["loss"]), max(points, key=lambda p: p["delta_delta"])
        first, last = points[0], points[-1]
        lines.append(
            f"{found['unique']:8,} {found['objective']:10} {last['epochs']:7.1f} | {first['loss']:9.3f} {least['loss']:7.3f} {least['epochs']:8.1f} "
            f"{last['loss']:7.3f} | {first['delta_delta']:10.3f} {most['delta_delta']:8.3f} {most['epochs']:8.1f} {last['delta_delta']:7.3f} "
            f"{last['delta_standard_error']:6.3f} {last['delta_accuracy']:7.1%}"
        )
    lines += ["loss: nats a token, an upper bound for diffusion. delta: nats a token, with its standard error over rows. chosen: the true continuation."]
    for ours, ar in zip(results[::2], results[1::2], strict=True):
        for what, value, sign in (("held-out loss", "loss", 1), ("delta-NLL", "delta_delta", -1)):
            at = crossing(ours["points"], ar["points"], value, sign)
            said = f"crosses the AR model's after {at:.1f} epochs" if at is not None else f"does not cross the AR model's within {ours['points'][-1]['epochs']:.1f} epochs"
            lines.append(f"{ours['unique']:8,} unique tokens: the diffusion model's {what} {said}")
    return "\n".join(lines)


def plot(results: list[dict], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * len(results) / 2, 7), layout="constrained")
    axes = figure.subplots(2, len(results) // 2, squeeze=False)
    for number, found in enumerate(results):
        epochs = [point["epochs"] for point in found["points"]]
        style = {"marker": "o", "markersize": 3, "color": "C0" if found["objective"] == "diffusion" else "C1"}
        column = axes[:, number // 2]
        column[0].plot(epochs, [p["loss"] for p in found["points"]], label="diffusion (NELBO, a bound)" if found["objective"] == "diffusion" else "AR (NLL)", **style)
        column[1].errorbar(epochs, [p["delta_delta"] for p in found["points"]], yerr=[p["delta_standard_error"] for p in found["points"]], label=found["objective"], **style)
        column[0].set(title=f"{found['unique']:,} unique tokens", ylabel="held-out loss, nats a token")
        column[1].set(xlabel="epochs", ylabel="delta-NLL, nats a token")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("checkpoint", "train", "validation", "to"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--unique", default="50000,200000", help="numbers of unique tokens, with a comma between")
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps of each run")
    parser.add_argument("--points", type=int, default=10, help="checkpoints that are measured")
    parser.add_argument("--rows", type=int, default=64, help="held-out rows")
    parser.add_argument("--draws", type=int, default=4, help="noise draws a row")
    parser.add_argument("--distractors", type=int, default=3, help="other continuations a row")
    parser.add_argument("--plot", help="a PNG (default: repeated_data.png in the folder)")
    parser.add_argument("words", nargs="*", help="recipe keys for all runs, key=value")
    arguments = parser.parse_args()
    to, results = Path(arguments.to), []
    for unique in map(int, arguments.unique.split(",")):
        for objective in OBJECTIVES:
            folder = to / f"{unique}-{objective.lower()}"
            train(folder, unique, objective, arguments)
            results.append(measure(folder, objective, arguments))
            print(f"{folder.name}: done", file=sys.stderr, flush=True)
    (to / "results.json").write_text(json.dumps(results, indent=1))
    plot(results, Path(arguments.plot) if arguments.plot else to / "repeated_data.png")
    print(table(results))


if __name__ == "__main__":
    main()
