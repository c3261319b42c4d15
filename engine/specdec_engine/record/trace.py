"""Events to JSON lines and back: one event a line, flushed as it happens, so that a killed run leaves what it did.

A trace may hold several runs. Each line bears its run's id, so that the lines of two writers can be told apart. With a
`describe` function the writer adds `pieces` to a line, the text of the token ids that the run has not named yet, so that it
can be read without the tokenizer.
"""

from __future__ import annotations

import json
import secrets
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Self, TypedDict

from specdec_engine.errors import TraceError, reason
from specdec_engine.record.contradictions import check
from specdec_engine.record.events import (
    TRACE_SCHEMA,
    Counters,
    Cycle,
    Event,
    Failed,
    Finished,
    SettingChanged,
    Started,
)
from specdec_engine.record.files import lock, parse_record, typed

if TYPE_CHECKING:
    import msgspec

_KINDS: dict[str, type[Event]] = {
    "started": Started,
    "cycle": Cycle,
    "setting_changed": SettingChanged,
    "counters": Counters,
    "finished": Finished,
    "failed": Failed,
}
_Pieces = dict[int, str]
_READS = ("specdec.trace/1", TRACE_SCHEMA)
"""/1 has no run ids, and nothing in it is unknown or inferred; otherwise it is the same."""


def to_json(event: Event) -> dict[str, Any]:
    """The event as plain JSON values, `kind` first; log-probabilities only where they were asked for."""
    record = asdict(event)
    if record.get("logprobs", ()) is None:
        del record["logprobs"]
    return {"kind": record.pop("kind"), **record}


def from_json(record: Mapping[str, Any]) -> Event:
    """The event a record holds; keys it does not know are ignored. Raises ValueError for what is none, and for one that
    contradicts itself, so that its readers need not look."""
    cls = _KINDS.get(str(record.get("kind")))
    if cls is None:
        raise ValueError(f"there is no kind {record['kind']!r}" if "kind" in record else "it has no kind")
    if cls is Started and record.get("schema") not in _READS:
        raise ValueError(f"schema {record.get('schema')!r} is none of {', '.join(_READS)}")
    event = typed(record, cls)
    check(event)
    return event


class Records:
    """Events as the records of a trace's lines. Each `started` begins a run with an id of its own; with `describe`, each
    record names the token ids that none of its run named before."""

    def __init__(self, describe: Callable[[int], str] | None = None) -> None:
        self.describe = describe
        """Names a token id; may be set later, when there is a tokenizer."""
        self._run = ""
        self._named: set[int] = set()

    def of(self, event: Event) -> dict[str, Any]:
        if isinstance(event, Started) or not self._run:
            self._run, self._named = secrets.token_hex(6), set()
        record = {"kind": event.kind, "run": self._run, **to_json(event)}
        if self.describe is not None:
            record["pieces"] = {str(token): self.describe(token) for token in sorted(self._new_tokens(event))}
        return record

    def _new_tokens(self, event: Event) -> set[int]:
        match event:
            case Started():
                tokens = {token for token in event.prompt if token is not None}
            case Cycle():
                rows = [row for raw in (event.raw_p, event.raw_q) if raw is not None for row in raw.likeliest]
                told = [one for of in event.logprobs or () for one in (of.token, *of.likeliest)]
                tokens = {token for token in (*event.drafted, *event.emitted) if token is not None}
                tokens |= {token for token, _ in event.residual} | {token for row in rows for token, _, _ in row}
                tokens |= {one.id for one in told}
            case _:
                tokens = set()
        new = tokens - self._named
        self._named |= new
        return new


class TraceWriter:
    """Appends events to a file, one flushed line each, which is locked meanwhile, so that no line of another
    program comes between the parts of one.

    Raises TraceError when the file cannot be opened, holds something else, another process writes to it, or a line cannot be
    written (no such folder, disk full).
    """

    def __init__(self, path: Path | str, describe: Callable[[int], str] | None = None) -> None:
        self.path = Path(path)
        self.records = Records(describe)
        try:
            if self.path.is_file() and not _begins_as_a_trace(self.path):
                raise TraceError(f"{self.path} holds something else than a trace", "choose another file for --trace")
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


@dataclass(frozen=True, slots=True)
class TraceLine:
    """An event as it stands in a trace."""

    run: str
    """Its run's id; empty in a trace of /1."""
    event: Event
    pieces: Mapping[int, str]
    """Text of the token ids that this line is the first of its run to name; bytes that are no UTF-8 are lone surrogates (PEP
    383)."""


def read_trace(path: Path | str) -> Iterator[Event]:
    """The events of a trace, run by run, in the order in which the runs began.

    A line that is cut short is accepted where a killed run would leave it: at the end, or before the next `started`.
    Raises TraceError, with the line's number, for any other line that is not an event, and for another schema.
    """
    return (line.event for line in read_lines(path))


def read_pieces(path: Path | str) -> dict[int, str]:
    """Token id to text, for all ids that the trace names."""
    return {token: text for line in read_lines(path) for token, text in line.pieces.items()}


def read_lines(path: Path | str) -> Iterator[TraceLine]:
    """As `read_trace`, with what else a line says. The first run's lines come as they are read; lines of other runs among
    them wait until it has ended, or the file has."""
    return _run_by_run(_lines(Path(path)))


@dataclass(slots=True)
class _Run:
    waiting: deque[TraceLine] = field(default_factory=deque)
    over: bool = False

    def take(self) -> Iterator[TraceLine]:
        while self.waiting:
            yield self.waiting.popleft()


def _run_by_run(lines: Iterable[TraceLine]) -> Iterator[TraceLine]:
    """The same lines, those of each run together."""
    by_id, order = dict[str, _Run](), deque[_Run]()
    for line in lines:
        if isinstance(line.event, Started):
            if line.run in by_id:  # a copy of a run, or the next one of a trace without ids
                by_id[line.run].over = True
            by_id[line.run] = _Run()  # the one before it with this id is still in order
            order.append(by_id[line.run])
        run = by_id[line.run]
        run.waiting.append(line)
        run.over = run.over or isinstance(line.event, Finished | Failed)
        yield from order[0].take()
        while order[0].over and len(order) > 1:
            order.popleft()
            yield from order[0].take()
    for run in order:
        yield from run.take()


def _lines(path: Path) -> Iterator[TraceLine]:
    damaged: tuple[int, Exception] | None = None
    whole = True
    open_runs = set[str]()
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                if not raw.strip():
                    continue
                try:
                    line = _parse(raw.strip())  # an error then counts columns of this line
                    _follow(line, open_runs)
                except ValueError as error:
                    if damaged or _is_json(raw):  # a killed run leaves the beginning of a line, and no other one
                        raise _unreadable(path, *(damaged or (number, error))) from error
                    damaged, whole = (number, error), raw.endswith(b"\n")
                    continue
                if damaged and not isinstance(line.event, Started):
                    raise _unreadable(path, *damaged)
                damaged = None
                yield line
    except OSError as error:
        raise TraceError(
            f"cannot read {path}: {reason(error)}", "give the path of a file written by --trace"
        ) from error
    if damaged and whole:
        raise _unreadable(path, *damaged)


def _follow(line: TraceLine, open_runs: set[str]) -> None:
    """Note which runs have begun and not ended. Raises ValueError for an event outside its run."""
    match line.event:
        case Started():
            open_runs.add(line.run)
        case event if line.run not in open_runs:
            raise ValueError(f"a {event.kind} comes before its run has started, or after it has ended")
        case Finished() | Failed():
            open_runs.discard(line.run)


def _is_json(line: bytes) -> bool:
    """Whether it is whole, whatever it says."""
    try:
        json.loads(line)
    except RecursionError:
        return True
    except ValueError:
        return False
    return True


class _Head(TypedDict, total=False):
    """What a line says beside its event."""

    kind: str
    run: str
    schema: str
    pieces: dict[int, str]


def _parse(line: bytes) -> TraceLine:
    """Raises ValueError. msgspec reads a line in a fifteenth of the time that `json` and a conversion take. A line that it
    rejects is parsed again by `json`, which accepts lone surrogates and has the better errors."""
    import msgspec

    try:
        head = _head_decoder().decode(line)
        event = _event_decoder(head["kind"]).decode(line)
        if isinstance(event, Started) and event.schema not in _READS:
            raise KeyError(event.schema)
    except (msgspec.MsgspecError, RecursionError, KeyError):
        record = parse_record(line)
        return TraceLine(typed(record.get("run", ""), str), from_json(record), typed(record.get("pieces", {}), _Pieces))
    check(event)
    return TraceLine(head.get("run", ""), event, head.get("pieces", {}))


@cache
def _head_decoder() -> msgspec.json.Decoder[_Head]:
    import msgspec

    return msgspec.json.Decoder(_Head)


@cache
def _event_decoder(kind: str) -> msgspec.json.Decoder[Event]:
    import msgspec

    return msgspec.json.Decoder(_KINDS[kind])


def _unreadable(path: Path, number: int, error: Exception) -> TraceError:
    return TraceError(f"{path}, line {number} is not an event of {TRACE_SCHEMA}: {error}", "was it written by --trace?")


def _unwritable(path: Path, error: OSError) -> TraceError:
    return TraceError(
        f"cannot write the trace {path}: {reason(error)}", "choose another path with --trace, or free some space"
    )


def _begins_as_a_trace(path: Path) -> bool:
    """Whether the file is empty, or its first line is an event, or what a killed run has left of one."""
    beginning = b'{"kind": "'
    with path.open("rb") as file:
        first = file.read(len(beginning) + 64).lstrip()[: len(beginning)]
    return beginning.startswith(first)


def _ends_inside_a_line(path: Path) -> bool:
    if not path.is_file() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read() != b"\n"
