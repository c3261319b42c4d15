"""Traces: what is written is read back; a run killed at any byte leaves what it did; rubbish is refused by line."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest

from specdec_engine.core.cycle_types import Sampling
from specdec_engine.errors import TraceError
from specdec_engine.record.events import Counters, Failed, Finished, SettingChanged
from specdec_engine.record.stats import Summary
from specdec_engine.record.text import TokenText
from specdec_engine.record.trace import Records, TraceWriter, read_pieces, read_trace, to_json
from tests.fakes import TableDrafter, TableTarget, byte_tokenizer, cycles, run

EVENTS = run(TableTarget(), TableDrafter(), k=3, sampling=Sampling(0.8, raw=True), max_tokens=9)


CYCLE = next(c for c in cycles(EVENTS) if len(c.drafted) == 3)
UNKNOWN = replace(
    CYCLE,
    drafted=(5, None, None),
    emitted=(5, None),
    accepted=1,
    p=(None,) * 3,
    q=(None,) * 3,
    u=(None,) * 3,
    overlap=(None,) * 3,
    draft_s=None,
    verify_s=None,
    other_s=None,
    cycle_s=0.02,
    exactness="inferred",
    raw_p=None,
    raw_q=None,
)
"""What a server tells of a cycle."""
TREE = replace(UNKNOWN, drafted=(5, 6, 7), parents=(-1, -1, 1), path=(1, 2), accepted=2, emitted=(6, 7, 8))


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "t.jsonl"
    with TraceWriter(path) as writer:
        for event in EVENTS:
            writer.write(event)
    return path


def test_every_event_is_read_back_as_it_was(tmp_path):
    unknown = replace(EVENTS[0], prompt=(1, None), seed=None)
    runs = [
        [*EVENTS[:-1], SettingChanged(3, "k", 4, 5, "asked"), Finished("cancelled", 1, 1, None)],
        [unknown, UNKNOWN, replace(UNKNOWN, k=None, context=None), TREE, Failed("GenerationFailed", "m", "h")],
        [unknown, Counters(1.5, 10, 30, 20, 31, (9, 7, 4))],
    ]
    with TraceWriter(tmp_path / "t") as writer:
        for event in chain.from_iterable(runs):
            writer.write(event)
    assert list(read_trace(tmp_path / "t")) == list(chain.from_iterable(runs))


@pytest.mark.parametrize(
    "raw", [0, [], "a", {}, {"drafted": ["x"], "likeliest": [[]]}, {"drafted": [0.5], "likeliest": [[[1, 2]]]}]
)
def test_distributions_before_warping_that_are_none_are_refused(tmp_path, raw):
    record = to_json(next(c for c in cycles(EVENTS) if c.drafted))
    (tmp_path / "t").write_text(json.dumps(to_json(EVENTS[0])) + "\n" + json.dumps(record | {"raw_p": raw}) + "\n")
    with pytest.raises(TraceError, match="line 2"):
        list(read_trace(tmp_path / "t"))


def test_a_cycle_line_has_the_contracts_keys():
    record = to_json(cycles(EVENTS)[0])
    assert set(record) == {
        "kind",
        "index",
        "drafter",
        "k",
        "drafted",
        "accepted",
        "emitted",
        "end",
        "p",
        "q",
        "u",
        "overlap",
        "residual",
        "draft_s",
        "verify_s",
        "other_s",
        "context",
        "cycle_s",
        "exactness",
        "parents",
        "path",
        "guessed",
        "raw_p",
        "raw_q",
    }
    started = to_json(EVENTS[0])
    assert (started["schema"], started["observer"]) == ("specdec.trace/2", "specdec")


@pytest.mark.parametrize("other", ["a,b\n1,2\n", '{"prompt": "x"}\n', "kind", "\x00\x01"])
def test_a_file_that_holds_something_else_is_left_as_it_is(tmp_path, other):
    path = tmp_path / "t"
    path.write_text(other)
    with pytest.raises(TraceError, match="something else than a trace"):
        TraceWriter(path)
    assert path.read_text() == other


@pytest.mark.parametrize("begun", ["", '{"ki', json.dumps({"kind": "cycle", "a": 1})])
def test_what_a_killed_run_has_left_is_gone_on_with(tmp_path, begun):
    path = tmp_path / "t"
    path.write_text(begun)
    with TraceWriter(path) as writer:
        writer.write(EVENTS[0])
    assert path.read_text().startswith(begun)


def test_a_trace_of_the_first_schema_is_read():
    first = Path(__file__).parent / "trace_v1.jsonl"
    events = list(read_trace(first))
    assert [e.kind for e in events].count("cycle") == len(events) - 4 == 3
    assert events[0].observer == "specdec"
    assert all(e.exactness == "exact" and e.seconds for e in cycles(events))
    assert read_pieces(first)[198] == "\n"


def test_runs_that_were_written_at_the_same_time_are_told_apart(tmp_path):
    other = [replace(EVENTS[0], seed=99), *EVENTS[1:]]
    first, second = Records(), Records()
    mixed = [
        json.dumps(records.of(event))
        for pair in zip(EVENTS, other, strict=True)
        for records, event in zip((first, second), pair, strict=True)
    ]
    (tmp_path / "t").write_text("\n".join(mixed) + "\n")
    assert list(read_trace(tmp_path / "t")) == [*EVENTS, *other]
    without_end = "\n".join(mixed[:-2]) + "\n"
    (tmp_path / "t").write_text(without_end)
    assert list(read_trace(tmp_path / "t")) == [*EVENTS[:-1], *other[:-1]]
    (tmp_path / "t").write_text(without_end * 2)  # the same runs copied once more
    assert len(list(read_trace(tmp_path / "t"))) == 4 * len(EVENTS[:-1])


def test_a_line_of_a_run_that_never_began_is_refused(trace):
    lines = trace.read_text().splitlines()
    lines[2] = json.dumps(json.loads(lines[2]) | {"run": "another"})
    trace.write_text("\n".join(lines) + "\n")
    with pytest.raises(TraceError, match=r"line 3.*before its run has started"):
        list(read_trace(trace))


@pytest.mark.parametrize(
    ("cycle", "change", "says"),
    [
        (CYCLE, {"p": [0.1, 7.5, 0.1]}, r"p\[1\]"),
        (CYCLE, {"drafted": [1, -2, 3]}, r"drafted\[1\]"),
        (CYCLE, {"emitted": [10**30]}, r"emitted\[0\]"),
        (CYCLE, {"verify_s": -1.0}, "verify_s"),
        (CYCLE, {"verify_s": None}, "all three are known, or none"),
        (CYCLE, {"accepted": 4}, "accepted: 4 of 3"),
        (CYCLE, {"u": []}, "u: 0 entries"),
        (CYCLE, {"residual": [[1, 2.5]]}, "residual"),
        (CYCLE, {"raw_p": {"drafted": [0.1] * 3, "likeliest": [[[1, 0.5, -1]]] * 3}}, "raw_p.likeliest"),
        (
            CYCLE,
            {"kind": "counters", "at_s": 1, "cycles": 1, "drafted": 2, "accepted": 3, "emitted": 3},
            "accepted: 3 of 2",
        ),
        (TREE, {"path": [0, 2]}, "path: 2 does not follow 0"),
        (TREE, {"path": [1]}, "path: 1 places"),
        (TREE, {"path": None}, "both are given"),
        (TREE, {"parents": [-1, 1, 0]}, "parents: each"),
    ],
)
def test_a_cycle_that_cannot_be_is_refused_with_line_and_field(tmp_path, cycle, change, says):
    lines = [json.dumps(to_json(EVENTS[0])), json.dumps(to_json(cycle) | change)]
    (tmp_path / "t").write_text("\n".join(lines) + "\n")
    with pytest.raises(TraceError, match=f"line 2 .*{says}"):
        list(read_trace(tmp_path / "t"))


def test_a_line_that_is_nested_too_deeply_is_no_event(trace):
    deep = '{"kind": "started", "settings": {"x": ' + "[" * 100_000 + "]" * 100_000 + "}}"
    trace.write_text(deep + "\n" + trace.read_text())
    with pytest.raises(TraceError, match=r"line 1 .*nested too deeply"):
        list(read_trace(trace))


def test_an_event_after_the_end_of_its_run_is_refused(trace):
    lines = trace.read_text().splitlines()
    trace.write_text("\n".join([*lines, lines[1]]) + "\n")
    with pytest.raises(TraceError, match="after it has ended"):
        list(read_trace(trace))


@pytest.mark.parametrize("wrong", ['{"kind": "cycle"}', '"hello"', '{"kind": "started", "schema": "specdec.trace/3"}'])
def test_only_a_line_that_was_cut_short_is_passed_over(trace, wrong):
    """At the end without its newline, and before the next run; whole JSON is another fault."""
    whole = trace.read_text()
    for content in (whole + wrong, wrong + "\n" + whole):
        trace.write_text(content)
        with pytest.raises(TraceError):
            list(read_trace(trace))


def test_figures_of_what_is_not_told_are_unknown_and_never_zero():
    s = Summary().plus(EVENTS[0]).plus(UNKNOWN)
    assert (s.draft_s, s.verify_s, s.other_s, s.expected_alpha) == (None,) * 4
    assert (s.decode_s, s.tokens_per_second, s.alpha, s.exactness) == (0.02, 100.0, 0.5, "inferred")
    known = s.plus(CYCLE)
    assert known.verify_s is None
    assert known.decode_s == pytest.approx(0.02 + CYCLE.seconds)


def test_what_became_of_a_trees_tokens():
    """5 and 6 follow the context, 7 follows 6; 6 and 7 were kept, and 8 came free."""
    assert [TREE.fate(place) for place in range(3)] == ["untested", "accepted", "accepted"]
    assert (TREE.depth, TREE.tested, TREE.rejected) == (2, 2, None)
    assert TREE.origins == ("accepted", "accepted", "bonus")
    cut = replace(TREE, path=(1,), accepted=1, emitted=(6, 9))
    assert [cut.fate(place) for place in range(3)] == ["untested", "accepted", "rejected"]
    assert (cut.tested, cut.origins) == (2, ("accepted", "recovered"))
    leaf = replace(TREE, path=(0,), accepted=1, emitted=(5, 9))
    assert (leaf.tested, leaf.rejected) == (1, None)  # nothing followed the accepted token


def test_levels_of_a_tree_are_counted_as_positions():
    s = Summary().plus(replace(TREE, overlap=(0.1, 0.9, 0.8)))
    assert [(p.drafted, p.tested, p.accepted) for p in s.positions] == [(1, 1, 1), (1, 1, 1)]
    assert s.expected_alpha is None


def test_counters_are_totals_where_there_are_no_cycles():
    """Of 10 cycles that drafted 30 tokens; 5 of the 35 emitted ones came without a draft."""
    s = Summary().plus(EVENTS[0]).plus(Counters(1.0, 10, 30, 20, 35, (9, 7, 4)))
    assert (s.cycles, s.drafted, s.accepted, s.emitted, s.mean_emitted_per_cycle) == (10, 30, 20, 35, 3.0)
    assert (s.alpha, s.tokens_per_second, s.exactness) == (None, None, "counted")
    assert [p.reach for p in s.positions] == [0.9, 0.7, 0.4]
    assert s.plus(Counters(2.0, 11, 33, 22, 40)).cycles == 11
    seen = Summary().plus(EVENTS[0]).plus(CYCLE)
    assert seen.plus(Counters(1.0, 10, 30, 20, 30)) == seen
    assert s.plus(CYCLE) == seen


def test_a_trace_cut_at_any_byte_still_reads(trace, tmp_path):
    whole = trace.read_bytes()
    for at in range(len(whole) + 1):
        cut = tmp_path / "cut.jsonl"
        cut.write_bytes(whole[:at])
        found = list(read_trace(cut))
        assert found == EVENTS[: len(found)]
        assert len(found) >= whole[:at].count(b"\n")


def test_a_run_appended_to_a_cut_trace_keeps_both(trace):
    trace.write_bytes(trace.read_bytes()[:-20])
    with TraceWriter(trace) as writer:
        for event in EVENTS:
            writer.write(event)
    assert list(read_trace(trace)) == EVENTS[:-1] + EVENTS


def test_a_start_that_fails_leaves_a_cut_trace_as_it_was(trace):
    cut = trace.read_bytes()[:-20]
    trace.write_bytes(cut)
    TraceWriter(trace).close()
    assert trace.read_bytes() == cut
    assert list(read_trace(trace)) == EVENTS[:-1]


def test_each_line_is_on_disk_before_the_next_event(tmp_path):
    path = tmp_path / "t"
    with TraceWriter(path) as writer:
        for n, event in enumerate(EVENTS, start=1):
            writer.write(event)
            assert path.read_bytes().count(b"\n") == n


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"not a trace\nat all\n", "line 1"),
        (b"{}\n", "line 1"),
        (b"[1, 2]\n", "line 1"),
        (b'{"kind": "started", "schema": "specdec.trace/99"}\n', "specdec.trace/99"),
        (b'{"kind": "cycle"}\n', "line 1"),
        (b"\xff\xfe\n\x00\n", "line 1"),
    ],
)
def test_what_is_no_trace_is_refused_with_the_line(tmp_path, content, says):
    path = tmp_path / "t"
    path.write_bytes(content)
    with pytest.raises(TraceError, match=says):
        list(read_trace(path))


def test_damage_in_the_middle_is_not_passed_over(trace):
    lines = trace.read_bytes().splitlines(keepends=True)
    trace.write_bytes(b"".join([*lines[:2], b'{"kind": "cyc\n', *lines[2:]]))
    with pytest.raises(TraceError, match="line 3"):
        list(read_trace(trace))


def test_a_missing_trace_and_a_missing_folder(tmp_path):
    with pytest.raises(TraceError, match="No such file"):
        list(read_trace(tmp_path / "none"))
    with pytest.raises(TraceError, match="No such file"):
        TraceWriter(tmp_path / "no" / "folder")


def test_a_full_disk_is_reported():
    writer = TraceWriter("/dev/full")
    with pytest.raises(TraceError, match="No space left"):
        writer.write(EVENTS[0])
    with pytest.raises(TraceError):
        writer.close()


def test_pieces_name_each_token_once_and_survive_half_characters(tmp_path):
    tokenizer = byte_tokenizer()
    ids = tokenizer("né\x1b[2J")["input_ids"]
    events = run(TableTarget(), TableDrafter(), ids, max_tokens=3)
    with TraceWriter(tmp_path / "t", TokenText(tokenizer)) as writer:
        for event in events:
            writer.write(event)
    pieces = read_pieces(tmp_path / "t")
    assert b"".join(pieces[i].encode("utf-8", "surrogateescape") for i in ids) == "né\x1b[2J".encode()
    named = [token for line in (tmp_path / "t").read_text().splitlines() for token in json.loads(line)["pieces"]]
    assert len(named) == len(set(named))


def test_a_summary_of_the_trace_is_the_summary_of_the_run(trace):
    live, read = Summary(), Summary()
    for event in EVENTS:
        live = live.plus(event)
    for event in read_trace(trace):
        read = read.plus(event)
    assert live == read
