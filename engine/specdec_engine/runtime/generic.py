"""The transformers forward, as it comes: slowest, and right for every architecture that transformers has."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from specdec_engine.core.transfer import upload
from specdec_engine.errors import ModelUnavailable, PairIncompatible, first_line
from specdec_engine.runtime import step_by_step
from specdec_engine.runtime.context_limit import context_limit
from specdec_engine.runtime.context_state import KeysAndValues, context_state
from specdec_engine.runtime.known_text import KnownText
from specdec_engine.runtime.last_states import LastStates
from specdec_engine.runtime.shape import Unsupported
from specdec_engine.runtime.transformers_cache import rollback_of
from specdec_engine.system.memory import ran_out


class GenericRuntime:
    """A transformers causal LM with a state of its own. Two runtimes may share one model.

    Raises PairIncompatible for a model whose logits depend on how its tokens are split into passes.
    """

    name = "generic"

    def __init__(self, model: Any, label: str) -> None:
        self.known = KnownText()
        self._state = context_state(model, rollback_of(model.config, model, label))
        self.model, self._label = model, label
        self.vocab = _logits_size(model)
        self.limit = context_limit(model.config)
        self.device = model.device
        self._last: LastStates | None = None
        self._keeps_rows = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._try(f"{label} ({model.config.model_type})")

    def _try(self, label: str) -> None:
        """A few tokens in one pass, and again in two with others taken back between: whether that is the same function."""
        try:
            difference = self._difference()
        except Exception as error:
            if ran_out(error):
                raise
            if self.device.type == "meta" and not isinstance(error, AssertionError | TypeError | ValueError):
                return  # it asks for numbers where there are only sizes: experts are chosen by them
            if getattr(self.model.config, "quantization_config", None) is not None:
                raise ModelUnavailable(
                    f"{label} is quantized, and does not run on {self.device}: {first_line(error)}",
                    "choose the checkpoint that it was made from, or a GGUF",
                ) from error
            raise PairIncompatible(
                f"{label} cannot be told several tokens after others: {first_line(error)}", _OTHER
            ) from error
        limit = _EXACT if self.model.dtype in (torch.float32, torch.float64) else _ROUNDED
        if difference > limit:
            raise PairIncompatible(
                f"{label} computes other logits for tokens of one pass than of two: they differ by {difference:.2g} of their "
                "spread",
                _OTHER,
            )

    def _difference(self) -> float:
        """Between logits of the same tokens, by their standard deviation; 0 where there are no numbers."""
        tokens = upload(torch.tensor([1, 2, 3, 1, 2, 2]), self.device) % self.vocab
        whole = self.forward(tokens, 6)
        self.rollback(0)
        first = self.forward(tokens[:3], 3)
        self.forward(tokens[:2], 2)
        counted = self.cached
        self.rollback(3)
        parts = torch.cat([first, self.forward(tokens[3:], 3)])
        self.rollback(0)
        if counted != 5:
            raise ValueError(f"its cache has {counted} rows for 5 tokens")
        if self.device.type == "meta":
            return 0.0
        finite = whole.isfinite() & parts.isfinite()
        whole, parts = whole[finite].float(), parts[finite].float()
        return float((whole - parts).square().mean().sqrt() / whole.std()) if len(whole) > 1 else 0.0

    def another(self) -> GenericRuntime:
        """The same model on a cache of its own, for another text."""
        made = GenericRuntime(self.model, self._label)
        if self._last is not None:
            made.keep_last()
        return made

    @property
    def cached(self) -> int:
        return self._state.cached

    @property
    def ready(self) -> int:
        """See `Runtime`."""
        return self._state.ready

    @torch.inference_mode()
    def forward(self, tokens: Tensor, rows: int, seldom: bool = False) -> Tensor:
        wanted: dict[str, Any] = {"logits_to_keep": rows} if self._keeps_rows else {}
        if self._last is not None:
            wanted["output_hidden_states"] = True
        passes = []
        for inputs in self._state.inputs(tokens):
            found = self.model(**inputs, **wanted)
            passes.append(found.logits[0, -rows:])
            if self._last is not None:  # a pass can feed again what was accepted, and there can be several
                self._last.add(found.hidden_states[-1][0], self.ready or self.cached)
        logits: Tensor = passes[0] if len(passes) == 1 else torch.cat(passes)[-rows:]
        return logits.to(self.device)  # with a device_map, the last layer may live elsewhere

    def rollback(self, to: int) -> None:
        self.known.cut(to)  # first: an interrupt must not leave it knowing more than there is
        self._state.rollback(to)
        if self._last is not None:
            self._last.cut(to)

    def keep_last(self) -> LastStates:
        """Keep from the next pass on what the model computes last of each token."""
        if self._last is None:
            self.rollback(0)  # of what was read before there is nothing
            self._last = LastStates()
        return self._last

    @property
    def keys_and_values(self) -> KeysAndValues:
        """What its layers keep. Raises Unsupported for a model that keeps something else."""
        if not isinstance(self._state, KeysAndValues):
            raise Unsupported("it keeps no keys and values that an assistant could read")
        return self._state

    def features(self, start: int, end: int) -> Tensor:
        """[end - start, 1, hidden] of cached tokens, which `keep_last` asked for: see `LeanRuntime.features`."""
        return self.keep_last().between(start, end)[:, None]

    unroll = step_by_step


_EXACT, _ROUNDED = 0.01, 0.25
"""Of a spread, between two ways of computing one function, in float32 and in 16 bits. Rounding makes 1e-5 of it, a state that
is not read 0.1 to 3; a floor that Nemotron-H and Zamba 2 put under the time steps of several tokens, and not of one, 3e-3."""
_OTHER = "choose a model with attention in every layer, such as Llama or Qwen"


def _logits_size(model: Any) -> int:
    head = model.get_output_embeddings()
    return int(head.weight.shape[0] if head is not None else model.config.get_text_config().vocab_size)
