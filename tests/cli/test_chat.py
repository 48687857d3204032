"""`dlmconvert chat` as somebody types it into a pipe, on a two-layer model on disk."""

from __future__ import annotations

import io

import pytest
from command_line import dlmconvert, fails
from tiny_folders import MASK, write_folder

GREEDY = {"steps": 4, "max_new_tokens": 8, "do_sample": False, "alg": "entropy", "eos_token_id": None}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("chat") / "model", converted=True, generation=GREEDY)


@pytest.fixture
def talk(model, monkeypatch):
    def say(*lines, options=()):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return dlmconvert("chat", model, "--max-new-tokens", 8, *options)

    return say


@pytest.fixture
def seen(monkeypatch):
    """What the model was shown in front of each answer, as text."""
    from dlmconvert.cli import chat

    shown = []
    real = chat.denoising

    def watched(verb, decoder, rows, seed):
        assert verb == "chat" and len(rows) == 1 and MASK not in rows[0].tokens
        shown.append(decoder.tokenizer.decode([token for token in rows[0].tokens if token is not None]))
        return real(verb, decoder, rows, seed)

    monkeypatch.setattr(chat, "denoising", watched)
    return shown


def test_a_conversation_through_a_pipe(talk, seen):
    told = talk("one", "", "two", "/quit", "never")
    assert told.code == 0 and len(seen) == 2
    assert seen[0] == "User: one\n\nAssistant:\n"
    assert seen[1].startswith(seen[0]) and seen[1].endswith("<end>\n\nUser: two\n\nAssistant:\n")
    answer = seen[1][len(seen[0]) : -len("<end>\n\nUser: two\n\nAssistant:\n")]
    assert answer and answer in told.out, "the model is shown what it said"
    assert "answers have at most 8 tokens, the conversation and the answer at most 128" in told.err and "in 4 forwards" in told.err
    assert talk("one", "", "two").out == told.out, "the end of the input leaves, and nothing is random at temperature 0"


def test_commands(talk, seen):
    talk("one", "/reset", "two", "/system Be brief.", "three", "/system", "/reset", "four")
    assert seen[1] == "User: two\n\nAssistant:\n" and seen[2].startswith("Be brief.\n\nUser: two") and seen[3] == "User: four\n\nAssistant:\n"
    told = talk("one", "/set threshold=0 seed=3", "/reset", "one", "/set", "/help", options=("--system", "S"))
    assert "in 4 forwards" in told.err and "in 1 forwards" in told.err and "threshold=0.0" in told.err and "seed=3" in told.err
    assert "/reset" in told.err and seen[-1].startswith("S\n\n")


def test_settings_are_those_of_sample(talk):
    lines = ("/set temprature=1", "/set order=entropie", "/set steps=0", "/set steps=x", "/set max_new_tokens=500", "/rest", "hello")
    told = talk(*lines)
    for hint in ("'temperature'", "'entropy'", "below 1", "not a whole number", "leave no room", "'/reset'"):
        assert hint in told.err, told.err
    assert told.code == 0 and "in 4 forwards" in told.err, "a mistake in a command ends nothing"
    assert talk("/set temperature=1 seed=1", "hello").out != talk("/set temperature=1 seed=2", "hello").out


def test_a_setting_that_is_taken_back_is_the_default(talk):
    told = talk("/set temperature=none top_p=none", "one", "/set temperature=nan", "/quit")
    assert told.code == 0 and "in 4 forwards" in told.err and "temperature=nan: not a number" in told.err


def test_bytes_that_are_no_text_do_not_end_the_conversation(model, monkeypatch, seen):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff bad\nok\n"), encoding="utf-8"))
    assert dlmconvert("chat", model, "--max-new-tokens", 8).code == 0
    assert len(seen) == 2 and "\ufffd bad" in seen[0]


def test_a_long_conversation_forgets_its_beginning_and_says_so(talk, seen):
    told = talk(*[f"message {n}, not short" for n in range(6)], "x" * 200, "after")
    assert "2 oldest messages are forgotten" in told.err and "message 0" not in seen[-1]
    assert all(len(text.replace("<end>", "#")) + 8 <= 128 for text in seen)
    assert "the message has" in told.err and "longest row has 128" in told.err
    assert not any("x" * 200 in text for text in seen) and seen[-1].endswith("User: after\n\nAssistant:\n")


def test_ctrl_c_stops_the_answer_and_not_the_program(talk, seen, monkeypatch):
    from dlmconvert.cli import chat

    watched, calls = chat.denoising, []

    def interrupted(*arguments):
        canvas, steps, may_change = watched(*arguments)
        calls.append(1)

        def some():
            for number, step in enumerate(steps):
                if len(calls) == 1 and number == 3:
                    raise KeyboardInterrupt
                yield step

        return canvas, some(), may_change

    monkeypatch.setattr(chat, "denoising", interrupted)
    told = talk("/set order=left_to_right steps=8", "one", "two")
    assert told.code == 0 and "stopped; 3 tokens in 3 forwards" in told.err and "8 tokens in 8 forwards" in told.err
    first, second = seen
    kept = second[len(first) :].partition("<end>")[0]
    assert 0 < len(kept.encode()) and kept in told.out


def test_wrong_input(model, tmp_path):
    assert "leave no room" in fails(2, "chat", model, "--max-new-tokens", 128)
    assert "did you mean 'entropy'" in fails(2, "chat", model, "--order", "entropi")
    assert "no config.json" in fails(2, "chat", tmp_path)
