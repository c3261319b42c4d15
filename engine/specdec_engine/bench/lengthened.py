"""Prompts made longer: the same question after a text of so many tokens, to see what speculation does to long contexts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, islice, repeat

from specdec_engine.errors import UsageError
from specdec_engine.models.chat import raw_ids
from specdec_engine.pair import Pair
from specdec_engine.record.prompt_files import Question

_TRIES = 8
"""A text cut between tokens may be encoded by one more or less than it had."""


def lengthened(pair: Pair, question: Question, others: Sequence[Question], tokens: int) -> Question:
    """The question with the text of others before its first turn, again and again, so that its prompt has so many tokens.
    Where the tokenizer does not meet the number, the next lower one that it does. Raises UsageError for a prompt that has
    more already."""
    text = "\n\n".join(turn for other in others for turn in other.turns)
    words = raw_ids(pair.tokenizer, f"{text}\n\n")

    def made(many: int) -> Question:
        before = list(islice(chain.from_iterable(repeat(words)), max(0, many)))
        if question.ids:
            return replace(question, ids=(*before, *question.ids))
        first, *later = question.turns
        return replace(question, turns=(f"{pair.tokenizer.decode(before)}\n\n{first}", *later))

    def length(of: Question) -> int:
        return len(of.ids or pair.encode(of.turns[0], system=of.system or None))

    if (least := length(question)) > tokens:
        raise UsageError(f"it has {least} tokens already, more than {tokens}", "choose a longer --context")
    many = tokens - length(made(0))
    if many <= 0:  # it has no room for more, or has just as many
        return question
    for _ in range(_TRIES):
        if (missing := tokens - length(found := made(many))) == 0:
            break
        many += missing
    while length(found) > tokens and many > 0:
        many -= 1
        found = made(many)
    return found if many > 0 else question
