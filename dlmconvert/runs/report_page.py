"""The report as one self-contained HTML page: curves, numbers, recipe, environment."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

_PANELS = (
    (("loss", "nelbo"), "nats a token", "loss"),
    (("cross_entropy",), "nats a masked token", "masked cross-entropy"),
    (("masked_fraction", "open_ratio"), "share", "masked tokens and open attention pairs"),
    (("gradient_norm",), "norm", "gradient norm"),
    (("learning_rate",), "per update", "learning rate"),
    (("tokens_per_second",), "tokens / s", "speed"),
)

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ name }} - dlmconvert</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1c2330; background: #fff }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .25rem .9rem .25rem 0; text-align: left; border-bottom: 1px solid #dde2ea }
td.n { text-align: right; font-variant-numeric: tabular-nums } img { max-width: 100% } pre { background: #f4f6f9; padding: .8rem; overflow: auto }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2rem }
</style></head><body>
<h1>{{ name }}</h1>
<table><tr><th>stage</th><th>status</th><th>seconds</th><th>last step</th></tr>
{% for stage, entry in status.stages.items() %}<tr><td>{{ stage }}</td><td>{{ entry.status }}</td><td class="n">{{ "%.0f"|format(entry.seconds) }}</td>
<td class="n">{{ entry.last.step if entry.last else "" }}</td></tr>{% endfor %}</table>
{% if measured %}<h2>Likelihood of held-out text</h2>
<p>NELBO is an upper bound on the negative log-likelihood; NLL is exact. Both on the same tokens, with fixed noise.</p>
<table><tr><th></th><th>nats a token</th><th>standard error</th><th>bits a byte</th><th>tokens</th><th>draws</th></tr>
{% for row in measured %}<tr><td>{{ row.what }}</td><td class="n">{{ "&le; "|safe if row.kind == "nelbo" }}{{ "%.4f"|format(row.nats_per_token) }}</td>
<td class="n">{{ "%.4f"|format(row.standard_error) if row.standard_error is not none }}</td><td class="n">{{ "%.4f"|format(row.bits_per_byte) if row.bits_per_byte is not none }}</td>
<td class="n">{{ "{:,}".format(row.tokens) }}</td><td class="n">{{ row.draws }}</td></tr>{% endfor %}</table>{% endif %}
{% if example %}<h2>One gap, filled in</h2><pre>{{ example }}</pre>{% endif %}
{% for title, image in plots %}<h2>{{ title }}</h2><img alt="{{ title }}" src="data:image/png;base64,{{ image }}">{% endfor %}
<h2>Recipe</h2><pre>{{ recipe }}</pre>
<h2>Environment</h2><table>{% for key, value in environment.packages.items() %}<tr><td>{{ key }}</td><td>{{ value or "not installed" }}</td></tr>{% endfor %}
<tr><td>python</td><td>{{ environment.python }}</td></tr><tr><td>system</td><td>{{ environment.system }}</td></tr></table>
</body></html>
"""


def plot_curves(curves: dict[str, list[dict[str, Any]]], folder: Path) -> list[tuple[str, Path]]:
    """One PNG a training stage: [(title, path)]."""
    if not curves:
        return []
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    plots = []
    for stage, lines in curves.items():
        training = [line for line in lines if "loss" in line]
        validation = [line for line in lines if "validation_nelbo" in line or "validation_nll" in line]
        figure, axes = pyplot.subplots(2, 3, figsize=(13, 6.5), constrained_layout=True)
        for axis, (names, unit, title) in zip(axes.flat, _PANELS, strict=True):
            for name in names:
                points = [(line["step"], line[name]) for line in training if name in line]
                if points:
                    axis.plot(*zip(*points, strict=True), linewidth=1.2, marker="." if len(points) < 30 else "", label=name)
            if title == "loss" and validation:
                key = "validation_nelbo" if "validation_nelbo" in validation[0] else "validation_nll"
                axis.plot([v["step"] for v in validation], [v[key] for v in validation], "o-", markersize=4, label=key)
            axis.set(title=title, xlabel="optimizer step", ylabel=unit)
            axis.grid(alpha=0.3)
            if len(axis.lines) > 1:
                axis.legend(fontsize=8)
        path = folder / f"{stage}.png"
        figure.savefig(path, dpi=110)
        pyplot.close(figure)
        plots.append((stage, path))
    return plots


def page(name: str, status: Any, measured: Any, plots: Any, example: Any, recipe: str, environment: Any) -> str:
    import jinja2

    template = jinja2.Environment(autoescape=True).from_string(_PAGE)
    images = [(title, base64.b64encode(path.read_bytes()).decode("ascii")) for title, path in plots]
    return template.render(
        name=name, status=status, measured=measured, plots=images, example="\n".join(example) if example else None,
        recipe=recipe, environment=environment,
    )  # fmt: skip
