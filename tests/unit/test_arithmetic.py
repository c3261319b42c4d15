"""What a CPU computes in: measured once, remembered, and never a form that cannot run."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from specdec_engine.errors import UsageError
from specdec_engine.machine import cpu_name
from specdec_engine.runtime import arithmetic, native
from specdec_engine.runtime.arithmetic import FORMS, Matrices, Measurement, Timing, choose
from tests.fakes import CPU

DENSE = Matrices(1024, 512, packed=False, lean=True)
PACKED = Matrices(1024, 512, packed=True, lean=True)
META = torch.device("meta")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path))
    native.key.cache_clear()
    arithmetic._measured.cache_clear()
    yield tmp_path
    arithmetic._measured.cache_clear()


def timings(**costs):
    """By the form's first word and last: `int4_own=1`."""
    names = {form.name.replace(", ", "_").replace(" kernels", ""): form.name for form in FORMS}
    return Measurement("", "", "", 1, 1, 1, tuple(Timing(names[n], c, c) for n, c in costs.items()), 1)


@pytest.fixture
def clock(monkeypatch):
    """Everything can run, and takes what is said."""

    def says(**costs):
        monkeypatch.setattr(arithmetic, "usable", lambda form: True)
        monkeypatch.setattr(arithmetic, "measured", lambda rows, columns: timings(**costs))

    return says


def test_the_fastest_form_is_taken(clock):
    clock(int4_own=1, int4_torch=2, bfloat16_own=3, bfloat16_torch=4, float32_torch=5)
    assert choose(PACKED, "auto", "auto", CPU).packs
    assert choose(PACKED, "auto", "auto", CPU).dtype == torch.float32  # what our own kernels read
    assert not choose(PACKED, "auto", "none", CPU).packs
    assert not choose(DENSE, "auto", "auto", CPU).packs
    assert choose(DENSE, "auto", "light", CPU).packs
    assert choose(DENSE, "auto", "int8", CPU).packs
    clock(int4_own=9, int4_torch=8, bfloat16_own=3, bfloat16_torch=2, float32_torch=1)
    assert choose(PACKED, "auto", "auto", CPU).weights == torch.float32
    assert choose(PACKED, "auto", "int4", CPU).dtype == torch.bfloat16  # asked for; of the two, torch's
    clock(int4_own=1, bfloat16_own=1, bfloat16_torch=3, float32_torch=2)
    generic = choose(Matrices(1024, 512, packed=True, lean=False), "auto", "auto", CPU)
    assert (generic.dtype, generic.packs, generic.kernels) == (torch.float32, False, None)


def test_a_dtype_that_is_named_is_not_measured(monkeypatch):
    monkeypatch.setattr(arithmetic, "measured", lambda *size: pytest.fail("measured"))
    assert choose(PACKED, "float32", "auto", CPU) == arithmetic.Arithmetic(torch.float32, torch.float32)
    assert choose(PACKED, "bfloat16", "auto", CPU).dtype == torch.bfloat16
    with pytest.raises(UsageError, match="cannot be packed to int4 on cpu in dtype float32"):
        choose(PACKED, "float32", "int4", CPU)
    with pytest.raises(UsageError, match="cannot be packed to int8 on meta"):
        choose(PACKED, "float16", "int8", META)
    with pytest.raises(UsageError, match="dtype 'float8' is unknown"):
        choose(PACKED, "float8", "auto", CPU)


def test_a_measurement_is_made_once_and_remembered(folder, monkeypatch):
    """Every form that can run is timed; the next process reads it, another torch measures anew."""
    monkeypatch.setattr(arithmetic, "usable_cores", torch.get_num_threads)
    first = arithmetic.measured(900, 300)
    assert (first.rows, first.columns) == (1024, 512)
    assert {t.form for t in first.timings} == {f.name for f in FORMS if arithmetic.usable(f)}
    assert all(t.one_ms > 0 and t.four_ms > 0 for t in first.timings)
    assert 1 <= first.fastest_threads <= first.threads == torch.get_num_threads()
    arithmetic._measured.cache_clear()
    calls = []
    monkeypatch.setattr(arithmetic, "measure", lambda *size: calls.append(size) or first)
    assert arithmetic.measured(1100, 700) == first
    assert arithmetic.remembered() == (first,)
    assert not calls
    monkeypatch.setattr(torch, "__version__", "0.0.0")
    arithmetic._measured.cache_clear()
    arithmetic.measured(1024, 512)
    assert calls == [(1024, 512)]
    assert arithmetic.current() == ()


def test_what_older_kernels_took_is_forgotten(folder, monkeypatch):
    """And `info` does not show it. What another CPU took stays: a home may be shared."""
    monkeypatch.setattr(arithmetic, "usable_cores", torch.get_num_threads)
    older = replace(timings(int4_own=1.0), cpu=cpu_name() or "", torch=torch.__version__, kernels="older")
    elsewhere = replace(older, cpu="another")
    arithmetic.remember([older, elsewhere])
    fresh = arithmetic.measured(1024, 512)
    assert arithmetic.remembered() == (elsewhere, fresh)
    assert arithmetic.current() == (fresh,)


def test_what_was_found_beside_other_programs_is_not_kept(folder, monkeypatch):
    monkeypatch.setattr(arithmetic, "usable_cores", lambda: torch.get_num_threads() + 1)
    arithmetic.measured(1024, 512)
    assert arithmetic.remembered() == ()


@pytest.mark.parametrize("content", ["", "{", "[1]", '[{"cpu": ""}]', "null"])
def test_a_damaged_memory_is_none(folder, content):
    (folder / "measured.json").write_text(content)
    assert arithmetic.remembered() == ()
    arithmetic.remember([timings(int4_own=1.0)])
    assert arithmetic.remembered() == (timings(int4_own=1.0),)
    assert json.loads((folder / "measured.json").read_text())


def test_more_threads_than_help_are_not_taken(monkeypatch):
    cost = {8: 1.0, 4: 0.5, 2: 0.49, 1: 0.9}
    now = [8]
    monkeypatch.setattr(torch, "set_num_threads", lambda n: now.__setitem__(0, n))
    assert arithmetic._fastest_threads(8, lambda: cost[now[0]]) == 4
    assert now == [8]


@pytest.mark.parametrize("cc", ["", "/no/such/compiler", "false"])
def test_without_a_compiler_torchs_kernels_are_taken(folder, monkeypatch, cc):
    """And why is told."""
    monkeypatch.setenv("CC", cc)
    monkeypatch.setenv("PATH", "/nowhere" if cc != "false" else "/bin:/usr/bin")
    native._compiler.cache_clear()
    native.kernels.cache_clear()
    try:
        assert native.kernels() is None
        assert "compiler" in native.why_none()
        found = choose(PACKED, "auto", "auto", CPU)
        assert found.kernels is None
    finally:
        monkeypatch.undo()
        for remembered in (native._compiler, native.kernels, native.key, arithmetic._measured):
            remembered.cache_clear()
