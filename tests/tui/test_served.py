"""A server behind the screen, as it was recorded."""

from __future__ import annotations

import asyncio
import time

import pytest

from specdec_tui.live import Request
from specdec_tui.served import ServerStream
from tests.servers.record import REPEAT
from tests.servers.replayed import replayed, slowly, whole
from tests.tui.conftest import on_screen, screen_of


def shown(state, act, size, tmp_path):
    return on_screen(ServerStream(state.url, Request(REPEAT, seed=1), tmp_path / "log"), act, size=size)


async def until(app, text):
    for _ in range(200):
        if text in screen_of(app):
            return
        await asyncio.sleep(0.02)
    raise AssertionError(f"no {text} in\n{screen_of(app)}")


@pytest.mark.parametrize("size", [(80, 24), (120, 40)])
@pytest.mark.parametrize(("name", "who"), [("llama_cpp_draft", "llama.cpp, exact"), ("vllm_ngram", "vLLM, inferred")])
def test_a_servers_cycles_are_on_the_screen_with_who_tells_them(name, who, size, tmp_path):
    async def act(app, pilot):
        await until(app, "finished")
        found = screen_of(app)
        await pilot.press("right_square_bracket")
        await pilot.pause()
        assert "the server keeps" in app.screen.remark
        await pilot.press("R", "o")  # the same once more, and its prompt
        await pilot.pause(0.1)
        await until(app, "finished")
        assert ("quick" if name == "llama_cpp_draft" else "sentence") in screen_of(app)
        return found

    with replayed(name) as state:
        found = shown(state, act, size, tmp_path)
        assert len([path for path, *_ in state.requests if "completion" in path]) == 2
    assert who in found
    assert "▶ prompt," in found


def test_a_run_that_breaks_off_is_said_on_the_screen(tmp_path):
    def dies(handler, lines):
        handler.wfile.write(f"{lines[0]}\n\n".encode())

    async def act(app, pilot):
        await until(app, "ended the stream")
        return screen_of(app)

    with replayed("llama_cpp_draft") as state:
        state.send = dies
        assert "× broken" in shown(state, act, (120, 40), tmp_path)


def test_another_answer_is_not_kept_waiting_by_a_silent_server(tmp_path):
    async def act(app, pilot):
        await until(app, "The")
        state.send = whole
        await pilot.press("R")
        await until(app, "finished")

    with replayed("llama_cpp_draft") as state:
        state.send = slowly([30.0])
        began = time.monotonic()
        shown(state, act, (120, 40), tmp_path)
        assert time.monotonic() - began < 15
