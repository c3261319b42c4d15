"""What `specdec tune` found: as a record for programs, as lines for people."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from specdec_cli import profiles
from specdec_cli.tables import threads
from specdec_engine.core.cycle_types import Sampling
from specdec_engine.tune.servers import Launch, Wanted, launches, served
from specdec_engine.tune.whatif import best_of

if TYPE_CHECKING:
    from specdec_engine.pair import Pair
    from specdec_engine.tune.run import Tuned
    from specdec_engine.tune.whatif import Setting


def record(
    target: str, found: Tuned, pairs: Mapping[str, Pair], sampling: Sampling, profile: profiles.Profile | None
) -> dict[str, Any]:
    draft, k = found.setting
    drafts = {name: part for pair in pairs.values() for name, part in pair.environment["drafts"].items()}
    return {
        "schema": "specdec.tune/1",
        "environment": {**next(iter(pairs.values())).environment, "drafts": drafts},
        "target": target,
        "temperature": sampling.temperature,
        "answers": {"count": len(found.answers), "tokens": found.tokens},
        "costs": {
            member.name: {
                "pass_s": {str(n): cost * member.costs.plain_s for n, cost in member.costs.passes.items()},
                "draft_s": {str(n): cost * member.costs.plain_s for n, cost in member.costs.draft.items()},
            }
            for member in found.members
        },
        "drafts": [
            {"draft": name, "curve": [_point(setting) for setting in curve]} for name, curve in found.curves.items()
        ],
        "predicted": {"draft": found.best.draft, **_point(found.best)},
        "confirmed": [
            {
                "k": arm.arm.k,
                "speedup": arm.speedup.mean,
                "speedup_low": _finite(arm.speedup.low),
                "speedup_high": _finite(arm.speedup.high),
                "mean_emitted_per_cycle": arm.costs.emitted,
            }
            for arm in found.confirmed
        ],
        "gap": found.gap,
        "recommendation": {"draft": draft, "k": k, "speedup": found.advice.speedup, "reason": found.advice.reason},
        "command": shlex.join(_command(target, draft, k, sampling)),
        "profile": None if profile is None else profile.block(),
        "launches": [
            {
                "server": launch.server,
                "line": launch.line,
                "arguments": list(launch.command),
                "needs": list(launch.needs),
            }
            for launch in _launches(target, draft, found, sampling, drafts)
        ],
    }


def _launches(
    target: str, draft: str, found: Tuned, sampling: Sampling, drafts: Mapping[str, Mapping[str, Any]]
) -> list[Launch]:
    """Servers run one draft: of a cascade one member, with the k that is best for it alone."""
    member, left_out = served(draft, {name for name, part in drafts.items() if part["by_text"]})
    if member is None:
        return []
    k = best_of(found.curves[member]).k
    return launches(Wanted(target, member, k, not sampling.greedy, gguf_of(target), left_out))


def _command(target: str, draft: str, k: object, sampling: Sampling) -> list[str]:
    sampled = [] if sampling.greedy else ["--temperature", f"{sampling.temperature:g}"]
    return ["specdec", "generate", "-t", target, "-d", draft, "-k", str(k), *sampled, "PROMPT"]


def gguf_of(target: str) -> str | None:
    """The target's file, for llama.cpp."""
    if target == "builtin":
        from specdec_engine.models.builtin import builtin_gguf

        return str(builtin_gguf(offline=True))
    return target if target.endswith(".gguf") else None


def _finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None


def _point(setting: Setting) -> dict[str, Any]:
    return {
        "k": setting.k,
        "mean_emitted_per_cycle": setting.emitted,
        "speedup": setting.speedup.mean,
        "speedup_low": _finite(setting.speedup.low),
        "speedup_high": _finite(setting.speedup.high),
    }


def lines(
    found: Tuned, record: dict[str, Any], profile: profiles.Profile | None, given: bool, saved: bool
) -> Iterator[str]:
    """For people: what was looked at, the best of each draft, the best one's curve, and what to type."""
    made, costs = record["environment"], found.members[0].costs
    yield (
        f"{record['target']}, {made['weights']} on {made['device']}, {threads(made)} · "
        f"{len(found.answers)} answers, {found.tokens} tokens, temperature {record['temperature']:g}"
    )
    steps = " · ".join(f"{n} {1e3 * cost * costs.plain_s:.1f}" for n, cost in costs.passes.items() if n <= _SHOWN)
    yield f"a pass over n tokens, in ms: {steps}"
    yield ""
    width = max(len(name) for name in found.curves)
    yield f"{'draft':<{width}}   k  tok/cycle  predicted speedup"
    for curve in found.curves.values():
        best = best_of(curve)
        yield f"{best.draft:<{width}}  {best.k:>2}  {best.emitted:>9.2f}  {best.speedup}"
    yield ""
    yield f"{found.best.draft} by k:"
    yield f"  k  tok/cycle  {'predicted speedup':>{_BAR + 6}}"
    curve = found.curves[found.best.draft]
    top = max(setting.speedup.mean for setting in curve)
    for setting in curve[: max(_SHOWN, found.best.k + 2)]:
        bar = "█" * round(_BAR * setting.speedup.mean / top)
        mark = " ←" if setting is found.best else " slower" if setting.speedup.mean < 1 else ""
        yield f"{setting.k:>3}  {setting.emitted:>9.2f}  {bar:<{_BAR}} {setting.speedup.mean:.2f}×{mark}"
    for launch in record["launches"]:
        yield ""
        yield f"# {'; '.join(launch['needs'])}"
        yield launch["line"]
    if not record["launches"] and found.setting[1]:
        yield ""
        yield f"# no server loads {found.setting[0]}"
    if profile is not None:
        yield ""
        how = "generate and watch take it up" if saved else "--save writes it, and generate and watch take it up"
        yield f"# a profile for {profiles.path()}: {how}"
        yield from profile.lines()
    yield ""
    yield from (f"confirmed with k {arm.arm.k}: {arm.speedup}" for arm in found.confirmed)
    if found.gap is not None:
        yield _agreement(found.gap, given)
    yield f"→ {record['recommendation']['reason']}"
    yield record["command"]


_BAR = 40
_SHOWN = 8


def _agreement(gap: float, given: bool) -> str:
    said = f"measured and predicted are {abs(gap):.0%} apart"
    if given:
        return f"{said}; predicted for the recorded texts, measured on what the target says to their prompts now"
    return said if abs(gap) <= _AGREES else f"{said}: the machine was not quiet; trust the measured, or run again"


_AGREES = 0.10
