"""What every drafter owes the loop. Each entry of the registry, and a cascade of them, is held to the same assertions."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from specdec_engine.core.cycle_types import Sampling, Verdict
from specdec_engine.core.randomness import KeyedRandomness
from specdec_engine.core.registry import drafters
from specdec_engine.core.trees import depths
from specdec_engine.drafters import build_drafter
from specdec_engine.drafters.base import AcceptanceAlong
from specdec_engine.drafters.token_choice import DraftChoice
from specdec_engine.errors import UsageError
from specdec_engine.models.options import LoadOptions
from specdec_engine.pair import load_pair
from specdec_engine.runtime import guided, step_by_step
from specdec_engine.runtime.generic import GenericRuntime
from specdec_engine.runtime.target import ModelTarget
from specdec_engine.tune.answers import Answer
from specdec_engine.tune.passes import chances_along
from specdec_engine.tune.whatif import expected_cycles
from specdec_engine.verify.sampling import draw_on_host
from tests.contracts.cases import (
    CASES,
    SAMPLINGS,
    SMALL,
    SPECS,
    TARGET,
    draft_folders,
    model_of,
    parts,
    runtime_of,
)
from tests.fakes import (
    VOCAB,
    byte_tokenizer,
    cycles,
    emitted,
    graph,
    host,
    lean,
    run,
    save_checkpoint,
    tiny_llama,
)


class Followed:
    """The target's runtime, kept at the context but for its newest token, as the loop keeps it."""

    def __init__(self, drafter, runtime):
        self.drafter, self.runtime, self.fed = drafter, runtime, []

    def begin(self, prompt):
        self.runtime.rollback(0)
        self.fed = []
        self._follow(prompt)
        self.drafter.begin(prompt)

    def propose(self, context, k, sampling, random):
        self._follow(context)
        return self.drafter.propose(context, k, sampling, random)

    def observe(self, draft, verdict):
        self.drafter.observe(draft, verdict)

    def _follow(self, context):
        same = next((i for i, (a, b) in enumerate(zip(self.fed, context[:-1], strict=False)) if a != b), len(self.fed))
        self.runtime.rollback(same)
        if rest := context[same:-1]:
            self.runtime.forward(torch.tensor(rest), 1)
        self.fed = list(context[:-1])


def build(spec):
    return Followed(*parts(spec))


def verdict(draft, accepted):
    """So many tokens of a chain are accepted; of a tree those up to that one."""
    tokens, path = tuple(draft.tokens.tolist()), None
    if draft.parents is not None:
        path, place = [], accepted - 1
        while place >= 0:
            path, place = [place, *path], draft.parents[place]
        accepted = len(path)
    end = "recovered" if accepted < len(tokens) else "bonus"
    tree = {} if path is None else {"parents": draft.parents, "path": tuple(path)}
    return Verdict(tokens, accepted, 5, end, (), (), (), (), (), **tree)


def test_every_drafter_is_under_contract():
    assert SPECS.keys() == drafters().keys(), "add the new drafter to SPECS above"


@pytest.mark.parametrize("spec", CASES)
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "raw", "warped"])
def test_proposals_keep_the_contract(spec, sampling):
    """Length, ids, device, and a q that is a distribution and that the token was drawn from; over a run with every kind of
    verdict."""
    rng = random.Random(0)
    drafter, context = build(spec), [rng.randrange(VOCAB) for _ in range(12)] * 2
    drafter.begin(context)
    for _ in range(25):
        k = rng.randint(1, 6)
        draft = drafter.propose(context, k, sampling, KeyedRandomness(1))
        assert (len(draft) if draft.parents is None else max(depths(draft.parents))) <= k
        assert draft.tokens.dtype == torch.int64
        assert all(0 <= t < VOCAB for t in draft.tokens.tolist())
        assert draft.drafter in ("tree", *SPECS) or draft.drafter.removeprefix("ngram+") in (
            "small",
            "self:1",
            *map(str, draft_folders()),
        )
        if draft.probs is not None:
            assert draft.probs.shape == (len(draft), VOCAB)
            assert torch.allclose(draft.probs.sum(-1), torch.ones(len(draft)), atol=1e-5)
            assert (draft.probs.gather(1, draft.tokens[:, None]) > 0).all()
            if spec.startswith("tree:"):  # siblings are told from each other, and members draw one after the other
                drafter.observe(draft, said := verdict(draft, rng.randint(0, len(draft))))
                context += [*said.tokens[:-1], rng.randrange(VOCAB)]
                continue
            numbers = KeyedRandomness(1).uniforms(len(context), "draft", len(draft))
            ids = torch.arange(VOCAB) if draft.raw_ids is None else draft.raw_ids
            drawn = [int(ids[draw_on_host(row[ids], u)]) for row, u in zip(draft.probs, numbers, strict=True)]
            assert draft.tokens.tolist() == drawn
        drafter.observe(draft, said := verdict(draft, rng.randint(0, len(draft))))
        context += [*said.tokens[:-1], rng.randrange(VOCAB)]


@pytest.mark.parametrize("spec", CASES)
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.7), Sampling(0.9, coupling="gumbel")])
def test_a_draft_tells_its_distributions_before_warping_where_it_is_asked(spec, sampling):
    """Of them the temperature makes those it drew from; asking changes no draft."""
    context = [7, 8, 9, 10, 7, 8, 9, 10, 7, 8]
    asked, silent = build(spec), build(spec)
    asked.begin(context)
    silent.begin(context)
    draft = asked.propose(context, 4, replace(sampling, raw=True), KeyedRandomness(3))
    same = silent.propose(context, 4, sampling, KeyedRandomness(3))
    assert same.raw is None
    assert same.tokens.tolist() == draft.tokens.tolist()
    if draft.raw is None:
        assert draft.probs is None or draft.parents is not None  # a lookup, or several drafters
        return
    ids = torch.arange(draft.raw.shape[1]) if draft.raw_ids is None else draft.raw_ids
    assert draft.raw.shape == (len(draft), len(ids))
    raw = torch.zeros(len(draft), VOCAB).index_copy_(1, ids, draft.raw)
    assert torch.allclose(raw.sum(-1), torch.ones(len(draft)), atol=1e-5)
    if draft.probs is not None:
        sharper = raw.pow(1 / sampling.temperature)
        assert torch.allclose(sharper / sharper.sum(-1, keepdim=True), draft.probs, atol=1e-5)
    elif sampling.greedy:
        assert draft.tokens.tolist() == raw.argmax(-1).tolist()


@pytest.mark.parametrize("spec", CASES)
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "raw", "warped"])
def test_a_proposal_depends_on_context_and_seed_alone(spec, sampling):
    """After any history a drafter proposes what a fresh one would: own state is rolled back and caught up."""
    rng = random.Random(1)
    used, context = build(spec), [rng.randrange(VOCAB) for _ in range(9)] * 2
    used.begin(context)
    for step in range(12):
        draft = used.propose(context, 4, sampling, KeyedRandomness(2))
        fresh = build(spec)
        fresh.begin(context)
        again = fresh.propose(context, 4, sampling, KeyedRandomness(2))
        assert draft.tokens.tolist() == again.tokens.tolist()
        if draft.probs is not None:
            assert torch.allclose(draft.probs, again.probs, atol=1e-4)
        accepted = step % (len(draft) + 1)
        if step % 4 != 3:  # a cycle in which another drafter was asked, or none
            used.observe(draft, said := verdict(draft, accepted))
            context += said.tokens[:-1]
        else:
            used.observe(draft, verdict(draft, 0))
            context += [rng.randrange(VOCAB) for _ in range(3)]
        context.append(rng.randrange(VOCAB))


@pytest.mark.parametrize("spec", CASES)
def test_begin_forgets_the_run_before(spec):
    drafter = build(spec)
    for prompt in ([7, 8, 9] * 5, [20, 21] * 4):
        drafter.begin(prompt)
        fresh = build(spec)
        fresh.begin(prompt)
        a, b = (d.propose(prompt, 5, Sampling(), KeyedRandomness(0)) for d in (drafter, fresh))
        assert a.tokens.tolist() == b.tokens.tolist()


@pytest.mark.parametrize("spec", CASES)
@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 8])
def test_greedy_output_is_the_targets_own(spec, k):
    """Against transformers' own generate, in float32."""
    prompt = [5, 6, 7, 8, 5, 6, 7]
    plain = model_of(spec).generate(
        torch.tensor([prompt]), do_sample=False, max_new_tokens=40, eos_token_id=None, pad_token_id=0
    )
    drafter, runtime = parts(spec)
    assert (
        emitted(run(ModelTarget(runtime, "tiny"), drafter, prompt, k=k, max_tokens=40))
        == plain[0, len(prompt) :].tolist()
    )


@pytest.mark.parametrize("spec", CASES)
def test_with_gumbel_coupling_a_seed_gives_one_text_whatever_drafts(spec):
    """Token for token what plain decoding draws, in float32; and some drafts are accepted."""
    prompt, sampling = [5, 6, 7, 8, 5, 6, 7], Sampling(0.8, top_k=50, coupling="gumbel")
    plain = emitted(
        run(
            ModelTarget(runtime_of(spec), "tiny"),
            build_drafter("none", host()),
            prompt,
            k=0,
            sampling=sampling,
            max_tokens=40,
            seed=7,
        )
    )
    for k in (1, 3, 5):
        drafter, runtime = parts(spec)
        found = run(ModelTarget(runtime, "tiny"), drafter, prompt, k=k, sampling=sampling, max_tokens=40, seed=7)
        assert emitted(found) == plain
    assert len(set(plain)) > 5


def test_a_model_that_is_its_own_draft_is_always_accepted():
    """Drawn drafts, too: q equals p, so every token passes, through rollback-free and two-pending-token cycles."""
    target = ModelTarget(GenericRuntime(TARGET, "tiny"), "tiny")
    drafter = build_drafter("model:x", host(VOCAB, lambda name: GenericRuntime(TARGET, name)))
    found = cycles(run(target, drafter, [5, 6, 7], k=4, sampling=Sampling(1.0), max_tokens=60))
    assert sum(c.accepted for c in found) >= 0.99 * sum(len(c.drafted) for c in found)


def test_a_full_acceptance_costs_no_extra_pass():
    """k forwards a cycle, whatever was accepted: the pending tokens ride in the first."""
    passes = []

    class Counting(GenericRuntime):
        def forward(self, tokens, rows, seldom=False):
            passes.append(len(tokens))
            return super().forward(tokens, rows)

    target = ModelTarget(GenericRuntime(TARGET, "tiny"), "tiny")
    drafter = build_drafter("model:x", host(VOCAB, lambda name: Counting(TARGET, name)))
    passes.clear()  # of those that tried the model out
    run(target, drafter, [5, 6, 7], k=3, max_tokens=12)
    assert passes == [2, 1, 1, 1, 2, 1, 1, 2, 1, 1]  # the prompt's first 2; then 3 a cycle, 2 tokens pending at first


def test_a_drafts_context_limit_ends_drafting_and_not_the_run():
    small = tiny_llama(seed=1, layers=1, hidden=16, max_position_embeddings=16)
    drafter = build_drafter("model:x", host(VOCAB, lambda name: GenericRuntime(small, name)))
    target = ModelTarget(GenericRuntime(TARGET, "tiny"), "tiny")
    found = cycles(run(target, drafter, [5] * 10, k=4, max_tokens=30))
    assert sum(len(c.emitted) for c in found) == 30
    assert found[0].drafted
    assert all(not c.drafted for c in found if c.context > 16)
    assert all(c.context + len(c.drafted) - 1 <= 16 for c in found if c.drafted)
    long = cycles(run(target, drafter, [5] * 40, k=4, max_tokens=5))
    assert [c.drafted for c in long] == [()] * 5


@pytest.mark.parametrize("spec", ["head:HEAD", "head:EAGLE", "self:1", "suffix,head:HEAD"])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0)], ids=["greedy", "raw"])
def test_drafters_on_the_targets_own_runtime_do_the_same_where_it_is_recorded(spec, sampling):
    """Features are kept by recorded passes too, padded ones, and through a cache made anew on the way."""
    found = []
    for target in (lean(TARGET, capacity=16), graph(TARGET, capacity=16)):
        drafter, runtime = parts(spec, target)
        for prompt in ([5, 6, 7], list(range(3, 250))):  # the second run, too
            found.append(
                emitted(run(ModelTarget(runtime, "tiny"), drafter, prompt, k=4, sampling=sampling, max_tokens=8))
            )
    assert found[:2] == found[2:]


def test_a_heads_features_survive_the_growth_of_the_cache():
    """Against a run whose cache never grows: the same drafts, cycle by cycle."""
    found = []
    for capacity in (16, 512):
        drafter, runtime = parts("head:HEAD", lean(TARGET, capacity=capacity))
        found.append(cycles(run(ModelTarget(runtime, "tiny"), drafter, [5, 6, 7], k=3, max_tokens=120)))
    assert [c.drafted for c in found[0]] == [c.drafted for c in found[1]]
    assert sum(len(c.drafted) for c in found[0]) > 100


FORESEEING = [
    "model:small",
    "self:1",
    "head:HEAD",
    "head:EAGLE",
    "lean@model:small",
    "graph@model:small",
    "reduced@model:small",
    "assistant:ASSISTANT",
    "mtp",
    "lean@mtp",
]


@pytest.mark.parametrize("spec", FORESEEING)
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "raw", "warped"])
def test_what_a_drafter_foresees_is_what_it_would_draw_from(spec, sampling):
    """Along a text that goes on as one of its own drafts, every chance is that draft's q over p, at every depth."""
    rng, drafter = random.Random(3), build(spec)
    prompt = [rng.randrange(VOCAB) for _ in range(9)] * 2
    drafter.begin(prompt)
    draft = drafter.propose(prompt, 4, sampling, KeyedRandomness(5))
    said = draft.tokens.tolist()
    q = [1.0] * 4 if draft.probs is None else draft.probs.gather(1, draft.tokens[:, None])[:, 0].tolist()
    p = [2 * value for value in q]  # as if the target said each token twice as often
    context = [*prompt, *said]
    inner = drafter.drafter
    assert isinstance(inner, AcceptanceAlong)
    drafter._follow(context)
    rows = inner.acceptance_along(context, p, 4, sampling)
    assert rows[0] == pytest.approx([0.5] * 4, rel=1e-3)
    for i in range(1, 4):
        fresh = build(spec)
        fresh.begin(context[: -4 + i])
        one = fresh.propose(context[: -4 + i], 1, sampling, KeyedRandomness(5))
        q = float(one.tokens[0] == said[i]) if one.probs is None else float(one.probs[0, said[i]])
        assert rows[i][0] == pytest.approx(min(1.0, q / p[i]), rel=1e-3), f"a draft begun {i} tokens later"


@pytest.mark.parametrize("spec", [*FORESEEING, "ngram", "suffix"])
def test_cycles_foreseen_at_temperature_0_are_those_of_real_runs(spec):
    """For every k, from the answer alone."""
    drafter, runtime = parts(spec)
    target, prompt = ModelTarget(runtime, "target"), [7, 8, 9, 7, 8]
    answer = Answer((*prompt, *emitted(run(target, drafter, prompt, k=0, max_tokens=40))), len(prompt), ended=False)
    found = chances_along(drafter, target, answer, Sampling())[0]
    for k in (1, 2, 3, 5, 8):
        real = cycles(run(target, drafter, prompt, k=k, max_tokens=40))
        assert sum(expected_cycles([found], k).values()) == pytest.approx(len(real)), k
        drafted = sum(kind.drafted * times for kind, times in expected_cycles([found], k).items())
        assert drafted == pytest.approx(sum(len(cycle.drafted) for cycle in real)), k


@pytest.mark.parametrize("spec", ["model:small", "graph@model:small", "reduced@model:small", "self:1"])
@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(0.5), Sampling(0.7, top_k=20)], ids=["greedy", "drawn", "cut"]
)
def test_a_lookup_below_a_draft_changes_no_token_of_it(spec, sampling):
    """The same tokens from the same distributions, with the same numbers, and in fewer passes where text repeats itself."""
    below = spec.replace("model:", "ngram+model:").replace("self:", "ngram+self:")
    alone, helped = build(spec), build(below)
    prompt = [5, 6, 7, 8, 9, 11, 12] * 3
    for seed in range(6):
        for drafter in (alone, helped):
            drafter.begin(prompt)
        ours, theirs = (d.propose(prompt, 6, sampling, KeyedRandomness(seed)) for d in (alone, helped))
        assert ours.tokens.tolist() == theirs.tokens.tolist()
        if ours.probs is not None:
            assert torch.allclose(ours.probs, theirs.probs, atol=1e-4)
        assert helped.drafter.name.startswith("ngram+")


@pytest.mark.parametrize("right", [8, 3, 0])
def test_a_draft_that_was_guessed_takes_fewer_passes(right):
    """One for all that was guessed right, and one for each token that was not; the tokens are the same."""
    runtime, pending, u = lean(SMALL), torch.tensor([5, 6, 7]), torch.zeros(8)
    choice = DraftChoice(Sampling(), SMALL.config.vocab_size)
    plain = step_by_step(runtime, pending, u, u[0], choice).tokens.tolist()
    runtime.rollback(0)
    passes, forward = [], runtime.forward
    runtime.forward = lambda tokens, rows: (passes.append(rows), forward(tokens, rows))[1]

    def guess(said, k):
        return (plain[len(said) : right] + [(token + 1) % 200 for token in plain[max(right, len(said)) :]])[:k]

    drafted = guided(runtime, guess, pending, u, u[0], choice)
    assert drafted.tokens.tolist() == plain
    assert drafted.guessed == tuple(range(min(right, 7)))  # the last comes of the same pass, unasked
    assert runtime.cached == 3 + 7
    assert len(passes) == (1 if right == 8 else 8 - right)


def test_a_parallel_draft_is_the_models_rows_at_masked_places():
    """Each place of its own: rows of one pass over the context and masks."""
    drafter = build("pard@model:small")
    prompt = [5, 6, 7, 8]
    drafter.begin(prompt)
    draft = drafter.propose(prompt, 3, Sampling(1.0), KeyedRandomness(2))
    with torch.inference_mode():
        rows = SMALL(torch.tensor([[*prompt, 3, 3]])).logits[0, 3:].softmax(-1)
    assert torch.allclose(draft.probs[:, : SMALL.config.vocab_size], rows, atol=1e-4)


def test_only_a_lookup_stands_below_a_model():
    with pytest.raises(UsageError, match="no model that ngram could draft for"):
        parts("ngram+none")
    with pytest.raises(UsageError, match="cannot draft for another draft"):
        parts("suffix+model:small")
    for spec in ("pard@ngram+model:small", "text@ngram+model:small"):
        with pytest.raises(UsageError, match="token by token"):
            parts(spec)


def test_a_target_that_verifies_chains_says_so_of_a_tree_and_verifies_its_first_path(tmp_path):
    folder = save_checkpoint(tmp_path / "t", layers=2, vocab=len(byte_tokenizer()))
    options = LoadOptions(dtype="float32", device="cpu", runtime="generic")
    pair = load_pair(str(folder), "tree:ngram,suffix", options)
    assert any("verifies chains here" in note for note in pair.notes)
    prompt = pair.encode("a b a b a b")
    found = list(pair.decode(prompt, k=4, max_tokens=30))
    assert all(cycle.parents is None for cycle in cycles(found))
    plain = load_pair(str(folder), "none", options)
    assert emitted(found) == emitted(list(plain.decode(prompt, k=0, max_tokens=30)))
