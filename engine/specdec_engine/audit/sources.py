"""Whose speculation is looked at: what each says after a prompt, many times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from specdec_engine.attach.asked import Asked
from specdec_engine.attach.attached import Attached
from specdec_engine.attach.load import at_once
from specdec_engine.core.cycle_types import Sampling
from specdec_engine.core.transfer import upload
from specdec_engine.drafters.base import empty_draft
from specdec_engine.errors import GenerationFailed, first_line
from specdec_engine.pair import Pair
from specdec_engine.record.events import Cycle
from specdec_engine.verify.processors import process
from specdec_engine.verify.sampling import warp

LOOKED_AT = 2
"""Tokens of each answer: the first, and the second where the first is the likeliest."""
_ROOM = 16
"""Tokens that an answer may have, so that drafts are as long as ever."""


@dataclass(frozen=True, slots=True)
class Said:
    """The beginning of one answer."""

    tokens: tuple[int, ...]
    drafted: tuple[int | None, ...] = ()
    """At each place the token that was drafted there, where that is told."""
    q: tuple[float | None, ...] = ()
    """The probabilities with which they were drawn."""


class Source(Protocol):
    """**Protocol:** an engine that says what a target says."""

    name: str
    first_place: int
    """The first token of an answer that is drafted and tested: a server's own first token comes from the prompt's pass."""

    def sample(self, prompt: Sequence[int], times: int, seed: int, done: Callable[[], None]) -> list[Said]:
        """So many answers, independent of each other."""
        ...


class OwnPair:
    """Our own engine."""

    first_place = 0

    def __init__(self, pair: Pair, sampling: Sampling, k: int, rule: str) -> None:
        self.name = f"specdec, draft {pair.drafter.name}, k {k}, {rule} rule"
        self._pair, self._sampling, self._k, self._rule = pair, sampling, k, rule

    def sample(self, prompt: Sequence[int], times: int, seed: int, done: Callable[[], None]) -> list[Said]:
        found = []
        for number in range(times):
            tokens, drafted, q = list[int](), list[int | None](), list[float | None]()
            events = self._pair.decode(
                list(prompt),
                k=self._k,
                sampling=self._sampling,
                rule=self._rule,
                max_tokens=_ROOM,
                seed=(seed + number) % 2**32,
            )
            for event in events:
                if isinstance(event, Cycle):
                    tokens += [token for token in event.emitted if token is not None]
                    places = _held_against(event)
                    drafted += [*(event.drafted[place] for place in places), None][: len(event.emitted)]
                    q += [*(event.q[place] for place in places), None][: len(event.emitted)]
                    if len(tokens) >= LOOKED_AT:
                        break
            found.append(Said(tuple(tokens[:LOOKED_AT]), tuple(drafted[:LOOKED_AT]), tuple(q[:LOOKED_AT])))
            done()
        return found


def _held_against(cycle: Cycle) -> list[int]:
    """The places in its draft of what emitted tokens were held against: the accepted ones, and the first that was not."""
    if cycle.path is None:
        return list(range(min(len(cycle.emitted), len(cycle.drafted))))
    return [*cycle.path, *([] if cycle.rejected is None else [cycle.rejected])]


class Transformers:
    """`generate` of transformers, with its assisted decoding, its prompt lookup or plain."""

    def __init__(
        self, model: Any, sampling: Sampling, k: int, more: dict[str, Any], name: str, first_place: int = 0
    ) -> None:
        """more: what makes `generate` speculate, such as `assistant_model`. first_place: of the first token that is drafted;
        assistants of Gemma 4 read what the target's first pass leaves, and begin with the second."""
        self.name, self.first_place = f"transformers, {name}", first_place
        self._model, self._sampling, self._k, self._more = model, sampling, k, more

    @torch.inference_mode()
    def sample(self, prompt: Sequence[int], times: int, seed: int, done: Callable[[], None]) -> list[Said]:
        found, s = [], self._sampling
        ids = upload(torch.tensor([list(prompt)]), self._model.device)
        for number in range(times):
            torch.manual_seed(seed + number)
            try:
                said = self._model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=True,
                    temperature=s.temperature,
                    top_k=s.top_k or 0,
                    top_p=s.top_p,
                    min_p=s.min_p or None,
                    max_new_tokens=self._k + LOOKED_AT,
                    pad_token_id=0,
                    **self._more,
                )
            except Exception as error:  # in as many ways as there are lines in it
                raise GenerationFailed(
                    f"transformers' generate fails: {first_line(error)}", "look at another pair"
                ) from error
            found.append(Said(tuple(said[0, len(prompt) : len(prompt) + LOOKED_AT].tolist())))
            done()
        return found


class ServedSource:
    """A server."""

    first_place = 1

    def __init__(self, server: Attached, sampling: Sampling, texts: dict[tuple[int, ...], str], at_once: int) -> None:
        """texts: of the prompts, by their ids; at_once: answers at a time."""
        self.name = f"{server.engine.name} at {server.server.url}"
        self._server, self._sampling, self._texts, self._at_once = server, sampling, texts, at_once

    def sample(self, prompt: Sequence[int], times: int, seed: int, done: Callable[[], None]) -> list[Said]:
        text = self._texts[tuple(prompt)]

        def one(number: int) -> Said:
            asked = Asked(text, self._sampling, max_tokens=_ROOM // 2, seed=(seed + number) % 2**31, chat=False)
            tokens = list[int | None]()
            for event in self._server.begin(asked).events():
                if isinstance(event, Cycle):
                    tokens += event.emitted
            done()
            return Said(tuple(-1 if token is None else token for token in tokens[:LOOKED_AT]))

        return at_once(one, times, self._at_once, self._server)


def distribution(pair: Pair, prompt: Sequence[int], said: Sequence[int], sampling: Sampling) -> np.ndarray:
    """[V] what the target says next, exactly, from one pass a token and no draft."""
    pair.target.prefill([*prompt, *said][:-1])
    row = pair.target.score([*prompt, *said], empty_draft(pair.target.device))
    if pair.asked:
        step = process(pair.asked, len(prompt), pair.target.device)
        row = step([*prompt, *said], empty_draft(pair.target.device).tokens, row)
    found: np.ndarray = warp(row[-1:].float(), sampling)[0].double().cpu().numpy()
    shares: np.ndarray = found / found.sum()
    return shares
