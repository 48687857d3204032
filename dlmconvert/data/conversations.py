"""Conversations become rows: a prompt that stays clean, an answer that is masked and scored, trained end tokens, padding.

    | prompt (earlier turns included) | answer | end tokens | padding      |
    | not eligible                    | eligible            | not eligible |
    | segment 0                                             | segment 1    |

One row a turn: a bidirectional model that answers turn 1 must not see the question of turn 2.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from dlmconvert.data.chat import Turn, assistant_turns, check_messages
from dlmconvert.data.docstrings import BUILTIN_DOCSTRINGS, docstring_pairs
from dlmconvert.data.packing import locked, published, told_as_user_errors
from dlmconvert.data.readers import JSON_SUFFIXES, PARQUET_SUFFIXES, Record, hub_records, load_hub, read_records, suffix_of
from dlmconvert.data.rows import FORMAT, RowStore, RowWriter, largest_vocabulary, smallest_dtype
from dlmconvert.data.sources import BUILTIN_PYTHON, content_fingerprint, content_hash, is_local, local_files
from dlmconvert.data.splits import LOOK_AHEAD, held_out, smallest_group
from dlmconvert.data.tokenising import no_length_warning
from dlmconvert.errors import UserError, nearest
from dlmconvert.recipe.schema import TextSource


@dataclass(frozen=True)
class Conversation:
    """messages: [{role, content}], checked. group: decides the side of the held-out split. origin: file and line."""

    messages: list[dict[str, str]]
    group: str
    origin: str


@dataclass(frozen=True)
class Layout:
    """How a turn is put into a row.

    row_length: tokens in a row. end_id: the end token. pad_id: fills what is behind it. prefix_id: a bos token that stays in
    front when the start of a prompt is dropped; None for none. pad_to, too_long: as in the recipe's `sft` section.
    """

    row_length: int
    end_id: int
    pad_id: int
    prefix_id: int | None = None
    pad_to: str | int = "row"
    too_long: str = "truncate"


@dataclass(frozen=True)
class LaidOut:
    """tokens_L int64; eligible_L bool; padding_start in 0..row_length; what had to be cut."""

    tokens_L: np.ndarray
    eligible_L: np.ndarray
    padding_start: int
    prompt_truncated: bool
    answer_cut: bool


def lay_out(turn: Turn, layout: Layout) -> LaidOut | None:
    """A turn as a row, or None when it is too long and skipped.

    The answer is closed with end tokens: one (`turn`), or up to the next multiple of `pad_to`, or to the end of the row. Too
    long and `truncate`: the prompt loses its start. An answer that alone is longer than row_length - 1 loses its end; it then
    has no end token, because it does not end there, and the last token of the prompt stands in front of it. So every row
    has at least two eligible tokens.
    """
    length = layout.row_length
    prompt, answer = list(turn.prompt_ids), list(turn.answer_ids)
    while answer and answer[-1] == layout.end_id:  # the template's own end token is counted among ours
        answer.pop()
    truncated = len(prompt) + len(answer) + 1 > length
    cut = len(answer) > length - 1
    if truncated and layout.too_long == "skip":
        return None
    if cut:
        prompt, answer = prompt[-1:], answer[: length - 1 if prompt else length]
    elif truncated:
        room = length - 1 - len(answer)
        keep_prefix = room > 1 and layout.prefix_id is not None and prompt[0] == layout.prefix_id
        prompt = [layout.prefix_id, *prompt[len(prompt) - room + 1 :]] if keep_prefix else prompt[len(prompt) - room :]
    answer_end = len(prompt) + len(answer)
    if cut:
        end = length
    elif layout.pad_to == "turn":
        end = answer_end + 1
    elif layout.pad_to == "row":
        end = length
    else:
        multiple = int(layout.pad_to)
        end = min(length, -(-(answer_end + 1) // multiple) * multiple)
    tokens_L = np.full(length, layout.pad_id, dtype=np.int64)
    tokens_L[:answer_end] = prompt + answer
    tokens_L[answer_end:end] = layout.end_id
    eligible_L = np.zeros(length, dtype=bool)
    eligible_L[len(prompt) : end] = True
    return LaidOut(tokens_L, eligible_L, end, truncated, cut)


def read_conversations(
    path: str, *, prompt_field: str = "prompt", response_field: str = "response", split: str = "train"
) -> Iterator[Conversation]:
    """The conversations of a JSONL or Parquet file (folder, glob), a Hub dataset, or `builtin:python-docstrings`.

    A record holds `messages`, or a prompt and a response under the names given. Raises UserError with file and line.
    The group is the hash of everything before the first answer: two answers to one question stay on one side of the split.
    """
    if path == BUILTIN_DOCSTRINGS:
        for pair in docstring_pairs():
            messages = [{"role": "user", "content": pair.prompt}, {"role": "assistant", "content": pair.response}]
            yield Conversation(messages, pair.group, pair.origin)
        return
    for record in _records(path, split):
        messages = check_messages(_messages(record, prompt_field, response_field), record.origin)
        first_answer = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
        yield Conversation(messages, content_hash(json.dumps(messages[:first_answer])), record.origin)


def conversation_rows(
    path: str,
    *,
    tokenizer: Any,
    tokenizer_fingerprint: str,
    layout: Layout,
    cache_folder: str | Path,
    prompt_field: str = "prompt",
    response_field: str = "response",
    split: str = "train",
    forbidden_id: int | None = None,
    validation: float | str = 0.02,
    progress: Callable[[int, float | None], None] | None = None,
) -> tuple[RowStore, RowStore | None]:
    """Rows of conversations to train on, and held out (None when nothing is).

    tokenizer: with a chat template (see `chat.ensure_chat_template`). tokenizer_fingerprint: changes with it and its template.
    validation: the fraction of the groups that is held out, or a path of its own.
    forbidden_id: token that a conversation must not contain; None when the mask token is an ordinary word.
    progress: called with (conversations so far, fraction done or None).

    The stores' meta counts num_conversations, num_rows (turns), num_prompts_truncated, num_answers_cut, num_skipped,
    num_eligible_tokens and num_padding_tokens. Raises UserError for what `read_conversations` finds, and for no rows at all.
    """
    assert tokenizer.chat_template, "call chat.ensure_chat_template first"
    cache = Path(cache_folder)
    fraction, held_path = (0.0, validation) if isinstance(validation, str) else (float(validation), None)
    paths = [path] if held_path is None else [path, held_path]
    settings = {
        "format": FORMAT, "kind": "conversations", "tokenizer": tokenizer_fingerprint, "template": str(tokenizer.chat_template),
        "layout": vars(layout), "fields": [prompt_field, response_field], "forbidden_id": forbidden_id, "fraction": fraction,
        "builtin": [p == BUILTIN_DOCSTRINGS for p in paths],
    }  # fmt: skip
    sources = [TextSource(path=BUILTIN_PYTHON if p == BUILTIN_DOCSTRINGS else p, split=split) for p in paths]
    fingerprint = content_fingerprint(sources, settings, memory=cache / "hashes.json")[:24]
    final = cache / fingerprint

    def read(from_path: str) -> Iterator[Conversation]:
        return read_conversations(from_path, prompt_field=prompt_field, response_field=response_field, split=split)

    def opened() -> tuple[RowStore, RowStore | None]:
        held = final / "validation"
        return RowStore.open(final / "train-0"), RowStore.open(held) if held.is_dir() else None

    if final.is_dir():
        return opened()
    with told_as_user_errors(cache), locked(cache / f".{fingerprint}.lock"):
        if final.is_dir():  # another process made it while this one waited
            return opened()
        turn_rows = _TurnRows(tokenizer, layout, forbidden_id)
        with no_length_warning(tokenizer), published(final) as folder:
            held = _Side(folder / "validation", fingerprint, layout.row_length, turn_rows.dtype)
            train = _Side(folder / "train-0", fingerprint, layout.row_length, turn_rows.dtype)
            excluded = set()
            if held_path is not None:
                for conversation in read(held_path):
                    excluded.add(conversation.group)
                    held.add(turn_rows.of(conversation))
            chosen = _chosen(read(path), fraction)
            total = _num_lines(path)
            for number, conversation in enumerate(read(path), start=1):
                if conversation.group in chosen or held_out(conversation.group, fraction):
                    held.add(turn_rows.of(conversation))
                elif conversation.group not in excluded:
                    train.add(turn_rows.of(conversation))
                if progress is not None and number % 100 == 0:
                    progress(number, min(1.0, number / total) if total else None)
            if progress is not None:
                progress(train.meta["num_conversations"] + held.meta["num_conversations"], 1.0)
            train.close(path)
            if not train.meta["num_rows"]:
                raise _no_rows(path, train.meta["num_skipped"], layout.row_length)
            held.close(held_path or "held out")
            if not held.meta["num_rows"]:
                if held_path is not None:
                    raise _no_rows(held_path, held.meta["num_skipped"], layout.row_length)
                shutil.rmtree(folder / "validation")
    return opened()


class _TurnRows:
    """The rows of a conversation; None for each turn that is skipped."""

    def __init__(self, tokenizer: Any, layout: Layout, forbidden_id: int | None):
        self._tokenizer = tokenizer
        self._layout = layout
        self._forbidden_id = forbidden_id
        self.dtype = smallest_dtype(max(largest_vocabulary(tokenizer), layout.end_id + 1, layout.pad_id + 1))

    def of(self, conversation: Conversation) -> list[LaidOut | None]:
        rows = []
        for turn in assistant_turns(self._tokenizer, conversation.messages, conversation.origin):
            if self._forbidden_id is not None and self._forbidden_id in turn.prompt_ids + turn.answer_ids:
                raise UserError(
                    f"{conversation.origin}: the text contains the mask token (id {self._forbidden_id})",
                    "such a token would look like a gap to be filled in",
                    "remove it from the text, or set source.mask_token to another token",
                )
            rows.append(lay_out(turn, self._layout))
        return rows


class _Side:
    """One store while it is written."""

    def __init__(self, folder: Path, fingerprint: str, row_length: int, dtype: str):
        self._writer = RowWriter(folder)
        self._dtype = dtype
        self.meta: dict[str, Any] = {
            "kind": "conversations", "fingerprint": fingerprint, "row_length": row_length, "dtype": dtype, "documents": "joined",
            "num_conversations": 0, "num_rows": 0, "num_tokens": 0, "num_prompts_truncated": 0, "num_answers_cut": 0, "num_skipped": 0,
            "num_eligible_tokens": 0, "num_padding_tokens": 0,
        }  # fmt: skip
        self._write(np.zeros(0), np.zeros(0, bool), np.zeros(0))

    def add(self, rows: Iterable[LaidOut | None]) -> None:
        meta = self.meta
        meta["num_conversations"] += 1
        for row in rows:
            if row is None:
                meta["num_skipped"] += 1
                continue
            self._write(row.tokens_L, row.eligible_L, np.asarray([row.padding_start]))
            meta["num_rows"] += 1
            meta["num_tokens"] += len(row.tokens_L)
            meta["num_prompts_truncated"] += row.prompt_truncated
            meta["num_answers_cut"] += row.answer_cut
            meta["num_eligible_tokens"] += int(row.eligible_L.sum())
            meta["num_padding_tokens"] += len(row.tokens_L) - row.padding_start

    def close(self, source: str) -> None:
        self._writer.close(self.meta | {"source": source})

    def _write(self, tokens_L: np.ndarray, eligible_L: np.ndarray, padding_start: np.ndarray) -> None:
        self._writer.append("tokens.bin", tokens_L.astype(self._dtype))
        self._writer.append("eligible.bin", np.packbits(eligible_L))
        self._writer.append("padding.bin", padding_start.astype(np.int32))


def _records(path: str, split: str) -> Iterator[Record]:
    if not is_local(path):
        yield from hub_records(load_hub(path, name=None, split=split, streaming=False), path)
        return
    if path.startswith("builtin:"):
        raise UserError(f"there are no conversations {path!r}", nearest(path, [BUILTIN_DOCSTRINGS]))
    for file in local_files(path):
        if suffix_of(file) not in JSON_SUFFIXES + PARQUET_SUFFIXES:
            raise UserError(f"{file}: plain text holds no conversations", "give a .jsonl file with `messages`, or a prompt and a response")
        num_records = 0
        for record in read_records(file):
            num_records += 1
            yield record
        if not num_records:
            raise UserError(f"{file}: empty file", "it holds no conversation")


def _messages(record: Record, prompt_field: str, response_field: str) -> Any:
    fields = record.value
    if "messages" in fields:
        return fields["messages"]
    for field, setting in ((prompt_field, "sft.prompt_field"), (response_field, "sft.response_field")):
        if field not in fields:
            raise UserError(
                f"{record.origin}: neither `messages` nor the field {field!r}",
                f"fields there: {', '.join(map(repr, fields)) or 'none'}; {nearest(field, fields)}",
                f"name the field with {setting}=...",
            )
        if not isinstance(fields[field], str):
            raise UserError(f"{record.origin}: field {field!r} is not a string", f"value: {str(fields[field])[:80]}")
    return [{"role": "user", "content": fields[prompt_field]}, {"role": "assistant", "content": fields[response_field]}]


def _chosen(conversations: Iterable[Conversation], fraction: float) -> set[str]:
    """The group that is held out of a small file in which the fraction happens to choose none."""
    groups = [conversation.group for conversation in islice(conversations, LOOK_AHEAD)] if fraction > 0 else []
    if len(groups) == LOOK_AHEAD or any(held_out(group, fraction) for group in groups):
        return set()
    return smallest_group(groups)


def _num_lines(path: str) -> int | None:
    """About the number of records of plain JSONL files; None for anything else."""
    if not is_local(path) or path == BUILTIN_DOCSTRINGS:
        return None
    total = 0
    for file in local_files(path):
        if file.suffix.lower() not in (".jsonl", ".ndjson"):
            return None
        with file.open("rb") as stream:
            total += sum(chunk.count(b"\n") for chunk in iter(lambda stream=stream: stream.read(1 << 20), b""))
    return total


def _no_rows(path: str, num_skipped: int, row_length: int) -> UserError:
    if num_skipped:
        return UserError(
            f"{path}: all {num_skipped} conversations are longer than a row of {row_length} tokens",
            "sft.too_long=skip leaves such conversations out",
            "raise sft.row_length, or set sft.too_long=truncate",
        )
    return UserError(f"{path}: no conversation is left to train on", "all of them are held out", "lower sft.validation, or give more")
