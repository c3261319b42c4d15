"""`specdec check TARGET DRAFT`: do these two fit, before any weights are read?"""

from __future__ import annotations

import json as jsonlib
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from specdec_cli import options as opt
from specdec_cli import output
from specdec_cli.exits import ExitCode
from specdec_cli.startup import interruptible, quieten
from specdec_engine.errors import UsageError

if TYPE_CHECKING:
    from specdec_engine.models.offers import Offer
    from specdec_engine.models.options import LoadOptions
    from specdec_engine.tune.deep import Worth

_MARKS = {"ok": "✓", "note": "·", "open": "?", "bad": "×"}
_KINDS = {
    "lookup": "a lookup, which fits every target",
    "layers": "the target's own first layers",
    "head": "a head that was made for it",
    "ids": "a smaller model with its tokens",
    "package": "another package's",
    "text": "a smaller model with other tokens, which fits by its text",
}


@opt.records
def check(
    *,
    target: Annotated[str, typer.Argument(help="As after --target.", show_default=False)],
    draft: Annotated[
        str | None, typer.Argument(help="As after --draft; without it, what could draft is listed.", show_default=False)
    ] = None,
    deep: Annotated[bool, typer.Option("--deep", help="Load both, and measure the draft on three prompts.")] = False,
    tokens: Annotated[int, typer.Option(help="Context to reckon memory with.", min=1)] = 2048,
    json: opt.Json = False,
    where: opt.Placement,
) -> None:
    """Say whether two models fit together, or what could draft for one. Exits with 0 or 4.

    specdec check org/target org/draft
    """
    quieten(where.offline, where.debug)
    if draft is None:
        if deep:
            raise UsageError("--deep measures a draft, and none is named", "specdec check TARGET DRAFT --deep")
        _list(target, tokens, json, where)
        return
    with interruptible(), output.narrated() as report:
        from specdec_engine.models.compatibility import check as checked

        options = where.loading(tokens, report)
        fit = checked(target, draft, options)
        measured = _measured(target, draft, options) if deep and fit.fits else None
        other = _other_reading(target, draft, options) if measured is not None else None
    if json:
        found = {"schema": "specdec.check/1", "fits": fit.fits, **asdict(fit)}
        if deep:
            found["measured"] = None if measured is None else asdict(measured)
        if other is not None:
            found["measured_by_index"] = {"layer_ids": other.ids, **asdict(other.worth)}
        typer.echo(jsonlib.dumps(found, indent=1))
    else:
        for finding in fit.findings:
            output.say(f"{_MARKS[finding.level]} {finding.about}: {finding.said}")
        if deep and fit.fits:
            output.say(_said(measured))
        if other is not None and measured is not None:
            output.say(_compared(measured, other))
        mark, verb = ("×", "cannot") if not fit.fits else ("✓", "can") if fit.certain else ("?", "may be able to")
        slow = ", and does not pay: see what was measured" if measured is not None and measured.speedup <= 1 else ""
        output.say(f"{mark} {draft} {verb} draft for {target}{slow}")
    if not fit.fits:
        raise typer.Exit(ExitCode.INCOMPATIBLE)


def _measured(target: str, draft: str, options: LoadOptions) -> Worth | None:
    from specdec_engine.pair import load_pair
    from specdec_engine.tune.deep import worth

    return worth(load_pair(target, draft, options))


class _Other(NamedTuple):
    """A head that does not say which layers it reads, read the other way."""

    ids: tuple[int, ...]
    """Numbers that its config would have to say."""
    worth: Worth


def _other_reading(target: str, draft: str, options: LoadOptions) -> _Other | None:
    """Measure a head that does not say its layers in the other way; None for all other drafts."""
    from specdec_engine.core.registry import entry_of
    from specdec_engine.models.draft_files import found_draft, read_draft
    from specdec_engine.models.eagle_files import read_by_index
    from specdec_engine.models.loading import find_model

    if entry_of(draft) is not None or "," in draft or "+" in draft:
        return None
    made = read_draft(found_draft(draft, options))
    if made is None or made.kind != "head" or made.layers.counted != "guessed":
        return None
    layers = int(find_model(target, options).config.get_text_config().num_hidden_layers)
    with read_by_index(made, layers) as (folder, ids):
        worth = _measured(target, str(folder), options)
    return None if worth is None else _Other(ids, worth)


def _compared(measured: Worth, other: _Other) -> str:
    layers = ", ".join(str(number - 1) for number in other.ids)
    if other.worth.alpha <= measured.alpha:
        return f"· read as the layers {layers} it would have {other.worth.alpha:.0%}: it reads what was taken"
    return (
        f"! read as the layers {layers} it has {other.worth.alpha:.0%}, which is more: write "
        f'"eagle_aux_hidden_state_layer_ids": {list(other.ids)} into its config.json'
    )


def _said(measured: Worth | None) -> str:
    if measured is None:
        return "· measured: it proposed nothing"
    mark = "✓" if measured.speedup > 1 else "·"
    return (
        f"{mark} measured on {measured.tokens} tokens: {measured.alpha:.0%} of its first tokens are accepted; a draft of one "
        f"costs {measured.c:.2f} of a plain cycle; at best k {measured.k}, {measured.tokens_per_cycle:.2f} tokens a cycle, "
        f"{measured.speedup:.2f}×"
    )


def _list(target: str, tokens: int, json: bool, where: opt.Placement) -> None:
    """What could draft for it, of what is on this machine."""
    with interruptible(), output.narrated() as report:
        from specdec_engine.models.offers import offers

        found = offers(target, where.loading(tokens, report))
    if json:
        offered = [asdict(offer) for offer in found]
        typer.echo(jsonlib.dumps({"schema": "specdec.check/1", "target": target, "offers": offered}, indent=1))
        return
    width = max(len(offer.draft) for offer in found)
    output.say(f"could draft for {target}:")
    for offer in found:
        kind = "the module for multi-token prediction in its checkpoint" if offer.draft == "mtp" else _KINDS[offer.kind]
        output.say(f"{offer.draft:<{width}}  {kind}{_cost(offer)}")
    output.say(f"specdec check {target} DRAFT --deep measures one, specdec tune -t {target} several on your prompts")


def _cost(offer: Offer) -> str:
    if offer.c is None:
        return ""
    low, high = offer.c
    c = f"{low:.2f}" if high - low < 0.005 else f"{low:.2f} to {high:.2f}"
    cost = f"; a draft step costs {c} of a target pass"
    if offer.speedup is None:
        return cost
    least, most = offer.speedup
    return f"{cost}, {least:.2f}× with half of the tokens accepted, {most:.2f}× with four in five"
