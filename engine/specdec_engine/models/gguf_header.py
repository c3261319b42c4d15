"""A GGUF's header in one pass, and transformers reading that instead of the file.

gguf.GGUFReader makes two numpy views of every string, 25 µs a token, and transformers has it read the file for the config and
again for the tokenizer: 48 s for a vocabulary of 262,144 tokens. This is the one file that knows how the two libraries, and
transformers' versions, read a header.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from specdec_engine.errors import ModelUnavailable
from specdec_engine.models.gguf_configs import Keys, made_here
from specdec_engine.models.gguf_parts import check_parts
from specdec_engine.models.kinds import MOST, WIDEST

Count = Callable[[int, int], None]
"""Is told how many tokens of the vocabulary are read, and how many there are."""
_EACH = 20_000
"""Tokens between two such reports: about 20 ms."""


_MOST_NUMBERS = 2_000_000
"""Of an array: each becomes an object of some 300 bytes, as transformers wants them."""
_STRETCHED = ("exaone4", "llama", "qwen2", "qwen3", "smollm3")
"""Architectures whose forward of ours takes a tensor that stretches the rotary embedding."""
_MANY = 1000
"""Layers: what is made of so many costs nothing, and what has more has a tensor for each."""
DAMAGED = "the file is damaged; get it again from where it is from"


def _uncounted(done: int, total: int) -> None:
    """Report nothing."""


class Header(gguf.GGUFReader):
    """gguf's own reader, but for arrays, which are read as a whole.

    Its internals are overridden: where another version of gguf has others, it reads as slowly as before.
    """

    def __init__(self, file: Path, count: Count) -> None:
        """Raises ModelUnavailable for a file that is not little-endian, or whose other parts are not there; for one that is
        damaged ValueError, and whatever else gguf and struct raise."""
        self._count, self._file = count, file
        super().__init__(file)
        self.part_of: list[int] = [0] * len(self.tensors)
        """The file of each tensor, by its number among those that the GGUF is cut into."""
        count_of_parts = _value(self, "split.count", 1)
        for part, other in enumerate(check_parts(file, count_of_parts)[1:] if count_of_parts > 1 else (), 1):
            more = gguf.GGUFReader(other).tensors
            self.tensors += more
            self.part_of += [part] * len(more)

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        """Size in bytes, parts, which parts are the values, and types: an array's values are views of a string's bytes or
        of one number each."""
        if self.byte_order == "S":
            raise ModelUnavailable(
                f"{self._file} is big-endian, which is not read", "use a little-endian file, as most are"
            )
        if raw_type != gguf.GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        kind, length = self._get(orig_offs, "<u4"), self._get(orig_offs + 4, "<u8")
        item, start = gguf.GGUFValueType(int(kind[0])), orig_offs + 12
        if item == gguf.GGUFValueType.STRING:
            key_ends = orig_offs - 4  # before the value's type
            count = self._count if bytes(self.data[key_ends - 7 : key_ends]) == b".tokens" else _uncounted
            end, values = self._strings(start, int(length[0]), count)
        elif item in self.gguf_scalar_to_np:
            end, values = self._numbers(start, int(length[0]), self.gguf_scalar_to_np[item])
        else:  # gguf would read one for as long as its length says, past the end of the file, until memory ends
            raise ValueError(f"a value is an array of {item.name}, which no model has")
        types = [gguf.GGUFValueType.ARRAY, item] if values else [gguf.GGUFValueType.ARRAY]
        return end - orig_offs, [kind, length, *values], list(range(2, 2 + len(values))), types

    def _strings(self, at: int, n: int, count: Count) -> tuple[int, list[Any]]:
        data, strings = self.data.data, list[Any]()
        for i in range(n):
            if i % _EACH == 0:
                count(i, n)
            (size,) = struct.unpack_from("<Q", data, at)
            at += 8 + size
            strings.append(data[at - size : at])
        if at > len(data):
            raise ValueError(f"a string ends at byte {at}, the file at {len(data)}")
        count(n, n)
        return at, strings

    def _numbers(self, at: int, n: int, dtype: Any) -> tuple[int, list[Any]]:
        numbers = self._get(at, dtype, n)
        if n > _MOST_NUMBERS:
            raise ValueError(f"an array has {n} numbers, and no vocabulary has {_MOST_NUMBERS}")
        if len(numbers) < n:
            raise ValueError(f"an array has {len(numbers)} of its {n} numbers")
        view = np.array(numbers).data  # a copy: views of a mapped array take ten times as long to make
        return at + numbers.nbytes, [view[i : i + 1] for i in range(n)]


@contextmanager
def given_to_transformers(header: Header, file: Path) -> Iterator[None]:
    """Until the block ends, what reads this file by gguf.GGUFReader gets what is read already."""
    usual: Any = gguf.GGUFReader

    def reader(path: Any, *more: Any) -> Any:
        return header if Path(path).samefile(file) else usual(path, *more)

    gguf.GGUFReader = reader  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        gguf.GGUFReader = usual  # type: ignore[misc]


def check_header(header: Header, file: Path, read_here: Collection[str]) -> None:
    """Refuse what no reader here would survive, or read rightly, before anything large is made of it. read_here:
    architectures whose tensors are not left to transformers. Raises ModelUnavailable."""
    arch = _value(header, "general.architecture", "")
    if header.part_of and header.part_of[-1] and arch not in read_here:
        raise ModelUnavailable(
            f"{file} is one of several files of a GGUF of the architecture {arch}, which is not read in parts",
            f"join them first: llama-gguf-split --merge {file.name} whole.gguf",
        )
    if not isinstance(arch, str) or not arch:
        raise ModelUnavailable(f"{file} does not say its architecture", "it holds no language model")
    stretching = [t.name for t in header.tensors if str(t.name).startswith("rope_f")]
    read = FACTORS if arch == "phi3" else ("rope_freqs.weight",) if arch in _STRETCHED else ()
    if found := [name for name in stretching if name not in read]:
        raise ModelUnavailable(
            f"{file} stretches its rotary embedding by the tensor {found[0]}, which is not read for {arch}",
            "use the model's safetensors checkpoint, whose config says how",
        )
    for key, most in _MOST.items():
        found = _value(header, f"{arch}.{key}", 0)
        if isinstance(found, int) and found > most:
            raise ModelUnavailable(f"{file} says {arch}.{key} = {found}, which no model has", DAMAGED)
    layers = _value(header, f"{arch}.block_count", 0)
    if not header.tensors:
        raise ModelUnavailable(f"{file} has no tensors", "it holds a vocabulary alone, and no model")
    if not isinstance(layers, int) or layers > max(_MANY, len(header.tensors)):
        raise ModelUnavailable(
            f"{file} says that it has {layers} layers, and has {len(header.tensors)} tensors", DAMAGED
        )


_MOST = {
    **dict.fromkeys(("embedding_length", "feed_forward_length", "attention.key_length"), WIDEST),
    **dict.fromkeys(("attention.head_count", "attention.head_count_kv", "expert_count"), MOST),
}
"""Numbers of a header that transformers would make something of before weights are looked at, and the most that they can
be."""


@dataclass(frozen=True, slots=True)
class Made:
    """What transformers needs beside a GGUF's weights."""

    config: Any
    tokenizer: Any
    taken: frozenset[str]
    """The architecture's keys that were read for it here; empty where transformers made it."""


def config_and_tokenizer(header: Header, file: Path) -> Made:
    """file: that GGUF, alone in its folder. Raises ModelUnavailable for a header that lacks something, and whatever
    transformers raises for what it cannot read."""
    from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

    source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name, "local_files_only": True}
    arch = _value(header, "general.architecture", "")
    names = frozenset(str(tensor.name) for tensor in header.tensors)
    keys = Keys(arch, lambda key, otherwise: _value(header, key, otherwise), names)
    if (config := made_here(keys)) is None:
        return Made(AutoConfig.from_pretrained(**source), AutoTokenizer.from_pretrained(**source), frozenset())
    return Made(config, PreTrainedTokenizerFast.from_pretrained(**source), frozenset(keys.taken))


def add_left_out(header: Header, config: Any) -> None:
    """Give the config of an architecture that is read here what its header says and transformers leaves out: a head's size,
    windows, and a stretched rotation. Gemma 3's layers with a window have one of their own, which is never stretched.

    What is left out after that is refused by `check_computed`.
    """
    arch = _value(header, "general.architecture", "")
    if (size := _value(header, f"{arch}.attention.key_length", None)) is not None:
        config.head_dim = int(size)
    window = _value(header, f"{arch}.attention.sliding_window", 0)
    if arch == "phi3":
        config.sliding_window = window or None
    if arch == "gemma3" and not window:
        config.layer_types = ["full_attention"] * config.num_hidden_layers
    factors = {str(t.name): [float(number) for number in t.data] for t in header.tensors if t.name in FACTORS}
    if len(factors) == len(FACTORS):
        given = dict(zip(("long_factor", "short_factor"), (factors[name] for name in FACTORS), strict=True))
        original = _value(header, f"{arch}.rope.scaling.original_context_length", config.max_position_embeddings)
        config.rope_parameters |= {"rope_type": "longrope", "original_max_position_embeddings": original, **given}
        config.original_max_position_embeddings = original
    scaling = {key: _value(header, f"{arch}.rope.scaling.{key}", None) for key in _SCALING}
    if scaling["type"] not in ("linear", "yarn") or scaling["factor"] is None or config.rope_parameters is None:
        return
    wanted = _SCALING if scaling["type"] == "yarn" else ("type", "factor")
    given = {_SCALING[key]: scaling[key] for key in wanted if scaling[key] is not None}
    if scaling["type"] == "yarn":
        given.setdefault("original_max_position_embeddings", config.max_position_embeddings)
    _stretched(config).update(given)


FACTORS = ("rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors of Phi-3's rotation (LongRoPE), which belong into the config."""
_SCALING = {
    "type": "rope_type",
    "factor": "factor",
    "original_context_length": "original_max_position_embeddings",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}
"""Keys of a header, after rope.scaling., and the names that transformers has for them."""


def _stretched(config: Any) -> dict[str, Any]:
    """The rotation that a header's scaling means: of layers without a window, where kinds of layers have their own."""
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    return rope.get("full_attention") or rope


def check_computed(header: Header, file: Path, config: Any, read: Collection[str]) -> None:
    """Look whether what the header says of this architecture is in the config: transformers leaves out what it does not know,
    and would compute another function. read: keys that we have put there ourselves. Raises ModelUnavailable with the first
    key that is not."""
    from transformers.modeling_gguf_pytorch_utils import GGUF_TO_TRANSFORMERS_MAPPING

    arch = _value(header, "general.architecture", "")
    mapped = GGUF_TO_TRANSFORMERS_MAPPING["config"]
    names = {arch, arch.replace("-", "_"), config.model_type, arch.replace("moe", "_moe")}
    taken = {key for name in names for key, to in mapped.get(name, {}).items() if to is not None and to != -1}
    taken |= set(read)
    for field in header.fields.values():
        prefix, _, key = field.name.partition(".")
        if prefix != arch or (key in taken and key != "rope.dimension_count") or key in _SAYS_NOTHING:
            continue
        value = _value(header, field.name, None)
        if not _agrees(key, value, config) and not (_is_neutral(key, value) and not _named(key, config)):
            raise ModelUnavailable(
                f"{file} says {field.name} = {value}, which is not read from GGUF files",
                "use the model's safetensors checkpoint, whose config says how",
            )


_SAYS_NOTHING = frozenset(
    {"tensor_data_layout", "vocab_size", "context_length", "rope.scaling.original_context_length"}
)
_MEANS = {
    "attention.key_length": ("head_dim",),
    "attention.value_length": ("v_head_dim", "head_dim"),
    "attention.sliding_window": ("sliding_window",),
    "attention.layer_norm_epsilon": ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "norm_eps"),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "logit_scale": ("logit_scale",),
    "use_parallel_residual": ("use_parallel_residual",),
    "feed_forward_length": ("intermediate_size", "n_inner"),
    "expert_feed_forward_length": ("moe_intermediate_size", "intermediate_size"),
    "expert_weights_norm": ("norm_topk_prob",),
    "expert_weights_scale": ("routed_scaling_factor",),
}
"""Keys that transformers may leave to the class, and the config's names for them."""


def _agrees(key: str, value: Any, config: Any) -> bool:
    """Say whether the config has the same by itself."""
    text = config.get_text_config()
    head = getattr(text, "head_dim", None) or int(text.hidden_size) // int(text.num_attention_heads)
    if key == "rope.dimension_count":
        rope = getattr(text, "rope_parameters", None) or {}
        share = rope.get("partial_rotary_factor") or getattr(text, "partial_rotary_factor", None) or 1.0
        return bool(value == int(head * share))
    if key in ("attention.key_length", "attention.value_length") and value == head:
        return True
    if key == "attention.sliding_window" and not isinstance(value, list):
        limit = getattr(text, "max_position_embeddings", None)
        if limit is not None and value >= limit:
            return True
    if (part := key.removeprefix("rope.scaling.")) in _SCALING:
        found = _stretched(text).get(_SCALING[part])
        return bool(value == found or _close(value, found))
    if key in ("rope.freq_base", "rope.freq_base_swa"):
        thetas = _thetas(text, local=key.endswith("swa"))  # none for a model that does not rotate
        return not thetas or any(_close(value, theta) for theta in thetas)
    if key == "attention.sliding_window_pattern":
        kinds = [kind == "sliding_attention" for kind in getattr(text, "layer_types", None) or ()]
        every = value if isinstance(value, list) else [bool((i + 1) % value) for i in range(len(kinds))]
        return kinds == list(map(bool, every))
    if key == "attention.head_count_kv" and value == text.num_attention_heads:
        return True
    found = _named(key, config)
    if key.endswith("epsilon") and not found:  # of the other kind of norm than the model's
        return True
    return any(_close(value, other) for other in found)


def _named(key: str, config: Any) -> list[Any]:
    """The config's own values for it, of those that it has."""
    text = config.get_text_config()
    return [other for name in _MEANS.get(key, ()) if (other := getattr(text, name, None)) is not None]


def _thetas(text: Any, local: bool) -> list[float]:
    """The rotary bases of a config, which has one or one for each kind of layer; local: of layers with a window, if they have
    their own."""
    rope = getattr(text, "rope_parameters", None) or {}
    windowed = rope.get("sliding_attention")
    if local and isinstance(windowed, dict):
        return [windowed["rope_theta"]]
    parts = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    named = [part.get("rope_theta") for part in parts]
    named += [getattr(text, name, None) for name in ("rope_theta", "rope_local_base_freq")]
    return [theta for theta in named if theta is not None]


def _close(a: Any, b: Any) -> bool:
    return isinstance(a, int | float) and isinstance(b, int | float) and abs(a - b) <= 1e-6 * max(abs(a), abs(b))


def _is_neutral(key: str, value: Any) -> bool:
    """Say whether a value changes nothing: none at all, no scaling, a causal model that is called one."""
    if key == "attention.causal":
        return bool(value)
    if key.endswith(("scale", "factor")) and value == 1.0:
        return True
    return (not value and not key.endswith("yarn_ext_factor")) or value == "none"


def _value(header: Header, key: str, otherwise: Any) -> Any:
    """A field's value as a Python object."""
    field = header.fields.get(key)
    found = otherwise if field is None else field.contents()
    return found.item() if isinstance(found, np.generic) else found


def end_ids(header: Header) -> list[int]:
    """The tokens that end a text, a turn or a message, by the header: one model has several."""
    keys = (f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
    return [found for key in keys if isinstance(found := _value(header, key, None), int)]
