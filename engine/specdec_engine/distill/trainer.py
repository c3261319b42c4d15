"""One draft in training: its steps, its state on disk, how well it does, and the folder it is exported to."""

from __future__ import annotations

import hashlib
import math
import shutil
import time
from dataclasses import replace

import torch
from accelerate import Accelerator
from torch import Tensor

from specdec_engine.distill.export import save_head, save_model
from specdec_engine.distill.recipe import Recipe, taps
from specdec_engine.distill.shards import Shard
from specdec_engine.distill.students import SIZES, HeadStudent, ModelStudent, shape_for, shape_of
from specdec_engine.distill.training import Batch, Estimate, Student, Teacher, batches, estimate, loss_of
from specdec_engine.distill.work import Spent, Trained, read, write
from specdec_engine.errors import UsageError, first_line
from specdec_engine.models.draft_files import head_weights, inverse
from specdec_engine.models.draft_folder import DraftFolder
from specdec_engine.models.loading import Candidate, Loaded
from specdec_engine.runtime.decoder import Decoder
from specdec_engine.runtime.shape import Shape

STEPS = 3
"""Depth of a draft in training. With 2, 3 and 4 a batch takes 2.1, 2.8 and 3.3 s on two cores. 150 batches more of one head
gave 2.45 tokens a cycle at k 5 with 2, and 2.53 with 3; at k 3 2.29 and 2.30, on held-out text."""
SHOWN = 5
"""Positions of the estimate."""
_RATE = 3e-3
_AGAIN = 1e-3
"""Learning rates at the height of a training: of a new draft, and of one that goes on."""
_WARMUP = 50
_HELD_BATCHES = 4
JUDGED = 3
"""Drafts are judged by the tokens that a cycle is expected to emit at this k."""


class Trainer:
    """Goes on where an earlier run with the same recipe left off."""

    def __init__(
        self,
        found: Candidate,
        target: Loaded,
        decoder: Decoder,
        recipe: Recipe,
        ids: Tensor,
        held: list[Shard],
        draft: DraftFolder | None = None,
    ) -> None:
        """draft: the head to go on from, with these ids; None to begin anew."""
        self._recipe, self._target, self._layers, self._ids = recipe, target, decoder.shape.layers, ids
        self._draft = draft
        self._device = target.runtime.device
        # Trained on the target's own device, in bfloat16 where that is computed in.
        half = self._device.type == "cpu" or decoder.dtype == torch.bfloat16
        self._accelerator = Accelerator(
            cpu=self._device.type == "cpu", mixed_precision="bf16" if half else "no", device_placement=False
        )
        every = found.output_rows(slice(None)).to(self._device, torch.bfloat16)
        ours = inverse(ids, target.runtime.vocab, -1).to(self._device)
        # A draft model's ids are those of its own vocabulary, and no others.
        whole = every if recipe.kind == "head" else None
        self._teacher = Teacher(every[ids.to(self._device)], ours, whole, decoder.shape.scales)
        self._student = self._new_student(found, decoder.shape, held[0].features.shape[1])
        self._optimizers = [self._accelerator.prepare(o) for o in _optimizers(self._student.module)]
        self._student.module = self._accelerator.prepare(self._student.module)
        # Each kind and size has a training of its own; the text serves them all.
        of = recipe.size or ("medium" if draft is None else f"from-{_fingerprint(draft)}")
        of += "-runs" if recipe.runs else ""
        self._state, self._rate = recipe.work.folder / f"state-{recipe.kind}-{of}", _RATE if draft is None else _AGAIN
        self.best = 0.0
        self.exported = False
        """True when the recipe's folder holds a draft of this training."""
        self._spent, self._began = self._resumed(), time.monotonic()
        self._held = list(batches(held, 0, prompts=False))[: 3 * _HELD_BATCHES : 3]
        self.kept: Estimate | None = None
        """The estimate of the draft that this process wrote last."""
        if draft is not None and not self.best:
            self.best = self.measure().emitted(JUDGED)

    @property
    def spent(self) -> Spent:
        """On earlier runs and this one."""
        return replace(self._spent, training_s=self._spent.training_s + time.monotonic() - self._began)

    def step(self, batch: Batch, share: float) -> float:
        """Learn from a batch; the loss. share: of the training that is done, which sets the rate."""
        rate = (
            self._rate * min(1.0, (self._spent.step + 1) / _WARMUP) * (0.05 + 0.475 * (1 + math.cos(math.pi * share)))
        )
        for group in (g for optimizer in self._optimizers for g in optimizer.param_groups):
            group["lr"] = rate
        with self._accelerator.autocast():
            loss = loss_of(self._student, self._teacher, _on(batch, self._device), STEPS)
        self._accelerator.backward(loss)
        self._accelerator.clip_grad_norm_(self._student.module.parameters(), 1.0)
        for optimizer in self._optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self._spent = replace(self._spent, step=self._spent.step + 1)
        return float(loss.detach())

    def measure(self) -> Estimate:
        """On held-out answers."""
        with self._accelerator.autocast():
            return estimate(self._student, self._teacher, [_on(b, self._device) for b in self._held], SHOWN)

    def save(self) -> None:
        """The state beside the old one, which goes when it is complete."""
        partial, old = self._state.with_suffix(".part"), self._state.with_suffix(".old")
        for left in (partial, old):
            shutil.rmtree(left, ignore_errors=True)
        self._accelerator.save_state(str(partial))
        write(partial / "trained.json", Trained(self._spent.step, self.spent.training_s, self.best, self.exported))
        if self._state.is_dir():
            self._state.rename(old)
        partial.rename(self._state)
        shutil.rmtree(old, ignore_errors=True)

    def export(self, text_tokens: int, measured: Estimate) -> None:
        """The draft, as it is now, into the recipe's folder, unless it was better before: more training on little text makes
        drafts worse while the loss still falls."""
        if (expected := measured.emitted(JUDGED)) < self.best:
            return
        self.best, self.exported, self.kept = expected, True, measured
        spent, module = self.spent, self._accelerator.unwrap_model(self._student.module)
        made = {
            "target": self._target.name,
            **({} if self._draft is None else {"from": self._draft.path.name}),
            "text_tokens": text_tokens,
            "text_minutes": round(spent.writing_s / 60, 1),
            "training_minutes": round(spent.training_s / 60, 1),
            "steps": spent.step,
            "agreement": [round(a, 4) for a in measured.agreement],
            "overlap": [round(o, 4) for o in measured.overlap],
        }
        if self._recipe.kind == "model":
            save_model(self._recipe.out, module, self._ids, self._target.tokenizer, made)
        else:
            save_head(self._recipe.out, module, self._ids, taps(self._layers), self._target.tokenizer, made)

    def _resumed(self) -> Spent:
        spent, old = self._recipe.work.spent(), self._state.with_suffix(".old")
        if old.is_dir() and not self._state.is_dir():  # killed between the two renames of `save`
            old.rename(self._state)
        if not self._state.is_dir():
            return spent
        try:
            self._accelerator.load_state(str(self._state))
        except Exception as error:  # of pickles and safetensors, in whatever way they are damaged
            raise UsageError(
                f"the training in {self._state} cannot be taken up: {first_line(error)}",
                "remove that folder to train anew",
            ) from error
        trained = read(self._state / "trained.json", Trained)
        self.best, self.exported = trained.best, trained.exported
        return replace(spent, step=trained.step, training_s=trained.training_s)

    def _new_student(self, found: Candidate, of: Shape, features: int) -> Student:
        torch.manual_seed(self._recipe.seed)
        size = SIZES[self._recipe.size or "medium"]
        if self._recipe.kind == "model":
            model = ModelStudent(size, self._teacher, self._target.runtime.limit or 8192)
            model.module.to(self._device)
            return model
        embedding, norm = (found.tensor(name) for name in ("model.embed_tokens.weight", "model.norm.weight"))
        shape = shape_for(of, size, features) if self._draft is None else shape_of(self._draft)
        head = HeadStudent(shape, embedding.to(self._device, torch.bfloat16))
        if self._draft is None:
            head.module.final_norm.data.copy_(norm + 1.0 if of.unit_norms else norm)
        else:
            head.module.load_state_dict(head_weights(self._draft))
        head.module.to(self._device)
        return head


def _fingerprint(draft: DraftFolder) -> str:
    """Of its weights."""
    return hashlib.sha256((draft.path / "model.safetensors").read_bytes()).hexdigest()[:8]


def _on(batch: Batch, device: torch.device) -> Batch:
    return Batch(batch.tokens.to(device), batch.features.to(device), batch.counts.to(device))


def _optimizers(module: torch.nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for matrices, AdamW for the rest. On one core Muon agreed with the target after 4 minutes and 126 steps (0.37)
    as often as AdamW after 7 and 250."""
    matrices = [p for p in module.parameters() if p.dim() == 2 and min(p.shape) > 16]
    others = [p for p in module.parameters() if not (p.dim() == 2 and min(p.shape) > 16)]
    if not hasattr(torch.optim, "Muon"):  # before torch 2.9
        return [torch.optim.AdamW(module.parameters(), lr=_RATE / 3, betas=(0.9, 0.95))]
    return [
        torch.optim.Muon(matrices, lr=_RATE, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    ]
