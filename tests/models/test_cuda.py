"""What only a GPU can show; skipped where there is none."""

from __future__ import annotations

from dataclasses import astuple, replace

import pytest
import torch

from specdec_engine.core.cycle_types import Sampling
from specdec_engine.core.transfer import download, upload
from specdec_engine.drafters.base import DraftSetup, LoadedDraft
from specdec_engine.drafters.ngram import NgramDrafter
from specdec_engine.drafters.on_runtime import RuntimeDrafter
from specdec_engine.record.events import Event, known_phases
from specdec_engine.runtime.decoder import Decoder
from specdec_engine.runtime.graphs import CudaRecorder, GraphRuntime
from specdec_engine.runtime.shape import Unsupported, shape_of
from specdec_engine.runtime.target import ModelTarget
from specdec_engine.system.timing import timer_for
from specdec_engine.verify.coupling import gumbel_noise
from specdec_engine.verify.rules import RULES
from specdec_engine.verify.verifier import verifier_for
from tests.fakes import CPU, VOCAB, StateWeights, cycles, emitted, events, lean, run, tiny_llama

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
PROMPT = [5, 6, 7, 8, 5, 6]
LONG = list(range(1, 230))
SAMPLINGS = [Sampling(), Sampling(0.9), Sampling(0.7, top_k=30, top_p=0.9, min_p=0.02), Sampling(0.9, raw=True)]


@pytest.fixture(autouse=True)
def float32():
    """As on the CPU, which texts are compared with."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def cuda():
    return torch.device("cuda", torch.cuda.current_device())


def recorded(model, capacity=64):
    """The weights are copied: `model` stays where it is."""
    device = cuda()
    decoder = Decoder(shape_of(model.config), StateWeights(model), torch.float32, device, "none")
    return GraphRuntime(decoder, "graph", model.config.max_position_embeddings, capacity, CudaRecorder(device))


def target_model():
    """With heads of 16, which our own kernels take."""
    return tiny_llama(0, hidden=64, max_position_embeddings=1024)


def draft_model():
    return tiny_llama(1, layers=1, hidden=64, max_position_embeddings=1024)


def pair(capacity=64):
    target, draft = recorded(target_model(), capacity), recorded(draft_model(), capacity)
    return ModelTarget(target, "t"), RuntimeDrafter(draft, about(target, draft), "small")


def about(target, draft):
    return DraftSetup("t", None, VOCAB, target.device, lambda name: LoadedDraft(draft), lambda: target, lambda ids: ids)


def verifier_on(target, rule="token"):
    return verifier_for(RULES[rule], target.device, target.runtime.recorder.another())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_recorded_verdicts_are_the_eager_ones(rule, sampling):
    target, drafter = pair()
    found = []
    for verifier in (verifier_for(RULES[rule], target.device), verifier_on(target, rule)):
        found.append(cycles(run(target, drafter, PROMPT, k=4, sampling=sampling, max_tokens=200, verifier=verifier)))
    assert [c.emitted for c in found[0]] == [c.emitted for c in found[1]]
    assert [c.drafted for c in found[0]] == [c.drafted for c in found[1]]


@pytest.mark.parametrize("prompt", [PROMPT, LONG], ids=["short", "grows"])
@pytest.mark.parametrize("k", [1, 4, 7])
def test_greedy_text_is_the_cpus_in_float32(k, prompt):
    target, drafter = pair()
    plain = run(ModelTarget(lean(target_model()), "t"), drafter, prompt, k=0, max_tokens=60)
    for _ in range(2):  # the second time nothing is recorded
        assert emitted(run(target, drafter, prompt, k=k, max_tokens=60, verifier=verifier_on(target))) == emitted(plain)


def test_growing_in_turns_leaves_the_others_recordings_whole():
    """Target, draft, verdicts and a cut of the target each have memory and a stream of their own: when one is made anew, what
    the libraries keep for the others stays."""
    expected = emitted(run(ModelTarget(lean(target_model()), "t"), pair()[1], PROMPT, k=0, max_tokens=700))
    target, drafter = pair()
    verifier, cut = verifier_on(target), target.runtime.first(1)
    itself = RuntimeDrafter(cut, about(target.runtime, cut), "self:1")
    for _ in range(2):
        for one in (drafter, itself):
            assert emitted(run(target, one, PROMPT, k=4, max_tokens=700, verifier=verifier)) == expected
            torch.cuda.synchronize()
    assert target.runtime.capacity == 1024


def test_other_graphs_of_the_process_go_on_after_ours():
    """A capture of ours inside inference mode would leave the generator's state as inference tensors."""
    target, drafter = pair()
    run(target, drafter, PROMPT, k=4, max_tokens=20, verifier=verifier_on(target))
    graph, out = torch.cuda.CUDAGraph(), torch.zeros(8, device=cuda())
    with torch.cuda.graph(graph):
        out.copy_(torch.rand(8, device=cuda()))
    graph.replay()
    first = out.clone()
    graph.replay()
    assert not torch.equal(out, first)


def test_recording_is_in_no_phase():
    """The first run records, and its cycles take no longer than those of the second, but for what is cold."""
    target, drafter = pair()
    verifier = verifier_on(target)
    first, second = (run(target, drafter, PROMPT, k=4, max_tokens=60, verifier=verifier) for _ in range(2))
    assert first[-1].recording_s > 0.0 == second[-1].recording_s
    spent = [max(known_phases(c).total_s for c in cycles(found)) for found in (first, second)]
    assert spent[0] < spent[1] + first[-1].recording_s / 4
    assert all(min(astuple(known_phases(c))) >= 0.0 for c in cycles(first))


def test_one_stopwatch_a_device():
    assert timer_for(torch.device("cuda")) is timer_for(cuda())


def test_what_waits_for_the_device_cannot_be_recorded_and_is_run_as_it_is():
    """A forward with a look at a value in it, as a mixture of experts may have; and the device is whole afterwards."""
    target, drafter = pair()
    runtime = target.runtime
    expected = emitted(run(target, drafter, PROMPT, k=3, max_tokens=30))
    passed = runtime._passed

    def looking(tokens, *rest):
        logits = passed(tokens, *rest)
        assert logits.sum().item() == logits.sum().item()
        return logits

    runtime._forget()
    runtime._passed = looking
    stream = torch.cuda.current_stream()
    with pytest.raises(Unsupported, match="cannot be recorded"):
        runtime.try_out()
    assert torch.cuda.current_stream() == stream
    assert emitted(run(target, drafter, PROMPT, k=3, max_tokens=30)) == expected
    runtime._forget()
    runtime._passed = passed
    runtime.try_out()
    assert emitted(run(target, drafter, PROMPT, k=3, max_tokens=30)) == expected


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("drafting", ["model", "ngram"])
def test_a_cycle_waits_for_nothing_but_its_verdict(sampling, drafting):
    """torch raises at any call that waits implicitly; the verdict waits on its event, explicitly. Watched are all launches
    but the first two: a prompt's memory may come from the driver, which waits."""
    target, drafter = pair(capacity=512)
    drafter = drafter if drafting == "model" else NgramDrafter(about(target.runtime, target.runtime))
    options = {"k": 4, "sampling": sampling, "max_tokens": 80, "verifier": verifier_on(target)}
    expected = emitted(run(target, drafter, PROMPT, **options))  # records
    watched, count = list[Event](), 0
    try:
        for event in events(target, drafter, PROMPT, **options):
            watched.append(event)
            if event.kind == "cycle":
                count += 1
                torch.cuda.set_sync_debug_mode("error")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert count > 5
    assert emitted(watched) == expected


def test_a_wait_is_noticed():
    """The control of the test above."""
    there = torch.ones(1, device=cuda())
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            there.item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_transfers_arrive():
    """Small ones from pageable memory, large ones pinned, and back; what they came from may go at once."""
    for n in (1, 100, 10**6):
        expected = torch.arange(n)
        there = [upload(torch.arange(n), cuda()) for _ in range(20)]
        for tensor in there:
            home, arrived = download(tensor)
            arrived()
            assert torch.equal(home, expected)


def test_the_noise_is_the_cpus():
    """Its integers to the bit; two logarithms may differ by a last place."""
    ours, theirs = (gumbel_noise(3, 7, 4, 50_000, device) for device in (CPU, cuda()))
    assert torch.allclose(ours, theirs.cpu(), rtol=2e-7, atol=2e-7)


def test_a_coupled_run_says_what_the_cpu_says():
    target, drafter = pair()
    sampling = replace(Sampling(0.9), coupling="gumbel")
    plain_drafter = RuntimeDrafter(lean(draft_model()), DraftSetup("t", None, VOCAB, CPU, None, None, None), "small")
    plain = run(ModelTarget(lean(target_model()), "t"), plain_drafter, PROMPT, k=4, sampling=sampling, max_tokens=60)
    verifier = verifier_on(target)
    assert emitted(run(target, drafter, PROMPT, k=4, sampling=sampling, max_tokens=60, verifier=verifier)) == emitted(
        plain
    )
