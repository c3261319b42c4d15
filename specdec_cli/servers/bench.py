"""`bench --attach` and `bench --engine`: a server with speculation beside the same without it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specdec_cli import output
from specdec_cli.exits import ExitCode
from specdec_cli.servers.attached import At, ServerOptions, short, started, starting
from specdec_engine.bench import report
from specdec_engine.core.cycle_types import Sampling
from specdec_engine.errors import UsageError
from specdec_engine.record.prompt_files import Question
from specdec_engine.record.text import counted

if TYPE_CHECKING:
    from pathlib import Path

    from specdec_engine.attach.asked import Asked
    from specdec_engine.attach.attached import Attached
    from specdec_engine.attach.load import Load

_SERVER = "A server"


@dataclass(frozen=True, slots=True)
class ServedOptions:
    """Options of measuring a server."""

    plain: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=_SERVER,
            metavar="URL",
            help="With --attach: the same server without speculation, to hold it against; --engine starts one.",
        ),
    ] = None
    concurrency: Annotated[
        str, typer.Option(rich_help_panel=_SERVER, help="Prompts at a time, several by commas: 1,2,4,8.")
    ] = "1"
    expect: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=_SERVER,
            metavar="TARGET",
            help="Hold its greedy texts against this target on our own engine in float32, and explain where they part.",
        ),
    ] = None

    def refuse_without_server(self) -> None:
        """Raises UsageError for an option that only a server has."""
        given = {
            "--plain": self.plain is not None,
            "--concurrency": self.concurrency != "1",
            "--expect": self.expect is not None,
        }
        if named := [name for name, value in given.items() if value]:
            raise UsageError(f"{named[0]} is for a server", "add --attach URL, or --engine")


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is measured."""

    server: ServerOptions
    options: ServedOptions
    target: str
    draft: str | None
    k: str | None
    temperature: float
    questions: Sequence[Question]
    repeats: int
    max_tokens: int
    seed: int
    offline: bool
    beside: tuple[Path, ...] = ()
    """Records of other engines."""


def bench_server(
    wanted: Wanted, given: Mapping[str, object], out: Path | None, format: str, fail_below: float | None
) -> None:
    """Measure, show, judge. given: options of `bench` that a server does not have, by name."""
    if named := [name for name, value in given.items() if value]:
        raise UsageError(f"{named[0]} is not for a server", "leave it out")
    from specdec_engine.bench.served import read_beside

    others = [read_beside(path, wanted.questions, wanted.temperature) for path in wanted.beside]
    found, whole = measured(wanted, out, format, fail_below)
    show(found, format, others)
    if not whole:
        raise typer.Exit(ExitCode.INTERRUPTED)
    judge(found, fail_below)


def measured(wanted: Wanted, out: Path | None, format: str, fail_below: float | None) -> tuple[dict[str, Any], bool]:
    """The record, kept after each load; and whether it is whole, or ended by Ctrl-C. Raises UsageError for what a server
    cannot be told, before anything is asked, and what `attach` raises."""
    from specdec_engine.attach.load import Load, under_load, warm_up

    loads_of = _concurrencies(wanted.options.concurrency)
    _check(wanted, format, fail_below)
    asked, loads, about = _asked(wanted), list[Load](), dict[str, Any]()

    def found(expected: Mapping[str, Any] | None = None) -> dict[str, Any]:
        return _recorded(wanted, loads, loads_of, about, expected)

    if out is not None:
        report.write(out, {"schema": report.SCHEMA, "arms": []})  # a place that cannot be written is found now
    whole = True
    try:
        with _told(len(asked) * len(loads_of) * wanted.repeats * 2) as done:
            for block, (plain, server) in _turns(wanted):
                warm_up(server, asked[0])
                about["plain" if plain else "speculative"] = {
                    "server": server.engine.name,
                    **asdict(server.engine.about),
                }
                for concurrency in loads_of:
                    loads.append(under_load(server, asked, concurrency, block, plain, done))
                    _check_sides(loads[-1], plain, server)
                    if out is not None and "speculative" in about:
                        report.write(out, found())
    except KeyboardInterrupt:
        if "speculative" not in about or not any(load.samples for load in loads):
            raise
        output.note("interrupted: what was measured until then is shown")
        whole = False
    for number, why in sorted({item for load in loads for item in load.left_out.items()}):
        output.note(f"prompt {number} is left out: {why}")
    result = found(_explained(wanted, loads) if whole and wanted.options.expect is not None else None)
    if out is not None:
        report.write(out, result)
    return result, whole


def _turns(wanted: Wanted) -> Iterator[tuple[int, tuple[bool, Attached]]]:
    """Both servers in each block."""
    for block in range(wanted.repeats):
        for side in _servers(wanted, block):
            yield block, side


def _check(wanted: Wanted, format: str, fail_below: float | None) -> None:
    """Raises UsageError, and ModelUnavailable for a target of --expect that is not there."""
    options, at = wanted.options, wanted.server.attach
    if format not in ("table", "json"):
        raise UsageError(f"--format {format} is not for servers", "table or json")
    if options.plain is not None and at is None:
        raise UsageError("--plain belongs to --attach", "--engine starts the plain server by itself")
    if at is not None and (wanted.k is not None or wanted.draft is not None):
        raise UsageError(
            "--attach cannot be told -k or --draft: a server keeps what it was started with", "leave it out"
        )
    if fail_below is not None and at is not None and options.plain is None:
        raise UsageError("--fail-below needs a speedup, and no plain server is named", "add --plain URL")
    if options.expect is not None and wanted.temperature:
        raise UsageError("--expect compares greedy texts", "leave out --temperature")
    Sampling(wanted.temperature)
    if at is not None:
        from specdec_engine.attach.attached import attach

        for url in filter(None, (at, options.plain)):
            attach(url)
    if options.expect is not None:
        from specdec_engine.models.loading import find_model
        from specdec_engine.models.options import LoadOptions

        find_model(options.expect, LoadOptions(dtype="float32", quantize="none", offline=wanted.offline))


def _check_sides(load: Load, plain: bool, server: Attached) -> None:
    """Raises UsageError where the server that is called plain drafts."""
    if plain and any(sample.drafted for sample in load.samples):
        raise UsageError(f"the server at --plain drafts, too: {server.server.url}", "name one without speculation")
    if not plain and server.engine.about.draft == "none":
        output.note(f"{server.server.url} drafts nothing: is it the plain one?")


def _recorded(
    wanted: Wanted,
    loads: Sequence[Load],
    loads_of: Sequence[int],
    about: Mapping[str, Any],
    expected: Mapping[str, Any] | None,
) -> dict[str, Any]:
    from specdec_engine.bench.served import record

    own = about["speculative"]
    said = {"draft": own["draft"], "k": own["k"], "temperature": wanted.temperature, "rule": "token"}
    environment = {
        "servers": dict(about),
        "target": own["target"],
        "cpu_count": os.cpu_count(),
        "utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "argv": sys.argv[1:],
    }
    parted = [] if expected is None else expected["divergences"]
    return {**record(loads, loads_of, wanted.questions, said, environment, parted), "expected": expected}


def _concurrencies(text: str) -> list[int]:
    try:
        found = list(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        found = []
    if not found or min(found) < 1 or max(found) > 256:
        raise UsageError(f"--concurrency {text} is no list of numbers from 1 to 256", "for example 1,2,4,8")
    return found


def _asked(wanted: Wanted) -> list[Asked]:
    from specdec_engine.attach.asked import Asked

    if any(len(question.turns) > 1 for question in wanted.questions):
        output.note("of conversations the first turn is asked")
    return [
        Asked(
            question.turns[0],
            Sampling(wanted.temperature),
            wanted.max_tokens,
            seed=wanted.seed + number,
            system=question.system or None,
            fresh=True,
        )
        for number, question in enumerate(wanted.questions)
    ]


def _servers(wanted: Wanted, block: int) -> Iterator[tuple[bool, Attached]]:
    """Both, one after the other, in turns: what drifts meets both. Only the speculative one where no plain one is named."""
    from specdec_engine.attach.attached import attach
    from specdec_engine.tune.engines import drafted_with

    if wanted.server.attach is not None:
        urls = [(False, At(wanted.server.attach))]
        if wanted.options.plain is not None:
            urls.append((True, At(wanted.options.plain)))
        for plain, at in urls if block % 2 == 0 else reversed(urls):
            yield plain, attach(at.url)
        return
    own = starting(wanted.server, wanted.target, wanted.draft, wanted.k, wanted.temperature > 0)
    for plain in (False, True) if block % 2 == 0 else (True, False):
        made = own.plain if plain else own
        with started(made, wanted.offline) as url:
            yield plain, attach(url, drafted_with(made), None if plain else own.k)


@contextmanager
def _told(total: int) -> Iterator[Callable[[], None]]:
    """How far it is, in a line that changes."""
    count = 0
    with output.working() as say:

        def done() -> None:
            nonlocal count
            count += 1
            say(f"asking the server, answer {count} of at most {total}")

        yield done


def _explained(wanted: Wanted, loads: Sequence[Load]) -> dict[str, Any]:
    """Where the speculative server's greedy texts leave those of our own target, and how near the two tokens were."""
    from specdec_engine.bench.measure import served_divergence
    from specdec_engine.models.options import LoadOptions
    from specdec_engine.pair import load_pair

    first = next(load for load in loads if load.samples and not load.samples[0].plain)
    with output.narrated() as report_:
        longest = max(len(s.prompt_ids) for s in first.samples) + wanted.max_tokens
        options = LoadOptions(dtype="float32", quantize="none", offline=wanted.offline, tokens=longest, report=report_)
        pair = load_pair(wanted.options.expect or "", "none", options)
    found, compared = list[dict[str, Any]](), 0
    for sample in first.samples:
        known = [token for token in sample.token_ids if token is not None]
        if len(known) < len(sample.token_ids):
            output.note(f"prompt {sample.question} is not compared: the server keeps some of its ids back")
            continue
        compared += 1
        if (parted := served_divergence(pair, sample.question, sample.prompt_ids, known)) is not None:
            found.append(asdict(parted))
    return {"target": wanted.options.expect, "compared": compared, "same": compared - len(found), "divergences": found}


def show(found: Mapping[str, Any], format: str, others: Sequence[Mapping[str, Any]] = ()) -> None:
    """On stdout. others: records whose arms stand in the same table."""
    import json

    if format == "json":
        typer.echo(json.dumps(found, indent=1))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None)
    names = ("at a time", "tok/s", "vs plain (95 %)", "all together", "accepted", "tok/cycle", "by position", "TTFT p50/p95",
             "token p50/p95", "same")  # fmt: skip
    for name in (*(("engine",) if others else ()), *names):
        table.add_column(name, justify="left" if name in ("engine", "by position") else "right")
    for record in (*others, found):
        for arm in record["arms"]:
            cells = [_engine(record, arm), *_row(arm)] if others else _row(arm)
            table.add_row(*(Text(output.one_line(cell)) for cell in cells))
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    servers = found["environment"]["servers"]
    own = servers["speculative"]
    plain = (
        "no plain server was named: there is no speedup to tell"
        if "plain" not in servers
        else "against the same without"
    )
    output.say(
        f"{own['server']} {own['version'] or ''}: {own['target']}, draft {own['draft']}, k {own['k'] or '–'}, "
        f"{counted(found['prompts']['count'], 'prompt')}; {plain}"
    )
    if (expected := found["expected"]) is not None:
        output.say(
            f"{expected['same']} of {expected['compared']} greedy texts are those of {expected['target']} on our own engine "
            "in float32"
        )
    for parted in {d["question"]: d for arm in found["arms"] for d in arm["first_divergences"]}.values():
        gap = "–" if parted["gap"] is None else f"{parted['gap']:.3f}"
        output.say(
            f"prompt {parted['question']} leaves our own float32 text at token {parted['position']}: {parted['arm']!r} for "
            f"{parted['plain']!r}, logits {gap} apart: {parted['verdict']}"
        )
    if (advice := found["recommendation"]) is not None:
        output.say(f"→ {advice['reason']}")


def _engine(record: Mapping[str, Any], arm: Mapping[str, Any]) -> str:
    """Who ran it, with what: a server, or our own engine."""
    servers = record["environment"].get("servers")
    if servers is None:
        return f"specdec, {short(arm['draft'])} k {arm['k']}"
    return f"{servers['speculative']['server']}, {short(arm['draft'])} k {arm['k'] or '–'}"


def _row(arm: Mapping[str, Any]) -> list[str]:
    """Of our own engine's arm there are the columns that it has: one answer at a time, and no arrival of tokens."""
    low = arm["speedup_low"]
    plain, together, throughput = arm.get("plain"), arm.get("throughput_ratio"), arm.get("throughput")
    return [
        str(arm.get("concurrency", 1)),
        _number(arm["tokens_per_second"], 1)
        + ("" if plain is None else f" / {_number(plain['tokens_per_second'], 1)}"),
        "–"
        if arm["speedup"] is None
        else f"{arm['speedup']:.2f}×" + ("" if low is None else f" ({low:.2f}–{arm['speedup_high']:.2f})"),
        _number(throughput, 0) + ("" if together is None else f" ({together:.2f}×)"),
        _number(arm["acceptance_rate"], 2),
        _number(arm["mean_emitted_per_cycle"], 2),
        " ".join(f"{share:.2f}" for share in arm.get("accepted_at", ())) or "–",
        _milliseconds(arm.get("ttft_s")),
        _milliseconds(arm.get("inter_token_s")),
        "–" if arm["compared"] is None else f"{arm['identical']}/{arm['compared']}",
    ]


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _milliseconds(spread: Mapping[str, float] | None) -> str:
    return "–" if spread is None else f"{1e3 * spread['p50']:.0f}/{1e3 * spread['p95']:.0f} ms"


def judge(found: Mapping[str, Any], fail_below: float | None) -> None:
    """Exit with 6 for a threshold that was missed."""
    best = max((arm["speedup"] for arm in found["arms"] if arm["speedup"] is not None), default=None)
    if fail_below is not None and best is not None and best < fail_below:
        output.error(f"the best speedup is {best:.2f}, below {fail_below:g}", "see the table")
        raise typer.Exit(ExitCode.CHECK)
