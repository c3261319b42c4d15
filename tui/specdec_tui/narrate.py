"""A cycle in words and numbers: the narration line, `replay --plain`, and what lessons point at."""

from __future__ import annotations

from specdec_engine.events import Cycle, SettingChanged
from specdec_tui.frame import Frame, View
from specdec_tui.pieces import Name, alone


def narrate(cycle: Cycle, name: Name) -> str:
    """One or two sentences."""
    said = [repr_of(token, name) for token in cycle.emitted[-1:]]
    last = said[0] if said else "nothing"
    number, k = cycle.index + 1, len(cycle.drafted)
    if not k:
        return f"Cycle {number}: nothing was drafted, so the pass gave one token, {last}.{_ended(cycle)}"
    if cycle.accepted == k:
        free = "" if _clipped(cycle) else f", and {last} comes free from the same pass"
        return f"Cycle {number}: kept all {k}{free}.{_ended(cycle)}"
    at = cycle.accepted
    refused = repr_of(cycle.drafted[at], name)
    dropped = f"; the {k - at - 1} after it dropped untested" if k - at > 1 else ""
    drawn = "" if _clipped(cycle) else f", {last} {_drawn(cycle)} instead"
    return f"Cycle {number}: kept {at} of {k}. {refused} rejected ({_held(cycle, at)}){drawn}{dropped}.{_ended(cycle)}"


def _held(cycle: Cycle, at: int) -> str:
    """The test of one position in numbers."""
    p, q, u = cycle.p[at], cycle.q[at], cycle.u[at]
    if p is None or q is None:
        return "the target says otherwise"
    ratio = min(1.0, p / q) if q else 0.0
    if p == 0.0:
        return "the target gives it no chance"
    return f"min(1, p/q) {ratio:.3f}" if u is None else f"u {u:.3f} ≥ min(1, p/q) {ratio:.3f}"


def _drawn(cycle: Cycle) -> str:
    mass = next((mass for token, mass in cycle.residual if cycle.emitted and token == cycle.emitted[-1]), None)
    if mass is not None and mass > 0.9995:
        return "is the target's choice"
    return "drawn from max(0, p − q)" + (f" ({mass:.2f})" if mass is not None else "")


def _clipped(cycle: Cycle) -> bool:
    """Whether the target's own token fell off the end."""
    return len(cycle.emitted) <= cycle.accepted


def _ended(cycle: Cycle) -> str:
    return {"stop": " Here the text ends.", "length": " Here the token budget ends."}.get(cycle.end, "")


def repr_of(token: int, name: Name) -> str:
    return f"“{alone(token, name).strip() or '␣'}”"


def step_words(view: View, name: Name) -> str:
    """What the step of a cycle that is shown in parts has just done."""
    cycle, partial = view.cycle, view.partial
    if cycle is None:
        return "Nothing is decoded yet."
    if partial is None or partial.final:
        return narrate(cycle, name)
    number, k = cycle.index + 1, len(cycle.drafted)
    if not partial.verified:
        token = repr_of(cycle.drafted[partial.drafted - 1], name) if partial.drafted else "nothing"
        return f"Cycle {number}: the draft guesses {token}, {partial.drafted} of {k}."
    if not partial.tested:
        return (
            f"Cycle {number}: the target reads all {k} guesses in one pass, and says what it would have said at each."
        )
    at = partial.tested - 1
    token, kept = repr_of(cycle.drafted[at], name), at < cycle.accepted
    p, q, u = cycle.p[at], cycle.q[at], cycle.u[at]
    if p is None or q is None or u is None:
        held = ""
    elif p >= q:
        held = f": p {p:.3f} ≥ q {q:.3f}, always kept"
    else:
        held = f": u {u:.3f} {'<' if kept else '≥'} p/q {p / q:.3f}"
    return f"Cycle {number}: {token} is {'kept' if kept else 'rejected'}{held}."


def changed(change: SettingChanged) -> str:
    why = f": {change.reason}" if change.reason else ""
    return f"From cycle {change.cycle + 1} on {change.name} is {change.new:g} instead of {change.old:g}{why}."


def script(frame: Frame, name: Name) -> list[str]:
    """The whole run, a sentence or two a line."""
    settings = frame.settings
    lines = [
        f"Target {settings.get('target')}, draft {settings.get('draft')}, k {settings.get('k')}, "
        f"temperature {settings.get('temperature', 0):g}, seed {frame.seed}; {len(frame.prompt)} tokens of prompt."
    ]
    changes = list(frame.changes)
    for cycle in frame.cycles:
        while changes and changes[0].cycle <= cycle.index:
            lines.append(changed(changes.pop(0)))
        lines.append(narrate(cycle, name))
    return [*lines, ending(frame)]


def ending(frame: Frame) -> str:
    """The run in one sentence."""
    s = frame.summary()
    if frame.failed is not None:
        return f"The run broke: {frame.failed.message} ({frame.failed.hint})."
    if not s.cycles:
        return "Nothing was decoded."
    rate = "" if s.tokens_per_second is None else f", {s.tokens_per_second:.1f} tokens a second"
    accepted = f"{s.accepted} of {s.drafted} drafted tokens were kept" if s.drafted else "nothing was drafted"
    how = {"stop": "The text is complete", "length": "The token budget is spent", "cancelled": "The run was stopped"}
    state = how.get(s.finish_reason or "", "The trace ends here")
    return f"{state}: {s.emitted} tokens in {s.cycles} target passes; {accepted}{rate}."
