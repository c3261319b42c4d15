"""vLLM's server as a source: a chunk with token ids is a cycle, by what is seen of it.

With `return_token_ids` each chunk has the ids of one step of the engine: the accepted tokens and the target's own. How many
were drafted is told at the end, where the server was started with `--per-request-spec-decode-metrics detailed`: the totals
then come as `Counters`. Until then the most that it drafts is taken for a step that accepted any, and cycles are called
inferred. What is accepted is seen, but for steps that vLLM joins when its own front end is busy: a chunk of more than k + 1
tokens is cut where the first steps could have ended.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from time import perf_counter
from typing import Any

from specdec_engine.attach.asked import MOST_A_CYCLE, About, Asked, CycleLog, Prompt, Texts, detokenized, sampled
from specdec_engine.attach.counters import always_drafts, positions_of
from specdec_engine.attach.http import Server, refused, told_of
from specdec_engine.errors import GenerationFailed, ServerUnavailable, UsageError
from specdec_engine.record.events import Counters, Cycle, Event, FinishReason, TokenId
from specdec_engine.record.text import spelled


class Vllm:
    """See `Engine`."""

    name = "vLLM"
    seeds = True

    def __init__(self, server: Server, version: str) -> None:
        self._server = server
        models = server.get("/v1/models")
        value = models.json()
        listed = value.get("data") if isinstance(value, dict) else None
        if models.status != 200 or not isinstance(listed, list) or not listed or not isinstance(listed[0], dict):
            raise refused(models, server.url, "/v1/models")
        self._model = str(listed[0].get("id") or "")
        most = listed[0].get("max_model_len")
        k, self._always = None, True
        metrics = server.get("/metrics")
        if metrics.status == 200:
            with suppress(ServerUnavailable):  # what stands before the server may answer in its place
                k, self._always = positions_of(metrics.text), always_drafts(metrics.text)
        self.about = About(
            target=PurePosixPath(self._model).name if self._model.startswith("/") else self._model,
            draft="none" if k == 0 else "unknown",
            version=version,
            k=k or None,
            context=most if isinstance(most, int) else None,
        )

    def prompt(self, asked: Asked) -> Prompt:
        common = {"model": self._model, "return_token_strs": True}
        answer = None
        if asked.chat is not False:
            answer = self._server.post(
                "/tokenize", {**common, "messages": asked.messages, "add_generation_prompt": True}
            )
            if answer.status != 200 and asked.chat:
                raise refused(answer, self._server.url, "/tokenize")
        if answer is None or answer.status != 200:  # without a template, a conversation is refused
            if asked.system:
                raise UsageError("--system needs a chat template", "leave out --raw, or put it into the prompt")
            answer = self._server.post("/tokenize", {**common, "prompt": asked.text, "add_special_tokens": True})
        value = answer.json()
        ids = value.get("tokens") if isinstance(value, dict) else None
        if answer.status != 200 or not isinstance(ids, list) or not all(isinstance(i, int) and i >= 0 for i in ids):
            raise refused(answer, self._server.url, "/tokenize")
        return Prompt(tuple(ids), _names(ids, value.get("token_strs")))

    def run(self, prompt: Prompt, asked: Asked, texts: Texts) -> Iterator[Event]:
        request = {
            "model": self._model,
            "prompt": list(prompt.ids),
            "max_tokens": asked.max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
            "stop": list(asked.stop),
            **({} if asked.seed is None else {"seed": asked.seed % 2**63}),
            **self._drawn(asked),
        }
        # Processed or raw is the server's setting, and only here the two are the same: p is then what it says.
        if asked.sampling.temperature == 1.0 and asked.sampling.filters == (0, 1.0, 0.0):
            request["logprobs"] = 0
        steps = _Steps(
            CycleLog(len(prompt.ids), asked.max_tokens),
            texts,
            self.about.k or 0,
            self.about.draft == "none",
            self._always,
            perf_counter(),
        )
        ended: FinishReason | None = None
        with self._server.stream("/v1/completions", request) as lines:
            for line in lines:
                if line.value is None:
                    break
                if not isinstance(line.value, dict):
                    continue
                if "error" in line.value:
                    raise GenerationFailed(
                        f"{self._server.url} says: {told_of(line.value)}", "see the server's own log"
                    )
                yield from steps.read(line.value, line.at_s)
                ended = steps.ended or ended
        if ended is None:
            raise GenerationFailed(
                f"{self._server.url} ended the stream before the text ended", "what came until then is valid"
            )
        if steps.totals is not None:
            yield steps.totals
        yield steps.log.finished(ended, steps.prefill_s)

    @staticmethod
    def _drawn(asked: Asked) -> dict[str, Any]:
        """At temperature 0 no filters, of which the likeliest token is left anyway."""
        return {"temperature": 0} if asked.sampling.greedy else sampled(asked.sampling)

    def learn(self, token: int, texts: Texts) -> None:
        """All that came with it at once, where their text has these tokens again: each question is a way there and back."""
        if token in texts.together:
            ids, text = texts.together[token]
            body = {"model": self._model, "prompt": text, "add_special_tokens": False, "return_token_strs": True}
            with suppress(ServerUnavailable):
                value = self._server.post("/tokenize", body).json()
                if isinstance(value, dict) and value.get("tokens") == list(ids):
                    texts.names.update(_names(ids, value.get("token_strs")))
        if token not in texts.names:
            found = detokenized(self._server, {"model": self._model, "tokens": [token]}, "prompt")
            texts.names.update({} if found is None else {token: found})


def _names(ids: Sequence[int], strings: Any) -> dict[int, str]:
    """Of tokens as the vocabulary spells them; empty where it is not told."""
    if not isinstance(strings, list) or len(strings) != len(ids):
        return {}
    byte_level = any("Ġ" in str(string) or "Ċ" in str(string) for string in strings)
    return {token: spelled(str(string), byte_level) for token, string in zip(ids, strings, strict=True)}


@dataclass(slots=True)
class _Steps:
    """The steps of one stream, chunk by chunk."""

    log: CycleLog
    texts: Texts
    k: int
    """Tokens that the server drafts at most; 0 where it drafts none, or does not say."""
    plain: bool
    """Whether it drafts none."""
    always: bool
    """Whether every step drafts, as far as the server's counters say: a lookup often has nothing to propose."""
    begun_s: float
    prefill_s: float | None = None
    ended: FinishReason | None = None
    totals: Counters | None = None
    _last_s: float = 0.0
    _text: str = field(default="")

    def read(self, chunk: dict[str, Any], at_s: float) -> Iterator[Cycle]:
        choices = chunk.get("choices")
        if not choices:
            self.totals = _totals(chunk, at_s - self.begun_s, self.log.emitted)
            return
        choice = choices[0]
        reason = choice.get("finish_reason")
        self.ended = None if reason is None else "length" if reason == "length" else "stop"
        ids = [token for token in choice.get("token_ids") or () if isinstance(token, int) and token >= 0]
        self._text += str(choice.get("text") or "")
        if not ids:
            return
        if len(ids) > MOST_A_CYCLE:
            raise GenerationFailed(f"the server sends {len(ids):,} tokens at once", "it is at fault")
        self.texts.take(ids, self._text, at_s)
        self._text = ""
        first, chances = self.prefill_s is None, _probabilities(choice, len(ids))
        if first:
            self.prefill_s = self._last_s = at_s - self.begun_s
        seconds, self._last_s = at_s - self.begun_s - self._last_s, at_s - self.begun_s
        # The first token comes of the pass that reads the prompt, alone, but for one that was joined with what followed.
        size = 1 if self.plain else self.k + 1 if self.k else len(ids)
        parts = ([ids[:1]] if first else []) + _cut(ids[1:] if first else ids, size)
        for number, part in enumerate(parts):
            at = sum(map(len, parts[:number]))
            accepted = len(part) - 1
            yield self.log.cycle(
                drafted=max(self.k, accepted) if accepted or (self.always and not (first and number == 0)) else 0,
                accepted=accepted,
                ids=part,
                seconds=0.0 if first else seconds / len(parts),
                exact=False,
                ended=self.ended if number == len(parts) - 1 else None,
                p=chances[at : at + len(part)],
            )


def _cut(ids: Sequence[TokenId], size: int) -> list[Sequence[TokenId]]:
    """Several steps that came as one: as many whole ones as there can be."""
    return [ids[i : i + size] for i in range(0, len(ids), size)]


def _probabilities(choice: dict[str, Any], n: int) -> Sequence[float | None]:
    """Of the emitted tokens; empty where they are not told. A logarithm of -9999 is that of 0, and null one of no number."""
    said = choice.get("logprobs")
    values = said.get("token_logprobs") if isinstance(said, dict) else None
    if not isinstance(values, list) or len(values) != n:
        return ()
    return [math.exp(min(0.0, value)) if isinstance(value, int | float) else None for value in values]


def _totals(chunk: dict[str, Any], at_s: float, emitted: int) -> Counters | None:
    """What the last chunk says of the run's steps, where the server was asked to count them."""
    found = (chunk.get("metrics") or {}).get("speculative_decoding")
    if not isinstance(found, dict):
        return None
    try:
        counts = [int(found[name]) for name in ("num_spec_steps", "num_draft_tokens", "num_accepted_draft_tokens")]
        kept = [int(n) for n in found.get("acceptance_histogram") or ()]
        pairs = list(zip(found.get("per_step_accepted") or (), found.get("per_step_drafted") or (), strict=True))
        tested = sum(min(int(a) + 1, int(d)) for a, d in pairs) if len(pairs) == counts[0] else None
        at = tuple(sum(kept[i + 1 :]) for i in range(len(kept) - 1))
    except (KeyError, TypeError, ValueError):
        return None
    if min(*counts, *kept, 0) < 0 or counts[2] > counts[1]:
        return None
    steps, drafted, accepted = counts
    return Counters(at_s, steps, drafted, accepted, emitted, at, tested)
