"""Several texts at once: each drafts, accepts, rolls back and draws as it does alone."""

from __future__ import annotations

import random
from functools import partial

import pytest
import torch

from specdec_engine.batch import prompts
from specdec_engine.batch.best_k import BestK
from specdec_engine.batch.prompts import read_prompts
from specdec_engine.batch.together import Lane, decode_together
from specdec_engine.constrain.wanted import by_regex
from specdec_engine.core.cycle_types import Sampling
from specdec_engine.core.randomness import KeyedRandomness
from specdec_engine.decoding.control import Controls
from specdec_engine.decoding.loop import start
from specdec_engine.decoding.stopping import Stop
from specdec_engine.drafters.base import another
from specdec_engine.errors import OutOfMemory, UsageError
from specdec_engine.record.events import Cycle, Failed, Finished, Started
from specdec_engine.runtime.generic import GenericRuntime
from specdec_engine.runtime.lean import forward_together, read_together
from specdec_engine.runtime.target import ModelTarget
from tests.contracts.cases import CASES, TARGET, parts
from tests.fakes import VOCAB, graph, lean, run, tiny_llama
from tests.unit.test_grammar import END, matching

REPEATABLE = [case for case in CASES if not case.startswith("text@")]


def lanes_of(spec, count, k, sampling=None, target=None):
    drafter, runtime = parts(spec, target)
    made = [Lane(ModelTarget(runtime, "tiny"), drafter, Controls(k, sampling))]
    for _ in range(count - 1):
        other = runtime.another()
        made.append(Lane(ModelTarget(other, "tiny"), another(drafter, other), Controls(k, sampling)))
    return made


def begin(prompt, seed, lane, *, max_tokens=12, grammar=None):
    return start(lane.target, lane.drafter, prompt, controls=lane.controls, random=KeyedRandomness(seed),
                 stop=Stop(max_tokens, frozenset([END])), grammar=None if grammar is None else matching(grammar))  # fmt: skip


def together(lanes, jobs, k, **how):
    """By number: the events."""
    found = {}
    begins = [partial(begin, prompt, seed, **how) for prompt, seed in jobs]
    for number, event in decode_together(lanes, [lambda lane, b=b: b(lane) for b in begins], k):
        found.setdefault(number, []).append(event)
    return [found[number] for number in range(len(jobs))]


def told(events):
    return [(c.drafted, c.accepted, c.emitted, c.end, c.context) for c in events if isinstance(c, Cycle)]


def jobs_of(count, seed=0):
    rng = random.Random(seed)
    return [([rng.randrange(VOCAB) for _ in range(rng.randint(1, 40))], 100 + i) for i in range(count)]


@pytest.mark.parametrize("spec", REPEATABLE)
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.9)], ids=["greedy", "sampled"])
def test_every_text_is_what_it_is_alone(spec, sampling):
    """Cycle by cycle, in float32, of unlike lengths, more of them than there is room for at once."""
    jobs, k = jobs_of(5), 0 if spec == "none" else 3
    found = together(lanes_of(spec, 3, k, sampling), jobs, k)
    for events, (prompt, seed) in zip(found, jobs, strict=True):
        drafter, runtime = parts(spec)
        alone = run(ModelTarget(runtime, "tiny"), drafter, prompt, k=k, sampling=sampling, max_tokens=12, seed=seed,
                    stop_ids=[END])  # fmt: skip
        assert told(events) == told(alone)
        assert isinstance(events[0], Started)
        assert isinstance(events[-1], Finished)
        assert events[-1].reason == alone[-1].reason


def test_under_a_grammar_each_text_has_its_own_place_in_it():
    grammar = by_regex("(the light|night)[0-9]{2,5}")
    jobs = jobs_of(5)
    found = together(lanes_of("ngram", 3, 3, Sampling(1.0)), jobs, 3, grammar=grammar, max_tokens=30)
    for events, (prompt, seed) in zip(found, jobs, strict=True):
        drafter, runtime = parts("ngram")
        alone = run(ModelTarget(runtime, "tiny"), drafter, prompt, k=3, sampling=Sampling(1.0), max_tokens=30, seed=seed,
                    stop_ids=[END], grammar=matching(grammar))  # fmt: skip
        assert told(events) == told(alone)


TARGETS = {"lean": lambda: lean(tiny_llama(seed=0)), "generic": lambda: GenericRuntime(TARGET, "tiny")}


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_one_text_that_fails_leaves_the_others(target):
    jobs = jobs_of(4)
    jobs[1] = ([], 5)
    found = together(lanes_of("ngram", 2, 2, target=target()), jobs, 2)
    assert isinstance(found[1][-1], Failed)
    assert all(isinstance(found[i][-1], Finished) for i in (0, 2, 3))
    good = together(lanes_of("ngram", 2, 2, target=target()), [jobs[i] for i in (0, 2, 3)], 2)
    assert [told(found[i]) for i in (0, 2, 3)] == [told(events) for events in good]


def test_a_text_whose_logits_are_no_numbers_fails_alone():
    lanes = lanes_of("ngram", 3, 2)
    broken = lanes[0]
    verify = type(begin([5], 0, lanes[1])[0]).verify

    def begins(number, prompt, seed):
        def made(lane):
            one, started = begin(prompt, seed, lane)
            if number == 1:
                one.verify = lambda proposed, logits: verify(one, proposed, logits * float("nan"))
            return one, started

        return made

    jobs, found = jobs_of(3), {}
    for number, event in decode_together(lanes, [begins(i, *job) for i, job in enumerate(jobs)], 2):
        found.setdefault(number, []).append(event)
    assert isinstance(found[1][-1], Failed)
    assert all(isinstance(found[i][-1], Finished) for i in (0, 2))
    assert broken.target.cached >= 0


def test_memory_that_runs_out_ends_all():
    lanes = lanes_of("none", 2, 0)

    def full(lane):
        raise OutOfMemory("no memory", "less")

    with pytest.raises(OutOfMemory):
        list(decode_together(lanes, [full], 0))


def test_a_draft_that_there_is_once_is_refused():
    with pytest.raises(UsageError, match="one text at a time"):
        lanes_of("text@model:small", 2, 2)


@pytest.mark.parametrize("how", [{}, {"dtype": torch.bfloat16, "quantize": "light"}], ids=["float32", "light"])
def test_rows_of_several_texts_have_the_logits_that_they_have_alone(how):
    """Of unlike lengths and numbers of rows; kernels of our own, where they are, take a layer in one call."""
    rng = torch.Generator().manual_seed(0)
    first = lean(TARGET, **how)
    texts = [first.another() for _ in range(4)]
    for i, text in enumerate(texts):
        text.forward(torch.randint(0, VOCAB, (5 + 30 * i,), generator=rng), 1)
    tokens = [torch.randint(0, VOCAB, (n,), generator=rng) for n in (1, 4, 2, 7)]
    found = forward_together(texts, tokens)
    lengths = [text.cached for text in texts]
    for text, own, rows, length in zip(texts, tokens, found, lengths, strict=True):
        text.rollback(length - len(own))
        assert torch.allclose(text.forward(own, len(own)), rows, atol=1e-4 if not how else 0.05)


def test_prompts_read_together_leave_what_each_leaves_alone(monkeypatch):
    """To the bit: long ones by chunks, short ones several in a pass, none and one token, with what a head reads."""
    passes = list[int]()

    def counted(runtimes, tokens):
        passes.append(sum(map(len, tokens)))
        read_together(runtimes, tokens)

    monkeypatch.setattr(prompts, "read_together", counted)
    first = lean(TARGET)
    first.tap((0,))
    rng = torch.Generator().manual_seed(0)
    texts = [torch.randint(0, VOCAB, (n,), generator=rng).tolist() for n in (70, 0, 9, 66, 300, 1, 130, 600, 40, 50)]
    lanes = [ModelTarget(first.another(), "tiny") for _ in texts]
    lanes[3].prefill([*texts[3][:5], 7])  # of another text
    jobs = list(zip(lanes, texts, strict=True))
    read_prompts(jobs, lanes)
    assert passes == [70 + 9 + 66 + 300 + 1, 40 + 50]
    for lane in lanes[2:4]:  # which say something, and are asked for one and the same
        lane.runtime.forward(torch.tensor([1, 2]), 1)
        lane.runtime.known.note([*texts[lanes.index(lane)], 1, 2], lane.cached)
    read_prompts([(lanes[2], texts[4]), (lanes[3], texts[4]), (lanes[4], texts[4])], lanes)
    read_prompts([(lanes[0], []), (lanes[9], [1, 2, 3])], lanes)  # one token, whose lane has read another prompt
    assert (lanes[0].cached, lanes[9].cached) == (0, 3)
    read_prompts([(lanes[0], texts[4]), (lanes[1], texts[7]), (lanes[7], texts[6]), (lanes[6], texts[9])], lanes)
    assert len(passes) == 2
    swapped = [(lanes[at], texts[of]) for at, of in enumerate((4, 7, 4, 4, 4, 5, 9, 6, 8))]
    for lane, text in swapped:
        alone, n = ModelTarget(first.another(), "tiny"), len(text)
        alone.prefill(text)
        assert lane.cached == alone.cached == n
        assert lane.runtime.known.common(text) == n
        assert torch.equal(lane.runtime._cache[:, :, :n], alone.runtime._cache[:, :, :n])
        assert torch.equal(lane.runtime.features(0, n), alone.runtime.features(0, n))


def test_k_is_what_is_fastest_for_so_many_texts():
    """Of a simulated machine, on which a drafted token pays for one text, and not for eight."""
    k = BestK()
    for texts, best in ((1, 3), (8, 0)):
        for _ in range(300):
            chosen = k.choose(texts)
            rows = texts * (chosen + 1)
            k.saw(texts, chosen, round(texts * (1 + 0.6 * chosen) * 10), 1.0 if rows <= 8 else rows / 8)
        assert [k.choose(texts) for _ in range(20)].count(best) >= 19


@pytest.mark.parametrize(("free", "accepted", "most"), [(8, 0.4, 1.06), (24, 0.6, 1.15), (64, 0.7, 1.08)])
def test_trying_costs_little(free, accepted, most):
    """Of sixteen texts of 64 tokens, eight at once, the last ones fewer: rows up to `free` cost nothing."""

    def seconds(texts, k):
        return 1.0 + 0.1 * k + max(0, texts * (k + 1) - free) / 8

    def whole(choose, saw):
        left, time = [64.0] * 16, 0.0
        while any(left):
            running = [i for i, tokens in enumerate(left) if tokens][:8]
            k = choose(len(running))
            each = 1 + sum(accepted**i for i in range(1, k + 1))
            for i in running:
                left[i] = max(0.0, left[i] - each)
            time += seconds(len(running), k)
            saw(len(running), k, round(100 * each * len(running)), seconds(len(running), k))
        return time

    auto = BestK()
    best = min(whole(lambda texts, k=k: k, lambda *told: None) for k in range(4))
    assert whole(auto.choose, auto.saw) < most * best


@pytest.mark.parametrize("spec", ["ngram", "head:HEAD", "self:1"])
def test_a_recorded_runtime_is_one_of_several(spec):
    """The first lane is the pair's own, whose passes are recorded; the others are not."""
    jobs = jobs_of(4)
    found = together(lanes_of(spec, 3, 3, target=graph(TARGET)), jobs, 3)
    assert [told(events) for events in found] == [told(events) for events in together(lanes_of(spec, 3, 3), jobs, 3)]
