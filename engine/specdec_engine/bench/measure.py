"""Measures one run of a plan, and tells rounding from bugs where greedy texts differ."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise

import torch

from specdec_engine.bench.figures import Sample
from specdec_engine.bench.plan import Arm, Run
from specdec_engine.constrain.wanted import Grammar
from specdec_engine.core.cycle_types import Sampling
from specdec_engine.drafters.base import empty_draft
from specdec_engine.errors import CheckFailed
from specdec_engine.pair import Pair
from specdec_engine.record.events import Cycle, known_ids, known_phases
from specdec_engine.record.prompt_files import Question
from specdec_engine.record.stats import Summary
from specdec_engine.verify.processors import process


def asked(pair: Pair, question: Question, turn: str, history: Sequence[tuple[str, str]] = ()) -> list[int]:
    """A turn's token ids, after what was said before."""
    return pair.encode(turn, history=history, system=question.system or None)


def measure_run(
    pair: Pair,
    arm: Arm | None,
    run: Run,
    question: Question,
    max_tokens: int,
    seed: int,
    grammar: Grammar | None = None,
) -> list[Sample]:
    """All turns of a conversation as one sample; none where the model said nothing. Sampled arms share the prompt's seed."""
    history, total, ids, passes = list[tuple[str, str]](), Summary(), list[int](), dict[str, tuple[int, float]]()
    prefill, turns = 0.0, list[int]()
    pair.forget()  # later turns keep what was read before; the first is alike whatever ran before it
    for turn in question.turns:
        said = list[int]()
        for event in pair.decode(
            question.ids or asked(pair, question, turn, history),
            k=0 if arm is None else arm.k,
            sampling=Sampling(run.form.temperature),
            rule="token" if arm is None else arm.rule,
            max_tokens=max_tokens,
            seed=seed,
            grammar=grammar if run.form.structured else None,
        ):
            if isinstance(event, Cycle):
                _check(event)
                total = total.plus(event)
                said += known_ids(event.emitted)
                n, seconds = passes.get(width := str(len(event.drafted) + 1), (0, 0.0))
                passes[width] = (n + 1, seconds + known_phases(event).verify_s)
            elif event.kind == "finished":
                prefill += event.prefill_s or 0.0
        ids += said
        turns.append(len(said))
        history.append((turn, pair.tokenizer.decode(said, skip_special_tokens=True)))
    if not total.emitted or (phases := total.phases) is None:
        return []
    return [
        Sample(
            question=run.question,
            repeat=run.repeat,
            temperature=run.form.temperature,
            arm=run.arm,
            seed=seed,
            emitted=total.emitted,
            cycles=total.cycles,
            drafted=total.drafted,
            tested=total.tested,
            accepted=total.accepted,
            **asdict(phases),
            prefill_s=prefill,
            passes=passes,
            token_ids=tuple(ids),
            turns=tuple(turns),
            quantize=run.form.quantize,
            structured=run.form.structured,
            context=run.form.context,
            forced=total.forced,
        )
    ]


def _check(cycle: Cycle) -> None:
    """Counters against ids. Raises CheckFailed."""
    places = range(cycle.accepted) if cycle.path is None else cycle.path
    kept = tuple(cycle.drafted[place] for place in places)
    cut = cycle.end in ("stop", "length")
    whole = len(cycle.emitted) <= cycle.accepted + 1 if cut else len(cycle.emitted) == cycle.accepted + 1
    if not whole or cycle.emitted[: len(kept)] != kept[: len(cycle.emitted)]:
        raise CheckFailed(
            f"cycle {cycle.index} of {cycle.drafter} says {cycle.accepted} of {len(cycle.drafted)} accepted, and emitted "
            f"{len(cycle.emitted)} tokens that are not those",
            "this is a bug in the draft or in specdec; no figure of this run is worth anything",
        )


@dataclass(frozen=True, slots=True)
class Divergence:
    """The first place where an arm's greedy text differs from plain decoding's."""

    question: int
    position: int
    plain: str
    arm: str
    gap: float | None
    """Between the logits of the two tokens, in a pass of its own; None where it was not looked at."""
    verdict: str
    """rounding, or bug."""


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Where they part; None if one begins with the other."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)


def explained(pair: Pair, question: Question, plain: Sample, arm: Sample) -> Divergence | None:
    """The first turn whose text differs, compared with a pass over the text that both share: two tokens that it finds about
    as likely were told apart by rounding; where it finds one far likelier, the other was wrong."""
    history, begin = list[tuple[str, str]](), 0
    for turn, (ours, theirs) in zip(question.turns, zip(_answers(plain), _answers(arm), strict=True), strict=True):
        if ours != theirs:
            return _divergence(pair, asked(pair, question, turn, history), plain.question, begin, ours, theirs)
        history.append((turn, pair.tokenizer.decode(ours, skip_special_tokens=True)))
        begin += len(ours)
    return None


def served_divergence(pair: Pair, question: int, prompt: Sequence[int], answer: Sequence[int]) -> Divergence | None:
    """The first place where a server's greedy text leaves that of our own target; None where it does not. A server computes
    in 16 bits: what those round away is called rounding."""
    events = pair.decode(list(prompt), k=0, max_tokens=len(answer), seed=0)
    ours = [token for event in events if isinstance(event, Cycle) for token in known_ids(event.emitted)]
    at = first_difference(ours, answer)
    if at is None:
        return None
    plain, served = (pair.tokenizer.decode([ids[at]]) for ids in (ours, answer))
    gap, rounding = _gap(pair, prompt, ours[:at], ours[at], answer[at], "bfloat16")
    return Divergence(question, at, plain, served, gap, "rounding" if gap <= rounding else "bug")


def _answers(sample: Sample) -> list[tuple[int, ...]]:
    ends = [0, *accumulate(sample.turns)]
    return [sample.token_ids[a:b] for a, b in pairwise(ends)]


def _divergence(
    pair: Pair, prompt: Sequence[int], question: int, begin: int, plain: Sequence[int], arm: Sequence[int]
) -> Divergence:
    at = first_difference(plain, arm)
    at = min(len(plain), len(arm)) if at is None else at
    plain_text, arm_text = (pair.tokenizer.decode([ids[at]]) if at < len(ids) else "the end" for ids in (plain, arm))
    if at >= min(len(plain), len(arm)):
        return Divergence(question, begin + at, plain_text, arm_text, None, "bug")
    gap, rounding = _gap(pair, prompt, plain[:at], plain[at], arm[at])
    return Divergence(question, begin + at, plain_text, arm_text, gap, "rounding" if gap <= rounding else "bug")


def _gap(
    pair: Pair, prompt: Sequence[int], answer: Sequence[int], a: int, b: int, dtype: str | None = None
) -> tuple[float, float]:
    """Distance of two tokens' logits after this answer, read token by token as plain decoding does (a wide pass rounds
    otherwise), and how far rounding can move it: some units of the last place of the largest logit, in the dtype that is
    computed with; 0.5 for the built-in target in bfloat16, where 0.25 was seen."""
    pair.target.prefill(prompt[:-1])
    text = [*prompt, *answer]
    for end in range(len(prompt), len(text) + 1):
        row = pair.target.score(text[:end], empty_draft(pair.target.device))
    if pair.asked:  # penalties are part of what the two were chosen by
        step = process(pair.asked, len(prompt), pair.target.device)
        row = step([*prompt, *answer], empty_draft(pair.target.device).tokens, row)
    logits = row[-1].float()
    precision = torch.finfo(getattr(torch, dtype or pair.environment["dtype"])).eps
    units = 4 if precision > 1e-4 else 256
    return abs(float(logits[a] - logits[b])), units * precision * max(float(logits[logits.isfinite()].abs().max()), 1.0)


def bandwidth(device: torch.device) -> float | None:
    """Bytes a second that this machine reads from memory with torch's threads: the least of five sums over 256 MB. Not
    measured on other devices than a CPU."""
    if device.type != "cpu":
        return None
    block, least = torch.ones(64 * 2**20), float("inf")
    for _ in range(5):
        began = time.perf_counter()
        block.sum()
        least = min(least, time.perf_counter() - began)
    return block.numel() * block.itemsize / least
