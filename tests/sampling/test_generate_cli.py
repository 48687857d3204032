"""`sample` and `infill` as a user types them, on a two-layer model on disk."""

from __future__ import annotations

import json
import re

import pytest
import torch
import typer
from typer.testing import CliRunner

from dlmconvert.backbone.load import save_model_folder
from dlmconvert.backbone.spec import DlmSpec
from dlmconvert.cli import decoding, generate, sampler
from dlmconvert.cli.prompts import read_prompts
from dlmconvert.errors import UserError

app = typer.Typer()
app.command()(generate.sample)
app.command()(generate.infill)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE({token: i for i, token in enumerate([*letters, "<end>", "<mask>"])}, []))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", mask_token="<mask>")
    torch.manual_seed(1)
    config = GPT2Config(vocab_size=260, n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=256)
    folder = tmp_path_factory.mktemp("cli") / "model"
    save_model_folder(folder, GPT2LMHeadModel(config), tokenizer, DlmSpec(mask_token_id=257, vocab_size=258))
    (folder / "generation_config.json").write_text(
        json.dumps({"steps": 4, "max_new_tokens": 6, "temperature": 0.0, "alg": "maskgit_plus", "eos_token_id": 256})
    )
    return folder


def run(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None:
        raise result.exception
    return result


def samples(*arguments):
    return [json.loads(line) for line in run(*arguments, "--json").stdout.splitlines()]


def test_defaults_come_from_the_folder_and_flags_override(model_folder):
    (result,) = samples("sample", model_folder, "--prompt", "ab")
    assert result["num_tokens"] == 6 and result["nfe"] == 4 and result["text"].startswith("ab")
    (result,) = samples("sample", model_folder, "--prompt", "ab", "--max-new-tokens", 5, "--steps", 2, "--order", "entropy")
    assert result["num_tokens"] == 5 and result["nfe"] == 2


def test_saved_steps_are_a_share_of_the_length(model_folder):
    """The folder says 4 steps for 6 tokens."""

    def shown_and_taken(*arguments):
        return [(result["settings"]["steps"], result["nfe"]) for result in samples(*arguments)]

    assert shown_and_taken("sample", model_folder, "--prompt", "ab", "--max-new-tokens", 12) == [(8, 8)]
    assert shown_and_taken("sample", model_folder, "--prompt", "ab", "--max-new-tokens", 2) == [(2, 2)]
    assert shown_and_taken("sample", model_folder, "--prompt", "ab", "--max-new-tokens", 12, "--steps", 4) == [(4, 4)]
    assert samples("sample", model_folder, "--prompt", "ab", "--max-new-tokens", 12, "--block-length", 1)[0]["nfe"] == 12  # a step a block
    assert shown_and_taken("infill", model_folder, "ab[[MASK:3]]c[[MASK:6]]d") == [(6, 6)]
    assert shown_and_taken("infill", model_folder, "ab[[MASK:9]]d", "--steps", 4) == [(4, 4)]


@pytest.mark.parametrize(
    "flags, nfe",
    [
        (("--threshold", 0), 1),
        (("--threshold", 2), 6),
        (("--threshold", 2, "--steps", 3), 3),
        (("--factor", 0), 6),
        (("--entropy-bound", "inf", "--block-length", 2), 3),
        (("--order", "first_hitting"), 6),
        (("--order", "left_to_right", "--budget", "llada"), 4),
        (("--threshold", 0, "--cfg-scale", 1), 2),
        (("--threshold", 2, "--repetition-penalty", 1.5), 6),
        (("--threshold", 0, "--block-length", 2, "--cache", "dual"), 3),
        (("--revision", "p2", "--steps", 5), 5),
    ],
)
def test_samplers_by_name(model_folder, flags, nfe):
    # The folder says 4 steps in confidence order; a budget that reads the predictions takes the steps that it needs.
    (result,) = samples("sample", model_folder, "--prompt", "ab", *flags)
    assert (result["nfe"], result["num_tokens"]) == (nfe, 6)
    (result,) = samples("infill", model_folder, "ab[[MASK:4]]c[[MASK:2]]d", *flags)
    assert (result["nfe"], result["num_tokens"]) == (nfe, 6)


@pytest.mark.parametrize("flags", [("--revision", "remdm"), ("--revision", "p2"), ("--revision", "wino")])
def test_a_penalty_leaves_fewer_repeats_under_revision(model_folder, flags):
    def num_distinct(*more):
        (result,) = samples("sample", model_folder, "--prompt", "ab", "--max-new-tokens", 30, *flags, *more)
        return len(set(result["text"]))

    assert num_distinct("--repetition-penalty", 3) > num_distinct() == num_distinct("--repetition-penalty", 1)


@pytest.mark.parametrize("content", ['[1, 2]', '{"max_new_tokens": "x"}', '{"eos_token_id": "x"}', '{"steps": 2.5}', "{"])
def test_a_generation_config_that_cannot_be_read_is_named(model_folder, tmp_path, content):
    """Before transformers reads it, whose words say neither which file nor what to do."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in model_folder.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "generation_config.json").unlink()
    (folder / "generation_config.json").write_text(content)
    with pytest.raises(UserError, match="generation_config.json cannot be read"):
        run("sample", folder, "--prompt", "abc")


def test_a_text_that_ends_is_shown_and_counted_to_its_end(model_folder, tmp_path):
    folder = tmp_path / "ends"
    folder.mkdir()
    for file in model_folder.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "generation_config.json").unlink()
    plain = json.loads((model_folder / "generation_config.json").read_text())
    (result,) = samples("sample", model_folder, "--prompt", "abc", "--order", "left_to_right", "--steps", 6)
    assert result["num_tokens"] == 6
    from dlmconvert.backbone.load import load_denoiser

    denoiser = load_denoiser(model_folder, device="cpu")
    third = denoiser.tokenizer.encode(result["text"])[3 + 2]
    (folder / "generation_config.json").write_text(json.dumps(plain | {"eos_token_id": third}))
    page = tmp_path / "trace.html"
    ended = run("sample", folder, "--prompt", "abc", "--order", "left_to_right", "--steps", 6, "--trace", "--trace-html", page, "--json")
    short = json.loads(ended.stdout)
    length = denoiser.tokenizer.encode(result["text"])[3:].index(third) + 1
    assert short["num_tokens"] == short["nfe"] == length < 6 and result["text"].startswith(short["text"])
    data = json.loads(re.search(r'<script id="trace" type="application/json">(.*?)</script>', page.read_text(), re.DOTALL)[1])
    settled = [event for _, _, events in data["rows"][0]["settled"] for event in events]
    assert data["numSteps"] == length and sorted(event[0] for event in settled) == list(range(3, 9))
    assert [event[1:] for event in settled if event[0] >= 3 + length] == [["", None]] * (6 - length)


def test_no_prompt_is_an_empty_prompt(model_folder):
    (result,) = samples("sample", model_folder)
    assert result["prompt"] == "" and result["text"] == "".join(result["generated"])


def test_prompts_of_different_length_give_what_they_give_alone(model_folder, tmp_path):
    (tmp_path / "p.txt").write_text("abc def ghi\n\nx\n")
    (tmp_path / "p.jsonl").write_text('{"prompt": "abc def ghi"}\n{"prompt": "x"}\n')
    how = ("--temperature", 1, "--seed", 5, "--num-samples", 2)
    together = samples("sample", model_folder, "--prompts", tmp_path / "p.txt", *how)
    assert [r["prompt"] for r in together] == ["abc def ghi", "abc def ghi", "x", "x"]
    assert [r["text"] for r in together] == [
        r["text"] for r in samples("sample", model_folder, "--prompts", tmp_path / "p.jsonl", *how)
    ]
    alone = samples("sample", model_folder, "--prompt", "x", *how)
    assert [r["text"] for r in alone] == [r["text"] for r in together[2:]]
    assert alone[0]["text"] != alone[1]["text"]
    assert samples("sample", model_folder, "--prompt", "x", "--temperature", 1, "--seed", 6)[0]["text"] != alone[0]["text"]


def test_infill_keeps_what_was_given(model_folder):
    (result,) = samples("infill", model_folder, "def f(x):[[MASK:6]]    return [[MASK:2]]y")
    assert re.fullmatch(r"def f\(x\):(.*)    return (.*)y", result["text"], re.DOTALL).groups() == tuple(result["generated"])
    assert result["num_tokens"] == 8
    assert run("infill", model_folder, "--prompt", "a[[MASK:2]]b").stdout.strip()


def test_results_go_to_a_new_file(model_folder, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "abc", "id": 1}\n{"text": "x"}\n')
    how = ("sample", model_folder, "--prompts", tmp_path / "p.jsonl", "--num-samples", 2, "--temperature", 1, "--seed", 3)
    quiet = run(*how, "--out", tmp_path / "out.jsonl")
    kept = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert quiet.stdout == "" and "4 results" in quiet.stderr
    told = samples(*how)
    without_clock = [{name: value for name, value in record.items() if name != "tokens_per_second"} for record in kept]
    assert without_clock == [{name: value for name, value in record.items() if name != "tokens_per_second"} for record in told]
    for record in kept:
        assert record["tokens_per_second"] > 0 and len(record["tokens"]) == record["num_tokens"] == 6 and record["seed"] == 3
        assert record["tokens_per_forward"] == 6 / record["nfe"] and record["settings"]["temperature"] == 1
    before = (tmp_path / "out.jsonl").read_bytes()
    with pytest.raises(UserError, match="exists"):
        run(*how, "--out", tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == before
    with pytest.raises(UserError, match="no folder"):
        run(*how, "--out", tmp_path / "nowhere" / "out.jsonl")
    (tmp_path / "p.jsonl").write_text('{"question": "abc"}\n')
    with pytest.raises(UserError, match="fields there: question"):
        run(*how)


def test_ctrl_c_keeps_what_was_made(model_folder, tmp_path, monkeypatch):
    calls, real = [], generate._fill

    def fill(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(generate, "_fill", fill)
    result = CliRunner().invoke(app, ["sample", str(model_folder), "--num-samples", "12", "--out", str(tmp_path / "out.jsonl")])
    assert result.exit_code == 130 and "stopped; 8 of 12 results" in result.stderr
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 8


@pytest.mark.parametrize("flags", [("--order", "left_to_right", "--steps", 6), ("--order", "entropy"), ("--revision", "p2", "--steps", 5)])
def test_one_text_is_written_as_it_settles_and_comes_out_whole(model_folder, monkeypatch, flags):
    pieces = []
    real = decoding.View._write

    def write(self, text):
        real(self, text)
        pieces.append(self.written)

    monkeypatch.setattr(decoding.View, "_write", write)
    shown = run("sample", model_folder, "--prompt", "ab", *flags).stdout
    (record,) = samples("sample", model_folder, "--prompt", "ab", *flags)
    assert shown == record["text"] + "\n"
    assert all(later.startswith(earlier) for earlier, later in zip(pieces, pieces[1:], strict=False))
    if "left_to_right" in flags:
        assert len(set(pieces)) > 2, "it grows"
    two = run("sample", model_folder, "--prompt", "ab", "--num-samples", 2, "--temperature", 1).stdout
    assert [two] == ["\n\n".join(r["text"] for r in samples("sample", model_folder, "--prompt", "ab", "--num-samples", 2, "--temperature", 1)) + "\n"]
    assert run("infill", model_folder, "a[[MASK:2]]b[[MASK:1]]").stdout == samples("infill", model_folder, "a[[MASK:2]]b[[MASK:1]]")[0]["text"] + "\n"


def test_a_helper_is_a_model_that_reads_from_the_left(model_folder):
    # The same weights read causally: with the diffusion model's share at 0 the helper alone decides, left to right.
    (result,) = samples("sample", model_folder, "--prompt", "ab", "--helper", model_folder, "--helper-weight", 0, "--temperature", 0)
    from dlmconvert.backbone.load import load_denoiser

    ar = load_denoiser(model_folder, device="cpu", attention="causal")
    ids = ar.tokenizer.encode("ab")
    for _ in range(6):
        wanted_BL = torch.zeros(1, len(ids) + 1, dtype=torch.bool)
        wanted_BL[0, -1] = True
        logits_V = ar.predict(torch.tensor([[*ids, 0]]), wanted_BL)[0]
        logits_V[257:] = -torch.inf
        ids.append(int(logits_V.argmax()))
    assert result["tokens"] == ids[2:] and result["settings"]["helper"] == str(model_folder)


def test_a_gap_may_choose_its_length(model_folder):
    (result,) = samples("infill", model_folder, "abc[[MASK:2-5]]def")
    assert 2 <= result["num_tokens"] == len(result["tokens"]) <= 5 and result["text"].startswith("abc") and result["text"].endswith("def")


def test_trace_lines_and_page(model_folder, tmp_path):
    page = tmp_path / "trace.html"
    result = run("infill", model_folder, "</script><b>[[MASK:5]]&", "--trace", "--trace-html", page, "--order", "margin")
    assert "step 1/4, 1 forwards" in result.stderr and "0 masked" in result.stderr
    text = page.read_text()
    assert text.count("</script>") == 2 and "http" not in text
    data = json.loads(re.search(r'<script id="trace" type="application/json">(.*?)</script>', text, re.DOTALL)[1])
    (row,) = data["rows"]
    settled = [event for _, _, events in row["settled"] for event in events]
    assert data["numSteps"] == 4 and [given for _, given in row["cells"]].count(False) == len(settled) == 5
    assert sorted(place for place, _, _ in settled) == [at for at, (_, given) in enumerate(row["cells"]) if not given]
    assert all(0 < confidence <= 1 for _, _, confidence in settled)
    with pytest.raises(UserError, match="exists"):
        run("sample", model_folder, "--trace-html", page)


def played(page):
    """What the page shows of each position that was to be filled, after the last step."""
    data = json.loads(re.search(r'<script id="trace" type="application/json">(.*?)</script>', page.read_text(), re.DOTALL)[1])
    (row,) = data["rows"]
    shown = {}
    for _, _, events in row["settled"]:
        for position, text, _ in events:
            shown[position] = text
            if text is None:
                del shown[position]
    return "".join(text if given else shown[place] for place, (text, given) in enumerate(row["cells"])), row["settled"]


@pytest.mark.parametrize(
    "flags", [("--revision", "remdm", "--steps", 12, "--revision-strength", 0.4), ("--initial-length", 2), ("--threshold", 0.1)]
)
def test_the_page_ends_with_the_text(model_folder, tmp_path, flags):
    page = tmp_path / "trace.html"
    (record,) = samples("sample", model_folder, "--prompt", "abc", "--max-new-tokens", 10, "--temperature", 1, *flags, "--trace-html", page)
    text, settled = played(page)
    # Bytes of one character that are two tokens are shown apart on the page.
    assert "".join(filter(str.isascii, text)) == "".join(filter(str.isascii, record["text"]))
    if "remdm" in flags:
        assert any(text is None for _, _, events in settled for _, text, _ in events), "some were masked again"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("sample", "--order", "entropie"), "entropy"),
        (("sample", "--budget", "evn"), "even"),
        (("sample", "--threshold", "0.9", "--factor", "1"), "threshold and factor"),
        (("sample", "--block-length", "1", "--steps", "4"), "too few"),
        (("sample", "--prompts", "nowhere.txt"), "nowhere.txt"),
        (("sample", "--max-new-tokens", "100"), "64"),
        (("sample", "--top-p", "2"), "top_p"),
        (("infill",), "no text"),
        (("infill", "a[[MASK:b]]"), "character 2"),
        (("infill", "plain"), "no gap"),
        (("infill", "a[[MASK:2-999]]b"), "1001 tokens"),
        (("infill", "a[[MASK:99999999999999999999]]"), "100000000000000000000 tokens"),
        (("sample", "--prompt", "\udcff"), "half"),
        (("sample", "--device", "gpu"), "'gpu' is no device"),
    ],
)
def test_wrong_input_is_named(model_folder, arguments, message):
    verb, *rest = arguments
    with pytest.raises(UserError) as error:
        run(verb, model_folder, *rest)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "name, content, prompts",
    [
        ("a.txt", b"\xef\xbb\xbfone\r\n\r\ntwo\x0cthree\xe2\x80\xa8four\n", ["one", "two\x0cthree\u2028four"]),
        ("a.jsonl", '\ufeff{"prompt": "a\u2028b\x85c"}\n\n{"text": "d"}'.encode(), ["a\u2028b\x85c", "d"]),
    ],
)
def test_a_prompt_ends_where_its_line_ends(tmp_path, name, content, prompts):
    (tmp_path / name).write_bytes(content)
    assert read_prompts(tmp_path / name) == prompts


def test_half_a_character_in_a_file_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b\\ud83d"}\n')
    with pytest.raises(UserError, match="a.jsonl:2 .*character 2"):
        read_prompts(tmp_path / "a.jsonl")


def test_two_results_do_not_go_to_one_file(model_folder, tmp_path):
    with pytest.raises(UserError, match="one file"):
        run("sample", model_folder, "--out", tmp_path / "same", "--trace-html", tmp_path / ".." / tmp_path.name / "same")
    assert not (tmp_path / "same").exists()


def test_infill_without_model_means_the_latest_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no run"):
        run("infill", "a[[MASK:3]]b")


def test_order_names_are_those_of_the_sampler():
    from dlmconvert.sampling.budget import BUDGETS
    from dlmconvert.sampling.cache import CACHES
    from dlmconvert.sampling.options import ALGORITHMS
    from dlmconvert.sampling.order import ORDERS
    from dlmconvert.sampling.revise import REVISIONS

    assert sampler.ORDERS == ORDERS and set(ORDERS) == set(ALGORITHMS.values()) and set(ORDERS) <= set(ALGORITHMS)
    assert sampler.BUDGETS == tuple(BUDGETS) and sampler.CACHES == tuple(CACHES) and sampler.REVISIONS == tuple(REVISIONS)
