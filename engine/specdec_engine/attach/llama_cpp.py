"""llama.cpp's server as a source: the one that tells each cycle live and exactly.

With `timings_per_token` each chunk has running totals of drafted and accepted tokens, and the milliseconds of decoding. All
tokens of a cycle come with the same totals: a change begins a cycle, which owns the next accepted + 1 tokens, by
`predicted_n` and not by chunks, since tokens inside a character that is not complete are withheld, their ids too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any, Literal

from specdec_engine.attach.asked import MOST_A_CYCLE, About, Asked, CycleLog, Prompt, Texts, detokenized, sampled
from specdec_engine.attach.http import Server, refused, told_of
from specdec_engine.errors import GenerationFailed, UsageError
from specdec_engine.record.events import Cycle, Event, TokenId


class LlamaCpp:
    """See `Engine`."""

    name = "llama.cpp"
    seeds = True

    def __init__(self, server: Server, props: dict[str, Any]) -> None:
        """props: what it says under /props."""
        self._server, self._template = server, bool(props.get("chat_template"))
        settings = props.get("default_generation_settings") or {}
        self.about = About(
            target=_name(props),
            draft="unknown" if self._speculates() in (True, None) else "none",
            version=str(props["build_info"]) if props.get("build_info") else None,
            context=settings.get("n_ctx") if isinstance(settings.get("n_ctx"), int) else None,
        )

    def _speculates(self) -> bool | None:
        """None where it does not show its slots. /props says "none" even where a draft is loaded."""
        slots = self._server.get("/slots").json()
        if not isinstance(slots, list) or not slots:
            return None
        return any(isinstance(slot, dict) and slot.get("speculative") for slot in slots)

    def prompt(self, asked: Asked) -> Prompt:
        text = asked.text
        chat = self._template if asked.chat is None else asked.chat
        if asked.system and not chat:
            raise UsageError("--system needs a chat template", "leave out --raw, or put it into the prompt")
        if chat:
            text = self._said("/apply-template", {"messages": asked.messages}, "prompt", str)
        content = {"content": text, "add_special": True, "parse_special": True, "with_pieces": True}
        tokens = self._said("/tokenize", content, "tokens", list)
        ids = tuple(int(token["id"]) for token in tokens)
        return Prompt(ids, {int(token["id"]): _piece(token.get("piece")) for token in tokens})

    def _said(self, path: str, value: Any, key: str, kind: type[Any]) -> Any:
        answer = self._server.post(path, value)
        found = answer.json()
        if answer.status != 200 or not isinstance(found, dict) or not isinstance(found.get(key), kind):
            raise refused(answer, self._server.url, path)
        return found[key]

    def run(self, prompt: Prompt, asked: Asked, texts: Texts) -> Iterator[Event]:
        request = {
            "prompt": list(prompt.ids),
            "n_predict": asked.max_tokens,
            "stream": True,
            "timings_per_token": True,
            "return_tokens": True,
            "stop": list(asked.stop),
            "cache_prompt": not asked.fresh,
            **({} if asked.seed is None else {"seed": asked.seed % 2**32}),
            **sampled(asked.sampling),
        }
        book = _Book(CycleLog(len(prompt.ids), asked.max_tokens), texts)
        newest: Cycle | None = None
        try:
            with self._server.stream("/completion", request) as lines:
                for value, at_s in ((line.value, line.at_s) for line in lines if isinstance(line.value, dict)):
                    if "error" in value:
                        raise GenerationFailed(f"{self._server.url} says: {told_of(value)}", _VALID)
                    for cycle in book.read(value, at_s):
                        # The newest waits for the next line, which may say that the run ended with it.
                        if newest is not None:
                            yield newest
                        newest = cycle
                    if value.get("stop") is True:
                        yield from _last(book, newest, _REASONS.get(str(value.get("stop_type")), "stop"))
                        return
            raise GenerationFailed(f"{self._server.url} ended the stream before the text ended", _VALID)
        except GenerationFailed:
            if newest is not None:
                yield newest
            raise

    def learn(self, token: int, texts: Texts) -> None:
        if (found := detokenized(self._server, {"tokens": [token]}, "content")) is not None:
            texts.names[token] = found


def _name(props: dict[str, Any]) -> str:
    """The alias, which is the file's path where none was given."""
    path = str(props.get("model_path") or "?")
    alias = str(props.get("model_alias") or path)
    return PurePosixPath(path).name if alias == path else alias


_VALID = "what came until then is valid"


def _last(book: _Book, newest: Cycle | None, reason: Literal["stop", "length"]) -> Iterator[Event]:
    """What is left when a run ends: its last cycle says how."""
    left = [*([newest] if newest is not None else []), *book.close()]
    yield from left[:-1]
    yield from (replace(cycle, end=reason) for cycle in left[-1:])
    yield book.log.finished(reason, book.prefill_s)


_REASONS: dict[str, Literal["stop", "length"]] = {"limit": "length", "eos": "stop", "word": "stop"}


def _piece(piece: Any) -> str:
    """A token's text; one that is no text by itself is a list of bytes."""
    if isinstance(piece, list):
        return bytes(int(byte) & 255 for byte in piece).decode("utf-8", "surrogateescape")
    return str(piece or "")


@dataclass(slots=True)
class _Open:
    """A cycle whose tokens still come."""

    drafted: int
    accepted: int
    seconds: float
    ids: list[TokenId] = field(default_factory=list)

    @property
    def owed(self) -> int:
        return self.accepted + 1 - len(self.ids)


@dataclass(slots=True)
class _Book:
    """The cycles of one stream: who owns which token, by the running totals."""

    log: CycleLog
    texts: Texts
    prefill_s: float | None = None
    _tokens: int = 0
    _drafted: int = 0
    _accepted: int = 0
    _ms: float = 0.0
    _open: _Open | None = None
    _held: str = ""

    def read(self, chunk: dict[str, Any], at_s: float) -> Iterator[Cycle]:
        """The cycles that a chunk completes."""
        timings = chunk.get("timings")
        if not isinstance(timings, dict):
            return
        total, drafted, accepted, ms = _totals(timings)
        if drafted - self._drafted > MOST_A_CYCLE:
            raise GenerationFailed(
                f"the server tells of a cycle of {drafted - self._drafted:,} tokens", "it is at fault"
            )
        if self.prefill_s is None and isinstance(timings.get("prompt_ms"), int | float):
            self.prefill_s = max(0.0, timings["prompt_ms"]) / 1e3
        said = [token for token in chunk.get("tokens") or () if isinstance(token, int) and token >= 0]
        new = min(max(0, total - self._tokens), MOST_A_CYCLE + 1)
        ids: list[TokenId] = [*[None] * (new - len(said)), *said][:new]
        self._take_text(str(chunk.get("content") or ""), ids, at_s)
        if self._open is not None:
            yield from self._fill(ids)
        if (drafted, accepted) != (self._drafted, self._accepted):
            yield from self._close()
            begun = _Open(drafted - self._drafted, accepted - self._accepted, max(0.0, ms - self._ms) / 1e3)
            while len(ids) > begun.owed:  # passes without a draft, hidden in the same chunk
                yield self._plain(ids.pop(0), None)
            self._open, self._ms = begun, ms
            self._drafted, self._accepted = drafted, accepted
            yield from self._fill(ids)
        for number, token in enumerate(ids):
            # The first comes of the pass that reads the prompt, whose time is `prefill_s`; the server says 1 µs of it.
            first = self.log.index == 0 and not drafted
            yield self._plain(token, 0.0 if first or number else max(0.0, ms - self._ms) / 1e3)
            self._ms = ms
        self._tokens = total

    def close(self) -> Iterator[Cycle]:
        """The last cycle, if a stop has cut it."""
        yield from self._close()
        if self._held:
            self.texts.pieces.append(self._held)
            self._held = ""

    def _take_text(self, text: str, ids: list[TokenId], at_s: float) -> None:
        if not ids:
            self._held += text
            return
        self.texts.take(ids, self._held + text, at_s)
        self._held = ""

    def _fill(self, ids: list[TokenId]) -> Iterator[Cycle]:
        """Give the open cycle what it owns of these, and close it where it has all."""
        assert self._open is not None
        owed = self._open.owed
        self._open.ids += ids[:owed]
        del ids[:owed]
        if not self._open.owed:
            yield from self._close()

    def _close(self) -> Iterator[Cycle]:
        if (done := self._open) is None:
            return
        self._open = None
        yield self.log.cycle(
            drafted=done.drafted,
            accepted=done.accepted,
            ids=done.ids,
            seconds=done.seconds,
            exact=True,
        )

    def _plain(self, token: TokenId, seconds: float | None) -> Cycle:
        return self.log.cycle(drafted=0, accepted=0, ids=[token], seconds=seconds, exact=True)


def _totals(timings: dict[str, Any]) -> tuple[int, int, int, float]:
    """Tokens, drafted, accepted, milliseconds. Raises GenerationFailed for what cannot be."""
    try:
        counts = [int(timings.get(name, 0)) for name in ("predicted_n", "draft_n", "draft_n_accepted")]
        ms = float(timings["predicted_ms"])
    except (KeyError, TypeError, ValueError, OverflowError):
        raise GenerationFailed("the server's timings are not numbers", "is it llama.cpp's own?") from None
    if min(counts) < 0 or counts[2] > counts[1] or not 0 <= ms < 1e12:
        raise GenerationFailed(f"the server's timings cannot be: {counts}, {ms} ms", "is it llama.cpp's own?")
    return counts[0], counts[1], counts[2], ms
