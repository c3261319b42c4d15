"""`specdec bench`, `check` and `info` on real checkpoints from disk."""

from __future__ import annotations

import csv
import io
import json
import shutil
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from specdec_engine.bench import report
from specdec_engine.bench.lengthened import lengthened
from specdec_engine.decoding import loop
from specdec_engine.drafters.ngram import NgramDrafter
from specdec_engine.errors import OutOfMemory, UsageError
from specdec_engine.models.options import LoadOptions
from specdec_engine.pair import Loader, load_pair
from specdec_engine.record.prompt_files import Question
from specdec_engine.verify.rules import TokenRule
from tests import fakes

ARM = {
    "draft", "k", "temperature", "tokens_per_second", "speedup", "speedup_low", "speedup_high", "acceptance_rate", "alpha",
    "mean_emitted_per_cycle", "draft_share", "verify_share", "other_share", "predicted_speedup", "identical", "compared",
    "first_divergences", "samples",
}  # fmt: skip


@pytest.fixture
def bench(specdec, checkpoint):
    small = ("--limit", "2", "--repeats", "1", "-n", "12", "-k", "2", "--dtype", "float32")
    return lambda *more: specdec("bench", "-t", checkpoint, *small, *more)


def record(result):
    assert result.code == 0, result.err
    return json.loads(result.out)


def test_json_has_the_contracts_keys_and_greedy_text_is_the_targets(bench, draft_checkpoint):
    found = record(bench("-d", draft_checkpoint, "-d", "ngram", "-k", "1,3", "--format", "json"))
    assert found["schema"] == "specdec.bench/1"
    assert found.keys() >= {"environment", "prompts", "baseline", "arms", "recommendation"}
    assert len(found["baseline"]["samples"]) == 2
    assert {(arm["draft"], arm["k"]) for arm in found["arms"]} == {
        (d, k) for d in (str(draft_checkpoint), "ngram") for k in (1, 3)
    }
    for arm in found["arms"]:
        assert arm.keys() >= ARM
        assert arm["identical"] == arm["compared"] == 2
        assert arm["draft_share"] + arm["verify_share"] + arm["other_share"] == pytest.approx(1)
        for s in arm["samples"]:
            assert s["emitted"] == len(s["token_ids"])
            assert s["accepted"] <= s["tested"] <= s["drafted"]
    assert found["recommendation"].keys() >= {"draft", "k", "speedup", "reason"}
    assert found["environment"]["target"]["weight_bytes"] > 0
    assert found["baseline"]["roofline"]["share_of_bandwidth"] > 0


def test_forms_of_the_weights_are_arms_each_against_its_own_plain_decoding(bench, tmp_path):
    out = tmp_path / "r.json"
    found = record(
        bench("--dtype", "bfloat16", "--quantize", "none,int8", "-d", "ngram", "--out", out, "--format", "json")
    )
    assert [arm["quantize"] for arm in found["arms"]] == ["none", "int8"]
    assert {s["quantize"] for s in found["baseline"]["samples"]} == {"none", "int8"}
    assert len(found["baseline"]["samples"]) == 4
    assert found["baseline"]["by_weights"].keys() == {"none", "int8"}
    assert found["environment"]["by_weights"]["int8"]["weights"] == "int8"
    for arm in found["arms"]:
        assert {s["quantize"] for s in arm["samples"]} == {arm["quantize"]}
        assert arm["compared"] == 2
    again = bench(
        "--dtype",
        "bfloat16",
        "--quantize",
        "none,int8",
        "-d",
        "ngram",
        "--out",
        out,
        "--resume",
        "--plot",
        tmp_path / "p.svg",
    )
    assert "nothing is left to run" in again.err
    assert "ngram (int8)" in again.out
    assert "plain decoding by weights" in again.out


def test_one_prompt_has_no_interval_and_the_record_is_json_all_the_same(bench, tmp_path):
    result = bench("--limit", "1", "--format", "json")
    found = json.loads(result.out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert found["arms"][0]["speedup_low"] is None
    assert found["recommendation"]["reason"].startswith("too few prompts")
    out = tmp_path / "r.json"
    assert "nan" not in bench("--limit", "1", "--out", out, "--plot", tmp_path / "p.svg").out
    assert "now" in bench("--limit", "1", "--compare", out).err


def test_an_interrupted_benchmark_goes_on(bench, tmp_path):
    out = tmp_path / "r.json"
    whole = record(bench("--out", out, "--format", "json"))
    cut = json.loads(out.read_text())
    cut["arms"][0]["samples"] = cut["arms"][0]["samples"][:1]
    kept = cut["baseline"]["samples"]
    out.write_text(json.dumps(cut))
    again = record(bench("--out", out, "--resume", "--format", "json"))
    assert again["baseline"]["samples"] == kept
    assert len(again["arms"][0]["samples"]) == len(whole["arms"][0]["samples"])
    other = bench("--out", out, "--resume", "-n", "13")
    assert other.code == 2
    assert "other arms, prompts or settings" in other.err
    busy = json.loads(out.read_text())
    busy["environment"]["threads"] += 1
    out.write_text(json.dumps(busy))
    assert "threads, and it is" in bench("--out", out, "--resume").err
    assert "part of the change is theirs" in bench("--compare", out).err


def test_a_rule_that_accepts_too_much_is_found_out(bench, draft_checkpoint, monkeypatch):
    monkeypatch.setattr(TokenRule, "thresholds", lambda self, case: case.p_drafted * 0 + 1)
    result = bench("-d", draft_checkpoint)
    assert result.code == 6
    assert "bug" in result.out
    assert "not by rounding" in result.err


def test_counters_that_are_wrong_are_found_out(bench, draft_checkpoint, monkeypatch):
    right = loop.cycle_told

    def wrong(*given):
        cycle = right(*given)
        return replace(cycle, accepted=min(len(cycle.drafted), cycle.accepted + 1))

    monkeypatch.setattr(loop, "cycle_told", wrong)
    result = bench("-d", draft_checkpoint)
    assert result.code == 6
    assert "says 1 of 2 accepted" in result.err


def test_a_threshold_that_is_missed_exits_with_6(bench):
    assert bench("--fail-below", "1000").code == 6
    assert bench("--fail-below", "0").code == 0


def test_a_chosen_acceptance_is_called_not_lossless_everywhere(bench, draft_checkpoint):
    found = record(bench("-d", draft_checkpoint, "--synthetic-acceptance", "1", "--format", "json"))
    assert found["lossless"] is False
    assert found["arms"][0]["rule"] == "synthetic"
    assert found["arms"][0]["alpha"] == 1
    assert found["arms"][0]["compared"] is None
    assert "NOT LOSSLESS" in bench("-d", draft_checkpoint, "--synthetic-acceptance", "0.5").out


def test_tables_for_people_and_for_programs(bench, tmp_path):
    assert "→" in bench().out
    assert bench("--format", "md").out.startswith("| draft | k |")
    [row] = csv.DictReader(io.StringIO(made := bench("--format", "csv").out))
    assert (list(row)[:3], row["k"]) == (["draft", "k", "temperature"], "2")
    assert all(char == "\n" or char.isprintable() for char in made)
    assert json.loads(bench("--format", "jsonl").out.splitlines()[0])["k"] == 2
    plot = tmp_path / "p.svg"
    assert bench("-k", "1,2,auto", "--plot", plot).code == 0
    assert ElementTree.parse(plot).getroot().tag.endswith("svg")


def test_two_records_are_compared(bench, tmp_path):
    out = tmp_path / "r.json"
    bench("--out", out)
    assert "before" in bench("--compare", out).err


def test_a_prompt_that_fills_the_context_is_left_out_and_said(bench, tmp_path):
    file = tmp_path / "q.txt"
    file.write_text("the light " * 3000 + "\nthe night\n")
    result = bench("--prompts", file, "--format", "json")
    assert "prompt 0 is left out" in result.err
    assert {s["question"] for s in json.loads(result.out)["baseline"]["samples"]} == {1}


def test_an_arm_out_of_memory_costs_that_arm_alone(bench, draft_checkpoint, monkeypatch):
    """Once while its draft is loaded, once in the middle of a run."""
    loads = Loader.pair

    def short(self, draft=None):
        if draft == "suffix":
            raise OutOfMemory("suffix needs 3 GiB, and 1 GiB are free", "choose a smaller one")
        return loads(self, draft)

    monkeypatch.setattr(Loader, "pair", short)
    result = bench("-d", "suffix", "-d", "ngram", "--format", "json")
    assert {arm["draft"] for arm in record(result)["arms"]} == {"ngram"}
    assert "the draft suffix is left out: suffix needs 3 GiB" in result.err
    assert bench("-d", "suffix").code == 5

    proposes = NgramDrafter.propose

    def broken(self, context, k, sampling, random):
        if k == 3:
            raise MemoryError("no more")
        return proposes(self, context, k, sampling, random)

    monkeypatch.setattr(NgramDrafter, "propose", broken)
    result = bench("-d", "ngram", "-k", "2,3", "--format", "json")
    assert [arm["k"] for arm in record(result)["arms"]] == [2]
    assert "k 3 · T 0 is left out: out of memory" in result.err


def test_a_disk_that_fills_up_costs_the_file_alone(bench, tmp_path, monkeypatch):
    writes, out = report.write, tmp_path / "r.json"

    def full(path, found):
        if found["baseline"]["samples"]:
            raise UsageError(f"{path} cannot be written: No space left on device", "choose another --out")
        writes(path, found)

    monkeypatch.setattr(report, "write", full)
    result = bench("--out", out)
    assert result.code == 1
    assert "vs plain" in result.out
    assert result.err.count("the runs go on") == 1
    assert "error: " in result.err
    assert bench("--out", tmp_path / "nowhere" / "r.json").code == 2


def test_conversations_have_all_their_turns(bench, tmp_path):
    file = tmp_path / "q.jsonl"
    file.write_text('{"category": "x", "turns": ["the light", "and the night"]}\n')
    found = record(bench("--prompts", file, "--format", "json"))
    assert found["baseline"]["samples"][0]["emitted"] == 24


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("-k", "x"), "neither a number"),
        (("-k", "0"), "plain decoding"),
        (("--temperature", "warm"), "warm"),
        (("--rule", "coin"), "coin"),
        (("--rule", "synthetic"), "synthetic"),
        (("--plot", "p.docx"), "p.docx"),
        (("--quantize", "auto,int3"), "int3"),
        (("--resume",), "--out"),
        (("-d", "none"), "-d none is plain decoding"),
        (("--context", "512,long"), "--context 512,long is no list of lengths"),
        (("--context", "0"), "--context 0 is no list"),
        (("--context", "100000"), "context ends"),
        (("--context", "512", "--attach", "x:1"), "--context"),
        (("--categories", "nothing"), "nothing"),
        (("--prompts", "nowhere.jsonl"), "in nowhere.jsonl cannot be read: No such file or directory"),
        (("--compare", "nowhere.json"), "nowhere.json"),
    ],
)
def test_bad_input_is_one_line(bench, options, said):
    result = bench(*options)
    assert result.code == 2
    assert said in result.err.splitlines()[0]


def test_check_says_that_two_models_fit_and_why(specdec, checkpoint, draft_checkpoint):
    result = specdec("check", checkpoint, draft_checkpoint)
    assert result.code == 0, result.err
    assert "every id means the same" in result.out
    found = record(specdec("check", checkpoint, draft_checkpoint, "--json"))
    assert found["schema"] == "specdec.check/1"
    assert found["fits"] is True
    assert 0 < found["figures"]["c"][0] <= found["figures"]["c"][1]
    assert specdec("check", checkpoint, "ngram").code == 0
    assert specdec("check", checkpoint, f"ngram,{draft_checkpoint}").code == 0
    assert specdec("check", checkpoint, "self:1").code == 0
    assert specdec("check", checkpoint, "self:99").code == 4


def test_check_shows_other_tokens_and_that_the_draft_fits_by_text(specdec, checkpoint, tmp_path):
    other = fakes.save_checkpoint(tmp_path / "other", seed=2, layers=1, hidden=16)
    file = other / "tokenizer.json"
    content = json.loads(file.read_text())
    vocab = content["model"]["vocab"]
    first, second = list(vocab)[100:102]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    file.write_text(json.dumps(content))
    result = specdec("check", checkpoint, other)
    assert result.code == 0
    assert "2 tokens differ" in result.out
    assert "fits by text" in result.out


def test_info_says_what_there_is(specdec):
    found = record(specdec("info", "--json"))
    assert found["schema"] == "specdec.info/1"
    assert found["packages"]["torch"]
    assert found["devices"][0]["name"] == "cpu"
    assert found["runtime"]["name"] in ("lean", "graph", "generic")
    assert "runtime:" in specdec("info").out


def test_check_lists_what_could_draft_for_a_target(specdec, checkpoint, draft_checkpoint, tmp_path, monkeypatch):
    """Of what is on this machine: by the target's ids, by its text, and not what fits in no way."""
    from specdec_engine.models import offers
    from specdec_engine.models.hub_cache import CachedModel

    other = fakes.save_checkpoint(
        tmp_path / "other", layers=1, hidden=16, tokenizer=fakes.byte_tokenizer(merges=["o n"])
    )
    cached = [CachedModel(str(path), path, 1, "llama", None) for path in (draft_checkpoint, other, tmp_path / "gone")]
    monkeypatch.setattr(offers, "cached_models", lambda: cached)
    found = record(specdec("check", checkpoint, "--json"))["offers"]
    kinds = {offer["draft"]: offer["kind"] for offer in found}
    assert kinds == {
        "ngram": "lookup", "suffix": "lookup", "self:1": "layers", str(draft_checkpoint): "ids", str(other): "text",
    }  # fmt: skip
    shown = specdec("check", checkpoint)
    assert shown.code == 0
    assert "fits by its text" in shown.out
    assert specdec("check", checkpoint, "--deep").code == 2


def test_check_measures_a_draft_on_three_prompts(specdec, checkpoint, draft_checkpoint):
    measured = record(specdec("check", checkpoint, draft_checkpoint, "--deep", "--json"))["measured"]
    assert 0 <= measured["alpha"] <= 1
    assert measured["c"] > 0
    assert measured["tokens"] > 100
    assert "of its first tokens are accepted" in specdec("check", checkpoint, draft_checkpoint, "--deep").out


def test_check_reads_a_head_that_does_not_say_its_layers_in_both_ways(specdec, tmp_path):
    """A wrong layer fails nowhere: it drafts badly."""
    tokenizer = fakes.byte_tokenizer()
    shape = {"layers": 8, "vocab": len(tokenizer)}
    target = fakes.save_checkpoint(tmp_path / "t", endless=True, **shape)
    head = fakes.save_eagle_head(tmp_path / "h", fakes.tiny_llama(**shape), len(tokenizer), says=False)
    found = record(specdec("check", target, head, "--deep", "--json"))
    assert found["measured_by_index"]["layer_ids"] == [3, 5, 6]
    assert found["measured_by_index"]["tokens"] == found["measured"]["tokens"]
    assert "read as the layers 2, 4, 5" in specdec("check", target, head, "--deep").out
    said = fakes.save_eagle_head(tmp_path / "said", fakes.tiny_llama(**shape), len(tokenizer))
    assert "measured_by_index" not in record(specdec("check", target, said, "--deep", "--json"))


def test_what_check_says_of_two_levels_and_of_several_is_what_generate_does(
    specdec, checkpoint, draft_checkpoint, tmp_path
):
    other = fakes.save_checkpoint(
        tmp_path / "other", layers=1, hidden=16, tokenizer=fakes.byte_tokenizer(merges=["o n"])
    )
    parallel = shutil.copytree(draft_checkpoint, tmp_path / "pard")
    about = json.loads((parallel / "config.json").read_text())
    (parallel / "config.json").write_text(json.dumps(about | {"pard_token": 3}))
    assert "a whole draft takes one of its passes" in specdec("check", checkpoint, parallel).out
    assert specdec("generate", "-t", checkpoint, "-d", parallel, "--max-tokens", "8", "hello").code == 0
    for draft in (f"ngram+{draft_checkpoint}", "ngram+self:1"):
        assert specdec("check", checkpoint, draft).code == 0, draft
        assert specdec("generate", "-t", checkpoint, "-d", draft, "--max-tokens", "8", "hello").code == 0, draft
    for draft in (f"suffix+{draft_checkpoint}", "ngram+ngram", "ngram+none", f"ngram+{other}", f"ngram+{parallel}"):
        assert specdec("check", checkpoint, draft).code == 4, draft
        assert specdec("generate", "-t", checkpoint, "-d", draft, "--max-tokens", "8", "hello").code == 2, draft
    several = specdec("check", checkpoint, f"ngram,{draft_checkpoint}", "--deep")
    assert several.code == 2
    assert "measures one draft" in several.err
    (parallel / "config.json").write_text(json.dumps(about | {"pard_token": 10**6}))
    assert "pard_token = 1000000" in specdec("check", checkpoint, parallel).err


def test_a_head_of_which_next_to_nothing_is_accepted_is_said_not_to_fit():
    from types import SimpleNamespace

    from specdec_cli.commands.generate import _misfit
    from specdec_engine.record.stats import Position

    def said(tested, accepted, name="h", kind="eagle3"):
        pair = SimpleNamespace(environment={"drafts": {"h": {"model_type": kind}}}, drafter=SimpleNamespace(name=name))
        return _misfit(pair, SimpleNamespace(positions=(Position(tested, tested, accepted),)))

    assert "8% of the first tokens of 60 drafts" in said(60, 5)
    assert said(40, 0) is said(60, 30) is said(60, 5, "ngram,h") is said(60, 5, kind="llama") is None


def test_a_schema_makes_each_arm_twice_each_against_plain_decoding_of_its_kind(bench, tmp_path):
    out = tmp_path / "r.json"
    schema = '{"type": "array", "items": {"enum": ["the light", "night"]}, "minItems": 3, "maxItems": 3}'
    result = bench("--json-schema", schema, "-k", "3", "--out", out)
    assert result.code == 0, result.err
    found = json.loads(out.read_text())
    assert [arm["structured"] for arm in found["arms"]] == [False, True]
    free, structured = found["arms"]
    assert (free["forced"], structured["forced"] > 0) == (0, True)
    assert structured["identical"] == structured["compared"] > 0
    assert found["baseline"]["structured"] > 0
    assert len([s for s in found["baseline"]["samples"] if s["structured"]]) == len(structured["samples"])
    assert "(structured)" in result.out
    assert "it forced" in result.out
    again = bench("--json-schema", schema, "-k", "3", "--out", out, "--resume")
    assert "nothing is left to run" in again.err
    other = bench("--json-schema", '{"enum": [1]}', "-k", "3", "--out", out, "--resume")
    assert other.code == 2
    assert bench("--json-schema", "{").code == 2


def test_prompts_are_lengthened_and_each_length_is_held_against_its_own_plain_decoding(bench, tmp_path):
    out, asked = tmp_path / "r.json", tmp_path / "q.txt"
    asked.write_text("the light in the night\n\non and on\n\na house\n")
    how = ("-d", "ngram", "--prompts", asked, "-n", "6")
    result = bench("--context", "150,90", "--out", out, *how)
    assert result.code == 0, result.err
    found = json.loads(out.read_text())
    assert [arm["context"] for arm in found["arms"]] == [150, 90]
    assert all(arm["identical"] == arm["compared"] == 2 and arm["prefill_s"] > 0 for arm in found["arms"])
    assert found["baseline"]["by_context"].keys() == {"150", "90"}
    assert {s["context"] for s in found["baseline"]["samples"]} == {150, 90}
    assert "plain decoding after 150 tokens: read in" in result.out
    assert "(context 90)" in result.out
    assert "nothing is left to run" in bench("--context", "150,90", "--out", out, "--resume", *how).err
    assert bench("--context", "90", "--out", out, "--resume", *how).code == 2
    short = bench("--context", "9,90", "--format", "json", *how)
    assert "prompt 0 at 9 tokens is left out: it has" in short.err
    assert {s["context"] for s in json.loads(short.out)["baseline"]["samples"]} == {90}
    none = bench("--context", "9", *how)
    assert (none.code, "no prompt could be run" in none.err) == (2, True)


@pytest.mark.parametrize("question", [Question("a", ("the light",)), Question("a", ("x",), ids=(1, 2, 3))])
def test_a_lengthened_prompt_has_the_tokens_that_were_asked_for(checkpoint, question):
    pair = load_pair(str(checkpoint), "none", LoadOptions(dtype="float32"))
    others = [Question("b", ("a night in the inn", "on")), Question("c", ("ten",))]
    for tokens in range(40, 200, 7):
        made = lengthened(pair, question, others, tokens)
        assert len(made.ids or pair.encode(made.turns[0])) == tokens
        assert made.turns[0].endswith(question.turns[0])
    own = len(question.ids or pair.encode(question.turns[0]))
    for more in range(3):  # no room for anything before it
        assert (
            len((made := lengthened(pair, question, others, own + more)).ids or pair.encode(made.turns[0]))
            <= own + more
        )
    with pytest.raises(UsageError, match=f"it has {own} tokens already"):
        lengthened(pair, question, others, own - 1)
