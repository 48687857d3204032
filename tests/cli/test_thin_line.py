"""The whole way as a user types it: adapt, sft, export, sample, infill, eval, status, report; and every second call does nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import SMALL, SMALL_EXPORT, SMALL_SFT, curve, fails, stage_state, steps_kept, weights, works, write_corpus


@pytest.fixture(scope="module")
def lines(tiny_checkpoints, tmp_path_factory):
    """family -> (folder, {verb: what it said}): verbs one by one for llama, `run` at once for GPT-2."""
    made = {}
    before = Path.cwd()
    try:
        for family in ("llama", "gpt2"):
            folder = tmp_path_factory.mktemp(f"line-{family}")
            write_corpus(folder)
            os.chdir(folder)
            source = folder / f"my-{family}"
            shutil.copytree(tiny_checkpoints[family], source)
            if family == "llama":
                told = {
                    "adapt": works("adapt", source, *SMALL),
                    "sft": works("sft", *SMALL_SFT),
                    "export": works("export", "--hf", *SMALL_EXPORT),
                }
            else:
                words = [*SMALL, *SMALL_SFT, *SMALL_EXPORT, "stages=[adapt,sft,export]", "eval.infill=the [[MASK:4]] fox"]
                told = {"run": works("run", source, *words)}
            made[family] = folder, told
    finally:
        os.chdir(before)
    return made


@pytest.fixture(params=["llama", "gpt2"])
def line(lines, request, monkeypatch):
    folder, told = lines[request.param]
    monkeypatch.chdir(folder)
    return folder / "runs" / f"my-{request.param}", told


@pytest.fixture
def llama(lines, monkeypatch):
    folder, told = lines["llama"]
    monkeypatch.chdir(folder)
    return folder / "runs" / "my-llama", told


def test_every_stage_leaves_what_it_promises(line):
    run, _ = line
    assert {name: stage_state(run, name)["status"] for name in ("prepare", "adapt", "sft", "export")} == dict.fromkeys(
        ("prepare", "adapt", "sft", "export"), "done"
    )
    for name in ("recipe.yaml", "environment.json", "source/config.json", "adapt/model/config.json", "sft/model/config.json"):
        assert (run / name).is_file()
    assert [point["step"] for point in curve(run / "adapt")] == [2, 4, 6, 8] and steps_kept(run / "adapt") == [6, 8]
    assert [point["step"] for point in curve(run / "sft")] == [1, 2, 3, 4, 5, 6] and steps_kept(run / "sft") == [4, 6]
    spec = json.loads((run / "sft" / "model" / "config.json").read_text())["dlm"]
    assert (spec["trained"], spec["attention"], spec["alignment"], spec["mask_token_id"]) == ("sft", "bidirectional", "shift", 300)
    assert weights(run / "sft" / "model") != weights(run / "adapt" / "model") != weights(run / "source")


def test_the_numbers_are_told_and_kept(line):
    run, told = line
    text = "".join(one.text for one in told.values())
    for what in ("AR NLL of the source", "NELBO before adaptation", "NELBO after adaptation", "NELBO of held-out answers after sft"):
        assert what in text
    before, after = (row["nats_per_token"] for row in stage_state(run, "adapt")["facts"]["measured"][1:])
    assert after < before
    json.loads((run / "run.json").read_text(), parse_constant=lambda word: pytest.fail(f"run.json holds {word}"))


def test_the_latest_run_is_meant_and_named(llama):
    _, told = llama
    for verb in ("sft", "export"):
        assert "run folder runs/my-llama (the latest run)" in told[verb].err


def test_the_export_is_whole_and_verified(line):
    run, told = line
    folder = run / "export" / "native"
    assert "verified in a fresh process" in list(told.values())[-1].err
    assert stage_state(run, "export")["facts"]["checks"] and stage_state(run, "export")["facts"]["stage"] == "sft"
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["steps"] == 4 and generation["max_new_tokens"] == 8
    card = (folder / "README.md").read_text()
    assert "NELBO of held-out answers after sft" in card and str(run.parent.parent) not in card


def test_run_shows_one_gap_filled_in(lines):
    told = lines["gpt2"][1]["run"].out
    assert "AR parent (sees the prefix only):" in told and "converted model (sees both sides):" in told
    assert [text for text in told.split("\n") if "  | the " in text and text.endswith(" fox")]
    assert "report.html" in told and "export/native" in told


def test_sample_infill_eval_status_and_report(line):
    run, _ = line
    (sampled,) = [json.loads(text) for text in works("sample", "--prompt", "the quick", "--max-new-tokens", 6, "--json").out.splitlines()]
    assert sampled["text"].startswith("the quick") and sampled["num_tokens"] == 6
    assert works("sample", run / "export" / "native", "--prompt", "the quick", "--seed", 3).out == works(
        "sample", run / "export" / "native", "--prompt", "the quick", "--seed", 3
    ).out  # fmt: skip
    filled = works("infill", "the [[MASK:4]] fox", "--seed", 1)
    assert filled.out.startswith("the ") and filled.out.endswith(" fox\n") and "the sft model of the latest run" in filled.err
    rows = json.loads(works("eval", "--json").out)
    assert [row["kind"] for row in rows] == ["nelbo", "nll"] and rows[0]["rows"] == 4
    exported = json.loads(works("eval", run / "export" / "native", "--json").out)
    assert exported[0]["nats_per_token"] == pytest.approx(rows[0]["nats_per_token"], abs=1e-4)
    adapted = json.loads(works("eval", run / "adapt", "--json").out)
    measured = stage_state(run, "adapt")["facts"]["measured"]
    assert adapted[0]["nats_per_token"] == pytest.approx(measured[-1]["nats_per_token"], abs=1e-5)
    assert adapted[1]["nats_per_token"] == pytest.approx(measured[0]["nats_per_token"], abs=1e-5)
    assert "nats a token" in works("eval", "--rows", 2, "--draws", 1).out
    (status,) = json.loads(works("status", "--json").out)
    assert status["stages"]["adapt"]["last"]["step"] == 8 and status["holder"] is None
    assert "step 8/8" in works("status", run.name).out
    page = Path(works("report", run).out.strip()).read_text()
    assert "NELBO after adaptation" in page and "<script src" not in page and "http://" not in page


def test_eval_of_a_text_and_of_an_export_elsewhere(llama, tmp_path):
    run, _ = llama
    (tmp_path / "other.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    rows = json.loads(works("eval", run, "--data", tmp_path / "other.txt", "--json", "--rows", 2).out)
    assert rows[0]["tokens"] == 2 * 31
    moved = shutil.copytree(run / "export" / "native", tmp_path / "moved")
    rows = json.loads(works("eval", moved, "--data", tmp_path / "other.txt", "--row-length", 16, "--json", "--rows", 2).out)
    assert [row["kind"] for row in rows] == ["nelbo"] and rows[0]["tokens"] == 2 * 15
    assert "no held-out text" in fails(2, "eval", moved)


def test_export_elsewhere_and_of_a_checkpoint_overwrites_nothing(llama):
    run, _ = llama
    before = {path: path.stat().st_mtime_ns for path in (run / "export" / "native").iterdir()}
    elsewhere = Path("my-model")
    assert works("export", "--to", elsewhere).out.strip() == "my-model"
    assert weights(elsewhere) == weights(run / "export" / "native")
    assert "exists already" in fails(2, "export", "--to", elsewhere)
    works("export", "--checkpoint", "step-6", "export.stage=adapt", "--to", "early", "export.temperature=0.5")
    assert json.loads(Path("early/generation_config.json").read_text())["temperature"] == 0.5
    card = Path("early/README.md").read_text()
    assert "6 (a checkpoint before the end)" in card and "NELBO after adaptation" not in card and "held-out answers" not in card
    assert json.loads(Path("early/config.json").read_text())["dlm"]["trained"] == "adapt"
    assert weights(Path("early")) not in (weights(run / "adapt" / "model"), weights(elsewhere))
    text = fails(2, "export", "--checkpoint", "step-3", "export.stage=adapt")
    assert "step-000006" in text and "step-000008" in text
    assert {path: path.stat().st_mtime_ns for path in (run / "export" / "native").iterdir()} == before
    assert "--to DIR" in fails(2, "export", "export.steps=9")


def test_a_checkpoint_is_the_model_that_it_was(llama):
    """The last checkpoint, exported, is the finished model."""
    run, _ = llama
    from safetensors.torch import load_file

    from dlmconvert.cli.console import ConsoleReporter
    from dlmconvert.runs.folder import RunFolder
    from dlmconvert.runs.models import consolidate
    from dlmconvert.runs.stage import StageContext, StopFlag

    folder = RunFolder(run)
    for stage, step in (("adapt", 8), ("sft", 6)):
        target = run.parent / f"consolidated-{stage}"
        consolidate(StageContext(folder, folder.recipe(), ConsoleReporter(), StopFlag()), stage, step, target)
        whole, found = load_file(run / stage / "model" / "model.safetensors"), load_file(target / "model.safetensors")
        assert whole.keys() == found.keys() and all(torch.equal(whole[name], found[name]) for name in whole)
        assert json.loads((target / "config.json").read_text()) == json.loads((run / stage / "model" / "config.json").read_text())


def test_second_calls_do_nothing_and_need_no_torch(lines):
    """In a process of its own: what is not imported cannot take long."""
    code = (
        "import sys\n"
        "from dlmconvert.cli.app import app, guarded\n"
        "code = guarded(lambda: app(sys.argv[1:], standalone_mode=False))\n"
        "heavy = [name for name in ('torch', 'transformers', 'datasets', 'peft', 'deepspeed', 'matplotlib') if name in sys.modules]\n"
        "assert not heavy, heavy\n"
        "sys.exit(code)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    llama, gpt2 = lines["llama"][0], lines["gpt2"][0]
    again = [*SMALL, *SMALL_SFT, *SMALL_EXPORT, "stages=[adapt,sft,export]", "eval.infill=the [[MASK:4]] fox"]
    calls = [
        (llama, ["adapt", llama / "my-llama", *SMALL], "everything is done already"),
        (llama, ["adapt", llama / "my-llama", *SMALL, "train.save_steps=77"], "everything is done already"),
        (llama, ["sft"], "everything is done already"),
        (llama, ["export", "--hf"], "exported and verified before"),
        (gpt2, ["run", gpt2 / "my-gpt2", *again], "everything is done already"),
        (llama, ["status"], "step 8/8"),
        (llama, ["--help"], "adapt"),
        (llama, ["adapt", "--help"], "KEY=VALUE"),
    ]
    for folder, words, expected in calls:
        stamps = {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*") if path.is_file()}
        done = subprocess.run([sys.executable, "-c", code, *map(str, words)], cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert expected in done.stdout + done.stderr
        assert stamps == {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*") if path.is_file()}


def test_the_export_follows_a_later_fine_tuning(tiny_checkpoints, tmp_path, monkeypatch):
    """adapt, export, sft, export: the second export is of the fine-tuned model, and the first is kept beside it."""
    from dlmconvert.exporting import package

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(package, "verify_export", lambda *args, **kwargs: {"skipped": True})
    monkeypatch.setattr(package, "model_card", lambda *args, **kwargs: "card")
    write_corpus(tmp_path)
    works("adapt", tiny_checkpoints["llama"], *SMALL, "run.folder=runs/one")
    works("export")
    first = weights(Path("runs/one/export/native"))
    assert "exported and verified before" in works("export").err
    works("sft", *SMALL_SFT)
    told = works("export")
    assert weights(Path("runs/one/export/native")) not in (first,) and "verified before" not in told.err
    assert weights(Path("runs/one/export/native-adapt")) == first
    assert stage_state(Path("runs/one"), "export")["facts"]["stage"] == "sft"
