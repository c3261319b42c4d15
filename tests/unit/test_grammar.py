"""Grammars: which tokens may come, at the edges that llguidance has; and runs that follow one."""

from __future__ import annotations

import json
import random
import re
from functools import cache

import pytest
import torch

from specdec_engine.constrain.matching import MOST_FORCED, Matching
from specdec_engine.constrain.wanted import by_grammar, by_json_schema, by_regex, schema_of
from specdec_engine.core.cycle_types import Sampling
from specdec_engine.decoding.control import Controls
from specdec_engine.errors import GenerationFailed, UsageError
from specdec_engine.record.events import Cycle, Finished, Started
from specdec_engine.record.stats import Summary
from specdec_engine.runtime.target import ModelTarget
from specdec_engine.verify.rules import RULES
from tests.contracts.cases import CASES, OWN_TARGETS, TARGET, TOKENIZER, parts, runtime_of
from tests.fakes import VOCAB, lean, run

CPU = torch.device("cpu")
END = TOKENIZER.eos_token_id
DIGITS = by_regex(r"[0-9]{1,3}")
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 4}, "light": {"enum": ["the light", "night"]}},
    "required": ["name", "light"],
    "additionalProperties": False,
}


def matching(grammar, vocab=VOCAB):
    return Matching(grammar, TOKENIZER, vocab, frozenset({END}), CPU)


def ids(text):
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def texts(row):
    return {TOKENIZER.decode([int(i)]) if int(i) != END else "END" for i in row.nonzero()[:, 0]}


def test_rows_are_by_the_text_and_the_drafted_tokens_before_them():
    text = matching(by_regex("ab|ac|b"))
    assert texts(text.allowed([])[0]) == {"a", "b"}
    rows = text.allowed(ids("a"))
    assert rows.shape == (2, VOCAB)
    assert texts(rows[1]) == {"b", "c"}
    assert texts(text.allowed([])[0]) == {"a", "b"}, "looking changes nothing"


def test_padding_rows_of_the_logits_may_not_come():
    assert not matching(by_regex(".*"), VOCAB + 40).allowed([])[0, VOCAB:].any()


def test_rows_after_a_token_that_may_not_come_are_not_read_and_the_text_stays_usable():
    text = matching(by_regex("abc"))
    rows = text.allowed([*ids("a"), *ids("x"), *ids("b")])
    assert texts(rows[1]) == {"b"}
    assert rows[2:].all()
    assert text.advance(ids("a")) == 1
    assert texts(text.allowed([])[0]) == {"b"}


def test_an_end_in_a_draft_is_never_fed():
    """llguidance counts it at some times, and rolls back a token too far at others."""
    text = matching(DIGITS)
    for drafted in ([*ids("1"), END], [*ids("1"), END, *ids("2")], [END], [*ids("1"), *ids("2"), *ids("3"), END]):
        rows = text.allowed(drafted)
        at = drafted.index(END)
        assert "END" in texts(rows[at]) or at == 0
        assert texts(text.allowed([])[0]) == set("0123456789")


def test_at_its_end_nothing_may_follow_and_the_run_is_over():
    text = matching(by_regex("ab"))
    assert text.advance([*ids("a"), *ids("b"), *ids("c")]) == 2
    assert text.finished
    assert text.forced(5) == []
    open_ended = matching(by_regex("a+"))
    assert open_ended.advance([*ids("a"), END]) == 2
    assert not open_ended.finished


def test_forced_tokens_are_the_tokenizers_own_and_not_more_than_asked():
    text = matching(by_regex("the light (a|b)"))
    forced = text.forced(99)
    assert forced == ids("the light ")[: len(forced)]
    assert 2 <= len(forced) <= MOST_FORCED
    assert text.forced(1) == forced[:1]
    assert text.forced(0) == []


def test_a_token_that_may_not_come_is_never_taken_silently():
    with pytest.raises(GenerationFailed, match="not in the grammar"):
        matching(DIGITS).advance(ids("x"))


def test_any_sequence_of_drafts_and_verdicts_leaves_the_text_where_a_fresh_one_is():
    rng = random.Random(0)
    grammar = schema_of(PERSON)
    for _ in range(20):
        text, said = matching(grammar), list[int]()
        while not text.finished and len(said) < 40:
            with text.ahead() as walk:
                for _ in range(rng.randint(0, 4)):
                    allowed = walk.allowed()
                    some = range(VOCAB) if allowed is None or rng.random() < 0.2 else allowed.nonzero()[:, 0].tolist()
                    walk.take(rng.choice(some))
            text.allowed([rng.choice([*text.forced(3), *range(VOCAB)]) for _ in range(rng.randint(0, 5))])
            row = text.allowed([])[0]
            fresh = matching(grammar)
            fresh.advance(said)
            assert torch.equal(fresh.allowed([])[0], row)
            token = rng.choice([t for t in row.nonzero()[:, 0].tolist() if t != END])
            said.append(token)
            text.advance([token])


@pytest.mark.parametrize(
    ("make", "given", "said"),
    [
        (by_json_schema, "{", "not JSON"),
        (by_json_schema, "[]", "neither an object nor true"),
        (by_json_schema, "false", "allows nothing"),
        (by_json_schema, '{"type": "nope"}', "Invalid type"),
        (by_json_schema, '{"minimum": 5, "maximum": 2, "type": "integer"}', "Unsatisfiable"),
        (by_json_schema, '{"type": "string", "format": "nope"}', "Unknown format"),
        (by_json_schema, '{"$ref": "http://elsewhere/x"}', "cannot be followed"),
        (by_json_schema, '{"type": "string", "pattern": "("}', "unclosed group"),
        (by_regex, "", "is empty"),
        (by_regex, "(", "unclosed group"),
        (by_grammar, " ", "is empty"),
        (by_grammar, 'start: "a" b', "unknown name"),
        (by_grammar, "root ::= (", "cannot be"),
    ],
)
def test_what_cannot_be_followed_is_told_in_one_line(make, given, said):
    with pytest.raises(UsageError, match=re.escape(said)) as raised:
        make(given)
    assert "\n" not in raised.value.message


def test_grammars_of_llama_cpp_and_of_lark_say_the_same():
    lark, gbnf = by_grammar('start: "a" /[0-9]/'), by_grammar('root ::= "a" [0-9]')
    for grammar in (lark, gbnf):
        text = matching(grammar)
        text.advance(ids("a"))
        assert texts(text.allowed([])[0]) == set("0123456789")


def followed(spec, grammar, k, sampling=None, seed=0, max_tokens=60, **more):
    """Drafts look at the grammar, as in a pair."""
    own = matching(grammar)
    drafter, runtime = parts(spec, matching=own)
    how = {"k": k, "sampling": sampling, "seed": seed, "stop_ids": [END], "max_tokens": max_tokens, **more}
    return run(ModelTarget(runtime, "tiny"), drafter, [5, 6, 7, 8, 5, 6, 7], grammar=own, **how)


def said(events):
    return [token for event in events if isinstance(event, Cycle) for token in event.emitted]


@cache
def plain_text(target):
    """target: a draft's name, which says what it drafts for."""
    own = matching(schema_of(PERSON))
    drafter, _ = parts("none")
    how = {"k": 0, "stop_ids": [END], "max_tokens": 60}
    return said(run(ModelTarget(runtime_of(target), "tiny"), drafter, [5, 6, 7, 8, 5, 6, 7], grammar=own, **how))


@pytest.mark.parametrize(("spec", "k"), [*((spec, 3) for spec in CASES), ("ngram,model:small", 1), ("head:HEAD", 5)])
def test_greedy_text_is_plain_decodings_under_the_same_grammar(spec, k):
    plain = plain_text(spec if spec in OWN_TARGETS else "none")
    found = followed(spec, schema_of(PERSON), k)
    assert said(found) == plain
    assert json.loads(TOKENIZER.decode(plain))["light"] in ("the light", "night")
    assert found[-1].reason == "stop"
    assert any(event.forced for event in found if isinstance(event, Cycle))


def test_drafts_that_look_at_the_grammar_are_accepted_more_often():
    """The same draft model, once with masks and once without."""
    counts = list[float]()
    for looks in (True, False):
        drafter, runtime = parts("lean@model:small")
        matches = matching(by_regex("[abc]{60}"))
        drafter._grammar.matching = matches if looks else None
        events = run(ModelTarget(runtime, "tiny"), drafter, [5, 6, 7], grammar=matches, k=3, sampling=Sampling(1.0),
                     max_tokens=60, stop_ids=[END])  # fmt: skip
        summary = Summary()
        for event in events:
            summary = summary.plus(event)
        counts.append(summary.alpha)
    assert counts[0] > 3 * counts[1]


COUPLED = ("model:small", "head:HEAD", "self:1", "reduced@model:small")


@pytest.mark.parametrize(
    ("spec", "sampling"),
    [*((spec, Sampling(1.0)) for spec in CASES), *((spec, Sampling(0.9, coupling="gumbel")) for spec in COUPLED)],
)
def test_drawn_text_of_every_draft_follows_the_grammar(spec, sampling):
    found = followed(spec, schema_of(PERSON), 3, sampling, seed=3, max_tokens=80)
    assert set(json.loads(TOKENIZER.decode(said(found)))) == {"name", "light"}
    if sampling.coupled:
        plain = followed("none", schema_of(PERSON), 0, sampling, seed=3, max_tokens=80)
        assert said(found) == said(plain)


@pytest.mark.parametrize("rule", ["token", "block"])
def test_drawn_text_follows_the_grammar_whole(rule):
    for seed in range(10):
        found = followed("ngram,model:small", schema_of(PERSON), 3, Sampling(1.0), seed, 80, rule=RULES[rule])
        assert set(json.loads(TOKENIZER.decode(said(found)))) == {"name", "light"}


def test_the_run_ends_where_nothing_may_follow_without_another_pass():
    found = followed("none", by_regex("(a|b)c"), 0)
    assert (len(said(found)), found[-1].cycles, found[-1].reason) == (2, 2, "stop")
    cut = followed("none", by_regex("(a|b)c"), 0, max_tokens=1)
    assert cut[-1].reason == "length"


def test_plain_decoding_proposes_nothing_and_a_draft_that_is_off_leaves_the_free_tokens():
    class Off:
        off, k = True, 0

        def observe(self, cycle, parts):
            return ""

    plain = followed("none", by_regex("the light (a|b)"), 0)
    assert all(not event.drafted for event in plain if isinstance(event, Cycle))
    controls = Controls(0, Sampling())
    controls.auto = Off()
    off = followed("none", by_regex("the light (a|b)"), 0, controls=controls)
    assert said(off) == said(plain)
    assert any(event.forced for event in off if isinstance(event, Cycle))


def test_forced_tokens_are_counted_apart_and_settings_name_the_grammar():
    found, summary = followed("ngram", by_regex("the light (a|b)"), 3), Summary()
    for event in found:
        summary = summary.plus(event)
    cycles = [event for event in found if isinstance(event, Cycle)]
    forced = sum(c.accepted for c in cycles if c.forced)
    assert summary.forced == forced > 0
    assert summary.accepted == sum(c.accepted for c in cycles if not c.forced)
    assert summary.emitted == len(said(found)) == found[-1].emitted
    assert isinstance(found[0], Started)
    assert found[0].settings["grammar"] == {"kind": "regex", "text": "the light (a|b)"}
    assert isinstance(found[-1], Finished)


def test_a_target_without_an_end_is_refused():
    with pytest.raises(UsageError, match="ends a text"):
        Matching(DIGITS, TOKENIZER, VOCAB, frozenset(), CPU)
    assert lean(TARGET).vocab == VOCAB
