"""What came out of a run: text for the screen, one HTML page with curves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dlmconvert.runs.folder import RunFolder
from dlmconvert.runs.status import status_of

TRAINING_STAGES = ("pretrain", "adapt", "sft")


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
