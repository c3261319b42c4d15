"""The watch screen, as text: at three sizes, under every key, in every state."""

from __future__ import annotations

from dataclasses import replace

import pytest

from specdec_engine.record.events import Failed, SettingChanged
from specdec_tui.frame import View
from specdec_tui.panels import PanelContext, header
from specdec_tui.saving import KINDS
from specdec_tui.screens.watch import WatchScreen
from specdec_tui.streams import Stage
from tests.tui.conftest import Told, lines_of, on_screen, screen_of
from tests.tui.scenes import events, frame, name

SIZES = [(80, 24), (120, 40), (200, 60)]


def pressed(source, *keys, size=(120, 40), speed=float("inf")):
    """The screen after these keys."""

    async def act(app, pilot):
        for key in keys:
            await pilot.press(key)
            await pilot.pause()
        await pilot.pause(0.1)
        return screen_of(app), app.player

    return on_screen(source, act, size=size, speed=speed)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("what", "keys"),
    [
        ("end", ()),
        ("rejection", ("home", "exclamation_mark")),
        ("step", ("home", "n", *["full_stop"] * 7)),
        ("warping", ("home", "exclamation_mark", "w")),
        ("presented", ("v", "home", "exclamation_mark")),
    ],
)
def test_screens_look_as_they_did(golden, size, what, keys):
    shown, _ = pressed(Told(events(60)), *keys, size=size)
    golden(shown, f"{what}-{size[0]}x{size[1]}.txt")
    text = shown if isinstance(shown, str) else "\n".join(shown)
    assert text.count("╭") == text.count("╰"), "a box is cut off at the bottom: there is no room for all panels"


def test_greyscale_has_no_hue_and_says_as_much(monkeypatch):
    async def act(app, pilot):
        await pilot.pause(0.1)
        return screen_of(app), [s.style for strip in app.screen._compositor.render_strips() for s in strip if s.style]

    coloured, hues = on_screen(Told(events(60)), act, size=(80, 24))
    monkeypatch.setenv("NO_COLOR", "1")
    grey, greys = on_screen(Told(events(60)), act, size=(80, 24))
    assert grey == coloured

    def tinted(styles):
        found = [style.color.triplet for style in styles if style.color is not None and style.color.triplet is not None]
        return [t for t in found if max(t) - min(t) > 12]

    assert tinted(hues)
    assert not tinted(greys)
    assert any(style.strike for style in greys)
    assert any(style.underline for style in greys)


def test_narrow_screens_swap_the_text_for_the_inspector():
    shown, _ = pressed(Told(events(60)), "home", "exclamation_mark", "i", size=(80, 24))
    assert "q draft" in shown
    assert "↳ drawn" in shown
    assert "─ text ─" not in shown


@pytest.mark.parametrize("size", SIZES)
def test_figures_on_screen_are_those_of_stats(size):
    shown, _ = pressed(Told(events(60)), size=size)
    s = frame(60).summary()
    row = shown.splitlines()[1]
    assert f"{s.tokens_per_second:.1f} tok/s" in row
    assert row.startswith(f" {s.tokens_per_second / 72:.2f}× plain ")
    assert f"{s.mean_emitted_per_cycle:.2f} tokens a cycle, α {s.alpha:.2f}" in row
    assert f"cycle {s.cycles}" in row


def test_figures_grow_with_the_screen():
    """What a narrow one has, a wider one has, too, in its place."""
    view, shown = View(frame(60)).end(), ""
    for width in range(20, 140):
        line = "".join(text for text, _ in header.figures(view, PanelContext(width, name)))
        assert line.startswith(shown)
        assert len(line) <= width
        shown = line
    assert "last 16" in shown


def test_a_click_on_the_prompt_unfolds_it():
    async def act(app, pilot):
        before = screen_of(app)
        await pilot.click("#stream", offset=(6, 1))
        await pilot.pause(0.2)
        opened = screen_of(app)
        await pilot.press("o")
        await pilot.pause(0.2)
        return before, opened, screen_of(app)

    before, opened, folded = on_screen(Told(events(20)), act)
    assert ("▶ prompt" in before, "▼ prompt" in opened, "▶ prompt" in folded) == (True, True, True)


def test_figures_go_back_with_the_view():
    shown, _ = pressed(Told(events(60)), "home", "n", "n")
    s = frame(60).upto(2).summary()
    assert f"α {s.alpha:.2f}" in shown.splitlines()[1]
    assert "cycle 2/60" in shown


@pytest.mark.parametrize(
    ("keys", "cycle"),
    [
        (("home",), 0), (("home", "n"), 1), (("home", "right", "right"), 2), (("p",), 59), (("left", "left"), 58),
        (("home", "end"), 60), (("home", "full_stop"), 1), (("home", "exclamation_mark"), None), (("home", "at"), None),
        (("home", "n", "n", "comma"), 2),
    ],
)  # fmt: skip
def test_keys_move_over_the_run(keys, cycle):
    _, player = pressed(Told(events(60)), *keys)
    if cycle is not None:
        assert player.view.shown == cycle
    else:
        full = player.view.cycle.accepted == len(player.view.cycle.drafted)
        assert full == (keys[-1] == "at")
    assert not player.playing


def test_space_pauses_and_plays():
    _, player = pressed(Told(events(60)), "space", speed=1 / 64)
    assert not player.playing
    _, player = pressed(Told(events(60)), "space", "space", speed=1 / 64)
    assert player.playing


def test_ctrl_c_pauses_and_a_second_one_leaves():
    source = Told(events(600), live=True)

    async def act(app, pilot):
        app.player.playing = True
        await pilot.press("ctrl+c")
        await pilot.pause(0.1)
        held = app.player.playing, source.closed
        await pilot.press("ctrl+c")
        await pilot.pause(0.1)
        return held

    assert on_screen(source, act, speed=1 / 64) == (False, False)
    assert source.closed


def test_speed_goes_up_and_down_and_stays_in_its_bounds():
    _, player = pressed(Told(events(600)), "minus", "minus")
    assert player.speed == 1.0
    _, player = pressed(Told(events(60)), *["minus"] * 9)
    assert player.speed == 1 / 64
    _, player = pressed(Told(events(60)), *["plus"] * 9)
    assert player.speed == float("inf")


def test_what_is_looked_for_is_seen_while_it_is_typed():
    shown, _ = pressed(Told(events(60)), "home", "slash", *"lant")
    assert any(" lant " in line for line in shown.splitlines())


def test_text_is_searched():
    shown, player = pressed(Told(events(60)), "home", "slash", *"lantern", "enter")
    first = player.view.shown
    assert 0 < first < 60
    assert "lantern" in shown
    shown, player = pressed(Told(events(60)), "home", "slash", *"lantern", "enter", "N")
    assert player.view.shown > first
    shown, player = pressed(Told(events(60)), "slash", *"lantern", "enter")
    assert player.view.shown == first, "from the end it goes on at the beginning"
    shown, _ = pressed(Told(events(60)), "slash", *"nowhere", "enter")
    assert "cycle 60/60" in shown


def test_a_click_on_a_token_inspects_it():
    """A kept token of an earlier cycle, in the text."""

    async def act(app, pilot):
        rows = lines_of(app)
        y, x = next((y, row.index(" fox") + 2) for y, row in enumerate(rows) if 4 < y < 20 and " fox" in row[:60])
        await pilot.click(offset=(x, y))
        await pilot.pause(0.1)
        return screen_of(app), app.player.view

    shown, view = on_screen(Told(events(60)), act)
    assert view.shown < 60
    assert view.position is not None
    at = view.inspected if view.position < len(view.cycle.drafted) else None
    assert at is None or f"token {at + 1} of {len(view.cycle.drafted)}" in shown


def test_other_tokens_of_a_cycle_are_looked_at_in_turn():
    first, _ = pressed(Told(events(60)), "home", "n")
    second, player = pressed(Told(events(60)), "home", "n", "l")
    assert "token 2 of 4" in first
    assert "token 3 of 4" in second
    assert "never tested" in second
    assert "min(1, p/q)" not in second.split("inspector")[1].split("kept, by")[0]
    assert player.view.position == 2


def test_block_verification_is_not_explained_as_the_token_rule():
    begun, *rest = events(60)
    block = replace(begun, settings={**begun.settings, "rule": "block"})
    shown, _ = pressed(Told([block, *rest]), "home", "exclamation_mark")
    assert "by block verification" in shown
    assert "min(1, p/q)" not in shown
    assert "≥" not in shown.splitlines()[-4]


def test_at_temperature_0_there_is_nothing_to_throw():
    begun, first, *_ = events(5)
    greedy = replace(first, p=(1.0, 0.0, 0.0, 0.0), q=(1.0,) * 4, u=(0.3, 0.9, None, None), accepted=1)
    shown, _ = pressed(Told([begun, greedy]))
    assert "not the target's choice" in shown
    assert "u 0.900" not in shown


def test_a_seed_is_shown_whole():
    """It is typed again to repeat the run."""
    started, *rest = events(20)
    shown, _ = pressed(Told([replace(started, seed=2_945_630_017), *rest]))
    assert "seed 2945630017" in (shown if isinstance(shown, str) else "\n".join(shown))


def test_the_header_follows_the_settings():
    changed = SettingChanged(3, "adaptive", True, False, "set by hand")
    found = [e for e in events(9) if getattr(e, "name", "") != "k"]
    shown, _ = pressed(Told([*found[:4], changed, *found[4:]]))
    assert "k 4  T" in shown.splitlines()[0]
    shown, _ = pressed(Told(found))
    assert "k ≤ 4 auto  T" in shown.splitlines()[0]


def test_what_cannot_run_is_said_below_a_run_that_did():
    source = Told(events(9), live=True, stage=Stage("the prompt has 9000 tokens", "shorten it", failed=True))
    shown, _ = pressed(source)
    assert "the prompt has 9000 tokens. shorten it" in shown
    assert "cycle 9/9" in shown


def test_the_scrubber_moves_the_view():
    async def act(app, pilot):
        await pilot.click("#scrubber", offset=(60, 0))
        await pilot.pause(0.1)
        return app.player.view.shown

    assert 20 < on_screen(Told(events(60)), act) < 45


@pytest.mark.parametrize("kind", KINDS)
def test_runs_are_saved(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)

    async def act(app, pilot):
        await pilot.press("s", *["down"] * list(KINDS).index(kind), "enter")
        for _ in range(600):
            await pilot.pause(0.1)
            said = [app.screen.remark] if isinstance(app.screen, WatchScreen) else []
            if any(message.startswith("saved") for message in said):
                return said
        return said

    said = on_screen(Told(events(20)), act)
    (file,) = tmp_path.iterdir()
    assert f"saved {file.name}" in said
    assert file.suffix == f".{KINDS[kind]}"
    begins = {"bitmap": b"\x89PNG", "animation": b"GIF8", "picture": b"<svg", "trace": b'{"ki', "narration": b"- Ta",
              "page": b"<!doctype html>"}  # fmt: skip
    assert file.read_bytes().startswith(begins.get(kind, b" "))
    if kind == "trace":
        from specdec_tui.streams import read_frame

        again, named = read_frame(file)
        assert list(again.events()) == events(20)
        assert named(3) == " fox"
    assert file.stat().st_size > 200


def test_a_folder_that_cannot_be_written_is_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tmp_path.rmdir()

    async def act(app, pilot):
        await pilot.press("s", "enter")
        await pilot.pause(0.2)
        return [note.message for note in app._notifications]

    assert any("not saved" in message for message in on_screen(Told(events(20)), act))


# -- states ------------------------------------------------------------------------------------------------------------


def test_while_nothing_is_known_the_stage_is_shown():
    shown, _ = pressed(Told(live=True, stage=Stage("loading builtin", "98 MB")))
    assert "loading builtin" in shown
    assert "98 MB" in shown


def test_a_failure_is_a_screen_with_what_to_do():
    shown, _ = pressed(
        Told(live=True, stage=Stage("model x is not cached", "run once without --offline", failed=True)),
        "n",
        "p",
        "i",
        "space",
    )
    assert "× model x is not cached" in shown
    assert "run once without --offline" in shown


def test_a_run_that_broke_keeps_what_was_decoded():
    broken = [*events(10)[:-1], Failed("OutOfMemory", "out of memory", "lower --max-tokens")]
    shown, _ = pressed(Told(broken))
    assert "cycle 10/10" in shown
    assert "out of memory" in shown


@pytest.mark.parametrize("size", [(39, 24), (60, 12), (38, 5), (1, 1)])
def test_too_small_a_terminal_says_so(size):
    shown, _ = pressed(Told(events(20)), size=size)
    assert size == (1, 1) or "specdec needs" in shown
    assert "inspector" not in shown


def test_resizing_keeps_everything():
    async def act(app, pilot):
        found = []
        for size in [(200, 60), (80, 24), (40, 16), (30, 8), (120, 40)]:
            await pilot.resize_terminal(*size)
            await pilot.pause(0.1)
            found.append(screen_of(app))
        return found

    again = on_screen(Told(events(60)), act)[-1]
    first, _ = pressed(Told(events(60)))
    assert again == first


def test_leaving_closes_the_source():
    source = Told(events(20))

    async def act(app, pilot):
        await pilot.press("q")

    on_screen(source, act)
    assert source.started
    assert source.closed


def test_help_names_every_key():
    shown, _ = pressed(Told(events(20)), "question_mark", size=(200, 60))
    words = " ".join(shown.split())
    for label in (
        "Next rejection",
        "Step within the cycle",
        "Faster",
        "Save",
        "Find text",
        "↳ recovered",
        "kept of drafted",
    ):
        assert label in words
    assert "Temperature" not in words  # there is no engine to turn


@pytest.mark.parametrize("key", ["escape", "question_mark"])
def test_the_help_closes_again(key):
    before, _ = pressed(Told(events(20)), size=(200, 60))
    after, _ = pressed(Told(events(20)), "question_mark", key, size=(200, 60))
    assert after == before


def test_keys_of_the_engine_say_that_the_run_is_recorded():
    async def act(app, pilot):
        said = []
        for key in ("b", "right_square_bracket", "a", "T", "r"):
            await pilot.press(key)
            await pilot.pause()
            said.append([app.screen.remark])
        return said

    for said in on_screen(Told(events(20)), act):
        assert ["this run is recorded" in message for message in said] == [True]


def test_memory_is_weights_caches_and_the_most_in_all():
    shown, _ = pressed(Told(events(20)), "end", size=(200, 60))
    tokens = 6 + frame(20).summary().emitted
    assert f"draft 9.0 MB  target 118.0 MB  {tokens * 24_576 / 1e6:.1f} MB for {tokens} tokens" in shown
    assert "memory · at most 612.0 MB in all" in shown
