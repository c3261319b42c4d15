"""`specdec tune` on real checkpoints from disk, and the profiles that it writes."""

from __future__ import annotations

import json
import shlex
import tomllib

import pytest

from specdec_cli import profiles
from specdec_cli.commands.tune import _fitting
from specdec_engine.core.registry import OURS
from specdec_engine.models import offers
from specdec_engine.models.options import LoadOptions
from specdec_engine.tune import passes


@pytest.fixture(autouse=True)
def config(tmp_path, monkeypatch):
    """Each test's own config file."""
    monkeypatch.setattr(profiles, "path", lambda: tmp_path / "config" / "config.toml")
    return tmp_path / "config" / "config.toml"


@pytest.fixture
def tune(specdec, checkpoint, monkeypatch, tmp_path):
    monkeypatch.setattr(passes, "ROUNDS", 1)
    file = tmp_path / "prompts.txt"
    file.write_text("the light\nthe night\na house\nand then\n" + "the light " * 3000)

    def call(*more):
        given = () if {"--trace", "--text", "--prompts"} & set(more) else ("--prompts", file)
        return specdec("tune", "-t", checkpoint, "-n", "12", "--dtype", "float32", *given, *more)

    return call


def record(result):
    assert result.code == 0, result.err
    return json.loads(result.out)


def test_it_looks_at_each_draft_solves_and_confirms(tune, checkpoint, draft_checkpoint):
    result = tune("-d", draft_checkpoint, "--json")
    found = record(result)
    assert found["schema"] == "specdec.tune/1"
    names = {curve["draft"] for curve in found["drafts"]}
    d = str(draft_checkpoint)
    lookups = {entry.name for entry in OURS if entry.lookup}
    assert names == {d, *lookups, *(f"{lookup},{d}" for lookup in lookups)}
    assert all([p["k"] for p in curve["curve"]] == list(range(1, 17)) for curve in found["drafts"])
    assert found["costs"][d]["pass_s"].keys() == {str(n) for n in range(1, 18)}
    assert found["predicted"]["draft"] == found["drafts"][0]["draft"]
    assert [arm["k"] for arm in found["confirmed"]] == [found["predicted"]["k"], "auto"]
    assert found["recommendation"].keys() >= {"draft", "k", "speedup", "reason"}
    assert found["command"].startswith("specdec generate -t ")
    for launch in found["launches"]:
        assert shlex.split(launch["line"]) == launch["arguments"]
    assert found["answers"] == {"count": 4, "tokens": 48}
    assert "1 of 5 prompts" in result.err
    assert found["environment"]["drafts"].keys() == {d}


def test_tokens_a_cycle_are_foretold_exactly_at_temperature_0(tune, draft_checkpoint):
    """The same prompts, the same greedy text: only the costs can be off."""
    found = record(tune("-d", draft_checkpoint, "--json"))
    assert found["confirmed"][0]["mean_emitted_per_cycle"] == pytest.approx(
        found["predicted"]["mean_emitted_per_cycle"]
    )


@pytest.mark.parametrize(
    ("offered", "taken"),
    [
        ([("ngram", "lookup", None), ("self:2", "layers", (0.3, 0.3))], ["self:2"]),
        (
            [("self:2", "layers", (0.3, 0.3)), ("org/small", "ids", (0.05, 0.2)), ("org/tiny", "ids", (0.01, 0.02))],
            ["org/small", "org/tiny", "ngram+org/small"],
        ),
        ([("org/head", "head", (0.02, 0.02)), ("org/other", "text", (0.1, 0.2))], ["org/head", "org/other"]),
    ],
    ids=["nothing but itself", "models with its tokens", "a head and another tokenizer"],
)
def test_unnamed_it_tries_what_fits_and_a_lookup_below_a_model_that_is_dear(offered, taken, monkeypatch):
    found = [offers.Offer(draft, kind, c, None) for draft, kind, c in offered]
    monkeypatch.setattr(offers, "offers", lambda target, options: found)
    assert _fitting("org/target", LoadOptions()) == taken


def test_for_people_it_ends_with_what_to_type(tune):
    out = tune("-d", "self:1").out
    assert " by k:" in out
    assert "confirmed with k auto" in out
    assert "→ " in out
    assert "specdec generate -t" in out
    assert "[[profiles]]" in out


def test_a_saved_profile_is_taken_up_and_said(tune, specdec, checkpoint, config):
    config.parent.mkdir()
    config.write_text("# mine\n[other]\nx = 1\n")
    found = record(tune("-d", "self:1", "--json", "--save"))
    text = config.read_text()
    assert text.startswith("# mine\n[other]\nx = 1\n")
    assert tomllib.loads(text)["profiles"] == [found["profile"]]
    tune("-d", "self:1", "--save")
    assert len(tomllib.loads(config.read_text())["profiles"]) == 1, "in place of the older one"

    assert found["profile"]["dtype"] == "float32"
    profile = profiles.Profile(str(checkpoint), "ngram", 2, False, {"dtype": "float32"})
    config.write_text("".join(f"{line}\n" for line in profile.lines()))
    run = ("generate", "hello", "-t", checkpoint, "-n", "4", "--dtype", "float32", "--json")
    result = specdec(*run)
    assert "draft ngram, k 2: from the profile for" in result.err
    assert "specdec: k 2: from" in specdec(*run, "-d", "ngram").err
    settings = record(result)["settings"]
    assert (settings["draft"], settings["k"], settings["adaptive"]) == ("ngram", 2, False)
    for typed, expected in (
        (("-k", "3"), ("ngram", 3)),
        (("-d", "suffix"), ("suffix", None)),
        (("-d", "ngram"), ("ngram", 2)),
        (("-d", "suffix", "-k", "1"), ("suffix", 1)),
        (("--temperature", "1"), ("ngram", None)),
        (("--runtime", "generic"), ("ngram", None)),
    ):
        found = record(specdec(*run, *typed))["settings"]
        assert found["draft"] == expected[0], typed
        assert found["adaptive"] if expected[1] is None else found["k"] == expected[1], typed


def test_a_profile_that_says_off_does_not_silence_a_k_that_was_typed(specdec, config, checkpoint):
    profiles.save(profiles.Profile(str(checkpoint), "none", 0, False))
    run = ("generate", "hello", "-t", checkpoint, "-n", "4", "--json")
    assert record(specdec(*run))["settings"]["draft"] == "none"
    found = record(specdec(*run, "-k", "2"))["settings"]
    assert (found["draft"], found["k"]) == ("ngram", 2)


def test_too_few_prompts_decide_nothing_and_nothing_is_saved(tune, config):
    result = tune("--limit", "2", "--save", "-d", "self:1")
    assert result.code == 2
    assert "--save with 2 answers has nothing to confirm" in result.err
    assert not config.exists()
    found = record(tune("--limit", "2", "--json", "-d", "self:1"))
    assert found["profile"] is None
    assert found["confirmed"] == []
    assert "predicted and not confirmed: 2 of at least 3 answers" in found["recommendation"]["reason"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[profiles", "cannot be read"),
        ("profiles = 3", "no list of tables"),
        ("[[profiles]]\ntarget = 'x'", "profile 1 lacks"),
        ("[[profiles]]\ntarget = 'x'\ndraft = 'y'\nk = 1.5", "has k = 1.5"),
    ],
)
def test_a_config_that_is_wrong_is_one_line_and_is_never_overwritten(specdec, config, checkpoint, text, said):
    config.parent.mkdir()
    config.write_text(text)
    result = specdec("generate", "hello", "-t", checkpoint)
    assert result.code == 2
    assert said in result.err.splitlines()[0]
    with pytest.raises(profiles.UsageError):
        profiles.save(profiles.Profile("t", "ngram", 1, False))
    assert config.read_text() == text


def test_profiles_in_one_line_are_refused_rather_than_broken(config):
    config.parent.mkdir()
    config.write_text("profiles = []\n")
    with pytest.raises(profiles.UsageError, match="in one line"):
        profiles.save(profiles.Profile("t", "ngram", 1, False))


def test_info_says_which_profiles_are_in_force(specdec, config):
    assert "no profiles" in specdec("info").out
    profiles.save(profiles.Profile("builtin", "ngram", 3, False))
    assert f"profile: draft ngram, k 3 for builtin, temperature 0 · {config}" in specdec("info").out
    found = record(specdec("info", "--json"))["config"]
    assert found == {
        "file": str(config),
        "profiles": [{"target": "builtin", "draft": "ngram", "k": 3, "sampled": False}],
        "error": None,
    }


def test_answers_from_a_trace(tune, specdec, checkpoint, draft_checkpoint, tmp_path):
    trace = tmp_path / "t.jsonl"
    for prompt in ("the light", "the night", "a house"):
        specdec(
            "generate",
            prompt,
            "-t",
            checkpoint,
            "-d",
            draft_checkpoint,
            "-n",
            "10",
            "--dtype",
            "float32",
            "--trace",
            trace,
        )
    found = record(tune("-d", draft_checkpoint, "--trace", trace, "--json"))
    assert found["answers"] == {"count": 3, "tokens": 30}
    same = record(tune("-d", draft_checkpoint, "--trace", trace, "-n", "10", "--json"))
    assert same["confirmed"][0]["mean_emitted_per_cycle"] == pytest.approx(same["predicted"]["mean_emitted_per_cycle"])
    assert record(tune("--trace", trace, "-n", "4", "--limit", "2", "--json"))["answers"] == {"count": 2, "tokens": 8}
    other = tune("--trace", trace, "--temperature", "1")
    assert other.code == 2
    assert "temperature" in other.err


def test_answers_from_a_text(tune, tmp_path):
    file = tmp_path / "book.txt"
    file.write_text("The lighthouse stood on the rock, and the light went round. " * 20)
    result = tune("--text", file)
    assert result.code == 0, result.err
    assert "predicted and not confirmed: the text is not what the target says" in result.out
    file.write_text("short")
    assert "the text has" in tune("--text", file).err
    file.write_text(" ")
    assert "is empty" in tune("--text", file).err


def test_sampled_drafts(tune, draft_checkpoint):
    found = record(tune("-d", draft_checkpoint, "--temperature", "0.8", "--json"))
    assert found["profile"]["sampled"] is True
    assert found["command"].endswith(" --temperature 0.8 PROMPT")
    small = next(curve for curve in found["drafts"] if curve["draft"] == str(draft_checkpoint))["curve"]
    emitted = [p["mean_emitted_per_cycle"] for p in small]
    assert emitted[0] > 1
    assert emitted == sorted(emitted), "more drafted tokens never bring fewer"


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--trace", "nowhere.jsonl"), 2, "nowhere.jsonl"),
        (("--text", "nowhere.txt"), 2, "nowhere.txt"),
        (("--prompts", "nowhere.jsonl"), 2, "nowhere.jsonl"),
        (("--prompts", "a", "--text", "b"), 2, "exclude"),
        (("--temperature", "-1"), 2, "temperature"),
        (("-d", "self:99"), 2, "self:99"),
        (("-d", "none"), 2, "nothing to tune"),
    ],
)
def test_bad_input_is_one_line(tune, options, code, said):
    result = tune(*options)
    assert result.code == code
    assert said in result.err.splitlines()[0]
