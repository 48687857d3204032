"""`dlmconvert bench` and `tune-sampler` on two-layer models: everything is measured, nothing is overwritten, what is written is used."""

from __future__ import annotations

import json

import pytest
import torch
from command_line import dlmconvert, fails, works
from tiny_folders import END, write_folder

from dlmconvert.evaluation import benchmark, tuning
from dlmconvert.evaluation.benchmark import AR
from dlmconvert.evaluation.quality import distinct, holds_answer, source_nats

NEW = 4


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    write_folder(folder / "model", converted=True)
    write_folder(folder / "source", converted=False, seed=2)
    (folder / "prompts.txt").write_text("ab cd\nlonger than that\nx\n")
    (folder / "answers.txt").write_text("a\nb\nc\n")
    return folder


@pytest.fixture(scope="module")
def benchmarked(folders):
    told = works(
        "bench", folders / "model", "--source", folders / "source", "--prompts", folders / "prompts.txt", "--new-tokens", NEW, "--batch", 2,
        "--repeats", 2, "--to", folders / "found.json", "--device", "cpu",
    )  # fmt: skip
    return told, json.loads((folders / "found.json").read_text())


def test_every_sampler_beside_the_source(benchmarked, folders):
    told, found = benchmarked
    assert (found["prompts"], found["new_tokens"], found["batch"], found["repeats"], found["prompt_lengths"]) == (3, NEW, 2, 2, [5, 16, 1])
    ar, *samplers = found["samplers"]
    assert ar["settings"] is None and ar["nfe"] == NEW and ar["tokens_per_forward"] == 1
    names = [sampler["name"] for sampler in samplers]
    for part in ("order=confidence", "order=entropy", "order=margin", "order=random", "threshold=0.8", "factor", "entropy_bound", "block_length=2", "cache=prefix", "cache=dual", "helper=source"):
        assert any(part in name for name in names), part
    for sampler in found["samplers"]:
        assert sampler["num_tokens"] == 3 * NEW and len(sampler["seconds"]) == 2, "all texts have one length"
        low, high = sampler["tokens_per_second_range"]
        assert low <= sampler["tokens_per_second"] <= high and 0 < sampler["median_seconds_to_first_token"] <= max(sampler["seconds"])
        assert sampler["memory_bytes"] > 0 and sampler["nats_per_token"] > 0 and sampler["nats_standard_error"] > 0
        assert 0 < sampler["distinct_1"] <= sampler["distinct_2"] <= sampler["distinct_3"] <= 1 and sampler["accuracy"] is None
        assert sampler["name"] in told.out
    by_name = {sampler["name"]: sampler for sampler in samplers}
    assert by_name["order=confidence+steps=4"]["nfe"] == 4 and by_name["order=confidence+steps=2"]["nfe"] == 2
    assert by_name["order=confidence+steps=2"]["tokens_per_forward"] == 2
    assert (folders / "found.png").read_bytes().startswith(b"\x89PNG")


def test_the_front_is_what_nothing_beats(benchmarked):
    samplers = benchmarked[1]["samplers"][1:]
    for one in samplers:
        beaten = any(
            other["tokens_per_second"] >= one["tokens_per_second"]
            and other["nats_per_token"] <= one["nats_per_token"]
            and (other["tokens_per_second"], other["nats_per_token"]) != (one["tokens_per_second"], one["nats_per_token"])
            for other in samplers
        )
        assert one["is_on_front"] != beaten


def test_nothing_is_overwritten_and_mistakes_are_named(benchmarked, folders, tmp_path):
    model, prompts = folders / "model", ("--prompts", folders / "prompts.txt")
    assert "found.json exists" in fails(2, "bench", model, *prompts, "--to", folders / "found.json")
    assert "found.png exists" in fails(2, "bench", model, *prompts, "--to", folders / "found.jsonl")
    assert "one file" in fails(2, "bench", model, *prompts, "--to", tmp_path / "both.png")
    assert "'threshold' has no value" in fails(2, "bench", model, *prompts, "--samplers", "threshold")
    (tmp_path / "list.txt").write_bytes(b"\xff\n")
    assert "cannot be read" in fails(2, "bench", model, *prompts, "--samplers", tmp_path / "list.txt")
    assert "did you mean 'threshold'" in fails(2, "bench", model, *prompts, "--samplers", "treshold=0.9")
    assert "too few" in fails(2, "bench", model, *prompts, "--samplers", "order=entropy+steps=1+block_length=2")
    assert "twice" in fails(2, "bench", model, *prompts, "--samplers", "steps=2,steps=2")
    assert "--prompts" in fails(2, "bench", model)
    assert "2 answers for" not in fails(2, "bench", model, "--answers", folders / "answers.txt")
    assert "made for 128" in fails(2, "bench", model, *prompts, "--new-tokens", 128)
    (tmp_path / "bad.yaml").write_text("threshold: 0.9\n")
    assert "no list" in fails(2, "bench", model, *prompts, "--samplers", tmp_path / "bad.yaml")


def test_a_list_of_ones_own_and_answers(folders, tmp_path):
    (tmp_path / "list.yaml").write_text("- {threshold: 0.5}\n- {order: left_to_right, steps: 4, temperature: 1.0}\n")
    (tmp_path / "list.txt").write_text("threshold=0.5  # fast\norder=left_to_right+steps=4+temperature=1\n")
    how = ("bench", folders / "model", "--prompts", folders / "prompts.txt", "--answers", folders / "answers.txt", "--new-tokens", NEW, "--repeats", 1, "--json")
    found = json.loads(works(*how, "--samplers", tmp_path / "list.yaml").out)
    assert [s["settings"] for s in found["samplers"]] == [{"temperature": 0.0, "threshold": 0.5}, {"temperature": 1.0, "alg": "left_to_right", "steps": 4}]
    assert all(0 <= s["accuracy"] <= 1 and s["nats_per_token"] is None for s in found["samplers"]), "without a source only the answers judge"
    again = json.loads(works(*how, "--samplers", tmp_path / "list.txt").out)
    assert [s["name"] for s in again["samplers"]] == [s["name"] for s in found["samplers"]]
    batched = json.loads(works(*how, "--samplers", tmp_path / "list.txt", "--batch", 3).out)
    assert [s["distinct_1"] for s in batched["samplers"]] == [s["distinct_1"] for s in found["samplers"]], "texts do not depend on the batch"
    inline = json.loads(works(*how, "--samplers", "threshold=0.5,order=left_to_right+steps=4+temperature=1").out)
    for other in (again, inline):
        assert [s["settings"] for s in other["samplers"]] == [s["settings"] for s in found["samplers"]]
        assert [s["distinct_1"] for s in other["samplers"]] == [s["distinct_1"] for s in found["samplers"]], "the same seed makes the same texts"


def test_block_models_draft_and_keep_their_keys(folders, tmp_path):
    model = write_folder(tmp_path / "blocks", converted=True, attention="context_causal", block_length=2)
    how = ("bench", model, "--prompts", folders / "prompts.txt", "--new-tokens", NEW, "--repeats", 1, "--json", "--samplers")
    drafted, stored, plain = json.loads(works(*how, "draft_length=2,threshold=0.9+cache=block,threshold=0.9+cache=none").out)["samplers"]
    assert all(sampler["num_tokens"] == 3 * NEW for sampler in (drafted, stored, plain))
    assert stored["distinct_1"] == plain["distinct_1"] and stored["nfe"] == plain["nfe"]
    assert "cache=dual" in fails(2, *how, "cache=dual")


def test_what_works_for_some_prompts_only_is_left_out_or_refused(folders, tmp_path):
    # Blocks of 2 are counted from the first token of a row: 4 tokens behind 16 fill two of them, behind 5 three.
    model = write_folder(tmp_path / "blocks", converted=True, attention="block_causal", block_length=2, alignment="in_place")
    (tmp_path / "prompts.txt").write_text("longer than that\nab cd\n")
    how = ("bench", model, "--prompts", tmp_path / "prompts.txt", "--new-tokens", NEW, "--repeats", 1, "--json")
    names = [sampler["name"] for sampler in json.loads(works(*how).out)["samplers"]]
    assert "order=confidence+steps=4" in names and "order=confidence+steps=2" not in names and "revision=wino+cache=block" in names
    assert "2 steps are too few" in fails(2, *how, "--samplers", "steps=2")


def test_a_helper_is_the_source_or_any_checkpoint(folders):
    how = ("bench", folders / "model", "--prompts", folders / "prompts.txt", "--new-tokens", NEW, "--repeats", 1, "--json")
    names = f"helper=source+draft_length=2,helper={folders / 'source'}+draft_length=2"
    ar, by_name, by_folder = json.loads(works(*how, "--source", folders / "source", "--samplers", names).out)["samplers"]
    assert by_name["settings"] == {"temperature": 0.0, "helper": "source", "draft_length": 2} and 2 <= by_name["nfe"] <= NEW
    assert (by_name["nfe"], by_name["distinct_1"], by_name["nats_per_token"]) == (by_folder["nfe"], by_folder["distinct_1"], by_folder["nats_per_token"])
    assert "no AR source is known" in fails(2, *how, "--samplers", "helper=source")


def test_ctrl_c_keeps_what_was_measured(folders, tmp_path, monkeypatch):
    passes, whole = [], benchmark.run_sampler

    def run_sampler(*arguments):
        passes.append(arguments)
        if len(passes) == most:
            raise KeyboardInterrupt
        return whole(*arguments)

    monkeypatch.setattr(benchmark, "run_sampler", run_sampler)
    how = ("--source", folders / "source", "--prompts", folders / "prompts.txt", "--new-tokens", NEW, "--repeats", 2, "--device", "cpu")
    bench = ("bench", folders / "model", *how, "--samplers", "steps=1,steps=2", "--to", tmp_path / "found.json")
    most = 2  # while it warms up
    told = dlmconvert(*bench)
    assert told.code == 130 and "0 of 3 samplers were measured, and nothing was written" in told.err and not list(tmp_path.iterdir())
    passes, most = [], 4  # two warm-ups, the first sampler's first pass, half of the second's
    told = dlmconvert(*bench)
    assert told.code == 130 and "2 of 3 samplers were measured" in told.err and "steps=1" in told.out and "steps=2" not in told.out
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["stopped"] and [sampler["name"] for sampler in found["samplers"]] == [AR, "steps=1"]

    monkeypatch.setattr(tuning, "coarse_grid", lambda num_new, works: [{"steps": 1}, {"steps": 2}, {"steps": 4}])
    passes, most = [], 8  # the grid takes six passes, the first refinement two
    before = sorted(path.name for path in (folders / "model").iterdir())
    told = dlmconvert("tune-sampler", folders / "model", *how, "--floor", "90%")
    assert told.code == 130 and "3 settings were tried, and nothing was written" in told.err and "steps=4" in told.out
    assert sorted(path.name for path in (folders / "model").iterdir()) == before


def test_what_was_tuned_is_what_sample_and_transformers_use(folders, tmp_path, monkeypatch):
    whole = tuning.coarse_grid
    assert len(whole(64, lambda settings: True)) > 30 and whole(64, lambda settings: "cache" not in settings)
    monkeypatch.setattr(tuning, "coarse_grid", lambda num_new, works: whole(num_new, works)[::5])
    model = write_folder(tmp_path / "model", converted=True, generation={"bos_token_id": 5, "temperature": 0.7, "do_sample": True, "threshold": 0.5, "eos_token_id": END})
    before = (model / "generation_config.json").read_text()
    how = ("tune-sampler", model, "--prompts", folders / "prompts.txt", "--new-tokens", NEW, "--batch", 3, "--repeats", 1)
    assert "nothing can judge" in fails(2, *how)
    assert "no setting reaches" in fails(1, *how, "--source", folders / "source", "--floor", "0.01")
    assert (model / "generation_config.json").read_text() == before and len(list(model.glob("*.bak*"))) == 0
    assert "no floor" in fails(2, *how, "--source", folders / "source", "--floor", "high")

    told = works(*how, "--source", folders / "source", "--floor", "1%", "--json")
    found = json.loads(told.out)
    best = min(s["nats_per_token"] for s in found["samplers"])
    allowed = [s for s in found["samplers"] if s["nats_per_token"] <= 1.01 * best]
    assert found["chosen"]["name"] in [s["name"] for s in allowed] and found["chosen"]["settings"]["temperature"] == 0.7
    assert (model / "generation_config.json.bak").read_text() == before == (tmp_path / "model" / "generation_config.json.bak").read_text()
    values = json.loads((model / "generation_config.json").read_text())
    wanted = found["chosen"]["settings"]
    assert {name: values[name] for name in wanted} == wanted and values["bos_token_id"] == 5 and values["do_sample"] is True
    assert ("threshold" in values) == ("threshold" in wanted)
    result = json.loads(works("sample", model, "--prompt", "ab", "--max-new-tokens", NEW, "--json").out)
    assert {name: result["settings"].get(name) for name in wanted} == wanted

    from transformers import GenerationConfig

    from dlmconvert.sampling.options import saved_options

    loaded = saved_options(GenerationConfig.from_pretrained(model))
    assert {name: loaded.get(name) for name in wanted} == wanted
    works(*how, "--source", folders / "source", "--temperature", 0, "--json")
    values = json.loads((model / "generation_config.json").read_text())
    assert values["do_sample"] is False and "temperature" not in values and (model / "generation_config.json.bak2").is_file()
    assert json.loads(works("sample", model, "--prompt", "ab", "--json").out)["settings"]["temperature"] == 0


def test_steps_that_were_tuned_are_a_share_of_the_length(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "coarse_grid", lambda num_new, works: [{"steps": 1}])
    monkeypatch.setattr(benchmark, "default_samplers", lambda *facts: [])
    model = write_folder(tmp_path / "model", converted=True)
    how = (model, "--source", folders / "source", "--prompts", folders / "prompts.txt", "--repeats", 1, "--json")
    works("tune-sampler", *how, "--new-tokens", NEW)
    values = json.loads((model / "generation_config.json").read_text())
    assert (values["steps"], values["max_new_tokens"]) == (1, NEW)
    assert json.loads(works("sample", model, "--max-new-tokens", 3 * NEW, "--json").out)["nfe"] == 3
    (ours,) = (found for found in json.loads(works("bench", *how, "--new-tokens", 3 * NEW).out)["samplers"] if found["name"] != AR)
    assert ours["settings"]["steps"] == ours["nfe"] == 3


def test_likelihood_is_that_of_every_token_after_its_prompt():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    source = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=32, n_embd=16, n_layer=2, n_head=2)).eval()
    prompts, texts = [[1, 2, 3], [4]], [[5, 6], [7, 8, 9]]
    mean, error = source_nats(source, prompts, texts)
    nats = []
    for prompt, text in zip(prompts, texts, strict=True):
        for place, token in enumerate(text):
            seen = torch.tensor([[*prompt, *text[:place]]])
            nats.append(-torch.log_softmax(source(seen).logits[0, -1], dim=-1)[token].item())
    assert mean == pytest.approx(sum(nats) / len(nats), abs=1e-5) and error > 0
    assert source_nats(source, prompts, [[], []]) == (None, None)


def test_what_repeats_itself_and_what_answers():
    assert distinct([[1, 2, 1, 2, 1]], 2) == 0.5 and distinct([[1, 2], [1, 2]], 1) == 0.5 and distinct([[1]], 2) is None
    assert holds_answer("It is  Paris, of course", "paris") and holds_answer("x = 42.", "42")
    assert not holds_answer("it is 142", "42") and not holds_answer("Parisian", "paris")
