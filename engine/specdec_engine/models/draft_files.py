"""Folders of drafts made for one target: what `specdec distill` writes, and what `--draft FOLDER` finds.

config.json has a section `specdec_draft`; `draft_vocab.safetensors` maps the draft's ids to the target's. A draft of the kind
`model` is an ordinary transformers checkpoint beside that, with a smaller vocabulary.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from specdec_engine.errors import ModelUnavailable, PairIncompatible

SECTION = "specdec_draft"
VOCABULARY = "draft_vocab.safetensors"


@dataclass(frozen=True, slots=True)
class DraftFolder:
    """A draft made for one target, without its weights."""

    path: Path
    kind: Literal["head", "model"]
    config: dict[str, Any]
    taps: tuple[int, ...]
    """Layers of the target whose output a head reads."""
    tokenizer: str
    """`fingerprint` of the target's tokenizer."""
    ids: Tensor
    """[V'] the target's id of each of the draft's."""

    def check(self, tokenizer: Any, target: str, vocab: int) -> None:
        """Raises PairIncompatible for another target's tokenizer or logits: ids would mean other tokens, or none."""
        if int(self.ids[-1]) >= vocab or fingerprint(tokenizer) != self.tokenizer:
            raise PairIncompatible(
                f"the draft {self.path} was made for another tokenizer than that of {target}",
                "choose the target it was distilled from, or distill a draft for this one: specdec distill",
            )


def read_draft(path: Path) -> DraftFolder | None:
    """The draft in this folder; None if it is none of ours. Raises ModelUnavailable for a damaged one."""
    config_file = path / "config.json"
    if not config_file.is_file():
        return None
    try:
        config = json.loads(config_file.read_text("utf-8"))
        if not isinstance(config, dict) or SECTION not in config:
            return None
        about = config[SECTION]
        ids = load_file(path / VOCABULARY)["target_ids"].long()
        draft = DraftFolder(path, about["kind"], config, tuple(about["taps"]), about["tokenizer_sha256"], ids)
        _check(draft)
        return draft
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ModelUnavailable(
            f"the draft in {path} is damaged: {error}", "distill it again, or choose another"
        ) from error


def _check(draft: DraftFolder) -> None:
    """Raises ValueError. An id that came twice would be drawn with another probability than is reported for it."""
    if draft.kind not in ("head", "model"):
        raise ValueError(f"its kind is {draft.kind!r}")
    if list(draft.taps) != sorted({int(tap) for tap in draft.taps if tap >= 0}) or (
        draft.kind == "head" and not draft.taps
    ):
        raise ValueError(f"its taps are {draft.taps}")
    ids = draft.ids
    if ids.dim() != 1 or len(ids) == 0 or int(ids[0]) < 0 or not bool((ids[1:] > ids[:-1]).all()):
        raise ValueError("its ids are not in rising order")
    if len(ids) != draft.config["vocab_size"]:
        raise ValueError(f"it has {len(ids)} ids where its config says {draft.config['vocab_size']}")


def fingerprint(tokenizer: Any) -> str:
    """SHA-256 of which token each id is."""
    tokens = sorted((i, token) for token, i in tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()


def inverse(ids: Tensor, vocab: int, lacking: int) -> Tensor:
    """[V'] -> [V]: the draft's id of each of the target's; `lacking` where it has none."""
    return torch.full((vocab,), lacking).index_put_((ids,), torch.arange(len(ids)))


def head_weights(draft: DraftFolder) -> dict[str, Tensor]:
    """Raises ModelUnavailable for damaged ones."""
    try:
        return load_file(draft.path / "model.safetensors")
    except (OSError, SafetensorError) as error:
        raise ModelUnavailable(f"the draft in {draft.path} is damaged: {error}", "distill it again") from error


def builtin_draft() -> Path:
    """The folder of the draft that comes with the package, made for the built-in target."""
    return Path(__file__).parent / "builtin_draft"
