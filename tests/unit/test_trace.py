"""Traces: what is written is read back; a run killed at any byte leaves what it did; rubbish is refused by line."""

from __future__ import annotations

import json

import pytest

from specdec_engine.core.cycle_types import Sampling
from specdec_engine.errors import TraceError
from specdec_engine.record.events import Failed, Finished, SettingChanged
from specdec_engine.record.stats import Summary
from specdec_engine.record.text import TokenText
from specdec_engine.record.trace import TraceWriter, read_pieces, read_trace, to_json
from tests.fakes import TableDrafter, TableTarget, byte_tokenizer, cycles, run

EVENTS = run(TableTarget(), TableDrafter(), k=3, sampling=Sampling(0.8, raw=True), max_tokens=9)


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "t.jsonl"
    with TraceWriter(path) as writer:
        for event in EVENTS:
            writer.write(event)
    return path


def test_every_event_is_read_back_as_it_was(tmp_path):
    others = [
        SettingChanged(3, "k", 4, 5, "asked"),
        Failed("GenerationFailed", "m", "h"),
        Finished("cancelled", 1, 1, None),
    ]
    with TraceWriter(tmp_path / "t") as writer:
        for event in [*EVENTS, *others]:
            writer.write(event)
    assert list(read_trace(tmp_path / "t")) == [*EVENTS, *others]


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
        "source",
        "raw_p",
        "raw_q",
    }
    assert record["source"] == {"engine": "specdec", "exactness": "exact"}
    assert to_json(EVENTS[0])["schema"] == "specdec.trace/1"


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
