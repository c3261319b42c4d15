"""Every drafter that is under contract, on tiny models: what the tests in this folder hold to the same assertions."""

from __future__ import annotations

import atexit
from dataclasses import replace
from functools import cache
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from specdec_engine.core.cycle_types import Sampling
from specdec_engine.drafters import build_drafter
from specdec_engine.drafters.base import LoadedDraft, RunGrammar
from specdec_engine.models.pretrained import load_config
from specdec_engine.models.translation import Translation
from specdec_engine.runtime.generic import GenericRuntime
from tests.fakes import VOCAB, byte_tokenizer, graph, host, lean, save_eagle_head, save_head_draft, tiny_llama
from tests.gemma import save_assistant, tiny_gemma
from tests.mtp import save_mtp_target

SPECS = {
    "none": "none",
    "ngram": "ngram",
    "suffix": "suffix",
    "model": "model:small",
    "head": "head:HEAD",
    "assistant": "assistant:ASSISTANT",
    "mtp": "mtp",
    "self": "self:1",
}
CASES = [*SPECS.values(), "head:EAGLE", "ngram:1", "ngram,model:small", "none,ngram,model:small", "suffix,head:HEAD"]
CASES += [
    "lean@mtp",
    "lean@model:small",
    "light@model:small",
    "graph@model:small",
    "graph@ngram,model:small",
    "ngram,head:EAGLE",
    "reduced@model:small",
    "text@model:small",
    "pard@model:small",
    "ngram+model:small",
    "reduced@ngram+model:small",
    "graph@ngram+model:small",
    "tree:ngram,head:HEAD",
    "tree:model:small,head:HEAD",
    "tree:ngram,model:small,suffix",
]
SAMPLINGS = [Sampling(), Sampling(1.0), Sampling(0.7, top_k=20, top_p=0.9, min_p=0.01)]
TARGET = tiny_llama(seed=0)
GEMMA = tiny_gemma()
SMALL = tiny_llama(seed=1, layers=1, hidden=16, vocab=VOCAB - 10)  # padding differs within a family


RUNTIMES = {
    "generic": lambda: LoadedDraft(GenericRuntime(SMALL, "small")),
    "lean": lambda: LoadedDraft(lean(SMALL)),
    "light": lambda: LoadedDraft(lean(SMALL, dtype=torch.bfloat16, quantize="light")),
    "graph": lambda: LoadedDraft(graph(SMALL)),
    # Its id i is the target's 2 i + 1.
    "reduced": lambda: LoadedDraft(lean(tiny_llama(seed=1, layers=1, vocab=80)), torch.arange(1, 160, 2)),
}
TOKENIZER = byte_tokenizer()
OTHER = byte_tokenizer(merges=["o n", "t h", "Ġ a"])
# By its text: its ids mean other tokens.
RUNTIMES["pard"] = lambda: LoadedDraft(lean(SMALL), mask=3)
RUNTIMES["text"] = lambda: LoadedDraft(lean(SMALL), translation=Translation(TOKENIZER, OTHER, "small"))


@cache
def draft_folders() -> tuple[Path, Path, Path]:
    """Folders with a draft head, ours and one of others, and with an assistant."""
    folder = Path(mkdtemp(prefix="specdec-heads-"))
    atexit.register(rmtree, folder, ignore_errors=True)
    head, eagle = save_head_draft(folder / "head", TARGET, TOKENIZER), save_eagle_head(folder / "eagle", TARGET, VOCAB)
    return head, eagle, save_assistant(folder / "assistant")


@cache
def mtp_target(kind: str) -> tuple[Path, Any]:
    """A target with a module in its checkpoint, and its model: a hybrid's, or MiMo's, which runs on our own forward."""
    folder = Path(mkdtemp(prefix="specdec-mtp-"))
    atexit.register(rmtree, folder, ignore_errors=True)
    save_mtp_target(folder, kind, std=0.15)  # with 0.3 a hybrid that reads in other passes is 1e-4 off
    made: Any = AutoModelForCausalLM
    model = made.from_pretrained(folder, config=load_config(folder, False), dtype=torch.float32)
    return folder, model.eval()


OWN_TARGETS = ("assistant:ASSISTANT", "mtp", "lean@mtp")
"""Drafts that are made for another target than the rest."""


def _mtp_kind(spec):
    return {"mtp": "qwen3_5_text", "lean@mtp": "mimo"}.get(spec)


def model_of(spec):
    """The target that it drafts for."""
    if (kind := _mtp_kind(spec)) is not None:
        return mtp_target(kind)[1]
    return GEMMA if "ASSISTANT" in spec else TARGET


def runtime_of(spec):
    """The target's runtime: ours, where the model runs on it."""
    if spec in OWN_TARGETS and spec != "lean@mtp":
        return GenericRuntime(model_of(spec), "target")
    return lean(model_of(spec))


def parts(spec, target=None, matching=None):
    """The drafter that `spec` names, on the generic runtime or on the one before an @; and the target's runtime."""
    runtime, _, plain = spec.rpartition("@")
    target = target or runtime_of(spec)
    about = host(
        VOCAB,
        tokenizer=TOKENIZER,
        target=lambda: target,
        output_rows=lambda ids: TARGET.lm_head.weight.detach()[ids],
    )
    about = replace(about, load_draft=lambda name: RUNTIMES[runtime or "generic"](), grammar=RunGrammar(matching))
    if (kind := _mtp_kind(spec)) is not None:
        about = replace(about, checkpoint=mtp_target(kind)[0])
    head, eagle, assistant = draft_folders()
    folders = {"HEAD": head, "EAGLE": eagle, "ASSISTANT": assistant}
    for word, folder in folders.items():
        plain = plain.replace(word, str(folder))
    return build_drafter(plain, about), target
