"""Load an export as a stranger would, and write down what it answers. Run as a script, in a process of its own:

    python -P fresh_process.py EXPORT QUESTIONS ANSWERS

dlmconvert cannot be imported here, and the network is off (verify.py sets the environment). It judges nothing: verify.py compares.
"""

import json
import sys


class _Absent:
    """Makes `import dlmconvert` fail as if it were not installed."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "dlmconvert":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None


def predictions(model, state, is_block):
    """The prediction of each wanted token; of a block model, the hidden states of clean text that are wanted."""
    if not is_block:
        return model.predict(state["tokens_BL"], state["wanted_BL"], state["positions_BL"], state["segments_BL"])
    padding = None if state["segments_BL"] is None else (state["segments_BL"] == 0).long()
    return model(input_ids=state["tokens_BL"], attention_mask=padding, position_ids=state["positions_BL"]).logits[state["wanted_BL"]]


def answer(folder, questions):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(questions["threads"])
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=getattr(torch, questions["dtype"]), output_loading_info=True
    )
    model.eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    first = questions["states"][0]
    changed_BL = first["tokens_BL"].clone()
    changed_BL[:, -1] = questions["another_token"]
    greedy = {"alg": "maskgit_plus", "temperature": 0.0, "top_p": None, "top_k": None, "eos_token_id": None, "steps": questions["steps"]}
    with torch.no_grad():
        plain_BLV = model(input_ids=first["tokens_BL"]).logits
        changed_BLV = model(input_ids=changed_BL).logits
        logits = [predictions(model, state, questions["is_block"]) for state in questions["states"]]
        generated_BL = model.diffusion_generate(
            questions["prompts_BP"], questions["prompts_mask_BP"], max_new_tokens=questions["max_new_tokens"], **greedy
        )
        infilled = model.infill([[None if t < 0 else t for t in row] for row in questions["gaps"]], **greedy)
        source = {}
        if questions["is_gated"]:
            with model.as_source():
                source = {"source_BLV": model(input_ids=questions["clean_BL"]).logits}
    try:
        model.generate(questions["prompts_BP"], max_new_tokens=1)
        refuses_generate = False
    except NotImplementedError:
        refuses_generate = True
    mask_id = model.config.mask_token_id
    return source | {
        "logits": logits,
        "plain_BLV": plain_BLV,
        "moved_BL": (plain_BLV - changed_BLV).abs().amax(-1) > 0,
        "generated_BL": generated_BL,
        "infilled": infilled,
        "report": json.dumps(
            {
                "class": type(model).__name__,
                "from_model_folder": type(model).__module__.startswith("transformers_modules."),
                "dlmconvert_imported": any(name.split(".")[0] == "dlmconvert" for name in sys.modules),
                "missing": sorted(info["missing_keys"]),
                "unexpected": sorted(info["unexpected_keys"]),
                "mismatched": sorted(str(key) for key in info["mismatched_keys"]),
                "refuses_generate": refuses_generate,
                "is_causal": model.config.is_causal,
                "mask_token_id": mask_id,
                "tokenizer_mask_token_id": tokenizer.mask_token_id,
                "mask_round_trip": tokenizer.convert_tokens_to_ids(tokenizer.convert_ids_to_tokens(mask_id)),
                "encoded": [tokenizer(text)["input_ids"] for text in questions["texts"]],
                "has_chat_template": tokenizer.chat_template is not None,
                "sampler": {k: getattr(model.generation_config, k, None) for k in ("steps", "max_new_tokens", "temperature", "top_p", "alg")},
            }
        ),
    }


if __name__ == "__main__":
    sys.meta_path.insert(0, _Absent())
    import torch

    export, questions_file, answers_file = sys.argv[1:]
    torch.save(answer(export, torch.load(questions_file, weights_only=True)), answers_file)
