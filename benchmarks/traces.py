"""Seconds to read a trace of 100,000 cycles, every type and every bound checked.

    python benchmarks/traces.py

The bundled run over and over, which was recorded with distributions before and after temperature: 1.6 kB a cycle. The reader
takes turns with `json.loads` of the same lines, which checks nothing.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

from specdec_engine.record.events import Cycle, Started
from specdec_engine.record.trace import Records, read_lines
from specdec_engine.system.machine import cpu_flags, cpu_name
from specdec_tui.streams import DEMO

CYCLES, ROUNDS = 100_000, 3


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "long.jsonl"
        _write(path)
        ours, parsed = list[float](), list[float]()
        for _ in range(ROUNDS):
            ours.append(_seconds(lambda: sum(1 for _ in read_lines(path))))
            parsed.append(_seconds(lambda: sum(1 for line in path.open("rb") if json.loads(line))))
        found = {
            "cycles": CYCLES,
            "bytes": path.stat().st_size,
            "read_trace_s": ours,
            "json_loads_s": parsed,
            "ratio": median(a / b for a, b in zip(ours, parsed, strict=True)),
            "cpu": cpu_name(),
            "instructions": cpu_flags(),
            "python": sys.version.split()[0],
        }
    print(json.dumps(found, indent=1))


def _write(path: Path) -> None:
    lines = list(read_lines(DEMO))
    pieces = {token: text for line in lines for token, text in line.pieces.items()}
    once = [line.event for line in lines if isinstance(line.event, Cycle)]
    records = Records(lambda token: pieces[token])
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps(records.of(next(line.event for line in lines if isinstance(line.event, Started)))) + "\n")
        for index in range(CYCLES):
            file.write(json.dumps(records.of(replace(once[index % len(once)], index=index))) + "\n")


def _seconds(work: Callable[[], int]) -> float:
    began = time.perf_counter()
    assert work() == CYCLES + 1
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
