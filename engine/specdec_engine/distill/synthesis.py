"""Training text by the target itself: it writes a user's turn into its own chat template, and then answers it.

Nothing else is needed, and what a draft must learn is exactly what its target says (self-synthesis, Xu et al. 2024,
arXiv:2406.08464, "Magpie"). The features that a head reads are kept with the tokens: the target's pass is made once.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdec_engine.core.transfer import upload
from specdec_engine.distill.batch import Batch
from specdec_engine.errors import UsageError
from specdec_engine.models.chat import chat_ids
from specdec_engine.models.loading import Loaded
from specdec_engine.record.prompt_files import Question
from specdec_engine.record.text import counted

_MARK = "⟦prompt⟧"
SUBJECT, REST = 1.0, 0.7
"""Temperatures of the first tokens written into a prompt, which give it its subject, and of the others, which keep it
readable."""
_SUBJECT_TOKENS = 8
ANSWERS = (0.0, 0.8)
"""Answers are written at one or the other of these temperatures: drafts are wanted at both."""
OPENINGS: tuple[str, ...] = tuple(json.loads((Path(__file__).parent / "openings.json").read_text("utf-8")))
"""What most prompts begin with, for the target to go on from: left to itself it writes small talk. A head that had learnt
from that alone, and agreed with its target 45 times in 100 on such text, agreed 30 times on other people's questions."""
_UNOPENED, _LONG = 1 / 5, 1 / 4
"""Of prompts: shares without an opening, and of texts to be read, which are longer."""
_LIKELIEST = 64
"""Tokens drawn are among this many likeliest."""


@dataclass(frozen=True, slots=True)
class Example:
    """One conversation: a prompt, its answer, and what the target computed on the way."""

    tokens: Tensor
    """[n] int32"""
    answer: int
    """Index of the answer's first token."""
    features: Tensor
    """[n, taps + 1, hidden]: row i is the target's after it has read token i."""


@dataclass(slots=True)
class _Slot:
    tokens: list[int]
    features: list[Tensor]
    temperature: float
    """Of the answer."""
    subject_end: int
    """Where the prompt has its subject; from there on it is written at a lower temperature."""
    prompt_end: int
    """Where it must end."""
    fed: int = 0
    """Tokens the target has read."""
    answer: int | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    """How long the parts of a conversation may get, in tokens."""

    prompt: int = 128
    long_prompt: int = 256
    answer: int = 192


def unused_in(questions: Sequence[Question]) -> str:
    """Say in a sentence what of given conversations is not asked; empty where every one is a single turn."""
    later = sum(len(question.turns) > 1 for question in questions)
    systems = sum(bool(question.system) for question in questions)
    parts = [(later, "later turns"), (systems, "a system message")]
    said = " and ".join(f"{n} with {what}" for n, what in parts if n)
    return f"of {counted(len(questions), 'conversation')}, {said}: each is asked its first turn alone" if said else ""


def turns(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the chat template puts before a user's words, and what follows them. Raises UsageError without a template."""
    if not _has_turns(tokenizer):
        raise UsageError("this target has no chat template to write prompts into", "give prompts by --data FILE")
    rendered = tokenizer.decode(chat_ids(tokenizer, _MARK, None))
    before, marked, after = rendered.partition(_MARK)
    if not marked or not after:
        raise UsageError("this target's chat template does not show where a user's turn ends", "choose another target")
    return _ids(tokenizer, before), _ids(tokenizer, after)


def _has_turns(tokenizer: Any) -> bool:
    return bool(getattr(tokenizer, "chat_template", None))


def _ids(tokenizer: Any, text: str, **how: Any) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, **how)["input_ids"])


def synthesise(
    target: Loaded,
    slots: int,
    taps: Sequence[int],
    seed: int,
    limits: Limits | None = None,
    prompts: Iterator[str] | None = None,
) -> Iterator[Example]:
    """Conversations without end, as they are finished; the target writes the prompts too, unless they are given.

    The target must run on a `Decoder` (lean or graph runtime). Ends when given prompts do.
    """
    before, after = ([], []) if prompts and not _has_turns(target.tokenizer) else turns(target.tokenizer)
    limits = limits or Limits()
    scribe = _Scribe(target, limits, before, after, prompts, random.Random(seed))
    decoder = target.runtime.decoder  # type: ignore[attr-defined]
    capacity = len(before) + limits.long_prompt + len(after) + limits.answer + 1
    batch = Batch(decoder, slots, capacity, taps)
    generator = torch.Generator(decoder.device).manual_seed(seed)
    running = [scribe.fresh() for _ in range(slots)]
    while any(running):
        # A slot whose prompts are at an end idles.
        fed = [(0, 0, 0.0) if s is None else (s.tokens[s.fed], s.fed, _temperature(s)) for s in running]
        tokens, positions, temperatures = (
            upload(torch.tensor(column), decoder.device) for column in zip(*fed, strict=True)
        )
        logits, features = batch.step(tokens, positions)
        chosen, rows = _choose(logits, temperatures, generator).tolist(), features.cpu()
        for i, slot in enumerate(running):
            if slot is None:
                continue
            slot.features.append(rows[i])
            slot.fed += 1
            if slot.fed == len(slot.tokens) and scribe.ends(slot, chosen[i]):
                if example := _finished(slot, len(before) + len(after)):
                    yield example
                running[i] = scribe.fresh()


@dataclass(slots=True)
class _Scribe:
    """What stands in a conversation beside the target's own choices."""

    target: Loaded
    limits: Limits
    before: list[int]
    after: list[int]
    prompts: Iterator[str] | None
    dice: random.Random

    def fresh(self) -> _Slot | None:
        """None where given prompts have come to their end."""
        temperature = self.dice.choice(ANSWERS)
        if self.prompts is None:
            opening = "" if self.dice.random() < _UNOPENED else self.dice.choice(OPENINGS)
            longest = self.limits.long_prompt if self.dice.random() < _LONG else self.limits.prompt
            tokens = [*self.before, *_ids(self.target.tokenizer, opening)]
            subject_end = len(tokens) + _SUBJECT_TOKENS
            return _Slot(tokens, [], temperature, subject_end, prompt_end=len(self.before) + longest)
        prompt = next(self.prompts, None)
        if prompt is None:
            return None
        words = _ids(self.target.tokenizer, prompt, split_special_tokens=True)[: self.limits.long_prompt]
        tokens = [*self.before, *words, *self.after]
        return _Slot(tokens, [], temperature, subject_end=len(tokens), prompt_end=len(tokens), answer=len(tokens))

    def ends(self, slot: _Slot, token: int) -> bool:
        """Take a token that the target chose; whether the conversation has ended."""
        if slot.answer is not None:
            slot.tokens.append(token)
            return token in self.target.stop_ids or len(slot.tokens) - slot.answer >= self.limits.answer
        closing = bool(self.after) and token == self.after[0]
        if closing or token in self.target.stop_ids or len(slot.tokens) >= slot.prompt_end:
            slot.tokens += self.after
            slot.answer = len(slot.tokens)
        else:
            slot.tokens.append(token)
        return False


def _finished(slot: _Slot, shortest: int) -> Example | None:
    """The conversation; None if its prompt was empty."""
    if slot.answer is None or slot.answer <= shortest:
        return None
    tokens = torch.tensor(slot.tokens[: slot.fed], dtype=torch.int32)
    return Example(tokens, slot.answer, torch.stack(slot.features))


def _temperature(slot: _Slot) -> float:
    if slot.answer is not None:
        return slot.temperature
    return SUBJECT if len(slot.tokens) < slot.subject_end else REST


def _choose(logits: Tensor, temperatures: Tensor, generator: torch.Generator) -> Tensor:
    """One token a row; temperature 0 takes the likeliest."""
    best, at = logits.float().topk(_LIKELIEST, -1)
    probs = (best / temperatures.clamp(min=1e-4)[:, None]).softmax(-1)
    return at.gather(1, torch.multinomial(probs, 1, generator=generator))[:, 0]
