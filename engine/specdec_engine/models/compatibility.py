"""Do these two models belong together? Answered from configs and tokenizers, before any weights are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from specdec_engine.core.registry import entry_of, levels_of, members_of
from specdec_engine.errors import OutOfMemory, PairIncompatible
from specdec_engine.models.draft_files import found_draft, read_draft
from specdec_engine.models.draft_folder import DraftFolder
from specdec_engine.models.hub_cache import cached_models, drafts_for
from specdec_engine.models.kinds import mask_of
from specdec_engine.models.loading import Candidate, find_model
from specdec_engine.models.mtp_files import check_module, find_mtp
from specdec_engine.models.options import LoadOptions
from specdec_engine.models.pretrained import load_config
from specdec_engine.models.tokenizers import Difference, compare_tokenizers, shared_share
from specdec_engine.models.translation import Translation
from specdec_engine.record.cycle_stats import expected_emitted
from specdec_engine.runtime.assistant import layers_read
from specdec_engine.runtime.context_limit import context_limit
from specdec_engine.runtime.shape import Unsupported, shape_of
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


Kind = Literal["lookup", "layers", "head", "ids", "text", "package"]
"""A lookup, the target's own first layers, a head that was made for it, a smaller model with its tokens, one with other
tokens, which fits by its text, or another package's."""


@dataclass(frozen=True, slots=True)
class Looked:
    """What was found of one draft."""

    kind: Kind
    findings: list[Finding]
    figures: dict[str, Any] = field(default_factory=dict)
    in_one_pass: bool = False
    """It drafts all its tokens at once."""


def check(target: str, draft: str, options: LoadOptions) -> Fit:
    """draft: as after `--draft`; of several, joined by commas, each is looked at. Raises what loading them would:
    ModelUnavailable for a model that cannot be had, OutOfMemory for one that cannot fit, alone or beside the other."""
    ours = find_model(target, options).rehearsed()
    findings, figures = [*_going_back(ours, draft)], dict[str, Any]()
    for name in members_of(draft)[1] if not findings else ():
        found = member(ours, name, options)
        findings += found.findings
        figures |= found.figures
    return Fit(target, draft, (*_running(ours), *findings), figures)


def _going_back(ours: Candidate, draft: str) -> Iterator[Finding]:
    """Whether what it has read of a draft can be taken back."""
    if draft != "none" and ours.plain_only:
        yield Finding("cache", "bad", f"{ours.plain_only}; choose --draft none")


def member(ours: Candidate, draft: str, options: LoadOptions) -> Looked:
    """Look at one draft of those that `--draft` joins. Raises what `check` does."""
    if (levels := levels_of(draft)) is not None:
        return _two_levels(ours, *levels, options)
    entry, argument = entry_of(draft), draft.partition(":")[2]
    if entry is not None and entry.package:
        said = f"{draft} is {entry.package}'s, which alone can say what it needs; it is loaded by generate"
        return Looked("package", [Finding("draft", "open", said)])
    if entry is not None and entry.name == "self":
        return Looked("layers", [_own_layers(ours, argument)])
    if entry is not None and entry.name == "mtp":
        return Looked("head", [_mtp(ours, argument, options)])
    if entry is not None and entry.name not in ("model", "head", "assistant"):
        said = f"{draft} drafts without a model of its own, and fits every target"
        return Looked("lookup", [Finding("draft", "ok", said)])
    draft = draft if entry is None else argument  # model:NAME and head:FOLDER
    made = read_draft(found_draft(draft, options))
    if made is not None and made.kind != "model":
        return Looked("head", (_head if made.kind == "head" else _assistant)(ours, draft, made))
    theirs = find_model(draft, options.for_draft()).rehearsed()
    if theirs.plain_only:
        return Looked("ids", [Finding("cache", "bad", theirs.plain_only)])
    tokens, drafted_for_one = _tokens(ours, theirs)
    by_text = drafted_for_one is not None
    in_one_pass = not by_text and mask_of(theirs.config, draft) is not None
    figures = _figures(ours, theirs, drafted_for_one or 1.0, in_one_pass)
    findings = [
        *tokens,
        *([] if by_text else _ends(ours, theirs)),
        *_templates(ours.tokenizer, theirs.tokenizer),
        *_contexts(ours, theirs),
        *([Finding("draft", "ok", _IN_ONE_PASS)] if in_one_pass else []),
        *_running(theirs),
        *_memory(ours, theirs),
        *_promise(figures),
    ]
    if any(f.level == "bad" for f in findings):
        findings += _others(ours)
    return Looked("text" if by_text else "ids", findings, figures, in_one_pass)


_IN_ONE_PASS = "it fills in masked places (PARD): a whole draft takes one of its passes"


def _two_levels(ours: Candidate, lower: str, upper: str, options: LoadOptions) -> Looked:
    """`ngram+MODEL`, as `drafters` builds it."""
    if not upper:
        return Looked("lookup", [Finding("draft", "bad", f"{lower}+ names no model to draft for")])
    if not lower.startswith("ngram"):
        return Looked("lookup", [Finding("draft", "bad", f"{lower} cannot draft for another draft, as ngram can")])
    found = member(ours, upper, options)
    if found.kind in ("ids", "layers") and not found.in_one_pass:
        return found
    said = f"{lower} drafts for models with the target's tokens, token by token, and {upper} is none"
    return replace(found, findings=[*found.findings, Finding("draft", "bad", said)])


def _own_layers(ours: Candidate, argument: str) -> Finding:
    layers = int(getattr(ours.config.get_text_config(), "num_hidden_layers", 0))
    if isinstance(ours.shape, Unsupported):
        return Finding("draft", "bad", f"self:{argument} needs the lean runtime, and {ours.shape}")
    if not argument.isdigit() or not 0 < int(argument) < layers:
        return Finding("draft", "bad", f"self:{argument} is not from self:1 to self:{layers - 1}")
    return Finding("draft", "ok", f"the first {argument} of the target's own {layers} layers")


def _mtp(ours: Candidate, argument: str, options: LoadOptions) -> Finding:
    found = find_mtp(ours.path)
    if argument:
        return Finding("draft", "bad", f"mtp:{argument} is no draft: mtp alone is the target's own module")
    if found is None:
        return Finding("draft", "bad", "its checkpoint has no module for multi-token prediction (MTP)")
    check_module(found, ours.name)
    lean = not isinstance(ours.shape, Unsupported)
    recorded = ours.device.type == "cuda" and ours.options.runtime != "generic"
    if found.is_mimo and not lean:
        return Finding("draft", "bad", f"its MTP module needs the lean or the graph runtime, and {ours.shape}")
    if not found.is_mimo and (lean or recorded):
        return Finding("draft", "bad", "its MTP module needs the generic runtime: add --runtime generic")
    if not found.is_mimo and (options.device_map is not None or options.draft_quantize in ("int8", "int4")):
        return Finding(
            "draft", "bad", "its MTP module runs as it is and on one device: no --device-map, no --draft-quantize"
        )
    several = f", the first of {found.modules}" if found.modules > 1 else ""
    return Finding("draft", "ok", f"the MTP module of its own checkpoint{several}; it drafts all {ours.vocab:,} tokens")


def _head(ours: Candidate, name: str, made: DraftFolder) -> list[Finding]:
    found = list[Finding]()
    try:
        made.check(ours.tokenizer, ours.name, ours.vocab)
        if made.made_for and made.made_for.lower() != ours.name.lower():
            found.append(
                Finding("draft", "note", f"it was made for {made.made_for}: another target's head drafts badly")
            )
        text = ours.config.get_text_config()
        taps = made.taps_on(int(text.hidden_size), int(text.num_hidden_layers))
    except PairIncompatible as error:
        return [Finding("draft", "bad", f"{error.message}; {error.hint}")]
    if isinstance(ours.shape, Unsupported):
        return [Finding("draft", "bad", f"a draft head needs the lean or the graph runtime, and {ours.shape}")]
    whose = f"made for {made.made_for}" if made.made_for else "made for this target" if made.tokenizer else "EAGLE-3's"
    said = f"{name} is a head, {whose}; it drafts {len(made.ids):,} of its {ours.vocab:,} tokens"
    reads = f"it reads what the layers {', '.join(map(str, taps))} of the target give, counted from 0"
    if made.layers.counted == "guessed":
        reads += ", as EAGLE's own code does, for it does not say"
    found.insert(0, Finding("draft", "ok", said))
    return [*found, Finding("layers", "note" if made.layers.counted == "guessed" else "ok", reads)] if taps else found


def _assistant(ours: Candidate, name: str, made: DraftFolder) -> list[Finding]:
    try:
        made.check(ours.tokenizer, ours.name, ours.vocab)
        made.check_width(int(ours.config.get_text_config().hidden_size))
        layers_read(load_config(made.path, trust_remote_code=False).get_text_config(), ours.config.get_text_config())
    except PairIncompatible as error:
        return [Finding("draft", "bad", f"{error.message}; {error.hint}")]
    except Unsupported as reason:
        return [Finding("draft", "bad", f"the assistant {name} does not fit: {reason}")]
    if not isinstance(ours.shape, Unsupported) or (ours.device.type == "cuda" and ours.options.runtime != "generic"):
        return [Finding("draft", "bad", "an assistant of Gemma 4 needs the generic runtime: add --runtime generic")]
    return [
        Finding("draft", "ok", f"{name} is an assistant of Gemma 4; it reads what the target keeps, and nothing again")
    ]


def _tokens(ours: Candidate, theirs: Candidate) -> tuple[list[Finding], float | None]:
    """What their ids mean to each other; and for a draft that fits by its text, how many of its tokens it drafts for one."""
    made = read_draft(theirs.path)
    if made is not None:
        try:
            made.check(ours.tokenizer, ours.name, ours.vocab)
        except PairIncompatible as error:
            return [Finding("tokenizer", "bad", error.message)], None
        return [Finding("tokenizer", "ok", f"drafts {len(made.ids):,} of the target's {ours.vocab:,} tokens")], None
    found = compare_tokenizers(ours.tokenizer, theirs.tokenizer)
    if found.ordinary:
        return _by_text(ours, theirs, found.ordinary)
    padded = "" if ours.vocab == theirs.vocab else f"; {ours.vocab:,} and {theirs.vocab:,} rows, which is padding"
    same = Finding("tokenizer", "ok", f"every id means the same to both{padded}")
    if not found.special:
        return [same], None
    said = f"{len(found.special)} special tokens differ: {_shown(found.special)}"
    return [Finding("tokenizer", "note", said), same], None


def _by_text(ours: Candidate, theirs: Candidate, differing: Sequence[Difference]) -> tuple[list[Finding], float | None]:
    what = f"{len(differing):,} tokens differ: {_shown(differing)}"
    try:
        carried = Translation(ours.tokenizer, theirs.tokenizer, theirs.name)
    except PairIncompatible as error:
        return [Finding("tokenizer", "bad", f"{what}; {error.message}")], None
    said = (
        f"{what}. It fits by text: what it drafts is proposed in the target's tokens, of which it has "
        f"{shared_share(ours.tokenizer, theirs.tokenizer):.0%} itself; it drafts about {carried.for_one:.1f} of its own "
        "for one of them"
    )
    return [Finding("tokenizer", "note", said)], carried.for_one


def _shown(differing: Sequence[Difference]) -> str:
    return "; ".join(f"{d.id} is {d.target!r} and {d.draft!r}" for d in differing[:_SHOWN])


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


def _figures(ours: Candidate, theirs: Candidate, drafted_for_one: float, in_one_pass: bool) -> dict[str, Any]:
    """c between what reading the weights costs and what layers cost, for a token of the target's or for a whole draft in one
    pass, and the speedup at the best k for each."""
    layers = [int(getattr(m.config.get_text_config(), "num_hidden_layers", 1)) for m in (ours, theirs)]
    sizes = [_read_by_a_token(m) for m in (ours, theirs)]
    low, high = sorted(drafted_for_one * ratio for ratio in (sizes[1] / sizes[0], layers[1] / layers[0]))
    return {
        "c": [low, high],
        "speedup": list(band(low, high, in_one_pass)),
        "weight_bytes": [m.need.weights for m in (ours, theirs)],
    }


def _read_by_a_token(model: Candidate) -> float:
    """Bytes of its weights: of a mixture of experts the few that a token takes, on whatever runtime."""
    try:
        return model.need.weights * shape_of(model.config).share_read
    except Unsupported:  # of a kind whose tensors are not known here
        return model.need.weights


def band(low: float, high: float, in_one_pass: bool = False) -> tuple[float, float]:
    """The speedup at the best k: of a weak draft at the higher cost, and of an apt one at the lower."""
    least, most = (
        max(_speedup(a, c / max(k, 1) if in_one_pass else c, k) for k in range(9))
        for a, c in zip(_ALPHAS, (high, low), strict=True)
    )
    return least, most


def _speedup(alpha: float, c: float, k: int) -> float:
    """With passes that cost the same for a few tokens as for one."""
    return expected_emitted(alpha, k) / (k * c + 1)


def _promise(figures: Mapping[str, Any]) -> Iterator[Finding]:
    (low, high), (least, most) = figures["c"], figures["speedup"]
    level: Level = "ok" if least > 1.05 else "note"
    said = f"a draft step costs {low:.2f} to {high:.2f} of a target pass; "
    if most < 1.005:
        said += "too dear to be faster even if four in five tokens are accepted"
    else:
        said += f"at best {least:.2f}× if half of the tokens are accepted, {most:.2f}× if four in five are; "
        said += "`specdec bench` measures it"
    yield Finding("speed", level, said)


def _others(ours: Candidate) -> list[Finding]:
    models = cached_models()
    target = next((m for m in models if m.name == ours.name), None)
    names = [m.name for m in drafts_for(target, models)] if target is not None else []
    said = f"cached models that would: {', '.join(names[:_SHOWN])}; and ngram, which always does"
    return [Finding("instead", "note", said if names else "ngram, a lookup, fits every target")]
