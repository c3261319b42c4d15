"""The start screen: everything there is to run, and a prompt."""

from __future__ import annotations

import asyncio

from specdec_tui.start import EXAMPLE, Choice, Entry, StartApp
from tests.tui.conftest import screen_of

ENTRIES = [
    Entry("the built-in pair", "98 MB"),
    Entry("a recorded run", "no model", "demo"),
    Entry("org/large", "1.2 GB", "run", "org/large", "ngram,org/small"),
]


def started(*keys, size=(80, 24)):
    async def run():
        app = StartApp(ENTRIES)
        async with app.run_test(size=size) as pilot:
            await pilot.pause(0.1)
            for key in keys:
                await pilot.press(key)
                await pilot.pause()
            shown = screen_of(app) if app.is_running else ""
        return app.return_value, shown

    return asyncio.run(run())


def test_it_says_what_there_is_to_run():
    _, shown = started()
    for entry in ENTRIES:
        assert entry.title in shown
        assert entry.about in shown
    assert EXAMPLE in shown


def test_enter_twice_runs_the_first_with_the_example():
    assert started("enter", "enter")[0] == Choice(ENTRIES[0], EXAMPLE)


def test_a_prompt_can_be_typed_for_another_model():
    assert started("down", "down", "enter", "H", "i", "enter")[0] == Choice(ENTRIES[2], "Hi")


def test_what_needs_no_prompt_starts_at_once():
    assert started("down", "enter")[0] == Choice(ENTRIES[1])


def test_escape_goes_back_and_then_out():
    assert started("enter", "escape", "down", "enter")[0] == Choice(ENTRIES[1])
    assert started("escape")[0] is None


def test_an_empty_prompt_is_not_run():
    assert started("enter", "delete", "enter")[0] is None
