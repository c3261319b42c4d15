"""Prompts to a server, several at a time, and what each answer took: a bench's samples, as a server's user sees them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from time import perf_counter, sleep
from typing import TypeVar

from specdec_engine.attach.asked import Asked
from specdec_engine.attach.attached import Attached
from specdec_engine.errors import UsageError
from specdec_engine.record.events import Cycle, TokenId
from specdec_engine.record.stats import Summary

Answered = TypeVar("Answered")


@dataclass(frozen=True, slots=True)
class ServedSample:
    """One answer of a server."""

    question: int
    block: int
    concurrency: int
    plain: bool
    """Of the server without speculation."""
    ttft_s: float
    """From the request to the first token, as it arrives here."""
    decode_s: float
    """From the first token to the last, as the cycles say."""
    emitted: int
    cycles: int
    drafted: int
    tested: int | None
    accepted: int
    accepted_at: tuple[int, ...]
    """By position in the draft."""
    drafts: int
    """Cycles with a draft."""
    token_s: tuple[float, ...]
    """Of each token after the first: its cycle's seconds, shared by the tokens of that cycle."""
    token_ids: tuple[TokenId, ...]
    text: str
    prompt_ids: tuple[int, ...]

    @property
    def seconds_a_token(self) -> float | None:
        """After the first; None for an answer of one token."""
        return self.decode_s / (self.emitted - 1) if self.emitted > 1 and self.decode_s > 0 else None


@dataclass(frozen=True, slots=True)
class Load:
    """The answers to all prompts, so many at a time."""

    samples: tuple[ServedSample, ...]
    wall_s: float
    left_out: Mapping[int, str]
    """Prompts that the server does not take, and why."""

    @property
    def throughput(self) -> float:
        """Tokens a second, of all together."""
        return sum(sample.emitted for sample in self.samples) / self.wall_s if self.wall_s else 0.0


def under_load(
    server: Attached, prompts: Sequence[Asked], concurrency: int, block: int, plain: bool, done: Callable[[], None]
) -> Load:
    """Every prompt once, at most so many at a time; done: called after each. A prompt that does not fit is left out. Raises
    ServerUnavailable and GenerationFailed."""
    samples, left_out = list[ServedSample](), dict[int, str]()

    def answer(number: int) -> None:
        try:
            samples.append(_answer(server, prompts[number], number, concurrency, block, plain))
        except UsageError as error:
            left_out[number] = error.message
        done()

    begun = perf_counter()
    at_once(answer, len(prompts), concurrency, server)
    return Load(tuple(sorted(samples, key=lambda s: s.question)), perf_counter() - begun, left_out)


def at_once(work: Callable[[int], Answered], times: int, most: int, server: Attached) -> list[Answered]:
    """What `work` gives for each number below `times`, at most so many at a time.

    Where one raises, or this is interrupted, what is asked of the server is given up, and nothing more is asked.
    """
    pool, asked = ThreadPoolExecutor(most), list[Future[Answered]]()
    try:
        asked += [pool.submit(work, number) for number in range(times)]
        wait(asked, return_when=FIRST_EXCEPTION)
        if (broken := next((a for a in asked if a.done() and a.exception() is not None), None)) is not None:
            broken.result()  # raises
        return [answer.result() for answer in asked]
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        while not all(answer.done() for answer in asked):  # one may have been about to begin
            server.server.hang_up()
            sleep(0.05)
        raise
    finally:
        pool.shutdown()


def _answer(server: Attached, asked: Asked, number: int, concurrency: int, block: int, plain: bool) -> ServedSample:
    run = server.begin(server.unseeded(asked))
    summary, ids, token_s, text = Summary(), list[TokenId](), list[float](), list[str]()
    begun = perf_counter()
    for event in run.events():
        summary = summary.plus(event)
        if isinstance(event, Cycle):
            if event.cycle_s:
                token_s += [event.cycle_s / len(event.emitted)] * len(event.emitted)
            ids += event.emitted
            text += [run.texts.feed(token) for token in event.emitted]
    first = run.texts.arrived_s[0] - begun if run.texts.arrived_s else perf_counter() - begun
    return ServedSample(
        question=number,
        block=block,
        concurrency=concurrency,
        plain=plain,
        ttft_s=first,
        decode_s=summary.decode_s or 0.0,
        emitted=summary.emitted,
        cycles=summary.cycles,
        drafted=summary.drafted,
        tested=None if summary.untested else summary.tested,
        accepted=summary.accepted,
        accepted_at=tuple(position.accepted for position in summary.positions),
        drafts=max((position.drafted for position in summary.positions), default=0),
        token_s=tuple(token_s),
        token_ids=tuple(ids),
        text="".join(text) + run.texts.flush(),
        prompt_ids=run.prompt.ids,
    )


def warm_up(server: Attached, asked: Asked) -> None:
    """A short answer that is dropped: a server compiles at its first."""
    for _ in server.begin(server.unseeded(replace(asked, max_tokens=8))).events():
        pass
