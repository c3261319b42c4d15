"""A server measured beside another one, at several loads."""

from __future__ import annotations

import json

import pytest

from specdec_engine.attach.load import Load, ServedSample
from specdec_engine.bench.served import Spread, figures_at
from tests.servers.replayed import replayed, without_speculation


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "p.txt"
    file.write_text("one\ntwo\nthree\nfour\n")
    return file


def test_two_servers_beside_each_other_at_two_loads(specdec, prompts, tmp_path):
    with replayed("llama_cpp_draft") as fast, replayed("llama_cpp_ngram") as slow:
        without_speculation(slow, 250.0)
        typed = (
            "bench",
            "--attach",
            fast.url,
            "--plain",
            slow.url,
            "--prompts",
            prompts,
            "--concurrency",
            "1,3",
            "--repeats",
            "2",
        )
        out = tmp_path / "record.json"
        result = specdec(*typed, "--out", out)
        assert result.code == 0, result.err
        assert "× (" in result.out
        assert specdec(*typed, "--fail-below", "99").code == 6
    found = json.loads(out.read_text())
    assert found["schema"] == "specdec.bench/1"
    assert [arm["concurrency"] for arm in found["arms"]] == [1, 3]
    for arm in found["arms"]:
        assert len(arm["samples"]) == 8
        assert arm["speedup"] == pytest.approx(arm["tokens_per_second"] / arm["plain"]["tokens_per_second"])
        assert arm["speedup"] > 1
        assert 0 < arm["acceptance_rate"] <= 1
        assert arm["accepted_at"] == sorted(arm["accepted_at"], reverse=True)
        assert arm["ttft_s"]["p50"] > 0
        assert arm["spec_decode_acceptance_length"] >= arm["mean_emitted_per_cycle"]
        assert (arm["identical"], arm["compared"]) == (4, 4)
    assert found["recommendation"]["reason"] == "speculation is faster at every load"


def test_one_server_has_no_speedup(specdec, prompts):
    with replayed("vllm_ngram") as state:
        found = json.loads(specdec("bench", "--attach", state.url, "--prompts", prompts, "--format", "json").out)
    assert found["arms"][0]["speedup"] is None
    assert found["arms"][0]["acceptance_rate"] > 0
    assert found["baseline"]["tokens_per_second"] is None
    assert found["recommendation"] is None


@pytest.mark.parametrize(
    "typed",
    [
        ("--plain", "x:1"),
        ("--concurrency", "2"),
        ("--attach", "x:1", "--concurrency", "0"),
        ("--attach", "x:1", "--concurrency", "a"),
        ("--attach", "x:1", "--temperature", "0,1"),
        ("--attach", "x:1", "--rule", "block"),
        ("--attach", "x:1", "--engine", "vllm"),
        ("--attach", "x:1", "-d", "a", "-d", "b"),
        ("--engine", "vllm", "--plain", "x:1"),
        ("--attach", "x:1", "-k", "4"),
        ("--attach", "x:1", "--format", "md"),
        ("--attach", "x:1", "--fail-below", "1"),
        ("--attach", "x:1", "--expect", "builtin", "--temperature", "1"),
        ("--engine", "vllm", "-k", "1,4"),
    ],
)
def test_what_does_not_belong_together_is_refused_before_anything_runs(specdec, typed):
    assert specdec("bench", *typed).code == 2


def sample(question, plain, token_s, block=0):
    return ServedSample(
        question=question, block=block, concurrency=1, plain=plain, ttft_s=0.1, decode_s=10 * token_s, emitted=11, cycles=6,
        drafted=20, tested=8, accepted=5, accepted_at=(4, 1), drafts=5, token_s=(token_s,) * 10, token_ids=(1,) * 11,
        text="x", prompt_ids=(1,),
    )  # fmt: skip


def test_a_speedup_is_paired_prompt_by_prompt():
    """One prompt is twice as fast and one half as fast: on the whole nothing is gained."""
    fast = Load((sample(0, False, 0.1), sample(1, False, 0.2)), 2.0, {})
    slow = Load((sample(0, True, 0.2), sample(1, True, 0.1)), 2.0, {})
    found = figures_at([fast, slow], 1, greedy=True)
    assert found.speedup.mean == pytest.approx(1.0)
    assert found.mean_emitted_per_cycle == 2.0
    assert found.alpha == 5 / 8
    assert found.accepted_at == (0.8, 0.2)
    assert found.speculative.throughput == 11.0


def test_percentiles_are_values_that_were_seen():
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 3.0)
    assert Spread.of([]) is None


def test_two_servers_that_both_draft_are_not_compared(specdec, prompts):
    with replayed("llama_cpp_draft") as fast, replayed("llama_cpp_draft") as slow:
        result = specdec("bench", "--attach", fast.url, "--plain", slow.url, "--prompts", prompts)
    assert result.code == 2
    assert "the server at --plain drafts, too" in result.err


def test_a_place_that_cannot_be_written_is_found_before_anything_is_asked(specdec, prompts, tmp_path):
    with replayed("llama_cpp_draft") as state:
        result = specdec("bench", "--attach", state.url, "--prompts", prompts, "--out", tmp_path / "no" / "x.json")
        assert result.code != 0
        assert not [path for path, *_ in state.requests if "completion" in path]


def test_several_engines_stand_in_one_table(specdec, prompts, tmp_path):
    one, other = tmp_path / "one.json", tmp_path / "other.json"
    typed = ("--prompts", prompts, "--repeats", "1")
    with replayed("llama_cpp_draft") as llama, replayed("vllm_draft") as vllm:
        assert specdec("bench", "--attach", llama.url, *typed, "--out", one).code == 0
        both = specdec("bench", "--attach", vllm.url, *typed, "--out", other, "--compare", one)
        assert both.code == 0, both.err
        rows = [line for line in both.out.splitlines() if "llama.cpp," in line or "vLLM," in line]
        assert len(rows) == 2
        (tmp_path / "fewer").write_text("one\n")
        refused = specdec("bench", "--attach", vllm.url, "--prompts", tmp_path / "fewer", "--compare", one)
        assert (refused.code, "other prompts" in refused.err) == (2, True)
        warm = specdec("bench", "--attach", vllm.url, *typed, "--temperature", "1", "--compare", one)
        assert (warm.code, "at temperature 1" in warm.err) == (2, True)
        assert specdec("bench", "--attach", vllm.url, *typed, "--compare", prompts).code == 2
    for path in (one, other):
        (arm,) = json.loads(path.read_text())["arms"]
        for sample in arm["samples"]:
            said = sample["speculative_decoding"]
            steps = {int(n): count for n, count in said["acceptance_histogram"].items()}
            assert sum(steps.values()) == said["num_spec_steps"]
            assert sum(n * count for n, count in steps.items()) == said["num_accepted_draft_tokens"]
            assert said["mean_acceptance_length"] == pytest.approx(
                1 + said["num_accepted_draft_tokens"] / said["num_spec_steps"]
            )
