"""A run as files: the trace that can be replayed, the text, the narration, an animation."""

from __future__ import annotations

import asyncio
import sys
from asyncio.subprocess import DEVNULL, PIPE
from pathlib import Path
from tempfile import TemporaryDirectory
from time import strftime

from specdec_engine.errors import UsageError
from specdec_engine.record.files import replace_file
from specdec_engine.record.text import as_markdown
from specdec_engine.record.trace import TraceWriter
from specdec_tui.frame import Frame
from specdec_tui.narrate import script
from specdec_tui.page import html, telling
from specdec_tui.pieces import UNKNOWN, Name, as_bytes

KINDS = {
    "trace": "jsonl", "page": "html", "text": "txt", "narration": "md", "picture": "svg", "bitmap": "png", "animation": "gif",
}  # fmt: skip


def fresh_path(folder: Path, kind: str) -> Path:
    """A name that is not taken."""
    stem, ending = strftime("specdec-%Y%m%d-%H%M%S"), KINDS[kind]
    names = (f"{stem}{suffix}.{ending}" for suffix in ("", *(f"-{i}" for i in range(2, 100))))
    return next(path for path in (folder / name for name in names) if not path.exists())


def save(frame: Frame, name: Name, kind: str, path: Path) -> None:
    """Raises TraceError or OSError where it cannot be written."""
    if kind == "trace":
        with TraceWriter(path, name) as writer:
            for event in frame.events():
                writer.write(event)
    elif kind == "text":
        tokens = (token for cycle in frame.cycles for token in cycle.emitted)
        text = b"".join(UNKNOWN.encode() if token is None else as_bytes(name(token)) for token in tokens)
        replace_file(path, text)
    elif kind == "page":
        replace_file(path, html(frame, name, begin=telling(frame) + 1).encode())
    else:
        replace_file(path, markdown(frame, name).encode())


async def animate(frame: Frame, name: Name, path: Path) -> None:
    """A GIF, drawn in a process of its own: it takes some seconds, in which the screen and the engine go on.

    With -P no module is looked for in the folder that the user stands in. Raises OSError or TraceError where it cannot be
    written, UsageError without the extra.
    """
    with TemporaryDirectory() as folder:
        trace = Path(folder) / "run.jsonl"
        save(frame, name, "trace", trace)
        command = (sys.executable, "-P", "-m", "specdec_tui.export", str(trace), str(path))
        process = await asyncio.create_subprocess_exec(*command, stdin=DEVNULL, stdout=DEVNULL, stderr=PIPE)
        try:
            said = (await process.communicate())[1].decode("utf-8", "replace").strip()
        except asyncio.CancelledError:  # the screen is left
            process.kill()
            await process.wait()
            raise
    if process.returncode:
        raise UsageError(said.splitlines()[-1] if said else "the drawing process was killed", "")


def markdown(frame: Frame, name: Name) -> str:
    """The narration as a list."""
    return "".join(f"- {as_markdown(line)}\n" for line in script(frame, name))
