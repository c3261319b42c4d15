"""What a chat template is told beside the words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specdec_engine.errors import UsageError
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
_OURS = {"messages", "conversation", "add_generation_prompt", "tokenize", "chat_template", "tools", "documents"}
_FOR_EXAMPLE = """for example '{"enable_thinking": false}'"""


@dataclass(frozen=True, slots=True)
class Template:
    """Options of every command that renders a prompt."""

    thinking: Thinking = None
    template_kwargs: TemplateKwargs = None

    @property
    def told(self) -> dict[str, Any]:
        """By the template's own names. Raises UsageError for what is no object, and for names that it is told anyhow."""
        found = {} if self.template_kwargs is None else _object(self.template_kwargs)
        if ours := sorted(_OURS & found.keys()):
            raise UsageError(f"--template-kwargs cannot set {ours[0]}", "the conversation itself does")
        return found if self.thinking is None else {**found, "enable_thinking": self.thinking}

    def check(self, found: Candidate, *, raw: bool = False) -> None:
        """Look at a target before its weights are read. Raises UsageError where its template is not asked, is not there, or
        has no such switch."""
        if not self.told:
            return
        option = "--template-kwargs" if self.thinking is None else "--thinking"
        template = str(getattr(found.tokenizer, "chat_template", None) or "")
        if raw or not template:
            why = "--raw uses no chat template" if raw else f"{found.name} has no chat template"
            raise UsageError(why, f"leave out {option}")
        if self.thinking is not None and "enable_thinking" not in template:
            raise UsageError(
                f"the chat template of {found.name} has no switch for thinking",
                "leave out --thinking; what else it knows goes into --template-kwargs",
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
