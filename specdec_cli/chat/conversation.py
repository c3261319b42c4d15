"""A conversation with a pair: what was said, and the next answer."""

from __future__ import annotations

import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from specdec_cli import options as opt
from specdec_cli import output
from specdec_cli.recorder import Recorder
from specdec_engine.errors import UsageError
from specdec_engine.record.chats import Message
from specdec_engine.record.events import Cycle, Event, Finished, TokenId
from specdec_engine.record.stats import Summary
from specdec_engine.record.text import TextStream, TokenText, counted

if TYPE_CHECKING:
    from specdec_engine.pair import Loader, Pair


@dataclass(slots=True)
class Conversation:
    """Turns kept as messages, rendered anew for each answer: whatever a template makes of them, only what differs from the
    text before is read again."""

    loader: Loader
    pair: Pair
    how: opt.Decoding
    k: int | Literal["auto"]
    template: Mapping[str, Any]
    recorder: Recorder
    color: output.Color
    messages: list[Message] = field(default_factory=list)
    """Without the system prompt, which is in `how`."""
    uses: list[int] = field(default_factory=list)
    """Tokens of the context after each turn, as far as they are known: of a chat that was loaded they are not."""
    events: list[Event] = field(default_factory=list)
    """Of the last answer."""
    files: set[Path] = field(default_factory=set)
    """Those that this chat was read from or written to: no other is written over."""
    summaries: list[Summary] = field(default_factory=list)
    """One an answer, also of those that were taken back."""

    @property
    def system(self) -> list[Message]:
        return [Message("system", self.how.system)] if self.how.system else []

    @property
    def limit(self) -> int | None:
        """Tokens of the context; None where the target does not say."""
        return self.pair.target.limit

    def ask(self, text: str) -> None:
        """Stream the answer, and keep both. What was said before Ctrl-C is kept; where nothing was, the turn is taken back.
        Raises UsageError for what cannot be asked, and GenerationFailed for a run that broke: the turn is not kept then."""
        turns = [{"role": m.role, "content": m.content} for m in (*self.system, *self.messages, Message("user", text))]
        ids = self.pair.encode_turns(turns, self.template)
        if self.limit is not None and len(ids) >= self.limit:
            raise UsageError(
                f"with this turn the chat has {len(ids):,} tokens, and {self.pair.target.name} takes {self.limit:,}",
                "/undo takes the last turn back, /clear begins anew; /save keeps what there is",
            )
        if typed := self.pair.marks_in(text, chat=True):
            output.note(typed)
        said = self._answer(ids)
        if said:
            self.messages += [Message("user", text), Message("assistant", said)]
            self.uses.append(self.summaries[-1].prompt_tokens + self.summaries[-1].emitted)
            output.note(self._figures())
        else:
            output.note("nothing was said, and the turn is taken back")

    def _answer(self, ids: list[int]) -> str:
        from specdec_engine.decoding.stopping import Stop

        how, pair = self.how, self.pair
        stops = Stop(how.max_tokens, strings=tuple(how.stop or ())).strings
        heard = _Heard(TextStream(pair.tokenizer, stops))
        sink = output.TextOutput(heard, self.color, marks=False)
        self.recorder.describe(TokenText(pair.tokenizer))
        seed = None if how.seed is None else how.seed + len(self.summaries)  # another for the same words said again
        controls = pair.controls(self.k, how.sampling, how.draft_temperature)
        run = pair.decode(ids, controls=controls, rule=how.rule, max_tokens=how.max_tokens, stop=stops, seed=seed)
        self.events, summary = [], Summary()
        kept = pair.target.runtime.known.common(ids)
        try:
            with _CtrlC() as asked:
                for event in output.reading(run, len(ids) - kept, lambda: pair.target.cached - kept):
                    asked.soon = isinstance(event, Cycle)
                    summary = self._take(event, summary, sink)
                    if asked.ends:
                        ended = Finished("cancelled", summary.emitted, summary.cycles, None, cached_tokens=kept)
                        summary = self._take(ended, summary, sink)
                        break
        finally:
            sink.end(summary)
        if not sys.stdout.isatty():
            output.say("")
        self.summaries.append(summary)
        return heard.text

    def _take(self, event: Event, summary: Summary, sink: output.TextOutput) -> Summary:
        self.events.append(event)
        self.recorder.write(event)
        sink.show(event)
        return summary.plus(event)

    def _figures(self) -> str:
        """Of the last answer, in a line."""
        s = self.summaries[-1]
        rate, per_cycle = s.tokens_per_second, s.mean_emitted_per_cycle
        read = s.prompt_tokens - (s.cached_tokens or 0)
        kept = "" if s.cached_tokens is None else f" (read {read:,}, kept {s.cached_tokens:,})"
        said = [
            f"{'–' if rate is None else f'{rate:.1f}'} tok/s",
            f"{'–' if per_cycle is None else f'{per_cycle:.2f}'} a cycle",
            f"{counted(s.emitted, 'token')}",
            f"prompt {s.prompt_tokens:,}{kept}",
            self.room(),
        ]
        if s.finish_reason == "cancelled":
            said.append("interrupted")
        if s.finish_reason == "length":
            full = self.limit is not None and self.uses[-1] >= self.limit
            said.append("the context is full" if full else f"cut at --max-tokens {self.how.max_tokens}")
        return " · ".join(said)

    def room(self) -> str:
        """Of the context, in words."""
        if self.messages and not self.uses:
            return "context known after the next answer"
        used = self.uses[-1] if self.uses else 0
        return f"{used:,} tokens used" if self.limit is None else f"{self.limit - used:,} of {self.limit:,} tokens left"

    # -- what commands do --------------------------------------------------------------------------------------------

    def undo(self) -> str:
        """Take back the last turn and its answer; the turn's words. Raises UsageError without one."""
        if not self.messages:
            raise UsageError("nothing has been said yet", "type something")
        asked = self.messages[-2].content
        del self.messages[-2:], self.uses[-1:]
        return asked

    def begin(self) -> None:
        """Forget what was said; the system prompt stays."""
        self.messages, self.uses = [], []

    def go_on(self, messages: Sequence[Message]) -> None:
        """After these messages, in the place of what was said; the first may be the system prompt, else there is none."""
        self.turn(system=next((m.content for m in messages if m.role == "system"), None))
        self.messages, self.uses = [m for m in messages if m.role != "system"], []

    def redraft(self, draft: str) -> None:
        """Draft with another one from now on. Raises what loading it raises, and keeps the one there is."""
        self.pair = self.loader.pair(draft)
        for sentence in self.pair.notes:
            output.note(sentence)

    def turn(self, **to: Any) -> None:
        """Set options of the next answers. Raises UsageError for values that no run has."""
        how = replace(self.how, **to)
        _ = how.sampling  # raises
        self.how = how


class _Heard:
    """A stream's text, kept as it is shown."""

    def __init__(self, stream: TextStream) -> None:
        self._stream, self.text = stream, ""

    def feed(self, token: TokenId) -> str:
        self.text += (piece := self._stream.feed(token))
        return piece

    def flush(self) -> str:
        self.text += (piece := self._stream.flush())
        return piece


class _CtrlC:
    """Until the block ends: while a prompt is read Ctrl-C breaks it off, in the middle of a pass; while an answer is written
    the first lets the cycle that runs end, and a second one does not."""

    def __init__(self) -> None:
        self.soon = self.ends = False
        """Whether the next event is near; whether the answer is to end."""

    def __enter__(self) -> _CtrlC:
        self._usual = signal.signal(signal.SIGINT, self._hit)
        return self

    def _hit(self, number: int, frame: object) -> None:
        if self.ends or not self.soon:
            raise KeyboardInterrupt
        self.ends = True

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGINT, self._usual)
