"""A run as one HTML file that can be sent: nothing is fetched, nothing is sent, and it works from a disk. Without Textual.

All of it is in the file, under a Content-Security-Policy that allows its own script and style, by their hashes, and nothing
else. A run's text is anybody's: it is told as JSON, of which no `<` is left as such, and shown as text.
"""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Iterable
from hashlib import sha256
from html import escape
from importlib.resources import files

from specdec_engine.record.events import Event
from specdec_engine.version import VERSION
from specdec_tui.frame import Frame
from specdec_tui.narrate import script
from specdec_tui.page.told import told
from specdec_tui.pieces import Name


def html(frame: Frame, name: Name, begin: int = 0) -> str:
    """The whole page; begin: the cycle that it shows first, 0 for none."""
    parts = files(__name__)
    style, program, page = ((parts / part).read_text("utf-8") for part in ("page.css", "page.js", "page.html"))
    told_ = {**told(frame, name), "begin": begin}
    filled = {
        "style_hash": _hash(style),
        "script_hash": _hash(program),
        "style": style,
        "script": program,
        "title": escape(told_["title"]),
        "version": VERSION,
        "story": "\n".join(f"<li>{escape(line)}</li>" for line in script(frame, name)),
        "run": json.dumps(told_, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c"),
    }
    before, *rest = page.split("{")
    found = [before]
    for part in rest:  # not `format`: what is filled in holds braces of its own
        key, _, after = part.partition("}")
        found += [filled[key], after]
    return "".join(found)


def telling(frame: Frame, most: int | None = None) -> int:
    """The index of a cycle after the first few, and before `most`, in which tokens were kept and one rejected; -1 if there is
    none."""
    several = [i for i, c in enumerate(frame.cycles[:most]) if i >= 3 and 0 < c.accepted < len(c.drafted)]
    sampled = [i for i in several if any(u is not None for u in frame.cycles[i].u)]
    return next(iter(sampled or several), -1)


def _hash(source: str) -> str:
    """As a Content-Security-Policy names an inline script or style."""
    return f"sha256-{b64encode(sha256(source.encode()).digest()).decode()}"


class RunPage:
    """A run's page for a notebook, of its events: `RunPage(pair.decode(ids), TokenText(pair.tokenizer))`."""

    def __init__(self, events: Iterable[Event], name: Name) -> None:
        """name: token id -> text (`TokenText`)."""
        self._frame, self._name = Frame().plus(list(events)), name

    @property
    def html(self) -> str:
        """The whole page, as a file has it."""
        return html(self._frame, self._name)

    def _repr_html_(self) -> str:
        """In a frame of its own, which can run its script, and do nothing else."""
        page = escape(self.html, quote=True)
        return (
            f'<iframe sandbox="allow-scripts" srcdoc="{page}" style="width: 100%; height: 46rem; border: 0"></iframe>'
        )
