"""Every kind of model that transformers has with a state of its own: whatever was read and forgotten before, logits are those
of the remaining tokens from scratch, and tokens are fed again with the next pass instead of in one of their own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec_engine.runtime.context_state import FED_AGAIN
from specdec_engine.runtime.generic import GenericRuntime
from specdec_engine.runtime.transformers_cache import rollback_of
from tests.models import checkpoints

VOCAB = 300


def stateful():
    """By the class: recurrent layers among others or alone, or a state outside the cache."""
    for name in checkpoints.kinds():
        if name in checkpoints.MISTAKES:
            continue
        model = checkpoints.build(name)
        if name not in REFUSED and (rollback_of(model.config, model, name).how != "crop" or model._is_stateful):
            yield name


REFUSED = {"cpmant": "its cache has rows of its own", "xlnet": "it sees tokens to come"}
KINDS = tuple(stateful())
FLOORED = {"nemotron_h": 0.02, "zamba2": 0.02}
"""transformers puts a floor under the time steps of several tokens, and none under that of one: logits of spread 1.6 differ
by 5e-3."""
PASSES = st.lists(
    st.tuples(st.lists(st.integers(1, VOCAB - 1), min_size=1, max_size=6), st.integers(0, 9)), min_size=1, max_size=9
)


def test_the_kinds_are_those_that_people_have():
    assert {"qwen3_next", "qwen3_5_text", "granitemoehybrid", "nemotron_h", "lfm2", "falcon_h1", "mamba2"} <= set(KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_logits_after_any_passes_and_rollbacks_are_those_from_scratch(name):
    model = checkpoints.build(name)
    runtime = GenericRuntime(model, name)

    @settings(max_examples=5, deadline=None, database=None)
    @given(PASSES)
    def check(passes):
        runtime.rollback(0)
        text = list[int]()
        for tokens, back in passes:
            logits = runtime.forward(torch.tensor(tokens), len(tokens))
            text += tokens
            with torch.inference_mode():
                scratch = model(torch.tensor([text]), use_cache=False).logits[0, -len(tokens) :]
            assert torch.allclose(logits, scratch, atol=FLOORED.get(name, 1e-3))
            runtime.rollback(max(0, len(text) - back))
            del text[max(0, len(text) - back) :]
            assert runtime.cached == len(text)

    check()


@pytest.fixture
def counted(monkeypatch):
    """A runtime of Qwen3-Next, and the number of tokens of each of its passes."""
    model = checkpoints.build("qwen3_next")
    runtime, sizes = GenericRuntime(model, "it"), []
    forward = type(model).forward

    def count(self, **inputs):
        sizes.append(inputs["input_ids"].shape[1])
        return forward(self, **inputs)

    monkeypatch.setattr(type(model), "forward", count)
    return runtime, sizes


def test_a_rejection_costs_rows_and_no_pass(counted):
    runtime, sizes = counted
    runtime.forward(torch.arange(1, 7), 1)
    for _ in range(3):  # newest and three drafted, of which one is accepted
        runtime.forward(torch.arange(1, 5), 4)
        runtime.rollback(runtime.cached - 2)
    assert sizes == [6, 4, 6, 8]


def test_what_waits_too_long_is_read_once_and_kept(counted):
    runtime, sizes = counted
    runtime.forward(torch.arange(1, 7), 1)
    for _ in range(8):
        runtime.forward(torch.arange(1, 5), 4)
        runtime.rollback(runtime.cached - 2)
    assert max(sizes) <= FED_AGAIN + 4
    assert len(sizes) == 9 + 1  # ten tokens waited, once


def test_plain_decoding_keeps_a_checkpoint_now_and_then(counted, monkeypatch):
    runtime, sizes = counted
    from specdec_engine.runtime import context_state

    taken = []
    copied = context_state.copied_states
    monkeypatch.setattr(context_state, "copied_states", lambda cache: taken.append(1) or copied(cache))
    for _ in range(32):
        runtime.forward(torch.ones(1, dtype=torch.long), 1)
    assert sizes == [1] * 32
    assert len(taken) <= 32 // FED_AGAIN
