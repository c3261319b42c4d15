"""What is imported when: proved in a fresh interpreter, the only way to know that a deferral defers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "accelerate", "gguf", "huggingface_hub")


def imported_by(code: str) -> set[str]:
    paths = [str(ROOT), str(ROOT / "engine"), str(ROOT / "tui")]
    script = f"import sys; sys.path[:0] = {paths!r}\n{code}\nprint(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {name.split(".")[0] for name in done.stderr.split()}


@pytest.mark.parametrize(
    "argv",
    [["--help"], ["generate", "--help"], ["--version"], ["generate"], ["generate", "x", "-k", "-1"]],
    ids=" ".join,
)
def test_help_and_usage_errors_load_no_model_library(argv):
    code = f"""
import sys
from specdec_cli.main import main
sys.argv, sys.stdin = ["specdec", *{argv!r}], open("/dev/null")
try:
    main()
except SystemExit:
    pass
"""
    assert not imported_by(code) & set(HEAVY)


@pytest.mark.parametrize(
    "module", ["events", "stats", "trace", "text", "stopping", "errors", "types", "control", "drafters"]
)
def test_a_trace_can_be_read_without_torch(module):
    assert not imported_by(f"import specdec_engine.{module}") & {*HEAVY, "textual", "typer", "rich"}


def test_the_package_itself_costs_nothing_until_a_name_is_used():
    assert not imported_by("import specdec_engine; specdec_engine.read_trace; specdec_engine.Summary") & set(HEAVY)


def test_the_engine_runs_without_the_command_line():
    assert not imported_by("import specdec_engine.pair") & {"specdec_cli", "specdec_tui", "textual", "typer"}


def test_public_names_are_what_they_say():
    import specdec_engine

    assert sorted(specdec_engine.__all__) == specdec_engine.__all__
    assert set(specdec_engine.__all__) == set(specdec_engine._HOME)
    for name in specdec_engine.__all__:
        assert getattr(specdec_engine, name)
    with pytest.raises(AttributeError):
        specdec_engine.nonsense  # noqa: B018


def test_third_parties_can_add_a_drafter(monkeypatch):
    """An entry point in the group `specdec.drafters` is found by name, with its argument."""
    from importlib.metadata import EntryPoint

    from specdec_engine import drafters
    from tests.fakes import host

    entry = EntryPoint("mine", "specdec_engine.drafters.ngram:build", drafters.ENTRY_POINTS)
    monkeypatch.setattr(
        drafters,
        "entry_points",
        lambda group, name: [entry] if (group, name) == (drafters.ENTRY_POINTS, "mine") else [],
    )
    assert drafters.build_drafter("mine:5", host()).name == "ngram"
