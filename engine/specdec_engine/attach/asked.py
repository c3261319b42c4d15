"""The words of a run at a server, the same for every kind: what is asked, what it says of itself, of a prompt and of text."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from specdec_engine.attach.http import Server
from specdec_engine.core.cycle_types import Sampling
from specdec_engine.errors import GenerationFailed, ServerUnavailable
from specdec_engine.record.events import Cycle, Event, Finished, FinishReason, TokenId


@dataclass(frozen=True, slots=True)
class Asked:
    """A run at a server. What is not here cannot be asked of one: k, the rule and the draft are what it was started with."""

    text: str
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    seed: int | None = None
    chat: bool | None = None
    """True for the server's chat template, False for the text as it is, None for the template where there is one."""
    system: str | None = None
    fresh: bool = False
    """True to have the prompt read anew, where a server can be told so; else it may have parts of it from before."""

    @property
    def messages(self) -> list[dict[str, str]]:
        before = [{"role": "system", "content": self.system}] if self.system else []
        return [*before, {"role": "user", "content": self.text}]


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as the server sees it."""

    ids: tuple[int, ...]
    names: Mapping[int, str]
    """Their texts, as far as the server says them."""


@dataclass(frozen=True, slots=True)
class About:
    """A server's own description; None for what it does not say."""

    target: str
    draft: str
    """`none` without speculation, `unknown` where the server does not name it."""
    version: str | None
    k: int | None = None
    """Tokens drafted a cycle, at most."""
    context: int | None = None
    """Tokens of prompt and answer at most."""


@dataclass(slots=True)
class Texts:
    """The text of a run, as the server has it: a piece for each emitted token, in order. Where one character takes several
    tokens, all but the last have none."""

    pieces: deque[str] = field(default_factory=deque)
    names: dict[int, str] = field(default_factory=dict)
    """Tokens' own texts, as far as the server said them."""
    together: dict[int, tuple[tuple[int, ...], str]] = field(default_factory=dict)
    """Several tokens that came with one text, and that text, by each of them."""
    arrived_s: list[float] = field(default_factory=list)
    """When each part of the text arrived, by the clock of `perf_counter`."""
    partial: bool = False
    """True while the newest tokens are part of a character whose rest is still to come."""

    def take(self, ids: Sequence[TokenId], text: str, at_s: float) -> None:
        """Tokens that came together, and their text."""
        self.arrived_s.append(at_s)
        self.pieces.extend([""] * (len(ids) - 1) + [text])
        known = tuple(token for token in ids if token is not None)
        whole, self.partial = not self.partial and bool(text), not text
        if whole and len(known) == len(ids) == 1:
            self.names.setdefault(known[0], text)
        elif whole and len(known) == len(ids):
            self.together.update(dict.fromkeys(known, (known, text)))

    def feed(self, token: TokenId) -> str:
        """The next token's text; takes the place of a `TextStream`."""
        return self.pieces.popleft() if self.pieces else ""

    def flush(self) -> str:
        """Give what is left."""
        left = "".join(self.pieces)
        self.pieces.clear()
        return left


class Engine(Protocol):
    """**Protocol:** a kind of server."""

    name: str
    """The engine's name, as its makers write it."""
    about: About
    seeds: bool
    """Whether a seed can be asked for."""

    def prompt(self, asked: Asked) -> Prompt:
        """Through the server's own template and tokenizer. Raises UsageError for a prompt that cannot be, and
        ServerUnavailable."""
        ...

    def run(self, prompt: Prompt, asked: Asked, texts: Texts) -> Iterator[Event]:
        """Cycles as they come, then `Finished`; adds to `texts` before each. Closing it ends the run at the server. Raises
        ServerUnavailable, and GenerationFailed for a run that breaks off."""
        ...

    def learn(self, token: int, texts: Texts) -> None:
        """Ask for the text of a token that no answer has told, and add it to `texts`, if the server says it."""
        ...


MOST_A_CYCLE = 4096
"""Tokens: no engine drafts so many, and a server that says so must not fill this machine's memory."""


@dataclass(slots=True)
class CycleLog:
    """Numbers the cycles of a run, and counts what they emit."""

    prompt_tokens: int
    most: int
    """Tokens that were asked for."""
    index: int = 0
    emitted: int = 0

    def cycle(
        self,
        *,
        drafted: int,
        accepted: int,
        ids: Sequence[TokenId],
        seconds: float | None,
        exact: bool,
        ended: FinishReason | None = None,
        p: Sequence[float | None] = (),
    ) -> Cycle:
        """A chain of so many drafted tokens, of which the accepted are known by what was emitted. ended: the run, with this
        cycle. p: the target's probabilities of the emitted tokens, where they are told."""
        if max(drafted, len(ids)) > MOST_A_CYCLE:
            raise GenerationFailed(
                f"the server tells of a cycle of {max(drafted, len(ids)):,} tokens", "it is at fault"
            )
        if self.emitted > self.most + MOST_A_CYCLE:
            raise GenerationFailed(
                f"the server sends more than the {self.most:,} tokens that were asked for", "it is at fault"
            )
        drafted = max(drafted, accepted)
        known = tuple(ids[:accepted]) + (None,) * (drafted - len(ids[:accepted]))
        unknown = (None,) * drafted
        own = tuple(p[:accepted]) + (None,) * (drafted - len(p[:accepted]))
        found = Cycle(
            index=self.index,
            drafter="unknown" if drafted else "none",
            k=None,
            drafted=known,
            accepted=accepted,
            emitted=tuple(ids),
            end=_end(ended, drafted, accepted),
            p=own,
            q=unknown,
            u=unknown,
            overlap=unknown,
            residual=(),
            draft_s=None,
            verify_s=None,
            other_s=None,
            context=self.prompt_tokens + self.emitted,
            cycle_s=seconds,
            exactness="exact" if exact else "inferred",
        )
        self.index, self.emitted = self.index + 1, self.emitted + len(ids)
        return found

    def finished(self, reason: FinishReason, prefill_s: float | None) -> Finished:
        return Finished(reason, self.emitted, self.index, prefill_s)


def _end(ended: FinishReason | None, drafted: int, accepted: int) -> Any:
    if ended in ("stop", "length"):
        return ended
    return "plain" if not drafted else "bonus" if accepted == drafted else "recovered"


def sampled(sampling: Sampling) -> dict[str, Any]:
    """A request's words for how tokens are drawn, which all these servers share. All are given: llama.cpp filters unless it
    is told not to."""
    return {
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
    }


def detokenized(server: Server, value: Any, key: str) -> str | None:
    """What /detokenize says under this key; None where it says nothing."""
    try:
        found = server.post("/detokenize", value).json()
    except ServerUnavailable:
        return None
    return str(found[key]) if isinstance(found, dict) and key in found else None
