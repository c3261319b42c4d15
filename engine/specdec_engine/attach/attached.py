"""A running server as a source of events: which one it is, and a run at it."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from specdec_engine.attach.asked import Asked, Engine, Prompt, Texts
from specdec_engine.attach.http import Answer, Server, refused, understood
from specdec_engine.attach.llama_cpp import LlamaCpp
from specdec_engine.attach.sglang import SGLang
from specdec_engine.attach.vllm import Vllm
from specdec_engine.errors import GenerationFailed, ServerUnavailable, UsageError
from specdec_engine.record.events import Event, Started


def attach(url: str, draft: str | None = None, k: int | None = None) -> Attached:
    """Look which server is there. draft, k: what it drafts with, where that is known.

    Raises UsageError for what is no address, and ServerUnavailable for one that is none of vLLM, SGLang and llama.cpp, that
    does not answer, or that wants a key.
    """
    server = Server(url)
    with understood(server.url, ServerUnavailable):
        engine = _recognised(server)
    if draft is not None:
        engine.about = replace(engine.about, draft=draft, k=engine.about.k or k)
    return Attached(server, engine)


def _recognised(server: Server) -> Engine:
    answers = list[Answer]()
    for path in ("/props", "/version", "/server_info"):
        answer = server.get(path)
        value = answer.json()
        if answer.status == 200 and isinstance(value, dict):
            if path == "/props" and "default_generation_settings" in value:
                return LlamaCpp(server, value)
            if path == "/version" and isinstance(value.get("version"), str):
                return Vllm(server, value["version"])
            if path == "/server_info" and "internal_states" in value:
                return SGLang(server, value)
        if answer.status in (401, 403, 503) or 300 <= answer.status < 400:
            raise refused(answer, server.url, path)
        answers.append(answer)
    raise ServerUnavailable(
        f"{server.url} is none of vLLM, SGLang and llama.cpp's server: /props, /version and /server_info say "
        f"{', '.join(str(answer.status) for answer in answers)}",
        "give the address of one of them, without a path",
    )


@dataclass(slots=True)
class Run:
    """One run at a server, about to begin."""

    engine: Engine
    url: str
    prompt: Prompt
    asked: Asked
    texts: Texts = field(default_factory=Texts)

    def events(self) -> Iterator[Event]:
        """As our own engine's. Closing it ends the run at the server. Raises ServerUnavailable, and GenerationFailed for a
        run that breaks off."""
        about, sampling = self.engine.about, self.asked.sampling
        settings: dict[str, Any] = {
            "target": about.target,
            "draft": about.draft,
            "k": about.k,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
            "max_tokens": self.asked.max_tokens,
            "stop": list(self.asked.stop),
        }
        environment = {"server": self.engine.name, "server_version": about.version, "url": self.url}
        yield Started(self.prompt.ids, settings, self.asked.seed, environment, self.engine.name)
        with understood(self.url, GenerationFailed):
            yield from self.engine.run(self.prompt, self.asked, self.texts)

    def name(self, token: int) -> str:
        """A token's own text, as the server has it."""
        if token not in self.texts.names:
            self.engine.learn(token, self.texts)
            self.texts.names.setdefault(token, f"⟨{token}⟩")
        return self.texts.names[token]


@dataclass(frozen=True, slots=True)
class Attached:
    """A server that was recognised."""

    server: Server
    engine: Engine

    def unseeded(self, asked: Asked) -> Asked:
        """The same without its seed, where the engine takes none."""
        return asked if self.engine.seeds else replace(asked, seed=None)

    def begin(self, asked: Asked) -> Run:
        """Have a prompt made into tokens. A sampled run without a seed is given one. Raises UsageError for one that does not
        fit, and ServerUnavailable."""
        if not asked.text.strip():
            raise UsageError("the prompt is empty", "say something")
        with understood(self.server.url, ServerUnavailable):
            prompt = self.engine.prompt(asked)
        most = self.engine.about.context
        if most is not None and len(prompt.ids) >= most:
            raise UsageError(
                f"the prompt has {len(prompt.ids):,} tokens, and the server takes {most:,} at most",
                "shorten it, or start the server with a longer context",
            )
        if not self.engine.seeds and asked.seed is not None:
            raise UsageError(f"{self.engine.name} takes no seed", "leave out --seed")
        if asked.seed is None and self.engine.seeds:
            asked = replace(asked, seed=secrets.randbits(31))
        return Run(self.engine, self.server.url, prompt, asked, Texts(names=dict(prompt.names)))
