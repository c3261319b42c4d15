"""Counters of real servers, and of strange ones."""

from __future__ import annotations

from dataclasses import replace

import pytest

from specdec_engine.attach.counters import read_counters
from specdec_engine.attach.watching import EngineHistory, histories, once
from specdec_engine.errors import ServerUnavailable
from specdec_engine.record.events import Counters
from tests.servers.record import PLAN
from tests.servers.replayed import NAMES, recording, replayed
from tests.servers.runs import said_by


@pytest.mark.parametrize("name", NAMES)
def test_a_servers_counters_are_the_sum_of_its_runs(name):
    """Over all recorded streams; with a stop string vLLM counts tokens that it throws away, and tells no totals."""
    recorded = recording(name)
    before, after = (read_counters(recorded[key]["body"], 0.0)[0].counters for key in ("/metrics", "/metrics after"))
    tags = [tag for tag in PLAN if said_by(recorded, tag)[1][1] is not None]
    sums = [sum(said_by(recorded, tag)[1][i] for tag in tags) for i in (1, 2)]
    found = [after.drafted - before.drafted, after.accepted - before.accepted]
    if len(tags) == len(PLAN):
        assert found == sums
    else:
        assert all(a >= b for a, b in zip(found, sums, strict=True))
    assert sum(after.accepted_at) == after.accepted


def test_an_engine_that_begins_anew_is_not_held_against_its_past():
    def reading(n):
        text = recording("vllm_ngram")["/metrics after"]["body"]
        first = read_counters(text, float(n))[0]
        return replace(first, counters=Counters(float(n), n, 4 * n, 2 * n, 3 * n, (n, n)))

    history = EngineHistory(reading(10))
    assert history.recent is None
    history.take(reading(14))
    assert history.recent.acceptance_rate == 0.5
    assert history.recent_tokens_per_second == 3.0
    history.take(reading(2))
    assert history.recent is None
    assert history.total.drafted == 8


def test_counters_are_read_over_and_over_and_one_failure_is_forgiven():
    with replayed("llama_cpp_draft") as state:
        read = histories(state.url, 0.01)
        assert next(read)[""].latest.server == "llama.cpp"
        whole, asked = state.said["/metrics"]["body"], len(state.requests)
        state.failing["/metrics"] = 2
        assert next(read)[""].before is not None
        assert len(state.requests) == asked + 3
        state.said["/metrics"]["body"] = whole
        state.instead["/metrics"] = (500, {}, "")
        with pytest.raises(ServerUnavailable, match="500"):
            next(read)
        state.instead["/metrics"] = (501, {}, "")
        with pytest.raises(ServerUnavailable, match="has no /metrics"):
            once(state.url)
        for rubbish in (
            "",
            "hello\n",
            "\x00{",
            "other:counter_total 3\n",
            "vllm:foo 1\n",
            "vllm:generation_tokens_total NaN\n",
        ):
            state.instead["/metrics"] = (200, {}, rubbish)
            with pytest.raises(ServerUnavailable):
                once(state.url)
