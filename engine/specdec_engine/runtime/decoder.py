"""The dense decoder family (Llama, SmolLM, Mistral, Qwen2, Qwen3) as one lean forward.

What transformers computes, in fewer and larger steps: query, key and value are one projection, so are gate and up; keys and
values lie in one preallocated tensor; the rotation is one complex multiplication; nothing is decided per step that could be
decided once. Positions are a tensor, never a Python number, so that the same code can be recorded as a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad, rms_norm, scaled_dot_product_attention, silu

from specdec_engine.runtime.linear import Projection, Quantize, project
from specdec_engine.runtime.shape import Shape, Unsupported
from specdec_engine.weights import Grouped, Weights


@dataclass(frozen=True, slots=True)
class Layer:
    """One block; the norms' weights carry the factor √size, see `Decoder._normed`."""

    attention_norm: Tensor
    qkv: Projection
    q_norm: Tensor | None
    k_norm: Tensor | None
    out: Projection
    mlp_norm: Tensor
    gate_up: Projection
    down: Projection
    window: int | None


@dataclass(frozen=True, slots=True)
class Step:
    """What a pass computes once for all its layers: tensors that the layers fill one after another, and every view of them.

    A view costs 1 to 2 µs, and a layer would make some twenty.
    """

    positions: Tensor
    """[n] int64"""
    x_and_eps: Tensor
    """[n, hidden + 1] float32: the residual stream, and √(d·eps) for the norms."""
    x: Tensor
    """[n, hidden] of it."""
    size: Tensor
    scaled: Tensor
    normed: Tensor
    """Where a norm works: [n, 1], [n, hidden], and [n, hidden] in the activations' dtype."""
    heads: Tensor
    """[n, heads + 2 · kv_heads, head_size]: a layer's queries, keys and values."""
    pairs: Tensor
    """The same as complex numbers, [n, heads + 2 · kv_heads, head_size / 2]."""
    rotation: Tensor
    """What they are multiplied by; 1 for the values, which are not rotated. Scales the queries by 1 / √head_size, too."""
    fresh: Tensor
    """The keys and values among `heads`, as the cache wants them: [2 · kv_heads, n, head_size]."""
    asked: Tensor
    """The queries among `heads`: [groups, heads a group, n, head_size]."""
    queries: Tensor
    """[groups, rows, head_size]; rows beyond the real ones stay 0."""
    places: Tensor
    """The real rows of `queries`, shaped as `asked`."""
    masks: dict[int | None, Tensor]
    """By window: [rows, span], 0 or -inf."""
    kept: Sequence[Tensor]
    """Per layer: [2 · kv_heads, capacity, head_size], to write into."""
    keys: Sequence[Tensor]
    """Per layer: [kv_heads, span, head_size]."""
    values: Sequence[Tensor]
    scores: Tensor | None
    """[groups, rows, span], where attention is done in three steps; None where torch's fused attention is used."""
    seen: Tensor
    """[groups, rows, head_size]: what attention gave."""
    answers: Tensor
    """The real rows of `seen`, as [n, groups, heads a group, head_size]."""
    mixed: Tensor
    """Shaped as `answers`, in the activations' dtype."""


def cache_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What keys and values are kept in: on a CPU float32, where attention takes half the time it takes in bfloat16."""
    return torch.float32 if device.type == "cpu" else dtype


class Decoder:
    """The weights, and the forward over a cache that the caller owns."""

    def __init__(
        self, shape: Shape, weights: Weights, dtype: torch.dtype, device: torch.device, quantize: Quantize
    ) -> None:
        """Raises Unsupported if the checkpoint has tensors that this forward does not know, or lacks one."""
        _check_names(weights.names, shape)
        take = _Taker(weights)
        to = (dtype, device, quantize)
        self.shape, self.dtype, self.device = shape, dtype, device
        self.embedding = _Embedding(take.stored("model.embed_tokens.weight"), device, dtype)
        self.layers = [self._layer(take, i, to) for i in range(shape.layers)]
        self.norm = self._norm_weight(take, "model.norm.weight")
        tied = shape.tied and _same_head(weights)
        # The head stays dense, also where its file has it in 8 bits: reordered bfloat16 takes 2.0 ms for one row as for
        # eight, packed 1.8 for one and 7 for eight (49,152 x 576); and all logits pass through its rounding.
        matrix = self.embedding.table if tied else take.dense("lm_head.weight")
        matrix = take.dense("model.embed_tokens.weight") if matrix is None else matrix
        self.head = project([matrix], None, dtype, device, "none")
        self.vocab = int(matrix.shape[0])
        self.parameters = take.parameters
        frequencies = shape.frequencies
        if (factors := take.optional("rope_freqs.weight")) is not None:  # how GGUF keeps Llama 3's stretched rotation
            frequencies = frequencies / factors
        self._frequencies = frequencies.to(device)
        self._padding = 4 if device.type == "cpu" else 1

    @property
    def forms(self) -> str:
        """How the layers' weights are kept: int4, int8, or a dtype."""
        return "+".join(
            sorted({p.form for layer in self.layers for p in (layer.qkv, layer.out, layer.gate_up, layer.down)})
        )

    def _layer(self, take: _Taker, i: int, to: tuple[torch.dtype, torch.device, Quantize]) -> Layer:
        shape, at = self.shape, f"model.layers.{i}"
        attention, mlp = f"{at}.self_attn", f"{at}.mlp"
        paired = {"q_proj": _paired(shape.heads, shape.head_size), "k_proj": _paired(shape.kv_heads, shape.head_size)}
        one = _paired(1, shape.head_size)
        return Layer(
            attention_norm=self._norm_weight(take, f"{at}.input_layernorm.weight"),
            qkv=take.projection(attention, ("q_proj", "k_proj", "v_proj"), to, paired),
            q_norm=take.optional(f"{attention}.q_norm.weight", one, self.device),
            k_norm=take.optional(f"{attention}.k_norm.weight", one, self.device),
            out=take.projection(attention, ("o_proj",), to),
            mlp_norm=self._norm_weight(take, f"{at}.post_attention_layernorm.weight"),
            gate_up=take.projection(mlp, ("gate_proj", "up_proj"), to),
            down=take.projection(mlp, ("down_proj",), to),
            window=shape.windows[i],
        )

    def _norm_weight(self, take: _Taker, name: str) -> Tensor:
        weight: Tensor = take.dense(name).to(self.device).float()
        return weight * float(self.shape.hidden**0.5)

    @property
    def kv_values(self) -> int:
        """Numbers cached a token, keys and values, all layers."""
        return self.shape.kv_values

    @property
    def cache_dtype(self) -> torch.dtype:
        return cache_dtype(self.dtype, self.device)

    def new_cache(self, capacity: int) -> Tensor:
        """[layers, 2 · kv_heads, capacity, head_size]: each layer's keys, then its values; zeros, so that no masked row is
        NaN.

        On a CPU in float32, where attention takes half the time it takes in bfloat16, and in pages that cost nothing until
        they are written.
        """
        s = self.shape
        size = (s.layers, 2 * s.kv_heads, capacity, s.head_size)
        if self.device.type == "cpu":  # numpy's zeros are the system's; torch's would be written
            return torch.from_numpy(np.zeros(size, np.float32))
        return torch.zeros(size, dtype=self.cache_dtype, device=self.device)

    @torch.inference_mode()
    def __call__(self, tokens: Tensor, positions: Tensor, cache: Tensor, span: int, rows: int) -> Tensor:
        """[n] tokens at [n] positions -> [rows, V] logits of the last `rows`.

        Writes their keys and values into `cache`, and looks at its first `span` positions, which must take in all of
        `positions`.
        """
        step = self._step(positions, cache, span)
        step.x.copy_(self.embedding(tokens))
        for i, layer in enumerate(self.layers):
            step.x.add_(layer.out(self._attention(i, layer, self._normed(step, layer.attention_norm), step)))
            gate_up = layer.gate_up(self._normed(step, layer.mlp_norm))
            half = gate_up.shape[1] // 2
            step.x.add_(layer.down(silu(gate_up[:, :half]).mul_(gate_up[:, half:])))
        logits: Tensor = self.head(self._normed(step, self.norm)[-rows:])
        return logits

    def _step(self, positions: Tensor, cache: Tensor, span: int) -> Step:
        s, n, kept = self.shape, positions.shape[0], cache.dtype
        heads = torch.empty(n, s.heads + 2 * s.kv_heads, s.head_size, device=self.device)
        # A group's query heads go as further rows of one head, whose keys are read once; many rows would need too large a
        # mask.
        grouped = n <= _GROUPED_ROWS
        groups = s.kv_heads if grouped else s.heads
        together = s.heads // groups
        rows = n * together
        # To a multiple of 4 rows: then a row has the same bits alone and among others (117 of 130 cases, against 29 without).
        surplus = -rows % self._padding
        queries = torch.zeros(groups, rows + surplus, s.head_size, dtype=kept, device=self.device)
        seen = torch.empty_like(queries)
        keys = cache[:, : s.kv_heads, :span]
        # Fused attention takes 39 µs here for one row and 112 positions, three steps into ready buffers 28.
        in_steps = grouped and self.device.type == "cpu"
        x_and_eps = torch.full((n, s.hidden + 1), (s.eps * s.hidden) ** 0.5, device=self.device)
        return Step(
            positions=positions,
            x_and_eps=x_and_eps,
            x=x_and_eps[:, :-1],
            size=torch.empty(n, 1, device=self.device),
            scaled=torch.empty(n, s.hidden, device=self.device),
            normed=torch.empty(n, s.hidden, dtype=self.dtype, device=self.device),
            heads=heads.view(n, -1),
            pairs=torch.view_as_complex(heads.view(n, -1, s.head_size // 2, 2)),
            rotation=self.rotation(positions),
            fresh=heads[:, s.heads :].transpose(0, 1),
            asked=heads[:, : s.heads].view(n, groups, together, -1).permute(1, 2, 0, 3),
            queries=queries,
            places=queries[:, :rows].view(groups, together, n, -1),
            masks={window: self._mask(positions, span, window, together, surplus, kept) for window in set(s.windows)},
            kept=cache.unbind(0),
            keys=(keys.transpose(-1, -2) if in_steps else keys).unbind(0),
            values=cache[:, s.kv_heads :, :span].unbind(0),
            scores=torch.empty(groups, rows + surplus, span, dtype=kept, device=self.device) if in_steps else None,
            seen=seen,
            answers=seen[:, :rows].view(groups, together, n, -1).permute(2, 0, 1, 3),
            mixed=torch.empty(n, groups, together, s.head_size, dtype=self.dtype, device=self.device),
        )

    def rotation(self, positions: Tensor) -> Tensor:
        """[n] -> [n, heads + 2 · kv_heads, head_size / 2] complex: see `Step.rotation`."""
        s, n = self.shape, positions.shape[0]
        angles = positions[:, None] * self._frequencies
        turned = torch.polar(torch.full_like(angles, s.rope_scale), angles)[:, None]
        queries = (turned * s.head_size**-0.5).expand(n, s.heads, -1)
        return torch.cat(
            [queries, turned.expand(n, s.kv_heads, -1), torch.ones_like(turned).expand(n, s.kv_heads, -1)], 1
        )

    def _mask(
        self, positions: Tensor, span: int, window: int | None, together: int, surplus: int, dtype: torch.dtype
    ) -> Tensor:
        columns = torch.arange(span, device=self.device)
        seen = columns <= positions[:, None]
        if window is not None:
            seen &= columns > positions[:, None] - window
        mask = torch.zeros(seen.shape, dtype=dtype, device=self.device).masked_fill_(~seen, float("-inf"))
        return pad(mask.repeat(together, 1), (0, 0, 0, surplus))

    def _attention(self, i: int, layer: Layer, h: Tensor, step: Step) -> Tensor:
        step.heads.copy_(layer.qkv(h))
        if layer.q_norm is not None and layer.k_norm is not None:
            self._norm_heads(step, layer.q_norm, layer.k_norm)
        step.pairs.mul_(step.rotation)
        step.kept[i].index_copy_(1, step.positions, step.fresh.to(step.seen.dtype))
        step.places.copy_(step.asked)
        if step.scores is not None:
            torch.baddbmm(step.masks[layer.window], step.queries, step.keys[i], out=step.scores)
            torch.softmax(step.scores, -1, out=step.scores)
            torch.bmm(step.scores, step.values[i], out=step.seen)
        else:
            step.seen.copy_(self._fused_attention(i, layer, step))
        step.mixed.copy_(step.answers)
        return step.mixed.view(h.shape[0], -1)

    def _fused_attention(self, i: int, layer: Layer, step: Step) -> Tensor:
        attended: Tensor = scaled_dot_product_attention(
            step.queries[None],
            step.keys[i][None],
            step.values[i][None],
            step.masks[layer.window],
            scale=1.0,
            enable_gqa=step.queries.shape[0] != self.shape.kv_heads,
        )
        return attended[0]

    def _norm_heads(self, step: Step, q_norm: Tensor, k_norm: Tensor) -> None:
        """Qwen3 norms each query's and each key's head."""
        s = self.shape
        heads = step.heads.view(-1, s.heads + 2 * s.kv_heads, s.head_size)
        for part, weight in ((heads[:, : s.heads], q_norm), (heads[:, s.heads : s.heads + s.kv_heads], k_norm)):
            part.copy_(rms_norm(part, (s.head_size,), weight, s.eps))

    def _normed(self, step: Step, weight: Tensor) -> Tensor:
        """RMSNorm of x, as x · w√d / √(Σx² + d·eps); `weight` holds w√d, and the sum's last term is a column of its own.

        Four operations into ready buffers take 5 µs, torch's rms_norm 23; a pass of 30 layers has 61 of them.
        """
        torch.linalg.vector_norm(step.x_and_eps, dim=-1, keepdim=True, out=step.size)
        torch.mul(step.x, weight, out=step.scaled)
        step.normed.copy_(step.scaled.div_(step.size))
        return step.normed


_GROUPED_ROWS = 32
"""Rows of a pass up to which query heads are grouped."""


class _Embedding:
    """Rows of the table on demand; on a CPU a packed table stays packed."""

    def __init__(self, stored: Tensor | Grouped, device: torch.device, dtype: torch.dtype) -> None:
        self._packed = stored if isinstance(stored, Grouped) and device.type == "cpu" else None
        self.table = None if self._packed is not None else _dense(stored, dtype).to(device)
        """[V, hidden], where it is dense: a tied head can share it."""

    def __call__(self, tokens: Tensor) -> Tensor:  # [n] -> [n, hidden] float32
        if self._packed is not None:
            return self._packed.rows(tokens).dense()
        assert self.table is not None
        return self.table[tokens].float()


def _dense(stored: Tensor | Grouped, dtype: torch.dtype) -> Tensor:
    return stored.dense().to(dtype) if isinstance(stored, Grouped) else stored


def _paired(heads: int, size: int) -> Tensor:
    """Row order that brings each head's halves together in pairs, which is what a complex multiplication rotates.

    Scores are sums over a head's entries, so the same order for queries and keys changes nothing.
    """
    return torch.arange(heads * size).view(heads, 2, size // 2).transpose(1, 2).flatten()


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
        to: tuple[torch.dtype, torch.device, Quantize],
        orders: dict[str, Tensor] | None = None,
    ) -> Projection:
        """The named matrices, stacked; rows in the order given for a part."""
        dtype, device, quantize = to
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
        return project(matrices, torch.cat(known) if known else None, dtype, device, quantize)


def _check_names(names: frozenset[str], shape: Shape) -> None:
    """Raises Unsupported for a checkpoint that lacks a tensor, or has one that would have to be left out."""
    wanted = shape.tensors if shape.tied else shape.tensors | {"lm_head.weight"}
    if missing := sorted(wanted - names):
        raise Unsupported(f"its checkpoint has no {missing[0]}")
    ignored = {"lm_head.weight", "rope_freqs.weight"}
    left = sorted(n for n in names - wanted - ignored if not n.endswith("rotary_emb.inv_freq"))
    if left:
        raise Unsupported(f"its checkpoint has {len(left)} tensors this forward does not know, the first {left[0]}")


def _same_head(weights: Weights) -> bool:
    """Whether a model that calls its head tied has no other one; transformers then takes the other."""
    if "lm_head.weight" not in weights.names:
        return True
    return torch.equal(weights.dense("lm_head.weight"), weights.dense("model.embed_tokens.weight"))
