"""The command in this process (fast: models are tiny, torch is loaded already) and as a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from specdec_cli.main import main

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


@pytest.fixture
def specdec(monkeypatch, capsys) -> Callable[..., Result]:
    """`specdec("generate", "hello", ...)` with stdin closed."""

    def call(*argv: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["specdec", *map(str, argv)])
        with Path(os.devnull).open() as closed, monkeypatch.context() as patched:
            patched.setattr(sys, "stdin", closed)
            with pytest.raises(SystemExit) as ended:
                main()
        captured = capsys.readouterr()
        return Result(int(ended.value.code or 0), captured.out, captured.err)

    return call


def command(*argv: object) -> list[str]:
    return [sys.executable, "-m", "specdec_cli", *map(str, argv)]


def environment(**extra: str) -> dict[str, str]:
    paths = os.pathsep.join(str(ROOT / p) for p in (".", "engine", "tui"))
    return {**os.environ, "PYTHONPATH": paths, "PYTHONWARNINGS": "error", **extra}


def process(*argv: object, stdin: bytes | None = None, **extra: str) -> subprocess.CompletedProcess[bytes]:
    """Run to its end; without `stdin` it reads /dev/null."""
    given: dict[str, Any] = {"input": stdin} if stdin is not None else {"stdin": subprocess.DEVNULL}
    return subprocess.run(command(*argv), capture_output=True, env=environment(**extra), timeout=120, **given)
