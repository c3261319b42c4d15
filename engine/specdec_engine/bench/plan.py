"""What a benchmark runs: arms, prompts, and their order. No torch."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

from specdec_engine.errors import UsageError
from specdec_engine.record.prompt_files import Question
from specdec_engine.record.prompt_files import read_questions as read_questions  # a plan's, for whoever writes one

BUILTIN_PROMPTS = Path(__file__).parent / "prompts.json"
MOST_K = 64


@dataclass(frozen=True, slots=True, order=True)
class Form:
    """What an arm shares with the plain decoding that it is held against."""

    temperature: float
    quantize: str = ""
    """The target's weights, where arms differ in them."""
    structured: bool = False
    """Under the plan's grammar."""
    context: int = 0
    """Tokens that prompts are lengthened to; 0 for prompts as they are."""

    @property
    def label(self) -> str:
        """All but the temperature; empty for the usual."""
        parts = (
            self.quantize,
            "structured" if self.structured else "",
            f"context {self.context:,}" if self.context else "",
        )
        return " · ".join(filter(None, parts))


@dataclass(frozen=True, slots=True)
class Arm:
    """One way of decoding, held against plain decoding of the same form."""

    draft: str | None
    """As after --draft; None for the best that need not be named."""
    k: int | Literal["auto"]
    temperature: float
    rule: str = "token"
    quantize: str = ""
    structured: bool = False
    context: int = 0
    """These three as in `Form`."""

    @property
    def label(self) -> str:
        parts = [self.draft or "default", f"k {self.k}", f"T {self.temperature:g}"]
        return " · ".join(filter(None, [*parts, "" if self.rule == "token" else self.rule, self.form.label]))

    @property
    def form(self) -> Form:
        return Form(self.temperature, self.quantize, self.structured, self.context)


@dataclass(frozen=True, slots=True)
class Run:
    """One run: a prompt, a repeat, and an arm; None for plain decoding of this form."""

    question: int
    repeat: int
    form: Form
    arm: int | None


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that decides what is run."""

    target: str
    arms: tuple[Arm, ...]
    questions: tuple[Question, ...]
    repeats: int
    max_tokens: int
    seed: int
    conditions: tuple[str, ...] = ()
    """What else samples must have in common to be put together: where and how the models ran."""

    def runs(self) -> Iterator[Run]:
        """Prompt by prompt, plain decoding and all arms in shuffled order: a machine that slows down slows all alike."""
        order = random.Random(self.seed)
        against = sorted({arm.form for arm in self.arms})
        for repeat, question in product(range(self.repeats), range(len(self.questions))):
            plain = [Run(question, repeat, form, None) for form in against]
            arms = [Run(question, repeat, arm.form, i) for i, arm in enumerate(self.arms)]
            yield from order.sample(plain + arms, len(plain + arms))

    @property
    def digest(self) -> str:
        """Alike for plans whose samples may be put together."""
        plan = {**asdict(self), "questions": list(map(_named, self.questions)), "arms": list(map(_named, self.arms))}
        return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def prompts_digest(self) -> str:
        return digest_of(self.questions)


def digest_of(questions: Sequence[Question]) -> str:
    """Alike for the same prompts."""
    return hashlib.sha256(json.dumps([_named(q) for q in questions]).encode()).hexdigest()[:16]


def _named(part: Question | Arm) -> dict[str, Any]:
    """Without what is empty, as in records from before there was such a field."""
    return {key: value for key, value in asdict(part).items() if key != "id" and (key not in _LATER or value)}


_LATER = ("ids", "quantize", "structured", "context", "system")
"""Left out where they are empty; and a prompt's own name always."""


def ks_of(text: str) -> tuple[int | Literal["auto"], ...]:
    """`1-8,auto`, `2-8+2`, `1-16*2`, `3`. Raises UsageError."""
    found = list[int | Literal["auto"]]()
    for part in text.split(","):
        if part == "auto":
            found.append("auto")
        elif match := re.fullmatch(r"(\d+)(?:-(\d+)(?:([+*])(\d+))?)?", part.strip()):
            found += _range(part, *match.groups())
        else:
            raise UsageError(
                f"-k {part!r} is neither a number, a range nor auto", "for example -k 1-8,auto or -k 1-16*2"
            )
    return tuple(dict.fromkeys(found))


def _range(text: str, first: str, last: str | None, sign: str | None, by: str | None) -> list[int]:
    k, end, step = int(first), int(last or first), int(by or 1)
    if k > end or end > MOST_K or step < 1 or (sign == "*" and (step < 2 or k < 1)):
        raise UsageError(f"-k {text} is no range", f"for example 1-8, 2-8+2 or 1-16*2, at most {MOST_K}")
    found = list[int]()
    while k <= end:
        found.append(k)
        k = k * step if sign == "*" else k + step
    return found


def builtin_questions() -> list[Question]:
    """Two of each of six kinds, written for this."""
    found: dict[str, list[str]] = json.loads(BUILTIN_PROMPTS.read_text("utf-8"))
    return [Question(category, (prompt,)) for category, prompts in found.items() for prompt in prompts]


def chosen(questions: Sequence[Question], categories: Sequence[str], limit: int | None) -> tuple[Question, ...]:
    """Those of these categories, at most so many, evenly spread. Raises UsageError for a category that none has."""
    known = sorted({q.category for q in questions})
    if unknown := [c for c in categories if c not in known]:
        raise UsageError(f"no prompt is of category {unknown[0]!r}", f"there are {', '.join(known)}")
    left = [q for q in questions if not categories or q.category in categories]
    if limit is None or limit >= len(left):
        return tuple(left)
    return tuple(left[i * len(left) // limit] for i in range(limit))
