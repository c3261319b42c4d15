"""A target's own module for multi-token prediction (MTP) as drafter; DeepSeek-V3 (arXiv:2412.19437) says how it is trained.

Its first module drafts every token: from the target's last state first, and then from its own, as vLLM and SGLang have it.
"""

from __future__ import annotations

import torch

from specdec_engine.core.cycle_types import Sampling
from specdec_engine.core.transfer import upload
from specdec_engine.drafters.base import DraftSetup, ModelInfo
from specdec_engine.drafters.context_ids import ContextIds
from specdec_engine.drafters.on_features import Featured, FeatureDrafter, check_packing, stored_bytes
from specdec_engine.drafters.token_choice import DraftChoice
from specdec_engine.errors import ModelUnavailable, PairIncompatible, UsageError, first_line
from specdec_engine.models.mtp_files import (
    MIMO_FORM,
    MtpFiles,
    check_module,
    find_mtp,
    load_module,
    mimo_shape,
    mimo_weights,
)
from specdec_engine.runtime import Runtime
from specdec_engine.runtime.decoder import Decoder
from specdec_engine.runtime.generic import GenericRuntime
from specdec_engine.runtime.head import HeadForward, check_weights, head_shape
from specdec_engine.runtime.head_runtime import HeadRuntime
from specdec_engine.runtime.lean import LeanRuntime
from specdec_engine.runtime.mtp import MtpRuntime
from specdec_engine.system.memory import ran_out


def build(argument: str, setup: DraftSetup) -> FeatureDrafter:
    """`mtp`. Raises PairIncompatible for a target whose checkpoint has no module, or that runs where it cannot be read."""
    if argument:
        raise UsageError(f"mtp:{argument} is no draft: the module has no other name", "mtp alone is the target's own")
    found = None if setup.checkpoint is None else find_mtp(setup.checkpoint)
    if found is None:
        raise PairIncompatible(
            f"the checkpoint of {setup.name} has no module for multi-token prediction (MTP)",
            "specdec check TARGET lists what could draft for it",
        )
    check_module(found, setup.name)
    packed = setup.draft_quantize in ("int8", "int4")
    if packed and not found.is_mimo:
        raise UsageError(
            f"the MTP module of {setup.name} cannot be packed: it runs on transformers' forward",
            "leave out --draft-quantize",
        )
    target = setup.target()
    module: HeadRuntime | MtpRuntime
    if found.is_mimo and isinstance(target, LeanRuntime) and isinstance(target.decoder, Decoder):
        module, info = _on_lean(found, target, target.decoder, setup)
        kept: Featured = target
    elif not found.is_mimo and isinstance(target, GenericRuntime) and not _spread(target):
        module, info = _on_generic(found, target, setup)
        kept = target
    else:
        raise _misplaced(found, target, setup)
    if found.modules > 1:
        setup.notes.append(
            f"{setup.name} has {found.modules} MTP modules, each for one token further: the first drafts them all"
        )
    setup.models["mtp"] = info
    return FeatureDrafter(module, kept, ContextIds(torch.arange(setup.vocab, device=setup.device), None), setup, "mtp")


def _misplaced(found: MtpFiles, target: Runtime, setup: DraftSetup) -> PairIncompatible:
    spread = isinstance(target, GenericRuntime) and _spread(target)
    needs, way_out = "the generic runtime", "add --runtime generic"
    if found.is_mimo:
        needs, way_out = "the lean or the graph runtime", "leave out --runtime and --device-map"
    elif spread:
        needs, way_out = "one device", "leave out --device-map"
    where = "several devices" if spread else target.name
    return PairIncompatible(
        f"the MTP module of {setup.name} needs {needs}, and the target runs on {where}",
        f"{way_out}, or choose another draft",
    )


def _spread(target: GenericRuntime) -> bool:
    return getattr(target.model, "hf_device_map", None) is not None


def _on_generic(found: MtpFiles, target: GenericRuntime, setup: DraftSetup) -> tuple[MtpRuntime, ModelInfo]:
    """transformers' module, tried on two tokens: what does not go together is found out before a run."""
    model = load_module(found, target.model, setup.name)
    module = MtpRuntime(model)
    own = {id(weight) for weight in target.model.parameters()}
    numbers = [weight for weight in model.parameters() if id(weight) not in own]
    if not all(bool(weight.isfinite().all()) for weight in numbers if weight.is_floating_point()):
        what = f"the MTP module of {setup.name} is damaged: it has entries that are not finite numbers"
        raise ModelUnavailable(what, f"fetch it again: {found.path}")
    try:
        target.keep_last()
        tokens = upload(torch.tensor([1, 2]), target.device) % target.vocab
        target.forward(tokens, 1)
        number, ids = torch.zeros(1, device=target.device), torch.arange(target.vocab, device=target.device)
        choice = DraftChoice(Sampling(), target.vocab, confident=False)
        module.unroll(target.features(0, 1), tokens[1:], number, number[0], choice, ids)
        module.rollback(0)
        target.rollback(0)
    except Exception as error:  # in as many ways as there are lines in a stranger's forward
        if ran_out(error):
            raise
        raise PairIncompatible(
            f"the MTP module of {setup.name} does not run: {first_line(error)}", "choose another draft"
        ) from error
    return module, _info(
        target, sum(n.numel() for n in numbers), str(target.model.dtype), sum(n.nbytes for n in numbers)
    )


def _on_lean(
    found: MtpFiles, target: LeanRuntime, decoder: Decoder, setup: DraftSetup
) -> tuple[HeadRuntime, ModelInfo]:
    """MiMo's, as a form of our draft head."""
    check_packing(setup, decoder)
    try:
        config = mimo_shape(decoder.shape)
        weights, shape = mimo_weights(found, decoder.shape), head_shape(config)
        check_weights(weights, shape, weights["down.weight"].shape[-1], 1, MIMO_FORM, shape.hidden)
        packed = setup.draft_quantize == "auto" and ("int4" in decoder.forms or decoder.kernels is not None)
        forward = HeadForward(
            shape,
            weights,
            decoder.embedding,
            decoder.head,
            decoder.dtype,
            setup.device,
            "int4" if packed else setup.draft_quantize,
            kernels=decoder.kernels,
            form=MIMO_FORM,
        )
    except (LookupError, TypeError, ValueError, RuntimeError) as error:
        raise ModelUnavailable(
            f"the MTP module of {setup.name} is damaged: {first_line(error)}", f"fetch it again: {found.path}"
        ) from error
    target.tap(())
    numbers = sum(tensor.numel() for tensor in weights.values())
    dtype = str(decoder.dtype).removeprefix("torch.")
    return HeadRuntime(forward, target.capacity), _info(
        target, numbers, dtype, stored_bytes(numbers, forward.forms), forward.forms
    )


def _info(target: LeanRuntime | GenericRuntime, parameters: int, dtype: str, size: int, weights: str = "") -> ModelInfo:
    dtype = dtype.removeprefix("torch.")
    return ModelInfo("mtp", "mtp", parameters, target.vocab, target.limit, target.name, dtype, weights or dtype, size)
