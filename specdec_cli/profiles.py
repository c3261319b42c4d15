"""Profiles in the user's config file: what `tune` found for a target, taken up by `generate` and `watch`.

[[profiles]]
target = "org/target"
draft = "ngram,org/draft"
k = 4
sampled = false
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from platformdirs import user_config_path

from specdec_engine.errors import UsageError

NAME = "config.toml"


@dataclass(frozen=True, slots=True)
class Profile:
    """What was found best for a target."""

    target: str
    draft: str
    k: int | Literal["auto"]
    sampled: bool
    """Whether at a temperature above 0: what is accepted then is another matter."""

    def lines(self) -> list[str]:
        """As TOML."""
        import tomlkit

        return ["[[profiles]]", *tomlkit.dumps(self.block()).splitlines()]

    def block(self) -> dict[str, Any]:
        """As it stands in the file."""
        return {"target": self.target, "draft": self.draft, "k": self.k, "sampled": self.sampled}


def path() -> Path:
    return user_config_path("specdec") / NAME


def profiles() -> list[Profile]:
    """In the file's order; none where there is no file. Raises UsageError for one that cannot be understood."""
    try:
        read = tomllib.loads(path().read_text("utf-8"))
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{path()} cannot be read: {error}", "correct it, or delete it") from error
    blocks = read.get("profiles", [])
    if not isinstance(blocks, list):
        raise UsageError(f"{path()}: profiles is no list of tables", "write each as [[profiles]]")
    return [_profile(block, number) for number, block in enumerate(blocks, 1)]


def _profile(block: Any, number: int) -> Profile:
    where = f"{path()}, profile {number}"
    if not isinstance(block, Mapping) or not {"target", "draft", "k"} <= block.keys():
        raise UsageError(f"{where} lacks target, draft or k", "specdec tune prints how one looks")
    target, draft, k, sampled = (block["target"], block["draft"], block["k"], block.get("sampled", False))
    whole = isinstance(k, int) and not isinstance(k, bool) and k >= 0
    if not (
        isinstance(target, str) and isinstance(draft, str) and isinstance(sampled, bool) and (whole or k == "auto")
    ):
        raise UsageError(
            f"{where} has a value of another kind than it should", "k is a number or auto, sampled a boolean"
        )
    return Profile(target, draft, k, sampled)


def found_for(target: str, draft: str | None, sampled: bool) -> Profile | None:
    """The last profile for this target, and this draft if one is named."""
    fitting = (p for p in reversed(profiles()) if p.target == target and p.sampled == sampled)
    return next((p for p in fitting if draft is None or p.draft == draft), None)


@dataclass(frozen=True, slots=True)
class Setting:
    """Draft and k of a run, and the profile that they come from where they were not typed."""

    draft: str | None
    k: str
    profile: Profile | None = None

    @property
    def said(self) -> str:
        """Where it comes from; empty where nothing did."""
        if self.profile is None:
            return ""
        return f"draft {self.draft}, k {self.k}, as the profile for {self.profile.target} in {path()} says"


def chosen(target: str, draft: str | None, k: str | None, sampled: bool) -> Setting:
    """What was typed; where draft or k were not, what a profile says."""
    profile = None if draft is not None and k is not None else found_for(target, draft, sampled)
    if profile is None:
        return Setting(draft, k or "auto")
    return Setting(draft or profile.draft, k or str(profile.k), profile)


def save(profile: Profile) -> Path:
    """Put it into the file in place of an older one for the same target; all else stays as it is. Raises UsageError where it
    cannot be written."""
    import tomlkit

    profiles()  # a file that is damaged is not overwritten
    file = path()
    try:
        document = tomlkit.parse(file.read_text("utf-8")) if file.exists() else tomlkit.document()
        blocks = document.setdefault("profiles", tomlkit.aot())
        known = [
            i
            for i, b in enumerate(blocks)
            if b["target"] == profile.target and b.get("sampled", False) == profile.sampled
        ]
        block = tomlkit.table()
        block.update(profile.block())
        for i in reversed(known):
            del blocks[i]
        blocks.append(block)
        file.parent.mkdir(parents=True, exist_ok=True)
        beside = file.with_name(file.name + ".part")
        beside.write_text(tomlkit.dumps(document), "utf-8")
        beside.replace(file)
    except OSError as error:
        raise UsageError(f"{file} cannot be written: {error.strerror}", "write the block there yourself") from error
    return file
