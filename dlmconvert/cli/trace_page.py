"""Following the denoising: `--trace` in the terminal, `--trace-html` as one self-contained page that plays it step by step.

The page fetches nothing from a network.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any


@dataclass
class RowTrace:
    """What happened to one row.

    cells: (text, is it given) of each position. settled: one entry a step that committed something: (step, forwards so far,
    [(position, text, confidence), ...]); the confidence of a position behind the end of the text, which stays empty, is None, and of a
    token that only moved, because the answer grew, -1. The text of a position that is masked again is None.
    """

    cells: list[tuple[str, bool]]
    settled: list[tuple[int, int, list[tuple[int, str, float | None]]]] = field(default_factory=list)


class TraceWatcher:
    """Follows the denoising for --trace (redrawn on a terminal, a line a step elsewhere) and --trace-html."""

    def __init__(self, tokenizer: Any, show: bool, keep: bool):
        self.tokenizer, self.num_steps, self.show, self.keep = tokenizer, None, show, keep
        self.rows, self.texts, self.kept, self.live, self.steps_seen, self.empty_BL, self.before = [], {}, [], None, 0, None, None

    def watching(self, batch: list[Any], num_steps: int | None):
        from dlmconvert.cli.console import console

        self.rows, self.num_steps, self.empty_BL, self.before = batch, num_steps, None, None
        if self.keep:
            for row in batch:
                self.kept.append(RowTrace([("" if t is None else self._text(t), t is not None) for t in row.tokens[row.num_start :]]))
        if self.show and console.is_terminal:
            from rich.live import Live

            self.live = Live(console=console, auto_refresh=False, vertical_overflow="visible")
            return self.live
        return nullcontext()

    def see(self, step: Any) -> None:
        self.steps_seen = max(self.steps_seen, step.index + 1)
        self.empty_BL = step.given_back_BL if self.empty_BL is None else self.empty_BL | step.given_back_BL
        if self.keep:
            self._remember(step)
        if self.show and (self.live is not None or bool(step.committed_BL.any())):
            self._draw(step)

    def _remember(self, step: Any) -> None:
        traces = self.kept[-len(self.rows) :]
        tokens, masked, committed, given_back, confidence = (
            t.tolist() for t in (step.tokens_BL, step.masked_BL, step.committed_BL, step.given_back_BL, step.confidence_BL)
        )
        for number, (row, trace) in enumerate(zip(self.rows, traces, strict=True)):
            events = []
            for place, given in enumerate(row.tokens):
                if given is not None:
                    continue
                token, was = tokens[number][place], None if self.before is None else self.before[number][place]
                if given_back[number][place]:
                    events.append((place - row.num_start, "", None))
                elif committed[number][place]:
                    events.append((place - row.num_start, self._text(token), round(confidence[number][place], 4)))
                elif masked[number][place] and was is not None:  # a revision doubts it
                    events.append((place - row.num_start, None, None))
                elif not masked[number][place] and was not in (token, ""):  # the answer grew before it
                    events.append((place - row.num_start, self._text(token), -1))
            if events:
                trace.settled.append((step.index, step.nfe, events))
        empty = self.empty_BL.tolist()
        # None where a mask stands, "" behind the end of the text.
        self.before = [
            [None if is_masked else "" if is_empty else token for token, is_masked, is_empty in zip(*rows, strict=True)]
            for rows in zip(tokens, masked, empty, strict=True)
        ]

    def _draw(self, step: Any) -> None:
        from rich.text import Text

        from dlmconvert.cli.console import console

        of = "" if self.num_steps is None else f"/{self.num_steps}"
        head = f"step {step.index + 1}{of}, {step.nfe} forwards, {int(step.masked_BL.sum())} masked"
        canvases = []
        state = (step.tokens_BL.tolist(), step.masked_BL.tolist(), step.committed_BL.tolist(), self.empty_BL.tolist())
        for row, tokens_L, masked_L, committed_L, empty_L in zip(self.rows, *state, strict=True):
            canvas = Text()
            for place in range(row.num_start, len(row.tokens)):
                if masked_L[place]:
                    canvas.append("_", style="dim")
                elif not empty_L[place]:
                    style = "bold reverse green" if committed_L[place] else "green" if row.tokens[place] is None else ""
                    canvas.append(self._text(tokens_L[place]), style=style)
            canvases.append(canvas)
        if self.live is None:
            shown = " | ".join(canvas.plain.replace("\n", "\\n") for canvas in canvases)
            console.print(f"{head}: {shown}", markup=False, highlight=False, soft_wrap=True)
        else:
            self.live.update(Text("\n").join([*canvases, Text(head, style="dim")]), refresh=True)

    def _text(self, token: int) -> str:
        from dlmconvert.sampling.text import token_text

        if token not in self.texts:
            self.texts[token] = token_text(self.tokenizer, token)
        return self.texts[token]


def render_trace_page(model: str, settings: dict[str, Any], num_steps: int, rows: list[RowTrace]) -> str:
    """The page as text. settings: shown as they are, name beside value."""
    from jinja2 import Environment

    data = {"numSteps": num_steps, "rows": [{"cells": row.cells, "settled": row.settled} for row in rows]}
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(_PAGE)
    return template.render(model=model, settings=settings, data=data)


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>denoising: {{ model }}</title>
<style>
:root { color-scheme: light dark; --ground: #fff; --ink: #1c1e21; --faint: #767b84; --line: #d8dbe0; }
@media (prefers-color-scheme: dark) { :root { --ground: #16181c; --ink: #e6e8eb; --faint: #8b919b; --line: #33373e; } }
body { background: var(--ground); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 62rem;
  padding: 0 1rem; }
h1 { font-size: 1.2rem; overflow-wrap: anywhere; }
dl { display: flex; flex-wrap: wrap; gap: .2rem 1.4rem; color: var(--faint); margin: 0 0 1rem; }
dl div { display: flex; gap: .4rem; } dd { margin: 0; color: var(--ink); }
#controls { position: sticky; top: 0; background: var(--ground); display: flex; flex-wrap: wrap; gap: .7rem; align-items: center;
  padding: .6rem 0; border-bottom: 1px solid var(--line); }
#controls input[type=range] { flex: 1 1 14rem; }
#where { font-variant-numeric: tabular-nums; min-width: 22rem; }
.row { white-space: pre-wrap; overflow-wrap: anywhere; font: 15px/1.75 ui-monospace, monospace; border: 1px solid var(--line);
  border-radius: 6px; padding: .8rem 1rem; margin: 1rem 0; }
.given { color: var(--faint); }
.masked { display: inline-block; width: 1.1em; height: .85em; margin: 0 1px; vertical-align: baseline; border-radius: 2px;
  background: var(--line); }
.settled { border-radius: 3px; }
.fresh { outline: 2px solid currentColor; }
#legend { color: var(--faint); font-size: .85rem; }
#legend i { display: inline-block; width: 5rem; height: .7em; border-radius: 2px;
  background: linear-gradient(90deg, hsl(0 75% 50% / .45), hsl(60 75% 50% / .45), hsl(120 75% 50% / .45)); }
</style>
</head>
<body>
<h1>{{ model }}</h1>
<dl>
{% for name, value in settings.items() %}
<div><dt>{{ name }}</dt><dd>{{ value }}</dd></div>
{% endfor %}
</dl>
<div id="controls">
<button id="play" type="button">play</button>
<button id="back" type="button" aria-label="one step back">&lt;</button>
<button id="next" type="button" aria-label="one step forward">&gt;</button>
<input id="slider" type="range" min="0" max="{{ data.numSteps }}" value="0" aria-label="step">
<label>speed <select id="speed"><option value="700">slow</option><option value="250" selected>normal</option>
<option value="70">fast</option></select></label>
<span id="where"></span>
</div>
<main id="rows"></main>
<p id="legend">confidence p(token) when it settled: 0 <i></i> 1. Grey text was given; blocks are still masked; outlined tokens settled
in this step. Point at a token for its numbers.</p>
<script id="trace" type="application/json">{{ data|tojson }}</script>
<script>
"use strict";
const trace = JSON.parse(document.getElementById("trace").textContent);
const main = document.getElementById("rows");
const rows = trace.rows.map(row => {
  const box = document.createElement("div");
  box.className = "row";
  const cells = row.cells.map(([text, given]) => {
    const cell = document.createElement("span");
    if (given) { cell.className = "given"; cell.textContent = text; }
    box.append(cell);
    return cell;
  });
  main.append(box);
  return { given: row.cells.map(cell => cell[1]), cells, settled: row.settled };
});
const slider = document.getElementById("slider");
const where = document.getElementById("where");
const play = document.getElementById("play");
let timer = null;

// The state after `shown` steps is rebuilt from the start: what settles later overrides what settled before.
function draw(shown) {
  let forwards = 0, settled = 0, all = 0;
  for (const row of rows) {
    const state = new Map();
    for (const [step, nfe, events] of row.settled) {
      if (step >= shown) break;
      forwards = Math.max(forwards, nfe);
      for (const [position, text, confidence] of events) {
        if (text === null) state.delete(position); else state.set(position, [text, confidence, step]);
      }
    }
    row.cells.forEach((cell, position) => {
      if (row.given[position]) return;
      all += 1;
      const known = state.get(position);
      if (!known) {
        cell.className = "masked"; cell.textContent = ""; cell.style.background = ""; cell.title = "position " + position + ": masked";
        return;
      }
      settled += 1;
      const [text, confidence, step] = known;
      if (confidence === null) {
        cell.className = "empty"; cell.textContent = ""; cell.style.background = ""; cell.title = "position " + position + ": after the end";
        return;
      }
      cell.className = step === shown - 1 ? "settled fresh" : "settled";
      cell.textContent = text;
      const moved = confidence < 0;
      cell.style.background = moved ? "" : "hsl(" + Math.round(120 * confidence) + " 75% 50% / .3)";
      cell.title = "position " + position + ", step " + (step + 1) + (moved ? ", moved" : ", confidence " + confidence.toFixed(3));
    });
  }
  where.textContent = "step " + shown + "/" + trace.numSteps + ", forwards " + forwards + ", settled " + settled + "/" + all;
}
function go(shown) {
  slider.value = Math.max(0, Math.min(trace.numSteps, shown));
  draw(Number(slider.value));
}
function stop() { clearTimeout(timer); timer = null; play.textContent = "play"; }
function tick() {
  if (Number(slider.value) >= trace.numSteps) { stop(); return; }
  go(Number(slider.value) + 1);
  timer = setTimeout(tick, Number(document.getElementById("speed").value));
}
play.onclick = () => {
  if (timer !== null) { stop(); return; }
  if (Number(slider.value) >= trace.numSteps) go(0);
  play.textContent = "pause";
  tick();
};
document.getElementById("back").onclick = () => { stop(); go(Number(slider.value) - 1); };
document.getElementById("next").onclick = () => { stop(); go(Number(slider.value) + 1); };
slider.oninput = () => { stop(); draw(Number(slider.value)); };
draw(0);
</script>
</body>
</html>
"""
