"""Training text by the target itself: it writes a user's turn into its own chat template, and then answers it.

Nothing else is needed, and what a draft must learn is exactly what its target says (self-synthesis, Xu et al. 2024,
arXiv:2406.08464, "Magpie"). The features that a head reads are kept with the tokens: the target's pass is made once.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from specdec_engine.core.transfer import upload
from specdec_engine.distill.documents import FOLLOW_UPS, OPENINGS, Documents, Request
from specdec_engine.distill.lanes import Lanes, lanes_of
from specdec_engine.errors import UsageError
from specdec_engine.models.chat import chat_ids
from specdec_engine.models.loading import Loaded
from specdec_engine.record.prompt_files import Question
from specdec_engine.record.text import counted

_MARKS = "⟦first⟧", "⟦answer⟧", "⟦second⟧"
SUBJECT, REST = 1.0, 0.7
"""Temperatures of the first tokens written into a prompt, which give it its subject, and of the others, which keep it
readable."""
_SUBJECT_TOKENS = 8
ANSWERS = (0.0, 0.8)
"""Answers are written at one or the other of these temperatures: drafts are wanted at both."""
_UNOPENED, _LONG, _ABOUT_TEXTS, _SECOND = 1 / 5, 1 / 4, 1 / 2, 1 / 4
"""Of prompts: shares without an opening, and of texts to be read, which are longer; of prompts where there are documents,
those about them; of answers, those after which the user goes on."""
_LEAST = 0.05
"""Share of a document that is asked about all the same."""
_LIKELIEST = 64
"""Tokens drawn are among this many likeliest."""


@dataclass(frozen=True, slots=True)
class Example:
    """One conversation: a prompt, its answer, and what the target computed on the way."""

    tokens: Tensor
    """[n] int32"""
    answer: int
    """Index of the last answer's first token."""
    features: Tensor
    """[n, taps + 1, hidden]: row i is the target's after it has read token i."""


@dataclass(slots=True)
class _Text:
    """A conversation that is being written."""

    tokens: list[int]
    temperature: float
    """Of the answer."""
    prompt: _Prompt
    fed: int
    """Tokens that the target has read."""
    answer: int | None = None
    """Where the answer begins, while one is being written."""
    followed_up: bool = False
    ended: bool = False


@dataclass(frozen=True, slots=True)
class _Prompt:
    """Places in a prompt that the target writes."""

    subject_end: int
    """From here on it is written at a lower temperature."""
    end: int
    """Where it must end."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How long the parts of a conversation may get, in tokens."""

    prompt: int = 128
    long_prompt: int = 256
    given: int = 384
    """Of a prompt that is given, or of the document in it."""
    follow_up: int = 48
    answer: int = 192

    def conversation(self, template: int) -> int:
        """Two turns, in a template of so many tokens."""
        return template + self.given + self.prompt + self.follow_up + 2 * self.answer + 1


@dataclass(frozen=True, slots=True)
class Turns:
    """What a chat template puts around words."""

    before: list[int] = field(default_factory=list)
    after: list[int] = field(default_factory=list)
    """After a user's words, up to the answer."""
    between: list[int] = field(default_factory=list)
    """After an answer, up to the next words of a user; empty where the template does not show it."""


def unused_in(questions: Sequence[Question]) -> str:
    """Say in a sentence what of given conversations is not asked; empty where every one is a single turn."""
    later = sum(len(question.turns) > 1 for question in questions)
    systems = sum(bool(question.system) for question in questions)
    parts = [(later, "later turns"), (systems, "a system message")]
    said = " and ".join(f"{n} with {what}" for n, what in parts if n)
    return f"of {counted(len(questions), 'conversation')}, {said}: each is asked its first turn alone" if said else ""


def turns(tokenizer: Any) -> Turns:
    """See `Turns`. Raises UsageError without a template."""
    if not _has_turns(tokenizer):
        raise UsageError("this target has no chat template to write prompts into", "give prompts by --data FILE")
    first, answer, second = _MARKS
    before, marked, after = tokenizer.decode(chat_ids(tokenizer, first, None)).partition(first)
    if not marked or not after:
        raise UsageError("this target's chat template does not show where a user's turn ends", "choose another target")
    rendered = tokenizer.decode(chat_ids(tokenizer, second, None, [(first, answer)]))
    between, again, _ = rendered.partition(answer)[2].partition(second)
    return Turns(_ids(tokenizer, before), _ids(tokenizer, after), _ids(tokenizer, between) if again else [])


def _has_turns(tokenizer: Any) -> bool:
    return bool(getattr(tokenizer, "chat_template", None))


def _ids(tokenizer: Any, text: str, **how: Any) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, **how)["input_ids"])


def synthesise(
    target: Loaded,
    taps: tuple[int, ...],
    seed: int,
    limits: Limits | None = None,
    prompts: Iterator[str] | None = None,
    documents: Documents | None = None,
) -> Iterator[Example]:
    """Conversations without end, as they are finished; the target writes the prompts too, unless they are given.

    The target must run on a `Decoder` (lean or graph runtime). Ends when given prompts do.
    """
    asked = Turns() if prompts and not _has_turns(target.tokenizer) else turns(target.tokenizer)
    limits = limits or Limits()
    room = target.runtime.limit or sys.maxsize
    scribe = _Scribe(target, limits, asked, prompts, documents, random.Random(seed), room)
    capacity = limits.conversation(len(asked.before) + 2 * len(asked.after) + len(asked.between))
    lanes = lanes_of(target.runtime, taps, capacity)  # type: ignore[arg-type]
    generator = torch.Generator(target.runtime.device).manual_seed(seed)
    running = dict[int, _Text]()
    for lane in range(lanes.count):
        _begin(lane, running, lanes, scribe)
    while running:
        logits = lanes.step({lane: text.tokens[text.fed] for lane, text in running.items()})
        temperatures = upload(torch.tensor([_temperature(text) for text in running.values()]), logits.device)
        chosen = _choose(logits, temperatures, generator).tolist()
        for (lane, text), token in zip(list(running.items()), chosen, strict=True):
            text.fed += 1
            if text.fed == len(text.tokens):
                scribe.take(text, token)
            if text.ended:
                if example := _finished(text, lanes.features(lane)):
                    yield example
                _begin(lane, running, lanes, scribe)


def _begin(lane: int, running: dict[int, _Text], lanes: Lanes, scribe: _Scribe) -> None:
    """A new conversation on this lane, or none where given prompts have come to their end."""
    running.pop(lane, None)
    if (text := scribe.fresh()) is not None:
        lanes.begin(lane, text.tokens)
        running[lane] = text


@dataclass(slots=True)
class _Scribe:
    """What stands in a conversation beside the target's own choices."""

    target: Loaded
    limits: Limits
    turns: Turns
    prompts: Iterator[str] | None
    documents: Documents | None
    dice: random.Random
    room: int
    """Tokens that the target can take in."""

    def fresh(self) -> _Text | None:
        """None where given prompts have come to their end."""
        temperature = self.dice.choice(ANSWERS)
        request = self._request()
        if request is None:
            return None
        words = self._words(request)[: self._given]
        tokens = [*self.turns.before, *words, *([] if request.goes_on else self.turns.after)]
        prompt, answer = self._prompt(len(tokens), request.about_text), None if request.goes_on else len(tokens)
        return _Text(tokens, temperature, prompt, fed=len(tokens) - 1, answer=answer)

    def take(self, text: _Text, token: int) -> None:
        """A token that the target chose, and what follows it by the template."""
        stopped = token in self.target.stop_ids
        if text.answer is not None:
            text.tokens.append(token)
            text.ended = stopped or len(text.tokens) - text.answer >= self.limits.answer
            if stopped and self._goes_on(text):
                self._follow_up(text)
        elif stopped or token in self.turns.after[:1] or len(text.tokens) >= text.prompt.end:
            text.ended = len(text.tokens) == len(self.turns.before)  # nothing was said
            text.tokens += self.turns.after
            text.answer = len(text.tokens)
        else:
            text.tokens.append(token)
        text.ended |= len(text.tokens) >= self.room

    def _request(self) -> Request | None:
        if self.prompts is not None:
            prompt = next(self.prompts, None)
            return None if prompt is None else Request(prompt)
        if self.documents is not None and self.dice.random() < _ABOUT_TEXTS:
            return self._about_text(self.documents)
        return Request("" if self.dice.random() < _UNOPENED else self.dice.choice(OPENINGS), goes_on=True)

    @property
    def _given(self) -> int:
        """Tokens that a prompt may bring."""
        return min(self.limits.given, self.room // 2)

    def _words(self, request: Request) -> list[int]:
        return _ids(self.target.tokenizer, request.text, split_special_tokens=True)

    def _about_text(self, documents: Documents) -> Request:
        """Ask with as much of the document as there is room for: what is asked about it mostly stands behind it."""
        seed, share = self.dice.random(), 1.0
        while len(self._words(request := documents.request(seed, share))) > self._given and share > _LEAST:
            share *= 0.7
        return request

    def _prompt(self, begin: int, about_text: bool) -> _Prompt:
        """What the target may write from here on: after a text, a question."""
        longest = self.limits.long_prompt if self.dice.random() < _LONG else self.limits.prompt
        longest = self.limits.follow_up if about_text else longest
        return _Prompt(begin + _SUBJECT_TOKENS, begin + longest)

    def _goes_on(self, text: _Text) -> bool:
        """Whether the user says something more: once at most, and only where the target writes the prompts."""
        may = self.prompts is None and self.turns.between and not text.followed_up
        return bool(may) and self.dice.random() < _SECOND

    def _follow_up(self, text: _Text) -> None:
        between = self.turns.between
        # The answer ends with the mark that begins what is between.
        text.tokens += between[1:] if text.tokens[-1] == between[0] else between
        text.tokens += _ids(self.target.tokenizer, self.dice.choice(FOLLOW_UPS))
        begin = len(text.tokens)
        text.prompt = _Prompt(begin + _SUBJECT_TOKENS, begin + self.limits.follow_up)
        text.answer, text.followed_up, text.ended = None, True, False


def _finished(text: _Text, features: Tensor) -> Example | None:
    """The conversation; None if its prompt was empty."""
    if text.answer is None or text.answer >= text.fed:
        return None
    tokens = torch.tensor(text.tokens[: text.fed], dtype=torch.int32)
    return Example(tokens, text.answer, features.to("cpu", torch.bfloat16, copy=True))


def _temperature(text: _Text) -> float:
    if text.answer is not None:
        return text.temperature
    return SUBJECT if len(text.tokens) < text.prompt.subject_end else REST


def _choose(logits: Tensor, temperatures: Tensor, generator: torch.Generator) -> Tensor:
    """One token a row; temperature 0 takes the likeliest."""
    best, at = logits.float().topk(_LIKELIEST, -1)
    probs = (best / temperatures.clamp(min=1e-4)[:, None]).softmax(-1)
    return at.gather(1, torch.multinomial(probs, 1, generator=generator))[:, 0]
