"""Runs of real servers as they were recorded: their cycles are whole, and add up to the servers' own totals."""

from __future__ import annotations

import json
import socket
import threading
import time
from dataclasses import replace

import pytest

from specdec_engine.attach.asked import Asked
from specdec_engine.attach.attached import attach
from specdec_engine.attach.counters import read_counters
from specdec_engine.attach.http import KEY, MOST_LINE, Server
from specdec_engine.attach.watching import EngineHistory, histories, once
from specdec_engine.core.cycle_types import Sampling
from specdec_engine.errors import GenerationFailed, ServerUnavailable, UsageError
from specdec_engine.record.events import Counters, Cycle, Finished, Started
from specdec_engine.record.stats import Summary
from specdec_engine.record.trace import Records, TraceWriter, read_trace
from tests.servers.record import PLAN, REPEAT
from tests.servers.replayed import NAMES, recording, replayed, slowly


def ran(state, **more):
    """The events of a run, and its text."""
    run = attach(state.url).begin(Asked(REPEAT, **{"max_tokens": 64, "seed": 1, **more}))
    events, text = list(run.events()), ""
    for event in events:
        if isinstance(event, Cycle):
            text += "".join(run.texts.feed(token) for token in event.emitted)
    return events, text + run.texts.flush()


def said_by(recorded, tag):
    """Text, tokens, drafted and accepted, by the server's own last words."""
    lines = [json.loads(line[6:]) for line in recorded[tag]["lines"] if line.startswith("data: {")]
    if "timings" in lines[0]:
        totals = lines[-1]["timings"]
        counts = (totals["predicted_n"], totals.get("draft_n", 0), totals.get("draft_n_accepted", 0))
        return "".join(line["content"] for line in lines), counts
    usage = lines[-1]
    found = (usage.get("metrics") or {}).get("speculative_decoding")
    text = "".join(choice["text"] for line in lines for choice in line["choices"])
    drafted = (found["num_draft_tokens"], found["num_accepted_draft_tokens"]) if found else (None, None)
    return text, (usage["usage"]["completion_tokens"], *drafted)


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


# -- servers that fail -------------------------------------------------------------------------------------------------


def dies(handler, lines):
    handler.wfile.write("".join(f"{line}\n\n" for line in lines[:2]).encode())
    handler.connection.shutdown(socket.SHUT_RDWR)


def half_a_line(handler, lines):
    handler.wfile.write("".join(f"{line}\n\n" for line in lines[:2]).encode() + lines[2][:40].encode())


def endless(handler, lines):
    handler.wfile.write("".join(f"{line}\n\n" for line in lines[:2]).encode() + b"data: " + b"x" * (MOST_LINE + 10))


def an_error(handler, lines):
    handler.wfile.write(
        f"{lines[0]}\n\n".encode() + b'data: {"error": {"message": "CUDA is out\\u001b of memory"}}\n\n'
    )


def impossible(handler, lines):
    chunk = json.loads(next(line for line in lines if line.startswith("data: {"))[6:])
    if "timings" in chunk:
        chunk["timings"] |= {"predicted_n": 2, "draft_n": 10**9, "draft_n_accepted": 10**9}
    else:
        chunk["choices"][0]["token_ids"] = [1] * 5000
    handler.wfile.write(f"{lines[0]}\n\ndata: {json.dumps(chunk)}\n\n".encode())


@pytest.mark.parametrize("name", ["llama_cpp_draft", "vllm_draft"])
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (dies, "ended the stream|broke off"),
        (half_a_line, "no JSON|ended the stream"),
        (endless, "line of more than 1,000,000 bytes"),
        (an_error, "CUDA is out␛ of memory"),
        (impossible, "cycle of|tokens at once"),
    ],
)
def test_a_run_that_breaks_off_ends_with_a_sentence_and_keeps_what_came(name, fault, said):
    with replayed(name) as state:
        state.send = fault
        run = attach(state.url).begin(Asked(REPEAT, seed=1))
        events = []
        with pytest.raises(GenerationFailed, match=said):
            events.extend(run.events())
        assert isinstance(events[0], Started)


def test_silence_ends_too():
    with replayed("llama_cpp_draft") as state:
        state.send = slowly([3.0])
        server = attach(state.url)
        server.server._silence_s = 0.3
        run = server.begin(Asked(REPEAT, seed=1))
        began = time.monotonic()
        with pytest.raises(GenerationFailed, match="went silent"):
            list(run.events())
        assert time.monotonic() - began < 2


@pytest.mark.parametrize(
    ("status", "headers", "body", "said"),
    [
        (500, {"Content-Type": "text/plain"}, "Traceback", "says 500: Traceback"),
        (401, {"Content-Type": "application/json"}, '{"error":"Unauthorized"}', "wants a key"),
        (302, {"Location": "http://evil.example/"}, "", "sends elsewhere"),
        (200, {"Content-Type": "text/html"}, "<html>", "sends text/html, and no stream"),
        (200, {"Content-Type": "application/json"}, "{}", "sends application/json, and no stream"),
        (503, {"Content-Type": "application/json"}, '{"error":{"message":"Loading model"}}', "says 503: Loading model"),
    ],
)
@pytest.mark.parametrize("name", ["llama_cpp_draft", "vllm_draft"])
def test_an_answer_that_is_no_stream_is_refused_with_its_reason(name, status, headers, body, said):
    with replayed(name) as state:
        state.instead["/completion"] = state.instead["/v1/completions"] = (status, headers, body)
        with pytest.raises(ServerUnavailable, match=said):
            ran(state)
        assert len([path for path, *_ in state.requests if "completion" in path]) == 1, "and nobody else is asked"


@pytest.mark.parametrize(
    ("instead", "said"),
    [
        ({"/props": (404, {}, ""), "/version": (404, {}, ""), "/server_info": (404, {}, "")}, "none of vLLM"),
        ({"/props": (401, {}, "")}, "wants a key"),
        ({"/props": (503, {}, '{"error":{"message":"Loading model"}}')}, "503: Loading model"),
        ({"/props": (307, {"Location": "http://evil.example/props"}, "")}, "sends elsewhere"),
        ({"/props": (200, {}, "x" * 17_000_000)}, "sends more than 16 MB"),
    ],
)
def test_what_is_no_known_server_is_said(instead, said):
    with replayed("llama_cpp_draft") as state:
        state.instead |= instead
        with pytest.raises(ServerUnavailable, match=said):
            attach(state.url)


def test_no_server_at_all():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(ServerUnavailable, match="cannot be reached: Connection refused"):
        attach(f"127.0.0.1:{port}")


@pytest.mark.parametrize(
    "url", ["", "ftp://a", "http://", "http://a?b=c", "http://u:p@a", "http://a:999999", "http://[::1"]
)
def test_addresses_that_are_none(url):
    with pytest.raises(UsageError):
        Server(url)


@pytest.mark.parametrize(
    "url", ["localhost:8000", "http://localhost:8000/", "http://localhost:8000/v1", "http://localhost:8000/v1/"]
)
def test_the_same_address_in_other_words(url):
    assert Server(url).url == "http://localhost:8000"


def fed(state, chunk):
    """A stream with this line after its first."""

    def send(handler, lines):
        handler.wfile.write(f"{lines[0]}\n\ndata: {json.dumps(chunk)}\n\n".encode())

    state.send = send


@pytest.mark.parametrize(
    ("name", "chunk"),
    [
        ("llama_cpp_draft", {"tokens": 5, "content": "x", "timings": {"predicted_n": 2, "predicted_ms": 1.0}}),
        ("llama_cpp_draft", {"timings": {"predicted_n": "x", "predicted_ms": 1.0}}),
        ("llama_cpp_draft", {"timings": {"predicted_n": 2, "predicted_ms": float("nan")}}),
        ("vllm_draft", {"choices": {"index": 0}}),
        ("vllm_draft", {"choices": ["x"]}),
        ("vllm_draft", {"choices": [], "metrics": [1]}),
        ("vllm_draft", {"choices": [{"token_ids": 5}]}),
    ],
)
def test_values_of_another_kind_are_the_servers_fault(name, chunk):
    with replayed(name) as state:
        fed(state, chunk)
        with pytest.raises(GenerationFailed, match=r"not understood|not numbers|cannot be|ended the stream"):
            ran(state)


@pytest.mark.parametrize(
    ("name", "path", "body"),
    [
        ("llama_cpp_draft", "/props", "[" * 200_000),
        ("llama_cpp_draft", "/props", '{"default_generation_settings": [1]}'),
        ("llama_cpp_draft", "/tokenize", '{"tokens": ["a"]}'),
        ("llama_cpp_draft", "/tokenize", '{"tokens": [{"id": "x"}]}'),
        ("vllm_draft", "/v1/models", '{"data": ["x"]}'),
        ("vllm_draft", "/tokenize", '{"tokens": ["a"]}'),
    ],
)
def test_answers_of_another_kind_are_the_servers_fault(name, path, body):
    with replayed(name) as state:
        state.instead[path] = (200, {"Content-Type": "application/json"}, body)
        with pytest.raises(ServerUnavailable):
            ran(state)


def test_a_server_that_does_not_stop_is_stopped():
    def endless(handler, lines):
        for number in range(2, 10_000):
            timings = {"predicted_n": 4097 * number, "predicted_ms": 1.0 * number}
            handler.wfile.write(f"data: {json.dumps({'content': 'x', 'tokens': [1], 'timings': timings})}\n\n".encode())

    with replayed("llama_cpp_draft") as state:
        state.send = endless
        with pytest.raises(GenerationFailed, match=r"more than the 64 tokens|cycle of"):
            ran(state)


def test_a_run_that_is_left_while_the_server_is_silent_ends_at_once():
    """Its connection is closed, on which the server stops, and the thread that reads is gone."""
    with replayed("llama_cpp_draft") as state:
        state.send = slowly([30.0])
        server = attach(state.url)
        events = server.begin(Asked(REPEAT, seed=1)).events()
        assert isinstance(next(events), Started)
        assert isinstance(next(events), Cycle)
        began = time.monotonic()
        events.close()
        assert time.monotonic() - began < 1
        assert not [t for t in threading.enumerate() if t.name == "server"]


def test_the_key_is_never_shown(monkeypatch):
    monkeypatch.setenv(KEY, "sk-SECRET\nx")
    with pytest.raises(UsageError) as refused:
        Server("http://127.0.0.1:9")
    assert "SECRET" not in str(refused.value)
    monkeypatch.setenv(KEY, "sk-SECRET")
    with replayed("llama_cpp_draft") as state:
        state.instead["/completion"] = (400, {}, '{"error": "bad header Authorization: Bearer sk-SECRET"}')
        with pytest.raises(ServerUnavailable) as said:
            ran(state)
        assert "SECRET" not in said.value.message
        assert "•••" in said.value.message


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


# -- counters ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_servers_counters_are_the_sum_of_its_runs(name):
    """Over all recorded streams; with a stop string vLLM counts tokens that it throws away, and tells no totals."""
    recorded = recording(name)
    before, after = (read_counters(recorded[key]["body"], 0.0)[0].counters for key in ("/metrics", "/metrics after"))
    tags = [tag for tag in PLAN if said_by(recorded, tag)[1][1] is not None]
    sums = [sum(said_by(recorded, tag)[1][i] for tag in tags) for i in (1, 2)]
    found = [after.drafted - before.drafted, after.accepted - before.accepted]
    if len(tags) == len(PLAN):
        assert found == sums
    else:
        assert all(a >= b for a, b in zip(found, sums, strict=True))
    assert sum(after.accepted_at) == after.accepted


def test_an_engine_that_begins_anew_is_not_held_against_its_past():
    def reading(n):
        text = recording("vllm_ngram")["/metrics after"]["body"]
        first = read_counters(text, float(n))[0]
        return replace(first, counters=Counters(float(n), n, 4 * n, 2 * n, 3 * n, (n, n)))

    history = EngineHistory(reading(10))
    assert history.recent is None
    history.take(reading(14))
    assert history.recent.acceptance_rate == 0.5
    assert history.recent_tokens_per_second == 3.0
    history.take(reading(2))
    assert history.recent is None
    assert history.total.drafted == 8


def test_counters_are_read_over_and_over_and_one_failure_is_forgiven():
    with replayed("llama_cpp_draft") as state:
        read = histories(state.url, 0.01)
        assert next(read)[""].latest.server == "llama.cpp"
        whole, asked = state.said["/metrics"]["body"], len(state.requests)
        state.failing["/metrics"] = 2
        assert next(read)[""].before is not None
        assert len(state.requests) == asked + 3
        state.said["/metrics"]["body"] = whole
        state.instead["/metrics"] = (500, {}, "")
        with pytest.raises(ServerUnavailable, match="500"):
            next(read)
        state.instead["/metrics"] = (501, {}, "")
        with pytest.raises(ServerUnavailable, match="has no /metrics"):
            once(state.url)
        for rubbish in (
            "",
            "hello\n",
            "\x00{",
            "other:counter_total 3\n",
            "vllm:foo 1\n",
            "vllm:generation_tokens_total NaN\n",
        ):
            state.instead["/metrics"] = (200, {}, rubbish)
            with pytest.raises(ServerUnavailable):
                once(state.url)
