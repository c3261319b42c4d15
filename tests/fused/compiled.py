"""Compiles every kernel of `runtime/fused.py` for cards that are not here; run by `test_fused.py`."""

from __future__ import annotations

import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from specdec_engine.runtime import fused

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
ROOM = {80: 163 * 1024, 90: 227 * 1024}
"""Bytes of shared memory a program may use, by compute capability."""


def kernels(dtype, n, heads, groups, size, window):
    """(kernel, its arguments' types and constants, options)"""
    own, cut = f"*{NAMES[dtype]}", fused.cut_for(n, heads, groups, dtype)
    yield (
        fused._add_norm,
        {"x": "*fp32", "more": own, "weight": "*fp32", "out": own, "eps": "fp32"},
        {"size": 4096, "adds": True, "block": 4096},
        {"num_warps": 8},
    )
    rotate = {"qkv": own, "rotation": "*fp32", "positions": "*i64", "kept": own, "queries": own}
    yield (
        fused._rotate,
        {**rotate, "q_norm": "*fp32", "k_norm": "*fp32", "eps": "fp32", "capacity": "i32"},
        {"heads": heads, "groups": groups, "half": size // 2, "norms": True},
        {"num_warps": 1},
    )
    yield fused._gate, {"gate_up": own, "out": own, "size": "i32"}, {"block": 1024}, {}
    parts = {"parts": "*fp32", "bests": "*fp32", "totals": "*fp32"}
    whole = {"queries": own, "kept": own, "positions": "*i64", **parts, "n": "i32", "capacity": "i32", "scale": "fp32"}
    constants = {"groups": groups, "together": heads // groups, "size": size, "window": window}
    yield (
        fused._attend,
        whole,
        {**constants, "splits": cut.splits, "rows": cut.rows, "block": cut.block},
        {"num_stages": 2},
    )
    yield fused._combine, {**parts, "out": own}, {"size": size, "splits": cut.splits}, {}


def main() -> None:
    for dtype in NAMES:
        for capability, room in ROOM.items():
            for n, heads, groups, size, window in ((1, 32, 8, 128, 0), (16, 32, 8, 128, 4096), (16, 14, 2, 64, 0)):
                for kernel, signature, constants, options in kernels(dtype, n, heads, groups, size, window):
                    types = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
                    source = ASTSource(kernel, types, constants)
                    made = triton.compile(source, GPUTarget("cuda", capability, 32), {"num_warps": 4, **options})
                    assert made.metadata.shared <= room, (kernel, dtype, made.metadata.shared)
                    if "-v" in sys.argv:
                        print(capability, dtype, n, size, kernel.__name__, made.metadata.shared)  # noqa: T201


main()
