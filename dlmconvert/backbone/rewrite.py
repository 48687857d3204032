"""What an AR config must become before it can denoise, and the probe that shows that it did.

Nothing is patched and nothing is copied: windows, dropout and caches are config values, and masks are arguments of the
unmodified model.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch

from dlmconvert.diffusion.attention import AttentionContext, allowed_matrix, realise
from dlmconvert.errors import UserError

PROBE_LENGTH = 12
_NOISE_WORDS = ("dropout", "pdrop", "drop_rate", "layerdrop", "jitter_noise")  # all of it makes a batch depend on its split
_RECURRENT_FAMILIES = ("rwkv", "xlstm")  # recurrent, and their configs do not say so


def rewrite_config(config: Any) -> list[str]:
    """Widen local attention to the whole row, switch off caches and dropout, in place. Returns what was changed.

    Windows are widened by their size, never by relabelling layers: in Gemma-3 the label of a layer also chooses its rotary base.
    """
    notes = []
    text_config = config.get_text_config()
    longest = getattr(text_config, "max_position_embeddings", None)
    for name in ("sliding_window", "attention_window_size", "local_attention_window"):
        window = getattr(text_config, name, None)
        if isinstance(window, int) and (longest is None or window < longest):
            setattr(text_config, name, longest if longest is not None else 1 << 30)
            notes.append(f"{name} {window} -> {getattr(text_config, name)}")
    for name, value in list(vars(text_config).items()):
        if isinstance(value, float) and value > 0 and any(word in name for word in _NOISE_WORDS):
            setattr(text_config, name, 0.0)
            notes.append(f"{name} {value:g} -> 0")
    if getattr(text_config, "output_router_logits", False):
        # The model would compute its balance loss from a 2-D mask, which it is not given; training computes it outside (extras.py).
        text_config.output_router_logits = False
        notes.append("output_router_logits True -> False (training keeps the balance loss)")
    if getattr(text_config, "use_cache", False):
        text_config.use_cache = False
    return notes


def call_model(model: torch.nn.Module, tokens_BL: torch.Tensor, positions_BL: torch.Tensor, context: AttentionContext, **kwargs: Any):
    """One forward of an unmodified AutoModelForCausalLM under an attention pattern.

    Some families read the direction from the config and ignore the argument (Falcon, BLOOM, GPT-J), others the reverse: both are
    set, and the config keeps what it was after the call.
    """
    config = model.config
    realised = realise(
        context, tokens_BL.shape[1], getattr(config, "_attn_implementation", None) or "eager", _mask_dtype(model), tokens_BL.device
    )
    missing = object()
    before = getattr(config, "is_causal", missing)
    config.is_causal = realised.is_causal
    try:
        return model(
            input_ids=tokens_BL,
            position_ids=positions_BL,
            attention_mask=realised.mask,
            is_causal=realised.is_causal,
            use_cache=False,
            **kwargs,
        )
    finally:
        if before is missing:
            del config.is_causal
        else:
            config.is_causal = before


def _mask_dtype(model: torch.nn.Module) -> torch.dtype:
    return getattr(model, "dtype", torch.float32)


def refuse_unsupported(config: Any, where: str) -> None:
    """Families that no attention mask can turn around, by what their config says."""
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"{where}: {kind} is an encoder-decoder", "only decoder-only models can become denoisers", _FAMILIES)
    text_config = config.get_text_config()
    layer_types = set(getattr(text_config, "layer_types", None) or [])
    recurrent = sorted(t for t in layer_types if "attention" not in t or t == "linear_attention")
    if kind in _RECURRENT_FAMILIES:
        recurrent = [kind]
    if recurrent:
        raise UserError(f"{where}: {kind} has {recurrent[0]} layers", "a recurrent layer reads from left to right only; no mask can change that", _FAMILIES)


_FAMILIES = "convert a decoder-only attention model instead: GPT-2, Llama, Qwen2/3, Mistral, Phi-3, OLMo-2, GPT-NeoX, OPT, Gemma-2/3, Mixtral, ..."


def shrunk_config(config: Any) -> Any:
    """A copy with few layers, few words and a window shorter than the probe's row: the same family, probed in milliseconds."""
    small = copy.deepcopy(config)
    text_config = small.get_text_config()
    layer_types = getattr(text_config, "layer_types", None)
    if layer_types:
        layer_types = list(dict.fromkeys(layer_types))
        text_config.layer_types = layer_types
    text_config.num_hidden_layers = len(layer_types) if layer_types else 1
    text_config.vocab_size = 64
    if getattr(text_config, "sliding_window", None):
        text_config.sliding_window = 4
    for name in ("intermediate_size", "moe_intermediate_size", "ffn_dim"):
        if isinstance(getattr(text_config, name, None), int):
            setattr(text_config, name, 64)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(text_config, name, None)
    return small


def probe_family(config: Any, where: str, trust_remote_code: bool = False) -> None:
    """Change one token, see which predictions move, compare with the pattern; raise UserError when they differ.

    Runs on a shrunk copy with random weights, so that every influence is visible in float32. The expected influence over n
    layers is the n-th boolean power of the pattern.
    """
    from transformers import AutoModelForCausalLM

    refuse_unsupported(config, where)
    small = shrunk_config(config)
    rewrite_config(small)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            model = AutoModelForCausalLM.from_config(small, trust_remote_code=trust_remote_code).float().eval()
        except Exception as error:
            raise UserError(f"{where}: no probe could be built for {config.model_type}", str(error).splitlines()[0], _FAMILIES) from error
    segments_BL = (torch.arange(PROBE_LENGTH) >= PROBE_LENGTH // 2).long()[None]
    contexts = {
        "causal": AttentionContext(open_ratio=0.0),
        "annealed": AttentionContext(open_ratio=0.4, seed=1),
        "bidirectional": AttentionContext(open_ratio=1.0),
        "bidirectional with isolated documents": AttentionContext(open_ratio=1.0, segments_BL=segments_BL),
    }
    for name, context in contexts.items():
        expected = _closure(allowed_matrix(PROBE_LENGTH, context)[0, 0], small.get_text_config().num_hidden_layers)
        try:
            measured = influence(model, context)
        except (TypeError, ValueError, RuntimeError, AttributeError, NotImplementedError, IndexError) as error:
            raise UserError(f"{where}: {config.model_type} does not accept a {name} attention mask", str(error).splitlines()[0], _FAMILIES) from error
        if not torch.equal(measured, expected):
            wrong = (measured != expected).nonzero()[0].tolist()
            moved = "moved" if bool(measured[wrong[0], wrong[1]]) else "did not move"
            raise UserError(
                f"{where}: {config.model_type} fails the {name} probe",
                f"after a change of token {wrong[1]} the prediction at {wrong[0]} {moved}; the pattern says otherwise "
                "(a recurrent layer, or attention that ignores the mask it is given)",
                _FAMILIES,
            )


@torch.no_grad()
def influence(model: torch.nn.Module, context: AttentionContext) -> torch.Tensor:
    """bool (L, L): does the prediction at position i move when token j changes? L = PROBE_LENGTH."""
    length = PROBE_LENGTH
    tokens_L = torch.arange(length) + 3
    tokens_BL = tokens_L.repeat(length + 1, 1)
    tokens_BL[torch.arange(length), torch.arange(length)] += 30
    positions_BL = torch.arange(length).expand(length + 1, length)
    if context.segments_BL is not None:
        context = replace(context, segments_BL=context.segments_BL.expand(length + 1, length))
    logits_BLV = call_model(model, tokens_BL, positions_BL, context).logits.float()
    change_ji = (logits_BLV[:length] - logits_BLV[length]).abs().amax(-1)
    return (change_ji > 1e-6 * logits_BLV.abs().max()).T


def _closure(pattern_LL: torch.Tensor, layers: int) -> torch.Tensor:
    step = pattern_LL.float()
    reach = step
    for _ in range(layers - 1):
        reach = ((reach @ step) > 0).float()
    return reach > 0
