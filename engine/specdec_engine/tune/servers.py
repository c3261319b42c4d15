"""The same setting for servers: a launch line each for vLLM, SGLang and llama.cpp, and what each asks for first. No torch.

Written for vLLM 0.32, SGLang 0.5.23 and llama.cpp of October 2026; vLLM's and llama.cpp's are held against their own parsers
(`tests/servers`).
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

BUILTIN_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"


@dataclass(frozen=True, slots=True)
class Launch:
    """How one server is told the same."""

    server: str
    command: tuple[str, ...] | None
    """None where it cannot do that at all."""
    needs: tuple[str, ...]
    """What must hold first, or why it cannot."""

    @property
    def line(self) -> str | None:
        return None if self.command is None else shlex.join(self.command)


@dataclass(frozen=True, slots=True)
class _Served:
    """What servers know how to do, of a setting of ours."""

    target: str
    model: str | None
    """A draft model that they can load."""
    k: int
    sampled: bool
    left_out: tuple[str, ...]


def launches(target: str, draft: str, k: int, sampled: bool, gguf: str | None = None) -> list[Launch]:
    """For a draft as after --draft. Of a cascade servers take one member: its model where they can load it, else the lookup.
    gguf: the target's file, where it is one; sampled: whether requests are drawn at a temperature."""
    members = [member.strip() for member in draft.split(",") if member.strip() != "none"]
    if not members or not k:
        return []
    models = [m for m in members if _is_model(m)]
    known = [*models, *(m for m in members if m.partition(":")[0] in ("ngram", "suffix"))]
    if not known:
        reason = (f"{draft} runs in specdec only; no server loads it",)
        return [Launch(server, None, reason) for server in ("vLLM", "SGLang", "llama.cpp")]
    left_out = tuple(member for member in members if member != known[0])
    served = _Served(target, models[0] if models else None, k, sampled, left_out)
    return [_vllm(served), _sglang(served), _llama_cpp(served, gguf)]


def _own(member: str) -> bool:
    """Drafts of ours that no server knows: the built-in head, the target's own layers."""
    return member == "builtin" or member.partition(":")[0] in ("self", "head")


def _is_model(member: str) -> bool:
    return not _own(member) and member.partition(":")[0] not in ("ngram", "suffix")


def _vllm(s: _Served) -> Launch:
    config: dict[str, object] = {"method": "ngram", "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    needs = ["vLLM 0.32"]
    if s.model is not None:
        config = {"method": "draft_model", "model": s.model}
        if s.sampled:  # its default draft is greedy, whose acceptance at a temperature is another
            config |= {"draft_sample_method": "probabilistic"}
        needs.append("equal vocabulary sizes of target and draft")
    config |= {"num_speculative_tokens": s.k}
    command = ("vllm", "serve", _hub(s.target), "--speculative-config", json.dumps(config))
    return Launch("vLLM", command, (*needs, *_said(s)))


def _sglang(s: _Served) -> Launch:
    command = ["python", "-m", "sglang.launch_server", "--model-path", _hub(s.target)]
    if s.model is None:
        command += ["--speculative-algorithm", "NGRAM", "--speculative-num-draft-tokens", str(s.k)]
    else:
        command += ["--speculative-algorithm", "STANDALONE", "--speculative-draft-model-path", s.model]
        command += ["--speculative-num-steps", str(s.k), "--speculative-eagle-topk", "1"]
        command += ["--speculative-num-draft-tokens", str(s.k + 1)]
    needs = ("SGLang 0.5.23, and a GPU", "this line was not tried against its parser")
    return Launch("SGLang", tuple(command), (*needs, *_said(s)))


def _llama_cpp(s: _Served, gguf: str | None) -> Launch:
    command = ["llama-server", "-m", gguf or "TARGET.gguf"]
    needs = ["llama.cpp of 2026"]
    if gguf is None:
        needs.append(f"{_hub(s.target)} as a GGUF")
    if s.model is None:
        command += ["--spec-type", "ngram-simple", "--spec-ngram-simple-size-n", "3"]
        command += ["--spec-ngram-simple-size-m", str(s.k)]
    else:
        command += ["-md", s.model if s.model.endswith(".gguf") else "DRAFT.gguf", "--spec-type", "draft-simple"]
        command += ["--spec-draft-n-max", str(s.k)]
        needs.append("vocabularies within 128 tokens, with the same text for each")
        if not s.model.endswith(".gguf"):
            needs.append(f"{s.model} as a GGUF")
    return Launch("llama.cpp", tuple(command), (*needs, *_said(s)))


def _said(s: _Served) -> Sequence[str]:
    return [f"without {', '.join(s.left_out)}, which it does not know or cannot combine"] if s.left_out else []


def _hub(target: str) -> str:
    return BUILTIN_HUB_ID if target == "builtin" else target
