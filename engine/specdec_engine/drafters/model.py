"""A smaller model as drafter: hub id, folder or .gguf file, by its ids or, where its tokenizer is another, by its text."""

from __future__ import annotations

from specdec_engine.drafters.base import DraftSetup
from specdec_engine.drafters.on_runtime import RuntimeDrafter
from specdec_engine.drafters.on_text import TranslatedDrafter
from specdec_engine.errors import UsageError


def build(argument: str, setup: DraftSetup) -> RuntimeDrafter | TranslatedDrafter:
    """The argument is the model's name, as for --target."""
    if not argument:
        raise UsageError("the draft model has no name", "model:NAME, or simply NAME")
    loaded = setup.load_draft(argument)
    if loaded.translation is not None:
        return TranslatedDrafter(loaded.runtime, setup, argument, loaded.translation)
    return RuntimeDrafter(loaded.runtime, setup, argument, loaded.ids, loaded.mask)
