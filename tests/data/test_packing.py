"""Packed rows: nothing lost but the last partial row, the same bytes for any number of workers and after any interruption."""

import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from data_examples import story, write_jsonl
from transformers import AutoTokenizer

from dlmconvert.data import packing, tokenising
from dlmconvert.data.packing import prepare_rows
from dlmconvert.data.rows import RowStore, smallest_dtype
from dlmconvert.data.sources import read_documents
from dlmconvert.data.splits import split_rule
from dlmconvert.errors import UserError
from dlmconvert.recipe.schema import TextSource

ROW_LENGTH = 32
SHARED = Path(__file__).parents[2].parent / "shared"


def prepare(path, tokenizer, cache, **settings):
    sources = path if isinstance(path, list) else [TextSource(path=str(path))]
    settings = {"tokenizer_fingerprint": "t", "row_length": ROW_LENGTH, "separator_id": 0, "validation": 0.1, "workers": 1} | settings
    return prepare_rows(sources, tokenizer=tokenizer, cache_folder=cache, **settings)


def stream(store):
    return np.fromfile(store.folder / "tokens.bin", dtype=store.meta["dtype"])


def store_bytes(store):
    return {file.name: file.read_bytes() for file in store.folder.iterdir()}


@pytest.fixture
def small_shards(monkeypatch):
    """Many shards and pieces out of little text; and processes for it, when asked for."""
    monkeypatch.setattr(tokenising, "SHARD_CHARACTERS", 1500)
    monkeypatch.setattr(tokenising, "PIECE_CHARACTERS", 150)
    monkeypatch.setattr(packing, "_SMALL_CORPUS_BYTES", 0)


def test_the_stream_is_the_documents_in_order(stories, tokenizer, tmp_path):
    (train,), held = prepare(stories, tokenizer, tmp_path / "cache", prefix_id=2)
    source = TextSource(path=str(stories))
    rule = split_rule([read_documents(source)], 0.1)
    for store, side in ((train, 0), (held, 1)):
        texts = [rule.parts(d)[side] for d in read_documents(source)]
        expected = [[2, *tokenizer(text, add_special_tokens=False)["input_ids"], 0] for text in texts if text]
        assert stream(store).tolist() == sum(expected, [])
        starts = np.fromfile(store.folder / "documents.bin", dtype=np.int64)
        assert starts.tolist() == np.cumsum([0] + [len(e) for e in expected[:-1]]).tolist()
        assert store.meta["num_documents"] == len(expected)
        assert store.meta["num_tokens"] == store.num_rows * ROW_LENGTH + store.meta["num_tokens_dropped"]
        assert store.meta["num_documents_split"] == sum(len(e) > ROW_LENGTH for e in expected)
        rows = store.rows(np.arange(store.num_rows))
        assert rows.tokens_BL.flatten().tolist() == sum(expected, [])[: store.num_rows * ROW_LENGTH]
        assert rows.eligible_BL.all() and not rows.segments_BL.any()


def test_held_out_text_is_not_in_the_training_stream(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": story(i % 25)} for i in range(100)])
    (train,), held = prepare(path, tokenizer, tmp_path / "cache", validation=0.2)
    both = [set(tokenizer.decode(stream(store)).split("<|end|>")) - {""} for store in (train, held)]
    assert both[1] and not both[0] & both[1]


def test_pieces_do_not_change_the_text(stories, tokenizer, tmp_path, small_shards):
    (train,), _ = prepare(stories, tokenizer, tmp_path / "cache", validation=0)
    assert tokenizer.decode(stream(train)).split("<|end|>")[:-1] == [d.text for d in read_documents(TextSource(path=str(stories)))]


@pytest.mark.parametrize("text", ["x" * 1000, "a b\n" * 300, "\n" * 999 + "x", "word " * 200])
def test_pieces_add_up_to_their_document(text, small_shards):
    pieces = list(tokenising.pieces_of(text, False, "here"))
    assert "".join(piece.text for piece in pieces) == text
    assert [piece.first for piece in pieces] == [True] + [False] * (len(pieces) - 1)
    assert [piece.last for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert all(0 < len(piece.text) <= tokenising.PIECE_CHARACTERS for piece in pieces)


def test_the_number_of_workers_changes_nothing(stories, tokenizer, tmp_path, small_shards, monkeypatch):
    calls, submitted = [], []
    submit = tokenising.Tokeniser.submit

    def counted(self, pieces, path):
        submitted[-1] += sum(len(piece.text) for piece in pieces)
        return submit(self, pieces, path)

    monkeypatch.setattr(tokenising.Tokeniser, "submit", counted)
    submitted.append(0)
    (one,), held_one = prepare(stories, tokenizer, tmp_path / "one", workers=1, max_tokens=1500)
    submitted.append(0)
    (two,), held_two = prepare(stories, tokenizer, tmp_path / "two", workers=2, max_tokens=1500, progress=lambda *call: calls.append(call))
    assert store_bytes(one) == store_bytes(two) and store_bytes(held_one) == store_bytes(held_two)
    assert one.num_tokens == 1500
    assert submitted[0] <= submitted[1] <= submitted[0] + 2 * (tokenising.SHARD_CHARACTERS + 150) < stories.stat().st_size, "little more than the bound"
    assert calls[-1][1] == 1.0 and [c[0] for c in calls] == sorted(c[0] for c in calls)


def test_an_interrupted_preparation_continues_with_the_missing_shards(stories, tokenizer, tmp_path, small_shards, monkeypatch):
    (straight,), held = prepare(stories, tokenizer, tmp_path / "straight")
    cache, written = tmp_path / "cache", []
    write = tokenising.write_shard

    def write_some(encoder, shard_format, pieces, path):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(path.name)
        return write(encoder, shard_format, pieces, path)

    monkeypatch.setattr(tokenising, "write_shard", write_some)
    with pytest.raises(KeyboardInterrupt):
        prepare(stories, tokenizer, cache)
    assert not [folder for folder in cache.iterdir() if (folder / "train-0").exists()]
    shards = sorted(next(cache.glob("*.shards")).rglob("*.npz"))
    assert len(shards) == 3
    shards[0].unlink()
    shards[1].write_bytes(shards[1].read_bytes()[:100])  # as after a power cut
    again = []

    def write_counted(encoder, shard_format, pieces, path):
        again.append(path.name)
        return write(encoder, shard_format, pieces, path)

    monkeypatch.setattr(tokenising, "write_shard", write_counted)
    (resumed,), held_resumed = prepare(stories, tokenizer, cache)
    assert shards[0].name in again and shards[1].name in again and shards[2].name not in again
    assert store_bytes(resumed) == store_bytes(straight) and store_bytes(held_resumed) == store_bytes(held)
    assert not list(cache.glob("*.shards")) and not list(cache.glob("*.tmp"))


def test_prepared_rows_are_found_again_by_content(stories, tokenizer, tmp_path, monkeypatch):
    prepare(stories, tokenizer, tmp_path / "cache")
    copy = tmp_path / "copy.jsonl"
    shutil.copy(stories, copy)
    with monkeypatch.context() as context:
        context.setattr(tokenising, "write_shard", None)  # it would fail if it were called
        prepare([TextSource(path=str(copy), weight=5)], tokenizer, tmp_path / "cache")
    with copy.open("a") as file:
        file.write(json.dumps({"text": story(1000)}) + "\n")
    (changed,), _ = prepare(copy, tokenizer, tmp_path / "cache")
    assert "Story 1000" in tokenizer.decode(stream(changed)) or "Story 1000" in tokenizer.decode(stream(_))


def test_isolated_documents_are_numbered_within_a_row(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": story(i, num_words=4)} for i in range(60)])
    (train,), _ = prepare(path, tokenizer, tmp_path / "cache", validation=0, documents="isolated")
    ends = stream(train)[: train.num_rows * ROW_LENGTH] == 0
    documents = np.concatenate([[0], np.cumsum(ends)[:-1]]).reshape(-1, ROW_LENGTH)
    expected = documents - documents[:, :1]
    order = np.random.default_rng(0).permutation(train.num_rows)
    assert train.has_segments and expected.max() > 1
    assert (train.segments(order).numpy() == expected[order]).all()


def test_several_sources_and_a_validation_text_of_its_own(tmp_path, tokenizer, stories):
    other = write_jsonl(tmp_path / "other.jsonl", [{"body": story(i)} for i in range(100, 130)])
    held = write_jsonl(tmp_path / "held.jsonl", [{"text": story(i)} for i in range(55, 70)])
    sources = [TextSource(path=str(stories)), TextSource(path=str(other), text_field="body")]
    (first, second), validation = prepare(sources, tokenizer, tmp_path / "cache", validation=[TextSource(path=str(held))])
    assert first.meta["num_documents"] == 55  # the five that are also in the validation text are not trained on
    assert second.meta["num_documents"] == 30 and validation.meta["num_documents"] == 15


@pytest.mark.parametrize("kind", ["documents", "one text"])
def test_a_bound_holds_for_what_is_held_out_too(tmp_path, tokenizer, kind, small_shards):
    """Whichever text is held out: as many tokens as are the fraction's share beside the bounded training text, and the first of them."""
    texts = [story(i) for i in range(200)]
    path = tmp_path / ("a.txt" if kind == "one text" else "a.jsonl")
    path.write_text("".join(texts)) if kind == "one text" else write_jsonl(path, [{"text": text} for text in texts])
    (everything,), all_held = prepare(path, tokenizer, tmp_path / "cache", validation=0.2)
    (train,), held = prepare(path, tokenizer, tmp_path / "cache", validation=0.2, max_tokens=1000)
    assert train.num_tokens == 1000 and ROW_LENGTH <= held.num_tokens <= 250 and all_held.num_tokens > 1000
    for some, whole in ((train, everything), (held, all_held)):
        assert (stream(some) == stream(whole)[: some.num_tokens]).all()
    (_,), one_row = prepare(path, tokenizer, tmp_path / "cache", validation=0.02, max_tokens=100)
    assert one_row.num_rows == 1, "a whole row, though its share would be two tokens"


def test_one_long_text_holds_out_its_end(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_text("".join(story(i) for i in range(50)))
    (train,), held = prepare(path, tokenizer, tmp_path / "cache", validation=0.1, max_tokens=1000)
    assert train.num_tokens == 1000 and train.meta["num_documents"] == 1
    assert held.num_tokens == 112, "1000 / 9: the bound of a tenth beside 1000"
    assert tokenizer.decode(stream(held)) in path.read_text()[-len(path.read_text()) // 9 :]


def test_a_corpus_smaller_than_one_row(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("the cat sees")
    with pytest.raises(UserError) as caught:
        prepare(tmp_path / "a.txt", tokenizer, tmp_path / "cache", validation=0)
    assert "tokens are fewer than one row of data.row_length=32" in str(caught.value)
    assert not [entry for entry in (tmp_path / "cache").iterdir() if entry.is_dir()]


def test_held_out_text_smaller_than_one_row_names_a_fraction_that_is_enough(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("".join(story(i) for i in range(5)))
    with pytest.raises(UserError) as caught:
        prepare(tmp_path / "a.txt", tokenizer, tmp_path / "cache", validation=0.01)
    suggestion = float(str(caught.value).split("data.validation=")[2].split(",")[0])
    assert prepare(tmp_path / "a.txt", tokenizer, tmp_path / "cache", validation=suggestion)[1].num_rows >= 1


@pytest.mark.parametrize("workers", [1, 2])
def test_text_that_contains_the_mask_token(tmp_path, tokenizer, workers, small_shards):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": story(i) + ("<|mask|>" if i == 30 else "")} for i in range(40)])
    with pytest.raises(UserError, match=r"a.jsonl, line 31: the text contains the mask token \(id 1\)") as caught:
        prepare(path, tokenizer, tmp_path / "cache", forbidden_id=1, workers=workers)
    assert "source.mask_token" in caught.value.next_step


@pytest.mark.parametrize("name", ["tokens.bin", "documents.bin"])
def test_a_truncated_or_missing_file_is_named(stories, tokenizer, tmp_path, name):
    (train,), _ = prepare(stories, tokenizer, tmp_path / "cache")
    file = train.folder / name
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(UserError, match="damaged") as caught:
        prepare(stories, tokenizer, tmp_path / "cache")
    assert name in str(caught.value) and f"delete the folder {train.folder.parent}" in str(caught.value)
    file.unlink()
    with pytest.raises(UserError, match="damaged"):
        RowStore.open(train.folder)


def test_a_cache_that_is_a_file(stories, tokenizer, tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        prepare(stories, tokenizer, tmp_path / "cache")


def test_a_full_disk_keeps_the_shards(stories, tokenizer, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as context:
        context.setattr(packing.RowWriter, "append", full)
        with pytest.raises(UserError, match="No space left") as caught:
            prepare(stories, tokenizer, tmp_path / "cache")
    assert caught.value.exit_code == 1 and list((tmp_path / "cache").glob("*.shards/part-0/*.npz"))
    assert prepare(stories, tokenizer, tmp_path / "cache")[0][0].num_rows > 0


def test_two_at_once_do_the_work_once(stories, tokenizer, tmp_path, monkeypatch):
    """Threads stand for processes: the lock is held by an open file, not by a process."""
    write, begun = tokenising.write_shard, []

    def write_slowly(*arguments):
        begun.append(arguments[-1])
        time.sleep(0.3)
        return write(*arguments)

    monkeypatch.setattr(tokenising, "write_shard", write_slowly)
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda _: prepare(stories, tokenizer, tmp_path / "cache"), range(2)))
    assert len(begun) == 1 and answers[0][0][0].folder == answers[1][0][0].folder


def test_without_locks_the_faster_one_wins(stories, tokenizer, tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError("locks are not supported here")

    monkeypatch.setattr(packing.fcntl, "flock", no_locks)
    concatenate, faster = packing._concatenate, []

    def overtaken(*arguments):
        if not faster:
            faster.append(None)
            with monkeypatch.context() as context:
                context.setattr(packing.os, "getpid", lambda: 1)  # as another process
                faster.append(prepare(stories, tokenizer, tmp_path / "cache")[0][0])
        return concatenate(*arguments)

    monkeypatch.setattr(packing, "_concatenate", overtaken)
    (train,), _ = prepare(stories, tokenizer, tmp_path / "cache")
    assert store_bytes(train) == store_bytes(faster[1])
    assert len([entry for entry in (tmp_path / "cache").iterdir() if entry.is_dir()]) == 1


def test_dtypes():
    assert [smallest_dtype(n) for n in (1 << 16, (1 << 16) + 1)] == ["uint16", "uint32"]


@pytest.mark.skipif(not (SHARED / "checkpoints/gpt2-tokenizer").is_dir(), reason="needs ../shared")
@pytest.mark.parametrize("name", ["gpt2-tokenizer", "stories260K"])
def test_real_tokenizers_agree_with_calling_them(name, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "checkpoints" / name)
    path = SHARED / "corpora/tinystories"
    source = TextSource(path=str(sorted(path.glob("*valid*.jsonl*"))[0]))
    (train,), _ = prepare([source], tokenizer, tmp_path / "cache", validation=0, separator_id=tokenizer.eos_token_id)
    expected = []
    for document in read_documents(source):
        expected += [*tokenizer(document.text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert stream(train).tolist() == expected


def test_rows_can_be_read_in_any_order(stories, tokenizer, tmp_path):
    (train,), _ = prepare(stories, tokenizer, tmp_path / "cache", documents="isolated")
    whole = train.rows(np.arange(train.num_rows))
    order = np.asarray([5, 0, 5, 3])
    some = train.rows(order)
    assert torch.equal(some.tokens_BL, whole.tokens_BL[order]) and torch.equal(some.segments_BL, whole.segments_BL[order])
