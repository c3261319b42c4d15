"""A server as a process of ours: started, waited for, always stopped."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic, sleep

from specdec_engine.attach.http import Server
from specdec_engine.errors import ServerUnavailable
from specdec_engine.record.text import printable
from specdec_engine.system.signals import terminated_by

Say = Callable[[str], None]

_PATIENCE_S = 900.0
"""Until it answers: vLLM compiles for minutes, and may fetch the weights."""
_LEAVE_S = 10.0
"""What a server is given to end by itself."""
_PRIVATE = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
"""No reports of usage to anybody."""


def free_port() -> int:
    """One that nobody listens on at this moment."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


@contextmanager
def launched(command: Sequence[str], port: int, environment: Mapping[str, str], log: Path, say: Say) -> Iterator[str]:
    """The address of a server that was started with this command and answers. It is stopped when the block ends, however it
    ends: by Ctrl-C, by SIGTERM, and by the death of this process.

    Raises ServerUnavailable, with the last line of its log, for one that cannot be started, ends, or never answers.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as written, terminated_by(SystemExit):
        try:
            process = subprocess.Popen(
                (sys.executable, "-I", "-S", "-c", _WARDEN, *command),
                stdin=subprocess.PIPE,
                stdout=written,
                stderr=subprocess.STDOUT,
                env={**os.environ, **_PRIVATE, **environment},
                start_new_session=True,
            )
        except OSError as error:
            raise ServerUnavailable(
                f"{command[0]} cannot be started: {error.strerror or error}",
                "install it, or name the Python that has it with --engine-python",
            ) from None
        try:
            url = f"http://127.0.0.1:{port}"
            _wait(process, url, log, say)
            yield url
        finally:
            _stop(process)


_WARDEN = """
import os, signal, subprocess, sys, threading, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
try:
    child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL,
                             preexec_fn=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))
except OSError as error:
    print(f"{sys.argv[1]} cannot be started: {error.strerror}", flush=True)
    os._exit(127)
def watch():
    os.read(0, 1)
    os.killpg(0, signal.SIGTERM)
    time.sleep(10)
    os.killpg(0, signal.SIGKILL)
threading.Thread(target=watch, daemon=True).start()
code = child.wait()
os._exit(code if code >= 0 else 128 - code)
"""
"""Runs the server, and ends its whole group when whoever holds the other end of its standard input is gone, however that
ended: vLLM swallows a first signal while it starts, and its engine is a process of its own."""


def _wait(process: subprocess.Popen[bytes], url: str, log: Path, say: Say) -> None:
    server, begun = Server(url, silence_s=5.0), monotonic()
    while monotonic() - begun < _PATIENCE_S:
        if (code := process.poll()) is not None:
            if code == 127:
                raise ServerUnavailable(
                    last_line(log), "install it, or name the Python that has it with --engine-python"
                )
            raise ServerUnavailable(
                f"the server ended with {_ending(code)} before it answered: {why(log)}",
                f"it was built for another processor; its log is {log}"
                if code == 128 + signal.SIGILL
                else f"its log is {log}",
            )
        with suppress(ServerUnavailable):
            if server.get("/health").status == 200:
                return
        say(f"starting the server, {last_line(log)[:80]}")
        sleep(0.25)
    raise ServerUnavailable(f"the server has not answered for {_PATIENCE_S:.0f} s", f"its log is {log}")


def _ending(code: int) -> str:
    return f"signal {signal.Signals(code - 128).name}" if 128 < code < 160 else f"code {code}"


def last_line(log: Path) -> str:
    """The newest line of a log that says something, safe to show."""
    with suppress(OSError):
        tail = log.read_bytes()[-4000:].decode("utf-8", "replace")
        lines = [line.strip() for line in tail.splitlines() if line.strip()]
        return printable(lines[-1]) if lines else "its log is empty"
    return "it has no log"


def why(log: Path) -> str:
    """The first error in a log, which later ones follow from; else its newest line."""
    with suppress(OSError):
        found = _ERROR.search(log.read_bytes()[-1_000_000:].decode("utf-8", "replace"))
        if found is not None:
            return printable(found.group().strip()[:300])
    return last_line(log)


_ERROR = re.compile(r"(?<![\w`'\"(])\w*(?:Error|Exception): [^\n]+|(?<=\d E )[^\n]+")
"""Of Python, and not where a warning speaks of one; of llama.cpp's log."""


def _stop(process: subprocess.Popen[bytes]) -> None:
    """The whole group: vLLM's engine is a process of its own."""
    for number, patience in ((signal.SIGTERM, _LEAVE_S), (signal.SIGKILL, _LEAVE_S)):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience)
            break
    with suppress(ProcessLookupError, PermissionError):  # whoever of the group is left
        os.killpg(process.pid, signal.SIGKILL)
    if process.stdin is not None:
        process.stdin.close()
