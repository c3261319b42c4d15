"""A context in another model's tokens, and its draft in the target's: three families of tokenizers against each other."""

from __future__ import annotations

import json
from itertools import permutations

import pytest
import torch

from specdec_engine.core.cycle_types import Sampling
from specdec_engine.errors import PairIncompatible
from specdec_engine.models.compatibility import check
from specdec_engine.models.options import LoadOptions
from specdec_engine.models.translation import Reading, Translation, decoded, encoded
from specdec_engine.pair import load_pair
from tests.fakes import byte_tokenizer, cycles, emitted, save_checkpoint, tiny_llama
from tests.families import FAMILIES, text

OPTIONS = LoadOptions(device="cpu", dtype="float32", threads=1)
PAIRS = list(permutations(FAMILIES, 2))
PAGE = text()[1][:1500] + "\n\nIt is 東京 🙂, as you know.\n\n    for i in range(10):\n        print(i)\n"


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_a_growing_context_reads_as_a_whole_one(ours, theirs):
    """Only the last words are encoded again, and yet the tokens are those of the whole text."""
    target, draft = FAMILIES[ours](), FAMILIES[theirs]()
    reading, ids = Reading(Translation(target, draft, theirs)), encoded(target, PAGE).ids
    for end in range(1, len(ids), 3):
        reading.follow(ids[:end])
        if reading.whole:
            begin = reading._of.begin
            assert reading.ids == begin + encoded(draft, decoded(target, ids[:end])).ids
    reading.follow(ids[:20])  # another context, and back
    reading.follow(ids)
    assert reading.ids == reading._of.begin + encoded(draft, decoded(target, ids)).ids


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_a_draft_that_knows_the_text_is_translated_into_it(ours, theirs):
    """Nearly always: a word that it ends within may be cut in other pieces."""
    target, draft = FAMILIES[ours](), FAMILIES[theirs]()
    of, ids = Translation(target, draft, theirs), encoded(target, PAGE).ids
    reading, whole = Reading(of), encoded(draft, decoded(target, ids)).ids
    right = proposed = 0
    for end in range(20, len(ids) - 8, 5):
        reading.follow(ids[:end])
        known = reading.ids[len(of.begin) :]
        if not reading.whole or whole[: len(known)] != known:
            continue
        found = of.proposed(*reading.tail, whole[len(known) :][:6])
        proposed += len(found)
        right += next((i for i, (a, b) in enumerate(zip(found, ids[end:], strict=False)) if a != b), len(found))
    assert proposed > 50
    assert right > 0.85 * proposed


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_greedy_text_is_the_targets_own(ours, theirs, tmp_path):
    """Of models that say rubbish: halves of characters, marks in the middle of words."""
    target = save_checkpoint(tmp_path / "target", seed=0, vocab=720, tokenizer=FAMILIES[ours]())
    draft = save_checkpoint(tmp_path / "draft", seed=1, layers=1, vocab=710, tokenizer=FAMILIES[theirs]())
    pair = load_pair(str(target), str(draft), OPTIONS)
    assert any("another tokenizer" in note for note in pair.notes)
    prompt = pair.encode("What is a lighthouse?", chat=False)
    plain = emitted(list(load_pair(str(target), "none", OPTIONS).decode(prompt, k=0, max_tokens=50)))
    for k in (1, 4):
        assert emitted(list(pair.decode(prompt, k=k, max_tokens=50))) == plain
    found = list(pair.decode(prompt, k=3, max_tokens=50, sampling=Sampling(0.8), seed=1))
    assert sum(len(c.drafted) for c in cycles(found)) > 0


def renamed(folder, model, seed=0):
    """The same model under other ids: a draft with another tokenizer that knows all that the target does."""
    order = torch.randperm(model.config.vocab_size, generator=torch.Generator().manual_seed(seed))
    order = torch.cat([torch.arange(4), order[order >= 4]])  # special tokens keep their ids
    made = tiny_llama(seed=0, vocab=model.config.vocab_size)
    state = model.state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = state[name][order]
    made.load_state_dict(state)
    made.save_pretrained(folder)
    tokenizer = byte_tokenizer()
    pieces = {i: piece for piece, i in tokenizer.get_vocab().items()}
    tokenizer.save_pretrained(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"] = {pieces[int(old)]: new for new, old in enumerate(order) if int(old) in pieces}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def test_the_same_model_under_other_ids_is_accepted(tmp_path):
    tokenizer = byte_tokenizer()
    model = tiny_llama(seed=0, vocab=len(tokenizer))
    halves = [
        i
        for i in range(len(tokenizer))
        if not tokenizer.decode([i]).isprintable() or not tokenizer.decode([i]).isascii()
    ]
    model.lm_head.weight.data[halves] = 0.0  # rubbish that can be read: after half a character nothing is drafted
    model.save_pretrained(tmp_path / "target")
    byte_tokenizer().save_pretrained(tmp_path / "target")
    draft = renamed(tmp_path, model)
    pair = load_pair(str(tmp_path / "target"), str(draft), OPTIONS)
    found = cycles(pair.decode(pair.encode("the light", chat=False), k=4, max_tokens=80))
    tested = sum(c.tested for c in found)
    assert tested > 10
    assert sum(c.accepted for c in found) > 0.9 * tested


def test_turns_end_by_their_role(tmp_path):
    """The draft's end of a turn is proposed as the target's."""
    target, draft = byte_tokenizer(), FAMILIES["byte fallback"]()
    of = Translation(target, draft, "it")
    end = draft.eos_token_id
    assert of.proposed([], [], [*encoded(draft, "the light").ids, end])[-1] == target.convert_tokens_to_ids(
        "<|im_end|>"
    )
    reading = Reading(of)
    reading.follow([*encoded(target, "a").ids, target.convert_tokens_to_ids("<|im_end|>")])
    assert reading.ids == [*of.begin, *encoded(draft, "a").ids, end]


def lowercasing():
    from tokenizers import normalizers

    tokenizer = byte_tokenizer(merges=["o n", "t h"])
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def test_a_tokenizer_that_changes_text_is_refused():
    with pytest.raises(PairIncompatible, match=r"it changes text: 'Hello, world!' comes back as 'hello, world!'"):
        Translation(byte_tokenizer(), lowercasing(), "small")


def test_check_says_that_a_draft_fits_by_its_text(tmp_path):
    target = save_checkpoint(tmp_path / "target")
    draft = save_checkpoint(tmp_path / "draft", tokenizer=byte_tokenizer(merges=["o n", "t h"]), layers=1)
    fit = check(str(target), str(draft), OPTIONS)
    assert fit.fits
    (said,) = [finding.said for finding in fit.findings if finding.about == "tokenizer"]
    assert "It fits by text" in said
    other = save_checkpoint(tmp_path / "other", tokenizer=lowercasing(), layers=1)
    assert not check(str(target), str(other), OPTIONS).fits
