"""`specdec chat`: talk to a target; each turn reads only what is new."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from specdec_cli import options as opt
from specdec_cli import output, profiles
from specdec_cli.chat.commands import COMMANDS, Leave, do, load
from specdec_cli.chat.conversation import Conversation
from specdec_cli.chat.lines import Turns
from specdec_cli.exits import ExitCode, exit_code
from specdec_cli.recorder import Recorder
from specdec_cli.startup import interruptible, quieten, uncollected
from specdec_cli.templates import Template
from specdec_engine.decoding.stopping import Stop
from specdec_engine.errors import SpecdecError, UsageError, first_line
from specdec_engine.system.signals import terminated_by

if TYPE_CHECKING:
    from specdec_engine.pair import Loader

_PROMPT = "Prompt"
Load = Annotated[
    str | None,
    typer.Option("--load", rich_help_panel=_PROMPT, metavar="FILE", help="Go on with a chat that /save wrote."),
]
_ROOM = 2048
"""Tokens of context to make room for at first."""


@opt.records
def chat(
    *,
    target: opt.Target = "builtin",
    draft: opt.Draft = None,
    how: opt.Decoding,
    template: Template,
    load_: Load = None,
    where: opt.Placement,
    trace: opt.Trace = None,
    color: opt.Color = "auto",
) -> None:
    """Talk to a target: each turn reads only what is new. /help lists what else can be typed.

    specdec chat

    specdec chat -t org/target -d org/draft --system "Be brief." --temperature 0.7

    printf 'Hello\\nWhat did I say?\\n' | specdec chat
    """
    if how.chat is False:
        raise UsageError("--raw has no turns", "specdec generate --raw goes on with a text")
    sampling = how.sampling
    Stop(how.max_tokens, strings=tuple(how.stop or ()))
    told = template.told
    setting = profiles.chosen(target, draft, how.k, not sampling.greedy, where)
    k = opt.k_of(setting.k)
    from specdec_engine.decoding.control import Controls

    Controls(3 if k == "auto" else k, sampling, how.draft_temperature)
    recorder = Recorder(trace)
    if setting.said:
        output.note(setting.said)
    quieten(where.offline, where.debug)
    with interruptible(), output.narrated() as report, uncollected():
        from specdec_engine.pair import Loader

        loader = Loader(target, where.loading(_ROOM + how.max_tokens, report, follow=True))
        _check_template(loader, template)
        pair = loader.pair(setting.draft)
    for sentence in pair.notes:
        output.note(sentence)
    talk = Conversation(loader, pair, how, k, told, recorder, color)
    if load_ is not None:
        load(talk, load_)
        if how.system is not None:
            talk.turn(system=how.system)
    try:
        with terminated_by(SystemExit):  # Ctrl-C ends an answer, and not the chat
            code = _talk(talk, where.debug)
    finally:
        recorder.close()
    recorder.check()
    if code:
        raise typer.Exit(code)


def _check_template(loader: Loader, template: Template) -> None:
    """Before weights are read. Raises UsageError for a target without a chat template, or without a switch in it."""
    if not getattr(loader.found.tokenizer, "chat_template", None):
        raise UsageError(
            f"{loader.found.name} has no chat template",
            "specdec generate goes on with a text; a model to talk to has one",
        )
    template.check(loader.found)


def _talk(talk: Conversation, debug: bool) -> int:
    """Until it is left; the exit code: of a pipe the last error's, so that a script notices."""
    code = ExitCode.OK
    if sys.stdin.isatty():
        output.note(f"{talk.pair.target.name}, draft {talk.pair.drafter.name}; /help lists commands, Ctrl-D leaves")
    for line in Turns(
        [f"/{c.form.split()[0]}{' ' * (' ' in c.form)}" for c in COMMANDS.values()], lambda: _status(talk)
    ):
        try:
            _heard(talk, line)
        except Leave:
            break
        except KeyboardInterrupt:
            output.note("interrupted, and the turn is taken back")
        except SpecdecError as error:
            output.error(error.message, error.hint)
            code = exit_code(error)
        except BrokenPipeError:
            output.silence_stdout()
            return ExitCode.OK
        except Exception as error:  # nothing that was said is to be lost by a fault of ours
            if debug:
                raise
            output.error(f"{type(error).__name__}: {first_line(error)}", "this is a bug in specdec; the chat goes on")
            code = ExitCode.FAILED
    return ExitCode.OK if sys.stdin.isatty() else code


def _heard(talk: Conversation, line: str) -> None:
    text = line.strip()
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError(
            "the line has a byte that is no text", "type it again; is the terminal set to UTF-8?"
        ) from None
    if text.startswith("/") and not text.startswith("//"):
        do(talk, text)
    else:
        talk.ask(text[1:] if text.startswith("//") else line)


def _status(talk: Conversation) -> str:
    return (
        f" /help · {talk.room()} · k {talk.k} · T {talk.how.temperature:g} · {talk.pair.drafter.name} → "
        f"{talk.pair.target.name}"
    )
