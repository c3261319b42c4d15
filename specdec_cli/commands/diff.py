"""`specdec diff`: two recorded runs of one prompt. No torch."""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specdec_cli import options as opt
from specdec_cli import output
from specdec_cli.exits import ExitCode
from specdec_engine.errors import UsageError

if TYPE_CHECKING:
    from specdec_engine.record.comparison import Comparison, RecordedRun


def diff(
    a: Annotated[Path, typer.Argument(help="A file that --trace wrote.", show_default=False)],
    b: Annotated[Path, typer.Argument(help="Another one, of the same prompt.", show_default=False)],
    json: opt.Json = False,
) -> None:
    """Say where two recorded runs of one prompt part, and why. Exits with 6 for what nothing explains.

    specdec diff one.jsonl other.jsonl
    """
    for path in (a, b):
        if not path.is_file():
            raise UsageError(f"{path} is not a file", "give a file that --trace wrote")
    from specdec_engine.record.comparison import compare, read_run

    found = compare(read_run(a), read_run(b))
    if json:
        typer.echo(jsonlib.dumps(_record(found), indent=1))
    else:
        say_comparison(found)
    if found.cause == "unexplained":
        raise typer.Exit(ExitCode.CHECK)


def _record(found: Comparison) -> dict[str, Any]:
    return {
        "schema": "specdec.diff/1",
        "same": found.same,
        "common": found.common,
        "cause": found.cause,
        "why": found.why,
        "tokens": [_at(run, found.common) for run in (found.a, found.b)],
        "settings": {name: list(pair) for name, pair in found.settings.items()},
        "same_cycles": found.same_cycles,
        "other_cycles": list(found.other_cycles),
        "figures": [run.summary.figures() for run in (found.a, found.b)],
    }


def _short(value: object) -> str:
    """A setting: of a grammar its kind, of a text its beginning."""
    text = str(value["kind"]) if isinstance(value, dict) and "kind" in value else str(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


_SHOWN = 60


def _at(run: RecordedRun, place: int) -> dict[str, Any] | None:
    """The token at this place, and the cycle that emitted it; None behind the end."""
    cycle = run.cycle_at(place)
    if cycle is None:
        return None
    token = run.tokens[place]
    return {"id": token, "text": run.name(token), "cycle": cycle.index}


def say_comparison(found: Comparison) -> None:
    """For people, on stdout."""
    a, b = found.a, found.b
    for letter, run in (("A", a), ("B", b)):
        s = run.summary
        rate = "–" if s.mean_emitted_per_cycle is None else f"{s.mean_emitted_per_cycle:.2f}"
        speed = "" if s.tokens_per_second is None else f", {s.tokens_per_second:.1f} tok/s"
        output.say(
            f"{letter} {run.path}: {run.started.observer}, draft {run.started.settings.get('draft')}, {s.emitted} tokens in "
            f"{s.cycles} cycles, {rate} a cycle, accepted {s.accepted} of {s.drafted}{speed}"
        )
    for name, (x, y) in found.settings.items():
        output.say(f"  {name}: {_short(x)} | {_short(y)}")
    cycles = found.same_cycles + len(found.other_cycles)
    output.say(f"{found.common} tokens are the same; {found.same_cycles} of A's {cycles} cycles there are B's, too")
    if found.other_cycles:
        shown = ", ".join(str(index + 1) for index in found.other_cycles[:12])
        output.say(f"  others: cycle {shown}{', …' if len(found.other_cycles) > 12 else ''}")
    if found.same:
        output.say("✓ the same text")
        return
    for letter, run in (("A", a), ("B", b)):
        at = _at(run, found.common)
        said = "the end" if at is None else f"{at['text']!r} in cycle {at['cycle'] + 1}"
        output.say(f"{letter} then says {said}")
    mark = {"unexplained": "×", "length": "·"}.get(found.cause, "·")
    output.say(f"{mark} {found.why}")
