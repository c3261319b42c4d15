"""`-k auto` against simulated drafters and machines whose truth is known."""

from __future__ import annotations

import random
from dataclasses import replace
from statistics import fmean

import pytest

from specdec_engine.adaptive.controller import AutoK
from specdec_engine.adaptive.cost import CostsByLength, Drafting, Drift, Staircase, Times, best_k, expected_emitted
from specdec_engine.adaptive.history import MOST
from specdec_engine.adaptive.limits import DraftLimits
from specdec_engine.core.cycle_types import Part, Sibling
from specdec_engine.decoding.control import Controls
from specdec_engine.models.options import LoadOptions
from specdec_engine.pair import load_pair
from specdec_engine.record.events import Cycle, SettingChanged
from tests.fakes import ScriptedDrafter, TableTarget, cycles, emitted, greedy, host, run, save_checkpoint

PACKED = {1: 1.0, 2: 1.05, 3: 1.2, 4: 1.3, 5: 1.7, 6: 1.75, 7: 1.8, 8: 1.85, 9: 2.3}


def cycle(drafted, accepted, draft_s, verify_s, drafter="model"):
    return Cycle(
        0, drafter, drafted, (1,) * drafted, accepted, (1,) * (accepted + 1), "bonus", (), (), (), (), (), draft_s,
        verify_s, 0.01, 10,
    )  # fmt: skip


class World:
    """Seconds and tokens of a run with a controller; alpha the chance of each token, step the seconds of a draft step."""

    def __init__(self, alpha, step, passes=PACKED, noise=0.05, seed=0):
        self.alpha, self.step, self.passes, self.noise = alpha, step, passes, noise
        self.rng = random.Random(seed)
        self.seconds = self.tokens = 0.0

    def cycle(self, k):
        accepted = next((i for i in range(k) if self.rng.random() > self.alpha), k)
        slow = 1 + abs(self.rng.gauss(0, self.noise))
        made = cycle(k, accepted, k * self.step * slow, self.passes[k + 1] * slow)
        self.seconds += made.draft_s + made.verify_s + made.other_s
        self.tokens += accepted + 1
        return made

    def run(self, auto, cycles):
        for _ in range(cycles):
            auto.observe(self.cycle(auto.k))
        return self.tokens / self.seconds

    def rate(self, k):
        emitted = expected_emitted([self.alpha ** (i + 1) for i in range(k)])
        return emitted / (k * self.step + self.passes[k + 1] + 0.01) / (1 + self.noise * 0.8)


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.3, 0.5, 0.7, 0.85, 0.95])
@pytest.mark.parametrize("step", [0.0, 0.1, 0.3])
def test_it_comes_close_to_the_best_k_and_never_far_below_plain(alpha, step):
    worlds = [World(alpha, step, seed=seed) for seed in range(8)]  # luck is 4 % to either side
    found = [world.run(AutoK(), 600) for world in worlds]
    best = max(worlds[0].rate(k) for k in range(MOST + 1))
    assert fmean(found) > 0.96 * best  # learning and looking again cost some
    assert fmean(found) > 0.97 * worlds[0].rate(0)
    assert min(found) > 0.93 * best


def test_a_few_misses_do_not_switch_off_what_pays():
    """With α 0.3 one time in six five drafts in a row miss; and a try after a pause has more to read than to draft."""
    off = 0
    for seed in range(10):
        world, auto, unread = World(0.3, 0.06, seed=seed), AutoK(), 0
        for _ in range(300):
            made = world.cycle(auto.k)
            off += not auto.k
            auto.observe(replace(made, draft_s=made.draft_s + 0.01 * unread * bool(auto.k)))
            unread = 0 if made.drafted else unread + 1
    assert off < 0.1 * 3000


def test_a_draft_that_was_slow_in_its_first_cycles_is_found_to_be_cheap():
    """Its tries each begin with more to read than to draft, which must not hide what the next draft costs."""
    world, auto, unread, reasons = World(0.6, 0.06), AutoK(), 0, []
    for i in range(600):
        made = world.cycle(auto.k)
        slow = 3.0 if i < 4 else 0.01 * unread
        reasons.append(auto.observe(replace(made, draft_s=made.draft_s + slow * bool(auto.k))))
        unread = 0 if made.drafted else unread + 1
    assert any("does not pay" in reason for reason in reasons)
    assert auto.k >= 2


def test_what_may_yet_pay_says_so():
    auto = AutoK()
    auto.begin(0)
    reasons = [auto.observe(cycle(auto.k, 0, 0.06 * auto.k, PACKED[auto.k + 1])) for _ in range(40)]
    said = [reason.split(" ", 1)[1] for reason in reasons if reason.startswith("model")]
    assert said[0] == "may yet pay: too few drafts to tell"
    assert said[1].startswith("does not pay")


def test_what_hurts_is_off_within_a_paragraph_says_so_and_is_tried_again():
    world, auto, reasons = World(0.05, 0.3), AutoK(), []
    ks = []
    for _ in range(300):
        ks.append(auto.k)
        reasons.append(auto.observe(world.cycle(auto.k)))
    assert ks[40:].count(0) > 0.9 * len(ks[40:])
    assert 1 in ks[40:]
    assert any("does not pay" in reason for reason in reasons)
    assert any("tried once more" in reason for reason in reasons)


@pytest.mark.parametrize(("tokenwise", "drafts"), [(True, True), (False, False)])
def test_it_learns_from_the_chance_of_a_token_where_its_rule_tells_it(tokenwise, drafts):
    """Of tokens that had good chances and bad luck, every time."""
    auto = AutoK()
    auto.begin(1, tokenwise=tokenwise)
    for _ in range(60):
        auto.observe(replace(cycle(auto.k, 0, 0.05 * auto.k, PACKED[auto.k + 1]), overlap=(0.8,) * auto.k))
    assert bool(auto.k) == drafts


@pytest.mark.parametrize(
    ("a_token", "runs", "share"), [(0.001, 1, 0.01), (0.04, 1, 0.01), (0.04, 40, 0.011), (0.5, 40, 0.02)]
)
def test_tries_of_a_drafter_that_has_much_to_read_take_a_hundredth_of_the_time(a_token, runs, share):
    """All that was written since its last draft, or since a run began; plain passes take 1."""
    auto, tried, total = AutoK(), 0.0, 0.0
    for run_ in range(runs):
        auto.begin(run_)
        unread = 0
        for i in range(4000 // runs):
            drafted = auto.k
            draft_s = (0.3 + a_token * unread) * bool(drafted)
            unread = 0 if drafted else unread + 1
            auto.observe(cycle(drafted, 0, draft_s, 1.0 + 0.1 * drafted))
            total += draft_s + 1.01 + 0.1 * drafted
            tried += draft_s * (run_ > 0 or i > 110)
    assert tried < share * total


def test_a_try_that_a_hiccup_made_slow_is_not_the_last():
    auto, drafts = AutoK(), []
    for i in range(3000):
        drafted = auto.k
        slow = 20.0 if drafted and i > 40 and not any(d > 40 for d in drafts) else 0.3 * drafted
        drafts += [i] * bool(drafted)
        auto.observe(cycle(drafted, 0, slow, 1.0 + 0.1 * drafted))
    assert len([d for d in drafts if d > 100]) >= 3


def test_a_drafter_that_gets_better_is_found_again():
    world, auto = World(0.02, 0.1), AutoK()
    world.run(auto, 150)
    assert auto.k == 0
    world.alpha = 0.9
    world.run(auto, 400)
    assert auto.k >= 3


def test_each_change_of_k_is_an_event_with_its_reason():
    target = TableTarget(vocab=5)
    drafter = ScriptedDrafter(lambda context, k: [(t + 1) % 5 for t in greedy(target, context, k)])
    found = run(target, drafter, max_tokens=200, controls=Controls(AutoK()))
    changed = [e for e in found if isinstance(e, SettingChanged)]
    assert changed
    assert all(e.name == "k" and e.reason for e in changed)
    assert {c.k for c in cycles(found)} >= {0, 3}


def test_a_drafters_confidence_ends_its_drafts():
    """Tokens it is sure of are accepted, others are not: drafts come to end at the first unsure one."""
    auto, rng = AutoK(), random.Random(0)
    lengths = []
    for _ in range(200):
        k, drafted, right = auto.k, 0, []
        enough = auto.early_stop("model")
        for _ in range(k):
            sure = rng.random() < 0.7
            drafted += 1
            right.append(sure)
            if enough(0.95 if sure else 0.15):
                break
        accepted = next((i for i in range(drafted) if not right[i]), drafted)
        auto.observe(cycle(drafted, accepted, 0.1 * drafted, PACKED[drafted + 1]))
        lengths.append((drafted, right))
    late = [right for drafted, right in lengths[100:] if drafted]
    further = [right for right in late if not all(right[:-1])]
    assert len(further) < len(late) / 6  # every eighth looks what one token more would bring


def test_a_lookup_is_asked_for_its_confidence_and_not_switched_off():
    auto = AutoK()
    for i in range(300):
        sure = i % 3 == 0
        confidence = 1.0 if sure else 0.3
        if auto.k and auto.should_draft("ngram", confidence):
            enough = auto.early_stop("ngram")
            drafted = 1 if enough(confidence) else 2
            enough(confidence)
            auto.observe(cycle(drafted, drafted if sure else 0, 0.0, PACKED[drafted + 1], "ngram"))
        else:
            auto.observe(cycle(0, 0, 0.0, 1.0))
    assert auto.limit("ngram")
    assert auto.should_draft("ngram", 1.0)
    assert not auto.should_draft("ngram", 0.3)


def tree_run(passes, step, alphas, cycles=300, seed=0):
    """A lookup and a model of these chances, merged at the root where each says that it pays: how often both drafted, and
    tokens a second; always both; and the better one alone."""
    found = []
    for forced in (None, ("model",), ("ngram",), ("ngram", "model")):
        auto, rng, both, tokens, seconds = AutoK(), random.Random(seed), 0, 0, 0.0
        for _ in range(cycles):
            parts, said = [], {}
            for name in ("ngram", "model"):
                asked = name in forced if forced else True
                k = auto.limit(name) if auto.k and asked else 0
                join = (
                    not parts
                    or forced
                    or auto.should_join(
                        name,
                        {part.drafter: len(part.tokens) for part in parts},
                        sum(len(part.tokens) for part in parts),
                    )
                )
                if k and join and (name == "model" or auto.should_draft(name, 0.5, alone=False)):
                    enough = auto.early_stop(name)
                    k = next((i for i in range(1, k) if enough(0.5)), k)
                    right = next((i for i in range(k) if rng.random() > alphas[name]), k)
                    said[name] = right
                    drafted = (*range(right), *[99] * (k - right))
                    parts.append(Part(name, drafted, step * k if name == "model" else 0.0))
            if len(said) == 2 and said["ngram"] and said["model"]:  # where both are right they agree
                said = {name: max(said.values()) for name in said}
            accepted = max(said.values(), default=0)
            rows, draft_s = sum(len(part.tokens) for part in parts), sum(part.seconds for part in parts)
            made = replace(cycle(rows, accepted, draft_s, passes[rows + 1]), emitted=(*range(accepted), 50))
            auto.observe(made, parts)
            both += len(parts) == 2
            tokens, seconds = tokens + accepted + 1, seconds + draft_s + passes[rows + 1] + 0.01
        found.append((both / cycles, tokens / seconds))
    return found


@pytest.mark.parametrize("alphas", [{"ngram": 0.4, "model": 0.55}, {"ngram": 0.7, "model": 0.6}])
def test_drafts_join_in_a_tree_where_rows_are_free_and_not_where_they_are_dear(alphas):
    """And never fall far behind the better of both alone."""
    free, dear = dict.fromkeys(range(1, 24), 1.0), {n: 1.0 + 0.3 * (n - 1) for n in range(1, 24)}
    (share, rate), model, lookup, _ = tree_run(free, 0.02, alphas)
    assert share > 0.6
    assert rate > 1.03 * max(model[1], lookup[1])
    (share, rate), model, lookup, always = tree_run(dear, 0.1, alphas)
    assert share < 0.3
    assert rate > 0.93 * max(model[1], lookup[1], always[1])


def test_a_draft_that_did_not_pay_beside_others_is_tried_again():
    """One that is always wrong for a while, and then always right."""
    auto, joined = AutoK(), []
    for i in range(1200):
        if not auto.k:
            auto.observe(cycle(0, 0, 0.0, 1.0))
            continue
        parts = [Part("a", (0, 99), 0.0)]
        if (asked := auto.limit("b")) and auto.should_join("b", {"a": 2}, 2):
            auto.early_stop("b")
            parts.append(Part("b", (*range(50),)[:asked] if i > 100 else (98,) * asked, 0.02 * asked))
        joined.append(len(parts) == 2)
        drafted = sum(len(part.tokens) for part in parts)
        right = asked if len(parts) == 2 and i > 100 else 1
        auto.observe(replace(cycle(drafted, right, 0.0, 1.0 + 0.05 * drafted), emitted=(*range(right), 97)), parts)
    assert sum(joined[60:100]) <= 3
    assert sum(joined[-200:]) > 180


@pytest.mark.parametrize(("row", "right", "stands"), [(0.01, 0.2, True), (0.4, 0.2, False), (0.05, 0.0, False)])
def test_a_second_candidate_stands_where_it_is_right_oftener_than_its_row_costs(row, right, stands):
    """Its drafter gives it 0.3, and half to the first, which is right every other time; row: of a plain pass."""
    auto, rng, stood = AutoK(), random.Random(1), list[bool]()
    for _ in range(600):
        if not auto.limit("head") or not auto.k:
            auto.observe(cycle(0, 0, 0.0, 1.0))
            continue
        drawn = rng.random()
        chosen = auto.places_of_siblings("head", [0.5], [0.3], 0)
        stood.append(chosen == [0])
        said = 0 if drawn < 0.5 else 1 if drawn < 0.5 + right else 2  # the first candidate, the second, another
        kept = said < 1 + len(chosen)
        siblings = tuple(Sibling(place, 1, 0.3) for place in chosen)
        made = cycle(1 + len(chosen), int(kept), 0.02, 1.0 + row * (1 + len(chosen)))
        emitted_ids = (said, 9) if kept else (said,)
        auto.observe(replace(made, emitted=emitted_ids), [Part("head", (0,), 0.02, siblings)])
    assert (sum(stood[-200:]) > 150) == stands
    assert auto.places_of_siblings("unknown", [0.5], [0.3], 0) == []


def test_a_third_drafter_is_held_against_a_lookup_and_another():
    """A lookup may draft further than others do; where both are always right, a third adds nothing."""
    auto = AutoK()
    auto.should_draft("ngram", 0.9)
    for _ in range(40):
        parts = [Part("ngram", (*range(9),), 0.0), Part("head", (0, 1, 2), 0.0), Part("self", (0, 1), 0.3)]
        auto.observe(replace(cycle(14, 9, 0.3, 1.0), emitted=(*range(9), 9)), parts)
        auto.observe(cycle(0, 0, 0.0, 1.0))
    assert not auto.should_join("self", {"ngram": 9, "head": 3}, 12)
    assert auto.limit("ngram") == 15


def test_without_costs_a_second_candidate_stands_where_it_is_likely():
    assert DraftLimits().places_of_siblings("head", [0.5, 0.9, 0.9], [0.4, 0.1, 0.3]) == [0, 2]


def test_without_a_controller_every_draft_goes_as_far_as_k():
    limits = DraftLimits()
    assert limits.limit("x", 5) == 5
    assert limits.should_draft("x", 0.0)
    assert limits.early_stop("x") is None


def test_members_of_a_cascade_have_their_own_k():
    from specdec_engine.core.cycle_types import Sampling
    from specdec_engine.core.randomness import KeyedRandomness
    from specdec_engine.drafters import build_drafter

    class Fixed(AutoK):
        def limit(self, name):
            return {"ngram": 0, "suffix": 2}[name]

        def should_draft(self, name, confidence, alone=True, unknown=True):
            return True

        def early_stop(self, name):
            return lambda confidence: False

    about = host()
    about.draft_limits.controller = Fixed()
    drafter = build_drafter("ngram,suffix", about)
    context = [5, 6, 7] * 4
    drafter.begin(context)
    draft = drafter.propose(context, 4, Sampling(), KeyedRandomness(0))
    assert (draft.drafter, len(draft)) == ("suffix", 2)


def test_the_staircase_takes_the_median_of_the_last_and_never_falls():
    stairs = Staircase()
    with pytest.raises(ValueError, match="no pass"):
        stairs(1)
    for width, seconds in ((1, 1.0), (4, 1.4), (4, 1.3), (3, 9.0), (8, 2.0)):
        stairs.add(width, seconds)
    assert [stairs(n) for n in (1, 3, 4, 6, 8, 20)] == pytest.approx([1.0, 1.35, 1.35, 1.675, 2.0, 2.0 + 12 / 7])
    assert stairs.measured(3)
    assert not stairs.measured(2)


@pytest.mark.parametrize(
    ("seen", "of_16"),
    [
        ({1: 1.0}, 1.0),
        ({1: 1.0, 2: 1.3}, 1.3),  # a step says nothing of more
        ({1: 1.0, 2: 1.3, 4: 1.3}, 1.3),  # a GPU
        ({1: 1.0, 4: 1.6}, 4.0),  # a packed CPU: no row is free
        ({1: 1.0, 2: 1.1, 4: 1.9}, 5.5),  # no steeper than all of it
    ],
)
def test_widths_beyond_the_widest_are_judged_by_the_last_ones(seen, of_16):
    stairs = Staircase()
    for width, seconds in seen.items():
        stairs.add(width, seconds)
    assert stairs(16) == pytest.approx(of_16)


def test_times_forget():
    times = Times()
    for seconds in (1.0, *[3.0] * 6):
        times.add(seconds)
    assert times.seconds == 3.0


def test_a_draft_costs_most_at_its_first_token():
    drafting = Drafting()
    assert not drafting.known
    drafting.add(1, 1.5)
    assert [drafting(n) for n in (0, 1, 3)] == pytest.approx([0.0, 1.5, 4.5])
    drafting.add(3, 2.9)
    assert [drafting(n) for n in (0, 1, 2, 5)] == pytest.approx([0.0, 1.5, 2.2, 4.3])
    drafting.add(2, 1.9)
    assert [drafting(n) for n in (2, 3, 4)] == pytest.approx([1.9, 2.9, 3.9])


def test_a_machine_that_slows_down_slows_everything_alike():
    """A plain pass measured before is not held against wider ones measured after."""
    rng = random.Random(0)
    drift, stairs = Drift(), Staircase()
    slow = 1.0
    for i in range(400):
        slow = 1.0 if i < 200 else 1.4
        width = 1 if i == 100 else rng.choice((2, 3))
        seconds = PACKED[width] * slow * rng.uniform(0.95, 1.05)
        drift.saw(width, seconds)
        stairs.add(width, drift.evened(seconds))
    assert stairs(2) / stairs(1) == pytest.approx(PACKED[2], rel=0.08)
    assert stairs(3) / stairs(1) == pytest.approx(PACKED[3], rel=0.08)


def test_best_k_solves_the_design_pages_formula():
    stairs = Staircase()
    for width, seconds in PACKED.items():
        stairs.add(width, seconds)
    choice = best_k([0.8**i for i in range(1, 9)], lambda k: 0.1 * k, stairs, 0.0)
    rates = [expected_emitted([0.8**i for i in range(1, k + 1)]) / (0.1 * k + PACKED[k + 1]) for k in range(9)]
    assert choice.rate == pytest.approx(max(rates))
    assert choice.k == rates.index(max(rates))


def test_a_seed_that_comes_again_finds_nothing_learnt():
    """k must not depend on what the very numbers of this run have decided before."""
    auto = AutoK()
    auto.begin(1)
    World(0.02, 0.1).run(auto, 100)
    auto.begin(2)
    assert auto.k == 0
    auto.begin(1)
    assert auto.k == 3


def test_a_pairs_run_begins_with_the_k_that_is_left_after_forgetting(tmp_path):
    """The settings are read after the run has begun: with k 0 from what was forgotten it would never draft again."""
    pair = load_pair(str(save_checkpoint(tmp_path / "model")), "ngram", LoadOptions(dtype="float32", threads=1))
    for controls in (None, pair.controls()):
        pair.auto.begin(7)
        World(0.02, 0.1).run(pair.auto, 100)
        assert pair.auto.k == 0
        started = next(pair.decode([1, 2, 3], seed=7, max_tokens=4, controls=controls))
        assert started.settings["k"] == 3


def test_a_run_that_taught_it_nothing_may_be_repeated():
    """As the plain runs are that a screen measures before each of its own."""
    auto = AutoK()
    auto.begin(0)
    auto.begin(1)
    World(0.02, 0.1).run(auto, 100)
    auto.begin(0)
    auto.begin(2)
    assert auto.k == 0


@pytest.mark.parametrize("spec", ["none,ngram", "ngram,none"])
def test_a_member_that_never_drafts_does_no_harm(spec):
    from specdec_engine.drafters import build_drafter

    about, auto = host(), AutoK()
    about.draft_limits.controller = auto
    found = run(TableTarget(vocab=5), build_drafter(spec, about), [1, 2], max_tokens=80, controls=Controls(auto))
    assert emitted(found) == emitted(run(TableTarget(vocab=5), build_drafter("none", host()), [1, 2], max_tokens=80))
    assert {c.drafter for c in cycles(found)} <= {"ngram", "none"}


AFTER_MANY = {width: 2.0 + 1.5 * (width - 1) for width in PACKED}
"""A pass over a long context: each row looks at all of it."""


def alternating(short, long, alpha):
    """Shares of the best rate of runs after short contexts and after long ones, in turns; whether k is right at once."""
    shares, right = [], []
    for seed in range(4):
        auto = AutoK()
        worlds = World(alpha, 0.05, seed=seed), World(alpha, 0.05, passes=AFTER_MANY, seed=seed + 10)
        for number in range(30):
            world, context = (worlds[0], short) if number % 2 == 0 else (worlds[1], long)
            auto.begin(number, context=context)
            right += [(number % 2 == 0) == (auto.k > 0)] if number >= 8 else []
            for _ in range(40):
                auto.observe(replace(world.cycle(auto.k), context=context))
        shares.append([world.tokens / world.seconds / max(map(world.rate, range(MOST + 1))) for world in worlds])
    return [fmean(share) for share in zip(*shares, strict=True)], fmean(right)


@pytest.mark.parametrize("alpha", [0.4, 0.6])
def test_what_passes_cost_is_learnt_by_length(alpha):
    """Where lengths take turns; as one length it would lose a fifth."""
    shares, right = alternating(100, 5000, alpha)
    assert min(shares) > 0.95
    assert right > 0.95
    as_one, wrong = alternating(100, 1000, alpha)
    assert min(as_one) < 0.9
    assert wrong < 0.8


def test_a_length_that_is_new_begins_with_what_the_nearest_one_takes():
    costs = CostsByLength()
    assert not costs.go_to(100)
    for context, seconds in ((100, 1.0), (3000, 2.0)):
        assert not costs.go_to(context)
        for width in (1, 1, 1, 3, 3, 3):
            costs.now.passes.add(width, width * seconds)
        costs.now.cycles += 6
    assert costs.go_to(900)
    assert [costs.now.passes(width) for width in (1, 2, 3)] == [1.0, 2.0, 3.0]
    assert not costs.go_to(20_000)
    assert [costs.now.passes(width) for width in (1, 2, 3)] == [2.0, 4.0, 6.0]
    assert (costs.now.cycles, costs.now.plain) == (0, 0)
    costs.now.passes.add(1, 4.0)  # what was carried over counts once
    assert costs.now.passes(1) == 3.0
