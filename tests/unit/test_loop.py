"""The loop on table models: every kind of cycle, every way to end, thousands of greedy runs."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import replace
from itertools import product

import pytest
import torch

from specdec_engine.core.cycle_types import Sampling
from specdec_engine.decoding.control import Controls
from specdec_engine.errors import GenerationFailed, UsageError
from specdec_engine.record.events import Failed, Finished, SettingChanged, Started
from specdec_engine.record.stats import Summary
from specdec_engine.system.timing import HostTimer
from tests.fakes import (
    FakeClock,
    ScriptedDrafter,
    TableDrafter,
    TableTarget,
    byte_tokenizer,
    cycles,
    emitted,
    events,
    greedy,
    run,
    table_probs,
)

PROMPT = [1, 2]


def right(target):
    """Always what the target will say."""
    return ScriptedDrafter(lambda context, k: greedy(target, context, k))


def wrong(target):
    """Never what the target will say."""
    return ScriptedDrafter(lambda context, k: [(t + 1) % target.vocab for t in greedy(target, context, k)])


def scrambled(seed):
    rng = random.Random(seed)
    return lambda target: ScriptedDrafter(
        lambda context, k: [
            t if rng.random() < 0.7 else rng.randrange(target.vocab) for t in greedy(target, context, rng.randint(0, k))
        ]
    )


DRAFTERS = {
    "right": right,
    "wrong": wrong,
    "none": lambda target: ScriptedDrafter(lambda context, k: []),
    "short": lambda target: ScriptedDrafter(lambda context, k: greedy(target, context, 1)),
    **{f"scrambled{i}": scrambled(i) for i in range(6)},
}


@pytest.mark.parametrize("name", DRAFTERS)
def test_greedy_output_is_plain_decoding_for_any_drafter_k_budget_and_stop(name):
    """Nothing accepted, some, all; a stop or the budget's end anywhere inside a draft: 1,000 runs and more."""
    for seed, k, budget in product(range(8), (0, 1, 2, 3, 5, 8), (1, 2, 3, 7, 20)):
        target = TableTarget(vocab=5, seed=seed)
        plain = greedy(target, PROMPT, budget)
        assert emitted(run(target, DRAFTERS[name](target), PROMPT, k=k, max_tokens=budget)) == plain
        stop_id = seed % 5
        stopped = plain[: plain.index(stop_id) + 1] if stop_id in plain else plain
        found = run(target, DRAFTERS[name](target), PROMPT, k=k, max_tokens=budget, stop_ids=[stop_id])
        assert emitted(found) == stopped
        assert found[-1].reason == ("stop" if stop_id in plain else "length")


def test_rejecting_every_token_still_emits_one_per_cycle():
    target = TableTarget()
    found = cycles(run(target, wrong(target), PROMPT, k=4, max_tokens=6))
    assert [(c.accepted, c.end, c.origins) for c in found[:5]] == [(0, "recovered", ("recovered",))] * 5
    assert found[-1].end == "length"


def test_accepting_all_emits_a_bonus():
    target = TableTarget()
    first = cycles(run(target, right(target), PROMPT, k=4, max_tokens=20))[0]
    assert (first.accepted, first.end, len(first.emitted)) == (4, "bonus", 5)
    assert first.origins == ("accepted",) * 4 + ("bonus",)
    assert (first.p, first.q, first.overlap, first.residual) == ((1.0,) * 4, (1.0,) * 4, (1.0,) * 4, ())


def test_without_a_draft_a_cycle_is_plain():
    only = cycles(run(TableTarget(), TableDrafter(), PROMPT, k=0, max_tokens=2))[0]
    assert (only.drafter, only.k, only.drafted, only.end, only.origins) == ("none", 0, (), "plain", ("plain",))


def test_the_last_token_of_the_budget_is_not_drafted_for():
    """A pass verifies k drafted tokens and yields k + 1: with 3 left, 2 are asked for."""
    target = TableTarget()
    found = cycles(run(target, right(target), PROMPT, k=8, max_tokens=3))
    assert [(c.k, len(c.emitted), c.end) for c in found] == [(2, 3, "length")]


def test_eos_inside_a_draft_drops_what_follows_and_keeps_the_count_of_accepted():
    target = TableTarget()
    plain = greedy(target, PROMPT, 5)
    at = next(i for i in range(1, 4) if plain[i] not in plain[:i])
    only = cycles(run(target, right(target), PROMPT, k=4, stop_ids=[plain[at]]))[0]
    assert (only.emitted, only.end, only.accepted) == (tuple(plain[: at + 1]), "stop", 4)
    assert target.cached == len(PROMPT) + at


def test_a_stop_string_across_token_borders_ends_the_run():
    """'ab' + 'cd' emitted token by token contain 'bc'; the token that completes it is the last."""
    tokenizer = byte_tokenizer()
    ids = tokenizer("xabcdy")["input_ids"]
    script = dict(enumerate(ids))
    target = TableTarget(
        vocab=300, logits=lambda c: torch.nn.functional.one_hot(torch.tensor(script.get(len(c) - 1, 5)), 300).double()
    )
    found = run(target, right(target), [0], k=4, stop=["bc"], tokenizer=tokenizer, max_tokens=20)
    assert tokenizer.decode(emitted(found)) == "xabc"
    assert found[-1].reason == "stop"


def test_the_targets_context_limit_ends_the_run_cleanly():
    target = TableTarget()
    target.limit = 6
    found = run(target, right(target), PROMPT, k=3, max_tokens=100)
    assert (len(emitted(found)), found[-1].reason) == (4, "length")


@pytest.mark.parametrize("prompt", [[], [1] * 6, [1] * 9])
def test_a_prompt_that_cannot_be_continued_is_refused_before_anything_runs(prompt):
    target = TableTarget()
    target.limit = 6
    with pytest.raises(UsageError):
        run(target, right(target), prompt)
    assert target.passes == 0


def test_events_come_in_order_and_add_up():
    target, summary = TableTarget(seed=3), Summary()
    found = run(target, TableDrafter(seed=3), PROMPT, k=4, sampling=Sampling(1.0), max_tokens=50)
    assert isinstance(found[0], Started)
    assert isinstance(found[-1], Finished)
    assert [c.index for c in cycles(found)] == list(range(len(found) - 2))
    for event in found:
        summary = summary.plus(event)
    assert summary.emitted == 50 == found[-1].emitted
    assert summary.cycles == target.passes == found[-1].cycles
    assert summary.accepted <= summary.tested <= summary.drafted
    assert summary.emitted == summary.accepted + summary.cycles
    context = len(PROMPT)
    for c in cycles(found):
        assert c.context == context
        assert c.accepted <= len(c.drafted) <= c.k
        assert len(c.p) == len(c.q) == len(c.u) == len(c.overlap) == len(c.drafted)
        assert [u is not None for u in c.u] == [i < c.tested for i in range(len(c.drafted))]
        context += len(c.emitted)


def test_same_seed_same_tokens_and_another_seed_others():
    def tokens(seed):
        return emitted(
            run(TableTarget(), TableDrafter(), PROMPT, k=3, sampling=Sampling(1.0), max_tokens=40, seed=seed)
        )

    assert tokens(7) == tokens(7)
    assert tokens(7) != tokens(8)


def test_phases_are_timed_by_the_clock_that_is_passed():
    """Four looks at the clock a cycle: draft, verify and other are one tick each, and the consumer's time is none."""
    found = run(TableTarget(), TableDrafter(), PROMPT, k=2, max_tokens=9, timer=HostTimer(FakeClock()))
    assert {(c.draft_s, c.verify_s, c.other_s) for c in cycles(found)} == {(1.0, 1.0, 1.0)}
    assert found[-1].prefill_s == 1.0


def test_a_consumer_that_stops_iterating_has_cancelled():
    target = TableTarget()
    run_of_events = events(target, right(target), PROMPT, k=3, max_tokens=1000)
    for _ in range(3):
        next(run_of_events)
    run_of_events.close()
    assert target.passes == 2
    assert emitted(run(target, right(target), PROMPT, k=3, max_tokens=20)) == greedy(target, PROMPT, 20)


def test_settings_change_between_cycles_and_say_so():
    controls, target = Controls(k=2), TableTarget()
    found = []
    for event in events(target, right(target), PROMPT, controls=controls, max_tokens=30):
        found.append(event)
        if len(cycles(found)) == 2:
            controls.change(k=5, reason="asked")
    changed = [e for e in found if isinstance(e, SettingChanged)]
    assert changed == [SettingChanged(2, "k", 2, 5, "asked")]
    assert [c.k for c in cycles(found)][:4] == [2, 2, 5, 5]
    assert emitted(found) == greedy(target, PROMPT, 30)


def test_no_setting_changes_without_an_event():
    """Changed while Started, and again while SettingChanged, is being consumed: what is announced is what runs."""
    controls, target, found = Controls(k=2), TableTarget(), []
    for event in events(target, right(target), PROMPT, controls=controls, max_tokens=40):
        found.append(event)
        if isinstance(event, Started):
            controls.change(k=3)
        if isinstance(event, SettingChanged) and event.new == 3:
            controls.change(k=5)
    assert found[0].settings["k"] == 2
    announced = [(e.cycle, e.old, e.new) for e in found if isinstance(e, SettingChanged)]
    assert announced == [(0, 2, 3), (1, 3, 5)]
    assert [c.k for c in cycles(found)][:3] == [3, 5, 5]


def test_a_bad_setting_changes_nothing():
    controls = Controls(k=2)
    with pytest.raises(UsageError, match="-1"):
        controls.change(k=-1)
    assert controls.settings.k == 2


def test_a_failure_is_recorded_and_raised():
    target = TableTarget(logits=lambda context: torch.full((5,), float("nan")))
    found = []
    with pytest.raises(GenerationFailed, match="target"):
        found.extend(events(target, TableDrafter(), PROMPT))
    found = list_until_error(events(target, TableDrafter(), PROMPT))
    assert isinstance(found[-1], Failed)
    assert found[-1].error == "GenerationFailed"


def list_until_error(iterator):
    found = []
    try:
        for event in iterator:
            found.append(event)
    except GenerationFailed:
        pass
    return found


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_minus_infinity_is_a_ban_and_not_a_failure(temperature):
    """Only one token has a finite logit: it is emitted, whatever the draft says."""
    logits = torch.full((5,), float("-inf"))
    logits[3] = 1.0
    target = TableTarget(logits=lambda context: logits)
    assert emitted(run(target, TableDrafter(), PROMPT, sampling=Sampling(temperature), max_tokens=6)) == [3] * 6


def test_a_drafter_that_proposes_too_much_is_reported():
    drafter = ScriptedDrafter(lambda context, k: [1] * (k + 1))
    with pytest.raises(GenerationFailed, match="scripted proposed 3 tokens where 2"):
        run(TableTarget(), drafter, PROMPT, k=2)


def test_running_out_of_memory_is_recognised():
    def full(context):
        raise torch.OutOfMemoryError("CUDA out of memory")

    from specdec_engine.errors import OutOfMemory

    with pytest.raises(OutOfMemory):
        run(TableTarget(logits=full), TableDrafter(), PROMPT)


# -- launched ahead, as on a GPU ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0)])
def test_running_ahead_gives_the_same_events(sampling):
    """Whatever the drafter, the budget and the stop."""
    for seed, k, budget in product(range(4), (0, 1, 3), (1, 2, 7, 20)):
        found = []
        for ahead in (False, True):
            target = TableTarget(vocab=5, seed=seed)
            timer, options = HostTimer(FakeClock()), {"k": k, "sampling": sampling, "max_tokens": budget}
            found.append(run(target, TableDrafter(), PROMPT, stop_ids=[seed], timer=timer, ahead=ahead, **options))
        assert cycles(found[0]) == cycles(found[1])
        assert [e.kind for e in found[0]] == [e.kind for e in found[1]]


def test_ahead_the_next_pass_is_launched_before_the_event_comes():
    target = TableTarget(vocab=5)
    passes = []
    for event in events(target, right(target), PROMPT, max_tokens=12, k=2, ahead=True):
        passes += [target.passes] if event.kind == "cycle" else []
    assert passes == [2, 3, 4, 4]


def test_ahead_a_changed_setting_reaches_the_cycle_after_the_one_in_flight():
    target, controls = TableTarget(vocab=5), Controls(1)
    seen = []
    for event in events(target, right(target), PROMPT, controls=controls, max_tokens=20, ahead=True):
        if event.kind == "cycle":
            seen.append(event.k)
            if event.index == 1:
                controls.change(k=3)
        if event.kind == "setting_changed":
            assert (event.cycle, event.new) == (3, 3)
    assert seen[:5] == [1, 1, 1, 3, 3]


def test_ahead_a_launch_that_breaks_loses_no_cycle():
    target = TableTarget(vocab=5)

    def script(context, k):
        if len(context) > 8:
            raise ValueError("broken")
        return greedy(target, context, k)

    found, come = [], events(target, ScriptedDrafter(script), PROMPT, max_tokens=20, k=2, ahead=True)
    with pytest.raises(GenerationFailed, match="broken"):
        deque(map(found.append, come))
    assert found[-1].kind == "failed"
    assert len(emitted(found)) == 9


def test_the_consumers_time_is_not_the_runs_own():
    """A screen that pauses between two cycles does not slow the figures, ahead or not."""
    clock = FakeClock()
    for ahead in (False, True):
        target = TableTarget(vocab=5)
        for event in events(target, right(target), PROMPT, max_tokens=12, k=2, ahead=ahead, timer=HostTimer(clock)):
            if event.kind == "cycle":
                assert event.other_s == 1.0
                clock.now += 1000.0


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(0.5), Sampling(0.8, top_k=2), Sampling(0.9, coupling="gumbel")]
)
def test_cycles_tell_p_and_q_before_they_were_warped_where_they_are_asked(sampling):
    told = cycles(run(TableTarget(), TableDrafter(), sampling=replace(sampling, raw=True)))
    context = [1, 2]
    for cycle in told:
        for raw in filter(None, (cycle.raw_p, cycle.raw_q)):  # nothing of what was never tested
            assert [value is None for value in raw.drafted] == [u is None for u in cycle.u]
            assert [row == () for row in raw.likeliest] == [u is None for u in cycle.u]
        for i, token in enumerate(cycle.drafted[: cycle.tested]):
            for raw, seed in ((cycle.raw_p, 0), (cycle.raw_q, 1)):
                table = table_probs([*context, *cycle.drafted[:i]], 5, seed)
                assert raw.drafted[i] == pytest.approx(float(table[token]), rel=1e-4)
                assert [mass for _, mass, _ in raw.likeliest[i]] == pytest.approx(
                    table.sort(descending=True)[0][:4].tolist()
                )
            assert all(after == pytest.approx(cycle.q[i]) for at, _, after in cycle.raw_q.likeliest[i] if at == token)
            assert all(after == pytest.approx(cycle.p[i]) for at, _, after in cycle.raw_p.likeliest[i] if at == token)
        context += cycle.emitted
    silent = cycles(run(TableTarget(), TableDrafter(), sampling=sampling))
    assert all(cycle.raw_p is None and cycle.raw_q is None for cycle in silent)
    assert [c.emitted for c in silent] == [c.emitted for c in told]


def test_a_draft_is_tested_with_the_distribution_it_was_drawn_from_also_at_a_temperature_of_its_own():
    told = cycles(run(TableTarget(), TableDrafter(), controls=Controls(3, Sampling(1.0), draft_temperature=0.5)))
    context = [1, 2]
    for cycle in told:
        for i, token in enumerate(cycle.drafted[: cycle.tested]):
            p, q = (table_probs([*context, *cycle.drafted[:i]], 5, seed) for seed in (0, 1))
            sharp = q.square() / q.square().sum()
            assert (cycle.p[i], cycle.q[i]) == pytest.approx((float(p[token]), float(sharp[token])), rel=1e-4)
            assert cycle.overlap[i] == pytest.approx(float(torch.minimum(p, sharp).sum()), rel=1e-4)
        context += cycle.emitted
    assert 0 < sum(cycle.accepted for cycle in told) < sum(len(cycle.drafted) for cycle in told)
