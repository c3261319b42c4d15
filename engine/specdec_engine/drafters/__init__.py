"""Ways of drafting. `core/registry.py` lists them; here they are built. CONTRIBUTING.md says what a new one takes."""

from __future__ import annotations

from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING

from specdec_engine.core.registry import drafters, entry_of
from specdec_engine.errors import ModelUnavailable, SpecdecError, UsageError, first_line

if TYPE_CHECKING:
    from specdec_engine.drafters.base import Drafter, DraftSetup


def build_drafter(spec: str, setup: DraftSetup) -> Drafter:
    """The drafter that `--draft` names.

    `spec` is `none`, `ngram`, `ngram:5`, a third party's name, a model (hub id, folder, .gguf file), or several of these
    joined by commas: the first that proposes wins.
    """
    from specdec_engine.drafters.cascade import CascadeDrafter

    if not spec.replace(",", "").strip():
        raise UsageError(f"the draft {spec!r} names no drafter", "choose none, ngram, or a model's name")
    members = [_build_one(part.strip(), setup) for part in spec.split(",") if part.strip()]
    return members[0] if len(members) == 1 else CascadeDrafter(members, setup)


def _build_one(spec: str, setup: DraftSetup) -> Drafter:
    entry, argument = entry_of(spec), spec.partition(":")[2]
    if entry is None:
        entry, argument = drafters()[_kind(spec)], spec
    try:
        built: Drafter = resolve_name(entry.build)(argument, setup)
    except Exception as error:
        if not entry.package or isinstance(error, SpecdecError):
            raise
        what = f"the draft {spec}, of the package {entry.package}, cannot be loaded: {type(error).__name__}: "
        raise ModelUnavailable(what + first_line(error), "choose another draft, or mend that package") from error
    return built


def is_checkpoint(spec: str) -> bool:
    """Whether it names an ordinary causal LM, which other programs could load too: not a lookup, nothing that `distill` made,
    nothing of a third party."""
    from specdec_engine.models.draft_files import read_draft

    return entry_of(spec) is None and spec != "builtin" and read_draft(Path(spec)) is None


def _kind(name: str) -> str:
    """Which drafter runs the model of this name."""
    from specdec_engine.models.draft_files import builtin_draft, read_draft

    found = read_draft(builtin_draft() if name == "builtin" else Path(name))
    return "model" if found is None else found.kind
