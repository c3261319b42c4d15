"""The lesson: the watch screen on a bundled run, a page of text above it, and two experiments."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.widgets import Static

from specdec_tui.lesson import ENOUGH, Lesson, State
from specdec_tui.panels import Line, PanelContent, flowed
from specdec_tui.panels.toy import branches, curve, histograms, stacks
from specdec_tui.player import Player
from specdec_tui.questions import Question
from specdec_tui.screens.ask import AskPair
from specdec_tui.screens.watch import WatchScreen
from specdec_tui.streams import EventStream
from specdec_tui.theme import content
from specdec_tui.toy import MOST, Branches, Draws, ToyPair
from specdec_tui.widgets.board import Board
from specdec_tui.widgets.keys import Mode

_KEYS = "⏎ ⌫ pages · q leaves"
_TOYS = ("stacks", "draws", "branches")
"""Pages that draw from five tokens."""
_AT_ONCE = 100
"""Draws a tick, so that the histograms are seen to meet."""


def _asked(question: Question, answer: int | None, width: int) -> list[Line]:
    """The question; with an answer, which was right, and why."""
    lines = flowed(question.text, width, "strong")
    for number, choice in enumerate(question.choices):
        right, chosen = number == question.right, number == answer
        mark = "  " if answer is None else "✓ " if right else "× " if chosen else "  "
        style = "" if answer is None else "accepted" if right else "refused" if chosen else "muted"
        lines.append([(f"{mark}{number + 1}  {choice}", style)])
    if answer is None:
        return [*lines, [("□ ", "muted"), ("press 1, 2 or 3; enter goes on without", "key")]]
    return [*lines, *flowed(question.why, width), [("enter for the next page", "key")]]


def recap(lesson: Lesson, width: int) -> PanelContent:
    """What to remember of each page, and how many questions were answered right."""
    lines = list[Line]()
    for at, page in enumerate(lesson.pages):
        if (question := page.question) is None:
            continue
        answer = lesson.answers.get(at)
        mark = (
            ("· ", "muted") if answer is None else ("✓ ", "accepted") if answer == question.right else ("× ", "refused")
        )
        first, *more = flowed(question.recap, max(20, width - 6))
        lines += [[mark, *first], *([("  ", ""), *line] for line in more)]
    right, asked = lesson.score
    return PanelContent(f"{right} of {asked} questions answered right", lines)


class LessonScreen(WatchScreen):
    """Pages; each is ticked when its thing is done."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "done", "Next page, when this one is done", id="lesson.done", priority=True),
        Binding("pagedown", "turn(1)", "Next page", id="lesson.next", priority=True),
        Binding("backspace,pageup", "turn(-1)", "Previous page", id="lesson.previous", priority=True),
        Binding("e", "edit", "p and q by hand", id="lesson.edit"),
        *(
            Binding(str(n), f"answer({n - 1})", f"Answer {n}", id=f"lesson.answer-{n}", priority=True)
            for n in (1, 2, 3)
        ),
    ]
    CSS = """
    LessonScreen #page { height: auto; padding: 0 1; background: $panel; border-left: thick $accent; }
    LessonScreen #experiment { display: none; height: 1fr; border: round $border; padding: 0 1; }
    LessonScreen.-experiment #experiment { display: block; }
    LessonScreen.-experiment #board { display: none; }
    LessonScreen #header, LessonScreen #figures { display: none; }
    LessonScreen.-medium #middle, LessonScreen.-wide #middle, LessonScreen #right { display: none; }
    LessonScreen #middle .aside { display: none; }
    LessonScreen.-medium.-inspecting #middle, LessonScreen.-wide.-inspecting #middle { display: block; }
    LessonScreen.-narrow.-inspecting #left, LessonScreen.-narrow.-inspecting #scrubber { display: none; }
    """

    def __init__(self, stream: EventStream, player: Player, lesson: Lesson) -> None:
        super().__init__(stream, player)
        self._lesson, self._seen = lesson, State(player.view)
        self._drawing = self._unsure = False

    def compose(self) -> ComposeResult:
        yield Static(id="page", markup=False)
        yield Static(id="experiment", markup=False)
        yield Board(self._stream.name)

    def on_mount(self) -> None:
        super().on_mount()
        self._player.feed(self._stream.drain())
        self.action_turn(0)

    def tick(self) -> None:
        if self._drawing:
            toy = self._toy
            toy.more(min(_AT_ONCE, self._enough - toy.made))
            self._drawing = toy.made < self._enough
            self._drawn = None
        super().tick()

    def draw(self) -> None:
        """The page, and the run or the experiment under it."""
        page, width = self._lesson.page, self.size.width - 6
        self._seen.view = self._player.view
        self._lesson.look(self._seen)
        self.query_one("#page", Static).update(content(self._page(max(20, width))))
        if page.shows == "run":
            super().draw()
            return
        match page.shows:
            case "stacks":
                self._experiment(stacks(self._seen.draws, width))
            case "draws":
                self._experiment(histograms(self._seen.draws, width))
            case "branches":
                self._experiment(branches(self._seen.branches, width))
            case "curve":
                self._experiment(curve(self._seen.what, width))
            case _:
                self._experiment(recap(self._lesson, width))

    @property
    def _enough(self) -> int:
        """Draws in all, after this page."""
        return 2 * ENOUGH if self._lesson.page.shows == "draws" else ENOUGH

    @property
    def _toy(self) -> Draws | Branches:
        """What this page draws from."""
        return self._seen.branches if self._lesson.page.shows == "branches" else self._seen.draws

    def _experiment(self, drawn: PanelContent) -> None:
        box = self.query_one("#experiment", Static)
        box.border_title = content([[(drawn.title, "muted")]])
        toy = self._lesson.page.shows in _TOYS
        box.border_subtitle = content([[("e", "key"), (" p and q by hand", "muted")]]) if toy else ""
        box.update(content(drawn.lines), layout=False)

    def _page(self, width: int) -> list[Line]:
        lesson, page = self._lesson, self._lesson.page
        where = f"{lesson.at + 1} of {len(lesson.pages)}  "
        gap = width - len(where) - len(page.title) - len(_KEYS)
        keys = " " * gap + _KEYS if gap > 1 else ""
        title: Line = [(where, "muted"), (page.title, "strong"), (keys, "muted")]
        if lesson.asking and page.question is not None:
            return [title, *_asked(page.question, lesson.answers.get(lesson.at), width)]
        if lesson.at not in lesson.ticked:
            skip = [("; enter again skips this", "muted")] if self._unsure else []
            return [title, *flowed(page.text, width), [("□ ", "muted"), (page.task, "key"), *skip]]
        last = "q leaves; specdec watch shows a run of your own"
        onward = last if page.question is None else "enter for a question about it"
        return [title, *flowed(page.text, width), [("✓ ", "accepted"), (onward, "key")]]

    # -- keys --------------------------------------------------------------------------------------------------------

    def action_done(self) -> None:
        """The page's question, and then the next page; before this one is done only if it is said twice."""
        lesson = self._lesson
        if lesson.at in lesson.ticked and not lesson.asking and lesson.page.question is not None:
            lesson.asking, self._drawn = True, None
            self.draw()
        elif lesson.at in lesson.ticked or self._unsure:
            self.action_turn(1)
        else:
            self._unsure, self._drawn = True, None
            self.draw()

    def action_answer(self, choice: int) -> None:
        self._lesson.answer(choice)
        self._drawn = None
        self.draw()

    def action_turn(self, by: int) -> None:
        """Another page, at its beginning, and with the lesson's own pair: what it says is of that."""
        self._lesson.turn(by)
        if self._seen.draws.pair != ToyPair():
            self._seen.draws, self._seen.branches = Draws(), Branches()
        self._unsure = False
        page = self._lesson.page
        self._player.playing, self._drawing = False, False
        self._player.view = page.view(self._player.view.frame)
        if page.what is not None:
            self._seen.what = page.what
        self.set_class(page.shows != "run", "-experiment")
        self.set_class(page.inspects, "-inspecting")
        self._drawn = None
        self.call_after_refresh(self.draw)

    @property
    def _mode(self) -> Mode:
        return "lesson"

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """k and α are turned on the pages about them."""
        if action == "present":
            return False
        if action == "edit":
            return self._lesson.page.shows in _TOYS
        if action in ("k", "temperature"):
            return self._lesson.page.shows == "curve"
        return super().check_action(action, parameters)

    @work
    async def action_edit(self) -> None:
        """Another pair, whose draws begin anew."""
        typed = await self.app.push_screen_wait(AskPair(self._seen.draws.pair))
        if typed is not None:
            pair = ToyPair.typed(typed)
            self._seen.draws, self._seen.branches = Draws(pair), Branches(pair)
            self._drawing, self._drawn = True, None
            self.tick()

    def action_play(self) -> None:
        if self._lesson.page.shows in _TOYS:
            self._drawing = self._toy.made < self._enough
        elif self._lesson.page.shows == "run":
            super().action_play()

    def action_k(self, by: int) -> None:
        what = self._seen.what
        self._seen.what = replace(what, k=max(0, min(MOST, what.k + by)))
        self.draw()

    def action_temperature(self, by: float) -> None:
        """Of the page's draft, the chance that a guess is kept: the key that is one for temperature in a run."""
        what = self._seen.what
        self._seen.what = replace(what, alpha=round(max(0.0, min(0.9, what.alpha - by)), 1))
        self.draw()
