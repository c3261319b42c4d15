"""What the built wheel contains: exactly our three packages, all of each, and nothing with a generic name."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {"specdec_cli": ROOT, "specdec_engine": ROOT / "engine", "specdec_tui": ROOT / "tui"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    with zipfile.ZipFile(next(out.glob("*.whl"))) as archive:
        yield archive


def test_top_level_names_are_ours_alone(wheel):
    tops = {name.split("/")[0] for name in wheel.namelist() if ".dist-info" not in name.split("/")[0]}
    assert tops == PACKAGES.keys()


def test_every_module_on_disk_is_in_it_with_its_type_marker(wheel):
    names = set(wheel.namelist())
    for package, parent in PACKAGES.items():
        modules = [p for kind in ("*.py", "*.c") for p in (parent / package).rglob(kind)]
        on_disk = {p.relative_to(parent).as_posix() for p in modules}
        assert on_disk <= names
        assert f"{package}/py.typed" in names


def test_the_builtin_draft_is_in_it_and_small(wheel):
    sizes = {i.filename.split("/")[-1]: i.file_size for i in wheel.infolist() if "/builtin_draft/" in i.filename}
    assert sizes.keys() == {"config.json", "draft_vocab.safetensors", "model.safetensors"}
    assert sum(sizes.values()) < 16e6
    assert "specdec_tui/demo.jsonl" in wheel.namelist()
    assert "specdec_tui/screens/watch.tcss" in wheel.namelist()


def test_it_says_what_it_is(wheel):
    info = next(n for n in wheel.namelist() if n.endswith("METADATA"))
    metadata = wheel.read(info).decode()
    assert "Name: specdec-cli" in metadata
    assert "License-Expression: Apache-2.0" in metadata
    scripts = wheel.read(info.replace("METADATA", "entry_points.txt")).decode()
    assert "specdec = specdec_cli.main:main" in scripts
    assert any(n.endswith("licenses/LICENSE") for n in wheel.namelist())
