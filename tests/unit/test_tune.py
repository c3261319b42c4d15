"""What-if without generating: against simulation, against real runs, and what is made of it."""

from __future__ import annotations

import json
import random
import shlex

import pytest

from specdec_engine.core.cycle_types import Sampling
from specdec_engine.core.registry import is_lookup
from specdec_engine.errors import UsageError
from specdec_engine.record.events import Cycle, SettingChanged
from specdec_engine.record.trace import TraceWriter
from specdec_engine.tune.answers import Answer, cut, evenly, recorded
from specdec_engine.tune.servers import Wanted, launches, served
from specdec_engine.tune.whatif import (
    Chances,
    CycleKind,
    Member,
    UnitCosts,
    best_of,
    curves,
    expected_cycles,
    predicted,
)  # fmt: skip
from tests.fakes import (
    ScriptedDrafter,
    TableDrafter,
    TableTarget,
    byte_tokenizer,
    cycles,
    emitted,
    run,
    save_head_draft,
    table_probs,
    tiny_llama,
)  # fmt: skip

# -- against simulation ------------------------------------------------------------------------------------------------

P = [[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.1, 0.1, 0.8]]
Q = [[0.5, 0.2, 0.3], [0.4, 0.4, 0.2], [0.3, 0.1, 0.6]]


def chain(n, rng):
    """A text of a Markov chain, and the chances that it came from drafts of another."""
    state, chances = 0, []
    for _ in range(n):
        token = rng.choices(range(3), P[state])[0]
        chances.append(min(1.0, Q[state][token] / P[state][token]))
        state = token
    return chances


def simulated(k, tokens, rng):
    """Tokens a cycle of speculative decoding (Leviathan et al., algorithm 1), written without the engine."""
    state, emitted_, cycles_ = 0, 0, 0
    while emitted_ < tokens:
        cycles_ += 1
        for _ in range(k):
            token = rng.choices(range(3), Q[state])[0]
            if rng.random() >= P[state][token] / Q[state][token]:
                rest = [max(0.0, p - q) for p, q in zip(P[state], Q[state], strict=True)]
                state, emitted_ = rng.choices(range(3), rest)[0], emitted_ + 1
                break
            state, emitted_ = token, emitted_ + 1
        else:
            state, emitted_ = rng.choices(range(3), P[state])[0], emitted_ + 1
    return emitted_ / cycles_


@pytest.mark.parametrize("k", [1, 2, 4, 8])
def test_one_text_tells_what_simulations_of_every_k_show(k):
    """Within half a percent, from 120,000 tokens."""
    n = 120_000
    chances = chain(n, random.Random(1))
    table = Chances((8,) * n, tuple(tuple(chances[i : i + 8]) for i in range(n)), ended=True)
    expected = n / sum(expected_cycles([table], k).values())
    assert expected == pytest.approx(simulated(k, n, random.Random(k)), rel=0.005)


# -- against real runs -------------------------------------------------------------------------------------------------


def script(context, k):
    """Right for as long as the context's length has it, and sometimes silent."""
    target, grown = TableTarget(seed=3), list(context)
    for i in range(min(k, len(context) % 4)):
        right = int(target.logits(grown).argmax())
        grown.append(right if i < len(context) % 3 else (right + 1) % 5)
    return grown[len(context) :]


@pytest.mark.parametrize("n", [1, 2, 17, 40])
@pytest.mark.parametrize("k", [1, 2, 3, 6])
def test_cycles_of_a_deterministic_draft_are_exact_to_the_last_of_the_budget(n, k):
    prompt = [1, 2]
    said = emitted(run(TableTarget(seed=3), ScriptedDrafter(script), prompt, k=0, max_tokens=n))
    drafts = [script([*prompt, *said[:i]], 8) for i in range(n)]
    rows = tuple(tuple(float(a == b) for a, b in zip(d, said[i:], strict=False)) for i, d in enumerate(drafts))
    found = expected_cycles([Chances(tuple(map(len, drafts)), rows)], k)
    real = cycles(run(TableTarget(seed=3), ScriptedDrafter(script), prompt, k=k, max_tokens=n))
    by_drafted = {d: sum(len(c.drafted) == d for c in real) for d in {len(c.drafted) for c in real}}
    assert {kind.drafted: times for kind, times in found.items() if times} == pytest.approx(by_drafted)


def test_sampled_runs_take_the_cycles_that_plain_ones_foretell():
    """A table that depends on the whole context; 250 plain answers against 250 real runs, within 2 %."""
    k, n, prompt, sampling = 3, 24, [1, 2], Sampling(1.0)
    expected = real = 0.0
    for seed in range(250):
        said = emitted(run(TableTarget(), TableDrafter(), prompt, k=0, max_tokens=n, seed=seed, sampling=sampling))
        chances, context = [], list(prompt)
        for token in said:
            p, q = (table_probs(context, 5, s)[token] for s in (0, 1))
            chances.append(float(min(1.0, q / p)))
            context.append(token)
        rows = tuple(tuple(chances[i : i + k]) for i in range(n))
        expected += sum(expected_cycles([Chances((k,) * n, rows)], k).values())
        real += len(
            cycles(run(TableTarget(), TableDrafter(), prompt, k=k, max_tokens=n, seed=10**6 + seed, sampling=sampling))
        )
    assert expected == pytest.approx(real, rel=0.02)


def test_in_a_cascade_the_first_that_proposes_wins_the_cycle():
    lookup = Chances((0, 2, 0, 2), ((), (1.0, 0.0), (), (1.0,)), ended=True)
    model = Chances((4,) * 4, ((1.0,) * 4, (0.0,) * 3, (0.0,) * 2, (0.0,)), ended=True)
    assert expected_cycles([lookup, model], 1) == {CycleKind(1, 1): 2.0, CycleKind(0, 1): 1.0}  # tokens 0 1, 2, 3
    assert expected_cycles([lookup], 2) == {CycleKind(0, 0): 1.0, CycleKind(0, 2): 2.0}


def test_before_another_a_lookup_counts_where_it_is_sure():
    """A run leaves the rest to the next drafter (`limits.SURE`), and so does what is predicted."""
    alone = Chances((2, 2), ((0.0, 0.0), (0.0,)), ended=True)
    sure = Chances((0, 0), ((), ()), ended=True)
    right = Chances((2, 2), ((1.0, 1.0), (1.0,)), ended=True)
    lookup, model = Member("ngram", (alone,), costs(), before=(sure,)), Member("x", (right,), costs())
    assert predicted([lookup], 2).emitted == 1.0
    assert predicted([lookup, model], 2).emitted == 2.0
    assert predicted([model, lookup], 2).emitted == 2.0


# -- costs and settings ------------------------------------------------------------------------------------------------


def cycle(drafted, draft_s, verify_s, other_s=0.0):
    k = len(drafted)
    none = (None,) * k
    return Cycle(
        0, "x", k, tuple(drafted), 0, (1,), "recovered", none, none, none, none, (), draft_s, verify_s, other_s, 9
    )


def costs(c=0.1, step=0.05, plain=0.010, slows=0.0, catching_up=1.0):
    """A plain cycle of 10 ms; a drafted token costs c of it and widens the pass by `step`."""
    cycles, speed = [], 1.0
    for k in [*range(1, 17), *range(1, 17)]:
        cycles.append(cycle((), 0.0, plain * speed))
        for factor in (catching_up, 1.0):
            cycles.append(cycle(range(k), factor * plain * c * k * speed, plain * (1 + step * k) * speed))
        speed += slows
    return UnitCosts.of(cycles)


def test_cycles_cost_what_was_measured_in_plain_cycles():
    found = costs(c=0.1, step=0.05)
    assert found(0) == 1.0
    assert found(4) == pytest.approx(1 + 4 * 0.15)
    assert costs(plain=0.5)(4) == pytest.approx(found(4)), "a slower machine is no other ratio"
    assert costs(catching_up=3.0)(4) == pytest.approx(found(4)), "nor a draft that first reads what a plain cycle said"
    assert costs(slows=0.05)(4) == pytest.approx(found(4), rel=0.03), "nor is one that becomes slower"


def test_a_lookups_drafts_are_timed_apart_and_its_silence_counts():
    found = costs(c=0.5, step=0.0).drafting([(2, 0.001), (2, 0.003), (2, 0.002), (0, 0.001)])
    assert found(2) == pytest.approx(1.2)
    assert found(1) == pytest.approx(1.2), "what was not measured costs what more tokens cost"
    assert found(0) == pytest.approx(1.1)
    silent = Chances((0, 0), ((), ()), ended=True)
    model = member("m", 0.0, n=2, texts=1)
    alone, behind = predicted([model], 1), predicted([Member("ngram", (silent,), found), model], 1)
    assert 1 / behind.speedup.mean == pytest.approx(1 / alone.speedup.mean + 0.1)


def member(name, alpha, *, n=60, texts=3, **unit):
    rows = tuple((alpha,) * 16 for _ in range(n))
    return Member(name, tuple(Chances((16,) * n, rows, ended=True) for _ in range(texts)), costs(**unit))


def test_the_best_k_is_the_one_that_the_formula_has():
    """(1 - α^(k+1)) / (1 - α) / (1 + k c) with α 0.7 and c 0.1 in all is largest at k 4, and so is the walk."""
    curve = [predicted([member("m", 0.7, c=0.1, step=0.0, n=3000)], k) for k in range(1, 17)]
    formula = [(1 - 0.7 ** (k + 1)) / 0.3 / (1 + 0.1 * k) for k in range(1, 17)]
    assert [s.speedup.mean for s in curve] == pytest.approx(formula, rel=0.01)
    assert max(range(16), key=lambda i: formula[i]) + 1 == 4
    assert best_of(curve).k in (3, 4), "the smallest within a hundredth"


def test_the_draft_with_the_best_setting_comes_first():
    members = [member("ngram", 0.3, c=0.0), member("a", 0.6), member("b", 0.7, c=0.6)]
    found = curves([[m] for m in members] + [members[:2]], 8)
    assert next(iter(found)) == "a"
    assert set(found) == {"ngram", "a", "b", "ngram,a"}
    assert all([s.k for s in curve] == list(range(1, 9)) for curve in found.values())


# -- where answers come from -------------------------------------------------------------------------------------------


def test_answers_are_taken_from_traces_of_the_same_target_and_distribution(tmp_path):
    file = tmp_path / "t.jsonl"
    for n in (5, 9):
        with TraceWriter(file) as writer:
            for event in run(TableTarget(), TableDrafter(), [1, 2], max_tokens=n, sampling=Sampling(1.0)):
                writer.write(event)
    found = recorded(file, "table", Sampling(1.0))
    assert [len(a.context) - a.begin for a in found] == [5, 9]
    assert all(a.prompt == (1, 2) and not a.ended for a in found)
    with pytest.raises(UsageError, match="temperature 1"):
        recorded(file, "table", Sampling())
    turned = tmp_path / "turned.jsonl"
    first, *rest = run(TableTarget(), TableDrafter(), [1, 2], sampling=Sampling(1.0))
    with TraceWriter(turned) as writer:
        for event in (first, SettingChanged(0, "temperature", 1.0, 0.5, ""), *rest):
            writer.write(event)
    with pytest.raises(UsageError, match="temperature was turned"):
        recorded(turned, "table", Sampling(1.0))
    with pytest.raises(UsageError, match="of the target table"):
        recorded(file, "another", Sampling(1.0))


def test_a_text_is_cut_into_prompts_and_answers():
    found = cut(list(range(25)), 4, 6)
    assert [a.context for a in found] == [tuple(range(10)), tuple(range(10, 20))], "one token is no answer"
    assert all(a.begin == 4 for a in found)


def test_answers_are_spread_and_cut():
    answers = [Answer(tuple(range(i, i + 10)), 4, True) for i in range(9)]
    assert [a.context[0] for a in evenly(answers, 3)] == [0, 3, 6]
    assert evenly(answers, 20) == answers
    assert answers[0].first(2) == Answer((0, 1, 2, 3, 4, 5), 4, False)
    assert answers[0].first(6) is answers[0]


# -- servers -----------------------------------------------------------------------------------------------------------


def test_of_a_cascade_servers_get_the_checkpoint_before_the_lookup():
    assert served("ngram,org/small") == ("org/small", ("ngram",))
    assert served("ngram:5,builtin") == ("ngram:5", ("builtin",))
    assert served("ngram,mtp") == ("mtp", ("ngram",))
    assert served("builtin")[0] is served("self:4,head:x")[0] is served("none")[0] is None


def test_what_distill_made_is_no_checkpoint_to_others(tmp_path):
    tiny = tiny_llama()
    folder = save_head_draft(tmp_path / "head", tiny, byte_tokenizer())
    assert served(f"ngram,{folder}") == ("ngram", (str(folder),))


def test_launch_lines_say_the_same_k_and_what_is_not_the_same():
    vllm, sglang, llama = launches(Wanted("org/big", "org/small", 4, sampled=True, left_out=("ngram",)))
    words = shlex.split(vllm.line)
    config = json.loads(words[words.index("--speculative-config") + 1])
    assert config == {
        "method": "draft_model", "model": "org/small", "draft_sample_method": "probabilistic", "num_speculative_tokens": 4,
    }  # fmt: skip
    assert "--speculative-num-steps 4" in sglang.line
    assert "--speculative-num-draft-tokens 5" in sglang.line
    assert "--spec-draft-n-max 4" in llama.line
    assert "without ngram" in vllm.needs
    assert any("org/big as a GGUF" in need for need in llama.needs)
    vllm, sglang, llama = launches(Wanted("big.gguf", "ngram:5", 3, sampled=False, gguf="big.gguf"))
    assert '"prompt_lookup_max": 5' in vllm.line
    assert "--spec-ngram-simple-size-n 5" in llama.line
    assert all(any("its own lookup" in need for need in launch.needs) for launch in (vllm, sglang, llama))
    assert any("not as a GGUF" in need for need in vllm.needs)


def test_the_targets_own_module_is_asked_for_without_a_model():
    vllm, sglang, llama = launches(Wanted("org/big", "mtp", 2, sampled=True))
    words = shlex.split(vllm.line)
    assert json.loads(words[words.index("--speculative-config") + 1]) == {"method": "mtp", "num_speculative_tokens": 2}
    assert "NEXTN --speculative-num-steps 2 --speculative-eagle-topk 1 --speculative-num-draft-tokens 3" in sglang.line
    assert "--spec-type draft-mtp --spec-draft-n-max 2" in llama.line
    assert not any("lookup" in need for launch in (vllm, sglang, llama) for need in launch.needs)


# -- negative control --------------------------------------------------------------------------------------------------


def test_a_wrong_chance_shows_in_the_sum():
    """Chances of min(1, p/q), the ratio upside down, do not foretell simulated cycles."""
    n, state, chances, rng = 60_000, 0, [], random.Random(1)
    for _ in range(n):
        token = rng.choices(range(3), P[state])[0]
        chances.append(min(1.0, P[state][token] / Q[state][token]))
        state = token
    table = Chances((4,) * n, tuple(tuple(chances[i : i + 4]) for i in range(n)), ended=True)
    assert n / sum(expected_cycles([table], 4).values()) != pytest.approx(simulated(4, n, random.Random(4)), rel=0.02)


def test_of_two_levels_servers_get_the_model_and_no_draft_by_text():
    assert served("ngram+org/small")[0] == "org/small"
    assert served("ngram:5+org/small")[0] == "org/small"
    assert served("ngram,org/small", by_text={"org/small"})[0] == "ngram"
    assert not is_lookup("ngram:5+org/small")
