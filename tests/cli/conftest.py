from __future__ import annotations

import pytest


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder with text.jsonl and chat.jsonl, and the tests standing in it."""
    from command_line import write_corpus

    write_corpus(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path
