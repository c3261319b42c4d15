"""The dense decoder families (`shape.FAMILY`) on lean blocks."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from specdec_engine.runtime.blocks import Blocks, TreeRows
from specdec_engine.runtime.cpu import whole
from specdec_engine.runtime.experts import Experts
from specdec_engine.runtime.linear import NativeDense, NativePacked, Packing, Projection, Rows, head_packing, project
from specdec_engine.runtime.native import Kernels, Stack
from specdec_engine.runtime.native_records import Following, Matrix, Tapped
from specdec_engine.runtime.ops import Layer, Network, Ops, Pass, PassOfPrompts, PassTogether, clamped_gate
from specdec_engine.runtime.shape import Shape, Unsupported
from specdec_engine.runtime.unfused import Unfused
from specdec_engine.runtime.weights import Grouped, Weights


@dataclass(frozen=True, slots=True)
class Taps:
    """Where a pass leaves what a draft head reads: the target's features."""

    layers: tuple[int, ...]
    """Whose output is kept, and besides it the normed output of the last."""
    kept: Tensor
    """[capacity, taps + 1, hidden], by position."""

    def told(self, features: Tensor) -> Tapped:
        """The place [n, taps + 1, hidden] for a pass's, with the layers as they follow."""
        return Tapped(tuple(sorted(self.layers)), features)


@dataclass(frozen=True, slots=True)
class OneOfSeveral:
    """Tokens that follow one text, in that text's own cache; see `Decoder.__call__`."""

    tokens: Tensor
    positions: Tensor
    cache: Tensor
    span: int
    start: int
    taps: Taps | None
    tree: TreeRows | None = None


class Decoder(Blocks):
    """A whole model: embedding, blocks, head."""

    def __init__(
        self,
        shape: Shape,
        weights: Weights,
        dtype: torch.dtype,
        device: torch.device,
        quantize: Packing,
        ops: Ops | None = None,
        kernels: Kernels | None = None,
    ) -> None:
        """ops: see `Blocks`; kernels: see `project`.

        Raises Unsupported if the checkpoint has tensors that this forward does not know, or lacks one.
        """
        check_tensors(weights, shape)
        queries, keys = (count * shape.head_size for count in (shape.heads, shape.kv_heads))
        take = _Taker(Unfused(weights, queries, keys) if shape.fused else weights)
        if (factors := take.optional("rope_freqs.weight")) is not None:  # how GGUF keeps Llama 3's stretched rotation
            stretched = [replace(r, frequencies=r.frequencies / factors) for r in shape.rotations]
            shape = replace(shape, rotations=tuple(stretched))
        super().__init__(shape, dtype, device, ops, kernels)
        table = _table(take.stored("model.embed_tokens.weight"), dtype, device)
        self.layers = [self._layer(take, i, (dtype, device, quantize, kernels)) for i in range(shape.layers)]
        self.norm = self.norm_weight(take.dense("model.norm.weight"))
        tied = shape.tied and _same_head(weights)
        matrix = table if tied else take.stored("lm_head.weight")
        self.head = project([matrix], None, dtype, device, head_packing(quantize, kernels), kernels)
        self.embedding = Embedding(self.head if tied and isinstance(self.head, Rows) else table)
        # Kept only where neither head nor embedding hands out rows: an 8B model's takes 0.5 GB.
        self._matrix = None if tied or isinstance(self.head, Rows) else matrix
        self.vocab = int(matrix.q.shape[0] if isinstance(matrix, Grouped) else matrix.shape[0])
        self.parameters = take.parameters

    def output_rows(self, ids: Tensor) -> Tensor:
        """[n] ids -> [n, hidden] float32: what logits of these tokens are made with."""
        if isinstance(self.head, Rows):
            return self.head.dense_rows(ids)
        if self._matrix is None:
            return self.embedding(ids)
        if isinstance(self._matrix, Grouped):
            return self._matrix.rows(ids.to(self._matrix.q.device)).dense().to(self.device).float()
        return self._matrix[ids.to(self._matrix.device)].to(self.device).float()

    def first(self, layers: int) -> Decoder:
        """The same model without its later blocks; shares all weights."""
        cut = copy.copy(self)
        shape = self.shape
        cut.shape = replace(
            shape, layers=layers, windows=shape.windows[:layers], rotation_of_layer=shape.rotation_of_layer[:layers]
        )
        cut.layers = self.layers[:layers]
        return cut

    @torch.inference_mode()
    def __call__(
        self,
        tokens: Tensor,
        positions: Tensor,
        cache: Tensor,
        span: int,
        rows: int,
        taps: Taps | None = None,
        start: int | None = None,
    ) -> Tensor:
        """[n] tokens at [n] positions -> [rows, V] logits of the last `rows`.

        Writes their keys and values into `cache`, and looks at its first `span` positions, which must take in all of
        `positions`. start: see `Blocks.begin`.
        """
        reading = rows == 1 < len(tokens)
        stack = None if start is None else self._stack_for(len(tokens), start, reading)
        if stack is not None and start is not None and (matrices := self.head.matrices):
            return self._by_own_kernels(stack, matrices, tokens, start, cache, rows, taps, reading)
        step = self.begin(positions, cache, span, start, None, reading)
        features = None
        if taps is not None:
            features = self._features(taps, len(tokens)) if start is None else taps.kept[start : start + len(tokens)]
        logits = self._through(step, tokens, taps, features, rows)
        if taps is not None and features is not None and start is None:
            taps.kept.index_copy_(0, positions, features)
        return logits

    @torch.inference_mode()
    def together(self, sequences: Sequence[OneOfSeveral]) -> list[Tensor]:
        """Several sequences in one pass -> [n, V] logits of each, of all its tokens. They read the same layers for a head, or
        none does."""
        lengths = [len(s.tokens) for s in sequences]
        return list(torch.split(self._read(sequences, PassTogether, sum(lengths)), lengths))

    @torch.inference_mode()
    def read_together(self, sequences: Sequence[OneOfSeveral]) -> None:
        """As `together`, of prompts: without logits, and with each one's own bits."""
        self._read(sequences, PassOfPrompts, 0)

    def _read(self, sequences: Sequence[OneOfSeveral], kind: type[PassTogether], rows: int) -> Tensor:
        """[rows, V] logits of the last rows of all."""
        reading, lengths = kind is PassOfPrompts, [len(s.tokens) for s in sequences]
        turns = self.rotations(torch.cat([s.positions for s in sequences]), max(s.span for s in sequences))
        own_turns = zip(*(torch.split(turn, lengths) for turn in turns), strict=True)
        parts = [
            self.begin(s.positions, s.cache, s.span, s.start, s.tree, reading, own)
            for s, own in zip(sequences, own_turns, strict=True)
        ]
        taps = sequences[0].taps
        features = None if taps is None else self._features(taps, sum(lengths))
        logits = self._through(kind(parts), torch.cat([s.tokens for s in sequences]), taps, features, rows)
        if features is not None:
            for s, own in zip(sequences, torch.split(features, lengths), strict=True):
                assert s.taps is not None
                s.taps.kept[s.start : s.start + len(own)] = own
        return logits

    def _by_own_kernels(
        self,
        stack: Stack,
        matrices: Sequence[Matrix],
        tokens: Tensor,
        start: int,
        cache: Tensor,
        rows: int,
        taps: Taps | None,
        reading: bool,
    ) -> Tensor:
        """A pass in one call; matrices: the head's."""
        n = len(tokens)
        after = Following(n, self.norm, matrices, min(rows, n))
        tapped = None if taps is None else taps.told(taps.kept[start : start + n])
        self.in_one_call(stack, self._embedded(tokens), start, cache, after, None, tapped, reading)
        return self.shape.scales.of_logits(after.out)

    def _through(self, step: Pass, tokens: Tensor, taps: Taps | None, features: Tensor | None, rows: int) -> Tensor:
        """[rows, V] logits of the last rows; features [n, taps + 1, hidden]: the place for what a head reads."""
        step.x.copy_(self._embedded(tokens))
        tapped = None if taps is None or features is None else taps.told(features)
        _, out = step.finish(self.layers, self.norm, self.head if rows else None, rows, tapped)
        return self.shape.scales.of_logits(out) if rows else out[:0]

    def _embedded(self, tokens: Tensor) -> Tensor:
        embedded, scale = self.embedding(tokens), self.shape.scales.embedding
        return embedded if scale == 1.0 else embedded * scale

    def _features(self, taps: Taps, rows: int) -> Tensor:
        return torch.empty(rows, len(taps.layers) + 1, self.shape.hidden, dtype=self.dtype, device=self.device)

    def _layer(self, take: _Taker, i: int, to: _To) -> Layer:
        shape, at = self.shape, f"model.layers.{i}"
        attention = f"{at}.self_attn"
        size, rotary = shape.head_size, shape.rotary
        orders, of_one_head = {}, None
        if not shape.paired:
            orders = {"q_proj": paired(shape.heads, size, rotary), "k_proj": paired(shape.kv_heads, size, rotary)}
            of_one_head = paired(1, size, rotary)
        normed = orders if shape.wide_norms else {}

        def norm(name: str | None) -> Tensor | None:
            return None if name is None else self.norm_weight(take.dense(f"{at}.{name}.weight"))

        layer = Layer(
            attention_norm=norm(shape.norms.attention),
            qkv=take.projection(attention, ("q_proj", "k_proj", "v_proj"), to, orders),
            q_norm=self._head_norm(take, f"{attention}.q_norm.weight", normed.get("q_proj", of_one_head)),
            k_norm=self._head_norm(take, f"{attention}.k_norm.weight", normed.get("k_proj", of_one_head)),
            out=take.projection(attention, ("o_proj",), to),
            mlp_norm=norm(shape.norms.mlp),
            network=self._network(take, i, to),
            window=shape.windows[i],
            rotation=shape.rotation_of_layer[i] if shape.rotation_of_layer else 0,
            attention_after=norm(shape.norms.attention_after),
            mlp_after=norm(shape.norms.mlp_after),
            sinks=take.optional(f"{attention}.sinks", device=self.device),
        )
        return whole(layer, shape)

    def _network(self, take: _Taker, i: int, to: _To) -> Network | Experts:
        at, mixture = f"model.layers.{i}", self.shape.mixture
        if mixture is None or i not in mixture.layers:
            return Network(
                take.projection(f"{at}.mlp", ("gate_proj", "up_proj"), to),
                take.projection(f"{at}.mlp", ("down_proj",), to),
            )
        dtype, device, _, kernels = to
        gate, up, down = mixture.parts
        stems = [f"{at}.{mixture.expert.format(number)}" for number in range(mixture.count)]
        router, bias = f"{at}.{mixture.router}", take.bias(f"{at}.{mixture.router}")
        return Experts(
            router=project([take.dense(f"{router}.weight")], bias, dtype, device, "none", kernels),
            gate_ups=[take.projection(stem, (gate, up), to) for stem in stems],
            downs=[take.projection(stem, (down,), to) for stem in stems],
            taken=mixture.taken,
            renormed=mixture.renormed,
            gate=None if mixture.gate is None else partial(clamped_gate, mixture.gate),
        )

    def _head_norm(self, take: _Taker, name: str, order: Tensor | None) -> Tensor | None:
        """The norm of each query's head, or of each key's, if there is one."""
        found = take.optional(name, order)
        return None if found is None else self.norm_weight(found)


class Embedding:
    """Rows of the table on demand, [n] -> [n, hidden] float32.

    A tied head is the same memory where the device allows it: on a GPU the table is in the activations' dtype, and kernels of
    our own hand out the rows that they multiply.
    """

    def __init__(self, table: Tensor | Rows) -> None:
        self.table = table

    @property
    def matrix(self) -> Matrix | None:
        """The table for kernels of our own; None where they cannot read it."""
        if isinstance(self.table, Tensor):
            bits = {torch.bfloat16: 16, torch.float32: 32}.get(self.table.dtype)
            whole = self.table.device.type == "cpu" and self.table.is_contiguous()
            return Matrix(bits, 0, 0, *self.table.shape, self.table.data_ptr(), None, None) if bits and whole else None
        return self.table.matrices[0] if isinstance(self.table, NativePacked | NativeDense) else None

    def __call__(self, tokens: Tensor) -> Tensor:
        return self.table[tokens].float() if isinstance(self.table, Tensor) else self.table.dense_rows(tokens)


def _table(stored: Tensor | Grouped, dtype: torch.dtype, device: torch.device) -> Tensor | Grouped:
    """On a CPU as it is stored, packed or in a dtype of its own."""
    if device.type == "cpu":
        return stored
    return (stored.dense() if isinstance(stored, Grouped) else stored).to(device, dtype)


def paired(heads: int, size: int, rotary: int = 0) -> Tensor:
    """Row order that brings the halves of what is rotated of each head together in pairs, which is what a complex
    multiplication rotates; rotary: how many rows of a head are, 0 for all.

    Scores are sums over a head's entries, so the same order for queries and keys changes nothing.
    """
    rotary = rotary or size
    one = torch.cat([torch.arange(rotary).view(2, rotary // 2).T.flatten(), torch.arange(rotary, size)])
    return (torch.arange(heads)[:, None] * size + one).flatten()


_To = tuple[torch.dtype, torch.device, Packing, Kernels | None]
"""What `project` is told of every matrix."""


class _Taker:
    """Hands out a checkpoint's tensors, and counts their numbers, each tensor once."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._left = set(weights.names)
        self.parameters = 0

    def stored(self, name: str) -> Tensor | Grouped:
        found: Tensor | Grouped = self._found(name, self._weights.stored)
        self.parameters += found.q.numel() if isinstance(found, Grouped) else found.numel()
        return found

    def dense(self, name: str) -> Tensor:
        fresh = name in self._left
        found: Tensor = self._found(name, self._weights.dense)
        self.parameters += found.numel() if fresh else 0
        return found

    def _found(self, name: str, read: Callable[[str], Any]) -> Any:
        self._left.discard(name)
        return read(name)

    def optional(self, name: str, order: Tensor | None = None, device: torch.device | None = None) -> Tensor | None:
        if name not in self._weights.names:
            return None
        found = self.dense(name).float()
        return (found if order is None else found[order]).to(device)

    def bias(self, stem: str) -> Tensor | None:
        return self.dense(f"{stem}.bias") if f"{stem}.bias" in self._weights.names else None

    def projection(
        self,
        stem: str,
        parts: Sequence[str],
        to: _To,
        orders: dict[str, Tensor] | None = None,
    ) -> Projection:
        """The named matrices, stacked; rows in the order given for a part."""
        dtype, device, quantize, kernels = to
        matrices, biases = [], []
        for part in parts:
            matrix, bias = self.stored(f"{stem}.{part}.weight"), self.bias(f"{stem}.{part}")
            order = (orders or {}).get(part)
            if order is not None:
                matrix = matrix.rows(order) if isinstance(matrix, Grouped) else matrix[order]
                bias = None if bias is None else bias[order]
            matrices.append(matrix)
            biases.append(bias)
        known = [bias for bias in biases if bias is not None]
        return project(matrices, torch.cat(known) if known else None, dtype, device, quantize, kernels)


def check_tensors(weights: Weights, shape: Shape) -> None:
    """Look whether a checkpoint has the tensors of this shape, without reading them. Raises Unsupported if it lacks one, if
    one has another size, or if one would have to be left out."""
    names, wanted = weights.names, dict(shape.tensors)
    if not shape.tied:
        wanted["lm_head.weight"] = wanted["model.embed_tokens.weight"]
    if missing := sorted(wanted.keys() - names):
        raise Unsupported(f"its checkpoint has no {missing[0]}")
    for name, size in wanted.items():
        if weights.size(name) != size:
            raise Unsupported(f"its {name} has the size {weights.size(name)}, and its config asks for {size}")
    ignored = {"lm_head.weight", "rope_freqs.weight"}
    left = sorted(n for n in names - wanted.keys() - ignored if not _PASSED_OVER.search(n))
    if left:
        raise Unsupported(f"its checkpoint has {len(left)} tensors this forward does not know, the first {left[0]}")


_PASSED_OVER = re.compile(r"rotary_emb\.inv_freq$|^model\.mtp_layers\.")
"""Tensors that a forward does without: a table, and the module that MiMo's `mtp` drafts with."""


def _same_head(weights: Weights) -> bool:
    """Whether a model that calls its head tied has no other one; transformers then takes the other."""
    if "lm_head.weight" not in weights.names:
        return True
    return torch.equal(weights.dense("lm_head.weight"), weights.dense("model.embed_tokens.weight"))
