"""Cache and rollback on a real random-weight Llama, as a state machine against a plain list of tokens."""

from __future__ import annotations

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from specdec_engine.runtime.generic import GenericRuntime
from tests.fakes import VOCAB, graph, lean, tiny_llama

MODEL = tiny_llama(seed=3)
TOKENS = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=7)


class CacheAgainstList(RuleBasedStateMachine):
    """Whatever was scored and forgotten before, logits are those of the remaining tokens from scratch."""

    @initialize()
    def fresh(self):
        self.runtime = self.make()
        self.tokens: list[int] = []

    def make(self):
        return GenericRuntime(MODEL, "tiny")

    @rule(tokens=TOKENS, rows=st.integers(1, 7))
    def forward(self, tokens, rows):
        rows = min(rows, len(tokens))
        logits = self.runtime.forward(torch.tensor(tokens), rows)
        self.tokens += tokens
        with torch.inference_mode():
            scratch = MODEL(torch.tensor([self.tokens]), use_cache=False).logits[0, -rows:]
        # Logits are of size 3; rounding reaches 1e-4 at times, a wrong cache is off by 1.
        assert torch.allclose(logits, scratch, atol=1e-3)

    @rule(data=st.data())
    def rollback(self, data):
        to = data.draw(st.integers(0, len(self.tokens) + 3))  # further than there is: nothing happens
        self.runtime.rollback(to)
        self.runtime.rollback(to)  # idempotent
        del self.tokens[to:]

    @invariant()
    def length(self):
        if hasattr(self, "runtime"):
            assert self.runtime.cached == len(self.tokens)


class LeanCacheAgainstList(CacheAgainstList):
    """The lean forward, whose cache begins with room for 16 tokens, and so is made anew on the way."""

    def make(self):
        return lean(MODEL, capacity=16)


class GraphCacheAgainstList(CacheAgainstList):
    """Recorded passes, padded to a few widths: what surplus rows leave in the cache must never be seen."""

    def make(self):
        return graph(MODEL)


SETTINGS = settings(max_examples=60, stateful_step_count=12, deadline=None)
for machine in (CacheAgainstList, LeanCacheAgainstList, GraphCacheAgainstList):
    machine.TestCase.settings = SETTINGS
TestRollback = CacheAgainstList.TestCase
TestLeanRollback = LeanCacheAgainstList.TestCase
TestGraphRollback = GraphCacheAgainstList.TestCase
