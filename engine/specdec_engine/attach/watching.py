"""A server's counters over time: what others' requests are accepted at."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from time import perf_counter, sleep

from specdec_engine.attach.counters import Reading, read_counters
from specdec_engine.attach.http import Server, refused, understood
from specdec_engine.errors import ServerUnavailable
from specdec_engine.record.events import Counters
from specdec_engine.record.stats import Summary

KEPT = 600
"""Readings of an engine that are kept for what is drawn of them: 20 minutes of one every 2 s."""


@dataclass(slots=True)
class EngineHistory:
    """What was read of one engine."""

    latest: Reading
    before: Counters | None = None
    """The reading before; None after the first, and after the server began anew."""
    rates: deque[float | None] = field(default_factory=lambda: deque(maxlen=KEPT))
    """The acceptance rate between two readings; None where nothing was drafted between them."""

    @property
    def total(self) -> Summary:
        """Since the server began."""
        return Summary().plus(self.latest.counters)

    @property
    def recent(self) -> Summary | None:
        """Between the last two readings; None where there are not two."""
        now, then = self.latest.counters, self.before
        if then is None:
            return None
        kept = [n - m for n, m in zip(now.accepted_at, then.accepted_at, strict=False)]
        return Summary().plus(
            Counters(
                now.at_s - then.at_s,
                now.cycles - then.cycles,
                now.drafted - then.drafted,
                now.accepted - then.accepted,
                now.emitted - then.emitted,
                tuple(kept),
            )
        )

    @property
    def interval_s(self) -> float:
        """Between the last two readings; 0 where there are not two."""
        return 0.0 if self.before is None else self.latest.counters.at_s - self.before.at_s

    @property
    def recent_tokens_per_second(self) -> float | None:
        """Of all requests together, between the last two readings."""
        now, then = self.latest.counters, self.before
        if then is None or now.at_s <= then.at_s:
            return None
        if now.emitted == then.emitted and self.latest.running:  # llama.cpp counts a request when it ends
            return None
        return (now.emitted - then.emitted) / (now.at_s - then.at_s)

    def take(self, reading: Reading) -> None:
        old, new = self.latest.counters, reading.counters
        pairs = ((new.cycles, old.cycles), (new.drafted, old.drafted), (new.accepted, old.accepted))
        begun_anew = new.emitted < old.emitted or any(now < then for now, then in pairs)
        self.latest, self.before = reading, None if begun_anew else old
        if (recent := self.recent) is not None:
            self.rates.append(recent.acceptance_rate)


def once(url: str, begun_s: float | None = None) -> list[Reading]:
    """Every engine's counters at this moment. Raises ServerUnavailable where there are none."""
    server = Server(url, silence_s=10.0)
    answer = server.get("/metrics")
    if answer.status != 200:
        if answer.status in (404, 501):
            raise ServerUnavailable(
                f"{server.url} has no /metrics ({answer.status})",
                "start llama-server with --metrics, SGLang with --enable-metrics; vLLM has them",
            )
        raise refused(answer, server.url, "/metrics")
    at_s = 0.0 if begun_s is None else perf_counter() - begun_s
    with understood(server.url, ServerUnavailable):
        return read_counters(answer.text, at_s)


def histories(url: str, every_s: float) -> Iterator[dict[str, EngineHistory]]:
    """After each reading, by engine. Raises ServerUnavailable where the first reading fails; a later one that fails is tried
    again, and raises after three in a row."""
    begun = perf_counter()
    found = {reading.engine: EngineHistory(reading) for reading in once(url, begun)}
    yield found
    failures = 0
    while True:
        sleep(every_s)
        try:
            readings = once(url, begun)
        except ServerUnavailable:
            failures += 1
            if failures == _MOST_FAILURES:
                raise
            continue
        failures = 0
        for reading in readings:
            if reading.engine in found:
                found[reading.engine].take(reading)
            else:
                found[reading.engine] = EngineHistory(reading)
        yield found


_MOST_FAILURES = 3
