"""`specdec check TARGET DRAFT`: do these two fit, before any weights are read?"""

from __future__ import annotations

import json as jsonlib
from dataclasses import asdict
from typing import Annotated

import typer

from specdec_cli import options as opt
from specdec_cli import output
from specdec_cli.exits import ExitCode
from specdec_cli.startup import quieten

_MARKS = {"ok": "✓", "note": "·", "open": "?", "bad": "×"}


@opt.records
def check(
    *,
    target: Annotated[str, typer.Argument(help="As after --target.", show_default=False)],
    draft: Annotated[str, typer.Argument(help="As after --draft.", show_default=False)],
    tokens: Annotated[int, typer.Option(help="Context to reckon memory with.", min=1)] = 2048,
    json: opt.Json = False,
    where: opt.Placement,
) -> None:
    """Say whether two models fit together, from their configs and tokenizers alone. Exits with 0 or 4.

    specdec check org/target org/draft
    """
    quieten(where.offline, where.debug)
    with output.narrated() as report:
        from specdec_engine.models.compatibility import check as checked

        fit = checked(target, draft, where.loading(tokens, report))
    if json:
        found = {"schema": "specdec.check/1", "fits": fit.fits, **asdict(fit)}
        typer.echo(jsonlib.dumps(found, indent=1))
    else:
        for finding in fit.findings:
            output.say(f"{_MARKS[finding.level]} {finding.about}: {finding.said}")
        mark, verb = ("×", "cannot") if not fit.fits else ("✓", "can") if fit.certain else ("?", "may be able to")
        output.say(f"{mark} {draft} {verb} draft for {target}")
    if not fit.fits:
        raise typer.Exit(ExitCode.INCOMPATIBLE)
