"""The run, cycle by cycle: text, ladder, the decision, and what it costs."""

from __future__ import annotations

import math
from asyncio import sleep
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic, thread_time
from typing import ClassVar, Literal

from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.events import Key
from textual.screen import Screen

from specdec_engine.errors import SpecdecError
from specdec_engine.record.text import printable
from specdec_tui import raster
from specdec_tui.display import DrawThrottle
from specdec_tui.frame import View
from specdec_tui.live import LiveStream, Request
from specdec_tui.narrate import ending, step_words
from specdec_tui.player import Player
from specdec_tui.saving import KINDS, animate, fresh_path, save
from specdec_tui.screens.ask import AskKind, AskPrompt, AskWord
from specdec_tui.screens.race import RaceScreen
from specdec_tui.served import ServerStream
from specdec_tui.streams import EventStream, Stage
from specdec_tui.widgets.board import Board, Status
from specdec_tui.widgets.keys import Mode
from specdec_tui.widgets.scrubber import Scrubber
from specdec_tui.widgets.stream import Stream
from specdec_tui.widgets.view_lines import ViewLines
from specdec_tui.words import containing

REMARK_S = 3.0
TICK_S = 1 / 15
"""Screens are drawn so often, or less where an engine runs at full speed (`display.py`); the engine never waits for them."""


@dataclass(frozen=True, slots=True)
class Guide:
    """What is said to somebody who sees this for the first time."""

    first: str
    """Before the first cycle."""
    last: str
    """After the last."""


class WatchScreen(Screen[None]):
    """Draws a player's view, and turns keys into its commands."""

    CSS_PATH = "watch.tcss"
    HORIZONTAL_BREAKPOINTS = [(0, "-slim"), (40, "-narrow"), (110, "-medium"), (170, "-wide")]  # noqa: RUF012
    VERTICAL_BREAKPOINTS = [(0, "-tiny"), (16, "-short"), (36, "-tall"), (46, "-huge")]  # noqa: RUF012
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("space", "play", "Pause or play", id="play", priority=True),
        Binding("n,right,j", "cycle(1)", "Next cycle", id="next"),
        Binding("p,left,k", "cycle(-1)", "Previous cycle", id="previous"),
        Binding("full_stop,shift+right", "step(1)", "Step within the cycle", id="step"),
        Binding("comma,shift+left", "step(-1)", "Step back", id="step-back"),
        Binding("home", "first", "First cycle", id="first"),
        Binding("end", "last", "Newest cycle", id="last"),
        Binding("exclamation_mark", "find('rejection')", "Next rejection", id="next-rejection"),
        Binding("at", "find('acceptance')", "Next full acceptance", id="next-acceptance"),
        Binding("plus,equals_sign", "faster(1)", "Faster", id="faster"),
        Binding("minus", "faster(-1)", "Slower", id="slower"),
        Binding("i", "inspect", "Inspect", id="inspect"),
        Binding("w", "warp", "Before and after warping", id="warp"),
        Binding("o", "unfold", "Prompt: fold or unfold", id="unfold"),
        Binding("v,f5", "present", "Presenter mode", id="present"),
        Binding("tab", "app.focus_next", "Next panel", id="focus", show=False),
        Binding("slash", "search", "Find text", id="search"),
        Binding("N", "search_again(1)", "Next match", id="search-next"),
        Binding("P", "search_again(-1)", "Previous match", id="search-previous"),
        Binding("right_square_bracket", "k(1)", "k + 1", id="k-up"),
        Binding("left_square_bracket", "k(-1)", "k - 1", id="k-down"),
        Binding("a", "adapt", "k auto on or off", id="adapt"),
        Binding("T", "temperature(0.1)", "Temperature + 0.1", id="temperature-up"),
        Binding("t", "temperature(-0.1)", "Temperature - 0.1", id="temperature-down"),
        Binding("r", "prompt", "Another prompt", id="prompt"),
        Binding("R", "again", "Same prompt, new seed", id="again"),
        Binding("b", "race", "Race against plain decoding", id="race"),
        Binding("s", "save", "Save", id="save"),
        Binding("l", "aim(1)", "Next token of the cycle", id="aim"),
        Binding("h", "aim(-1)", "Previous token of the cycle", id="aim-back"),
    ]

    def __init__(self, stream: EventStream, player: Player, guide: Guide | None = None) -> None:
        super().__init__()
        self._stream, self._player, self._guide = stream, player, guide
        self._live = stream if isinstance(stream, LiveStream) else None
        self._asked = stream if isinstance(stream, LiveStream | ServerStream) else None
        self._word, self._remark, self._remark_until = "", "", 0.0
        self._racing = False
        self._ticked, self._throttle = monotonic(), DrawThrottle()
        self._since, self._waited = self._ticked, 0
        self._drawn: tuple[View, bool, float, Stage | None, int, str] | None = None

    def compose(self) -> ComposeResult:
        yield Board(self._stream.name)

    def on_mount(self) -> None:
        self.query_one(Stream).focus()
        self.set_interval(TICK_S, self.tick)
        self.call_after_refresh(self.tick)

    def on_resize(self) -> None:
        self.call_after_refresh(self.draw)

    # -- time --------------------------------------------------------------------------------------------------------

    def tick(self) -> None:
        """Take what has come, move the head, draw what changed."""
        now = monotonic()
        elapsed, self._ticked = now - self._ticked, now
        if self._racing:  # the events are the race's
            return
        self._player.feed(self._stream.drain())
        self._player.tick(elapsed)
        self._stream.allow(self._player.allowed)
        stage = self._stream.stage
        self._since = now if stage is None or stage.failed else self._since
        self._waited = int(now - self._since)
        state = self._player.view, self._player.playing, self._player.speed, stage, self._waited, self.remark
        used = thread_time()
        if state != self._drawn and (not self._at_full_speed or self._throttle.may_draw(now, used)):
            self._drawn = state
            self._throttle.drawing(now, used)
            self.draw()

    @property
    def _at_full_speed(self) -> bool:
        return self._live is not None and self._player.playing and self._player.speed == math.inf

    def draw(self) -> None:
        """Everything, from the player's view."""
        view, over = self._player.view, self._player.view.frame.over
        end = "live" if self._player.live and not over else "end"
        cost = self._throttle.share if self._at_full_speed else None
        said = Status(
            self._state(),
            self._narration(),
            end,
            self._player.playing,
            self._mode,
            self._stream.stage,
            cost,
            self._waited,
        )
        with self.app.batch_update():
            self.query_one(Board).show(view, said)

    @property
    def _mode(self) -> Mode:
        """The kind of keys that matter."""
        if self._player.presenting:
            return "presenting"
        return "recorded" if self._live is None else "live"

    def _narration(self) -> str:
        view, guide = self._player.view, self._guide
        if self.remark:
            return self.remark
        if guide is not None and not view.shown:
            return guide.first
        if view.at_end and view.frame.over and view.shown:
            end, more = ending(view.frame), step_words(view, self._stream.name) if guide is None else guide.last
            # Two lines, three on a narrow screen: what does not fit whole is left out, and is said one cycle back.
            room = (self.size.width - 6) * (3 if self.has_class("-narrow") else 2)
            return f"{end} {more}" if guide is not None or len(end) + len(more) < room else end
        return step_words(view, self._stream.name)

    def _state(self) -> str:
        player, over = self._player, self._player.view.frame.over
        if player.view.at_end and over:
            return "■ finished" if player.view.frame.failed is None else "× broken"
        if player.presenting:
            return "▶ presenting" if player.playing else "‖ presenting"
        return f"▶ {player.speed_name}" if player.playing else "‖ paused"

    # -- keys --------------------------------------------------------------------------------------------------------

    def _do(self, command: Callable[[], object]) -> None:
        self._remark_until = 0.0
        command()
        self.tick()

    def action_play(self) -> None:
        self._do(self._player.toggle)

    def action_cycle(self, by: int) -> None:
        self._do(lambda: self._player.cycle(by))

    def action_step(self, by: int) -> None:
        self._do(lambda: self._player.step(by))

    def action_first(self) -> None:
        self._do(lambda: self._player.to(0))

    def action_last(self) -> None:
        self._do(self._player.end)

    def action_find(self, wanted: Literal["rejection", "acceptance"]) -> None:
        found = self._player.find(wanted)
        self._do(lambda: None)
        if not found:
            self._say(f"no {wanted} after this cycle")

    def action_faster(self, by: int) -> None:
        self._do(lambda: self._player.faster(by))

    def action_aim(self, by: int) -> None:
        self._do(lambda: self._player.aim(by))

    def action_warp(self) -> None:
        """Where the inspector is not on screen, it comes with it."""
        self._player.warp()
        if self._player.view.warping:
            self.add_class("-inspecting")
        self.call_after_refresh(self.draw)

    def action_present(self) -> None:
        """Fewer panels, so that the terminal's type can be large; it plays by steps, and stops where a draft is decided."""
        self._player.present()
        self.set_class(self._player.presenting, "-presenting")
        self.remove_class("-inspecting")
        self._remark_until = 0.0
        if self._player.presenting:
            self._say("presenter mode: space plays to the next decision, v leaves")
        self.call_after_refresh(self.draw)

    def action_unfold(self) -> None:
        self._do(self._player.unfold)

    # -- questions -----------------------------------------------------------------------------------------------------

    @work
    async def action_search(self) -> None:
        word: str | None = await self.app.push_screen_wait(AskWord())
        self._word = word or self._word
        self.action_search_again(1)

    def action_search_again(self, direction: int) -> None:
        view = self._player.view
        if not self._word:
            return
        found = containing(view.frame, self._stream.name, self._word, view.shown, direction)
        if found is None:
            self._say(f"“{printable(self._word)}” is not in the text")
        else:
            self._do(lambda: self._player.to(found.shown))
            self._say(f"“{printable(self._word)}”: {found.number} of {found.total}")

    @work
    async def action_save(self) -> None:
        try:
            folder = Path.cwd()
        except OSError as error:  # it is gone
            self.notify(f"not saved: {error}", severity="error", markup=False)
            return
        if (kind := await self.app.push_screen_wait(AskKind(KINDS, str(folder)))) is None:
            return
        frame, name = self._player.view.frame, self._stream.name
        self.app.clear_notifications()  # a picture would show them
        self._remark_until = 0.0
        await sleep(0.1)
        try:
            path = fresh_path(folder, kind)
            if kind == "picture":
                path.write_text(self.app.export_screenshot(simplify=True), "utf-8")
            elif kind == "bitmap":
                path.write_bytes(raster.png(self))
            elif kind == "animation":
                self.notify(f"drawing {path.name}; who quits before it is saved has none", timeout=60, markup=False)
                await animate(frame, name, path)
            else:
                save(frame, name, kind, path)
        except (OSError, SpecdecError) as error:
            self.notify(f"not saved: {error}", severity="error", markup=False)
        else:
            self._say(f"saved {path.name}")

    # -- the engine ------------------------------------------------------------------------------------------------------

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Keys that turn the engine's settings are for live runs."""
        if action in ("inspect", "warp") and self._player.presenting:
            return False
        return action not in _ENGINE_ACTIONS or action in self._stream.steers

    def on_key(self, event: Key) -> None:
        """Of a recorded run, or of a server's, nothing would tell that they are."""
        action = _ENGINE_KEYS.get(event.key)
        if action is not None and not self.check_action(action, ()):
            self._say(self._stream.unsteered)

    def action_k(self, by: int) -> None:
        self._turn("k", lambda live: live.change_k(by))

    def action_temperature(self, by: float) -> None:
        self._turn("temperature", lambda live: live.change_temperature(by))

    def action_adapt(self) -> None:
        self._turn("k auto", LiveStream.toggle_auto)

    def _turn(self, name: str, turn: Callable[[LiveStream], float | None]) -> None:
        """While a run is under way; and say what its next cycle will run with."""
        value = None if self._live is None or self._player.view.frame.over else turn(self._live)
        if value is None:
            loading = self._stream.stage is not None
            self._say("nothing runs yet" if loading else "no run is under way: r begins another")
            return
        shown = ("on" if value else "off") if isinstance(value, bool) else f"{value:g}"
        self._say(f"{name} is {shown} from the next cycle")

    def _say(self, text: str) -> None:
        """Say it for a moment in the narration's place: a toast would cover what it speaks of."""
        if self._player.view.frame.run:
            self._remark, self._remark_until = text, monotonic() + REMARK_S
        else:  # while there is nothing to show, there is no narration either
            self.app.clear_notifications()
            self.notify(text, timeout=REMARK_S, markup=False)

    @property
    def remark(self) -> str:
        """The answer to a key; empty when its moment is over."""
        return self._remark if monotonic() < self._remark_until else ""

    @work
    async def action_prompt(self) -> None:
        asked = self._asked
        if asked is not None and (text := await self.app.push_screen_wait(AskPrompt(asked.request.prompt))):
            self._restart(replace(asked.turned, prompt=text))

    def action_again(self) -> None:
        if self._asked is not None:
            self._restart(replace(self._asked.turned, seed=None))

    @work
    async def action_race(self) -> None:
        if self._live is None:
            return
        self._racing = True
        run = await self.app.push_screen_wait(RaceScreen(self._live))
        self._racing = False
        if run is not None:
            self._player.feed(run.events())
            self._player.end()
            self._say("this is the race's run; r or R begins another")
        else:  # the engine has given the run up for the race
            self._live.again(self._live.request)
            self._say("the race was left: your run begins anew")

    def _restart(self, request: Request) -> None:
        if self._asked is not None:
            self._asked.again(request)
            self._say("another run begins")

    def action_inspect(self) -> None:
        self.toggle_class("-inspecting")
        self.call_after_refresh(self.draw)

    def on_view_lines_pointed(self, event: ViewLines.Pointed) -> None:
        if event.cycle < 0:  # the prompt
            self.action_unfold()
        else:
            self._do(lambda: self._player.point(event.cycle, event.position))

    def on_scrubber_moved(self, event: Scrubber.Moved) -> None:
        self._do(lambda: self._player.to(event.shown))


_ENGINE_ACTIONS = ("k", "adapt", "temperature", "prompt", "again", "race")
_ENGINE_KEYS = {
    key: binding.action.partition("(")[0]
    for binding in WatchScreen.BINDINGS
    if isinstance(binding, Binding) and binding.action.partition("(")[0] in _ENGINE_ACTIONS
    for key in binding.key.split(",")
}
