"""A draft head: one block that reads what its target computed, and predicts among the target's commonest tokens.

After EAGLE (Li et al. 2024, arXiv:2401.15077) and EAGLE-3 (2025, arXiv:2503.01840). Slot t takes the target's features after
token t, or, past what the target has read, the head's own state of the slot before; and the embedding of token t + 1. It
predicts token t + 2. Embeddings and output rows are the target's own, so that the head is small.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from specdec_engine.runtime import DraftTokens, SampledToken, StopDrafting, TokenSampler
from specdec_engine.runtime.blocks import Blocks
from specdec_engine.runtime.cpu import whole
from specdec_engine.runtime.decoder import Embedding
from specdec_engine.runtime.linear import Quantize, project
from specdec_engine.runtime.native import Kernels
from specdec_engine.runtime.ops import Layer, Ops
from specdec_engine.runtime.shape import Shape


def head_shape(config: Mapping[str, Any]) -> Shape:
    """From a head's config. Raises KeyError for one that lacks an entry."""
    size = config["head_dim"]
    steps = torch.arange(0, size, 2, dtype=torch.int64).float() / size
    return Shape(
        layers=1,
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_size=size,
        hidden=config["hidden_size"],
        vocab=config["vocab_size"],
        eps=config["rms_norm_eps"],
        tied=False,
        tensors={},
        windows=(None,),
        frequencies=1.0 / config["rope_theta"] ** steps,
        rope_scale=1.0,
    )


def check_weights(weights: Mapping[str, Tensor], shape: Shape, intermediate: int, features: int) -> None:
    """Raises ValueError for weights of other shapes than the config's, and for such as are no numbers."""
    d, width = shape.hidden, shape.heads * shape.head_size
    expected = {
        "feature_norm": (features, d),
        "fuse.weight": (d, features * d),
        "qkv.weight": (width + 2 * shape.kv_heads * shape.head_size, 2 * d),
        "out.weight": (d, width),
        "gate_up.weight": (2 * intermediate, d),
        "down.weight": (d, intermediate),
        **dict.fromkeys(("embedding_norm", "state_norm", "mlp_norm", "final_norm"), (d,)),
    }
    for name, size in expected.items():
        if tuple(weights[name].shape) != size:
            raise ValueError(f"{name} is {tuple(weights[name].shape)} and should be {size}")
        if not bool(weights[name].isfinite().all()):
            raise ValueError(f"{name} has entries that are not finite numbers")


class HeadForward(Blocks):
    """The head's weights, and its forward over a cache that the caller owns."""

    def __init__(
        self,
        shape: Shape,
        weights: Mapping[str, Tensor],
        embedding: Embedding,
        rows: Tensor,
        dtype: torch.dtype,
        device: torch.device,
        quantize: Quantize,
        ops: Ops | None = None,
        kernels: Kernels | None = None,
    ) -> None:
        """weights: as `distill.head.Head` names them; rows [V', hidden]: the target's output matrix for the draft's ids; ops:
        see `Blocks`; kernels: see `project`."""
        super().__init__(shape, dtype, device, ops, kernels)

        def matrix(name: str) -> Tensor:
            return weights[f"{name}.weight"].to(dtype)

        self.embedding = embedding
        self.vocab = rows.shape[0]
        layer = Layer(
            attention_norm=self.norm_weight(weights["state_norm"]),
            qkv=project([matrix("qkv")], None, dtype, device, quantize, kernels),
            q_norm=None,
            k_norm=None,
            out=project([matrix("out")], None, dtype, device, quantize, kernels),
            mlp_norm=self.norm_weight(weights["mlp_norm"]),
            gate_up=project([matrix("gate_up")], None, dtype, device, quantize, kernels),
            down=project([matrix("down")], None, dtype, device, quantize, kernels),
            window=shape.windows[0],
        )
        self.layers = [whole(layer, shape)]
        self._embedding_norm = self.norm_weight(weights["embedding_norm"])
        self._feature_norm = self.norm_weight(weights["feature_norm"])
        self._fuse = project([matrix("fuse")], None, dtype, device, quantize, kernels)
        self._norm = self.norm_weight(weights["final_norm"])
        self._head = project([rows.to(dtype)], None, dtype, device, quantize, kernels)

    def fused(self, features: Tensor) -> Tensor:
        """[n, F, hidden] -> [n, hidden]: the states that the target leaves to these slots."""
        scaled = rms_norm(features.float(), features.shape[-1:], None, self.shape.eps).mul_(self._feature_norm)
        return self._fuse(scaled.to(self.dtype).flatten(1))

    def __call__(self, states: Tensor, tokens: Tensor, start: int, cache: Tensor, span: int) -> tuple[Tensor, Tensor]:
        """[n, hidden] states and [n] tokens (target ids) at the n slots from `start` -> [1, V'] logits after the last, and
        its state [1, hidden] for the slot that follows."""
        positions = torch.arange(start, start + tokens.shape[0], device=self.device)
        step = self.begin(positions, cache, span, start)
        step.x.copy_(self.embedding(tokens))
        embedded = step.normed(self._embedding_norm)
        step.x.copy_(states)
        layer = self.layers[0]
        step.block(0, layer, torch.cat([embedded, step.normed(layer.attention_norm)], 1))
        return self._head(step.normed(self._norm)[-1:]), step.x[-1:]


class HeadRuntime:
    """A head and its cache, which grows. Its slots are counted as `Runtime` counts tokens."""

    def __init__(self, forward: HeadForward, capacity: int) -> None:
        """capacity: slots to make room for at first."""
        self.device = forward.device
        self._forward = forward
        self._cached = self._written = 0
        self._cache = forward.new_cache(_rounded(capacity))

    @property
    def cached(self) -> int:
        return self._cached

    @torch.inference_mode()
    def forward(self, features: Tensor, tokens: Tensor) -> None:
        """Cache slots: [n, F, hidden] features and the [n] tokens that follow them."""
        self._step(self._forward.fused(features), tokens)

    @torch.inference_mode()  # a cache that grew in a pass is an inference tensor
    def rollback(self, to: int) -> None:
        """Forget all but the first `to` slots; idempotent."""
        if to == 0:  # as in `LeanRuntime`: what a broken run left would come through the mask
            self._cache[:, :, : self._written].zero_()
            self._written = 0
        self._cached = min(self._cached, to)

    @torch.inference_mode()
    def unroll(
        self,
        features: Tensor,
        tokens: Tensor,
        u: Tensor,
        temperature: Tensor,
        sampler: TokenSampler,
        ids: Tensor,
        stop: StopDrafting | None = None,
    ) -> DraftTokens:
        """Pending slots and [k] uniform numbers -> at most [k] tokens, the target's ids, and their distributions [k, V']."""
        states, sampled, said = self._forward.fused(features), list[SampledToken](), list[Tensor]()
        for number in u:
            logits, states = self._step(states, tokens)
            sampled.append(sampler(logits, number, temperature))
            tokens = ids.index_select(0, sampled[-1].token)
            said.append(tokens)
            if stop is not None and stop(sampled[-1].sure):
                break
        return DraftTokens.of(sampled, said)

    def _step(self, states: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        end = self._cached + tokens.shape[0]
        if end > self._cache.shape[2]:
            wider = self._forward.new_cache(_rounded(2 * end))
            wider[:, :, : self._cached] = self._cache[:, :, : self._cached]
            self._cache = wider
        start, self._cached = self._cached, end
        self._written = max(self._written, end)
        return self._forward(states, tokens, start, self._cache, end)


def _rounded(slots: int) -> int:
    return -(-slots // 16) * 16
