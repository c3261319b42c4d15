"""Assistants of Gemma 4: what transformers drafts with the same two models, and what is said of those that do not fit."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation.candidate_generator import SinglePositionMultiTokenCandidateGenerator

from specdec_engine.core.cycle_types import Sampling
from specdec_engine.core.randomness import KeyedRandomness
from specdec_engine.errors import ModelUnavailable, PairIncompatible, UsageError
from specdec_engine.models.assistant_files import load_assistant
from specdec_engine.models.compatibility import check
from specdec_engine.models.draft_files import read_draft
from specdec_engine.models.loading import Candidate
from specdec_engine.models.offers import offers
from specdec_engine.models.options import LoadOptions
from specdec_engine.pair import load_pair
from tests.fakes import byte_tokenizer, cycles, emitted, save_checkpoint
from tests.gemma import save_assistant, tiny_gemma

OPTIONS = LoadOptions(device="cpu", dtype="float32", threads=1)


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """Its last two layers read what the two before them keep, as in Gemma 4's smaller models."""
    folder = tmp_path_factory.mktemp("gemma") / "target"
    tiny_gemma(shared=2).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=[False, True], ids=["all ids", "centroids"])
def assistant(request, tmp_path_factory):
    return save_assistant(tmp_path_factory.mktemp("gemma") / "assistant", centroids=request.param)


@pytest.mark.parametrize("length", [3, 8, 9, 40])
def test_it_drafts_what_transformers_drafts(target, assistant, length):
    """After a prompt, and after a draft of which a part was accepted; shorter and longer than its window."""
    pair = load_pair(str(target), str(assistant), OPTIONS)
    model, seed = pair.target.runtime.model, torch.Generator().manual_seed(length)
    text = torch.randint(5, 300, (length,), generator=seed).tolist()
    small = load_assistant(read_draft(assistant))
    small.generation_config.num_assistant_tokens = 5
    how = GenerationConfig(max_length=1000)
    theirs = SinglePositionMultiTokenCandidateGenerator(small, model.get_input_embeddings(), how)
    for more in ([], [17, 23, 42]):
        text += more
        pair.drafter.begin(text)
        pair.target.prefill(text[:-1])
        ours = pair.drafter.propose(text, 5, Sampling(), KeyedRandomness(0)).tokens.tolist()
        read = model(torch.tensor([text[:-1]]), output_hidden_states=True, return_shared_kv_states=True)
        theirs.is_main_model_prefill = True
        ids, _ = theirs.get_candidates(torch.tensor([text]), {}, read, is_first_iteration=False, n_last_matches=0)
        assert ours == ids[0, len(text) :].tolist()
        assert len(set(ours)) > 1


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("shared", [0, 2])
def test_the_text_is_the_targets_own(tmp_path, assistant, shared, k):
    model = tiny_gemma(shared)
    model.save_pretrained(tmp_path / "t")
    byte_tokenizer().save_pretrained(tmp_path / "t")
    prompt = [5, 9, 7, 9, 5, 9, 11, 12, 13, 14, 15]
    plain = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=30, eos_token_id=None)
    pair = load_pair(str(tmp_path / "t"), str(assistant), OPTIONS).asking(ignore_eos=True)
    found = list(pair.decode(prompt, k=k, max_tokens=30))
    assert emitted(found) == plain[0, len(prompt) :].tolist()
    assert sum(len(cycle.drafted) for cycle in cycles(found)) >= 20
    assert "gemma4_assistant" in str(pair.environment)


def test_it_draws_from_the_distribution_that_it_tells(target, assistant):
    pair = load_pair(str(target), str(assistant), OPTIONS)
    prompt = [5, 9, 7, 9, 5]
    pair.target.prefill(prompt[:-1])
    draft = pair.drafter.propose(prompt, 4, Sampling(1.0), KeyedRandomness(3))
    again = pair.drafter.propose(prompt, 4, Sampling(1.0), KeyedRandomness(4))
    assert draft.probs is not None
    assert again.probs is not None
    assert torch.allclose(draft.probs[0], again.probs[0])
    assert draft.tokens.tolist() != again.tokens.tolist()
    assert draft.probs.sum(-1).tolist() == pytest.approx([1.0] * 4)


def test_drafts_after_accepted_tokens_are_those_of_a_pair_that_has_read_the_text_anew(tmp_path):
    """Flat models, of which many tokens are accepted: what a draft begins with is then in the middle of the last pass."""
    tiny_gemma(shared=2, std=0.02).save_pretrained(tmp_path / "t")
    byte_tokenizer().save_pretrained(tmp_path / "t")
    assistant = str(save_assistant(tmp_path / "a", std=0.02))
    used, fresh = (load_pair(str(tmp_path / "t"), assistant, OPTIONS).asking(ignore_eos=True) for _ in range(2))
    text, sampling = [5, 9, 7, 9, 5], Sampling(1.0)
    found = cycles(used.decode(text, k=4, sampling=sampling, seed=5, max_tokens=40))
    for cycle in found[:-1]:
        fresh.target.rollback(0)
        fresh.target.prefill(text[:-1])
        draft = fresh.drafter.propose(text, 4, sampling, KeyedRandomness(5))
        assert tuple(draft.tokens.tolist()) == cycle.drafted
        text = [*text, *cycle.emitted]
    assert {cycle.accepted for cycle in found} >= {0, 1, 2}


def test_it_is_found_fitting_or_not(target, assistant, tmp_path):
    fit = check(str(target), str(assistant), OPTIONS)
    assert fit.fits
    assert any("assistant of Gemma 4" in finding.said for finding in fit.findings)
    wide = save_assistant(tmp_path / "wide", reads=48)
    assert not check(str(target), str(wide), OPTIONS).fits
    with pytest.raises(PairIncompatible, match="reads states of 48 numbers, and the target's have 32"):
        load_pair(str(target), str(wide), OPTIONS)


def test_heads_that_it_does_not_read_are_found_out_by_check_and_by_loading(assistant, tmp_path):
    tiny_gemma(shared=2, num_key_value_heads=4).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    fit = check(str(tmp_path), str(assistant), OPTIONS)
    assert [finding.level for finding in fit.findings if "4 heads of 16 numbers" in finding.said] == ["bad"]
    with pytest.raises(PairIncompatible, match="4 heads of 16 numbers, and it reads 2 of 16"):
        load_pair(str(tmp_path), str(assistant), OPTIONS)


def test_what_is_wrong_with_it_comes_out_before_the_targets_weights_are_read(assistant, target, tmp_path, monkeypatch):
    half = shutil.copytree(assistant, tmp_path / "half")
    (half / "model.safetensors").write_bytes((half / "model.safetensors").read_bytes()[:2000])
    monkeypatch.setattr(Candidate, "load", lambda self: pytest.fail("weights were read"))
    with pytest.raises(ModelUnavailable, match="damaged"):
        load_pair(str(target), str(half), OPTIONS)
    with pytest.raises(UsageError, match="cannot be packed"):
        load_pair(str(target), str(assistant), replace(OPTIONS, draft_quantize="int8"))
    config = json.loads((half / "config.json").read_text())
    config["text_config"]["vocab_size"] = 10**13
    (half / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelUnavailable, match="a size that is none"):
        load_pair(str(target), str(half), OPTIONS)


def test_a_target_of_another_family_is_refused(assistant, tmp_path):
    llama = str(save_checkpoint(tmp_path / "llama", hidden=32))
    assert not check(llama, str(assistant), OPTIONS).fits
    with pytest.raises(PairIncompatible, match="needs the generic runtime"):
        load_pair(llama, str(assistant), OPTIONS)
    with pytest.raises(
        PairIncompatible, match=r"does not fit .*: the target has no layers of (full|sliding) attention"
    ):
        load_pair(llama, str(assistant), LoadOptions(device="cpu", dtype="float32", threads=1, runtime="generic"))


def test_it_is_no_target_and_no_damaged_one_is_taken(assistant, target, tmp_path):
    with pytest.raises(UsageError, match="an assistant of Gemma 4 and no model of its own"):
        load_pair(str(assistant), "ngram", OPTIONS)
    half = shutil.copytree(assistant, tmp_path / "half")
    (half / "config.json").write_text('{"model_type": "gemma4_assistant"}')
    with pytest.raises(ModelUnavailable, match="damaged"):
        load_pair(str(target), str(half), OPTIONS)


def test_one_that_is_called_after_a_target_is_offered_for_it(target, assistant, tmp_path, monkeypatch):
    monkeypatch.setattr("specdec_engine.models.hub_cache._cached", lambda: [(f"{target}-assistant", assistant)])
    shutil.copytree(assistant, f"{target}-assistant", dirs_exist_ok=True)
    assert f"{target}-assistant" in [offer.draft for offer in offers(str(target), OPTIONS)]
