"""What is recorded, when, and what a replay may not forget: the graph runtime's bookkeeping, on a CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from specdec_engine.adaptive.controller import AutoK
from specdec_engine.adaptive.limits import DraftLimits
from specdec_engine.core.cycle_types import Draft, Sampling
from specdec_engine.core.randomness import KeyedRandomness
from specdec_engine.decoding.control import Controls
from specdec_engine.drafters.context_ids import ContextIds
from specdec_engine.drafters.on_features import told_in_one_size
from specdec_engine.drafters.on_runtime import RuntimeDrafter
from specdec_engine.drafters.token_choice import DraftChoice
from specdec_engine.errors import UsageError
from specdec_engine.models import loading
from specdec_engine.models.loading import find_model
from specdec_engine.models.options import LoadOptions
from specdec_engine.pair import Pair
from specdec_engine.runtime import native
from specdec_engine.runtime.attention import attend_in_groups, causal_mask
from specdec_engine.runtime.decoder import Decoder
from specdec_engine.runtime.graphs import repeatable, room_for, span_for
from specdec_engine.runtime.ops import TORCH
from specdec_engine.runtime.shape import Unsupported
from specdec_engine.runtime.target import ModelTarget
from specdec_engine.system.timing import HostTimer
from specdec_engine.verify.processors import Asked
from specdec_engine.verify.rules import RULES, SyntheticRule, TokenRule
from specdec_engine.verify.verifier import verifier_for
from tests.fakes import CPU, VOCAB, FakeClock, cycles, emitted, events, graph, host, lean, run, tiny_llama
from tests.models.test_architectures import build
from tests.models.test_lean import FAMILY
from tests.tape import TapeRecorder

TARGET = tiny_llama(seed=0, max_position_embeddings=1024)
SMALL = tiny_llama(seed=1, layers=1, hidden=16, max_position_embeddings=1024)
PROMPT = [5, 6, 7, 8, 5, 6]


def pair(recorder=None, draft=SMALL):
    """A target and a draft, both recorded."""
    recorder = recorder or TapeRecorder()
    drafter = RuntimeDrafter(graph(draft, recorder=recorder.another()), host(VOCAB), "small")
    return ModelTarget(graph(TARGET, recorder=recorder.another()), "tiny"), drafter


def verifier_on(recorder, rule="token"):
    """A verdict that is recorded."""
    return verifier_for(RULES[rule], CPU, recorder.another())


SAMPLINGS = [Sampling(), Sampling(1.0), Sampling(0.7, top_k=30, top_p=0.9), Sampling(0.9, raw=True)]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("prompt", [PROMPT, list(range(1, 230))], ids=["short", "grows"])
def test_recorded_runs_say_what_unrecorded_ones_say(rule, sampling, prompt):
    """Tokens, p and q, drawn ones too: the same uniform numbers reach what is recorded. The long one outgrows its caches, and
    crosses to a wider span in the middle of a draft."""
    recorder = TapeRecorder()
    target, drafter = pair(recorder)
    plain_target, plain_drafter = ModelTarget(lean(TARGET), "tiny"), RuntimeDrafter(lean(SMALL), host(VOCAB), "small")
    options = {"k": 4, "sampling": sampling, "max_tokens": 45, "seed": 3}
    verifier = verifier_on(recorder, rule)
    found = [
        cycles(run(target, drafter, prompt, verifier=verifier, **options)) for _ in range(2)
    ]  # the second all replayed
    plain = cycles(run(plain_target, plain_drafter, prompt, rule=RULES[rule], **options))
    for recorded in found:
        assert emitted(recorded) == emitted(plain)
        for ours, theirs in zip(recorded, plain, strict=True):
            assert ours.drafted == theirs.drafted
            assert ours.q == pytest.approx(theirs.q, abs=1e-4)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.9)])
def test_a_second_run_records_nothing(sampling):
    """Nor does one whose end leaves room for a shorter draft."""
    recorder = TapeRecorder()
    target, drafter = pair(recorder, draft=TARGET)  # all is accepted, so that mostly two tokens are pending
    verifier, options = verifier_on(recorder), {"k": 4, "sampling": sampling}
    run(target, drafter, PROMPT, max_tokens=40, verifier=verifier, **options)
    before = recorder.recordings
    assert before == 5  # a pass of the target and one of the draft, a step after one token and after two, a verdict
    for budget in (1, 2, 3, 40, 41, 42, 43):
        found = run(target, drafter, [9, *PROMPT], max_tokens=budget, verifier=verifier, **options)
        assert len(emitted(found)) == budget
    assert recorder.recordings == before


class Clock:
    """Stands still unless it is moved."""

    now = 0.0

    def __call__(self):
        return self.now


def test_seconds_spent_recording_are_in_no_phase():
    clock = Clock()
    timer = HostTimer(clock)
    recorder = TapeRecorder(timer, clock, seconds=100.0)
    target, drafter = pair(recorder)
    verifier = verifier_on(recorder)
    found = run(target, drafter, PROMPT, k=3, max_tokens=30, timer=timer, verifier=verifier)
    assert recorder.recordings > 3
    assert {(c.draft_s, c.verify_s, c.other_s) for c in cycles(found)} == {(0.0, 0.0, 0.0)}
    assert (found[-1].prefill_s, found[-1].recording_s) == (0.0, 100.0 * recorder.recordings)


@pytest.mark.parametrize("timed", [True, False])
def test_auto_keeps_a_good_draft_whatever_recording_costs(timed):
    """A draft step is 0.27 of a pass, and all is accepted; each recording takes six passes. Unless that is left out, the
    draft looks dear and is switched off."""
    clock, auto = Clock(), AutoK()
    timer = HostTimer(clock)
    recorder = TapeRecorder(timer if timed else HostTimer(clock), clock, seconds=0.045)
    target, drafter = pair(recorder, draft=TARGET)
    score, propose = target.score, drafter.propose

    def slow_score(*given):
        clock.now += 0.0073
        return score(*given)

    def slow_propose(context, k, *given):
        clock.now += 0.002 * k
        return propose(context, k, *given)

    target.score, drafter.propose = slow_score, slow_propose
    auto.begin(0)
    verifier, controls = verifier_on(recorder), Controls(auto)
    found = cycles(run(target, drafter, PROMPT, controls=controls, max_tokens=200, timer=timer, verifier=verifier))
    drafted = [c.k or 0 for c in found[3:] if c.index not in (8, 16, 32)]  # there plain passes are measured
    assert (min(drafted) > 0) == timed


def test_neither_a_new_temperature_nor_a_new_k_records_a_draft_anew():
    """By the draft's recordings: it is the target itself, so that from the second cycle on two tokens are pending."""
    recorder, controls = TapeRecorder(), Controls(3, Sampling(0.8))
    target = ModelTarget(lean(TARGET), "tiny")
    drafter = RuntimeDrafter(graph(TARGET, recorder=recorder), host(VOCAB), "small")
    turns = {10: {"sampling": Sampling(1.3)}, 20: {"k": 5}, 30: {"k": 2, "sampling": Sampling(0.8)}}
    counts = {}
    for event in cycles_as_they_come(events(target, drafter, PROMPT, controls=controls, max_tokens=180)):
        counts[event.index] = recorder.recordings
        controls.change(**turns.get(event.index, {}))
    assert counts[2] == counts[35] == 3  # a pass over the prompt, a step after one token and after two


def test_growing_the_cache_records_anew_and_keeps_what_was_cached():
    recorder = TapeRecorder()
    runtime = graph(TARGET, capacity=64, recorder=recorder)
    assert runtime.capacity == 256
    tokens = torch.randint(0, VOCAB, (300,), generator=torch.Generator().manual_seed(0))
    plain = lean(TARGET)
    for start, end in ((0, 200), (200, 204), (204, 260), (260, 263), (263, 264), (264, 300)):
        expected = plain.forward(tokens[start:end], 1)
        assert torch.allclose(runtime.forward(tokens[start:end], 1), expected, atol=1e-4)
    assert runtime.capacity == 512


def test_what_a_growing_cache_forgets_others_keep():
    """Recorders share nothing: the target's verdicts, its first layers and a draft go on when its own recordings are gone."""
    recorder = TapeRecorder()
    runtime, verifier = graph(TARGET, capacity=64, recorder=recorder), verifier_on(recorder)
    drafter = RuntimeDrafter(runtime.first(1), host(VOCAB), "self:1")
    target = ModelTarget(runtime, "tiny")
    long = list(range(1, 230))
    run(target, drafter, PROMPT, k=3, max_tokens=20, verifier=verifier)
    drafter.runtime.forward(torch.tensor(long), 1)
    drafter.runtime.rollback(0)
    found = emitted(run(target, drafter, long, k=3, max_tokens=60, verifier=verifier))
    assert runtime.capacity == 512
    plain = ModelTarget(lean(TARGET), "tiny")
    assert found == emitted(
        run(plain, RuntimeDrafter(plain.runtime.first(1), host(VOCAB), "x"), long, k=3, max_tokens=60)
    )


@pytest.mark.parametrize(
    "work",
    [
        lambda x: (x.sum().item(),),
        lambda x: (x,) if bool((x > 0).all()) else (),
        lambda x: (x[x > 0],),
        lambda x: (x.nonzero(),),
        lambda x: (x + torch.tensor([1.0]),),
    ],
    ids=["item", "bool", "mask", "nonzero", "tensor"],
)
def test_a_tape_refuses_what_a_capture_refuses(work):
    ready = torch.ones(3)
    with pytest.raises(AssertionError, match="inside a capture"):
        TapeRecorder().record(lambda: work(ready))


def test_a_recording_that_was_cleared_cannot_be_replayed():
    recorder = TapeRecorder()
    runtime = graph(TARGET, recorder=recorder)
    runtime.forward(torch.tensor([1]), 1)
    recorder.clear()
    with pytest.raises(AssertionError, match="cleared"):
        runtime.forward(torch.tensor([1]), 1)


def test_a_normal_run_never_grows():
    """Room is asked for by the text and what is emitted; a chat template, a draft and the padding come on top."""
    for tokens in (64, 240, 500, 1000):
        runtime = graph(TARGET, capacity=room_for(tokens, None))
        assert runtime.capacity - tokens >= 100 + 64 + 16
    assert room_for(1000, 1024) == 1024  # there are no more


def test_surplus_rows_of_a_padded_pass_leave_no_trace():
    """Three tokens in a pass of width four: the fourth's keys lie behind the end, masked, and are written over."""
    runtime, plain = graph(TARGET), lean(TARGET)
    for tokens in ([1, 2, 3], [4], [5, 6, 7, 8, 9], [10, 11]):
        found = runtime.forward(torch.tensor(tokens), len(tokens))
        assert torch.allclose(found, plain.forward(torch.tensor(tokens), len(tokens)), atol=1e-4)
        assert runtime.cached == plain.cached


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "olmo3"])
def test_capped_scores_and_several_rotations_are_recorded(name):
    """With an attention that reads the length on the device, which Gemma 2's scores do not take."""
    model = build(*FAMILY[name])
    runtime, plain = graph(model, ops=replace(TORCH, attend=attend_all)), lean(model)
    for tokens in ([1, 2, 3], [4], [5, 6, 7, 8, 9], [10, 11]):
        found = runtime.forward(torch.tensor(tokens), len(tokens))
        assert torch.allclose(found, plain.forward(torch.tensor(tokens), len(tokens)), atol=1e-3)


def attend_all(queries, kept, positions, window):
    """Over the whole cache, as a kernel that is told nothing but the positions."""
    mask = causal_mask(positions, kept.shape[1], window, queries.dtype)
    return attend_in_groups(queries, kept, mask)


def test_padding_stays_inside_the_models_own_context():
    """A model that looks its positions up has none beyond."""
    runtime, seen = graph(tiny_llama(max_position_embeddings=20)), []
    passed = runtime._passed
    runtime._passed = lambda tokens, positions, *rest: (seen.append(positions), passed(tokens, positions, *rest))[1]
    for n in (10, 5, 5):
        runtime.forward(torch.arange(n), 1)
    assert max(int(positions.max()) for positions in seen) == 19


def test_logits_outlive_the_next_replay():
    runtime = graph(TARGET)
    first = runtime.forward(torch.tensor([1]), 1)
    before = first.clone()
    runtime.forward(torch.tensor([2]), 1)
    assert torch.equal(first, before)


@pytest.mark.parametrize(("end", "span"), [(1, 256), (256, 256), (257, 512), (4096, 4096), (4097, 8192)])
def test_spans_are_powers_of_two(end, span):
    assert span_for(end) == span


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.8)])
def test_a_cycle_reads_from_the_device_once(sampling, monkeypatch):
    """Every way by which a tensor's value reaches Python is counted; on a GPU each would wait for all that came before."""
    target, drafter = pair()
    reads = []
    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, *a, _o=original, _n=name, **o: (reads.append(_n), _o(self, *a, **o))[1]
        )
    per_cycle, seen = [], 0
    verifier = verifier_for(
        RULES["token"], CPU, TapeRecorder()
    )  # as on a GPU: on the host looking is free, and it is done
    for _ in cycles_as_they_come(
        events(target, drafter, PROMPT, k=4, sampling=sampling, max_tokens=40, verifier=verifier)
    ):
        per_cycle.append(reads[seen:])
        seen = len(reads)
    assert len(per_cycle) > 5
    assert all(found == ["tolist"] for found in per_cycle), per_cycle


def cycles_as_they_come(found):
    return (event for event in found if hasattr(event, "drafted"))


def test_the_recorded_output_is_the_targets_own():
    plain = TARGET.generate(
        torch.tensor([PROMPT]), do_sample=False, max_new_tokens=60, eos_token_id=None, pad_token_id=0
    )
    for k in (1, 4, 7):
        target, drafter = pair()
        assert emitted(run(target, drafter, PROMPT, k=k, max_tokens=60)) == plain[0, len(PROMPT) :].tolist()


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_recorded_or_not_a_drafts_columns_are_named(temperature):
    """A head's distributions before warping are over ids of its own."""
    ids, vocab, sampling = torch.tensor([9, 2, 7, 4, 11, 5]), 13, Sampling(temperature, raw=True)
    own = torch.tensor([[0.05, 0.5, 0.1, 0.05, 0.1, 0.2], [0.1, 0.1, 0.1, 0.1, 0.1, 0.5]])
    drafted = ids[own.argmax(-1)]
    logits = torch.randn(3, vocab, generator=torch.Generator().manual_seed(2))
    logits[0, drafted[0]] += 9.0  # kept, so that the second is tested
    draft = Draft(drafted, None, "x", own, ids)
    for recorder in (None, TapeRecorder()):
        verdict = verifier_for(TokenRule(), CPU, recorder).start(logits, draft, sampling, KeyedRandomness(1), 5)()
        assert verdict.raw_q.drafted == pytest.approx((0.5, 0.5))
        assert verdict.raw_q.likeliest[0][:2] == ((2, pytest.approx(0.5), 1.0), (5, pytest.approx(0.2), 0.0))
        assert verdict.raw_p.drafted == pytest.approx(logits.softmax(-1)[[0, 1], drafted].tolist())


@pytest.mark.parametrize("raw", [False, True], ids=["", "raw"])
@pytest.mark.parametrize("rule", RULES.values(), ids=lambda rule: rule.name)
@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(0.9), Sampling(0.7, top_k=30, top_p=0.9, min_p=0.02), Sampling(0.9, coupling="gumbel")],
)
def test_recorded_verdicts_are_the_unrecorded_ones(rule, sampling, raw, monkeypatch):
    """Sampled drafts, greedy ones and none, k by k."""
    monkeypatch.setattr(native, "of_rows", lambda row: None)  # their softmax rounds otherwise than torch's
    recorder = TapeRecorder()
    verifier, plain = verifier_for(rule, CPU, recorder), verifier_for(rule, CPU)
    for k in (3, 0, 5, 3, 0):
        target, drafter = ModelTarget(lean(TARGET), "tiny"), RuntimeDrafter(lean(SMALL), host(VOCAB), "small")
        options = {
            "k": k,
            "sampling": replace(sampling, raw=raw),
            "max_tokens": 30,
            "seed": k,
            "timer": HostTimer(FakeClock()),
        }
        recorded = cycles(run(target, drafter, PROMPT, verifier=verifier, **options))
        unrecorded = cycles(run(target, drafter, PROMPT, verifier=plain, **options))
        for one, other in zip(recorded, unrecorded, strict=True):
            assert replace(one, residual=()) == replace(other, residual=())
            assert dict(one.residual) == pytest.approx(dict(other.residual), abs=1e-6)  # summed in another order
    before = recorder.recordings
    warmer = replace(sampling, temperature=sampling.temperature and 1.3, raw=raw)
    run(target, drafter, PROMPT, k=3, sampling=warmer, max_tokens=30, verifier=verifier)
    assert recorder.recordings == before


class Refuser(TapeRecorder):
    """Records so many times, and no more."""

    def __init__(self, times=0):
        super().__init__()
        self.times = times

    def record(self, work):
        if self.recordings >= self.times:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nCompile with ...")
        return super().record(work)

    def another(self):
        return Refuser(self.times)


@pytest.mark.parametrize("times", range(3))
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.9)])
def test_what_cannot_be_recorded_is_run_as_it_is(times, sampling):
    recorder = Refuser(times)
    target, drafter = pair(recorder)
    options = {"k": 4, "sampling": sampling, "max_tokens": 40, "seed": 3}
    found = run(target, drafter, PROMPT, verifier=verifier_on(recorder), **options)
    plain = run(ModelTarget(lean(TARGET), "t"), RuntimeDrafter(lean(SMALL), host(VOCAB), "s"), PROMPT, **options)
    assert emitted(found) == emitted(plain)


def test_a_forward_is_tried_out_before_a_run():
    with pytest.raises(Unsupported, match=r"cannot be recorded \(CUDA error: operation not permitted.*capturing\)$"):
        graph(TARGET, recorder=Refuser()).try_out()
    recorder = TapeRecorder()
    runtime = graph(TARGET, recorder=recorder)
    runtime.try_out()
    logits = runtime.forward(torch.tensor([5]), 1)
    assert recorder.recordings == 1
    assert torch.allclose(logits, lean(TARGET).forward(torch.tensor([5]), 1), atol=1e-4)


def reading(queries, kept, positions, window):
    """Attention that looks as far as the positions say, whatever the span, as our kernels on a GPU do."""
    return attend_in_groups(queries, kept, causal_mask(positions, kept.shape[1], window, kept.dtype))


def test_what_was_tried_out_is_what_the_first_pass_replays():
    recorder = TapeRecorder()
    runtime = graph(TARGET, recorder=recorder, ops=replace(TORCH, attend=reading))
    assert runtime.decoder.reads_length_on_device
    runtime.try_out()
    for token in torch.tensor([[5], [6]]):
        runtime.forward(token, 1)
    assert recorder.recordings == 1


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: out of memory")]
)
def test_memory_that_runs_out_is_no_forward_that_cannot_be_recorded(error):
    """It was, with our kernels slower and nothing said."""

    class Full(TapeRecorder):
        def record(self, work):
            raise error

    with pytest.raises(type(error), match="out of memory"):
        graph(TARGET, recorder=Full()).try_out()
    with pytest.raises(type(error), match="out of memory"):
        repeatable(Full(), lambda: ())


def test_a_compilers_own_error_ends_no_run():
    class Compiler(TapeRecorder):
        def record(self, work):
            raise AssertionError("PTXAS error: ...")

    with pytest.raises(Unsupported, match="cannot be recorded"):
        graph(TARGET, recorder=Compiler()).try_out()
    assert repeatable(Compiler(), tuple)() == ()


@pytest.mark.parametrize("wanted", ["auto", "graph"])
def test_a_target_whose_forward_cannot_be_recorded_is_loaded_without(checkpoint, monkeypatch, wanted):
    candidate = replace(
        find_model(str(checkpoint), LoadOptions(device="cpu", dtype="float32")), device=torch.device("cuda")
    )
    candidate = replace(candidate, options=replace(candidate.options, runtime=wanted))
    monkeypatch.setattr(loading, "CudaRecorder", lambda device: Refuser())
    monkeypatch.setattr(
        loading,
        "Decoder",
        lambda shape, weights, dtype, device, *rest, **more: Decoder(shape, weights, dtype, CPU, *rest, **more),
    )
    monkeypatch.setattr(loading, "place", lambda *given: CPU)
    if wanted == "graph":
        with pytest.raises(UsageError, match="cannot run on the graph runtime: its forward cannot be recorded"):
            candidate.load()
        return
    loaded = candidate.load()
    assert (loaded.runtime.name, loaded.remark[:34]) == ("lean", "its forward cannot be recorded (CU")


@pytest.mark.parametrize("name", ["sampled", "greedy"])
def test_a_draft_that_nobody_asks_how_sure_it_is_works_out_no_softmax(name):
    sampling = Sampling() if name == "greedy" else Sampling(0.8)
    logits, u, temperature = torch.randn(1, 40), torch.tensor(0.3), torch.tensor(0.8)
    asked, unasked = (DraftChoice(sampling, 40, confident=confident) for confident in (True, False))
    assert asked.key != unasked.key
    assert unasked(logits, u, temperature).confidence is None
    assert torch.equal(unasked(logits, u, temperature).token, asked(logits, u, temperature).token)


def test_a_made_up_acceptance_rate_is_recorded_too():
    """`Pair.synthetic`, which bench uses."""
    recorder = TapeRecorder()
    target, drafter = pair(recorder)
    whole = Pair(target, drafter, {}, AutoK(), DraftLimits(), None, frozenset(), Asked(), {}).synthetic(0.7)
    verifier, plain = whole.verifiers["synthetic"], verifier_for(SyntheticRule(0.7), CPU)
    options = {"k": 4, "sampling": Sampling(0.9), "max_tokens": 40}
    expected = emitted(run(target, drafter, PROMPT, verifier=plain, **options))
    before = recorder.recordings
    assert emitted(run(target, drafter, PROMPT, verifier=verifier, **options)) == expected
    assert recorder.recordings == before + 1


def test_ids_of_the_context_make_no_new_recordings():
    """A head's columns grow with the text; what is told of them before warping keeps its size where verdicts are recorded."""
    rows, sizes = torch.randn(VOCAB, 4), set()
    ids = ContextIds(torch.arange(1, 60, 2), lambda found: rows[found])
    for context in ([4], [4, 6, 8], list(range(VOCAB)) * 2):
        ids.read(context)
        raw = torch.rand(2, len(ids.ids))
        padded, named = told_in_one_size(raw, ids)
        assert torch.equal(padded[:, : raw.shape[1]], raw)
        assert not padded[:, raw.shape[1] :].any()
        assert torch.equal(named[: len(ids.ids)], ids.ids)
        sizes.add((padded.shape[1], len(named)))
    assert len(sizes) == 1
    fixed = ContextIds(torch.arange(5), None)
    assert told_in_one_size(torch.rand(2, 5), fixed)[0].shape == (2, 5)
