"""A draft head as drafter: one that `specdec distill` made, or an EAGLE-3 head of others, on the lean runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from specdec_engine.drafters.base import DraftSetup, ModelInfo
from specdec_engine.drafters.context_ids import ContextIds
from specdec_engine.drafters.on_features import FeatureDrafter, check_packing, stored_bytes
from specdec_engine.errors import ModelUnavailable, PairIncompatible, UsageError
from specdec_engine.models.draft_files import builtin_draft, head_weights, read_draft
from specdec_engine.models.draft_folder import DraftFolder
from specdec_engine.runtime.decoder import Decoder, Embedding
from specdec_engine.runtime.head import HeadForward, check_weights, head_shape
from specdec_engine.runtime.head_runtime import HeadRuntime
from specdec_engine.runtime.lean import LeanRuntime
from specdec_engine.runtime.shape import Unsupported


def build(argument: str, setup: DraftSetup) -> FeatureDrafter:
    """`head:NAME`: a folder as `specdec distill` writes it, or an EAGLE-3 head, a folder or a hub id. Raises PairIncompatible
    for another target than it was made for."""
    path = builtin_draft() if argument == "builtin" else setup.find(argument)
    draft = read_draft(path)
    if draft is None or draft.kind != "head":
        raise UsageError(f"{path} holds no draft head", "specdec distill --kind head --out FOLDER makes one")
    draft.check(setup.tokenizer, setup.name, setup.vocab)
    weights, target = head_weights(draft), setup.target()
    if not isinstance(target, LeanRuntime) or not isinstance(target.decoder, Decoder):
        raise PairIncompatible(
            f"a draft head needs the lean or the graph runtime, and the target runs on {target.name}",
            "leave out --runtime and --device-map, or choose another draft",
        )
    check_packing(setup, target.decoder)
    try:
        taps = draft.taps_on(target.decoder.shape.hidden, target.decoder.shape.layers)
        forward, numbers = _forward(draft, weights, taps, target.decoder, setup)
    except (LookupError, TypeError, ValueError, RuntimeError) as error:
        raise ModelUnavailable(f"the draft in {path} is damaged: {error}", "fetch or distill it again") from error
    if draft.layers.counted == "guessed":
        setup.notes.append(
            f"{argument} does not say which layers of the target it reads: {', '.join(map(str, taps))} are taken, as EAGLE's "
            "own code does; if few of its first tokens are accepted, it was made for others"
        )
    try:
        target.tap(taps)
    except Unsupported as reason:
        raise PairIncompatible(
            f"the target cannot serve the draft {path}: {reason}", "choose one draft head"
        ) from reason
    setup.models[argument] = ModelInfo(
        name=argument,
        model_type=draft.config["model_type"],
        parameters=sum(tensor.numel() for tensor in weights.values()),
        vocab=len(draft.ids),
        context=target.limit,
        runtime=target.name,
        dtype=str(target.decoder.dtype).removeprefix("torch."),
        weights=forward.forms,
        weight_bytes=stored_bytes(numbers, forward.forms),
    )
    more = None if "head.weight" in weights else _output_rows(target.decoder)
    ids = ContextIds(draft.ids.to(setup.device), more)
    return FeatureDrafter(HeadRuntime(forward, target.capacity), target, ids, setup, argument)


def _output_rows(decoder: Decoder) -> Callable[[Tensor], Tensor]:
    dtype = decoder.dtype if decoder.kernels is None else torch.bfloat16  # in which our own multiply them

    def rows(ids: Tensor) -> Tensor:
        return decoder.output_rows(ids).to(dtype)

    return rows


def _forward(
    draft: DraftFolder, weights: Mapping[str, Tensor], taps: Sequence[int], decoder: Decoder, setup: DraftSetup
) -> tuple[HeadForward, int]:
    """The head on its target, and how many numbers a step reads. Raises PairIncompatible, and for damage what `build`
    catches."""
    shape, form = head_shape(draft.config), draft.form
    own = Embedding(weights["embedding.weight"].to(decoder.device)) if "embedding.weight" in weights else None
    width = decoder.shape.hidden
    if own is None and shape.hidden != width:
        raise ValueError(f"it is {shape.hidden} numbers wide, its target {width}, and it has no embeddings of its own")
    if own is not None and tuple(weights["embedding.weight"].shape) != (setup.vocab, shape.hidden):
        raise ValueError(f"its embeddings are {tuple(weights['embedding.weight'].shape)}")
    check_weights(weights, shape, draft.config["intermediate_size"], len(taps) + form.final, form, width)
    rows = weights["head.weight"] if "head.weight" in weights else setup.output_rows(draft.ids)
    # A dense head's step takes 1.9 ms beside a packed target, 1.2 in 4 bits. Beside a dense one our own kernels gain 3 %:
    # 1.95 times plain decoding against 1.89, since as much is accepted.
    packed = setup.draft_quantize == "auto" and ("int4" in decoder.forms or decoder.kernels is not None)
    forward = HeadForward(
        shape,
        weights,
        decoder.embedding if own is None else own,
        rows,
        decoder.dtype,
        setup.device,
        "int4" if packed else setup.draft_quantize,
        kernels=decoder.kernels,
        form=form,
    )
    read = sum(t.numel() for name, t in weights.items() if name not in ("embedding.weight", "head.weight"))
    return forward, read + rows.numel()
