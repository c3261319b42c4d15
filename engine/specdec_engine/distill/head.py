"""The draft head in training: one layer that reads what its target computed (EAGLE-3; Li et al. 2025, arXiv:2503.01840).

Slot t holds the target's features after token t and the embedding of token t + 1, and predicts token t + 2. Of its own
drafted tokens the head has no features: there it reads its own output of the slot before. So it is trained as it will be
used, several steps deep ("training-time test"): step s sees true features up to slot t - s, and its own from there on.

Shapes: B sequences of T slots, hidden size d of the target, F features (layers tapped and the final norm), V' draft ids.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, silu


@dataclass(frozen=True, slots=True)
class HeadShape:
    """What a head takes over from its target."""

    hidden: int
    features: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    eps: float
    theta: float
    output_normed: bool
    """The state that is fed back is normed as the output is (EAGLE-3.1, arXiv:2605.09992): it is then as large after one step
    as after five."""


class Head(nn.Module):
    """The layer; embeddings and output rows are the target's own."""

    def __init__(self, shape: HeadShape) -> None:
        super().__init__()
        s, d = shape, shape.hidden
        self.shape = shape
        self.feature_norm = nn.Parameter(torch.ones(s.features, d))
        self.fuse = nn.Linear(s.features * d, d, bias=False)
        self.embedding_norm = nn.Parameter(torch.ones(d))
        self.state_norm = nn.Parameter(torch.ones(d))
        self.qkv = nn.Linear(2 * d, (s.heads + 2 * s.kv_heads) * s.head_size, bias=False)
        self.out = nn.Linear(s.heads * s.head_size, d, bias=False)
        self.mlp_norm = nn.Parameter(torch.ones(d))
        self.gate_up = nn.Linear(d, 2 * s.intermediate, bias=False)
        self.down = nn.Linear(s.intermediate, d, bias=False)
        self.final_norm = nn.Parameter(torch.ones(d))
        for linear in (self.out, self.down):
            nn.init.normal_(linear.weight, std=0.01)

    def fused(self, features: Tensor) -> Tensor:
        """[..., F, d] -> [..., d]: the state that the target leaves to a slot."""
        d = self.shape.hidden
        normed = rms_norm(features.float(), (d,), None, self.shape.eps) * self.feature_norm
        fused: Tensor = self.fuse(normed.flatten(-2))
        return fused

    def attention_inputs(self, state: Tensor, embedding: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, T, d] twice -> queries, keys, values [B, heads, T, head_size]; keys and values repeated for each query head."""
        s = self.shape
        inputs = [self._normed(embedding, self.embedding_norm), self._normed(state, self.state_norm)]
        heads = self.qkv(torch.cat(inputs, -1)).view(*state.shape[:2], -1, s.head_size).transpose(1, 2)
        q, k, v = torch.split(heads, [s.heads, s.kv_heads, s.kv_heads], 1)
        repeat = s.heads // s.kv_heads
        q, k = _rotated(q.float(), rotation), _rotated(k.float(), rotation)
        return q * s.head_size**-0.5, k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)

    def after_attention(self, state: Tensor, attended: Tensor) -> Tensor:
        """[B, T, d], [B, heads, T, head_size] -> [B, T, d]: the state of the next slot, before the final norm."""
        x = state + self.out(attended.transpose(1, 2).flatten(-2))
        gate, up = self.gate_up(self._normed(x, self.mlp_norm)).chunk(2, -1)
        y: Tensor = x + self.down(silu(gate) * up)
        return y

    def output(self, state: Tensor) -> Tensor:
        """[..., d] -> [..., d], what the output rows are multiplied with."""
        return self._normed(state, self.final_norm)

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x.float(), (self.shape.hidden,), weight, self.shape.eps)

    def forward(self, features: Tensor, embeddings: Tensor, steps: int) -> list[Tensor]:
        """features [B, T, F, d], embeddings [B, T, d] of the tokens that follow -> `steps` outputs [B, T, d].

        Row t of step s is the prediction at slot t by a draft that began s slots before. Its first s rows mean nothing.
        """
        state = self.fused(features)
        rotation = _rotation(torch.arange(state.shape[1], device=state.device), self.shape)
        keys, values, outputs = list[Tensor](), list[Tensor](), list[Tensor]()
        for _ in range(steps):
            q, k, v = self.attention_inputs(state, embeddings, rotation)
            keys.append(k)
            values.append(v)
            state = self.after_attention(state, _attended(q, keys, values))
            outputs.append(self.output(state))
            state = (outputs[-1] if self.shape.output_normed else state).roll(
                1, 1
            )  # the next reads that of the slot before
        return outputs


def _attended(q: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    """Attention at step s = len(keys) - 1: true features' keys up to slot t - s, then one key of each step since."""
    s, slots = len(keys) - 1, q.shape[2]
    at = torch.arange(slots, device=q.device)
    scores = (q @ keys[0].transpose(-1, -2)).masked_fill(at > at[:, None] - s, float("-inf"))
    # A row before slot s has no key at all; its own, masked out of the loss, keeps the softmax finite.
    own = [(q * keys[j].roll(s - j, 2)).sum(-1, keepdim=True) for j in range(1, s + 1)]
    weights = torch.cat([scores, *own], -1).softmax(-1)
    attended = weights[..., :slots].to(values[0]) @ values[0]
    for j in range(1, s + 1):
        attended = attended + weights[..., slots + j - 1, None].to(values[j]) * values[j].roll(s - j, 2)
    return attended


def _rotation(positions: Tensor, shape: HeadShape) -> Tensor:
    """[T] -> [T, head_size / 2] complex."""
    steps = torch.arange(0, shape.head_size, 2, device=positions.device).float() / shape.head_size
    angles = positions[:, None] * (1.0 / shape.theta**steps)
    return torch.polar(torch.ones_like(angles), angles)


def _rotated(x: Tensor, rotation: Tensor) -> Tensor:
    """Neighbouring numbers of the last dimension are one complex number."""
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * rotation
    return torch.view_as_real(pairs).flatten(-2)
