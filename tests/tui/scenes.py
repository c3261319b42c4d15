"""Runs to show: made by chance from a seed, consistent as a real engine's are, and without one."""

from __future__ import annotations

import random

from specdec_engine.record.events import Cycle, Finished, Raw, SettingChanged, Started
from specdec_tui.frame import Frame

TEXT = (
    "the quick brown fox jumps over a lazy dog while seven bright lanterns drift along that quiet river and nobody"
    " counts them twice because morning always comes too early for people who stay awake"
)
WORDS = TEXT.split()
PIECES = {i: f" {word}" for i, word in enumerate(WORDS)} | {
    100: ".",
    101: "\n",
    102: "ish",
    103: "\udcf0\udc9f",
    104: "\udc98\udc80",
}


def name(token: int) -> str:
    return PIECES.get(token, f"⟨{token}⟩")


def cycle(index: int, source: random.Random, k: int, context: int) -> Cycle:
    drafted = tuple(source.choice(list(PIECES)[:33]) for _ in range(k))
    q = [round(source.uniform(0.2, 1.0), 3) for _ in drafted]
    p = [round(source.uniform(0.05, 1.0), 3) for _ in drafted]
    u = [round(source.random(), 3) for _ in drafted]
    accepted = next((i for i in range(k) if u[i] >= min(1.0, p[i] / q[i])), k)
    final = source.choice(list(PIECES))
    rejected = accepted < k
    return Cycle(
        index=index,
        drafter="model" if k else "none",
        k=k,
        drafted=drafted,
        accepted=accepted,
        emitted=(*drafted[:accepted], final),
        end="recovered" if rejected else "bonus" if k else "plain",
        p=tuple(p),
        q=tuple(q),
        u=tuple(x if i <= accepted else None for i, x in enumerate(u)),
        overlap=tuple(round(min(a, b), 3) for a, b in zip(p, q, strict=True)),
        residual=((final, 0.41), (1, 0.22), (2, 0.13)) if rejected else (),
        raw_p=before(drafted, p, accepted + 1),
        raw_q=before(drafted, q, accepted + 1),
        draft_s=0.001 * k,
        verify_s=0.0125 + 0.0005 * k,
        other_s=0.0005,
        context=context,
    )


def before(drafted, warped, tested):
    """What T 0.8 made `warped` of: every mass a little flatter. No chance in it."""
    flatter = [round(0.8 * mass, 3) for mass in warped]
    others = [(14, 0.11, 0.08), (21, 0.05, 0.0)]
    rows = [((token, was, now), *others) for token, was, now in zip(drafted, flatter, warped, strict=True)]
    known = [i < tested for i in range(len(drafted))]
    return Raw(
        tuple(value if told else None for value, told in zip(flatter, known, strict=True)),
        tuple(row if told else () for row, told in zip(rows, known, strict=True)),
    )


def events(cycles: int, seed: int = 7, k: int = 4):
    source, context = random.Random(seed), 6
    settings = {
        "target": "target-model", "draft": "draft-model", "rule": "token", "coupling": "independent", "k": k,
        "temperature": 0.8, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "draft_temperature": 0.8, "adaptive": True,
        "max_tokens": 1000, "stop": [],
    }  # fmt: skip
    environment = {
        "plain_tokens_per_second": 72.0,
        "target": {"weight_bytes": 118_000_000, "token_bytes": 23_040},
        "drafts": {"draft-model": {"weight_bytes": 9_000_000, "token_bytes": 1_536}},
    }
    found = [Started((0, 1, 2, 3, 4, 101), settings, seed, environment)]
    for index in range(cycles):
        if index == 2:
            found.append(SettingChanged(2, "k", k, 0, "a plain pass is measured, which all else is held against"))
        if index == 3:
            found.append(SettingChanged(3, "k", 0, k, "drafting goes on"))
        made = cycle(index, source, 0 if index == 2 else k, context)
        context += len(made.emitted)
        found.append(made)
    return [*found, Finished("length", context - 6, cycles, 0.2, 612_000_000)]


def frame(cycles: int, seed: int = 7, k: int = 4) -> Frame:
    return Frame().plus(events(cycles, seed, k))
