"""The check that kernels of our own compute what torch does: made once, of those that were compiled."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from specdec_engine.runtime.compiled import Unavailable
from specdec_engine.runtime.native_records import TILED, Matrix
from specdec_engine.runtime.weights import Grouped

if TYPE_CHECKING:  # which imports this file
    from specdec_engine.runtime.native import Kernels


@torch.inference_mode()
def check(kernels: Kernels) -> None:
    """Raises Unavailable for kernels that do not compute what torch does. On sizes that leave a rest everywhere, some ms."""
    some = torch.Generator().manual_seed(0)
    rows, columns, n = 2 * kernels.lanes + 5, 96, 2 * TILED + 1
    x = torch.randn(n, columns, generator=some)
    for bits, group, offsets in ((4, 32, True), (8, 32, True), (8, 32, False), (8, 16, False)):
        least, most = (0, 16) if bits == 4 else (-128, 128)
        q = torch.randint(least, most, (rows, columns), generator=some, dtype=torch.int8)
        scale, offset = (torch.rand(rows, columns // group, generator=some).half().float() for _ in range(2))
        weight = Grouped(q, scale, offset if offsets else None, bits)
        words, constants = kernels.pack(weight)
        matrix = Matrix(bits, group, offsets, rows, columns, words.data_ptr(), constants.data_ptr(), None)
        _check_products(kernels, f"with {bits} bits", x, matrix, weight.dense())
        _check_close(f"rows in {bits} bits", kernels.rows(torch.arange(rows), matrix), weight.dense())
    dense = torch.randn(rows, columns, generator=some).bfloat16()
    matrix = Matrix(16, 0, 0, rows, columns, dense.data_ptr(), None, None)
    _check_products(kernels, "in bfloat16", x, matrix, dense.float())
    for size, dtype in ((24, torch.bfloat16), (64, torch.float32)):
        kept = torch.randn(4, 140, size, generator=some).to(dtype)
        _check_attention(kernels, torch.randn(7, 6, size, generator=some), kept)
    _check_rows(kernels, torch.randn(2, 4 * kernels.lanes + 3, generator=some))


def _check_rows(kernels: Kernels, logits: Tensor) -> None:
    p, q = logits.softmax(-1)
    _check_close("softmax", kernels.warp(logits, 1.0), logits.softmax(-1))
    left, ends = kernels.residual(p, q, 0), p.double().cumsum(0)
    _check_close("residual", p if left is None else left, (p - q).clamp(min=0) / (p - q).clamp(min=0).sum())
    alike, broken = logits.round(), logits.index_fill(1, torch.tensor([kernels.lanes]), torch.nan)
    wrong = any(kernels.best(rows) != rows.argmax(-1).tolist() for rows in (logits, alike))
    if wrong or kernels.best(broken) is not None:
        raise Unavailable("they were compiled, and the largest numbers that they find are wrong")
    if kernels.place(p, 0.5) != int((ends > 0.5 * ends[-1]).nonzero()[0]) or kernels.top(p, 1)[0][0] != int(p.argmax()):
        raise Unavailable("they were compiled, and what they draw is wrong")


def _check_products(kernels: Kernels, what: str, x: Tensor, matrix: Matrix, dense: Tensor) -> None:
    _check_close(f"products {what}", kernels.multiply(x, matrix), x @ dense.T)
    if kernels.tiled:
        read = kernels.reading_as("tiles").multiply(x, matrix, reading=True)
        _check_close(f"products {what}, in tiles,", read, x.bfloat16().float() @ dense.bfloat16().float().T)


def _check_attention(kernels: Kernels, queries: Tensor, kept: Tensor) -> None:
    """Check a chain of tokens, the last that are cached, and a tree."""
    n, end = len(queries), kept.shape[1]
    positions = torch.arange(end - n, end)
    seen = kernels.attend(torch.float32, queries, kept, positions, None)
    keys, values = (part.float().repeat_interleave(3, 0) for part in kept.chunk(2))
    mask = torch.arange(end) <= positions[:, None]
    expected = scaled_dot_product_attention(queries.transpose(0, 1), keys, values, mask)
    _check_close("attention", seen, expected.transpose(0, 1).reshape(n, -1))
    hidden = torch.tensor([0, 0, 0b10, 0b110, 0, 0b1011, 0b100000])
    seen = kernels.attend(torch.float32, queries, kept, positions, None, hidden)
    mask[:, end - n :] &= (hidden[:, None] >> torch.arange(n) & 1) == 0
    expected = scaled_dot_product_attention(queries.transpose(0, 1), keys, values, mask)
    _check_close("attention in a tree", seen, expected.transpose(0, 1).reshape(n, -1))


def _check_close(what: str, found: Tensor, expected: Tensor) -> None:
    if not (found - expected).abs().max() <= 1e-3 * expected.abs().max():
        raise Unavailable(f"they were compiled, and their {what} are wrong")
