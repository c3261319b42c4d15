"""Options that tell a chat template something beside the words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specdec_engine.errors import UsageError
from specdec_engine.models.chat import names_read
from specdec_engine.record.files import parse_json

if TYPE_CHECKING:
    from specdec_engine.models.loading import Candidate

_PROMPT = "Prompt"
Thinking = Annotated[
    bool | None,
    typer.Option(
        "--thinking/--no-thinking",
        rich_help_panel=_PROMPT,
        help="Have the target think aloud before it answers, or not, where its chat template can.",
        show_default="as the template has it",
    ),
]
TemplateKwargs = Annotated[
    str | None,
    typer.Option(rich_help_panel=_PROMPT, metavar="JSON", help="What else the chat template is told, as an object."),
]
_OURS = {
    *("messages", "conversation", "add_generation_prompt", "continue_final_message", "tokenize", "chat_template"),
    *("tools", "documents", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
    *("return_assistant_tokens_mask", "tokenizer_kwargs"),
}
_EVERYWHERE = {"raise_exception", "strftime_now"}
"""Functions that every template may call."""
_SWITCH = "enable_thinking"
_FOR_EXAMPLE = """for example '{"enable_thinking": false}'"""


@dataclass(frozen=True, slots=True)
class Template:
    """Options of `generate`, `watch` and `chat`."""

    thinking: Thinking = None
    template_kwargs: TemplateKwargs = None

    @property
    def told(self) -> dict[str, Any]:
        """Values by the template's own names. Raises UsageError for what is no object, for names that it is told anyhow, and
        for a name that two options set."""
        found = {} if self.template_kwargs is None else _object(self.template_kwargs)
        if ours := sorted(_OURS & found.keys()):
            raise UsageError(f"--template-kwargs cannot set {ours[0]}", "the conversation itself does")
        if self.thinking is None:
            return found
        if _SWITCH in found:
            raise UsageError(f"--template-kwargs and {self._flag} both set {_SWITCH}", "leave one of them out")
        return {**found, _SWITCH: self.thinking}

    @property
    def _flag(self) -> str:
        return "--thinking" if self.thinking else "--no-thinking"

    def check(self, found: Candidate, *, raw: bool = False) -> None:
        """Look at a target before its weights are read. raw: no template is used. Raises UsageError where something is to be
        told, and there is no template to tell it, or none that reads it."""
        if not self.told:
            return
        option = "--template-kwargs" if self.thinking is None else self._flag
        template = str(getattr(found.tokenizer, "chat_template", None) or "")
        if raw or not template:
            why = "--raw uses no chat template" if raw else f"{found.name} has no chat template"
            raise UsageError(why, f"leave out {option}")
        if self.thinking is not None and _SWITCH not in template:
            raise UsageError(
                f"the chat template of {found.name} has no switch for thinking",
                f"leave out {self._flag}; what else it knows goes into --template-kwargs",
            )
        read = names_read(template)
        if read is not None and (unknown := sorted(self.told.keys() - read)):
            knows = sorted(name for name in read - _OURS - _EVERYWHERE if not name.endswith("_token"))
            raise UsageError(
                f"the chat template of {found.name} reads no {unknown[0]}",
                f"it knows {', '.join(knows)}" if knows else "it can be told nothing: leave out --template-kwargs",
            )

    def refuse_at_server(self) -> None:
        """Raises UsageError for any of them."""
        if self != Template():
            raise UsageError(
                "--thinking and --template-kwargs are for our own engine",
                "leave out --attach or --engine; most servers take them where they are started",
            )


def _object(text: str) -> dict[str, Any]:
    try:
        found = parse_json(text)
    except ValueError as error:
        raise UsageError(f"--template-kwargs: {error}", _FOR_EXAMPLE) from error
    if not isinstance(found, dict):
        raise UsageError(f"--template-kwargs {text} is no object", _FOR_EXAMPLE)
    return found
