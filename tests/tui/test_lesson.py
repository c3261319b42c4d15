"""The lesson, page by page, on the bundled run."""

from __future__ import annotations

import asyncio
import random

import pytest

from specdec_tui import questions
from specdec_tui.app import SpecdecApp
from specdec_tui.lesson import ENOUGH, Lesson, pages, script
from specdec_tui.panels.toy import branches, histograms, stacks
from specdec_tui.questions import Question
from specdec_tui.streams import DEMO, FrameStream, read_frame
from specdec_tui.toy import TOKENS, Branches, Draws, ToyPair, WhatIf, left
from tests.tui.conftest import screen_of
from tests.tui.scenes import frame as made


@pytest.fixture(scope="module")
def demo():
    return read_frame(DEMO)


def taught(demo, act, size=(120, 40)):
    async def run():
        lesson = Lesson(demo[0])
        app = SpecdecApp(FrameStream(*demo), speed=1 / 16, lesson=lesson)
        async with app.run_test(size=size) as pilot:
            await pilot.pause(0.1)
            return await act(app, pilot, lesson)

    return asyncio.run(run())


DO = (
    ("right",), ("full_stop",) * 8, ("full_stop",), ("full_stop",), ("full_stop", "exclamation_mark"),
    ("full_stop",) * 2, ("full_stop",) * 12,
    ("space",), ("space",), ("space",), ("end",), (), ("T",) * 6,
)  # fmt: skip
"""What each page but the last asks for; the twelfth wants the best k found."""


@pytest.mark.parametrize("size", [(80, 24), (120, 40), (200, 60)])
def test_every_page_is_ticked_when_its_thing_is_done_and_not_before(demo, size):
    async def act(app, pilot, lesson):
        for number, keys in enumerate(DO):
            page = lesson.page
            for _ in range(60):  # a page is drawn after the next refresh
                if page.task in (shown := screen_of(app)):
                    break
                await pilot.pause(0.05)
            assert page.title in shown
            assert page.task in shown
            assert number not in lesson.ticked
            for key in keys:
                await pilot.press(key)
                await pilot.pause()
            if number == 11:
                for _ in range(8):
                    if number not in lesson.ticked:
                        await pilot.press("right_square_bracket")
                        await pilot.pause()
            for _ in range(60):
                if number in lesson.ticked:
                    break
                await pilot.pause(0.1)
            await pilot.pause(0.1)
            assert number in lesson.ticked, page.title
            assert page.task not in screen_of(app)
            question = page.question
            await pilot.press("1")  # before it is asked: not an answer
            await pilot.press("enter")
            await pilot.pause(0.1)
            assert "press 1, 2 or 3" in screen_of(app)
            assert lesson.at not in lesson.answers
            given = question.right if number % 3 else (question.right + 1) % 3
            await pilot.press(str(given + 1), "1", "2", "3")  # the first counts
            await pilot.pause(0.1)
            assert lesson.answers[number] == given
            assert f"✓ {question.right + 1}  " in screen_of(app)
            assert ("× " in screen_of(app)[:2000]) or given == question.right
            await pilot.press("enter")
            await pilot.pause(0.1)
        assert lesson.at == len(lesson.pages) - 1
        assert lesson.score == (8, 13)
        shown = " ".join(screen_of(app).replace("│", " ").split())
        assert "8 of 13 questions answered right" in shown
        for page in lesson.pages[:-1]:
            assert page.question.recap in shown

    taught(demo, act, size)


def test_pages_turn_back_and_stay_ticked(demo):
    async def act(app, pilot, lesson):
        await pilot.press("right")
        await pilot.press("enter", "enter")  # on, without an answer
        await pilot.pause(0.1)
        assert lesson.at == 1
        assert lesson.answers == {}
        await pilot.press("backspace")
        await pilot.pause(0.1)
        assert lesson.at == 0
        assert "✓" in screen_of(app).splitlines()[5] + screen_of(app).splitlines()[4] + screen_of(app).splitlines()[3]

    taught(demo, act)


def test_a_page_that_is_not_done_is_skipped_only_on_purpose(demo):
    async def act(app, pilot, lesson):
        await pilot.press("enter")
        await pilot.pause(0.1)
        assert lesson.at == 0
        assert "enter again skips this" in screen_of(app)
        await pilot.press("enter")
        await pilot.pause(0.1)
        assert lesson.at == 1
        assert "enter again" not in screen_of(app)

    taught(demo, act)


def test_pages_are_short(demo):
    found = pages(demo[0])
    assert len(found) == 14
    for page in found:
        assert len(page.text.split()) <= 60, page.title


def test_without_a_terminal_the_lesson_is_text(demo):
    said = list(script(*demo))
    for number, page in enumerate(pages(demo[0]), 1):
        assert f"{number} of 14. {page.title}" in said
        assert page.text in said


def test_a_run_without_the_cycles_it_needs_is_refused():
    with pytest.raises(ValueError, match="no cycle"):
        Lesson(made(1))


def test_two_guesses_for_one_place_make_p_too():
    draws = Branches(chance=random.Random(3))
    draws.more(200_000)
    for i, p in enumerate(ToyPair().p):
        made = draws.first[i] + draws.second[i] + draws.corrected[i]
        assert abs(made / draws.made - p) < 0.005
        assert abs(draws.first[i] / draws.made - min(p, ToyPair().q[i])) < 0.005
    shown = "".join(text for line in branches(draws, 110).lines for text, _ in line)
    assert "in 55 of 100 places with one guess, in" in shown


def test_the_two_histograms_meet_and_the_careless_one_does_not():
    draws = Draws(chance=random.Random(3))
    draws.more(200_000)
    for i in range(len(TOKENS)):
        assert abs(draws.speculative[i] / draws.made - ToyPair().p[i]) < 0.005
        assert abs(draws.target[i] / draws.made - ToyPair().p[i]) < 0.005
    careless = max(abs(draws.careless[i] / draws.made - ToyPair().p[i]) for i in range(len(TOKENS)))
    assert careless > 0.05


def test_kept_guesses_and_corrections_make_p(demo):
    draws = Draws(chance=random.Random(3))
    assert draws.distance(draws.kept) is None
    draws.more(100_000)
    for i, p in enumerate(ToyPair().p):
        assert abs(draws.kept[i] / draws.made - min(p, ToyPair().q[i])) < 0.005
        assert abs(draws.corrected[i] / draws.made - max(0.0, p - ToyPair().q[i])) < 0.005
    assert draws.distance(draws.speculative) < 0.01 < 0.08 < draws.distance(draws.careless)
    shown = "".join(text for line in stacks(draws, 110).lines for text, _ in line)
    assert "█" in shown
    assert "min(p, q)" in shown


def test_each_question_has_one_right_answer_and_all_places_occur():
    asked = [value for value in vars(questions).values() if isinstance(value, Question)]
    assert len(asked) == 13
    assert {question.right for question in asked} == {0, 1, 2}
    assert all(len(set(question.choices)) == 3 and question.text.endswith("?") for question in asked)


PAIRS = [
    ToyPair(),
    ToyPair.typed("1 0 0 0 0\n0.2 0.2 0.2 0.2 0.2"),
    ToyPair.typed("3 2 2 2 1\n0 0 0 0 1"),
    ToyPair.typed("0.3, 0.3, 0.2, 0.1, 0.1\n0.3, 0.3, 0.2, 0.1, 0.1"),
    ToyPair.typed("0 0 0 1 1\n1 1 1 0 0"),
]


@pytest.mark.parametrize("pair", PAIRS)
def test_draws_of_any_pair_come_out_as_its_target_says(pair):
    draws, two = Draws(pair, random.Random(3)), Branches(pair, random.Random(4))
    draws.more(20_000)
    two.more(20_000)
    for i, p in enumerate(pair.p):
        assert draws.speculative[i] / draws.made == pytest.approx(p, abs=0.015)
        assert (two.first[i] + two.second[i] + two.corrected[i]) / two.made == pytest.approx(p, abs=0.015)
    for drawn in (stacks(draws, 74), histograms(draws, 74), branches(two, 74)):
        assert all(sum(len(text) for text, _ in line) <= 110 for line in drawn.lines)


@pytest.mark.parametrize(
    ("p", "said"),
    [
        ("0.4 0.6", "has 2 numbers, and there are 5"),
        ("a b c d e", "no number"),
        ("0 0 0 0 0", "one is above 0"),
        ("-1 1 1 1 1", "from 0 on"),
        ("nan 1 1 1 1", "finite numbers"),
        ("1e308 1e308 1 1 1", "finite numbers"),
    ],
)
def test_what_is_no_distribution_is_said(p, said):
    with pytest.raises(ValueError, match=said):
        ToyPair.typed(f"1 1 1 1 1\n{p}")


@pytest.mark.parametrize("size", [(80, 24), (120, 40)])
def test_p_and_q_are_edited_by_hand(demo, size):
    async def act(app, pilot, lesson):
        lesson.at = next(i for i, page in enumerate(lesson.pages) if page.shows == "stacks")
        app.screen.action_turn(0)
        await pilot.pause(0.1)
        assert "p and q by hand" in screen_of(app)
        await pilot.press("e")
        await pilot.pause(0.1)
        await pilot.press("end", *["backspace"] * 5, "enter")
        await pilot.pause(0.1)
        assert "4 numbers, and there are 5 tokens" in screen_of(app)
        await pilot.press("space", "9", "enter")
        for _ in range(100):
            await pilot.pause(0.05)
            if "2,000 times" in screen_of(app):
                break
        found = screen_of(app)
        await pilot.press("pagedown")
        await pilot.pause(0.2)
        assert "p 0.40" in screen_of(app), "the next page speaks of the lesson's own pair"
        return found

    found = taught(demo, act, size)
    assert "p 0.90" in found


def test_the_toy_rule_is_exact_by_enumeration():
    pair = ToyPair()
    kept = [min(p, q) for p, q in zip(pair.p, pair.q, strict=True)]
    lost = 1 - sum(kept)
    assert [k + lost * r for k, r in zip(kept, left(pair.p, pair.q), strict=True)] == pytest.approx(list(pair.p))


def test_the_curve_is_the_papers():
    assert WhatIf(0.8, 4, 0.0, 0.0).speedup() == pytest.approx((1 - 0.8**5) / (1 - 0.8))
    assert WhatIf(0.0, 3, 0.1, 0.1).speedup() < 1
    assert WhatIf(0.0).best == 0
    assert ENOUGH == 2000
