"""`specdec replay`: a recorded run, again, cycle by cycle. No torch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from specdec_cli import options as opt
from specdec_cli import output
from specdec_cli.startup import has_screen
from specdec_engine.errors import UsageError, reason

if TYPE_CHECKING:
    from specdec_tui.frame import Frame


def replay(
    trace: Annotated[Path, typer.Argument(help="A file that --trace wrote.", show_default=False)],
    plain: Annotated[bool, typer.Option("--plain", help="The run in sentences, on stdout.")] = False,
    export: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write it as .html, a page that can be stepped and sent, .gif, .png, .svg or .md instead.",
        ),
    ] = None,
    cycle: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="The cycle that a picture shows, or a page first.")
    ] = None,
    theme: opt.Theme = "auto",
    lesson: Annotated[bool, typer.Option("--lesson", help="The lesson, on this run.")] = False,
    against: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Beside another run of the same prompt, token by token: where they part, and why."
        ),
    ] = None,
) -> None:
    """Show a recorded run again: stepped, rewound, inspected. No model is loaded.

    specdec generate --trace run.jsonl "Explain how a lighthouse works."

    specdec replay run.jsonl

    specdec replay run.jsonl --against other.jsonl

    specdec replay run.jsonl --export run.html
    """
    _check(trace, against, plain, export, cycle, lesson)
    if not plain:
        from specdec_tui.theme import want  # Textual takes 0.3 s

        want(theme)
    if lesson:
        teach(trace)
    elif against is not None:
        _against(trace, against, plain)
    elif plain:
        _narrate(trace)
    elif export is not None:
        _export(trace, export, cycle)
    else:
        _show(trace)


def _check(
    trace: Path, against: Path | None, plain: bool, export: Path | None, cycle: int | None, lesson: bool
) -> None:
    """Raises UsageError for what is no file, and for what does not go together."""
    if cycle is not None and export is None:
        raise UsageError("--cycle needs --export", "for example --export run.png")
    if lesson and (export is not None or against is not None or plain):
        raise UsageError("--lesson is a screen of its own", "leave out --export, --against and --plain")
    if against is not None and export is not None:
        raise UsageError("--export is of one run", "leave out --against, or give --plain")
    if plain and export is not None:
        raise UsageError("--plain and --export exclude each other", "--export run.md writes the sentences")
    for path in filter(None, (trace, against)):
        if not path.exists() or path.is_dir():
            raise UsageError(f"{path} is not a file", "give a file that --trace wrote")


def _narrate(trace: Path) -> None:
    from specdec_tui.narrate import script
    from specdec_tui.streams import read_frame

    frame, name = read_frame(trace)
    _several(trace, frame.run)
    _cut_short(trace, frame)
    for line in script(frame, name):
        output.say(line)


def _show(trace: Path) -> None:
    _needs_terminal("the run")
    from specdec_tui.app import SpecdecApp
    from specdec_tui.leaving import show
    from specdec_tui.player import REPLAY_SPEED
    from specdec_tui.streams import ReplayStream

    stream = ReplayStream(trace)
    show(SpecdecApp(stream, speed=REPLAY_SPEED))
    if stream.error is not None:
        raise stream.error
    _several(trace, stream.runs)


def teach(trace: Path) -> None:
    """The lesson on a run: on a terminal the pages, else what they say. Raises UsageError for a run that will not do."""
    from specdec_tui.lesson import Lesson, script
    from specdec_tui.player import REPLAY_SPEED
    from specdec_tui.streams import FrameStream, read_frame

    frame, name = read_frame(trace)
    try:
        lesson = Lesson(frame)
    except ValueError as error:
        raise UsageError(f"{trace}: {error}", "record one at a temperature, with -d ngram,MODEL and -k auto") from error
    if has_screen():
        from specdec_tui.app import SpecdecApp
        from specdec_tui.leaving import show

        show(SpecdecApp(FrameStream(frame, name), speed=REPLAY_SPEED, lesson=lesson))
        return
    for line in script(frame, name):
        output.say(line)


def _export(trace: Path, path: Path, cycle: int | None) -> None:
    """Raises UsageError for a file that cannot be written."""
    from specdec_tui.export import export
    from specdec_tui.streams import read_frame

    frame, name = read_frame(trace)
    _several(trace, frame.run)
    _cut_short(trace, frame)
    try:
        export(frame, name, path, cycle)
        output.note(f"wrote {path}, {-(-path.stat().st_size // 1000):,} kB")
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {reason(error)}", "choose another --export") from error


def _needs_terminal(what: str) -> None:
    """Raises UsageError without one."""
    if not sys.stdout.isatty() or not sys.stdin.isatty():
        raise UsageError("replay needs a terminal", f"add --plain for {what} in sentences")


def _against(a: Path, b: Path, plain: bool) -> None:
    """Raises UsageError for runs of different prompts."""
    from specdec_engine.record.comparison import compare, read_run

    found = compare(read_run(a), read_run(b))
    if plain:
        from specdec_cli.commands.diff import say_comparison

        say_comparison(found)
        return
    _needs_terminal("what differs")
    from specdec_tui.against import Against
    from specdec_tui.app import SpecdecApp
    from specdec_tui.leaving import show
    from specdec_tui.player import REPLAY_SPEED
    from specdec_tui.screens.against import AgainstScreen
    from specdec_tui.streams import FrameStream, read_frame

    (frame, name), (other, other_name) = read_frame(a), read_frame(b)
    for path, shown in ((a, frame), (b, other)):
        _several(path, shown.run)
    screen = AgainstScreen(Against.of(found, (frame, other)), (name, other_name))
    show(SpecdecApp(FrameStream(frame, name), speed=REPLAY_SPEED, instead=screen))


def _cut_short(trace: Path, frame: Frame) -> None:
    if not frame.over:
        output.note(f"the run in {trace} has no end: it was cut short, or goes on")


def _several(trace: Path, runs: int) -> None:
    if runs > 1:
        output.note(f"{trace} holds {runs} runs, and this is the last")
