"""A model hub on this machine: just enough of the protocol for huggingface_hub's real client."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def hub(repositories: dict[str, Path], gated: str = "org/gated") -> Iterator[str]:
    """Serves folders as repositories; one name is gated, all others do not exist. Yields the endpoint."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            path = unquote(self.path.split("?")[0]).strip("/")
            name = next((n for n in [*repositories, gated] if f"{n}/" in f"{path}/"), None)
            if name is None:
                return self.send(
                    401, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
                )
            if name == gated:
                return self.send(403, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
            folder = repositories[name]
            if path.startswith("api/"):
                files = sorted(p.name for p in folder.iterdir())
                if "/tree/" in path:
                    tree = [
                        {"type": "file", "path": f, "size": (folder / f).stat().st_size, "oid": digest(folder / f)[:40]}
                        for f in files
                    ]
                    return self.send(200, json.dumps(tree).encode(), {}, body)
                info = {"id": name, "modelId": name, "sha": COMMIT, "siblings": [{"rfilename": f} for f in files]}
                return self.send(200, json.dumps(info).encode(), {}, body)
            file = folder / path.rsplit("/", 1)[-1]
            if not file.is_file():
                return self.send(404, b"", {"X-Error-Code": "EntryNotFound"})
            headers = {"ETag": f'"{digest(file)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            self.send(200, file.read_bytes(), headers, body)

        def send(self, status: int, data: bytes, headers: dict[str, str], body: bool = True) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(data)), "Content-Type": "application/json"}.items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(data)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
