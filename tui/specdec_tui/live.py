"""A running engine as a source: one thread for the app's life, which loads, decodes, and waits between cycles.

The engine is told how many cycles it may have run, so that pausing and slow speeds cost it no time that it measures.
"""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

from specdec_engine.core.cycle_types import Sampling
from specdec_engine.errors import SpecdecError
from specdec_engine.models.progress import Progress, Report
from specdec_engine.record.events import Cycle, Finished, Started, known_phases
from specdec_tui.streams import Stage, Threaded

if TYPE_CHECKING:
    from specdec_engine.adaptive.controller import AutoK
    from specdec_engine.constrain.wanted import Grammar
    from specdec_engine.decoding.control import Controls
    from specdec_engine.pair import Pair

PLAIN_TOKENS = 16
"""Decoded without a draft before each run: what its speed is held against."""


@dataclass(frozen=True, slots=True)
class Request:
    """A run."""

    prompt: str
    k: int | Literal["auto"] = "auto"
    sampling: Sampling = field(default_factory=lambda: Sampling(raw=True))
    """The inspector shows what `raw` tells."""
    draft_temperature: float | None = None
    rule: str = "token"
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    seed: int | None = None
    chat: bool | None = None
    system: str | None = None
    grammar: Grammar | None = None
    """What the answer follows."""
    template: Mapping[str, Any] | None = None
    """Values for the chat template, by its own names."""


class LiveStream(Threaded):
    """Events of the engine. `load` is called in its thread."""

    live = True
    steers = frozenset({"k", "adapt", "temperature", "prompt", "again", "race"})
    unsteered = ""

    def __init__(self, load: Callable[[Report], Pair], request: Request, log: Path) -> None:
        """log: where the traceback of a failure goes."""
        super().__init__(self._main, "engine")
        self.stage = Stage("loading PyTorch and transformers")
        self.request = request
        self._load, self._log = load, log
        self._gate = threading.Condition()
        self._allowed: int | None = None
        self._wanted: Request | None = request
        self._closing = False
        self._pair: Pair | None = None
        self._controls: Controls | None = None
        self._text: Callable[[int], str] = lambda token: f"⟨{token}⟩"

    # -- from the screen ---------------------------------------------------------------------------------------------

    def close(self) -> None:
        with self._gate:
            self._closing = True
            self._gate.notify()
        self._join(_PATIENCE_S)

    @property
    def closed(self) -> bool:
        """Whether the thread has ended."""
        return not self._thread.is_alive()

    @property
    def notes(self) -> tuple[str, ...]:
        """What there is to say about the pair, once it is loaded."""
        return () if self._pair is None else self._pair.notes

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
            self._allowed = 0  # until the screen has seen that it began
            self._gate.notify()

    def change_k(self, by: int) -> int | None:
        """From the next cycle on, and no longer by itself; the new k, or None where no run is under way."""
        if self._controls is None or self._pair is None:
            return None
        now, auto = self._controls.settings.k, self._controls.auto
        if auto is not None and not auto.off:  # in a cycle that only measures a plain pass it is 0
            now = max(now, 1)
        k = max(0, now + by)
        self._adapt(self._pair, self._controls, None)
        self._controls.change(k=k, reason=_BY_HAND)
        return k

    def change_temperature(self, by: float) -> float | None:
        """From the next cycle on; the new one, or None where no run is under way."""
        if self._controls is None:
            return None
        now = self._controls.settings.sampling
        temperature = round(max(0.0, now.temperature + by), 1)
        self._controls.change(sampling=replace(now, temperature=temperature), reason=_BY_HAND)
        return temperature

    @property
    def turned(self) -> Request:
        """The request, with what was turned since."""
        if self._controls is None:
            return self.request
        now = self._controls.settings
        sampling = replace(self.request.sampling, temperature=now.sampling.temperature)
        return replace(self.request, k=now.k if self._controls.auto is None else "auto", sampling=sampling)

    def toggle_auto(self) -> bool | None:
        """Whether k follows what pays from the next cycle on; None where no run is under way."""
        if self._controls is None or self._pair is None:
            return None
        self._adapt(self._pair, self._controls, None if self._controls.auto is not None else self._pair.auto)
        return self._controls.auto is not None

    def _adapt(self, pair: Pair, controls: Controls, auto: AutoK | None) -> None:
        if auto is not controls.auto:
            controls.adapt(auto, _BY_HAND if auto is None else "auto is on again")
            pair.draft_limits.controller = auto

    # -- in the engine's thread --------------------------------------------------------------------------------------

    def _main(self) -> None:
        try:
            pair = self._pair = self._load(self._report)
            from specdec_engine.record.text import TokenText

            self._text = TokenText(pair.tokenizer)
            while (request := self._next()) is not None:
                self._try(pair, request)
        except _Closed:
            pass
        except SpecdecError as error:
            self._failed(error)
        except Exception as error:
            self._log.parent.mkdir(parents=True, exist_ok=True)
            self._log.write_text(traceback.format_exc(), "utf-8")
            self.stage = Stage(f"{type(error).__name__}: {error}", f"the traceback is in {self._log}", failed=True)

    def _try(self, pair: Pair, request: Request) -> None:
        """Run it; a prompt that is too long, say, ends this run and not the engine."""
        try:
            self._run(pair, request)
        except SpecdecError as error:
            if self.stage is not None:  # else it is among the events already, as Failed
                self.stage = Stage(error.message, error.hint, failed=True)

    def _report(self, progress: Progress) -> None:
        if self._closing:
            raise _Closed
        self.stage = Stage(progress.doing, f" {progress.amount}" if progress.amount else "")

    def _next(self) -> Request | None:
        with self._gate:
            self._gate.wait_for(lambda: self._closing or self._wanted is not None)
            request, self._wanted = self._wanted, None
            return None if self._closing else request

    def _run(self, pair: Pair, request: Request) -> None:
        ids = pair.encode(request.prompt, chat=request.chat, system=request.system, template=request.template)
        said = "; ".join(filter(None, [*pair.notes, pair.marks_in(request.prompt, request.chat)]))
        self.stage = Stage("reading the prompt", said, so_far=lambda: _read(pair, len(ids)))
        plain = self._plain(pair, ids, said)
        controls = self._controls = pair.controls(request.k, request.sampling, request.draft_temperature)
        how: dict[str, Any] = {"rule": request.rule, "max_tokens": request.max_tokens, "stop": request.stop}
        how["grammar"] = request.grammar
        done = emitted = 0
        for event in pair.decode(ids, controls=controls, seed=request.seed, **how):
            if isinstance(event, Started):
                event = replace(event, environment={**event.environment, "plain_tokens_per_second": plain})
                self.stage = None
            self._events.append(event)
            if isinstance(event, Cycle):
                done, emitted = done + 1, emitted + len(event.emitted)
            if not self._may_go_on(done):
                self._events.append(Finished("cancelled", emitted, done, None))
                return

    def _plain(self, pair: Pair, ids: list[int], hint: str) -> float | None:
        """Tokens a second without a draft, the first left out: it finds everything cold. By the median: on a shared machine
        the mean was 1.4 times what the run's own plain passes took, in one run of ten."""
        seconds = list[float]()
        for event in pair.decode(ids, k=0, max_tokens=PLAIN_TOKENS, seed=0):
            if self._closing:
                raise _Closed
            if isinstance(event, Cycle):
                self.stage = Stage(f"measuring plain decoding, {PLAIN_TOKENS} tokens", hint)
                phases = known_phases(event)
                seconds.append(phases.verify_s + phases.other_s)
        del seconds[:1]
        return 1 / median(seconds) if seconds and median(seconds) else None

    def _may_go_on(self, done: int) -> bool:
        """Wait until the next cycle is allowed; False where it is not wanted any more."""
        with self._gate:
            self._gate.wait_for(
                lambda: self._closing or self._wanted is not None or self._allowed is None or done < self._allowed
            )
            return not self._closing and self._wanted is None


def _read(pair: Pair, tokens: int) -> str:
    return f", {min(pair.target.cached, tokens):,} of {tokens:,} tokens"


class _Closed(BaseException):
    """The screen is gone."""


_BY_HAND = "set by hand"
_PATIENCE_S = 0.5
"""What leaving waits for a pass that is running: less than a signal gives the whole of it (`leaving.SOON_S`)."""
