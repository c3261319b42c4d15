"""Modules for multi-token prediction: what they draft, by transformers' own way and by the equations, and what is said of
targets that have none."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM, GenerationConfig, Qwen2Config

from specdec_engine.core.cycle_types import Sampling
from specdec_engine.core.randomness import KeyedRandomness
from specdec_engine.errors import ModelUnavailable, PairIncompatible, UsageError
from specdec_engine.models.compatibility import check
from specdec_engine.models.loading import load_config
from specdec_engine.models.mtp_files import find_mtp
from specdec_engine.models.offers import offers
from specdec_engine.models.options import LoadOptions
from specdec_engine.pair import Loader, load_pair
from tests.fakes import byte_tokenizer, cycles, emitted, save_checkpoint, save_head_draft
from tests.models import vllm_mtp
from tests.mtp import JOINS, KINDS, NAMES, save_mtp_target

OPTIONS = LoadOptions(device="cpu", dtype="float32", threads=1)
TEXTS = ([5, 9, 7], [5, 9, 7, 9, 5, 9, 11, 12, 13, 250, 3, 77], [17, 23] * 20)


@pytest.fixture(scope="module", params=KINDS)
def target(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mtp") / request.param
    return request.param, save_mtp_target(folder, request.param)


def model_of(folder):
    return AutoModelForCausalLM.from_pretrained(folder, config=load_config(folder, False), dtype=torch.float32).eval()


def fused_experts(own):
    """As transformers keeps them, from as they are stored: one by one."""
    if "mlp.experts.0.up_proj.weight" not in own:
        return {}
    parts = {p: [own[f"mlp.experts.{i}.{p}_proj.weight"] for i in range(4)] for p in ("gate", "up", "down")}
    both = [torch.cat(pair) for pair in zip(parts["gate"], parts["up"], strict=True)]
    return {"mlp.experts.gate_up_proj": torch.stack(both), "mlp.experts.down_proj": torch.stack(parts["down"])}


def by_the_equations(kind, folder, text, k):
    """Greedy drafts of the module, its layer one of transformers', all slots computed anew for each token: no cache."""
    model, stored = model_of(folder), load_file(folder / "model.safetensors")
    names, at = NAMES[kind]
    layers = model.config.num_hidden_layers
    embedding_norm, hidden_norm, last_norm, join = (stored[name.format(layers)].float() for name in names)
    at = at.format(layers)
    layer = copy.deepcopy(model.model.layers[-1])
    own = {n.removeprefix(at): t.float() for n, t in stored.items() if n.startswith(at)}
    layer.load_state_dict(own | fused_experts(own), strict=False)
    assert not layer.state_dict().keys() - own.keys() - fused_experts(own).keys()
    more = 1.0 if kind.startswith("qwen") else 0.0
    eps = model.config.rms_norm_eps

    def normed(x, weight):
        return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * (weight + more)

    with torch.inference_mode():
        states = model.model(torch.tensor([text[:-1]])).last_hidden_state[0]
        tokens, drafted = list(text), []
        for _ in range(k):
            embedded = model.get_input_embeddings()(torch.tensor(tokens[1:]))
            if kind == "mimo":
                embedded[0] = 0.0
            parts = [normed(embedded, embedding_norm), normed(states, hidden_norm)]
            x = linear(torch.cat(parts[::-1] if kind == "mimo" else parts, -1), join)[None]
            n = x.shape[1]
            own_turn = {"layer_type": "sliding_attention"} if kind == "mellum" else {}
            cos_sin = model.model.rotary_emb(x, torch.arange(1, n + 1)[None], **own_turn)
            mask = torch.full((n, n), -torch.inf).triu(1)[None, None]
            if kind == "mellum":  # its module's layer has a window of 8
                mask = mask + torch.full((n, n), -torch.inf).tril(-8)
            for module in layer.modules():
                if hasattr(module, "layer_idx"):
                    module.layer_idx = 0
            given = {"attention_mask": mask, "position_embeddings": cos_sin}
            out = normed(layer(x, **given)[0], last_norm)
            drafted.append(int(model.lm_head(out[-1]).argmax()))
            tokens.append(drafted[-1])
            states = torch.cat([states, out[-1:]])
    return drafted


@pytest.mark.parametrize("text", TEXTS, ids=[f"{len(text)} tokens" for text in TEXTS])
def test_it_drafts_what_the_equations_say(target, text):
    """After a prompt, and after more of the text, of which it has read a part."""
    kind, folder = target
    pair = load_pair(str(folder), "mtp", OPTIONS)
    for more in ([], [33], [4, 8, 15, 16]):
        text = [*text, *more]
        pair.drafter.begin(text)
        pair.target.prefill(text[:-1])
        found = pair.drafter.propose(text, 4, Sampling(), KeyedRandomness(0)).tokens.tolist()
        assert found == by_the_equations(kind, folder, text, 4)
        assert len(set(found)) > 1


@pytest.mark.parametrize("kind", ["glm4_moe", "deepseek_v3", "mellum"])
def test_the_first_token_is_that_of_transformers_own_way(tmp_path, kind):
    from transformers.generation.candidate_generator import MTPCandidateGenerator

    folder, text = save_mtp_target(tmp_path / "t", kind), [5, 9, 7, 9, 5, 9, 11, 12, 13]
    model = model_of(folder)
    model.config.name_or_path = str(folder)
    model._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{model.config.num_hidden_layers}\.", r"^mtp\."]
    theirs = MTPCandidateGenerator(model, GenerationConfig(do_sample=False), {})
    read = model(torch.tensor([text[:-1]]), output_hidden_states=True)
    known = {"position_ids": torch.arange(len(text))[None]}
    ids, _ = theirs.get_candidates(torch.tensor([text]), known, read, is_first_iteration=False, n_last_matches=0)
    pair = load_pair(str(folder), "mtp", OPTIONS)
    pair.drafter.begin(text)
    pair.target.prefill(text[:-1])
    assert pair.drafter.propose(text, 1, Sampling(), KeyedRandomness(0)).tokens.tolist() == ids[0, len(text) :].tolist()


@pytest.mark.parametrize("kind", json.loads(vllm_mtp.RECORD.read_text("utf-8")))
def test_it_drafts_what_vllm_drafts(tmp_path, kind):
    """At every place of a text, each draft of several tokens; what it drafted is recorded."""
    record = json.loads(vllm_mtp.RECORD.read_text("utf-8"))[kind]
    pair = load_pair(str(vllm_mtp.save(kind, tmp_path / kind)), "mtp", OPTIONS)
    assert len(record["drafted"]) == len(record["said"]) == vllm_mtp.TOKENS, "it accepted nothing"
    for i, drafted in enumerate(record["drafted"][:-1], 1):
        text = [*vllm_mtp.PROMPT, *record["said"][:i]]
        pair.drafter.begin(text)
        pair.target.prefill(text[:-1])
        found = pair.drafter.propose(text, vllm_mtp.K, Sampling(), KeyedRandomness(0)).tokens.tolist()
        assert found == drafted


@pytest.mark.parametrize("k", [1, 4])
def test_the_text_is_the_targets_own(target, k):
    kind, folder = target
    prompt = [5, 9, 7, 9, 5, 9, 11, 12, 13, 14, 15]
    plain = model_of(folder).generate(
        torch.tensor([prompt]), do_sample=False, max_new_tokens=30, eos_token_id=None, pad_token_id=0
    )
    pair = load_pair(str(folder), "mtp", OPTIONS).asking(ignore_eos=True)
    assert pair.target.runtime.name == ("lean" if kind == "mimo" else "generic")
    found = list(pair.decode(prompt, k=k, max_tokens=30))
    assert emitted(found) == plain[0, len(prompt) :].tolist()
    assert sum(len(cycle.drafted) for cycle in cycles(found)) >= 20
    assert "mtp" in str(pair.environment)
    assert not pair.notes


def test_drafts_after_accepted_tokens_are_those_of_a_pair_that_has_read_the_text_anew(target, tmp_path):
    """Flat models, of which many tokens are accepted: slots of drafted tokens are computed again from true states."""
    kind, _ = target
    folder = str(save_mtp_target(tmp_path / "flat", kind, std=0.02))
    used, fresh = (load_pair(folder, "mtp", OPTIONS).asking(ignore_eos=True) for _ in range(2))
    text, sampling = [5, 9, 7, 9, 5], Sampling(1.0)
    found = cycles(used.decode(text, k=4, sampling=sampling, seed=5, max_tokens=40))
    for cycle in found[:-1]:
        fresh.target.rollback(0)
        fresh.drafter.begin([])
        fresh.target.prefill(text[:-1])
        draft = fresh.drafter.propose(text, len(cycle.drafted), sampling, KeyedRandomness(5))
        assert tuple(draft.tokens.tolist()) == cycle.drafted
        text = [*text, *cycle.emitted]
    assert len({cycle.accepted for cycle in found}) > 1


def test_it_is_offered_looked_at_and_said_to_be_missing(target, tmp_path):
    kind, folder = target
    assert "mtp" in [offer.draft for offer in offers(str(folder), OPTIONS)]
    fit = check(str(folder), "ngram,mtp", OPTIONS)
    assert fit.fits
    assert any("MTP module of its own checkpoint" in finding.said for finding in fit.findings)
    bare = str(save_checkpoint(tmp_path / "bare"))
    assert "mtp" not in [offer.draft for offer in offers(bare, OPTIONS)]
    assert not check(bare, "mtp", OPTIONS).fits
    with pytest.raises(PairIncompatible, match="no module for multi-token prediction"):
        load_pair(bare, "mtp", OPTIONS)
    other = replace(OPTIONS, runtime="generic" if kind == "mimo" else "auto", draft_quantize="none")
    if kind == "mimo":
        assert not check(str(folder), "mtp", other).fits
        with pytest.raises(
            PairIncompatible, match="needs the lean or the graph runtime, and the target runs on generic"
        ):
            load_pair(str(folder), "mtp", other)
    else:
        with pytest.raises(UsageError, match="cannot be packed"):
            load_pair(str(folder), "mtp", replace(OPTIONS, draft_quantize="int8"))
    with pytest.raises(UsageError, match="the module has no other name"):
        load_pair(str(folder), "mtp:1", OPTIONS)
    assert not check(str(folder), "mtp:1", OPTIONS).fits
    packed = replace(OPTIONS, draft_quantize="int8")
    assert check(str(folder), "mtp", packed).fits == (kind == "mimo")
    if kind == "mimo":
        with pytest.raises(UsageError, match="cannot be packed to int8 on cpu in dtype float32"):
            load_pair(str(folder), "mtp", packed)


def test_a_module_that_is_cut_is_damaged(target, tmp_path):
    kind, _ = target
    folder = save_mtp_target(tmp_path / "t", kind)
    stored = load_file(folder / "model.safetensors")
    found = find_mtp(folder)
    assert found is not None
    join = next(name for name in stored if found.names.search(name) and name.endswith(JOINS))
    for part, change, said in (
        ("layernorm", lambda tensor: None, r"the MTP module of .* (lacks|is damaged: there is no) .*layernorm"),
        ("o_proj", lambda tensor: tensor[:8].contiguous(), r"o_proj.*has the size \(8, "),
        (join, lambda tensor: None, "lacks the matrix that joins state and embedding"),
        (join, lambda tensor: tensor[:, :32].contiguous(), r"has the size \(32, 32\), which joins no two states"),
        ("down_proj", lambda tensor: tensor * torch.nan, "entries that are not finite numbers"),
    ):
        name = max(name for name in stored if found.names.search(name) and part in name)
        broken = {**stored, name: change(stored[name])}
        given = {name: tensor for name, tensor in broken.items() if tensor is not None}
        save_file(given, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModelUnavailable, match=said):
            load_pair(str(folder), "mtp", OPTIONS)
        if part != "down_proj" and not (kind == "mimo" and part == "layernorm"):  # these two need its weights read
            with pytest.raises(ModelUnavailable, match=said):
                check(str(folder), "mtp", OPTIONS)


def test_of_several_modules_the_first_drafts_and_says_so(tmp_path):
    """Counted by what is stored, whatever a config says."""
    folder = save_mtp_target(tmp_path / "t", "glm4_moe")
    config = json.loads((folder / "config.json").read_text()) | {"num_nextn_predict_layers": 3}
    (folder / "config.json").write_text(json.dumps(config))
    assert not load_pair(str(folder), "mtp", OPTIONS).notes
    stored = load_file(folder / "model.safetensors")
    more = {name.replace("layers.2.", "layers.3."): t.clone() for name, t in stored.items() if "layers.2." in name}
    save_file(stored | more, folder / "model.safetensors", metadata={"format": "pt"})
    (said,) = load_pair(str(folder), "mtp", OPTIONS).notes
    assert "has 2 MTP modules" in said


def test_it_drafts_for_the_text_part_of_a_vision_language_model_as_for_the_model_alone(tmp_path):
    """Qwen 3.5 as it is published: with another part before it, and the module beside both."""
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    alone, whole = save_mtp_target(tmp_path / "alone", "qwen3_5_text"), tmp_path / "whole"
    text = json.loads((alone / "config.json").read_text())
    eye = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    images = {"image_token_id": 290, "video_token_id": 291, "vision_start_token_id": 292, "vision_end_token_id": 293}
    config = Qwen3_5Config(text_config=text, vision_config=eye | {"num_position_embeddings": 16}, **images)
    Qwen3_5ForConditionalGeneration(config).save_pretrained(whole)
    byte_tokenizer().save_pretrained(whole)
    stored = load_file(whole / "model.safetensors")
    for name, tensor in load_file(alone / "model.safetensors").items():
        stored[name.replace("model.", "model.language_model.") if name.startswith("model.") else name] = tensor
    save_file(stored, whole / "model.safetensors", metadata={"format": "pt"})
    pairs = [load_pair(str(folder), "mtp", OPTIONS).asking(ignore_eos=True) for folder in (alone, whole)]
    found = [cycles(pair.decode([5, 9, 7, 9, 5, 9, 11], k=3, max_tokens=20)) for pair in pairs]
    assert [c.drafted for c in found[0]] == [c.drafted for c in found[1]]


def test_a_head_and_the_module_serve_one_target_in_any_order(tmp_path):
    """They tap one runtime, and each reads its own of it."""
    folder = save_mtp_target(tmp_path / "t", "mimo")
    head = save_head_draft(tmp_path / "head", model_of(folder), byte_tokenizer())
    plain = emitted(load_pair(str(folder), "none", OPTIONS).decode([5, 9, 7, 9, 5], k=0, max_tokens=20))
    alone = cycles(load_pair(str(folder), "mtp", OPTIONS).decode([5, 9, 7, 9, 5], k=3, max_tokens=20))
    loader = Loader(str(folder), OPTIONS)
    pairs = [loader.pair(draft) for draft in ("mtp", f"head:{head}", f"mtp,head:{head}", "mtp")]
    for pair in (*pairs, *pairs[::-1]):
        found = list(pair.decode([5, 9, 7, 9, 5], k=3, max_tokens=20))
        assert emitted(found) == plain
        if pair is pairs[0]:
            assert [cycle.drafted for cycle in cycles(found)] == [cycle.drafted for cycle in alone]


def test_mimo_is_read_as_the_qwen_that_it_is(tmp_path):
    """Without its own code, with and without its module; on both forwards."""
    folder = save_mtp_target(tmp_path / "t", "mimo")
    assert isinstance(load_config(folder, trust_remote_code=False), Qwen2Config)
    ids = torch.tensor([[5, 9, 7, 9, 5]])
    expected = model_of(folder)(ids).logits[0]
    for runtime in ("lean", "generic"):
        pair = load_pair(str(folder), "none", replace(OPTIONS, runtime=runtime))
        assert torch.allclose(pair.target.runtime.forward(ids[0], 5), expected, atol=1e-4)
        assert not pair.notes
