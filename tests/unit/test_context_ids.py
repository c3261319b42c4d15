"""Ids that a draft takes from the context."""

from __future__ import annotations

import random

import torch

from specdec_engine.drafters.context_ids import MOST, ContextIds

OWN = torch.arange(0, 1000, 10)
ROWS = torch.arange(2000.0)[:, None].repeat(1, 4)


def fresh() -> ContextIds:
    return ContextIds(OWN, lambda ids: ROWS[ids])


def test_columns_depend_on_the_context_alone():
    """Read at once or bit by bit, after another context or first; fewer than fit, and more."""
    dice = random.Random(3)
    for length in (1, 40, 3 * MOST, 20 * MOST):
        context = [dice.randrange(1000) for _ in range(length)]
        once, slowly = fresh(), fresh()
        slowly.read([1, 2, 3, 4])
        slowly.forget()
        once.read(context)
        for end in sorted(dice.sample(range(length), min(length, 30))):
            slowly.read(context[:end])
        slowly.read(context)
        assert torch.equal(once.ids, slowly.ids)
        assert len(set(once.ids.tolist())) == len(once.ids) <= len(OWN) + MOST
        for ids in (once, slowly, once.another()):
            ids.read(context)
            assert torch.equal(ROWS[ids.ids[len(OWN) :]], ids.rows if ids.rows is not None else ROWS[:0])
            assert all(ids.column(token) == column for column, token in enumerate(ids.ids.tolist()))


def test_of_many_the_last_ones_stay():
    ids = fresh()
    context = [token for token in range(1, 600) if token % 10]
    ids.read(context)
    assert set(ids.ids.tolist()) == set(OWN.tolist()) | set(context[-MOST:])
    ids.read([*context, context[0]])
    assert ids.column(context[0]) >= len(OWN)
    assert ids.column(context[-MOST]) == -1


def test_a_head_with_output_rows_of_its_own_keeps_to_its_ids():
    ids = ContextIds(OWN, None)
    ids.read([1, 2, 3])
    assert ids.rows is None
    assert torch.equal(ids.ids, OWN)
