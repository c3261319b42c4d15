"""The statistics of a benchmark against data whose truth is known, and its plan."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from statistics import fmean

import pytest

from specdec_engine.bench import report
from specdec_engine.bench.figures import Interval, Sample, bootstrap, by_question, costs, geometric, recommend
from specdec_engine.bench.plan import Arm, Plan, builtin_questions, chosen, ks_of
from specdec_engine.errors import UsageError
from specdec_engine.record.cycle_stats import budget, lost_to
from specdec_engine.record.prompt_files import Question, read_questions
from specdec_engine.record.stats import Summary

QUESTIONS = tuple(Question(kind, (f"{kind} {i}",)) for kind in ("a", "b") for i in range(3))


def sample(question, repeat=0, arm=None, *, token_s=0.01, emitted=100, drafted=0, accepted=0, cycles=None, draft_s=0.0):
    cycles = emitted - accepted if cycles is None else cycles
    total = token_s * emitted
    width = str(1 + (drafted // cycles if drafted else 0))
    return Sample(
        question, repeat, 0.0, arm, 0, emitted, cycles, drafted, drafted, accepted, draft_s, total - draft_s, 0.0, 0.1,
        {width: (cycles, total - draft_s)}, tuple(range(emitted)), (emitted,),
    )  # fmt: skip


def test_ratios_are_paired_and_averaged_by_prompt_first():
    plain = [sample(0, 0, token_s=0.02), sample(0, 1, token_s=0.04), sample(1, 0, token_s=0.01)]
    arm = [sample(0, 0, 0, token_s=0.01), sample(0, 1, 0, token_s=0.01), sample(1, 0, 0, token_s=0.02)]
    found = by_question(arm, plain)
    assert found == pytest.approx({0: math.sqrt(2 * 4), 1: 0.5})
    assert geometric(list(found.values())) == pytest.approx(math.sqrt(math.sqrt(8) * 0.5))
    assert Interval.of(list(found.values())).slower == 0.5


def test_a_round_that_plain_decoding_lacks_is_left_out():
    assert by_question([sample(0, 0, 0), sample(0, 1, 0, token_s=9.0)], [sample(0, 0)]) == pytest.approx({0: 1.0})


def test_pairing_cancels_a_machine_that_slows_down():
    """Twice as slow in the second half: the paired ratio stays 1.5, the ratio of means over shuffled halves does not."""
    slow = [1.0 if i < 10 else 2.0 for i in range(20)]
    plain = [sample(i, token_s=0.015 * slow[i]) for i in range(20)]
    arm = [sample(i, 0, 0, token_s=0.010 * slow[i]) for i in range(20)]
    assert all(r == pytest.approx(1.5) for r in by_question(arm, plain).values())
    unpaired = fmean(s.token_s for s in plain[10:]) / fmean(s.token_s for s in arm[:10])
    assert unpaired > 2.5


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng, hits, trials = random.Random(1), 0, 300
    for trial in range(trials):
        values = [math.exp(rng.gauss(math.log(1.3), 0.2)) for _ in range(24)]
        low, high = bootstrap(values, seed=trial)
        hits += low <= 1.3 <= high
    assert 0.89 <= hits / trials <= 0.98


def test_costs_are_counted_in_plain_passes():
    plain = [sample(i, token_s=0.010) for i in range(3)]
    # 50 cycles of 2 drafted tokens, half of them kept: 100 tokens; a cycle takes 2 ms of drafting, 13 of verifying.
    arm = [
        sample(i, 0, 0, token_s=0.0075, emitted=100, drafted=100, accepted=50, cycles=50, draft_s=0.1) for i in range(3)
    ]
    found = costs(arm, plain)
    assert found.emitted == pytest.approx(2.0)
    assert found.c == pytest.approx(0.1)
    assert found.v == pytest.approx({3: 1.3})
    assert found.predicted == pytest.approx(2.0 / (0.2 + 1.3))
    assert found.alpha == pytest.approx(0.5)
    said = found.cause(found.predicted)
    assert "wider pass 0.30" in said
    assert "drafting 0.20" in said


def test_screen_and_bench_tell_the_same_of_the_same_run():
    """What a cycle costs, what is lost to what, and the speedup."""
    plain_s, plain = 0.010, [sample(0, token_s=0.010)]
    arm = sample(0, 0, 0, token_s=0.0075, emitted=100, drafted=100, accepted=50, cycles=50, draft_s=0.1)
    arm = replace(arm, other_s=0.02)
    total = Summary(
        cycles=50,
        drafted=100,
        tested=100,
        accepted=50,
        emitted=100,
        draft_s=0.1,
        verify_s=arm.verify_s,
        other_s=0.02,
        decode_s=arm.decode_s,
    )
    screen, bench = budget(total, plain_s), costs([arm], plain)
    assert screen is not None
    for name in ("emitted", "draft", "verify", "other"):
        assert getattr(screen, name) == pytest.approx(getattr(bench, name)), name
    assert dict(screen.lost) == pytest.approx(dict(lost_to(bench.draft, bench.verify, bench.other)))
    assert sum(dict(screen.lost).values()) == pytest.approx(screen.cost - 1)
    assert screen.speedup == pytest.approx(Interval.of([plain[0].token_s / arm.token_s]).mean)


def spread(mean, seed, n=24):
    rng = random.Random(seed)
    return {i: mean * math.exp(rng.gauss(0, 0.1)) for i in range(n)}


def test_the_smallest_k_within_noise_is_recommended():
    best = spread(1.50, 0)
    near = {i: r * math.exp(random.Random(i).gauss(-0.003, 0.02)) for i, r in best.items()}
    far = {i: r * 0.8 for i, r in best.items()}
    found = recommend([far, near, best], [1, 2, 4], ["k 1", "k 2", "k 4"])
    assert found.arm == 1
    assert "within noise of the best, k 4" in found.reason
    assert recommend([best, far], ["auto", 2], ["auto", "k 2"]).arm == 0


def test_what_is_not_surely_faster_is_turned_off():
    found = recommend([spread(1.01, 3), spread(0.8, 4)], [2, 4], ["k 2", "k 4"])
    assert found.arm is None
    assert found.reason.startswith("turn it off")


def test_ks_are_lists_and_ranges():
    assert ks_of("1-3,auto,8") == (1, 2, 3, "auto", 8)
    assert ks_of("2-8+3") == (2, 5, 8)
    assert ks_of("1-16*2") == (1, 2, 4, 8, 16)
    for wrong in ("x", "5-2", "1-100", "1-8*1", "-1", ""):
        with pytest.raises(UsageError):
            ks_of(wrong)


def plan(**changes):
    given = {"target": "t", "arms": (Arm("d", 2, 0.0), Arm("d", "auto", 0.8)), "questions": QUESTIONS, "repeats": 2}
    return Plan(**{**given, "max_tokens": 8, "seed": 0, **changes})


def test_every_prompt_is_run_in_every_arm_and_plain_at_every_temperature():
    runs = list(plan().runs())
    assert len(runs) == 2 * 6 * (2 + 2)
    assert len(set(runs)) == len(runs)
    for start in range(0, len(runs), 4):  # prompt by prompt
        assert len({(c.question, c.repeat) for c in runs[start : start + 4]}) == 1
    firsts = [runs[start].arm for start in range(0, len(runs), 4)]
    assert len(set(firsts)) > 1  # in shuffled order
    assert runs == list(plan().runs())


def test_prompts_come_in_the_formats_of_the_field(tmp_path):
    file = tmp_path / "q"
    file.write_text(
        '{"question_id": 1, "category": "writing", "turns": ["one", "two"]}\n\n{"prompt": "three"}\nplain text\n'
    )
    assert read_questions(file) == [
        Question("writing", ("one", "two")),
        Question("prompts", ("three",)),
        Question("text", ("plain text",)),
    ]
    for wrong in ('{"turns": []}', '{"a": 1}', '{"a": 1}\n{', ""):
        file.write_text(wrong)
        with pytest.raises(UsageError):
            read_questions(file)
    with pytest.raises(UsageError):
        read_questions(tmp_path / "nowhere")


def test_our_own_prompts_are_two_of_each_of_six_kinds():
    found = builtin_questions()
    assert len(found) == 12
    assert len({q.category for q in found}) == 6


def test_prompts_are_chosen_by_category_and_evenly():
    assert [q.turns[0] for q in chosen(QUESTIONS, ["b"], None)] == ["b 0", "b 1", "b 2"]
    assert [q.turns[0] for q in chosen(QUESTIONS, (), 2)] == ["a 0", "b 0"]
    with pytest.raises(UsageError, match="'c'"):
        chosen(QUESTIONS, ["c"], None)


def made(samples):
    return report.record(
        plan(),
        samples,
        {"target": {"weight_bytes": 100}, "bandwidth_bytes_per_second": 1e5, "threads": 2},
        {0: (2, [])},
    )


SAMPLES = [sample(0), sample(1), sample(0, 0, 0, token_s=0.005), sample(2, 0, 0)]


@pytest.fixture
def written(tmp_path):
    file = tmp_path / "r.json"
    report.write(file, made(SAMPLES))
    return file


def test_a_record_tells_speedup_equality_and_advice():
    found = made(SAMPLES)
    assert found["arms"][0]["speedup"] == pytest.approx(2.0)
    assert found["arms"][0]["identical"] == found["arms"][0]["compared"] == 2
    assert found["recommendation"]["reason"].startswith("too few prompts")


def test_a_record_is_read_back_whole(written):
    again = report.samples_of(report.read(written), plan(), threads=2)
    assert sorted(again, key=repr) == sorted(SAMPLES, key=repr)


def test_a_record_serves_only_its_own_plan_and_threads(written):
    with pytest.raises(UsageError, match="other arms"):
        report.samples_of(report.read(written), plan(max_tokens=9), threads=2)
    with pytest.raises(UsageError, match="begun on 2 threads"):
        report.samples_of(report.read(written), plan(), threads=1)


def test_a_file_of_another_schema_is_no_record(written):
    written.write_text(json.dumps({"schema": "other"}))
    with pytest.raises(UsageError, match=r"specdec\.bench/1"):
        report.read(written)


def test_samples_whose_plain_run_is_missing_are_kept():
    found = made([sample(0, 0, 0)])
    assert found["arms"] == []
    assert len(found["unpaired"]) == 1
    assert found["recommendation"] is None
