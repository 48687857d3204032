"""The native export: reloads without dlmconvert, answers the same, samples, and refuses what would be silently wrong."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from export_models import ALIGNMENTS, EOS, FAMILIES, MASK, PAD, VERIFIED, VOCAB
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from dlmconvert.backbone.load import load_denoiser

every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def stranger(exports, tmp_path_factory):
    """What a process without dlmconvert got out of all exports."""
    scratch = tmp_path_factory.mktemp("stranger")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(scratch / "modules")}
    folder = next(iter(exports.values())).target.parent
    script = Path(__file__).with_name("stranger.py")
    done = subprocess.run(
        [sys.executable, "-P", str(script), str(folder), str(scratch / "answers.pt"), *FAMILIES], env=environment, cwd=scratch, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for word in ("Warning", "WARNING", "not valid", "MISSING", "MISMATCH"):
        assert word not in done.stderr.replace("[WARNING] [real_accelerator", ""), done.stderr[-3000:]
    return torch.load(scratch / "answers.pt", weights_only=False)


@every_family
def test_logits_equal_the_stock_model_with_everything_visible(family, models_folder, stranger):
    """The oracle is transformers' own class under an explicit mask of ones, with no code of ours."""
    stock = AutoModelForCausalLM.from_pretrained(models_folder / family, attn_implementation="sdpa").eval()
    tokens_BL = stranger["tokens_BL"]
    length = tokens_BL.shape[1]
    seen = torch.ones(len(tokens_BL), 1, length, length, dtype=torch.bool)
    with torch.no_grad():
        expected_BLV = stock(tokens_BL, attention_mask=seen, position_ids=torch.arange(length).expand_as(tokens_BL)).logits
        stock.config.is_causal = True
        causal_BLV = stock(tokens_BL, is_causal=True).logits
    torch.testing.assert_close(stranger[family]["logits_BLV"], expected_BLV, atol=1e-5, rtol=1e-5)
    assert (causal_BLV - expected_BLV).abs().max() > 1e-2, "the test would not notice a causal model"


@every_family
def test_a_stranger_can_sample_and_infill(family, stranger):
    answers = stranger[family]
    assert answers["produced_mask_or_padding_rows"] == 0
    assert answers["prompt_kept"] and answers["same_seed_same_tokens"] and answers["eager_agrees"]
    assert answers["shapes"] == [[2, 9 + 12]] * 4 + [[2, 9 + 30]]
    first, second = answers["infilled_rows"]
    assert first[0] == 5 and first[3] == 7 and len(first) == 4 and second[0] == 9 and len(second) == 2
    assert all(token < VOCAB and token != MASK for token in first + second)
    assert answers["nfe"] <= 3
    assert answers["text"].startswith("def f(x):") and answers["text"].endswith("    return y")
    assert answers["texts"][0].startswith("a") and answers["texts"][1].endswith("er")
    assert answers["base_is_equal"] and answers["base_class"].startswith("Dlm")
    assert not answers["dlmconvert"]


@every_family
def test_streamers_criteria_and_configs_as_in_transformers(family, stranger):
    found = stranger[family]["conventions"]
    assert found["streamed"] == found["decoded"] and found["decoded"]
    assert found["gap_filled"] == "def f" + found["gap_streamed"] and found["gap_streamed"].endswith("x")
    whole, stopped = found["whole"], found["stopped"]
    assert stopped[:5] == whole[:5] and set(stopped[5:]) <= {PAD, EOS} and len(stopped) == len(whole) == 12
    assert found["beams"].startswith("ValueError") and "num_beams" in found["beams"]


@every_family
def test_what_would_be_silently_wrong_is_refused(family, stranger):
    answers = stranger[family]
    assert answers["generate"].startswith("NotImplementedError") and "diffusion_generate" in answers["generate"]
    assert answers["labels"].startswith("NotImplementedError") and "autoregressive" in answers["labels"]
    assert "did you mean 'steps'" in answers["typo"]
    if ALIGNMENTS.get(family, "shift") == "shift":
        assert "first token" in answers["first_wanted"]
    else:
        assert answers["first_wanted"] == "no error"


@every_family
def test_a_stranger_has_the_caches_and_revisions_of_the_sampler_that_is_tested(family, models_folder, stranger):
    from dlmconvert.sampling.api import diffusion_generate

    denoiser, batch = load_denoiser(models_folder / family, device="cpu"), stranger[family]["batch"]
    how = {"max_new_tokens": 12, "temperature": 0.0, "threshold": 0.3, "block_length": 4}
    for cache, tokens_BL in stranger[family]["cached"].items():
        assert torch.equal(tokens_BL, diffusion_generate(denoiser, batch["input_ids"], batch["attention_mask"], cache=cache, **how)), cache
    how = {"max_new_tokens": 12, "temperature": 1.0, "revision": "remdm", "seed": 3}
    assert torch.equal(stranger[family]["revised"], diffusion_generate(denoiser, batch["input_ids"], batch["attention_mask"], **how))


def test_a_stranger_can_save_it_again(stranger):
    assert stranger["saved_again_is_equal"] and stranger["saved_again_samples"] == [2, 32]


@pytest.mark.parametrize("family", VERIFIED)
def test_the_export_was_verified(family, exports):
    checks = exports[family].checks
    assert checks["logits_exact"] and checks["largest_logit_difference"] == 0
    moved, total = checks["earlier_predictions_moved_by_a_later_token"]
    assert moved == total > 0
    passport = json.loads((exports[family].target / "dlmconvert.json").read_text())
    assert passport["checks"] == checks and passport["profile"] == "native"


@every_family
def test_files(family, exports, models_folder):
    folder = exports[family].target
    files = set(exports[family].files)
    kind = FAMILIES[family]["model_type"]
    assert {f"modeling_dlm_{kind}.py", f"configuration_dlm_{kind}.py", "README.md", "generation_config.json", "tokenizer.json", "chat_template.jinja"} <= files
    assert not any(name.startswith(".") for name in files)
    config = json.loads((folder / "config.json").read_text())
    source = json.loads((models_folder / family / "config.json").read_text())
    assert config["model_type"] == f"dlm_{kind}" != source["model_type"]
    assert config["mask_token_id"] == config["dlm"]["mask_token_id"] == MASK
    assert config["is_causal"] is False and config["use_cache"] is False
    assert config["dtype"] == config["torch_dtype"] == "float32"
    assert {"pad_token_id", "bos_token_id", "eos_token_id", "vocab_size", "tie_word_embeddings", "auto_map"} <= set(config)
    if "rope_parameters" in source:
        parameters = config["rope_parameters"].get("full_attention", config["rope_parameters"])
        assert config["rope_theta"] == parameters["rope_theta"] and "rope_scaling" not in config
        restored = AutoConfig.for_model(kind, **{k: v for k, v in config.items() if k not in ("model_type", "auto_map")})
        assert restored.rope_parameters == AutoConfig.from_pretrained(models_folder / family).rope_parameters
    generation = json.loads((folder / "generation_config.json").read_text())
    assert (generation["steps"], generation["alg"], generation["temperature"], generation["mask_token_id"]) == (8, "origin", 0.9, MASK)


@every_family
def test_weights_keep_names_and_tying(family, exports, models_folder):
    folder = exports[family].target
    shards = sorted(folder.glob("*.safetensors"))
    theirs = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    ours = load_file(models_folder / family / "model.safetensors")
    assert set(theirs) == set(ours) and all(torch.equal(theirs[name], ours[name]) for name in ours)
    tied = json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    assert tied == (not any("lm_head" in name for name in theirs))
    for shard in shards:
        with safe_open(shard, "pt") as file:
            assert file.metadata() == {"format": "pt"}
    if family == "llama":
        assert len(shards) > 1
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == set(ours)
        assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in ours.values())


def test_windows_are_widened(exports):
    for family in ("gemma3", "mixtral"):
        assert json.loads((exports[family].target / "config.json").read_text())["sliding_window"] == 64
        assert exports[family].notes == ["sliding_window 4 -> 64"]


def test_code_imports_torch_transformers_and_siblings_only(exports):
    for family, report in exports.items():
        for path in report.target.glob("*.py"):
            text = path.read_text()
            assert "dlmconvert." not in "\n".join(line for line in text.splitlines() if "import" in line), (family, path.name)
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.ImportFrom) and node.level == 0:
                    assert node.module.split(".")[0] in {"torch", "transformers"} | set(sys.stdlib_module_names)


def test_old_transformers_is_refused_by_name(exports, monkeypatch):
    import transformers

    monkeypatch.setattr(transformers, "__version__", "4.57.1")
    text = (exports["gpt2"].target / "configuration_dlm_gpt2.py").read_text()
    with pytest.raises(ImportError, match="5.22 or newer, and this is 4.57.1"):
        exec(text, {"__name__": "configuration"})


def test_our_own_loader_reads_the_export(exports, models_folder):
    tokens_BL = torch.randint(0, 250, (2, 10))
    wanted_BL = torch.zeros(2, 10, dtype=torch.bool)
    wanted_BL[:, 4:7] = True
    of_export = load_denoiser(exports["gpt2"].target, device="cpu").predict(tokens_BL, wanted_BL)
    of_model = load_denoiser(models_folder / "gpt2", device="cpu").predict(tokens_BL, wanted_BL)
    assert torch.equal(of_export, of_model)


def test_card(exports):
    text = (exports["gpt2"].target / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["library_name"] == "transformers" and front["license"] == "apache-2.0" and "diffusion" in front["tags"]
    assert "base_model" not in front
    assert "2.5 +- 0.01" in text and "123,456" in text
    assert "AR NLL |" not in text and "hours" not in text, "absent numbers are left out"
    assert "/home/somebody" not in text + (exports["gpt2"].target / "dlmconvert.json").read_text()
    recipe = yaml.safe_load(text.split("```yaml")[1].split("```")[0])
    assert recipe == {"name": "tiny", "source": {"model": "tiny-ar"}, "train": {"steps": 10}}
    for promise in ("Not an autoregressive model", "**bound**", "trust_remote_code=True", "Not checked", "exactly equal"):
        assert promise in text


def test_the_code_of_the_card_runs(exports, tmp_path, monkeypatch):
    monkeypatch.chdir(exports["gpt2"].target)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    code = (exports["gpt2"].target / "README.md").read_text().split("```python")[1].split("```")[0]
    printed = []
    exec(code, {"print": printed.append})
    assert len(printed) == 2 and printed[1].startswith("Once upon a time")


def test_exporting_again_gives_the_same_bytes(exports, models_folder, tmp_path):
    from export_models import GENERATION, facts

    from dlmconvert.exporting.package import export_folder

    again = export_folder(models_folder / "gpt2", tmp_path / "gpt2", "native", card=facts(), generation=GENERATION, verify=False)
    for name in set(again.files) - {"README.md", "dlmconvert.json"}:
        assert (again.target / name).read_bytes() == (exports["gpt2"].target / name).read_bytes(), name
    assert "**not** compared" in (again.target / "README.md").read_text()
    shutil.rmtree(again.target)
