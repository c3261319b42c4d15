"""What a CPU computes in: measured once, remembered, and never a form that cannot run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections import deque
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from specdec_engine.conditions import target_notes
from specdec_engine.errors import UsageError
from specdec_engine.runtime import arithmetic, compiled, native
from specdec_engine.runtime.arithmetic import FORMS, Matrices, Measurement, Timing, choose
from specdec_engine.system import threads
from specdec_engine.system.machine import cpu_flags, cpu_name
from tests.fakes import CPU

DENSE = Matrices(1024, 512, packed=False, lean=True)
PACKED = Matrices(1024, 512, packed=True, lean=True)
META = torch.device("meta")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path))
    monkeypatch.setattr(arithmetic, "keep_step", lambda threads: True)
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


def test_what_older_kernels_took_is_forgotten(folder):
    """And `info` does not show it. What another CPU took stays: a home may be shared."""
    older = replace(timings(int4_own=1.0), cpu=cpu_name() or "", torch=torch.__version__, kernels="older")
    elsewhere = replace(older, cpu="another")
    arithmetic.remember([older, elsewhere])
    fresh = arithmetic.measured(1024, 512)
    assert arithmetic.remembered() == (elsewhere, fresh)
    assert arithmetic.current() == (fresh,)


def test_what_was_found_beside_other_programs_is_not_kept(folder, monkeypatch):
    steps = iter([True, False])
    monkeypatch.setattr(arithmetic, "keep_step", lambda threads: next(steps))
    arithmetic.measured(1024, 512)
    assert arithmetic.remembered() == ()


def test_what_was_found_with_other_threads_comes_before_what_is_found_beside_other_programs(folder, monkeypatch):
    """`check` on a busy machine named another runtime than `generate`, which takes fewer threads there."""
    quiet = arithmetic.measured(1024, 512)
    arithmetic.remember([replace(quiet, threads=quiet.threads + 1, timings=timings(int4_own=1.0).timings)])
    arithmetic._measured.cache_clear()
    monkeypatch.setattr(arithmetic, "keep_step", lambda threads: False)
    found = arithmetic.measured(1024, 512)
    assert [timing.form for timing in found.timings] == [FORMS[0].name]
    assert found.fastest_threads <= quiet.threads


def test_a_draft_is_measured_on_as_many_threads_as_its_target(folder, monkeypatch):
    """And once: a target that takes fewer threads, as fastest, had it measured again at every start."""
    monkeypatch.setattr(threads, "_initial", deque([3]))
    calls = []
    monkeypatch.setattr(arithmetic, "measure", lambda *size: calls.append(size) or timings(int4_own=1.0))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        arithmetic.measured(1024, 512)
        arithmetic.measured(1024, 512)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    assert calls == [(1024, 512)]
    assert arithmetic._measured.cache_info().currsize == 1


WRONG = {
    "milliseconds": {"timings": [{"form": FORMS[0].name, "one_ms": None, "four_ms": 1.0}]},
    "no milliseconds": {"timings": []},
    "an unknown form": {"timings": [{"form": "int3", "one_ms": 1.0, "four_ms": 1.0}]},
    "threads": {"fastest_threads": 0},
}
DAMAGED = ["", "{", "[1]", '[{"cpu": ""}]', "null", "[" * 9999]
DAMAGED += [json.dumps([asdict(timings(int4_own=1.0)) | wrong]) for wrong in WRONG.values()]


@pytest.mark.parametrize("content", DAMAGED, ids=lambda text: text[:20])
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


_UNOPTIMISED = ("-O1", *compiled._FLAGS[1:])
"""Compiled in a third of the time."""


@pytest.fixture
def compiling(folder, monkeypatch):
    """As in a process that has not looked yet; with $CC as given."""
    monkeypatch.setattr(compiled, "_FLAGS", _UNOPTIMISED)
    kept = (compiled._compiler, native.kernels, native._attempt, arithmetic._measured)

    def forget(cc=None):
        if cc is not None:
            monkeypatch.setenv("CC", cc)
        for each in kept:
            each.cache_clear()

    forget()
    yield forget
    monkeypatch.undo()
    forget()


@pytest.mark.parametrize(
    ("cc", "why"),
    [
        ("", "no C compiler"),
        ("/no/such/compiler", "no such compiler"),
        ("false", "compiler failed"),
        ('"gcc', "is no command"),
    ],
)
def test_without_a_compiler_torchs_kernels_are_taken(compiling, monkeypatch, cc, why):
    """And why is told, with the value; $CC is not a model's fault."""
    compiling(cc)
    monkeypatch.setenv("PATH", "/nowhere" if cc != "false" else "/bin:/usr/bin")
    assert native.kernels() is None
    assert why in native.why_none()
    assert choose(PACKED, "auto", "auto", CPU).kernels is None
    remark = f"there are no kernels of our own: {native.why_none()}"
    target = SimpleNamespace(
        name="t", runtime=SimpleNamespace(vocab=9), stop_ids=(), asked=None, unused=(), left_out=(), remark=remark
    )
    said = "".join(target_notes(target, "none"))  # where one package would mend it, without -v
    assert ("near-ties may fall otherwise" in said) == (why == "no C compiler")
    monkeypatch.setattr(arithmetic, "torch_packs", lambda: False)
    with pytest.raises(UsageError, match=f"of our own there are none .*{why}"):
        arithmetic.refuse_packing("int4", "auto", CPU)


def test_what_does_not_compile_is_tried_once(compiling, folder):
    compiling("false")
    assert "compiler failed" in native.why_none()
    (why,) = (folder / "native").glob("*.why")
    why.write_text("as before")
    compiling("false")
    assert native.why_none() == "as before"


needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc")


@needs_gcc
@pytest.mark.parametrize("rest", [0, 5000])
def test_a_damaged_library_is_compiled_again(compiling, folder, rest):
    """A truncated one killed the process."""
    assert not native.is_ready()
    assert native.kernels() is not None
    assert native.is_ready()
    (library,) = (folder / "native").glob("*.so")
    whole = library.read_bytes()
    library.unlink()  # it is mapped
    library.write_bytes(whole[:rest])
    compiling()
    assert not native.is_ready()
    assert native.kernels() is not None
    assert library.read_bytes()[:4] == b"\x7fELF"
    assert native.is_ready()


@needs_gcc
def test_what_was_compiled_once_needs_no_compiler(compiling, monkeypatch):
    """As in an image that was built on another."""
    assert native.kernels() is not None
    monkeypatch.setenv("PATH", "/nowhere")
    compiling("")
    assert native.is_ready()
    assert native.kernels() is not None


@needs_gcc
def test_kernels_that_are_wrong_are_not_taken(compiling, monkeypatch, tmp_path):
    """As by a compiler's fault, or on instructions that no one has tried."""
    shutil.copytree(native.SOURCE.parent, tmp_path / "kernels")
    wrong = tmp_path / "kernels" / "packed.h"
    sound = wrong.read_text("utf-8")
    wrong.write_text(sound.replace("each(scale[r * G + g])", "each(2 * scale[r * G + g])"), "utf-8")
    monkeypatch.setattr(native, "SOURCE", wrong.with_name("kernels.c"))
    assert native.kernels() is None
    assert native.why_none() == "they were compiled, and their products with 4 bits are wrong"


@needs_gcc
@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_told(compiling, folder):
    folder.chmod(0o500)
    assert "denied" in native.why_none()


@needs_gcc
@pytest.mark.skipif(not {"avx2", "fma", "f16c"} <= set(cpu_flags().split()), reason="no AVX2")
def test_kernels_for_avx2_are_right_on_every_processor_that_has_it(tmp_path):
    """On one with AVX-512 they are not what runs, and most users' are."""
    library = tmp_path / "other.so"
    command = ["gcc", *_UNOPTIMISED, "-march=haswell", "-shared", str(native.SOURCE), "-lm", "-o", str(library)]
    subprocess.run(command, check=True)
    other = native.Kernels(library)
    assert other.lanes == 8
    native.check(other)


def test_openmp_is_found_under_a_path_with_spaces(monkeypatch):
    path = "/home/me/My Projects/.venv/lib/torch.libs/libgomp-98b21ff3.so.1.0.0"
    lines = [f"7f0-7f1 r-xp 0 fe:00 1 {path}", "7f1-7f2 r--p 0 fe:00 2 /usr/lib/libm.so.6", "7f2-7f3 rw-p 0 00:00 0 "]
    monkeypatch.setattr(Path, "read_text", lambda *_: "\n".join(lines))
    assert compiled.openmp() == path
