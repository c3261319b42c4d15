"""How a draft chooses its next token from its logits."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec_engine.constrain.matching import Walk
from specdec_engine.core.cycle_types import Sampling
from specdec_engine.core.randomness import Randomness
from specdec_engine.core.transfer import upload
from specdec_engine.drafters.base import RunGrammar
from specdec_engine.runtime import SampledToken, TokenSampler, native
from specdec_engine.runtime.likely import Likely
from specdec_engine.verify.coupling import choice, gumbel_noise
from specdec_engine.verify.sampling import LOWEST, draw, draw_on_host, warp, wide


@dataclass(frozen=True, slots=True)
class DraftChoice:
    """The likeliest token at temperature 0; otherwise one drawn under the run's sampling settings (`runtime.TokenSampler`).

    With Gumbel coupling `u` is not a number but the [V] noise of the token's position.
    """

    sampling: Sampling
    vocab: int
    """Only ids below this may be chosen."""
    eager: bool = False
    """On the host, and outside anything that is recorded."""
    confident: bool = True
    """True where somebody asks how sure the draft is; at temperature 0 that costs a softmax over the vocabulary."""

    @property
    def key(self) -> Hashable:
        sampling = self.sampling
        return (sampling.greedy, sampling.coupled, *sampling.filters, sampling.raw, self.vocab, self.confident)

    @property
    def plain(self) -> float | None:
        sampling = self.sampling
        if not self.eager or sampling.raw:
            return None
        if sampling.greedy:
            return 0.0
        return None if sampling.coupled or sampling.filtered else max(sampling.temperature, LOWEST)

    def __call__(self, logits: Tensor, u: Tensor, temperature: Tensor) -> SampledToken:
        logits = logits[:, : self.vocab]
        raw = logits.float().softmax(-1) if self.sampling.raw else None
        if self.sampling.greedy:
            if self.eager and raw is None and (two := two_likeliest(logits[0])) is not None:
                return SampledToken(torch.tensor([two[0].place]), None, two[0].share)
            if not self.confident:
                return SampledToken(logits.argmax(-1), None, None, raw)
            most, at = (logits.float().softmax(-1) if raw is None else raw).max(-1)
            return SampledToken(at, None, most, raw)
        row = warp(logits, self.sampling, None if self.eager else temperature)
        sure = row.amax() if self.confident else None
        if self.sampling.coupled:
            return SampledToken(choice(row, u[None, : self.vocab]), None, sure, raw)
        drawn = torch.tensor(draw_on_host(row[0], float(u))) if self.eager else draw(row[0], u)
        return SampledToken(drawn[None], row, sure, raw)


class TwoLikeliest:
    """The likeliest token, and how likely the second one was: a `TokenSampler` for one draft."""

    def __init__(self, vocab: int, raw: bool) -> None:
        """vocab: only ids below this may be chosen; raw: distributions are asked for."""
        self.vocab, self._raw = vocab, raw
        self.found: list[tuple[Likely, Likely]] = []
        """Each token, and the second; empty where our own kernels chose (`DraftTokens.likeliest`)."""

    @property
    def key(self) -> Hashable:
        return id(self)

    @property
    def plain(self) -> float | None:
        return None if self._raw else 0.0

    def __call__(self, logits: Tensor, u: Tensor, temperature: Tensor) -> SampledToken:
        logits = logits[:, : self.vocab]
        row = logits.float().softmax(-1) if self._raw else None
        first, second = two_likeliest(logits[0]) or _likely(logits[0])
        self.found.append((first, second))
        return SampledToken(torch.tensor([first.place]), None, first.share, row)


def two_likeliest(logits: Tensor) -> tuple[Likely, Likely] | None:  # [n]
    """Ask our own kernels, where a CPU has some and the numbers are theirs."""
    kernels = native.of_rows(logits)
    return None if kernels is None or len(logits) < 2 else kernels.likeliest(logits)


def _likely(logits: Tensor) -> tuple[Likely, Likely]:  # [n]
    shares, places = logits.float().softmax(-1).topk(2)
    first, second = map(Likely, places.tolist(), shares.tolist())
    return first, second


class MaskedChoice:
    """A draft's choice among what a grammar allows: q is masked and normalised, and that is what it is drawn from. A draft
    that has left the grammar, or has none of the tokens that are allowed, chooses freely."""

    plain: float | None = None

    def __init__(self, choice: DraftChoice | TwoLikeliest, walk: Walk, ids: Tensor | None) -> None:
        """ids [V']: the target's id of each of the draft's."""
        self._choice, self._walk, self._ids = choice, walk, ids

    @property
    def key(self) -> Hashable:
        return id(self)

    def __call__(self, logits: Tensor, u: Tensor, temperature: Tensor) -> SampledToken:
        logits, allowed = logits[:, : self._choice.vocab], self._walk.allowed()
        if allowed is not None:
            allowed = allowed[: logits.shape[1]] if self._ids is None else allowed[self._ids]
            logits = logits.masked_fill(~allowed, -torch.inf) if bool(allowed.any()) else logits
        found = self._choice(logits, u, temperature)
        token = int(found.token)
        self._walk.take(token if self._ids is None else int(self._ids[token]))
        return found


@contextmanager
def masked(
    choice: DraftChoice | TwoLikeliest, grammar: RunGrammar, device: torch.device, ids: Tensor | None = None
) -> Iterator[TokenSampler]:
    """The choice for one draft, by the run's grammar if there is one; on a device nothing is looked at, which would wait for
    each token."""
    if grammar.matching is None or device.type != "cpu":
        yield choice
        return
    with grammar.matching.ahead() as walk:
        yield MaskedChoice(choice, walk, ids)


def probabilities_of(logits: Tensor, said: Sequence[int], sampling: Sampling) -> list[float]:  # [n, V], [n] -> [n]
    """The probability of each token under its row; 0 for ids outside the vocabulary."""
    ids = upload(torch.tensor(said), logits.device)
    known = (ids >= 0) & (ids < logits.shape[-1])
    rows = warp(logits, sampling).gather(-1, ids.where(known, 0)[:, None])[:, 0]
    found: list[float] = rows.where(known, 0.0).tolist()
    return found


def acceptance_of_emitted(p: float, q: float) -> float:
    """The probability that a token which the target emitted was an accepted draft token: min(p, q) / p."""
    return min(1.0, q / p) if p > 0 else 0.0


class TextSampler:
    """Chooses what a text says, and notes each token's acceptance probability: a `TokenSampler` for one draft."""

    plain: float | None = None

    def __init__(self, tokens: Sequence[int], p: Sequence[float], sampling: Sampling) -> None:
        """tokens: the draft's ids of what is said, negative where it has none; p: what the target gives them."""
        self._tokens, self._p, self._sampling = tokens, p, sampling
        self.chances: list[float] = []
        self._reach = 1.0

    @property
    def key(self) -> Hashable:
        return id(self)

    def __call__(self, logits: Tensor, u: Tensor, temperature: Tensor) -> SampledToken:
        at = len(self.chances)
        token = self._tokens[at]
        self.chances.append(acceptance_of_emitted(self._p[at], probabilities_of(logits, [token], self._sampling)[0]))
        self._reach *= self.chances[-1]
        fed = upload(torch.tensor([max(token, 0)]), logits.device)
        return SampledToken(fed, None, torch.ones((), device=logits.device))

    def stop(self, confidence: float) -> bool:
        """Whether fewer than one draft in a thousand gets further."""
        return self._reach < 1e-3


def draft_numbers(
    random: Randomness, sampling: Sampling, position: int, k: int, vocab: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """What `Runtime.unroll` takes: [k] uniform numbers (with Gumbel coupling [k, vocab] noise), and the temperature []."""
    if sampling.coupled:
        temperature = upload(torch.tensor(sampling.temperature, dtype=wide(device)), device)
        return gumbel_noise(random.seed, position, k, vocab, device), temperature
    if sampling.greedy:  # nothing is drawn
        numbers = torch.zeros(k + 1, dtype=wide(device), device=device)
        return numbers[:k], numbers[k]
    uniforms = random.uniforms(position, "draft", k)
    numbers = upload(torch.tensor([*uniforms, sampling.temperature], dtype=wide(device)), device)
    return numbers[:k], numbers[k]
