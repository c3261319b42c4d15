"""`distill`: text, vocabulary, training, export. Each part goes on where an interrupted run left it.

The draft is written whenever it has been measured; what is kept in the work folder is kept when interrupted, too.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch

from specdec_engine.core.registry import entry_of
from specdec_engine.distill import shards
from specdec_engine.distill.documents import Documents, read_documents
from specdec_engine.distill.recipe import Recipe, taps
from specdec_engine.distill.recorded import Recordings, read_by, read_recordings
from specdec_engine.distill.students import SIZES
from specdec_engine.distill.synthesis import Example, synthesise, unused_in
from specdec_engine.distill.trainer import JUDGED, Trainer
from specdec_engine.distill.training import Estimate, batches
from specdec_engine.distill.vocabulary import draft_ids
from specdec_engine.errors import GenerationFailed, UsageError
from specdec_engine.models.draft_files import found_draft, read_draft
from specdec_engine.models.draft_folder import DraftFolder
from specdec_engine.models.forwards import lean_shape
from specdec_engine.models.loading import Candidate, Loaded
from specdec_engine.models.options import LoadOptions
from specdec_engine.record.prompt_files import Question, read_questions
from specdec_engine.record.text import counted
from specdec_engine.runtime.decoder import Decoder
from specdec_engine.runtime.lean import LeanRuntime
from specdec_engine.runtime.shape import Shape, Unsupported

TEXT_SHARE = 0.55
"""Of the time, for writing text: on 2 cores each token is then learnt from some 7 times."""
PASSES = 6
"""Over the text, where a number of tokens was asked for and not a time; at most, over what runs have left."""
_MEASURED_S = 240.0
_HELD_OUT = 24
"""One shard in so many is never trained on, the first of all among them."""
_STEP_TOKENS = 2048
_FEWEST = 10
"""Runs, of which one is held out."""


@dataclass(frozen=True, slots=True)
class Writing:
    """The target writes."""

    tokens: int
    share: float
    """Of this part that is done, 0 to 1."""
    note: str = ""
    """A sentence about the given prompts that a user should read; empty for none."""


@dataclass(frozen=True, slots=True)
class Training:
    """The draft learns."""

    step: int
    loss: float
    share: float
    estimate: Estimate | None
    """The newest; None before the first."""


def check_target(found: Candidate) -> None:
    """Look whether a draft can be made for it, before its weights are read. Raises UsageError."""
    on_a_cpu = isinstance(lean_shape(found.config, found.options, torch.device("cpu")), Shape)
    if found.device.type != "cpu" and on_a_cpu and found.config.model_type not in _ON_A_GPU:
        raise UsageError(
            f"distill writes text of {found.name} ({found.config.model_type}) on a CPU alone", "add --device cpu"
        )
    if isinstance(found.shape, Unsupported):
        raise UsageError(f"distilling {found.name} needs the lean or the graph runtime, and {found.shape}", _OTHERS)


_ON_A_GPU = ("llama", "mistral", "qwen2", "qwen3")
"""Whose layers `batch.py` runs for many sequences at once."""
_OTHERS = "choose a target that runs on it (docs/models.md); EAGLE-3 heads, smaller models and lookups draft for others"


def distill(found: Candidate, target: Loaded, recipe: Recipe) -> Iterator[Writing | Training]:
    """Make a draft for this target; progress as it goes. The folder `recipe.out` then holds it.

    Raises UsageError for a target whose forward is not ours, and for one without a chat template where no data is given.
    """
    check_target(found)
    if not isinstance(target.runtime, LeanRuntime) or not isinstance(target.runtime.decoder, Decoder):
        raise UsageError(
            f"{target.name} runs on {target.runtime.name}, and distilling needs the lean or the graph runtime", _OTHERS
        )
    decoder = target.runtime.decoder
    if read_draft(found.path) is not None:
        raise UsageError(
            f"{target.name} is a draft itself, with ids of its own", "distill from the target it was made for"
        )
    given = _read_given(recipe, target)  # a bad line or file is found before an hour is spent
    recipe.work.claim(target.name, target.tokenizer)
    if given.recordings is None:
        yield from _write_text(target, decoder, recipe, given)
    else:
        yield from _read_runs(target.runtime, recipe, given.recordings)
    files = sorted((recipe.work.text if given.recordings is None else recipe.work.runs).glob("*.safetensors"))
    if not files:
        raise UsageError("the target finished no conversation in this time", "give more --minutes, or --tokens")
    read = [shards.read(file) for file in files]
    if given.recordings is not None and (n := sum(len(shard.answers) for shard in read)) < _FEWEST:
        raise UsageError(
            f"{counted(n, 'run')} are too few to learn from and to judge by", f"record {_FEWEST} at least by --trace"
        )
    held, text = _split(read)
    if given.draft is None:
        n = SIZES[recipe.size or "medium"].ids
        ids = draft_ids(found.output_rows(slice(None)), text, n, recipe.work.folder)
    else:
        ids = given.draft.ids
    yield from _train(Trainer(found, target, decoder, recipe, ids, held, given.draft), text, recipe)


@dataclass(frozen=True, slots=True)
class _Given:
    """What the recipe names."""

    asked: Sequence[Question] | None
    documents: Documents | None
    recordings: Recordings | None
    draft: DraftFolder | None

    @property
    def notes(self) -> str:
        """In sentences, what of it is not used."""
        asked = "" if self.asked is None else unused_in(self.asked)
        return " ".join(filter(None, (asked, self.documents.note if self.documents else "")))


def _read_given(recipe: Recipe, target: Loaded) -> _Given:
    return _Given(
        None if recipe.data is None else read_questions(recipe.data),
        None if recipe.documents is None else read_documents(recipe.documents),
        read_recordings(recipe.runs, target.name, target.runtime.vocab) if recipe.runs else None,
        None if recipe.draft is None else _head_to_go_on_from(recipe.draft, target),
    )


def _head_to_go_on_from(name: str, target: Loaded) -> DraftFolder:
    """Raises UsageError for what is no head of `distill`'s own, and PairIncompatible for one of another target."""
    lookup = entry_of(name) is not None
    draft = None if lookup else read_draft(found_draft(name, LoadOptions(offline=True)))
    if draft is None or not draft.ours or draft.kind != "head":
        raise UsageError(
            f"{name} is no head that distill has made",
            "name builtin, or distill's folder; leave out --draft to begin anew",
        )
    draft.check(target.tokenizer, target.name, target.runtime.vocab)
    return draft


def _read_runs(runtime: LeanRuntime, recipe: Recipe, recordings: Recordings) -> Iterator[Writing]:
    """Anew each time: it takes a second a thousand tokens, and the files may have grown."""
    shutil.rmtree(recipe.work.runs, ignore_errors=True)
    read = 0
    assert isinstance(runtime.decoder, Decoder)
    yield Writing(0, 0.0, recordings.note)
    for tokens in shards.collect(recipe.work.runs, read_by(runtime, recordings, taps(runtime.decoder.shape.layers))):
        read += tokens
        yield Writing(read, min(1.0, read / recordings.tokens))


def _split(read: list[shards.Shard]) -> tuple[list[shards.Shard], list[shards.Shard]]:
    """Held-out text and the rest: whole shards, or of a few shards every tenth example of the first."""
    if len(read) >= _HELD_OUT:
        return read[::_HELD_OUT], [shard for i, shard in enumerate(read) if i % _HELD_OUT]
    n = len(read[0].answers)
    held = [i for i in range(n) if i % 10 == 0]
    return [read[0].part(held)], [read[0].part([i for i in range(n) if i % 10] or held), *read[1:]]


def _write_text(target: Loaded, decoder: Decoder, recipe: Recipe, given: _Given) -> Iterator[Writing]:
    work, asked = recipe.work, given.asked
    spent, files = work.spent(), list(work.text.glob("*.safetensors"))
    written = sum(len(shards.read(file).tokens) for file in files)
    budget_s = math.inf if recipe.minutes is None else recipe.minutes * 60 * TEXT_SHARE
    wanted = math.inf if recipe.tokens is None else recipe.tokens
    began = time.monotonic()

    def share() -> float:
        return min(1.0, max((spent.writing_s + time.monotonic() - began) / budget_s, written / wanted))

    yield Writing(written, share(), given.notes)
    if written and share() >= 1.0:
        return
    # Another seed than before, or a second run would write the same text again.
    seed = recipe.seed + len(files)
    prompts = None if asked is None else (question.turns[0] for question in asked)
    examples = synthesise(target, taps(decoder.shape.layers), seed, prompts=prompts, documents=given.documents)
    for tokens in shards.collect(work.text, _until(examples, lambda: share() >= 1.0)):
        written += tokens
        work.record(replace(spent, writing_s=spent.writing_s + time.monotonic() - began))
        yield Writing(written, share())
    if asked is not None and share() < 1.0:
        said = f"all {counted(len(asked), 'prompt')} are answered, in {written:,} tokens, before the writing was to end"
        yield Writing(written, share(), said)


def _until(examples: Iterator[Example], over: Callable[[], bool]) -> Iterator[Example]:
    for example in examples:
        yield example
        if over():
            return


def _train(trainer: Trainer, text: list[shards.Shard], recipe: Recipe) -> Iterator[Training]:
    tokens = sum(len(shard.tokens) for shard in text)
    measured, last, loss = None, time.monotonic(), math.nan

    def share() -> float:
        learnt = trainer.spent.step * _STEP_TOKENS / (PASSES * tokens)
        if recipe.minutes is None:
            return min(1.0, learnt)
        for_training = 1.0 if recipe.runs else 1.0 - TEXT_SHARE
        used = trainer.spent.training_s / (recipe.minutes * 60 * for_training)
        return min(1.0, max(used, learnt) if recipe.runs else used)

    def keep() -> Estimate:
        found = trainer.measure()
        trainer.export(tokens, found)
        trainer.save()
        return found

    try:
        for batch in chain.from_iterable(batches(text, recipe.seed + 1 + i, _STEP_TOKENS) for i in range(10**6)):
            if share() >= 1.0:
                break
            loss = trainer.step(batch, share())
            if time.monotonic() - last > _MEASURED_S:
                measured, last = keep(), time.monotonic()
            yield Training(trainer.spent.step, loss, share(), measured)
    except (KeyboardInterrupt, GeneratorExit):
        trainer.save()
        raise
    last_found = keep()
    yield Training(trainer.spent.step, loss, 1.0, last_found)
    if trainer.kept is not None:  # what the folder holds, which is not always what was measured last
        yield Training(trainer.spent.step, loss, 1.0, trainer.kept)
    if not trainer.exported:
        raise GenerationFailed(
            f"the draft is no better on held-out text than before: {last_found.emitted(JUDGED):.2f} tokens a cycle are "
            f"expected at k {JUDGED}, and {trainer.best:.2f} were; nothing was written",
            "give more text, or another --draft",
        )
