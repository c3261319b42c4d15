"""A running server as a source: one thread for the app's life, which asks, and tells what comes as cycles.

The server does not wait for the screen: pausing holds the screen alone.
"""

from __future__ import annotations

import threading
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from specdec_engine.errors import SpecdecError
from specdec_engine.record.events import Cycle, Failed, Finished
from specdec_tui.live import Request
from specdec_tui.streams import Stage, Threaded

if TYPE_CHECKING:
    from specdec_engine.attach.attached import Attached


class ServerStream(Threaded):
    """Events of a server's runs."""

    live = True
    steers = frozenset({"prompt", "again"})
    unsteered = "the server keeps what it was started with; r and R ask it for another answer"
    notes: tuple[str, ...] = ()

    def __init__(self, url: str, request: Request, log: Path, draft: str | None = None, k: int | None = None) -> None:
        """log: where the traceback of a failure goes. draft, k: what the server drafts with, where that is known."""
        super().__init__(self._main, "server")
        self.stage = Stage(f"looking which server is at {url}")
        self.request = request
        self._url, self._log, self._draft, self._k = url, log, draft, k
        self._gate = threading.Condition()
        self._wanted: Request | None = request
        self._closing = False
        self._names: dict[int, str] = {}
        self._server: Attached | None = None
        self._begun = False

    # -- from the screen ---------------------------------------------------------------------------------------------

    def close(self) -> None:
        with self._gate:
            self._closing = True
            self._gate.notify()
        self._hang_up()
        self._join(_PATIENCE_S)

    @property
    def closed(self) -> bool:
        """Whether the thread has ended."""
        return not self._thread.is_alive()

    def name(self, token: int) -> str:
        return self._names.get(token, f"⟨{token}⟩")

    def allow(self, cycles: int | None) -> None:
        pass

    @property
    def turned(self) -> Request:
        """The request as it is; nothing of it can be turned."""
        return self.request

    def again(self, request: Request) -> None:
        """Give up the run, and ask for this one."""
        with self._gate:
            self.request = self._wanted = request
            self._gate.notify()
        self._hang_up()

    def _hang_up(self) -> None:
        """What is being read is not waited for."""
        if self._server is not None:
            self._server.server.hang_up()

    # -- in the thread -----------------------------------------------------------------------------------------------

    def _main(self) -> None:
        try:
            from specdec_engine.attach.attached import attach

            server = self._server = attach(self._url, self._draft, self._k)
            while (request := self._next()) is not None:
                try:
                    self.error = None
                    self._run(server, request)
                except SpecdecError as error:  # the next prompt may fare better
                    if self._wanted is None and not self._closing:
                        self._say(error)
        except SpecdecError as error:
            self._failed(error)
        except Exception as error:
            self._log.parent.mkdir(parents=True, exist_ok=True)
            self._log.write_text(traceback.format_exc(), "utf-8")
            self.stage = Stage(f"{type(error).__name__}: {error}", f"the traceback is in {self._log}", failed=True)

    def _say(self, error: SpecdecError) -> None:
        """Before a run has begun in its place; later as its end."""
        self.error = error
        if self._begun:
            self.stage = None
            self._events.append(Failed(type(error).__name__, error.message, error.hint))
        else:
            self.stage = Stage(error.message, error.hint, failed=True)

    def _next(self) -> Request | None:
        with self._gate:
            self._gate.wait_for(lambda: self._closing or self._wanted is not None)
            request, self._wanted = self._wanted, None
            return None if self._closing else request

    def _run(self, server: Attached, request: Request) -> None:
        from specdec_engine.attach.asked import Asked

        self.stage, self._begun = Stage(f"{server.engine.name} reads the prompt"), False
        asked = Asked(
            request.prompt,
            request.sampling,
            request.max_tokens,
            request.stop,
            request.seed,
            request.chat,
            request.system,
        )
        run = server.begin(asked)
        self._names |= run.texts.names
        done = emitted = 0
        for event in run.events():
            self._begun = True
            if isinstance(event, Cycle):
                self.stage = None
                # Here and not when they are drawn: the server is asked for those that it has not told yet.
                self._names |= {token: run.name(token) for token in event.emitted if token is not None}
                done, emitted = done + 1, emitted + len(event.emitted)
            self._events.append(event)
            if self._closing or self._wanted is not None:
                if not isinstance(event, Finished):
                    self._events.append(Finished("cancelled", emitted, done, None))
                return


_PATIENCE_S = 0.5
