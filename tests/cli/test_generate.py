"""`specdec generate` on real checkpoints from disk: what it prints, where, and how it ends."""

from __future__ import annotations

import json
from contextlib import contextmanager
from itertools import pairwise
from time import monotonic

import pytest
import torch

from specdec_cli import output
from specdec_engine.record.events import Logprob, Started, TokenLogprobs
from specdec_engine.record.trace import from_json, read_trace
from specdec_engine.system.threads import free_threads
from tests.fakes import cycles, emitted

KEYS = {
    "schema",
    "text",
    "finish_reason",
    "prompt_tokens",
    "emitted",
    "cycles",
    "drafted",
    "accepted",
    "acceptance_rate",
    "alpha",
    "mean_emitted_per_cycle",
    "tokens_per_second",
    "draft_s",
    "verify_s",
    "other_s",
    "seed",
    "settings",
    "token_ids",
    "environment",
}


@pytest.fixture
def generate(specdec, checkpoint):
    return lambda *argv: specdec("generate", "the light in the night", "-t", checkpoint, "--dtype", "float32", *argv)


def answer(result):
    assert result.code == 0, result.err
    return json.loads(result.out)


def test_json_has_the_contracts_keys_and_adds_up(generate, checkpoint):
    record = answer(generate("--json", "-n", "20", "--seed", "5"))
    assert record.keys() >= KEYS
    assert record["schema"] == "specdec.generate/1"
    assert record["emitted"] == len(record["token_ids"]) == 20
    assert record["finish_reason"] == "length"
    assert record["settings"]["target"] == str(checkpoint)
    assert record["settings"]["draft"] == "ngram"
    assert record["environment"]["dtype"] == "float32"
    assert record["seed"] == 5


def test_a_model_draft_from_disk_gives_the_plain_tokens(generate, draft_checkpoint, checkpoint):
    """Greedy, float32: no draft, a lookup, a small model, the target itself, and cascades say the same."""
    plain = answer(generate("--json", "-n", "40", "-d", "none"))
    assert plain["drafted"] == 0
    for draft in ("ngram", "ngram:5", draft_checkpoint, checkpoint, f"ngram,{draft_checkpoint}"):
        for k in (1, 4, 7):
            assert answer(generate("--json", "-n", "40", "-d", draft, "-k", k))["token_ids"] == plain["token_ids"]


def test_sampling_repeats_under_its_printed_seed(generate, draft_checkpoint):
    # k as given: `-k auto` follows measured times, and what is drawn follows k.
    options = ("--json", "-n", "30", "--temperature", "0.9", "--top-p", "0.95", "-d", draft_checkpoint, "-k", "3")
    first = answer(generate(*options))
    assert answer(generate(*options, "--seed", first["seed"]))["token_ids"] == first["token_ids"]
    assert answer(generate(*options))["seed"] != first["seed"]


def test_text_streams_to_stdout_and_words_to_stderr(generate):
    text = answer(generate("--json", "-n", "25"))["text"]
    result = generate("-n", "25")
    assert result.out == text
    assert result.err.count("\n") == 1
    for word in (
        "tok/s",
        "emitted per cycle",
        "accepted",
        "seed",
        "speculation on: ngram as none was named, k auto",
        "lean",
    ):
        assert word in result.err
    assert generate("-n", "25", "--no-stats").err == ""


@pytest.mark.parametrize(
    ("options", "why"), [(["-k", "0"], "because k is 0"), (["-d", "none"], "because the draft is none")]
)
def test_speculation_that_is_off_says_why(generate, options, why):
    assert f"speculation off {why}" in generate("-n", "3", *options).err


def test_jsonl_is_the_trace_as_it_happens(generate, tmp_path):
    trace = tmp_path / "t.jsonl"
    result = generate("--jsonl", "-n", "15", "--trace", trace)
    found = [from_json(json.loads(line)) for line in result.out.splitlines()]
    assert found == list(read_trace(trace))
    assert len(emitted(found)) == 15
    kinds = [event.kind for event in found if event.kind != "setting_changed"]
    assert kinds == ["started"] + ["cycle"] * len(cycles(found)) + ["finished"]


def test_a_second_run_is_appended_to_the_trace(generate, tmp_path):
    for _ in range(2):
        assert generate("-n", "3", "--trace", tmp_path / "t").code == 0
    assert [e.kind for e in read_trace(tmp_path / "t")].count("started") == 2


def test_a_stop_string_ends_the_text_before_it(generate):
    text = answer(generate("--json", "-n", "40"))["text"]
    stop = text[10:13]
    cut = answer(generate("--json", "-n", "40", "--stop", stop))
    assert cut["text"] == text[: text.index(stop)]
    assert cut["finish_reason"] == "stop"
    assert generate("-n", "40", "--stop", stop).out == cut["text"]


def test_all_eos_ids_stop(specdec, tmp_path):
    """A checkpoint whose generation config has a list: whichever comes first ends the run, and is emitted."""
    from tests.fakes import byte_tokenizer, tiny_llama

    model = tiny_llama(seed=8)
    byte_tokenizer().save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    options = ("generate", "the night", "-t", tmp_path, "--dtype", "float32", "--json", "-n", "30")
    ids = answer(specdec(*options))["token_ids"]
    model.generation_config.eos_token_id = [1, ids[9], ids[6]]
    model.save_pretrained(tmp_path)
    first = min(ids.index(ids[9]), ids.index(ids[6]))
    record = answer(specdec(*options))
    assert (record["token_ids"], record["finish_reason"]) == (ids[: first + 1], "stop")


def test_chat_is_the_default_where_there_is_a_template(generate, specdec, checkpoint):
    chat, raw = answer(generate("--json", "-n", "1")), answer(generate("--json", "-n", "1", "--raw"))
    assert chat["prompt_tokens"] > raw["prompt_tokens"]
    assert answer(generate("--json", "-n", "1", "--chat"))["prompt_tokens"] == chat["prompt_tokens"]
    assert answer(generate("--json", "-n", "1", "--system", "Be brief."))["prompt_tokens"] > chat["prompt_tokens"]


def test_colour_says_where_tokens_came_from_and_marks_say_it_without(generate, checkpoint):
    """The target as its own draft: accepted tokens and bonuses. Nothing but styling is added."""
    plain = generate("-n", "11", "-d", checkpoint, "-k", "4").out
    coloured = generate("-n", "11", "-d", checkpoint, "-k", "4", "--color", "always").out
    assert "\x1b[38;2;86;180;233m" in coloured  # accepted, sky blue
    assert "\x1b[1;38;2;204;121;167m" in coloured  # bonus, bold purple
    marked = generate("-n", "11", "-d", checkpoint, "-k", "4", "--marks").out
    assert "+" in marked
    assert len(marked) > len(plain)


def test_no_color_is_honoured(generate, checkpoint, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    assert "38;2;" not in generate("-n", "11", "-d", checkpoint, "--color", "always").out


def test_hostile_text_is_made_visible_when_styled(specdec, tmp_path):
    """A model that answers with an escape sequence, markup and a bidi override: none of it steers the terminal."""
    import torch

    from tests.fakes import byte_tokenizer, tiny_llama

    tokenizer = byte_tokenizer(merges=[])
    hostile = "\x1b2J[/red]\u202e\x9b31m"
    ids = [*tokenizer(hostile)["input_ids"], 1]
    model = tiny_llama(hidden=512, layers=1, vocab=600)
    follow = {0: ids[0], **dict(pairwise(ids))}
    assert len(set(ids)) == len(ids), "each token decides the next"
    with (
        torch.no_grad()
    ):  # embeddings are unit vectors, attention and MLP add nothing, the head maps each token to the next
        for name, weight in model.named_parameters():
            weight.copy_(
                torch.eye(600, 512)
                if "embed" in name
                else torch.ones_like(weight)
                if "norm" in name
                else torch.zeros_like(weight)
            )
        for token, after in follow.items():
            model.lm_head.weight[after, token] = 1.0
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    start = tokenizer.decode([0])
    options = ("generate", start, "--raw", "-t", tmp_path, "--dtype", "float32", "-d", "none", "-n", "40", "--no-stats")
    assert specdec(*options).out == hostile  # a pipe gets what the model said
    shown = specdec(*options, "--color", "always").out
    assert "␛2J[/red]··31m" in shown
    assert "\x1b2J" not in shown
    assert "\u202e" not in shown
    assert "\x9b" not in shown


@pytest.mark.parametrize("piece", ["\r", "\rspoof", "\x85x", "\x1cx", "\u2028", " \x0b", "\x1b[31m"])
def test_control_characters_that_count_as_space_are_made_visible_too(piece, capsys):
    """`str.lstrip` takes carriage returns and separators for space; the terminal does not."""
    from specdec_cli.output import TextOutput
    from specdec_engine.record.text import TextStream, printable
    from tests.fakes import byte_tokenizer

    tokenizer = byte_tokenizer()
    shown = TextOutput(TextStream(tokenizer), "always", marks=False)
    for token in tokenizer(piece)["input_ids"]:
        shown._write(shown._stream.feed(token))
    assert capsys.readouterr().out == printable(piece)


def test_tabs_stay_tabs(capsys):
    from specdec_cli.output import TextOutput
    from specdec_engine.record.text import TextStream
    from tests.fakes import byte_tokenizer

    TextOutput(TextStream(byte_tokenizer()), "always", marks=False)._write("a\tb")
    assert capsys.readouterr().out == "a\tb"


def test_a_device_map_gives_the_same_tokens(generate):
    """With one CPU there is nothing to spread, which is what the environment then says."""
    spread = answer(generate("--json", "-n", "12", "--device-map", "auto"))
    assert spread["token_ids"] == answer(generate("--json", "-n", "12"))["token_ids"]
    assert spread["environment"]["device_map"] is False


def test_the_runtime_can_be_named_and_says_why(generate):
    """The text is the same; -v says what was taken, and why not the faster one."""
    lean, generic = (generate("--json", "-n", "12", "--runtime", name, "-v") for name in ("auto", "generic"))
    assert answer(lean)["environment"]["runtime"] == "lean"
    assert answer(generic)["environment"]["runtime"] == "generic"
    assert answer(lean)["token_ids"] == answer(generic)["token_ids"]
    assert "runs on the lean runtime, float32 weights\n" in lean.err
    assert "runs on the generic runtime, float32 weights, because --runtime generic was asked for" in generic.err


def test_weights_can_be_packed(specdec, checkpoint, draft_checkpoint):
    arguments = ("generate", "hi", "-t", checkpoint, "-d", draft_checkpoint, "-n", "4", "--json")
    packed = answer(specdec(*arguments, "--quantize", "int8", "--draft-quantize", "int8", "--threads", "1"))
    made = packed["environment"]
    assert (made["weights"], made["threads"]) == ("int8", 1)
    assert [draft["weights"] for draft in made["drafts"].values()] == ["int8"]


def test_fewer_threads_than_cores_are_told(generate, monkeypatch):
    for name in ("system.threads", "conditions"):
        monkeypatch.setattr(f"specdec_engine.{name}.usable_cores", lambda: 4)
    before = torch.get_num_threads()
    for room, said in ((2, "on cpu, 2 of 4 threads, lean runtime"), (4, "on cpu, lean runtime")):
        free_threads.cache_clear()
        monkeypatch.setattr("specdec_engine.system.threads.keep_step", lambda n, room=room: n <= room)
        assert said in generate("-n", "3").err
    free_threads.cache_clear()
    torch.set_num_threads(before)


def test_more_threads_than_cores_are_told(generate, monkeypatch):
    monkeypatch.setattr("specdec_engine.conditions.usable_cores", lambda: 1)
    before = torch.get_num_threads()
    assert "2 threads on 1 cores wait for each other" in generate("-n", "3", "--threads", "2").err
    torch.set_num_threads(before)


@pytest.mark.parametrize("live", [False, True])
def test_while_a_long_prompt_is_read_a_line_says_so(capsys, monkeypatch, live):
    monkeypatch.setattr(output, "live", lambda: live)
    monkeypatch.setattr(output, "Cycle", int)
    monkeypatch.setattr(output, "Started", tuple)
    for events in ([("started",), 1, 2, "finished"], [("started",), "failed"]):
        assert list(output.reading(iter(events), 5143)) == events
    assert live or capsys.readouterr().err == 2 * "specdec: reading the prompt, 5,143 tokens\n"
    assert list(output.reading(iter([("started",), 1]), 40)) == [("started",), 1]
    assert [str(event) for event in output.reading(iter(["refused"]), 5143)] == ["refused"]
    assert "reading" not in capsys.readouterr().err.replace("reading the prompt, 5,143 tokens", "")


def test_how_much_of_a_long_prompt_is_read_is_told(monkeypatch):
    shown, read = [], 0

    @contextmanager
    def spinner(text):
        shown.append(output._Doing(text, text, monotonic()))
        yield shown[0]

    def events():
        nonlocal read
        for tokens in (-3, 512, 9000):
            read = tokens
            yield str(shown[0].__rich__())
        yield 1  # a cycle

    monkeypatch.setattr(output, "live", lambda: True)
    monkeypatch.setattr(output, "_spinner", spinner)
    monkeypatch.setattr(output, "Cycle", int)
    *said, _ = output.reading(events(), 5143, lambda: read)
    assert [line.partition(" tokens")[0] for line in said] == [
        f"reading the prompt, {n} of 5,143" for n in ("0", "512", "5,143")
    ]


def test_version_and_bare_command(specdec):
    assert specdec("--version").out.startswith("specdec ")
    assert "generate" in specdec().out


@pytest.mark.parametrize(("option", "value"), [("-k", "many"), ("-k", "-1"), ("--draft-temperature", "-1")])
def test_values_of_the_draft_are_refused_before_a_model_is_loaded(generate, option, value):
    result = generate(option, value, "--target", "nowhere")
    assert result.code == 2
    assert value in result.err


@pytest.mark.parametrize("draft", ["suffix", "self:1", "suffix,self:1", "ngram"])
def test_every_draft_gives_the_same_greedy_text(generate, draft):
    plain = generate("-d", "none", "-n", "40").out
    assert generate("-d", draft, "-n", "40").out == plain


def test_a_coupled_seed_gives_one_text(generate):
    """With any draft and any k, the block rule and a sharper draft."""
    options = ["--temperature", "0.9", "--coupling", "gumbel", "--seed", "5", "-n", "40"]
    plain = generate("-d", "none", *options).out
    for more in (
        ["-k", "3"],
        ["-d", "self:1"],
        ["-d", "self:1", "-k", "2", "--rule", "block"],
        ["--draft-temperature", "0.5"],
    ):
        assert generate(*options, *more).out == plain
    assert generate("-d", "none", *options[:-3], "6", "-n", "40").out != plain


def test_a_draft_that_does_not_pay_is_switched_off_and_says_so(generate):
    """The target's own first layer of two costs half a pass, and is random."""
    result = generate("-d", "self:1", "-n", "120", "--jsonl")
    events = [json.loads(line) for line in result.out.splitlines()]
    reasons = [e["reason"] for e in events if e["kind"] == "setting_changed"]
    assert any("self:1 does not pay" in reason for reason in reasons)
    ks = [e["k"] for e in events if e["kind"] == "cycle"]
    assert ks.count(0) > len(ks) / 2


def test_what_is_loaded_is_not_searched_for_garbage_then_or_later():
    import gc

    from specdec_cli.startup import uncollected

    before = gc.get_freeze_count()
    try:
        with uncollected():
            assert not gc.isenabled()
        assert gc.get_freeze_count() > before
        with pytest.raises(ValueError, match="broken"), uncollected():
            raise ValueError("broken")
        assert gc.isenabled()
    finally:
        gc.unfreeze()


SCHEMA = '{"type": "array", "items": {"enum": ["the light", "night"]}, "minItems": 2, "maxItems": 2}'


def test_structured_output_is_what_was_asked_for_and_counts_free_tokens(specdec, checkpoint, tmp_path):
    (tmp_path / "schema.json").write_text(SCHEMA)
    (tmp_path / "rules").write_text('root ::= "yes" | "no"')
    typed = ("generate", "hello", "-t", checkpoint, "--no-stats")
    for option, value in (("--json-schema", SCHEMA), ("--json-schema", tmp_path / "schema.json")):
        found = json.loads(specdec(*typed, option, value, "--temperature", "1").out)
        assert len(found) == 2
        assert set(found) <= {"the light", "night"}
    assert specdec(*typed, "--regex", "[0-9]{3}").out.isdigit()
    assert specdec(*typed, "--grammar", tmp_path / "rules").out in ("yes", "no")
    told = json.loads(specdec(*typed, "--json-schema", SCHEMA, "--json").out)
    assert told["forced"] > 0
    assert told["settings"]["grammar"]["kind"] == "json_schema"
    cut = specdec("generate", "hello", "-t", checkpoint, "--json-schema", SCHEMA, "-n", "2")
    assert (cut.code, "cut, and so not whole" in cut.err) == (0, True)
    assert "forced by the grammar" in specdec("generate", "hello", "-t", checkpoint, "--json-schema", SCHEMA).err


@pytest.mark.parametrize(
    "options",
    [
        ("--json-schema", "{"),
        ("--json-schema", "nowhere.json"),
        ("--json-schema", '{"type": "nope"}'),
        ("--regex", "("),
        ("--regex", "a", "--json-schema", "{}"),
        ("--grammar", "nowhere"),
        ("--regex", "a", "--attach", "x:1"),
    ],
)
def test_what_no_answer_can_follow_is_refused_before_a_model_is_loaded(specdec, options):
    result = specdec("generate", "hello", "-t", "nowhere/at-all", *options)
    assert result.code == 2
    assert "Traceback" not in result.err


def test_without_the_extra_it_says_what_to_install(specdec, checkpoint, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "llguidance", None)
    result = specdec("generate", "hello", "-t", checkpoint, "--regex", "a")
    assert (result.code, "specdec-cli[structured]" in result.err) == (2, True)


@pytest.mark.parametrize(
    "options",
    [
        ("--repetition-penalty", "0"),
        ("--logit-bias", "x"),
        ("--logit-bias", "99999999=1"),
        ("--presence-penalty", "nan"),
        ("--min-tokens", "-1"),
        ("--regex", "a", "--ignore-eos"),
        ("--attach", "x:1", "--min-tokens", "3"),
    ],
)
def test_penalties_out_of_bounds_are_refused(specdec, checkpoint, options):
    result = specdec("generate", "hello", "-t", checkpoint, *options)
    assert (result.code, "Traceback" in result.err) == (2, False)


def test_penalties_are_in_the_settings_and_a_batch_has_them(specdec, checkpoint, tmp_path):
    file = tmp_path / "p.txt"
    file.write_text("hello\nand then\n")
    options = (
        "--repetition-penalty",
        "1.4",
        "--logit-bias",
        "9=3",
        "--min-tokens",
        "7",
        "-n",
        "9",
        "--dtype",
        "float32",
    )
    one = json.loads(specdec("generate", "hello", "-t", checkpoint, "--json", *options).out)
    named = one["settings"]["generation_config"]
    assert {"repetition_penalty": 1.4, "logit_bias": [[9, 3.0]], "min_new_tokens": 7}.items() <= named.items()
    lines = specdec("generate", "-t", checkpoint, "--prompts", file, "--batch", "2", *options).out.splitlines()
    assert next(json.loads(line) for line in lines if json.loads(line)["index"] == 0)["token_ids"] == one["token_ids"]


def test_several_answers_are_those_of_their_seeds_and_the_prompt_is_read_once(generate, tmp_path):
    options = ("--temperature", "1", "-n", "6", "-k", "2")
    alone = [json.loads(generate(*options, "--seed", str(seed), "--json").out) for seed in (5, 6, 7)]
    trace = tmp_path / "t.jsonl"
    found = json.loads(generate(*options, "--seed", "5", "--samples", "3", "--json", "--trace", trace).out)
    assert found["schema"] == "specdec.samples/1"
    assert [one["text"] for one in found["samples"]] == [one["text"] for one in alone]
    assert [one["cached_tokens"] for one in found["samples"]][1:] == [found["samples"][0]["prompt_tokens"] - 1] * 2
    assert sum(isinstance(event, Started) for event in read_trace(trace)) == 3
    plain = generate(*options, "--seed", "5", "--samples", "3")
    assert plain.out == "\n---\n".join(one["text"] for one in alone)
    assert plain.err.count("tok/s") == 3


def test_a_part_of_a_character_is_told_by_its_bytes():
    told = [TokenLogprobs(Logprob(i, -1.0, None), ()) for i in range(3)]
    found = output.told_logprobs(told, ["light", "\udcf0\udc9f", "\ud83d"].__getitem__)
    assert [one["text"] for one in found] == ["light", "\ufffd", "?"]
    assert [one.get("bytes") for one in found] == [None, [0xF0, 0x9F], None]
    assert json.dumps(found, ensure_ascii=False).encode()


def test_json_tells_how_likely_tokens_were_before_and_after_warping(generate):
    found = json.loads(generate("-n", "4", "--json", "--logprobs", "2").out)
    assert [one["id"] for one in found["logprobs"]] == found["token_ids"]
    for one in found["logprobs"]:
        assert one["warped_logprob"] == 0.0  # greedy: all mass is on it
        assert one["logprob"] < 0.0
        likeliest, second = one["likeliest"]
        assert likeliest == {key: value for key, value in one.items() if key != "likeliest"}
        assert second["warped_logprob"] is None
    assert "logprobs" not in json.loads(generate("-n", "4", "--json").out)


@pytest.mark.parametrize(
    ("typed", "why"),
    [
        ((), ""),
        (("--rule", "block"), "the block rule"),
        (("--regex", "[a-z ]*"), "a grammar"),
        (("--logit-bias", "5=1", "--rule", "block"), "the block rule and logit bias"),
    ],
)
def test_trees_that_are_verified_as_chains_are_told(generate, specdec, checkpoint, tmp_path, typed, why):
    prompts = tmp_path / "p.txt"
    prompts.write_text("hi")
    words = ("-d", "tree:ngram,suffix", "-n", "3", *typed)
    for said in (generate(*words).err, specdec("generate", "--prompts", prompts, "-t", checkpoint, *words).err):
        assert ("the first path alone is verified" in said) == bool(why)
        assert (f"verified, because of {why}" in said) == bool(why)
