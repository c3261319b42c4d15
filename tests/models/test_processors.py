"""A checkpoint's own penalties: transformers' `generate` token for token, and lossless with every rule."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import GenerationConfig

from specdec_engine.bench.measure import _gap
from specdec_engine.errors import ModelUnavailable, UsageError
from specdec_engine.models.options import LoadOptions
from specdec_engine.pair import load_pair
from specdec_engine.record.events import Cycle, Started
from specdec_engine.verify.processors import Asked, asked_by, left_out_of, process
from tests.exact.test_lossless import LENGTH, LOSSLESS, VOCAB, deviation, enumerate_emitted
from tests.fakes import CPU, save_checkpoint, table_probs

PROMPT = [5, 9, 7, 9, 5, 9]
SETTINGS = {
    "repetition": {"repetition_penalty": 1.3},
    "n-grams": {"no_repeat_ngram_size": 2},
    "suppressed": {"suppress_tokens": [11, 12, 13], "begin_suppress_tokens": [40]},
    "words": {"bad_words_ids": [[17], [9, 5]]},
    "at least": {"min_new_tokens": 20},
    "at least, with the prompt": {"min_length": 25},
    "all": {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "suppress_tokens": [8], "min_new_tokens": 9},
}


def folder_with(tmp_path, settings):
    folder = save_checkpoint(tmp_path, seed=3)
    file = folder / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    return folder


@pytest.mark.parametrize("draft", ["none", "ngram", "self:1"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_greedy_text_is_transformers_own_under_the_same_config(settings, draft, tmp_path):
    from transformers import AutoModelForCausalLM

    folder = folder_with(tmp_path, settings)
    pair = load_pair(str(folder), draft, LoadOptions(dtype="float32"))
    events = list(pair.decode(PROMPT, k=4, max_tokens=24))
    ours = [token for e in events if isinstance(e, Cycle) for token in e.emitted]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    said = model.generate(torch.tensor([PROMPT]), do_sample=False, max_new_tokens=24, pad_token_id=3)
    assert ours == said[0, len(PROMPT) :].tolist()
    assert any("followed" in note for note in pair.notes)
    assert isinstance(events[0], Started)
    assert set(events[0].settings["generation_config"]) == set(settings)


def test_a_row_is_what_plain_decoding_gets():
    """Whatever is drafted, and however long the draft is."""
    asked = Asked(
        1.3,
        0.4,
        0.2,
        no_repeat_ngram_size=2,
        min_new_tokens=4,
        suppress_tokens=(3,),
        begin_suppress_tokens=(4,),
        ends=(1,),
    )
    step, logits = process(asked, 3, CPU), torch.randn(5, 8)
    context, drafted = [2, 5, 6, 5], [6, 7, 7, 1]
    rows = step(context, torch.tensor(drafted), logits)
    for i in range(5):
        alone = step([*context, *drafted[:i]], torch.tensor([], dtype=torch.long), logits[i : i + 1])
        assert torch.equal(rows[i], alone[0])


@pytest.mark.parametrize("deterministic", [False, True], ids=["sampled", "deterministic"])
@pytest.mark.parametrize("rule", LOSSLESS, ids=lambda rule: rule.name)
def test_the_emitted_text_has_exactly_that_distribution(rule, deterministic):
    asked, none = Asked(1.5, 0.3, 0.6, no_repeat_ngram_size=2), torch.tensor([], dtype=torch.long)
    step = process(asked, 1, CPU)

    def p(context):
        logits = table_probs(context, VOCAB, 4).log().float()
        return step([0, *context], none, logits[None])[0].double().softmax(-1)

    def q(context):
        return table_probs(context, VOCAB, 5)

    found = enumerate_emitted(rule, p, q, 2, LENGTH, deterministic=deterministic)
    assert deviation(found, p, LENGTH) < 1e-12
    assert deviation(found, lambda context: table_probs(context, VOCAB, 4), LENGTH) > 1e-3  # and not the one without


def test_texts_are_told_apart_by_what_they_were_chosen_by(tmp_path):
    """Two tokens as likely as each other, one of which may not come: no rounding makes it come."""
    pair = load_pair(str(folder_with(tmp_path, {"suppress_tokens": [8]})), "none", LoadOptions(dtype="float32"))
    gap, rounding = _gap(pair, PROMPT, [7], 8, 9)
    assert gap == float("inf") > rounding


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": "1.2"},
        {"repetition_penalty": 0},
        {"repetition_penalty": float("nan")},
        {"presence_penalty": float("inf")},
        {"no_repeat_ngram_size": -2},
        {"no_repeat_ngram_size": 2.9},
        {"suppress_tokens": "all"},
        {"suppress_tokens": list(range(50))},
        {"bad_words_ids": 3},
        {"bad_words_ids": [1, 2]},
        {"bad_words_ids": [[-1]]},
    ],
    ids=str,
)
def test_a_value_that_is_none_is_named(settings):
    config = type("Config", (), settings)
    with pytest.raises(ModelUnavailable, match=next(iter(settings))):
        asked_by(config, "generation_config.json", 50)


def test_ids_that_cannot_come_are_suppressed_already():
    """In a model whose vocabulary was trimmed; `generate` passes over them, too."""
    config = type("Config", (), {"suppress_tokens": [50, 7, -1], "begin_suppress_tokens": [99]})
    assert asked_by(config, "generation_config.json", 50).named() == {"suppress_tokens": (7,)}


def test_a_minimum_length_without_an_end_is_not_called_followed():
    config = GenerationConfig(min_new_tokens=9)
    assert not asked_by(config, "generation_config.json", 50)
    config.eos_token_id = 3
    assert asked_by(config, "generation_config.json", 50).named() == {"min_new_tokens": 9}


def test_what_is_not_followed_is_named():
    config = GenerationConfig(
        num_beams=4, sequence_bias=[[[1], 2.0]], temperature=0.7, dola_layers="high", suppress_tokens=[1]
    )
    assert sorted(left_out_of(config)) == ["dola_layers 'high'", "num_beams 4", "sequence_bias [[[1], 2.0]]"]


@pytest.mark.parametrize("draft", ["none", "ngram", "self:1"])
@pytest.mark.parametrize(
    "penalties",
    [
        {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2},
        {"logit_bias": {9: 4.0, 12: -100.0}},
        {"min_tokens": 20},
    ],
    ids=["penalties", "bias", "at least"],
)
def test_penalties_of_ones_own_give_plain_decodings_text_with_every_draft(penalties, draft, tmp_path):
    folder = save_checkpoint(tmp_path, seed=3)
    found = []
    for name, k in (("none", 0), (draft, 4)):
        pair = load_pair(str(folder), name, LoadOptions(dtype="float32")).asking(**penalties)
        events = list(pair.decode(PROMPT, k=k, max_tokens=24))
        found.append([token for e in events if isinstance(e, Cycle) for token in e.emitted])
        assert events[0].settings["generation_config"]
    assert found[0] == found[1]
    if "logit_bias" in penalties:
        assert 12 not in found[0]


def test_a_bias_is_added_to_the_row_at_each_drafted_position():
    logits = torch.randn(3, 20)
    made = process(Asked(logit_bias=((3, 2.5), (7, -1.0))), 2, CPU)([1, 2], torch.tensor([5, 6]), logits)
    expected = logits.clone()
    expected[:, 3] += 2.5
    expected[:, 7] -= 1.0
    assert torch.allclose(made, expected)


def test_an_end_that_is_ignored_ends_nothing(tmp_path):
    pair = load_pair(str(save_checkpoint(tmp_path, seed=3)), "ngram", LoadOptions(dtype="float32"))
    end = min(pair.stop_ids)
    biased = {"logit_bias": {end: 100.0}}
    assert len([e for e in pair.asking(**biased).decode(PROMPT, max_tokens=9) if isinstance(e, Cycle)]) == 1
    events = list(pair.asking(**biased, ignore_eos=True).decode(PROMPT, max_tokens=9))
    assert (events[-1].emitted, events[-1].reason) == (9, "length")
    held = list(pair.asking(**biased, min_tokens=5).decode(PROMPT, max_tokens=9))
    assert held[-1].emitted == 6


@pytest.mark.parametrize(
    "wrong", [{"repetition_penalty": 0.0}, {"presence_penalty": float("nan")}, {"logit_bias": {10**9: 1.0}}], ids=str
)
def test_values_out_of_bounds_are_refused(wrong, tmp_path):
    pair = load_pair(str(save_checkpoint(tmp_path, seed=3)), "none", LoadOptions(dtype="float32"))
    with pytest.raises(UsageError):
        pair.asking(**wrong)
