"""A GPU's own kernels without one: interpreted they compute what torch computes, and they compile for an A100 and an H100."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is for Linux")
HERE = Path(__file__).parent


def ran(tmp_path, *command, **environment):
    """In a process of its own: whether Triton interprets is settled when it is imported, and torch imports it, too."""
    variables = {
        **os.environ,
        "TRITON_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(sys.path),
        **environment,
    }
    found = subprocess.run(
        [sys.executable, *command], env=variables, capture_output=True, text=True, cwd=HERE.parents[1]
    )
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.parametrize("part", ["attend", "not attend"])
def test_the_kernels_compute_what_torch_computes(tmp_path, part):
    options = ("-q", "-p", "no:cacheprovider", "-k", part)
    ran(tmp_path, "-m", "pytest", *options, str(HERE / "interpreted.py"), TRITON_INTERPRET="1")


def test_the_kernels_compile_without_a_card(tmp_path):
    """Types, which the interpreter does not look at, and room for a block of keys and values."""
    ran(tmp_path, str(HERE / "compiled.py"), TRITON_INTERPRET="0")
