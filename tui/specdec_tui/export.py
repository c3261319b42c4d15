"""A run as a file that anyone can look at: a page, GIF, PNG, SVG, Markdown; pictures by the screens, without a terminal."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from specdec_engine.errors import SpecdecError, UsageError
from specdec_engine.record.files import replace_file
from specdec_tui.app import SpecdecApp
from specdec_tui.frame import Frame, View, steps
from specdec_tui.page import html, telling
from specdec_tui.pieces import Name
from specdec_tui.saving import markdown
from specdec_tui.screens.watch import WatchScreen
from specdec_tui.streams import FrameStream, read_frame

SIZE = (112, 40)
"""Cells of an exported screen."""
_CYCLE_MS, _STEP_MS, _LONG_MS = 260, 750, 2600
MOST_CYCLES = 48
"""Shown in an animation; a longer run is cut."""


def export(frame: Frame, name: Name, path: Path, cycle: int | None = None) -> None:
    """Written as the ending says. cycle: the one that a picture shows, or a page first; by default a picture shows the end,
    and a page a cycle with much to see. Raises UsageError for another ending, or a cycle that there is not, OSError where it
    cannot be written."""
    of_all: dict[str, Callable[[Frame, Name], bytes]] = {".gif": _gif, ".md": _markdown}
    of_one: dict[str, Callable[[Frame, Name, int | None], bytes]] = {".svg": _svg, ".png": _png, ".html": _html}
    if path.suffix not in (endings := [*of_one, *of_all]):
        raise UsageError(f"{path} has no ending that can be exported", f"one of {', '.join(endings)}")
    if cycle is not None and not 1 <= cycle <= len(frame.cycles):
        raise UsageError(f"there is no cycle {cycle}", f"the run has {len(frame.cycles)}")
    if path.suffix in of_one:
        replace_file(path, of_one[path.suffix](frame, name, cycle))
    elif cycle is not None:
        raise UsageError(f"{path} is of the whole run", f"one cycle is shown by {', '.join(of_one)}")
    else:
        replace_file(path, of_all[path.suffix](frame, name))


def shots(frame: Frame) -> list[tuple[View, int]]:
    """Views and their milliseconds: how it ends, for who sees no other, then cycle by cycle, one with a kept and a rejected
    token step by step."""
    view, slow = View(frame), telling(frame, MOST_CYCLES)
    found = [(view.to(min(len(frame.cycles), MOST_CYCLES)), _LONG_MS), (view.to(0), _STEP_MS)]
    for shown in range(1, min(len(frame.cycles), MOST_CYCLES) + 1):
        if shown - 1 == slow:
            parts = range(1, steps(frame.cycles[slow]))
            found += [(replace(view.to(shown), step=step), _STEP_MS) for step in parts]
            found.append((view.to(shown), _LONG_MS))
        else:
            found.append((view.to(shown), _CYCLE_MS))
    return [*found[:-1], (found[-1][0], _LONG_MS)]


def drawn(frame: Frame, name: Name, views: Iterable[View], take: Callable[[SpecdecApp], None]) -> None:
    """Let the app draw each view, and `take` what it needs."""

    async def run() -> None:
        app = SpecdecApp(FrameStream(frame, name), speed=1.0)
        async with app.run_test(size=SIZE) as pilot:
            await pilot.pause()
            screen = app.screen
            assert isinstance(screen, WatchScreen)
            screen.tick()
            app.player.playing = False
            for view in views:
                app.player.view = replace(view, frame=app.player.view.frame)
                for _ in range(2):  # a panel that appears or goes has its width only after a layout
                    screen.draw()
                    await pilot.pause()
                take(app)

    asyncio.run(run())


def _gif(frame: Frame, name: Name) -> bytes:
    from specdec_tui import raster

    raster.require()
    frames, times = list[raster.Shot](), shots(frame)
    durations = iter([ms for _, ms in times])
    drawn(
        frame,
        name,
        [view for view, _ in times],
        lambda app: frames.append(raster.Shot(raster.drawn(app.screen), next(durations))),
    )
    return raster.gif(frames)


def _png(frame: Frame, name: Name, cycle: int | None) -> bytes:
    from specdec_tui import raster

    found = list[bytes]()
    drawn(frame, name, [_view(frame, cycle)], lambda app: found.append(raster.png(app.screen)))
    return found[0]


def _svg(frame: Frame, name: Name, cycle: int | None) -> bytes:
    found = list[str]()
    drawn(frame, name, [_view(frame, cycle)], lambda app: found.append(app.export_screenshot(simplify=True)))
    return found[0].encode()


def _view(frame: Frame, cycle: int | None) -> View:
    return View(frame).end() if cycle is None else View(frame).to(cycle)


def _html(frame: Frame, name: Name, cycle: int | None) -> bytes:
    return html(frame, name, begin=telling(frame) + 1 if cycle is None else cycle).encode()


def _markdown(frame: Frame, name: Name) -> bytes:
    return markdown(frame, name).encode()


def main() -> None:
    """TRACE FILE; of what goes wrong one line."""
    try:
        export(*read_frame(Path(sys.argv[1])), Path(sys.argv[2]))
    except (OSError, SpecdecError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
