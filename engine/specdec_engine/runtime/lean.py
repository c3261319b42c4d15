"""The lean forward with a cache that grows: the fast road on a CPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol, cast

import torch
from torch import Tensor

from specdec_engine.core.transfer import upload
from specdec_engine.core.trees import depths, hidden_rows
from specdec_engine.errors import OutOfMemory
from specdec_engine.runtime import step_by_step
from specdec_engine.runtime.blocks import TreeRows
from specdec_engine.runtime.decoder import Decoder, OneOfSeveral, Taps
from specdec_engine.runtime.known_text import KnownText
from specdec_engine.runtime.shape import Unsupported
from specdec_engine.system.memory import free_bytes, gib, ran_out


class Forward(Protocol):
    """**Protocol:** a model's forward over a cache that the caller owns; see `Decoder`."""

    vocab: int
    device: torch.device

    @property
    def cache_dtype(self) -> torch.dtype: ...

    @property
    def kv_values(self) -> int: ...

    def new_cache(self, capacity: int) -> Tensor: ...

    def __call__(self, tokens: Tensor, positions: Tensor, cache: Tensor, span: int, rows: int) -> Tensor: ...


class LeanRuntime:
    """A `Decoder`, or another `Forward`, and its cache. Several may share one."""

    name = "lean"

    def __init__(self, decoder: Forward, label: str, limit: int | None, capacity: int) -> None:
        """capacity: tokens to make room for at first."""
        self.decoder = decoder
        self.vocab = decoder.vocab
        self.limit = limit
        self.device = decoder.device
        self._label = label
        self.known = KnownText()
        self._cached = self._written = self._tree_at = 0
        self._taps: Taps | None = None
        self._cache = self._new_cache(self._rounded(capacity))

    @property
    def cached(self) -> int:
        return self._cached

    @property
    def ready(self) -> int:
        """See `Runtime`."""
        return self._cached

    @property
    def capacity(self) -> int:
        """Tokens that fit before the cache is made anew."""
        return self._cache.shape[2]

    @torch.inference_mode()
    def forward(self, tokens: Tensor, rows: int, seldom: bool = False) -> Tensor:
        end = self._cached + tokens.shape[0]
        self._make_room(end)
        positions = torch.arange(self._cached, end, device=self.device)
        logits = self._passed(tokens, positions, self._rounded(end), rows, self._cached)
        self._cached = end
        return logits

    @property
    def trees(self) -> bool:
        """Whether it takes trees: where rows see all that comes before them, and attention can be told what is hidden."""
        if not isinstance(self.decoder, Decoder) or self.device.type != "cpu":
            return False
        shape = self.decoder.shape
        return not any(shape.windows) and shape.growth is None and shape.scales.cap_scores == 0.0

    @torch.inference_mode()
    def forward_tree(self, tokens: Tensor, parents: Sequence[int]) -> Tensor:
        """The newest token and the n of a tree, see `core.trees` -> [n + 1, V] logits after each; caches all of them, until
        `keep` says which go on."""
        return forward_together([self], [tokens], [parents])[0]

    @torch.inference_mode()
    def keep(self, path: Sequence[int]) -> None:
        """Of the tokens of the last `forward_tree` these alone, as a chain: what was computed of them moves together."""
        first, kept = self._tree_at, len(path)
        if list(path) != list(range(kept)):
            places = upload(torch.tensor(path), self.device) + first
            self._cache[:, :, first : first + kept] = self._cache[:, :, places]
            if self._taps is not None:
                self._taps.kept[first : first + kept] = self._taps.kept[places]
        self._cached = first + kept

    def following(self, tokens: Tensor, parents: Sequence[int] | None = None) -> OneOfSeveral:
        """Tokens that follow the cached ones, as one text of several; parents: of a tree, behind the newest token."""
        start, end = self._cached, self._cached + tokens.shape[0]
        self._make_room(end)
        places = torch.arange(start, end, device=self.device)
        if parents is None:
            return OneOfSeveral(tokens, places, self._cache, self._rounded(end), start, self._taps)
        self._tree_at = start + 1
        positions = upload(torch.tensor([0, *depths(parents)]), self.device) + start
        tree = TreeRows(places, upload(torch.tensor(hidden_rows(parents)), self.device))
        return OneOfSeveral(tokens, positions, self._cache, end, start, self._taps, tree)

    def took(self, tokens: int) -> None:
        """So many tokens were cached by a pass over several texts."""
        self._cached += tokens

    @torch.inference_mode()
    def take(self, other: LeanRuntime, tokens: int) -> None:
        """Cache the first so many tokens of another runtime of this model, and no others."""
        self.rollback(0)
        self._make_room(tokens)
        self._cache[:, :, :tokens] = other._cache[:, :, :tokens]
        if self._taps is not None:
            assert other._taps is not None
            self._taps.kept[:tokens] = other._taps.kept[:tokens]
        self._cached = tokens

    def keys_and_values(self, tokens: int) -> Tensor:
        """[layers, 2 · kv_heads, tokens, head_size] of the first so many cached tokens."""
        return self._cache[:, :, :tokens]

    def _passed(self, tokens: Tensor, positions: Tensor, span: int, rows: int, start: int | None = None) -> Tensor:
        if isinstance(self.decoder, Decoder):
            return self.decoder(tokens, positions, self._cache, span, rows, self._taps, start)
        return self.decoder(tokens, positions, self._cache, span, rows)

    def another(self) -> LeanRuntime:
        """The same model on a cache of its own, for another text."""
        made = LeanRuntime(self.decoder, self._label, self.limit, _ROOM)
        if self._taps is not None:
            made.tap(self._taps.layers)
        return made

    def first(self, layers: int) -> LeanRuntime:
        """The same decoder without its later blocks, on a cache of its own."""
        assert isinstance(self.decoder, Decoder)
        return LeanRuntime(self.decoder.first(layers), f"{self._label}:{layers}", self.limit, self.capacity)

    def tap(self, layers: tuple[int, ...]) -> None:
        """Keep what a draft head reads, from the next pass on; without layers, the last state, which is kept with those of
        any. Raises Unsupported where the forward is not a Decoder."""
        if not isinstance(self.decoder, Decoder):
            raise Unsupported("its forward is transformers' own")
        known = None if self._taps is None else self._taps.layers
        if known and layers and known != layers:
            raise Unsupported(f"another draft head reads its layers {', '.join(map(str, known))}")
        if known is None or (layers and not known):
            self.rollback(0)  # of what was read before there are no features
            self._taps = Taps(layers, self._new_features(len(layers), self.capacity))

    def features(self, start: int, end: int) -> Tensor:
        """[end - start, taps + 1, hidden] of cached tokens; `tap` must have been called before they were."""
        assert self._taps is not None
        assert end <= self._cached
        return self._taps.kept[start:end]

    def _new_features(self, layers: int, capacity: int) -> Tensor:
        decoder = cast(Decoder, self.decoder)
        return torch.zeros(capacity, layers + 1, decoder.shape.hidden, dtype=decoder.dtype, device=self.device)

    @torch.inference_mode()
    def rollback(self, to: int) -> None:
        self.known.cut(to)  # first: an interrupt must not leave it knowing more than there is
        if to == 0:  # what a run that broke has left, NaN or inf, would come through the mask
            self._cache[:, :, : self._written].zero_()  # no more: what was never written takes no memory yet
            self._written = 0
        self._cached = min(self._cached, to)

    unroll = step_by_step

    def _make_room(self, end: int) -> None:
        """Places up to `end` are about to be written."""
        if end > self.capacity:
            self._grow(end)
        self._written = max(self._written, end)

    def _grow(self, end: int) -> None:
        wider = self._new_cache(self._fitting(end))
        wider[:, :, : self._cached] = self._cache[:, :, : self._cached]
        taps = self._taps
        if taps is not None:
            kept = self._new_features(len(taps.layers), wider.shape[2])
            kept[: self._cached] = taps.kept[: self._cached]
            taps = Taps(taps.layers, kept)
        self._cache, self._taps = wider, taps  # together: an interrupt leaves both as they were

    def _fitting(self, end: int) -> int:
        """Twice the capacity, or no more than is needed where memory is short. Raises OutOfMemory where that is too much.

        Asked before, because a CPU's memory is granted when it is written to, and whoever then has too little is killed.
        """
        least, ample = self._rounded(end), self._rounded(max(end, 2 * self.capacity))
        free = free_bytes(self.device) or math.inf
        if self.token_bytes * ample < free:
            return ample
        if (
            self.token_bytes * least > free and self.device.type == "cpu"
        ):  # a GPU's allocator has some of its own, and says so
            raise self._too_much(least)
        return least

    def _rounded(self, tokens: int) -> int:
        return -(-tokens // _ROOM) * _ROOM

    def _new_cache(self, capacity: int) -> Tensor:
        try:
            return self.decoder.new_cache(capacity)
        except (MemoryError, RuntimeError) as error:
            if not ran_out(error):
                raise
            raise self._too_much(capacity) from error

    @property
    def token_bytes(self) -> int:
        """Of the cache, a token."""
        return self.decoder.kv_values * self.decoder.cache_dtype.itemsize

    def _too_much(self, capacity: int) -> OutOfMemory:
        return OutOfMemory(
            f"out of memory: the cache of {self._label} for {capacity} tokens needs {gib(capacity * self.token_bytes)}",
            f"{self._cached} tokens fit; lower --max-tokens, or shorten the prompt",
        )


def forward_together(
    runtimes: Sequence[LeanRuntime],
    tokens: Sequence[Tensor],
    parents: Sequence[Sequence[int] | None] | None = None,
) -> list[Tensor]:
    """A pass over tokens of several texts, each on a runtime of its own of one decoder: as `LeanRuntime.forward` of each, or,
    where it has parents, as `forward_tree`, with logits after all of its tokens."""
    decoder = runtimes[0].decoder
    assert isinstance(decoder, Decoder)
    told = zip(runtimes, tokens, parents or [None] * len(runtimes), strict=True)
    found = decoder.together([runtime.following(own, tree) for runtime, own, tree in told])
    for runtime, own in zip(runtimes, tokens, strict=True):
        runtime.took(len(own))
    return found


def read_together(runtimes: Sequence[LeanRuntime], tokens: Sequence[Tensor]) -> None:
    """The same of prompts, without logits."""
    decoder = runtimes[0].decoder
    assert isinstance(decoder, Decoder)
    decoder.read_together([runtime.following(own) for runtime, own in zip(runtimes, tokens, strict=True)])
    for runtime, own in zip(runtimes, tokens, strict=True):
        runtime.took(len(own))


_ROOM = 16
"""Tokens by which a cache is made larger at least."""
