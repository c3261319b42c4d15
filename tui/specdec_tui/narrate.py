"""A cycle in words and numbers: the narration line, `replay --plain`, and what lessons point at."""

from __future__ import annotations

from collections.abc import Sequence

from specdec_engine.record.events import Cycle, SettingChanged, TokenId
from specdec_engine.record.text import counted
from specdec_tui.frame import Frame, View
from specdec_tui.pieces import Name, StreamDecoder, alone, one_line, plain


def narrate(cycle: Cycle, name: Name, rule: str = "token") -> str:
    """One or two sentences."""
    last = repr_of(cycle.emitted[-1], name) if cycle.emitted else "nothing"
    number, k, kept, at = cycle.index + 1, len(cycle.drafted), cycle.accepted, cycle.rejected
    if not k:
        return f"Cycle {number}: nothing was drafted, so the pass gave one token, {last}.{_ended(cycle)}"
    if cycle.forced and at is None:
        and_last = "" if _clipped(cycle) else f"; {last} comes from the same pass"
        return f"Cycle {number}: {counted(k, 'token')} had to come by the grammar{and_last}.{_ended(cycle)}"
    if at is None:
        free = "" if _clipped(cycle) else f", and {last} comes free from the same pass"
        whole = {1: "the one guess", 2: "both guesses"}.get(k, f"all {k}")
        all_of = whole if kept == k else f"{kept} of {k}"
        return f"Cycle {number}: kept {all_of}{_by_branch(cycle, name)}{free}.{_ended(cycle)}"
    refused = repr_of(cycle.drafted[at], name)
    drawn = "" if _clipped(cycle) else f", {last} {_drawn(cycle, rule)} instead"
    if rule != "token":
        return f"Cycle {number}: kept {kept} of {k} by {rule} verification{drawn}.{_ended(cycle)}"
    untested = sum(cycle.fate(place) == "untested" for place in range(k))
    after = "" if cycle.parents is not None else " after it"
    others = sum(cycle.fate(place) == "rejected" for place in range(k)) - 1
    beside = f"; {counted(others, 'other')} rejected, too" if others else ""
    dropped = f"; the {'one' if untested == 1 else untested}{after} untested" if untested else ""
    kept_some = f"kept {kept} of {k}{_by_branch(cycle, name)}"
    return (
        f"Cycle {number}: {kept_some}. {refused} rejected ({held(cycle, at)}){drawn}{beside}{dropped}.{_ended(cycle)}"
    )


def held(cycle: Cycle, at: int) -> str:
    """The token rule's test of one position in numbers."""
    p, q, u = cycle.p[at], cycle.q[at], cycle.u[at]
    if p is None or q is None or u is None or not q:
        return "the target agrees" if cycle.fate(at) == "accepted" else "the target says otherwise"
    if p in (0.0, 1.0) and q == 1.0:  # temperature 0, or noise that both share: there is nothing to throw
        return "the target's choice too" if p else "not the target's choice"
    left = "" if cycle.parents is None or cycle.parents.index(cycle.parents[at]) == at else " of what is left"
    if p >= q:
        return f"p {p:.3f}{left} ≥ q {q:.3f}: always kept"
    return f"u {u:.3f} {'<' if u < p / q else '≥'} min(1, p/q) {p / q:.3f}{left}"


def _by_branch(cycle: Cycle, name: Name) -> str:
    """Say of a token tree how many branches it has, what was kept, and whether that is not what stood first."""
    if cycle.parents is None:
        return ""
    aside = any(cycle.parents.index(cycle.parents[place]) != place for place in cycle.path or ())
    leaves = len(set(range(len(cycle.parents))) - set(cycle.parents))
    shown = StreamDecoder(name)
    text = one_line("".join(shown(cycle.drafted[place]) for place in cycle.path or ()))
    kept = f", “{text}”" if cycle.path else ""
    return f" in {counted(leaves, 'branch')}{kept}" + (", on another than the first" if aside else "")


def _drawn(cycle: Cycle, rule: str) -> str:
    mass = next((mass for token, mass in cycle.residual if cycle.emitted and token == cycle.emitted[-1]), None)
    if mass is not None and mass >= 1.0:
        return "is the target's choice"
    if not cycle.residual:  # its observer tells neither p nor q
        return "is the target's own"
    left = "max(0, p − q)" if rule == "token" else "what is left of p"
    return f"drawn from {left}" + (f" ({mass:.2f})" if mass is not None else "")


def _clipped(cycle: Cycle) -> bool:
    """Whether the target's own token fell off the end."""
    return len(cycle.emitted) <= cycle.accepted


def _ended(cycle: Cycle) -> str:
    return {"stop": " Here the text ends.", "length": " Here the token budget ends."}.get(cycle.end, "")


def repr_of(token: TokenId, name: Name) -> str:
    return f"“{alone(token, name).strip() or '␣'}”"


def step_words(view: View, name: Name) -> str:
    """What the step of a cycle that is shown in parts has just done."""
    cycle, partial, rule = view.cycle, view.partial, view.frame.rule
    if cycle is None:
        return ending(view.frame) if view.frame.counters is not None else "Nothing is decoded yet."
    if partial is None or partial.final:
        return narrate(cycle, name, rule) + _why_nothing(view.frame, cycle)
    number, k = cycle.index + 1, len(cycle.drafted)
    if not partial.verified:
        token = repr_of(cycle.drafted[partial.drafted - 1], name) if partial.drafted else "nothing"
        expected = ", as a lookup had expected" if partial.drafted - 1 in cycle.guessed else ""
        who = "the grammar leaves only" if cycle.forced else "the draft guesses"
        return f"Cycle {number}: {who} {token}{expected}, {partial.drafted} of {k}."
    if not partial.tested:
        guesses = (
            "the guess in one pass, and says what it would have said there"
            if k == 1
            else (f"all {k} guesses in one pass, and says what it would have said at each")
        )
        return f"Cycle {number}: the target reads {guesses}."
    at = cycle.tests[partial.tested - 1]
    verdict = "kept" if cycle.fate(at) == "accepted" else "rejected"
    why = held(cycle, at) if rule == "token" else f"{rule} verification weighs the whole draft"
    return f"Cycle {number}: {repr_of(cycle.drafted[at], name)} is {verdict} ({why})."


def _why_nothing(frame: Frame, cycle: Cycle) -> str:
    """Why a cycle drafted nothing, where that is known."""
    if cycle.drafted or cycle.k is None:
        return ""
    if cycle.k:
        return " The draft was sure enough of nothing."
    turned = next((c for c in reversed(frame.changes) if c.name == "k" and c.cycle <= cycle.index), None)
    return f" k is 0: {one_line(turned.reason)}." if turned is not None and turned.reason else ""


def changed(change: SettingChanged) -> str:
    why = f": {one_line(change.reason)}" if change.reason else ""
    if isinstance(change.new, bool):
        return f"From cycle {change.cycle + 1} on k is {'chosen by what pays' if change.new else 'held'}{why}."
    name, new, old = one_line(change.name), plain(change.new), plain(change.old)
    return f"From cycle {change.cycle + 1} on {name} is {new} instead of {old}{why}."


def script(frame: Frame, name: Name) -> list[str]:
    """The whole run, a sentence or two a line."""
    settings = frame.settings
    lines = [
        f"Target {plain(settings.get('target'))}, draft {plain(settings.get('draft'))}, k {plain(settings.get('k'))}, "
        f"temperature {plain(settings.get('temperature'))}, seed {plain(frame.seed)}; "
        f"{counted(len(frame.prompt), 'token')} of prompt."
    ]
    lines += [f"Prompt: {_said(frame.prompt, name)}"] if frame.prompt else []
    changes = list(frame.changes)
    for cycle in frame.cycles:
        while changes and changes[0].cycle <= cycle.index:
            lines.append(changed(changes.pop(0)))
        lines.append(narrate(cycle, name, frame.rule))
    text = [token for cycle in frame.cycles for token in cycle.emitted]
    lines += [f"Text: {_said(text, name)}"] if text else []
    return [*map(one_line, lines), ending(frame)]


def _said(tokens: Sequence[TokenId], name: Name) -> str:
    """On one line."""
    shown = StreamDecoder(name)
    return one_line("".join(map(shown, tokens)).strip())


def ending(frame: Frame) -> str:
    """The run in one sentence."""
    s = frame.summary()
    if frame.failed is not None:
        return f"The run broke: {one_line(frame.failed.message)} ({one_line(frame.failed.hint)})."
    if not s.cycles:
        return "Nothing was decoded."
    if s.counted:
        return f"{frame.observer} tells totals alone: {s.accepted} of {counted(s.drafted, 'drafted token')} were kept."
    rate = "" if s.tokens_per_second is None else f", {s.tokens_per_second:.1f} tokens a second"
    kept = f"{s.accepted} of {counted(s.drafted, 'drafted token')} {'was' if s.drafted == 1 else 'were'} kept"
    accepted = kept if s.drafted else "nothing was drafted"
    spent = s.emitted == frame.settings.get("max_tokens", s.emitted)
    how = {
        "stop": "The text is complete",
        "length": "The token budget is spent" if spent else "The model's context is full",
        "cancelled": "The run was stopped",
    }
    state = how.get(s.finish_reason or "", "The trace ends here")
    tokens, passes = counted(s.emitted, "token"), counted(s.cycles, "target pass")
    return f"{state}: {tokens} in {passes}; {accepted}{rate}."
