"""Ways of drafting. `core/registry.py` lists them; here they are built. CONTRIBUTING.md says what a new one takes."""

from __future__ import annotations

from collections.abc import Sequence
from pkgutil import resolve_name
from typing import TYPE_CHECKING

from specdec_engine.core.registry import drafters, entry_of, levels_of, members_of
from specdec_engine.errors import ModelUnavailable, SpecdecError, UsageError, first_line

if TYPE_CHECKING:
    from specdec_engine.drafters.base import Drafter, DraftSetup


def build_drafter(spec: str, setup: DraftSetup) -> Drafter:
    """The drafter that `--draft` names.

    `spec` is `none`, `ngram`, `ngram:5`, a third party's name, a model (hub id, folder, .gguf file), or several of these
    joined by commas: the first that proposes wins; after `tree:` all propose, and their drafts are one token tree.
    `ngram+MODEL` is a model for which the lookup drafts.
    """
    from specdec_engine.drafters.cascade import CascadeDrafter
    from specdec_engine.drafters.tree import TreeDrafter

    if not members_of(spec)[1]:
        raise UsageError(f"the draft {spec!r} names no drafter", "choose none, ngram, or a model's name")
    merged, names = members_of(spec)
    _refuse_twice(spec, names)
    members = [_build_one(name, setup) for name in names]
    _refuse_twice(spec, [member.name for member in members])  # `ngram` and `ngram:5` are one, and share a history
    if merged:
        return TreeDrafter(members, setup)
    return members[0] if len(members) == 1 else CascadeDrafter(members, setup)


def _refuse_twice(spec: str, names: Sequence[str]) -> None:
    """Raises UsageError."""
    if twice := next((name for i, name in enumerate(names) if name in names[:i]), None):
        raise UsageError(f"the draft {spec} names {twice} twice", "each of them proposes once: name it once")


def _build_one(spec: str, setup: DraftSetup) -> Drafter:
    if (levels := levels_of(spec)) is not None:
        return _on_two_levels(*levels, setup)
    entry, argument = entry_of(spec), spec.partition(":")[2]
    if entry is None:
        entry, argument = drafters()[_kind(spec, setup)], spec
    try:
        built: Drafter = resolve_name(entry.build)(argument, setup)
    except Exception as error:
        if not entry.package or isinstance(error, SpecdecError):
            raise
        what = f"the draft {spec}, of the package {entry.package}, cannot be loaded: {type(error).__name__}: "
        raise ModelUnavailable(what + first_line(error), "choose another draft, or mend that package") from error
    return built


def _on_two_levels(lower: str, upper: str, setup: DraftSetup) -> Drafter:
    """`ngram+MODEL`: the lookup drafts for the model, which drafts for the target."""
    from specdec_engine.drafters.base import Guesser
    from specdec_engine.drafters.on_runtime import RuntimeDrafter

    if not upper:
        raise UsageError(f"{lower}+ names no model to draft for", f"for example {lower}+ORG/DRAFT")
    guesser = _build_one(lower, setup)
    if not isinstance(guesser, Guesser):
        raise UsageError(f"{lower} cannot draft for another draft", f"ngram can: ngram+{upper}")
    if (entry := entry_of(upper)) is not None and entry.name not in ("model", "self"):
        raise UsageError(f"{upper} is no model that {lower} could draft for", f"one after the other is {lower},{upper}")
    model = _build_one(upper, setup)
    if not isinstance(model, RuntimeDrafter) or model.in_one_pass:
        raise UsageError(
            f"{lower} drafts for models with the target's tokens, token by token, and {upper} is none",
            f"one after the other is {lower},{upper}",
        )
    model.take_guesses(guesser, f"{lower}+{model.name}")
    return model


def is_checkpoint(spec: str) -> bool:
    """Say whether it names an ordinary causal LM, which other programs could load too: not a lookup, no head,
    nothing that `distill` made, nothing of a third party."""
    from specdec_engine.models.draft_files import read_draft
    from specdec_engine.models.sources import resolve

    if entry_of(spec) is not None or levels_of(spec) is not None or spec == "builtin":
        return False
    try:
        path = resolve(spec, offline=True)
    except ModelUnavailable:  # nothing of it is on this machine: a checkpoint, as far as anybody can say
        return True
    return read_draft(path) is None


def is_eagle(spec: str) -> bool:
    """Say whether it names an EAGLE-3 head that others published, and that is on this machine."""
    from specdec_engine.models.draft_files import read_draft
    from specdec_engine.models.sources import resolve

    if entry_of(spec) is not None or levels_of(spec) is not None or spec == "builtin":
        return False
    try:
        draft = read_draft(resolve(spec, offline=True))
    except ModelUnavailable:
        return False
    return draft is not None and draft.config.get("model_type") == "eagle3"


def _kind(name: str, setup: DraftSetup) -> str:
    """Tell by its files which drafter runs the model of this name."""
    from specdec_engine.models.draft_files import builtin_draft, read_draft

    found = read_draft(builtin_draft() if name == "builtin" else setup.find(name))
    return "model" if found is None else found.kind
