"""Options that several commands share: one name, one meaning, one help text each."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_type_hints

import typer

from specdec_cli import output
from specdec_engine.core.cycle_types import Sampling
from specdec_engine.core.registry import OURS, described
from specdec_engine.errors import UsageError
from specdec_engine.models.progress import Report, silent

if TYPE_CHECKING:
    from specdec_engine.models.options import LoadOptions

_MODELS, _SAMPLING, _PROMPT, _OUTPUT = "Models", "Sampling", "Prompt", "Output"


Target = Annotated[
    str, typer.Option("--target", "-t", rich_help_panel=_MODELS, help="Hub id, folder, .gguf file, or builtin.")
]
Draft = Annotated[
    str | None,
    typer.Option(
        "--draft",
        "-d",
        rich_help_panel=_MODELS,
        show_default="a profile's; else ngram,builtin for the built-in target, ngram for others",
        help=f"{', '.join(map(described, OURS))}. A,B is A, and B where A proposes nothing; tree:A,B merges what they guess "
        "into a tree.",
    ),
]
K = Annotated[
    str | None,
    typer.Option(
        "-k",
        rich_help_panel=_MODELS,
        metavar="N|auto",
        show_default="a profile's, else auto",
        help="Drafted tokens a cycle; 0 is plain decoding, auto learns how many pay.",
    ),
]
Device = Annotated[
    str, typer.Option(rich_help_panel=_MODELS, help="auto (cuda, then mps, then cpu), cpu, cuda, cuda:1, mps.")
]
DeviceMap = Annotated[
    Literal["auto"] | None,
    typer.Option(rich_help_panel=_MODELS, help="auto spreads the target over all GPUs and the CPU."),
]
Dtype = Annotated[
    str,
    typer.Option(
        rich_help_panel=_MODELS,
        help="auto (on a GPU bfloat16 where it computes in it, on a CPU as measured), float32, bfloat16, float16.",
    ),
]
Runtime = Annotated[
    Literal["auto", "lean", "graph", "generic"],
    typer.Option(
        rich_help_panel=_MODELS,
        help="How forwards are run: lean (our own, for Llama and its kin), graph (the same as CUDA graphs), "
        "generic (the transformers forward).",
    ),
]
_Quantize = Literal["auto", "none", "int8", "int4"]
QUANTIZED = get_args(_Quantize)
Quantize = Annotated[
    _Quantize,
    typer.Option(
        rich_help_panel=_MODELS,
        help="The target's weights on a CPU: auto (a GGUF's Q4_0, Q4_1, Q4_K, Q8_0 stay packed), none, int8, int4.",
    ),
]
DraftQuantize = Annotated[
    _Quantize,
    typer.Option(
        rich_help_panel=_MODELS,
        help="The same for the draft. auto packs dense ones too, as they are tested anyway: a draft model's in 8 bits, a "
        "head's in 4 beside int4 weights.",
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        min=1,
        rich_help_panel=_MODELS,
        help="CPU threads; by default the cores usable here, fewer while others use them.",
    ),
]
Offline = Annotated[bool, typer.Option("--offline", rich_help_panel=_MODELS, help="No network at all.")]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", rich_help_panel=_MODELS, help="Run code that comes with a checkpoint."),
]

Attach = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=_MODELS,
        metavar="URL",
        help="A running server of vLLM, SGLang or llama.cpp instead, with its own pair; its key from SPECDEC_API_KEY.",
    ),
]

Engine = Annotated[
    Literal["vllm", "sglang", "llama.cpp"] | None,
    typer.Option(
        rich_help_panel=_MODELS,
        help="Start this engine's server with the pair, attach to it, and stop it at the end; its own flags go after --.",
    ),
]
EnginePython = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=_MODELS, metavar="PATH", help="The Python that has the engine, if it is not on the PATH."
    ),
]

Temperature = Annotated[float, typer.Option(rich_help_panel=_SAMPLING, help="0 is greedy.")]
TopK = Annotated[int, typer.Option(rich_help_panel=_SAMPLING, help="Keep the k likeliest tokens; 0 is off.")]
TopP = Annotated[float, typer.Option(rich_help_panel=_SAMPLING, help="Keep the likeliest mass p; 1 is off.")]
MinP = Annotated[
    float, typer.Option(rich_help_panel=_SAMPLING, help="Drop tokens below this share of the likeliest; 0 is off.")
]
Seed = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=_SAMPLING,
        help="Repeat a run (a sampled one with a fixed -k, or with --coupling gumbel).",
    ),
]
MaxTokens = Annotated[
    int, typer.Option("--max-tokens", "-n", rich_help_panel=_SAMPLING, help="Emitted tokens at most.")
]
DraftTemperature = Annotated[
    float | None,
    typer.Option(
        rich_help_panel=_SAMPLING, show_default="the target's", help="The draft's own; sharper may be accepted more."
    ),
]
Rule = Annotated[
    Literal["token", "block"],
    typer.Option(
        rich_help_panel=_SAMPLING, help="Verification: token by token, or block (as lossless, for sampled drafts)."
    ),
]
Coupling = Annotated[
    Literal["independent", "gumbel"],
    typer.Option(rich_help_panel=_SAMPLING, help="gumbel: in float32 a seed gives one text, with any draft and any k."),
]
StopText = Annotated[
    list[str] | None, typer.Option("--stop", rich_help_panel=_SAMPLING, help="End before this text; repeatable.")
]

Prompt = Annotated[str | None, typer.Argument(help="The prompt; - reads stdin. Piped stdin and --file come before it.")]
PromptFile = Annotated[
    Path | None, typer.Option("--file", "-f", rich_help_panel=_PROMPT, help="Read the prompt from a file.")
]
Chat = Annotated[
    bool | None,
    typer.Option(
        "--chat/--raw", rich_help_panel=_PROMPT, help="Apply the chat template; the default where there is one."
    ),
]
System = Annotated[str | None, typer.Option(rich_help_panel=_PROMPT, help="System prompt for the chat template.")]

Json = Annotated[bool, typer.Option("--json", rich_help_panel=_OUTPUT, help="One object at the end.")]
JsonLines = Annotated[bool, typer.Option("--jsonl", rich_help_panel=_OUTPUT, help="One event a line as it happens.")]
Trace = Annotated[
    str | None, typer.Option(rich_help_panel=_OUTPUT, metavar="FILE", help="Append the events to this JSONL file.")
]
Color = Annotated[output.Color, typer.Option(rich_help_panel=_OUTPUT, help="Colour tokens by where they came from.")]
Marks = Annotated[
    bool,
    typer.Option(
        "--marks", rich_help_panel=_OUTPUT, help="Say it without colour too: ↳ recovered, + bonus, accepted unmarked."
    ),
]
Stats = Annotated[bool, typer.Option("--stats/--no-stats", rich_help_panel=_OUTPUT, help="The summary on stderr.")]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", rich_help_panel=_OUTPUT, help="Say which runtime each model got, and why.")
]
Logprobs = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=_OUTPUT, min=0, metavar="N",
        help="Log-probabilities of emitted tokens, and of the N likeliest, in --json, --jsonl, --trace or --prompts.",
    ),
]  # fmt: skip
Theme = Annotated[
    Literal["auto", "dark", "light", "high-contrast"],
    typer.Option(rich_help_panel=_OUTPUT, help="The screen's colours; auto asks the terminal for its background."),
]
Debug = Annotated[bool, typer.Option("--debug", rich_help_panel=_OUTPUT, help="Tracebacks for errors.")]


@dataclass(frozen=True, slots=True)
class Told:
    """What a run says, and where."""

    json: Json = False
    jsonl: JsonLines = False
    trace: Trace = None
    logprobs: Logprobs = None
    color: Color = "auto"
    marks: Marks = False
    stats: Stats = True
    verbose: Verbose = False

    def check(self, many: bool) -> None:
        """Raises UsageError for what does not go together; many: prompts of a file are answered."""
        if self.json and self.jsonl:
            raise UsageError("--json and --jsonl exclude each other", "--json is one object, --jsonl one event a line")
        if self.logprobs is not None and not (many or self.json or self.jsonl or self.trace):
            raise UsageError("--logprobs has no place in plain text", "add --json, --jsonl or --trace FILE")

    @property
    def of_one_prompt(self) -> dict[str, object]:
        """What is for one prompt alone, by name."""
        return {"--json": self.json, "--jsonl": self.jsonl, "--trace": self.trace, "--marks": self.marks}


@dataclass(frozen=True, slots=True)
class Placement:
    """Where and how models run."""

    device: Device = "auto"
    device_map: DeviceMap = None
    dtype: Dtype = "auto"
    runtime: Runtime = "auto"
    quantize: Quantize = "auto"
    draft_quantize: DraftQuantize = "auto"
    threads: Threads = None
    offline: Offline = False
    trust_remote_code: TrustRemoteCode = False
    debug: Debug = False

    def loading(self, tokens: int, report: Report = silent, *, follow: bool = False) -> LoadOptions:
        """tokens: of context to reckon with; follow: have the threads follow other programs' load, where nothing is compared.
        Imports torch, which takes 3 s."""
        from specdec_engine.models.options import LoadOptions

        return LoadOptions(
            device=self.device,
            dtype=self.dtype,
            device_map=self.device_map,
            runtime=self.runtime,
            quantize=self.quantize,
            draft_quantize=self.draft_quantize,
            threads=self.threads or ("follow" if follow else "auto"),
            offline=self.offline,
            trust_remote_code=self.trust_remote_code,
            tokens=tokens,
            report=report,
        )


@dataclass(frozen=True, slots=True)
class Decoding:
    """A run: what it draws with, how it verifies, when it ends."""

    k: K = None
    temperature: Temperature = 0.0
    top_k: TopK = 0
    top_p: TopP = 1.0
    min_p: MinP = 0.0
    draft_temperature: DraftTemperature = None
    rule: Rule = "token"
    coupling: Coupling = "independent"
    seed: Seed = None
    max_tokens: MaxTokens = 256
    stop: StopText = None
    chat: Chat = None
    system: System = None

    @property
    def sampling(self) -> Sampling:
        """Raises UsageError for values that no distribution has."""
        return Sampling(self.temperature, self.top_k, self.top_p, self.min_p, self.coupling)


def records(command: Callable[..., None]) -> Callable[..., None]:
    """A Typer command that takes records of options: every field of a parameter that is a dataclass becomes an option."""
    hints = get_type_hints(command, include_extras=True)
    parameters, made = list[inspect.Parameter](), dict[str, type[Any]]()
    for name, parameter in inspect.signature(command).parameters.items():
        if not is_dataclass(kind := hints[name]):
            parameters.append(parameter.replace(annotation=kind))
            continue
        made[name] = kind  # type: ignore[assignment]
        of_field = get_type_hints(kind, include_extras=True)
        for field in fields(kind):
            default = inspect.Parameter.empty if field.default is MISSING else field.default
            parameters.append(
                inspect.Parameter(
                    field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=of_field[field.name]
                )
            )

    @wraps(command)
    def flat(**given: Any) -> None:
        gathered = {name: kind(**{f.name: given.pop(f.name) for f in fields(kind)}) for name, kind in made.items()}
        command(**given, **gathered)

    flat.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
    )
    flat.__annotations__ = {p.name: p.annotation for p in parameters}
    return flat


def k_of(text: str) -> int | Literal["auto"]:
    """Raises UsageError for what is neither a number nor auto."""
    if text == "auto":
        return "auto"
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"-k {text} is neither a number nor auto", "auto learns it; 0 is plain decoding") from None
