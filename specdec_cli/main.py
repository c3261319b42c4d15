"""The `specdec` command: its commands, each imported when it is named, and how errors become one line and an exit code."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from itertools import pairwise
from types import ModuleType
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from specdec_cli.exits import ExitCode, exit_code
from specdec_engine import __version__
from specdec_engine.errors import SpecdecError, UsageError, reason
from specdec_engine.system.signals import terminated_by

COMMANDS = {
    "generate": "Generate text from a draft/target pair, losslessly.",
    "chat": "Talk to a target: each turn reads only what is new. /help lists what else can be typed.",
    "watch": "Watch a run live: each draft, what was kept, what was not and why.",
    "replay": "Show a recorded run again: stepped, rewound, inspected. No model is loaded.",
    "bench": "Measure speculation against plain decoding, paired prompt by prompt, and say what to set.",
    "tune": "Find draft and k for your prompts: predicted from one plain answer to each, then confirmed by a short "
    "paired run.",
    "audit": "Test whether speculation changes what a target says. Exits with 0, or with 6 on a bias.",
    "check": "Say whether two models fit together, or what could draft for one. Exits with 0 or 4.",
    "diff": "Say where two recorded runs of one prompt part, and why. Exits with 6 for what nothing explains.",
    "distill": "Distill a small draft from a target; interrupted, the same command goes on.",
    "info": "Show versions, devices, the runtime that the built-in pair would get and why, cached models, and profiles.",
}
"""What `--help` says of each: the first paragraph of the docstring of the function NAME in `commands/NAME.py`."""


class Helped:
    """A command whose help is written by Typer without what of it we do not use."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        _import_help()
        super().format_help(ctx, formatter)  # type: ignore[misc]


class Real(Helped, TyperCommand):
    """A command that was imported."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """With the drafts that other packages add: to look for them takes 60 ms, which only the reader of the help waits."""
        for option in self.params:
            if option.name == "draft":
                from rich.markup import escape

                from specdec_engine.core.registry import described, foreign

                added = f" Of other packages: {escape(', '.join(map(described, foreign())))}." if foreign() else ""
                option.help += added  # type: ignore[attr-defined]
        super().format_help(ctx, formatter)

    def invoke(self, ctx: Any) -> Any:
        """Raises UsageError for a number that is none: every bound of an option lets it through."""
        for name, value in ctx.params.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise UsageError(f"--{name.replace('_', '-')} is {value}", "give a finite number")
            if name == "seed" and value is not None and not 0 <= value < 2**64:
                raise UsageError(f"--seed {value} is no seed", "give a number from 0 to 2^64 - 1")
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # the reader has had enough, and that is no failure; Typer would end it with 1
            _silence()
            return None
        except KeyboardInterrupt:  # Typer would say nothing
            _say_interrupted()
            raise typer.Exit(ExitCode.INTERRUPTED) from None


class Deferred(TyperCommand):
    """A command by its name and its line of help. Its module is imported once something is asked of the command itself."""

    def make_context(self, *arguments: Any, **named: Any) -> Any:
        """The command's own context, whose `command` is the real one: to invoke, to complete, to help."""
        with _reader_may_leave():
            return self._command().make_context(*arguments, **named)

    def _command(self) -> Any:
        name = str(self.name)
        alone = typer.Typer(add_completion=False)
        alone.command(name, cls=Real)(getattr(import_module(f"specdec_cli.commands.{name}"), name))
        return typer.main.get_command(alone)


class Commands(Helped, TyperGroup):
    """All commands, none of them imported."""

    def __init__(self, **settings: Any) -> None:
        deferred = {name: Deferred(name, help=line) for name, line in COMMANDS.items()}
        super().__init__(**{**settings, "commands": deferred})

    def make_context(self, *arguments: Any, **named: Any) -> Any:
        """The context of all commands; `--help` and `--version` are said on the way."""
        with _reader_may_leave():
            return super().make_context(*arguments, **named)

    def get_params(self, ctx: Any) -> Any:
        """All switches, False by default: Typer has None for its own, and imports pydantic (0.1 s) to read that."""
        switches = super().get_params(ctx)
        for switch in switches:
            switch.default = switch.default or False
        return switches


@contextmanager
def _reader_may_leave() -> Iterator[None]:
    """A reader who has had enough of a help is no failure; Typer and rich would end it with 1."""
    try:
        yield
    except (BrokenPipeError, SystemExit) as error:
        if isinstance(error, SystemExit) and error.code != 1:  # 1 is rich's way to say the same
            raise
        _silence()
        raise typer.Exit from None


def _import_help() -> None:
    """What Typer writes help with, but for rich's Markdown: we write none, and its parser is half of the time of `--help`."""
    name = "rich.markdown"
    if name in sys.modules or "typer.rich_utils" in sys.modules:
        return
    unused = ModuleType(name)
    unused.Markdown = None  # type: ignore[attr-defined]
    sys.modules[name] = unused
    try:
        import_module("typer.rich_utils")
    finally:
        del sys.modules[name]


app = typer.Typer(
    name="specdec",
    help="Speculative decoding in the terminal: lossless, measured, and visible cycle by cycle.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    cls=Commands,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"specdec {__version__}")
        raise typer.Exit


@app.callback()
def specdec(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run a command and exit with its code."""
    _open_streams()
    code: int | None = None
    try:
        with terminated_by(KeyboardInterrupt):
            code = app(_arguments(), standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:  # what was printed last; the command has done its work
        _silence()
    except SpecdecError as error:
        _trace_if_wanted()
        _tell(error.message, error.hint)
        code = exit_code(error)
    except KeyboardInterrupt:
        _say_interrupted()
        code = ExitCode.INTERRUPTED
    except OSError as error:
        _trace_if_wanted()
        what = f"reading or writing {error.filename}" if error.filename else "writing the output"
        _tell(f"{what} failed: {reason(error)}", "check the path and the free space")
        from specdec_cli import output

        output.silence_stdout()
        code = ExitCode.FAILED
    except Exception as error:
        code = _unforeseen(error)
    sys.exit(code or ExitCode.OK)


def _say_interrupted() -> None:
    from specdec_cli import output

    output.note("interrupted")


def _silence() -> None:
    from specdec_cli import output

    output.silence_stdout()


def _arguments() -> list[str]:
    """What was typed; a server's own flags, after `--`, are kept for it."""
    if not any(word.startswith("--engine") for word in sys.argv):
        return sys.argv[1:]
    from specdec_cli.servers.attached import take_server_flags

    return take_server_flags(sys.argv[1:])


def _open_streams() -> None:
    """A service or cron may start us with stdout or stderr closed: what is written there goes nowhere, and breaks nothing."""
    for number, name in ((0, "stdin"), (1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            # The lowest free number, which is the closed one: no file that is opened later becomes standard output.
            handle = os.open(os.devnull, os.O_RDWR)
            if handle != number:
                os.dup2(handle, number)
                os.close(handle)
            setattr(sys, name, open(number, "r" if number == 0 else "w", encoding="utf-8", closefd=False))  # noqa: SIM115


def _unforeseen(error: Exception) -> int:
    if hasattr(error, "format_message"):  # Typer's own: an unknown option, a word where a number belongs
        said = error.format_message().rstrip(".")
        if said:  # empty for a bare `specdec`, which has printed its help
            command = next((f" {word}" for word in sys.argv[1:2] if word in COMMANDS), "")
            form = _form(error)
            hint = f"{form}specdec{command} --help lists what there is"
            if prompt := _dashed(said):
                said = f"the prompt {prompt!r} begins with a dash"
                hint = f"put -- before it: specdec{command} -- {prompt!r}"
            if "unexpected extra argument" in said and not form:
                hint = "put a prompt in quotes; " + hint
            _tell(said + _typed_value(error, said), hint)
        return int(getattr(error, "exit_code", ExitCode.USAGE))
    _trace_if_wanted()
    _tell(f"{type(error).__name__}: {error}", "this is a bug in specdec; --debug shows where")
    return ExitCode.FAILED


def _form(error: Any) -> str:
    """How the command is typed, where something has to follow its name; else empty."""
    context: Any = getattr(error, "ctx", None)
    taken = [] if context is None else [one for one in context.command.params if one.param_type_name == "argument"]
    words = [one.name.upper() if one.required else f"[{one.name.upper()}]" for one in taken]
    return f"type {context.command_path} {' '.join(words)}; " if any(one.required for one in taken) else ""


def _dashed(said: str) -> str:
    """The prompt that was taken for an option: a word with spaces, as no option has them; empty if there is none."""
    if not said.startswith("No such option"):
        return ""
    return next((word for word in sys.argv[1:] if word.startswith("-") and " " in word.strip()), "")


def _tell(message: str, hint: str) -> None:
    from specdec_cli import output  # imports rich, which `--version` and completion do without

    output.error(message, hint)


def _typed_value(error: Exception, said: str) -> str:
    """Typer says which option had a bad value, and not always which value."""
    options = getattr(getattr(error, "param", None), "opts", [])
    typed = next((repr(value) for option, value in pairwise(sys.argv) if option in options), "")
    return f", not {typed}" if typed and typed not in said else ""


def _trace_if_wanted() -> None:
    if "--debug" in sys.argv or os.environ.get("SPECDEC_DEBUG"):
        from traceback import print_exc

        print_exc()
