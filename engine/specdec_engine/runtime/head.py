"""A draft head: one block that reads what its target computed, and predicts among the target's commonest tokens.

After EAGLE (Li et al. 2024, arXiv:2401.15077) and EAGLE-3 (2025, arXiv:2503.01840). Slot t takes the target's features after
token t, or, past what the target has read, the head's own state of the slot before; and the embedding of token t + 1. It
predicts token t + 2. Embeddings and output rows of ours are the target's own, so that the head is small; those of others may
be their own, and `HeadForm` says in what else they differ.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from specdec_engine.runtime.blocks import Blocks
from specdec_engine.runtime.cpu import whole
from specdec_engine.runtime.decoder import Embedding
from specdec_engine.runtime.head_steps import HeadSteps, Read
from specdec_engine.runtime.linear import Projection, Quantize, project
from specdec_engine.runtime.native import Kernels, Stack
from specdec_engine.runtime.native_records import Beginning, Following, Matrix, address
from specdec_engine.runtime.ops import Layer, Network, Ops, Pass
from specdec_engine.runtime.shape import Rotation, Shape


@dataclass(frozen=True, slots=True)
class HeadForm:
    """In what heads of different makers differ; by default ours. A head may besides have output rows and embeddings of its
    own, norms of queries and keys, biases, and ordinary layers above the first: its weights tell."""

    final: bool = True
    """The target's final normed state is a feature, after those of the tapped layers."""
    feature_norms: Literal["each", "whole", "none"] = "each"
    """Of each feature by itself (ours, EAGLE-3.1), of all in a row, or of none (EAGLE-3)."""
    residual_normed: bool = False
    """The first layer adds to its normed state, not to the state."""
    output_normed: bool = False
    """The state that is fed back is normed as the output is (EAGLE-3.1, MTP)."""
    joined: bool = False
    """State and embedding, each normed, are joined to one vector before ordinary layers (MTP); else both are what the first
    layer reads, and the state is what it adds to. The first slot sees no token."""


def head_shape(config: Mapping[str, Any]) -> Shape:
    """The shape of a head's config, with its `rotation` where that is not a plain one of `rope_theta`. Raises KeyError for
    one that lacks an entry."""
    size, layers = config["head_dim"], int(config.get("num_hidden_layers") or 1)
    rotation = config.get("rotation")
    if rotation is None:
        steps = torch.arange(0, size, 2, dtype=torch.int64).float() / size
        rotation = Rotation(1.0 / config["rope_theta"] ** steps)
    return Shape(
        layers=layers,
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_size=size,
        hidden=config["hidden_size"],
        vocab=config["vocab_size"],
        eps=config["rms_norm_eps"],
        tied=False,
        tensors={},
        windows=(None,) * layers,
        rotations=(rotation,),
    )


def check_weights(
    weights: Mapping[str, Tensor], shape: Shape, intermediate: int, features: int, form: HeadForm, target: int
) -> None:
    """Look whether a head's weights are what its config says; features: how many it reads, each `target` numbers wide. Raises
    ValueError for other shapes, and for entries that are no numbers, KeyError for a tensor that is missing."""
    if form.feature_norms == "none" and "feature_norm" in weights:
        raise ValueError("it has norms of features, and its config does not say how they are taken")
    if shape.hidden != target and "head.weight" not in weights:
        raise ValueError(
            f"it is {shape.hidden} numbers wide, its target {target}, and it has no output rows of its own"
        )
    for name, size in _sizes(weights, shape, intermediate, features, form, target).items():
        if tuple(weights[name].shape) != size:
            raise ValueError(f"{name} is {tuple(weights[name].shape)} and should be {size}")
        if not bool(weights[name].isfinite().all()):
            raise ValueError(f"{name} has entries that are not finite numbers")


def _sizes(
    weights: Mapping[str, Tensor], shape: Shape, intermediate: int, features: int, form: HeadForm, target: int
) -> dict[str, tuple[int, ...]]:
    """Of the tensors that such a head has; see `check_weights`."""
    d, width = shape.hidden, shape.heads * shape.head_size
    expected: dict[str, tuple[int, ...]] = dict.fromkeys(("embedding_norm", "final_norm"), (d,))
    if form.feature_norms != "none":
        expected["feature_norm"] = (features, target) if form.feature_norms == "each" else (features * target,)
    if features > 1 or d != target or "fuse.weight" in weights:
        expected["fuse.weight"] = (d, features * target)
    if form.joined:
        expected |= {"joined_norm": (d,), "join.weight": (d, 2 * d)}
    for i in range(shape.layers):
        at, inputs = (f"{i}." if i else "", d if i or form.joined else 2 * d)
        expected |= {
            f"{at}state_norm": (d,),
            f"{at}qkv.weight": (width + 2 * shape.kv_heads * shape.head_size, inputs),
            f"{at}out.weight": (d, width),
            f"{at}mlp_norm": (d,),
            f"{at}gate_up.weight": (2 * intermediate, d),
            f"{at}down.weight": (d, intermediate),
        }
    if "head.weight" in weights:
        expected["head.weight"] = (shape.vocab, d)
    return expected


@dataclass(frozen=True, slots=True)
class Features:
    """The features that the target has left to slots."""

    read: Tensor
    """[n, taps + 1, hidden of the target]"""


@dataclass(frozen=True, slots=True)
class State:
    """The state that the head has left to a slot."""

    state: Tensor
    """[1, hidden]"""


class HeadForward(Blocks):
    """The head's weights, and its forward over a cache that the caller owns."""

    def __init__(
        self,
        shape: Shape,
        weights: Mapping[str, Tensor],
        embedding: Embedding,
        rows: Tensor | Projection,
        dtype: torch.dtype,
        device: torch.device,
        quantize: Quantize,
        ops: Ops | None = None,
        kernels: Kernels | None = None,
        form: HeadForm | None = None,
    ) -> None:
        """weights: as `distill.head.Head` names them, those of layers above the first with its number before; embedding: of
        the target's ids; rows [V', hidden]: the output matrix for the draft's ids, or the target's own as it is; ops: see
        `Blocks`; kernels: see `project`."""
        super().__init__(shape, dtype, device, ops, kernels)
        self.form = HeadForm() if form is None else form
        self.embedding = embedding
        self.vocab = shape.vocab

        def matrix(name: str) -> Projection:
            bias = weights.get(f"{name}.bias")
            return project([weights[f"{name}.weight"].to(dtype)], bias, dtype, device, quantize, kernels)

        self.layers = [self._layer(weights, matrix, f"{i}." if i else "") for i in range(shape.layers)]
        self._embedding_norm = self.norm_weight(weights["embedding_norm"])
        self._feature_norm = self.norm_weight(weights["feature_norm"]) if "feature_norm" in weights else None
        self._fuse = matrix("fuse") if "fuse.weight" in weights else None
        self._norm = self.norm_weight(weights["final_norm"])
        self._joined_norm = self.norm_weight(weights["joined_norm"]) if self.form.joined else None
        self._join = matrix("join") if self.form.joined else None
        self._head = (
            project([rows.to(dtype)], None, dtype, device, quantize, kernels) if isinstance(rows, Tensor) else rows
        )

    def _layer(self, weights: Mapping[str, Tensor], matrix: Callable[[str], Projection], at: str) -> Layer:
        norms = [weights.get(f"{at}{name}") for name in ("q_norm", "k_norm")]
        q_norm, k_norm = (None if norm is None else self.norm_weight(norm) for norm in norms)
        layer = Layer(
            attention_norm=self.norm_weight(weights[f"{at}state_norm"]),
            qkv=matrix(f"{at}qkv"),
            q_norm=q_norm,
            k_norm=k_norm,
            out=matrix(f"{at}out"),
            mlp_norm=self.norm_weight(weights[f"{at}mlp_norm"]),
            network=Network(matrix(f"{at}gate_up"), matrix(f"{at}down")),
            window=None,
        )
        return whole(layer, self.shape)

    def __call__(
        self,
        before: Features | State,
        tokens: Tensor,
        start: int,
        cache: Tensor,
        span: int,
        more: Tensor | None = None,
        rows: int = 1,
    ) -> tuple[Tensor, Tensor]:
        """Read what is before [n] slots from `start`, and their [n] tokens (target ids) -> [rows, V' + m] logits of the
        last one, or of none, and its state [1, hidden] for the slot that follows. more [m, hidden]: output rows besides its
        own."""
        stack = self._stack_for(len(tokens), start, reading=True)
        if stack is not None and self._own is not None:
            return self._by_own_kernels(self._own, stack, before, self.embedding(tokens), start, cache, more, rows)
        positions = torch.arange(start, start + tokens.shape[0], device=self.device)
        step = self.begin(positions, cache, span, start, reading=True)
        step.x.copy_(self.embedding(tokens))
        if self.form.joined and start == 0:
            step.x[0] = 0.0  # as MiMo's makers have it in vLLM
        embedded = step.normed(self._embedding_norm)
        step.x.copy_(self._fused(before.read) if isinstance(before, Features) else before.state)
        step.through(self.layers, self._read(step, self.layers[0], embedded))
        last = step.normed(self._norm)[-1:]
        logits = self._head(last) if rows else last[:0]
        if more is not None and rows:
            logits = torch.cat([logits, (last @ more.to(last).T).to(logits)], -1)
        return logits, last if self.form.output_normed else step.x[-1:]

    def _read(self, step: Pass, first: Layer, embedded: Tensor) -> Tensor | None:
        """What the first layer reads of states, which are in `step.x`, and embeddings; None for what is in `step.x` then."""
        if self._join is not None and self._joined_norm is not None:
            step.x.copy_(self._join(torch.cat([step.normed(self._joined_norm), embedded], 1), reading=True))
            return None
        assert first.attention_norm is not None
        normed = step.normed(first.attention_norm)
        if self.form.residual_normed:
            step.x.copy_(normed)
        return torch.cat([embedded, normed], 1)

    def _fused(self, features: Tensor) -> Tensor:
        """[n, taps + 1, hidden of the target] -> [n, hidden]: the states that the target leaves to these slots."""
        read = self._parts(features)
        if self._feature_norm is not None:
            read = rms_norm(read.float(), read.shape[-1:], None, self.shape.eps).mul_(self._feature_norm)
        flat = read.to(self.dtype).flatten(1)
        return flat if self._fuse is None else self._fuse(flat, reading=True)

    def _parts(self, features: Tensor) -> Tensor:
        """[n, parts, size] of what the target computed: what is read, in parts that are normed by themselves."""
        read = features if self.form.final else features[:, :-1]
        read = features[:, -1:] if self.form.joined else read  # what others tap beside it is not its own
        return read.flatten(1)[:, None] if self.form.feature_norms == "whole" else read

    @cached_property
    def _own(self) -> Matrix | None:
        """The output matrix, where our own kernels do all of a step; None where they do not."""
        parts = [self._head] if self._fuse is None else [self._head, self._fuse]
        alone = all(len(part.matrices) == 1 for part in parts)
        return self._head.matrices[0] if alone and not self.form.joined else None

    def steps(self, slots: int, columns: int) -> HeadSteps:
        """Room for drafts that `goes_by_steps`: that begin with so many slots, and choose among so many columns, at most."""
        stack, table = self._stack, self._table
        assert stack is not None
        assert self._own is not None
        assert table is not None
        normed, before = self.form.output_normed, self._beginning(None, None)
        return HeadSteps(stack, self._own, self._norm, before, table, slots, columns, normed=normed)

    def goes_by_steps(self, slots: int, start: int) -> bool:
        """Tell whether a draft that begins with so many slots from `start` is made by our own kernels alone."""
        return (
            self._own is not None
            and self._table is not None
            and self._stack_for(slots, start, reading=True) is not None
        )

    @cached_property
    def _table(self) -> Matrix | None:
        return self.embedding.matrix

    def read(
        self, before: Features, tokens: Tensor, start: int, k: int, cache: Tensor, ids: Tensor, more: Tensor | None
    ) -> Read:
        """Gather what the first of up to k steps reads; see `__call__`. ids: of all columns."""
        text = self.fields_from(start, len(tokens), cache, more=k)[0]
        return Read(self._parts(before.read).contiguous(), tokens, text, cache, more, ids)

    def _by_own_kernels(
        self,
        own: Matrix,
        stack: Stack,
        before: Features | State,
        embedded: Tensor,
        start: int,
        cache: Tensor,
        more: Tensor | None,
        rows: int,
    ) -> tuple[Tensor, Tensor]:
        """A step in one call: by operations it took 0.4 ms, of which a third was work."""
        n, features, embedded = len(embedded), None, embedded.contiguous()
        assert embedded.dtype == torch.float32
        if isinstance(before, Features):
            assert before.read.dtype == torch.float32
            assert len(before.read) == n
            x, features = torch.empty(n, self.shape.hidden), self._parts(before.read).contiguous()
        else:
            assert n == 1
            x = before.state.clone()
        matrices = [own]
        if more is not None:
            more = more.bfloat16().contiguous()
            matrices.append(Matrix(16, 0, 0, *more.shape, more.data_ptr(), None, None))
        after = Following(n, self._norm, matrices, rows)
        self.in_one_call(stack, x, start, cache, after, self._beginning(features, embedded), reading=True)
        return after.out, after.last[-1:] if self.form.output_normed else x[-1:]

    def _beginning(self, features: Tensor | None, embedded: Tensor | None) -> Beginning:
        return Beginning(
            address(features),
            *((1, 1) if features is None else features.shape[1:]),
            address(self._feature_norm),
            None if self._fuse is None else ctypes.pointer(self._fuse.matrices[0]),
            address(embedded),
            self._embedding_norm.data_ptr(),
            self.form.residual_normed,
        )
