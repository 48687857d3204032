"""The curves of a comparison in one PNG, and its report: one self-contained HTML page."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from dlmconvert.errors import UserError
from dlmconvert.runs.folder import write_atomically

_MARK = '<meta name="generator" content="dlmconvert compare">'

_PAGE = (
    """<!doctype html>
<html lang="en"><head><meta charset="utf-8">"""
    + _MARK
    + """<title>{{ comparison.recipe }} - dlmconvert compare</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #1c2330; background: #fff }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .25rem .9rem .25rem 0; text-align: right; border-bottom: 1px solid #dde2ea }
td:first-child, th:first-child { text-align: left } img { max-width: 100% } code { background: #f4f6f9 } h1 { font-size: 1.5rem }
</style></head><body>
<h1>Variants of {{ comparison.recipe }}</h1>
<p>{{ title }}.</p>
<table><tr>{% for heading in headings %}<th>{{ heading }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>
{% for note in comparison.notes %}<p>{{ note }}</p>
{% endfor %}{% for row in comparison.variants if row.retention %}<p>{{ row.variant }}: {{ row.retention.sentence }}</p>
{% endfor %}<img alt="curves of all variants" src="data:image/png;base64,{{ image }}">
<ul>{% for row in comparison.variants %}<li>{{ row.variant }}: <code>{{ row.words|join(" ") }}</code> in {{ row.run }}</li>
{% endfor %}</ul></body></html>
"""
)


def plot_variants(comparison: dict[str, Any], path: Path) -> Path:
    """Training NELBO, masked cross-entropy and held-out likelihood of all variants; NLLs are dashed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    from dlmconvert.training.metrics import read_metrics

    figure, axes = pyplot.subplots(1, 3, figsize=(15, 4.8), constrained_layout=True)
    for row in comparison["variants"]:
        lines = read_metrics(Path(row["run"]) / "adapt" / "metrics.jsonl")
        causal = row["method"] == "ar" or (row["after"] or {}).get("kind") == "nll"
        style = {"linewidth": 1.2, "linestyle": "--" if causal else "-", "label": row["variant"] + (" (NLL)" if causal else "")}
        kind = "nll" if causal else "nelbo"
        held = [(line["step"], line[f"validation_{kind}"]) for line in lines if f"validation_{kind}" in line]
        first = row["source"] if causal else row["before"]
        ends = [[(step, found["nats_per_token"])] if found else [] for step, found in ((0, first), (row["steps"], row["after"]))]
        training = [line for line in lines if "loss" in line]
        curves = (
            [(line["step"], line["loss"] if causal else line["nelbo"]) for line in training],
            [(line["step"], line["cross_entropy"]) for line in training],
            [*ends[0], *held, *ends[1]],
        )
        colour = None
        for axis, points in zip(axes, curves, strict=True):
            (drawn,) = axis.plot(*zip(*points, strict=True) if points else ([], []), color=colour, marker="." if len(points) < 30 else "", **style)
            colour = drawn.get_color()
    titles = (("training NELBO", "nats a token"), ("training cross-entropy", "nats a predicted token"), ("held-out NELBO", "nats a token"))
    for axis, (title, unit) in zip(axes, titles, strict=True):
        axis.set(title=title, xlabel="optimizer step", ylabel=unit)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def check_report(path: Path) -> None:
    """Raise UserError when a report cannot be written there: not .html, or a file that compare has not made."""
    if path.suffix != ".html":
        raise UserError(f"--report {path}: not an .html file", "the report is one self-contained page", f"--report {path.with_suffix('.html')}")
    if path.exists() and _MARK not in path.read_text(encoding="utf-8", errors="replace")[:400]:
        raise UserError(f"{path} exists already", "nothing is overwritten but an earlier report of compare", "name another file")


def write_page(comparison: dict[str, Any], image: Path, path: Path) -> Path:
    import jinja2

    from dlmconvert.runs.compare import table_of, title_of

    template = jinja2.Environment(autoescape=True).from_string(_PAGE)
    picture = base64.b64encode(image.read_bytes()).decode("ascii")
    headings, *rows = table_of(comparison)
    title = title_of(comparison)
    write_atomically(path, template.render(comparison=comparison, title=title[0].upper() + title[1:], headings=headings, rows=rows, image=picture))
    return path
