"""One statistical test of the whole loop, with its power computed: it would catch each mutant with near certainty.

The enumeration proves the algebra; this proves that `decode` wires it up: warping, drawing, rollback, random numbers.
"""

from __future__ import annotations

from collections import Counter
from itertools import product

import pytest
from scipy.stats import chi2, ncx2

from specdec_engine.core.cycle_types import Sampling
from specdec_engine.verify.rules import BlockRule, TokenRule
from tests.exact.test_lossless import BonusFromTheWrongRow, NoResidual, SwappedRatio, enumerate_emitted
from tests.fakes import ScriptedDrafter, TableDrafter, TableTarget, emitted, run, table_logits, table_probs

VOCAB, LENGTH, K, RUNS = 3, 3, 2, 3000
CELLS = list(product(range(VOCAB), repeat=LENGTH))
CRITICAL = chi2.ppf(1 - 1e-3, len(CELLS) - 1)


def p(context):
    return table_probs(context, VOCAB, 0)


def q(context):
    return table_probs(context, VOCAB, 1)


def exact():
    return {t: float(p(())[t[0]] * p(t[:1])[t[1]] * p(t[:2])[t[2]]) for t in CELLS}


def observed(rule, drafter, coupling="independent"):
    """Counts of the first tokens over many seeds. The prompt is one token that the table does not see."""
    target = TableTarget(VOCAB, logits=lambda context: table_logits(context[1:], VOCAB, 0))
    sampling = Sampling(1.0, coupling=coupling)
    runs = (
        run(target, drafter, [0], k=K, sampling=sampling, max_tokens=LENGTH, seed=seed, rule=rule)
        for seed in range(RUNS)
    )
    return Counter(tuple(emitted(events)) for events in runs)


def statistic(counts):
    return sum((counts[t] - RUNS * mass) ** 2 / (RUNS * mass) for t, mass in exact().items())


class Drafter(TableDrafter):
    """The table drafter, blind to the prompt as well."""

    def propose(self, context, k, sampling, random):
        return super().propose(context[1:], k, sampling, random)


SAMPLED = Drafter(VOCAB, 1)
DETERMINISTIC = ScriptedDrafter(lambda context, k: [(len(context) + i) % VOCAB for i in range(k)])


@pytest.mark.parametrize("drafter", [SAMPLED, DETERMINISTIC], ids=["sampled", "deterministic"])
@pytest.mark.parametrize("rule", [TokenRule(), BlockRule()], ids=lambda rule: rule.name)
@pytest.mark.parametrize("coupling", ["independent", "gumbel"])
def test_the_loop_emits_the_targets_distribution(rule, drafter, coupling):
    """With Gumbel coupling the noise alone is random: over seeds it must give the target's distribution, too."""
    assert statistic(observed(rule, drafter, coupling)) < CRITICAL


@pytest.mark.parametrize(
    "mutant", [SwappedRatio(), NoResidual(), BonusFromTheWrongRow()], ids=lambda m: type(m).__name__
)
def test_the_test_has_the_power_it_claims(mutant):
    """Non-centrality from the exact distribution of the mutant: each would pass with a chance below one in a million."""
    wrong = enumerate_emitted(mutant, p, q, K, LENGTH)
    noncentrality = RUNS * sum((wrong[t] - mass) ** 2 / mass for t, mass in exact().items())
    assert ncx2.cdf(CRITICAL, len(CELLS) - 1, noncentrality) < 1e-6


def test_a_wrong_rule_fails_the_statistical_test():
    assert statistic(observed(NoResidual(), SAMPLED)) > CRITICAL
