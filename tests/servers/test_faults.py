"""Servers that fail, and servers that mean harm: each ends with a sentence, and nothing is lost."""

from __future__ import annotations

import json
import socket
import threading
import time

import pytest

from specdec_engine.attach.asked import Asked
from specdec_engine.attach.attached import attach
from specdec_engine.attach.http import KEY, MOST_LINE, Server
from specdec_engine.attach.load import at_once
from specdec_engine.errors import GenerationFailed, ServerUnavailable, UsageError
from specdec_engine.record.events import Cycle, Started
from tests.servers.record import REPEAT
from tests.servers.replayed import replayed, slowly
from tests.servers.runs import ran


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


def test_a_load_that_is_interrupted_is_given_up():
    """Not after all that was still to be asked."""

    def interrupted(number):
        if number == 1:
            time.sleep(0.3)
            raise UsageError("enough")
        list(server.begin(Asked(REPEAT, seed=1)).events())

    with replayed("llama_cpp_draft") as state:
        state.send = slowly([30.0])
        server = attach(state.url)
        began = time.monotonic()
        with pytest.raises(UsageError, match="enough"):
            at_once(interrupted, 50, 2, server)
        assert time.monotonic() - began < 5
