"""The record of a benchmark: what was run, on what, every sample, every figure. No torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

from specdec_engine.bench.figures import (
    Costs,
    Interval,
    Recommendation,
    Sample,
    by_question,
    costs,
    recommend,
)
from specdec_engine.bench.plan import Arm, Form, Plan
from specdec_engine.core.registry import members_of
from specdec_engine.errors import UsageError, reason
from specdec_engine.record.files import parse_record, replace_file, typed

SCHEMA = "specdec.bench/1"


@dataclass(frozen=True, slots=True)
class ArmFigures:
    """What one arm did."""

    arm: Arm
    samples: tuple[Sample, ...]
    ratios: Mapping[int, float]
    """Speedup by prompt."""
    speedup: Interval
    by_category: Mapping[str, Interval]
    costs: Costs
    share: tuple[float, float, float]
    """Of its time: draft, verify, other."""
    tokens_per_second: float
    accepted: int
    drafted: int


def figures_of(plan: Plan, samples: Sequence[Sample]) -> list[ArmFigures]:
    """For every arm that has run beside plain decoding, in the plan's order."""
    return [
        found
        for number, arm in enumerate(plan.arms)
        if (found := _figures(plan, arm, _of(samples, number, arm), _of(samples, None, arm)))
    ]


def _of(samples: Sequence[Sample], number: int | None, arm: Arm) -> tuple[Sample, ...]:
    """The arm's own, or those of the plain decoding that it is held against."""
    return tuple(s for s in samples if s.arm == number and s.form == arm.form)


def _figures(plan: Plan, arm: Arm, runs: tuple[Sample, ...], plain: tuple[Sample, ...]) -> ArmFigures | None:
    ratios = by_question(runs, plain)
    if not ratios:
        return None
    kinds = sorted({plan.questions[q].category for q in ratios})
    total = sum(s.decode_s for s in runs)
    return ArmFigures(
        arm=arm,
        samples=runs,
        ratios=ratios,
        speedup=Interval.of(list(ratios.values())),
        by_category={
            kind: Interval.of([r for q, r in ratios.items() if plan.questions[q].category == kind]) for kind in kinds
        },
        costs=costs(runs, plain),
        share=(
            sum(s.draft_s for s in runs) / total,
            sum(s.verify_s for s in runs) / total,
            sum(s.other_s for s in runs) / total,
        ),
        tokens_per_second=sum(s.emitted for s in runs) / total,
        accepted=sum(s.accepted for s in runs),
        drafted=sum(s.drafted for s in runs),
    )


def advice(arms: Sequence[ArmFigures]) -> Recommendation | None:
    """None while nothing has run."""
    if not arms:
        return None
    return recommend([a.ratios for a in arms], [a.arm.k for a in arms], [a.arm.label for a in arms])


def alike(arms: Sequence[ArmFigures]) -> list[ArmFigures]:
    """The fastest arm and those that differ from it in k alone: what a k can be chosen among."""
    if not arms:
        return []
    best = max(arms, key=lambda a: a.speedup.mean).arm
    return [a for a in arms if replace(a.arm, k=best.k) == best]


def record(
    plan: Plan,
    samples: Sequence[Sample],
    environment: Mapping[str, Any],
    looked: Mapping[int, tuple[int, Sequence[Mapping[str, Any]]]],
    synthetic: float | None = None,
) -> dict[str, Any]:
    """The whole as one JSON object. looked: by arm, of how many prompts its greedy text was compared, and where it differed;
    with a chosen acceptance nothing is lossless, and the record says so."""
    arms = figures_of(plan, samples)
    plain = [s for s in samples if s.arm is None]
    free = [s for s in plain if not s.structured]
    forms = list(dict.fromkeys(arm.quantize for arm in plan.arms))
    contexts = list(dict.fromkeys(arm.context for arm in plan.arms))
    usual = replace(plan.arms[0].form, structured=False)
    first = _in_form(free, usual)
    advised = advice(alike(arms))
    found = {
        "schema": SCHEMA,
        "environment": dict(environment),
        "plan": {**asdict(plan), "digest": plan.digest},
        "synthetic_acceptance": synthetic,
        "lossless": synthetic is None,
        "prompts": {"count": len(plan.questions), "digest": plan.prompts_digest},
        "baseline": {
            "tokens_per_second": _rate(first),
            "by_weights": {form: _rate(_in_form(free, replace(usual, quantize=form))) for form in forms if form},
            "structured": _rate([s for s in plain if s.structured]),
            "context": usual.context or None,
            "by_context": {str(n): _after(_in_form(free, replace(usual, context=n))) for n in contexts if n},
            "roofline": roofline(first, environment),
            "samples": [asdict(s) for s in plain],
        },
        "unpaired": [asdict(s) for s in samples if s.arm is not None and plan.arms[s.arm] not in {a.arm for a in arms}],
        "arms": [_arm(a, looked.get(plan.arms.index(a.arm)), environment) for a in arms],
        "recommendation": None if advised is None else _advised(advised, alike(arms)),
    }
    return {key: _finite(value) for key, value in found.items()}


def _in_form(samples: Sequence[Sample], form: Form) -> list[Sample]:
    return [sample for sample in samples if sample.form == form]


def _after(samples: Sequence[Sample]) -> dict[str, float | None]:
    rate = _rate(samples)
    per_token = None if rate is None else 1 / rate
    return {"tokens_per_second": rate, "token_s": per_token, "prefill_s": _prefill(samples)}


def _prefill(samples: Sequence[Sample]) -> float | None:
    """Seconds until prompts were read, in the mean."""
    known = [s.prefill_s for s in samples if s.prefill_s is not None]
    return sum(known) / len(known) if known else None


def _rate(samples: Sequence[Sample]) -> float | None:
    """Tokens a second."""
    return sum(s.emitted for s in samples) / sum(s.decode_s for s in samples) if samples else None


def _arm(
    a: ArmFigures, looked: tuple[int, Sequence[Mapping[str, Any]]] | None, environment: Mapping[str, Any]
) -> dict[str, Any]:
    compared, divergences = (None, ()) if looked is None else looked
    return {
        "draft": a.arm.draft,
        "k": a.arm.k,
        "temperature": a.arm.temperature,
        "rule": a.arm.rule,
        "quantize": a.arm.quantize or None,
        "structured": a.arm.structured,
        "context": a.arm.context or None,
        "prefill_s": _prefill(a.samples),
        "forced": sum(s.forced for s in a.samples),
        "tokens_per_second": a.tokens_per_second,
        "speedup": a.speedup.mean,
        "speedup_low": a.speedup.low,
        "speedup_high": a.speedup.high,
        "slower_share": a.speedup.slower,
        "acceptance_rate": a.accepted / a.drafted if a.drafted else None,
        "alpha": a.costs.alpha,
        "mean_emitted_per_cycle": a.costs.emitted,
        "draft_share": a.share[0],
        "verify_share": a.share[1],
        "other_share": a.share[2],
        "c": a.costs.c,
        "v": {str(n): cost for n, cost in a.costs.v.items()},
        "predicted_speedup": a.costs.predicted,
        "cause": a.costs.cause(a.speedup.mean),
        "memory_bound_speedup": memory_bound(a.costs, a.arm.draft, environment),
        "identical": None if compared is None else compared - len(divergences),
        "compared": compared,
        "first_divergences": list(divergences),
        "categories": {kind: asdict(found) for kind, found in a.by_category.items()},
        "samples": [asdict(s) for s in a.samples],
    }


def _advised(advised: Recommendation, arms: Sequence[ArmFigures]) -> dict[str, Any]:
    arm = None if advised.arm is None else arms[advised.arm].arm
    return {
        "draft": "none" if arm is None else arm.draft,
        "k": 0 if arm is None else arm.k,
        "temperature": None if arm is None else arm.temperature,
        "rule": None if arm is None else arm.rule,
        "quantize": None if arm is None else arm.quantize or None,
        "structured": arm is not None and arm.structured,
        "context": None if arm is None else arm.context or None,
        "speedup": advised.speedup,
        "reason": advised.reason,
    }


def roofline(plain: Sequence[Sample], environment: Mapping[str, Any]) -> dict[str, float] | None:
    """How much of the memory bandwidth plain decoding uses, if a pass reads every weight once."""
    size, limit = environment.get("target", {}).get("weight_bytes"), environment.get("bandwidth_bytes_per_second")
    if not plain or not size or not limit:
        return None
    pass_s = sum(s.verify_s for s in plain) / sum(s.cycles for s in plain)
    return {"pass_s": pass_s, "bytes_per_second": size / pass_s, "share_of_bandwidth": size / pass_s / limit}


def memory_bound(costs: Costs, draft: str | None, environment: Mapping[str, Any]) -> float | None:
    """E / (k · draft bytes / target bytes + 1): the speedup where only reading weights costs time; as if every drafted token
    took a model's step, which in a cascade a lookup's do not."""
    size = environment.get("target", {}).get("weight_bytes")
    if not size:
        return None
    parts = environment.get("drafts", {})
    drafts: int = sum(parts[name].get("weight_bytes") or 0 for name in members_of(draft or "")[1] if name in parts)
    return costs.emitted / (costs.k * drafts / int(size) + 1)


def write(path: Path, found: Mapping[str, Any]) -> None:
    """Whole or not at all. Raises UsageError for a place that cannot be written."""
    try:
        replace_file(path, json.dumps(found, indent=1).encode())
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {reason(error)}", "choose another --out") from error


def read(path: Path) -> dict[str, Any]:
    """Raises UsageError for what is no such record."""
    hint = "give a file that specdec bench --out wrote"
    try:
        found = parse_record(path.read_bytes())
        if found.get("schema") != SCHEMA:
            raise UsageError(f"{path} is not {SCHEMA}", hint)
        _check(typed(found, _Record))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {reason(error)}", hint) from error
    return found


class _Plan(TypedDict):
    digest: str


class _Environment(TypedDict):
    threads: int


class _Measured(TypedDict):
    samples: list[Sample]


class _Arm(_Measured):
    draft: str | None
    k: int | Literal["auto"]
    temperature: float
    rule: str
    quantize: NotRequired[str | None]
    structured: NotRequired[bool]
    context: NotRequired[int | None]
    speedup: float
    speedup_low: float | None
    speedup_high: float | None


class _Record(TypedDict):
    """The parts of a record that are read again."""

    plan: _Plan
    environment: _Environment
    baseline: _Measured
    arms: list[_Arm]
    unpaired: NotRequired[list[Sample]]


def _check(found: _Record) -> None:
    """Raises ValueError for figures that cannot be divided by."""
    if any(arm["speedup"] <= 0 for arm in found["arms"]):
        raise ValueError("an arm's speedup is not above 0")
    if any(sample.emitted < 1 or sample.decode_s <= 0 for sample in _samples(found)):
        raise ValueError("it holds a run of no tokens, or in no time")


def _samples(found: _Record) -> list[Sample]:
    parts = (found["baseline"], *found["arms"])
    return [*(sample for part in parts for sample in part["samples"]), *found.get("unpaired", [])]


def samples_of(found: Mapping[str, Any], plan: Plan, threads: int) -> list[Sample]:
    """What was measured before. Raises UsageError if it was for another plan, or on another number of threads."""
    if found["plan"]["digest"] != plan.digest:
        raise UsageError(
            "the file to resume is of other arms, prompts or settings", "give the same options, or another --out"
        )
    if (then := found["environment"]["threads"]) != threads:
        raise UsageError(
            f"the file to resume was begun on {then} threads, and it is {threads} now",
            "resume when other programs leave as much of the machine as then, or give another --out",
        )
    return _samples(typed(found, _Record))


def _finite(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(v) for key, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, list | tuple) else value
