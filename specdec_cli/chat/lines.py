"""Where turns come from: a line editor on a terminal, else the lines of stdin. `\"""` begins and ends a turn of several."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator

from platformdirs import user_state_path

from specdec_cli import output
from specdec_engine.errors import UsageError
from specdec_engine.record.files import RECODE, decode

_SEVERAL = '"""'


def turns(commands: Iterable[str], status: Callable[[], str]) -> Iterator[str]:
    """What is typed, a turn or a command at a time, until it ends. commands: to complete; status: for the line below."""
    lines = _typed(commands, status) if sys.stdin.isatty() and sys.stdout.isatty() else _piped()
    for line in lines:
        text = line
        if line.lstrip().startswith(_SEVERAL):
            text = _gathered(line.lstrip().removeprefix(_SEVERAL), lines)
        if text.strip():
            yield text


def _gathered(first: str, rest: Iterator[str]) -> str:
    """From after the opening marks up to the closing ones, or to the end of all."""
    found = [first]
    while not found[-1].rstrip().endswith(_SEVERAL):
        line = next(rest, None)
        if line is None:
            output.note(f"{_SEVERAL} was not closed before the end")
            return "\n".join(found).strip("\n")
        found.append(line)
    return "\n".join(found).rstrip().removesuffix(_SEVERAL).strip("\n")


def _piped() -> Iterator[str]:
    """Raises UsageError for what is no text."""
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            yield decode(line).rstrip("\r\n")
        except ValueError as error:
            raise UsageError(f"line {number} of stdin cannot be read: {error}", RECODE) from error


def _typed(commands: Iterable[str], status: Callable[[], str]) -> Iterator[str]:
    """Enter sends, Alt-Enter begins a line; the last ones typed come back with ↑, also in the next chat."""
    # Deferred: 0.1 s that a pipe does without.
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.history import FileHistory, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("enter")
    def _send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    try:
        folder = user_state_path("specdec", ensure_exists=True)
        history: FileHistory | InMemoryHistory = FileHistory(str(folder / "chat_history"))
    except OSError:  # a home that cannot be written is no reason not to talk
        history = InMemoryHistory()
    session: PromptSession[str] = PromptSession(
        history=history,
        key_bindings=keys,
        multiline=True,
        prompt_continuation="… ",
        completer=WordCompleter(list(commands), sentence=True),
        complete_while_typing=False,
        bottom_toolbar=lambda: output.one_line(status()),
    )
    while True:
        try:
            yield session.prompt("› ")
        except KeyboardInterrupt:
            output.note("Ctrl-D or /bye leaves")
        except EOFError:
            return
