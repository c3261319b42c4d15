"""Options that make the target's distribution another one: penalties, a schema, a grammar."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from specdec_engine.errors import UsageError, reason
from specdec_engine.record.files import decode

if TYPE_CHECKING:
    from specdec_engine.constrain.wanted import Grammar
    from specdec_engine.pair import Pair

_SAMPLING = "Sampling"
RepetitionPenalty = Annotated[
    float | None,
    typer.Option(rich_help_panel=_SAMPLING, help="Divide the logits of tokens that the text has, prompt too.",
                 show_default="the checkpoint's own"),
]  # fmt: skip
PresencePenalty = Annotated[
    float | None,
    typer.Option(rich_help_panel=_SAMPLING, help="Less for every token that the answer has.", show_default="0"),
]
FrequencyPenalty = Annotated[
    float | None,
    typer.Option(rich_help_panel=_SAMPLING, help="Less again each time that it came.", show_default="0"),
]
LogitBias = Annotated[
    list[str] | None,
    typer.Option(rich_help_panel=_SAMPLING, metavar="ID=VALUE", help="Add to a token's logit; repeatable."),
]
MinTokens = Annotated[
    int, typer.Option(rich_help_panel=_SAMPLING, min=0, help="No end token before so many emitted tokens.")
]
IgnoreEos = Annotated[
    bool, typer.Option("--ignore-eos", rich_help_panel=_SAMPLING, help="End tokens end nothing: go on to --max-tokens.")
]
_STRUCTURED = "Structured output"
JsonSchema = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=_STRUCTURED,
        metavar="FILE|JSON",
        help="The answer is JSON that this schema describes, without blanks.",
    ),
]
Regex = Annotated[
    str | None, typer.Option(rich_help_panel=_STRUCTURED, help="The whole answer matches this regular expression.")
]
GrammarFile = Annotated[
    Path | None,
    typer.Option(
        "--grammar",
        rich_help_panel=_STRUCTURED,
        metavar="FILE",
        help="The answer follows this grammar, Lark's or GBNF.",
    ),
]


@dataclass(frozen=True, slots=True)
class Penalties:
    """What else changes the target's distribution, and when a run ends."""

    repetition_penalty: RepetitionPenalty = None
    presence_penalty: PresencePenalty = None
    frequency_penalty: FrequencyPenalty = None
    logit_bias: LogitBias = None
    min_tokens: MinTokens = 0
    ignore_eos: IgnoreEos = False

    @property
    def bias(self) -> dict[int, float]:
        """Raises UsageError for what is no ID=VALUE."""
        found = dict[int, float]()
        for given in self.logit_bias or ():
            token, _, value = given.partition("=")
            try:
                found[int(token)] = float(value)
            except ValueError:
                raise UsageError(f"--logit-bias {given} is no ID=VALUE", "for example 262=-100") from None
        return found

    def of(self, pair: Pair) -> Pair:
        """The pair with them. Raises UsageError for values out of bounds."""
        if self == Penalties():
            return pair
        return pair.asking(
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=self.bias,
            min_tokens=self.min_tokens,
            ignore_eos=self.ignore_eos,
        )

    def refuse_at_server(self) -> None:
        """Raises UsageError for any of them."""
        if self != Penalties():
            raise UsageError("penalties and --ignore-eos are for our own engine", "leave out --attach or --engine")


@dataclass(frozen=True, slots=True)
class Structured:
    """What the answer is to follow."""

    json_schema: JsonSchema = None
    regex: Regex = None
    grammar: GrammarFile = None

    @property
    def wanted(self) -> Grammar | None:
        """Raises UsageError for several of them, for a file that cannot be read, and for what cannot be followed."""
        given = [name for name in ("json_schema", "regex", "grammar") if getattr(self, name) is not None]
        if len(given) > 1:
            names = " and ".join(f"--{name.replace('_', '-')}" for name in given)
            raise UsageError(f"{names} exclude each other", "give one of them")
        if not given:
            return None
        from specdec_engine.constrain import wanted

        if self.regex is not None:
            return wanted.by_regex(self.regex)
        if self.grammar is not None:
            return wanted.by_grammar(_text_of("--grammar", Path(self.grammar)))
        text = self.json_schema or ""
        inline = text.lstrip()[:1] in ("{", "[", "") or text in ("true", "false")
        return wanted.by_json_schema(text if inline else _text_of("--json-schema", Path(text)))

    def refuse_at_server(self) -> None:
        """Raises UsageError for any of them."""
        if any(value is not None for value in (self.json_schema, self.regex, self.grammar)):
            raise UsageError("structured output is for our own engine", "leave out --attach or --engine")


def _text_of(option: str, path: Path) -> str:
    """Raises UsageError for a file that cannot be read."""
    try:
        return decode(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(f"{option} {path} cannot be read: {reason(error)}", "give the name of a file") from error
