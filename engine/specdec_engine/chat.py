"""A prompt as its target is to read it: the chat template's turns, and what ends them.

A template is a stranger's program. Whatever it does, the prompt's words are in what is sent, or it is an error; marks that
are typed into them are sent as text; and it has so many seconds.
"""

from __future__ import annotations

import ctypes
import json
import threading
from collections.abc import Callable, Sequence
from typing import Any

from specdec_engine.errors import UsageError, first_line

_SECONDS = 10.0
"""Far more than any template takes: the longest in use are done in a few ms."""
_MARK = "\ue000prompt\ue001"
"""Stands for the prompt while the template is rendered; characters of no script, that no text has and none trims."""
_ENDS = ("<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<|end_of_turn|>")
"""Special tokens that end a turn wherever they are known, whether a config says so or not (Llama 3 came without)."""

Turn = dict[str, Any]


def chat_ids(tokenizer: Any, prompt: str, system: str | None, history: Sequence[tuple[str, str]] = ()) -> list[int]:
    """The prompt as the next user turn of the tokenizer's chat template, the assistant's turn opened. history: what was said
    before, user and assistant. Raises UsageError for a template that fails, or leaves the prompt out."""
    typed = special_in(tokenizer, prompt)
    text = _rendered(tokenizer, _turns(_MARK if typed else prompt, system, history))
    if not typed:
        return _ids(tokenizer, text)
    before, found, after = text.partition(_MARK)
    if not found or _MARK in after:
        raise UsageError(
            f"the prompt holds {typed[0]}, and the chat template does not show where a user's words go",
            "take it out, or use --raw",
        )
    # In parts: the template's marks are marks, the prompt's are text, as of whoever wrote it.
    return [*_ids(tokenizer, before), *_ids(tokenizer, prompt, split_special_tokens=True), *_ids(tokenizer, after)]


def raw_ids(tokenizer: Any, text: str) -> list[int]:
    """The text as it is; marks are marks. With one beginning-of-text token, where the text begins with it by itself."""
    ids = list(tokenizer(text)["input_ids"])
    bos = getattr(tokenizer, "bos_token_id", None)
    twice = bos is not None and ids[:2] == [bos, bos] and text.startswith(str(tokenizer.bos_token))
    return ids[1:] if twice else ids


def special_in(tokenizer: Any, text: str) -> list[str]:
    """The tokenizer's special tokens that stand in a text, as it would find them."""
    return [token for token in _specials(tokenizer) if token and token in text]


def turn_ends(tokenizer: Any) -> frozenset[int]:
    """The special tokens that end an assistant's turn: by its template, and by their names."""
    known = _specials(tokenizer)
    ends = {known[name] for name in _ENDS if name in known}
    if getattr(tokenizer, "chat_template", None):
        try:
            turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _MARK}]
            text = _within(_SECONDS, lambda: tokenizer.apply_chat_template(turns, tokenize=False))
        except Exception:  # it does not show it; a prompt that it fails for says so
            text = ""
        after = text.partition(_MARK)[2].lstrip() if isinstance(text, str) else ""
        ends |= {i for token, i in known.items() if token and after.startswith(token)}
    return frozenset(ends)


def stop_id(tokenizer: Any, text: str) -> int | None:
    """The special token that a stop text is; it has no text of its own. None for ordinary text. Raises UsageError for a
    text with one inside."""
    known = _specials(tokenizer)
    if text in known:
        return known[text]
    if inside := special_in(tokenizer, text):
        raise UsageError(
            f"--stop {text!r} has the special token {inside[0]} inside, which has no text",
            f"give it by itself: --stop '{inside[0]}'",
        )
    return None


def _specials(tokenizer: Any) -> dict[str, int]:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    found = {token.content: i for i, token in added.items() if token.special}
    return found | dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=False))


def _ids(tokenizer: Any, text: str, **how: Any) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, **how)["input_ids"])


def _turns(prompt: str, system: str | None, history: Sequence[tuple[str, str]]) -> list[Turn]:
    turns = [{"role": "system", "content": system}] if system else []
    for user, assistant in history:
        turns += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return [*turns, {"role": "user", "content": prompt}]


def _rendered(tokenizer: Any, turns: Sequence[Turn]) -> str:
    """The turns by the template, with contents as text or, where it wants them so, as parts. Raises UsageError."""
    wanted = [turn["content"] for turn in (turns[-1], *(t for t in turns if t["role"] == "system"))]
    failed: UsageError | None = None
    for form in (turns, [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]):
        try:
            text = _applied(tokenizer, form)
        except UsageError as error:
            failed = failed or error
            continue
        lost = [words for words in wanted if not _holds(text, words)]
        if not lost:
            return text
        said = "the system prompt" if lost[0] != turns[-1]["content"] else "the prompt"
        remedy = "leave out --system" if said != "the prompt" else "use --raw"
        failed = failed or UsageError(f"the chat template leaves {said} out of what is sent", remedy)
    assert failed is not None
    raise failed


def _holds(text: str, words: str) -> bool:
    """Say whether the words are in the text, however it spaces or quotes them."""
    told, *forms = ("".join(t.split()) for t in (text, words, json.dumps(words)[1:-1]))
    return any(form in told for form in forms)


def _applied(tokenizer: Any, turns: Sequence[Turn]) -> str:
    def render() -> str:
        return str(tokenizer.apply_chat_template(list(turns), add_generation_prompt=True, tokenize=False))

    try:
        return _within(_SECONDS, render)
    except TimeoutError as error:
        raise UsageError(f"the chat template is not done after {_SECONDS:g} s", "use --raw") from error
    except Exception as error:  # jinja2's, and whatever a program can raise
        remedy = "leave out --system, or use --raw" if any(t["role"] == "system" for t in turns) else "use --raw"
        raise UsageError(f"the chat template refuses this prompt: {first_line(error)}", remedy) from error


def _within(seconds: float, work: Callable[[], str]) -> str:
    """Its result. Raises TimeoutError if it is not there in time; the work is then ended, at its next line of Python."""
    done: list[tuple[str, BaseException | None]] = []

    def run() -> None:
        try:
            done.append((work(), None))
        except BaseException as error:
            done.append(("", error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not done:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit))
        raise TimeoutError
    result, error = done[0]
    if error is not None:
        raise error
    return result
