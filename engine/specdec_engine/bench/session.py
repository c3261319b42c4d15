"""The runs of a plan, one after the other: what breaks one prompt or one arm costs no more than that."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from specdec_engine.adaptive.controller import AutoK
from specdec_engine.bench import report
from specdec_engine.bench.figures import Sample
from specdec_engine.bench.measure import explained, run
from specdec_engine.bench.plan import Cell, Plan
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
    ) -> None:
        """plain: by the arms' weights; pairs: by their drafts and weights; before: samples of an earlier part of the same
        plan."""
        self.plan, self.environment, self.samples = plan, environment, list(before)
        self.left_out = dict[str, str]()
        """What was given up, and why."""
        self._plain, self._synthetic = plain, synthetic
        # What `-k auto` has learnt belongs to its arm: others with the same draft and seeds would make it begin anew.
        self._own = [replace(pairs[arm.draft, arm.quantize], auto=AutoK()) for arm in plan.arms]
        self._failed = set[int]()

    def cells(self) -> list[Cell]:
        """Those that are not measured yet."""
        done = {Cell(s.question, s.repeat, s.temperature, s.arm, s.quantize) for s in self.samples}
        return [cell for cell in self.plan.cells() if cell not in done]

    def warm_up(self) -> None:
        """A short run of every arm, dropped: kernels set themselves up, pages come in."""
        plain = [Cell(0, -1, 0.0, None, form) for form in self._plain]
        arms = [Cell(0, -1, arm.temperature, number, arm.quantize) for number, arm in enumerate(self.plan.arms)]
        for cell in (*plain, *arms):
            self._run(cell, min(_WARM_TOKENS, self.plan.max_tokens), self.plan.seed - 1)

    def measure(self, cell: Cell) -> None:
        """Run it, if its arm still runs. A prompt that fills the context is left out, and so is an arm that needs too much
        memory; where plain decoding does, OutOfMemory is raised."""
        self.samples += self._run(cell, self.plan.max_tokens, self.plan.seed + 1000 * cell.repeat + cell.question)

    def _run(self, cell: Cell, max_tokens: int, seed: int) -> list[Sample]:
        if cell.arm in self._failed:
            return []
        arm = None if cell.arm is None else self.plan.arms[cell.arm]
        pair = self._plain[cell.quantize] if cell.arm is None else self._own[cell.arm]
        try:
            return run(pair, arm, cell, self.plan.questions[cell.question], max_tokens, seed)
        except UsageError as error:
            self.left_out.setdefault(f"prompt {cell.question}", error.message)
        except OutOfMemory as error:
            if arm is None or cell.arm is None:
                raise
            self._failed.add(cell.arm)
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
    plain = {(s.question, s.quantize): s for s in samples if s.arm is None and s.temperature == 0 and s.repeat == 0}
    found = dict[int, tuple[int, list[dict[str, Any]]]]()
    for number, arm in enumerate(plan.arms):
        if arm.temperature:
            continue
        texts = [s for s in samples if s.arm == number and s.repeat == 0 and (s.question, s.quantize) in plain]
        looked = (
            explained(pairs[s.quantize], plan.questions[s.question], plain[s.question, s.quantize], s) for s in texts
        )
        found[number] = len(texts), [asdict(d) for d in looked if d is not None]
    return found
