"""Where events come from: a running engine or a trace. The screen does not know which."""

from __future__ import annotations

import gc
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from specdec_engine.errors import SpecdecError, TraceError
from specdec_engine.record.events import Event, Started
from specdec_engine.record.trace import read_lines
from specdec_tui.frame import Frame
from specdec_tui.pieces import Name

DEMO = Path(__file__).parent / "demo.jsonl"
"""A recorded run of the built-in pair."""


@dataclass(frozen=True, slots=True)
class Stage:
    """What happens before the first event, or why there will be none."""

    what: str
    hint: str = ""
    failed: bool = False
    so_far: Callable[[], str] = str
    """How far it is now: asked each time that it is shown."""

    @property
    def text(self) -> str:
        return self.what + self.so_far()


class EventStream(Protocol):
    """**Protocol:** events for the screen, drained at its own rate, from a thread of their own."""

    live: bool
    """Whether settings can change and cycles wait to be allowed."""

    def start(self) -> None: ...

    def close(self) -> None:
        """Stop as soon as may be; returns when it has."""
        ...

    def drain(self) -> list[Event]:
        """What has come since it was last asked."""
        ...

    stage: Stage | None
    """None while events come."""
    steers: frozenset[str]
    """The screen's actions that it takes, of those that turn a run or begin another."""
    unsteered: str
    """What to say where one of the others is wanted."""

    def name(self, token: int) -> str:
        """A token's own text."""
        ...

    def allow(self, cycles: int | None) -> None:
        """How many cycles of the run may have been decoded; None for any number."""
        ...


class Threaded:
    """Events that a thread of its own appends, and what befell it."""

    def __init__(self, work: Callable[[], None], name: str) -> None:
        self.stage: Stage | None = None
        self.error: SpecdecError | None = None
        """Why there will be no more events."""
        self._events: deque[Event] = deque()
        self._thread = threading.Thread(target=work, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def drain(self) -> list[Event]:
        return [self._events.popleft() for _ in range(len(self._events))]

    def _join(self, seconds: float) -> None:
        if self._thread.ident is not None:
            self._thread.join(seconds)

    def _failed(self, error: SpecdecError) -> None:
        self.error, self.stage = error, Stage(error.message, error.hint, failed=True)


_RECORDED = "this run is recorded; the engine's keys are for live ones: specdec watch"


class ReplayStream(Threaded):
    """A trace, read in a thread: a large one shows its beginning while the rest is read. Of several runs, the last."""

    live = False
    steers = frozenset[str]()
    unsteered = _RECORDED

    def __init__(self, path: Path) -> None:
        super().__init__(self._read, "trace")
        self.path = path
        self.runs = 0
        """In the file; the last one is shown."""
        self._pieces: dict[int, str] = {}
        self._closed = threading.Event()

    def close(self) -> None:
        self._closed.set()
        self._join(2.0)
        gc.unfreeze()

    def name(self, token: int) -> str:
        return self._pieces.get(token, f"⟨{token}⟩")

    def allow(self, cycles: int | None) -> None:
        pass

    def _read(self) -> None:
        try:
            for line in read_lines(self.path):
                self.runs += isinstance(line.event, Started)
                self._pieces |= line.pieces
                self._events.append(line.event)
                if self._closed.is_set():
                    return
            if not self.runs:
                raise TraceError(f"{self.path} holds no run", "give a file that --trace wrote")
            gc.collect()
            gc.freeze()  # a collection that looks through 5,000 cycles takes 0.1 s, and is felt
        except SpecdecError as error:
            self._failed(error)
        except Exception as error:  # a screen that waits for ever says less
            self._failed(TraceError(f"{self.path} cannot be read: {error}", "this is a bug in specdec"))


class FrameStream:
    """A run that is known whole."""

    live = False
    steers = frozenset[str]()
    unsteered = _RECORDED
    stage: Stage | None = None

    def __init__(self, frame: Frame, name: Name) -> None:
        self._events, self.name = list(frame.events()), name

    def start(self) -> None:
        pass

    def close(self) -> None:
        pass

    def drain(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def allow(self, cycles: int | None) -> None:
        pass


def read_frame(path: Path) -> tuple[Frame, Name]:
    """A whole trace at once. Raises TraceError."""
    pieces, events = dict[int, str](), list[Event]()
    for line in read_lines(path):
        pieces |= line.pieces
        events.append(line.event)
    frame = Frame().plus(events)
    if not frame.run:
        raise TraceError(f"{path} holds no run", "give a file that --trace wrote")
    return frame, lambda token: pieces.get(token, f"⟨{token}⟩")
