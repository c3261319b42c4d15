"""The runs of a plan, one after the other: what breaks one prompt or one arm costs no more than that."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from specdec_engine.adaptive.controller import AutoK
from specdec_engine.bench import report
from specdec_engine.bench.figures import Sample
from specdec_engine.bench.measure import explained, measure_run
from specdec_engine.bench.plan import Plan, Run
from specdec_engine.constrain.wanted import Grammar
from specdec_engine.errors import OutOfMemory, UsageError
from specdec_engine.pair import Pair

_WARM_TOKENS = 16


class Session:
    """Measured so far, and what could not be."""

    def __init__(
        self,
        plan: Plan,
        plain: Mapping[str, Pair],
        pairs: Mapping[tuple[str | None, str], Pair],
        environment: Mapping[str, Any],
        synthetic: float | None = None,
        before: Iterable[Sample] = (),
        grammar: Grammar | None = None,
    ) -> None:
        """plain: by the arms' weights; pairs: by their drafts and weights; before: samples of an earlier part of the same
        plan; grammar: of the arms that follow one."""
        self.plan, self.environment, self.samples = plan, environment, list(before)
        self.left_out = dict[str, str]()
        """What was given up, and why."""
        self._plain, self._synthetic, self._grammar = plain, synthetic, grammar
        # What `-k auto` has learnt belongs to its arm: others with the same draft and seeds would make it begin anew.
        self._own = [replace(pairs[arm.draft, arm.quantize], auto=AutoK()) for arm in plan.arms]
        self._failed = set[int]()

    def runs(self) -> list[Run]:
        """Those that are not measured yet."""
        done = {Run(s.question, s.repeat, s.temperature, s.arm, s.quantize, s.structured) for s in self.samples}
        return [run for run in self.plan.runs() if run not in done]

    def warm_up(self) -> None:
        """A short run of every arm, dropped: kernels set themselves up, pages come in."""
        plain = [Run(0, -1, 0.0, None, form) for form in self._plain]
        arms = [Run(0, -1, a.temperature, number, a.quantize, a.structured) for number, a in enumerate(self.plan.arms)]
        for run in (*plain, *arms):
            self._run(run, min(_WARM_TOKENS, self.plan.max_tokens), self.plan.seed - 1)

    def measure(self, run: Run) -> None:
        """Run it, if its arm still runs. A prompt that fills the context is left out, and so is an arm that needs too much
        memory; where plain decoding does, OutOfMemory is raised."""
        self.samples += self._run(run, self.plan.max_tokens, self.plan.seed + 1000 * run.repeat + run.question)

    def _run(self, run: Run, max_tokens: int, seed: int) -> list[Sample]:
        if run.arm in self._failed:
            return []
        arm = None if run.arm is None else self.plan.arms[run.arm]
        pair = self._plain[run.quantize] if run.arm is None else self._own[run.arm]
        try:
            question = self.plan.questions[run.question]
            return measure_run(pair, arm, run, question, max_tokens, seed, self._grammar)
        except UsageError as error:
            self.left_out.setdefault(f"prompt {run.question}", error.message)
        except OutOfMemory as error:
            if arm is None or run.arm is None:
                raise
            self._failed.add(run.arm)
            self.left_out[arm.label] = error.message
        return []

    def record(self) -> dict[str, Any]:
        """What there is now."""
        return report.record(self.plan, self.samples, self.environment, {}, self._synthetic)

    def compared(self) -> dict[str, Any]:
        """The same, with greedy texts held against plain decoding's, which takes a pass for each that differs."""
        if self._synthetic is not None:
            return self.record()
        looked = _compared(self.plan, self.samples, self._plain)
        return report.record(self.plan, self.samples, self.environment, looked, None)


def _compared(
    plan: Plan, samples: Sequence[Sample], pairs: Mapping[str, Pair]
) -> dict[int, tuple[int, list[dict[str, Any]]]]:
    """By greedy arm: how many of its texts were compared, and where they differ."""
    first = [s for s in samples if s.temperature == 0 and s.repeat == 0]
    plain = {_form(s): s for s in first if s.arm is None}
    found = dict[int, tuple[int, list[dict[str, Any]]]]()
    for number, arm in enumerate(plan.arms):
        if arm.temperature:
            continue
        texts = [s for s in first if s.arm == number and _form(s) in plain]
        looked = (explained(pairs[s.quantize], plan.questions[s.question], plain[_form(s)], s) for s in texts)
        found[number] = len(texts), [asdict(d) for d in looked if d is not None]
    return found


def _form(sample: Sample) -> tuple[int, str, bool]:
    """What a text shares with the plain one that it is compared with."""
    return sample.question, sample.quantize, sample.structured
