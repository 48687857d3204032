"""The engines beside each other: a step, two processes, a checkpoint, a resume.

    python benchmarks/engines.py                               # GPT-2 small, 4 rows x 512, half of the tokens masked; about half an hour on two cores
    python benchmarks/engines.py --only step --stages 2        # or ranks, saving, resume
    python benchmarks/engines.py --only saving --processes 2 --steps 2     # a checkpoint of two processes
    python benchmarks/engines.py --layers 2 --length 64 --steps 3      # does it run? two minutes

Every variant lives in processes of its own, because ZeRO-3 puts a linear layer into torch for good. They take turns: one group of
processes steps while all others wait (A B A B ...); minimum and median over the turns. A step is what `training.loop.train` does: the
micro-batches of `accumulate`, the sum over ranks, `update`.
"""

from __future__ import annotations

import os

from dlmconvert.threads import spin_briefly

spin_briefly()  # before torch
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import argparse  # noqa: E402
import json  # noqa: E402
import socket  # noqa: E402
import statistics  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from dataclasses import dataclass, replace  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1]))  # this checkout, whatever is installed

# Workers


class OneBatch:
    """The same half-masked rows in every step: nothing but the engines is measured."""

    def __init__(self, num_rows: int, length: int, vocab_size: int):
        from train_step import full_rows

        self._whole = full_rows(num_rows, length, vocab_size)

    def batch(self, step: int, start: int, stop: int) -> Any:
        rows = slice(start, stop)
        cut = {name: value[rows] for name, value in vars(self._whole).items() if name != "step" and value is not None and not isinstance(value, int)}
        return replace(self._whole, **cut)

    def num_eligible(self, step: int) -> int:
        return int(self._whole.eligible_BL.sum())

    def num_masked(self, step: int) -> int:
        return int(self._whole.masked_BL.sum())


def make(arguments: argparse.Namespace) -> tuple[Any, Any, Any]:
    """(engine, stream, settings) of this process."""
    import torch
    from train_step import ADAMW, CLIP_NORM, MASK_TOKEN_ID, our_settings, random_model

    from dlmconvert.backbone.denoiser import Denoiser
    from dlmconvert.backbone.spec import DlmSpec
    from dlmconvert.training.engine import SingleDeviceEngine
    from dlmconvert.training.ranks import Place, Ranks, Solo

    torch.set_num_threads(arguments.threads)
    model = random_model("gpt2", arguments.layers)
    denoiser = Denoiser(model, DlmSpec(mask_token_id=MASK_TOKEN_ID, vocab_size=model.config.vocab_size, mask_is_word=True))
    values = {"device": torch.device("cpu"), "precision": arguments.precision, **ADAMW}
    share = arguments.rows // arguments.count
    settings = replace(our_settings(arguments.rows), micro_batch=min(arguments.micro_batch, share))
    stream = OneBatch(arguments.rows, arguments.length, model.config.vocab_size)
    if arguments.engine == "single":
        return SingleDeviceEngine(denoiser, clip_norm=CLIP_NORM, **values), stream, settings
    from dlmconvert.training.deepspeed import DeepSpeedEngine
    from dlmconvert.training.deepspeed_config import derived_config, effective_stage

    ranks: Any = Solo()
    if arguments.count > 1:
        ranks = Ranks(Place(arguments.rank, arguments.count, arguments.rank), {}, lambda outcome: os._exit(1))
        ranks.meet(lambda *about: None)
    config = derived_config(
        zero_stage=effective_stage(arguments.stage, arguments.precision), precision=arguments.precision, clip_norm=CLIP_NORM,
        micro_batch=settings.micro_batch, num_micro_batches=-(-share // settings.micro_batch), num_ranks=arguments.count,
    )  # fmt: skip
    return DeepSpeedEngine(denoiser, ranks=ranks, config=config, **values), stream, settings


def work(arguments: argparse.Namespace) -> None:
    """Read one command a line, answer seconds."""
    began = time.perf_counter()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print is no answer
    from dlmconvert.training.checkpoint import CheckpointFolder
    from dlmconvert.training.loop import accumulate
    from dlmconvert.training.saving import Saving

    engine, stream, settings = make(arguments)
    checkpoints = CheckpointFolder(Path(arguments.folder))

    def step() -> float:
        start = time.perf_counter()
        part = accumulate(engine, stream, settings, engine.step)
        sums = engine.ranks.sum(part.sums)
        engine.update(settings.learning_rate_at(engine.step))
        step.loss = sums["loss"]
        return time.perf_counter() - start

    def run(words: list[str]) -> Any:
        if words[0] == "step":
            return {"seconds": step(), "loss": step.loss}
        if words[0] == "save":  # overlaps, steps: a checkpoint, and steps while it may be on its way
            saving = Saving(checkpoints, engine.ranks, words[1] == "true")
            start = time.perf_counter()
            saving.begin(engine, engine.step, {})
            blocked = time.perf_counter() - start
            for _ in range(int(words[2])):
                step()
                flags = engine.ranks.sum({name: float(value) for name, value in saving.flags().items()})
                saving.advance(flags["written"], flags["failed"])
            steps = time.perf_counter() - start
            saving.finish()
            return {"blocked": blocked, "steps": steps, "all": time.perf_counter() - start}
        assert words[0] == "resume", words
        fresh = CheckpointFolder(Path(arguments.folder))
        start = time.perf_counter()
        checkpoint = engine.newest(fresh)
        found = time.perf_counter() - start
        engine.restore(fresh, checkpoint)
        return {"find": found, "all": time.perf_counter() - start}

    def answer(value: Any) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    answer({"seconds": time.perf_counter() - began})
    for line in sys.stdin:
        answer(run(line.split()))


# The side that asks


@dataclass
class Group:
    """The processes of one variant. ready: seconds from the start until all have their engine."""

    name: str
    processes: list[subprocess.Popen]
    ready: float = 0.0

    def ask(self, *words: object) -> dict[str, float]:
        """Rank 0's answer, when all have answered."""
        for process in self.processes:
            process.stdin.write(" ".join(map(str, words)) + "\n")
            process.stdin.flush()
        return self.answers()[0]

    def answers(self) -> list[dict[str, float]]:
        lines = [process.stdout.readline() for process in self.processes]
        if not all(lines):
            sys.exit(f"{self.name} ended: see above")
        return [json.loads(line) for line in lines]

    def close(self) -> None:
        for process in self.processes:
            process.stdin.close()
        for process in self.processes:
            process.wait()


def start(arguments: argparse.Namespace, name: str, engine: str, stage: int = 0, count: int = 1, threads: int = 0, folder: str = "") -> Group:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    begun, processes = time.perf_counter(), []
    threads = threads or arguments.threads
    for rank in range(count):
        words = ["--worker", "--engine", engine, "--stage", stage, "--rank", rank, "--count", count, "--threads", threads, "--folder", folder or os.devnull]
        size = ["--layers", arguments.layers, "--rows", arguments.rows, "--length", arguments.length, "--micro-batch", arguments.micro_batch, "--precision", arguments.precision]
        environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": str(threads), "DS_ACCELERATOR": "cpu"}
        command = [sys.executable, __file__, *map(str, [*words, *size])]
        processes.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment))
    group = Group(name, processes)
    group.answers()
    group.ready = time.perf_counter() - begun
    return group


def compare(arguments: argparse.Namespace, groups: list[Group], target: str = "") -> None:
    """Turns of a step; the first two of each are not counted (moments are made, kernels are chosen)."""
    seconds: dict[str, list[float]] = {group.name: [] for group in groups}
    losses = {}
    for turn in range(arguments.steps + 2):
        for group in groups:
            found = group.ask("step")
            losses.setdefault(group.name, found["loss"])
            if turn > 1:
                seconds[group.name].append(found["seconds"])
    first = groups[0].name
    for name, values in seconds.items():
        ratios = f"{min(values) / min(seconds[first]):5.3f} at the minimum, {statistics.median(values) / statistics.median(seconds[first]):5.3f} at the median"
        off = abs(losses[name] - losses[first]) / losses[first]
        assert off < (1e-4 if arguments.precision == "fp32" else 2e-2), (name, losses)
        note = "" if name == first else f"   / {first}: {ratios}{target}"
        print(f"  {name:34} min {min(values):7.4f} s  median {statistics.median(values):7.4f} s{note}", flush=True)
    print(flush=True)


def compare_steps(arguments: argparse.Namespace) -> None:
    print(f"a step, one process of {arguments.threads} threads")
    for stage in arguments.stages:
        groups = [start(arguments, "single", "single"), start(arguments, f"deepspeed, stage {stage}", "deepspeed", stage)]
        compare(arguments, groups, "   target <= 1.05")
        for group in groups:
            group.close()


def compare_ranks(arguments: argparse.Namespace) -> None:
    each = max(1, arguments.threads // 2)
    print(f"two processes of {each} threads beside one of {arguments.threads}, the same global batch")
    groups = [start(arguments, f"single, {arguments.threads} threads", "single")]
    groups += [start(arguments, f"2 processes, stage {stage}", "deepspeed", stage, count=2, threads=each) for stage in arguments.stages]
    compare(arguments, groups)
    for group in groups:
        group.close()


SAVED = (("single", "single", 0, 1), ("deepspeed, stage 2", "deepspeed", 2, 1), ("2 processes, stage 2", "deepspeed", 2, 2))


def variants(arguments: argparse.Namespace, known: tuple[tuple[str, str, int, int], ...]) -> list[tuple[str, str, int, int]]:
    """(name, engine, stage, processes) of those with a number of processes that was asked for."""
    return [variant for variant in known if variant[3] in arguments.processes]


def compare_saving(arguments: argparse.Namespace) -> None:
    """What a checkpoint takes from training: the time of a few steps with one at their beginning, less the time of those steps without."""
    print("a checkpoint: seconds that it stops training, and that it takes from training in all")
    for name, engine, stage, count in variants(arguments, SAVED):
        with tempfile.TemporaryDirectory(prefix="dlmconvert-benchmark-", dir=arguments.folder or None) as folder:
            group = start(arguments, name, engine, stage, count, max(1, arguments.threads // count), folder)
            plain = statistics.median(group.ask("step")["seconds"] for _ in range(arguments.steps + 1))
            taken = {}
            for overlaps in ("false", "true"):
                found = [group.ask("save", overlaps, arguments.steps) for _ in range(3)]
                taken[overlaps] = {key: statistics.median(one[key] for one in found) for key in found[0]}
                cost = taken[overlaps]["all"] - arguments.steps * plain
                taken[overlaps]["cost"] = cost
                label = f"{name}, {'overlapped' if overlaps == 'true' else 'waited for'}"
                print(f"  {label:34} stops {taken[overlaps]['blocked']:7.3f} s   takes {cost:7.3f} s of {arguments.steps} steps of {plain:.3f} s", flush=True)
            size = sum(path.stat().st_size for path in Path(folder).glob("step-*/**/*") if path.is_file()) / max(1, len(list(Path(folder).glob("step-*"))))
            print(f"  {'overlapped / waited for':34} stops {taken['true']['blocked'] / taken['false']['blocked']:5.2f}, takes {taken['true']['cost'] / taken['false']['cost']:5.2f}; a checkpoint is {size / 2**20:,.0f} MiB\n", flush=True)
            group.close()


def compare_resumes(arguments: argparse.Namespace) -> None:
    print("a resume: imports and model, then the newest checkpoint (hashes compared, weights and moments loaded)")
    for name, engine, stage, count in variants(arguments, (*SAVED, ("deepspeed, stage 3", "deepspeed", 3, 1))):
        with tempfile.TemporaryDirectory(prefix="dlmconvert-benchmark-", dir=arguments.folder or None) as folder:
            for turn in ("first", "again"):
                group = start(arguments, name, engine, stage, count, max(1, arguments.threads // count), folder)
                if turn == "first":
                    group.ask("step")
                    group.ask("save", "false", 0)
                else:
                    found = group.ask("resume")
                    step = group.ask("step")["seconds"]
                    print(f"  {name:34} process and model {group.ready:6.2f} s   checkpoint {found['all']:6.2f} s (of which finding it whole {found['find']:.2f} s)   = {(group.ready + found['all']) / step:.1f} steps", flush=True)
                group.close()
    print(flush=True)


PARTS = {"step": compare_steps, "ranks": compare_ranks, "saving": compare_saving, "resume": compare_resumes}


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4, help="rows of the global batch")
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512, help="tokens in a row")
    parser.add_argument("--layers", type=int, default=12, help="layers of the model; 12 is GPT-2 small")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--stages", default="0,2,3", help="ZeRO stages")
    parser.add_argument("--processes", default="1,2", help="of the variants of saving and resume")
    parser.add_argument("--steps", type=int, default=9, help="turns that are timed")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of one process; two processes have half of them each")
    parser.add_argument("--folder", default="", help="where checkpoints are written and removed again (default: the system's temporary folder)")
    parser.add_argument("--only", choices=tuple(PARTS))
    for name, kind in (("--engine", str), ("--stage", int), ("--rank", int), ("--count", int)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.stages = [int(stage) for stage in arguments.stages.split(",")]
    arguments.processes = [int(count) for count in arguments.processes.split(",")]
    return arguments


def main() -> None:
    arguments = parsed()
    if arguments.worker:
        return work(arguments)
    if arguments.folder:
        Path(arguments.folder).mkdir(parents=True, exist_ok=True)
    print(f"GPT-2, {arguments.layers} layers, {arguments.precision}; {arguments.rows} rows x {arguments.length} tokens, half of them masked; {arguments.steps} turns\n", flush=True)
    for name, part in PARTS.items():
        if arguments.only in (None, name):
            part(arguments)


if __name__ == "__main__":
    main()
