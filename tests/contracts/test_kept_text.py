"""What a prompt has in common with the last run's text is not read again, and nothing but the time tells."""

from __future__ import annotations

import random

import pytest

from specdec_engine.core.cycle_types import Sampling
from specdec_engine.drafters import build_drafter
from specdec_engine.errors import GenerationFailed
from specdec_engine.record.events import Cycle, Finished
from specdec_engine.runtime.generic import GenericRuntime
from specdec_engine.runtime.known_text import KnownText
from specdec_engine.runtime.target import ModelTarget
from tests.contracts.cases import CASES, TARGET, parts
from tests.fakes import VOCAB, events, graph, host, lean, run
from tests.models import checkpoints


def told(found):
    """The cycles, to what float32 tells; times are others."""
    return [(c.drafted, c.accepted, c.emitted, c.end, c.context) for c in found if isinstance(c, Cycle)]


def next_prompt(rng, prompt, said):
    """A next turn, most often: some of the last text, and something new."""
    text = [*prompt, *said]
    kept = rng.choice([len(text), len(text), len(prompt), rng.randint(0, len(text))])
    new = [rng.randrange(VOCAB) for _ in range(rng.choice([0, 1, 5, 30]))]
    return [*text[:kept], *new] or [5]


@pytest.mark.parametrize("spec", CASES)
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.9)], ids=["greedy", "sampled"])
def test_runs_one_after_another_are_each_what_they_are_alone(spec, sampling):
    """Whole, cut by the budget, and given up after some cycles; drafts and verdicts, too."""
    rng = random.Random(spec)
    drafter, runtime = parts(spec)
    target, prompt = ModelTarget(runtime, "tiny"), [rng.randrange(VOCAB) for _ in range(20)]
    for seed in range(5):
        fresh_drafter, fresh_runtime = parts(spec)
        how = {"k": rng.randint(1, 5), "sampling": sampling, "max_tokens": rng.randint(1, 12), "seed": seed}
        alone = run(ModelTarget(fresh_runtime, "tiny"), fresh_drafter, prompt, **how)
        stop_after, found = rng.choice([99, 99, 1, 2]), []
        for event in events(target, drafter, prompt, **how):
            found.append(event)
            if sum(isinstance(e, Cycle) for e in found) == stop_after:
                break
        assert told(found) == told(alone)[: len(told(found))]
        said = [token for c in found if isinstance(c, Cycle) for token in c.emitted]
        prompt = next_prompt(rng, prompt, said)


@pytest.mark.parametrize(
    "make", [lean, graph, lambda model: GenericRuntime(model, "tiny")], ids=["lean", "graph", "generic"]
)
def test_the_second_turn_reads_only_what_is_new(make):
    read, runtime = [], make(TARGET)
    forward = runtime.forward
    runtime.forward = lambda tokens, *rest, **more: (read.append(len(tokens)), forward(tokens, *rest, **more))[1]
    target, drafter = ModelTarget(runtime, "tiny"), build_drafter("ngram", host(VOCAB))
    first = list(range(3, 40))
    found = run(target, drafter, first, k=3, max_tokens=10)
    said = [token for c in found if isinstance(c, Cycle) for token in c.emitted]
    assert found[-1].cached_tokens == 0
    second = [*first, *said, 7, 8, 9]
    read.clear()
    again = run(target, drafter, second, k=3, max_tokens=1)
    assert isinstance(again[-1], Finished)
    assert again[-1].cached_tokens == len(second) - 4, "the last token said was never fed"
    assert read == [3, 1]


def test_others_that_use_the_runtime_in_between_are_noticed():
    """Pairs share it: what one has cached is no other's."""
    import torch

    runtime = lean(TARGET)
    target, drafter = ModelTarget(runtime, "tiny"), build_drafter("none", host())
    prompt = list(range(3, 30))
    first = told(run(target, drafter, prompt, k=0, max_tokens=5))
    runtime.rollback(4)
    runtime.forward(torch.tensor([90, 91, 92, 93]), 1)
    again = run(ModelTarget(runtime, "other"), drafter, prompt, k=0, max_tokens=5)
    assert again[-1].cached_tokens == 4
    assert told(again) == first


def test_after_a_run_that_broke_everything_is_read_anew():
    runtime = lean(TARGET)
    target, drafter = ModelTarget(runtime, "tiny"), build_drafter("none", host())
    prompt = list(range(3, 30))
    run(target, drafter, prompt, k=0, max_tokens=5)
    whole = runtime.forward
    runtime.forward = lambda *args, **more: whole(*args, **more) * float("nan")
    with pytest.raises(GenerationFailed):
        run(target, drafter, [*prompt, 5], k=0, max_tokens=5)
    runtime.forward = whole
    assert run(target, drafter, prompt, k=0, max_tokens=5)[-1].cached_tokens == 0


def test_after_an_interrupt_in_a_pass_everything_is_read_anew():
    """Some layers have read the tokens of that pass, and others not."""
    runtime = GenericRuntime(TARGET, "tiny")
    target, drafter, prompt = ModelTarget(runtime, "tiny"), build_drafter("none", host()), list(range(3, 30))
    layer, calls = TARGET.model.layers[1].mlp, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt

    hook = layer.register_forward_hook(interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(target, drafter, prompt, k=0, max_tokens=8)
    hook.remove()
    alone = run(ModelTarget(GenericRuntime(TARGET, "tiny"), "tiny"), drafter, prompt, k=0, max_tokens=8)
    assert told(run(target, drafter, prompt, k=0, max_tokens=8)) == told(alone)


def test_a_head_that_comes_later_reads_what_was_said_before():
    """Of what was cached before it there are no features."""
    runtime, prompt = lean(TARGET), list(range(3, 60))
    target = ModelTarget(runtime, "tiny")
    run(target, build_drafter("none", host()), prompt, k=0, max_tokens=5)
    drafter, _ = parts("head:HEAD", runtime)
    fresh_drafter, fresh_runtime = parts("head:HEAD")
    alone = run(ModelTarget(fresh_runtime, "tiny"), fresh_drafter, prompt, k=3, max_tokens=12)
    assert told(run(target, drafter, prompt, k=3, max_tokens=12)) == told(alone)


def test_a_recurrent_model_says_what_it_reads_again():
    runtime = GenericRuntime(checkpoints.build("mamba2"), "tiny")
    target, drafter = ModelTarget(runtime, "tiny"), build_drafter("none", host())
    run(target, drafter, [5, 6, 7, 8], k=0, max_tokens=3)
    assert run(target, drafter, [5, 6, 9, 9, 9], k=0, max_tokens=3)[-1].cached_tokens < 2


def test_known_text_is_cut_and_compared():
    known, text = KnownText(), [1, 2, 3]
    assert known.common([1]) == 0
    known.note(text, 3)
    text.append(4)
    assert known.common([1, 2, 3, 4]) == 3, "of what came later nothing is known"
    assert known.common([1, 2, 9]) == 2
    known.cut(1)
    assert known.common([1, 2, 3]) == 1
    known.cut(5)
    assert known.common([1, 2, 3]) == 1
