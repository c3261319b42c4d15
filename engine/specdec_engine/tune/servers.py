"""The same setting for servers: a launch line each for vLLM, SGLang and llama.cpp, and what each asks for first. No torch.

Written for vLLM 0.32, SGLang 0.5.23 and llama.cpp of October 2026; vLLM's and llama.cpp's are held against their own parsers
(`tests/servers`).
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Container, Sequence
from dataclasses import dataclass

from specdec_engine.core.registry import ServerNames, drafters, entry_of, is_lookup, levels_of, members_of
from specdec_engine.drafters import is_checkpoint, is_eagle

BUILTIN_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"


@dataclass(frozen=True, slots=True)
class Launch:
    """How one server is told the same."""

    server: str
    command: tuple[str, ...]
    needs: tuple[str, ...]
    """What must hold first."""

    @property
    def line(self) -> str:
        return shlex.join(self.command)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What servers know how to do, of a setting of ours: one draft."""

    target: str
    draft: str
    """A checkpoint, a lookup, or `mtp`."""
    k: int
    sampled: bool
    """Whether requests are drawn at a temperature."""
    gguf: str | None = None
    """The target's file, where it is one."""
    left_out: tuple[str, ...] = ()
    """Members of a cascade that it does not have."""

    @property
    def model(self) -> str | None:
        """None for a lookup, and for the target's own module."""
        return self.draft if is_checkpoint(self.draft) or is_eagle(self.draft) else None

    @property
    def names(self) -> ServerNames:
        """What servers call this way of drafting. Raises ValueError for one that they do not have."""
        if is_eagle(self.draft):
            return _EAGLE
        entry = entry_of(self.draft) or drafters()["model"]
        if entry.servers is None:
            raise ValueError(f"no server is known to draft as {self.draft} does")
        return entry.servers

    @property
    def longest(self) -> str:
        """Tokens that are looked up at most."""
        name, _, argument = self.draft.partition(":")
        return argument if name == "ngram" and argument else "3"

    @property
    def notes(self) -> list[str]:
        """What is not the same."""
        own = ["with its own lookup, which is not quite ours"] if is_lookup(self.draft) else []
        return own + ([f"without {', '.join(self.left_out)}"] if self.left_out else [])


def served(draft: str, by_text: Container[str] = ()) -> tuple[str | None, tuple[str, ...]]:
    """Of a draft as after --draft the member that servers can run, a lookup last, and the others. by_text: those with another
    tokenizer than the target's, which they would take for the target's."""
    members = tuple(member for member in members_of(draft)[1] if member != "none")
    uppers = (levels[1] if (levels := levels_of(member)) is not None else member for member in members)
    models = (m for m in uppers if m not in by_text and (is_checkpoint(m) or is_eagle(m)))
    named = sorted(filter(_is_named, members), key=is_lookup)
    known = next(iter([*models, *named]), None)
    return known, tuple(member for member in members if member != known)


def _is_named(draft: str) -> bool:
    """Whether servers have a name for it."""
    return (entry := entry_of(draft)) is not None and entry.servers is not None


_EAGLE = ServerNames("eagle3", "EAGLE3", "draft-eagle3")
"""EAGLE-3 heads that others published; those that `distill` made no server reads."""


def launches(wanted: Wanted) -> list[Launch]:
    """A line for each server."""
    return [_vllm(wanted), _sglang(wanted), _llama_cpp(wanted)]


def _vllm(s: Wanted) -> Launch:
    config: dict[str, object] = {"method": s.names.vllm}
    needs = ["vLLM 0.32", *_folder(s)]
    if s.names.vllm == "ngram":
        config |= {"prompt_lookup_max": int(s.longest), "prompt_lookup_min": 1}
    if s.names.vllm == "suffix":
        needs.append("the package arctic-inference")
    if s.model is not None:
        config = {"method": s.names.vllm, "model": s.model}
        if (
            s.sampled and s.names is not _EAGLE
        ):  # its default draft is greedy, whose acceptance at a temperature is another
            config |= {"draft_sample_method": "probabilistic"}
        needs.append("equal vocabulary sizes of target and draft")
    config |= {"num_speculative_tokens": s.k}
    command = ("vllm", "serve", _hub(s.target), "--speculative-config", json.dumps(config))
    return Launch("vLLM", command, (*needs, *s.notes))


def _sglang(s: Wanted) -> Launch:
    command = ["python", "-m", "sglang.launch_server", "--model-path", _hub(s.target)]
    command += ["--speculative-algorithm", s.names.sglang]
    if is_lookup(s.draft):
        command += ["--speculative-num-draft-tokens", str(s.k)]
    else:
        command += ["--speculative-draft-model-path", s.model] if s.model is not None else []
        command += ["--speculative-num-steps", str(s.k), "--speculative-eagle-topk", "1"]
        command += ["--speculative-num-draft-tokens", str(s.k + 1)]
    needs = ("SGLang 0.5.23, and a GPU", "this line was not tried against its parser", *_folder(s))
    return Launch("SGLang", tuple(command), (*needs, *s.notes))


def _llama_cpp(s: Wanted) -> Launch:
    command = ["llama-server", "-m", s.gguf or "TARGET.gguf"]
    needs = ["llama.cpp of 2026"]
    if s.gguf is None:
        needs.append(f"{_hub(s.target)} as a GGUF")
    if is_lookup(s.draft):
        command += ["--spec-type", s.names.llama_cpp, "--spec-ngram-simple-size-n", s.longest]
        command += ["--spec-ngram-simple-size-m", str(s.k)]
    elif s.model is None:
        command += ["--spec-type", s.names.llama_cpp, "--spec-draft-n-max", str(s.k)]
        needs.append("a GGUF that was converted with its MTP layers")
    else:
        command += ["-md", s.model if s.model.endswith(".gguf") else "DRAFT.gguf", "--spec-type", s.names.llama_cpp]
        command += ["--spec-draft-n-max", str(s.k)]
        needs.append("vocabularies within 128 tokens, with the same text for each")
        if not s.model.endswith(".gguf"):
            needs.append(f"{s.model} as a GGUF")
    return Launch("llama.cpp", tuple(command), (*needs, *s.notes))


def _folder(s: Wanted) -> Sequence[str]:
    return ["the target as a folder or hub id, not as a GGUF"] if s.target.endswith(".gguf") else []


def _hub(target: str) -> str:
    return BUILTIN_HUB_ID if target == "builtin" else target
