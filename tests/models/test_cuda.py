"""What only a GPU can show; skipped where there is none."""

from __future__ import annotations

import pytest
import torch

from specdec_engine.acceptance import RULES
from specdec_engine.drafters.base import DraftHost, LoadedDraft
from specdec_engine.drafters.on_runtime import RuntimeDrafter
from specdec_engine.judge import Judge
from specdec_engine.runtime.decoder import Decoder
from specdec_engine.runtime.graphs import CudaRecorder, GraphRuntime
from specdec_engine.runtime.shape import shape_of
from specdec_engine.target import ModelTarget
from specdec_engine.types import Sampling
from tests.fakes import VOCAB, StateWeights, cycles, emitted, lean, run, tiny_llama

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
PROMPT = [5, 6, 7, 8, 5, 6]
SAMPLINGS = [Sampling(), Sampling(0.9), Sampling(0.7, top_k=30, top_p=0.9, min_p=0.02)]


def recorded(model, capacity=64):
    device = torch.device("cuda")
    decoder = Decoder(shape_of(model.config), StateWeights(model.to(device)), torch.float32, device, "none")
    return GraphRuntime(decoder, "graph", model.config.max_position_embeddings, capacity, CudaRecorder(device))


def pair():
    target, draft = recorded(tiny_llama(0, max_position_embeddings=1024)), recorded(tiny_llama(1, layers=1))
    about = DraftHost("t", None, VOCAB, target.device, lambda name: LoadedDraft(draft), lambda: target, lambda ids: ids)
    return ModelTarget(target, "t"), RuntimeDrafter(draft, about, "small")


@pytest.mark.parametrize("rule", RULES.values(), ids=lambda rule: rule.name)
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_recorded_verdicts_are_the_eager_ones(rule, sampling):
    target, drafter = pair()
    found = []
    for recorder in (None, target.runtime.recorder):
        judge = Judge(rule, target.device, recorder)
        found.append(cycles(run(target, drafter, PROMPT, k=4, sampling=sampling, max_tokens=200, judge=judge)))
    assert [c.emitted for c in found[0]] == [c.emitted for c in found[1]]
    assert [c.drafted for c in found[0]] == [c.drafted for c in found[1]]


def test_greedy_text_is_the_cpus_in_float32():
    torch.backends.cuda.matmul.allow_tf32 = False
    target, drafter = pair()
    plain = run(
        ModelTarget(lean(tiny_llama(0, max_position_embeddings=1024)), "t"), drafter, PROMPT, k=0, max_tokens=60
    )
    assert emitted(run(target, drafter, PROMPT, k=4, max_tokens=60)) == emitted(plain)


def test_a_cycle_waits_for_nothing_but_its_verdict():
    """torch raises at any call that synchronises implicitly; the verdict waits on its event, explicitly."""
    target, drafter = pair()
    judge = Judge(RULES["token"], target.device, target.runtime.recorder)
    run(target, drafter, PROMPT, k=4, max_tokens=60, judge=judge)  # records
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(target, drafter, PROMPT, k=4, max_tokens=60, judge=judge)
    finally:
        torch.cuda.set_sync_debug_mode("default")
