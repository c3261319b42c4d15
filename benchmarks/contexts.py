"""Time a pass after a short text and after a long one, by how keys and values are kept and attended to on a CPU.

    python benchmarks/contexts.py [--target builtin] [--contexts 512,4096,8000] [--rows 1,4,512] [--rounds 5]

The arms share the weights and take turns: `bfloat16` and `float32` are our own kernels on a cache of that dtype, and `torch`
is torch's operations on float32. Caches hold random numbers, since what a pass takes depends on their size alone. Medians in
ms, and each arm's ratio to `bfloat16`, pass by pass. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Mapping
from statistics import median
from time import perf_counter
from typing import Any

import torch

from specdec_engine.models.loading import load_model
from specdec_engine.models.options import LoadOptions
from specdec_engine.runtime.decoder import Decoder
from specdec_engine.runtime.lean import LeanRuntime
from specdec_engine.runtime.ops import TORCH
from specdec_engine.system.machine import cpu_flags, cpu_name, usable_cores


def main() -> None:
    options = parsed()
    loaded = load_model(options.target, LoadOptions(offline=True))
    runtime = loaded.runtime
    assert isinstance(runtime, LeanRuntime)
    assert isinstance(runtime.decoder, Decoder)
    if runtime.decoder.cache_dtype != torch.bfloat16:
        sys.exit("there are no kernels of our own here: specdec info says why")
    found = {context: measured(arms_of(runtime.decoder, context), context, options) for context in options.contexts}
    report = {
        "schema": "specdec.contexts/1",
        "environment": {"torch": torch.__version__, "threads": torch.get_num_threads(), "weights": loaded.weights},
        "conditions": {
            "processor": cpu_name(),
            "cores": usable_cores(),
            "instructions": cpu_flags(),
            **{key: str(value) for key, value in vars(options).items()},
        },
        "contexts": found,
    }
    json.dump(report, sys.stdout, indent=1)


def parsed() -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="builtin")
    parser.add_argument(
        "--contexts", type=numbers, default=[512, 4096, 8000], help="tokens that are cached before a pass"
    )
    parser.add_argument("--rows", type=numbers, default=[1, 4, 512], help="of a pass")
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


def arms_of(decoder: Decoder, context: int) -> Mapping[str, LeanRuntime]:
    """The same weights three times, each with a full cache of its own."""
    arms = dict[str, LeanRuntime]()
    for name in ("bfloat16", "float32", "torch"):
        arm = copy.copy(decoder)
        arm.cache_dtype = torch.bfloat16 if name == "bfloat16" else torch.float32
        if name == "torch":
            arm.ops, arm._whole = TORCH, None
        arms[name] = LeanRuntime(arm, name, None, context + 600)
        arms[name]._cache.normal_()
        arms[name]._cached = context
    return arms


def measured(arms: Mapping[str, LeanRuntime], context: int, options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of the arms by rows, and their ratios to the first."""
    found = dict[str, Any]()
    for rows in options.rows:
        seconds: dict[str, list[float]] = {name: [] for name in arms}
        for turn in range(options.rounds + 1):
            for name, runtime in arms.items():
                took = pass_s(runtime, rows, context)
                if turn:  # the first is the warm-up
                    seconds[name].append(took)
        ratios = {
            name: [s / first for s, first in zip(of, seconds["bfloat16"], strict=True)] for name, of in seconds.items()
        }
        found[str(rows)] = {
            "ms": {name: round(1e3 * median(of), 2) for name, of in seconds.items()},
            "against bfloat16": {name: round(median(of), 2) for name, of in ratios.items() if name != "bfloat16"},
        }
        print(f"after {context}, {rows} rows: {found[str(rows)]}", file=sys.stderr)
    return found


def pass_s(runtime: LeanRuntime, rows: int, context: int) -> float:
    """Seconds of a pass; of narrow ones the median of nine."""
    took = list[float]()
    for _ in range(9 if rows < 64 else 1):
        tokens = torch.arange(rows)
        began = perf_counter()
        runtime.forward(tokens, 1 if rows > 64 else rows)
        took.append(perf_counter() - began)
        runtime.rollback(context)
    return median(took)


if __name__ == "__main__":
    main()
