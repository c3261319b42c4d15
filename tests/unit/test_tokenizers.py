"""Do the tokenizers of two models agree? By content."""

from __future__ import annotations

import pytest

from specdec_engine.errors import PairIncompatible
from specdec_engine.models.tokenizers import check_pair, compare_tokenizers
from tests.fakes import byte_tokenizer


def test_a_tokenizer_agrees_with_itself():
    assert compare_tokenizers(byte_tokenizer(), byte_tokenizer()) == compare_tokenizers(
        byte_tokenizer(), byte_tokenizer()
    )
    assert not compare_tokenizers(byte_tokenizer(), byte_tokenizer()).ordinary


def test_ids_that_only_one_side_has_are_padding():
    longer = byte_tokenizer()
    longer.add_tokens(["<|extra|>", "<|more|>"])
    assert not check_pair("a", longer, "b", byte_tokenizer()).ordinary
    assert not check_pair("a", byte_tokenizer(), "b", longer).ordinary


def test_other_tokens_are_refused_with_the_first_ids():
    other = byte_tokenizer(merges=["o n", "t h", "i n"])
    with pytest.raises(
        PairIncompatible, match=r"small differ in \d+ tokens: 260 is 'th' and 'on'; 261 is 'the' and 'th'"
    ):
        check_pair("big", byte_tokenizer(), "small", other)


def test_a_control_token_of_another_name_is_worth_a_note_only():
    special = byte_tokenizer()
    special.add_special_tokens({"additional_special_tokens": ["<|a|>"]})
    other = byte_tokenizer()
    other.add_special_tokens({"additional_special_tokens": ["<|b|>"]})
    comparison = check_pair("a", special, "b", other)
    assert [(d.target, d.draft) for d in comparison.special] == [("<|a|>", "<|b|>")]
