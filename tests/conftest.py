"""Shared fixtures: no network but where a test starts its own server, and models made on the spot."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import tempfile
from pathlib import Path

import pytest

# Before anything imports huggingface_hub, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
# The profiles of whoever runs the tests are not theirs.
os.environ["XDG_CONFIG_HOME"] = tempfile.mkdtemp(prefix="specdec-config-")

import torch
from hypothesis import settings

from specdec_engine.errors import ModelUnavailable
from specdec_engine.models.builtin import builtin_gguf
from tests import fakes

atexit.register(shutil.rmtree, os.environ["XDG_CONFIG_HOME"], ignore_errors=True)

# Started with signals ignored, as by nohup or a shell's &, these tests go on ignoring them, and what they start does not:
# ignoring is inherited, a handler is not.
for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGTERM):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, lambda *_: None)

# Side by side, two threads of each process wait for the other's: with one, the lean forward's tests take a fifth of the time.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

# In CI the same examples each time: a rare find belongs to whoever runs the tests by hand, not to an unrelated change.
settings.register_profile("ci", derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")


@pytest.fixture(scope="session")
def builtin() -> Path:
    """The built-in target's file. Without a network the test skips; in CI that is a failure."""
    try:
        return builtin_gguf()
    except ModelUnavailable as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real checkpoint on disk: a random 2-layer Llama with a byte-level BPE tokenizer and a chat template.

    With this seed its greedy answers run on for 60 tokens before they end.
    """
    return fakes.save_checkpoint(tmp_path_factory.mktemp("models") / "target", seed=8)


@pytest.fixture(scope="session")
def draft_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A smaller one with the same tokenizer."""
    return fakes.save_checkpoint(tmp_path_factory.mktemp("models") / "draft", seed=1, layers=1, hidden=16)
