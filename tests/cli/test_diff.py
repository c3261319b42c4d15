"""Two recorded runs beside each other."""

from __future__ import annotations

import json

import pytest

PROMPT = "the light in the night"


@pytest.fixture
def traced(specdec, checkpoint, tmp_path):
    def run(name, *more, prompt=PROMPT):
        path = tmp_path / f"{name}.jsonl"
        typed = ("generate", prompt, "-t", checkpoint, "-n", "24", "--dtype", "float32", "--trace", path, "--seed", "1")
        result = specdec(*typed, *more)
        assert result.code == 0, result.err
        return path

    return run


def found(specdec, a, b):
    result = specdec("diff", a, b, "--json")
    return result.code, json.loads(result.out)


def test_the_same_text_with_other_drafts_is_the_same(specdec, traced):
    code, same = found(specdec, traced("a", "-d", "ngram", "-k", "2"), traced("b", "-d", "self:1", "-k", "3"))
    assert (code, same["same"], same["common"], same["cause"]) == (0, True, 24, "none")
    assert same["settings"]["draft"] == ["ngram", "self:1"]
    assert same["other_cycles"]


@pytest.mark.parametrize(
    ("one", "other", "cause"),
    [
        (("-n", "10"), ("-n", "20"), "length"),
        (("--temperature", "1"), ("--temperature", "1", "--seed", "2"), "seed"),
        (("--temperature", "1", "-d", "ngram", "-k", "2"), ("--temperature", "1", "-d", "self:1", "-k", "4"), "draws"),
        (("--temperature", "1"), ("--temperature", "0.5"), "settings"),
    ],
)
def test_each_cause_is_told(specdec, traced, one, other, cause):
    code, parted = found(specdec, traced("a", *one), traced("b", *other))
    assert (code, parted["cause"]) == (0, cause)
    said = specdec("diff", traced("c", *one), traced("d", *other)).out
    assert "tokens are the same" in said


def test_two_greedy_texts_of_one_target_are_explained_or_said_not_to_be(specdec, traced):
    """A trace in which one token was changed is no work of rounding; one whose probabilities are near is."""
    a = traced("a", "-d", "self:1", "-k", "3")
    lines = [json.loads(line) for line in a.read_text().splitlines()]
    cycle = next(line for line in lines if line["kind"] == "cycle" and line["accepted"] < len(line["drafted"]))
    rejected, own = cycle["drafted"][cycle["accepted"]], cycle["emitted"][-1]
    b = a.with_name("b.jsonl")

    def write(gap):
        for line in lines:
            if line is cycle:
                place = line["raw_p"]["likeliest"][line["accepted"]]
                line["raw_p"]["likeliest"][line["accepted"]] = [[own, 0.4, 1.0], [rejected, 0.4 - gap, 0.0], *place[2:]]
        a.write_text("\n".join(map(json.dumps, lines)))
        changed = [{**line, "emitted": [*line["emitted"][:-1], rejected]} if line is cycle else line for line in lines]
        b.write_text("\n".join(map(json.dumps, changed)))

    write(0.2)
    code, parted = found(specdec, a, b)
    assert (code, parted["cause"]) == (6, "unexplained")
    assert parted["tokens"][0]["cycle"] == cycle["index"]
    write(0.001)
    assert found(specdec, a, b)[1]["cause"] == "rounding"


def test_runs_of_other_prompts_and_files_that_are_none_are_refused(specdec, traced, tmp_path):
    a = traced("a")
    assert specdec("diff", a, traced("b", prompt="another prompt")).code == 2
    assert specdec("diff", a, tmp_path / "none").code == 2
    (tmp_path / "empty").write_text("")
    assert specdec("diff", a, tmp_path / "empty").code == 2


def test_replay_beside_another_run_says_in_sentences_what_diff_says(specdec, traced):
    a, b = traced("a", "-d", "ngram", "-k", "2"), traced("b", "-d", "self:1", "-k", "3")
    assert specdec("replay", a, "--against", b, "--plain").out == specdec("diff", a, b).out
    for typed in (("--export", "x.gif"), ()):  # no terminal here
        assert specdec("replay", a, "--against", b, *typed).code == 2
    assert specdec("replay", a, "--against", a.with_name("none"), "--plain").code == 2


def test_a_run_under_a_grammar_and_a_free_one_differ_in_their_settings(specdec, traced):
    code, parted = found(specdec, traced("a"), traced("b", "--regex", "[0-9]{9}"))
    assert (code, parted["cause"]) == (0, "settings")
