"""Copies between host and device are made in one place, which knows where they may be left to run."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ENGINE = Path(__file__).parents[2] / "engine" / "specdec_engine"
FILES = [path for path in sorted(ENGINE.rglob("*.py")) if path.name != "transfer.py"]


def calls(path: Path) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ENGINE).as_posix())
def test_nothing_else_copies_without_waiting_or_waits_for_a_copy(path):
    """`non_blocking` corrupts on MPS what was freed; `torch.tensor(..., device=cuda)` waits for all that was launched."""
    for call in calls(path):
        names = {keyword.arg for keyword in call.keywords}
        assert not names & {"non_blocking", "pin_memory"}, f"line {call.lineno}: transfer.upload or download"
        made = isinstance(call.func, ast.Attribute) and call.func.attr in ("tensor", "as_tensor")
        assert not (made and "device" in names), f"line {call.lineno}: transfer.upload(torch.tensor(...), device)"
