"""The command line in this process, tiny texts and recipes for it, and what a run leaves behind."""

from __future__ import annotations

import contextlib
import io
import json
import random
from dataclasses import dataclass
from pathlib import Path

WORDS = "the quick brown fox jumps over lazy dog and sleeps in beginning there was model that read from left to right".split()
SMALL = [
    "data.train=text.jsonl", "data.validation=0.1", "data.row_length=32", "data.workers=1", "train.steps=8", "train.rows_per_step=4",
    "train.micro_batch=2", "train.warmup_steps=2", "train.learning_rate=3e-3", "train.save_steps=3", "train.log_steps=2", "eval.rows=4",
    "eval.draws=2", "engine.device=cpu",
]  # fmt: skip
SMALL_SFT = [
    "sft.data=chat.jsonl", "sft.validation=0.2", "sft.steps=6", "sft.rows_per_step=4", "sft.micro_batch=2", "sft.warmup_steps=1",
    "sft.learning_rate=3e-3", "sft.save_steps=2", "sft.log_steps=1",
]  # fmt: skip
SMALL_EXPORT = ["export.max_new_tokens=8", "export.steps=4"]


@dataclass(frozen=True)
class Told:
    """What a command said, and its exit code."""

    code: int
    out: str
    err: str

    @property
    def text(self) -> str:
        return self.out + self.err


def dlmconvert(*words: object) -> Told:
    """The command as `main` runs it, in this process and in the current folder."""
    from dlmconvert.cli.app import app, guarded

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = guarded(lambda: app([str(word) for word in words], standalone_mode=False))
    told = Told(code, out.getvalue(), err.getvalue())
    assert "Traceback" not in told.text, told.text
    return told


def works(*words: object) -> Told:
    told = dlmconvert(*words)
    assert told.code == 0, told.text
    return told


def fails(code: int, *words: object) -> str:
    told = dlmconvert(*words)
    assert told.code == code and told.err.startswith(("error:", "run folder", "model", "the ")), told.text
    assert "this is a bug" not in told.text, told.text
    return told.text


def write_corpus(folder: Path, seed: int = 0) -> None:
    """text.jsonl and chat.jsonl."""
    draw = random.Random(seed)
    texts = [{"text": " ".join(draw.choices(WORDS, k=40)) + "."} for _ in range(60)]
    chats = [{"prompt": "say " + " ".join(draw.choices(WORDS, k=2)), "response": draw.choice(WORDS)} for _ in range(40)]
    for name, records in (("text", texts), ("chat", chats)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def curve(stage: Path) -> list[dict]:
    """The lines of metrics.jsonl without what a clock or the machine decides."""
    from dlmconvert.training.metrics import CLOCK

    lines = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in lines]


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def steps_kept(stage: Path) -> list[int]:
    return sorted(int(p.name.removeprefix("step-")) for p in (stage / "checkpoints").glob("step-*") if (p / "COMPLETE").is_file())


def stage_state(run: Path, stage: str) -> dict:
    return json.loads((run / "run.json").read_text())["stages"].get(stage, {})
