"""What is imported when: proved in a fresh interpreter, the only way to know that a deferral defers."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

from specdec_cli.main import COMMANDS

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "accelerate", "gguf", "huggingface_hub")


def modules_after(code: str, **variables: str) -> set[str]:
    """Of a fresh interpreter that has run this."""
    paths = [str(ROOT), str(ROOT / "engine"), str(ROOT / "tui")]
    script = f"import sys; sys.path[:0] = {paths!r}\n{code}\nprint(*sys.modules, file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, **variables}
    )
    assert done.returncode == 0, done.stderr
    return set(done.stderr.split())


def imported_by(code: str) -> set[str]:
    return {name.split(".")[0] for name in modules_after(code)}


def running(*argv: str) -> str:
    return f"""
import sys
from specdec_cli.main import main
sys.argv, sys.stdin = ["specdec", *{argv!r}], open("/dev/null")
try:
    main()
except SystemExit:
    pass
"""


def completing(*words: str) -> dict[str, str]:
    """What bash sets for a Tab behind the last word."""
    line = " ".join(["specdec", *words])
    return {"_SPECDEC_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words))}


def ours(modules: set[str]) -> set[str]:
    return {name for name in modules if name.startswith("specdec_")}


PROGRAM = {
    "specdec_cli",
    "specdec_cli.main",
    "specdec_cli.exits",
    "specdec_engine",
    "specdec_engine.errors",
    "specdec_engine.system",
    "specdec_engine.system.signals",
    "specdec_engine.version",
}
"""What every start imports of ours."""


@pytest.mark.parametrize("argv", [["--version"], ["--help"], ["--show-completion", "bash"]], ids=" ".join)
def test_what_is_said_of_the_program_imports_no_command(argv):
    found = modules_after(running(*argv))
    assert ours(found) == PROGRAM
    assert "pydantic" not in found
    assert ("rich" in found) == (argv == ["--help"])


@pytest.mark.parametrize("word", ["", "ge", "--"])
def test_completing_a_command_s_name_imports_none(word):
    found = modules_after(running(), **completing(word))
    assert ours(found) == PROGRAM
    assert not found & {"rich", "pydantic"}


def test_completing_an_option_and_help_import_that_command_alone():
    for code, variables in ((running(), completing("check", "--dr")), (running("check", "--help"), {})):
        found = ours(modules_after(code, **variables))
        assert {name for name in found if name.startswith("specdec_cli.commands.")} == {"specdec_cli.commands.check"}
        assert not any(name.startswith("specdec_tui") for name in found)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_list_of_commands_says_what_their_docstrings_say(name):
    documented = inspect.getdoc(getattr(import_module(f"specdec_cli.commands.{name}"), name))
    assert documented.split("\n\n")[0] == COMMANDS[name]


def test_every_command_is_in_the_list():
    files = (ROOT / "specdec_cli" / "commands").glob("*.py")
    assert {file.stem for file in files} - {"__init__"} == COMMANDS.keys()


@pytest.mark.parametrize(
    "argv",
    [["--help"], ["generate", "--help"], ["--version"], ["generate"], ["generate", "x", "-k", "-1"]],
    ids=" ".join,
)
def test_help_and_usage_errors_load_no_model_library(argv):
    assert not imported_by(running(*argv)) & set(HEAVY)


def modules_without_torch() -> list[str]:
    """As the contract in pyproject.toml lists them: the one list."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]["contracts"]
    listed = next(c for c in contracts if c["name"] == "A trace replays without torch")["source_modules"]
    return [each for name in listed for each in (expanded(name) if name.endswith(".*") else [name])]


def expanded(pattern: str) -> list[str]:
    folder = ROOT.joinpath("engine", *pattern.split(".")[:-1])
    return [pattern.replace("*", file.stem) for file in sorted(folder.glob("*.py")) if file.stem != "__init__"]


@pytest.mark.parametrize("module", [*modules_without_torch(), "specdec_engine.drafters"])
def test_a_trace_can_be_read_without_torch(module):
    assert not imported_by(f"import {module}") & {*HEAVY, "textual", "typer", "rich"}


def test_every_file_of_the_engines_rooms_is_on_its_map():
    """Rooms whose files are one command's are told as a whole."""
    named = set(re.findall(r"\b(\w+)\.py\b", (ROOT / "engine" / "README.md").read_text("utf-8")))
    rooms = {"decoding", "batch", "constrain", "verify", "adaptive", "models", "runtime", "core", "system", "record"}
    files = [file for room in rooms for file in (ROOT / "engine" / "specdec_engine" / room).glob("*.py")]
    assert len(files) > 50
    assert not {file.stem for file in files} - named - {"__init__"}


def test_every_drafter_is_held_to_know_no_other():
    """All files of the folder but those that drafters are made with."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]["contracts"]
    held = next(c for c in contracts if c["type"] == "independence")["modules"]
    shared = {
        f"specdec_engine.drafters.{name}"
        for name in ("base", "context_ids", "on_features", "on_runtime", "on_text", "several", "token_choice")
    }
    forgotten = set(expanded("specdec_engine.drafters.*")) - shared ^ set(held)
    assert not forgotten, f"pyproject.toml, contract 'Drafters do not know each other': {forgotten}"


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


def test_a_pair_on_a_cpu_imports_no_compiler_of_torchs():
    """`torch._dynamo` takes 1.4 s of a start; more than one harmless import brings it along."""
    code = "import sys, specdec_engine.pair, specdec_engine.runtime.lean\nprint(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch._dynamo", "torch._inductor", "sympy"} & set(found)
