"""From a name to a model on a device, on the fastest runtime that computes it exactly.

`find_model` fetches and looks, `Candidate.load` reads the weights; what can be refused is refused in between. Code that
comes with a checkpoint is run only on demand.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from specdec_engine.errors import ModelUnavailable, UsageError
from specdec_engine.models import gguf_files
from specdec_engine.models.damage import explained
from specdec_engine.models.draft_files import read_draft
from specdec_engine.models.forwards import lean_shape
from specdec_engine.models.kinds import check_kind, check_plain, rollback_by_kind
from specdec_engine.models.memory_needs import Need
from specdec_engine.models.mtp_files import find_mtp
from specdec_engine.models.options import LoadOptions
from specdec_engine.models.placement import matrices_of, need_of, packing_of, place
from specdec_engine.models.pretrained import (
    DeviceMap,
    Read,
    State,
    generation_config,
    load_config,
    load_tokenizer,
    load_weights,
    stop_ids,
)
from specdec_engine.models.progress import Progress
from specdec_engine.models.sources import resolve, weight_files
from specdec_engine.models.text_part import TextWeights, causal_name, text_part
from specdec_engine.runtime import Runtime, native
from specdec_engine.runtime.arithmetic import Arithmetic, choose
from specdec_engine.runtime.context_limit import context_limit
from specdec_engine.runtime.decoder import Decoder, check_tensors
from specdec_engine.runtime.graphs import CudaRecorder, GraphRuntime, room_for
from specdec_engine.runtime.lean import Forward, LeanRuntime
from specdec_engine.runtime.shape import FAMILY, Shape, Unsupported, is_mxfp4
from specdec_engine.runtime.unfused import SplitExperts
from specdec_engine.runtime.weights import PACKED, GgufWeights, SafetensorsWeights, Weights
from specdec_engine.system.devices import pick_device, pick_dtype
from specdec_engine.verify.processors import Asked, asked_by, left_out_of

if TYPE_CHECKING:
    from specdec_engine.runtime.generic import GenericRuntime
    from specdec_engine.runtime.transformers_cache import Rollback


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model with what belongs to it."""

    name: str
    runtime: Runtime
    config: Any
    tokenizer: Any
    dtype: str
    weights: str
    """How the layers' weights are kept: int4, int8, or a dtype."""
    parameters: int
    stop_ids: frozenset[int]
    """Tokens that end a text or a turn."""
    asked: Asked = field(default_factory=Asked)
    """What the checkpoint's generation config does to logits."""
    left_out: tuple[str, ...] = ()
    """What else it says, and is not done."""
    unused: tuple[str, ...] = ()
    """Tensors of the checkpoint that no part of the model takes."""
    spread: bool = False
    """Over several devices, by accelerate."""
    remark: str = ""
    """Why a faster runtime was not taken."""
    weight_bytes: int = 0
    """As kept in memory."""
    revision: str | None = None
    """Of the hub's repository."""
    kernels: str = "torch"
    """Whose multiply: torch, or own (`runtime.native`)."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model that was found and looked at; its weights are not read yet."""

    name: str
    path: Path
    """The folder, or the GGUF."""
    folder: Path
    """Where config and tokenizer are."""
    config: Any
    shape: Shape | Unsupported
    """For the lean forward, or why it is not taken."""
    tokenizer: Any
    need: Need
    device: torch.device
    arithmetic: Arithmetic
    options: LoadOptions
    stop_ids: frozenset[int]
    asked: Asked
    left_out: tuple[str, ...]
    """As `Loaded` has them."""
    text_of: str = ""
    """The type of the vision-language model whose text part it is; empty for a model of its own."""
    rollback: Rollback | None = None
    """How the generic forward goes back; None for the lean one, and for a class that comes with the checkpoint."""

    @property
    def plain_only(self) -> str:
        """Why no draft can be tested by it, nor by it be made; empty where both can."""
        return "" if self.rollback is None else self.rollback.plain_only

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations."""
        return self.arithmetic.dtype if isinstance(self.shape, Shape) else self.arithmetic.weights

    @property
    def vocab(self) -> int:
        """Size of the logits, by the config."""
        return int(self.config.get_text_config().vocab_size)

    def load(self) -> Loaded:
        """Read the weights. Raises ModelUnavailable for damaged ones, OutOfMemory if they do not fit any more."""
        report, size = self.options.report, self.need.weights
        placement = place(self.name, self.need, self.device, self.options)
        report(Progress("load", self.name, 0, size))
        with explained(self.name, self.path):
            try:
                loaded = self._on_runtime(placement)
            except RuntimeError as error:
                if "ignore_mismatched_sizes" in str(error):  # says no more than that some have another size
                    self.rehearsed()
                raise
        report(Progress("load", self.name, size, size))
        return loaded

    def rehearsed(self) -> Candidate:
        """As `load` would take it, by names and sizes of the tensors: on the lean forward, or the generic one and why. Raises
        what `load` does for a checkpoint that lacks some or is of another kind; what a GGUF of transformers' names holds is
        looked at by `load` alone."""
        with explained(self.name, self.path):
            try:
                if isinstance(self.shape, Unsupported):
                    raise self.shape
                check_tensors(self._weights(), self.shape)
            except Unsupported as reason:
                dense = self._dense(reason)
                if self.path.is_dir():
                    dense._read(torch.device("meta"))  # noqa: SLF001 - another of its own class
                return dense
        return self

    def _on_runtime(self, placement: torch.device | DeviceMap) -> Loaded:
        """The lean forward, on a GPU as recorded graphs; or the generic one, and why."""
        try:
            if isinstance(self.shape, Unsupported):
                raise self.shape
            if isinstance(placement, str):  # only now: the draft, which is loaded first, has taken its room
                raise Unsupported(_SPREAD)
            return self._lean(self.shape)
        except Unsupported as reason:  # of the config, or now of the checkpoint
            return self._dense(reason)._generic(placement, str(reason))  # noqa: SLF001 - likewise

    def _dense(self, reason: Unsupported) -> Candidate:
        """For the generic forward. Raises UsageError if what was asked for is the lean one's."""
        if self.options.quantize in ("int8", "int4"):
            raise UsageError(
                f"the weights of {self.name} cannot be packed: that needs the lean runtime, and {reason}",
                "leave out --quantize or --draft-quantize, and --runtime and --device-map if you gave them",
            ) from None
        if self.options.runtime == "lean" or (self.options.runtime == "graph" and self.device.type != "cuda"):
            raise UsageError(
                f"{self.name} cannot run on the {self.options.runtime} runtime: {reason}", "leave out --runtime"
            ) from None
        dense = choose(matrices_of(self.config, False, False), self.options.dtype, "none", self.device)
        return replace(self, shape=reason, arithmetic=dense)

    def _lean(self, shape: Shape) -> Loaded:
        packing = packing_of(self.options, self.arithmetic)
        dtype, kernels = self.arithmetic.dtype, self.arithmetic.kernels
        decoder = Decoder(shape, self._weights(), dtype, self.device, packing, kernels=kernels)
        runtime: LeanRuntime | None = None
        remark = decoder.ops.remark
        if self.device.type == "cpu" and self.options.dtype == "auto" and (missing := native.why_none()):
            remark = f"there are no kernels of our own: {missing}"
        if self.device.type == "cuda" and self.options.runtime != "lean":
            runtime, why = self._graphs(decoder)
            remark = "; ".join(filter(None, (remark, why)))
        if runtime is None:
            runtime = LeanRuntime(decoder, self.name, context_limit(self.config), self.options.tokens)
        return self._loaded(runtime, decoder.forms, decoder.parameters, remark=remark)

    def _graphs(self, forward: Forward) -> tuple[GraphRuntime | None, str]:
        """A forward as graphs; None where it cannot be recorded, and why. Raises UsageError if graphs were asked for."""
        limit = context_limit(self.config)
        room = room_for(self.options.tokens, limit)
        runtime = GraphRuntime(forward, self.name, limit, room, CudaRecorder(self.device))
        try:
            runtime.try_out()
        except Unsupported as reason:
            self._check_demand(reason)
            return None, str(reason)
        return runtime, ""

    def _check_demand(self, reason: Unsupported) -> None:
        """Raises UsageError if the graph runtime was asked for by name, and this is why it cannot be had."""
        if self.options.runtime == "graph":
            raise UsageError(f"{self.name} cannot run on the graph runtime: {reason}", "leave out --runtime") from None

    def _generic(self, placement: torch.device | DeviceMap, remark: str) -> Loaded:
        runtime: Runtime
        runtime, read = self._read(placement)
        model = read.model
        form = str(self.arithmetic.weights).removeprefix("torch.")
        spread = getattr(model, "hf_device_map", None) is not None  # not so where there is but one device
        if self.device.type == "cuda" and not spread and self.options.runtime != "generic":
            runtime, remark = self._recorded(model, runtime, remark)
        if self.rollback is not None and self.rollback.remark and runtime.name == "generic":
            remark = f"{remark}; {self.rollback.remark}"
        loaded = self._loaded(runtime, form, model.num_parameters(), spread, remark)
        unused = (*loaded.unused, *read.unused)
        if unused and (drafting := find_mtp(self.path)) is not None:
            unused = tuple(name for name in unused if not drafting.all_names.search(name))
        return replace(loaded, unused=unused)

    def _read(self, placement: torch.device | DeviceMap) -> tuple[GenericRuntime, Read]:
        from specdec_engine.runtime.generic import GenericRuntime  # its imports take 2 s

        dtype, own_code = self.arithmetic.weights, self.options.trust_remote_code
        read = load_weights(self.path, self.folder, self._state(placement), dtype, placement, own_code)
        return GenericRuntime(read.model, self.name), read

    def _recorded(self, model: Any, otherwise: Runtime, remark: str) -> tuple[Runtime, str]:
        """The transformers forward as graphs, where it can be recorded; and why it is not the lean one, or not even that."""
        from specdec_engine.runtime.static import StaticForward

        try:
            forward = StaticForward(model)
        except Unsupported as reason:
            self._check_demand(reason)
            return otherwise, f"{remark}, and {reason}"
        runtime, why = self._graphs(forward)
        return (otherwise, f"{remark}, and {why}") if runtime is None else (runtime, remark)

    def _loaded(
        self, runtime: Runtime, weights: str, parameters: int, spread: bool = False, remark: str = ""
    ) -> Loaded:
        _check_numbers(runtime, self)
        return Loaded(
            name=self.name,
            runtime=runtime,
            config=self.config,
            tokenizer=self.tokenizer,
            dtype=str(self.dtype).removeprefix("torch."),
            weights=weights,
            parameters=parameters,
            stop_ids=self.stop_ids,
            asked=self.asked,
            left_out=self.left_out,
            unused=TextWeights(weight_files(self.path)).unused if self.text_of else (),
            spread=spread,
            remark=remark,
            weight_bytes=self.need.weights,
            revision=self.path.name if self.path.parent.name == "snapshots" else None,
            kernels="own" if getattr(getattr(runtime, "decoder", None), "kernels", None) is not None else "torch",
        )

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor of the checkpoint, unpacked."""
        return self._weights().dense(name)

    def output_rows(self, ids: torch.Tensor | slice) -> torch.Tensor:
        """[n] ids -> [n, hidden]: those rows of the matrix that makes logits, unpacked."""
        weights, untied = self._weights(), "lm_head.weight"
        stored = weights.stored(untied if untied in weights.names else "model.embed_tokens.weight")
        return stored[ids] if isinstance(stored, torch.Tensor) else stored.dense_rows(ids)

    def _weights(self) -> Weights:
        if self.path.is_dir():
            stored = (TextWeights if self.text_of else SafetensorsWeights)(weight_files(self.path))
            return SplitExperts(stored) if self.config.model_type == "gpt_oss" else stored
        found = gguf_files.entries(self.folder)
        if not found:
            raise Unsupported("the names in this GGUF are known to transformers only")
        return GgufWeights(weight_files(self.path), found)

    def _state(self, placement: torch.device | DeviceMap) -> State | None:
        """Tensors by their names, dequantised, with their config, where we read them: of a text part, and of a GGUF, which
        takes transformers half a minute for 100 MB. None if that is left to transformers."""
        if self.text_of:
            weights, config = self._weights(), self.config
            if placement == torch.device("meta"):
                return State(config, {name: torch.empty(weights.size(name), device="meta") for name in weights.names})
        else:
            found = gguf_files.entries(self.folder) if self.path.is_file() else {}
            if "rope_freqs.weight" in found:  # transformers would leave them out, and compute another function
                raise ModelUnavailable(
                    f"{self.name} stretches its rotary embedding by a tensor, which only the lean runtime reads",
                    "leave out --runtime and --device-map",
                )
            if not found:
                return None
            if self.config.model_type == "gpt_oss":
                what = f"{self.name} is a GGUF of GPT-OSS, which only the lean runtime reads: {self.shape}"
                raise ModelUnavailable(what, "leave out --runtime, add --device cpu, or use the safetensors checkpoint")
            weights, config = self._weights(), load_config(self.folder, self.options.trust_remote_code)
        # Copied: an unpacked tensor is the mapped file itself, and whoever wrote to it would be killed.
        return State(config, {name: weights.dense(name).clone() for name in weights.names})


def find_model(name: str, options: LoadOptions) -> Candidate:
    """The model that `name` means, fetched if need be and checked as far as that goes without its weights.

    Raises UsageError for a device or dtype that does not exist, ModelUnavailable for a model that cannot be had,
    OutOfMemory for one that does not fit.
    """
    device = pick_device(options.device)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # streams, events and graphs are the current device's
    path = resolve(name, offline=options.offline, trust_remote_code=options.trust_remote_code, report=options.report)
    if path.is_dir() and (made := read_draft(path)) is not None and made.kind != "model":
        what = "a draft head" if made.kind == "head" else "an assistant of Gemma 4"
        raise UsageError(
            f"{name} is {what} and no model of its own", "give it to --draft by its name alone, with its target"
        )
    with explained(name, path):
        folder = gguf_files.beside(path, name, options.report) if path.is_file() else path
        found = gguf_files.entries(folder) if path.is_file() else {}
        config: Any = gguf_files.plain_config(folder) if found else load_config(folder, options.trust_remote_code)
        part = None if found or config.model_type in FAMILY else text_part(config)
        text_of, config = ("", config) if part is None else (config.model_type, part)
        check_kind(config, name, _own_code(config, options))
        if not path.is_file() and not getattr(config, "quantization_config", None):
            check_plain(path, name)
        shape = lean_shape(config, options, device)
        packed = any(e.kind in PACKED for e in found.values()) or is_mxfp4(config)
        if options.dtype != "auto":
            pick_dtype(options.dtype, device)  # what is refused is refused before anything is compiled
        if device.type == "cpu" and not native.is_ready():
            options.report(Progress("compile", "kernels for this CPU, once"))
        matrices = matrices_of(config, packed, isinstance(shape, Shape))
        arithmetic = choose(matrices, options.dtype, options.quantize, device)
        need = need_of(path, found, config, shape, arithmetic, device, options, causal_name if text_of else str)
        if isinstance(place(name, need, device, options), str):
            shape = Unsupported(_SPREAD)
        rollback = None
        if isinstance(shape, Unsupported):
            rollback = rollback_by_kind(config if text_of else load_config(folder, options.trust_remote_code), name)
        tokenizer = load_tokenizer(folder, options.trust_remote_code)
        generation = generation_config(folder, config)
        vocab = int(config.get_text_config().vocab_size)
        return Candidate(
            name,
            path,
            folder,
            config,
            shape,
            tokenizer,
            need,
            device,
            arithmetic,
            options,
            stop_ids=stop_ids(folder, config, generation, tokenizer),
            asked=asked_by(generation, f"generation_config.json of {name}", vocab),
            left_out=tuple(left_out_of(generation)),
            text_of=text_of,
            rollback=rollback,
        )


_SPREAD = "it is spread over devices"


def _own_code(config: Any, options: LoadOptions) -> bool:
    return options.trust_remote_code and bool(getattr(config, "auto_map", None))


def _check_numbers(runtime: Runtime, model: Candidate) -> None:
    """Raises ModelUnavailable for weights that compute no numbers. A draft of them would be rejected without a word: the
    likeliest of a row of NaN is a token, too."""
    logits = runtime.forward(torch.zeros(1, dtype=torch.long, device=runtime.device), 1, seldom=True)
    runtime.rollback(0)
    if bool((logits.isnan() | (logits == math.inf)).any()):  # masked rows of a vocabulary may be -inf
        dtype = str(model.dtype).removeprefix("torch.")
        compare = "compare them with their owner's"
        hint = compare if dtype == "float32" else f"try --dtype float32, or {compare}"
        raise ModelUnavailable(f"the weights of {model.name} give logits that are not numbers, in {dtype}", hint)


def load_model(name: str, options: LoadOptions) -> Loaded:
    """`find_model`, and its weights."""
    return find_model(name, options).load()
