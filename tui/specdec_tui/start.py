"""Where nothing was named: what there is to run, and a prompt for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from textual import events
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.content import Content
from textual.widgets import Input, OptionList, Static
from textual.widgets.option_list import Option

from specdec_tui.leaving import TerminalApp
from specdec_tui.pieces import one_line
from specdec_tui.theme import STYLES

EXAMPLE = "Explain step by step how a lighthouse works."


@dataclass(frozen=True, slots=True)
class Entry:
    """Something to choose."""

    title: str
    about: str
    kind: Literal["run", "demo", "lesson"] = "run"
    target: str = "builtin"
    draft: str | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """What was chosen."""

    entry: Entry
    prompt: str = ""


class StartApp(TerminalApp[Choice | None]):
    """Returns the choice; None where the user left."""

    TITLE = "specdec"
    ENABLE_COMMAND_PALETTE = False
    CSS = """
    Screen { background: $background; }
    #title { height: 2; padding: 0 1; background: $panel; }
    #entries { height: 1fr; border: round $border; background: $background; padding: 0 1; }
    #entries:focus { border: round $draft; }
    #prompt { height: 3; border: round $border; background: $background; padding: 0 1; }
    #prompt:focus { border: round $draft; }
    #keys { height: 1; padding: 0 1; background: $panel; color: $text-muted; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "leave", "Back", id="start.back"),
        Binding("ctrl+q", "quit", "Quit", id="start.quit", priority=True),
        Binding("ctrl+c", "end(130)", "Quit", id="start.stop", priority=True),
    ]

    def __init__(self, entries: Sequence[Entry]) -> None:
        super().__init__()
        self._entries = entries
        self._chosen = entries[0]

    def compose(self) -> ComposeResult:
        title = Content.assemble((" specdec ", STYLES["brand"]), "  speculative decoding, cycle by cycle")
        yield Static(title, id="title")
        yield OptionList(*(Option(_shown(entry)) for entry in self._entries), id="entries")
        yield Input(EXAMPLE, id="prompt", select_on_focus=True)
        yield Static(_KEYS["entries"], id="keys", markup=False)

    def on_mount(self) -> None:
        self.query_one("#prompt", Input).border_title = "prompt"
        self.query_one("#entries", OptionList).focus()

    def on_descendant_focus(self, event: events.DescendantFocus) -> None:
        self.query_one("#keys", Static).update(_KEYS.get(event.widget.id or "", ""))

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        self._chosen = self._entries[event.option_index]
        if self._chosen.kind == "run":
            self.query_one("#prompt", Input).focus()
        else:
            self.exit(Choice(self._chosen))

    def on_input_submitted(self, event: Input.Submitted) -> None:
        if event.value.strip():
            self.exit(Choice(self._chosen, event.value))

    def action_end(self, code: int) -> None:
        self.end(code)

    def action_leave(self) -> None:
        """From the prompt to the list; from the list out."""
        entries = self.query_one("#entries", OptionList)
        if entries.has_focus:
            self.exit(None)
        else:
            entries.focus()


_KEYS = {
    "entries": "↑ ↓ choose · enter: on to the prompt, or start · escape: leave",
    "prompt": "enter runs it · escape: back to the list",
}


def _shown(entry: Entry) -> Content:
    about = (f"  {one_line(entry.about)}", STYLES["muted"])
    return Content.assemble((one_line(entry.title), STYLES["strong"]), "\n", about)
