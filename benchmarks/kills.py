"""kill -9 at random moments of a run of two processes, and the same command again until it is done.

    python benchmarks/kills.py                       # 20 kills, ZeRO stage 2; some minutes on two cores
    python benchmarks/kills.py --kills 20 --stage 3 --overlap

Moments are drawn (seeded): while the processes start, after a drawn number of steps, and while a checkpoint is being written. Victims
too: rank 0, rank 1, or the command with all of its ranks. After the last kill the command runs to its end. What is compared with a run
that nobody touched: every line of metrics.jsonl and the weights, to the last bit; and after each kill, that no whole checkpoint is gone.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests")]
os.environ.setdefault("DS_ACCELERATOR", "cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--stage", type=int, default=2, help="ZeRO stage")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=60, help="of the run")
    parser.add_argument("--overlap", action="store_true", help="checkpoints are written while training goes on")
    arguments = parser.parse_args()

    import conftest  # noqa: F401  the same settings as in the tests
    from command_line import SMALL, curve, weights, write_corpus
    from kills import kill_once
    from tiny_models import TEXT, VOCAB, build
    from zygote import Zygote

    from dlmconvert.backbone.scratch import train_tokenizer

    zygote, draw, kills, finished = Zygote(), random.Random(arguments.seed), [], 0
    with tempfile.TemporaryDirectory(prefix="dlmconvert-kills-") as folder:
        place = Path(folder)
        build("gpt2").save_pretrained(place / "gpt2")
        train_tokenizer(TEXT, VOCAB, "bpe").save_pretrained(place / "gpt2")
        write_corpus(place)
        words = [
            *SMALL, f"train.steps={arguments.steps}", "train.save_steps=5", "train.log_steps=1", "engine.name=deepspeed", f"engine.zero_stage={arguments.stage}",
            "engine.deepspeed.zero_optimization.stage3_param_persistence_threshold=0", f"train.overlap_saving={str(arguments.overlap).lower()}",
        ]  # fmt: skip
        command = ["adapt", place / "gpt2", *words, "--processes", arguments.processes]
        status, text = zygote.run(place, *command, "run.folder=straight")
        if status:
            sys.exit(text)
        expected = place / "straight" / "adapt"
        stage = place / "run" / "adapt"

        def check() -> bool:
            return curve(stage) == curve(expected) and weights(stage / "model") == weights(expected / "model")

        equal, began = True, time.monotonic()
        print(f"a run of {arguments.processes} processes, ZeRO stage {arguments.stage}, {arguments.steps} steps, a checkpoint every 5{', overlapped' if arguments.overlap else ''}\n")
        print(f"  {'':>3} {'victim':8} {'moment':7} {'step':>5} {'checkpoint before':>18} {'after':>6} {'s until it had ended':>21}")
        while len(kills) < arguments.kills:
            moment = draw.choice(("save", "save", "step", "start"))
            kill = kill_once(zygote, place, [*command, "run.folder=run"], stage, draw, moment, arguments.processes)
            if kill is None:  # the run came to its end: another one from the start
                finished, equal = finished + 1, equal and check()
                shutil.rmtree(place / "run")
                continue
            kills.append(kill)
            print(f"  {len(kills):>3} {kill.victim:8} {kill.moment:7} {kill.step:>5} {kill.kept[0]:>18} {kill.kept[1]:>6} {kill.seconds:>21.2f}", flush=True)
        status, text = zygote.run(place, *command, "run.folder=run")
        if status:
            sys.exit(text)
        finished, equal = finished + 1, equal and check()
    zygote.close()
    lost = sum(kill.lost for kill in kills)
    counts = {name: sum(kill.moment == name for kill in kills) for name in ("start", "step", "save")}
    print(f"\n{len(kills)} kills ({', '.join(f'{number} at a {name}' for name, number in counts.items())}), {finished} runs to their end, {time.monotonic() - began:.0f} s")
    print(f"lost: {lost} steps of whole checkpoints; curves and weights equal to the last bit: {'yes' if equal else 'NO'}")
    sys.exit(0 if equal and not lost else 1)


if __name__ == "__main__":
    main()
