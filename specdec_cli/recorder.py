"""`--trace`: a run's events into a file, whose troubles wait until the run is over."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from specdec_engine.errors import TraceError
from specdec_engine.record.events import Event
from specdec_engine.record.trace import TraceWriter


class Recorder:
    """The trace, if one is wanted. A disk that fills up must not cost the text: the error waits until the end."""

    def __init__(self, path: str | None) -> None:
        self._writer = TraceWriter(path) if path is not None else None
        self._error: TraceError | None = None

    def describe(self, text_of: Callable[[int], str]) -> None:
        if self._writer is not None:
            self._writer.records.describe = text_of

    def write(self, event: Event) -> None:
        if self._writer is None or self._error is not None:
            return
        try:
            self._writer.write(event)
        except TraceError as error:
            self._error = error

    def close(self) -> None:
        if self._writer is not None:
            with suppress(TraceError):  # an unflushed rest is what `check` reports
                self._writer.close()

    def check(self) -> None:
        """Raises the first TraceError there was."""
        if self._error is not None:
            raise self._error
