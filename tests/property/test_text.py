"""Text from tokens: streamed equals decoded at once, stop strings never come out, nothing hostile reaches a terminal."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from specdec_engine.record.text import Detokenizer, TextStream, TokenText, printable
from tests.fakes import VOCAB, byte_tokenizer

TOKENIZER = byte_tokenizer()
TEXT = TokenText(TOKENIZER)
SIZE = len(TOKENIZER)
BYTE = {TEXT(i).encode("utf-8", "surrogateescape")[0]: i for i in range(4, 260)}


def streamed(ids, stop=()):
    stream = TextStream(TOKENIZER, stop)
    return [*(stream.feed(i) for i in ids), stream.flush()], stream


@given(st.text())
@example("naïve 👩‍👩‍👧‍👦 日本語 \u202e\x1b[31m")
def test_streamed_text_is_the_text(text):
    ids = TOKENIZER(text)["input_ids"]
    pieces, _ = streamed(ids)
    assert "".join(pieces) == TOKENIZER.decode(ids, skip_special_tokens=True) == text


@given(st.lists(st.integers(0, SIZE - 1)))
@example([BYTE[b] for b in b"\x80" * 9])
@example([BYTE[b] for b in b"\x80\x80\x80\xf0\x9f\x91\x8d"])
def test_any_ids_stream_to_what_decoding_them_at_once_gives(ids):
    """Broken UTF-8 included: a model at high temperature emits it."""
    assert "".join(streamed(ids)[0]) == TOKENIZER.decode(ids, skip_special_tokens=True)


@given(st.text(min_size=1))
def test_only_whole_characters_come_out(text):
    pieces, _ = streamed(TOKENIZER(text)["input_ids"])
    assert not any("\ufffd" in piece for piece in pieces) or "\ufffd" in text


@given(st.text(alphabet="abc"), st.lists(st.text(alphabet="abc", min_size=1, max_size=4), min_size=1, max_size=3))
@example("aabaabaac", ["aabaac"])
def test_output_ends_before_the_first_stop_string(text, stops):
    pieces, stream = streamed(TOKENIZER(text)["input_ids"], stops)
    first = min((text.find(s) for s in stops if s in text), default=None)
    if first is None:
        assert "".join(pieces) == text
        assert not stream.stopped
    else:
        assert stream.stopped
        assert not any(s in "".join(pieces) for s in stops)
        assert text.startswith("".join(pieces))


@given(st.text(st.characters(codec=None, exclude_categories=())))
@example("\x1b]52;c;cm0gLXJm\x07\x9b31m\x7f\u202etxt\u2066\u200b\ufeff\u2028\ud800\U000e0041")
def test_printable_text_cannot_steer_a_terminal(text):
    safe = printable(text)
    assert len(safe) == len(text)  # one for one: spans computed before still fit
    for char in safe:
        assert char in "\n\t\u200c\u200d" or unicodedata.category(char) not in {"Cc", "Cf", "Cs", "Zl", "Zp"}


def test_printable_leaves_ordinary_text_alone():
    text = "Tabs\tand\nlines, naïve café, 日本語, 👩‍👩‍👧, [red]markup[/red]"
    assert printable(text) == text


def test_printable_shows_what_was_there():
    assert printable("a\x1b[2Jb\rc\x7f") == "a␛[2Jb␍c␡"


@pytest.mark.parametrize("text", ["é", "日", "👍"])
def test_a_character_split_over_tokens_is_held_back_until_it_is_whole(text):
    ids = TOKENIZER(text)["input_ids"]
    assert len(ids) > 1
    detokenizer = Detokenizer(TOKENIZER)
    assert [detokenizer.feed(i) for i in ids] == [""] * (len(ids) - 1) + [text]


@given(st.text())
def test_token_text_keeps_every_byte(text):
    pieces = [TEXT(i) for i in TOKENIZER(text)["input_ids"]]
    assert b"".join(p.encode("utf-8", "surrogateescape") for p in pieces) == text.encode()


def sentencepiece_like():
    """Llama-2's kind: a mark for a space, byte fallback, and a decoder that strips the first space."""
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocab = {"<unk>": 0, "▁hello": 1, "▁world": 2, "é": 3, "<0xE2>": 4, "<0x82>": 5, "<0xAC>": 6, "<tool>": 7, "!": 8}
    model = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    model.decoder = decoders.Sequence(steps)
    model.add_special_tokens([AddedToken("<tool>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>", additional_special_tokens=["<tool>"])


SENTENCEPIECE = sentencepiece_like()


@given(st.lists(st.sampled_from([[1], [2], [3], [7], [8], [4, 5, 6]])))
@example([[1], [7], [2]])
@example([[7], [1], [4, 5, 6]])
def test_a_sentencepiece_tokenizer_streams_what_it_decodes(tokens):
    """Whole characters: of broken ones, byte fallback takes back what it had decoded, which no stream can."""
    ids = [i for group in tokens for i in group]
    stream = Detokenizer(SENTENCEPIECE)
    text = "".join([*(stream.feed(i) for i in ids), stream.flush()])
    assert text == SENTENCEPIECE.decode(ids, skip_special_tokens=True)


def test_sentencepiece_tokens_have_their_own_bytes():
    text = TokenText(SENTENCEPIECE)
    pieces = [text(i) for i in (1, 3, 4, 5, 6)]
    assert pieces[:2] == [" hello", "é"]
    assert b"".join(p.encode("utf-8", "surrogateescape") for p in pieces[2:]) == "€".encode()


def test_an_id_without_a_token_has_no_text():
    assert TEXT(VOCAB + 1000) == ""
