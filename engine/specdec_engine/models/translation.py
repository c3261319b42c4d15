"""Text between two tokenizers: a context as another model reads it, and what that one drafts as the target's tokens.

After "string-level exact match" (Timor et al. 2025, arXiv:2502.05202). Whatever comes out is proposed as deterministic
tokens, so that a bad translation is merely rejected: nothing here has to be right for the output to be the target's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from specdec_engine.errors import PairIncompatible
from specdec_engine.models.chat import turn_ends
from specdec_engine.models.tokenizers import compare_tokenizers
from specdec_engine.record.text import REPLACEMENT, Detokenizer

if TYPE_CHECKING:
    from specdec_engine.models.loading import Candidate

_TRIED = ("Hello, world!", "Naïve café — 東京 🙂", "x = [1, 23, 456]\n\n    return  x", "IT'S 7 o'clock.", "a  b\tc")
"""Words, marks, figures, white space and capitals: what a normalizer that loses text would lose."""
_SAMPLE = """A lighthouse shows ships where the coast is: its lamp turns slowly, and each has a rhythm of its own.

def flashes(seconds: float, period: float = 7.5) -> int:
    return int(seconds // period) + 1
"""
_AGAIN = 24
"""Tokens before new text that are encoded once more with it: a word's pieces depend on what follows it."""
_SETTLED = 3
"""Of those the first are not looked at: the first piece of a text may have a space of its own before it."""
_BEFORE = 12
"""Tokens of the context that a draft's text is encoded behind."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A text's tokens, and where each begins in it, in characters."""

    ids: list[int]
    begins: list[int]

    def characters(self, first: int) -> Iterator[tuple[int, int]]:
        """Tokens from this one on that begin a character, and where: several may share one."""
        for i in range(first, len(self.ids)):
            if i == 0 or self.begins[i] != self.begins[i - 1]:
                yield i, self.begins[i]


class Translation:
    """Between a target's tokenizer and a draft's."""

    def __init__(self, target: Any, draft: Any, name: str) -> None:
        """Raises PairIncompatible for a draft whose tokenizer does not give back the text that it was given, or does not say
        where tokens lie in it."""
        for tokenizer in (target, draft):
            if not getattr(tokenizer, "is_fast", False):
                raise PairIncompatible(
                    f"{name} has another tokenizer than the target, and one of them does not say where tokens lie in a text",
                    "choose a draft with the target's tokenizer, or with tokenizer.json in its folder",
                )
        lost = [text for text in _TRIED if decoded(draft, encoded(draft, text).ids).strip() != text]
        if lost:
            raise PairIncompatible(
                f"{name} has another tokenizer than the target, and it changes text: {lost[0]!r} comes back as "
                f"{decoded(draft, encoded(draft, lost[0]).ids)!r}",
                "choose a draft with another tokenizer, or --draft ngram, which fits every target",
            )
        self.target, self.draft = target, draft
        self.target_specials, self.draft_specials = special_ids(target), special_ids(draft)
        ends, theirs = _ends(target), _ends(draft)
        self._end_of_theirs = min(theirs, default=None)
        self._end_of_ours = min(ends, default=None)
        self._their_ends = theirs
        first = list(draft("a")["input_ids"])[:1]
        self.begin = first if first and first[0] in self.draft_specials else []
        """What the draft's tokenizer puts before a text."""
        self._special = {i: self._translated(i, token, ends) for i, token in self.target_specials.items()}

    @property
    def for_one(self) -> float:
        """How many of the draft's tokens stand for one of the target's, in a sentence and a line of code."""
        return len(encoded(self.draft, _SAMPLE).ids) / len(encoded(self.target, _SAMPLE).ids)

    def _translated(self, special: int, token: str, ends: frozenset[int]) -> list[int]:
        """A special token of the target as the draft's: of the same name, or of the same role; else nothing."""
        same = next((i for i, name in self.draft_specials.items() if name == token), None)
        if same is None and special in ends:
            same = self._end_of_theirs
        return [] if same is None or [same] == self.begin else [same]

    def special(self, token: int) -> list[int] | None:
        """The draft's tokens for one of the target's special ones; None for an ordinary token."""
        return self._special.get(token)

    def proposed(self, before: Sequence[int], read: Sequence[int], drafted: Sequence[int]) -> list[int]:
        """A draft's tokens as the target's. before: ordinary tokens of the target that end the context; read: the draft's
        tokens that end it for the draft, of which there are enough to decode by.

        The last token is left out unless the draft ends the turn: it may be half of a longer one.
        """
        plain = [*drafted]
        cut = next((i for i, token in enumerate(plain) if token in self.draft_specials), len(plain))
        ended = cut < len(plain) and plain[cut] in self._their_ends and self._end_of_ours is not None
        text = self._new_text(read, plain[:cut])
        found = self._encoded_behind(before, text) if text else []
        if not ended:
            return found[:-1] if len(found) > 1 else found
        assert self._end_of_ours is not None
        return [*found, self._end_of_ours]

    def _new_text(self, read: Sequence[int], drafted: Sequence[int]) -> str:
        """What the drafted tokens add to a text, up to the last whole character."""
        known, text = decoded(self.draft, read), decoded(self.draft, [*read, *drafted])
        return text[len(known) :].partition(REPLACEMENT)[0] if text.startswith(known) else ""

    def _encoded_behind(self, before: Sequence[int], text: str) -> list[int]:
        """As the target's tokenizer encodes it after these tokens; by itself where a token would cross the border."""
        known = decoded(self.target, before)
        whole = encoded(self.target, known + text)
        if known and len(known) in whole.begins:
            return whole.ids[whole.begins.index(len(known)) :]
        return encoded(self.target, text).ids


class Reading:
    """A context that grows, as the draft's tokens."""

    def __init__(self, translation: Translation) -> None:
        self._of = translation
        self._forget()

    def _forget(self) -> None:
        self._context: list[int] = []
        self._settled = [*self._of.begin]  # up to the last special token, and with it
        self._open()

    def _open(self) -> None:
        """A stretch of ordinary tokens begins."""
        self._detokenizer = Detokenizer(self._of.target)
        self._from, self._text, self._part = len(self._context), "", Encoded([], [])
        self._waiting = False

    @property
    def ids(self) -> list[int]:
        """The draft's tokens for all whole characters."""
        return self._settled + self._part.ids

    @property
    def tail(self) -> tuple[list[int], list[int]]:
        """The last ordinary tokens, the target's and the draft's."""
        return self._context[max(self._from, len(self._context) - _BEFORE) :], self._part.ids[-_BEFORE:]

    @property
    def whole(self) -> bool:
        """Whether the context ends with a whole character."""
        return not self._waiting

    def follow(self, context: Sequence[int]) -> None:
        """Read a context, from where it goes on if it does."""
        if list(context[: len(self._context)]) != self._context:
            self._forget()
        text = ""
        for token in context[len(self._context) :]:
            self._context.append(token)
            special = self._of.special(token)
            if special is None:
                piece = self._detokenizer.feed(token)
                text, self._waiting = text + piece, not piece
                continue
            self._read(text + self._detokenizer.flush())
            self._settled += [*self._part.ids, *special]
            text = ""
            self._open()
        self._read(text)

    def _read(self, text: str) -> None:
        """More of the open stretch."""
        if not text:
            return
        self._text += text
        known = self._part
        first = max(0, len(known.ids) - _AGAIN)
        start = known.begins[first] if first else 0
        more = encoded(self._of.draft, self._text[start:])
        at = 0
        if first:
            places = {place: i for i, place in known.characters(first + _SETTLED)}
            at = next((i for i, place in more.characters(_SETTLED) if start + place in places), -1)
            first = places[start + more.begins[at]] if at >= 0 else 0
        if at < 0:
            more, start, at = encoded(self._of.draft, self._text), 0, 0
        self._part = Encoded(
            known.ids[:first] + more.ids[at:],
            known.begins[:first] + [start + place for place in more.begins[at:]],
        )


def encoded(tokenizer: Any, text: str) -> Encoded:
    """A text's tokens, without any that a tokenizer puts around a whole one."""
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return Encoded(list(found["input_ids"]), [begin for begin, _ in found["offset_mapping"]])


def decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of ordinary tokens, as it is: no spaces are taken out before marks."""
    text: str = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def special_ids(tokenizer: Any) -> dict[int, str]:
    """Tokens that are marks and no text."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    marks = {i: str(token) for i, token in added.items() if getattr(token, "special", True)}
    return marks | {i: str(tokenizer.convert_ids_to_tokens(i)) for i in tokenizer.all_special_ids}


def _ends(tokenizer: Any) -> frozenset[int]:
    """What ends a turn, or else a text."""
    end = tokenizer.eos_token_id
    return turn_ends(tokenizer) or (frozenset() if end is None else frozenset({end}))


def translation_for(target: Candidate, draft: Candidate) -> tuple[Translation | None, str]:
    """Build one for a draft whose ids mean other tokens; None where they mean the same. And a sentence for the user on how
    they differ, empty if they do not. Raises PairIncompatible for a draft whose text cannot be carried over."""
    differing = compare_tokenizers(target.tokenizer, draft.tokenizer)
    if differing.ordinary:
        said = f"{draft.name} has another tokenizer than {target.name}: its text is drafted, in the target's tokens"
        return Translation(target.tokenizer, draft.tokenizer, draft.name), said
    if special := differing.special:
        ids = f"{len(special)} special tokens of {target.name} and {draft.name} differ, from id {special[0].id} on"
        return None, ids
    return None, ""
