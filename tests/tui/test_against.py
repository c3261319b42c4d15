"""Two recorded runs beside each other, token by token."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace

import pytest

from specdec_engine.errors import UsageError
from specdec_engine.record.comparison import compare, read_run
from specdec_engine.record.events import Finished, Started
from specdec_engine.record.trace import TraceWriter
from specdec_tui.against import Against
from specdec_tui.app import SpecdecApp
from specdec_tui.screens.against import AgainstScreen
from specdec_tui.streams import FrameStream, read_frame
from tests.tui.conftest import lines_of
from tests.tui.scenes import cycle, name


def run(ids, k, seed):
    """A run that emits these ids, by cycles of up to k accepted."""
    source, at, cycles = random.Random(seed), 0, []
    while at < len(ids):
        made = cycle(len(cycles), source, k, at)
        kept = min(made.accepted, len(ids) - at - 1)
        drafted = (*ids[at : at + kept], *made.drafted[kept:])
        end = "bonus" if kept == k and k else "recovered" if k else "plain"
        u = tuple(0.5 if i <= kept else None for i in range(k))
        cycles.append(
            replace(made, drafted=drafted, accepted=kept, emitted=tuple(ids[at : at + kept + 1]), end=end, u=u, raw_p=None,
                    raw_q=None, residual=())
        )  # fmt: skip
        at += kept + 1
    settings = {"target": "t", "draft": f"model{k}", "k": k, "temperature": 0.0}
    return [Started((1, 2), settings, 1, {}), *cycles, Finished("length", len(ids), len(cycles), 0.01)]


IDS = [i % 30 for i in range(3, 43)]
OTHER = [*IDS[:25], 31, *IDS[:14]]


@pytest.fixture
def written(tmp_path):
    def write(file, ids, k, seed):
        path = tmp_path / file
        with TraceWriter(path, name) as writer:
            for event in run(ids, k, seed):
                writer.write(event)
        return path

    return write


def against(a, b):
    (frame, _), (other, _) = read_frame(a), read_frame(b)
    return Against.of(compare(read_run(a), read_run(b)), (frame, other))


def test_both_lanes_stand_at_the_same_place_of_the_text(written):
    both = against(written("a", IDS, 2, 1), written("b", IDS, 5, 2))
    assert both.same
    for place in range(both.tokens + 1):
        shown = [len([t for c in lane.at(place).past.cycles for t in c.emitted]) for lane in both.lanes]
        assert all(count <= place for count in shown)
        assert place in (0, both.tokens) or both.said(place)
    assert "same text" in both.said(both.tokens)
    ends, place = [], 0
    while (after := both.border(place, 1)) != place:
        ends.append(place := after)
    assert ends == sorted({int(end) for lane in both.lanes for end in lane.ends})
    assert both.border(ends[-1], -1) == ends[-2]


def test_the_place_where_they_part_shows_both_tokens(written):
    both = against(written("a", IDS, 2, 1), written("b", OTHER, 3, 2))
    assert both.found.common == 25
    for lane, ids in zip(both.lanes, (IDS, OTHER), strict=True):
        shown = [t for c in lane.at(both.parts_at).past.cycles for t in c.emitted]
        assert shown[25] == ids[25]
    assert "They part after 25 tokens" in both.said(both.parts_at)
    assert "They part" not in both.said(25)


def test_runs_of_other_prompts_are_refused(written):
    a = written("a", IDS, 2, 1)
    text = a.read_text().replace('"prompt": [1, 2]', '"prompt": [1, 3]')
    assert text != a.read_text()
    b = a.with_name("c")
    b.write_text(text)
    with pytest.raises(UsageError, match="not of one prompt"):
        against(a, b)


@pytest.mark.parametrize("size", [(60, 20), (80, 24), (120, 40)])
def test_the_screen_holds_where_they_part_and_steps_by_cycles(written, size):
    a, b = written("a", IDS, 2, 1), written("b", OTHER, 3, 2)
    (frame, named), (_, other_named) = read_frame(a), read_frame(b)

    async def act():
        screen = AgainstScreen(against(a, b), (named, other_named))
        app = SpecdecApp(FrameStream(frame, named), speed=1.0, instead=screen)
        async with app.run_test(size=size) as pilot:
            await pilot.press("plus", "plus", "plus")
            for _ in range(100):
                await pilot.pause(0.05)
                if not screen._playing:
                    break
            parted = " ".join(" ".join(lines_of(app)).split())
            await pilot.press("home", "space", "right")
            await pilot.pause(0.2)
            first = screen._clock
            await pilot.press("n", "end", "left", "question_mark")
            await pilot.pause(0.2)
            return parted, first, "\n".join(lines_of(app))

    parted, first, help_shown = asyncio.run(act())
    assert "They part after 25 tokens" in parted
    assert f"token {against(a, b).parts_at} of" in parted
    assert first in {end for lane in against(a, b).lanes for end in lane.ends}
    assert "help" in help_shown
