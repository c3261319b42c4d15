"""Ways of drafting, by name. Listing them imports nothing but this file.

A new one: a file here with `build(argument, host)`, a line in `DRAFTERS`, and a case in tests/contracts, which fail until
there is one. Another package's: the entry-point group `specdec.drafters`, whose values are such `build` functions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING

from specdec_engine.errors import UsageError

if TYPE_CHECKING:
    from specdec_engine.drafters.base import Drafter, DraftHost

ENTRY_POINTS = "specdec.drafters"


@dataclass(frozen=True, slots=True)
class DrafterSpec:
    """Where a drafter is built, and one line about it."""

    module: str
    about: str


DRAFTERS: Mapping[str, DrafterSpec] = {
    "none": DrafterSpec("specdec_engine.drafters.none", "plain decoding"),
    "ngram": DrafterSpec("specdec_engine.drafters.ngram", "copy what followed the same tokens before"),
    "suffix": DrafterSpec(
        "specdec_engine.drafters.suffix", "copy what most often followed the longest suffix seen before"
    ),
    "model": DrafterSpec("specdec_engine.drafters.model", "a smaller model with the same tokenizer"),
    "head": DrafterSpec(
        "specdec_engine.drafters.head", "a layer distilled from the target, which reads its hidden states"
    ),
    "self": DrafterSpec("specdec_engine.drafters.self_layers", "the target's first layers"),
}


def build_drafter(spec: str, host: DraftHost) -> Drafter:
    """The drafter that `--draft` names.

    `spec` is `none`, `ngram`, `ngram:5`, a third party's name, a model (hub id, folder, .gguf file), or several of these
    joined by commas: the first that proposes wins.
    """
    from specdec_engine.drafters.cascade import CascadeDrafter

    if not spec.replace(",", "").strip():
        raise UsageError(f"the draft {spec!r} names no drafter", "choose none, ngram, or a model's name")
    members = [_build_one(part.strip(), host) for part in spec.split(",") if part.strip()]
    return members[0] if len(members) == 1 else CascadeDrafter(members, host)


def _build_one(spec: str, host: DraftHost) -> Drafter:
    name, _, argument = spec.partition(":")
    if name in DRAFTERS:
        built: Drafter = import_module(DRAFTERS[name].module).build(argument, host)
        return built
    for entry in entry_points(group=ENTRY_POINTS, name=name):
        foreign: Drafter = entry.load()(argument, host)
        return foreign
    return _build_one(f"{_kind(spec)}:{spec}", host)


def is_checkpoint(spec: str) -> bool:
    """Whether it names an ordinary causal LM, which other programs could load too: not a lookup, nothing that `distill` made,
    nothing of a third party."""
    from specdec_engine.models.draft_files import read_draft

    name = spec.partition(":")[0]
    ours = name in DRAFTERS or name == "builtin" or bool(entry_points(group=ENTRY_POINTS, name=name))
    return not ours and read_draft(Path(spec)) is None


def _kind(name: str) -> str:
    """Which drafter runs the model of this name."""
    from specdec_engine.models.draft_files import builtin_draft, read_draft

    found = read_draft(builtin_draft() if name == "builtin" else Path(name))
    return "model" if found is None else found.kind
