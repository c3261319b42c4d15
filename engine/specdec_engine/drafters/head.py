"""A draft head as drafter (EAGLE; Li et al. 2024, arXiv:2401.15077): drafts from what the target computed on the way.

The head reads the target's features of every token that the target has read, and of its own drafted tokens its own states.
When the target has verified a draft, slots that stood on own states are computed again from true features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from specdec_engine.core.cycle_types import Draft, Sampling, Verdict
from specdec_engine.core.randomness import Randomness
from specdec_engine.core.transfer import upload
from specdec_engine.drafters.base import DraftSetup, ModelInfo, empty_draft
from specdec_engine.drafters.context_ids import MOST, ContextIds
from specdec_engine.drafters.token_choice import DraftChoice, TextSampler, draft_numbers, masked
from specdec_engine.errors import ModelUnavailable, PairIncompatible, UsageError
from specdec_engine.models.draft_files import builtin_draft, head_weights, read_draft
from specdec_engine.models.draft_folder import DraftFolder
from specdec_engine.runtime import Runtime
from specdec_engine.runtime.arithmetic import refuse_packing
from specdec_engine.runtime.decoder import Decoder, Embedding
from specdec_engine.runtime.head import HeadForward, HeadRuntime, check_weights, head_shape
from specdec_engine.runtime.lean import LeanRuntime
from specdec_engine.runtime.shape import Unsupported


class HeadDrafter:
    """A head on a target whose features are tapped."""

    def __init__(self, head: HeadRuntime, target: LeanRuntime, ids: ContextIds, setup: DraftSetup, name: str) -> None:
        self.name = name
        self._head, self._target, self._ids, self._setup = head, target, ids, setup

    def another(self, target: Runtime) -> HeadDrafter:
        """See `Repeatable`; the target's runtime is tapped as the first one's."""
        assert isinstance(target, LeanRuntime)
        return HeadDrafter(self._head.another(), target, self._ids.another(), self._setup, self.name)

    def begin(self, prompt: Sequence[int]) -> None:
        """The target has read the prompt but for its last token."""
        self._ids.forget()
        known = min(self._head.known.common(prompt), len(prompt) - 1)  # the newest is for the draft
        self._head.rollback(max(0, known - 1))
        self._catch_up(prompt, keep=1)

    def propose(self, context: Sequence[int], k: int, sampling: Sampling, random: Randomness) -> Draft:
        """Nothing after a single token, of which there are no features yet."""
        read = self._target.cached
        if read == 0:
            return empty_draft(self._setup.device, self.name)
        self._catch_up(context, keep=_IN_ONE_PASS)
        begin = self._head.cached
        self._ids.read(context)
        ids = self._ids.ids
        u, temperature = draft_numbers(random, sampling, len(context), k, self._setup.vocab, self._head.device)
        stop = self._setup.draft_limits.early_stop_on(self._head.device, self.name)
        eager = self._head.device.type == "cpu"
        choice = DraftChoice(sampling, len(ids), eager, confident=stop is not None)
        with masked(choice, self._setup.grammar, self._head.device, ids) as sampler:
            drawn = self._head.unroll(
                self._target.features(begin, read),
                self._tokens(context[begin + 1 :]),
                u[:, ids] if sampling.coupled else u,
                temperature,
                sampler,
                ids,
                stop,
                self._ids.rows,
            )
        self._head.rollback(read)
        self._head.known.note(context, len(context))
        raw, raw_ids = drawn.raw, ids
        if raw is not None and not eager:  # or a verdict would be recorded anew for each id of the context
            raw, raw_ids = told_in_one_size(raw, self._ids)
        return Draft(drawn.tokens, self._widened(drawn.rows), self.name, raw, raw_ids)

    def observe(self, draft: Draft, verdict: Verdict) -> None:
        """Slots of drafted tokens were forgotten at once: all of them stood on own states."""

    def acceptance_along(
        self, context: Sequence[int], p: Sequence[float], k: int, sampling: Sampling
    ) -> list[list[float]]:
        """A draft begun at each place and led along the text: what the head says depends on how many of its own states it
        has read."""
        begin, rows = len(context) - len(p), list[list[float]]()
        self._head.rollback(0)
        self._ids.forget()
        self._feed(context, begin - 2)
        for at in range(begin, len(context)):
            if at < 2:
                rows.append([])
                continue
            self._ids.read(context, at)
            said = TextSampler([self._ids.column(token) for token in context[at : at + k]], p[at - begin :], sampling)
            steps = torch.zeros(min(k, len(context) - at), device=self._head.device)
            newest = self._tokens([context[at - 1]])
            features, ids = self._target.features(at - 2, at - 1), self._ids
            self._head.unroll(features, newest, steps, steps[0], said, ids.ids, said.stop, ids.rows)
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
            self._head.known.note(context, stop + 1)

    def _tokens(self, tokens: Sequence[int]) -> Tensor:
        return upload(torch.tensor(tokens), self._head.device)

    def _widened(self, rows: Tensor | None) -> Tensor | None:
        if rows is None:
            return None
        wide = torch.zeros(rows.shape[0], self._setup.vocab, dtype=rows.dtype, device=rows.device)
        return wide.index_copy_(1, self._ids.ids, rows)


def told_in_one_size(raw: Tensor, ids: ContextIds) -> tuple[Tensor, Tensor]:
    """Rows over a head's columns, and their ids, with room for all that the context may bring: of probability 0."""
    more = len(ids.own) + MOST - len(ids.ids) if ids.grows else 0
    return pad(raw, (0, more)), torch.cat([ids.ids, ids.ids[:1].expand(more)])


def build(argument: str, setup: DraftSetup) -> HeadDrafter:
    """`head:NAME`: a folder as `specdec distill` writes it, or an EAGLE-3 head, a folder or a hub id. Raises PairIncompatible
    for another target than it was made for."""
    path = builtin_draft() if argument == "builtin" else setup.find(argument)
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
    if setup.draft_quantize in ("int8", "int4") and target.decoder.kernels is None:
        refuse_packing(setup.draft_quantize, str(target.decoder.dtype).removeprefix("torch."), setup.device)
    try:
        taps = draft.taps_on(target.decoder.shape.hidden, target.decoder.shape.layers)
        forward, numbers = _forward(draft, weights, taps, target.decoder, setup)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ModelUnavailable(f"the draft in {path} is damaged: {error}", "fetch or distill it again") from error
    if draft.layers.counted == "guessed":
        setup.notes.append(
            f"{argument} does not say which layers of the target it reads: {', '.join(map(str, taps))} are taken, as EAGLE's "
            "own code does; if few of its first tokens are accepted, it was made for others"
        )
    try:
        target.tap(taps)
    except Unsupported as reason:
        raise PairIncompatible(
            f"the target cannot serve the draft {path}: {reason}", "choose one draft head"
        ) from reason
    setup.models[argument] = ModelInfo(
        name=argument,
        model_type=draft.config["model_type"],
        parameters=sum(tensor.numel() for tensor in weights.values()),
        vocab=len(draft.ids),
        context=target.limit,
        runtime=target.name,
        dtype=str(target.decoder.dtype).removeprefix("torch."),
        weights=forward.forms,
        weight_bytes=int(numbers * _BYTES.get(forward.forms, 4)),
    )
    more = None if "head.weight" in weights else _output_rows(target.decoder)
    ids = ContextIds(draft.ids.to(setup.device), more)
    return HeadDrafter(HeadRuntime(forward, target.capacity), target, ids, setup, argument)


def _output_rows(decoder: Decoder) -> Callable[[Tensor], Tensor]:
    def rows(ids: Tensor) -> Tensor:
        return decoder.output_rows(ids).to(decoder.dtype)

    return rows


def _forward(
    draft: DraftFolder, weights: Mapping[str, Tensor], taps: Sequence[int], decoder: Decoder, setup: DraftSetup
) -> tuple[HeadForward, int]:
    """The head on its target, and how many numbers a step reads. Raises PairIncompatible, and for damage what `build`
    catches."""
    shape, form = head_shape(draft.config), draft.form
    own = Embedding(weights["embedding.weight"].to(decoder.device)) if "embedding.weight" in weights else None
    width = decoder.shape.hidden
    if own is None and shape.hidden != width:
        raise ValueError(f"it is {shape.hidden} numbers wide, its target {width}, and it has no embeddings of its own")
    if own is not None and tuple(weights["embedding.weight"].shape) != (setup.vocab, shape.hidden):
        raise ValueError(f"its embeddings are {tuple(weights['embedding.weight'].shape)}")
    check_weights(weights, shape, draft.config["intermediate_size"], len(taps) + form.final, form, width)
    rows = weights["head.weight"] if "head.weight" in weights else setup.output_rows(draft.ids)
    # Beside a packed target a dense head would be the dearer part: 1.9 ms a step against 1.2 in 4 bits.
    packed = setup.draft_quantize == "auto" and "int4" in decoder.forms
    forward = HeadForward(
        shape,
        weights,
        decoder.embedding if own is None else own,
        rows,
        decoder.dtype,
        setup.device,
        "int4" if packed else setup.draft_quantize,
        kernels=decoder.kernels,
        form=form,
    )
    read = sum(t.numel() for name, t in weights.items() if name not in ("embedding.weight", "head.weight"))
    return forward, read + rows.numel()


_BYTES = {"int4": 0.625, "int8": 1.0, "bfloat16": 2, "float16": 2}
"""A number; in 4 bits with a scale and an offset for each group of 32."""
_IN_ONE_PASS = 64
"""Slots behind that still go into a draft's first pass instead of passes of their own."""
_CHUNK = 512
