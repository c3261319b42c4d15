"""What no event of a trace may say: its readers need not look for it."""

from __future__ import annotations

from typing import TypedDict

from specdec_engine.record.events import Counters, Cycle, Event, SettingChanged, Started
from specdec_engine.record.files import typed


class _Settings(TypedDict, total=False):
    """Those of `Started.settings` that are read again."""

    target: str | None
    draft: str | None
    rule: str | None
    coupling: str | None
    k: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    draft_temperature: float | None
    adaptive: bool | None
    max_tokens: int | None


class _Part(TypedDict, total=False):
    weight_bytes: int | None
    token_bytes: int | None


class _Environment(TypedDict, total=False):
    """Those of `Started.environment` that are read again."""

    target: _Part
    drafts: dict[str, _Part] | None
    plain_tokens_per_second: float | None


def check(event: Event) -> None:
    """Raises ValueError, with the field, for an event that contradicts itself."""
    match event:
        case Cycle():
            _check_cycle(event)
        case Started():
            typed(event.settings, _Settings)
            typed(event.environment, _Environment)
        case Counters() if event.accepted > event.drafted:
            raise ValueError(f"accepted: {event.accepted} of {event.drafted} drafted tokens")
        case SettingChanged():
            typed({event.name: event.old}, _Settings)
            typed({event.name: event.new}, _Settings)


def _check_cycle(cycle: Cycle) -> None:
    """Raises ValueError."""
    k = len(cycle.drafted)
    _check_lengths(cycle, k)
    if len(cycle.emitted) > cycle.accepted + 1:
        raise ValueError(f"emitted: {len(cycle.emitted)} tokens where {cycle.accepted} were accepted")
    if cycle.parents is not None or cycle.path is not None:
        _check_tree(cycle, k)
    phases = (cycle.draft_s, cycle.verify_s, cycle.other_s)
    if None in phases and phases != (None, None, None):
        raise ValueError("draft_s, verify_s, other_s: all three are known, or none")


def _check_lengths(cycle: Cycle, k: int) -> None:
    """Raises ValueError for lists by position that are not of the draft's length."""
    if cycle.accepted > k:
        raise ValueError(f"accepted: {cycle.accepted} of {k} drafted tokens")
    lists = (("p", cycle.p), ("q", cycle.q), ("u", cycle.u), ("overlap", cycle.overlap))
    raw = [(n, r) for n, r in (("raw_p", cycle.raw_p), ("raw_q", cycle.raw_q)) if r is not None]
    for name, values in (*lists, *((n, r.drafted) for n, r in raw), *((n, r.likeliest) for n, r in raw)):
        if len(values) != k:
            raise ValueError(f"{name}: {len(values)} entries for {k} drafted tokens")
    if cycle.logprobs is not None and len(cycle.logprobs) != len(cycle.emitted):
        raise ValueError(f"logprobs: {len(cycle.logprobs)} entries for {len(cycle.emitted)} emitted tokens")
    if beyond := [place for place in cycle.guessed if place >= k]:
        raise ValueError(f"guessed: there is no place {beyond[0]} among {k} drafted tokens")


def _check_tree(cycle: Cycle, k: int) -> None:
    """Raises ValueError for a token tree whose parts do not belong together."""
    parents, path = cycle.parents, cycle.path
    if parents is None or path is None:
        raise ValueError("parents, path: both are given, or none")
    if len(parents) != k or any(not -1 <= parent < place for place, parent in enumerate(parents)):
        raise ValueError(f"parents: each of {k} drafted tokens has one, that stands before it, or -1")
    if len(path) != cycle.accepted:
        raise ValueError(f"path: {len(path)} places of {cycle.accepted} accepted tokens")
    before = -1
    for place in path:
        if not 0 <= place < k or parents[place] != before:
            raise ValueError(f"path: {place} does not follow {before}")
        before = place
