"""Run by test_native_export.py in a process where dlmconvert cannot be imported: what somebody with plain transformers does.

    python -P stranger.py EXPORTS_FOLDER ANSWERS_FILE FAMILY ...
"""

import sys
from pathlib import Path


class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "dlmconvert":
            raise ModuleNotFoundError(name)
        return None


sys.meta_path.insert(0, Absent())

import torch  # noqa: E402
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, StoppingCriteriaList, TextStreamer  # noqa: E402
from transformers.generation.stopping_criteria import MaxLengthCriteria  # noqa: E402


def error_of(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


class Told(TextStreamer):
    """Keeps what TextStreamer would print."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer, skip_prompt=True)
        self.text = ""

    def on_finalized_text(self, text, stream_end=False):
        self.text += text


def conventions(model, tokenizer):
    """What people know from transformers' generate."""
    prompt = tokenizer("def f(x):", return_tensors="pt")
    start = prompt["input_ids"].shape[1]
    streamer, settings = Told(tokenizer), {"alg": "entropy", "do_sample": False, "eos_token_id": None, "max_new_tokens": 12}
    tokens = model.diffusion_generate(**prompt, streamer=streamer, **settings)
    config = GenerationConfig(alg="entropy", do_sample=False, max_new_tokens=12, steps=8)
    criteria = StoppingCriteriaList([MaxLengthCriteria(max_length=start + 5)])
    stopped = model.diffusion_generate(**prompt, stopping_criteria=criteria, generation_config=config, seed=1)
    whole = model.diffusion_generate(**prompt, generation_config=config, seed=1)
    of_gap = Told(tokenizer)
    filled = model.infill("def f[[MASK:4]]x", tokenizer=tokenizer, streamer=of_gap, alg="entropy", do_sample=False)
    return {
        "gap_streamed": of_gap.text,
        "gap_filled": filled,
        "streamed": streamer.text,
        "decoded": tokenizer.decode(tokens[0, start:]),
        "stopped": stopped[0, start:].tolist(),
        "whole": whole[0, start:].tolist(),
        "beams": error_of(lambda: model.diffusion_generate(**prompt, generation_config=GenerationConfig(num_beams=2))),
    }


def visit(folder, tokens_BL):
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    base = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    mask_id, vocab_size = model.config.mask_token_id, model.config.dlm["vocab_size"]
    with torch.no_grad():
        logits_BLV = model(tokens_BL).logits
        eager = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, attn_implementation="eager").eval()
        tokenizer.padding_side = "left"
        batch = tokenizer(["def f(x):", "x"], return_tensors="pt", padding=True)
        produced = [model.diffusion_generate(**batch, alg=alg, temperature=1.0, seed=3) for alg in ("origin", "maskgit_plus", "topk_margin", "entropy")]
        hot = model.diffusion_generate(**batch, max_new_tokens=30, steps=10, temperature=5.0, top_p=None, eos_token_id=None, seed=1)
        greedy = {"alg": "entropy", "temperature": 0.0, "eos_token_id": None}
        cached = {
            cache: model.diffusion_generate(**batch, cache=cache, threshold=0.3, block_length=4, temperature=0.0, eos_token_id=None)
            for cache in ("none", "prefix", "dual")
        }
        revised = model.diffusion_generate(**batch, revision="remdm", temperature=1.0, top_p=None, seed=3, eos_token_id=None)
        output = model.infill([[5, None, None, 7], [9, None]], return_dict_in_generate=True, seed=1)
        text = model.infill("def f(x):[[MASK:6]]    return y", tokenizer=tokenizer, seed=1)
        texts = model.infill(["a[[MASK:2]]b", "long[[MASK:3]]er"], tokenizer=tokenizer, seed=1)
        return {
            "logits_BLV": logits_BLV,
            "batch": dict(batch),
            "cached": cached,
            "revised": revised,
            "base_is_equal": torch.allclose(base(tokens_BL).last_hidden_state, model.base_model(tokens_BL).last_hidden_state, atol=0),
            "base_class": type(base).__name__,
            "eager_agrees": torch.equal(eager.diffusion_generate(**batch, **greedy), model.diffusion_generate(**batch, **greedy)),
            "produced_mask_or_padding_rows": max(int((p[:, batch["input_ids"].shape[1] :] >= min(mask_id, vocab_size)).sum()) for p in [*produced, hot]),
            "shapes": [list(p.shape) for p in [*produced, hot]],
            "prompt_kept": all(torch.equal(p[:, : batch["input_ids"].shape[1]], batch["input_ids"]) for p in produced),
            "same_seed_same_tokens": torch.equal(produced[0], model.diffusion_generate(**batch, alg="origin", temperature=1.0, seed=3)),
            "infilled_rows": output.sequences,
            "nfe": output.nfe,
            "text": text,
            "conventions": conventions(model, tokenizer),
            "texts": texts,
            "generate": error_of(lambda: model.generate(tokens_BL)),
            "labels": error_of(lambda: model(tokens_BL, labels=tokens_BL)),
            "typo": error_of(lambda: model.diffusion_generate(tokens_BL, step=3)),
            "first_wanted": error_of(lambda: model.predict(tokens_BL, torch.ones_like(tokens_BL, dtype=torch.bool))),
            "dlmconvert": any(name.split(".")[0] == "dlmconvert" for name in sys.modules),
        }, model


if __name__ == "__main__":
    exports, answers_file, *families = sys.argv[1:]
    torch.manual_seed(0)
    tokens_BL = torch.randint(0, 250, (2, 20))
    answers = {"tokens_BL": tokens_BL}
    for family in families:
        answers[family], model = visit(str(Path(exports) / family), tokens_BL)
    # Saved again by its user (after fine-tuning, say), the last one is still whole.
    again = Path(answers_file).parent / "again"
    model.save_pretrained(again)
    reloaded = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True).eval()
    with torch.no_grad():
        answers["saved_again_is_equal"] = torch.equal(reloaded(tokens_BL).logits, answers[families[-1]]["logits_BLV"])
        answers["saved_again_samples"] = list(reloaded.diffusion_generate(tokens_BL).shape)
    torch.save(answers, answers_file)
