"""The `specdec` command: its commands, and how errors become one line and an exit code."""

from __future__ import annotations

import os
import sys
import traceback
from itertools import pairwise
from typing import Annotated

import typer

from specdec_cli import output
from specdec_cli.commands.bench import bench
from specdec_cli.commands.check import check
from specdec_cli.commands.distill import distill
from specdec_cli.commands.generate import generate
from specdec_cli.commands.info import info
from specdec_cli.commands.replay import replay
from specdec_cli.commands.tune import tune
from specdec_cli.commands.watch import watch
from specdec_cli.exits import ExitCode, exit_code
from specdec_engine import __version__
from specdec_engine.errors import SpecdecError, reason

COMMANDS = (generate, watch, replay, bench, tune, check, distill, info)

app = typer.Typer(
    name="specdec",
    help="Speculative decoding in the terminal: lossless, measured, and visible cycle by cycle.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in COMMANDS:
    app.command()(command)


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
    try:
        code = app(standalone_mode=False)
    except SpecdecError as error:
        _trace_if_wanted()
        output.error(error.message, error.hint)
        code = exit_code(error)
    except KeyboardInterrupt:
        code = ExitCode.INTERRUPTED
    except OSError as error:
        _trace_if_wanted()
        what = f"reading or writing {error.filename}" if error.filename else "writing the output"
        output.error(f"{what} failed: {reason(error)}", "check the path and the free space")
        output.silence_stdout()
        code = ExitCode.FAILED
    except Exception as error:
        code = _unforeseen(error)
    sys.exit(code or ExitCode.OK)


def _unforeseen(error: Exception) -> int:
    if hasattr(error, "format_message"):  # Typer's own: an unknown option, a word where a number belongs
        said = error.format_message().rstrip(".")
        if said:  # empty for a bare `specdec`, which has printed its help
            command = next((f" {word}" for word in sys.argv[1:2] if word in {c.__name__ for c in COMMANDS}), "")
            hint = f"specdec{command} --help lists what there is"
            if "unexpected extra argument" in said:
                hint = "put a prompt in quotes; " + hint
            output.error(said + _typed_value(error, said), hint)
        return int(getattr(error, "exit_code", ExitCode.USAGE))
    _trace_if_wanted()
    output.error(f"{type(error).__name__}: {error}", "this is a bug in specdec; --debug shows where")
    return ExitCode.FAILED


def _typed_value(error: Exception, said: str) -> str:
    """Typer says which option had a bad value, and not always which value."""
    options = getattr(getattr(error, "param", None), "opts", [])
    typed = next((repr(value) for option, value in pairwise(sys.argv) if option in options), "")
    return f", not {typed}" if typed and typed not in said else ""


def _trace_if_wanted() -> None:
    if "--debug" in sys.argv or os.environ.get("SPECDEC_DEBUG"):
        traceback.print_exc()
