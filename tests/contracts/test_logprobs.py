"""What cycles tell of emitted tokens is what the target says of them from scratch, whoever drafted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from specdec_engine.core.cycle_types import Sampling
from specdec_engine.errors import UsageError
from specdec_engine.record.events import Cycle, Started
from specdec_engine.record.trace import from_json, to_json
from specdec_engine.runtime.target import ModelTarget
from specdec_engine.verify.processors import Asked, process
from specdec_engine.verify.sampling import warp
from tests.contracts.cases import CASES, SAMPLINGS, TARGET, parts, runtime_of
from tests.fakes import CPU, run

ASKED = Asked(repetition_penalty=1.3, logit_bias=((7, 2.0),))


@pytest.mark.parametrize("spec", CASES)
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_each_emitted_token_is_told_as_the_target_alone_has_it(spec, sampling):
    drafter, runtime = parts(spec)
    prompt, sampling = [5, 9, 5, 9, 5], replace(sampling, logprobs=3)
    events = run(ModelTarget(runtime, "tiny"), drafter, prompt, sampling=sampling, max_tokens=14, asked=ASKED)
    cycles = [event for event in events if isinstance(event, Cycle)]
    text = [*prompt, *(token for cycle in cycles for token in cycle.emitted)]
    logits = runtime_of(spec).forward(torch.tensor(text[:-1]), len(text) - len(prompt))
    shaped = process(ASKED, len(prompt), CPU)(prompt, torch.tensor(text[len(prompt) : -1]), logits)
    own, warped = logits.log_softmax(-1), warp(shaped, sampling).log()
    told = [one for cycle in cycles for one in cycle.logprobs]
    assert [one.token.id for one in told] == text[len(prompt) :]
    for row, one in enumerate(told):
        likeliest = own[row].topk(3)
        assert [found.logprob for found in one.likeliest] == pytest.approx(likeliest.values.tolist(), abs=1e-3)
        for found in (one.token, *one.likeliest):
            assert found.logprob == pytest.approx(float(own[row, found.id]), abs=1e-3)
            after = float(warped[row, found.id])
            assert found.warped_logprob == (None if after == -torch.inf else pytest.approx(after, abs=1e-3))
        assert one.token.warped_logprob is not None  # what was drawn can be drawn
    assert all(from_json(to_json(cycle)) == cycle for cycle in cycles)


def test_nothing_is_told_that_was_not_asked_for():
    drafter, runtime = parts("ngram")
    for event in run(ModelTarget(runtime, "tiny"), drafter):
        assert not isinstance(event, Cycle) or event.logprobs is None
        assert not isinstance(event, Started) or "logprobs" not in event.settings
    with pytest.raises(UsageError, match="logprobs -1 is negative"):
        Sampling(logprobs=-1)


def test_as_many_as_there_are_tokens_and_none():
    for many, expected in ((0, 0), (10**6, TARGET.config.vocab_size)):
        drafter, runtime = parts("ngram")
        events = run(ModelTarget(runtime, "tiny"), drafter, sampling=Sampling(logprobs=many), max_tokens=3)
        told = [one for event in events if isinstance(event, Cycle) for one in event.logprobs]
        assert [len(one.likeliest) for one in told] == [expected] * 3
