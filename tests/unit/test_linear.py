"""Packed weights: read from their blocks as the gguf library reads them, and multiplied as their dense values would be."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from specdec_engine.runtime.linear import Dense, Int4, Int8, packing_block, project, quantized
from specdec_engine.weights import Entry, GgufWeights, Grouped
from tests.fakes import CPU

gguf = pytest.importorskip("gguf")
ROWS, COLUMNS = 48, 96


def weight(seed=0):
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed))


def stored(tmp_path, kind, heads=0):
    """A matrix in one of GGUF's formats, as the gguf library writes it, and the values it says are in there."""
    member = gguf.GGMLQuantizationType[kind]
    raw = gguf.quantize(weight().numpy(), member)
    file = tmp_path / "raw"
    file.write_bytes(b"head" + raw.tobytes())
    entry = Entry(kind, (ROWS, COLUMNS), 4, raw.nbytes, heads)
    return GgufWeights(file, {"w": entry}), torch.from_numpy(gguf.dequantize(raw, member).reshape(ROWS, COLUMNS))


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "F16", "BF16", "F32", "Q5_0"])
def test_blocks_hold_what_the_gguf_library_says(tmp_path, kind):
    weights, expected = stored(tmp_path, kind)
    found = weights.dense("w").float()
    assert torch.allclose(found, expected.float(), atol=0, rtol=1e-6)
    assert isinstance(weights.stored("w"), Grouped) == (kind in ("Q4_0", "Q4_1", "Q8_0"))


def test_k_quants_of_four_bits_are_groups_of_32_too(tmp_path):
    """The gguf library reads Q4_K and does not write it: any bytes will do, with scales of a usual size."""
    raw = np.random.default_rng(0).integers(0, 256, (ROWS, 144), np.uint8)
    raw[:, :4] = np.array([0.01, 0.02], np.float16).view(np.uint8)
    file = tmp_path / "raw"
    file.write_bytes(raw.tobytes())
    expected = gguf.dequantize(raw, gguf.GGMLQuantizationType.Q4_K)
    weights = GgufWeights(file, {"w": Entry("Q4_K", (ROWS, 256), 0, raw.nbytes)})
    assert isinstance(weights.stored("w"), Grouped)
    assert np.allclose(weights.dense("w").numpy(), expected, rtol=1e-5, atol=1e-5)


def test_interleaved_heads_come_back_in_halves(tmp_path):
    """llama.cpp stores a head's rows 0, d/2, 1, d/2 + 1 ...; Hugging Face has 0, 1 ... d/2, d/2 + 1 ..."""
    plain, _ = stored(tmp_path, "Q4_1")
    turned, _ = stored(tmp_path, "Q4_1", heads=3)
    halves = [head * 16 + i for head in range(3) for i in (*range(0, 16, 2), *range(1, 16, 2))]
    assert torch.equal(turned.dense("w"), plain.dense("w")[halves])
    assert torch.equal(turned.stored("w").dense(), turned.dense("w"))


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
@pytest.mark.parametrize("bias", [False, True])
def test_packed_matrices_multiply_as_their_values_do(tmp_path, kind, bias):
    """To bfloat16's rounding of scales, inputs and result: 2 % of a typical entry; a wrong nibble is off by far more."""
    weights, expected = stored(tmp_path, kind)
    x = torch.randn(5, COLUMNS).bfloat16()
    added = torch.randn(ROWS) if bias else None
    found = project([weights.stored("w")], added, torch.bfloat16, CPU, "auto")
    assert isinstance(found, Int4)
    exact = x.float() @ expected.T + (0 if added is None else added)
    assert (found(x).float() - exact).abs().max() < 0.02 * exact.abs().max()
    assert found.form == ("int8" if kind == "Q8_0" else "int4")


def test_forms_by_choice(tmp_path):
    packed, _ = stored(tmp_path, "Q4_1")
    mixed = [packed.stored("w"), weight()]
    assert isinstance(project([packed.stored("w")], None, torch.float32, CPU, "none"), Dense)
    assert isinstance(project(mixed, None, torch.bfloat16, CPU, "auto"), Dense)
    assert isinstance(project([weight()], None, torch.bfloat16, CPU, "int8"), Int8)
    assert isinstance(project([weight()], None, torch.bfloat16, CPU, "int4"), Int4)
    eight = stored(tmp_path, "Q8_0")[0].stored("w")
    assert isinstance(project([eight], None, torch.bfloat16, CPU, "auto"), Int4)  # as two halves
    assert project([eight], None, torch.bfloat16, CPU, "int4").form == "int4"
    assert isinstance(project([packed.stored("w")], None, torch.bfloat16, CPU, "int8"), Int8)
    assert isinstance(project([packed.stored("w")], None, torch.bfloat16, CPU, "light"), Int4)  # stays as it is
    assert isinstance(project(mixed, None, torch.bfloat16, CPU, "light"), Int8)
    assert isinstance(
        project([weight()[:, :88]], None, torch.bfloat16, CPU, "light"), Dense
    )  # no multiple of 16 columns
    odd = project([weight()[:47]], None, torch.bfloat16, CPU, "int4")  # no multiple of 16 rows
    assert isinstance(odd, Int8)
    x = torch.randn(3, COLUMNS).bfloat16()
    exact = x.float() @ weight()[:47].T
    assert (odd(x).float() - exact).abs().max() < 0.03 * exact.abs().max()


def test_quantized_groups_keep_their_ends():
    """Least and largest of every group are hit exactly, the rest to half a step."""
    dense = weight()
    groups, back = dense.view(-1, 32), quantized(dense).dense().view(-1, 32)
    assert torch.allclose(back.amin(1), groups.amin(1), atol=1e-5)
    assert torch.allclose(back.amax(1), groups.amax(1), atol=1e-5)
    step = (groups.amax(1) - groups.amin(1)) / 15
    assert ((back - groups).abs() <= step[:, None] / 2 + 1e-5).all()


@pytest.mark.parametrize("rows", [320, 48])
@pytest.mark.parametrize("kind", ["int4", "Q8_0", "int8"])
@pytest.mark.parametrize("at_once", [2**22, 130 * COLUMNS])
def test_wide_passes_give_what_narrow_ones_give(monkeypatch, kind, rows, at_once):
    """To the rounding of weights and results to bfloat16. Whole blocks of the kernel's are unpacked, and 48 rows are none;
    several parts, the last of which is smaller, are as good as one."""
    monkeypatch.setattr("specdec_engine.runtime.linear._AT_ONCE", at_once)
    dense = torch.cat([weight(seed) for seed in range(7)])[:rows]
    eight = torch.randint(-127, 128, dense.shape).to(torch.int8)
    packed = Grouped(eight, torch.rand(rows, COLUMNS // 32) + 0.01, None) if kind == "Q8_0" else quantized(dense)
    matrix = project([dense if kind == "int8" else packed], torch.randn(rows), torch.bfloat16, CPU, "light")
    assert isinstance(matrix, Int8 if kind == "int8" else Int4)
    x = torch.randn(200, COLUMNS, generator=torch.Generator().manual_seed(9)).bfloat16()
    narrow = torch.cat([matrix(part) for part in x.split(8)]).float()
    assert (matrix(x).float() - narrow).abs().max() < 0.02 * narrow.abs().max()


def test_the_packing_of_this_torch_is_known():
    """Else wide passes would go through the narrow ones' kernel, correct and slow."""
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512", "AMX"):
        assert packing_block() in (32, 64)


@pytest.mark.parametrize("form", ["int8", "int4", "none"])
def test_a_row_has_the_same_bits_alone_and_among_others(form):
    """What keeps plain and speculative decoding together in bfloat16."""
    if torch.backends.cpu.get_cpu_capability() not in ("AVX512", "AMX"):
        pytest.skip("seen to hold with AVX-512")
    matrix = project([torch.randn(960, 576) * 0.03], None, torch.bfloat16, CPU, form)
    x = torch.randn(9, 576).bfloat16()
    together = matrix(x)
    for n in range(1, 9):
        assert torch.equal(matrix(x[:n]), together[:n])


def test_nothing_is_read_before_it_is_asked_for(tmp_path):
    """A GGUF is mapped: opening a 40 GB file costs nothing."""
    file = tmp_path / "sparse"
    with file.open("wb") as handle:
        handle.truncate(40 << 30)
    weights = GgufWeights(file, {"w": Entry("F32", (2, 4), 39 << 30, 32)})
    assert np.array_equal(weights.dense("w").numpy(), np.zeros((2, 4), np.float32))
