"""Texts that a target has written, from wherever. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from specdec_engine.core.cycle_types import Sampling
from specdec_engine.errors import UsageError
from specdec_engine.record.events import Cycle, SettingChanged, Started, TokenId, known_ids
from specdec_engine.record.trace import read_trace

ROOM = 256
"""Tokens of a run that is timed."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A text that the target has written."""

    context: tuple[int, ...]
    """Prompt and answer."""
    begin: int
    """Where the answer begins."""
    ended: bool
    """By the target, and not by the budget."""

    @property
    def prompt(self) -> tuple[int, ...]:
        return self.context[: self.begin]

    def first(self, tokens: int) -> Answer:
        """As if the budget had been so small."""
        end = self.begin + tokens
        return self if end >= len(self.context) else Answer(self.context[:end], self.begin, False)


def evenly(answers: Sequence[Answer], most: int) -> list[Answer]:
    """At most so many, spread over all."""
    n = min(most, len(answers))
    return [answers[i * len(answers) // n] for i in range(n)]


def recorded(path: Path, target: str, sampling: Sampling) -> list[Answer]:
    """The answers in a trace: whatever drafted, they are the target's. Raises UsageError for those of another target or
    another distribution."""
    wanted = {
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
    }
    found, prompt, emitted, ended = list[Answer](), tuple[int, ...](), list[int](), False

    def close() -> None:
        if emitted:
            found.append(Answer((*prompt, *emitted), len(prompt), ended))

    for event in read_trace(path):
        if isinstance(event, Started):
            close()
            _check_run(path, event, target, wanted)
            prompt, emitted, ended = _told(path, "the prompt", event.prompt), [], False
        elif isinstance(event, SettingChanged) and event.name in wanted:
            raise UsageError(f"in {path} {event.name} was turned on the way", "record a run in which it stays as it is")
        elif isinstance(event, Cycle):
            emitted += _told(path, f"cycle {event.index}", event.emitted)
            ended = event.end == "stop"
    close()
    if not found:
        raise UsageError(f"{path} has no emitted tokens", "record a longer run with --trace")
    return found


def _check_run(path: Path, run: Started, target: str, wanted: Mapping[str, float]) -> None:
    """Raises UsageError for a run of another target or another distribution."""
    if run.settings.get("target") != target:
        raise UsageError(
            f"{path} is of the target {run.settings.get('target')}, not {target}", "name that one with --target"
        )
    if run.settings.get("grammar") is not None:
        raise UsageError(f"{path} follows a grammar, which cannot be tuned for", "record a run without one")
    for name, value in wanted.items():
        if run.settings.get(name, value) != value:
            raise UsageError(
                f"{path} was recorded with {name} {run.settings[name]}, not {value}",
                "give the same --temperature; filters cannot be tuned for",
            )


def _told(path: Path, what: str, tokens: Sequence[TokenId]) -> tuple[int, ...]:
    """The same tokens. Raises UsageError where their observer does not tell them."""
    try:
        return known_ids(tokens)
    except ValueError as error:
        raise UsageError(f"{path}, {what}: {error}", "give a trace of our own engine") from error


def cut(ids: Sequence[int], prompt: int, answer: int) -> list[Answer]:
    """A text as if the target had written it: pieces, each with its first tokens as its prompt."""
    pieces = (tuple(ids[i : i + prompt + answer]) for i in range(0, len(ids), prompt + answer))
    return [Answer(piece, prompt, False) for piece in pieces if len(piece) > prompt + 1]
