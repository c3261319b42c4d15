"""A mixture of experts as the lean forward needs to know it: feed-forward networks, of which a token takes a few."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Gate:
    """GPT-OSS's: g · sigmoid(steep · g) · (u + 1), of g and u that are kept below a limit, and u above its negative."""

    limit: float
    steep: float


@dataclass(frozen=True, slots=True)
class Mixture:
    """A config's experts."""

    count: int
    taken: int
    """The number that each token takes: those that the router finds likeliest."""
    inner: int
    """Each one's width."""
    layers: frozenset[int]
    """The layers that have them; the others have one feed-forward network."""
    renormed: bool
    """The weights of those that are taken add up to 1."""
    router: str
    """Name in a layer of the matrix that chooses."""
    expert: str
    """Name in a layer of an expert, with {} for its number."""
    parts: tuple[str, str, str]
    """Names in an expert of its gate, its way up and its way down."""
    biased: bool = False
    """The router and each expert's matrices add a bias."""
    gate: Gate | None = None
    """Another gate than a silu."""

    def unread(self, hidden: int) -> int:
        """Numbers of the experts that a token does not take, in all layers."""
        return len(self.layers) * (self.count - self.taken) * 3 * self.inner * hidden

    def tensors(self, hidden: int) -> dict[str, tuple[int, ...]]:
        """Names in a layer, and sizes."""
        gate, up, down = self.parts
        found: dict[str, tuple[int, ...]] = {f"{self.router}.weight": (self.count, hidden)}
        for i in range(self.count):
            at = self.expert.format(i)
            found |= {f"{at}.{part}.weight": (self.inner, hidden) for part in (gate, up)}
            found[f"{at}.{down}.weight"] = (hidden, self.inner)
        if self.biased:
            found |= {name.replace(".weight", ".bias"): (size[0],) for name, size in found.items()}
        return found


def mixture_of(config: Any) -> Mixture | None:
    """Find a config's experts; None for a model without."""
    layers = range(config.num_hidden_layers)
    if config.model_type == "mixtral":
        return Mixture(
            count=config.num_local_experts,
            taken=config.num_experts_per_tok,
            inner=config.intermediate_size,
            layers=frozenset(layers),
            renormed=True,
            router="block_sparse_moe.gate",
            expert="block_sparse_moe.experts.{}",
            parts=("w1", "w3", "w2"),
        )
    if config.model_type == "gpt_oss":
        return Mixture(
            count=config.num_local_experts,
            taken=config.num_experts_per_tok,
            inner=config.intermediate_size,
            layers=frozenset(layers),
            renormed=True,  # it takes the softmax of those that are taken alone, which is the same
            router="mlp.router",
            expert="mlp.experts.{}",
            parts=("gate_proj", "up_proj", "down_proj"),
            biased=True,
            gate=Gate(getattr(config, "swiglu_limit", 7.0), getattr(config, "swiglu_alpha", 1.702)),
        )
    if config.model_type != "qwen3_moe":
        return None
    every, alone = config.decoder_sparse_step, config.mlp_only_layers or ()
    count = int(getattr(config, "num_experts", 0) or getattr(config, "num_local_experts", 0) or 0)
    return Mixture(
        count=count,
        taken=config.num_experts_per_tok,
        inner=config.moe_intermediate_size,
        layers=frozenset(i for i in layers if i not in alone and count and (i + 1) % every == 0),
        renormed=bool(config.norm_topk_prob),
        router="mlp.gate",
        expert="mlp.experts.{}",
        parts=("gate_proj", "up_proj", "down_proj"),
    )
