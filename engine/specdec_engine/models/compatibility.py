"""Do these two models belong together? Answered from configs and tokenizers, before any weights are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from specdec_engine.core.registry import entry_of
from specdec_engine.errors import OutOfMemory, PairIncompatible
from specdec_engine.models.draft_files import DraftFolder, builtin_draft, read_draft
from specdec_engine.models.hub_cache import cached_models, drafts_for
from specdec_engine.models.loading import Candidate, find_model
from specdec_engine.models.options import LoadOptions
from specdec_engine.models.tokenizers import compare_tokenizers
from specdec_engine.record.cycle_stats import expected_emitted
from specdec_engine.runtime.context_limit import context_limit
from specdec_engine.runtime.shape import Unsupported
from specdec_engine.system.memory import free_bytes, gib

Level = Literal["ok", "note", "open", "bad"]
"""open: what cannot be known before it is tried."""
_SHOWN = 3
_ALPHAS = (0.5, 0.8)
"""Acceptance of a weak and of an apt draft: what published pairs lie between on mixed text."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    about: str
    level: Level
    said: str


@dataclass(frozen=True, slots=True)
class Fit:
    """What was found about a pair."""

    target: str
    draft: str
    findings: tuple[Finding, ...]
    figures: Mapping[str, Any]

    @property
    def certain(self) -> bool:
        """Whether all that decides it could be looked at."""
        return all(finding.level != "open" for finding in self.findings)

    @property
    def fits(self) -> bool:
        return all(finding.level != "bad" for finding in self.findings)


def check(target: str, draft: str, options: LoadOptions) -> Fit:
    """draft: as after `--draft`; of several, joined by commas, each is looked at. Raises what loading them would:
    ModelUnavailable for a model that cannot be had, OutOfMemory for one that cannot fit, alone or beside the other."""
    ours = find_model(target, options).rehearsed()
    findings, figures = [*_going_back(ours, draft)], dict[str, Any]()
    for name in draft.split(","):
        found, of_model = _member(ours, name, options)
        findings += found
        figures |= of_model
    return Fit(target, draft, (*_running(ours), *findings), figures)


def _going_back(ours: Candidate, draft: str) -> Iterator[Finding]:
    """Whether what it has read of a draft can be taken back."""
    if draft != "none" and ours.plain_only:
        yield Finding("cache", "bad", f"{ours.plain_only}; choose --draft none")


def _member(ours: Candidate, draft: str, options: LoadOptions) -> tuple[list[Finding], dict[str, Any]]:
    entry, argument = entry_of(draft), draft.partition(":")[2]
    if entry is not None and entry.package:
        said = f"{draft} is {entry.package}'s, which alone can say what it needs; it is loaded by generate"
        return [Finding("draft", "open", said)], {}
    if entry is not None and entry.name == "self":
        return [_own_layers(ours, argument)], {}
    if entry is not None and entry.name not in ("model", "head"):
        return [Finding("draft", "ok", f"{draft} drafts without a model of its own, and fits every target")], {}
    draft = draft if entry is None else argument  # model:NAME and head:FOLDER
    head = builtin_draft() if draft == "builtin" else Path(draft)
    made = read_draft(head) if head.is_dir() else None
    if made is not None and made.kind == "head":
        return [_head(ours, draft, made)], {}
    theirs = find_model(draft, options.for_draft()).rehearsed()
    if theirs.plain_only:
        return [Finding("cache", "bad", theirs.plain_only)], {}
    figures = _figures(ours, theirs)
    findings = [
        *_tokens(ours, theirs),
        *_ends(ours, theirs),
        *_templates(ours.tokenizer, theirs.tokenizer),
        *_contexts(ours, theirs),
        *_running(theirs),
        *_memory(ours, theirs),
        *_promise(figures),
    ]
    if any(f.level == "bad" for f in findings):
        findings += _others(ours)
    return findings, figures


def _own_layers(ours: Candidate, argument: str) -> Finding:
    layers = int(getattr(ours.config.get_text_config(), "num_hidden_layers", 0))
    if isinstance(ours.shape, Unsupported):
        return Finding("draft", "bad", f"self:{argument} needs the lean runtime, and {ours.shape}")
    if not argument.isdigit() or not 0 < int(argument) < layers:
        return Finding("draft", "bad", f"self:{argument} is not from self:1 to self:{layers - 1}")
    return Finding("draft", "ok", f"the first {argument} of the target's own {layers} layers")


def _head(ours: Candidate, name: str, made: DraftFolder) -> Finding:
    try:
        made.check(ours.tokenizer, ours.name, ours.vocab)
    except PairIncompatible as error:
        return Finding("draft", "bad", error.message)
    if isinstance(ours.shape, Unsupported):
        return Finding("draft", "bad", f"a draft head needs the lean or the graph runtime, and {ours.shape}")
    said = f"{name} is a head made for this target; it drafts {len(made.ids):,} of its {ours.vocab:,} tokens"
    return Finding("draft", "ok", said)


def _tokens(ours: Candidate, theirs: Candidate) -> Iterator[Finding]:
    made = read_draft(theirs.path)
    if made is not None:
        try:
            made.check(ours.tokenizer, ours.name, ours.vocab)
        except PairIncompatible as error:
            yield Finding("tokenizer", "bad", error.message)
        else:
            yield Finding("tokenizer", "ok", f"drafts {len(made.ids):,} of the target's {ours.vocab:,} tokens")
        return
    found = compare_tokenizers(ours.tokenizer, theirs.tokenizer)
    for kind, level, differing in (("tokens", "bad", found.ordinary), ("special tokens", "note", found.special)):
        if differing:
            first = "; ".join(f"{d.id} is {d.target!r} and {d.draft!r}" for d in differing[:_SHOWN])
            yield Finding("tokenizer", level, f"{len(differing)} {kind} differ: {first}")  # type: ignore[arg-type]
    if not found.ordinary:
        padded = "" if ours.vocab == theirs.vocab else f"; {ours.vocab:,} and {theirs.vocab:,} rows, which is padding"
        yield Finding("tokenizer", "ok", f"every id means the same to both{padded}")


def _ends(ours: Candidate, theirs: Candidate) -> Iterator[Finding]:
    a, b = ours.stop_ids, theirs.stop_ids
    if a == b:
        yield Finding("end of text", "ok", f"ids {_ids(a)} end it for both")
    else:
        said = f"the target ends at {_ids(a)}, the draft at {_ids(b)}: the last tokens of a turn are accepted less"
        yield Finding("end of text", "note", said)


def _ids(ids: frozenset[int]) -> str:
    return ", ".join(map(str, sorted(ids))) or "none"


def _templates(ours: Any, theirs: Any) -> Iterator[Finding]:
    a, b = (getattr(t, "chat_template", None) for t in (ours, theirs))
    thinks = [isinstance(t, str) and ("enable_thinking" in t or "<think>" in t) for t in (a, b)]
    if thinks[0] != thinks[1]:
        who = "target" if thinks[0] else "draft"
        yield Finding(
            "chat template", "note", f"only the {who}'s knows of thinking: the other will not follow such text"
        )
    elif a == b:
        yield Finding("chat template", "ok", "the same" if a else "neither has one")
    else:
        yield Finding("chat template", "note", "they differ; the target's is used, and the draft sees that")


def _contexts(ours: Candidate, theirs: Candidate) -> Iterator[Finding]:
    a, b = context_limit(ours.config), context_limit(theirs.config)
    if a is not None and b is not None and b < a:
        yield Finding("context", "note", f"the target takes {a:,} tokens, the draft {b:,}: past that it drafts nothing")
    else:
        yield Finding("context", "ok", f"{a:,} tokens" if a is not None else "no limit is known")


def _running(model: Candidate) -> Iterator[Finding]:
    computed = f"{model.arithmetic.name} on {model.device}"
    computed += f", of a {model.text_of} the text part alone" if model.text_of else ""
    if isinstance(model.shape, Unsupported):
        more = "" if model.rollback is None or not model.rollback.remark else f"; {model.rollback.remark}"
        yield Finding("runtime", "note", f"{model.name}: generic, {computed}, as {model.shape}{more}")
    else:
        runtime = "graph" if model.device.type == "cuda" else "lean"
        yield Finding("runtime", "ok", f"{model.name}: {runtime}, {computed}")


def _memory(ours: Candidate, theirs: Candidate) -> Iterator[Finding]:
    need, free = ours.need.total + theirs.need.total, free_bytes(ours.device)
    parts = f"{gib(ours.need.total)} and {gib(theirs.need.total)} with {ours.options.tokens:,} tokens of cache"
    if free is None:
        yield Finding("memory", "ok", f"they need {parts}; what is free is not known")
    elif need > free:
        raise OutOfMemory(
            f"the two need {parts}, and {gib(free)} are free on {ours.device}",
            "choose a smaller draft, or fewer --tokens",
        )
    else:
        yield Finding("memory", "ok", f"they need {parts}; {gib(free)} are free on {ours.device}")


def _figures(ours: Candidate, theirs: Candidate) -> dict[str, Any]:
    """c between what reading the weights costs and what layers cost, and the speedup at the best k for each."""
    layers = [int(getattr(m.config.get_text_config(), "num_hidden_layers", 1)) for m in (ours, theirs)]
    sizes = [m.need.weights for m in (ours, theirs)]
    low, high = sorted((sizes[1] / sizes[0], layers[1] / layers[0]))
    return {
        "c": [low, high],
        "speedup": [max(_speedup(a, c, k) for k in range(9)) for a, c in zip(_ALPHAS, (high, low), strict=True)],
        "weight_bytes": sizes,
    }


def _speedup(alpha: float, c: float, k: int) -> float:
    """With passes that cost the same for a few tokens as for one."""
    return expected_emitted(alpha, k) / (k * c + 1)


def _promise(figures: Mapping[str, Any]) -> Iterator[Finding]:
    (low, high), (least, most) = figures["c"], figures["speedup"]
    level: Level = "ok" if least > 1.05 else "note"
    said = (
        f"a draft step costs {low:.2f} to {high:.2f} of a target pass; at best {least:.2f}× if half of the tokens are "
        f"accepted, {most:.2f}× if four in five are; `specdec bench` measures it"
    )
    yield Finding("speed", level, said)


def _others(ours: Candidate) -> list[Finding]:
    models = cached_models()
    target = next((m for m in models if m.name == ours.name), None)
    names = [m.name for m in drafts_for(target, models)] if target is not None else []
    said = f"cached models that would: {', '.join(names[:_SHOWN])}; and ngram, which always does"
    return [Finding("instead", "note", said if names else "ngram, a lookup, fits every target")]
