"""Events to JSON lines and back: one event a line, flushed as it happens, so that a killed run leaves what it did.

A trace may hold several runs, one `started` line each. With a `describe` function the writer adds `pieces` to a line, the
text of the token ids that this trace has not named yet, so that it can be read without the tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from specdec_engine.errors import TraceError
from specdec_engine.events import TRACE_SCHEMA, Cycle, Event, Failed, Finished, Raw, SettingChanged, Source, Started

_KINDS: dict[str, type[Event]] = {
    "started": Started,
    "cycle": Cycle,
    "setting_changed": SettingChanged,
    "finished": Finished,
    "failed": Failed,
}


def to_json(event: Event) -> dict[str, Any]:
    """The event as plain JSON values, `kind` first."""
    record = asdict(event)
    return {"kind": record.pop("kind"), **record}


def from_json(record: dict[str, Any]) -> Event:
    """The event a record holds; keys it does not know are ignored. Raises KeyError, TypeError or ValueError otherwise."""
    if record["kind"] == "started" and record.get("schema") != TRACE_SCHEMA:
        raise ValueError(f"schema {record.get('schema')!r} is not {TRACE_SCHEMA!r}")
    cls = _KINDS[record["kind"]]
    known = {f.name: _frozen(record[f.name]) for f in fields(cls) if f.name in record}
    if cls is Cycle and "source" in known:
        known["source"] = Source(**record["source"])
    for side in {"raw_p", "raw_q"} & known.keys():
        known[side] = None if record[side] is None else _raw(record[side])
    event = cls(**known)
    if isinstance(event, Cycle):
        _check(event)
    return event


def _check(cycle: Cycle) -> None:
    """Raises ValueError for one that contradicts itself, so that its readers need not look."""
    k = len(cycle.drafted)
    raw = [
        values for side in (cycle.raw_p, cycle.raw_q) if side is not None for values in (side.drafted, side.likeliest)
    ]
    told = (cycle.p, cycle.q, cycle.u, cycle.overlap, *raw)
    if any(len(values) != k for values in told) or not 0 <= cycle.accepted <= k:
        raise ValueError(f"cycle {cycle.index} has {k} drafted tokens and other numbers of verdicts")


def _raw(record: dict[str, Any]) -> Raw:
    """Raises KeyError, TypeError or ValueError for what is none."""
    drafted = tuple(None if value is None else float(value) for value in record["drafted"])
    rows = [
        tuple((int(token), float(before), float(after)) for token, before, after in row) for row in record["likeliest"]
    ]
    return Raw(drafted, tuple(rows))


def _frozen(value: Any) -> Any:
    return tuple(_frozen(v) for v in value) if isinstance(value, list) else value


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
    """Appends events to a file, one flushed line each.

    Raises TraceError when the file cannot be opened or a line cannot be written (no such folder, disk full).
    """

    def __init__(self, path: Path | str, describe: Callable[[int], str] | None = None) -> None:
        self.path = Path(path)
        self.records = Records(describe)
        try:
            self._file: IO[str] = self.path.open("a", encoding="utf-8")
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
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                    event = from_json(record)
                    pieces = {int(token): str(piece) for token, piece in record.get("pieces", {}).items()}
                except (ValueError, TypeError, KeyError, AttributeError) as error:
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
            f"cannot read {path}: {error.strerror}", "give the path of a file written by --trace"
        ) from error
    if damaged and line.endswith(b"\n"):
        raise _unreadable(path, *damaged)


def _unreadable(path: Path, number: int, error: Exception) -> TraceError:
    said = "it is not JSON" if isinstance(error, json.JSONDecodeError) else str(error)
    said = f"no {error}" if isinstance(error, KeyError) else said
    return TraceError(f"{path}, line {number} is not an event of {TRACE_SCHEMA}: {said}", "was it written by --trace?")


def _unwritable(path: Path, error: OSError) -> TraceError:
    return TraceError(
        f"cannot write the trace {path}: {error.strerror}", "choose another path with --trace, or free some space"
    )


def _ends_inside_a_line(path: Path) -> bool:
    if not path.is_file() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read() != b"\n"
