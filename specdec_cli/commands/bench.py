"""`specdec bench`: is speculation helping, by how much, and with which k?"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from specdec_cli import options as opt
from specdec_cli import output, tables
from specdec_cli.commands.generate import interruptible, quieten
from specdec_cli.exits import ExitCode
from specdec_engine.bench import report
from specdec_engine.bench.plan import Arm, Cell, Plan, builtin_questions, chosen, ks_of, read_questions
from specdec_engine.errors import UsageError
from specdec_engine.machine import cpu_name
from specdec_engine.types import Sampling

if TYPE_CHECKING:
    from specdec_engine.bench.figures import Sample
    from specdec_engine.pair import Pair

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
        _WHAT, "JSONL with prompt or turns (Spec-Bench, SPEED-Bench), or a prompt a line.", show_default="12 of our own"
    ),
]
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
Compare = Annotated[Path | None, _option(_OUT, "An older record to hold this one against.")]
Plot = Annotated[Path | None, _option(_OUT, "Draw the speedup over k, with intervals and prediction (.svg, .png).")]


@opt.records
def bench(
    *,
    target: opt.Target = "builtin",
    draft: Drafts = None,
    k: Ks = "1,2,4,8,auto",
    temperature: Temperatures = "0",
    rule: Rules = "token",
    prompts: Prompts = None,
    categories: Categories = None,
    limit: Limit = None,
    synthetic_acceptance: Synthetic = None,
    repeats: Repeats = 2,
    max_tokens: Tokens = 64,
    seed: Seed = 0,
    where: opt.Placement,
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
    """
    questions = builtin_questions() if prompts is None else read_questions(prompts)
    plan = Plan(
        target=target,
        arms=_arms(draft, k, temperature, rule, synthetic_acceptance),
        questions=chosen(questions, (categories or "").split(",") if categories else (), limit),
        repeats=repeats,
        max_tokens=max_tokens,
        seed=seed,
        conditions=_conditions(where, synthetic_acceptance),
    )
    if plot is not None:
        tables.check_plot(plot)
    older = None if compare is None else report.read(compare)
    if resume and out is None:
        raise UsageError("--resume needs --out", "name the file that was begun")
    begun = report.read(out) if resume and out is not None and out.exists() else None
    quieten(where.offline, where.debug)
    found, whole = _measured(plan, begun, where, out, synthetic_acceptance)
    tables.show(found, format)
    if plot is not None:
        tables.plot(found, plot)
    if older is not None:
        for line in tables.compared(older, found):
            output.note(line)
    if not whole:
        raise typer.Exit(ExitCode.INTERRUPTED)
    _judge(found, fail_below)


def _conditions(where: opt.Placement, synthetic: float | None) -> tuple[str, ...]:
    names = ("device", "device_map", "dtype", "runtime", "quantize", "draft_quantize", "threads")
    return (f"synthetic={synthetic}", *(f"{name}={getattr(where, name)}" for name in names))


def _arms(
    drafts: Sequence[str] | None, k: str, temperature: str, rule: str, synthetic: float | None
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
    every = (Arm(d, n, t, r) for t in temperatures for d in named for r in rules for n in ks_of(k) if n != 0)
    if not (found := tuple(dict.fromkeys(every))):
        raise UsageError("-k 0 is plain decoding, which every arm is held against anyway", "for example -k 1-8,auto")
    return found


def _measured(
    plan: Plan, begun: dict[str, Any] | None, where: opt.Placement, out: Path | None, synthetic: float | None
) -> tuple[dict[str, Any], bool]:
    """Run what is missing of the plan; after Ctrl-C what there is, and False."""
    with interruptible(), output.narrated() as narrated:
        from specdec_engine.auto import AutoK
        from specdec_engine.bench.measure import bandwidth, run
        from specdec_engine.pair import load_pairs

        wanted: list[str | None] = ["none", *(arm.draft for arm in plan.arms)]
        drafts = list(dict.fromkeys(wanted))
        longest = max(sum(map(len, q.turns)) // 3 + plan.max_tokens * len(q.turns) for q in plan.questions)
        pairs = load_pairs(plan.target, drafts, where.loading(longest, narrated))
    if synthetic is not None:
        pairs = [pair.synthetic(synthetic) for pair in pairs]
    named = {draft: draft or pair.drafter.name for draft, pair in zip(drafts, pairs, strict=True)}
    by_draft: dict[str | None, Pair] = dict(zip(named.values(), pairs, strict=True))
    plan = replace(plan, arms=tuple(replace(arm, draft=named[arm.draft]) for arm in plan.arms))
    environment = {**pairs[-1].environment, **_machine(bandwidth(pairs[0].target.device))}
    environment["drafts"] = {name: part for pair in pairs for name, part in pair.environment["drafts"].items()}

    samples = [] if begun is None else report.samples_of(begun, plan)
    done = {(s.question, s.repeat, s.temperature, s.arm) for s in samples}

    # What `-k auto` has learnt belongs to its arm: others with the same draft and seeds would make it begin anew.
    own = [replace(by_draft[arm.draft], auto=AutoK()) for arm in plan.arms]

    def of(cell: Cell) -> tuple[Pair, Arm | None]:
        return (pairs[0], None) if cell.arm is None else (own[cell.arm], plan.arms[cell.arm])

    def record(looked: dict[int, tuple[int, list[dict[str, Any]]]]) -> dict[str, Any]:
        return report.record(plan, samples, environment, looked, synthetic)

    left_out = dict[int, str]()
    whole = True
    cells = [c for c in plan.cells() if (c.question, c.repeat, c.temperature, c.arm) not in done]
    if not cells:
        output.note("nothing is left to run")
    try:
        for arm in (
            (None, *range(len(plan.arms))) if cells else ()
        ):  # warm-up, dropped: kernels set themselves up, pages come in
            cell = Cell(0, -1, 0.0 if arm is None else plan.arms[arm].temperature, arm)
            with suppress(UsageError):
                run(*of(cell), cell, plan.questions[0], min(16, plan.max_tokens), plan.seed - 1)
        for cell in _followed(cells, plan):
            seed = plan.seed + 1000 * cell.repeat + cell.question
            try:
                samples += run(*of(cell), cell, plan.questions[cell.question], plan.max_tokens, seed)
            except UsageError as error:  # one prompt that fills the context is no reason to lose the others
                left_out.setdefault(cell.question, error.message)
            if out is not None:
                report.write(out, record({}))
    except KeyboardInterrupt:
        done_now = f"{len(samples)} of {len(list(plan.cells()))} runs"
        output.note(f"interrupted after {done_now}" + ("; --resume goes on" if out is not None else ""))
        whole = False
        if not any(s.arm is None for s in samples):
            raise
    for question, reason in left_out.items():
        output.note(f"prompt {question} is left out: {reason}")
    found = record({} if synthetic is not None else _compared(plan, samples, pairs[0]))
    if out is not None:
        report.write(out, found)
    return found, whole


def _followed(cells: Sequence[Cell], plan: Plan) -> Iterator[Cell]:
    """On a terminal with a bar: which run, how many, how long still."""
    if not sys.stderr.isatty():
        yield from cells
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=len(cells))
        for cell in cells:
            label = "plain" if cell.arm is None else plan.arms[cell.arm].label
            bar.update(task, description=f"{label}, {plan.questions[cell.question].category}")
            yield cell
            bar.advance(task)


def _compared(plan: Plan, samples: Sequence[Sample], pair: Pair) -> dict[int, tuple[int, list[dict[str, Any]]]]:
    """By greedy arm: how many of its texts were held against plain decoding's, and where they differ."""
    from specdec_engine.bench.measure import explained

    plain = {s.question: s for s in samples if s.arm is None and s.temperature == 0 and s.repeat == 0}
    found = dict[int, tuple[int, list[dict[str, Any]]]]()
    for number, arm in enumerate(plan.arms):
        if arm.temperature:
            continue
        texts = [s for s in samples if s.arm == number and s.repeat == 0 and s.question in plain]
        looked = (explained(pair, plan.questions[s.question], plain[s.question], s) for s in texts)
        found[number] = len(texts), [asdict(d) for d in looked if d is not None]
    return found


def _machine(bandwidth: float | None) -> dict[str, Any]:
    return {
        "bandwidth_bytes_per_second": bandwidth,
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "cpu": cpu_name(),
        "utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "argv": sys.argv[1:],
    }


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
    best = max((arm["speedup"] for arm in found["arms"]), default=0.0)
    if fail_below is not None and best < fail_below:
        output.error(f"the best speedup is {best:.2f}, below {fail_below:g}", "see the table for where the time goes")
        raise typer.Exit(ExitCode.CHECK)
