"""The engine behind the screen: a real pair, real threads."""

from __future__ import annotations

import threading
import time

import pytest

from specdec_engine.core.cycle_types import Sampling
from specdec_engine.errors import ModelUnavailable
from specdec_engine.models.progress import Progress
from specdec_engine.record.events import Cycle, Event, Finished, Started
from specdec_tui.live import LiveStream, Request
from specdec_tui.streams import Stage
from tests.fakes import byte_tokenizer, save_checkpoint
from tests.tui.conftest import on_screen, screen_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("m") / "t", layers=2, vocab=len(byte_tokenizer()))


@pytest.fixture
def source(folder, tmp_path):
    def load(report):
        from specdec_engine import LoadOptions, load_pair

        return load_pair(str(folder), "ngram", LoadOptions(dtype="float32", device="cpu"))

    made = LiveStream(load, Request("hello hello hello", k=3, max_tokens=120, seed=1), tmp_path / "log" / "watch.log")
    yield made
    made.close()


def until(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)


def waiting(source):
    """Whether the engine's thread stands at its gate: sleeping a while would find that on a slow machine, too."""
    return bool(source._gate._waiters)


def gathered(source, found, enough):
    def look():
        found.extend(source.drain())
        return enough(found)

    until(look)
    return found


def cycles(found):
    return [event for event in found if isinstance(event, Cycle)]


def over(found):
    return bool(found) and isinstance(found[-1], Finished)


async def shown(pilot, condition, said=lambda: ""):
    """Until the screen is so."""
    for _ in range(600):
        await pilot.pause(0.05)
        if condition():
            return
    raise AssertionError(f"it never came: {said()}"[:3000])


def test_a_run_comes_with_its_plain_speed(source):
    source.start()
    found = gathered(source, [], over)
    assert isinstance(found[0], Started)
    assert found[0].environment["plain_tokens_per_second"] > 0
    assert sum(len(c.emitted) for c in cycles(found)) == found[-1].emitted
    assert source.stage is None
    assert source.name(cycles(found)[0].emitted[0])


def test_how_much_of_the_prompt_is_read_is_told():
    stage = Stage("reading the prompt", so_far=lambda: f", {next(count):,} of 9 tokens")
    count = iter((3, 9))
    assert [stage.text, stage.text] == ["reading the prompt, 3 of 9 tokens", "reading the prompt, 9 of 9 tokens"]
    assert Stage("loading").text == "loading"


def test_the_engine_waits_between_cycles_and_runs_as_many_as_it_may(source):
    source.allow(2)
    source.start()
    found = list[Event]()
    for allowed in (2, 3):
        source.allow(allowed)
        gathered(source, found, lambda f, n=allowed: len(cycles(f)) >= n and waiting(source))
        found += source.drain()  # what came before it waited
        assert len(cycles(found)) == allowed


def test_settings_change_from_the_next_cycle_on_and_are_recorded(source):
    source.allow(2)
    source.start()
    found = gathered(source, [], lambda f: len(cycles(f)) == 2)
    assert [source.change_k(1), source.change_k(1)] == [4, 5]
    assert source.change_temperature(0.7) == 0.7
    source.allow(None)
    gathered(source, found, over)
    changed = {event.name: (event.cycle, event.new, event.reason) for event in found if event.kind == "setting_changed"}
    draft_follows = changed.pop("draft_temperature")
    assert changed == {"k": (2, 5, "set by hand"), "temperature": draft_follows}
    assert draft_follows == (2, 0.7, "set by hand")
    assert {c.k for c in cycles(found)[:2]} == {3}
    assert cycles(found)[2].k == 5


def test_auto_goes_on_and_off(source):
    source.allow(1)
    source.start()
    found = gathered(source, [], lambda f: len(cycles(f)) == 1)
    assert source.toggle_auto() is True
    source.allow(3)
    gathered(source, found, lambda f: len(cycles(f)) == 3)
    assert source.toggle_auto() is False
    source.allow(None)
    gathered(source, found, over)
    switched = [event.new for event in found if event.kind == "setting_changed" and event.name == "adaptive"]
    assert switched == [True, False]


def test_another_request_ends_the_run_and_begins_its_own(source):
    source.allow(1)
    source.start()
    found = gathered(source, [], lambda f: len(cycles(f)) == 1)
    source.again(Request("other words", k=2, max_tokens=10, seed=5, sampling=Sampling(0.5)))
    source.allow(None)
    gathered(source, found, lambda f: sum(isinstance(e, Finished) for e in f) == 2)
    first, second = [event for event in found if isinstance(event, Started)]
    assert (first.seed, second.seed, second.settings["temperature"]) == (1, 5, 0.5)
    cancelled = next(e for e in found if isinstance(e, Finished))
    assert (cancelled.reason, cancelled.emitted) == ("cancelled", len(cycles(found)[0].emitted))


def test_a_run_that_cannot_begin_leaves_the_engine_ready_for_the_next(source):
    source.start()
    found = gathered(source, [], over)
    source.again(Request("word " * 3000, seed=2))
    until(lambda: source.stage is not None and source.stage.failed)
    assert "context ends" in source.stage.text
    assert source.error is None
    source.again(Request("a shorter prompt", max_tokens=5, seed=3))
    source.allow(None)
    gathered(source, found, lambda f: over(f) and f[-1].emitted == 5)
    assert source.stage is None


def test_settings_cannot_change_before_there_is_a_run(source):
    assert (source.change_k(1), source.change_temperature(0.1), source.toggle_auto()) == (None, None, None)


def test_closing_while_loading_ends_the_thread(tmp_path):
    began = threading.Event()

    def load(report):
        began.set()
        while True:
            time.sleep(0.01)
            report(Progress("load", "x", 1, 2))

    source = LiveStream(load, Request("x"), tmp_path / "watch.log")
    source.start()
    began.wait(10)
    source.close()
    assert source.closed


def test_closing_in_the_middle_of_a_run_is_quick(source):
    source.start()
    gathered(source, [], lambda f: len(cycles(f)) >= 1)
    began = time.monotonic()
    source.close()
    assert time.monotonic() - began < 2
    assert not any(thread.name == "engine" and thread.is_alive() for thread in threading.enumerate())


@pytest.mark.parametrize("error", [ModelUnavailable("no such model", "name another"), ValueError("something else")])
def test_what_goes_wrong_while_loading_is_a_stage(tmp_path, error):
    def load(report):
        raise error

    source = LiveStream(load, Request("x"), tmp_path / "logs" / "watch.log")
    source.start()
    until(lambda: source.stage.failed)
    if isinstance(error, ModelUnavailable):
        assert (source.stage.text, source.stage.hint) == ("no such model", "name another")
    else:
        assert "something else" in source.stage.text
        assert "ValueError" in (tmp_path / "logs" / "watch.log").read_text()
    source.close()


def test_a_live_run_is_watched_paused_stepped_and_turned(source):
    async def act(app, pilot):
        async def until_so(condition):
            await shown(pilot, condition, lambda: f"{source.stage}, {app.player.__dict__}")

        view = lambda: app.player.view  # noqa: E731
        await pilot.press("space")
        await until_so(lambda: view().frame.prompt)
        first = view().shown
        await pilot.press("n")
        await until_so(lambda: view().shown == first + 1)
        await pilot.press("n")
        await until_so(lambda: view().shown == first + 2)
        held = view().shown
        await pilot.press("right_square_bracket", "right_square_bracket")
        await until_so(lambda: source.turned.k == 5)
        await pilot.press("n")
        await until_so(lambda: view().shown == held + 1)
        assert view().cycle.k == 5
        await pilot.press("T", *["plus"] * 9, "space")
        await until_so(lambda: view().frame.over and view().at_end)
        assert view().frame.setting("temperature") == 0.1
        before = view().frame.seed
        await pilot.press("R")
        await until_so(lambda: view().frame.seed != before and view().frame.over)
        return screen_of(app)

    assert "■ finished" in on_screen(source, act, speed=1 / 64)


def test_keys_for_the_engine_turn_nothing_once_the_run_is_over(source):
    """What runs next is what was asked for."""

    async def act(app, pilot):
        await shown(pilot, lambda: app.player.view.frame.over)
        await pilot.press("left_square_bracket", "right_square_bracket", "right_square_bracket", "T", "a")
        await pilot.pause(0.2)
        return source.turned

    assert on_screen(source, act) == source.request


def test_a_race_is_recorded_back_to_back_and_replayed_on_one_clock(source):
    async def act(app, pilot):
        for _ in range(600):
            await pilot.pause(0.05)
            if app.player.view.frame.over:
                break
        await pilot.press("b")
        for _ in range(600):
            await pilot.pause(0.05)
            race = getattr(app.screen, "_race", None)
            if race is not None and app.screen._clock >= race.total_s:
                break
        await pilot.pause(0.2)
        shown = screen_of(app)
        await pilot.press("home", "space", "plus", "minus", "escape")
        await pilot.pause(0.2)
        return shown, race, app.player.view, screen_of(app)

    shown, race, view, after = on_screen(source, act)
    assert race.plain.ids == race.speculative.ids
    assert "Same text ✓" in " ".join(shown.split())
    assert f"{race.speedup:.2f}×" in shown
    assert (shown.count("✓ done"), "■ finished" in shown, "▶ 1/" in shown) == (2, True, False)
    assert view.frame.cycles == race.speculative.frame.cycles
    assert "cycles" in after


def test_a_race_that_is_left_early_gives_the_run_back(source):
    async def act(app, pilot):
        await shown(pilot, lambda: app.player.view.frame.over)
        await pilot.press("b", "escape")
        await pilot.pause(0.1)
        assert source.request.k == 3
        await pilot.press("b")  # at once: what the first race had begun must not be taken for a lane of this one
        await shown(pilot, lambda: getattr(app.screen, "_race", None) is not None)
        race = app.screen._race
        assert race.plain.frame.settings["k"] == 0
        assert race.speculative.frame.settings["k"] == 3
        await pilot.press("escape", "escape")
        await pilot.pause(0.2)
        return source.request.k

    assert on_screen(source, act) == 3
