"""`specdec distill`: a draft made for one target, from the target's own words."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from specdec_cli import options as opt
from specdec_cli import output
from specdec_cli.exits import ExitCode
from specdec_cli.startup import interruptible, quieten
from specdec_engine.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from specdec_engine.distill.run import Training, Writing
    from specdec_engine.distill.training import Estimate

_PANEL = "Draft"


def distill(
    out: Annotated[Path, typer.Option("--out", "-o", rich_help_panel=_PANEL, help="Folder for the draft.")],
    target: opt.Target = "builtin",
    kind: Annotated[
        Literal["head", "model"],
        typer.Option(
            rich_help_panel=_PANEL,
            help="head (reads the target's hidden states) or model (a language model of its own).",
        ),
    ] = "head",
    size: Annotated[
        Literal["small", "medium", "large"] | None,
        typer.Option(
            rich_help_panel=_PANEL,
            help="4096, 6144 or 8192 draft tokens, and wider layers; medium by default.",
            show_default=False,
        ),
    ] = None,
    draft: Annotated[
        str | None,
        typer.Option(
            "--draft",
            "-d",
            rich_help_panel=_PANEL,
            help="Go on from this head (builtin, or a folder of distill's) instead of beginning anew.",
        ),
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(rich_help_panel=_PANEL, help="Time for all of it; 60 by default.")
    ] = None,
    tokens: Annotated[int | None, typer.Option(rich_help_panel=_PANEL, help="Text to write instead of a time.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=_PANEL, help="Prompts, one a line or as JSONL; without it the target writes them too."
        ),
    ] = None,
    documents: Annotated[
        Path | None,
        typer.Option(rich_help_panel=_PANEL, help="Text file or folder; half of the prompts ask about passages in it."),
    ] = None,
    traces: Annotated[
        list[Path] | None,
        typer.Option(
            "--from",
            rich_help_panel=_PANEL,
            help="Learn from your own runs: a trace, or a folder of them; may be repeated.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(rich_help_panel=_PANEL, help="Of the text and the training.")] = 0,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
    threads: opt.Threads = None,
    offline: opt.Offline = False,
    trust_remote_code: opt.TrustRemoteCode = False,
    debug: opt.Debug = False,
) -> None:
    """Distill a small draft from a target; interrupted, the same command goes on.

    specdec distill --target builtin --out my-draft --minutes 60
    """
    if minutes is None and tokens is None:
        minutes = 60.0
    if data is not None and not data.is_file():
        raise UsageError(f"{data} is not a file", "give a file with one prompt a line, or leave out --data")
    quieten(offline, debug)
    with interruptible(), output.narrated() as report:
        # Deferred, as for generate: torch takes seconds.
        import torch

        from specdec_engine.distill.recipe import Recipe
        from specdec_engine.distill.run import check_target, distill
        from specdec_engine.models.loading import find_model
        from specdec_engine.models.options import LoadOptions
        from specdec_engine.system.machine import usable_cores
        from specdec_engine.system.threads import set_threads

        recipe = Recipe(out, kind, size, minutes, tokens, data, documents, tuple(traces or ()), draft, seed)
        options = LoadOptions(
            device=device,
            dtype=dtype,
            offline=offline,
            trust_remote_code=trust_remote_code,
            report=report,
        )
        found = find_model(target, options)
        check_target(found)
        set_threads(threads or "auto", found.device)
        if threads is None and torch.get_num_threads() < usable_cores():
            output.note(f"other programs keep this machine busy: {torch.get_num_threads()} of {usable_cores()} threads")
        loaded = found.load()
    try:
        last = _shown(distill(found, loaded, recipe), "your runs are read" if recipe.runs else "the target writes")
    except KeyboardInterrupt:
        output.note(f"interrupted; the same command goes on from {recipe.work.folder}")
        raise typer.Exit(ExitCode.INTERRUPTED) from None
    output.note(f"{out} holds the draft; {_estimated(last) if last else 'nothing was measured'}")
    output.note(f"{recipe.work.folder} holds the text and the training state, to go on from; it may be deleted")
    output.say(str(out))


def _shown(steps: Iterable[Writing | Training], first: str) -> Estimate | None:
    """Two bars on a terminal; elsewhere a line whenever the draft was measured. first: what comes before the learning.
    Returns the last estimate."""
    from specdec_engine.distill.run import Writing

    last: Estimate | None = None
    columns = [TextColumn("{task.description:<22}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %")]
    columns += [TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[said]}")]
    with Progress(*columns, console=Console(stderr=True), disable=not output.live()) as bars:
        writing = bars.add_task(first, total=1.0, said="")
        training = bars.add_task("the draft learns", total=1.0, said="", start=False)
        part = ""
        for step in steps:
            if type(step).__name__ != part and not output.live():
                part = type(step).__name__
                output.note(first if isinstance(step, Writing) else "the draft learns")
            if isinstance(step, Writing):
                if step.note:
                    output.note(step.note)
                bars.update(writing, completed=step.share, said=f"{step.tokens:,} tokens")
                continue
            if step.estimate is not last and step.estimate is not None:
                last = step.estimate
                if not output.live():
                    output.note(f"step {step.step}: {_estimated(last)}")
            bars.start_task(training)
            bars.update(training, completed=step.share, said="" if last is None else _estimated(last))
    return last


def _estimated(estimate: Estimate) -> str:
    """On text it has not seen, at temperature 0."""
    each = ", ".join(f"{estimate.emitted(k):.2f} at k {k}" for k in (1, 3, 5))
    return f"held-out agreement {estimate.agreement[0]:.0%}, emitted per cycle {each}"
