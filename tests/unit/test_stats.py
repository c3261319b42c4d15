"""Definitions, on hand-made cycles."""

from __future__ import annotations

from specdec_engine.record.events import Cycle, Finished, Started
from specdec_engine.record.stats import Summary


def cycle(drafted, accepted, emitted, overlap=None, seconds=(0.25, 0.5, 0.25)):
    n = len(drafted)
    return Cycle(
        0,
        "x",
        n,
        drafted,
        accepted,
        emitted,
        "recovered",
        (None,) * n,
        (None,) * n,
        (None,) * n,
        overlap or (None,) * n,
        (),
        draft_s=seconds[0],
        verify_s=seconds[1],
        other_s=seconds[2],
        context=10,
    )


def folded(*events):
    summary = Summary()
    for event in events:
        summary = summary.plus(event)
    return summary


def test_the_rates_of_the_glossary():
    """Of 4 drafted 2 accepted (3 tested), of 2 drafted 2 (2 tested), then a plain cycle."""
    summary = folded(
        Started((1, 2, 3), {}, 7),
        cycle((1, 2, 3, 4), 2, (1, 2, 9), (0.5, 0.7, 0.3, 0.9)),
        cycle((1, 2), 2, (1, 2, 3), (1.0, 1.0)),
        cycle((), 0, (5,)),
        Finished("length", 7, 3, 0.5),
    )
    assert summary.acceptance_rate == 4 / 6
    assert summary.alpha == 4 / 5
    assert summary.expected_alpha == (0.5 + 0.7 + 0.3 + 1.0 + 1.0) / 5
    assert summary.mean_emitted_per_cycle == 7 / 3
    assert summary.tokens_per_second == 7 / 3.0
    assert summary.speedup_estimate is None  # one plain cycle is too few
    figures = summary.figures()
    assert (figures["prompt_tokens"], figures["seed"], figures["finish_reason"], figures["prefill_s"]) == (
        3,
        7,
        "length",
        0.5,
    )


def test_the_speedup_is_estimated_from_several_plain_cycles():
    """Plain ones take 0.5 + 0.25 s; all five together 7 tokens in 5 s."""
    summary = folded(cycle((1, 2), 2, (1, 2, 3)), *[cycle((), 0, (5,))] * 4)
    assert summary.speedup_estimate == 7 / 5.0 * 0.75


def test_accepted_counts_what_the_rule_kept_before_a_stop_clipped_it():
    summary = folded(cycle((1, 2, 3), 3, (1, 2)))
    assert (summary.accepted, summary.emitted, summary.tested) == (3, 2, 3)


def test_undefined_is_none_and_not_zero():
    figures = Summary().figures()
    undefined = ("acceptance_rate", "alpha", "expected_alpha", "mean_emitted_per_cycle", "tokens_per_second", "seed")
    assert [figures[name] for name in undefined] == [None] * 6
