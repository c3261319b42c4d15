"""Texts that a target has written, from wherever. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from specdec_engine.core.cycle_types import Sampling
from specdec_engine.errors import UsageError
from specdec_engine.record.events import Cycle, SettingChanged, Started, known_ids
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
    found = list[Answer]()
    for event in read_trace(path):
        if isinstance(event, Started):
            _check_run(path, event, target, wanted)
            found.append(Answer(event.prompt, len(event.prompt), False))
        elif isinstance(event, SettingChanged) and event.name in wanted:
            raise UsageError(f"in {path} {event.name} was turned on the way", "record a run in which it stays as it is")
        elif isinstance(event, Cycle):
            answer = found.pop()
            found.append(Answer((*answer.context, *_told(path, event)), answer.begin, event.end == "stop"))
    if not (answered := [answer for answer in found if len(answer.context) > answer.begin]):
        raise UsageError(f"{path} has no emitted tokens", "record a longer run with --trace")
    return answered


def _check_run(path: Path, run: Started, target: str, wanted: Mapping[str, float]) -> None:
    """Raises UsageError for a run of another target or another distribution."""
    if run.settings.get("target") != target:
        raise UsageError(
            f"{path} is of the target {run.settings.get('target')}, not {target}", "name that one with --target"
        )
    for name, value in wanted.items():
        if run.settings.get(name, value) != value:
            raise UsageError(
                f"{path} was recorded with {name} {run.settings[name]}, not {value}",
                "give the same --temperature; filters cannot be tuned for",
            )


def _told(path: Path, cycle: Cycle) -> tuple[int, ...]:
    """The tokens of a cycle. Raises UsageError where its observer does not tell them."""
    try:
        return known_ids(cycle.emitted)
    except ValueError as error:
        raise UsageError(f"in {path}, cycle {cycle.index}: {error}", "give a trace of our own engine") from error


def cut(ids: Sequence[int], prompt: int, answer: int) -> list[Answer]:
    """A text as if the target had written it: pieces, each with its first tokens as its prompt."""
    pieces = (tuple(ids[i : i + prompt + answer]) for i in range(0, len(ids), prompt + answer))
    return [Answer(piece, prompt, False) for piece in pieces if len(piece) > prompt + 1]
