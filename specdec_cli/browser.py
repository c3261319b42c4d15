"""A command's screen in a browser on this machine, by textual-serve: the same Textual app, one process a visit.

Only this machine's own page may drive it: what it takes are keys, and among them are those that save files.
"""

from __future__ import annotations

import logging
import shlex
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import typer
from platformdirs import user_log_path

from specdec_cli import output
from specdec_engine.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aiohttp import web

_HOST = "127.0.0.1"
_PORTS = range(8000, 8010)
_POLICY = "default-src 'self' 'unsafe-inline' data:; connect-src 'self' ws://{address}"
"""textual-serve's page names a font of Google's, which is not asked for."""


_HEAD = """<title>specdec</title>
<script>
const waiting = setInterval(() => {
  const keys = document.querySelector("#terminal textarea");
  if (keys) { keys.focus(); clearInterval(waiting); }
}, 100);
</script>
"""
"""Keys work without a click."""


def serve(arguments: Sequence[str]) -> NoReturn:
    """Serve the screen of `specdec ARGUMENTS` until Ctrl-C. Raises UsageError without textual-serve, and where no port is
    free."""
    try:
        from textual_serve.server import Server
    except ImportError:
        raise UsageError("--browser needs textual-serve", "pip install 'specdec-cli[browser]'") from None
    log, port = user_log_path("specdec") / "browser.log", _free_port()
    log.parent.mkdir(parents=True, exist_ok=True)
    command = f"{shlex.join([sys.executable, '-m', 'specdec_cli', *arguments])} 2>>{shlex.quote(str(log))}"
    _quietly(Server)(command, host=_HOST, port=port, title="specdec").serve()
    raise typer.Exit


def _free_port() -> int:
    for port in _PORTS:
        with socket.socket() as tried:
            if tried.connect_ex((_HOST, port)):
                return port
    raise UsageError(
        f"the ports {_PORTS.start} to {_PORTS.stop - 1} of {_HOST} are taken", "close what listens there, and try again"
    )


def _quietly(server: type[Any]) -> type[Any]:
    """textual-serve's server with our words, for its own page alone."""

    class Quiet(server):  # type: ignore[misc]
        def initialize_logging(self) -> None:
            logging.getLogger("textual-serve").setLevel(logging.WARNING)

        async def on_startup(self, app: web.Application) -> None:
            output.note(f"for this machine alone, until Ctrl-C, the screen is at {self.public_url}")
            log = Path(self.command.rpartition("2>>")[2].strip("'"))
            output.note(f"each visit begins a run of its own; what it says besides is in {log}")

        async def _make_app(self) -> web.Application:
            app: web.Application = await super()._make_app()
            app.middlewares.append(_own_page_alone(f"{self.host}:{self.port}"))
            return app

    return Quiet


def _own_page_alone(address: str) -> Any:
    """Refuse what other pages ask for in this browser, by whatever name they call us."""
    from aiohttp import web

    @web.middleware
    async def checked(
        request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        if request.path == "/" and request.host == f"localhost:{address.partition(':')[2]}":
            raise web.HTTPFound(f"http://{address}")
        if request.host != address or request.headers.get("Origin") not in (None, f"http://{address}"):
            return web.Response(status=403, text=f"open http://{address} in a browser on this machine\n")
        response = await handler(request)
        if request.path == "/" and isinstance(response, web.Response) and response.text is not None:
            response.text = response.text.replace("</head>", f"{_HEAD}</head>", 1)
        if not response.prepared:
            response.headers["Content-Security-Policy"] = _POLICY.format(address=address)
        return response

    return checked
