"""`watch --attach URL --metrics`: a server that others drive, by its own counters."""

from __future__ import annotations

import json as jsonlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specdec_cli import output
from specdec_cli.exits import ExitCode
from specdec_engine.errors import UsageError
from specdec_engine.record.stats import Summary

if TYPE_CHECKING:
    from rich.table import Table

    from specdec_engine.attach.watching import EngineHistory

EVERY_S = 2.0
FEWEST = 20
"""Drafted tokens that a rate is judged by."""
_SERVER = "A server that others drive"


@dataclass(frozen=True, slots=True)
class Counters:
    """Options of watching a server by its counters."""

    metrics: Annotated[
        bool,
        typer.Option(
            "--metrics",
            rich_help_panel=_SERVER,
            help="With --attach: what the server accepts of all its requests, by its own counters, over time.",
        ),
    ] = False
    once: Annotated[
        bool, typer.Option("--once", rich_help_panel=_SERVER, help="With --metrics: read them once, and leave.")
    ] = False
    json: Annotated[
        bool, typer.Option("--json", rich_help_panel=_SERVER, help="With --metrics: one object a reading.")
    ] = False
    fail_below: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=_SERVER,
            metavar="RATE",
            help="With --metrics: exit with 6 once the acceptance rate is lower.",
        ),
    ] = None

    def wanted(self, url: str | None, prompt: bool) -> bool:
        """Raises UsageError for options that do not belong together, and for a rate that is none."""
        if self.metrics and url is None:
            raise UsageError("--metrics needs --attach", "specdec watch --attach http://localhost:8000 --metrics")
        if self.metrics and prompt:
            raise UsageError("--metrics takes no prompt: others drive the server", "leave out one of the two")
        if not self.metrics and (self.once or self.json or self.fail_below is not None):
            raise UsageError("--once, --json and --fail-below belong to --metrics", "add --metrics, and --attach URL")
        if self.fail_below is not None and not 0 <= self.fail_below <= 1:
            raise UsageError(f"--fail-below {self.fail_below:g} is no rate", "give one from 0 to 1, such as 0.5")
        return self.metrics


def show_counters(url: str, how: Counters) -> None:
    """On a terminal a table that is drawn anew; elsewhere a line for each engine. Exits with 6 where the acceptance rate is
    lower than `fail_below`: with `once` since the server began, else between two readings."""
    from specdec_engine.attach.watching import histories

    read, json, fail_below = histories(url, EVERY_S), how.json, how.fail_below
    if how.once:
        found = next(read)
        _print(found, json)
        _judge({name: history.total for name, history in found.items()}, fail_below)
        return
    try:
        if sys.stdout.isatty() and not json:
            _draw(read, fail_below)
        for found in read:
            _print(found, json)
            _judge({name: recent for name, h in found.items() if (recent := h.recent) is not None}, fail_below)
    except BrokenPipeError:
        output.silence_stdout()
    except KeyboardInterrupt:
        raise typer.Exit(ExitCode.INTERRUPTED) from None


def _judge(summaries: dict[str, Summary], fail_below: float | None) -> None:
    """Few drafted tokens say little, and none nothing, which is said."""
    if fail_below is not None and summaries and all(summary.drafted < FEWEST for summary in summaries.values()):
        output.note(f"fewer than {FEWEST} drafted tokens: there is no rate to hold against {fail_below:g}")
    for name, summary in summaries.items():
        rate = summary.acceptance_rate if summary.drafted >= FEWEST else None
        if fail_below is not None and rate is not None and rate < fail_below:
            engine = f" of engine {name}" if name and len(summaries) > 1 else ""
            output.error(f"the acceptance rate{engine} is {rate:.2f}, and --fail-below is {fail_below:g}")
            raise typer.Exit(ExitCode.CHECK)


def _print(found: dict[str, EngineHistory], json: bool) -> None:
    if json:
        first = next(iter(found.values())).latest
        engines = [{"engine": name or None, **_figures(history)} for name, history in found.items()]
        record = {"schema": "specdec.metrics/1", "server": first.server, "engines": engines}
        print(jsonlib.dumps(record), flush=True)  # noqa: T201
        return
    for name, history in found.items():
        figures = history.total if history.recent is None else history.recent
        when = "since it began" if history.recent is None else f"in {history.interval_s:.0f} s"
        engine = f" engine {name}" if len(found) > 1 else ""
        output.say(f"{history.latest.server}{engine}, {when}: {_sentence(figures)}")
    sys.stdout.flush()


def _figures(history: EngineHistory) -> dict[str, Any]:
    total, recent = history.total, history.recent
    return {
        "cycles": total.cycles,
        "drafted": total.drafted,
        "accepted": total.accepted,
        "emitted": total.emitted,
        "acceptance_rate": total.acceptance_rate,
        "mean_emitted_per_cycle": total.mean_emitted_per_cycle,
        "accepted_at": [position.reach for position in total.positions],
        "requests_running": history.latest.running,
        "recent": None
        if recent is None
        else {
            "acceptance_rate": recent.acceptance_rate,
            "mean_emitted_per_cycle": recent.mean_emitted_per_cycle,
            "tokens_per_second": history.recent_tokens_per_second,
        },
    }


def _sentence(summary: Summary) -> str:
    if not summary.cycles:
        return f"no cycle drafted, {summary.emitted:,} tokens emitted"
    return (
        f"{_number(summary.acceptance_rate)} of {summary.drafted:,} drafted tokens accepted, "
        f"{_number(summary.mean_emitted_per_cycle)} emitted per cycle, by position "
        f"{' '.join(_number(position.reach) for position in summary.positions) or '–'}"
    )


def _draw(read: Iterator[dict[str, EngineHistory]], fail_below: float | None) -> None:
    """Until Ctrl-C."""
    from rich.console import Console, Group
    from rich.live import Live
    from rich.text import Text

    console = Console()
    with Live(console=console, auto_refresh=False) as live:
        for found in read:
            lines = [spark(list(history.rates), console.width - 12) for history in found.values()]
            graphs = [Text(f"over time  {line}", no_wrap=True) for line in lines]
            live.update(Group(_table(found), *graphs), refresh=True)
            _judge({name: recent for name, h in found.items() if (recent := h.recent) is not None}, fail_below)


def _table(found: dict[str, EngineHistory]) -> Table:
    from rich.table import Table
    from rich.text import Text

    server = next(iter(found.values())).latest.server
    table = Table(title=f"{server}: what it accepts of its drafts · Ctrl-C leaves", title_justify="left", box=None)
    for name in ("engine", "", "accepted", "a cycle", "by position", "tok/s", "running"):
        table.add_column(name, justify="right" if name in ("accepted", "a cycle", "tok/s", "running") else "left")
    for name, history in found.items():
        rows = [("since it began", history.total, "", "")]
        if (recent := history.recent) is not None:
            speed = history.recent_tokens_per_second
            running = "–" if history.latest.running is None else str(history.latest.running)
            rows.append((f"last {history.interval_s:.0f} s", recent, "–" if speed is None else f"{speed:.0f}", running))
        for i, (when, figures, speed_said, running_said) in enumerate(rows):
            table.add_row(
                "" if i else Text(output.one_line(name or "0")),
                when,
                _number(figures.acceptance_rate),
                _number(figures.mean_emitted_per_cycle),
                " ".join(_number(position.reach) for position in figures.positions) or "–",
                speed_said,
                running_said,
            )
    return table


_BARS = "▁▂▃▄▅▆▇█"


def spark(rates: list[float | None], width: int) -> str:
    """The newest rates, a character each: the higher the more; a dot where nothing was drafted."""
    return "".join("·" if rate is None else _BARS[min(7, int(8 * rate))] for rate in rates[-width:]) or "–"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
