"""Small questions in front of the run: a prompt, a word to find, what to save."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import Input, OptionList, Static, TextArea
from textual.widgets.option_list import Option

from specdec_tui.toy import TOKENS, ToyPair


class Ask(ModalScreen[str | None]):
    """A box in the middle; escape leaves it unanswered."""

    DEFAULT_CSS = """
    Ask { align: center middle; }
    Ask > Vertical { width: 76; max-width: 96%; height: auto; max-height: 80%; }
    Ask > Vertical { border: round $accent; padding: 0 1; background: $panel; }
    Ask TextArea { height: 9; border: none; }
    Ask OptionList { border: none; height: auto; background: $panel; }
    Ask .hint { color: $text-muted; height: 1; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "dismiss(None)", "Back", id="ask.back")]


class AskPrompt(Ask):
    """The prompt of another run."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter,ctrl+s", "run", "Run", id="ask.run", priority=True),
        Binding("ctrl+j", "line", "New line", id="ask.line", priority=True),
    ]

    def __init__(self, prompt: str) -> None:
        super().__init__()
        self._prompt = prompt

    def compose(self) -> ComposeResult:
        with Vertical() as box:
            box.border_title = "prompt"
            yield TextArea(self._prompt, id="prompt")
            yield Static("enter runs it · ctrl+j: a new line · escape leaves it", classes="hint")

    def on_mount(self) -> None:
        self.query_one(TextArea).select_all()  # typing replaces it

    def action_line(self) -> None:
        self.query_one(TextArea).insert("\n")

    def action_run(self) -> None:
        text = self.query_one(TextArea).text
        if text.strip():
            self.dismiss(text)


class AskPair(Ask):
    """A box for what the lesson's target and draft say, by hand: two lines of five numbers, so that no key is lost on the way
    from one field to another."""

    DEFAULT_CSS = """
    AskPair { align: center bottom; }
    AskPair TextArea, AskPair TextArea:focus { height: 2; border: none; padding: 0; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [Binding("enter", "take", "Draw anew", id="ask.take", priority=True)]

    def __init__(self, pair: ToyPair) -> None:
        super().__init__()
        self._pair = pair

    def compose(self) -> ComposeResult:
        with Vertical() as box:
            box.border_title = f"p and q of {', '.join(TOKENS)}"
            yield Static("the target's p, and under it the draft's q", classes="hint")
            lines = (" ".join(f"{value:.2f}" for value in values) for values in (self._pair.p, self._pair.q))
            yield TextArea("\n".join(lines), id="pair")
            yield Static(
                "enter draws anew · escape leaves it · the next page has its own again", id="said", classes="hint"
            )

    def action_take(self) -> None:
        text = self.query_one(TextArea).text
        try:
            ToyPair.typed(text)
        except ValueError as error:
            self.query_one("#said", Static).update(str(error))
        else:
            self.dismiss(text)


class AskWord(Ask):
    """What to look for."""

    def compose(self) -> ComposeResult:
        with Vertical() as box:
            box.border_title = "find in the text"
            yield Input(id="word", compact=True)

    def on_input_submitted(self, event: Input.Submitted) -> None:
        self.dismiss(event.value or None)


class AskKind(Ask):
    """What to save."""

    def __init__(self, kinds: dict[str, str], folder: str) -> None:
        """folder: where it goes."""
        super().__init__()
        self._kinds, self._folder = kinds, folder

    def compose(self) -> ComposeResult:
        with Vertical() as box:
            box.border_title = "save"
            yield OptionList(*(Option(f"{kind} (.{ending})", id=kind) for kind, ending in self._kinds.items()))
            yield Static(f"into {self._folder}", classes="hint", markup=False)

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        self.dismiss(event.option.id)
