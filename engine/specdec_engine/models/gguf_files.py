"""GGUF files as checkpoints: what transformers needs beside the weights is made once and kept in the cache.

Making config and tokenizer of a GGUF's header takes seconds: its vocabulary is text, and the tokenizer's merges may have to
be recovered from it. The folder made here holds those and the tensor list; the weights stay where they are and are read in
place. It appears whole or not at all: a killed run leaves a scratch folder, and the next one begins again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
import tempfile
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from specdec_engine.errors import ModelUnavailable, first_line, reason
from specdec_engine.models.gguf_parts import parts_of
from specdec_engine.models.progress import Progress, Report, silent
from specdec_engine.record.files import read_json
from specdec_engine.system.folders import cache_folder

if TYPE_CHECKING:
    from specdec_engine.runtime.weights import Entry

LAYOUT = 9
"""Version of the folder; raise it when its contents change."""
SCRATCH = ".scratch-"
_INDEX = "index.json"
_DIGEST = "sha256"
_SLOW = 10_000_000
"""Bytes from which on a file has a vocabulary that takes long to read."""


@dataclass(frozen=True, slots=True)
class _Member:
    """How an architecture's tensors differ from Hugging Face's of the same names."""

    interleaved: bool = False
    """Query and key rows are stored as llama.cpp rotates them: in pairs."""
    fused: tuple[str, ...] = ()
    """Those of `_FUSED` that are one matrix."""
    plus: float = 0.0
    """A number that is added to the norms' weights: llama.cpp keeps Gemma's whole, Hugging Face less one."""
    more: tuple[str, ...] = ()
    """Tensors of a layer beside matrices and norms, by Hugging Face's names."""


_FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}
_EXPERTS = ("mlp.experts.gate_proj", "mlp.experts.up_proj", "mlp.experts.down_proj")
"""Each of all experts of a layer is one tensor."""
_MEMBERS = {
    "cohere2": _Member(),
    "command-r": _Member(),
    "exaone4": _Member(),
    "gemma2": _Member(plus=-1.0),
    "gemma3": _Member(plus=-1.0),
    "glm4": _Member(fused=("mlp.gate_up_proj",)),
    "gpt-oss": _Member(more=("mlp.router", "self_attn.sinks", *_EXPERTS)),
    "granite": _Member(interleaved=True),
    "llama": _Member(interleaved=True),
    "olmo2": _Member(),
    "phi3": _Member(fused=tuple(_FUSED)),
    "qwen2": _Member(),
    "qwen3": _Member(),
    "qwen3moe": _Member(more=("mlp.gate", *_EXPERTS)),
    "smollm3": _Member(interleaved=True),
}
"""GGUF architectures whose tensors have Hugging Face names one to one. Others are left to transformers."""


def beside(gguf: Path, name: str, report: Report) -> Path:
    """The folder with this file's config, tokenizer and tensor list; made if it is not there.

    Keyed by path, size and time, so that a file that was replaced is read anew, and by the versions of its readers. Raises
    ModelUnavailable where the cache cannot be written, and whatever transformers and gguf raise for a file they cannot
    read.
    """
    stats = [part.stat() for part in parts_of(gguf) if part.is_file()]
    dates = ":".join(f"{stat.st_size}:{stat.st_mtime_ns}" for stat in stats)
    known = f"{gguf.resolve()}:{dates}:{version('transformers')}:{version('gguf')}"
    key = hashlib.sha256(known.encode()).hexdigest()[:12]
    folder = cache_folder() / "gguf" / f"{key}-{LAYOUT}"
    if _is_whole(folder):
        return folder
    with _writing(name, folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        sweep(folder.parent)
        scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=SCRATCH))
    try:
        _make(gguf, scratch, name, report if stats[0].st_size > _SLOW else silent)
        with _writing(name, folder.parent):
            if folder.exists() and not _is_whole(folder):  # not ours, or damaged
                shutil.rmtree(folder)
            scratch.replace(folder)
    except ModelUnavailable:
        if not _is_whole(folder):  # no other process was faster, either
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _is_whole(folder: Path) -> bool:
    """Whether it is as it was written: one that was damaged since is made anew."""
    try:
        return (folder / _DIGEST).read_text("ascii") == _digest(folder)
    except (OSError, ValueError):
        return False


def _digest(folder: Path) -> str:
    """SHA-256 of all files but the one that holds it, 20 ms for 30 MB."""
    found = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.name != _DIGEST:
            found.update(file.name.encode() + b"\0" + file.read_bytes())
    return found.hexdigest()


@contextmanager
def _writing(name: str, where: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ModelUnavailable(
            f"{name} needs a few MB in {where}, which cannot be written: {reason(error)}",
            "free some space, or point SPECDEC_CACHE to a folder that can be written",
        ) from error


def entries(folder: Path) -> dict[str, Entry]:
    """The tensor list by Hugging Face names; empty for an architecture whose names are not known."""
    from specdec_engine.runtime.weights import Entry

    found: dict[str, Any] = _read_index(folder)["tensors"]
    return {name: Entry(**{**entry, "shape": tuple(entry["shape"])}) for name, entry in found.items()}


class PlainConfig(SimpleNamespace):
    """A config's values without its class, which takes 2 s to import: transformers.configuration_utils brings
    torch._dynamo."""

    def get_text_config(self) -> PlainConfig:
        return self

    def standardize_rope_params(self) -> None:
        """Nothing is left to do: these are the values of a config that was made. transformers' rotations ask for it."""


def plain_config(folder: Path) -> PlainConfig:
    return PlainConfig(**_read_index(folder)["config"])


def _read_index(folder: Path) -> dict[str, Any]:
    return read_json(folder / _INDEX)


def sweep(folder: Path) -> None:
    """Remove what killed runs left, once it is too old to be another process's work."""
    for left in folder.glob(f"{SCRATCH}*"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > 3600:
                shutil.rmtree(left, ignore_errors=True)


def _make(gguf: Path, into: Path, name: str, report: Report) -> None:
    from transformers import GenerationConfig

    from specdec_engine.models.gguf_header import (
        DAMAGED,
        Header,
        add_left_out,
        check_computed,
        check_header,
        config_and_tokenizer,
        end_ids,
        given_to_transformers,
    )

    def count(done: int, total: int) -> None:
        report(Progress("convert", f"the header of {name}", done, total, "tokens"))

    try:
        header = Header(gguf, count)
    except (
        ValueError,
        IndexError,
        KeyError,
        TypeError,
        OverflowError,
        struct.error,
    ) as error:
        raise ModelUnavailable(f"{gguf} is damaged or cut short: {first_line(error)}", DAMAGED) from error
    check_header(header, gguf, _MEMBERS)
    with given_to_transformers(header, gguf), _alone(gguf) as folder:
        made = config_and_tokenizer(header, folder / gguf.name)
    config = made.config
    tensors = {tensor: asdict(entry) for tensor, entry in _read_entries(header, config.model_type).items()}
    if tensors:
        add_left_out(header, config)
    check_computed(header, gguf, config, made.taken)
    if made.taken and (unknown := [name for name in tensors if not _is_read(name)]):
        raise ModelUnavailable(
            f"{gguf} has {len(unknown)} tensors that are not read, the first {unknown[0]}",
            "use the model's safetensors checkpoint",
        )
    if config.model_type in _LAYERS_OF_27B:  # not in the header: llama.cpp has it by the model's size, transformers 256
        config.query_pre_attn_scalar = _gemma_scalar(config)
    config.name_or_path = str(gguf)
    config.save_pretrained(into)
    generation = GenerationConfig.from_model_config(config)
    if ends := list(dict.fromkeys(end_ids(header))):
        generation.eos_token_id = ends
    generation.save_pretrained(into)
    made.tokenizer.save_pretrained(into)
    # All values, defaults too: `config.json` leaves them to the class.
    (into / _INDEX).write_text(json.dumps({"config": config.to_dict(), "tensors": tensors}), "utf-8")
    (into / _DIGEST).write_text(_digest(into), "ascii")


def _is_read(name: str) -> bool:
    """Whether it is one by a name that a forward has; those that nobody knows keep llama.cpp's."""
    return name.startswith(("model.", "lm_head.")) or name == "rope_freqs.weight"


@contextmanager
def _alone(gguf: Path) -> Iterator[Path]:
    """A folder in which the file lies by itself: beside another model's tokenizer.json transformers would take that one."""
    with tempfile.TemporaryDirectory(prefix="specdec-") as folder:
        (Path(folder) / gguf.name).symlink_to(gguf.resolve())
        yield Path(folder)


_LAYERS_OF_27B = {"gemma2": 46, "gemma3_text": 62}


def _gemma_scalar(config: Any) -> int:
    """The number whose root divides a query: a head's size; in the 27B the share of hidden size that a head has."""
    is_27b = config.num_hidden_layers == _LAYERS_OF_27B[config.model_type]
    return int(config.hidden_size // config.num_attention_heads if is_27b else config.head_dim)


def _read_entries(reader: Any, model_type: str) -> dict[str, Entry]:
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

    from specdec_engine.models.gguf_header import FACTORS
    from specdec_engine.runtime.tensors import norms_of
    from specdec_engine.runtime.weights import Entry

    arch = reader.fields["general.architecture"].contents()
    if arch not in _MEMBERS:
        return {}
    number: dict[str, MODEL_ARCH] = {name: member for member, name in MODEL_ARCH_NAMES.items()}
    layers = int(reader.fields[f"{arch}.block_count"].contents())
    heads = int(reader.fields[f"{arch}.attention.head_count"].contents())
    kv_heads = int(reader.fields[f"{arch}.attention.head_count_kv"].contents())
    member = _MEMBERS[arch]
    interleaved = {"q_proj": heads, "k_proj": kv_heads} if member.interleaved else {}
    parts = (*norms_of(model_type).names, *member.more)
    names = _hf_names(get_tensor_name_map(number[arch], layers), layers, member.fused, parts)
    found = dict[str, Entry]()
    for tensor, part in zip(reader.tensors, reader.part_of, strict=True):
        if tensor.name in FACTORS:  # these are in the config
            continue
        name = names.get(tensor.name, tensor.name)  # an unknown one keeps its name, and is seen to be left over
        name = name.removesuffix(".weight") if name.endswith(".sinks.weight") else name
        entry = Entry(
            kind=tensor.tensor_type.name,
            shape=tuple(int(size) for size in reversed(tensor.shape)),
            offset=int(tensor.data_offset),
            size=int(tensor.n_bytes),
            heads=next((n for part, n in interleaved.items() if f".{part}." in name), 0),
            plus=member.plus if name.endswith("norm.weight") else 0.0,
            part=part,
        )
        found |= _each_expert(name, entry) if ".mlp.experts." in name else {name: entry}
    return found


def _each_expert(name: str, entry: Entry) -> dict[str, Entry]:
    """A tensor [experts, rows, columns] as the matrices that it is made of."""
    count, *shape = entry.shape
    size, head, tail = entry.size // count, *name.split(".experts.")
    return {
        f"{head}.experts.{i}.{tail}": replace(entry, shape=tuple(shape), offset=entry.offset + i * size, size=size)
        for i in range(count)
    }


def _hf_names(table: Any, layers: int, fused: Collection[str], more: Collection[str]) -> dict[str, str]:
    """GGUF's names -> Hugging Face's, from the gguf library's own table."""
    parts = ["self_attn.o_proj", "self_attn.q_norm", "self_attn.k_norm", "mlp.down_proj", *more]
    for whole, apart in _FUSED.items():
        parts += [whole] if whole in fused else apart
    stems = ["model.embed_tokens", "model.norm", "lm_head"]
    stems += [f"model.layers.{i}.{part}" for i in range(layers) for part in parts]
    wanted = (f"{stem}.{kind}" for stem in stems for kind in ("weight", "bias"))
    known = ((table.get_name(name, try_suffixes=(".weight", ".bias")), name) for name in wanted)
    return {gguf: name for gguf, name in known if gguf is not None}
