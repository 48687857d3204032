"""Documents out of sources: every complaint names file and line; equal content gives equal fingerprints."""

import gzip
import json
import os

import pyarrow
import pyarrow.parquet
import pytest

from dlmconvert.data import sources
from dlmconvert.data.docstrings import LONGEST_RESPONSE, docstring_pairs
from dlmconvert.data.sources import content_fingerprint, content_hash, is_local, read_documents, standard_library_files, total_bytes
from dlmconvert.errors import UserError
from dlmconvert.recipe.schema import TextSource


def texts(path, **settings):
    return [document.text for document in read_documents(TextSource(path=str(path), **settings))]


def complaint(path, **settings):
    with pytest.raises(UserError) as caught:
        texts(path, **settings)
    return str(caught.value)


def test_a_text_file_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    documents = list(read_documents(TextSource(path=str(tmp_path / "a.txt"))))
    assert [d.text for d in documents] == ["one\n\ntwo\n"]
    assert documents[0].group == content_hash("one\n\ntwo\n")


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1 << 20])
def test_a_separator_cuts_documents_whatever_the_size_of_a_read(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr("dlmconvert.data.readers._READ_BYTES", chunk)
    path = tmp_path / "a.txt"
    path.write_text("first \u00e9\nline<|sep|>\nsecond<|sep|><|sep|>third\n\nend\n", encoding="utf-8")
    documents = list(read_documents(TextSource(path=str(path), separator="<|sep|>")))
    assert [d.text for d in documents] == ["first \u00e9\nline", "\nsecond", "third\n\nend\n"]
    assert [d.origin.rsplit("line ")[-1] for d in documents] == ["1", "2", "3"]


def test_jsonl_gzip_json_array_and_parquet_hold_the_same_documents(tmp_path):
    records = [{"text": "one", "n": 1}, {"text": "two\u2028three", "n": 2}, {"text": "", "n": 3}]
    lines = "\n\n".join(json.dumps(r, ensure_ascii=False) for r in records)
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "c.json").write_text(json.dumps(records, indent=2))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "d.parquet")
    for name in ("a.jsonl", "b.jsonl.gz", "c.json", "d.parquet"):
        assert texts(tmp_path / name) == ["one", "two\u2028three"], name


def test_folders_and_globs_are_sorted_and_skip_what_is_hidden_empty_or_unknown(tmp_path):
    for name in ("b.txt", "a/z.txt", "a/c.md", ".hidden/x.txt", "e.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "a/empty.txt").write_text("")
    assert texts(tmp_path) == ["a/c.md", "a/z.txt", "b.txt"]
    assert texts(f"{tmp_path}/**/*.txt") == ["a/z.txt", "b.txt"]


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("at home")
    assert texts("~/a.txt") == ["at home"]


def test_broken_json_names_file_and_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n\n{"text": "y"\n')
    message = complaint(tmp_path / "a.jsonl")
    assert "a.jsonl, line 3" in message and "broken JSON" in message


def test_broken_json_array_names_file_and_line(tmp_path):
    (tmp_path / "a.json").write_text('[\n{"text": "x"},\n{"text": }\n]')
    assert "a.json, line 3: broken JSON" in complaint(tmp_path / "a.json")


def test_a_record_that_is_no_object(tmp_path):
    (tmp_path / "a.jsonl").write_text("[1, 2]\n")
    assert "line 1: a list, not a JSON object" in complaint(tmp_path / "a.jsonl")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_invalid_utf8_names_the_line(tmp_path, name):
    (tmp_path / name).write_bytes(b'{"text": "ok"}\n{"text": "ok"}\n{"text": "caf\xe9"}\n')
    assert f"{name}, line 3: invalid UTF-8" in complaint(tmp_path / name)


def test_a_missing_field_names_the_line_the_fields_and_the_nearest(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"texts": "y", "id": 1}\n')
    message = complaint(tmp_path / "a.jsonl")
    assert "line 2: no field 'text'" in message and "'texts', 'id'" in message and "did you mean 'texts'" in message


def test_a_field_that_is_no_string(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": 5}\n')
    assert "line 1: field 'text' is a number, not a string" in complaint(tmp_path / "a.jsonl")


def test_an_empty_file_asked_for_by_name(tmp_path):
    (tmp_path / "a.txt").write_text(" \n")
    assert "a.txt: empty file" in complaint(tmp_path / "a.txt")


def test_a_path_that_is_not_there_names_its_neighbours(tmp_path):
    (tmp_path / "stories.jsonl").write_text("")
    message = complaint(tmp_path / "storys.jsonl")
    assert "no such file" in message and "did you mean 'stories.jsonl'" in message


def test_a_broken_parquet_file_and_a_missing_column(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"not parquet at all")
    assert "a.parquet: not a readable Parquet file" in complaint(tmp_path / "a.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "b.parquet")
    assert "b.parquet, row 1: no field 'text'" in complaint(tmp_path / "b.parquet")


def test_a_truncated_gzip_file(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"hello " * 1000)[:30])
    assert "a.txt.gz: cannot be read" in complaint(tmp_path / "a.txt.gz")


def test_an_unknown_builtin():
    assert "did you mean 'builtin:python'" in complaint("builtin:pyton")


@pytest.mark.parametrize("path", ["./x", "/x", "~/x", "x.jsonl", "x.txt.gz", "a/b/c", "data/*.txt", "builtin:python"])
def test_what_looks_local_never_goes_to_the_hub(path):
    assert is_local(path)


def test_hub_datasets_are_read_through_datasets(monkeypatch):
    asked = {}

    def load(path, **settings):
        asked.update(settings, path=path)
        return [{"body": "one"}, {"body": "two"}]

    monkeypatch.setattr(sources, "load_hub", load)
    assert texts("someone/stories", text_field="body", name="en", split="test") == ["one", "two"]
    assert asked == {"path": "someone/stories", "name": "en", "split": "test", "streaming": False, "revision": None}


def test_a_hub_that_cannot_be_reached_is_a_user_error(monkeypatch):
    def load(*_, **__):
        raise ConnectionError("Couldn't reach the Hub\nlong trace")

    monkeypatch.setattr("datasets.load_dataset", load)
    message = complaint("someone/stories")
    assert "'someone/stories' cannot be loaded from the Hub" in message and "Couldn't reach the Hub" in message


def test_a_stream_that_breaks_is_a_user_error(monkeypatch):
    def rows():
        yield {"text": "one"}
        raise ConnectionResetError("reset")

    monkeypatch.setattr(sources, "load_hub", lambda *_, **__: rows())
    monkeypatch.setattr(sources, "_hub_revision", lambda path: "abc")
    assert "reading stopped at row 1" in complaint("someone/stories", streaming=True)


def test_streamed_fingerprint_is_found_again_without_a_network(monkeypatch, tmp_path):
    source, memory = TextSource(path="someone/stories", streaming=True), tmp_path / "cache" / "hashes.json"
    monkeypatch.setattr(sources, "_hub_revision", lambda path: "abc")
    online = content_fingerprint([source], memory=memory)
    monkeypatch.setattr(sources, "_hub_revision", lambda path: None)
    assert content_fingerprint([source], memory=memory) == online
    monkeypatch.setattr(sources, "_hub_revision", lambda path: "def")
    assert content_fingerprint([source], memory=memory) != online


def test_fingerprint_follows_content_and_settings_but_not_place_or_weight(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text("content")
    source = TextSource(path=str(tmp_path / "one"))
    first = content_fingerprint([source], {"a": 1})
    assert first == content_fingerprint([TextSource(path=str(tmp_path / "two"), weight=3)], {"a": 1})
    assert first != content_fingerprint([source], {"a": 2})
    assert first != content_fingerprint([source, source], {"a": 1})
    (tmp_path / "one" / "a.txt").write_text("Content")
    assert first != content_fingerprint([source], {"a": 1})


def test_large_files_are_remembered_until_they_change(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_REMEMBER_BYTES", 1)
    path, memory = tmp_path / "a.txt", tmp_path / "hashes.json"
    path.write_text("content")
    os.utime(path, (1, 1))
    first = content_fingerprint([TextSource(path=str(path))], memory=memory)
    assert len(json.loads(memory.read_text())) == 1
    monkeypatch.setattr(sources.hashlib, "file_digest", None)  # it would fail if it were called
    assert content_fingerprint([TextSource(path=str(path))], memory=memory) == first
    monkeypatch.undo()
    path.write_text("changed")
    assert content_fingerprint([TextSource(path=str(path))], memory=memory) != first


def test_total_bytes(tmp_path):
    (tmp_path / "a.txt").write_text("12345")
    assert total_bytes([TextSource(path=str(tmp_path / "a.txt"))]) == 5
    assert total_bytes([TextSource(path="someone/stories")]) is None


def test_the_standard_library_without_tests_and_tables():
    names = [path.as_posix() for path in standard_library_files()]
    assert len(names) > 200 and len(set(names)) == len(names)
    assert any(name.endswith("/argparse.py") for name in names)
    for part in ("/test/", "/tests/", "/encodings/", "/site-packages/", "/pydoc_data/", "/idle_test/"):
        assert not any(part in name for name in names), part


def test_docstring_pairs_agree_with_the_files_of_builtin_python(monkeypatch):
    chosen = [path for path in standard_library_files() if path.name in ("bisect.py", "textwrap.py", "shlex.py", "heapq.py", "fnmatch.py")]
    monkeypatch.setattr("dlmconvert.data.docstrings.standard_library_files", lambda: chosen)
    pairs = list(docstring_pairs())
    groups = {content_hash(path.read_text(encoding="utf-8")) for path in chosen}
    assert len(pairs) > 10 and {pair.group for pair in pairs} <= groups
    assert len({(pair.prompt, pair.response) for pair in pairs}) == len(pairs)
    for pair in pairs:
        summary, _, signature = pair.prompt.partition("\n\n")
        assert summary and signature.startswith(("def ", "async def ")) and signature.endswith(":")
        assert 0 < len(pair.response) <= LONGEST_RESPONSE and '"""' not in pair.response.splitlines()[0]
        body = "\n".join("    " + line for line in pair.response.splitlines())
        compile(f"{signature}\n{body}", "pair", "exec")
