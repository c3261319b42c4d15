"""A running server's k, estimated from its answers."""

from __future__ import annotations

import json
import random

import pytest

from specdec_engine.record.events import Cycle
from specdec_engine.tune.served import ServedAnswer, flags_for, tuned
from tests.servers.replayed import replayed, without_speculation


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "p.txt"
    file.write_text("one\ntwo\nthree\nfour\nfive\nsix\nseven\neight\n")
    return file


def test_beside_a_plain_server_there_is_a_recommendation(specdec, prompts):
    with replayed("llama_cpp_draft") as fast, replayed("llama_cpp_ngram") as slow:
        without_speculation(slow, 250.0)
        typed = ("tune", "--attach", fast.url, "--plain", slow.url, "--prompts", prompts)
        result = specdec(*typed, "--json")
        assert result.code == 0, result.err
        found = json.loads(result.out)
        table = specdec(*typed)
        assert table.code == 0, table.err
    (curve,) = (draft["curve"] for draft in found["drafts"])
    assert [point["k"] for point in curve] == list(range(len(curve)))
    assert (curve[0]["mean_emitted_per_cycle"], curve[0]["speedup"]) == (1.0, pytest.approx(1.0))
    emitted = [point["mean_emitted_per_cycle"] for point in curve]
    assert emitted == sorted(emitted)
    assert emitted[-1] > 1
    assert found["answers"]["count"] == 8
    assert found["exactness"] == "exact"
    assert found["recommendation"]["k"] > 0
    assert found["recommendation"]["speedup"] == found["predicted"]["speedup"]
    assert {entry["draft"] for entry in found["lookups"]} == {"ngram", "suffix"}
    assert all(entry["mean_emitted_per_cycle"] >= 1 for entry in found["lookups"])
    assert "as it runs" in table.out
    assert found["recommendation"]["reason"] in table.out


def test_without_a_plain_server_no_speedup_is_told(specdec, prompts):
    with replayed("vllm_ngram") as state:
        result = specdec("tune", "--attach", state.url, "--prompts", prompts, "--json")
    found = json.loads(result.out)
    assert found["exactness"] == "inferred"
    assert found["recommendation"] is None
    assert {point["speedup"] for point in found["drafts"][0]["curve"]} == {None}


@pytest.mark.parametrize(
    "typed",
    [
        ("--plain", "x:1"),
        ("--attach", "x:1", "--draft", "ngram"),
        ("--attach", "x:1", "--target", "other"),
        ("--attach", "x:1", "--save"),
        ("--attach", "x:1", "--device", "cpu"),
    ],
)
def test_what_a_server_cannot_be_told_is_refused_before_it_is_asked(specdec, typed):
    assert specdec("tune", *typed).code == 2


def test_a_server_that_drafts_nothing_and_a_plain_one_that_drafts_are_refused(specdec, prompts):
    with replayed("llama_cpp_draft") as fast, replayed("llama_cpp_ngram") as slow:
        both = specdec("tune", "--attach", fast.url, "--plain", slow.url, "--prompts", prompts)
        assert (both.code, "drafts, too" in both.err) == (2, True)
        without_speculation(slow, 250.0)
        none = specdec("tune", "--attach", slow.url, "--prompts", prompts)
        assert (none.code, "drafted nothing" in none.err) == (2, True)


def cycle(index, drafted, accepted, seconds):
    none = (None,) * drafted
    end = "bonus" if accepted == drafted else "recovered"
    return Cycle(index, "served", drafted, none, accepted, (None,) * (accepted + 1), end, none, none, none, none, (),
                 None, None, None, None, cycle_s=seconds)  # fmt: skip


def answer(alpha, k, plain_s, cycle_s, seed):
    draw = random.Random(seed)
    accepted = [next((i for i in range(k) if draw.random() > alpha), k) for _ in range(400)]
    cycles = tuple(cycle(i, k, a, cycle_s) for i, a in enumerate(accepted))
    return ServedAnswer(cycles, (0, *(t for c in cycles for t in c.emitted)), 1, plain_s)


def test_the_estimate_is_the_closed_form_where_acceptances_are_alike():
    """Leviathan's (1 − α^(k+1)) / (1 − α) tokens a cycle, over a cost that grows by the drafted token."""
    alpha, k, plain_s, step_s = 0.7, 6, 0.02, 0.004
    found = tuned([answer(alpha, k, plain_s, plain_s + k * step_s, seed) for seed in range(12)])
    assert len(found.curve) == k + 1
    for setting in found.curve:
        emitted = (1 - alpha ** (setting.k + 1)) / (1 - alpha)
        assert setting.emitted == pytest.approx(emitted, rel=0.02)
        assert setting.speedup.mean == pytest.approx(emitted / (1 + setting.k * step_s / plain_s), rel=0.02)
    assert found.decided
    assert found.best.k in (2, 3)


def test_a_draft_that_does_not_pay_is_said_to_be_left_out():
    found = tuned([answer(0.1, 4, 0.02, 0.05, seed) for seed in range(12)])
    assert found.best.k == 0
    assert "leave out" in flags_for("vLLM", found.best.k)


def test_a_server_that_takes_no_seed_is_asked_without(specdec, prompts, monkeypatch):
    """As SGLang, whose draws cannot be told."""
    from specdec_engine.attach.llama_cpp import LlamaCpp

    monkeypatch.setattr(LlamaCpp, "seeds", False)
    with replayed("llama_cpp_draft") as state:
        result = specdec("tune", "--attach", state.url, "--prompts", prompts, "--json")
        assert result.code == 0, result.err
        assert json.loads(result.out)["answers"]["count"] == 8
        assert specdec("bench", "--attach", state.url, "--prompts", prompts, "--repeats", "1").code == 0
