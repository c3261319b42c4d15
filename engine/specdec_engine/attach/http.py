"""One server over HTTP, with bounds on what it may send: time, lines, bodies. It is not trusted with anything.

The standard library's client, because it reads a line of at most so many bytes, follows no redirect, and sends the key to the
host that was typed alone.
"""

from __future__ import annotations

import json
import os
import socket
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from time import perf_counter
from typing import Any
from urllib.parse import urlsplit

from specdec_engine.errors import GenerationFailed, ServerUnavailable, SpecdecError, UsageError, first_line
from specdec_engine.record.text import printable

KEY = "SPECDEC_API_KEY"
"""The environment variable with the key of a server; an argument would stand in the list of processes."""
MOST_LINE = 1_000_000
"""Bytes of a line of a stream: what vLLM says of a token with 20 others is 3 kB."""
_MOST_BODY = 16_000_000
_CONNECT_S, _ANSWER_S = 5.0, 30.0
"""To connect, and for an answer that is not a run's."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole response."""

    status: int
    kind: str
    """Its content type, in lower case, without parameters."""
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode("utf-8", "replace")

    def json(self) -> Any:
        """None for what is no JSON."""
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError):
            return None


@dataclass(frozen=True, slots=True)
class Line:
    """A `data:` line of a stream."""

    at_s: float
    """When it arrived, seconds of the clock that `perf_counter` has."""
    value: Any
    """The JSON in it; None for the `[DONE]` that ends some streams."""


class Server:
    """A server by its address."""

    def __init__(self, url: str, silence_s: float = 120.0) -> None:
        """silence_s: how long nothing may come before it is given up: a long prompt is read without a word. Raises UsageError
        for what is no address of a server."""
        try:
            parts = urlsplit(url if "//" in url else f"http://{url}")
            port = parts.port
        except ValueError as error:
            raise UsageError(f"--attach is no address: {error}", _SUCH_AS) from None
        if parts.username is not None or parts.password is not None:
            raise UsageError("--attach has a password in it, which other users could see", f"put the key into {KEY}")
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise UsageError(f"--attach {url} is no address of a server", _SUCH_AS)
        self.url = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/').removesuffix('/v1')}"
        self._https, self._host, self._port = parts.scheme == "https", parts.hostname, port
        self._path = parts.path.rstrip("/").removesuffix("/v1")
        self._silence_s = silence_s
        self._key = _key()
        self._streams = set[socket.socket]()

    def hang_up(self) -> None:
        """End whatever is read, from another thread; nothing happens if there is nothing."""
        for connected in tuple(self._streams):
            _hang_up(connected)

    def get(self, path: str) -> Answer:
        """Raises ServerUnavailable where no answer comes."""
        with self._asked("GET", path, None, min(self._silence_s, _ANSWER_S)) as response:
            return _whole(response, self.url)

    def post(self, path: str, value: Any) -> Answer:
        """The same with a JSON body."""
        with self._asked("POST", path, value, min(self._silence_s, _ANSWER_S)) as response:
            return _whole(response, self.url)

    @contextmanager
    def stream(self, path: str, value: Any) -> Iterator[Iterator[Line]]:
        """The lines of a stream of server-sent events, which are read as fast as they come, in a thread of their own: vLLM
        joins the tokens of several cycles for a reader that is slow. Leaving the block closes the connection, on which
        servers stop the run.

        Raises ServerUnavailable for an answer that is no such stream, and GenerationFailed, while lines are taken, for a
        stream that breaks off.
        """
        with self._asked("POST", path, value, self._silence_s) as response, _Lines() as arrived:
            if response.status != 200 or _kind(response) != "text/event-stream":
                raise refused(_whole(response, self.url), self.url, path)
            reader = threading.Thread(target=_read, args=(response, self.url, arrived), name="server", daemon=True)
            reader.start()
            yield iter(arrived)

    @contextmanager
    def _asked(self, method: str, path: str, value: Any, silence_s: float) -> Iterator[HTTPResponse]:
        connection = (HTTPSConnection if self._https else HTTPConnection)(self._host, self._port, timeout=_CONNECT_S)
        with ExitStack() as leaving:
            leaving.callback(connection.close)
            with _said(self.url):
                connection.connect()
                connected = connection.sock
                connected.settimeout(silence_s)
                body = None if value is None else json.dumps(value).encode()
                connection.request(method, self._path + path, body, _headers(body, self._key))
                response = leaving.enter_context(closing(connection.getresponse()))
            # The last to be entered, and the first that is left: to close a response waits for who reads from it.
            leaving.callback(_hang_up, connected)
            self._streams.add(connected)
            leaving.callback(self._streams.discard, connected)
            yield response


def _hang_up(connected: socket.socket) -> None:
    """Wakes the thread that reads from it."""
    with suppress(OSError):
        connected.shutdown(socket.SHUT_RDWR)


_SUCH_AS = "give one such as http://127.0.0.1:8000"


def _key() -> str:
    """From the environment; empty where there is none. Raises UsageError for one that no header can carry."""
    key = os.environ.get(KEY, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise UsageError(f"the key in {KEY} has characters that no key has", "set it again, on one line")
    return key


def shown(text: str) -> str:
    """What a server said, on one line, safe to show, and without the key, should it say that."""
    key = os.environ.get(KEY, "").strip()
    line = " ".join(text.split())
    return printable(line.replace(key, "•••") if key else line)[:300]


@contextmanager
def understood(url: str, kind: type[SpecdecError]) -> Iterator[None]:
    """What a server sends may be of any shape: raises an error of this kind where reading it meets another than was meant."""
    try:
        yield
    except SpecdecError:
        raise
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, OverflowError, RecursionError) as error:
        raise kind(f"{url} sends what is not understood: {shown(first_line(error))}", _OTHER) from error


def _headers(body: bytes | None, key: str) -> Mapping[str, str]:
    found = {"Accept": "application/json, text/event-stream, text/plain", "Connection": "close"}
    if body is not None:
        found["Content-Type"] = "application/json"
    if key:
        found["Authorization"] = f"Bearer {key}"
    return found


@contextmanager
def _said(url: str) -> Iterator[None]:
    """What befalls a connection, in a sentence."""
    try:
        yield
    except TimeoutError:
        raise ServerUnavailable(f"{url} does not answer", "is it running, and not too busy?") from None
    except (OSError, HTTPException, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ServerUnavailable(f"{url} cannot be reached: {shown(str(why))}", "is a server running there?") from None


def _whole(response: HTTPResponse, url: str) -> Answer:
    with _said(url):
        body = response.read(_MOST_BODY + 1)
    if len(body) > _MOST_BODY:
        raise ServerUnavailable(f"{url} sends more than {_MOST_BODY // 1_000_000} MB where a few lines are due", _OTHER)
    return Answer(response.status, _kind(response), body)


_OTHER = "is this the address of vLLM, SGLang or llama.cpp?"


def _kind(response: HTTPResponse) -> str:
    return response.headers.get("Content-Type", "").partition(";")[0].strip().lower()


def refused(answer: Answer, url: str, path: str) -> ServerUnavailable:
    """Why an answer is not the one that was asked for."""
    if answer.status in (401, 403):
        if os.environ.get(KEY, "").strip():
            return ServerUnavailable(f"{url} refuses the key in {KEY} ({answer.status})", "is it this server's?")
        return ServerUnavailable(f"{url} wants a key ({answer.status})", f"put it into the environment variable {KEY}")
    if 300 <= answer.status < 400:
        return ServerUnavailable(
            f"{url}{path} sends elsewhere ({answer.status}), which is not followed", "give the address that it is at"
        )
    if answer.status == 200:
        return ServerUnavailable(
            f"{url}{path} sends {answer.kind or 'something without a type'}, and no stream of events", _OTHER
        )
    return ServerUnavailable(f"{url}{path} says {answer.status}: {told(answer)}", _HINTS.get(answer.status, _OTHER))


_HINTS = {
    400: "the server does not take this request",
    404: _OTHER,
    429: "the server has too much to do; try again later",
    500: "the server's own log says more",
    503: "the server is not ready; try again when it is",
}


def told_of(value: Any) -> str:
    """The same of an error in a stream."""
    return told(Answer(200, "application/json", json.dumps(value).encode()))


def told(answer: Answer) -> str:
    """What a server says of an error, on one line."""
    value = answer.json()
    for key in ("error", "message", "detail"):
        if isinstance(value, dict) and key in value:
            value = value[key]
    text = value if isinstance(value, str) else answer.text if value is None else json.dumps(value)
    return shown(text) or "nothing more"


class _Lines:
    """Lines between the thread that reads them and the one that takes them, at most so many bytes of them."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[tuple[Line | Exception | None, int]] = deque()
        self._bytes, self._left = 0, False

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *error: object) -> None:
        """Nobody takes any more: whoever waits to put one need not."""
        with self._changed:
            self._left = True
            self._changed.notify_all()

    def put(self, item: Line | Exception | None, size: int = 0) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._left or self._bytes < _MOST_WAITING)
            self._bytes += size
            self._waiting.append((item, size))
            self._changed.notify_all()

    def __iter__(self) -> Iterator[Line]:
        """Raises what the reader met."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
                item, size = self._waiting.popleft()
                self._bytes -= size
                self._changed.notify_all()
            if item is None:
                return
            if isinstance(item, Exception):
                raise item
            yield item


_MOST_WAITING = 64_000_000
"""Bytes of lines that are read and not yet taken."""


def _read(response: HTTPResponse, url: str, arrived: _Lines) -> None:
    """In a thread: every line with the moment at which it came."""
    try:
        while line := response.readline(MOST_LINE + 1):
            if len(line) > MOST_LINE:
                raise GenerationFailed(f"{url} sends a line of more than {MOST_LINE:,} bytes", "the server is at fault")
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            arrived.put(Line(perf_counter(), None if data == b"[DONE]" else _parsed(data, url)), len(line))
        arrived.put(None)
    except GenerationFailed as error:
        arrived.put(error)
    except TimeoutError:
        arrived.put(GenerationFailed(f"{url} went silent", "is it still running? what came until then is valid"))
    except Exception as error:  # a thread that dies in silence would leave its reader waiting
        why = getattr(error, "strerror", None) or type(error).__name__
        arrived.put(GenerationFailed(f"{url} broke off: {why}", "what came until then is valid"))


def _parsed(data: bytes, url: str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        begins = shown(data[:60].decode("utf-8", "replace"))
        raise GenerationFailed(f"{url} sends a line that is no JSON: {begins}", "the server is at fault") from None
