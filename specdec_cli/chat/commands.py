"""What can be said with a slash."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from specdec_cli import options as opt
from specdec_cli import output
from specdec_cli.chat.conversation import Conversation
from specdec_cli.exits import ExitCode
from specdec_engine.errors import UsageError
from specdec_engine.record.chats import read_chat, write_chat
from specdec_engine.record.text import counted


class Leave(Exception):
    """The chat is over."""


@dataclass(frozen=True, slots=True)
class Command:
    """A word, what may follow it, and what it does."""

    form: str
    about: str
    run: Callable[[Conversation, str], None]


def do(talk: Conversation, line: str) -> None:
    """Run the command. Raises UsageError for one that is not known or cannot be, `Leave`, and what loading a draft raises."""
    word, _, rest = line[1:].partition(" ")
    command = COMMANDS.get(word)
    if command is None:
        raise UsageError(f"/{word} is no command", f"/help lists them; //{word} says it to the model")
    argument = rest.strip()
    if argument and " " not in command.form:
        raise UsageError(f"/{word} takes nothing more, and was given {argument}", f"/{word}")
    command.run(talk, argument)


def _k(talk: Conversation, text: str) -> None:
    if text:
        from specdec_engine.decoding.control import Controls

        k = opt.k_of(text)
        Controls(0 if k == "auto" else k)  # raises for one below 0
        talk.k = k
    output.note(f"k is {talk.k}")


def _draft(talk: Conversation, text: str) -> None:
    if text:
        talk.redraft(text)
    output.note(f"the draft is {talk.pair.drafter.name}")


def _temperature(talk: Conversation, text: str) -> None:
    if text:
        try:
            talk.turn(temperature=float(text))
        except ValueError:
            raise UsageError(f"/temp {text} is no number", "0 is greedy") from None
    output.note(f"the temperature is {talk.how.temperature:g}")


def _system(talk: Conversation, text: str) -> None:
    if text:
        talk.turn(system=None if text == "-" else text)
    output.note(
        f"the system prompt is {talk.how.system!r}" if talk.how.system else "there is no system prompt of yours"
    )


def _retry(talk: Conversation, text: str) -> None:
    turns, before, uses = len(talk.messages), talk.messages[-2:], talk.uses[-1:]
    asked = talk.undo()
    try:
        talk.ask(asked)
    finally:
        if len(talk.messages) < turns:  # nothing came: the answer that there was is kept
            talk.messages += before
            talk.uses += uses


def _undo(talk: Conversation, text: str) -> None:
    asked = output.one_line(talk.undo())
    output.note(f"taken back: {asked if len(asked) <= _SHOWN else asked[:_SHOWN] + '…'}")


_SHOWN = 60


def _clear(talk: Conversation, text: str) -> None:
    turns = len(talk.messages) // 2
    talk.begin()
    output.note(f"{counted(turns, 'turn')} forgotten; what follows begins anew")


def _save(talk: Conversation, text: str) -> None:
    if not text:
        raise UsageError("/save needs a file", "/save talk.jsonl")
    path = _path(text)
    write_chat(path, talk.pair.target.name, [*talk.system, *talk.messages], again=path.resolve() in talk.files)
    talk.files.add(path.resolve())
    output.note(f"{counted(len(talk.messages) // 2, 'turn')} written to {text}")


def _path(text: str) -> Path:
    """Raises UsageError for somebody's home that is not known."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UsageError(f"{text} cannot be found: {error}", "give a path") from error


def load(talk: Conversation, text: str) -> None:
    """Go on with a chat that was saved, in the place of this one. Raises UsageError, and changes nothing then."""
    if not text:
        raise UsageError("/load needs a file", "/load talk.jsonl")
    found = read_chat(_path(text), talk.pair.target.name)
    talk.go_on(found)
    talk.files.add(_path(text).resolve())
    output.note(f"{counted(len(talk.messages) // 2, 'turn')} read from {text}")


def _stats(talk: Conversation, text: str) -> None:
    all_ = talk.summaries
    emitted, drafted = sum(s.emitted for s in all_), sum(s.drafted for s in all_)
    accepted, cycles = sum(s.accepted for s in all_), sum(s.cycles for s in all_)
    took = sum(s.decode_s or 0.0 for s in all_)
    read = sum(s.prompt_tokens - (s.cached_tokens or 0) for s in all_)
    kept = sum(s.cached_tokens or 0 for s in all_)
    if not all_:
        output.say("nothing has been said yet")
        return
    output.say(
        f"{counted(len(all_), 'answer')}, {emitted:,} tokens, {emitted / took if took else 0:.1f} tok/s, "
        f"{emitted / max(cycles, 1):.2f} a cycle, accepted {accepted} of {drafted}"
    )
    output.say(f"of the prompts {read:,} tokens were read and {kept:,} kept from before; {talk.room()}")
    output.say(f"draft {talk.pair.drafter.name}, k {talk.k}, temperature {talk.how.temperature:g}")


def _watch(talk: Conversation, text: str) -> None:
    if not talk.events:
        raise UsageError("nothing has been said yet", "type something")
    if not sys.stdout.isatty() or not sys.stdin.isatty():
        raise UsageError("/watch needs a terminal", "specdec chat --trace FILE records what it would show")
    from specdec_engine.record.text import TokenText
    from specdec_tui.app import SpecdecApp
    from specdec_tui.frame import Frame
    from specdec_tui.leaving import show
    from specdec_tui.player import REPLAY_SPEED
    from specdec_tui.streams import FrameStream

    stream = FrameStream(Frame().plus(talk.events), TokenText(talk.pair.tokenizer))
    try:
        show(SpecdecApp(stream, speed=REPLAY_SPEED))
    except SystemExit as left:  # Ctrl-C twice leaves the screen, and not the chat
        if left.code != ExitCode.INTERRUPTED:
            raise


def _help(talk: Conversation, text: str) -> None:
    width = max(len(command.form) for command in COMMANDS.values()) + 1
    for command in COMMANDS.values():
        output.say(f"/{command.form:<{width}} {command.about}")
    output.say('""" begins and ends a turn of several lines; Alt-Enter begins a line; // begins a turn with a slash')
    output.say("Ctrl-C ends an answer, Ctrl-D the chat")


def _leave(talk: Conversation, text: str) -> None:
    raise Leave


COMMANDS = {
    command.form.split()[0]: command
    for command in (
        Command("k N|auto", "drafted tokens a cycle", _k),
        Command("draft NAME", "another draft", _draft),
        Command("temp T", "temperature", _temperature),
        Command("system TEXT", "system prompt; - takes it away", _system),
        Command("retry", "answer the last turn again", _retry),
        Command("undo", "take back the last turn and its answer", _undo),
        Command("clear", "begin anew", _clear),
        Command("save FILE", "write the chat", _save),
        Command("load FILE", "go on with one that was saved", load),
        Command("stats", "figures of all answers", _stats),
        Command("watch", "the last answer, cycle by cycle", _watch),
        Command("help", "this list", _help),
        Command("bye", "leave", _leave),
    )
}
