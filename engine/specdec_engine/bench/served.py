"""From a server's answers to figures, beside those of the same server without speculation. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any, TypedDict

from specdec_engine.attach.load import Load, ServedSample
from specdec_engine.bench.figures import FEWEST, Interval, geometric
from specdec_engine.bench.plan import digest_of
from specdec_engine.bench.report import SCHEMA
from specdec_engine.errors import UsageError, reason
from specdec_engine.record.files import parse_record, typed
from specdec_engine.record.prompt_files import Question


@dataclass(frozen=True, slots=True)
class Spread:
    """Of many seconds."""

    p50: float
    p95: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """None of none."""
        if not values:
            return None
        found = sorted(values)
        return cls(*(found[min(len(found) - 1, math.ceil(share * len(found)) - 1)] for share in (0.5, 0.95)))


@dataclass(frozen=True, slots=True)
class Side:
    """One server at one load."""

    tokens_per_second: float | None
    """Of one answer, after its first token."""
    throughput: float
    """Of all answers together."""
    ttft: Spread | None
    inter_token: Spread | None

    @classmethod
    def of(cls, loads: Sequence[Load]) -> Side | None:
        """None of none."""
        samples = [sample for load in loads for sample in load.samples]
        if not samples:
            return None
        tokens, seconds = sum(s.emitted - 1 for s in samples), sum(s.decode_s for s in samples)
        return cls(
            tokens / seconds if seconds else None,
            fmean(load.throughput for load in loads),
            Spread.of([s.ttft_s for s in samples]),
            Spread.of([t for s in samples for t in s.token_s]),
        )


@dataclass(frozen=True, slots=True)
class ServedFigures:
    """Speculation at one load."""

    concurrency: int
    speculative: Side
    plain: Side | None
    speedup: Interval | None
    """Seconds a token after the first, plain over speculative, geometric mean over prompts; None without a plain server."""
    throughput_ratio: float | None
    acceptance_rate: float | None
    alpha: float | None
    mean_emitted_per_cycle: float | None
    accepted_at: tuple[float, ...]
    """Share of the drafts of which the token at this position was accepted."""
    identical: int | None
    """Greedy texts that are plain decoding's."""
    compared: int | None


def figures_at(loads: Sequence[Load], concurrency: int, greedy: bool) -> ServedFigures | None:
    """None where the speculative server has not answered at this load."""
    mine = [load for load in loads if load.samples and load.samples[0].concurrency == concurrency]
    fast, slow = ([load for load in mine if load.samples[0].plain == plain] for plain in (False, True))
    side, plain_side = Side.of(fast), Side.of(slow)
    if side is None:
        return None
    samples = [sample for load in fast for sample in load.samples]
    drafted, accepted = sum(s.drafted for s in samples), sum(s.accepted for s in samples)
    tested = None if any(s.tested is None for s in samples) else sum(s.tested or 0 for s in samples)
    drafts = sum(s.drafts for s in samples)
    ratios = _ratios(samples, [sample for load in slow for sample in load.samples])
    same = _same(samples, [s for load in slow for s in load.samples]) if greedy and slow else (None, None)
    cycles = sum(s.cycles - 1 for s in samples)  # the first token is the prompt's
    return ServedFigures(
        concurrency,
        side,
        plain_side,
        Interval.of(list(ratios.values())) if ratios else None,
        None if plain_side is None or not plain_side.throughput else side.throughput / plain_side.throughput,
        accepted / drafted if drafted else None,
        accepted / tested if tested else None,
        sum(s.emitted - 1 for s in samples) / cycles if cycles else None,
        tuple(
            sum(s.accepted_at[i] for s in samples if i < len(s.accepted_at)) / drafts for i in range(_longest(samples))
        )
        if drafts
        else (),
        *same,
    )


def _longest(samples: Sequence[ServedSample]) -> int:
    return max((len(s.accepted_at) for s in samples), default=0)


def _ratios(fast: Sequence[ServedSample], slow: Sequence[ServedSample]) -> dict[int, float]:
    """Each prompt's speedup, over its answers in all blocks."""
    found = dict[int, float]()
    for question in sorted({s.question for s in fast}):
        sides = [
            [t for s in side if s.question == question and (t := s.seconds_a_token) is not None]
            for side in (slow, fast)
        ]
        if all(sides):
            found[question] = geometric(sides[0]) / geometric(sides[1])
    return found


def _same(fast: Sequence[ServedSample], slow: Sequence[ServedSample]) -> tuple[int, int]:
    """How many prompts have the same text from both servers, and of how many."""
    texts = {s.question: s.text for s in slow if s.block == slow[0].block}
    pairs = [(s.text, texts[s.question]) for s in fast if s.block == fast[0].block and s.question in texts]
    return sum(a == b for a, b in pairs), len(pairs)


def record(
    loads: Sequence[Load],
    concurrencies: Sequence[int],
    questions: Sequence[Question],
    said: Mapping[str, Any],
    environment: Mapping[str, Any],
    divergences: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """The whole as one JSON object. said: what all arms have in common: target, draft, k, temperature."""
    greedy = said["temperature"] == 0
    found = [f for c in concurrencies if (f := figures_at(loads, c, greedy)) is not None]
    samples = [sample for load in loads for sample in load.samples]
    base = found[0].plain if found else None
    return {
        "schema": SCHEMA,
        "environment": dict(environment),
        "prompts": {"count": len(questions), "digest": digest_of(questions)},
        "baseline": {
            "tokens_per_second": None if base is None else base.tokens_per_second,
            "samples": [asdict(s) for s in samples if s.plain],
        },
        "arms": [_arm(f, said, [s for s in samples if not s.plain], divergences) for f in found],
        "recommendation": _advice(found, said),
    }


def _arm(
    f: ServedFigures,
    said: Mapping[str, Any],
    samples: Sequence[ServedSample],
    divergences: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    return {
        **said,
        "concurrency": f.concurrency,
        "tokens_per_second": f.speculative.tokens_per_second,
        "speedup": None if f.speedup is None else f.speedup.mean,
        "speedup_low": _finite(None if f.speedup is None else f.speedup.low),
        "speedup_high": _finite(None if f.speedup is None else f.speedup.high),
        "throughput": f.speculative.throughput,
        "throughput_ratio": f.throughput_ratio,
        "acceptance_rate": f.acceptance_rate,
        "alpha": f.alpha,
        "mean_emitted_per_cycle": f.mean_emitted_per_cycle,
        "accepted_at": list(f.accepted_at),
        "ttft_s": _asdict(f.speculative.ttft),
        "inter_token_s": _asdict(f.speculative.inter_token),
        "plain": None if f.plain is None else asdict(f.plain),
        "identical": f.identical,
        "compared": f.compared,
        "first_divergences": list(divergences),
        **_as_vllm_names_it([s for s in samples if s.concurrency == f.concurrency], f),
        "samples": [
            {**asdict(s), "speculative_decoding": _as_aiperf_names_it(s)}
            for s in samples
            if s.concurrency == f.concurrency
        ],
    }


def _as_aiperf_names_it(s: ServedSample) -> dict[str, Any]:
    """The keys of AIPerf (0.14), by request: of steps with a draft alone, the target's own token counted in the length; the
    histogram has steps by accepted tokens, without the empty ones."""
    reached = [s.drafts, *s.accepted_at, 0]
    steps = {str(n): here - on for n, (here, on) in enumerate(pairwise(reached)) if here > on}
    return {
        "mean_acceptance_length": 1 + s.accepted / s.drafts if s.drafts else None,
        "draft_acceptance_rate": s.accepted / s.drafted if s.drafted else None,
        "acceptance_histogram": steps,
        "num_accepted_draft_tokens": s.accepted,
        "num_draft_tokens": s.drafted,
        "num_spec_steps": s.drafts,
    }


def _as_vllm_names_it(samples: Sequence[ServedSample], f: ServedFigures) -> dict[str, Any]:
    """The keys of `vllm bench serve`, whose acceptance length is that of cycles with a draft alone: 1 + accepted / drafts."""
    drafts, drafted = sum(s.drafts for s in samples), sum(s.drafted for s in samples)
    accepted = sum(s.accepted for s in samples)
    return {
        "spec_decode_num_drafts": drafts,
        "spec_decode_draft_tokens": drafted,
        "spec_decode_accepted_tokens": accepted,
        "spec_decode_acceptance_rate": f.acceptance_rate,
        "spec_decode_acceptance_length": 1 + accepted / drafts if drafts else None,
        "spec_decode_per_position_acceptance_rates": list(f.accepted_at),
    }


def _asdict(spread: Spread | None) -> dict[str, float] | None:
    return None if spread is None else asdict(spread)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _advice(found: Sequence[ServedFigures], said: Mapping[str, Any]) -> dict[str, Any] | None:
    """None without a plain server, and with too few prompts."""
    known = [f for f in found if f.speedup is not None]
    if not known or len({s for f in known for s in range(f.compared or FEWEST)}) < FEWEST:
        return None
    helps = [f for f in known if f.speedup is not None and f.speedup.low > 1]
    harms = [f for f in known if f.speedup is not None and f.speedup.high < 1]
    loads = (
        "at every load"
        if len(helps) == len(known)
        else f"with {', '.join(str(f.concurrency) for f in helps)} at a time"
    )
    reason = f"speculation is faster {loads}" if helps else "speculation is not clearly faster at any load"
    if harms:
        reason += f", and slower with {', '.join(str(f.concurrency) for f in harms)}"
    best = max(known, key=lambda f: f.speedup.mean if f.speedup is not None else 0.0)
    draft = said["draft"] if helps else "none"
    speedup = None if best.speedup is None else best.speedup.mean
    return {"draft": draft, "k": said["k"] if helps else 0, "speedup": speedup, "reason": reason}


class _Arm(TypedDict):
    temperature: float
    tokens_per_second: float | None
    speedup: float | None
    speedup_low: float | None
    speedup_high: float | None
    acceptance_rate: float | None
    mean_emitted_per_cycle: float | None
    identical: int | None
    compared: int | None


class _Prompts(TypedDict):
    digest: str


class _Record(TypedDict):
    """What stands beside another record in a table."""

    prompts: _Prompts
    environment: dict[str, Any]
    arms: list[_Arm]


def read_beside(path: Path, questions: Sequence[Question], temperature: float) -> dict[str, Any]:
    """A record of another engine, or of our own, of the same prompts. Raises UsageError for what is none."""
    hint = "give a file that specdec bench --out wrote, of the same prompts and temperature"
    try:
        found = parse_record(path.read_bytes())
        if found.get("schema") != SCHEMA:
            raise UsageError(f"{path} is not {SCHEMA}", hint)
        known = typed(found, _Record)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {reason(error)}", hint) from error
    if known["prompts"]["digest"] != digest_of(questions):
        raise UsageError(f"{path} is of other prompts", hint)
    if not any(arm["temperature"] == temperature for arm in known["arms"]):
        raise UsageError(f"{path} has nothing at temperature {temperature:g}", hint)
    return {**found, "arms": [arm for arm in found["arms"] if arm["temperature"] == temperature]}
