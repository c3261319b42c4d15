"""A prompt as its target is to read it: the chat template's turns, and what ends them.

A template is a stranger's program. Whatever it does, the prompt's words are in what is sent, or it is an error; marks that
are typed into them are sent as text; and it has so many seconds.
"""

from __future__ import annotations

import ctypes
import html
import json
import re
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

from specdec_engine.errors import UsageError, first_line

_SECONDS = 10.0
"""Far more than any template takes: the longest in use are done in a few ms."""
_MARK = "\ue000{}\ue001"
"""Stands for a turn's words while the template is rendered; characters of no script, that no text has and none trims."""
_ENDS = ("<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<|end_of_turn|>")
"""Special tokens that end a turn wherever they are known, whether a config says so or not (Llama 3 came without)."""

Turn = dict[str, Any]


def chat_ids(
    tokenizer: Any,
    prompt: str,
    system: str | None,
    history: Sequence[tuple[str, str]] = (),
    template: Mapping[str, Any] | None = None,
) -> list[int]:
    """The prompt as the next user turn. history: what was said before, user and assistant. For `template`, and what is
    raised, see `turn_ids`."""
    return turn_ids(tokenizer, _turns(prompt, system, history), template)


def turn_ids(tokenizer: Any, turns: Sequence[Turn], template: Mapping[str, Any] | None = None) -> list[int]:
    """The turns by the tokenizer's chat template, the assistant's next one opened; the last is the user's. template: what
    the template is told beside them. Raises UsageError for a template that fails, or leaves words out."""
    text, shown = _rendered(tokenizer, turns, template or {})
    typed = [token for turn in turns for token in special_in(tokenizer, turn["content"])]
    if not typed:
        return _ids(tokenizer, text)
    for words in (_said(turns), [content.strip() for content in _said(turns)]):
        parts = [words[int(part)] if i % 2 else part for i, part in enumerate(re.split("\ue000(\\d+)\ue001", shown))]
        if "".join(parts) == text:
            return _as_text(tokenizer, parts)
    raise UsageError(
        f"the prompt holds {typed[0]}, and the chat template does not show where a user's words go",
        "take it out, or use --raw",
    )


def _as_text(tokenizer: Any, parts: Sequence[str]) -> list[int]:
    """Every second part is somebody's words, whose marks are text and not marks. Encoded as a whole, so that all other ids
    are those of the whole; then the marks that were typed are taken apart."""
    known = _specials(tokenizer)
    a_mark = re.compile("|".join(re.escape(token) for token in sorted(filter(None, known), key=len, reverse=True)))
    marks = deque((mark, i % 2 == 1) for i, part in enumerate(parts) for mark in a_mark.findall(part))
    ids = list[int]()
    for token in _ids(tokenizer, "".join(parts)):
        typed = False
        if marks and known[marks[0][0]] == token:
            mark, typed = marks.popleft()
        ids += _ids(tokenizer, mark, split_special_tokens=True) if typed else [token]
    return ids


def raw_ids(tokenizer: Any, text: str) -> list[int]:
    """The text as it is; marks are marks. With one beginning-of-text token, where the text begins with it by itself."""
    ids = list(tokenizer(text)["input_ids"])
    bos = getattr(tokenizer, "bos_token_id", None)
    twice = bos is not None and ids[:2] == [bos, bos] and text.startswith(str(tokenizer.bos_token))
    return ids[1:] if twice else ids


def special_in(tokenizer: Any, text: str) -> list[str]:
    """The tokenizer's special tokens that stand in a text, as it would find them."""
    return [token for token in _specials(tokenizer) if token and token in text]


def between_turns(tokenizer: Any) -> frozenset[int]:
    """Special tokens that no answer has in it, only a template around answers: all but those that end one; none
    where there is no tokenizer."""
    if tokenizer is None:
        return frozenset()
    return frozenset(tokenizer.all_special_ids) - turn_ends(tokenizer) - {tokenizer.eos_token_id}


def names_read(template: str) -> frozenset[str] | None:
    """The names that a chat template expects to be told; None where only transformers can parse it."""
    from jinja2 import Environment, TemplateError, meta

    ours = Environment(extensions=_EXTENSIONS)
    try:
        return frozenset(meta.find_undeclared_variables(ours.parse(template)) - ours.globals.keys())
    except TemplateError:
        return None


_EXTENSIONS = ("jinja2.ext.loopcontrols",)
"""Part of what transformers renders templates with; the other extension is its own."""


def turn_ends(tokenizer: Any) -> frozenset[int]:
    """The special tokens that end an assistant's turn: by its template, and by their names."""
    known = _specials(tokenizer)
    ends = {known[name] for name in _ENDS if name in known}
    if getattr(tokenizer, "chat_template", None):
        mark = _MARK.format(1)
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": mark}]
        for form in (turns, _in_parts(turns)):
            try:
                text = _within(_SECONDS, partial(_render, tokenizer, form))
            except Exception:  # it does not show it; a prompt that it fails for says so
                continue
            after = text.partition(mark)[2].lstrip() if isinstance(text, str) else ""
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


def _said(turns: Sequence[Turn]) -> list[str]:
    return [turn["content"] for turn in turns]


def _in_parts(turns: Sequence[Turn]) -> list[Turn]:
    """Turns with contents in parts, as templates of vision-language models want them."""
    return [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]


def _rendered(tokenizer: Any, turns: Sequence[Turn], template: Mapping[str, Any]) -> tuple[str, str]:
    """The turns by the template, with contents as text or, where it wants them so, as parts; and the same with a mark for
    each turn's words. Raises UsageError if it fails, or one of the marks is not in it."""
    marked = [{**turn, "content": _MARK.format(i)} for i, turn in enumerate(turns)]
    failed: UsageError | None = None
    for form in (list, _in_parts):
        try:
            text, shown = _applied(tokenizer, form(turns), template), _applied(tokenizer, form(marked), template)
        except UsageError as error:
            if isinstance(error.__cause__, TimeoutError):
                raise
            failed = failed or error
            continue
        lost = [turn for turn, mark in zip(turns, marked, strict=True) if mark["content"] not in shown]
        lost += [turn for turn in turns if turn["role"] == "user" and not _holds(text, turn["content"])]
        if not lost:
            return text, shown
        said, remedy = _of_lost(turns, lost[0])
        failed = failed or UsageError(f"the chat template leaves {said} out of what is sent", remedy)
    assert failed is not None
    raise failed


def _of_lost(turns: Sequence[Turn], lost: Turn) -> tuple[str, str]:
    """Name the turn that was left out, and what to do."""
    if lost["role"] == "system":
        return "the system prompt", "leave out --system"
    return ("the prompt", "use --raw") if lost is turns[-1] else ("earlier turns", "ask each by itself, or use --raw")


def _holds(text: str, words: str) -> bool:
    """Say whether the words are in the text, however it spaces, quotes, escapes or lowers them."""
    quoted = (json.dumps(words)[1:-1], json.dumps(words, ensure_ascii=False)[1:-1], html.escape(words))
    told, *forms = ("".join(t.split()).casefold() for t in (text, words, *quoted))
    return any(form in told for form in forms)


def _render(tokenizer: Any, turns: Sequence[Turn], **how: Any) -> str:
    _check_bounds(str(getattr(tokenizer, "chat_template", "")))
    return str(tokenizer.apply_chat_template(list(turns), tokenize=False, **how))


def _applied(tokenizer: Any, turns: Sequence[Turn], template: Mapping[str, Any]) -> str:
    try:
        return _within(_SECONDS, partial(_render, tokenizer, turns, **{**template, "add_generation_prompt": True}))
    except TimeoutError as error:
        raise UsageError(f"the chat template is not done after {_SECONDS:g} s", "use --raw") from error
    except Exception as error:  # jinja2's, and whatever a program can raise
        remedy = "leave out --system, or use --raw" if any(t["role"] == "system" for t in turns) else "use --raw"
        said = (
            "refuses this prompt" if type(error).__name__ == "TemplateError" else "fails"
        )  # raise_exception's, or a fault
        raise UsageError(f"the chat template {said}: {first_line(error)}", remedy) from error


@cache
def _check_bounds(template: str) -> None:
    """Look for the plain ways to fill the memory in one step, which no time limit ends: powers, products of products, large
    numbers and widths. Raises ValueError; a template that cannot be parsed says so when it is applied."""
    from jinja2 import Environment, TemplateSyntaxError, nodes

    try:
        tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_GENERATION.sub("", template))
    except TemplateSyntaxError:
        return
    products = list(tree.find_all(nodes.Mul))
    numbers = [abs(literal.value) for literal in tree.find_all(nodes.Const) if type(literal.value) is int]
    numbers += [int(width) for width in re.findall(r"%\D{0,2}(\d{6,18})", template)]
    large = max(numbers, default=0) > (_LARGE if products else 100 * _LARGE)
    nested = any(product.find(nodes.Mul) is not None for product in products)
    if tree.find(nodes.Pow) is not None or large or nested:
        raise ValueError("it multiplies without bounds")


_LARGE = 100_000
_GENERATION = re.compile(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}")
"""A tag of transformers' own, which marks what an assistant said."""


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
