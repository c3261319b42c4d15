"""A running engine as a source: one thread for the app's life, which loads, decodes, and waits between cycles.

The engine is told how many cycles it may have run, so that pausing and slow speeds cost it no time that it measures.
"""

from __future__ import annotations

import threading
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from specdec_engine.errors import SpecdecError
from specdec_engine.events import Cycle, Event, Finished, Started
from specdec_engine.progress import Progress, Report
from specdec_engine.types import Sampling
from specdec_tui.source import Stage

if TYPE_CHECKING:
    from specdec_engine.control import Controls
    from specdec_engine.pair import Pair

PLAIN_TOKENS = 16
"""Decoded without a draft before each run: what its speed is held against."""


@dataclass(frozen=True, slots=True)
class Request:
    """A run."""

    prompt: str
    k: int | Literal["auto"] = "auto"
    sampling: Sampling = field(default_factory=Sampling)
    draft_temperature: float | None = None
    rule: str = "token"
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    seed: int | None = None
    chat: bool | None = None
    system: str | None = None


class LiveSource:
    """Events of the engine. `load` is called in its thread."""

    live = True

    def __init__(self, load: Callable[[Report], Pair], request: Request, log: Path) -> None:
        """log: where the traceback of a failure goes."""
        self.request = request
        self._load, self._log = load, log
        self._events: deque[Event] = deque()
        self._stage: Stage | None = Stage("loading PyTorch and transformers")
        self._gate = threading.Condition()
        self._allowed: int | None = None
        self._wanted: Request | None = request
        self._closing = False
        self._pair: Pair | None = None
        self._controls: Controls | None = None
        self._text: Callable[[int], str] = lambda token: f"⟨{token}⟩"
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)

    # -- from the screen ---------------------------------------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        with self._gate:
            self._closing = True
            self._gate.notify()
        self._thread.join(_PATIENCE_S)

    def drain(self) -> list[Event]:
        return [self._events.popleft() for _ in range(len(self._events))]

    @property
    def stage(self) -> Stage | None:
        return self._stage

    def name(self, token: int) -> str:
        return self._text(token)

    def allow(self, cycles: int | None) -> None:
        with self._gate:
            self._allowed = cycles
            self._gate.notify()

    def again(self, request: Request) -> None:
        """Give up the run, and begin this one."""
        with self._gate:
            self.request = self._wanted = request
            self._gate.notify()

    def change(self, *, k: int | None = None, temperature: float | None = None) -> None:
        """From the next cycle on; a k by hand ends `auto`. Raises UsageError for a value out of range."""
        if self._controls is None or self._pair is None:
            return
        now = self._controls.settings
        if k is not None:
            self.adapt(False)
            self._controls.change(k=k, reason="set by hand")
        if temperature is not None:
            self._controls.change(sampling=replace(now.sampling, temperature=temperature), reason="set by hand")

    def adapt(self, on: bool) -> None:
        """Whether k follows what pays."""
        if self._controls is not None and self._pair is not None:
            self._controls.adapt(self._pair.auto if on else None, "set by hand")
            self._pair.pace.controller = self._controls.auto

    # -- in the engine's thread --------------------------------------------------------------------------------------

    def _main(self) -> None:
        try:
            pair = self._pair = self._load(self._report)
            from specdec_engine.text import TokenText

            self._text = TokenText(pair.tokenizer)
            while (request := self._next()) is not None:
                self._run(pair, request)
        except SpecdecError as error:
            self._stage = Stage(error.message, error.hint, failed=True)
        except Exception as error:
            self._log.parent.mkdir(parents=True, exist_ok=True)
            self._log.write_text(traceback.format_exc(), "utf-8")
            self._stage = Stage(f"{type(error).__name__}: {error}", f"the traceback is in {self._log}", failed=True)

    def _report(self, progress: Progress) -> None:
        done = f" {progress.done / 1e6:.0f} of" if progress.total and 0 < progress.done < progress.total else ""
        size = f"{done} {progress.total / 1e6:.0f} MB" if progress.total else ""
        doing = {"download": "fetching", "convert": "converting", "load": "loading"}[progress.stage]
        self._stage = Stage(f"{doing} {progress.what}", size)

    def _next(self) -> Request | None:
        with self._gate:
            self._gate.wait_for(lambda: self._closing or self._wanted is not None)
            request, self._wanted = self._wanted, None
            return None if self._closing else request

    def _run(self, pair: Pair, request: Request) -> None:
        self._stage = Stage("measuring plain decoding", f"{PLAIN_TOKENS} tokens")
        ids = pair.encode(request.prompt, chat=request.chat, system=request.system)
        plain = self._plain(pair, ids)
        controls = self._controls = pair.controls(request.k, request.sampling, request.draft_temperature)
        how: dict[str, Any] = {"rule": request.rule, "max_tokens": request.max_tokens, "stop": request.stop}
        done = 0
        try:
            for event in pair.decode(ids, controls=controls, seed=request.seed, **how):
                if isinstance(event, Started):
                    event = replace(event, environment={**event.environment, "plain_tokens_per_second": plain})
                    self._stage = None
                self._events.append(event)
                done += isinstance(event, Cycle)
                if not self._may_go_on(done):
                    self._events.append(Finished("cancelled", 0, done, None))
                    return
        except SpecdecError as error:  # it is in the events already, as Failed; the next run may do better
            if self._stage is not None:
                raise error

    def _plain(self, pair: Pair, ids: list[int]) -> float | None:
        """Tokens a second without a draft, the first left out: it finds everything cold."""
        seconds = [
            event.verify_s + event.other_s
            for event in pair.decode(ids, k=0, max_tokens=PLAIN_TOKENS, seed=0)
            if isinstance(event, Cycle)
        ][1:]
        return len(seconds) / sum(seconds) if seconds and sum(seconds) else None

    def _may_go_on(self, done: int) -> bool:
        """Wait until the next cycle is allowed; False where it is not wanted any more."""
        with self._gate:
            self._gate.wait_for(
                lambda: self._closing or self._wanted is not None or self._allowed is None or done < self._allowed
            )
            return not self._closing and self._wanted is None


_PATIENCE_S = 5.0
"""What leaving waits for a pass that is running."""
