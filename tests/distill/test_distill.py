"""Distilling from a real, if tiny, target: the text it writes, what training computes, and that the result drafts."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from itertools import takewhile
from math import prod
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from specdec_engine.core.cycle_types import Sampling
from specdec_engine.core.randomness import KeyedRandomness
from specdec_engine.decoding.control import Controls
from specdec_engine.decoding.loop import decode
from specdec_engine.decoding.stopping import Stop
from specdec_engine.distill.batch import Batch
from specdec_engine.distill.documents import read_documents
from specdec_engine.distill.export import save_head
from specdec_engine.distill.head import Head, HeadShape
from specdec_engine.distill.lanes import BatchLanes, RunLanes
from specdec_engine.distill.recipe import Recipe, taps
from specdec_engine.distill.recorded import read_recordings
from specdec_engine.distill.run import Training, Writing, check_target, distill
from specdec_engine.distill.shards import read
from specdec_engine.distill.students import shape_of
from specdec_engine.distill.synthesis import Limits, _Scribe, turns
from specdec_engine.distill.trainer import Trainer
from specdec_engine.distill.training import (
    LEAST,
    MOST_STEPS,
    REJECTED,
    SHARPER,
    Estimate,
    Teacher,
    batches,
    estimate,
    loss_of,
    shared_prefix,
)
from specdec_engine.distill.training import Batch as TrainingBatch
from specdec_engine.drafters.context_ids import ContextIds
from specdec_engine.errors import GenerationFailed, ModelUnavailable, PairIncompatible, UsageError
from specdec_engine.models.draft_files import head_weights, read_draft
from specdec_engine.models.loading import find_model
from specdec_engine.models.options import LoadOptions
from specdec_engine.pair import load_pair
from specdec_engine.record.events import Started
from specdec_engine.record.trace import TraceWriter
from specdec_engine.runtime.head import Features, HeadForm, HeadForward, State, head_shape
from specdec_engine.runtime.head_runtime import HeadRuntime
from specdec_engine.system.timing import HostTimer
from tests.fakes import CPU, FakeClock, byte_tokenizer, cycles, emitted, lean, save_checkpoint, tiny_llama
from tests.models.test_architectures import build

OPTIONS = LoadOptions(dtype="float32", device="cpu", quantize="none")


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    vocab = len(byte_tokenizer())
    return save_checkpoint(tmp_path_factory.mktemp("target") / "t", layers=4, vocab=vocab, max_position_embeddings=512)


@pytest.fixture(scope="module")
def made(target, tmp_path_factory):
    """One small head and one small model, each with its progress."""
    found = find_model(str(target), OPTIONS)
    loaded, drafts = found.load(), {}
    for kind in ("head", "model"):
        out = tmp_path_factory.mktemp("drafts") / kind
        with pytest.MonkeyPatch.context() as patched:
            if kind == "model":
                patched.setattr("specdec_engine.distill.run.PASSES", 2)  # a step takes 3 s, and a head's 0.5
            drafts[kind] = out, list(distill(found, loaded, Recipe(out, kind, "small", tokens=18_000)))
    return drafts


@pytest.mark.parametrize("kind", [RunLanes, BatchLanes])
def test_lanes_say_what_each_text_says_alone(kind):
    """Begun with several tokens, with one, and anew."""
    net = tiny_llama(layers=3)
    alone, runtime = lean(net), lean(net)
    alone.tap((0, 2))
    lanes = kind(runtime, (0, 2), *([64] if kind is BatchLanes else []))
    texts = {0: [5, 9, 200, 7, 7, 31], 3: [17], 7: [3, 4]}
    for again in (False, True):
        for lane, text in texts.items():
            lanes.begin(lane, text)
        for _ in range(3):
            logits = lanes.step({lane: text[-1] for lane, text in texts.items()})
            for said, (lane, text) in zip(logits, texts.items(), strict=True):
                alone.rollback(0)
                assert torch.allclose(said, alone.forward(torch.tensor(text), 1)[0], atol=1e-4)
                assert torch.allclose(lanes.features(lane), alone.features(0, len(text)), atol=1e-4)
                text.append(int(said.argmax()))
        texts = {0: [8, 8], 7: texts[7]} if not again else texts


@pytest.mark.parametrize("model", ["llama", "qwen3"])
def test_many_sequences_at_once_say_what_each_says_alone(model):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(1)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "head_dim": 8}
    config = Qwen3Config(**sizes, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3)
    net = tiny_llama(vocab=97, layers=3) if model == "llama" else Qwen3ForCausalLM(config).eval()
    runtime = lean(net)
    together = Batch(runtime.decoder, 3, 64, (0, 2))
    rows = torch.randint(0, 97, (3, 40), generator=torch.Generator().manual_seed(2))
    for i in range(40):
        logits, features = together.step(rows[:, i], torch.full((3,), i))
    runtime.tap((0, 2))
    for row in range(3):
        runtime.rollback(0)
        alone = runtime.forward(rows[row], 1)
        assert torch.allclose(logits[row], alone[0], atol=1e-4)
        assert torch.allclose(features[row], runtime.features(39, 40)[0], atol=1e-4)


def test_slots_start_over_without_a_trace():
    runtime = lean(tiny_llama())
    batch = Batch(runtime.decoder, 2, 64, ())
    for i in range(20):
        batch.step(torch.tensor([7, 9]), torch.tensor([i, i]))
    logits, _ = batch.step(torch.tensor([5, 9]), torch.tensor([0, 20]))
    assert torch.allclose(logits[0], runtime.forward(torch.tensor([5]), 1)[0], atol=1e-4)


def test_what_cannot_write_text_for_a_draft_is_refused_before_its_weights_are_read(tmp_path, monkeypatch):
    from tests.models import checkpoints

    monkeypatch.setattr("specdec_engine.models.loading.load_weights", lambda *_: pytest.fail("weights were read"))
    for kind, device, said in (
        ("granite", "cuda", r"\(granite\) on a CPU alone"),
        ("gpt2", "cpu", "needs the lean or the graph runtime"),
    ):
        checkpoints.save(kind, tmp_path / kind)
        with pytest.raises(UsageError, match=said):
            check_target(replace(find_model(str(tmp_path / kind), OPTIONS), device=torch.device(device)))


KIN: dict[str, dict[str, Any]] = {
    "CohereConfig": {"logit_scale": 0.3},
    "Gemma2Config": {"query_pre_attn_scalar": 12, "final_logit_softcapping": 2.0},
    "GptOssConfig": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "GraniteConfig": {"logits_scaling": 2.5, "residual_multiplier": 0.3},
    "Qwen3MoeConfig": {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2},
}


@pytest.mark.parametrize("kind", KIN)
def test_a_head_learns_what_each_kind_of_target_says(kind, tmp_path):
    """Its scaled and capped logits; and the head that was made drafts for it without changing a word."""
    sizes = {
        "vocab_size": len(byte_tokenizer()),
        "head_dim": 8,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    }
    model = build(kind, {**sizes, **KIN[kind]})
    model.save_pretrained(tmp_path / "t")
    byte_tokenizer().save_pretrained(tmp_path / "t")
    found = find_model(str(tmp_path / "t"), OPTIONS)
    runtime, tokens = found.load().runtime, torch.arange(5, 35)
    runtime.tap((0,))
    logits = runtime.forward(tokens, 30)
    rows = found.output_rows(slice(None))
    batch = SimpleNamespace(features=runtime.features(0, 30)[None], counts=torch.ones(1, 29, dtype=torch.bool))
    teacher = Teacher(rows, torch.arange(len(rows)), scales=runtime.decoder.shape.scales)
    said = teacher.logits(batch, SimpleNamespace(rows=rows, masked=lambda logits: logits))
    assert torch.allclose(said, logits[1:], atol=1e-3)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("specdec_engine.distill.run.PASSES", 1)
        events = list(distill(found, found.load(), Recipe(tmp_path / "draft", "head", "small", tokens=3000)))
    assert isinstance(events[-1], Training)
    prompt = [5, 6, 7, 8, 5, 6, 7]
    plain, ours = (load_pair(str(tmp_path / "t"), draft, OPTIONS) for draft in ("none", str(tmp_path / "draft")))
    assert emitted(ours.decode(prompt, k=3, max_tokens=20)) == emitted(plain.decode(prompt, k=0, max_tokens=20))
    # And it says what it said in training.
    draft = read_draft(tmp_path / "draft")
    head, table = Head(shape_of(draft)), found.tensor("model.embed_tokens.weight").float()
    head.load_state_dict(head_weights(draft))
    for first in range(5, 15):
        text = [first, *prompt]
        ours.target.prefill(text[:-1])
        ours.drafter.begin(text)
        said = ours.drafter.propose(text, 1, Sampling(), KeyedRandomness(0)).tokens.tolist()
        features = ours.target.runtime.features(0, len(text) - 1)[None].float()
        with torch.no_grad():
            state = head(features, table[torch.tensor(text[1:])][None], 1)[0][0, -1]
        ids = ours.drafter._ids.ids
        assert said == [int(ids[(rows[ids].float() @ state).argmax()])]


def test_the_template_is_split_around_a_users_words():
    tokenizer = byte_tokenizer()
    found = turns(tokenizer)
    assert tokenizer.decode(found.before) == "<|im_start|>user\n"
    assert tokenizer.decode(found.after) == "<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(found.between) == "<|im_end|>\n<|im_start|>user\n"
    with pytest.raises(UsageError, match="no chat template"):
        turns(byte_tokenizer(chat=False))


@pytest.mark.parametrize("normed", [False, True])
def test_the_head_in_use_computes_what_the_head_in_training_computes(normed):
    """Step by step: true features first, then its own states; one slot at a time and several."""
    torch.manual_seed(0)
    shape = HeadShape(32, 3, 4, 2, 8, 48, 1e-5, 10000.0, normed)
    head = Head(shape)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    target = lean(tiny_llama())
    rows = torch.randn(50, 32)
    config = {
        "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 50,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    }  # fmt: skip
    weights = dict(head.state_dict())
    form = HeadForm(output_normed=normed)
    forward = HeadForward(
        head_shape(config), weights, target.decoder.embedding, rows, torch.float32, CPU, "none", form=form
    )
    features, tokens = torch.randn(1, 9, 3, 32), torch.randint(0, 300, (10,))
    with torch.no_grad():
        trained = head(features, target.decoder.embedding(tokens[1:])[None], 3)
    runtime = HeadRuntime(forward, 4)
    runtime.forward(features[0, :4], tokens[1:5])
    with torch.inference_mode():
        read = Features(features[0, 4:7])
        for step, at in enumerate((slice(5, 8), slice(8, 9), slice(9, 10))):
            logits, state = runtime._step(read, tokens[at])
            assert torch.allclose(logits[0], trained[step][0, 6 + step] @ rows.T, atol=1e-3)
            read = State(state)


@pytest.mark.parametrize("normed", [False, True])
def test_a_head_goes_on_in_the_form_that_it_was_made_in(tmp_path, normed):
    shape = HeadShape(32, 3, 4, 2, 8, 48, 1e-5, 10000.0, normed)
    save_head(tmp_path, Head(shape), torch.arange(50), (0, 2), byte_tokenizer(), {})
    draft = read_draft(tmp_path)
    assert shape_of(draft) == shape
    assert draft.form == HeadForm(output_normed=normed)


@pytest.mark.parametrize("kind", ["head", "model"])
def test_a_distilled_draft_drafts_losslessly(made, target, kind):
    """And some of its tokens are accepted: a random target's favourites are learnt in seconds."""
    out, steps = made[kind]
    assert isinstance(steps[0], Writing)
    assert isinstance(steps[-1], Training)
    assert steps[-1].share == 1.0
    config = json.loads((out / "config.json").read_text())
    assert config["specdec_draft"]["kind"] == kind
    pair = load_pair(str(target), str(out), OPTIONS)
    plain = load_pair(str(target), "none", OPTIONS)
    prompt = pair.encode("What is a lighthouse?")
    runs = [pair.decode(prompt, k=3, sampling=Sampling(0.7), max_tokens=60, seed=seed) for seed in range(3)]
    assert sum(c.accepted for run in runs for c in cycles(list(run))) > 0
    found = pair.decode(prompt, k=3, max_tokens=60)
    assert emitted(list(found)) == emitted(list(plain.decode(prompt, k=0, max_tokens=60)))


def test_a_draft_goes_on_learning_after_it_was_written(made, target, tmp_path):
    """Measured, saved and exported after every step, as a long run does every few minutes."""
    for kind in ("head", "model"):
        found = find_model(str(target), OPTIONS)
        loaded, recipe = found.load(), Recipe(tmp_path / kind, kind, "small", tokens=18_000)
        shutil.copytree(made[kind][0] / "work" / "text", recipe.work.text)
        shard = read(next(recipe.work.text.iterdir()))
        ids = torch.arange(0, loaded.runtime.vocab, 2)
        trainer = Trainer(found, loaded, loaded.runtime.decoder, recipe, ids, [shard])
        for batch, _ in zip(batches([shard], 1, 512), range(3), strict=False):
            assert trainer.step(batch, 0.5) > 0
            trainer.save()
            trainer.export(1, trainer.measure())


@pytest.mark.parametrize("kind", ["head", "model"])
def test_a_second_run_follows_one_that_outgrew_its_caches(made, target, kind):
    pair = load_pair(str(target), str(made[kind][0]), replace(OPTIONS, tokens=1))
    prompt = pair.encode("What is a lighthouse? " * 8)
    first, second = (emitted(list(pair.decode(prompt, k=3, max_tokens=80))) for _ in range(2))
    assert first == second


def test_a_distilled_model_is_an_ordinary_checkpoint(made):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out, _ = made["model"]
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model(torch.tensor([[1, 2, 3]])).logits.shape[-1] == model.config.vocab_size
    assert len(AutoTokenizer.from_pretrained(out)) == len(byte_tokenizer())


def test_the_same_command_goes_on(made, target):
    """All text is there: nothing is written anew, and training goes on from its last state."""
    out, steps = made["head"]
    found = find_model(str(target), OPTIONS)
    before = {file: file.stat().st_mtime_ns for file in (out / "work" / "text").iterdir()}
    again = list(distill(found, found.load(), Recipe(out, "head", "small", tokens=18_000)))
    assert {file: file.stat().st_mtime_ns for file in (out / "work" / "text").iterdir()} == before
    assert again[-1].step == steps[-1].step


def test_prompts_of_every_kind_are_answered_at_every_temperature(target):
    """Long or short, with an opening or without: eight kinds."""
    loaded = find_model(str(target), OPTIONS).load()
    asked = turns(loaded.tokenizer)
    scribe = _Scribe(loaded, Limits(), asked, None, None, random.Random(0), 512)
    texts = [scribe.fresh() for _ in range(300)]
    kinds = {
        (text.prompt.end - len(text.tokens), text.temperature, len(text.tokens) > len(asked.before)) for text in texts
    }
    assert len(kinds) == 8
    assert all(text.prompt.subject_end > len(text.tokens) for text in texts)


def test_a_user_goes_on_after_an_answer_once_at_most(target):
    loaded = find_model(str(target), OPTIONS).load()
    asked, dice = turns(loaded.tokenizer), random.Random(1)
    scribe = _Scribe(loaded, Limits(), asked, None, None, dice, 512)
    stop, went_on = next(iter(loaded.stop_ids)), 0
    for _ in range(60):
        text = scribe.fresh()
        for token in (65, 66, stop, 67, stop, 68, stop, 69, stop):
            if not text.ended:
                scribe.take(text, token)
        said = loaded.tokenizer.decode(text.tokens)
        went_on += said.count("<|im_start|>user") == 2
        assert said.count("<|im_start|>user") <= 2
        assert said.count("<|im_start|>user") == said.count("<|im_start|>assistant")
        assert text.answer == len(text.tokens) - 2
    assert 5 < went_on < 30


def test_text_is_conversations_with_their_features(made, target):
    shard = read(next((made["head"][0] / "work" / "text").glob("*.safetensors")))
    loaded = find_model(str(target), OPTIONS).load()
    loaded.runtime.tap(taps(4))
    start, end = int(shard.starts[3]), int(shard.starts[4])
    loaded.runtime.forward(shard.tokens[start:end].long(), 1)
    assert torch.allclose(
        loaded.runtime.features(0, end - start), shard.features[start:end].float(), rtol=0.01, atol=1e-3
    )
    asked = turns(loaded.tokenizer)
    tokens = shard.tokens[start : int(shard.answers[3])].tolist()
    assert tokens[: len(asked.before)] == asked.before
    assert tokens[-len(asked.after) :] == asked.after


def test_prompts_may_be_given_and_come_to_an_end(target, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "one"}\n{"turns": ["two", "x"]}\n"three"\n')
    found = find_model(str(target), OPTIONS)
    recipe = Recipe(tmp_path / "draft", "head", "small", tokens=1_000_000, data=file)
    next(distill(found, found.load(), recipe))
    steps = distill(found, found.load(), recipe)
    notes = [step.note for step in takewhile(lambda step: isinstance(step, Writing), steps) if step.note]
    assert notes[0] == "of 3 conversations, 1 with later turns: each is asked its first turn alone"
    assert notes[1].startswith("all 3 prompts are answered, in ")
    shard = read(next(recipe.work.text.iterdir()))
    prompts = [found.tokenizer.decode(shard.tokens[a:b]) for a, b in zip(shard.starts, shard.answers, strict=False)]
    assert {f"<|im_start|>user\n{p}<|im_end|>\n<|im_start|>assistant\n" for p in ("one", "two", "three")} == set(
        prompts
    )


def test_prompts_serve_a_target_without_a_chat_template(tmp_path):
    plain = byte_tokenizer(chat=False)
    folder = save_checkpoint(tmp_path / "t", layers=4, vocab=len(plain), tokenizer=plain, max_position_embeddings=512)
    file = tmp_path / "prompts.txt"
    file.write_text("one\ntwo\n")
    found = find_model(str(folder), OPTIONS)
    steps = distill(found, found.load(), Recipe(tmp_path / "a", "head", "small", tokens=10**6, data=file))
    assert isinstance(next(steps), Writing)
    assert next(steps).tokens > 0
    with pytest.raises(UsageError, match="no chat template"):
        list(distill(found, found.load(), Recipe(tmp_path / "b", "head", "small", tokens=100)))


def test_documents_are_asked_about(target, tmp_path):
    folder = tmp_path / "texts"
    (folder / "more").mkdir(parents=True)
    sentence = "The old lighthouse on the northern cape was lit by hand every evening for a hundred years."
    (folder / "one.txt").write_text(" ".join([sentence] * 4) + "\n\nToo short.\n")
    (folder / "more" / "two.md").write_text(" ".join([sentence.replace("cape", "hill")] * 30))
    (folder / "picture.png").write_bytes(b"\x89PNG\0\xff")
    documents = read_documents(folder)
    assert documents.note == f"1 file of 3 in {folder} hold no text, and are left out"
    assert all(30 <= len(passage.split()) <= 200 for passage in documents.passages)
    assert len(documents.passages) == 4
    requests = [documents.request(i) for i in range(300)]
    assert {request.goes_on for request in requests} == {True, False}
    assert all("lighthouse" in request.text and "{" not in request.text for request in requests)
    assert all(len(documents.request(i, 0.2).text) < len(documents.request(i).text) for i in range(0, 300, 7))
    found = find_model(str(target), OPTIONS)
    scribe = _Scribe(found.load(), Limits(), turns(found.tokenizer), None, documents, random.Random(1), 512)
    assert all(len(scribe._words(scribe._about_text(documents))) <= 256 for _ in range(100))
    recipe = Recipe(tmp_path / "draft", "head", "small", tokens=4_000, documents=folder)
    steps = distill(found, found.load(), recipe)
    assert next(steps).note == documents.note
    for step in steps:
        if isinstance(step, Training):
            break
    shard = read(next(recipe.work.text.iterdir()))
    prompts = [found.tokenizer.decode(shard.tokens[a:b]) for a, b in zip(shard.starts, shard.answers, strict=False)]
    assert any("lighthouse" in prompt for prompt in prompts)
    assert not all("lighthouse" in prompt for prompt in prompts)


def test_documents_without_a_paragraph_are_refused(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        read_documents(tmp_path / "nowhere")
    (tmp_path / "short.txt").write_text("Not much.\n")
    with pytest.raises(UsageError, match="no paragraph of 30 words"):
        read_documents(tmp_path)


@pytest.mark.parametrize("better", [True, False])
def test_a_head_goes_on_from_another_and_learns_from_recorded_runs(made, target, tmp_path, monkeypatch, better):
    """It begins as that was, with the same ids, and is written where it is better on held-out text."""
    judged = iter([0.5, *[0.6 if better else 0.4] * 1000])
    monkeypatch.setattr(Trainer, "measure", lambda self: Estimate((next(judged),) * 5, ()))
    out, _ = made["head"]
    pair, trace = load_pair(str(target), "none", OPTIONS), tmp_path / "runs.jsonl"
    with TraceWriter(trace) as writer:
        for seed in range(20):
            for event in pair.decode(pair.encode(f"Tell me of {seed}"), k=0, max_tokens=60, seed=seed):
                writer.write(event)
    found = find_model(str(target), OPTIONS)
    loaded = found.load()
    recipe = Recipe(tmp_path / "on", minutes=0.1, runs=(trace,), draft=str(out))
    if better:
        assert isinstance(list(distill(found, loaded, recipe))[-1], Training)
    else:
        with pytest.raises(GenerationFailed, match="no better on held-out text than before"):
            list(distill(found, loaded, recipe))
        with pytest.raises(GenerationFailed, match="no better on held-out text than before"):
            list(distill(found, loaded, replace(recipe, minutes=0.2)))  # nor was it written by the first
        assert [file.name for file in recipe.out.iterdir()] == ["work"]
        return
    trained = json.loads(next((recipe.work.folder).glob("state-*/trained.json")).read_text())
    assert trained["best"] == Estimate((0.6,) * 5, ()).emitted(3)
    shard = read(next(recipe.work.runs.iterdir()))
    assert len(shard.answers) == 20
    said = pair.encode("Tell me of 0")
    assert shard.tokens[: len(said)].tolist() == list(said)
    before, after = read_draft(out), read_draft(recipe.out)
    assert torch.equal(before.ids, after.ids)
    trainer = Trainer(
        found, loaded, loaded.runtime.decoder, replace(recipe, out=tmp_path / "x"), before.ids, [shard], before
    )
    kept = load_file(out / "model.safetensors")
    assert all(
        torch.equal(tensor.to(torch.bfloat16), kept[name])
        for name, tensor in trainer._student.module.state_dict().items()
    )


def test_what_cannot_be_gone_on_from_says_so(made, target, tmp_path):
    found = find_model(str(target), OPTIONS)
    loaded, out = found.load(), tmp_path / "d"
    for recipe, said in (
        (Recipe(out, tokens=100, draft=str(made["model"][0])), "is no head that distill has made"),
        (Recipe(out, tokens=100, draft=str(target)), "is no head that distill has made"),
        (Recipe(out, tokens=100, draft="ngram"), "ngram is no head that distill has made"),
    ):
        with pytest.raises(UsageError, match=said):
            next(distill(found, loaded, recipe))
    with pytest.raises(PairIncompatible, match="another tokenizer"):
        next(distill(found, loaded, Recipe(out, tokens=100, draft="builtin")))
    for wrong in (
        {"tokens": 5, "draft": "builtin", "size": "small"},
        {"tokens": 5, "draft": "builtin", "kind": "model"},
        {"tokens": 5, "runs": (out,)},
        {"minutes": 1, "runs": (out,), "documents": out},
        {"minutes": 1, "data": out, "documents": out},
    ):
        with pytest.raises(UsageError):
            Recipe(out, **wrong)


def test_runs_of_another_target_are_left_out(target, tmp_path):
    trace = tmp_path / "other.jsonl"
    with TraceWriter(trace) as writer:
        writer.write(Started((1, 2), {"target": "other"}, 0))
    with pytest.raises(UsageError, match=f"there is no run of {target}") as raised:
        read_recordings([trace], str(target), 300)
    assert "1 run of other" in raised.value.hint


@pytest.mark.parametrize(
    "rubbish", [b"one\n{broken\n", b'{"prompt": 5}\n', b"\xff\xfe\n", b"[]\n{}\n", b'{"turns": 7}\n']
)
def test_rubbish_for_prompts_is_refused(target, tmp_path, rubbish):
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(rubbish)
    found = find_model(str(target), OPTIONS)
    with pytest.raises(UsageError, match="prompts"):
        next(distill(found, found.load(), Recipe(tmp_path / "b", "head", "small", tokens=100, data=file)))


def test_a_file_without_prompts_says_so(target, tmp_path):
    file = tmp_path / "prompts"
    file.write_text("\n\n")
    found = find_model(str(target), OPTIONS)
    with pytest.raises(UsageError, match="has no prompts"):
        next(distill(found, found.load(), Recipe(tmp_path / "b", "head", "small", tokens=100, data=file)))


def test_prompts_count_in_training_and_answers_alone_in_the_estimate(made, target):
    """Slot t predicts token t + 2; the template that all conversations begin with is nobody's choice."""
    shard = read(next((made["head"][0] / "work" / "text").glob("*.safetensors")))
    before = turns(find_model(str(target), OPTIONS).tokenizer).before
    assert shared_prefix(shard) == len(before)
    whole, answers = (next(batches([shard], 0, prompts=p)).counts for p in (True, False))
    assert not (answers & ~whole).any()
    assert {int(row.nonzero()[0]) for row in whole} == {max(len(before) - 2, MOST_STEPS)}
    firsts = {max(int(a - s) - 2, MOST_STEPS) for a, s in zip(shard.answers, shard.starts, strict=False)}
    assert {int(row.nonzero()[0]) for row in answers} <= firsts


def test_one_folder_takes_every_kind_and_size_of_one_target_only(made, target, tmp_path):
    out, _ = made["head"]
    found = find_model(str(target), OPTIONS)
    loaded = found.load()
    for recipe in (Recipe(out, "model", "small", tokens=18_000), Recipe(out, "head", "medium", tokens=18_000)):
        assert next(s for s in distill(found, loaded, recipe) if isinstance(s, Training)).step == 1
    other = find_model(str(save_checkpoint(tmp_path / "o", layers=4, vocab=len(byte_tokenizer()))), OPTIONS)
    with pytest.raises(UsageError, match="holds text of"):
        next(distill(other, other.load(), Recipe(out, "head", "small", tokens=18_000)))


class Told:
    """A student whose every prediction is known."""

    module = torch.nn.Linear(1, 1)

    def __init__(self, right):
        self.right = right  # [steps][T] bool

    def states(self, batch, steps):
        said = torch.cat([batch.tokens[:, 2:], torch.zeros_like(batch.tokens[:, :1])], 1)
        return [torch.where(row, said, said + 1)[..., None] for row in self.right[:, None]]

    def logits(self, states, columns):
        return torch.nn.functional.one_hot(states[:, 0], 20).float() * 50


def test_the_estimate_counts_as_a_draft_would():
    """Agreement at position s + 1 given that all before agreed: each draft begins at a slot of its own."""
    tokens = torch.arange(8)[None]
    counts = torch.ones(1, 7, dtype=torch.bool)
    right = torch.tensor([[1, 1, 0, 1, 1, 0, 1], [0, 1, 0, 1, 1, 1, 0]], dtype=torch.bool)
    batch = TrainingBatch(tokens, torch.zeros(1, 8, 1, 4), counts)
    found = estimate(Told(right), Teacher(torch.zeros(20, 4), torch.arange(20)), [batch], 2)
    # Slots 0 to 5 have a known next token; 0, 1, 3, 4 are right. Their second tokens are those of slots 1, 2, 4, 5.
    assert found.agreement == (4 / 6, 3 / 4)
    assert found.emitted(2) == pytest.approx(1 + 4 / 6 + 4 / 6 * 3 / 4)
    assert Estimate((0.5, 0.5), ()).emitted(2) == 1.75


class Learnt(Told):
    """A student whose logits are its parameters."""

    def __init__(self, logits):
        self.parameters = logits  # [steps][B, T, V]

    def states(self, batch, steps):
        return list(self.parameters)

    def logits(self, states, columns):
        return states


def direct_loss(given, wanted, counts, said):
    """The loss as the docstrings have it, slot by slot; said [B, T]: columns of what the target chose."""
    p, q = (wanted / SHARPER).softmax(-1), (given / SHARPER).softmax(-1)
    total, weight = 0.0, 0.0

    def accepted(step, row, at):
        column = said[row, at]
        return 0.0 if column < 0 else (q[step, row, at, column] / p[row, at, column]).item()

    for row, slot in counts.nonzero().tolist():
        for s in range(len(given)):
            before = [(s - 1 - i, slot - 1 - i) for i in range(s)]  # the steps and slots of the same draft
            if any(at < 0 or not counts[row, at] for _, at in before):
                continue
            chance = prod(min(1.0, accepted(step, row, at)) for step, at in before)
            if chance > LEAST:
                entropy = -(wanted[row, slot].softmax(-1) * given[s, row, slot].log_softmax(-1)).sum()
                rejected = 1 - torch.minimum(q[s, row, slot], p[row, slot]).sum()
                total, weight = total + chance * (entropy + REJECTED * rejected), weight + chance
    return total / weight


@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-4)])
def test_the_gradient_of_the_loss_is_the_one_that_autograd_finds(dtype, within):
    """Over more slots than one slice of them, some of which do not count, each by the chance that a draft gets there."""
    torch.manual_seed(0)
    features = torch.randn(2, 101, 1, 6).to(dtype) * 2
    batch = TrainingBatch(torch.randint(0, 6, (2, 101)), features, torch.rand(2, 100) < 0.9)
    ids = torch.tensor([2, 0, 1, -1, 4, 5])  # by token: its column, if it has one
    logits = torch.randn(3, 2, 100, 6).to(dtype).requires_grad_()
    loss = loss_of(Learnt(logits), Teacher(torch.eye(6, dtype=dtype), ids), batch, 3)
    (found,) = torch.autograd.grad(loss, logits)
    said = torch.cat([ids[batch.tokens[:, 2:]], torch.zeros(2, 1, dtype=torch.long)], 1)
    direct = direct_loss(logits.float(), features[:, 1:, 0].float(), batch.counts, said)
    assert loss.item() == pytest.approx(direct.item())
    torch.testing.assert_close(found, torch.autograd.grad(direct, logits)[0], rtol=0.02, atol=within)


def test_ids_of_a_text_count_from_where_it_has_them():
    """As a draft in use has them: slot t's begins when token t + 1 is the newest."""
    every = torch.eye(10)
    ids = torch.tensor([0, 1, 2, -1, -1, -1, -1, -1, -1, -1])
    tokens = torch.tensor([[0, 7, 1, 5, 7, 2], [1, 1, 9, 0, 0, 0]])
    batch = TrainingBatch(tokens, torch.zeros(2, 6, 1, 10), torch.ones(2, 5, dtype=torch.bool))
    columns = Teacher(every[:3], ids, every).columns(batch)
    brought = columns.rows[3:].argmax(-1).tolist()
    assert sorted(brought) == [5, 7, 9]
    for slot, unseen in enumerate(columns.unseen):
        row, t = divmod(slot, 5)
        in_use = ContextIds(torch.arange(3), lambda found: every[found])
        in_use.read(tokens[row, : t + 2].tolist())
        assert {i for i, hidden in zip(brought, unseen.tolist(), strict=True) if not hidden} == set(
            in_use.ids.tolist()
        ) - {0, 1, 2}
    assert columns.masked(torch.zeros(10, 6))[columns.unseen.nonzero()[0, 0], 3:].min() < -1000


def test_a_batch_in_which_nothing_counts_teaches_nothing():
    logits = torch.randn(1, 1, 9, 6, requires_grad=True)
    batch = TrainingBatch(torch.zeros(1, 10, dtype=torch.long), torch.randn(1, 10, 1, 6), torch.zeros(1, 9) > 0)
    loss = loss_of(Learnt(logits), Teacher(torch.eye(6), torch.arange(6)), batch, 1)
    assert loss.item() == 0
    assert not torch.autograd.grad(loss, logits)[0].any()


def test_a_draft_made_for_another_target_is_refused(made, tmp_path):
    other = save_checkpoint(tmp_path / "o", tokenizer=byte_tokenizer(merges=["t h", "i n"]), vocab=262)
    with pytest.raises(PairIncompatible, match="made for another tokenizer"):
        load_pair(str(other), str(made["head"][0]), OPTIONS)


@pytest.mark.parametrize("options", [{}, {"minutes": 1.0, "tokens": 5}, {"tokens": 0}, {"minutes": -1.0}])
def test_a_recipe_needs_one_budget(options, tmp_path):
    with pytest.raises(UsageError):
        Recipe(tmp_path, **options)


@pytest.mark.parametrize(
    ("what", "value"),
    [
        ("hidden_size", None), ("head_dim", "x"), ("rope_theta", None), ("num_attention_heads", 3), ("vocab_size", 7),
        ("specdec_draft.taps", []), ("specdec_draft.taps", ["a"]), ("specdec_draft.taps", [0]),
        ("specdec_draft.taps", [-1]), ("specdec_draft.kind", "zzz"),
    ],
)  # fmt: skip
def test_a_damaged_head_is_refused_before_it_runs(made, target, tmp_path, what, value):
    folder = tmp_path / "damaged"
    shutil.copytree(made["head"][0], folder, ignore=shutil.ignore_patterns("work"))
    config = json.loads((folder / "config.json").read_text())
    section, _, name = what.rpartition(".")
    (config[section] if section else config)[name] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises((ModelUnavailable, PairIncompatible)):
        load_pair(str(target), str(folder), OPTIONS)


def test_a_head_of_no_numbers_is_refused(made, target, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(made["head"][0], folder, ignore=shutil.ignore_patterns("work"))
    weights = load_file(folder / "model.safetensors")
    weights["down.weight"][2, 3] = float("nan")
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ModelUnavailable, match=r"down\.weight has entries that are not finite numbers"):
        load_pair(str(target), str(folder), OPTIONS)


@pytest.mark.parametrize("ids", [[5, 5, 6], [3, 2, 9], [-1, 2, 3], [1, 2, 99999]])
def test_ids_that_come_twice_or_mean_nothing_are_refused(made, target, tmp_path, ids):
    """A token that came twice would be drawn with another probability than is reported for it."""
    folder = tmp_path / "damaged"
    shutil.copytree(made["head"][0], folder, ignore=shutil.ignore_patterns("work"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": len(ids)}))
    save_file({"target_ids": torch.tensor(ids, dtype=torch.int32)}, folder / "draft_vocab.safetensors")
    with pytest.raises((ModelUnavailable, PairIncompatible)):
        load_pair(str(target), str(folder), OPTIONS)


def test_two_heads_cannot_read_different_layers_of_one_target(made, target, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(made["head"][0], folder, ignore=shutil.ignore_patterns("work"))
    config = json.loads((folder / "config.json").read_text())
    config["specdec_draft"]["taps"] = [0, 1, 2]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(PairIncompatible, match="another draft head"):
        load_pair(str(target), f"{made['head'][0]},{folder}", OPTIONS)


@pytest.mark.parametrize("kind", ["head", "model"])
@pytest.mark.parametrize("ahead", [False, True])
def test_a_second_run_after_a_cancelled_one_is_as_a_fresh_pairs(made, target, kind, ahead):
    """p, q and u alike, not only the text: stale features or caches would leave the text right."""
    out, _ = made[kind]
    used, fresh = (load_pair(str(target), str(out), OPTIONS) for _ in range(2))
    prompts = [used.encode(text) for text in ("What is a lighthouse?", "Count to ten, please, and then back again.")]
    options = {"controls": None, "stop": Stop(40, used.stop_ids), "timer": HostTimer(FakeClock()), "ahead": ahead}

    def events(pair, prompt):
        made_of = {**options, "controls": Controls(3, Sampling(0.8)), "random": KeyedRandomness(4)}
        return decode(pair.target, pair.drafter, prompt, **made_of)

    for _, _ in zip(range(4), events(used, prompts[0]), strict=False):
        pass
    assert cycles(list(events(used, prompts[1]))) == cycles(list(events(fresh, prompts[1])))


def test_an_interruption_keeps_the_text_and_the_training(target, tmp_path):
    found = find_model(str(target), OPTIONS)
    loaded, recipe = found.load(), Recipe(tmp_path / "d", "head", "small", tokens=3_000)
    writing = distill(found, loaded, recipe)
    next(writing)
    tokens = next(writing).tokens
    writing.close()
    assert sum(len(read(f).tokens) for f in recipe.work.text.iterdir()) == tokens
    training = distill(found, loaded, recipe)
    step = next(s for s in training if isinstance(s, Training) and s.step == 3)
    training.close()
    again = distill(found, loaded, recipe)
    assert next(s for s in again if isinstance(s, Training)).step == step.step + 1


def test_a_draft_is_no_target(made, target):
    for kind in ("head", "model"):
        with pytest.raises(UsageError, match="draft"):
            load_pair(str(made[kind][0]), "none", OPTIONS)
    found = find_model(str(made["model"][0]), OPTIONS)
    with pytest.raises(UsageError, match="a draft itself"):
        next(distill(found, found.load(), Recipe(made["model"][0] / "x", tokens=100)))
