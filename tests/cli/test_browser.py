"""The screen of watch in a browser: one process a visit, for this machine's own page alone."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time

import aiohttp
import psutil
import pytest

COMMAND = [sys.executable, "-m", "specdec_cli"]


@pytest.fixture
def address(tmp_path):
    """The address of a server of the demo, and its process."""
    command = [*COMMAND, "watch", "--demo", "--browser"]
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path)}
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
    ) as server:
        line = server.stderr.readline()
        server.stderr.readline()
        time.sleep(1.0)  # it says where before it listens there
        yield line.partition(" is at ")[2].strip(), server
        server.kill()


async def screen(address, keys, until):
    """Visit, press these keys, and give what is shown until a word of it comes."""
    seen = ""
    async with aiohttp.ClientSession() as session, session.ws_connect(f"{address}/ws?width=100&height=30") as socket:
        async for message in socket:
            seen += message.data.decode("utf-8", "replace") if isinstance(message.data, bytes) else str(message.data)
            if keys and "paused" in seen:
                for key in keys:
                    await socket.send_json(["stdin", key])
                keys = ()
            if until in seen:
                return seen
    return seen


def test_the_demo_is_shown_stepped_and_left_and_no_other_page_drives_it(address):
    """One test, and one server at a time: two that begin at once may look at the same port."""
    url, server = address
    assert url.startswith("http://127.0.0.1:80")
    no_other_page_drives(url)
    seen = asyncio.run(asyncio.wait_for(screen(url, ["n"], "cycle 1"), 60))
    assert "A recorded run" in seen
    server.send_signal(signal.SIGINT)
    assert server.wait(20) == 0
    until = time.monotonic() + 20
    while any("--demo" in part for p in psutil.Process().children(recursive=True) for part in p.cmdline()):
        assert time.monotonic() < until, "a visit's process outlives the server"
        time.sleep(0.2)


def no_other_page_drives(url):
    async def asked(**headers):
        async with aiohttp.ClientSession() as session, session.get(url, headers=headers) as answer:
            return answer.status, answer.headers.get("Content-Security-Policy", "")

    status, policy = asyncio.run(asked())
    assert status == 200
    assert "default-src 'self'" in policy
    for headers in ({"Host": "evil.example"}, {"Origin": "http://evil.example"}):
        assert asyncio.run(asked(**headers)) == (403, "")


def test_a_prompt_that_is_piped_in_can_be_read_but_once():
    found = subprocess.run([*COMMAND, "watch", "--browser"], input="hello", capture_output=True, text=True, timeout=60)
    assert found.returncode == 2
    assert "begins a run at each visit" in found.stderr


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (("-f", "/nowhere"), "cannot be read"),
        (("-k", "-3", "hi"), "-3"),
        (("",), "empty"),
        (("--demo", "--lesson"), "a recorded run of their own"),
    ],
)
def test_what_each_visit_would_be_refused_for_is_said_at_once(specdec, typed, said):
    result = specdec("watch", "--browser", *typed)
    assert result.code == 2
    assert said in result.err


def test_without_textual_serve_a_sentence_says_what_to_install(specdec, monkeypatch):
    monkeypatch.setitem(sys.modules, "textual_serve.server", None)
    result = specdec("watch", "--demo", "--browser")
    assert result.code == 2
    assert "specdec-cli[browser]" in result.err
