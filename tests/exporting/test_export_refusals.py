"""What the exporter refuses, before it writes and after."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
from export_models import EOS, GENERATION, MASK, VOCAB, facts, spec_of, write_model
from safetensors.torch import load_file, save_file

from dlmconvert.errors import UserError
from dlmconvert.exporting import package
from dlmconvert.exporting.copying import check_standalone, flatten
from dlmconvert.exporting.profiles.native import NATIVE
from dlmconvert.exporting.verify import Tolerance, check_files, verify_export


def export(source, target, **changes):
    return package.export_folder(source, target, "native", **({"card": facts(), "generation": GENERATION, "verify": False} | changes))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("refusals") / "model", "qwen2")


def edited(model, tmp_path, **dlm):
    """A copy of the model's folder with other values in the dlm section."""
    folder = tmp_path / "edited"
    shutil.copytree(model, folder)
    path = folder / "config.json"
    values = json.loads(path.read_text())
    values["dlm"] |= dlm
    path.write_text(json.dumps(values))
    return folder


def test_nothing_is_overwritten(model, tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match="not empty"):
        export(model, target)
    assert (target / "mine.txt").read_text() == "precious"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_empty_target_and_our_own_leftovers_are_used(model, tmp_path):
    (tmp_path / "out").mkdir()
    leftover = tmp_path / "out.unfinished"
    leftover.mkdir()
    (leftover / package.UNFINISHED).write_text("")
    (leftover / "half.safetensors").write_text("half")
    report = export(model, tmp_path / "out")
    assert "half.safetensors" not in report.files and package.UNFINISHED not in report.files
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_folder_in_the_way_that_is_not_ours(model, tmp_path):
    (tmp_path / "out.unfinished").mkdir()
    with pytest.raises(UserError, match="in the way"):
        export(model, tmp_path / "out")


@pytest.mark.parametrize(
    ("dlm", "message"),
    [
        ({"attention": "causal"}, "autoregressive model"),
        ({"attention": "block_causal"}, "block models have one"),
        ({"block_length": 4}, "block models have one"),
        ({"attention": "spiral", "block_length": 4}, "spiral"),
        ({"alignment": "sideways"}, "sideways"),
        ({"mask_token_id": VOCAB + 4}, "has no row"),
        ({"mask_token_id": EOS}, "mask token"),
        ({"mask_token_id": EOS, "mask_is_word": True}, "is also the eos_token_id"),
        ({"mask_token_id": 32}, "mask token"),
        ({"vocab_size": 10_000}, "not within"),
        ({"flavour": "vanilla"}, "unknown keys"),
        ({"gated_adapter": {"rank": 4, "alpha": 8.0, "target_modules": "all-linear"}}, "has no gated/adapter.safetensors"),
    ],
)
def test_preconditions(model, tmp_path, dlm, message):
    with pytest.raises(UserError, match=message):
        export(edited(model, tmp_path, **dlm), tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.unfinished").exists()


def test_a_tokenizer_larger_than_the_embedding(tmp_path):
    folder = write_model(tmp_path / "model", "qwen2", spec_of("qwen2", mask_token_id=MASK, vocab_size=200), vocab_size=VOCAB - 1, pad_token_id=None)
    with pytest.raises(UserError, match="has no row|the embedding has"):
        export(folder, tmp_path / "out")


def test_an_ordinary_checkpoint(model, tmp_path):
    folder = tmp_path / "ar"
    shutil.copytree(model, folder)
    values = json.loads((folder / "config.json").read_text())
    del values["dlm"]
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="not a converted model"):
        export(folder, tmp_path / "out")


def test_unmerged_adapters(model, tmp_path):
    folder = edited(model, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.lora_A.weight"] = tensors["model.norm.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match="lora_A"):
        export(folder, tmp_path / "out")


def test_missing_weights(model, tmp_path):
    folder = edited(model, tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="has no model.safetensors"):
        export(folder, tmp_path / "out")


@pytest.mark.parametrize(("generation", "message"), [({"stepz": 3}, "stepz"), ({"order": "alphabetical"}, "alphabetical")])
def test_unknown_sampler_defaults(model, tmp_path, generation, message):
    with pytest.raises(UserError, match=message):
        export(model, tmp_path / "out", generation=generation)


def test_greedy_defaults_are_not_spelled_out(model, tmp_path):
    report = export(model, tmp_path / "out", generation={"temperature": 0.0, "top_p": 0.9, "order": "confidence", "steps": 4})
    values = json.loads((report.target / "generation_config.json").read_text())
    assert values["alg"] == "maskgit_plus" and values["do_sample"] is False and not {"temperature", "top_p"} & set(values)


def test_an_unknown_profile(model, tmp_path):
    with pytest.raises(UserError, match="did you mean 'native'"):
        package.export_folder(model, tmp_path / "out", "nativ", card=facts(), generation=GENERATION)


def test_a_corrupted_weight_fails_the_verification(model, tmp_path):
    folder = export(model, tmp_path / "out").target
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] += 0.5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="largest difference of a logit is .* is allowed") as caught:
        verify_export(folder, model)
    assert caught.value.exit_code == 1


def test_a_failed_verification_leaves_no_export(model, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise UserError("the export differs", exit_code=1)

    monkeypatch.setattr(package, "verify_export", fail)
    with pytest.raises(UserError, match="differs"):
        export(model, tmp_path / "out", verify=True)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.unfinished" / package.UNFINISHED).exists()


def test_a_target_that_wants_an_untied_head(model, tmp_path, monkeypatch):
    monkeypatch.setitem(package.PROFILES, "untied", dataclasses.replace(NATIVE, name="untied", untie_head=True))
    report = package.export_folder(
        model, tmp_path / "out", "untied", card=facts(), generation=GENERATION, verify=True, tolerance=Tolerance("bfloat16")
    )
    tensors = load_file(report.target / "model.safetensors")
    assert (tensors["lm_head.weight"] == tensors["model.embed_tokens.weight"]).all()
    assert json.loads((report.target / "config.json").read_text())["tie_word_embeddings"] is False
    assert report.checks["largest_logit_difference"] <= 2**-7 * 100


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"is_causal": True}, "attention is not causal"),
        ({"rope_theta": 5.0}, "rope_theta"),
        ({"torch_dtype": None}, "torch_dtype"),
        ({"note": "/home/somebody/runs/x"}, "local path"),
        ({"mask_token_id": 3}, "mask id"),
        ({"tie_word_embeddings": False}, "head"),
    ],
)
def test_files_that_contradict_themselves(model, tmp_path, change, message):
    folder = export(model, tmp_path / "out").target
    assert len(check_files(folder)) == 8
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message) as caught:
        check_files(folder)
    assert caught.value.exit_code == 1


def test_imports_are_flattened():
    text = "from ..diffusion.randomness import (\n    a,\n    b,\n)\nfrom .order import c\nimport math\n\n\ndef f():\n    from dlmconvert.diffusion.attention import d\n"
    flat, needed = flatten(text, "dlmconvert.sampling.denoise")
    assert flat.splitlines()[0] == "from .randomness import (" and "    from .attention import d" in flat
    assert set(needed) == {"dlmconvert.diffusion.randomness", "dlmconvert.sampling.order", "dlmconvert.diffusion.attention"}
    check_standalone("x.py", flat, {"randomness.py", "order.py", "attention.py"}, {"math"})
    for bad in ("import numpy", "from dlmconvert.errors import UserError", "from .absent import x", "from ..order import x"):
        with pytest.raises(AssertionError):
            check_standalone("x.py", bad, {"order.py"}, {"torch"})
