"""The shape of a source model from its config alone. Nothing but config.json is read, and every parameter is on the meta device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dlmconvert.backbone.hub import hub_reachable
from dlmconvert.errors import UserError

# config.json of the sources of the shipped recipes, as far as shapes go: they can be planned without a network, and Llama-2 without
# the permission that its repository asks for.
_GPT2 = {"model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024}
_LLAMA2_7B = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096, "tie_word_embeddings": False,
}  # fmt: skip
_QWEN3 = {"model_type": "qwen3", "vocab_size": 151936, "head_dim": 128, "num_key_value_heads": 8, "max_position_embeddings": 40960}
KNOWN_SHAPES = {
    "gpt2": _GPT2 | {"n_embd": 768, "n_layer": 12, "n_head": 12},
    "gpt2-medium": _GPT2 | {"n_embd": 1024, "n_layer": 24, "n_head": 16},
    "meta-llama/Llama-2-7b-hf": _LLAMA2_7B,
    "meta-llama/Meta-Llama-3-8B": _LLAMA2_7B | {"vocab_size": 128256, "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 8192},
    "Qwen/Qwen2.5-7B": {
        "model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 131072, "tie_word_embeddings": False,
    },
    "Qwen/Qwen3-0.6B": _QWEN3 | {
        "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16, "tie_word_embeddings": True,
    },
    "Qwen/Qwen3-8B": _QWEN3 | {
        "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32, "tie_word_embeddings": False,
    },
    "Qwen/Qwen3-30B-A3B": _QWEN3 | {
        "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 48,
        "num_attention_heads": 32, "num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8, "tie_word_embeddings": False,
    },
}  # fmt: skip
_SAME = {
    "openai-community/gpt2": "gpt2", "openai-community/gpt2-medium": "gpt2-medium",
    # The base models: the same but for the longest row.
    "Qwen/Qwen3-0.6B-Base": "Qwen/Qwen3-0.6B", "Qwen/Qwen3-8B-Base": "Qwen/Qwen3-8B", "Qwen/Qwen3-30B-A3B-Base": "Qwen/Qwen3-30B-A3B",
}  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """Numbers that memory and time depend on. Widths are features a token; parameters are counted once when tied. num_base_parameters:
    without adapters.

    feed_forward: active width (of all experts that a token goes through). experts_per_token: 0 for a dense model. attention_readers, feed_forward_readers: linear layers
    that read one norm's output (3 for separate q, k, v; 1 when fused). wide_norms: norms over the hidden state in a layer.
    active_matrix_parameters: of the linear layers that a token goes through, head and embedding left out.
    flops_per_token, flops_per_position, flops_per_target: forward and backward (training/throughput.py), of a token in the linear layers, of
    a token and each position that it attends to, and of a token that goes through the output matrix.
    """

    family: str
    num_base_parameters: int
    num_parameters: int
    num_trainable: int
    num_layers: int
    hidden: int
    query: int
    key_value: int
    num_heads: int
    feed_forward: int
    experts_per_token: int
    is_gated: bool
    activation: str
    vocab_size: int
    max_positions: int | None
    is_tied: bool
    wide_norms: int
    is_rms_norm: bool
    has_qk_norm: bool
    has_rotary: bool
    attention_readers: int
    feed_forward_readers: int
    num_linears: int
    matrix_parameters: int
    active_matrix_parameters: int
    norms_trained: bool
    head_trained: bool
    has_plain_head: bool
    embedding_trained: bool
    largest_parameter: int
    lora_rank: int
    attention_implementation: str
    flops_per_token: float
    flops_per_position: float
    flops_per_target: float


def find_config(source: Any, hub_timeout: float = 3.0) -> tuple[Any, str]:
    """The transformers config of `source` (a recipe's section) and a sentence that says where it came from.

    Looks in order at: the folder, the local Hub cache, the Hub (config.json only), `source.scratch` where the recipe allows it, the
    built-in table.
    Raises UserError when none of them has it.
    """
    from dlmconvert.backbone.load import load_config, scratch_config

    name = source.model
    if name is None:
        return scratch_config(source.scratch), "source.scratch (random weights)"
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        return load_config(folder, source.trust_remote_code), f"{folder}/config.json"
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    why = ""
    if _looks_like_hub_id(name):
        cached = try_to_load_from_cache(name, "config.json", revision=source.revision)
        if isinstance(cached, str):
            return load_config(Path(cached).parent, source.trust_remote_code), "the local Hub cache"
        if hub_reachable(hub_timeout):
            try:
                file = hf_hub_download(name, "config.json", revision=source.revision)
                if source.trust_remote_code:  # the code lies beside the config in the repository
                    return load_config(name, True), "the Hub"  # type: ignore[arg-type]
                return load_config(Path(file).parent), "the Hub"
            except UserError:
                raise
            except Exception as error:  # missing, private, gated, no disk: the table may still know it
                why = str(error).strip().splitlines()[0][:200]
        else:
            why = "the Hub cannot be reached"
    if source.if_missing == "scratch":  # what `prepare` would do
        return scratch_config(source.scratch), f"source.scratch ({name} is not there: {why or 'no such folder'})"
    known = KNOWN_SHAPES.get(_SAME.get(name, name))
    if known is not None:
        return scratch_config(known), f"the built-in table of shapes ({name} is not cached, and {why})"
    raise UserError(
        f"no config of {name!r}: neither a folder here nor in the local cache",
        why or "no such folder",
        f"built in are {', '.join(KNOWN_SHAPES)}; otherwise give a folder with its config.json: source.model=FOLDER",
    )


def _looks_like_hub_id(name: str) -> bool:
    return not name.startswith((".", "/", "~")) and name.count("/") <= 1


def describe(
    config: Any, *, lora: Any = None, rates: dict[str, float] | None = None, extra_rows: int = 0, mask_token_id: int | None = None, trust_remote_code: bool = False
) -> Architecture:  # fmt: skip
    """Build the model on the meta device, as a run would train it, and read its shapes.

    lora: the recipe's `lora` section, attached by peft itself so that the count is exact. rates: the recipe's `rates`; kinds of
    parameters at 0 are frozen. extra_rows: embedding rows that the mask token adds. mask_token_id: a row trained beside the adapters.
    Raises UserError for a family that has no causal language model, and for rates that cannot be had.
    """
    import copy

    import torch
    from transformers import AutoModelForCausalLM

    from dlmconvert.training.optimizer import freeze

    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.vocab_size += extra_rows
    with torch.device("meta"):
        try:
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{config.model_type}: no causal language model can be built", str(error).splitlines()[0][:300], "") from error
        plain = _read_shapes(model, text)
        trained: Any = model
        if lora is not None:
            from dlmconvert.backbone.adapters import attach_lora

            trained = attach_lora(
                model, rank=lora.rank, alpha=lora.alpha, dropout=0.0, target_modules=lora.target_modules, mask_token_id=mask_token_id, seed=0
            )
        freeze(trained, rates or {})
    return _with_trained(plain, trained, lora.rank if lora is not None else 0)


def _with_trained(plain: Architecture, model: Any, lora_rank: int) -> Architecture:
    """The shapes of a model with what is trained of it: everything, some kinds of parameters, or adapters."""
    from dlmconvert.training.optimizer import parameter_kinds
    from dlmconvert.training.throughput import model_flops

    kinds = parameter_kinds(model)
    # A trained row of a mask token lies beside the embedding, which itself stays frozen.
    found = {kinds[name] for name, p in model.named_parameters() if p.requires_grad and "trainable_tokens" not in name}
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    without, with_one = model_flops(model, 0), model_flops(model, 1)
    return replace(
        plain,
        num_parameters=sum(p.numel() for p in model.parameters()),
        num_trainable=trained,
        norms_trained="norm" in found,
        head_trained="head" in found or (plain.is_tied and "embeddings" in found),
        embedding_trained="embeddings" in found,
        lora_rank=lora_rank,
        flops_per_token=without.per_token,
        flops_per_position=with_one.per_token - without.per_token,
        flops_per_target=without.per_target,
    )


def _read_shapes(model: Any, text: Any) -> Architecture:
    hidden, heads = text.hidden_size, text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or hidden // heads
    key_value = (getattr(text, "num_key_value_heads", None) or heads) * head_dim
    parameters = list(model.parameters())
    layers = _layers(model, text.num_hidden_layers)
    # The last layer: families whose first layers are dense put their experts behind them.
    modules = dict(layers[-1].named_modules())
    linears = {name: m for name, m in modules.items() if getattr(m, "weight", None) is not None and m.weight.ndim == 2 and not name.endswith(("gate", "router"))}
    norms = [m for name, m in modules.items() if type(m).__name__.endswith("Norm") and getattr(m, "weight", None) is not None]
    leaf_names = {name.rsplit(".", 1)[-1] for name in linears}
    all_names = " ".join(name for name, _ in layers[-1].named_parameters())
    experts, width = _experts(text)
    is_gated = any(word in all_names for word in ("gate_proj", "gate_up_proj", "w3."))
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    head_size = head.weight.numel() if head is not None else 0
    is_tied = head is not None and head.weight is embedding
    total = sum(p.numel() for p in parameters)
    matrices = sum(p.numel() for layer in layers for p in layer.parameters() if p.ndim >= 2)
    active = matrices
    num_experts = _num_experts(text)
    if num_experts > 1:
        in_experts = sum(p.numel() for layer in layers for name, p in layer.named_parameters() if ".experts." in name and p.ndim >= 2)
        active = matrices - in_experts + in_experts * experts // num_experts
    return Architecture(
        family=model.config.model_type,
        num_base_parameters=total,
        num_parameters=total,
        num_trainable=total,
        num_layers=len(layers),
        hidden=hidden,
        query=heads * head_dim,
        key_value=key_value,
        num_heads=heads,
        feed_forward=width * experts,
        experts_per_token=experts if _num_experts(text) > 1 else 0,
        is_gated=is_gated,
        activation=str(next((a for name in ("hidden_act", "activation_function", "hidden_activation") if (a := getattr(text, name, None))), "gelu")),
        vocab_size=embedding.shape[0],
        max_positions=getattr(text, "max_position_embeddings", None),
        is_tied=is_tied,
        wide_norms=sum(m.weight.numel() == hidden for m in norms if not _is_head_norm(m, modules)),
        is_rms_norm=not any(type(m).__name__ == "LayerNorm" for m in norms),
        has_qk_norm=any(_is_head_norm(m, modules) for m in norms),
        has_rotary=any("rotary" in type(m).__name__.lower() for m in model.modules()),
        attention_readers=3 if "k_proj" in leaf_names or "key" in leaf_names else 1,
        feed_forward_readers=2 if {"gate_proj", "up_proj"} <= leaf_names else 1,
        num_linears=len(linears),
        matrix_parameters=matrices + head_size,
        active_matrix_parameters=active,
        norms_trained=True,
        head_trained=True,
        has_plain_head=_has_plain_head(head, text),
        embedding_trained=True,
        largest_parameter=max(p.numel() for p in parameters),
        lora_rank=0,
        attention_implementation=getattr(model.config, "_attn_implementation", None) or "eager",
        flops_per_token=0.0,
        flops_per_position=0.0,
        flops_per_target=0.0,
    )


def _has_plain_head(head: Any, text: Any) -> bool:
    """What backbone/head.py finds out with a forward pass, which the meta device has none of: logits are W h + b and nothing else."""
    from torch import nn

    scaled = any(getattr(text, name, None) not in (None, 1, 1.0) for name in ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier"))
    return type(head) is nn.Linear and not scaled


def _layers(model: Any, num_layers: int) -> list[Any]:
    from torch import nn

    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return list(module)
    raise UserError(f"{model.config.model_type}: no stack of {num_layers} layers was found", "plan cannot read the shapes of this family", "")


def _is_head_norm(norm: Any, modules: dict[str, Any]) -> bool:
    return any(m is norm and name.rsplit(".", 1)[-1] in ("q_norm", "k_norm", "q_layernorm", "k_layernorm") for name, m in modules.items())


def _num_experts(text: Any) -> int:
    return next((n for name in ("num_local_experts", "num_experts", "n_routed_experts") if (n := getattr(text, name, None))), 1)


def _experts(text: Any) -> tuple[int, int]:
    """Experts that a token goes through, and the width of one."""
    width = next((w for name in ("intermediate_size", "n_inner", "ffn_dim") if (w := getattr(text, name, None))), 4 * text.hidden_size)
    if _num_experts(text) == 1:
        return 1, width
    return getattr(text, "num_experts_per_tok", None) or 2, getattr(text, "moe_intermediate_size", None) or width
