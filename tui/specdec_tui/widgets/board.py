"""Everything of the watch screen that shows something: a function of a view and what is said about it."""

from __future__ import annotations

from dataclasses import dataclass

from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical
from textual.widgets import Static

from specdec_tui.frame import View
from specdec_tui.panels import PanelContext, acceptance, control, fitted, flowed, header, timing
from specdec_tui.panels.inspector import inspector
from specdec_tui.panels.presented import presented
from specdec_tui.panels.table import table
from specdec_tui.pieces import Name, one_line
from specdec_tui.streams import Stage
from specdec_tui.theme import content
from specdec_tui.widgets.keys import Keys, Mode
from specdec_tui.widgets.ladder import Ladder
from specdec_tui.widgets.panel import PanelBox
from specdec_tui.widgets.scrubber import Scrubber
from specdec_tui.widgets.stream import Stream
from specdec_tui.widgets.view_lines import ViewLines

ASIDE = {
    "by-position": acceptance.positions,
    "throughput": timing.throughput,
    "time-split": timing.time_split,
    "made-of": timing.made_of,
    "k": control.k_over_time,
    "memory": control.memory,
}


@dataclass(frozen=True, slots=True)
class Status:
    """What stands beside the view's own content."""

    state: str
    """Playing, paused or finished."""
    narration: str
    end: str
    """What the right end of the scrubber is called."""
    playing: bool
    mode: Mode
    stage: Stage | None
    display_cost: float | None
    """What drawing takes, as a share of one core; None where no engine is slowed by it."""
    waited: int = 0
    """Seconds for the first event."""


class Board(Vertical):
    """Text, cycles, panels; or, while there is nothing to show, why."""

    def __init__(self, name: Name) -> None:
        super().__init__(id="board")
        self._token_name = name

    def compose(self) -> ComposeResult:
        name = self._token_name
        yield Static(id="header", markup=False)
        yield Static(id="figures", markup=False)
        yield Static(id="notice", markup=False)
        yield Static("specdec needs 40 columns and 16 lines", id="small")
        with Horizontal(id="body"):
            with Vertical(id="left"):
                yield Stream(name)
                yield PanelBox(presented, name, id="presented")
                yield Ladder(name)
            with Vertical(id="middle"):
                yield PanelBox(inspector, name, id="inspector")
                for key, panel in ASIDE.items():
                    box = PanelBox(panel, name, id=f"aside-{key}")
                    box.add_class("aside")
                    yield box
            with Vertical(id="right"):
                yield PanelBox(table, name, id="table")
                for key, panel in {**ASIDE, "rolling": acceptance.rolling}.items():
                    yield PanelBox(panel, name, id=f"right-{key}")
        yield Static(id="narration", markup=False)
        yield Scrubber()
        yield Keys(id="keys")

    def show(self, view: View, status: Status) -> None:
        """Draw it."""
        waiting = not view.frame.run
        self.set_class(waiting, "-waiting")
        context = PanelContext(self.size.width, self._token_name)
        self._static("header", [header.header(view, context, status.state)])
        if waiting:
            self._static("notice", notice(status.stage, status.waited))
            return
        self._static("figures", [header.figures(view, context)])
        troubled = status.stage is not None and status.stage.failed
        style = "refused" if troubled else ""
        said_now = f"{status.stage.text}. {status.stage.hint}" if status.stage is not None else status.narration
        told = flowed(one_line(said_now), max(1, self.size.width - 2), style)
        rows = max(1, self.query_one("#narration").size.height or 2)
        if len(told) > rows:  # what is cut must be seen to be
            rest = " ".join(text for line in told[rows - 1 :] for text, _ in line)
            told = [*told[: rows - 1], [(fitted(rest, self.size.width - 2), style)]]
        self._static("narration", told)
        for lines in self.query(ViewLines):
            lines.show(view)
        for box in self.query(PanelBox):
            if box.parent is not None and box.parent.display:
                box.show(view)
        self.query_one(Scrubber).show(view, status.end)
        self.query_one(Keys).show(status.playing, status.mode, status.display_cost)

    def _static(self, name: str, lines: list[list[tuple[str, str]]]) -> None:
        self.query_one(f"#{name}", Static).update(content(lines), layout=False)


def notice(stage: Stage | None, waited: int = 0) -> list[list[tuple[str, str]]]:
    """What stands in the middle while there is nothing to show, and for how many seconds."""
    if stage is None:
        return [[("reading", "muted")]]
    if stage.failed:
        return [[("× ", "refused"), (one_line(stage.text), "strong")], [], [(one_line(stage.hint), "muted")]]
    clock = [(f"  {waited} s", "muted")] if waited else []
    return [[(one_line(stage.text), "strong"), *clock], [(one_line(stage.hint), "muted")]]
