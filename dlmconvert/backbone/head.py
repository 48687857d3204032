"""The output matrix scored inside the model's own forward: the loss of chosen tokens, with few logits alive at a time.

The unmodified model calls its head as ever; for the length of the call this one instance answers with the loss in place of logits. So
whatever surrounds the call stays in force, among it the gathering of a matrix that ZeRO-3 has dealt to many ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from dlmconvert.diffusion.fused_head import Score, linear_cross_entropy, linear_scored
from dlmconvert.errors import EXIT_FAILED, UserError


def compile_trunk(model: Any, dynamic: bool | None = None) -> None:
    """torch.compile of everything before the head. The head stays as it is: it answers with the loss in chunks (`scoring`), and how many
    hidden states it is asked for, another number at every step, is nothing that the compiled graph would see. The mask is of one shape
    or not there at all, so a training step is compiled once or twice.

    dynamic: graphs for any number of rows, columns and keys, as decoding needs them."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.base_model.compile(dynamic=dynamic)


def compile_for_decoding(*models: Any) -> None:
    """`compile_trunk` for windows of any size (`--compile`). Raises UserError without a compiler."""
    check_compiler("--compile")
    # One row or several, of equal lengths or not, all rows of the store or some, with a cache or without: more kinds than the eight after
    # which torch would run the rest uncompiled. (A number of rows that happens to be the number of heads is a kind of its own.)
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
    for model in models:
        compile_trunk(model, dynamic=True)


def check_compiler(asked: str) -> None:
    """Raises UserError where torch.compile, which `asked` asks for, would find no compiler at the first step."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise UserError(f"{asked} needs a C++ compiler", str(error), "install g++ (or set CXX), or leave it out", exit_code=EXIT_FAILED) from error


@torch.no_grad()
def plain_head(model: Any) -> nn.Linear | None:
    """The head when the model's logits are W h + b and nothing else, tried on two tokens; None where they are capped or scaled
    afterwards (Gemma-2, Cohere, Granite) or the head is wrapped (adapters)."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = base.get_output_embeddings()
    if type(head) is not nn.Linear:
        return None
    answers: list[torch.Tensor] = []
    handle = head.register_forward_hook(lambda module, inputs, output: answers.append(output))
    device = next(model.parameters()).device
    try:
        tokens_BL = torch.zeros((1, 2), dtype=torch.int64, device=device)
        # The dropout of adapters draws here as well: draws that no step must miss.
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.compiler.set_stance("force_eager"):
            logits = model(input_ids=tokens_BL, position_ids=torch.arange(2, device=device)[None], use_cache=False).logits
    finally:
        handle.remove()
    is_plain = len(answers) == 1 and answers[0].shape == logits.shape and torch.equal(answers[0].float(), logits.float())
    return head if is_plain else None


@contextmanager
def scoring(head: nn.Linear, x_0_N: torch.Tensor, weights_N: torch.Tensor, score: Score | None = None) -> Iterator[list[torch.Tensor]]:
    """Inside, `head` answers hidden states of N tokens with sum_i w_i CE_i as a tensor (1, 1, 1); the list receives CE_N.

    score: another loss, see `diffusion.fused_head.linear_scored`; the list then receives its values_KN.
    """
    found: list[torch.Tensor] = []

    def answer(hidden: torch.Tensor) -> torch.Tensor:
        hidden_ND = hidden.reshape(-1, hidden.shape[-1])
        if score is None:
            loss, values = linear_cross_entropy(hidden_ND, head.weight, head.bias, x_0_N, weights_N)
        else:
            loss, values = linear_scored(hidden_ND, head.weight, head.bias, score)
        found.append(values)
        return loss.reshape(1, 1, 1)

    head.forward = answer
    try:
        yield found
    finally:
        del head.forward


@contextmanager
def passing(head: nn.Linear) -> Iterator[None]:
    """Inside, `head` answers hidden states with themselves."""
    head.forward = lambda hidden: hidden
    try:
        yield
    finally:
        del head.forward
