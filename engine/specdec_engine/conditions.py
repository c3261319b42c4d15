"""The conditions of a pair's runs, and what a user should know of them, in sentences."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import torch
import transformers

from specdec_engine.core.registry import members_of
from specdec_engine.drafters.base import ModelInfo
from specdec_engine.models.loading import Loaded
from specdec_engine.models.memory_needs import kv_bytes
from specdec_engine.record.text import counted
from specdec_engine.runtime import native
from specdec_engine.runtime.target import ModelTarget, takes_trees
from specdec_engine.system.devices import idle_gpu
from specdec_engine.system.machine import instructions, usable_cores
from specdec_engine.verify.processors import Asked
from specdec_engine.version import VERSION


def machine_notes(asked: int | str | None, device: str, found: torch.device) -> Iterator[str]:
    """What of the threads and the device that were asked for a user should know."""
    cores = usable_cores()
    if isinstance(asked, int) and asked > cores:
        yield f"{asked} threads on {cores} cores wait for each other, and may take ten times as long"
    if device == "auto" and (idle := idle_gpu(found)) is not None:
        yield idle


def target_notes(target: Loaded, draft: str) -> Iterator[str]:
    """Say what of a target's files is followed and what is not, and whether it takes the draft that was named as it is."""
    name, vocab = target.name, target.runtime.vocab
    if members_of(draft)[0] and not takes_trees(target.runtime):
        yield (
            f"{name} verifies chains here: of {draft} the first path alone; whole trees on a CPU, by our own forward, "
            "without windows"
        )
    if "there is no C compiler" in target.remark:
        yield (
            f"{native.why_none()}, so none of our own kernels: it is mostly slower, and with a draft near-ties may fall "
            "otherwise than in plain decoding (not with --dtype float32)"
        )
    if target.stop_ids and min(target.stop_ids) >= vocab:
        yield f"no token of {name} ends a text: {min(target.stop_ids)} is beyond its {vocab:,} tokens"
    if target.asked:
        said = ", ".join(f"{key} {value}" for key, value in target.asked.named().items())
        yield f"followed, of {name}'s generation_config.json: {said}"
    if target.unused:
        yield f"not used, of {name}'s weights: {counted(len(target.unused), 'tensor')}, the first {target.unused[0]}"
    if target.left_out:
        yield f"not followed, of {name}'s generation_config.json: {', '.join(target.left_out)}"


def tree_note(draft: str, target: ModelTarget, rule: str, grammar: bool, asked: Asked) -> str:
    """Say in a sentence why a run verifies chains alone of the trees that its draft makes; empty where it does not."""
    if not members_of(draft)[0] or not target.trees:
        return ""
    why = (
        [f"the {rule} rule"] * (rule != "token")
        + ["a grammar"] * grammar
        + [name.replace("_", " ") for name in asked.named()]
    )
    return f"of {draft} the first path alone is verified, because of {' and '.join(why)}" if why else ""


def remarks_on(target: Loaded, parts: Mapping[str, ModelInfo], drafts: Mapping[str, Loaded]) -> tuple[str, ...]:
    """Say which runtimes the target and the parts of its draft got, and why."""
    own = ", by our own kernels" if target.kernels == "own" else ""
    drafting = (
        _remark_on("draft", part, drafts[name].remark if name in drafts else "") for name, part in parts.items()
    )
    return (_remark_on("target", info_of(target), target.remark) + own, *drafting)


def _remark_on(role: str, part: ModelInfo, why: str) -> str:
    because = f", because {why}" if why else ""
    return f"{role} {part.name} runs on the {part.runtime} runtime, {part.weights} weights{because}"


def now_on(environment: Mapping[str, Any]) -> Mapping[str, Any]:
    """The conditions of a run that begins now: threads may be other ones than at the loading."""
    return {**environment, "threads": torch.get_num_threads()}


def environment_of(target: Loaded, drafts: Mapping[str, ModelInfo]) -> dict[str, Any]:
    """The conditions of every run, as traces and records have them."""
    device = target.runtime.device
    return {
        "specdec": VERSION,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "platform": f"{sys.platform}-{platform.machine()}",
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "device_map": target.spread,
        "threads": torch.get_num_threads(),
        "cores": usable_cores(),
        "dtype": target.dtype,
        "weights": target.weights,
        "kernels": target.kernels,
        "instructions": instructions(),
        "runtime": target.runtime.name,
        "target": asdict(info_of(target)),
        "drafts": {name: asdict(draft) for name, draft in drafts.items()},
    }


def info_of(loaded: Loaded) -> ModelInfo:
    """A model in use."""
    return ModelInfo(
        name=loaded.name,
        model_type=loaded.config.model_type,
        parameters=loaded.parameters,
        vocab=loaded.runtime.vocab,
        context=loaded.runtime.limit,
        runtime=loaded.runtime.name,
        dtype=loaded.dtype,
        weights=loaded.weights,
        weight_bytes=loaded.weight_bytes,
        token_bytes=getattr(loaded.runtime, "token_bytes", None)
        or kv_bytes(loaded.config, getattr(torch, loaded.dtype), 1),
        revision=loaded.revision,
    )
