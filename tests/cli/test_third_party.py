"""A package that adds a way of drafting: installed, it stands wherever ours do."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.fakes import save_checkpoint

MODULE = """
from specdec_engine.drafters.ngram import build as lookup

print("imported")

def build(argument, host):
    drafter = lookup(argument, host)
    drafter.name = "mirror"
    return drafter
"""


@pytest.fixture(scope="module")
def specdec(tmp_path_factory):
    """Runs a command where the package is installed, as pip leaves it."""
    site = tmp_path_factory.mktemp("site")
    (site / "mirror_draft.py").write_text(MODULE)
    info = site / "mirror_draft-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: mirror-draft\nVersion: 1.0\nSummary: reads backwards\n"
    )
    (info / "entry_points.txt").write_text("[specdec.drafters]\nmirror = mirror_draft:build\n")

    def run(*words, code=0):
        path = os.pathsep.join([str(site), *sys.path])
        found = subprocess.run(
            [sys.executable, "-m", "specdec_cli", *words],
            env={**os.environ, "PYTHONPATH": path, "COLUMNS": "200"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert found.returncode == code, found.stderr
        return found

    return run


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(save_checkpoint(tmp_path_factory.mktemp("checkpoint"), seed=1, endless=True))


def test_help_and_info_describe_it_without_importing_it(specdec):
    for words in (["generate", "--help"], ["watch", "--help"], ["info"]):
        said = specdec(*words).stdout
        assert "mirror" in said
        assert "reads backwards, by mirror-draft" in " ".join(said.replace("│", " ").split())
        assert "imported" not in said


def test_it_drafts(specdec, checkpoint):
    run = specdec("generate", "-t", checkpoint, "-d", "mirror:2", "-n", "12", "-k", "3", "--raw", "--json", "aaaa")
    assert run.stdout.startswith("imported")
    told = json.loads(run.stdout.removeprefix("imported"))
    plain = json.loads(
        specdec("generate", "-t", checkpoint, "-d", "none", "-n", "12", "--raw", "--json", "aaaa").stdout
    )
    assert told["token_ids"] == plain["token_ids"]
    assert told["settings"]["draft"] == "mirror"


def test_a_mistyped_name_is_hinted_at(specdec, checkpoint):
    assert "did you mean mirror?" in specdec("generate", "-t", checkpoint, "-d", "miror:2", "x", code=3).stderr


def test_check_says_whose_it_is(specdec, checkpoint):
    said = specdec("check", checkpoint, "mirror").stdout
    assert "· draft: mirror is mirror-draft's" in said


def test_tune_considers_it_and_tells_servers_nothing_of_it(specdec, checkpoint, tmp_path):
    prompts = tmp_path / "p.txt"
    prompts.write_text("aaaa bbbb\ncccc dddd\neeee ffff\n")
    words = ["tune", "-t", checkpoint, "--prompts", str(prompts), "--max-tokens", "12", "--json"]
    told = json.loads(specdec(*words).stdout.removeprefix("imported"))
    assert "mirror" in {one["draft"] for one in told["drafts"]}
    assert "mirror" not in json.dumps(told["launches"])
