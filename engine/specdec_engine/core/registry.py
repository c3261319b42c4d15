"""The ways of drafting, by name: help, hints, `check`, `tune`, launch lines and docs are made from this list. No torch.

Another package adds its own by the entry-point group `specdec.drafters`, whose values are functions `build(argument,
setup)`. They stand in the same list, with the package's name and what it says of itself; none of their code is imported
for that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

GROUP = "specdec.drafters"


@dataclass(frozen=True, slots=True)
class ServerNames:
    """What servers call a way of drafting."""

    vllm: str
    sglang: str
    llama_cpp: str


@dataclass(frozen=True, slots=True)
class DrafterEntry:
    """One way of drafting."""

    name: str
    """`NAME` or `NAME:ARGUMENT` after --draft."""
    forms: tuple[str, ...]
    """How it is written there; words in capitals stand for the user's own."""
    about: str
    """What it drafts, in a few words."""
    build: str
    """`module:function`, a function of an argument and a `DraftSetup` that gives a `Drafter`."""
    lookup: bool = False
    """Whether it reads no weights and costs next to nothing: it fits every target, and `tune` tries it for everybody, alone
    and before each model."""
    servers: ServerNames | None = None
    """None for what no server can do."""
    package: str = ""
    """Which has it; empty for ours."""


_LOOKUP = ServerNames("ngram", "NGRAM", "ngram-simple")
"""They have no suffix tree that is like ours; their own lookup is the nearest."""
OURS = (
    DrafterEntry(
        "model",
        ("ORG/DRAFT", "FOLDER", "FILE.gguf"),
        "a smaller model",
        "specdec_engine.drafters.model:build",
        servers=ServerNames("draft_model", "STANDALONE", "draft-simple"),
    ),
    DrafterEntry("head", ("builtin", "FOLDER"), "a head that distill made", "specdec_engine.drafters.head:build"),
    DrafterEntry(
        "ngram",
        ("ngram", "ngram:N"),
        "what followed the same tokens before",
        "specdec_engine.drafters.ngram:build",
        lookup=True,
        servers=_LOOKUP,
    ),
    DrafterEntry(
        "suffix",
        ("suffix",),
        "what most often followed them",
        "specdec_engine.drafters.suffix:build",
        lookup=True,
        servers=_LOOKUP,
    ),
    DrafterEntry("self", ("self:N",), "the target's first N layers", "specdec_engine.drafters.self_layers:build"),
    DrafterEntry("none", ("none",), "plain decoding", "specdec_engine.drafters.none:build"),
)


@cache
def foreign() -> tuple[DrafterEntry, ...]:
    """Those of other packages."""
    from importlib.metadata import entry_points  # 60 ms, which a command without a draft does without

    ours, found = {entry.name for entry in OURS}, list[DrafterEntry]()
    for point in entry_points(group=GROUP):
        package = "another package" if point.dist is None else point.dist.name
        summary = None if point.dist is None else point.dist.metadata["Summary"]
        about = f"{summary or 'not described'}, by {package}"
        if point.name not in ours:
            found.append(DrafterEntry(point.name, (point.name,), about, point.value, package=package))
    return tuple(found)


def drafters() -> Mapping[str, DrafterEntry]:
    """All, by name: ours, then those of other packages. A name of ours stays ours."""
    return {entry.name: entry for entry in (*OURS, *foreign())}


def entry_of(spec: str) -> DrafterEntry | None:
    """Whose name a draft begins with, as `ngram:5` does; None for the name of a model."""
    return drafters().get(spec.partition(":")[0].strip())


def is_lookup(spec: str) -> bool:
    """Whether it costs next to nothing, fits every target, and may go before a model."""
    return (entry := entry_of(spec)) is not None and entry.lookup


def words() -> list[str]:
    """What can be typed as it stands, without an argument left out: for hints about what was mistyped."""
    forms = (form for entry in drafters().values() for form in entry.forms)
    return list(dict.fromkeys(form.partition(":")[0] for form in forms if not form[0].isupper()))


def described(entry: DrafterEntry) -> str:
    """Its forms and what it drafts, for help."""
    return f"{', '.join(entry.forms)} ({entry.about})"
