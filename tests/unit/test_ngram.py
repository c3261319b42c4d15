"""Prompt lookup, by worked examples and against the definition spelled out naively."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specdec_engine.adaptive.limits import DraftLimits
from specdec_engine.core.cycle_types import Sampling
from specdec_engine.core.randomness import KeyedRandomness
from specdec_engine.drafters import build_drafter
from specdec_engine.drafters.ngram import NgramDrafter
from specdec_engine.errors import UsageError
from tests.fakes import host


def propose(context, k, longest=3, begin=None):
    drafter = NgramDrafter(host(), longest)
    drafter.begin(context if begin is None else context[:begin])
    return drafter.propose(context, k, Sampling(), KeyedRandomness(0)).tokens.tolist()


@pytest.mark.parametrize(
    ("context", "k", "expected"),
    [
        ([1, 2, 3, 9, 2, 3], 2, [9, 2]),  # 2 3 was followed by 9
        ([1, 2, 7, 1, 2, 8, 1, 2], 1, [8]),  # the most recent of two
        ([5, 1, 2, 6, 2, 7, 1, 2], 1, [6]),  # the longer suffix 1 2 before the more recent 2
        ([1, 2, 3], 4, []),  # nothing repeats
        ([4], 3, []),
        ([1, 2, 1, 2], 5, [1, 2, 1, 2, 1]),  # runs on into its own copy
        ([7, 7], 3, [7, 7, 7]),
    ],
)
def test_examples(context, k, expected):
    assert propose(context, k) == expected


def naive(context, k, longest):
    for n in range(longest, 0, -1):
        suffix = context[-n:]
        starts = [i for i in range(len(context) - n) if context[i : i + n] == suffix]
        if len(context) > n and starts:
            grown = list(context)
            for i in range(k):
                grown.append(grown[starts[-1] + n + i])
            return grown[len(context) :]
    return []


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.integers(1, 6), st.integers(1, 4), st.integers(1, 30))
def test_finds_what_the_definition_says_however_the_context_grew(context, k, longest, begin):
    assert propose(context, k, longest, begin) == naive(context, k, longest)


@pytest.mark.parametrize(
    ("context", "sure"),
    [
        ([1, 5, 1], 0.25),
        ([9, 1, 2, 5, 8, 1, 2], 0.5),
        ([1, 2, 3, 1, 2, 3], 0.6),
        ([9, *range(7), 5, 8, *range(7)], 0.7),
        ([*range(9), *range(9)], 0.82),
        ([*range(40), *range(40)], 0.95),
        ([7] * 3, 0.5),  # the first was followed by the second: two alike, and no more are there
    ],
)
def test_it_is_the_surer_the_more_is_alike(context, sure):
    asked = []

    class Asked(DraftLimits):
        def should_draft(self, source, confidence):
            asked.append(confidence)
            return False

    drafter = NgramDrafter(replace(host(), draft_limits=Asked()))
    assert not len(drafter.propose(context, 4, Sampling(), KeyedRandomness(0)))
    assert asked[0] == sure  # of the longest; the shorter ones are asked about next


@pytest.mark.parametrize(
    ("lookup", "unsure", "sure"),
    [
        ("ngram", [5, 6, 7, 8, 9, 5], [5, 6, 7, 8, 5, 6]),  # one token alike, and two
        ("suffix", [5, 6, 5, 7, 5], [5, 6, 5, 6, 5]),  # what followed two things before, and one
    ],
)
def test_before_another_drafter_a_lookup_proposes_only_what_it_is_sure_of(lookup, unsure, sure):
    """It was asked first at a fixed k and always answered, though after one token alike it is right once in four times, and a
    head every second."""

    def proposed(spec, context):
        drafter = build_drafter(spec, host())
        drafter.begin(context)
        return drafter.propose(context, 2, Sampling(), KeyedRandomness(0)).drafter

    other = "ngram" if lookup == "suffix" else "suffix"
    assert proposed(lookup, unsure) == lookup  # as the last one, or alone, it is better than nothing
    assert proposed(f"{lookup},{other}", unsure) == other
    assert proposed(f"{lookup},{other}", sure) == lookup
    assert proposed(f"{lookup},none", unsure) == lookup  # who follows it never proposes


@pytest.mark.parametrize("spec", ["ngram:0", "ngram:x", "ngram:-1", ",", ""])
def test_a_bad_spec_is_a_usage_error(spec):
    with pytest.raises(UsageError):
        build_drafter(spec, host())


@given(
    st.lists(st.integers(0, 2), min_size=1, max_size=20),
    st.lists(st.integers(0, 2), max_size=5),
    st.integers(1, 9),
    st.integers(1, 4),
)
def test_a_guess_is_what_followed_the_longest_suffix_of_both_texts(context, said, k, longest):
    """Of those that end before the context's last token; running into its own copy where both end."""
    found = NgramDrafter(host(3), longest=longest).guess(context, said, k)
    text, expected = [*context, *said], []
    for n in range(min(longest, len(text) - 1), 1, -1):
        ends = [end for end in range(n, len(context)) if text[end - n : end] == text[-n:]]
        if ends:
            following = text[ends[-1] :]
            expected = [following[i % len(following)] for i in range(k)]
            break
    assert found == expected


def test_a_suffix_draft_has_read_the_prompt_before_its_first_cycle():
    """Which in a long one takes longer than many drafts."""
    drafter = build_drafter("suffix", host(9))
    drafter.begin([1, 2, 3, 1, 2])
    assert drafter._known == 5
    draft = drafter.propose([1, 2, 3, 1, 2], 1, Sampling(), KeyedRandomness(0))
    assert draft.tokens.tolist() == [3]


class Tokenizer:
    """With a token 7 that begins a turn, and 8 that ends it."""

    all_special_ids: ClassVar = [7, 8]
    all_special_tokens: ClassVar = ["<begin>", "<end>"]
    added_tokens_decoder: ClassVar = {}
    eos_token_id, chat_template = 8, None


@pytest.mark.parametrize("spec", ["ngram", "suffix"])
def test_no_lookup_drafts_what_begins_a_turn(spec):
    """`assistant` and a line's end were followed by a prompt and another turn. An answer may end, and not begin one."""

    def drafted(context, k):
        drafter = build_drafter(spec, host(9, tokenizer=Tokenizer))
        drafter.begin(context)
        return drafter.propose(context, k, Sampling(), KeyedRandomness(0)).tokens.tolist()

    assert drafted([7, 1, 2, 7, 3, 2], 3) == []
    assert drafted([1, 2, 3, 8, 7, 4, 1, 2], 4) == [3, 8]
    assert NgramDrafter(host(9, tokenizer=Tokenizer)).guess([1, 2, 3, 7, 4, 1, 2], [], 4) == [3]
