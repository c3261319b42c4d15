"""A GPU's own kernels against torch's operations, on a CPU: run by `test_fused.py` in a process of its own, in which Triton
interprets them. It must be told so before it is imported."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from specdec_engine.runtime import attention, fused, ops
from specdec_engine.runtime.blocks import Blocks
from specdec_engine.runtime.ops import HeadNorms
from specdec_engine.runtime.shape import Unsupported
from tests.fakes import CPU, lean, tiny_llama
from tests.models.test_architectures import build

CLOSE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
"""Of the largest value."""


def plain_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    """Triton 3.7 keeps a bfloat16 as its two bytes, and multiplies them as if they were a whole number."""
    both = (
        x.data if x.dtype.scalar != tl.bfloat16 else (x.data.astype(np.uint32) << 16).view(np.float32) for x in (a, b)
    )
    return interpreter.TensorHandle(np.matmul(*both, dtype=d.data.dtype) + d.data, d.dtype.scalar)


interpreter.InterpreterBuilder.create_dot = plain_dot
cut_short = interpreter._convert_float


def rounded(numbers, dtype, to, mode):
    """A GPU rounds to the nearest bfloat16, where Triton's interpreter cuts off."""
    if (dtype, to) != (tl.float32, tl.bfloat16):
        return cut_short(numbers, dtype, to, mode)
    nearest = torch.from_numpy(np.array(numbers)).bfloat16()
    return nearest.view(torch.int16).numpy().view(np.uint16)


interpreter._convert_float = rounded


@pytest.fixture
def numbers():
    random = torch.Generator().manual_seed(0)
    return lambda *size, dtype=torch.float32: torch.randn(*size, generator=random).to(dtype)


def close(found, expected, of=None):
    assert found.dtype == expected.dtype
    found, expected = found.float(), expected.float()
    return (found - expected).abs().max() <= CLOSE[of or torch.float32] * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "size"), [(1, 64), (5, 576), (3, 2100)])
@pytest.mark.parametrize("adds", [False, True])
def test_add_norm(numbers, n, size, dtype, adds):
    x, more, weight = numbers(n, size), numbers(n, size, dtype=dtype) if adds else None, numbers(size)
    mine, theirs = x.clone(), x.clone()
    assert close(
        fused.add_norm(mine, more, weight, 1e-5, dtype), ops.add_norm(theirs, more, weight, 1e-5, dtype), dtype
    )
    assert torch.equal(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("n", "heads", "groups", "size"), [(1, 4, 4, 64), (3, 8, 2, 128), (16, 3, 1, 32), (21, 8, 1, 16)]
)
@pytest.mark.parametrize("normed", [False, True])
def test_rotate(numbers, n, heads, groups, size, dtype, normed):
    qkv = numbers(n, (heads + 2 * groups) * size, dtype=dtype)
    rotation = torch.polar(torch.full((n, size // 2), 1.3), numbers(n, size // 2))
    norms = HeadNorms(numbers(size), numbers(size), 1e-6) if normed else None
    positions = torch.arange(7, 7 + n)
    mine = numbers(2 * groups, 40, size, dtype=dtype)
    theirs = mine.clone()
    queries = fused.rotate(qkv.clone(), rotation, positions, mine, norms)
    assert close(queries, ops.rotate(qkv.clone(), rotation, positions, theirs, norms), dtype)
    assert close(mine, theirs, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "size"), [(1, 96), (4, 1536)])
def test_gate(numbers, n, size, dtype):
    gate_up = numbers(n, 2 * size, dtype=dtype)
    assert close(fused.gate(gate_up), ops.gate(gate_up), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("n", "heads", "groups", "size", "end", "window"),
    [
        (1, 4, 4, 64, 1, None),
        (1, 8, 1, 128, 700, None),
        (2, 9, 3, 64, 65, None),
        (5, 14, 2, 64, 1999, None),
        (16, 8, 1, 64, 131, None),
        (16, 4, 2, 16, 16, None),
        (1, 4, 2, 64, 900, 100),
        (9, 8, 4, 128, 333, 70),
        (3, 4, 1, 64, 40, 4096),
    ],
)
def test_attend(numbers, n, heads, groups, size, end, window, dtype):
    """Behind the end lies what nobody may look at."""
    queries, kept = numbers(n, heads, size, dtype=dtype), numbers(2 * groups, end + 70, size, dtype=dtype)
    kept[:, end:] = torch.nan
    positions = torch.arange(end - n, end)
    mask = attention.causal_mask(positions, end, window, torch.float32)
    expected = attention.attend_in_groups(queries.float(), kept[:, :end].float(), mask).to(dtype)
    assert close(fused.attend(queries, kept, positions, window), expected, dtype)


def test_positions_need_not_be_known_to_the_host(numbers):
    """The same call, on the same tensors, looks further when they say so: what a recording does."""
    queries, kept, positions = numbers(2, 4, 64), numbers(4, 512, 64), torch.tensor([3, 4])
    for end in (5, 77, 512):
        positions.copy_(torch.arange(end - 2, end))
        mask = attention.causal_mask(positions, end, None, torch.float32)
        assert close(
            fused.attend(queries, kept, positions, None), attention.attend_in_groups(queries, kept[:, :end], mask)
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("config", "options"),
    [
        ("LlamaConfig", {"head_dim": 16}),
        ("MistralConfig", {"sliding_window": 5, "head_dim": 16}),
        ("Qwen3Config", {"head_dim": 16}),
    ],
)
def test_a_models_logits(config, options, dtype, monkeypatch):
    """Prompt, single rows, several and a rollback, in few splits: the interpreter takes a millisecond for each."""
    monkeypatch.setattr(fused, "_PROGRAMS", 8)
    model = build(config, {"num_hidden_layers": 2, **options})
    tokens = torch.randint(0, 97, (40,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        scratch = model(tokens[None], use_cache=False).logits[0]
    ours, theirs = (lean(model, capacity=128, dtype=dtype, ops=way) for way in (fused.FUSED, ops.TORCH))
    assert ours.decoder.reads_length_on_device
    assert not theirs.decoder.reads_length_on_device
    for start, end in ((0, 20), (20, 21), (21, 26), (26, 40)):
        off, torchs = (
            (each.forward(tokens[start:end], end - start).float() - scratch[start:end]).pow(2).mean().sqrt()
            for each in (ours, theirs)
        )
        assert off <= (1e-4 if dtype == torch.float32 else 2 * torchs)  # a wrong index is off by 100 times as much
        for each in (ours, theirs):
            each.forward(torch.arange(3), 1)
            each.rollback(end)


def test_the_check_at_load_passes_what_is_right_and_refuses_what_is_not(monkeypatch):
    monkeypatch.setattr(fused, "_PROGRAMS", 8)
    shape = lean(tiny_llama(hidden=64)).decoder.shape
    for dtype in (torch.float32, torch.bfloat16):
        assert fused.checked(shape, dtype, CPU) is fused.FUSED
    monkeypatch.setattr(
        fused, "FUSED", ops.Ops(fused.add_norm, fused.rotate, lambda x: ops.gate(x) * 1.2, fused.attend)
    )
    with pytest.raises(Unsupported, match="gate of 1 rows is not what torch computes"):
        fused.checked(shape, torch.bfloat16, CPU)
    with pytest.raises(Unsupported, match="heads of 8 are no power of two"):
        fused.checked(lean(tiny_llama()).decoder.shape, torch.bfloat16, CPU)


def test_blocks_of_a_cpu_have_none_of_it():
    assert Blocks(lean(tiny_llama()).decoder.shape, torch.float32, CPU).ops.attend is not fused.attend
