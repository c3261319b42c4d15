"""Packed weights: read from their blocks as the gguf library reads them, and multiplied as their dense values would be."""

from __future__ import annotations

import copy
import shutil

import numpy as np
import pytest
import torch

from specdec_engine.runtime import native
from specdec_engine.runtime.linear import Joined, NativeDense, NativePacked, multiply_texts, project, quantized
from specdec_engine.runtime.torch_forms import Dense, Int4, Int8, packing_block
from specdec_engine.runtime.weights import Entry, GgufWeights, Grouped
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
    return GgufWeights([file], {"w": entry}), torch.from_numpy(gguf.dequantize(raw, member).reshape(ROWS, COLUMNS))


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "F16", "BF16", "F32"])
def test_blocks_hold_what_the_gguf_library_says(tmp_path, kind):
    weights, expected = stored(tmp_path, kind)
    found = weights.dense("w").float()
    assert torch.allclose(found, expected.float(), atol=0, rtol=1e-6)
    assert isinstance(weights.stored("w"), Grouped) == (kind not in ("F16", "BF16", "F32"))


def k_quants(tmp_path, kind, columns=512):
    """The gguf library reads them and does not write them: any bytes will do, with scales of a usual size."""
    size, scales = {"Q4_K": (144, slice(0, 4)), "Q5_K": (176, slice(0, 4)), "Q6_K": (210, slice(208, 210))}[kind]
    raw = np.random.default_rng(0).integers(0, 256, (ROWS * columns // 256, size), np.uint8)
    raw[:, scales] = np.array([0.01, 0.02], np.float16).view(np.uint8)[: scales.stop - scales.start]
    file = tmp_path / "raw"
    file.write_bytes(raw.tobytes())
    expected = gguf.dequantize(raw, gguf.GGMLQuantizationType[kind]).reshape(ROWS, columns)
    return GgufWeights([file], {"w": Entry(kind, (ROWS, columns), 0, raw.nbytes)}), torch.from_numpy(expected)


@pytest.mark.parametrize(
    ("kind", "layout"), [("Q4_K", (4, 32, True)), ("Q5_K", (8, 32, True)), ("Q6_K", (8, 16, False))]
)
def test_k_quants_stay_packed(tmp_path, kind, layout):
    weights, expected = k_quants(tmp_path, kind)
    assert weights.stored("w").layout == layout
    assert torch.allclose(weights.dense("w"), expected, rtol=1e-5, atol=1e-5)


KINDS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")


@pytest.fixture(scope="module")
def own():
    """Kernels of our own. Where there is a C compiler they must be there."""
    if native.kernels() is None and shutil.which("cc") is None:
        pytest.skip(native.why_none())
    assert native.why_none() == ""
    return native.kernels()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 4, 7, 130])
def test_own_kernels_multiply_every_packed_form(tmp_path, own, kind, rows):
    """To 2e-5 where the file's scales are float16, to 3e-4 where ours are rounded to it; bfloat16's activations are off by
    2e-3. Whatever the rows, a row has the same bits."""
    weights, expected = k_quants(tmp_path, kind) if kind.endswith("K") else stored(tmp_path, kind)
    bias = torch.randn(ROWS)
    found = project([weights.stored("w")], bias, torch.float32, CPU, "auto", own)
    assert isinstance(found, NativePacked)
    x = torch.randn(rows, expected.shape[1], generator=torch.Generator().manual_seed(1))
    exact = x.double() @ expected.double().T + bias
    y = found(x)
    assert (y - exact).norm() < (4e-4 if kind.endswith("K") else 4e-5) * exact.norm()
    assert torch.equal(torch.cat([found(x[i : i + 1]) for i in range(rows)]), y)
    rows_of = torch.tensor([0, ROWS - 1, 9])
    assert torch.allclose(found.dense_rows(rows_of), expected[rows_of], rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at_once", [2**22, 9 * 96])
def test_own_kernels_unpack_for_a_prompt(monkeypatch, tmp_path, own, kind, at_once):
    """To bfloat16's rounding of weights and activations; in one part or in several, the last of which is smaller."""
    monkeypatch.setattr("specdec_engine.runtime.linear.AT_ONCE", at_once)
    weights, expected = k_quants(tmp_path, kind) if kind.endswith("K") else stored(tmp_path, kind)
    found = project(
        [weights.stored("w").rows(torch.arange(45))], None, torch.float32, CPU, "auto", own.reading_as("unpacked")
    )
    unpacked = torch.cat([part.T for part in found._unpacked()]).float()
    assert (unpacked - expected[:45]).abs().max() < 2**-8 * expected.abs().max()
    x = torch.randn(100, expected.shape[1])
    narrow = torch.cat([found(part) for part in x.split(10)])
    assert torch.equal(found(x), narrow)  # verified
    assert 0 < (found(x, reading=True) - narrow).abs().max() < 0.02 * narrow.abs().max()
    check_texts(found)


def test_tiles_that_another_process_found_fastest_are_not_taken_where_there_are_none(own):
    """The system may refuse this one, and an older compiler may know of none: what is remembered holds for neither."""
    other = copy.copy(own)
    other.tiled = False
    assert other.reading_as("tiles").reading == "alike"
    assert other.reading_as("unpacked").reading == "unpacked"


def check_texts(found):
    """Hold several texts to the bits of each alone."""
    texts = torch.randn(240, found.matrices[0].K).split([66, 9, 65, 100])
    joined = Joined([found, found])
    for one, y in ((found, multiply_texts(found, texts)), (joined, multiply_texts(joined, texts))):
        assert all(torch.equal(one(x, reading=True), of_it) for x, of_it in zip(texts, y, strict=True))


@pytest.mark.parametrize("kind", [*KINDS, "bfloat16"])
def test_own_kernels_read_a_prompt_in_tiles(tmp_path, own, kind):
    """To bfloat16's rounding of weights and activations; each row with the bits that it has among any number of others."""
    if not own.tiled:
        pytest.skip("no tiles of bfloat16 (AMX)")
    if kind == "bfloat16":
        weight = expected = torch.randn(47, 104).bfloat16()
    else:
        weights, expected = k_quants(tmp_path, kind) if kind.endswith("K") else stored(tmp_path, kind)
        weight = weights.stored("w")
    bias = torch.randn(len(expected))
    found = project([weight], bias, torch.float32, CPU, "auto", own.reading_as("tiles"))
    x = torch.randn(70, expected.shape[1])
    narrow = torch.cat([found(part) for part in x.split(10)])
    assert torch.equal(found(x), narrow)  # verified
    read = found(x, reading=True)
    exact = x.bfloat16().double() @ expected.bfloat16().double().T + bias
    assert (read - exact).norm() < 3e-3 * exact.norm()
    for n in (16, 17, 32, 33):
        assert torch.equal(found(x[:n], reading=True), read[:n])
    assert torch.equal(found(torch.cat(4 * [x]), reading=True)[:70], read)  # many rows
    assert torch.equal(found(x[:15], reading=True), narrow[:15])  # for few rows tiles do not pay
    check_texts(found)


@pytest.mark.parametrize("shape", [(47, 96), (64, 101), (33, 7), (3, 40), (960, 576)])
def test_own_kernels_multiply_bfloat16(own, shape):
    """Activations are not rounded to it: with tiles of bfloat16 they are two of its numbers."""
    dense = torch.randn(shape, generator=torch.Generator().manual_seed(2)).bfloat16()
    found = project([dense], None, torch.float32, CPU, "none", own)
    assert isinstance(found, NativeDense)
    x = torch.randn(70, shape[1])
    together, exact = found(x), x.double() @ dense.double().T
    assert (together - exact).norm() < 1e-5 * exact.norm()
    for n in (*range(1, 20), 31, 32, 33):
        assert torch.equal(found(x[:n]), together[:n])
        assert torch.equal(found(x[n : 2 * n]), together[n : 2 * n])
    assert found._weight.data_ptr() == dense.data_ptr()  # read where it lies: a tied table is not kept twice


@pytest.mark.parametrize("size", [1e-6, 1e-4, 0.02, 30.0])
@pytest.mark.parametrize(("packing", "off"), [("int8", 0.012), ("int4", 0.15)])
def test_tiny_weights_are_packed_as_well_as_large_ones_or_not_at_all(own, size, packing, off):
    """Scales in float16 would lose them."""
    dense = size * weight()
    x = torch.randn(5, COLUMNS)
    found, expected = project([dense], None, torch.float32, CPU, packing, own)(x), x @ dense.T
    assert (found - expected).norm() < off * expected.norm()


def test_rows_that_are_no_numbers_give_none(own):
    """An integer would hide them."""
    found = project([weight()], None, torch.float32, CPU, "int4", own)
    x = torch.randn(3, COLUMNS)
    clean = found(x)
    for broken in (torch.nan, torch.inf):
        x[1, 5] = broken
        y = found(x)
        assert y[1].isnan().all()
        assert torch.equal(y[[0, 2]], clean[[0, 2]])
    assert torch.equal(found(torch.zeros(2, COLUMNS)), torch.zeros(2, ROWS))
    assert found(torch.full((1, COLUMNS), 1e-38)).abs().max() < 1e-36  # too small to be scaled


def test_matrices_packed_in_different_ways_are_joined(tmp_path, own):
    """Files of 4 bits keep the values' projection in 6; as one, all were dense."""
    four, first = k_quants(tmp_path, "Q4_K")
    parts = [four.stored("w")]
    six, second = k_quants(tmp_path, "Q6_K")
    parts.append(six.stored("w"))
    x, bias = torch.randn(3, 512), torch.randn(2 * ROWS)
    exact = x @ torch.cat([first, second]).T + bias
    for dtype, kernels in ((torch.float32, own), (torch.bfloat16, None)):
        found = project(parts, bias, dtype, CPU, "auto", kernels)
        assert found.form == "int4+int8"
        assert (found(x.to(dtype)).float() - exact).abs().max() < 0.03 * exact.abs().max()


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
    assert isinstance(project(mixed, None, torch.bfloat16, CPU, "auto"), Joined)
    assert isinstance(project([weight()], None, torch.bfloat16, CPU, "int8"), Int8)
    assert isinstance(project([weight()], None, torch.bfloat16, CPU, "int4"), Int4)
    eight = stored(tmp_path, "Q8_0")[0].stored("w")
    assert isinstance(project([eight], None, torch.bfloat16, CPU, "auto"), Int4)  # as two halves
    assert project([eight], None, torch.bfloat16, CPU, "int4").form == "int4"
    assert isinstance(project([packed.stored("w")], None, torch.bfloat16, CPU, "int8"), Int8)
    assert isinstance(project([packed.stored("w")], None, torch.bfloat16, CPU, "light"), Int4)  # stays as it is
    assert project(mixed, None, torch.bfloat16, CPU, "light").form == "int4+int8"
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
    monkeypatch.setattr("specdec_engine.runtime.torch_forms.AT_ONCE", at_once)
    dense = torch.cat([weight(seed) for seed in range(7)])[:rows]
    eight = torch.randint(-127, 128, dense.shape).to(torch.int8)
    packed = (
        Grouped(eight, torch.rand(rows, COLUMNS // 32) + 0.01, None, bits=8) if kind == "Q8_0" else quantized(dense)
    )
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
    if form == "none" and torch.backends.cpu.get_cpu_capability() not in ("AVX512", "AMX"):
        pytest.skip("torch's dense bfloat16 has it with AVX-512 only; our own kernels always")
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
    weights = GgufWeights([file], {"w": Entry("F32", (2, 4), 39 << 30, 32)})
    assert np.array_equal(weights.dense("w").numpy(), np.zeros((2, 4), np.float32))
