"""Do the tokenizers of two models agree? By content."""

from __future__ import annotations

from specdec_engine.models.tokenizers import compare_tokenizers, shared_share
from tests.fakes import byte_tokenizer


def test_a_tokenizer_agrees_with_itself():
    assert compare_tokenizers(byte_tokenizer(), byte_tokenizer()) == compare_tokenizers(
        byte_tokenizer(), byte_tokenizer()
    )
    assert not compare_tokenizers(byte_tokenizer(), byte_tokenizer()).ordinary


def test_ids_that_only_one_side_has_are_padding():
    longer = byte_tokenizer()
    longer.add_tokens(["<|extra|>", "<|more|>"])
    assert not compare_tokenizers(longer, byte_tokenizer()).ordinary
    assert not compare_tokenizers(byte_tokenizer(), longer).ordinary


def test_other_tokens_are_named_with_their_ids():
    other = byte_tokenizer(merges=["o n", "t h", "i n"])
    first, second, *_ = compare_tokenizers(byte_tokenizer(), other).ordinary
    assert (first.id, first.target, first.draft) == (260, "th", "on")
    assert (second.id, second.target, second.draft) == (261, "the", "th")
    assert shared_share(byte_tokenizer(), byte_tokenizer()) == 1
    assert shared_share(byte_tokenizer(), other) < 1


def test_a_control_token_of_another_name_is_worth_a_note_only():
    special = byte_tokenizer()
    special.add_special_tokens({"additional_special_tokens": ["<|a|>"]})
    other = byte_tokenizer()
    other.add_special_tokens({"additional_special_tokens": ["<|b|>"]})
    comparison = compare_tokenizers(special, other)
    assert [(d.target, d.draft) for d in comparison.special] == [("<|a|>", "<|b|>")]
