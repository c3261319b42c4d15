"""Token trees by exact enumeration: every shape, every drawn child, every way through; and mutants that must fail."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from itertools import product

import pytest
import torch
from torch import Tensor

from specdec_engine.core.cycle_types import Draft, Sampling, Verdict
from specdec_engine.core.randomness import KeyedRandomness
from specdec_engine.core.registry import members_of
from specdec_engine.core.trees import children, depths, fault_of, first_path, hidden_rows
from specdec_engine.decoding.control import Controls
from specdec_engine.decoding.loop import decode
from specdec_engine.decoding.stopping import Stop
from specdec_engine.drafters.tree import TreeDrafter, merged
from specdec_engine.errors import UsageError
from specdec_engine.verify.evidence import Uniforms
from specdec_engine.verify.sampling import draw_on_host
from specdec_engine.verify.trees import decide_greedily_on_tree, decide_on_tree, walk
from tests.exact.test_lossless import VOCAB, deviation, toy
from tests.fakes import CPU, TableDrafter, TableTarget, cycles, emitted, host

LENGTH = 4


@dataclass(frozen=True)
class Node:
    """A token of a shape: how it is chosen, and what follows it."""

    how: str
    """drawn; or likeliest, second, third: that many by q, which is not drawn."""
    after: tuple[Node, ...] = ()


def drawn(*after: Node) -> Node:
    return Node("drawn", after)


def taken(rank: str, *after: Node) -> Node:
    return Node(rank, after)


SHAPES = {
    "a chain": (drawn(drawn(drawn())),),
    "two drawn at the root": (drawn(), drawn()),
    "two drawn, a child of the first": (drawn(drawn()), drawn()),
    "a fork further on": (drawn(drawn(), drawn()),),
    "three drawn": (drawn(), drawn(), drawn()),
    "two taken": (taken("likeliest"), taken("second")),
    "taken, then drawn": (taken("likeliest", taken("likeliest")), drawn(drawn())),
    "drawn, then taken": (drawn(drawn()), taken("second", drawn())),
    "mixed and deep": (taken("second", drawn(), taken("third")), drawn(taken("likeliest"))),
}


def grown(shape, q, context):
    """(tokens, parents, rows, weight) of every tree of this shape: drawn children without replacement."""

    def at(nodes, text, parent, made, rows, weight):
        """Grow these siblings, and then what follows each."""
        if not nodes:
            yield made, rows, weight
            return
        node, *rest = nodes
        siblings = [token for token, of, _ in made if of == parent]
        row = q(text)
        options = []
        if node.how == "drawn":
            left = row.index_fill(0, torch.tensor(siblings, dtype=torch.long), 0.0)
            left = left / left.sum() if float(left.sum()) > 0 else left
            options = [(token, left, float(left[token])) for token in range(VOCAB) if float(left[token]) > 0]
        else:
            token = int(row.argsort(descending=True)[("likeliest", "second", "third").index(node.how)])
            # A token that is there is not proposed again.
            options = [] if token in siblings else [(token, None, 1.0)]
        if not options:
            yield from at(rest, text, parent, made, rows, weight)
        for token, used, chance in options:
            place = len(made)
            after = [*made, (token, parent, place)]
            for more, rows_more, w in at(rest, text, parent, after, [*rows, used], weight * chance):
                yield from at(node.after, (*text, token), place, more, rows_more, w)

    for made, rows, weight in at(list(shape), context, -1, [], [], 1.0):
        tokens, parents = [m[0] for m in made], [m[1] for m in made]
        probs = torch.stack([one_hot(t) if r is None else r for t, r in zip(tokens, rows, strict=True)])
        yield tokens, parents, probs, weight


def one_hot(token: int) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor(token), VOCAB).double()


def text_of(context, tokens, parents, place):
    """The context and a token's path."""
    return context if place < 0 else (*text_of(context, tokens, parents, parents[place]), tokens[place])


def right(p_rows, tokens, probs, parents, u):
    """The rule as it is."""
    found = walk(p_rows, tokens, probs, parents, u)
    return found.path, found.final


class Number:
    """In place of a uniform number: says yes or no when it is held against a threshold, and notes the chance of that."""

    def __init__(self, answers, chances):
        self.answers, self.chances = answers, chances

    def __lt__(self, threshold):
        said = self.answers[len(self.chances)] if len(self.chances) < len(self.answers) else True
        below = min(1.0, max(0.0, float(threshold)))
        self.chances.append((said, below if said else 1 - below))
        return said


def outcomes_of(p_rows, tokens, probs, parents, rule):
    """(path, final, chance) of every way through one tree."""
    waiting = [[]]
    while waiting:
        chances = []
        answers = waiting.pop()
        path, final = rule(p_rows, tokens, probs, parents, [Number(answers, chances)] * len(tokens))
        made = [said for said, _ in chances]
        waiting += [[*made[:i], False] for i in range(len(answers), len(made))]
        yield path, final, math.prod(chance for _, chance in chances)


def enumerated(shape, p, q, rule=right, grow=grown):
    @cache
    def after(context, left):
        if left == 0:
            return {(): 1.0}
        total = {}
        for tokens, parents, probs, weight in grow(shape, q, context):
            rows = torch.stack([p(context), *(p(text_of(context, tokens, parents, i)) for i in range(len(tokens)))])
            for path, final, chance in outcomes_of(rows, tokens, probs, parents, rule):
                if chance * weight == 0:
                    continue
                for token in range(VOCAB):
                    mass = chance * weight * float(final[token])
                    kept = (*(tokens[i] for i in path), token)[:left]
                    for rest, more in after((*context, *kept), left - len(kept)).items() if mass else ():
                        total[kept + rest] = total.get(kept + rest, 0.0) + mass * more
        return total

    return after((), LENGTH)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(2))
def test_text_from_trees_has_exactly_the_targets_distribution(shape, seed):
    p, q = toy(seed)
    assert deviation(enumerated(SHAPES[shape], p, q), p, LENGTH) < 1e-12


@pytest.mark.parametrize("how", ["identical", "one_hot", "disjoint"])
@pytest.mark.parametrize("shape", ["two drawn, a child of the first", "taken, then drawn"])
def test_also_where_p_and_q_are_alike_or_share_nothing(shape, how):
    p, q = toy(5, **{how: True})
    assert deviation(enumerated(SHAPES[shape], p, q), p, LENGTH) < 1e-12


def new_draw_at_each_child(p_rows, tokens, probs, parents, u):
    """What is left of p is forgotten from child to child: each is tested against the whole."""
    at, path, following = -1, [], children(parents)
    while True:
        row, accepted = p_rows[at + 1], None
        for place in following[at]:
            if u[place] < row[tokens[place]] / probs[place][tokens[place]]:
                accepted = place
                break
        if accepted is None:
            return tuple(path), row
        at = accepted
        path.append(at)


def last_from_the_first_sibling(p_rows, tokens, probs, parents, u):
    """The last token comes from what the first rejection left."""
    path, final = right(p_rows, tokens, probs, parents, u)
    at = path[-1] if path else -1
    siblings = children(parents)[at]
    if len(siblings) < 2:
        return path, final
    first = siblings[0]
    left = (p_rows[at + 1] - probs[first]).clamp(min=0)
    return path, left / left.sum() if float(left.sum()) else final


def bonus_of_another_leaf(p_rows, tokens, probs, parents, u):
    """After a leaf the row of the token before it."""
    path, final = right(p_rows, tokens, probs, parents, u)
    return (path, p_rows[path[-1]]) if path and not children(parents)[path[-1]] else (path, final)


@pytest.mark.parametrize("rule", [new_draw_at_each_child, last_from_the_first_sibling, bonus_of_another_leaf])
def test_rules_that_are_wrong_are_found_out(rule):
    p, q = toy(1)
    worst = max(
        deviation(enumerated(SHAPES[name], p, q, rule), p, LENGTH) for name in ("two drawn at the root", "a chain")
    )
    assert worst > 1e-3


def q_of_the_whole_vocabulary(shape, q, context):
    """Siblings are drawn without replacement, and said to be drawn from q as it was."""
    for tokens, parents, _, weight in grown(shape, q, context):
        rows = [q(text_of(context, tokens, parents, parent)) for parent in parents]
        yield tokens, parents, torch.stack(rows), weight


def unlikely_ones_dropped(shape, q, context):
    """A drawn sibling is left out because of what it turned out to be."""
    for tokens, parents, probs, weight in grown(shape, q, context):
        keep = [i for i in range(len(tokens)) if i == 0 or float(probs[i][tokens[i]]) > 0.6]
        if any(parents[i] >= 0 and parents[i] not in keep for i in keep):
            keep = keep[:1]
        renumbered = {old: new for new, old in enumerate(keep)} | {-1: -1}
        yield [tokens[i] for i in keep], [renumbered[parents[i]] for i in keep], probs[keep], weight


def soft_q_for_taken_ones(shape, q, context):
    """The likeliest token is proposed, and said to be drawn from q."""
    yield from q_of_the_whole_vocabulary(shape, q, context)


@pytest.mark.parametrize(
    ("grow", "shape"),
    [
        (q_of_the_whole_vocabulary, "two drawn at the root"),
        (unlikely_ones_dropped, "two drawn at the root"),
        (soft_q_for_taken_ones, "two taken"),
    ],
)
def test_trees_that_do_not_say_how_they_were_drawn_are_found_out(grow, shape):
    p, q = toy(0)
    assert deviation(enumerated(SHAPES[shape], p, q, right, grow), p, LENGTH) > 1e-3


def test_merged_drafts_say_what_each_token_was_drawn_from():
    """All that two drafters may draw, merged: exactly the target's distribution, too."""
    p, q = toy(3)

    def both(_, q, context):
        for a in product(range(VOCAB), repeat=2):
            first = [q(context), q((*context, a[0]))]
            taken_first = int(p((*context, 1)).argmax()), a[1]
            for member, weight in (
                (Draft(torch.tensor(a), torch.stack(first), "a"), float(first[0][a[0]] * first[1][a[1]])),
            ):
                for b in product(range(VOCAB), repeat=2):
                    rows = [q((*context, 2)), q((*context, b[0], 2))]
                    chance = weight * float(rows[0][b[0]] * rows[1][b[1]])
                    for lookup in (None, Draft(torch.tensor(taken_first), None, "l")):
                        parts = [member, Draft(torch.tensor(b), torch.stack(rows), "b")]
                        tree = merged([*([lookup] if lookup else []), *parts], CPU)
                        parents = tree.parents or tuple(range(-1, len(tree) - 1))
                        yield tree.tokens.tolist(), parents, tree.probs, chance / 2

    assert deviation(enumerated(None, p, q, right, both), p, LENGTH) < 1e-12


@pytest.mark.parametrize("seed", range(40))
def test_greedy_trees_are_decided_as_any_others(seed):
    """One-hot rows, without a softmax and with it."""
    some = torch.Generator().manual_seed(seed)
    n = 6
    parents = tuple(int(torch.randint(-1, i, (1,), generator=some)) if i else -1 for i in range(n))
    tokens = torch.randint(0, VOCAB, (n,), generator=some)
    best = torch.randint(0, VOCAB, (n + 1,), generator=some)
    draft, numbers = Draft(tokens, None, "x", parents=parents), Uniforms.drawn(KeyedRandomness(seed), 5, n)
    fast = decide_greedily_on_tree(best.tolist(), draft)
    slow = decide_on_tree(torch.nn.functional.one_hot(best, VOCAB).double(), draft, numbers)
    assert fast.path == slow.path
    assert fast.token == slow.token
    assert fast.tested == slow.tested
    assert [fast.p[i] for i in fast.tested] == pytest.approx([1.0 if i in fast.path else 0.0 for i in fast.tested])


def test_what_a_tree_is():
    parents = (-1, 0, 0, -1, 3, 1)
    assert depths(parents) == [1, 2, 2, 1, 2, 3]
    assert children(parents) == {-1: [0, 3], 0: [1, 2], 1: [5], 2: [], 3: [4], 4: [], 5: []}
    assert first_path(parents) == [0, 1, 5]
    seen = [{0}, {0, 1}, {0, 1, 2}, {0, 1, 3}, {0, 4}, {0, 4, 5}, {0, 1, 2, 6}]
    assert hidden_rows(parents) == [
        sum(1 << other for other in range(row) if other not in own) for row, own in enumerate(seen)
    ]


@pytest.mark.parametrize("coupling", ["independent", "gumbel"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_loop_decodes_by_trees_as_the_target_alone(coupling, temperature):
    """At temperature 0, and with Gumbel coupling at any, the very same tokens as without a draft; each cycle asserts the
    caches."""
    sampling = Sampling(temperature, coupling=coupling)
    members = [TableDrafter(5, seed) for seed in (3, 4)]
    texts, seen = [], 0
    for drafter in (None, TreeDrafter(members, host(5))):
        controls = Controls(0 if drafter is None else 3, sampling)
        found = list(
            decode(
                TableTarget(5), drafter or members[0], [1, 2], controls=controls, stop=Stop(max_tokens=60),
                random=KeyedRandomness(2),
            )
        )  # fmt: skip
        texts.append(emitted(found))
        seen += sum(cycle.parents is not None for cycle in cycles(found))
    assert seen > 5
    assert len(texts[0]) == len(texts[1]) == 60
    if temperature == 0 or coupling == "gumbel":
        assert texts[0] == texts[1]


class Noting:
    """A member that notes the numbers it was given, and draws with them."""

    def __init__(self, name, q):
        self.name, self.q, self.numbers, self.told = name, q, [], []

    def begin(self, prompt):
        pass

    def propose(self, context, k, sampling, random):
        self.numbers = random.uniforms(len(context), "draft", k)
        tokens = [draw_on_host(self.q, number) for number in self.numbers]
        return Draft(torch.tensor(tokens), self.q.repeat(k, 1), self.name)

    def observe(self, draft, verdict):
        self.told.append(verdict)


def test_members_draw_with_numbers_of_their_own():
    """Two that draw with the same ones know of each other: siblings then come together too often, and p is missed by 0.1."""
    q = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    members = [Noting(name, q) for name in "abc"]
    TreeDrafter(members, host(VOCAB)).propose([1, 2], 4, Sampling(1.0), KeyedRandomness(5))
    numbers = [number for member in members for number in member.numbers]
    assert numbers == KeyedRandomness(5).uniforms(2, "draft", 12)
    assert len(set(numbers)) == 12


def test_two_drawn_guesses_leave_the_first_token_the_targets():
    """By many seeds, through the drafter, the walk and the numbers that a run has; the bound is exceeded by chance once in
    a million."""
    p = torch.tensor([0.021, 0.444, 0.535], dtype=torch.float64)
    rows = [
        torch.tensor([0.564, 0.254, 0.182], dtype=torch.float64),
        torch.tensor([0.356, 0.241, 0.403], dtype=torch.float64),
    ]
    counts, n = [0] * VOCAB, 6000
    for seed in range(n):
        random = KeyedRandomness(seed)
        draft = TreeDrafter([Noting(str(i), row) for i, row in enumerate(rows)], host(VOCAB)).propose(
            [1], 1, Sampling(1.0), random
        )
        draft = replace(draft, parents=draft.parents or tuple(range(-1, len(draft) - 1)))
        found = decide_on_tree(p.repeat(len(draft) + 1, 1), draft, Uniforms.drawn(random, 1, len(draft)))
        counts[draft.tokens[found.path[0]] if found.path else found.token] += 1
    assert sum((count - n * mass) ** 2 / (n * mass) for count, mass in zip(counts, p.tolist(), strict=True)) < 27.6


def test_members_are_told_how_their_own_draft_fared():
    q = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    members = [Noting(name, q) for name in "ab"]
    drafter = TreeDrafter(members, host(VOCAB))
    draft = drafter.propose([1, 2], 3, Sampling(1.0), KeyedRandomness(1))
    assert draft.parents is not None
    path = [len(draft) - 1]
    while (parent := draft.parents[path[0]]) >= 0:
        path.insert(0, parent)
    tokens = tuple(draft.tokens.tolist())
    verdict = Verdict(tokens, len(path), 0, "bonus", (), (), (), (), (), parents=draft.parents, path=tuple(path))
    drafter.observe(draft, verdict)
    for member, part in zip(members, draft.parts, strict=True):
        (told,) = member.told
        assert told.drafted == part.tokens
        assert told.tokens == verdict.tokens[: told.accepted + 1]


@pytest.mark.parametrize(
    ("parents", "said"),
    [((), "of 0 tokens"), ((-1, 1), "not before it"), ((-1, -2), "not before it"), ((-1, 0, 1, 2), "of depth 4"),
     ((-1,) * 63, "1 to 62")],
)  # fmt: skip
def test_what_is_no_tree_is_refused(parents, said):
    assert said in fault_of(parents, len(parents), 3)
    assert fault_of((-1, 0, 0, -1), 4, 2) == ""


@pytest.mark.parametrize(
    "spec", ["tree:", "tree:ngram", " tree:ngram, ", "tree:tree:ngram,suffix", "ngram,tree:ngram,suffix"]
)
def test_a_tree_of_fewer_than_two_or_inside_another_is_refused(spec):
    with pytest.raises(UsageError, match="tree:"):
        members_of(spec)


def test_where_trees_are_not_verified_the_first_that_proposes_drafts_alone():
    q = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    members = [Noting(name, q) for name in "ab"]
    drafter = TreeDrafter(members, host(VOCAB))
    drafter.branch(False)
    draft = drafter.propose([1, 2], 3, Sampling(1.0), KeyedRandomness(1))
    assert draft.parents is None
    assert draft.parts == ()
    assert members[1].numbers == []
