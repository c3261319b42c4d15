"""Servers as processes of ours: waited for, told apart from those that die, and always stopped. Here with a server of
Python's own; `test_real.py` starts real ones."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from specdec_cli.servers import attached
from specdec_engine.attach import launch
from specdec_engine.attach.http import Server
from specdec_engine.attach.launch import free_port, launched
from specdec_engine.errors import ServerUnavailable, UsageError
from specdec_engine.tune.engines import Starting, command_of

ANSWERS = """
import sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if time.time() - begun > float(sys.argv[2]) else 503)
        self.end_headers()
begun = time.time()
print("listening", flush=True)
HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def command(port, after=0.3):
    return (sys.executable, "-c", ANSWERS, str(port), str(after))


def until_it_answers(command, folder, port=0):
    return launched(command, port or free_port(), {}, folder / "l", lambda text: None)


def gone(pid, seconds=5.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            os.kill(pid, 0)
            if Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":  # ended, and not yet waited for
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.02)
    return False


def test_it_is_waited_for_and_stopped(tmp_path):
    port, said = free_port(), []
    with launched(command(port), port, {}, tmp_path / "log" / "s.log", said.append) as url:
        assert Server(url).get("/health").status == 200
    assert said
    with pytest.raises(ServerUnavailable):
        Server(url).get("/health")
    assert "listening" in (tmp_path / "log" / "s.log").read_text()


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("raise ValueError('no memory')", "ended with code 1 before it answered: ValueError: no memory"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "ended with signal SIGILL"),
        ("print('bye')", "ended with code 0 before it answered: bye"),
        ("", "its log is empty"),
    ],
)
def test_one_that_ends_is_said_with_the_reason_in_its_log(program, said, tmp_path):
    with pytest.raises(ServerUnavailable, match=said), until_it_answers((sys.executable, "-c", program), tmp_path):
        raise AssertionError("it never answered")


def test_one_that_is_not_there_and_one_that_never_answers(tmp_path, monkeypatch):
    with (
        pytest.raises(ServerUnavailable, match="no-such-server cannot be started: No such file"),
        until_it_answers(("no-such-server",), tmp_path),
    ):
        raise AssertionError("it never answered")
    monkeypatch.setattr(launch, "_PATIENCE_S", 0.6)
    with (
        pytest.raises(ServerUnavailable, match="has not answered"),
        until_it_answers(command(port := free_port(), after=60), tmp_path, port),
    ):
        raise AssertionError("it never answered")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_it_does_not_outlive_us(number, tmp_path):
    """However this process ends, and by a kill that cannot be caught."""
    port = free_port()
    ours = textwrap.dedent(f"""
        import signal, time
        from pathlib import Path
        from specdec_engine.attach.launch import launched
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with launched({command(port)!r}, {port}, {{}}, Path({str(tmp_path / "l")!r}), lambda text: None):
            print("ready", flush=True)
            time.sleep(60)
    """)
    parent = subprocess.Popen([sys.executable, "-c", ours], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                              env={**os.environ, "PYTHONPATH": "engine"})  # fmt: skip
    with parent:
        assert parent.stdout.readline() == "ready\n"
        found = subprocess.run(["pgrep", "-f", f"python.* {port} "], capture_output=True, text=True).stdout.split()
        pids = [int(pid) for pid in found if int(pid) != parent.pid]
        assert pids
        parent.send_signal(number)
        parent.wait(15)
    assert all(gone(pid, 15.0) for pid in pids)


# -- command lines -----------------------------------------------------------------------------------------------------


def starting(engine, draft, **more):
    return Starting(engine, "org/target", draft, 3, sampled=False, **more)


def test_the_same_pair_in_each_engines_words():
    vllm = command_of(starting("vllm", "org/draft", flags=("--tensor-parallel-size", "2")), 7)
    assert vllm[:3] == ("vllm", "serve", "org/target")
    assert '"model": "org/draft"' in vllm[vllm.index("--speculative-config") + 1]
    assert vllm[-6:] == ("--host", "127.0.0.1", "--port", "7", "--tensor-parallel-size", "2")
    assert "--per-request-spec-decode-metrics" in vllm
    plain = command_of(starting("vllm", "org/draft", python="/p").plain, 7)
    assert plain[:5] == ("/p", "-m", "vllm.entrypoints.openai.api_server", "--model", "org/target")
    assert not any("spec" in word for word in plain)
    llama = command_of(starting("llama.cpp", "ngram:5", gguf="t.gguf"), 7)
    assert llama[:5] == ("llama-server", "-m", "t.gguf", "--spec-type", "ngram-simple")
    assert "--metrics" in llama
    sglang = command_of(starting("sglang", "org/draft"), 7)
    assert "STANDALONE" in sglang


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        (starting("vllm", "self:4"), "have vLLM draft as self:4"),
        (starting("llama.cpp", "ngram"), "needs org/target as a GGUF"),
        (starting("llama.cpp", "org/draft", gguf="t.gguf"), "needs the draft org/draft as a GGUF"),
        (Starting("vllm", "t.gguf", "ngram", 3, sampled=False), "needs t.gguf as a folder"),
    ],
)
def test_what_an_engine_cannot_run_is_refused(wanted, said):
    with pytest.raises(UsageError, match=said):
        command_of(wanted, 7)


def test_flags_of_a_server_stand_behind_dashes(monkeypatch):
    monkeypatch.setattr(attached, "SERVER_FLAGS", [])
    typed = ["generate", "--engine", "vllm", "hello", "--", "--tensor-parallel-size", "2"]
    assert attached.take_server_flags(typed) == typed[:4]
    assert typed[5:] == attached.SERVER_FLAGS
    other = ["generate", "--", "-5 degrees"]
    assert attached.take_server_flags(other) == other
