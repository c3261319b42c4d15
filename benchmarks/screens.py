"""How long does a person wait? From the command to its first frame, and from a key to the screen it asked for.

    python benchmarks/screens.py [--rounds 5] [--size 120x40]

On a terminal of its own (a pty) that answers as terminals do: a frame has come when the last byte of its synchronised update
was read. Keys are pressed on a trace of at least 3,000 cycles and 10,000 tokens, made of the bundled run over and over.
Prints one JSON object; seconds, medians and the slowest.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import platform
import pty
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

from specdec_engine.record.events import Cycle, Finished, SettingChanged
from specdec_engine.record.trace import Records, read_lines
from specdec_engine.system.machine import cpu_name, usable_cores
from specdec_tui.streams import DEMO

CYCLES, TOKENS = 3_000, 10_000
KEYS = {
    "next cycle": b"\x1b[C",
    "previous cycle": b"\x1b[D",
    "step within a cycle": b".",
    "next rejection": b"!",
    "first cycle": b"\x1b[H",
    "newest cycle": b"\x1b[F",
    "next token": b"h",
    "scroll the text": b"\x1b[5~",
}
_END = b"\x1b[?2026l"
_ASKED = b"\x1b[?2026$p"


class Terminal:
    """A process on a pty, and everything that it wrote, with times."""

    def __init__(self, command: list[str], columns: int, rows: int) -> None:
        self.leader, follower = pty.openpty()
        self._size(columns, rows)
        self.began = time.perf_counter()
        environment = {**os.environ, "TERM": "xterm-256color", "COLORTERM": "truecolor"}
        self.process = subprocess.Popen(
            command, stdin=follower, stdout=follower, stderr=follower, env=environment, start_new_session=True
        )
        os.close(follower)
        self._written = bytearray()
        self._times: list[tuple[int, float]] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        try:
            while data := os.read(self.leader, 65536):
                asked = _ASKED in data
                self._written += data
                self._times.append((len(self._written), time.perf_counter()))
                if asked:
                    os.write(self.leader, b"\x1b[?2026;2$y")
        except OSError:  # the process has left
            pass

    def until(self, text: bytes, after: int = 0, seconds: float = 30.0) -> tuple[int, float]:
        """Where `text` ends in what was written after so many bytes, and when it was read."""
        limit = time.perf_counter() + seconds
        while time.perf_counter() < limit:
            at = self._written.find(text, after)
            if at >= 0:
                end = at + len(text)
                return end, next(t for length, t in self._times if length >= end)
            time.sleep(0.0005)
        raise TimeoutError(f"{text!r} never came; last {bytes(self._written[-300:])!r}")

    def settled(self, quiet: float = 0.3) -> int:
        """Bytes written, once nothing more comes."""
        while not self._times or time.perf_counter() - self._times[-1][1] < quiet:
            time.sleep(0.01)
        return len(self._written)

    def seconds_to_frame(self, act: Callable[[], object]) -> float:
        """From an act to the end of the frame that it leads to."""
        before = self.settled()
        began = time.perf_counter()
        act()
        return self.until(_END, before)[1] - began

    def resize(self, columns: int, rows: int) -> None:
        self._size(columns, rows)
        os.kill(self.process.pid, signal.SIGWINCH)

    def _size(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self.leader, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def close(self) -> None:
        os.write(self.leader, b"q")
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
        os.close(self.leader)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", default="120x40")
    options = parser.parse_args()
    columns, rows = map(int, options.size.split("x"))
    first = {
        "watch --demo": _starts(["watch", "--demo"], b"tok/s", columns, rows, options.rounds),
        "watch PROMPT, before the models are loaded": _starts(
            ["watch", "hello"], b"specdec", columns, rows, options.rounds
        ),
    }
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "long.jsonl"
        cycles, tokens = _lengthened(trace)
        keys = _keys(trace, columns, rows, options.rounds)
    found = {
        "schema": "specdec.screens/1",
        "environment": {
            "python": platform.python_version(),
            "platform": f"{sys.platform}-{platform.machine()}",
            "cpu": cpu_name(),
            "threads": usable_cores(),
        },
        "conditions": vars(options),
        "first_frame_s": {name: _summed(times) for name, times in first.items()},
        "history": {"cycles": cycles, "tokens": tokens},
        "key_to_frame_s": {name: _summed(times) for name, times in keys.items()},
    }
    json.dump(found, sys.stdout, indent=1)


def _summed(times: list[float]) -> dict[str, object]:
    return {"median": round(median(times), 4), "slowest": round(max(times), 4), "samples": [round(t, 4) for t in times]}


def _starts(arguments: list[str], text: bytes, columns: int, rows: int, rounds: int) -> list[float]:
    found = list[float]()
    for _ in range(rounds + 1):  # the first, which reads the files from disk, is dropped
        terminal = Terminal([sys.executable, "-m", "specdec_cli", *arguments], columns, rows)
        end, _ = terminal.until(text)
        found.append(terminal.until(_END, end)[1] - terminal.began)
        terminal.close()
    return found[1:]


def _lengthened(path: Path) -> tuple[int, int]:
    """The bundled run over and over, as one."""
    lines = list(read_lines(DEMO))
    started, *events = [line.event for line in lines]
    pieces = {token: piece for line in lines for token, piece in line.pieces.items()}
    once = [event for event in events if isinstance(event, Cycle)]
    cycles, tokens = list[Cycle](), 0
    while len(cycles) < CYCLES or tokens < TOKENS:
        part = once[len(cycles) % len(once)]
        end = "recovered" if part.end in ("stop", "length") else part.end
        cycles.append(replace(part, index=len(cycles), end=end, context=(part.context or 0) + tokens))
        tokens += len(part.emitted)
    turned = [event for event in events if isinstance(event, SettingChanged)]
    records = Records(lambda token: pieces.get(token, ""))
    with path.open("w", encoding="utf-8") as file:
        for event in (started, *turned, *cycles, Finished("length", tokens, len(cycles), 0.1)):
            file.write(json.dumps(records.of(event)) + "\n")
    return len(cycles), tokens


def _keys(trace: Path, columns: int, rows: int, rounds: int) -> dict[str, list[float]]:
    terminal = Terminal([sys.executable, "-m", "specdec_cli", "replay", str(trace)], columns, rows)
    terminal.until(b"tok/s")
    time.sleep(2.0)  # all of it is read
    found: dict[str, list[float]] = {name: [] for name in KEYS}
    found["resize"] = []
    for _ in range(rounds):
        os.write(terminal.leader, KEYS["newest cycle"])  # and no longer plays
        for name in ("previous cycle", "next token", "step within a cycle", "scroll the text", "first cycle"):
            found[name].append(terminal.seconds_to_frame(partial(os.write, terminal.leader, KEYS[name])))
        for name in ("next rejection", "next cycle", "newest cycle"):
            found[name].append(terminal.seconds_to_frame(partial(os.write, terminal.leader, KEYS[name])))
        for size in ((columns - 20, rows - 4), (columns, rows)):
            found["resize"].append(terminal.seconds_to_frame(partial(terminal.resize, *size)))
    terminal.close()
    return found


if __name__ == "__main__":
    main()
