"""A run as plain values for a page: every figure and sentence is made here, and the page only shows them. Without Textual."""

from __future__ import annotations

from typing import Any

from specdec_engine.record.cycle_stats import budget
from specdec_engine.record.events import Cycle
from specdec_tui.decision import draw, left_after, left_title, scales, verdict
from specdec_tui.frame import Frame
from specdec_tui.ladder import FORCED, GUESSED, MARKS
from specdec_tui.narrate import changed, ending, narrate
from specdec_tui.panels import number
from specdec_tui.panels.warping import in_short
from specdec_tui.pieces import Name, StreamDecoder, alone, plain

_MOST_LEFT = 4


def told(frame: Frame, name: Name) -> dict[str, Any]:
    """Text in it may be anybody's: a page sets it as text, never as markup."""
    decode = StreamDecoder(name)
    prompt = "".join(map(decode, frame.prompt))
    changes, cycles = list(frame.changes), list[dict[str, Any]]()
    for number_, cycle in enumerate(frame.cycles, 1):
        said = list[str]()
        while changes and changes[0].cycle <= cycle.index:
            said.append(changed(changes.pop(0)))
        emitted = zip(cycle.emitted, cycle.origins, strict=True)
        made = {
            "text": [[decode(token), kind] for token, kind in emitted],
            "figures": _figures(frame.upto(number_)),
            "changed": said,
        }
        cycles.append(_cycle(frame.upto(number_), cycle, name) | made)
    return {
        "title": f"{plain(frame.settings.get('draft'))} drafts, {plain(frame.settings.get('target'))} decides",
        "facts": _facts(frame),
        "headline": _headline(frame),
        "prompt": {"tokens": len(frame.prompt), "text": prompt},
        "cycles": cycles,
        "ending": ending(frame),
        "legend": [[MARKS[kind], kind, words] for kind, words in _LEGEND.items()],
    }


_LEGEND = {
    "accepted": "kept: drafted, and the target agrees",
    "rejected": "rejected",
    "untested": "untested: after a rejection",
    "recovered": "recovered: the target's own instead",
    "bonus": "bonus: the target's own after all were kept",
}


def _facts(frame: Frame) -> list[str]:
    ks = [k for k in (frame.settings.get("k"), *(c.new for c in frame.changes if c.name == "k")) if isinstance(k, int)]
    auto = frame.settings.get("adaptive")
    facts = [
        f"k up to {plain(max(ks, default=None))}, chosen by what pays"
        if auto
        else f"k {plain(frame.settings.get('k'))}"
    ]
    facts += [f"temperature {plain(frame.settings.get('temperature'))}", f"seed {plain(frame.seed)}"]
    if frame.observer != "specdec":
        facts.append(f"{plain(frame.observer)}, {frame.summary().exactness}")
    return facts


def _headline(frame: Frame) -> list[str]:
    """The run's speedup and what it is made of; without a plain speed to hold it against, its tokens a pass."""
    s = frame.summary()
    made = None if frame.plain_s is None or not s.drafted else budget(s, frame.plain_s)
    if made is None or made.speedup is None:
        return [number(s.mean_emitted_per_cycle), "tokens a cycle"]
    return [
        f"{made.speedup:.2f}×",
        f"as fast as plain decoding: {made.emitted:.2f} tokens a cycle ÷ {made.cost:.2f} plain passes",
    ]


def _figures(past: Frame) -> list[list[str]]:
    """Of the run up to here: what it is called, and its value."""
    s = past.summary()
    made = None if past.plain_s is None or not s.drafted else budget(s, past.plain_s)
    return [
        ["speedup so far", "–" if made is None else f"{number(made.speedup)}×"],
        ["tokens a second", number(s.tokens_per_second, 1)],
        ["tokens a cycle", number(s.mean_emitted_per_cycle)],
        ["tested tokens kept, α", number(s.alpha)],
        ["tokens", str(s.emitted)],
    ]


def _cycle(frame: Frame, cycle: Cycle, name: Name) -> dict[str, Any]:
    drafted = [_drafted(frame, cycle, at, name) for at in range(len(cycle.drafted))]
    own = None
    if len(cycle.emitted) > cycle.accepted:
        kind = cycle.origins[-1]
        own = {"text": _word(cycle.emitted[-1], name), "kind": kind, "mark": MARKS[kind], "why": _OWN[kind]}
    return {
        "number": cycle.index + 1,
        "kept": f"{cycle.accepted}/{len(cycle.drafted)}" if cycle.drafted else "",
        "took": f"{1e3 * cycle.seconds:.1f} ms" if cycle.seconds else "",
        "by": plain(cycle.drafter) if cycle.drafted else "",
        "said": narrate(cycle, name, frame.rule),
        "drafted": drafted,
        "own": own,
        "begin": cycle.rejected if cycle.rejected is not None else max(0, len(drafted) - 1),
    }


_OWN = {
    "recovered": "drawn from what is left of the target's distribution after the rejection",
    "bonus": "the target read past the whole draft, so its next token comes from the same pass",
    "plain": "nothing was drafted: the target's own token",
    "accepted": "",
}


def _drafted(frame: Frame, cycle: Cycle, at: int, name: Name) -> dict[str, Any]:
    fate = cycle.fate(at)
    said, why = verdict(cycle, at, frame.rule)
    notes = ["".join(text for text, _ in line) for line in in_short(cycle, at, frame)]
    notes += ["a lookup expected it; the draft model chose it too"] if at in cycle.guessed else []
    notes += ["the grammar allows nothing else here: a free token"] if cycle.forced else []
    left = left_after(cycle, _MOST_LEFT) if at == cycle.rejected else ()
    before = FORCED if cycle.forced else GUESSED if at in cycle.guessed else ""
    return {
        "text": before + _word(cycle.drafted[at], name),
        "kind": fate,
        "mark": MARKS[fate],
        "scales": [[s.label, s.value, number(s.value, 3), s.style] for s in scales(cycle, at, frame.rule)],
        "draw": None if (u := draw(cycle, at, frame.rule)) is None else [u, number(u, 3)],
        "verdict": said,
        "why": why,
        "notes": notes,
        "left_title": left_title(frame.rule) if left else "",
        "left": [
            ["others" if e.token is None else _word(e.token, name), e.mass, f"{e.mass:.2f}" if e.mass else "", e.drawn]
            for e in left
        ],
    }


def _word(token: int | None, name: Name) -> str:
    return alone(token, name).strip() or "␣"
