"""A draft head's step in one call of our own kernels is the step that is done operation by operation."""

from dataclasses import replace

import pytest
import torch

from specdec_engine.core.cycle_types import Sampling
from specdec_engine.drafters.token_choice import DraftChoice, TwoLikeliest
from specdec_engine.runtime import native
from specdec_engine.runtime.decoder import Embedding
from specdec_engine.runtime.head import (
    Features,
    HeadForm,
    HeadForward,
    State,
    _sizes,
    check_weights,
    head_shape,
)
from specdec_engine.runtime.head_runtime import HeadRuntime
from specdec_engine.runtime.linear import project
from tests.fakes import lean, tiny_llama

CPU = torch.device("cpu")
CONFIG = {
    "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 50,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
}  # fmt: skip
FORMS = {
    "ours": HeadForm(),
    "EAGLE-3": HeadForm(final=False, feature_norms="none"),
    "EAGLE-3.1": HeadForm(final=False, residual_normed=True, output_normed=True),
    "of all in a row": HeadForm(feature_norms="whole"),
    "MTP": HeadForm(feature_norms="none", joined=True, output_normed=True),
}


def built(form, quantize, layers=1, fused=True):
    shape = head_shape(CONFIG | {"num_hidden_layers": layers})
    features = 3 if form.final and not form.joined else 2
    if form.joined or not fused:
        features = 1
    drawn = torch.Generator().manual_seed(1)
    weights = {
        name: torch.randn(size, generator=drawn) / (size[-1] ** 0.5 if len(size) > 1 else 1)
        for name, size in _sizes({}, shape, 96, features, form, 64).items()
    }
    table, rows = torch.randn(200, 64, generator=drawn), torch.randn(50, 64, generator=drawn)
    kernels = native.kernels()
    return HeadForward(shape, weights, Embedding(table), rows, torch.float32, CPU, quantize, kernels=kernels, form=form)


def said(forward, whole, more=None, kept=3):
    """A prompt's slots, then a draft's, each from the state before -> logits and states."""
    forward.__dict__.pop("_own", None)
    if not whole:
        forward.__dict__["_own"] = None
    drawn, runtime, found = torch.Generator().manual_seed(2), HeadRuntime(forward, 16), []
    features, tokens = torch.randn(40, kept, 64, generator=drawn), torch.randint(0, 200, (40,), generator=drawn)
    runtime.forward(features[:30], tokens[:30])
    with torch.inference_mode():
        read, at = Features(features[30:34]), slice(30, 34)
        for step in range(4):
            logits, state = runtime._step(read, tokens[at], more)
            found += [logits, state.clone()]
            read, at = State(state), slice(34 + step, 35 + step)
    return found


def assert_close(mine, theirs, by=1e-3):
    assert (mine - theirs).abs().max() <= by * theirs.abs().max()


@pytest.mark.skipif(native.kernels() is None, reason="no kernels of our own")
@pytest.mark.parametrize("quantize", ["none", "int4"])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("layers", [1, 2])
def test_a_step_in_one_call_is_the_step_by_operations(form, quantize, layers):
    forward = built(form, quantize, layers)
    assert (forward._own is None) == form.joined  # MTP's is done by operations
    kept = 2 if form.joined else 3
    for mine, theirs in zip(said(forward, True, kept=kept), said(forward, False, kept=kept), strict=True):
        assert_close(mine, theirs)


@pytest.mark.skipif(native.kernels() is None, reason="no kernels of our own")
def test_rows_of_the_context_stand_behind_its_own():
    forward, more = built(HeadForm(), "int4"), torch.randn(7, 64)
    for mine, theirs in zip(said(forward, True, more), said(forward, False, more), strict=True):
        assert mine.shape == theirs.shape
        assert_close(mine, theirs, 3e-3)  # the context's rows are rounded to bfloat16
    assert said(forward, True, more)[0].shape == (1, 57)


def drafts(forward, sampling, more, stops):
    """Three drafts after one another, the second of one slot more, by steps or call by call."""
    drawn, runtime, found = torch.Generator().manual_seed(2), HeadRuntime(forward, 16), []
    features, tokens = torch.randn(80, 3, 64, generator=drawn), torch.randint(0, 200, (80,), generator=drawn)
    runtime.forward(features[:30], tokens[:30])
    begin = 30
    for round, slots in enumerate((1, 2, 20)):
        brought = None if more is None else more[: len(more) - 2 + round]
        ids = torch.randperm(200, generator=drawn)[: 50 + (0 if brought is None else len(brought))]
        u, at = torch.rand(5, generator=drawn, dtype=torch.float64), slice(begin, begin + slots)
        temperature, asked = torch.tensor(sampling.temperature), []

        def stop(sure, asked=asked):
            asked.append(sure)
            return len(asked) == stops

        choice = DraftChoice(sampling, len(ids), eager=True)
        made = runtime.unroll(features[at], tokens[at], u, temperature, choice, ids, stop if stops else None, brought)
        found.append((made.tokens.tolist(), made.rows, asked, runtime.cached))
        begin += slots
        runtime.rollback(begin)
    assert (runtime._steps is None) == (DraftChoice.plain is None)
    return found


@pytest.mark.skipif(native.kernels() is None, reason="no kernels of our own")
@pytest.mark.parametrize("stops", [0, 2])
@pytest.mark.parametrize("form", ["ours", "EAGLE-3.1"])
@pytest.mark.parametrize("temperature", [0.0, 0.8, 1e-39, 1e-50])
def test_a_draft_step_by_step_in_one_call_each_is_the_draft_call_by_call(temperature, form, stops, monkeypatch):
    """To the bit, whether all are drafted or one asks to stop, with ids of the context and without."""
    sampling = Sampling(temperature=temperature)
    for more in (None, torch.randn(7, 64)):
        form_of = replace(FORMS[form], final=True)
        mine = drafts(built(form_of, "int4"), sampling, more, stops)
        with monkeypatch.context() as patched:
            patched.setattr(DraftChoice, "plain", None)
            theirs = drafts(built(form_of, "int4"), sampling, more, stops)
        for (tokens, rows, sure, cached), (tokens_, rows_, sure_, cached_) in zip(mine, theirs, strict=True):
            assert (tokens, sure, cached) == (tokens_, sure_, cached_)
            assert len(tokens) == (stops or 5)
            assert (rows is None) == (temperature == 0)
            assert rows is None or torch.equal(rows, rows_)


TABLES = {
    "float32": lambda table: table,
    "bfloat16": torch.Tensor.bfloat16,
    "dense rows": lambda table: project([table], None, torch.float32, CPU, "none", native.kernels()),
    "int8": lambda table: project([table], None, torch.float32, CPU, "int8", native.kernels()),
    "int4": lambda table: project([table], None, torch.float32, CPU, "int4", native.kernels()),
    "float16": torch.Tensor.half,
}


@pytest.mark.skipif(native.kernels() is None, reason="no kernels of our own")
@pytest.mark.parametrize("table", TABLES)
def test_steps_read_embeddings_in_any_form_and_tell_the_two_likeliest(table):
    """A form that C does not read is read call by call. A second text on the same head takes nothing from the first."""
    forward = built(HeadForm(), "int4")
    forward.embedding = Embedding(TABLES[table](forward.embedding.table))
    ids, u = torch.arange(50), torch.zeros(4)
    features, tokens = torch.randn(3, 3, 64), torch.tensor([1, 2, 3])
    first = HeadRuntime(forward, 16)
    second = first.another()
    found = []
    for runtime in (first, second, first):
        runtime.rollback(0)
        two = TwoLikeliest(50, raw=False)
        made = runtime.unroll(features, tokens, u, u[0], two, ids)
        assert (made.likeliest == ()) == (table == "float16") == (runtime._steps is None)
        found.append((made.tokens.tolist(), list(made.likeliest or two.found)))
    called = TwoLikeliest(50, raw=False)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(TwoLikeliest, "plain", None)
        first.rollback(0)
        made = first.unroll(features, tokens, u, u[0], called, ids)
    assert found == [(made.tokens.tolist(), called.found)] * 3
    assert [one.place for one, _ in called.found] == made.tokens.tolist()


@pytest.mark.skipif(native.kernels() is None, reason="no kernels of our own")
def test_features_that_nothing_fuses_are_the_states():
    forward = built(replace(FORMS["EAGLE-3"], final=True), "int4", fused=False)
    assert forward._fuse is None
    for mine, theirs in zip(said(forward, True, kept=1), said(forward, False, kept=1), strict=True):
        assert_close(mine, theirs)


@pytest.mark.skipif(native.kernels() is None, reason="no kernels of our own")
def test_an_output_in_several_matrices_is_multiplied_by_operations():
    forward = built(HeadForm(), "int4")
    forward._head = project([torch.randn(50, 64)], None, torch.float32, CPU, "none")
    assert not forward._head.matrices
    assert forward._own is None
    assert len(said(forward, True)) == 8


@pytest.mark.skipif(native.kernels() is None, reason="no kernels of our own")
@pytest.mark.parametrize("n", [2, 15, 16, 17, 50, 6144, 6401])
def test_the_two_likeliest_are_a_softmaxs(n):
    for seed in range(30):
        logits = torch.randn(n, generator=torch.Generator().manual_seed(seed)) * 10
        shares, places = logits.softmax(-1).topk(2)
        found = native.kernels().likeliest(logits)
        assert [one.place for one in found] == places.tolist()
        assert [one.share for one in found] == pytest.approx(shares.tolist(), rel=1e-5, abs=1e-9)


@pytest.mark.skipif(native.kernels() is None, reason="no kernels of our own")
def test_of_those_that_are_alike_the_first_is_likeliest():
    logits = torch.zeros(40)
    first, second = native.kernels().likeliest(logits)
    assert (first.place, second.place) == (0, 1)
    assert first.share == second.share == pytest.approx(1 / 40)
    assert native.kernels().likeliest(torch.full((40,), -torch.inf).index_fill(0, torch.tensor([7]), 0.0))[0].place == 7


def test_a_head_narrower_than_its_target_needs_what_fuses():
    """One feature of another width than the head's is no state: without this the kernels would write past their memory."""
    shape, form = head_shape(CONFIG), HeadForm(final=False, feature_norms="none")
    weights = {name: torch.zeros(size) for name, size in _sizes({}, shape, 96, 1, form, 64).items()}
    weights["head.weight"] = torch.zeros(50, 64)
    check_weights(weights, shape, 96, 1, form, 64)
    with pytest.raises(KeyError, match=r"fuse\.weight"):
        check_weights(weights, shape, 96, 1, form, 1024)


@pytest.mark.skipif(native.kernels() is None, reason="no kernels of our own")
def test_no_more_rows_are_given_than_were_read():
    runtime = lean(tiny_llama(), kernels=native.kernels())
    assert runtime.forward(torch.empty(0, dtype=torch.long), 1).shape == (0, runtime.vocab)
    assert runtime.forward(torch.tensor([3, 4]), 50).shape == (2, runtime.vocab)
