"""Where a run stands, as another terminal sees it: files are read, a running process is not disturbed."""

from __future__ import annotations

import socket
import time
from typing import Any

from dlmconvert.runs.folder import RunFolder

ORDER = ("pretrain", "prepare", "adapt", "sft", "export", "report")
_SECTIONS = {"adapt": "train"}  # of the recipe, where it is not called like the stage


def status_of(run: RunFolder) -> dict[str, Any]:
    """The state of a run as plain values (for --json).

    stages: {name: {status, seconds, last (line of metrics.jsonl), steps, skipped_steps, seconds_left, seconds_since_last_line, process
    (pid, host, ranks, since), checkpoints}}, of which those of a training are there once it has begun.
    """
    state = run.state()
    holder = run.holder()
    stages = {}
    for name in ORDER:
        recorded = state["stages"].get(name)
        if recorded is not None:
            stages[name] = _stage_status(run, name, recorded, holder is not None)
    return {"run": str(run.path), "holder": holder, "updated": state.get("updated"), "stages": stages}


def _stage_status(run: RunFolder, name: str, recorded: dict[str, Any], is_held: bool) -> dict[str, Any]:
    from dlmconvert.training.metrics import read_metrics

    entry: dict[str, Any] = {"status": recorded.get("status"), "seconds": round(recorded.get("seconds", 0.0), 1)}
    is_running = entry["status"] == "started" and is_held
    if entry["status"] == "started":
        entry["status"] = "running" if is_held else "interrupted"
    process = recorded.get("process")
    if process is not None:
        entry["process"] = process
        if is_running:
            entry["seconds"] = round(entry["seconds"] + time.time() - process["since"], 1)
    path = run.path / name / "metrics.jsonl"
    every = read_metrics(path)
    lines = [line for line in every if "loss" in line]
    if lines:
        entry["last"] = lines[-1]
        entry["steps"] = (recorded.get("keys") or {}).get(f"{_SECTIONS.get(name, name)}.steps")
    if every:
        entry["skipped_steps"] = max(line.get("skipped_steps", 0) for line in every)
    if lines and is_running:
        age = max(0.0, time.time() - path.stat().st_mtime)
        entry["seconds_since_last_line"] = round(age, 1)
        if "seconds_left" in lines[-1]:
            entry["seconds_left"] = round(max(0.0, lines[-1]["seconds_left"] - age), 1)
    entry["checkpoints"] = sorted(p.name for p in (run.path / name / "checkpoints").glob("step-*") if (p / "COMPLETE").is_file())
    return entry


def status_text(status: dict[str, Any]) -> str:
    """A line for the run, one for each stage, and one that says what became of an interrupted one."""
    lines = [f"{status['run']}" + (f"   (held by {status['holder']})" if status["holder"] else "")]
    if status["updated"]:
        lines[0] += f"   last change {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(status['updated']))}"
    for name, entry in status["stages"].items():
        text = f"  {name:9} {entry['status'] or '':12} {entry['seconds']:>8.0f} s"
        if "last" in entry:
            last = entry["last"]
            text += f"   step {last['step']}/{entry['steps'] or '?'}  loss {last['loss']:.3f}  {last['tokens_per_second']:,.0f} tokens/s"
            if "mfu" in last:
                text += f"  MFU {last['mfu']:.1%}"
        if "seconds_left" in entry:
            text += f"  about {_minutes(entry['seconds_left'])} left  last line {_minutes(entry['seconds_since_last_line'])} ago"
        if entry.get("skipped_steps"):
            text += f"  {entry['skipped_steps']} steps left out (not finite)"
        if entry["checkpoints"]:
            text += f"   checkpoints {', '.join(entry['checkpoints'])}"
        lines.append(text)
        if entry["status"] in ("running", "interrupted") and "process" in entry:
            lines.append(f"            {_process_text(entry)}")
    if not status["stages"]:
        lines.append("  nothing has started")
    return "\n".join(lines)


def _process_text(entry: dict[str, Any]) -> str:
    process = entry["process"]
    ranks = f"{process['ranks']} ranks" if process["ranks"] > 1 else "1 process"
    who = f"process {process['pid']} on {process['host']}, {ranks}"
    if entry["status"] == "running":
        return who
    since = f"from {entry['checkpoints'][-1]}" if entry["checkpoints"] else "from the start: there is no checkpoint yet"
    gone = "has ended" if process["host"] == socket.gethostname() else "does not hold the run as far as this machine can see"
    return f"{who}, {gone}; the same command continues {since}"


def _minutes(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def stage_process(ranks: int) -> dict[str, Any]:
    """Who trains a stage, for `RunFolder.update_stage`."""
    import os

    return {"pid": os.getpid(), "host": socket.gethostname(), "ranks": ranks, "since": time.time()}
