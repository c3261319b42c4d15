"""What `specdec bench` measures with: every pair of its arms, loaded, and what is known of the machine."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, cast

from specdec_cli import options as opt
from specdec_cli import output
from specdec_cli.startup import interruptible
from specdec_engine.bench import report
from specdec_engine.bench.plan import Plan
from specdec_engine.errors import OutOfMemory, UsageError

if TYPE_CHECKING:
    from specdec_engine.bench.session import Session
    from specdec_engine.constrain.wanted import Grammar
    from specdec_engine.pair import Pair
    from specdec_engine.runtime.linear import Quantize


def load_session(
    plan: Plan,
    begun: dict[str, Any] | None,
    where: opt.Placement,
    synthetic: float | None,
    grammar: Grammar | None,
) -> Session:
    """All pairs loaded; an arm whose draft does not fit into memory beside the others is left out."""
    plain: dict[str, Pair] = {}
    pairs: dict[tuple[str | None, str], Pair] = {}
    too_large = dict[tuple[str | None, str], OutOfMemory]()
    with interruptible(), output.narrated() as narrated:
        from specdec_engine.bench.measure import bandwidth
        from specdec_engine.bench.session import Session
        from specdec_engine.pair import Loader

        longest = max(sum(map(len, q.turns)) // 3 + plan.max_tokens * len(q.turns) for q in plan.questions)
        longest += max(arm.context for arm in plan.arms)
        options = where.loading(longest, narrated)
        for form in dict.fromkeys(arm.quantize for arm in plan.arms):
            loader = Loader(plan.target, replace(options, quantize=cast("Quantize", form)) if form else options)
            if any(arm.draft != "none" for arm in plan.arms):
                loader.check_drafts()
            plain[form] = loader.pair("none")
            for draft in dict.fromkeys(arm.draft for arm in plan.arms if arm.quantize == form):
                try:
                    pairs[draft, form] = loader.pair(draft)
                except OutOfMemory as error:
                    too_large[draft, form] = error
    if not pairs:
        raise next(iter(too_large.values()))
    for (draft, _), reason in too_large.items():
        output.note(f"the draft {draft} is left out: {reason.message}")
    for sentence in dict.fromkeys(note for pair in pairs.values() for note in pair.notes):
        output.note(sentence)
    if synthetic is not None:
        pairs = {key: pair.synthetic(synthetic) for key, pair in pairs.items()}
    named = {key: key[0] or pair.drafter.name for key, pair in pairs.items()}
    left = (arm for arm in plan.arms if (arm.draft, arm.quantize) in named)
    plan = replace(plan, arms=tuple(replace(arm, draft=named[arm.draft, arm.quantize]) for arm in left))
    first = plain[plan.arms[0].quantize]
    _check_contexts(plan, first)
    environment = {**first.environment, **_machine(bandwidth(first.target.device))}
    environment["drafts"] = {name: part for pair in pairs.values() for name, part in pair.environment["drafts"].items()}
    environment["by_weights"] = {form: pair.environment["target"] for form, pair in plain.items() if form}
    before = [] if begun is None else report.samples_of(begun, plan, environment["threads"])
    by_name: dict[tuple[str | None, str], Pair] = {(named[key], key[1]): pair for key, pair in pairs.items()}
    return Session(plan, plain, by_name, environment, synthetic, before, grammar)


def _check_contexts(plan: Plan, pair: Pair) -> None:
    """Raises UsageError for a length that the target has no room for."""
    longest, limit = max(arm.context for arm in plan.arms), pair.target.limit
    later = max(sum(map(len, question.turns[1:])) // 3 for question in plan.questions)
    more = later + plan.max_tokens * max(len(question.turns) for question in plan.questions)
    if longest and limit is not None and longest + more > limit:
        raise UsageError(
            f"--context {longest} and some {more} tokens more are beyond {limit}, where {plan.target}'s context ends",
            f"choose at most {limit - more}",
        )


def _machine(bandwidth: float | None) -> dict[str, Any]:
    from specdec_engine.system.machine import cpu_name, gpu_driver

    return {
        "bandwidth_bytes_per_second": bandwidth,
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "cpu": cpu_name(),
        "gpu_driver": gpu_driver(),
        "utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "argv": sys.argv[1:],
    }
