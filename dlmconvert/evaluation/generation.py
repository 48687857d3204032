"""What a person looks at: one gap filled by the converted model, beside its AR parent that sees the prefix only."""

from __future__ import annotations

import ast
from typing import Any

import torch

from dlmconvert.sampling.api import infill
from dlmconvert.sampling.text import encode_row, end_ids, parse_gaps


def fill_gap(denoiser: Any, text: str, seed: int = 0) -> str:
    """The text of the gaps (joined with newlines when there are several), one token a forward, most confident first, temperature 0."""
    parts = parse_gaps(text)
    tokens, _ = encode_row(denoiser.tokenizer, parts)
    rows = infill(denoiser, [tokens], alg="confidence", temperature=0.0, seed=seed, eos_token_id=end_ids(denoiser.tokenizer))
    gaps, gap = [], []
    for before, after in zip(tokens, rows[0], strict=True):
        if before is None:
            gap.append(after)
        elif gap:
            gaps.append(gap)
            gap = []
    gaps += [gap] if gap else []
    return "\n".join(denoiser.tokenizer.decode(g) for g in gaps)


@torch.no_grad()
def continue_prefix(denoiser: Any, text: str) -> str:
    """What the AR model writes in the place of the first gap, from the prefix alone: greedy, as many tokens as the gap has."""
    parts = parse_gaps(text)
    first = next(i for i, part in enumerate(parts) if isinstance(part, int))
    tokens, _ = encode_row(denoiser.tokenizer, parts[: first + 1])
    num_new = parts[first]
    row = [token for token in tokens if token is not None]
    for _ in range(num_new):
        row_BL = torch.tensor([[*row, 0]], device=denoiser.device)
        wanted_BL = torch.zeros_like(row_BL, dtype=torch.bool)
        wanted_BL[0, -1] = True
        logits_V = denoiser.predict(row_BL, wanted_BL)[0]
        logits_V[denoiser.vocab_size :] = -torch.inf
        if 0 <= denoiser.mask_token_id < denoiser.vocab_size:
            logits_V[denoiser.mask_token_id] = -torch.inf
        row.append(int(logits_V.argmax()))
    return denoiser.tokenizer.decode(row[-num_new:])


def held_out_function(tokenizer: Any, fraction: float, max_tokens: int) -> str | None:
    """A function of the standard library that was held out, with the middle of its body cut out as a gap.

    The first, in the order of a hash, that has two to six lines to hide (at most 32 tokens) and fits into `max_tokens`: chosen before
    any model has seen it. None when nothing was held out.
    """
    from dlmconvert.data.sources import content_hash, standard_library_files
    from dlmconvert.data.splits import held_out

    found = []
    for path in standard_library_files():
        try:
            text = path.read_text(encoding="utf-8")
            if held_out(content_hash(text), fraction):
                found += [(content_hash("".join(parts)), parts) for parts in _functions(text)]
        except (SyntaxError, UnicodeDecodeError):
            continue
    for _, (before, hidden, after) in sorted(found):
        gap = len(tokenizer(hidden, add_special_tokens=False)["input_ids"])
        prompt = f"{before}[[MASK:{gap}]]{after}"
        if 6 <= gap <= 32 and len(encode_row(tokenizer, parse_gaps(prompt))[0]) <= max_tokens:
            return prompt
    return None


def _functions(text: str) -> list[tuple[str, str, str]]:
    """(signature and docstring, hidden statements, last line) of each top-level function that ends in a one-line return."""
    lines = text.split("\n")
    parts = []
    for node in ast.parse(text).body:
        if not isinstance(node, ast.FunctionDef) or not isinstance(node.body[-1], ast.Return) or "[[MASK" in text:
            continue
        statements = node.body[1:] if ast.get_docstring(node) else node.body
        first, last = statements[0].lineno - 1, node.body[-1].lineno - 1
        if node.body[-1].end_lineno == last + 1 and 2 <= last - first <= 6:
            parts.append(("\n".join(lines[node.lineno - 1 : first]) + "\n", "\n".join(lines[first:last]) + "\n", lines[last] + "\n"))
    return parts
