"""stdout is data, stderr is narration: everything the command line prints goes through here."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from time import monotonic
from typing import IO, Any, Literal, Protocol

from rich.console import COLOR_SYSTEMS, Console
from rich.style import Style
from rich.text import Text

from specdec_engine.models.progress import Progress, Report
from specdec_engine.record.events import Cycle, Event, Logprob, Started, TokenId, TokenLogprobs
from specdec_engine.record.stats import Summary
from specdec_engine.record.text import counted, printable
from specdec_engine.record.trace import Records

Color = Literal["auto", "always", "never"]

STYLES = {
    # Hue says who produced the token (Okabe-Ito: safe for colour-blind eyes); weight and underline say it again.
    "accepted": "#56B4E9",
    "recovered": "bold underline #E69F00",
    "bonus": "bold #CC79A7",
    "plain": "",
}
MARKS = {"accepted": "", "recovered": "↳", "bonus": "+", "plain": ""}


def error(message: str, hint: str = "") -> None:
    """The error, and what to do about it, each on one line of stderr."""
    print(f"specdec: error: {printable(message)}", file=sys.stderr)  # noqa: T201
    if hint:
        print(f"hint: {printable(hint)}", file=sys.stderr)  # noqa: T201


def note(message: str) -> None:
    """A sentence of narration."""
    print(f"specdec: {printable(message)}", file=sys.stderr)  # noqa: T201


def say(line: str) -> None:
    """A line of a result, on stdout; what is in it may be anybody's text."""
    print(one_line(line))  # noqa: T201


def record(value: Mapping[str, Any]) -> None:
    """A JSON object on a line of stdout, at once."""
    print(json.dumps(value), flush=True)  # noqa: T201


def one_line(text: str) -> str:
    """Prompts, tokens and paths come from elsewhere, and must not steer the terminal."""
    return printable(text).replace("\n", " ")


def interrupted() -> None:
    """Ctrl-C while loading: the live line is wiped and the cursor shown again."""
    wipe = "\r\x1b[2K\x1b[?25h" if sys.stderr.isatty() else ""
    os.write(2, f"{wipe}specdec: interrupted while loading\n".encode())


def silence_stdout() -> None:
    """Point stdout at nothing, so that flushing it at exit cannot fail a second time."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def live() -> bool:
    """Whether stderr can show a line that changes."""
    return sys.stderr.isatty()


@contextmanager
def narrated() -> Iterator[Report]:
    """Loading progress: on a terminal a live line with the seconds of each step; elsewhere a sentence for what takes long."""
    if live():
        with _spinner("loading PyTorch and transformers") as doing:
            yield lambda progress: doing.say(_sentence(progress), progress.doing)
        return
    told: set[tuple[str, str]] = set()

    def tell_once(progress: Progress) -> None:
        key = (progress.stage, progress.what)
        if progress.stage not in ("compile", "load") and key not in told:
            told.add(key)
            note(_sentence(progress))

    yield tell_once


@contextmanager
def working() -> Iterator[Callable[[str], None]]:
    """What is being done, as a live line on a terminal; elsewhere each thing once, without how far it is."""
    if not live():
        told = set[str]()

        def tell_once(text: str) -> None:
            what = text.partition(",")[0]
            if what not in told:
                told.add(what)
                note(what)

        yield tell_once
        return
    with _spinner("working") as doing:
        yield lambda text: doing.say(text, text.partition(",")[0])


def reading(events: Iterator[Event], tokens: int, read: Callable[[], int] | None = None) -> Iterator[Event]:
    """The events; while so many tokens of a long prompt are read, before the first cycle, a line says so, and how many of
    them are: what `read` says, from any thread."""
    whole = f"reading the prompt, {tokens:,} tokens"
    if tokens < _LONG_PROMPT:
        yield from events
    elif not live():
        for event in events:
            yield event
            if isinstance(event, Started):  # a prompt that does not fit is refused before
                note(whole)
    else:
        with _spinner(whole) as doing:
            if read is not None:
                doing.text = lambda: f"reading the prompt, {min(max(read(), 0), tokens):,} of {tokens:,} tokens"
            for event in events:
                if isinstance(event, Cycle):
                    break
                yield event
            else:
                return
        yield event
        yield from events


_LONG_PROMPT = 512
"""Tokens: a second or more."""


@dataclass
class _Doing:
    """A line that says what is being done, and for how many seconds already: it is drawn anew while the work goes on."""

    text: str | Callable[[], str]
    step: str
    since: float

    def say(self, text: str, step: str) -> None:
        """The seconds go on as long as the step is the same."""
        if step != self.step:
            self.step, self.since = step, monotonic()
        self.text = text

    def __rich__(self) -> Text:
        text = self.text if isinstance(self.text, str) else self.text()
        return Text(f"{printable(text)} · {monotonic() - self.since:.0f} s", overflow="ellipsis", no_wrap=True)


@contextmanager
def _spinner(text: str) -> Iterator[_Doing]:
    """On stderr until the block ends, and then nothing of it is left."""
    doing = _Doing(text, text, monotonic())
    with Console(stderr=True).status(doing):
        yield doing


def _sentence(progress: Progress) -> str:
    if progress.unit == "tokens":
        return f"{progress.doing}: {progress.amount}"
    return progress.doing + (f" ({progress.amount})" if progress.amount else "")


class Output(Protocol):
    """**Protocol:** where a run's events go on stdout."""

    def show(self, event: Event) -> None: ...

    def end(self, summary: Summary) -> None:
        """The run is over, in whatever way; called once."""
        ...


class TextSource(Protocol):
    """**Protocol:** the text of emitted tokens, as it becomes certain: a `TextStream`, or what a server says."""

    def feed(self, token: TokenId) -> str: ...

    def flush(self) -> str: ...


class TextOutput:
    """The text as it arrives: as it is for a pipe; safe and coloured by provenance for a terminal."""

    def __init__(self, stream: TextSource, color: Color, marks: bool) -> None:
        self._stream = stream
        self.terminal = sys.stdout.isatty()
        self.styled = color == "always" or (color == "auto" and self.terminal)
        self._codes = _codes() if self.styled else dict.fromkeys(STYLES, ("", ""))
        self.marks = marks
        self._origin = "plain"
        _speak_utf8(sys.stdout)

    def show(self, event: Event) -> None:
        if isinstance(event, Cycle):
            for token, origin in zip(event.emitted, event.origins, strict=True):
                self._origin = origin
                self._write(self._stream.feed(token))
            sys.stdout.flush()

    def end(self, summary: Summary) -> None:
        self._write(self._stream.flush())
        if self.terminal:
            sys.stdout.write("\n")
        sys.stdout.flush()

    def separate(self) -> None:
        """A line of its own for what follows on stderr, where both streams show in one place and only one ended its line."""
        if not self.terminal and (sys.stderr.isatty() or _same_place(sys.stdout, sys.stderr)):
            print(file=sys.stderr)  # noqa: T201

    def _write(self, text: str) -> None:
        if self.terminal or self.styled:
            text = printable(text)
        word = text.lstrip(" \n\t")
        space = text[: len(text) - len(word)]
        if word:  # the word alone is styled: an underlined space in front of it looks like a fault
            before, after = self._codes[self._origin]
            mark = MARKS[self._origin] if self.marks else ""
            text = f"{space}{before}{mark}{word}{after}"
        sys.stdout.write(text)


class JsonLinesOutput:
    """One event a line as it happens: the lines a trace has."""

    def __init__(self, text_of: Callable[[int], str]) -> None:
        self._records = Records(text_of)

    def show(self, event: Event) -> None:
        print(json.dumps(self._records.of(event)), flush=True)  # noqa: T201

    def end(self, summary: Summary) -> None:
        pass


def told_logprobs(logprobs: Sequence[TokenLogprobs], text_of: Callable[[int], str]) -> list[dict[str, Any]]:
    """As `--json` and answers have them: with the tokens' texts."""
    from specdec_tui.pieces import as_bytes  # `--help` of any command imports this file, and no screen

    def one(found: Logprob) -> dict[str, Any]:
        raw = as_bytes(text_of(found.id))
        text = raw.decode("utf-8", "replace")
        parts = {} if text.encode() == raw else {"bytes": list(raw)}  # a part of a character
        return {"id": found.id, "text": text, **parts, **asdict(found)}

    return [{**one(told.token), "likeliest": list(map(one, told.likeliest))} for told in logprobs]


class JsonOutput:
    """One object at the end."""

    def __init__(
        self, stream: TextSource, text_of: Callable[[int], str], give: Callable[[Mapping[str, Any]], None] = record
    ) -> None:
        """give: takes the object."""
        self._stream, self._text_of, self._give = stream, text_of, give
        self._text: list[str] = []
        self._token_ids: list[TokenId] = []
        self._logprobs: list[dict[str, Any]] | None = None
        self._started: dict[str, Any] = {"settings": None, "environment": None}

    def show(self, event: Event) -> None:
        match event:
            case Started():
                self._started = {"settings": event.settings, "environment": event.environment}
            case Cycle():
                self._token_ids += event.emitted
                self._text += [self._stream.feed(token) for token in event.emitted]
                if event.logprobs is not None:
                    self._logprobs = (self._logprobs or []) + told_logprobs(event.logprobs, self._text_of)

    def end(self, summary: Summary) -> None:
        text = "".join([*self._text, self._stream.flush()])
        said = {"schema": "specdec.generate/1", "text": text, **summary.figures(), "token_ids": self._token_ids}
        logprobs = {} if self._logprobs is None else {"logprobs": self._logprobs}
        self._give({**said, **logprobs, **self._started})


def between(shown: TextOutput) -> None:
    """A line between two answers to one prompt."""
    sys.stdout.write("---\n" if shown.terminal else "\n---\n")


def summary_line(summary: Summary, ending: str, state: str) -> str:
    """The run in one line; what is undefined is a dash."""
    accepted = f"accepted {summary.accepted} of {summary.drafted} ({_percent(summary.acceptance_rate)})"
    speedup = summary.speedup_estimate if summary.drafted else None
    compared = "" if speedup is None else f", about {speedup:.2f}× plain"
    return " · ".join(
        [
            f"{_number(summary.tokens_per_second, 1)} tok/s{compared}",
            f"{_number(summary.mean_emitted_per_cycle, 2)} emitted per cycle (plain: 1)",
            accepted + (f", {summary.forced} forced by the grammar" if summary.forced else ""),
            f"{counted(summary.emitted, 'token')}, {ending}",
            f"seed {summary.seed if summary.seed is not None else '–'}",
            state,
        ]
    )


def legend(shown: TextOutput) -> None:
    """What the colours and marks mean, in them, if stderr is a terminal and there are any."""
    if not sys.stderr.isatty() or not (shown.styled or shown.marks):
        return
    words = {
        "accepted": "accepted draft",
        "recovered": "recovered after a rejection",
        "bonus": "bonus, all accepted",
        "plain": "plain: nothing drafted",
    }
    marked = {origin: (MARKS[origin] if shown.marks else "") + word for origin, word in words.items()}
    parts = [
        part for origin, word in marked.items() for part in ((word, STYLES[origin] if shown.styled else ""), " · ")
    ]
    Console(stderr=True).print(Text.assemble("specdec: ", *parts[:-1]))


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f} %"


def _codes() -> dict[str, tuple[str, str]]:
    """What switches each style on and off here, by Rich's knowledge of terminals and NO_COLOR.

    The codes and not Rich's printing, which would expand the model's tabs.
    """
    terminal = sys.stdout.isatty()
    console = Console(force_terminal=not terminal or None, color_system="auto" if terminal else "truecolor")
    system = COLOR_SYSTEMS.get(console.color_system or "")
    codes = {}
    for origin, definition in STYLES.items():
        style = Style.parse(definition)
        on, off = (style.without_color if console.no_color else style).render("|", color_system=system).split("|")
        codes[origin] = (on, off)
    return codes


def _same_place(one: IO[str], other: IO[str]) -> bool:
    try:
        return os.path.sameopenfile(one.fileno(), other.fileno())
    except (OSError, ValueError):  # replaced by something without a descriptor
        return False


def _speak_utf8(stream: IO[str]) -> None:
    """A pipe gets UTF-8 whatever the locale; a terminal its own encoding, with what that lacks replaced."""
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(encoding=None if stream.isatty() else "utf-8", errors="replace")
