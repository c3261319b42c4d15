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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from platformdirs import user_config_path

from specdec_cli.options import Placement
from specdec_engine.errors import UsageError, reason
from specdec_engine.record.files import replace_file

NAME = "config.toml"


@dataclass(frozen=True, slots=True)
class Profile:
    """What was found best for a target."""

    target: str
    draft: str
    k: int | Literal["auto"]
    sampled: bool
    """Whether at a temperature above 0: what is accepted then is another matter."""
    placement: Mapping[str, str] = field(default_factory=dict)
    """Options of where and how the models ran that were typed: elsewhere it holds for nothing."""

    @property
    def said(self) -> str:
        """What it sets, and for which runs."""
        typed = "".join(f", --{name.replace('_', '-')} {value}" for name, value in self.placement.items())
        when = "above 0" if self.sampled else "0"
        return f"draft {self.draft}, k {self.k} for {self.target}, temperature {when}{typed}"

    def lines(self) -> list[str]:
        """As TOML."""
        import tomlkit

        return ["[[profiles]]", *tomlkit.dumps(self.block()).splitlines()]

    def block(self) -> dict[str, Any]:
        """As it stands in the file."""
        return {"target": self.target, "draft": self.draft, "k": self.k, "sampled": self.sampled, **self.placement}


def path() -> Path:
    return user_config_path("specdec") / NAME


def profiles() -> list[Profile]:
    """In the file's order; none where there is no file. Raises UsageError for one that cannot be understood."""
    try:
        read = tomllib.loads(path().read_text("utf-8"))
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{path()} cannot be read: {reason(error)}", "correct it, or delete it") from error
    blocks = read.get("profiles", [])
    if not isinstance(blocks, list):
        raise UsageError(f"{path()}: profiles is no list of tables", "write each as [[profiles]]")
    return [_profile(block, number) for number, block in enumerate(blocks, 1)]


def of_block(block: Mapping[str, Any]) -> Profile:
    """From one that is right."""
    return _profile(block, 1)


def _profile(block: Any, number: int) -> Profile:
    where = f"{path()}, profile {number}"
    if not isinstance(block, Mapping) or not {"target", "draft", "k"} <= block.keys():
        raise UsageError(f"{where} lacks target, draft or k", "specdec tune prints how one looks")
    target, draft, k, sampled = block["target"], block["draft"], block["k"], block.get("sampled", False)
    placement = {name: block[name] for name in PLACEMENT if name in block}
    whole = isinstance(k, int) and not isinstance(k, bool) and k >= 0
    kinds = [(name, block[name], isinstance(block[name], str), "text") for name in ("target", "draft", *placement)]
    kinds += [("k", k, whole or k == "auto", "a number or auto")]
    kinds += [("sampled", sampled, isinstance(sampled, bool), "true or false")]
    for name, value, right, wanted in kinds:
        if not right:
            raise UsageError(f"{where} has {name} = {value!r}", f"write {wanted}")
    return Profile(target, draft, k, sampled, placement)


PLACEMENT = ("device", "device_map", "dtype", "runtime", "quantize", "draft_quantize")


def placement_of(where: Placement) -> dict[str, str]:
    """What was typed of it."""
    usual = Placement()
    return {n: str(getattr(where, n)) for n in PLACEMENT if getattr(where, n) != getattr(usual, n)}


@dataclass(frozen=True, slots=True)
class Setting:
    """Draft and k of a run, and where they come from."""

    draft: str | None
    k: str
    said: str = ""
    """What a profile says of them; empty where none does."""


def chosen(target: str, draft: str | None, k: str | None, sampled: bool, where: Placement) -> Setting:
    """What was typed; where draft or k were not, what the last profile for such runs says."""
    profile = None if draft is not None and k is not None else _found(target, draft, sampled, placement_of(where))
    if profile is None or (profile.k == 0 and k is not None):  # whoever names a k does not want plain decoding
        return Setting(draft, k or "auto")
    taken = ([f"draft {profile.draft}"] if draft is None else []) + ([f"k {profile.k}"] if k is None else [])
    said = f"{', '.join(taken)}: from the profile for {target} in {path()}"
    return Setting(draft or profile.draft, k or str(profile.k), said)


def _found(target: str, draft: str | None, sampled: bool, placement: Mapping[str, str]) -> Profile | None:
    fitting = (p for p in reversed(profiles()) if (p.target, p.sampled, p.placement) == (target, sampled, placement))
    return next((p for p in fitting if draft is None or p.draft == draft), None)


def save(profile: Profile) -> Path:
    """Put it into the file in place of an older one for the same target; all else stays as it is. Raises UsageError where it
    cannot be written."""
    import tomlkit

    profiles()  # a file that is damaged is not overwritten
    file = path()
    try:
        document = tomlkit.parse(file.read_text("utf-8")) if file.exists() else tomlkit.document()
        if document and "profiles" not in document:
            document.add(tomlkit.nl())
        blocks = document.setdefault("profiles", tomlkit.aot())
        if not isinstance(blocks, tomlkit.items.AoT):
            raise UsageError(f"{file} has its profiles in one line", "write each as a table of its own: [[profiles]]")
        same = (profile.target, profile.sampled, profile.placement)
        known = [i for i, p in enumerate(profiles()) if (p.target, p.sampled, p.placement) == same]
        block = tomlkit.table()
        block.update(profile.block())
        for i in reversed(known):
            del blocks[i]
        blocks.append(block)
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file, tomlkit.dumps(document).encode())
    except OSError as error:
        raise UsageError(f"{file} cannot be written: {error.strerror}", "write the block there yourself") from error
    return file
