"""Where a run stands and what came out of it: text for the screen, one HTML page with curves."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from dlmconvert.runs.folder import RunFolder

TRAINING_STAGES = ("pretrain", "adapt", "sft")
ORDER = ("pretrain", "prepare", "adapt", "sft", "export", "report")


def status_of(run: RunFolder) -> dict[str, Any]:
    """The state of a run as plain values (for --json). Reads files only; a running process is not disturbed."""
    from dlmconvert.training.metrics import read_metrics

    state = run.state()
    holder = run.holder()
    stages = {}
    for name in ORDER:
        recorded = state["stages"].get(name)
        if recorded is None:
            continue
        entry = {"status": recorded.get("status"), "seconds": round(recorded.get("seconds", 0.0), 1)}
        if entry["status"] == "started":
            entry["status"] = "running" if holder else "interrupted"
        lines = [line for line in read_metrics(run.path / name / "metrics.jsonl") if "loss" in line]
        if lines:
            entry["last"] = lines[-1]
            entry["steps"] = recorded.get("keys", {}).get(f"{'train' if name == 'adapt' else name}.steps")
        entry["checkpoints"] = sorted(p.name for p in (run.path / name / "checkpoints").glob("step-*") if (p / "COMPLETE").is_file())
        stages[name] = entry
    return {"run": str(run.path), "holder": holder, "updated": state.get("updated"), "stages": stages}


def status_text(status: dict[str, Any]) -> str:
    lines = [f"{status['run']}" + (f"   (held by {status['holder']})" if status["holder"] else "")]
    if status["updated"]:
        lines[0] += f"   last change {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(status['updated']))}"
    for name, entry in status["stages"].items():
        text = f"  {name:9} {entry['status']:12} {entry['seconds']:>8.0f} s"
        if "last" in entry:
            last = entry["last"]
            text += f"   step {last['step']}/{entry['steps']}  loss {last['loss']:.3f}  {last['tokens_per_second']:,.0f} tokens/s"
            if entry["steps"] and entry["status"] == "running":
                left = (entry["steps"] - last["step"]) * last["seconds_per_step"]
                text += f"  about {left / 60:.1f} min left"
        if entry["checkpoints"]:
            text += f"   checkpoints {', '.join(entry['checkpoints'])}"
        lines.append(text)
    if not status["stages"]:
        lines.append("  nothing has started")
    return "\n".join(lines)


def measured_rows(run: RunFolder) -> list[dict[str, Any]]:
    """Every likelihood that the run has measured, in order."""
    rows = []
    for name in TRAINING_STAGES:
        rows += run.stage_state(name).get("facts", {}).get("measured", [])
    return rows


def result_text(run: RunFolder) -> str:
    """The end of a command: numbers, one filled gap, where things lie."""
    from dlmconvert.runs.stages import nats_text

    lines = [""]
    rows = measured_rows(run)
    if rows:
        lines.append(f"  {'on held-out text':40} nats a token    bits a byte")
        for row in rows:
            bits = f"{row['bits_per_byte']:.3f}" if row["bits_per_byte"] is not None else ""
            bound = "<= " if row["kind"] == "nelbo" else "   "
            lines.append(f"  {row['what']:40} {bound}{nats_text(row)}   {bits}")
    example = run.stage_state("report").get("facts", {}).get("infill")
    if example:
        lines += ["", *infill_lines(example)]
    places = [("model", p) for p in _models(run)] + [("report", run.path / "report.html")]
    lines += [""] + [f"  {what:7} {path}" for what, path in places if path.exists()]
    return "\n".join(lines)


def infill_lines(example: dict[str, str]) -> list[str]:
    from dlmconvert.sampling.text import parse_gaps  # needs no torch: a finished run is shown at once

    lines = []
    for title, filling in (("AR parent (sees the prefix only)", example["source"]), ("converted model (sees both sides)", example["converted"])):
        text = "".join(part if isinstance(part, str) else filling for part in parse_gaps(example["text"]))
        lines += [f"  {title}:"] + [f"  | {line}" for line in text.rstrip("\n").split("\n")]
    return lines


def _models(run: RunFolder) -> list[Path]:
    exported = run.stage_state("export").get("facts", {})
    newest = "sft" if run.stage_state("sft").get("status") == "done" else "adapt"
    if exported.get("stage") == newest and Path(exported["folder"]).is_dir():
        return [Path(exported["folder"])]
    return [p for p in (run.model_folder("sft"), run.model_folder("adapt")) if p.is_dir()][:1]


def write_report(run: RunFolder) -> Path:
    """report.html and plots/*.png from what lies in the run folder. May be called at any time."""
    from dlmconvert.runs.report_page import page, plot_curves
    from dlmconvert.training.metrics import read_metrics

    curves = {name: read_metrics(run.path / name / "metrics.jsonl") for name in TRAINING_STAGES}
    plots = plot_curves({name: lines for name, lines in curves.items() if lines}, run.path / "plots")
    path = run.path / "report.html"
    recipe_text = (run.path / "recipe.yaml").read_text(encoding="utf-8")
    environment = json.loads((run.path / "environment.json").read_text(encoding="utf-8"))
    example = run.stage_state("report").get("facts", {}).get("infill")
    from dlmconvert.runs.folder import write_atomically

    write_atomically(path, page(run.name, status_of(run), measured_rows(run), plots, example and infill_lines(example), recipe_text, environment))
    return path
