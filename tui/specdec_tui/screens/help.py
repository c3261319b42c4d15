"""Help: what the marks, the keys and the figures mean."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.screen import ModalScreen, Screen
from textual.widgets import Static

from specdec_tui.panels import Line, flowed, padded
from specdec_tui.theme import content

MARKS: tuple[tuple[str, str, str], ...] = (
    ("✓ kept", "accepted", "a guess of the draft that the target accepts"),
    ("× rejected", "rejected", "a guess that fails the test; all after it are dropped"),
    ("· never tested", "untested", "dropped after a rejection"),
    ("↳ recovered", "recovered", "the target's own token instead, drawn from max(0, p − q)"),
    ("+ bonus", "bonus", "the target's own token after a draft that was kept whole"),
    (
        "» expected",
        "draft",
        "a lookup had expected it of the draft model (ngram+MODEL), which saved a pass of that",
    ),
    ("/ branch", "muted", "in a token tree, where another guess begins for a token that has one already"),
    ("≡ forced", "accepted", "the grammar allows nothing else: a free token, in no figure of drafts"),
    ("? and none", "drafted", "a guess not tested yet; the target's own token from a pass without a draft"),
)
FIGURES: tuple[tuple[str, str], ...] = (
    ("p, q", "the target's and the draft's probability of a token, after temperature and filters; u: the number drawn."),
    ("T", "temperature: 0 is greedy; below 1 sharper, above flatter. What it and the filters do to p and q is warping."),
    ("α", "kept of those tested. Tokens after a rejection were never tested and do not count; where servers speak of an "
     "acceptance rate they mean kept of drafted, which is lower."),
    ("a cycle", "tokens of one pass of the target, its own included: the mean acceptance length."),
    ("× plain", "tokens a second against plain decoding of the same target, measured before the run, on the same machine."),
    ("by α alone", "the speedup at this cost of a cycle if every token were kept with the chance α."),
    ("overlap", "Σ min(p, q) over all tokens: how likely a guess is to be kept, before it is drawn."),
    ("k, auto", "guesses asked for in a cycle, by -k N or by [ and ]; with auto the program asks for as many as pay, k at "
     "most, which it moves itself, and for none where none do. 2/3 in a cycle's row: kept of guessed."),
    ("p below q", "the draft guesses it too often, so it is kept with chance p/q only: q · p/q = p. It is drawn by u."),
    ("nothing lost", "kept guesses bring min(p, q) of each token, corrections the rest of p. The sum is p, at every place: "
     "each text comes as likely as without a draft. The lesson shows it (watch --lesson)."),
    ("slower", "where a cycle gives fewer tokens than it costs in plain passes: few guesses kept, a dear draft, or a pass "
     "over all guesses that takes much longer than a plain one (the wider pass)."),
)  # fmt: skip
GROUPS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Moving", ("play", "next", "previous", "step", "step-back", "first", "last", "next-rejection", "next-acceptance",
                "faster", "slower")),
    ("Looking", ("inspect", "warp", "unfold", "present", "aim", "aim-back", "search", "search-next", "search-previous",
                 "focus")),
    ("The engine, live", ("k-up", "k-down", "adapt", "temperature-up", "temperature-down", "prompt", "again", "race")),
)  # fmt: skip
_KEY, _COLUMN = 15, 44


class HelpScreen(ModalScreen[None]):
    """Over the screen whose keys it tells."""

    DEFAULT_CSS = """
    HelpScreen { align: center middle; }
    HelpScreen > VerticalScroll { width: 98; max-width: 100%; height: auto; max-height: 100%; }
    HelpScreen > VerticalScroll { border: round $accent; padding: 0 1; background: $panel; scrollbar-size-vertical: 1; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,question_mark,f1", "dismiss", "Close the help", id="help.close", priority=True)
    ]

    def __init__(self, of: Screen[object]) -> None:
        super().__init__()
        self._keys = _keys(of)

    def compose(self) -> ComposeResult:
        with VerticalScroll() as box:
            box.border_title, box.border_subtitle = "help", "↑ ↓ scroll · escape closes"
            yield Static(id="help", markup=False)

    def on_resize(self) -> None:
        self.query_one("#help", Static).update(content(lines(self._keys, min(98, self.size.width) - 5)))


def _keys(screen: Screen[object]) -> dict[str, tuple[str, str]]:
    """By binding's id: the keys as shown, and what they do; those that work on this screen."""
    found = dict[str, tuple[str, str]]()
    for _, binding, enabled, _ in screen.active_bindings.values():
        if enabled and binding.id and binding.description:
            keys = f"{found[binding.id][0]} " if binding.id in found else ""
            found[binding.id] = f"{keys}{screen.app.get_key_display(binding)}", binding.description
    return found


def lines(keys: dict[str, tuple[str, str]], width: int) -> list[Line]:
    """The whole text at this width."""
    found = list[Line]()
    grouped = {name for _, names in GROUPS for name in names}
    rest = tuple(name for name in keys if name not in grouped)
    for title, names in (*GROUPS, ("Everything else", rest)):
        if shown := [keys[name] for name in names if name in keys]:
            found += [[(title, "strong")], *_in_columns(shown, max(1, width // _COLUMN), width), []]
    found.append([("Marks", "strong")])
    for mark, style, text in MARKS:
        found += _beside((mark, style), text, width)
    found += [[], [("Figures", "strong")]]
    for name, text in FIGURES:
        found += _beside((name, "key"), text, width)
    return found


def _in_columns(keys: Iterable[tuple[str, str]], columns: int, width: int) -> list[Line]:
    """Read downwards."""
    shown = list(keys)
    rows = -(-len(shown) // columns)
    by_column = [shown[i : i + rows] for i in range(0, len(shown), rows)]
    found = list[Line]()
    for row in range(rows):
        line = Line()
        for column in by_column:
            if row < len(column):
                key, text = column[row]
                line += [(f"  {padded(key, _KEY)}", "key"), (padded(text, width // columns - _KEY - 2), "")]
        found.append(line)
    return found


def _beside(label: tuple[str, str], text: str, width: int) -> list[Line]:
    """A label, and a text that flows at its right."""
    name, style = label
    flow = flowed(text, width - _KEY - 2)
    return [
        [("  ", ""), (name, style), (" " * (_KEY - len(name)), ""), *flow[0]],
        *([(" " * (_KEY + 2), ""), *line] for line in flow[1:]),
    ]
