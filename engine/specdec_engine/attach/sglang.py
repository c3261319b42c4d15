"""SGLang's server as a source, by its documentation and source (0.5.23): it needs a GPU, and was not run here.

`/generate` streams running totals: the growth of `completion_tokens` is what one step emitted. What it drafted is nominal
(`spec_num_proposed_drafts` counts k for every step), so cycles are inferred, and so are the totals at the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from time import perf_counter
from typing import Any

from specdec_engine.attach.asked import About, Asked, CycleLog, Prompt, Texts, detokenized, sampled
from specdec_engine.attach.http import Server, refused, told_of
from specdec_engine.errors import GenerationFailed, UsageError
from specdec_engine.record.events import Event, FinishReason, TokenId


class SGLang:
    """See `Engine`."""

    name = "SGLang"
    seeds = False

    def __init__(self, server: Server, info: dict[str, Any]) -> None:
        """info: what it says under /server_info."""
        self._server = server
        steps = info.get("speculative_num_draft_tokens")
        self.about = About(
            target=str(info.get("served_model_name") or info.get("model_path") or "?"),
            draft=str(info.get("speculative_draft_model_path") or info.get("speculative_algorithm") or "none"),
            version=str(info["version"]) if info.get("version") else None,
            k=steps - 1 if isinstance(steps, int) and steps > 1 else None,
            context=info.get("context_length") if isinstance(info.get("context_length"), int) else None,
        )

    def prompt(self, asked: Asked) -> Prompt:
        chat = asked.chat is not False
        if asked.system and not chat:
            raise UsageError("--system needs a chat template", "leave out --raw, or put it into the prompt")
        body = {"model": self.about.target, **({"messages": asked.messages} if chat else {"prompt": asked.text})}
        answer = self._server.post("/tokenize", body)
        value = answer.json()
        ids = value.get("tokens") if isinstance(value, dict) else None
        if answer.status != 200 or not isinstance(ids, list) or not all(isinstance(i, int) and i >= 0 for i in ids):
            raise refused(answer, self._server.url, "/tokenize")
        return Prompt(tuple(ids), {})

    def run(self, prompt: Prompt, asked: Asked, texts: Texts) -> Iterator[Event]:
        drawn = sampled(asked.sampling)
        drawn["top_k"] = drawn["top_k"] or -1  # 0 keeps no token there
        params = {"max_new_tokens": asked.max_tokens, "stop": list(asked.stop), "stream_interval": 1, **drawn}
        request = {"input_ids": list(prompt.ids), "sampling_params": params, "stream": True}
        log, begun = CycleLog(len(prompt.ids), asked.max_tokens), perf_counter()
        seen, said, last, prefill = 0, "", 0.0, None
        ended: FinishReason | None = None
        with self._server.stream("/generate", request) as lines:
            for line in lines:
                value = line.value
                if value is None:
                    break
                if not isinstance(value, dict) or "error" in value:
                    raise GenerationFailed(f"{self._server.url} says: {told_of(value)}", "see the server's own log")
                meta = value.get("meta_info") or {}
                total, text = int(meta.get("completion_tokens") or 0), str(value.get("text") or "")
                new, reason = total - seen, meta.get("finish_reason")
                if isinstance(reason, dict):
                    ended = "length" if reason.get("type") == "length" else "stop"
                if new <= 0:
                    continue
                ids = _newest(value.get("output_ids"), new)
                texts.take(ids, text[len(said) :] if text.startswith(said) else text, line.at_s)
                at = line.at_s - begun
                first, prefill = prefill is None, at if prefill is None else prefill
                for part in filter(None, ([ids[:1], ids[1:]] if first else _steps(ids, self.about.draft == "none"))):
                    yield log.cycle(
                        drafted=0 if first and part == ids[:1] else self.about.k or 0,
                        accepted=len(part) - 1,
                        ids=part,
                        seconds=0.0 if first else (at - last) * len(part) / new,
                        exact=False,
                        ended=ended,
                    )
                seen, said, last = total, text, at
        if ended is None:
            raise GenerationFailed(
                f"{self._server.url} ended the stream before the text ended", "what came until then is valid"
            )
        yield log.finished(ended, prefill)

    def learn(self, token: int, texts: Texts) -> None:
        found = detokenized(self._server, {"model": self.about.target, "tokens": [token]}, "text")
        if found is not None:
            texts.names[token] = found


def _steps(ids: list[TokenId], plain: bool) -> list[list[TokenId]]:
    """One step, or, without speculation, one for each token."""
    return [[token] for token in ids] if plain else [ids]


def _newest(ids: Any, new: int) -> list[TokenId]:
    """Of all ids so far, or of those that are new."""
    found = [token if isinstance(token, int) and token >= 0 else None for token in ids or ()][-new:]
    return [*[None] * (new - len(found)), *found]
