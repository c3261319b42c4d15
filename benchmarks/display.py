"""What does watching cost? Tokens a second of the same runs with the screen attached and without.

    python benchmarks/display.py [--tokens 256] [--rounds 5] [--size 120x40]

Without: events are folded in a loop, as `generate` does. With: the app is on a terminal of its own (a pty whose output is
read and dropped), and draws every cycle it can. The two take turns. Wall time from the first cycle to the last, and the
engine's own. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import pty
import sys
import tempfile
import threading
import time
from collections import deque
from pathlib import Path
from statistics import median
from typing import Any

from specdec_engine import Cycle, LoadOptions, Summary, load_pair
from specdec_engine.machine import usable_cores
from specdec_tui.app import SpecdecApp
from specdec_tui.live import LiveSource, Request

PROMPT = "Explain step by step how a lighthouse works, and why ships still need one."


class Clocked(deque[Any]):
    """Events, each with the time it came."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []
        self.events: list[Any] = []

    def append(self, event: Any) -> None:
        self.times.append(time.perf_counter())
        self.events.append(event)
        super().append(event)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", default="120x40")
    options = parser.parse_args()
    pair = load_pair(options=LoadOptions(threads=usable_cores()))
    request = Request(PROMPT, max_tokens=options.tokens, seed=None)
    arms = {"without": lambda: without(pair, request), "with": lambda: attached(pair, request, options.size)}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in arms}
    for arm in arms.values():
        arm()  # the first of each sets things up
    for _ in range(options.rounds):
        for name, arm in arms.items():
            found[name].append(arm())
            print(name, found[name][-1], file=sys.stderr)
    ratio = {
        key: median(a[key] / b[key] for a, b in zip(found["with"], found["without"], strict=True))
        for key in ("wall", "engine")
    }
    json.dump(
        {
            "schema": "specdec.display/1",
            "environment": dict(pair.environment),
            "conditions": vars(options),
            "tokens_per_second": {
                name: {k: median(r[k] for r in runs) for k in ("wall", "engine")} for name, runs in found.items()
            },
            "with / without": ratio,
            "samples": found,
        },
        sys.stdout,
        indent=1,
    )


def figures(events: list[Any], times: list[float]) -> dict[str, float]:
    summary = Summary()
    for event in events:
        summary = summary.plus(event)
    at = [t for e, t in zip(events, times, strict=True) if isinstance(e, Cycle)]
    first = next(len(e.emitted) for e in events if isinstance(e, Cycle))
    return {"wall": (summary.emitted - first) / (at[-1] - at[0]), "engine": summary.tokens_per_second or math.nan}


def without(pair: Any, request: Request) -> dict[str, float]:
    events, times = [], []
    for event in pair.decode(pair.encode(request.prompt), max_tokens=request.max_tokens):
        events.append(event)
        times.append(time.perf_counter())
    return figures(events, times)


def attached(pair: Any, request: Request, size: str) -> dict[str, float]:
    """On a pty, in this process: Textual writes to the terminal that stderr is."""
    import fcntl
    import struct
    import termios

    columns, rows = map(int, size.split("x"))
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    reader = threading.Thread(target=_dropped, args=(leader,), daemon=True)
    reader.start()
    kept = {fd: os.dup(fd) for fd in (0, 1, 2)}
    source = LiveSource(lambda report: pair, request, Path(tempfile.gettempdir()) / "display.log")
    source._events = clocked = Clocked()
    try:
        for fd in kept:
            os.dup2(follower, fd)
        app = SpecdecApp(source, speed=math.inf)

        async def leave_when_over() -> None:
            while not app.player.view.frame.over:
                await asyncio.sleep(0.1)
            app.exit()

        app.call_later(lambda: app.run_worker(leave_when_over()))
        app.run()
    finally:
        for fd, copy in kept.items():
            os.dup2(copy, fd)
            os.close(copy)
        os.close(follower)
    return figures(clocked.events, clocked.times)


def _dropped(leader: int) -> None:
    try:
        while os.read(leader, 65536):
            pass
    except OSError:  # the other side is closed
        pass


if __name__ == "__main__":
    main()
