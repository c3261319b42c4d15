"""What does watching cost? Tokens a second of the same run with the screen attached and without.

    python benchmarks/display.py [--k 2] [--tokens 256] [--rounds 5] [--size 120x40]

Without: events are folded in a loop, as `generate` does. With: the app is on a terminal of its own (a pty whose output is
read and dropped). Each run has a process of its own, as a user's has: a second thread that computes in one process gets a
second team of OpenMP threads, and more threads than cores halve the speed of both. The two take turns. Wall time from the
first cycle to the last, and the engine's own, of the second run of each process. k is fixed unless `--k auto` is given: what
that learns differs from run to run by more than a screen costs, so that it takes more rounds. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import json
import math
import os
import pty
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections import deque
from pathlib import Path
from statistics import median
from typing import Any

from specdec_engine import Cycle, LoadOptions, Pair, Summary, load_pair
from specdec_engine.models.progress import Report
from specdec_engine.system.machine import usable_cores
from specdec_tui.app import SpecdecApp
from specdec_tui.live import LiveStream, Request

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
    parser.add_argument("--k", default="2", help="a number, or auto")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", default="120x40")
    parser.add_argument("--arm", choices=list(ARMS), help="one run of this kind, in this process")
    options = parser.parse_args()
    if options.arm is not None:
        request = Request(PROMPT, k="auto" if options.k == "auto" else int(options.k), max_tokens=options.tokens)
        json.dump(ARMS[options.arm](request, options.size), sys.stdout)
        return
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in ARMS}
    for _ in range(options.rounds):
        for name in ARMS:
            command = [sys.executable, __file__, *sys.argv[1:], "--arm", name]
            found[name].append(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))
            print(name, found[name][-1]["tokens_per_second"], file=sys.stderr)
    rates = {name: [run["tokens_per_second"] for run in runs] for name, runs in found.items()}
    ratio = {
        key: median(a[key] / b[key] for a, b in zip(rates["with"], rates["without"], strict=True))
        for key in ("wall", "engine")
    }
    json.dump(
        {
            "schema": "specdec.display/1",
            "environment": found["without"][0]["environment"],
            "conditions": vars(options),
            "tokens_per_second": {
                name: {k: median(r[k] for r in runs) for k in ("wall", "engine")} for name, runs in rates.items()
            },
            "with / without": ratio,
            "samples": rates,
        },
        sys.stdout,
        indent=1,
    )


def load(report: Report = lambda progress: None) -> Pair:
    return load_pair(options=LoadOptions(threads=usable_cores(), report=report))


def figures(events: list[Any], times: list[float]) -> dict[str, float]:
    summary = Summary()
    for event in events:
        summary = summary.plus(event)
    at = [t for e, t in zip(events, times, strict=True) if isinstance(e, Cycle)]
    first = next(len(e.emitted) for e in events if isinstance(e, Cycle))
    return {"wall": (summary.emitted - first) / (at[-1] - at[0]), "engine": summary.tokens_per_second or math.nan}


def result(pair: Pair, events: list[Any], times: list[float]) -> dict[str, Any]:
    return {"environment": dict(pair.environment), "tokens_per_second": figures(events, times)}


def without(request: Request, size: str) -> dict[str, Any]:
    pair = load()
    for _ in range(2):
        events, times = list[Any](), list[float]()
        for event in pair.decode(pair.encode(request.prompt), k=request.k, max_tokens=request.max_tokens):
            events.append(event)
            times.append(time.perf_counter())
    return result(pair, events, times)


def attached(request: Request, size: str) -> dict[str, Any]:
    """On a pty, in this process: Textual writes to the terminal that stderr is."""
    columns, rows = map(int, size.split("x"))
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    threading.Thread(target=_dropped, args=(leader,), daemon=True).start()
    kept = {fd: os.dup(fd) for fd in (0, 1, 2)}
    stream = LiveStream(load, request, Path(tempfile.gettempdir()) / "display.log")
    stream._events = clocked = Clocked()
    try:
        for fd in kept:
            os.dup2(follower, fd)
        app = SpecdecApp(stream, speed=math.inf)

        async def leave_after_two() -> None:
            while not app.player.view.frame.over:
                await asyncio.sleep(0.1)
            clocked.events.clear()
            clocked.times.clear()
            stream.again(request)
            while app.player.view.frame.run < 2 or not app.player.view.frame.over:
                await asyncio.sleep(0.1)
            app.exit()

        app.call_later(lambda: app.run_worker(leave_after_two()))
        app.run()
    finally:
        for fd, copy in kept.items():
            os.dup2(copy, fd)
            os.close(copy)
    assert stream._pair is not None
    return result(stream._pair, clocked.events, clocked.times)


def _dropped(leader: int) -> None:
    try:
        while os.read(leader, 65536):
            pass
    except OSError:  # the other side is closed
        pass


ARMS = {"without": without, "with": attached}

if __name__ == "__main__":
    main()
