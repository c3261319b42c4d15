"""The ways of drafting, by name: help, hints, `check`, `tune`, launch lines and docs are made from this list. No torch.

Another package adds its own by the entry-point group `specdec.drafters`, whose values are functions `build(argument,
setup)`. They stand in the same list, with the package's name and what it says of itself; none of their code is imported
for that.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache

from specdec_engine.errors import UsageError
from specdec_engine.record.text import printable

GROUP = "specdec.drafters"


@dataclass(frozen=True, slots=True)
class ServerNames:
    """Names that servers have for a way of drafting."""

    vllm: str
    sglang: str
    llama_cpp: str


@dataclass(frozen=True, slots=True)
class DrafterEntry:
    """One way of drafting."""

    name: str
    """`NAME` or `NAME:ARGUMENT` after --draft; models and heads are found by their own names, which `forms` say."""
    forms: tuple[str, ...]
    """How it is written there; words in capitals stand for the user's own."""
    about: str
    """A few words on where its tokens come from."""
    build: str
    """`module:function`, a function of an argument and a `DraftSetup` that gives a `Drafter`."""
    lookup: bool = False
    """Whether it reads no weights and costs next to nothing: it fits every target, and `tune` tries it for everybody, alone
    and before each model."""
    servers: ServerNames | None = None
    """Their names for it; None where no server can do it."""
    package: str = ""
    """The package that provides it; empty for ours."""


OURS = (
    DrafterEntry(
        "model",
        ("ORG/DRAFT", "FOLDER", "FILE.gguf", "ngram+ORG/DRAFT"),
        "a smaller model, of whatever tokenizer; with ngram+ a lookup drafts for it, if its tokens are the target's",
        "specdec_engine.drafters.model:build",
        servers=ServerNames("draft_model", "STANDALONE", "draft-simple"),
    ),
    DrafterEntry(
        "head",
        ("builtin", "FOLDER", "ORG/HEAD"),
        "a head that distill made, or EAGLE-3's; builtin, for the built-in target",
        "specdec_engine.drafters.head:build",
    ),
    DrafterEntry(
        "assistant",
        ("ORG/ASSISTANT",),
        "an assistant of Gemma 4",
        "specdec_engine.drafters.assistant:build",
    ),
    DrafterEntry(
        "mtp",
        ("mtp",),
        "the target's own module for multi-token prediction, where its checkpoint has one",
        "specdec_engine.drafters.mtp:build",
        servers=ServerNames("mtp", "NEXTN", "draft-mtp"),
    ),
    DrafterEntry(
        "ngram",
        ("ngram", "ngram:N"),
        "what followed the same tokens before, N at most",
        "specdec_engine.drafters.ngram:build",
        lookup=True,
        servers=ServerNames("ngram", "NGRAM", "ngram-simple"),
    ),
    DrafterEntry(
        "suffix",
        ("suffix",),
        "what most often followed them",
        "specdec_engine.drafters.suffix:build",
        lookup=True,
        servers=ServerNames("suffix", "NGRAM", "ngram-simple"),
    ),
    DrafterEntry("self", ("self:N",), "the target's first N layers", "specdec_engine.drafters.self_layers:build"),
    DrafterEntry("none", ("none",), "plain decoding", "specdec_engine.drafters.none:build"),
)


@cache
def foreign() -> tuple[DrafterEntry, ...]:
    """List the drafters of other packages. Words of ours stay ours; of two packages with one name the first has it, which
    its sentence says; a name that could not be typed after --draft is left out."""
    from importlib.metadata import entry_points  # 60 ms, which a command without a draft does without

    found = dict[str, DrafterEntry]()
    for point in entry_points(group=GROUP):
        package = point.dist.name if point.dist is not None else None
        if point.name in _RESERVED or not _NAME.fullmatch(point.name):
            continue
        if (first := found.get(point.name)) is not None:
            about = f"{first.about} ({package or 'another package'} has one of this name, too)"
            found[point.name] = replace(first, about=about)
            continue
        summary = None if point.dist is None else str(point.dist.metadata.json.get("summary") or "")
        about = f"{printable(summary or 'not described')}, by {package or 'a package without a name'}"
        build = point.value.partition("[")[0].strip()  # extras are for pip
        found[point.name] = DrafterEntry(point.name, (point.name,), about, build, package=package or "another package")
    return tuple(found.values())


_NAME = re.compile(r"[\w.-]+")
_MODELS = ("model", "head", "assistant")
"""Entries that are found by a model's name and seldom by their own."""
_RESERVED = {"builtin", *(entry.name for entry in OURS)}


def drafters() -> Mapping[str, DrafterEntry]:
    """All, by name: ours, then those of other packages. A name of ours stays ours."""
    return {entry.name: entry for entry in (*OURS, *foreign())}


def entry_of(spec: str) -> DrafterEntry | None:
    """The entry named by the part before `:`, as in `ngram:5`; None for the name of a model, and for two levels."""
    if levels_of(spec) is not None:
        return None
    name, colon, _ = spec.partition(":")
    return None if name.strip() in _MODELS and not colon else drafters().get(name.strip())


TREE = "tree:"
"""Before several drafts: they are merged into a token tree."""


def members_of(spec: str) -> tuple[bool, list[str]]:
    """Say whether the drafts that `--draft` names are merged into a tree, and their names. Raises UsageError for a tree of
    fewer than two, and for one inside another draft."""
    merged = spec.strip().startswith(TREE)
    names = [name.strip() for name in spec.strip().removeprefix(TREE).split(",")]
    names = [name for name in names if name]
    if any(name.startswith(TREE) for name in names):
        raise UsageError(f"in the draft {spec!r} {TREE} does not stand in front", f"for example {TREE}ngram,builtin")
    if merged and len(names) < 2:
        raise UsageError(
            f"the draft {spec!r} is to merge several drafts, and names {len(names)}", f"for example {TREE}ngram,builtin"
        )
    return merged, names


def levels_of(spec: str) -> tuple[str, str] | None:
    """Split `ngram+MODEL` into the lookup and the model that it drafts for; None for a draft of one level."""
    lower, plus, upper = spec.partition("+")
    return (lower.strip(), upper.strip()) if plus and is_lookup(lower) else None


def is_lookup(spec: str) -> bool:
    """Say whether a draft costs next to nothing, fits every target, and may go before a model."""
    return (entry := entry_of(spec)) is not None and entry.lookup


def words() -> list[str]:
    """List what a mistyped draft may have meant."""
    return ["builtin", *(name for name in drafters() if name not in _MODELS)]


def described(entry: DrafterEntry) -> str:
    """Its forms and what it drafts, for help."""
    return f"{', '.join(entry.forms)} ({entry.about})"
