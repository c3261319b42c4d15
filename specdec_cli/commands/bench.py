"""`specdec bench`: is speculation helping, by how much, and with which k?"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from specdec_cli import options as opt
from specdec_cli import output, shaping, tables
from specdec_cli.exits import ExitCode
from specdec_cli.options import QUANTIZED
from specdec_cli.servers.attached import ServerOptions
from specdec_cli.servers.bench import ServedOptions, Wanted, bench_server
from specdec_cli.sessions import load_session
from specdec_cli.startup import quieten
from specdec_engine.bench import report
from specdec_engine.bench.plan import Arm, Plan, Run, builtin_questions, chosen, ks_of
from specdec_engine.core.cycle_types import Sampling
from specdec_engine.errors import UsageError
from specdec_engine.record.prompt_files import read_questions

if TYPE_CHECKING:
    from specdec_engine.constrain.wanted import Grammar

ALL_K = "1,2,4,8,auto"
_WHAT, _HOW, _OUT = "What is run", "How", "Output"


def _option(panel: str, help: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, rich_help_panel=panel, help=help, **more)


Drafts = Annotated[
    list[str] | None,
    _option(
        _WHAT,
        "A draft, as for generate; repeat it for several arms.",
        "--draft",
        "-d",
        show_default="the default draft",
    ),
]
Ks = Annotated[str, _option(_WHAT, "Drafted tokens a cycle: 1,2,4 or 1-8,auto or 2-8+2 or 1-16*2.", "-k")]
Temperatures = Annotated[str, _option(_WHAT, "One or several, by commas; each is held against plain decoding at it.")]
Rules = Annotated[str, _option(_WHAT, "token, block or both, by commas.")]
Prompts = Annotated[
    Path | None,
    _option(
        _WHAT,
        "A prompt a line, or JSON: turns, messages, conversations, prompt, question.",
        show_default="12 of our own",
    ),
]
Contexts = Annotated[
    str | None,
    _option(_WHAT, "Lengthen prompts to so many tokens, by commas: each length is held against plain decoding after it.",
            "--context", metavar="N"),
]  # fmt: skip
Categories = Annotated[str | None, _option(_WHAT, "Only prompts of these categories, by commas.")]
Limit = Annotated[int | None, _option(_WHAT, "At most so many prompts, evenly spread.", min=1)]
Synthetic = Annotated[
    float | None,
    _option(
        _WHAT, "Accept drafted tokens at this chance: the ceiling of a better draft. NOT lossless.", min=0.0, max=1.0
    ),
]
Repeats = Annotated[int, _option(_HOW, "Rounds over all prompts.", min=1)]
Tokens = Annotated[int, _option(_HOW, "Tokens a run.", "--max-tokens", "-n", min=2)]
Seed = Annotated[int, _option(_HOW, "Of the order, and of sampled text.")]
Format = Annotated[Literal["table", "md", "csv", "json", "jsonl"], _option(_OUT, "On stdout, at the end.")]
Out = Annotated[Path | None, _option(_OUT, "Write the whole record as JSON after every run.")]
Resume = Annotated[bool, _option(_OUT, "Go on where --out was interrupted.", "--resume")]
FailBelow = Annotated[float | None, _option(_OUT, "Exit with 6 if the best arm's speedup is below.")]
Compare = Annotated[
    list[Path] | None,
    _option(_OUT, "An older record to hold this one against; of a server, other engines' beside it, repeatable."),
]
Plot = Annotated[Path | None, _option(_OUT, "Draw the speedup over k, with intervals and prediction (.svg, .png).")]


@dataclass(frozen=True, slots=True)
class _Placement(opt.Placement):
    """With several forms of the target's weights."""

    quantize: Annotated[
        str,
        _option(
            "Models",
            "The target's weights on a CPU: auto, none, int8, int4; several, by commas, are arms, each against its own plain "
            "decoding.",
        ),
    ] = "auto"  # type: ignore[assignment]


@opt.records
def bench(
    *,
    target: opt.Target = "builtin",
    draft: Drafts = None,
    k: Ks = ALL_K,
    temperature: Temperatures = "0",
    rule: Rules = "token",
    prompts: Prompts = None,
    categories: Categories = None,
    limit: Limit = None,
    context: Contexts = None,
    synthetic_acceptance: Synthetic = None,
    json_schema: shaping.JsonSchema = None,
    server: ServerOptions,
    served: ServedOptions,
    repeats: Repeats = 2,
    max_tokens: Tokens = 64,
    seed: Seed = 0,
    where: _Placement,
    format: Format = "table",
    out: Out = None,
    resume: Resume = False,
    fail_below: FailBelow = None,
    compare: Compare = None,
    plot: Plot = None,
) -> None:
    """Measure speculation against plain decoding, paired prompt by prompt, and say what to set.

    specdec bench

    specdec bench -t org/target -d org/draft -d ngram -k 1-8,auto --prompts questions.jsonl --out result.json

    specdec bench --engine vllm -t org/target -d org/draft -k 4 --concurrency 1,4,16
    """
    questions = builtin_questions() if prompts is None else read_questions(prompts)
    if server.wanted:
        given = {"--rule": rule != "token", "--synthetic-acceptance": synthetic_acceptance, "--resume": resume,
                 "--json-schema": json_schema, "--plot": plot, "--context": context,
                 "several drafts": draft is not None and len(draft) > 1}  # fmt: skip
        wanted = Wanted(
            server=server,
            options=served,
            target=target,
            draft=draft[0] if draft else None,
            k=None if k == ALL_K else k,
            temperature=_one(temperature),
            questions=chosen(questions, (categories or "").split(",") if categories else (), limit),
            repeats=repeats,
            max_tokens=max_tokens,
            seed=seed,
            offline=where.offline,
            beside=tuple(compare or ()),
        )
        bench_server(wanted, given, out, format, fail_below)
        return
    served.refuse_without_server()
    grammar = shaping.Structured(json_schema).wanted
    arms = _arms(draft, k, temperature, rule, _forms(where.quantize), synthetic_acceptance)
    arms = _also_after(context, _also_under(grammar, arms, synthetic_acceptance))
    plan = Plan(
        target=target,
        arms=arms,
        questions=chosen(questions, (categories or "").split(",") if categories else (), limit),
        repeats=repeats,
        max_tokens=max_tokens,
        seed=seed,
        conditions=_conditions(where, synthetic_acceptance, grammar),
    )
    if plot is not None:
        tables.check_plot(plot)
    older = [report.read(path) for path in compare or ()]
    if resume and out is None:
        raise UsageError("--resume needs --out", "name the file that was begun")
    begun = report.read(out) if resume and out is not None and out.exists() else None
    quieten(where.offline, where.debug)
    kept = _Kept(out)
    found, whole = _measured(plan, begun, where, kept, synthetic_acceptance, grammar)
    if whole and not found["baseline"]["samples"]:
        raise UsageError("no prompt could be run", "see above why each was left out")
    tables.show(found, format)
    if plot is not None:
        tables.plot(found, plot)
    for record in older:
        for line in tables.compared(record, found):
            output.note(line)
    if kept.error is not None:
        output.error(kept.error.message, kept.error.hint)
        raise typer.Exit(ExitCode.FAILED)
    if not whole:
        raise typer.Exit(ExitCode.INTERRUPTED)
    _judge(found, fail_below)


def _also_under(grammar: Grammar | None, arms: tuple[Arm, ...], synthetic: float | None) -> tuple[Arm, ...]:
    """The arms, and where there is a grammar each again under it. Raises UsageError with a chosen acceptance."""
    if grammar is None:
        return arms
    if synthetic is not None:
        raise UsageError("--synthetic-acceptance accepts what no grammar allows", "leave it or --json-schema out")
    for warning in grammar.warnings:
        output.note(f"not followed, of the {grammar.word}: {warning}")
    return (*arms, *(replace(arm, structured=True) for arm in arms))


def _also_after(contexts: str | None, arms: tuple[Arm, ...]) -> tuple[Arm, ...]:
    """The arms after each of these lengths. Raises UsageError for what is no list of numbers."""
    if contexts is None:
        return arms
    lengths = [int(part) if part.strip().isdecimal() else 0 for part in contexts.split(",")]
    if not all(lengths):
        raise UsageError(f"--context {contexts} is no list of lengths", "for example 512,4096")
    return tuple(replace(arm, context=length) for length in dict.fromkeys(lengths) for arm in arms)


def _one(temperature: str) -> float:
    """Raises UsageError for several."""
    try:
        return float(temperature)
    except ValueError:
        raise UsageError(f"--temperature {temperature} is no number", "a server is measured at one") from None


def _forms(quantize: str) -> tuple[str, ...]:
    """One empty name for a single form, as which all is loaded. Raises UsageError."""
    found = tuple(dict.fromkeys(form.strip() for form in quantize.split(",")))
    if unknown := [form for form in found if form not in QUANTIZED]:
        raise UsageError(
            f"--quantize {unknown[0]} is not known", f"one or several of {', '.join(QUANTIZED)}, by commas"
        )
    return found if len(found) > 1 else ("",)


def _conditions(where: opt.Placement, synthetic: float | None, grammar: Grammar | None) -> tuple[str, ...]:
    names = ("device", "device_map", "dtype", "runtime", "quantize", "draft_quantize", "threads")
    follows = () if grammar is None else (f"grammar={grammar.compiled}",)
    return (f"synthetic={synthetic}", *follows, *(f"{name}={getattr(where, name)}" for name in names))


def _arms(
    drafts: Sequence[str] | None, k: str, temperature: str, rule: str, forms: Sequence[str], synthetic: float | None
) -> tuple[Arm, ...]:
    """Every combination. Raises UsageError."""
    rules = ["synthetic"] if synthetic is not None else [r.strip() for r in rule.split(",")]
    known = ("token", "block") if synthetic is None else ("synthetic",)
    if unknown := [r for r in rules if r not in known]:
        raise UsageError(f"the rule {unknown[0]!r} is not known", "token or block")
    try:
        temperatures = [float(t) for t in temperature.split(",")]
    except ValueError:
        raise UsageError(f"--temperature {temperature} is no list of numbers", "for example 0,0.8") from None
    for t in temperatures:
        Sampling(t)
    named: Sequence[str | None] = drafts or [None]
    combined = product(forms, temperatures, named, rules, ks_of(k))
    every = (Arm(d, n, t, r, form) for form, t, d, r, n in combined if n != 0)
    if set(drafts or ()) == {"none"}:
        raise UsageError("-d none is plain decoding, which every arm is held against anyway", "for example -d ngram")
    if not (found := tuple(dict.fromkeys(every))):
        raise UsageError("-k 0 is plain decoding, which every arm is held against anyway", "for example -k 1-8,auto")
    return found


def _measured(
    plan: Plan,
    begun: dict[str, Any] | None,
    where: opt.Placement,
    kept: _Kept,
    synthetic: float | None,
    grammar: Grammar | None,
) -> tuple[dict[str, Any], bool]:
    """Run what is missing of the plan; after Ctrl-C what there is, and False."""
    session, whole = load_session(plan, begun, where, synthetic, grammar), True
    kept.begin(session.record())
    runs = session.runs()
    if not runs:
        output.note("nothing is left to run")
    try:
        if runs:
            session.warm_up()
        for run in _followed(runs, session.plan):
            session.measure(run)
            kept.write(session.record())
    except KeyboardInterrupt:
        done = f"{len(session.samples)} of {len(list(session.plan.runs()))} runs"
        output.note(f"interrupted after {done}" + ("; --resume goes on" if kept.path is not None else ""))
        whole = False
        if not any(s.arm is None for s in session.samples):
            raise
    for what, reason in session.left_out.items():
        output.note(f"{what} is left out: {reason}")
    found = session.compared()
    kept.write(found)
    return found, whole


class _Kept:
    """The record on disk. A disk that fills up does not cost what is measured: it is said when it happens and in the end."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.error: UsageError | None = None
        """Why the newest record is not there."""

    def begin(self, found: dict[str, Any]) -> None:
        """Raises UsageError for a place that cannot be written: nothing has been measured yet."""
        if self.path is not None:
            report.write(self.path, found)

    def write(self, found: dict[str, Any]) -> None:
        try:
            self.begin(found)
            self.error = None
        except UsageError as error:
            if self.error is None:
                output.note(f"{error.message}; the runs go on")
            self.error = error


def _followed(runs: Sequence[Run], plan: Plan) -> Iterator[Run]:
    """On a terminal with a bar: which run, how many, how long still."""
    if not sys.stderr.isatty():
        yield from runs
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=len(runs))
        for run in runs:
            label = "plain" if run.arm is None else plan.arms[run.arm].label
            bar.update(task, description=f"{label}, {plan.questions[run.question].category}")
            yield run
            bar.advance(task)


def _judge(found: dict[str, Any], fail_below: float | None) -> None:
    """Exit with 6 for text that is not the target's, or a threshold that was missed."""
    bugs = [d for arm in found["arms"] for d in arm["first_divergences"] if d["verdict"] == "bug"]
    if bugs:
        first = bugs[0]
        output.error(
            f"greedy text differs from plain decoding's, and not by rounding: prompt {first['question']}, token "
            f"{first['position']}, {first['plain']!r} and {first['arm']!r}",
            "run it with --dtype float32; if it still differs, it is a bug in the draft or in specdec",
        )
        raise typer.Exit(ExitCode.CHECK)
    best = dict[int | None, float]()
    for arm in found["arms"]:  # a draft must not pass by the length that suits it
        best[arm["context"]] = max(arm["speedup"], best.get(arm["context"], 0.0))
    least = min(best.values(), default=0.0)
    if fail_below is not None and least < fail_below:
        output.error(f"the best speedup is {least:.2f}, below {fail_below:g}", "see the table for where the time goes")
        raise typer.Exit(ExitCode.CHECK)
