"""A run as files: the trace that can be replayed, the text, the narration."""

from __future__ import annotations

from pathlib import Path
from time import strftime

from specdec_engine.trace import TraceWriter
from specdec_tui.frame import Frame
from specdec_tui.narrate import script
from specdec_tui.pieces import Name, as_bytes

KINDS = {"trace": "jsonl", "text": "txt", "narration": "md", "picture": "svg"}


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
        path.write_bytes(b"".join(as_bytes(name(token)) for cycle in frame.cycles for token in cycle.emitted))
    else:
        path.write_text(markdown(frame, name), "utf-8")


def markdown(frame: Frame, name: Name) -> str:
    """The narration as a list."""
    return "".join(f"- {line}\n" for line in script(frame, name))
