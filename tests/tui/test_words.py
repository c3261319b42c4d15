"""The stream's text: nothing lost, nothing hostile, the same however one gets there."""

from __future__ import annotations

import unicodedata
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from specdec_engine.record.events import Finished
from specdec_tui.frame import View
from specdec_tui.pieces import StreamDecoder, alone
from specdec_tui.words import Lines, TextLayout, Word, containing
from tests.tui.scenes import frame, name


def text_of(lines, kinds=("prompt", "accepted", "recovered", "bonus", "plain")):
    return "".join(word.text for line in lines for word in line if word.kind in kinds)


def squeezed(text):
    return "".join(text.replace("⏎", "").split())


@pytest.mark.parametrize("width", [10, 33, 80, 200])
def test_the_stream_shows_every_emitted_token_once(width):
    run = frame(60)
    ids = [*run.prompt, *(token for cycle in run.cycles for token in cycle.emitted)]
    decode = StreamDecoder(name)
    whole = "".join(map(decode, ids))
    layout = TextLayout(name)
    lines = layout.lines(View(run, unfolded=True).end(), width)
    assert squeezed(text_of(lines)) == squeezed(f"▼ prompt, {len(run.prompt)} tokens{whole}")
    answer = whole[len("".join(map(StreamDecoder(name), run.prompt))) :]
    folded = layout.lines(View(run).end(), width)
    assert squeezed(text_of(folded)) == squeezed(f"▶ prompt, {len(run.prompt)} tokens{answer}")
    assert all(sum(cell_len(word.text) for word in line) <= width + 1 for line in lines)  # ⏎ may stand past the edge


@given(moves=st.lists(st.integers(0, 40), max_size=30), width=st.integers(8, 90), fold=st.sets(st.integers(0, 40)))
@settings(deadline=None, max_examples=60)
def test_however_one_moves_there_a_view_looks_the_same(moves, width, fold):
    run, layout = frame(40), TextLayout(name)
    for shown in moves:
        view = View(run, unfolded=shown in fold).to(shown)
        fresh = TextLayout(name).lines(view, width)
        assert layout.lines(view, width) == fresh


def test_what_a_cycle_dropped_stands_before_the_token_that_replaced_it():
    run = frame(40)
    shown = next(i + 1 for i, c in enumerate(run.cycles) if len(c.drafted) - c.accepted == 2)
    words = [
        word for line in TextLayout(name).lines(View(run).to(shown), 500) for word in line if word.cycle == shown - 1
    ]
    assert [word.kind for word in words][-3:] == ["rejected", "untested", "recovered"]


def test_at_the_end_of_a_run_its_text_stands_alone():
    run = frame(40)
    shown = next(i + 1 for i, c in enumerate(run.cycles) if len(c.drafted) - c.accepted == 2)
    ended = replace(run.upto(shown), finished=Finished("length", 9, shown, None))
    words = [
        word for line in TextLayout(name).lines(View(ended).end(), 500) for word in line if word.cycle == shown - 1
    ]
    assert [word.kind for word in words][-1:] == ["recovered"]
    assert not {"rejected", "untested"} & {word.kind for word in words}


def test_a_character_of_two_tokens_appears_with_the_second():
    decode = StreamDecoder(name)
    assert (decode(103), decode(104)) == ("", "😀")
    assert alone(103, name) == "⟨f0⟩⟨9f⟩"


@given(st.text())
@settings(max_examples=300)
def test_no_token_can_steer_the_terminal(text):
    for shown in (alone(0, lambda _: text), StreamDecoder(lambda _: text)(0)):
        for char in shown:
            allowed = char in "\n\t\u200c\u200d" or unicodedata.category(char) not in {"Cc", "Cf", "Cs", "Zl", "Zp"}
            assert allowed, hex(ord(char))


def test_words_longer_than_a_line_are_cut_and_newlines_shown():
    lines = Lines(5, [Word("abcdefgh", "plain"), Word("x\n\ny", "plain")]).lines
    assert ["".join(word.text for word in line) for line in lines] == ["abcde", "fghx⏎", "⏎", "y"]


def test_a_word_of_several_tokens_moves_to_the_next_line_whole():
    lines = Lines(12, [Word(" light", "plain"), Word(" house", "plain"), Word("hold", "plain")]).lines
    assert ["".join(word.text for word in line) for line in lines] == [" light", "household"]


def test_text_is_found_in_the_cycle_that_completes_it():
    run = frame(60)
    found = containing(run, name, "lantern", 0, 1)
    assert found is not None
    assert any("lantern" in name(token) for token in run.cycles[found.shown - 1].emitted)
    hits = [found]
    while (following := containing(run, name, "lantern", hits[-1].shown, 1)) != found:
        hits.append(following)
    assert [(hit.number, hit.total) for hit in hits] == [(i + 1, len(hits)) for i in range(len(hits))]
    assert containing(run, name, "lantern", found.shown, -1) == hits[-1]
    assert containing(run, name, "no such text", 0, 1) is None
