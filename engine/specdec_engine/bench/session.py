"""The runs of a plan, one after the other: what breaks one prompt or one arm costs no more than that."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from typing import Any

from specdec_engine.adaptive.controller import AutoK
from specdec_engine.bench import report
from specdec_engine.bench.figures import Sample
from specdec_engine.bench.lengthened import lengthened
from specdec_engine.bench.measure import Divergence, explained, measure_run
from specdec_engine.bench.plan import Form, Plan, Run, builtin_questions
from specdec_engine.constrain.wanted import Grammar
from specdec_engine.errors import OutOfMemory, UsageError
from specdec_engine.pair import Pair
from specdec_engine.record.prompt_files import Question

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
        self._lengthened = dict[tuple[int, int], Question]()

    def runs(self) -> list[Run]:
        """Those that are not measured yet."""
        done = {Run(s.question, s.repeat, s.form, s.arm) for s in self.samples}
        return [run for run in self.plan.runs() if run not in done]

    def warm_up(self) -> None:
        """A short run of every arm, dropped: kernels set themselves up, pages come in."""
        plain = [Run(0, -1, Form(0.0, quantize), None) for quantize in self._plain]
        arms = [Run(0, -1, replace(arm.form, context=0), number) for number, arm in enumerate(self.plan.arms)]
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
        pair = self._plain[run.form.quantize] if run.arm is None else self._own[run.arm]
        try:
            question = self._question(run.question, run.form.context)
            return measure_run(pair, arm, run, question, max_tokens, seed, self._grammar)
        except UsageError as error:
            what = f"prompt {run.question}" + (f" at {run.form.context:,} tokens" if run.form.context else "")
            self.left_out.setdefault(what, error.message)
        except OutOfMemory as error:
            if arm is None or run.arm is None:
                raise
            self._failed.add(run.arm)
            self.left_out[arm.label] = error.message
        return []

    def _question(self, number: int, context: int) -> Question:
        """Lengthened to so many tokens, or as it is. Raises UsageError."""
        if not context:
            return self.plan.questions[number]
        if (number, context) not in self._lengthened:
            questions = self.plan.questions
            others = [*questions[number + 1 :], *questions[:number]] or builtin_questions()
            pair = next(iter(self._plain.values()))
            self._lengthened[number, context] = lengthened(pair, questions[number], others, context)
        return self._lengthened[number, context]

    def record(self) -> dict[str, Any]:
        """What there is now."""
        return report.record(self.plan, self.samples, self.environment, {}, self._synthetic)

    def compared(self) -> dict[str, Any]:
        """The same, with greedy texts held against plain decoding's, which takes a pass for each that differs."""
        if self._synthetic is not None:
            return self.record()
        return report.record(self.plan, self.samples, self.environment, self._looked(), None)

    def _looked(self) -> dict[int, tuple[int, list[dict[str, Any]]]]:
        """By greedy arm: how many of its texts were compared, and where they differ."""
        first = [s for s in self.samples if s.temperature == 0 and s.repeat == 0]
        plain = {(s.question, s.form): s for s in first if s.arm is None}
        found = dict[int, tuple[int, list[dict[str, Any]]]]()
        for number, arm in enumerate(self.plan.arms):
            if arm.temperature:
                continue
            texts = [s for s in first if s.arm == number and (s.question, s.form) in plain]
            looked = (self._explained(plain[s.question, s.form], s) for s in texts)
            found[number] = len(texts), [asdict(d) for d in looked if d is not None]
        return found

    def _explained(self, plain: Sample, arm: Sample) -> Divergence | None:
        question = self._question(arm.question, arm.context)
        return explained(self._plain[arm.quantize], question, plain, arm)
