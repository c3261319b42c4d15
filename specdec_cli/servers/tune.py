"""`tune --attach`: which k a running server should be started with, estimated from its own answers."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specdec_cli import options as opt
from specdec_cli import output
from specdec_engine.bench.figures import FEWEST
from specdec_engine.core.cycle_types import Sampling
from specdec_engine.errors import UsageError
from specdec_engine.record.prompt_files import Question
from specdec_engine.record.text import counted

if TYPE_CHECKING:
    from specdec_engine.attach.asked import Asked
    from specdec_engine.attach.attached import Attached
    from specdec_engine.tune.served import ServedSetting, ServedTuned


@dataclass(frozen=True, slots=True)
class TunedServer:
    """A server that runs."""

    attach: opt.Attach = None
    plain: Annotated[
        str | None,
        typer.Option(
            rich_help_panel="Models",
            metavar="URL",
            help="With --attach: the same server without speculation, asked in turns with it.",
        ),
    ] = None

    @property
    def wanted(self) -> bool:
        """Raises UsageError for --plain alone."""
        if self.plain is not None and self.attach is None:
            raise UsageError("--plain belongs to --attach", "add --attach URL")
        return self.attach is not None


@dataclass(frozen=True, slots=True)
class Questioned:
    """What is asked."""

    questions: Sequence[Question]
    sampling: Sampling
    max_tokens: int
    seed: int


def tune_server(at: TunedServer, wanted: Questioned, given: Mapping[str, object], json: bool) -> None:
    """Ask, estimate, show. given: options of `tune` that a server does not have, by name. Raises UsageError for one of them,
    and what `attach` raises."""
    if named := [name for name, value in given.items() if value]:
        raise UsageError(
            f"--attach cannot be told {named[0]}: a server keeps what it was started with",
            "leave it out; without --attach, tune looks at a pair on this machine",
        )
    from specdec_engine.attach.attached import attach
    from specdec_engine.tune.served import asked, lookups_along, tuned

    server = attach(at.attach or "")
    plain = None if at.plain is None else attach(at.plain)
    with output.working() as say:
        answers = list(asked(server, plain, [_asked(wanted, n) for n in range(len(wanted.questions))], say))
        if lost := len(wanted.questions) - len(answers):
            output.note(f"left out, since they do not fit or end at once: {lost} of {len(wanted.questions)} prompts")
        found = tuned(answers)
        say("looking up the same texts")
        lookups = lookups_along(answers, found.running.k)
    record = _record(wanted, server, at.plain, found, lookups)
    if json:
        typer.echo(jsonlib.dumps(record, indent=1))
    else:
        for line in _lines(server, found, record):
            output.say(line)


def _asked(wanted: Questioned, number: int) -> Asked:
    from specdec_engine.attach.asked import Asked

    question = wanted.questions[number]
    return Asked(
        question.turns[0],
        wanted.sampling,
        wanted.max_tokens,
        seed=wanted.seed + number,
        system=question.system or None,
        fresh=True,
    )


def _record(
    wanted: Questioned, server: Attached, plain_url: str | None, found: ServedTuned, lookups: Mapping[str, float]
) -> dict[str, Any]:
    """As `tune` has it, with what a server tells."""
    from specdec_engine.tune.served import flags_for

    about, best = server.engine.about, found.best
    curve = [_point(setting) for setting in found.curve]
    return {
        "schema": "specdec.tune/1",
        "environment": {
            "server": server.engine.name,
            "server_version": about.version,
            "url": server.server.url,
            "plain_url": plain_url,
        },
        "observer": server.engine.name,
        "exactness": "exact" if found.exact else "inferred",
        "target": about.target,
        "temperature": wanted.sampling.temperature,
        "answers": {"count": len(found.answers), "tokens": sum(answer.tokens for answer in found.answers)},
        "costs": {"plain_s": found.plain_s, "cycle_s": found.running.cycle_s},
        "drafts": [{"draft": about.draft, "curve": curve}],
        "lookups": [
            {"draft": name, "k": found.running.k, "mean_emitted_per_cycle": emitted}
            for name, emitted in lookups.items()
        ],
        "predicted": {"draft": about.draft, **_point(best)} if found.decided else None,
        "confirmed": [],
        "recommendation": {
            "draft": about.draft if best.k else "none",
            "k": best.k,
            "speedup": None if best.speedup is None else best.speedup.mean,
            "reason": _reason(found),
            "flags": flags_for(server.engine.name, best.k),
        }
        if found.decided
        else None,
    }


def _point(setting: ServedSetting) -> dict[str, Any]:
    speedup = setting.speedup
    return {
        "k": setting.k,
        "mean_emitted_per_cycle": setting.emitted,
        "cycle_s": setting.cycle_s,
        "speedup": None if speedup is None else speedup.mean,
        "speedup_low": None if speedup is None or speedup.low != speedup.low else speedup.low,
        "speedup_high": None if speedup is None or speedup.high != speedup.high else speedup.high,
    }


def _reason(found: ServedTuned) -> str:
    if found.plain_s is None:
        return "what a token costs without speculation is not known: name a server without it by --plain URL"
    if not found.decided:
        return f"{counted(len(found.answers), 'prompt')} are too few to decide by: give {FEWEST} at least"
    best, running = found.best, found.running
    if best is running:
        return f"k {running.k}, with which it runs, is best: {running.speedup}"
    if not best.k:
        return f"it is faster without speculation: with k {running.k} {running.speedup}"
    return f"start it with k {best.k}: {best.speedup}, by estimate, for {running.speedup} with k {running.k}"


def _lines(server: Attached, found: ServedTuned, record: Mapping[str, Any]) -> Iterator[str]:
    about, answers = server.engine.about, record["answers"]
    yield (
        f"{server.engine.name} {about.version or ''} at {server.server.url}: {about.target}, draft {about.draft} · "
        f"{counted(answers['count'], 'answer')}, {answers['tokens']} tokens, temperature {record['temperature']:g} · "
        f"{record['exactness']}"
    )
    yield ""
    yield "  k  tok/cycle  cycle ms  estimated speedup"
    for setting in found.curve:
        took = "–" if setting.cycle_s is None else f"{1e3 * setting.cycle_s:.1f}"
        mark = "  ← as it runs" if setting is found.running else "  plain" if not setting.k else ""
        speedup = "–" if setting.speedup is None else str(setting.speedup) if setting.k else "1.00×"
        yield f"{setting.k:>3}  {setting.emitted:>9.2f}  {took:>8}  {speedup}{mark}"
    if record["lookups"]:
        yield ""
        said = ", ".join(f"{found['draft']} {found['mean_emitted_per_cycle']:.2f}" for found in record["lookups"])
        yield f"tokens a cycle of our lookups on the same texts, at k {found.running.k}: {said}"
    yield ""
    yield f"→ {_reason(found)}"
    advice = record["recommendation"]
    if advice is not None and advice["k"] != found.running.k:
        yield f"  {advice['flags']}"
