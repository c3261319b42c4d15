"""Runs of real servers as they were recorded: their cycles are whole, and add up to the servers' own totals."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from specdec_engine.attach.asked import Asked
from specdec_engine.attach.attached import attach
from specdec_engine.attach.http import KEY
from specdec_engine.core.cycle_types import Sampling
from specdec_engine.errors import UsageError
from specdec_engine.record.events import Counters, Cycle, Finished, Started
from specdec_engine.record.stats import Summary
from specdec_engine.record.trace import Records, TraceWriter, read_trace
from tests.servers.record import PLAN, REPEAT
from tests.servers.replayed import NAMES, recording, replayed, slowly
from tests.servers.runs import ran, said_by


@pytest.mark.parametrize("tag", PLAN)
@pytest.mark.parametrize("name", NAMES)
def test_cycles_add_up_to_what_the_server_says_of_the_run(name, tag):
    with replayed(name) as state:
        state.tag = tag
        wanted = PLAN[tag]
        events, text = ran(state, sampling=Sampling(wanted.get("temperature", 0.0)), stop=tuple(wanted.get("stop", ())))
    expected, (emitted, drafted, accepted) = said_by(state.said, tag)
    assert text == expected
    summary = Summary()
    for event in events:
        summary = summary.plus(event)
    assert summary.emitted == emitted
    if drafted is not None:
        assert (summary.drafted, summary.accepted) == (drafted, accepted)
    found = [event for event in events if isinstance(event, Cycle)]
    assert isinstance(events[0], Started)
    assert isinstance(events[-1], Finished)
    assert (events[-1].emitted, events[-1].cycles) == (emitted, len(found))
    for cycle in found:
        assert cycle.exactness == ("exact" if name.startswith("llama") else "inferred")
        assert (cycle.p.count(None), cycle.q, cycle.u) == (len(cycle.p), *2 * ((None,) * len(cycle.drafted),)) or (
            tag == "sampled" and name.startswith("vllm")
        )
        assert len(cycle.emitted) == cycle.accepted + 1 or cycle is found[-1]
        kept = cycle.emitted[: cycle.accepted]  # a stop cuts the last cycle
        assert cycle.drafted[: len(kept)] == kept
        assert cycle.seconds is not None
    assert found[0].seconds < 1e-3, "the prompt's pass is in prefill_s"
    assert events[-1].prefill_s > 0 or name.startswith("vllm")


@pytest.mark.parametrize("name", NAMES)
def test_lines_may_come_in_any_pieces(name):
    with replayed(name) as state:
        together, text = ran(state)
        state.send = slowly([0.002] * 40)
        apart, other = ran(state)

    def timeless(events):
        return [
            replace(e, cycle_s=0) if isinstance(e, Cycle) else e
            for e in events
            if not isinstance(e, Counters | Finished)
        ]

    assert timeless(together) == timeless(apart)
    assert text == other


@pytest.mark.parametrize("name", NAMES)
def test_a_servers_run_is_recorded_and_read_back(name, tmp_path):
    with replayed(name) as state:
        state.tag = "emoji"
        events, _ = ran(state)
    with TraceWriter(tmp_path / "t.jsonl") as writer:
        for event in events:
            writer.write(event)
    assert list(read_trace(tmp_path / "t.jsonl")) == events
    assert all(Records().of(event)["kind"] == event.kind for event in events)


def test_tokens_inside_a_character_are_unknown_and_in_their_own_cycle():
    """llama.cpp withholds them, and their ids are lost; the text is whole."""
    with replayed("llama_cpp_draft") as state:
        state.tag = "emoji"
        events, text = ran(state)
    assert "🎉" in text
    assert "\ufffd" not in text
    assert any(None in event.emitted for event in events if isinstance(event, Cycle))


def test_vllm_tells_p_where_it_is_what_was_drawn_from():
    """At temperature 1 without filters; else its logarithms may be of another distribution."""
    with replayed("vllm_draft") as state:
        state.tag = "sampled"
        events, _ = ran(state, sampling=Sampling(1.0))
        assert state.requests[-1][1]["logprobs"] == 0
        ran(state, sampling=Sampling(0.7))
        assert "logprobs" not in state.requests[-1][1]
    cycles = [event for event in events if isinstance(event, Cycle)]
    told = [p for cycle in cycles for p in cycle.p[: cycle.accepted]]
    assert told
    assert all(0 < p <= 1 for p in told)
    assert all(p is None for cycle in cycles for p in cycle.p[cycle.accepted :])


def test_steps_that_vllm_joined_are_cut_where_they_can_have_ended():
    lines = [line for line in recording("vllm_draft")["repeat"]["lines"] if line.startswith("data: {")]
    chunks = [json.loads(line[6:]) for line in lines]
    with_ids = [chunk for chunk in chunks if chunk["choices"] and chunk["choices"][0].get("token_ids")]
    first, rest = with_ids[0], with_ids[1:]
    joined = json.loads(json.dumps(rest[0]))
    for chunk in rest[1:]:
        for key in ("text", "token_ids"):
            joined["choices"][0][key] += chunk["choices"][0][key]
        joined["choices"][0]["finish_reason"] = chunk["choices"][0]["finish_reason"]
    with replayed("vllm_draft") as state:
        state.said["repeat"]["lines"] = [f"data: {json.dumps(c)}" for c in (first, joined, chunks[-1])]
        events, text = ran(state)
    cycles = [event for event in events if isinstance(event, Cycle)]
    assert max(len(cycle.emitted) for cycle in cycles) <= 5
    assert (text, sum(len(cycle.emitted) for cycle in cycles)) == (
        said_by(recording("vllm_draft"), "repeat")[0], said_by(recording("vllm_draft"), "repeat")[1][0],
    )  # fmt: skip


def test_what_a_server_is_asked_for_is_what_was_meant(monkeypatch):
    """llama.cpp filters unless told not to; the key goes with each request."""
    monkeypatch.setenv(KEY, "secret")
    with replayed("llama_cpp_draft") as state:
        ran(state, sampling=Sampling(0.5, top_p=0.9), stop=("fox",), seed=7, max_tokens=65)
    path, asked, headers = state.requests[-1]
    assert path == "/completion"
    drawn = {"temperature": 0.5, "top_k": 0, "top_p": 0.9, "min_p": 0.0}
    assert asked.items() >= {"n_predict": 65, "seed": 7, "stop": ["fox"], **drawn}.items()
    assert all(sent["Authorization"] == "Bearer secret" for _, _, sent in state.requests)
    assert headers["Authorization"] == "Bearer secret"


def test_a_server_without_speculation_never_seems_to_draft():
    """Even where vLLM joined several steps."""
    with replayed("vllm_ngram") as state:
        state.said["/metrics"]["body"] = 'vllm:generation_tokens_total{engine="0"} 5.0\n'
        events, _ = ran(state)
        assert attach(state.url).engine.about.draft == "none"
    assert all(not cycle.drafted for cycle in events if isinstance(cycle, Cycle))


@pytest.mark.parametrize("name", NAMES)
def test_the_last_cycle_says_how_the_run_ended(name):
    for tag, end in (("repeat", "stop"), ("stop", "stop"), ("week", "length")):
        with replayed(name) as state:
            state.tag = tag
            events, _ = ran(state, stop=tuple(PLAN[tag].get("stop", ())))
        cycles = [event for event in events if isinstance(event, Cycle)]
        assert cycles[-1].end == end == events[-1].reason
        assert not any(cycle.end in ("stop", "length") for cycle in cycles[:-1])


@pytest.mark.parametrize("name", NAMES)
def test_rates_leave_out_the_token_of_the_prompts_pass(name):
    """Its time is the prompt's; the server's own figure of tokens a cycle leaves it out, too."""
    with replayed(name) as state:
        events, _ = ran(state)
    summary = Summary()
    for event in events:
        summary = summary.plus(event)
    cycles = [event for event in events if isinstance(event, Cycle)]
    rest = sum(len(cycle.emitted) for cycle in cycles[1:])
    assert summary.mean_emitted_per_cycle == pytest.approx(rest / (len(cycles) - 1))
    assert summary.tokens_per_second == pytest.approx(rest / sum(cycle.seconds for cycle in cycles))


def test_sglang_by_its_documentation():
    """A server that answers as its source says; none was recorded."""
    total = [(1, "The", [5]), (4, "The light in a", [5, 6, 7, 8]), (5, "The light in a night", [5, 6, 7, 8, 9])]
    lines = []
    for n, text, ids in total:
        meta = {"completion_tokens": n, "finish_reason": {"type": "length"} if n == 5 else None}
        lines.append("data: " + json.dumps({"text": text, "output_ids": ids, "meta_info": meta}))
    answers = {
        "/server_info": {"internal_states": [], "version": "0.5.23", "model_path": "org/t", "speculative_algorithm": "EAGLE3",
                         "speculative_num_draft_tokens": 5},
        "/tokenize": {"tokens": [1, 2, 3]},
        "/detokenize": {"text": "x"},
    }  # fmt: skip
    with replayed("vllm_draft") as state:
        state.instead |= {"/props": (404, {}, ""), "/version": (404, {}, "")}
        state.instead |= {
            path: (200, {"Content-Type": "application/json"}, json.dumps(a)) for path, a in answers.items()
        }
        body = "".join(f"{line}\n\n" for line in [*lines, "data: [DONE]"])
        state.instead["/generate"] = (200, {"Content-Type": "text/event-stream"}, body)
        run = attach(state.url).begin(Asked(REPEAT, max_tokens=5))
        events = list(run.events())
        text = "".join(run.texts.feed(t) for e in events if isinstance(e, Cycle) for t in e.emitted)
        with pytest.raises(UsageError, match="takes no seed"):
            attach(state.url).begin(Asked(REPEAT, seed=1))
    cycles = [event for event in events if isinstance(event, Cycle)]
    assert [(len(c.drafted), c.accepted, c.emitted) for c in cycles] == [(0, 0, (5,)), (4, 2, (6, 7, 8)), (4, 0, (9,))]
    assert (events[0].seed, events[0].settings["draft"], cycles[-1].end) == (None, "EAGLE3", "length")
    assert text == "The light in a night"
