"""The package that the docs show, which adds a way of drafting: installed, it stands wherever ours do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from specdec_cli.main import app
from specdec_engine.core import registry
from specdec_engine.drafters import build_drafter
from specdec_engine.errors import ModelUnavailable
from tests.fakes import host, save_checkpoint

DOCS = (Path(__file__).parents[2] / "docs" / "extending.md").read_text("utf-8")


def block(mark):
    """The block of the docs that follows this mark."""
    return DOCS.partition(f"<!-- tested: {mark} -->\n```")[2].partition("\n")[2].partition("```")[0]


def install(site, package, points, summary="[/x] as \u202esaid"):
    """As pip leaves a package's metadata."""
    info = site / f"{package.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\nSummary: {summary}\n")
    lines = [f"{name} = {value}" for name, value in points.items()]
    (info / "entry_points.txt").write_text("\n".join(["[specdec.drafters]", *lines]))


@pytest.fixture(scope="module")
def specdec(tmp_path_factory):
    """Runs a command where the package is installed, as pip leaves it."""
    site = tmp_path_factory.mktemp("site")
    (site / "repeat_draft.py").write_text(f"print('imported')\n{block('module')}")
    project = tomllib.loads(block("package"))["project"]
    install(site, project["name"], project["entry-points"]["specdec.drafters"], project["description"])

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
        assert "repeat" in said
        assert "the newest token again and again, by repeat-draft" in " ".join(said.replace("│", " ").split())
        assert "imported" not in said


def test_it_drafts(specdec, checkpoint):
    run = specdec("generate", "-t", checkpoint, "-d", "repeat:2", "-n", "12", "-k", "3", "--raw", "--json", "aaaa")
    assert run.stdout.startswith("imported")
    told = json.loads(run.stdout.removeprefix("imported"))
    plain = json.loads(
        specdec("generate", "-t", checkpoint, "-d", "none", "-n", "12", "--raw", "--json", "aaaa").stdout
    )
    assert told["token_ids"] == plain["token_ids"]
    assert told["settings"]["draft"] == "repeat"


def test_a_mistyped_name_is_hinted_at(specdec, checkpoint):
    assert "did you mean repeat?" in specdec("generate", "-t", checkpoint, "-d", "repaet:2", "x", code=3).stderr


def test_check_says_whose_it_is(specdec, checkpoint):
    said = specdec("check", checkpoint, "repeat").stdout
    assert "? draft: repeat is repeat-draft's" in said
    assert "? repeat may be able to draft for" in said


def test_tune_considers_it_and_tells_servers_nothing_of_it(specdec, checkpoint, tmp_path):
    prompts = tmp_path / "p.txt"
    prompts.write_text("aaaa bbbb\ncccc dddd\neeee ffff\n")
    words = ["tune", "-t", checkpoint, "--prompts", str(prompts), "--max-tokens", "12", "--json"]
    told = json.loads(specdec(*words).stdout.removeprefix("imported"))
    assert "repeat" in {one["draft"] for one in told["drafts"]}
    assert "repeat" not in json.dumps(told["launches"])


def test_odd_and_broken_packages_harm_nobody(monkeypatch, tmp_path):
    """Their names are no words of ours, and what breaks names the package."""
    (tmp_path / "bad_draft.py").write_text("raise RuntimeError('boom')")
    points = {"bad": "bad_draft:build [fast]", "builtin": "bad_draft:build", "co:lon": "x:y", "co,mma": "x:y"}
    install(tmp_path, "a-bad-draft", points)
    install(tmp_path, "b-bad-draft", {"bad": "x:y"})
    monkeypatch.syspath_prepend(tmp_path)
    registry.foreign.cache_clear()
    try:
        (bad,) = registry.foreign()
        assert (bad.name, bad.package, bad.build) == ("bad", "a-bad-draft", "bad_draft:build")
        assert "b-bad-draft has one of this name" in bad.about
        assert "\u202e" not in bad.about
        with pytest.raises(ModelUnavailable, match=r"package a-bad-draft, cannot be loaded: RuntimeError: boom"):
            build_drafter("bad", host())
        help_of_generate = typer_help()
        assert "[/x] as" in help_of_generate
    finally:
        registry.foreign.cache_clear()


def typer_help():
    result = CliRunner().invoke(app, ["generate", "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.output
