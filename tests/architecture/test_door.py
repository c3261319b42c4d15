"""Text that is not ours passes one door before a terminal: what prints is in one file, or prints JSON, or what passed it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOORS = ("specdec_cli/output.py",)
"""Where text is printed, by functions that make it printable first."""
SAFE = ("dumps", "printable", "one_line", "counted")
FILES = sorted(str(p.relative_to(ROOT)) for folder in ("specdec_cli", "tui") for p in (ROOT / folder).rglob("*.py"))


def printed(tree):
    """(line, argument) of each call that writes to a standard stream."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "typer.echo", "sys.stdout.write"):
            yield from ((node.lineno, argument) for argument in node.args)


def is_safe(argument):
    """JSON, which escapes controls; what a function of the door gave; a version."""
    match argument:
        case ast.Call():
            return ast.unparse(argument.func).split(".")[-1] in SAFE
        case ast.JoinedStr():
            parts = [ast.unparse(v.value) for v in argument.values if isinstance(v, ast.FormattedValue)]
            return all(part == "__version__" for part in parts)
    return isinstance(argument, ast.Constant)


@pytest.mark.parametrize("file", [file for file in FILES if file not in DOORS])
def test_nothing_is_printed_past_the_door(file):
    tree = ast.parse((ROOT / file).read_text("utf-8"))
    past = [number for number, argument in printed(tree) if not is_safe(argument)]
    assert not past, f"{file}, lines {past}: say it by output.say, output.note or output.error"
