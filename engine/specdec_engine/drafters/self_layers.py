"""The target's first N layers with its own norm and head as drafter (early exit; Zhang et al. 2023, arXiv:2309.08168).

Shares the target's weights, and keeps a cache of those layers for itself. In the target's own it would find its tokens
already there, but a draft takes one pass a token either way: what was accepted rides in the first. It would save N layers'
memory, and a rollback would have two owners. What the layers were not trained to do they do badly: with few layers hardly a
token is accepted, with many a draft costs what it saves.
"""

from __future__ import annotations

from specdec_engine.drafters.base import DraftSetup, ModelInfo
from specdec_engine.drafters.on_runtime import RuntimeDrafter
from specdec_engine.errors import PairIncompatible, UsageError
from specdec_engine.runtime.decoder import Decoder
from specdec_engine.runtime.lean import LeanRuntime


def build(argument: str, setup: DraftSetup) -> RuntimeDrafter:
    """`self:N`, N at least 1 and less than the target has layers. Raises PairIncompatible for a target whose forward is not
    ours to cut."""
    if not argument.isdecimal() or not int(argument):
        raise UsageError(f"self:{argument} names no number of layers", "self:8 drafts with the target's first 8 layers")
    runtime, layers = setup.target(), int(argument)
    if not isinstance(runtime, LeanRuntime) or not isinstance(runtime.decoder, Decoder):
        raise PairIncompatible(
            f"self:{argument} needs the lean or the graph runtime, and the target runs on {runtime.name}",
            "leave out --runtime, where you named it; or choose a target that runs on it (docs/models.md), or another draft",
        )
    if layers >= runtime.decoder.shape.layers:
        raise UsageError(
            f"self:{layers} leaves out nothing: the target has {runtime.decoder.shape.layers} layers",
            f"self:{max(1, runtime.decoder.shape.layers // 4)} is a usual choice",
        )
    name, decoder = f"self:{layers}", runtime.decoder
    setup.models[name] = ModelInfo(
        name=name,
        model_type="first layers of the target",
        parameters=0,  # none that the target does not have
        vocab=runtime.vocab,
        context=runtime.limit,
        runtime=runtime.name,
        dtype=str(decoder.dtype).removeprefix("torch."),
        weights=decoder.forms,
    )
    return RuntimeDrafter(runtime.first(layers), setup, name)
