"""`distill`: text, ids, training, export. Each part goes on where an interrupted run left it.

The work folder holds the target's text with its features, and the training state; both are kept when interrupted. The draft
is written whenever it has been measured.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from specdec_engine.distill import shards
from specdec_engine.distill.export import save_head, save_model
from specdec_engine.distill.students import SIZES, HeadStudent, Kind, ModelStudent, Size
from specdec_engine.distill.synthesis import Example, synthesise
from specdec_engine.distill.training import Batch, Estimate, Student, Teacher, batches, estimate, loss_of
from specdec_engine.draft_files import fingerprint, read_draft
from specdec_engine.errors import UsageError
from specdec_engine.loading import Candidate, Loaded
from specdec_engine.runtime.decoder import Decoder
from specdec_engine.runtime.lean import LeanRuntime

TEXT_SHARE = 0.45
"""Of the time, for writing text: of the rest each token is seen some four times."""
PASSES = 6
"""Over the text, where a number of tokens was asked for and not a time."""
STEPS = 2
"""Depth of a draft in training: a third step costs half as much again, and adds next to nothing before the second is good."""
SHOWN = 5
"""Positions of the estimate."""
_RATE = 3e-3
_WARMUP = 50
_SLOTS = 64
_MEASURED_S = 240.0
_HELD_OUT = 24
"""One shard in so many is never trained on, the first of all among them."""
_HELD_BATCHES = 4


@dataclass(frozen=True, slots=True)
class Recipe:
    """What to make. Raises UsageError where it contradicts itself."""

    out: Path
    kind: Kind = "head"
    size: Size = "medium"
    minutes: float | None = None
    tokens: int | None = None
    """Of text, where no minutes are given."""
    data: Path | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        budget = self.tokens if self.minutes is None else self.minutes
        if budget is None or (self.minutes is not None and self.tokens is not None):
            raise UsageError("give either --minutes or --tokens, not both", "for example --minutes 60")
        if budget <= 0:
            raise UsageError(f"a budget of {budget:g} is nothing", "for example --minutes 60")
        if self.out.exists() and not self.out.is_dir():
            raise UsageError(f"{self.out} is a file", "--out names a folder")

    @property
    def work(self) -> Path:
        return self.out / "work"


@dataclass(frozen=True, slots=True)
class Writing:
    """The target writes."""

    tokens: int
    share: float
    """Of this part that is done, 0 to 1."""


@dataclass(frozen=True, slots=True)
class Training:
    """The draft learns."""

    step: int
    loss: float
    share: float
    estimate: Estimate | None
    """The newest; None before the first."""


@dataclass(frozen=True, slots=True)
class _Done:
    """How far earlier runs came."""

    writing_s: float = 0.0
    training_s: float = 0.0
    step: int = 0

    @classmethod
    def read(cls, work: Path) -> _Done:
        file = work / "progress.json"
        return cls(**json.loads(file.read_text("utf-8"))) if file.is_file() else cls()

    def write(self, work: Path) -> None:
        work.mkdir(parents=True, exist_ok=True)
        partial = work / "progress.part"
        partial.write_text(json.dumps(asdict(self)), "utf-8")
        partial.replace(work / "progress.json")


def distill(found: Candidate, target: Loaded, recipe: Recipe) -> Iterator[Writing | Training]:
    """Make a draft for this target; progress as it goes. The folder `recipe.out` then holds it.

    Raises UsageError for a target whose forward is not ours, and for one without a chat template where no data is given.
    """
    if not isinstance(target.runtime, LeanRuntime) or not isinstance(target.runtime.decoder, Decoder):
        raise UsageError(
            f"{target.name} runs on {target.runtime.name}, and distilling needs the lean or the graph runtime",
            "choose a target of the Llama, Mistral or Qwen family",
        )
    decoder = target.runtime.decoder
    if read_draft(found.path) is not None:
        raise UsageError(
            f"{target.name} is a draft itself, with ids of its own", "distill from the target it was made for"
        )
    _begin(target, recipe)
    yield from _write_text(target, decoder, recipe)
    files = sorted((recipe.work / "text").glob("*.safetensors"))
    if not files:
        raise UsageError("the target finished no conversation in this time", "give more --minutes, or --tokens")
    read = [shards.read(file) for file in files]
    held, train = _split(read)
    ids = _draft_ids(found, train, SIZES[recipe.size].ids, recipe.work)
    yield from _train(found, target, decoder, recipe, ids, held, train)


def _begin(target: Loaded, recipe: Recipe) -> None:
    """Raises UsageError where the work folder belongs to another target, and for prompts that cannot be read."""
    if recipe.data is not None:
        for _ in _prompts(recipe.data):
            pass
    owner, ours = recipe.work / "target.json", {"name": target.name, "tokenizer": fingerprint(target.tokenizer)}
    if owner.is_file():
        theirs = json.loads(owner.read_text("utf-8"))
        if theirs != ours:
            raise UsageError(
                f"{recipe.work} holds text of {theirs['name']}, not of {target.name}", "choose another --out"
            )
        return
    recipe.work.mkdir(parents=True, exist_ok=True)
    owner.write_text(json.dumps(ours), "utf-8")


def _split(read: list[shards.Shard]) -> tuple[list[shards.Shard], list[shards.Shard]]:
    """Held-out text and the rest: whole shards, or of a few shards every tenth example of the first."""
    if len(read) >= _HELD_OUT:
        return read[::_HELD_OUT], [shard for i, shard in enumerate(read) if i % _HELD_OUT]
    n = len(read[0].answers)
    held = [i for i in range(n) if i % 10 == 0]
    return [read[0].part(held)], [read[0].part([i for i in range(n) if i % 10] or held), *read[1:]]


def taps(layers: int) -> tuple[int, ...]:
    """Layers whose output a head reads: a quarter, a half and three quarters up (EAGLE-3 takes three, too)."""
    return tuple(sorted({layers // 4, layers // 2, min(layers - layers // 4, layers - 1)}))


def _write_text(target: Loaded, decoder: Decoder, recipe: Recipe) -> Iterator[Writing]:
    done, folder = _Done.read(recipe.work), recipe.work / "text"
    written = sum(len(shards.read(file).tokens) for file in folder.glob("*.safetensors"))
    budget_s = math.inf if recipe.minutes is None else recipe.minutes * 60 * TEXT_SHARE
    wanted = math.inf if recipe.tokens is None else recipe.tokens
    began = time.monotonic()

    def share() -> float:
        spent = done.writing_s + time.monotonic() - began
        return min(1.0, max(spent / budget_s, written / wanted))

    yield Writing(written, share())
    if written and share() >= 1.0:
        return
    # Another seed than before, or a second run would write the same text again.
    seed = recipe.seed + len(list(folder.glob("*.safetensors")))
    prompts = None if recipe.data is None else _prompts(recipe.data)
    examples = synthesise(target, _SLOTS, taps(decoder.shape.layers), seed, prompts=prompts)
    for tokens in shards.collect(folder, _until(examples, lambda: share() >= 1.0)):
        written += tokens
        replace(done, writing_s=done.writing_s + time.monotonic() - began).write(recipe.work)
        yield Writing(written, share())


def _until(examples: Iterator[Example], over: Any) -> Iterator[Example]:
    for example in examples:
        yield example
        if over():
            return


def _prompts(file: Path) -> Iterator[str]:
    """Lines of text, or JSON lines with `prompt` or Spec-Bench's `turns`. Raises UsageError for a line that is neither."""
    try:
        lines = file.read_text("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UsageError(f"{file} is not text in UTF-8", "one prompt a line, or JSON lines with `prompt`") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if not line.lstrip().startswith("{"):
            yield line
            continue
        try:
            record = json.loads(line)
            prompt = record["prompt"] if "prompt" in record else record["turns"][0]
            if not isinstance(prompt, str):
                raise TypeError
            yield prompt
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise UsageError(f"{file}, line {number}: no JSON object with `prompt`", "one prompt a line") from error


def _draft_ids(found: Candidate, train: list[shards.Shard], n: int, work: Path) -> Tensor:
    """The n tokens that the target finds likeliest, by its whole distribution at some positions of its own text.

    The distribution knows more than counts: tokens that the text happens not to have.
    """
    kept = work / f"ids-{n}.pt"
    if kept.is_file():
        ids: Tensor = torch.load(kept, weights_only=True)
        return ids
    rows = found.output_rows(slice(None)).to(torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(rows.shape[0], dtype=torch.float64)
    each = max(1, _SAMPLED // len(train))
    for shard in train:
        places = torch.randint(len(shard.tokens), (each,), generator=generator)
        for last in torch.split(shard.features[places, -1].to(torch.bfloat16), 256):
            total += (last @ rows.T).float().softmax(-1).sum(0)
        total += torch.bincount(shard.tokens.long(), minlength=rows.shape[0]) * (0.5 * each / len(shard.tokens))
    ids = total.topk(min(n, rows.shape[0])).indices.sort().values
    torch.save(ids, kept)
    return ids


_SAMPLED = 60_000
"""Positions looked at for the draft's ids."""


def _train(
    found: Candidate,
    target: Loaded,
    decoder: Decoder,
    recipe: Recipe,
    ids: Tensor,
    held: list[shards.Shard],
    train: list[shards.Shard],
) -> Iterator[Training]:
    device = target.runtime.device
    # Trained on the target's own device, in bfloat16 where that is computed in.
    half = device.type == "cpu" or decoder.dtype == torch.bfloat16
    accelerator = Accelerator(
        cpu=device.type == "cpu", mixed_precision="bf16" if half else "no", device_placement=False
    )
    teacher = Teacher(found.output_rows(ids).to(device, torch.bfloat16), _inverse(ids, target.runtime.vocab).to(device))
    student = _student(found, target, recipe, teacher, train[0].features.shape[1], device)
    optimizers = [accelerator.prepare(o) for o in _optimizers(student.module)]
    student.module = accelerator.prepare(student.module)
    # Each kind and size has a training of its own; the text serves them all.
    state = recipe.work / f"state-{recipe.kind}-{recipe.size}"
    done = _Done.read(recipe.work)
    if state.is_dir():
        accelerator.load_state(str(state))
        trained = json.loads((state / "trained.json").read_text("utf-8"))
        done = replace(done, step=trained["step"], training_s=trained["training_s"])
    measured = list(batches(held, 0))[: 3 * _HELD_BATCHES : 3]
    began, saved, seen = time.monotonic(), time.monotonic(), None
    loss, step = math.nan, done.step
    per_pass = sum(len(shard.tokens) for shard in train) / 1500  # a step's tokens, less padding

    def share() -> float:
        if recipe.minutes is None:
            return min(1.0, step / (PASSES * per_pass))
        budget_s = recipe.minutes * 60 * (1 - TEXT_SHARE)
        return min(1.0, (done.training_s + time.monotonic() - began) / budget_s)

    def keep() -> Estimate:
        with accelerator.autocast():
            found_now = estimate(student, teacher, [_on(b, device) for b in measured], SHOWN)
        spent = replace(done, training_s=done.training_s + time.monotonic() - began, step=step)
        _save_state(accelerator, state, spent)
        _export(accelerator.unwrap_model(student.module), recipe, ids, target, decoder, spent, train, found_now)
        return found_now

    try:
        for batch in chain.from_iterable(batches(train, recipe.seed + 1 + i, _STEP_TOKENS) for i in range(10**6)):
            if share() >= 1.0:
                break
            for group in (g for o in optimizers for g in o.param_groups):
                group["lr"] = (
                    _RATE * min(1.0, (step + 1) / _WARMUP) * (0.05 + 0.475 * (1 + math.cos(math.pi * share())))
                )
            with accelerator.autocast():
                value = loss_of(student, teacher, _on(batch, device), STEPS)
            accelerator.backward(value)
            accelerator.clip_grad_norm_(student.module.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            loss, step = float(value.detach()), step + 1
            if time.monotonic() - saved > _MEASURED_S:
                seen, saved = keep(), time.monotonic()
            yield Training(step, loss, share(), seen)
    except (KeyboardInterrupt, GeneratorExit):
        _save_state(accelerator, state, replace(done, training_s=done.training_s + time.monotonic() - began, step=step))
        raise
    yield Training(step, loss, 1.0, keep())


_STEP_TOKENS = 2048


def _save_state(accelerator: Accelerator, state: Path, done: _Done) -> None:
    """The new one beside the old, which goes when it is complete."""
    partial, old = state.with_name(f"{state.name}.part"), state.with_name(f"{state.name}.old")
    for left in (partial, old):
        shutil.rmtree(left, ignore_errors=True)
    accelerator.save_state(str(partial))
    (partial / "trained.json").write_text(json.dumps({"step": done.step, "training_s": done.training_s}), "utf-8")
    if state.is_dir():
        state.rename(old)
    partial.rename(state)
    shutil.rmtree(old, ignore_errors=True)


def _on(batch: Batch, device: torch.device) -> Batch:
    return Batch(batch.tokens.to(device), batch.features.to(device), batch.counts.to(device))


def _inverse(ids: Tensor, vocab: int) -> Tensor:
    return torch.full((vocab,), -1).index_put_((ids,), torch.arange(len(ids)))


def _student(
    found: Candidate, target: Loaded, recipe: Recipe, teacher: Teacher, features: int, device: torch.device
) -> Student:
    torch.manual_seed(recipe.seed)
    size = SIZES[recipe.size]
    if recipe.kind == "model":
        model = ModelStudent(size, teacher, target.runtime.limit or 8192)
        model.module.to(device)
        return model
    embedding, norm = (found.tensor(name) for name in ("model.embed_tokens.weight", "model.norm.weight"))
    head = HeadStudent(found.config, size, features, teacher, embedding.to(device, torch.bfloat16), norm)
    head.module.to(device)
    return head


def _optimizers(module: torch.nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for matrices, AdamW for the rest. After four minutes on two cores Muon agreed with the target as often as AdamW
    after eight."""
    matrices = [p for p in module.parameters() if p.dim() == 2 and min(p.shape) > 16]
    others = [p for p in module.parameters() if not (p.dim() == 2 and min(p.shape) > 16)]
    if not hasattr(torch.optim, "Muon"):  # before torch 2.9
        return [torch.optim.AdamW(module.parameters(), lr=_RATE / 3, betas=(0.9, 0.95))]
    return [
        torch.optim.Muon(matrices, lr=_RATE, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def _export(
    module: Any,
    recipe: Recipe,
    ids: Tensor,
    target: Loaded,
    decoder: Decoder,
    done: _Done,
    train: list[shards.Shard],
    found: Estimate,
) -> None:
    made = {
        "target": target.name,
        "text_tokens": sum(len(shard.tokens) for shard in train),
        "text_minutes": round(done.writing_s / 60, 1),
        "training_minutes": round(done.training_s / 60, 1),
        "steps": done.step,
        "agreement": [round(a, 4) for a in found.agreement],
        "overlap": [round(o, 4) for o in found.overlap],
    }
    if recipe.kind == "model":
        save_model(recipe.out, module, ids, target.tokenizer, made)
    else:
        save_head(recipe.out, module, ids, taps(decoder.shape.layers), target.tokenizer, made)
