"""Folding events, moving over them, and the head that plays them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec_engine.record.events import Cycle, Finished, Raw, Started
from specdec_engine.record.stats import Summary
from specdec_tui.frame import Frame, View, step_of, steps
from specdec_tui.ladder import row
from specdec_tui.panels import PanelContext
from specdec_tui.panels.inspector import inspector
from specdec_tui.player import PRESENTED_S, Player
from specdec_tui.race import Lane, Race
from tests.tui.scenes import events, frame, name


def test_a_frame_gives_its_events_back():
    assert list(frame(30).events()) == events(30)


@given(st.lists(st.integers(1, 9), max_size=12))
@settings(max_examples=50)
def test_events_may_come_in_any_portions(portions):
    left, found = events(30), Frame()
    for n in portions:
        found, left = found.plus(left[:n]), left[n:]
    assert found.plus(left) == frame(30)


def test_figures_are_those_of_stats():
    folded = Summary()
    for event in events(30):
        folded = folded.plus(event)
    assert frame(30).summary() == folded


def test_another_run_begins_anew():
    again = frame(5).plus(events(3, seed=9))
    assert (again.seed, len(again.cycles), len(again.changes)) == (9, 3, 1)


def test_the_past_knows_nothing_of_the_future():
    past = View(frame(30)).to(2).past
    assert len(past.cycles) == 2
    assert past.changes == ()
    assert not past.over
    assert View(frame(30)).to(3).past.setting("k") == 0
    assert View(frame(30)).to(30).past.setting("k") == 4


def test_a_cycle_appears_draft_first_then_the_pass_then_verdicts_then_the_targets_token():
    cycle = next(c for c in frame(30).cycles if 0 < c.accepted < len(c.drafted))
    k = len(cycle.drafted)
    shown = [step_of(cycle, n) for n in range(steps(cycle) + 1)]
    assert [s.drafted for s in shown[: k + 1]] == list(range(k + 1))
    assert [s.verified for s in shown].index(True) == k + 1
    assert max(s.tested for s in shown) == cycle.tested
    assert [s.final for s in shown].index(True) == steps(cycle)


@given(st.lists(st.sampled_from(["forward", "back", "on", "off", "rejection"]), max_size=60))
@settings(max_examples=100)
def test_no_way_of_moving_leaves_the_run(moves):
    view = View(frame(12))
    for move in moves:
        match move:
            case "forward":
                view = view.forward()
            case "back":
                view = view.back()
            case "on":
                view = view.to(view.shown + 1)
            case "off":
                view = view.to(view.shown - 1)
            case _:
                view = view.find("rejection")
        assert 0 <= view.shown <= 12
        if view.step is not None:
            assert view.cycle is not None
            assert 0 < view.step < steps(view.cycle)
        if (at := view.inspected) is not None:
            assert 0 <= at < len(view.cycle.drafted)


def test_stepping_forward_and_back_ends_where_it_began():
    view = start = View(frame(12)).to(2)
    for _ in range(25):
        view = view.forward()
    for _ in range(25):
        view = view.back()
    assert view == start


def test_the_next_rejection_is_one():
    view = View(frame(30)).find("rejection")
    assert view.cycle.accepted < len(view.cycle.drafted)
    full = View(frame(30)).find("acceptance")
    assert full.cycle.accepted == len(full.cycle.drafted) > 0
    assert View(frame(30)).end().find("rejection").at_end


def played(player, seconds, tick=0.05):
    for _ in range(round(seconds / tick)):
        player.tick(tick)
    return player.view.shown


def test_recorded_time_is_kept_at_any_speed():
    """60 cycles of some 17 ms."""
    run = frame(60)
    lasts = sum(c.draft_s + c.verify_s + c.other_s for c in run.cycles)
    for speed in (1 / 16, 1.0):
        player = Player(speed, live=False)
        player.feed(run.events())
        half = played(player, lasts / speed / 2, lasts / speed / 200)
        assert abs(half - 30) <= 2
        assert played(player, lasts / speed) == 60
        assert not player.playing
    player = Player(math.inf, live=False)
    player.feed(run.events())
    assert played(player, 0.1) == 60


def test_a_live_engine_is_held_while_paused_and_runs_one_cycle_when_asked():
    player, coming = Player(math.inf, live=True), events(20)[:-1]
    player.feed(coming[:5])
    player.tick(0.1)
    assert (player.allowed, player.view.shown) == (None, 3)
    player.toggle()
    assert player.allowed == 3
    player.cycle(1)
    assert player.allowed == 4
    player.feed(coming[5:8])
    player.tick(0.1)
    assert (player.view.shown, player.allowed) == (4, 4)
    player.cycle(-1)
    assert player.view.shown == 3


def test_a_step_at_the_live_end_runs_a_cycle_and_shows_its_first():
    player, coming = Player(math.inf, live=True), events(20)[:-1]
    drafting = [i for i, event in enumerate(coming) if isinstance(event, Cycle) and event.drafted][2]
    player.feed(coming[:drafting])
    player.tick(0.1)
    player.toggle()
    at = player.view.shown
    player.step(1)
    assert player.allowed == at + 1
    player.feed(coming[drafting : drafting + 1])
    assert (player.view.shown, player.view.step, player.allowed) == (at + 1, 1, at + 1)
    player.step(-1)
    assert (player.view.shown, player.view.step) == (at, None)


def test_cycles_under_way_when_it_was_paused_are_shown_until_one_moves():
    player, coming = Player(math.inf, live=True), events(20)[:-1]
    player.feed(coming[:5])
    player.tick(0.1)
    player.toggle()
    player.feed(coming[5:7])
    assert player.view.at_end
    player.cycle(-1)
    held = player.view.shown
    player.feed(coming[7:9])
    assert player.view.shown == held


def test_a_live_run_at_a_slow_speed_is_allowed_a_cycle_ahead():
    player = Player(1 / 16, live=True)
    player.feed(events(20)[:3])
    assert player.allowed == 1


def test_a_cycle_asked_for_is_forgotten_when_one_moves_on():
    player, coming = Player(math.inf, live=True), events(20)[:-1]
    player.feed(coming[:5])
    player.tick(0.1)
    player.toggle()
    player.cycle(1)
    player.cycle(-1)
    assert player.allowed == player.view.shown
    held = player.view.shown
    player.feed(coming[5:7])
    assert player.view.shown == held


def test_stepping_back_skips_the_parts_of_a_cycle_without_a_draft():
    view = View(frame(12)).to(3)
    assert not view.cycle.drafted
    assert (view.back().shown, view.back().step) == (2, None)


def test_a_run_without_a_prompt_is_a_run():
    begun = [Started((), {"k": 1}, 1), *events(3)[1:]]
    player = Player(math.inf, live=False)
    player.feed(begun)
    player.tick(0.1)
    assert (player.view.frame.run, player.view.shown) == (1, 3)
    player.feed(begun)
    assert player.view.frame.run == 2


def test_lanes_of_a_race_run_on_one_clock():
    """At 72 tokens a second a plain lane has emitted half its tokens after half its time."""
    plain, ours = Lane.of("plain", frame(40, k=0)), Lane.of("speculative", frame(20))
    race = Race(plain, ours)
    half = plain.at(plain.total_s / 2).shown
    assert abs(half - 20) <= 1
    assert plain.at(0.0).shown == 0
    assert ours.at(race.total_s).shown == 20
    assert race.speedup == ours.frame.summary().tokens_per_second / plain.frame.summary().tokens_per_second
    assert "slower than plain" not in race.verdict()
    assert "differ" in race.same_text


def test_playing_on_at_the_end_begins_again():
    player = Player(math.inf, live=False)
    player.feed(events(5))
    player.tick(0.1)
    player.toggle()
    assert (player.playing, player.view.shown) == (True, 0)
    player.tick(0.01)
    assert player.view.shown < 5


def test_a_new_run_is_shown_from_its_beginning():
    player = Player(math.inf, live=True)
    player.feed(events(5))
    player.tick(0.1)
    player.feed([Started((9, 9), {}, 1), Finished("cancelled", 0, 0, None)])
    assert (player.view.shown, player.view.frame.prompt) == (0, (9, 9))


SAYS = [
    ({"temperature": 0.0}, "before greedy: q 0.250, p 0.200"),
    ({"temperature": 0.7, "draft_temperature": 0.7}, "before T 0.7: q 0.250, p 0.200"),
    ({"temperature": 1.0, "draft_temperature": 0.5}, "before warping: q 0.250, p 0.200"),
    (
        {"temperature": 0.7, "draft_temperature": 0.7, "top_p": 0.9, "top_k": 20},
        "before T 0.7, top-k 20, top-p 0.9: q 0.250, p 0.200",
    ),
    ({"temperature": 1.0, "draft_temperature": 1.0, "coupling": "gumbel"}, "before the shared noise: q 0.250, p 0.200"),
]


def inspected(known, *, warping=False):
    at = next(c for c in known.cycles if c.drafted)
    view = replace(View(known).to(at.index + 1), warping=warping)
    return ["".join(text for text, _ in line) for line in inspector(view, PanelContext(60, name)).lines]


@pytest.mark.parametrize(("settings", "said"), SAYS)
def test_the_inspector_says_what_p_and_q_were_before_warping(settings, said):
    known = frame(30)

    def told(cycle, mass):
        return Raw((mass,) * len(cycle.drafted), ((),) * len(cycle.drafted))

    cycles = tuple(replace(c, raw_p=told(c, 0.2), raw_q=told(c, 0.25)) for c in known.cycles)
    assert said in inspected(replace(known, cycles=cycles, settings=known.settings | settings))
    silent = tuple(replace(c, raw_p=None, raw_q=None) for c in known.cycles)
    assert not any("before" in line for line in inspected(replace(known, cycles=silent)))


def test_the_inspectors_other_side_has_both_distributions_before_and_after():
    known = frame(30)
    cycle = next(c for c in known.cycles if c.drafted)
    at, lines = cycle.accepted, inspected(known, warping=True)
    assert "p target, before → after T 0.8" in lines
    assert "q draft, before → after T 0.8" in lines
    said = [
        f"{side.drafted[at]:.3f}→{after[at]:.3f}" for side, after in ((cycle.raw_p, cycle.p), (cycle.raw_q, cycle.q))
    ]
    assert all(any(line.startswith("› ") and line.endswith(pair) for line in lines) for pair in said)


def test_the_inspectors_other_side_says_what_it_cannot_tell():
    known = frame(30)
    unsaid = tuple(replace(c, raw_q=None) for c in known.cycles)
    lines = inspected(replace(known, cycles=unsaid), warping=True)
    assert sum("was not recorded" in line for line in lines) == 1
    looked_up = tuple(replace(c, q=(1.0,) * len(c.drafted)) for c in unsaid)
    assert any("looked this up" in line for line in inspected(replace(known, cycles=looked_up), warping=True))
    silent = tuple(replace(c, raw_p=None, raw_q=None) for c in known.cycles)
    sharp = known.settings | {"draft_temperature": 0}
    assert "q draft, before → after greedy" in inspected(replace(known, settings=sharp), warping=True)
    lines = inspected(replace(known, cycles=silent), warping=True)
    assert sum("was not recorded" in line for line in lines) == 2


def test_tokens_that_a_lookup_had_expected_are_marked():
    cycle = replace(next(c for c in frame(cycles=8).cycles if len(c.drafted) > 1), guessed=(1,))
    line = "".join(text for text, _ in row(cycle, "tok{}".format, 100))
    assert f"»tok{cycle.drafted[1]}" in line
    assert line.count("»") == 1


def test_presenter_mode_plays_by_steps_and_stops_where_a_draft_is_decided():
    player = Player(math.inf, live=False)
    player.feed(events(20))
    player.present()
    assert (player.presenting, player.playing, player.view.shown) == (True, False, 0)
    stops, seen = [], set()
    while not player.view.at_end:
        player.toggle()
        while player.playing:
            player.tick(PRESENTED_S)
            seen.add((player.view.shown, player.view.step))
        stops.append(player.view.shown)
        assert player.view.step is None
        assert player.view.cycle.drafted or player.view.at_end
    drafted = [i + 1 for i, cycle in enumerate(player.view.frame.cycles) if cycle.drafted]
    assert stops[: len(drafted)] == drafted
    first = player.view.frame.cycles[drafted[0] - 1]
    assert {step for shown, step in seen if shown == drafted[0]} == {None, *range(1, steps(first))}
    player.present()
    player.toggle()
    assert not player.presenting


def test_a_live_engine_in_presenter_mode_runs_one_cycle_ahead():
    player = Player(math.inf, live=True)
    assert player.allowed is None
    player.present()
    player.toggle()
    assert player.allowed == 1
