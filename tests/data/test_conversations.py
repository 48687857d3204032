"""Conversations as rows: only the last answer is eligible, it is closed as asked, and nothing is ever without a target."""

import json
from pathlib import Path

import numpy as np
import pytest
from data_examples import WORDS, story, write_jsonl
from transformers import AutoTokenizer

from dlmconvert.data import chat
from dlmconvert.data.chat import Turn, assistant_turns, check_messages, ensure_chat_template, has_generation_marks
from dlmconvert.data.conversations import Layout, conversation_rows, lay_out, read_conversations
from dlmconvert.data.sources import content_hash
from dlmconvert.errors import UserError

SHARED = Path(__file__).parents[2].parent / "shared"
END, PAD = 0, 1

CHATML = (
    "{% for message in messages %}{{ '<|bos|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ message['content'] + '<|end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|bos|>assistant\\n' }}{% endif %}"
)
WITHOUT_MARKS = CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def messages(*contents, system=None):
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return ([{"role": "system", "content": system}] if system else []) + turns


def rows(path, tokenizer, cache, **settings):
    ensure_chat_template(tokenizer)
    layout = Layout(**({"row_length": 64, "end_id": END, "pad_id": PAD} | settings.pop("layout", {})))
    return conversation_rows(str(path), tokenizer=tokenizer, tokenizer_fingerprint="t", layout=layout, cache_folder=cache, **settings)


@pytest.fixture
def chats(tmp_path):
    return write_jsonl(tmp_path / "chats.jsonl", [{"prompt": story(i, 8), "response": story(i + 500, 8)} for i in range(40)])


# one turn, laid out


@pytest.mark.parametrize("num_prompt", [0, 1, 5, 9, 20, 40])
@pytest.mark.parametrize("num_answer", [1, 4, 14, 15, 16, 30])
@pytest.mark.parametrize("pad_to", ["row", "turn", 4, 1, 100])
def test_every_layout_keeps_its_promises(num_prompt, num_answer, pad_to):
    prompt, answer = list(range(100, 100 + num_prompt)), list(range(200, 200 + num_answer))
    layout = Layout(row_length=16, end_id=END, pad_id=PAD, pad_to=pad_to)
    row = lay_out(Turn(prompt, [*answer, END]), layout)
    targets = row.tokens_L[row.eligible_L].tolist()
    first = int(np.argmax(row.eligible_L))
    assert len(targets) >= 2 and row.eligible_L[first : first + len(targets)].all()  # one span
    kept_prompt = row.tokens_L[:first].tolist()
    assert kept_prompt == prompt[num_prompt - len(kept_prompt) :]  # only the start of the prompt is ever dropped
    if num_answer <= 15:
        ends = len(targets) - num_answer
        assert targets == answer + [END] * ends and ends >= 1 and not row.answer_cut
        total = len(kept_prompt) + num_answer
        if pad_to == "turn":
            assert ends == 1
        elif pad_to == "row":
            assert row.padding_start == 16
        else:
            assert row.padding_start == 16 or (row.padding_start % pad_to == 0 and ends <= pad_to)
        assert row.prompt_truncated == (num_prompt + num_answer + 1 > 16)
        assert total + 1 <= 16
    else:
        assert row.answer_cut and row.padding_start == 16 and targets == answer[: len(targets)]
        assert len(kept_prompt) == min(1, num_prompt)
    assert (row.tokens_L[row.padding_start :] == PAD).all() and not row.eligible_L[row.padding_start :].any()
    assert row.padding_start == first + len(targets)
    skipped = lay_out(Turn(prompt, answer), Layout(16, END, PAD, pad_to=pad_to, too_long="skip"))
    assert (skipped is None) == (num_prompt + num_answer + 1 > 16)


def test_the_bos_token_stays_in_front_of_a_truncated_prompt():
    row = lay_out(Turn([2, *range(100, 130)], [7, 8]), Layout(8, END, PAD, prefix_id=2))
    assert row.tokens_L.tolist() == [2, 126, 127, 128, 129, 7, 8, END]


# turns out of conversations


def test_plain_template_marks_the_answer_and_its_end(tokenizer):
    assert ensure_chat_template(tokenizer) and not ensure_chat_template(tokenizer)
    (turn,) = assistant_turns(tokenizer, messages("  the dog \n", "sees a cat\n", system="be small"), "here")
    assert tokenizer.decode(turn.prompt_ids) == "be small\n\nUser: the dog\n\nAssistant:\n"
    assert tokenizer.decode(turn.answer_ids) == "sees a cat<|end|>"


def test_plain_template_begins_with_bos_where_the_tokenizer_does():
    assert chat.plain_chat_template(True).startswith("{{ bos_token }}") and "bos" not in chat.plain_chat_template(False).lower()


def test_the_prompt_in_training_is_the_prompt_in_sampling(tokenizer):
    ensure_chat_template(tokenizer)
    conversation = messages("the dog", "sees", "and then?", "    it walks\n    slowly")
    for turn, prompt in zip(assistant_turns(tokenizer, conversation, "here"), (conversation[:1], conversation[:3]), strict=True):
        assert turn.prompt_ids == tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]


@pytest.mark.parametrize("template", [CHATML, None])
def test_spans_from_prefixes_equal_spans_from_marks(tokenizer, template):
    tokenizer.chat_template = template
    ensure_chat_template(tokenizer)
    assert has_generation_marks(tokenizer)
    conversation = messages("the dog", "sees", "a large river?", "it walks under", "never", " ".join(WORDS), system="then")
    marked = list(assistant_turns(tokenizer, conversation, "here"))
    tokenizer.chat_template = WITHOUT_MARKS if template else _strip_marks(tokenizer.chat_template)
    assert not has_generation_marks(tokenizer)
    assert list(assistant_turns(tokenizer, conversation, "here")) == marked
    assert len(marked) == 3 and all(turn.answer_ids[-1] == END for turn in marked)


def _strip_marks(template):
    return template.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def test_earlier_turns_are_prompt_and_later_ones_are_not_there(tokenizer):
    tokenizer.chat_template = CHATML
    first, second = assistant_turns(tokenizer, messages("the", "cat", "sees", "dog", "blue"), "here")
    assert "dog" not in tokenizer.decode(first.prompt_ids + first.answer_ids)
    text = tokenizer.decode(second.prompt_ids)
    assert "cat<|end|>" in text and "sees" in text and "blue" not in text


def test_prefixes_that_disagree_are_refused(tokenizer):
    # The prompt alone ends with a space that becomes a part of the first token of the answer.
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['content'] + ' ' }}{% endfor %}{% if add_generation_prompt %}{{ '' }}{% endif %}"
    )
    with pytest.raises(UserError, match="file.jsonl, line 7: the answer cannot be told from the prompt"):
        list(assistant_turns(tokenizer, messages("the", "river"), "file.jsonl, line 7"))


def test_a_template_that_refuses_is_told_with_its_reason(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(UserError, match="line 3: the chat template refuses this conversation\nno system role"):
        list(assistant_turns(tokenizer, messages("a", "b"), "line 3"))


def test_marks_that_mark_nothing_are_an_error(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'tool' %}{% generation %}x{% endgeneration %}{% endif %}{% endfor %}"
    )
    with pytest.raises(UserError, match="marks no token"):
        list(assistant_turns(tokenizer, messages("the", "cat"), "here"))


@pytest.mark.parametrize(
    "record, words",
    [
        ({"messages": messages("hello")}, "no assistant turn"),
        ({"messages": []}, "no assistant turn"),
        ({"messages": messages("hello", "  ")}, "message 2: empty response"),
        ({"messages": [{"role": "asistant", "content": "x"}]}, "unknown role 'asistant'\ndid you mean 'assistant'?"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "roles out of order: 'assistant' where 'system' or 'user'"),
        ({"messages": messages("a", "b") + [{"role": "system", "content": "x"}]}, "message 3: roles out of order"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "`content` is missing or not a string"),
        ({"messages": [{"from": "human", "value": "x"}]}, "fields there: 'from', 'value'"),
        ({"messages": "hello"}, "not a list of objects"),
        ({"prompts": "a", "response": "b"}, "did you mean 'prompts'?"),
        ({"prompt": "a"}, "neither `messages` nor the field 'response'"),
        ({"prompt": "a", "response": 5}, "field 'response' is not a string"),
        ({"prompt": "a", "response": " "}, "empty response"),
    ],
)
def test_bad_conversations_are_named_with_file_and_line(tmp_path, record, words):
    path = write_jsonl(tmp_path / "chats.jsonl", [{"prompt": "a", "response": "b"}, record])
    with pytest.raises(UserError) as caught:
        list(read_conversations(str(path)))
    assert "chats.jsonl, line 2" in str(caught.value) and words in str(caught.value)


def test_check_messages_keeps_what_is_right():
    conversation = messages("a", "b", "c", "d", "e", system="s")
    assert check_messages([message | {"extra": 1} for message in conversation], "here") == conversation


# rows on disk


def test_rows_hold_prompt_answer_ends_and_padding(chats, tokenizer, tmp_path):
    train, held = rows(chats, tokenizer, tmp_path / "cache", layout={"pad_to": 8}, validation=0.2)
    assert train.num_rows + held.num_rows == 40 and held.num_rows >= 1
    seen = set()
    for store in (train, held):
        everything = store.rows(np.arange(store.num_rows))
        assert store.has_segments and not store.all_eligible
        for tokens, eligible, segments in zip(everything.tokens_BL, everything.eligible_BL, everything.segments_BL, strict=True):
            text = tokenizer.decode(tokens[~eligible & (segments == 0)])
            answer = tokenizer.decode(tokens[eligible])
            number = int(text.split("Story ")[1].split(".")[0])
            seen.add(number)
            assert text == f"User: {story(number, 8).strip()}\n\nAssistant:\n"
            assert answer.replace("<|end|>", "") + "\n" == story(number + 500, 8)
            assert answer.endswith("<|end|>") and (segments == 0).sum() % 8 == 0
            assert (tokens[segments == 1] == PAD).all() and not eligible[segments == 1].any()
        assert store.meta["num_eligible_tokens"] == int(everything.eligible_BL.sum())
        assert store.meta["num_padding_tokens"] == int(everything.segments_BL.sum())
    assert seen == set(range(40))


def test_a_full_row_has_one_segment(chats, tokenizer, tmp_path):
    train, _ = rows(chats, tokenizer, tmp_path / "cache", layout={"pad_to": "row"})
    assert not train.has_segments and not train.segments(np.arange(train.num_rows)).any()


def test_one_row_a_turn(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": messages("the", "cat", "sees", "dog")}] * 3)
    train, held = rows(path, tokenizer, tmp_path / "cache")
    assert held is None  # one group only: nothing can be held out
    assert train.num_rows == 6 and train.meta["num_conversations"] == 3


def test_two_answers_to_one_question_stay_on_one_side(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": story(i % 20, 8), "response": story(i, 8)} for i in range(60)])
    train, held = rows(path, tokenizer, tmp_path / "cache", validation=0.3)
    prompts = []
    for store in (train, held):
        everything = store.rows(np.arange(store.num_rows))
        pairs = zip(everything.tokens_BL, everything.eligible_BL, strict=True)
        prompts.append({tokenizer.decode(tokens[: int(eligible.int().argmax())]) for tokens, eligible in pairs})
    assert prompts[0] and prompts[1] and not prompts[0] & prompts[1]


def test_too_long_conversations_are_counted(tmp_path, tokenizer):
    path = write_jsonl(
        tmp_path / "a.jsonl",
        [{"prompt": "the", "response": "cat"}, {"prompt": story(1, 100), "response": "cat"}, {"prompt": "the", "response": story(2, 100)}],
    )
    train, _ = rows(path, tokenizer, tmp_path / "cache", layout={"row_length": 32}, validation=0)
    assert train.num_rows == 3 and train.meta["num_prompts_truncated"] == 2 and train.meta["num_answers_cut"] == 1
    skipped, _ = rows(path, tokenizer, tmp_path / "cache", layout={"row_length": 32, "too_long": "skip"}, validation=0)
    assert skipped.num_rows == 1 and skipped.meta["num_skipped"] == 2
    with pytest.raises(UserError, match="all 3 conversations are longer than a row of 4 tokens"):
        rows(path, tokenizer, tmp_path / "cache", layout={"row_length": 4, "too_long": "skip"}, validation=0)


def test_a_validation_file_of_its_own(tmp_path, tokenizer, chats):
    held_path = write_jsonl(tmp_path / "held.jsonl", [{"prompt": story(i, 8), "response": "cat"} for i in (3, 1000)])
    train, held = rows(chats, tokenizer, tmp_path / "cache", validation=str(held_path))
    assert train.num_rows == 39 and held.num_rows == 2  # question 3 is not trained on


def test_rows_are_made_once(chats, tokenizer, tmp_path, monkeypatch):
    first, _ = rows(chats, tokenizer, tmp_path / "cache")
    monkeypatch.setattr("dlmconvert.data.conversations._TurnRows", None)  # it would fail if it were called
    assert rows(chats, tokenizer, tmp_path / "cache")[0].folder == first.folder
    monkeypatch.undo()
    tokenizer.chat_template = CHATML
    assert rows(chats, tokenizer, tmp_path / "cache")[0].folder != first.folder


def test_an_interruption_leaves_nothing_half_made(chats, tokenizer, tmp_path):
    def stop(*_):
        raise KeyboardInterrupt

    for _ in range(5):
        with chats.open("a") as file:
            file.writelines(json.dumps({"prompt": story(i, 8), "response": "cat"}) + "\n" for i in range(40, 70))
    with pytest.raises(KeyboardInterrupt):
        rows(chats, tokenizer, tmp_path / "cache", progress=stop)
    assert not [entry for entry in (tmp_path / "cache").iterdir() if entry.is_dir()]


def test_a_conversation_that_contains_the_mask_token(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "the <|mask|>", "response": "cat"}])
    with pytest.raises(UserError, match=r"line 1: the text contains the mask token \(id 1\)"):
        rows(path, tokenizer, tmp_path / "cache", forbidden_id=1)


def test_plain_text_is_no_conversation(tmp_path):
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(UserError, match="plain text holds no conversations"):
        list(read_conversations(str(tmp_path / "a.txt")))
    with pytest.raises(UserError, match="did you mean 'builtin:python-docstrings'"):
        list(read_conversations("builtin:python-docstring"))


def test_docstring_conversations_carry_the_group_of_their_file(monkeypatch):
    from dlmconvert.data.sources import standard_library_files

    chosen = [path for path in standard_library_files() if path.name == "textwrap.py"]
    monkeypatch.setattr("dlmconvert.data.docstrings.standard_library_files", lambda: chosen)
    found = list(read_conversations("builtin:python-docstrings"))
    assert found and {c.group for c in found} == {content_hash(chosen[0].read_text(encoding="utf-8"))}


@pytest.mark.skipif(not (SHARED / "benchmarks/gsm8k/train.jsonl").is_file(), reason="needs ../shared")
@pytest.mark.parametrize("name", ["gpt2-tokenizer", "stories260K"])
def test_gsm8k_by_the_names_of_its_fields(name, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "checkpoints" / name)
    with (SHARED / "benchmarks/gsm8k/train.jsonl").open() as file:
        records = [json.loads(next(file)) for _ in range(200)]
    path, end = write_jsonl(tmp_path / "gsm8k.jsonl", records), tokenizer.eos_token_id
    train, held = rows(
        path, tokenizer, tmp_path / "cache", prompt_field="question", response_field="answer",
        layout={"row_length": 1024, "end_id": end, "pad_id": end, "pad_to": "turn"},
    )  # fmt: skip
    assert train.num_rows + held.num_rows == 200 and train.meta["num_prompts_truncated"] == 0
    answers = {record["answer"] for record in records}
    some = train.rows(np.arange(20))
    for tokens, eligible in zip(some.tokens_BL, some.eligible_BL, strict=True):
        assert tokens[eligible][-1] == end
        assert tokenizer.decode(tokens[eligible][:-1]).strip() in answers


def test_missing_field_of_gsm8k_names_the_setting(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": "a", "answer": "b"}])
    with pytest.raises(UserError, match="sft.prompt_field"):
        list(read_conversations(str(path)))
