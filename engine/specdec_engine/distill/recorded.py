"""Text that runs left in their traces, with what the target computes of it: what a user's own work looks like."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from specdec_engine.core.transfer import upload
from specdec_engine.distill.synthesis import Example
from specdec_engine.errors import UsageError
from specdec_engine.record.events import Cycle, Started
from specdec_engine.record.text import counted
from specdec_engine.record.trace import read_trace
from specdec_engine.runtime import prefill
from specdec_engine.runtime.lean import LeanRuntime

_LONGEST = 1024
"""Tokens of an example; what is longer is cut into several."""
_FEWEST = 16
"""A shorter piece teaches nothing: a draft's first steps are not learnt from."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """One run."""

    tokens: tuple[int, ...]
    """Prompt and answer."""
    answer: int
    """Index of the answer's first token."""


@dataclass(frozen=True, slots=True)
class Recordings:
    """What was found in the files."""

    runs: tuple[Recorded, ...]
    note: str = ""
    """A sentence about what was left out; empty for nothing."""

    @property
    def tokens(self) -> int:
        return sum(len(run.tokens) for run in self.runs)


def read_recordings(paths: Sequence[Path], target: str, vocab: int) -> Recordings:
    """The runs of one target in these traces, and in those of these folders. Raises UsageError where there is none, and
    TraceError for a file that is no trace."""
    files = [file for path in paths for file in (sorted(path.rglob("*.jsonl")) if path.is_dir() else [path])]
    runs, others, unknown = list[Recorded](), dict[str, int](), 0
    for file in files:
        for started, emitted in _runs(file):
            name = str(started.settings.get("target", ""))
            tokens = [*started.prompt, *emitted]
            if name != target:
                others[name] = others.get(name, 0) + 1
            elif any(token is None or token >= vocab for token in tokens):
                unknown += 1
            elif emitted:
                runs.append(Recorded(tuple(t for t in tokens if t is not None), len(started.prompt)))
    left_out = [f"{counted(n, 'run')} of {name or 'an unnamed target'}" for name, n in others.items()]
    left_out += [f"{counted(unknown, 'run')} whose ids are not all known"] if unknown else []
    said = f"left out: {', '.join(left_out)}" if left_out else ""
    if not runs:
        named = ", ".join(map(str, paths))
        hint = f"record runs of {target} by --trace FILE" + (f"; {said}" if said else "")
        raise UsageError(f"there is no run of {target} in {named}", hint)
    return Recordings(tuple(runs), said)


def _runs(file: Path) -> Iterator[tuple[Started, list[int | None]]]:
    started, emitted = None, list[int | None]()
    for event in read_trace(file):
        if isinstance(event, Started):
            if started is not None:
                yield started, emitted
            started, emitted = event, []
        elif isinstance(event, Cycle):
            emitted += event.emitted
    if started is not None:
        yield started, emitted


def read_by(runtime: LeanRuntime, recordings: Recordings, taps: tuple[int, ...]) -> Iterator[Example]:
    """The target reads them, and what a head needs of that is kept."""
    reader = runtime.another()
    reader.tap(taps)
    for run in recordings.runs:
        tokens = upload(torch.tensor(run.tokens[: runtime.limit]), runtime.device)
        reader.rollback(0)
        prefill(reader, tokens)
        features = reader.features(0, len(tokens)).to("cpu", torch.bfloat16)
        for begin in range(0, len(tokens), _LONGEST):
            end = min(begin + _LONGEST, len(tokens))
            answer = min(max(run.answer - begin, 0), end - begin)
            if end - begin >= _FEWEST and run.answer < end:
                yield Example(tokens[begin:end].int().cpu(), answer, features[begin:end].clone())
