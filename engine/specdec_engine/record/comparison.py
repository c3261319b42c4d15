"""Two recorded runs of one prompt, aligned by their tokens: where they part, and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from specdec_engine.errors import UsageError
from specdec_engine.record.events import Cycle, Event, Started, TokenId
from specdec_engine.record.stats import Summary
from specdec_engine.record.trace import read_lines

Cause = Literal["none", "length", "settings", "seed", "draws", "rounding", "unexplained"]
NEAR = 0.02
"""Difference of two tokens' probabilities, before temperature, that rounding may turn: in bfloat16 a logit of 16 moves by
0.06, a probability of a half by 0.015."""
_DECIDE = ("target", "temperature", "top_k", "top_p", "min_p", "generation_config", "grammar", "stop", "max_tokens")
"""Settings on which a text depends whatever drafts; those after `stop` only cut it."""
_ROUNDS_OTHERWISE = ("dtype", "weights", "kernels", "runtime", "device")


@dataclass(frozen=True, slots=True)
class RecordedRun:
    """A run as a trace has it."""

    path: Path
    started: Started
    cycles: tuple[Cycle, ...]
    summary: Summary
    names: Mapping[int, str]

    @property
    def tokens(self) -> tuple[TokenId, ...]:
        return tuple(token for cycle in self.cycles for token in cycle.emitted)

    def cycle_at(self, place: int) -> Cycle | None:
        """The one that emitted the token at this place."""
        return next((cycle for begin, cycle in self.begins() if begin <= place < begin + len(cycle.emitted)), None)

    def begins(self) -> Iterator[tuple[int, Cycle]]:
        """Each cycle, and the place at which it emits its first token."""
        place = 0
        for cycle in self.cycles:
            yield place, cycle
            place += len(cycle.emitted)

    def name(self, token: TokenId) -> str:
        return "⟨?⟩" if token is None else self.names.get(token, f"⟨{token}⟩")


@dataclass(frozen=True, slots=True)
class Comparison:
    """What two runs have in common, and what not."""

    a: RecordedRun
    b: RecordedRun
    common: int
    """Tokens until they part."""
    cause: Cause
    why: str
    """In a sentence."""
    settings: Mapping[str, tuple[Any, Any]]
    """Those that differ."""
    same_cycles: int
    """Cycles of A that are, token for token, cycles of B at the same place."""
    other_cycles: tuple[int, ...]
    """The indices of A's others, before the two part."""

    @property
    def same(self) -> bool:
        return self.cause == "none"


def read_run(path: Path) -> RecordedRun:
    """The last run of a trace. Raises TraceError, and UsageError for a file without one."""
    events, names = list[Event](), dict[int, str]()
    for line in read_lines(path):
        if isinstance(line.event, Started):
            events = []
        events.append(line.event)
        names |= line.pieces
    if not events or not isinstance(events[0], Started):
        raise UsageError(f"{path} holds no run", "give a file that --trace wrote")
    summary = Summary()
    for event in events:
        summary = summary.plus(event)
    return RecordedRun(path, events[0], tuple(e for e in events if isinstance(e, Cycle)), summary, names)


def compare(a: RecordedRun, b: RecordedRun) -> Comparison:
    """Raises UsageError for runs of different prompts."""
    if a.started.prompt != b.started.prompt:
        raise UsageError(
            f"{a.path} and {b.path} are not of one prompt: {len(a.started.prompt)} and {len(b.started.prompt)} tokens that "
            "differ",
            "record the same prompt twice",
        )
    common = _common(a.tokens, b.tokens)
    settings = {name: (x, y) for name, x, y in _settings(a.started, b.started) if x != y}
    cause, why = _why(a, b, common, settings)
    known = {(begin, cycle.drafted, cycle.emitted) for begin, cycle in b.begins()}
    mine = [(begin, cycle) for begin, cycle in a.begins() if begin < common]
    others = tuple(cycle.index for begin, cycle in mine if (begin, cycle.drafted, cycle.emitted) not in known)
    return Comparison(a, b, common, cause, why, settings, len(mine) - len(others), others)


def _common(a: Sequence[TokenId], b: Sequence[TokenId]) -> int:
    """Tokens that both begin with; one that is not known is taken to be the same."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y and x is not None and y is not None),
        min(len(a), len(b)),
    )


def _settings(a: Started, b: Started) -> Iterator[tuple[str, Any, Any]]:
    for name in sorted({*a.settings, *b.settings}):
        yield name, a.settings.get(name), b.settings.get(name)
    if any(one.settings.get("temperature") != 0 for one in (a, b)):  # nothing is drawn at 0
        yield "seed", a.seed, b.seed
    for name in ("dtype", "weights", "kernels", "runtime", "device", "threads", "server"):
        yield name, a.environment.get(name), b.environment.get(name)


def _why(a: RecordedRun, b: RecordedRun, common: int, settings: Mapping[str, tuple[Any, Any]]) -> tuple[Cause, str]:
    if common == len(a.tokens) == len(b.tokens):
        return "none", "the same text"
    if common == min(len(a.tokens), len(b.tokens)):
        return "length", "one begins with the other, and goes on"
    if decisive := [name for name in _DECIDE[:-2] if name in settings]:
        return "settings", f"another {decisive[0]}: {settings[decisive[0]][0]} and {settings[decisive[0]][1]}"
    if a.started.settings.get("temperature") == 0:
        return _greedy(a, b, common, settings)
    if "seed" in settings:
        return "seed", f"other seeds: {a.started.seed} and {b.started.seed}"
    coupled = [run.started.settings.get("coupling") == "gumbel" for run in (a, b)]
    if not all(coupled):
        return "draws", (
            "the numbers that decide depend on where cycles begin, and so on draft and k: both texts are the target's. With "
            "--coupling gumbel a seed gives one text"
        )
    return _greedy(a, b, common, settings)


def _greedy(a: RecordedRun, b: RecordedRun, common: int, settings: Mapping[str, tuple[Any, Any]]) -> tuple[Cause, str]:
    """Two choices of one target for the likeliest token: near to each other, or not explained."""
    gap = next((found for run in (a, b) if (found := _gap(run, common, a, b)) is not None), None)
    rounded = [f"{name} {x} and {y}" for name, (x, y) in settings.items() if name in _ROUNDS_OTHERWISE]
    what = f" ({', '.join(rounded)})" if rounded else ""
    if gap is None:
        return "unexplained", f"the same target says two things{what}; its probabilities at that place are not recorded"
    if gap <= NEAR:
        return "rounding", f"rounding{what}: the two tokens' probabilities are {gap:.4f} apart"
    return "unexplained", f"the two tokens' probabilities are {gap:.3f} apart, which is more than rounding does{what}"


def _gap(run: RecordedRun, place: int, a: RecordedRun, b: RecordedRun) -> float | None:
    """Between the target's probabilities of both tokens at this place, before temperature; None where a run does not tell."""
    wanted = (a.tokens[place], b.tokens[place])
    for begin, cycle in run.begins():
        at = place - begin
        if cycle.raw_p is not None and 0 <= at < len(cycle.raw_p.likeliest):
            found = {token: before for token, before, _ in cycle.raw_p.likeliest[at]}
            if all(token in found for token in wanted):
                return abs(found[wanted[0]] - found[wanted[1]])  # type: ignore[index]
    return None
