"""`dlmconvert doctor`: only what is required makes it fail."""

from __future__ import annotations

import importlib.metadata
import json

import pytest

from dlmconvert.cli import doctor as doctoring
from dlmconvert.cli.app import app, guarded


def dlmconvert(*words):
    return guarded(lambda: app(list(words), standalone_mode=False))


def states():
    return {check["name"]: check["state"] for check in doctoring.checks()}


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_this_machine_is_ready_offline(capsys):
    assert dlmconvert("doctor", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    names = {check["name"] for check in report["checks"]}
    assert report["ready"] and names >= {"Python", "torch", "transformers", "peft", "deepspeed", "memory", "disk", "Hub", "OMP_WAIT_POLICY", "locale"}
    assert dlmconvert("doctor") == 0
    assert "torch" in capsys.readouterr().out


def test_a_package_that_is_too_old_fails_it(monkeypatch, capsys):
    monkeypatch.setattr(doctoring, "requirements", lambda: {"torch": ">=99"})
    assert dlmconvert("doctor") == 1
    assert "torch>=99" in capsys.readouterr().out


def test_a_missing_package_fails_it_but_deepspeed_does_not(monkeypatch):
    real = importlib.metadata.version

    def version(name):
        if name in absent:
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    absent = {"deepspeed"}
    assert states()["deepspeed"] == "note"
    absent = {"peft"}
    assert states()["peft"] == "wrong"


def test_offline_and_spinning_threads_are_notes(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    found = states()
    assert found["Hub"] == "note" and found["OMP_WAIT_POLICY"] == "note"
