"""Events to JSON lines and back: one event a line, flushed as it happens, so that a killed run leaves what it did.

A trace may hold several runs, one `started` line each. With a `describe` function the writer adds `pieces` to a line, the
text of the token ids that this trace has not named yet, so that it can be read without the tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self, TypedDict

from specdec_engine.errors import TraceError, reason
from specdec_engine.record.events import TRACE_SCHEMA, Cycle, Event, Failed, Finished, SettingChanged, Started
from specdec_engine.record.files import lock, parse_record, typed

_KINDS: dict[str, type[Event]] = {
    "started": Started,
    "cycle": Cycle,
    "setting_changed": SettingChanged,
    "finished": Finished,
    "failed": Failed,
}
_Pieces = dict[int, str]


def to_json(event: Event) -> dict[str, Any]:
    """The event as plain JSON values, `kind` first."""
    record = asdict(event)
    return {"kind": record.pop("kind"), **record}


def from_json(record: Mapping[str, Any]) -> Event:
    """The event a record holds; keys it does not know are ignored. Raises ValueError for what is none, and for one that
    contradicts itself, so that its readers need not look."""
    cls = _KINDS.get(str(record.get("kind")))
    if cls is None:
        raise ValueError(f"there is no kind {record.get('kind')!r}")
    if cls is Started and record.get("schema") != TRACE_SCHEMA:
        raise ValueError(f"schema {record.get('schema')!r} is not {TRACE_SCHEMA!r}")
    event = typed(record, cls)
    match event:
        case Started():
            typed(event.settings, _Settings)
            typed(event.environment, _Environment)
            _check_tokens(event.prompt)
        case SettingChanged():
            typed({event.name: event.old}, _Settings)
            typed({event.name: event.new}, _Settings)
        case Finished():
            _check_numbers(
                "finished", event.emitted, event.cycles, event.prefill_s, event.peak_bytes, event.recording_s
            )
        case Cycle():
            _check_cycle(event)
    return event


class _Settings(TypedDict, total=False):
    """Those of `Started.settings` that are read again."""

    target: str | None
    draft: str | None
    rule: str
    coupling: str
    k: int
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    draft_temperature: float | None
    adaptive: bool
    max_tokens: int


class _Part(TypedDict, total=False):
    weight_bytes: int | None
    token_bytes: int | None


class _Environment(TypedDict, total=False):
    """Those of `Started.environment` that are read again."""

    target: _Part
    drafts: dict[str, _Part] | None
    plain_tokens_per_second: float | None


_MOST = 2**63
"""No token's id, count of bytes or number of seconds is as large."""


def _check_cycle(cycle: Cycle) -> None:
    """Raises ValueError."""
    k = len(cycle.drafted)
    raw = [side for side in (cycle.raw_p, cycle.raw_q) if side is not None]
    told = (cycle.p, cycle.q, cycle.u, cycle.overlap, *(values for r in raw for values in (r.drafted, r.likeliest)))
    if any(len(values) != k for values in told) or not 0 <= cycle.accepted <= k:
        raise ValueError(f"cycle {cycle.index} has {k} drafted tokens and other numbers of verdicts")
    if len(cycle.emitted) > cycle.accepted + 1:
        raise ValueError(f"cycle {cycle.index} accepts {cycle.accepted} tokens and emits {len(cycle.emitted)}")
    rows = [*cycle.residual, *((token, mass) for r in raw for row in r.likeliest for token, mass, _ in row)]
    _check_tokens((*cycle.drafted, *cycle.emitted, *(token for token, _ in rows)))
    _check_numbers("cycle", cycle.index, cycle.k, cycle.context, cycle.draft_s, cycle.verify_s, cycle.other_s)
    untempered = [value for r in raw for value in r.drafted]
    chances = (*cycle.p, *cycle.q, *cycle.u, *cycle.overlap, *(mass for _, mass in rows), *untempered)
    if any(value is not None and not -_ROUNDING <= value <= 1 + _ROUNDING for value in chances):
        raise ValueError(f"cycle {cycle.index} has a probability that is not from 0 to 1")


_ROUNDING = 1e-3
"""By how much a sum of bfloat16 probabilities may pass 1."""


def _check_tokens(tokens: Sequence[int]) -> None:
    if any(not 0 <= token < _MOST for token in tokens):
        raise ValueError(f"{next(t for t in tokens if not 0 <= t < _MOST)} is no token's id")


def _check_numbers(what: str, *values: float | None) -> None:
    if any(value is not None and not 0 <= value < _MOST for value in values):
        raise ValueError(f"a {what} has a count or a time below 0 or beyond all bounds")


class Records:
    """Events as the records of a trace's lines; with `describe`, each names the token ids that no record named before."""

    def __init__(self, describe: Callable[[int], str] | None = None) -> None:
        self.describe = describe
        """Names a token id; may be set later, when there is a tokenizer."""
        self._named: set[int] = set()

    def of(self, event: Event) -> dict[str, Any]:
        record = to_json(event)
        if self.describe is not None:
            record["pieces"] = {str(token): self.describe(token) for token in sorted(self._new_tokens(event))}
        return record

    def _new_tokens(self, event: Event) -> set[int]:
        match event:
            case Started():
                tokens = set(event.prompt)
            case Cycle():
                told = [row for side in (event.raw_p, event.raw_q) if side is not None for row in side.likeliest]
                tokens = {*event.drafted, *event.emitted, *(token for token, _ in event.residual)}
                tokens |= {token for row in told for token, _, _ in row}
            case _:
                tokens = set()
        new = tokens - self._named
        self._named |= new
        return new


class TraceWriter:
    """Appends events to a file, one flushed line each, which is locked meanwhile: the lines of two runs would mix.

    Raises TraceError when the file cannot be opened, another process writes to it, or a line cannot be written (no such
    folder, disk full).
    """

    def __init__(self, path: Path | str, describe: Callable[[int], str] | None = None) -> None:
        self.path = Path(path)
        self.records = Records(describe)
        try:
            self._file: IO[str] = self.path.open("a", encoding="utf-8")
            if not lock(self._file):
                raise TraceError(f"another run is writing to {self.path}", "give each a --trace of its own")
            # A killed run's last line stays the only damaged one; written with the first event, so that a start that
            # fails leaves the file as it was.
            self._before = "\n" if _ends_inside_a_line(self.path) else ""
        except OSError as error:
            raise _unwritable(self.path, error) from error

    def write(self, event: Event) -> None:
        record = self.records.of(event)
        try:
            self._file.write(self._before + json.dumps(record) + "\n")
            self._file.flush()
            self._before = ""
        except OSError as error:
            raise _unwritable(self.path, error) from error

    def close(self) -> None:
        try:
            self._file.close()
        except OSError as error:  # what could not be flushed before cannot be flushed now
            raise _unwritable(self.path, error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def read_trace(path: Path | str) -> Iterator[Event]:
    """The events of a trace, in order.

    A line that is cut short is accepted where a killed run would leave it: at the end, or before the next `started`.
    Raises TraceError, with the line's number, for any other line that is not an event, and for another schema.
    """
    for _, event, _ in _records(Path(path)):
        yield event


def read_described(path: Path | str) -> Iterator[tuple[Event, dict[int, str]]]:
    """Events with the text of the token ids that each names first; bytes that are no UTF-8 come as lone surrogates (PEP
    383)."""
    for _, event, pieces in _records(Path(path)):
        yield event, pieces


def read_pieces(path: Path | str) -> dict[int, str]:
    """Token id to text, for all ids that the trace names."""
    pieces: dict[int, str] = {}
    for _, named in read_described(path):
        pieces |= named
    return pieces


def _records(path: Path) -> Iterator[tuple[int, Event, dict[int, str]]]:
    damaged: tuple[int, Exception] | None = None
    begun = False
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    record = parse_record(line.strip())  # an error then counts columns of this line
                    event = from_json(record)
                    pieces = typed(record.get("pieces", {}), _Pieces)
                    if not (begun or isinstance(event, Started)):
                        raise ValueError(f"a {event.kind} comes before any run has started")
                    begun = True
                except ValueError as error:
                    if damaged:
                        raise _unreadable(path, *damaged) from error
                    damaged = number, error
                    continue
                if damaged and not isinstance(event, Started):
                    raise _unreadable(path, *damaged)
                damaged = None
                yield number, event, pieces
    except OSError as error:
        raise TraceError(
            f"cannot read {path}: {reason(error)}", "give the path of a file written by --trace"
        ) from error
    if damaged and line.endswith(b"\n"):
        raise _unreadable(path, *damaged)


def _unreadable(path: Path, number: int, error: Exception) -> TraceError:
    return TraceError(f"{path}, line {number} is not an event of {TRACE_SCHEMA}: {error}", "was it written by --trace?")


def _unwritable(path: Path, error: OSError) -> TraceError:
    return TraceError(
        f"cannot write the trace {path}: {reason(error)}", "choose another path with --trace, or free some space"
    )


def _ends_inside_a_line(path: Path) -> bool:
    if not path.is_file() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read() != b"\n"
