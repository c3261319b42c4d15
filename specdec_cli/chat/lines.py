"""Where turns come from: a line editor on a terminal, else the lines of stdin. `\"""` begins and ends a turn of several."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator

from platformdirs import user_state_path

from specdec_cli import output
from specdec_engine.errors import UsageError
from specdec_engine.record.files import RECODE, decode

_SEVERAL = '"""'


class Turns:
    """What is typed, a turn or a command at a time, until it ends."""

    def __init__(self, commands: Iterable[str], status: Callable[[], str]) -> None:
        """commands: to complete; status: for the line below."""
        self._commands, self._status = list(commands), status
        self._inside = False
        """Whether the end of a turn of several lines has yet to come."""

    def __iter__(self) -> Iterator[str]:
        """Raises UsageError for a line of a pipe that is no text."""
        lines = self._typed() if sys.stdin.isatty() and sys.stdout.isatty() else _piped()
        for line in lines:
            text = line
            if line is not None and line.lstrip().startswith(_SEVERAL):
                text = self._gathered(line.lstrip().removeprefix(_SEVERAL), lines)
            if text is not None and text.strip():
                yield text

    def _gathered(self, first: str, rest: Iterator[str | None]) -> str | None:
        """From after the opening marks up to the closing ones, or to the end of all; None where it was given up."""
        found, self._inside = [first], True
        try:
            while not found[-1].rstrip().endswith(_SEVERAL):
                if (line := next(rest, _SEVERAL)) is None:
                    return None
                found.append(line)
        finally:
            self._inside = False
        return "\n".join(found).rstrip().removesuffix(_SEVERAL).strip("\n")

    def _typed(self) -> Iterator[str | None]:
        """Enter sends, Alt-Enter begins a line; the last ones typed come back with ↑, also in the next chat. None for a line
        that Ctrl-C gives up."""
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
            message=lambda: "… " if self._inside else "› ",
            history=history,
            key_bindings=keys,
            multiline=True,
            prompt_continuation="… ",
            completer=WordCompleter(self._commands, sentence=True),
            complete_while_typing=False,
            bottom_toolbar=lambda: output.one_line(self._status()),
        )
        while True:
            try:
                # Ctrl-C is a key here; its own handler of the signal fails where one comes between two lines.
                yield session.prompt(handle_sigint=False)
            except KeyboardInterrupt:
                output.note("the turn is given up" if self._inside else "Ctrl-D or /bye leaves")
                yield None
            except EOFError:
                return


def _piped() -> Iterator[str | None]:
    """Raises UsageError for what is no text."""
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            yield decode(line).rstrip("\r\n")
        except ValueError as error:
            raise UsageError(f"line {number} of stdin cannot be read: {error}", RECODE) from error
