"""What another k would bring at a running server, estimated from what it answered with its own.

A cycle that drafted d tokens and had a of them accepted would, with k ≤ d, have emitted min(a, k) + 1. Its seconds lie, for k
between 0 and d, on the straight line between a plain token's and its own: on a GPU, where a pass over a few tokens costs
what one over one does and a draft's tokens cost alike, that is what is measured. Cycles would begin at other places, whose
acceptances are taken to be alike: so it is an estimate, but for the k that the server has. Beyond that nothing is known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from specdec_engine.attach.asked import Asked
from specdec_engine.attach.attached import Attached
from specdec_engine.bench.figures import FEWEST, Interval
from specdec_engine.errors import UsageError
from specdec_engine.record.events import Cycle, Started, TokenId
from specdec_engine.tune.whatif import WITHIN

_ENOUGH = 8
"""Plain cycles of its own after which a server needs no plain one beside it to tell what a token costs."""


@dataclass(frozen=True, slots=True)
class ServedAnswer:
    """A prompt's answer."""

    cycles: tuple[Cycle, ...]
    """After the first token, which is the prompt's."""
    context: tuple[TokenId, ...]
    """Prompt and answer."""
    begin: int
    """Where the answer begins."""
    plain_s: float | None
    """Seconds of a token at the same server without speculation; None where none was asked."""

    @property
    def tokens(self) -> int:
        return len(self.context) - self.begin


@dataclass(frozen=True, slots=True)
class ServedSetting:
    """A k, and what is expected of it."""

    k: int
    emitted: float
    """Tokens a cycle."""
    cycle_s: float | None
    speedup: Interval | None
    """Over plain decoding: geometric mean over the answers. Both None where no plain token was timed."""


@dataclass(frozen=True, slots=True)
class ServedTuned:
    """What was found."""

    answers: tuple[ServedAnswer, ...]
    plain_s: float | None
    curve: tuple[ServedSetting, ...]
    """From 0 to the most that the server drafted."""
    exact: bool
    """Whether the server itself told what it drafted."""

    @property
    def running(self) -> ServedSetting:
        """As the server runs."""
        return self.curve[-1]

    @property
    def decided(self) -> bool:
        """Whether there is enough to say which k is best."""
        return self.plain_s is not None and len(self.answers) >= FEWEST

    @property
    def best(self) -> ServedSetting:
        """The smallest k within a hundredth of the best; as it runs where nothing is known."""
        known = [(setting, setting.speedup.mean) for setting in self.curve if setting.speedup is not None]
        top = max((mean for _, mean in known), default=0.0)
        return next((setting for setting, mean in known if mean >= top * (1 - WITHIN)), self.running)


def asked(
    server: Attached, plain: Attached | None, prompts: Sequence[Asked], say: Callable[[str], None]
) -> Iterator[ServedAnswer]:
    """Every prompt's answer, in turns with the plain server's; one that does not fit is left out, unless all are. Raises
    UsageError then, ServerUnavailable and GenerationFailed."""
    answered, left_out = 0, None
    for number, prompt in enumerate(prompts):
        say(f"asking the server, answer {number + 1} of {len(prompts)}")
        try:
            first, second = (plain, server) if number % 2 else (server, plain)
            runs = {id(at): _run(at, prompt) for at in (first, second) if at is not None}
        except UsageError as error:
            left_out = error
            continue
        started, cycles = runs[id(server)]
        rest = tuple(cycle for cycle in cycles if cycle.cycle_s != 0 or cycle.drafted)
        emitted = tuple(token for cycle in cycles for token in cycle.emitted)
        beside = None if plain is None else _a_token(runs[id(plain)][1])
        if rest:
            answered += 1
            yield ServedAnswer(rest, (*started.prompt, *emitted), len(started.prompt), beside)
    if left_out is not None and not answered:
        raise left_out


def _run(server: Attached, prompt: Asked) -> tuple[Started, list[Cycle]]:
    events = list(server.begin(server.unseeded(prompt)).events())
    assert isinstance(events[0], Started)
    return events[0], [event for event in events if isinstance(event, Cycle)]


def _a_token(cycles: Sequence[Cycle]) -> float | None:
    """Seconds of one. Raises UsageError for a server that drafts."""
    if any(cycle.drafted for cycle in cycles):
        raise UsageError("the server at --plain drafts, too", "name one without speculation")
    times = [seconds for cycle in cycles if (seconds := cycle.seconds)]
    return fmean(times) if times else None


def tuned(answers: Sequence[ServedAnswer]) -> ServedTuned:
    """Raises UsageError where nothing was drafted."""
    cycles = [cycle for answer in answers for cycle in answer.cycles]
    most = max((len(cycle.drafted) for cycle in cycles), default=0)
    if not most:
        raise UsageError("the server drafted nothing", "start it with speculation: specdec tune prints the lines")
    beside = [answer.plain_s for answer in answers if answer.plain_s is not None]
    plain_s = fmean(beside) if beside else _own_plain(cycles)
    curve = tuple(_at(answers, k, plain_s) for k in range(most + 1))
    return ServedTuned(tuple(answers), plain_s, curve, all(cycle.exactness == "exact" for cycle in cycles))


def _own_plain(cycles: Sequence[Cycle]) -> float | None:
    """Seconds of a cycle in which it certainly drafted nothing."""
    found = [s for cycle in cycles if not cycle.drafted and cycle.exactness == "exact" and (s := cycle.seconds)]
    return median(found) if len(found) >= _ENOUGH else None


def _at(answers: Sequence[ServedAnswer], k: int, plain_s: float | None) -> ServedSetting:
    looked_at = [whole for answer in answers if (whole := _whole(answer))]
    emitted = [fmean(min(cycle.accepted, k) + 1 for cycle in cycles) for cycles in looked_at]
    if plain_s is None:
        return ServedSetting(k, fmean(emitted), None, None)
    own = [answer.plain_s or plain_s for answer in answers if _whole(answer)]
    spent = [fmean(_seconds(cycle, k, s) for cycle in cycles) for cycles, s in zip(looked_at, own, strict=True)]
    ratios = [s * tokens / took for s, tokens, took in zip(own, emitted, spent, strict=True)]
    return ServedSetting(k, fmean(emitted), fmean(spent), Interval.of(ratios))


def _whole(answer: ServedAnswer) -> Sequence[Cycle]:
    """Without the last cycle, which the answer's end may have cut; where it is the only one, with it."""
    return answer.cycles[:-1] or answer.cycles


def _seconds(cycle: Cycle, k: int, plain_s: float) -> float:
    """What it would have taken with k tokens at most."""
    took, drafted = cycle.seconds or plain_s, len(cycle.drafted)
    if not k:
        return plain_s
    return took if k >= drafted else plain_s + (took - plain_s) * k / drafted


LOOKUPS = ("ngram", "suffix")


def lookups_along(answers: Sequence[ServedAnswer], k: int) -> dict[str, float]:
    """Tokens a cycle of our own lookups on the same texts, by name; none where the server keeps ids back in every answer."""
    from specdec_engine.core.cycle_types import Sampling
    from specdec_engine.tune.answers import Answer
    from specdec_engine.tune.passes import lookup, proposed_along
    from specdec_engine.tune.whatif import expected_cycles

    told = [tuple(t for t in answer.context if t is not None) for answer in answers]
    whole = [
        Answer(ids, answer.begin, False)
        for ids, answer in zip(told, answers, strict=True)
        if len(ids) == len(answer.context)
    ]
    found = dict[str, float]()
    for name in LOOKUPS if whole else ():
        chances = [proposed_along(lookup(name), answer, Sampling())[0] for answer in whole]
        cycles = sum(sum(expected_cycles([along], k).values()) for along in chances)
        found[name] = sum(len(along.drafted) for along in chances) / cycles
    return found


def flags_for(engine: str, k: int) -> str:
    """What says k on the command line of a server, by the engine's name."""
    if not k:
        return "leave out its speculative flags"
    return {
        "vLLM": f'"num_speculative_tokens": {k} in --speculative-config',
        "SGLang": f"--speculative-num-steps {k} --speculative-num-draft-tokens {k + 1}; of a lookup the second alone, {k}",
    }.get(engine, f"--spec-draft-n-max {k}; of a lookup --spec-ngram-simple-size-m {k}")
