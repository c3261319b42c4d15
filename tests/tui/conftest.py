"""The app without a terminal, and its screens as text."""

from __future__ import annotations

import asyncio
import math
import os
from collections import deque
from pathlib import Path

import pytest

from specdec_tui.app import SpecdecApp
from specdec_tui.streams import Stage
from tests.tui.scenes import name

GOLDENS = Path(__file__).parent / "goldens"


class Told:
    """A source whose events are given by the test."""

    def __init__(self, events=(), *, live=False, stage=None):
        self.live, self.stage = live, stage
        self.steers, self.unsteered = frozenset(), "this run is recorded"
        self.coming = deque(events)
        self.allowed = []
        self.started = self.closed = False

    def start(self):
        self.started = True

    def close(self):
        self.closed = True

    def drain(self):
        return [self.coming.popleft() for _ in range(len(self.coming))]

    def name(self, token):
        return name(token)

    def allow(self, cycles):
        self.allowed.append(cycles)


def lines_of(app):
    return [strip.text.rstrip() for strip in app.screen._compositor.render_strips()]


def screen_of(app):
    return "\n".join(lines_of(app)) + "\n"


def on_screen(source, act, *, size=(120, 40), speed=math.inf):
    """Run the app on this source, `await act(app, pilot)`, and return what it returned."""

    async def run():
        app = SpecdecApp(source, speed=speed)
        async with app.run_test(size=size) as pilot:
            await pilot.pause(0.15)
            return await act(app, pilot)

    return asyncio.run(run())


@pytest.fixture
def golden():
    """Compare with a file of tests/tui/goldens; SPECDEC_GOLDENS=1 writes it anew."""

    def check(found: str, file: str) -> None:
        path = GOLDENS / file
        if os.environ.get("SPECDEC_GOLDENS"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(found, "utf-8")
        assert found == path.read_text("utf-8"), f"{file} differs; SPECDEC_GOLDENS=1 writes it anew"

    return check


__all__ = ["Stage", "Told"]
