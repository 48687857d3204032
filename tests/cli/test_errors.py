"""What goes wrong is told in one message with an exit code, without a traceback and before anything heavy is done."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from command_line import SMALL, SMALL_SFT, dlmconvert, fails, works


@pytest.mark.parametrize(
    "words, messages",
    [
        (["adapt", "tinny"], ["'tinny'", "did you mean 'tiny'?"]),
        (["run", "nowhere.yaml"], ["no such recipe file"]),
        (["adapt", "./nowhere", "data.train=text.jsonl"], ["no such folder: ./nowhere"]),
        (["adapt", "MODEL"], ["data.train is empty", "data.train=FILE"]),
        (["adapt", "MODEL", "data.train=nowhere.jsonl"], ["no such file or folder: nowhere.jsonl"]),
        (["adapt", "MODEL", "data.train=text.jsonl", "data.validation=nowhere.txt"], ["no such file or folder: nowhere.txt"]),
        (["adapt", "MODEL", "data.train=text.jsonl", "train.stpes=3"], ["train.stpes: no such key", "'steps'"]),
        (["adapt", "MODEL", "data.train=text.jsonl", "train.steps=many", "trian.steps=3"], ["2 mistakes", "train.steps='many'", "trian: no such key"]),
        (["adapt", "MODEL", "data.train=text.jsonl", "method.name=difullama"], ["'difullama' is not a published method", "diffullama"]),
        (["adapt", "MODEL", "data.train=text.jsonl", "method.attention.anneal_steps=2000"], ["leaves no step", "fully bidirectional"]),
        (["adapt", "MODEL", "train.steps"], ["'train.steps' is not key=value"]),
        (["adapt"], ["Missing argument", "--help"]),
        (["adatp", "MODEL"], ["adatp", "adapt"]),
        (["adapt", "MODEL", "--frehs"], ["--frehs"]),
        (["sft"], ["there is no run in ./runs"]),
        (["export", "--hf"], ["there is no run in ./runs"]),
        (["sample"], ["there is no run in ./runs"]),
        (["eval"], ["there is no run in ./runs"]),
        (["status"], ["there is no run in ./runs"]),
        (["report", "one"], ["'one' is not a run"]),
        (["sft", "one", "two"], ["one run at a time: 'one' and 'two'"]),
        (["sample", "MODEL"], ["is not a converted model", "dlmconvert adapt"]),
        (["eval", "text.jsonl"], ["holds no model"]),
    ],
)
def test_wrong_input(words, messages, place, tiny_checkpoints):
    told = dlmconvert(*(str(tiny_checkpoints["gpt2"]) if word == "MODEL" else word for word in words))
    assert told.code == 2, told.text
    assert told.text.count("error:") == 1 and "this is a bug" not in told.text
    for message in messages:
        assert message.lower() in told.text.lower(), told.text
    assert not list(place.glob("runs/*/run.json")), "a command that could not start leaves a run behind"


def test_no_command_shows_the_help(capsys):
    from dlmconvert.cli.app import app, guarded

    assert guarded(lambda: app([], standalone_mode=False)) == 2
    told = capsys.readouterr()
    assert "Usage" in told.out + told.err and "error:" not in told.out + told.err


@pytest.mark.parametrize(
    "content, where",
    [
        (b'{"text": "a"}\n{"text": 3}\n', "bad.jsonl, line 2"),
        (b'{"text": "a"}\n\n{"txet": "b"}\n', "bad.jsonl, line 3"),
        (b'{"text": "a"}\n{"text": "caf\xe9"}\n', "bad.jsonl, line 2"),
        (b"", "bad.jsonl"),
        (b'{"text": "short"}\n', "fewer than one row"),
        (b'{"text": "the <|mask|> here"}\n' * 60, "bad.jsonl, line"),
    ],
)
def test_problems_in_a_text_name_file_and_line(content, where, place, tiny_checkpoints):
    (place / "bad.jsonl").write_bytes(content)
    assert where in fails(2, "adapt", tiny_checkpoints["gpt2"], *SMALL, "data.train=bad.jsonl", "data.validation=0")


def test_a_run_without_a_model_says_so(place, tiny_checkpoints):
    (place / "bad.jsonl").write_text("{")
    fails(2, "adapt", tiny_checkpoints["gpt2"], *SMALL, "data.train=bad.jsonl", "run.folder=runs/one")
    assert "has no converted model yet" in fails(2, "sample", "one")
    assert "'oen' is not a run" in fails(2, "sample", "oen") and "'one'" in fails(2, "status", "oen")
    assert "no finished sft or adapt stage" in fails(2, "export", "one", "--to", "out")


def test_conversations_that_are_not_there(place, tiny_checkpoints):
    works("adapt", tiny_checkpoints["gpt2"], *SMALL, "run.folder=runs/one")
    assert "sft.data is empty" in fails(2, "sft")
    assert "no such file or folder: chats.jsonl" in fails(2, "sft", "sft.data=chats.jsonl")
    assert "chat.jsonl" in fails(2, "sft", "sft.data=chats.jsonl")
    assert "sft.stpes" in fails(2, "sft", *SMALL_SFT, "sft.stpes=3")
    assert "too_long" in fails(2, "sft", *SMALL_SFT, "sft.too_long=drop")
    with_text = fails(2, "eval", "--data", "nowhere.txt")
    assert "nowhere.txt" in with_text


def test_unexpected_errors_end_in_one_message(place, tiny_checkpoints, monkeypatch):
    from dlmconvert.runs import preparing

    def breaks(*args):
        raise ZeroDivisionError("on purpose")

    monkeypatch.setattr(preparing, "source_folder", breaks)
    told = dlmconvert("adapt", tiny_checkpoints["gpt2"], *SMALL)
    assert told.code == 1 and "ZeroDivisionError: on purpose" in told.err and "--debug" in told.err
    for words in ("CUDA out of memory. Tried", "DefaultCPUAllocator: can't allocate memory: you tried"):
        monkeypatch.setattr(preparing, "source_folder", lambda context, words=words: (_ for _ in ()).throw(RuntimeError(words)))
        told = dlmconvert("adapt", tiny_checkpoints["gpt2"], *SMALL)
        assert told.code == 1 and "lower micro_batch" in told.err
    monkeypatch.undo()
    os.chdir(place)
    works("adapt", tiny_checkpoints["gpt2"], *SMALL, "train.micro_batch=1")  # what was advised is not refused as drift


def test_streams_that_are_closed_or_speak_another_encoding(monkeypatch):
    import io
    import sys

    from dlmconvert.cli.app import usable_streams

    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdin", None)
    monkeypatch.setattr(sys, "stderr", None)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    usable_streams()
    sys.stderr.write("nowhere")
    sys.stdout.write("caf\u00e9")
    sys.stdout.flush()
    assert raw.getvalue() == b"caf?" and sys.stdin.read() == ""
    sys.stdin.close()
    sys.stderr.close()


def test_handlers_of_signals_are_put_back(place, tiny_checkpoints):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    works("adapt", tiny_checkpoints["gpt2"], *SMALL)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_signal_in_the_last_step_is_not_swallowed(place, tiny_checkpoints, monkeypatch):
    from dlmconvert.training.checkpoint import CheckpointFolder

    real = CheckpointFolder.write

    def write(self, step, *rest):
        if step == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, step, *rest)

    monkeypatch.setattr(CheckpointFolder, "write", write)
    assert dlmconvert("adapt", tiny_checkpoints["gpt2"], *SMALL, "run.folder=runs/one").code == 75
    assert not Path("runs/one/adapt/model").exists()
    works("adapt", tiny_checkpoints["gpt2"], *SMALL, "run.folder=runs/one")
