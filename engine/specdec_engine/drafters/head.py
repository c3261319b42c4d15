"""A draft head as drafter (EAGLE; Li et al. 2024, arXiv:2401.15077): drafts from what the target computed on the way.

The head reads the target's features of every token that the target has read, and of its own drafted tokens its own states.
When the target has verified a draft, slots that stood on own states are computed again from true features.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from specdec_engine.core.cycle_types import Draft, Sampling, Verdict
from specdec_engine.core.randomness import Randomness
from specdec_engine.core.transfer import upload
from specdec_engine.drafters.base import DraftSetup, ModelInfo, empty_draft
from specdec_engine.drafters.token_choice import DraftChoice, TextSampler, draft_numbers
from specdec_engine.errors import ModelUnavailable, PairIncompatible, UsageError
from specdec_engine.models.draft_files import builtin_draft, head_weights, inverse, read_draft
from specdec_engine.runtime.arithmetic import refuse_packing
from specdec_engine.runtime.decoder import Decoder
from specdec_engine.runtime.head import HeadForward, HeadRuntime, check_weights, head_shape
from specdec_engine.runtime.lean import LeanRuntime
from specdec_engine.runtime.shape import Unsupported


class HeadDrafter:
    """A head on a target whose features are tapped."""

    def __init__(self, head: HeadRuntime, target: LeanRuntime, ids: Tensor, setup: DraftSetup, name: str) -> None:
        """ids [V']: the target's id of each of the head's."""
        self.name = name
        self._head, self._target, self._setup = head, target, setup
        self._ids = ids.to(setup.device)

    def begin(self, prompt: Sequence[int]) -> None:
        """The target has read the prompt but for its last token."""
        self._head.rollback(0)
        self._catch_up(prompt, keep=1)

    def propose(self, context: Sequence[int], k: int, sampling: Sampling, random: Randomness) -> Draft:
        """Nothing after a single token, of which there are no features yet."""
        read = self._target.cached
        if read == 0:
            return empty_draft(self._setup.device, self.name)
        self._catch_up(context, keep=_IN_ONE_PASS)
        begin = self._head.cached
        u, temperature = draft_numbers(random, sampling, len(context), k, self._setup.vocab, self._head.device)
        stop = self._setup.draft_limits.early_stop_on(self._head.device, self.name)
        eager = self._head.device.type == "cpu"
        drawn = self._head.unroll(
            self._target.features(begin, read),
            self._tokens(context[begin + 1 :]),
            u[:, self._ids] if sampling.coupled else u,
            temperature,
            DraftChoice(sampling, len(self._ids), eager, confident=stop is not None),
            self._ids,
            stop,
        )
        self._head.rollback(read)
        return Draft(drawn.tokens, self._widened(drawn.rows), self.name, drawn.raw, self._ids)

    def observe(self, draft: Draft, verdict: Verdict) -> None:
        """Slots of drafted tokens were forgotten at once: all of them stood on own states."""

    def acceptance_along(
        self, context: Sequence[int], p: Sequence[float], k: int, sampling: Sampling
    ) -> list[list[float]]:
        """A draft begun at each place and led along the text: what the head says depends on how many of its own states it
        has read."""
        begin, rows = len(context) - len(p), list[list[float]]()
        own = inverse(self._ids.cpu(), self._setup.vocab, lacking=-1)[torch.tensor(context)].tolist()
        self._head.rollback(0)
        self._feed(context, begin - 2)
        for at in range(begin, len(context)):
            if at < 2:
                rows.append([])
                continue
            said = TextSampler(own[at : at + k], p[at - begin :], sampling)
            steps = torch.zeros(min(k, len(context) - at), device=self._head.device)
            newest = self._tokens([context[at - 1]])
            self._head.unroll(
                self._target.features(at - 2, at - 1), newest, steps, steps[0], said, self._ids, said.stop
            )
            self._head.rollback(at - 1)  # the first slot was a true one
            rows.append(said.chances)
        return rows

    def _catch_up(self, context: Sequence[int], keep: int) -> None:
        """Feed slots whose features are there, but for the last `keep`; usually there are none."""
        self._feed(context, self._target.cached - keep)

    def _feed(self, context: Sequence[int], end: int) -> None:
        for start in range(self._head.cached, end, _CHUNK):
            stop = min(start + _CHUNK, end)
            self._head.forward(self._target.features(start, stop), self._tokens(context[start + 1 : stop + 1]))

    def _tokens(self, tokens: Sequence[int]) -> Tensor:
        return upload(torch.tensor(tokens), self._head.device)

    def _widened(self, rows: Tensor | None) -> Tensor | None:
        if rows is None:
            return None
        wide = torch.zeros(rows.shape[0], self._setup.vocab, dtype=rows.dtype, device=rows.device)
        return wide.index_copy_(1, self._ids, rows)


def build(argument: str, setup: DraftSetup) -> HeadDrafter:
    """`head:FOLDER`, as `specdec distill` writes it. Raises PairIncompatible for another target than it was made for."""
    path = builtin_draft() if argument == "builtin" else Path(argument)
    draft = read_draft(path)
    if draft is None or draft.kind != "head":
        raise UsageError(f"{path} holds no draft head", "specdec distill --kind head --out FOLDER makes one")
    draft.check(setup.tokenizer, setup.name, setup.vocab)
    weights, target = head_weights(draft), setup.target()
    if not isinstance(target, LeanRuntime) or not isinstance(target.decoder, Decoder):
        raise PairIncompatible(
            f"a draft head needs the lean or the graph runtime, and the target runs on {target.name}",
            "leave out --runtime and --device-map, or choose another draft",
        )
    decoder, config = target.decoder, draft.config
    if setup.draft_quantize in ("int8", "int4") and decoder.kernels is None:
        refuse_packing(setup.draft_quantize, str(decoder.dtype).removeprefix("torch."), setup.device)
    try:
        shape = head_shape(config)
        if shape.hidden != decoder.shape.hidden or draft.taps[-1] >= decoder.shape.layers:
            raise PairIncompatible(
                f"the draft {path} was made for a target of another size", "distill one for this target"
            )
        check_weights(weights, shape, config["intermediate_size"], len(draft.taps) + 1)
        rows = setup.output_rows(draft.ids)
        # Beside a packed target a dense head would be the dearer part: 1.9 ms a step against 1.2 in 4 bits.
        packed = setup.draft_quantize == "auto" and "int4" in decoder.forms
        quantize = "int4" if packed else setup.draft_quantize
        forward = HeadForward(
            shape, weights, decoder.embedding, rows, decoder.dtype, setup.device, quantize, kernels=decoder.kernels
        )
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ModelUnavailable(f"the draft in {path} is damaged: {error}", "distill it again") from error
    try:
        target.tap(draft.taps)
    except Unsupported as reason:
        raise PairIncompatible(
            f"the target cannot serve the draft {path}: {reason}", "choose one draft head"
        ) from reason
    setup.models[argument] = ModelInfo(
        name=argument,
        model_type=config["model_type"],
        parameters=sum(tensor.numel() for tensor in weights.values()),
        vocab=len(draft.ids),
        context=target.limit,
        runtime=target.name,
        dtype=str(decoder.dtype).removeprefix("torch."),
        weights=forward.forms,
        weight_bytes=int((sum(t.numel() for t in weights.values()) + rows.numel()) * _BYTES.get(forward.forms, 4)),
    )
    return HeadDrafter(HeadRuntime(forward, target.capacity), target, draft.ids, setup, argument)


_BYTES = {"int4": 0.625, "int8": 1.0, "bfloat16": 2, "float16": 2}
"""A number; in 4 bits with a scale and an offset for each group of 32."""
_IN_ONE_PASS = 64
"""Slots behind that still go into a draft's first pass instead of passes of their own."""
_CHUNK = 512
