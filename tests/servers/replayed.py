"""A server that says what a real one said (`record.py`), and can be made to fail on the way."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.servers.record import PLAN, RECORDED

NAMES = ("llama_cpp_draft", "llama_cpp_ngram", "vllm_draft", "vllm_ngram")
STREAMS = ("/completion", "/v1/completions")


def recording(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RECORDED / f"{name}.json").read_text("utf-8"))
    return found


class Replayed:
    """What the server did, and how it is to fail."""

    def __init__(self, said: dict[str, Any]) -> None:
        self.said = said
        self.tag = "repeat"
        self.requests: list[tuple[str, Any, dict[str, str]]] = []
        self.send: Callable[[BaseHTTPRequestHandler, Sequence[str]], None] = whole
        self.instead: dict[str, tuple[int, dict[str, str], str]] = {}
        """By path: status, headers and body of another answer."""
        self.failing: dict[str, int] = {}
        """By path: how many times it fails before it answers."""
        self.url = ""


def without_speculation(state: Replayed, token_ms: float) -> None:
    """Make what a llama.cpp server said that of one that drafts nothing, so slow."""
    state.said["/slots"]["body"] = '[{"speculative": false}]'
    lines = state.said[state.tag]["lines"]
    for at, text in enumerate(lines):
        if text.startswith("data: {") and "timings" in (value := json.loads(text[6:])):
            number = value["timings"]["predicted_n"]
            value["timings"] = {"predicted_n": number, "prompt_ms": 1.0, "predicted_ms": token_ms * number}
            lines[at] = f"data: {json.dumps(value)}"


def whole(handler: BaseHTTPRequestHandler, lines: Sequence[str]) -> None:
    for line in lines:
        handler.wfile.write(f"{line}\n\n".encode())


@contextmanager
def replayed(name: str) -> Iterator[Replayed]:
    """Serves on a free port until the block ends."""
    state = Replayed(recording(name))

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            """Nothing."""

        def do_GET(self) -> None:
            self._answer(None)

        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            self._answer(json.loads(self.rfile.read(length)))

        def _answer(self, value: Any) -> None:
            state.requests.append((self.path, value, dict(self.headers)))
            if state.failing.get(self.path, 0):
                state.failing[self.path] -= 1
                self._head(500, {})
            elif self.path in state.instead:
                status, headers, body = state.instead[self.path]
                self._head(status, headers)
                self.wfile.write(body.encode())
            elif self.path in STREAMS:
                stream = state.said[state.tag]
                self._head(stream["status"], {"Content-Type": stream["type"]})
                with suppress(BrokenPipeError, ConnectionResetError):  # the client may be gone
                    state.send(self, stream["lines"])
            else:
                key = f"{state.tag} tokenize" if self.path == "/tokenize" else self.path
                answer = state.said.get(key, {"status": 404, "type": "text/plain", "body": "no such path"})
                self._head(answer["status"], {"Content-Type": answer["type"]})
                self.wfile.write(answer["body"].encode("utf-8"))

        def _head(self, status: int, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, text in headers.items():
                self.send_header(name, text)
            self.end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.block_on_close = True, False  # one that is silent is not waited for
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def slowly(pauses: Sequence[float]) -> Callable[[BaseHTTPRequestHandler, Sequence[str]], None]:
    """Pieces of bytes that end anywhere, with pauses between them."""

    def send(handler: BaseHTTPRequestHandler, lines: Sequence[str]) -> None:
        data = "".join(f"{line}\n\n" for line in lines).encode()
        size = max(1, len(data) // (len(pauses) + 1))
        for i, pause in zip(range(0, len(data), size), [*pauses, 0.0, 0.0], strict=False):
            handler.wfile.write(data[i : i + size])
            handler.wfile.flush()
            time.sleep(pause)
        handler.wfile.write(data[(len(pauses) + 2) * size :])

    return send


__all__ = ["NAMES", "PLAN", "Replayed", "recording", "replayed", "slowly", "whole"]
