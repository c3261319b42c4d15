"""EAGLE-3 heads of other makers: what the speculators library drafts with the same files, each dialect's reading, and what a
user is told of heads that do not fit."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from specdec_engine.errors import ModelUnavailable, PairIncompatible, UsageError
from specdec_engine.models.compatibility import check
from specdec_engine.models.draft_files import head_weights, read_draft
from specdec_engine.models.draft_folder import TargetLayers
from specdec_engine.models.options import LoadOptions
from specdec_engine.pair import load_pair
from specdec_engine.runtime.decoder import Embedding
from specdec_engine.runtime.head import Features, HeadForward, State, check_weights, head_shape
from specdec_engine.runtime.head_runtime import HeadRuntime
from tests.fakes import CPU, cycles, emitted, save_checkpoint, save_eagle_head, tiny_llama

RECORDED = Path(__file__).with_name("eagle")
HEADS = ("plain", "normed", "two_layers")


def head(folder):
    draft = read_draft(folder)
    weights, shape = head_weights(draft), head_shape(draft.config)
    check_weights(weights, shape, draft.config["intermediate_size"], 3 + draft.form.final, draft.form, shape.hidden)
    forward = HeadForward(
        shape,
        weights,
        Embedding(weights["embedding.weight"]),
        weights["head.weight"],
        torch.float32,
        CPU,
        "none",
        form=draft.form,
    )
    return draft, HeadRuntime(forward, 16)


def drafted(folder, said):
    """As `record.py` asks: from each slot on, fed the text's own tokens."""
    draft, runtime = head(folder)
    features = torch.tensor(said["features"])
    features = torch.cat([features, torch.zeros_like(features[:, :1])], 1)  # a place for the final state
    tokens, steps = torch.tensor(said["tokens"]), len(said["drafted"])
    found = [[] for _ in range(steps)]
    for slot in range(len(tokens) - steps + 1):
        runtime.rollback(0)
        if slot:
            runtime.forward(features[:slot], tokens[:slot])
        with torch.inference_mode():
            read = Features(features[slot : slot + 1])
            for step in range(steps):
                logits, state = runtime._step(read, tokens[slot + step : slot + step + 1])
                found[step].append(int(draft.ids[logits.argmax()]))
                read = State(state)
    return found


@pytest.mark.parametrize("name", HEADS)
def test_a_head_drafts_what_the_library_that_made_it_drafts(name):
    said = json.loads((RECORDED / name / "said.json").read_text("utf-8"))
    found = drafted(RECORDED / name, said)
    assert found == [step[: len(found[0])] for step in said["drafted"]]


@pytest.mark.parametrize("flag", ["norm_before_residual", "norm_output"])
def test_a_flag_that_is_not_followed_would_be_seen(flag, tmp_path):
    """Nothing fails where a norm is wrong: the head drafts, and badly."""
    folder = shutil.copytree(RECORDED / "normed", tmp_path / "head")
    said = json.loads((folder / "said.json").read_text("utf-8"))
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {flag: False}))
    assert drafted(folder, said) != [step[:10] for step in said["drafted"]]


def flat(tmp_path, nested=None, **more):
    """The same head in SafeAILab's dialect, with NVIDIA's section if it is given."""
    folder = shutil.copytree(RECORDED / "plain", tmp_path / "flat")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    layer = config["transformer_layer_config"]
    section = {} if nested is None else {"eagle_config": nested}
    whole = {**layer, "architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": config["draft_vocab_size"]}
    (folder / "config.json").write_text(json.dumps({**whole, **section, **more}))
    tensors = load_file(folder / "model.safetensors")
    renamed = {name.replace("layers.0.", "midlayer."): tensor for name, tensor in tensors.items()}
    save_file(renamed, folder / "model.safetensors")
    return folder


def test_the_dialects_are_one_head(tmp_path):
    theirs, ours = read_draft(RECORDED / "plain"), read_draft(flat(tmp_path))
    assert (theirs.form, theirs.vocab, theirs.ids.tolist()) == (ours.form, ours.vocab, ours.ids.tolist())
    assert theirs.layers == TargetLayers((1, 2, 3), "before")
    a, b = head_weights(theirs), head_weights(ours)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("layers", "n", "taps"),
    [
        (TargetLayers((2, 16, 29), "before"), 32, (1, 15, 28)),
        (TargetLayers((1, 15, 28), "output"), 32, (1, 15, 28)),
        (TargetLayers((24, 30, 36), "nvidia"), 36, (23, 29, 35)),  # gpt-oss's: the last is what the last layer gives
        (TargetLayers((), "guessed"), 32, (1, 15, 28)),
        (TargetLayers(()), 32, ()),
    ],
)
def test_layers_are_counted_in_three_ways(layers, n, taps):
    assert layers.taps(n) == taps


def test_each_dialect_says_which_layers_it_reads(tmp_path):
    assert read_draft(flat(tmp_path / "a")).layers.counted == "guessed"
    nested = {"eagle_aux_hidden_state_layer_ids": [1, 15, 28], "norm_before_fc": True}
    draft = read_draft(flat(tmp_path / "b", nested))
    assert draft.layers == TargetLayers((1, 15, 28), "nvidia")
    assert draft.form.feature_norms == "whole"
    assert read_draft(flat(tmp_path / "c", {"use_aux_hidden_state": False})).form.final
    with pytest.raises(PairIncompatible, match="reads the layers 1, 15, 28 of a target that has 16"):
        draft.layers.taps(16)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"medusa_num_heads": 5}, "a set of Medusa heads"),
        ({"speculators_model_type": "dflash", "draft_vocab_size": 9}, "a DFlash draft"),
        ({"model_type": "qwen3", "dflash_config": {}}, "a DFlash draft"),
        ({"model_type": "mlp_speculator"}, "an MLP speculator"),
        ({"architectures": ["DSparkDraftModel"]}, "a DSpark draft"),
    ],
)
def test_other_kinds_are_named_with_what_runs_them(config, said, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelUnavailable, match=said) as caught:
        read_draft(tmp_path)
    assert "vLLM" in caught.value.hint


def test_a_damaged_head_says_what_is_wrong(tmp_path):
    folder = flat(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"d2t": torch.zeros(48, dtype=torch.int64) + 200}, folder / "model.safetensors")
    with pytest.raises(ModelUnavailable, match="d2t gives a token twice, or one that there is none of"):
        read_draft(folder)
    save_file({name: t for name, t in tensors.items() if "hidden_norm" not in name}, folder / "model.safetensors")
    with pytest.raises(ModelUnavailable, match="EAGLE-1 or EAGLE-2"):
        read_draft(folder)


def test_a_tensor_that_would_be_left_out_is_an_error(tmp_path):
    folder = flat(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"midlayer.mlp.up_proj.bias": torch.zeros(48)}, folder / "model.safetensors")
    with pytest.raises(ModelUnavailable, match=r"does not know, the first layers.0.mlp.up_proj.bias"):
        head_weights(read_draft(folder))


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def theirs(target, tmp_path_factory):
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    return save_eagle_head(tmp_path_factory.mktemp("eagle"), model, model.config.vocab_size)


OPTIONS = LoadOptions(device="cpu", dtype="float32", threads=1)


@pytest.mark.parametrize("draft", ["{}", "ngram,{}", "head:{}"])
def test_a_folder_is_known_for_a_head_and_drafts_losslessly(draft, target, theirs):
    pair = load_pair(str(target), draft.format(theirs), OPTIONS)
    prompt = pair.encode("What is a lighthouse?")
    plain = emitted(list(load_pair(str(target), "none", OPTIONS).decode(prompt, k=0, max_tokens=40)))
    found = list(pair.decode(prompt, k=3, max_tokens=40))
    assert emitted(found) == plain
    assert sum(len(c.drafted) for c in cycles(found)) > 40


def test_check_says_what_a_head_reads_and_whom_it_fits(target, theirs, tmp_path):
    fit = check(str(target), str(theirs), OPTIONS)
    assert fit.fits
    assert any("reads what the layers 0, 1 of the target give" in finding.said for finding in fit.findings)
    other = check(str(target), str(RECORDED / "plain"), OPTIONS)
    assert not other.fits
    silent = shutil.copytree(theirs, tmp_path / "silent")
    about = json.loads((silent / "config.json").read_text("utf-8"))
    del about["eagle_config"]
    (silent / "config.json").write_text(json.dumps(about))
    assert "reads the layers 1, 0, -2" in check(str(target), str(silent), OPTIONS).findings[-1].said
    with pytest.raises(PairIncompatible, match="reads the layers"):
        load_pair(str(target), str(silent), OPTIONS)


def test_a_pickled_head_is_refused_with_the_way_out(target, theirs, tmp_path):
    folder = shutil.copytree(theirs, tmp_path / "pickled")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelUnavailable, match="only pickled ones") as caught:
        load_pair(str(target), str(folder), OPTIONS)
    assert "RedHatAI" in caught.value.hint


def test_a_head_is_no_target(theirs):
    with pytest.raises(UsageError, match="is a draft head"):
        load_pair(str(theirs), "ngram", OPTIONS)


DAMAGE = {
    "no width": {"hidden_size": None},
    "a wrong size of heads": {"head_dim": 6},
    "a word for a number": {"head_dim": "8"},
    "a wrong count of heads": {"num_attention_heads": 3},
    "a wrong count of ids": {"draft_vocab_size": 47},
    "a list for a section": {"eagle_config": [1]},
    "another list for a section": {"speculators_config": [1]},
}


@pytest.mark.parametrize("more", DAMAGE.values(), ids=DAMAGE)
def test_a_config_that_is_wrong_is_said_to_be_damaged(more, target, theirs, tmp_path):
    folder = shutil.copytree(theirs, tmp_path / "odd")
    about = json.loads((folder / "config.json").read_text("utf-8")) | more
    (folder / "config.json").write_text(json.dumps({k: v for k, v in about.items() if v is not None}))
    with pytest.raises(ModelUnavailable, match="is damaged"):
        load_pair(str(target), str(folder), OPTIONS)
    with pytest.raises(ModelUnavailable, match="is damaged") if more != {"head_dim": 6} else nullcontext():
        assert check(str(target), str(folder), OPTIONS)


TENSORS = {
    "embeddings with too few rows": lambda t, d: t | {"embed_tokens.weight": torch.zeros(7, d)},
    "norms of features that the config does not name": lambda t, d: t | {"input_norm.weight": torch.ones(2 * d)},
    "a bias of another size": lambda t, d: t | {f"midlayer.self_attn.{p}_proj.bias": torch.zeros(3) for p in "qkv"},
    "a number that is none": lambda t, d: t | {"norm.weight": torch.full((d,), float("nan"))},
}


@pytest.mark.parametrize("change", TENSORS.values(), ids=TENSORS)
def test_tensors_that_do_not_belong_together_are_found_before_a_run(change, target, theirs, tmp_path):
    folder = shutil.copytree(theirs, tmp_path / "odd")
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors, tensors["norm.weight"].shape[0]), folder / "model.safetensors")
    with pytest.raises(ModelUnavailable, match="is damaged"):
        load_pair(str(target), str(folder), OPTIONS)


def test_a_head_narrower_than_its_target_drafts(target, tmp_path):
    """With embeddings and rows of its own, in the speculators library's dialect."""
    wide = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    narrow = tiny_llama(vocab=wide.config.vocab_size, hidden=16)
    folder = save_eagle_head(tmp_path / "narrow", narrow, wide.config.vocab_size)
    tensors = load_file(folder / "model.safetensors")
    d, width = narrow.config.hidden_size, wide.config.hidden_size
    tensors |= {
        "fc.weight": torch.randn(d, 2 * width) * 0.3,
        "embed_tokens.weight": torch.randn(wide.config.vocab_size, d),
    }
    tensors = {name.replace("midlayer.", "layers.0."): tensor for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors")
    layer = json.loads((folder / "config.json").read_text("utf-8"))
    ids = layer.pop("draft_vocab_size")
    del layer["eagle_config"]
    about = {
        "speculators_model_type": "eagle3", "transformer_layer_config": layer, "draft_vocab_size": ids,
        "eagle_aux_hidden_state_layer_ids": [1, 2], "target_hidden_size": width,
        "speculators_config": {"verifier": {"name_or_path": "org/another"}},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(about))
    found = list(load_pair(str(target), str(folder), OPTIONS).decode([5, 6, 7], k=2, max_tokens=20))
    assert sum(len(c.drafted) for c in cycles(found)) > 10
    said = [finding.said for finding in check(str(target), str(folder), OPTIONS).findings]
    assert any("it was made for org/another" in one for one in said)


def test_a_folder_of_another_kind_is_named_whatever_it_lacks(target, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"medusa_num_heads": 5, "model_type": "llama"}))
    (tmp_path / "medusa_lm_head.pt").touch()
    with pytest.raises(ModelUnavailable, match="a set of Medusa heads"):
        check(str(target), str(tmp_path), OPTIONS)
