"""Figures over several cycles, on hand-made ones."""

from __future__ import annotations

import pytest

from specdec_engine.record.cycle_stats import budget, expected_emitted, median_phases, rate, rates, rolling_alpha
from specdec_engine.record.stats import Summary
from tests.unit.test_stats import cycle


def summary(cycles):
    found = Summary()
    for c in cycles:
        found = found.plus(c)
    return found


def test_positions_count_what_was_drafted_tested_and_kept_there():
    positions = summary([cycle((1, 2, 3), 1, (1, 9)), cycle((1, 2), 2, (1, 2, 3)), cycle((), 0, (5,))]).positions
    assert [(p.drafted, p.tested, p.accepted) for p in positions] == [(2, 2, 2), (2, 2, 1), (1, 0, 0)]
    assert [p.rate for p in positions] == [1.0, 0.5, None]
    assert positions[2].reach == 0.0


def test_rates_are_tokens_over_engine_seconds():
    cycles = [cycle((1,), 1, (1, 2), seconds=(0.5, 1.0, 0.5)), cycle((), 0, (5,), seconds=(0.0, 1.0, 0.0))]
    assert rates(cycles) == [1.0, 1.0]
    assert rate(cycles) == 1.0
    assert rate([]) is None


def test_rolling_alpha_forgets():
    cycles = [cycle((1, 2), 2, (1, 2, 3)), cycle((1, 2), 0, (9,)), cycle((), 0, (9,)), cycle((), 0, (9,))]
    assert rolling_alpha(cycles, 2) == [1.0, 2 / 3, 0.0, None]


def test_a_cycles_time_is_split_by_medians():
    cycles = [cycle((1,), 1, (1, 2), seconds=(s, 2 * s, 0.1)) for s in (1.0, 2.0, 30.0)]
    found = median_phases(cycles)
    assert (found.draft_s, found.verify_s, found.other_s) == (2.0, 4.0, 0.1)
    assert median_phases([]) is None


def test_a_speedup_is_tokens_over_what_they_cost_in_plain_cycles():
    """Two tokens a cycle of 1.5 plain ones."""
    found = budget(summary([cycle((1,), 1, (1, 2), seconds=(0.25, 1.0, 0.25))] * 4), 1.0)
    assert (found.emitted, found.cost) == (2.0, 1.5)
    assert found.speedup == pytest.approx(4 / 3)
    assert found.at_constant_alpha == pytest.approx(4 / 3)  # alpha is 1, so that the formula has nothing to smooth
    assert dict(found.lost) == {"the wider pass": 0.25, "drafting": 0.25}
    assert budget(Summary(), 1.0) is None


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.9, 1.0])
def test_expected_tokens_are_the_geometric_sum(alpha):
    assert expected_emitted(alpha, 4) == pytest.approx(sum(alpha**i for i in range(5)))
