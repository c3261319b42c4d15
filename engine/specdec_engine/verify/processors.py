"""What a checkpoint's generation_config.json asks for beside a temperature, as a function of the target's logits.

Each row is processed as transformers' `generate` processes it, with the tokens that come before that row: the context, and
the drafted tokens up to it. What comes out *is* the target's logits from there on, so every rule stays lossless; a draft's
own distribution is left as it is, and is none the less exact for being accepted less.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from reprlib import repr as brief
from typing import Any

import torch
from torch import Tensor

from specdec_engine.core.transfer import upload
from specdec_engine.errors import ModelUnavailable, UsageError

Process = Callable[[Tensor, Tensor], Tensor]
"""[n] ids before a row, [1, V] logits of it -> [1, V] logits."""


Processed = Callable[[Sequence[int], Tensor, Tensor], Tensor]
"""The context, [k] drafted tokens, [k + 1, V] logits -> [k + 1, V] logits, float32."""


@dataclass(frozen=True, slots=True)
class Asked:
    """The part of a generation config that changes logits, by transformers' names; as it is where it changes nothing."""

    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    min_length: int = 0
    min_new_tokens: int = 0
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    logit_bias: tuple[tuple[int, float], ...] = ()
    """What is added to the logits of tokens, by id; no config has it."""
    ends: tuple[int, ...] = ()
    """Its own end-of-text ids, which minimum lengths hold back: of a run's other ends it knows nothing."""

    def __bool__(self) -> bool:
        return bool(self.named())

    def named(self) -> dict[str, Any]:
        """Those that change something: without an end of its own there is nothing for a minimum length to hold back."""
        usual = Asked()
        nothing = {"ends"} if self.ends else {"ends", "min_length", "min_new_tokens"}
        named = (f.name for f in fields(self) if f.name not in nothing)
        return {name: value for name in named if (value := getattr(self, name)) != getattr(usual, name)}


def asked_by(config: Any, where: str, vocab: int) -> Asked:
    """What a transformers GenerationConfig, or none, does to logits of that size. Raises ModelUnavailable for a value of
    another kind or out of bounds."""
    found = dict[str, Any]()
    for field in fields(Asked)[:-1]:
        value = getattr(config, field.name, None)
        if value is None or value == []:
            continue
        try:
            found[field.name] = _taken(field.name, value, field.default, vocab)
        except (TypeError, ValueError) as error:
            why = str(error) or "which is no such value"
            raise ModelUnavailable(
                f"{where} says {field.name} = {brief(value)}, {why}", "correct that line, or take it out"
            ) from error
    ends = getattr(config, "eos_token_id", None)
    return Asked(**found, ends=() if ends is None else tuple(ends) if isinstance(ends, list) else (ends,))


_FOLLOWED_ELSEWHERE = frozenset(
    {
        "bos_token_id",
        "pad_token_id",
        "eos_token_id",
        "decoder_start_token_id",
        "do_sample",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "max_length",
        "max_new_tokens",
        "use_cache",
        "cache_implementation",
        "cache_config",
        "return_dict_in_generate",
        "output_attentions",
        "output_hidden_states",
        "output_scores",
        "output_logits",
        "num_return_sequences",
        "transformers_version",
        "_from_model_config",
        "early_stopping",
        "length_penalty",
        "num_beam_groups",
        "diversity_penalty",
        "renormalize_logits",
        "remove_invalid_values",
        "disable_compile",
    }
)
"""What a command line says instead (the sampling), what is done anyway, and what says nothing without beams."""


def changed(asked: Asked, penalties: Mapping[str, float], bias: Mapping[int, float], vocab: int) -> Asked:
    """The same with a user's penalties, by name, and logit bias, by id. Raises UsageError for values out of bounds."""
    if wrong := [i for i in bias if not 0 <= i < vocab]:
        raise UsageError(f"the logit bias of {wrong[0]} is of no token", f"ids go from 0 to {vocab - 1}")
    if not all(map(math.isfinite, (*penalties.values(), *bias.values()))):
        raise UsageError("a penalty or a bias is no finite number", "for example 1.1")
    if (repetition := penalties.get("repetition_penalty", 1.0)) <= 0:
        raise UsageError(f"repetition-penalty {repetition} is not above 0", "1 changes nothing, 1.1 is usual")
    biased = {"logit_bias": tuple(sorted(bias.items()))} if bias else {}
    return replace(asked, **penalties, **biased)  # type: ignore[arg-type]


def left_out_of(config: Any) -> list[str]:
    """Settings of a generation config that would change the text, and are not followed."""
    said = config.to_diff_dict() if config is not None else {}
    known = _FOLLOWED_ELSEWHERE | {field.name for field in fields(Asked)}
    return [f"{name} {brief(value)}" for name, value in said.items() if value is not None and name not in known]


def _taken(name: str, value: Any, usual: Any, vocab: int) -> Any:
    """The value as the field's default has it. Raises TypeError or ValueError."""
    if name == "bad_words_ids":
        return tuple(_ids(word, vocab) for word in value)
    if isinstance(usual, tuple):
        ids = tuple(
            i for i in _whole(value) if 0 <= i < vocab
        )  # others cannot come anyway, and `generate` passes over them
        if len(set(ids)) == vocab:
            raise ValueError("which is every token: none could come")
        return ids
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError
    if (
        not math.isfinite(value)
        or (name == "repetition_penalty" and value <= 0)
        or (isinstance(usual, int) and (value < 0 or value != int(value)))
    ):
        raise ValueError("which is out of bounds")
    return type(usual)(value)


def _ids(value: Any, vocab: int) -> tuple[int, ...]:
    """Raises ValueError for an id that is no token, as `generate` does."""
    ids = _whole(value)
    if outside := [i for i in ids if not 0 <= i < vocab]:
        raise ValueError(f"of which {outside[0]} is no token: there are {vocab:,}")
    return ids


def _whole(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list | tuple) or not value or not all(type(i) is int for i in value):
        raise TypeError
    return tuple(value)


def process(asked: Asked, prompt: int, device: torch.device) -> Processed:
    """For a run whose prompt has so many tokens."""
    steps = list(_steps(asked, prompt, device))

    def processed(context: Sequence[int], drafted: Tensor, logits: Tensor) -> Tensor:
        ids = torch.cat([upload(torch.tensor(context), device), drafted])
        rows = (_through(steps, ids[: len(context) + i], row[None]) for i, row in enumerate(logits.float()))
        return torch.cat(list(rows))

    return processed


def _through(steps: Sequence[Process], ids: Tensor, row: Tensor) -> Tensor:
    for step in steps:
        row = step(ids, row)
    return row


def _steps(asked: Asked, prompt: int, device: torch.device) -> list[Process]:
    """In the order in which `generate` has them; the two penalties that it has not follow vLLM, and come after its own."""
    from transformers.generation import logits_process as of

    made, ends = list[Any](), list(asked.ends)
    if asked.repetition_penalty != 1.0:
        made.append(of.RepetitionPenaltyLogitsProcessor(asked.repetition_penalty))
    if asked.no_repeat_ngram_size > 0:
        made.append(of.NoRepeatNGramLogitsProcessor(asked.no_repeat_ngram_size))
    if asked.bad_words_ids:
        words = [list(word) for word in asked.bad_words_ids]
        made.append(of.NoBadWordsLogitsProcessor(words, ends or None))
    if asked.min_length > 0 and ends:
        made.append(of.MinLengthLogitsProcessor(asked.min_length, ends, str(device)))
    if asked.min_new_tokens > 0 and ends:
        made.append(of.MinNewTokensLengthLogitsProcessor(prompt, asked.min_new_tokens, ends, str(device)))
    if asked.suppress_tokens:
        made.append(of.SuppressTokensLogitsProcessor(list(asked.suppress_tokens), str(device)))
    if asked.begin_suppress_tokens:
        begin = list(asked.begin_suppress_tokens)
        made.append(of.SuppressTokensAtBeginLogitsProcessor(begin, prompt, str(device)))
    steps: list[Process] = [lambda ids, row, step=step: step(ids[None], row) for step in made]  # type: ignore[misc]
    if asked.presence_penalty or asked.frequency_penalty:
        steps.append(lambda ids, row: _penalised(ids[prompt:], row, asked))
    if asked.logit_bias:
        biased, more = zip(*asked.logit_bias, strict=True)
        at, added = upload(torch.tensor(biased), device), upload(torch.tensor(more), device)
        steps.append(lambda ids, row: row.index_add(1, at, added[None].to(row.dtype)))
    return steps


def _penalised(emitted: Tensor, row: Tensor, asked: Asked) -> Tensor:
    """Less for every token that the answer has, and less again each time (OpenAI's API)."""
    counts = torch.zeros_like(row[0]).index_add_(0, emitted, torch.ones_like(emitted, dtype=row.dtype))
    return row - asked.frequency_penalty * counts - asked.presence_penalty * (counts > 0)
