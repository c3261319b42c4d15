"""`specdec tune`: which draft and which k for these prompts, on this machine?"""

from __future__ import annotations

import json as jsonlib
import math
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specdec_cli import options as opt
from specdec_cli import output, profiles
from specdec_cli.commands.generate import interruptible, quieten
from specdec_cli.prompts import read_prompt
from specdec_cli.tables import one_line
from specdec_engine.bench.plan import Question, builtin_questions, chosen, read_questions
from specdec_engine.errors import UsageError
from specdec_engine.tune.servers import launches
from specdec_engine.tune.whatif import best_of
from specdec_engine.types import Sampling

if TYPE_CHECKING:
    from specdec_engine.pair import Pair
    from specdec_engine.tune.passes import Answer
    from specdec_engine.tune.run import Tuned
    from specdec_engine.tune.whatif import Setting

_TEXT_PROMPT = 64
"""Tokens of a text's piece that are taken for its prompt."""
_TEXT_PIECES = 24

_What = "What is looked at"

Drafts = Annotated[
    list[str] | None,
    typer.Option(
        "--draft",
        "-d",
        rich_help_panel=_What,
        help="A draft to consider, as for generate; repeatable. Lookups, alone and before each model, always are.",
        show_default="what fits the target on this machine",
    ),
]
Prompts = Annotated[
    Path | None,
    typer.Option(
        rich_help_panel=_What,
        help="Your prompts: JSONL with prompt or turns, or a prompt a line.",
        show_default="12 of our own",
    ),
]
Traces = Annotated[
    list[Path] | None,
    typer.Option("--trace", rich_help_panel=_What, help="Take the answers of recorded runs instead; repeatable."),
]
Text = Annotated[
    Path | None,
    typer.Option("--text", rich_help_panel=_What, help="Take a text file instead, as if the target had written it."),
]
Limit = Annotated[
    int | None, typer.Option(rich_help_panel=_What, help="At most so many prompts, evenly spread.", min=1)
]
Temperature = Annotated[float, typer.Option(rich_help_panel=_What, help="That you decode at; 0 is greedy.")]
Tokens = Annotated[int, typer.Option("--max-tokens", "-n", rich_help_panel=_What, help="Tokens an answer.", min=2)]
Seed = Annotated[int, typer.Option(rich_help_panel=_What, help="Of sampled text, and of the order.")]
Save = Annotated[
    bool,
    typer.Option("--save", rich_help_panel="Output", help="Write the profile; generate and watch then take it up."),
]


@opt.records
def tune(
    *,
    target: opt.Target = "builtin",
    draft: Drafts = None,
    prompts: Prompts = None,
    trace: Traces = None,
    text: Text = None,
    limit: Limit = None,
    temperature: Temperature = 0.0,
    max_tokens: Tokens = 64,
    seed: Seed = 0,
    where: opt.Placement,
    save: Save = False,
    json: opt.Json = False,
) -> None:
    """Find draft and k for your prompts: predicted from one plain answer to each, then confirmed.

    specdec tune

    specdec tune -t org/target -d org/draft --prompts mine.jsonl --save
    """
    sampling = Sampling(temperature)
    if sum(source is not None for source in (prompts, trace or None, text)) > 1:
        raise UsageError("--prompts, --trace and --text exclude each other", "give one of them")
    questions = chosen(builtin_questions() if prompts is None else read_questions(prompts), (), limit)
    if text is not None and not text.is_file():
        raise UsageError(f"--text {text} is no file", "check the path")
    quieten(where.offline, where.debug)
    with interruptible(), output.narrated() as report:
        from specdec_engine.pair import Loader
        from specdec_engine.tune.run import candidates, tuned, with_cascades

        names = candidates(_fitting(target, where) if draft is None else draft)
        every = with_cascades(names)
        longest = max(sum(map(len, q.turns)) // 3 + max_tokens for q in questions)
        loader = Loader(target, where.loading(longest, report))
        loaded = {name: loader.pair(name) for name in every}
    with output.working() as say:
        plain = loaded[names[0]]
        sources = _Sources(questions, trace or [], text, limit)
        answers = sources.answers(plain, target, sampling, max_tokens, seed, say)
        alone = {name: loaded[name] for name in names}
        found = tuned(target, alone, loaded.__getitem__, answers, temperature, max_tokens, seed, say)
    record = _record(target, found, plain, sampling)
    if json:
        typer.echo(jsonlib.dumps(record, indent=1))
    else:
        for line in _lines(found, record, text):
            typer.echo(line)
    if save:
        output.note(f"written to {profiles.save(profiles.Profile(**record['profile']))}")


def _fitting(target: str, where: opt.Placement) -> list[str]:
    """Drafts that need not be named: the one made for the built-in target, and cached models with the target's tokens."""
    if target == "builtin":
        ours = where.runtime != "generic" and where.device_map is None
        return ["builtin"] if ours else []
    from specdec_engine.cached import cached_models, drafts_for

    models = cached_models()
    return [draft.name for model in models if model.name == target for draft in drafts_for(model, models)]


@dataclass(frozen=True, slots=True)
class _Sources:
    """Where answers come from."""

    questions: Sequence[Question]
    traces: Sequence[Path]
    text: Path | None
    limit: int | None

    def answers(
        self, pair: Pair, target: str, sampling: Sampling, max_tokens: int, seed: int, say: Callable[[str], None]
    ) -> list[Answer]:
        from specdec_engine.tune.passes import cut, recorded, written

        if self.traces:
            return [answer for path in self.traces for answer in recorded(path, target, sampling)]
        if self.text is not None:
            ids = pair.encode(read_prompt(None, self.text), chat=False)
            pieces = cut(ids, _TEXT_PROMPT, max_tokens)
            if not pieces:
                raise UsageError(f"{self.text} has {len(ids)} tokens", f"give a text of more than {_TEXT_PROMPT}")
            return pieces[: self.limit or _TEXT_PIECES]
        found: list[Answer] = []
        prompts = (pair.encode(question.turns[0]) for question in self.questions)
        for answer in written(pair, prompts, sampling, max_tokens, seed):
            found.append(answer)
            say(f"writing answers, {len(found)} of {len(self.questions)}")
        if lost := len(self.questions) - len(found):
            output.note(f"left out, since they fill the context: {lost} of {len(self.questions)} prompts")
        return found


def _record(target: str, found: Tuned, pair: Pair, sampling: Sampling) -> dict[str, Any]:
    draft, k = found.setting
    return {
        "schema": "specdec.tune/1",
        "environment": dict(pair.environment),
        "target": target,
        "temperature": sampling.temperature,
        "answers": {"count": len(found.answers), "tokens": found.tokens},
        "costs": {
            member.name: {
                "pass_s": {str(n): cost * member.costs.plain_s for n, cost in member.costs.passes.items()},
                "draft_s": {str(n): cost * member.costs.plain_s for n, cost in member.costs.draft.items()},
            }
            for member in found.members
        },
        "drafts": [
            {"draft": name, "curve": [_point(setting) for setting in curve]} for name, curve in found.curves.items()
        ],
        "predicted": {"draft": found.best.draft, **_point(found.best)},
        "confirmed": [
            {
                "k": arm.arm.k,
                "speedup": arm.speedup.mean,
                "speedup_low": _finite(arm.speedup.low),
                "speedup_high": _finite(arm.speedup.high),
                "mean_emitted_per_cycle": arm.costs.emitted,
            }
            for arm in found.confirmed
        ],
        "gap": found.gap,
        "recommendation": {"draft": draft, "k": k, "speedup": found.advice.speedup, "reason": found.advice.reason},
        "command": shlex.join(["specdec", "generate", "-t", target, "-d", draft, "-k", str(k)]),
        "profile": {"target": target, "draft": draft, "k": k, "sampled": not sampling.greedy},
        "launches": [
            {"server": launch.server, "line": launch.line, "needs": list(launch.needs)}
            for launch in launches(target, draft, found.best.k, not sampling.greedy, _gguf(target))
        ],
    }


def _gguf(target: str) -> str | None:
    """The target's file, for llama.cpp."""
    if target == "builtin":
        from specdec_engine.builtin import builtin_gguf

        return str(builtin_gguf(offline=True))
    return target if target.endswith(".gguf") else None


def _finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None


def _point(setting: Setting) -> dict[str, Any]:
    return {
        "k": setting.k,
        "mean_emitted_per_cycle": setting.emitted,
        "speedup": setting.speedup.mean,
        "speedup_low": _finite(setting.speedup.low),
        "speedup_high": _finite(setting.speedup.high),
    }


def _lines(found: Tuned, record: dict[str, Any], text: Path | None) -> Iterator[str]:
    """For people: what was looked at, the best of each draft, the best one's curve, and what to type."""
    made, costs = record["environment"], found.members[0].costs
    yield (
        f"{one_line(record['target'])}, {made['weights']} on {made['device']}, {made['threads']} threads · "
        f"{len(found.answers)} answers, {found.tokens} tokens, temperature {record['temperature']:g}"
    )
    steps = " · ".join(f"{n} {1e3 * cost * costs.plain_s:.1f}" for n, cost in costs.passes.items())
    yield f"a pass over n tokens takes, in ms: {steps}"
    yield ""
    width = max(len(name) for name in found.curves)
    yield f"{'draft':<{width}}   k  tok/cycle  predicted"
    for curve in found.curves.values():
        best = best_of(curve)
        yield f"{one_line(best.draft):<{width}}  {best.k:>2}  {best.emitted:>9.2f}  {best.speedup}"
    yield ""
    yield f"{one_line(found.best.draft)} by k, predicted:"
    curve = found.curves[found.best.draft]
    top = max(setting.speedup.mean for setting in curve)
    for setting in curve[: max(8, found.best.k + 2)]:
        bar = "█" * round(_BAR * setting.speedup.mean / top)
        mark = " ←" if setting is found.best else ""
        yield f"{setting.k:>3}  {setting.emitted:.2f}  {bar:<{_BAR}}  {setting.speedup.mean:.2f}×{mark}"
    yield ""
    yield from (f"confirmed with k {arm.arm.k}: {arm.speedup}" for arm in found.confirmed)
    if found.gap is not None:
        yield _agreement(found.gap, text)
    yield f"→ {one_line(record['recommendation']['reason'])}"
    yield ""
    yield f"{record['command']} PROMPT"
    yield ""
    yield f"# {profiles.path()} (--save writes it; generate and watch take it up)"
    yield from profiles.Profile(**record["profile"]).lines()
    for launch in record["launches"]:
        yield ""
        yield f"# {launch['server']}: {'; '.join(map(one_line, launch['needs']))}"
        if launch["line"] is not None:
            yield launch["line"]


_BAR = 40


def _agreement(gap: float, text: Path | None) -> str:
    said = f"measured and predicted are {abs(gap):.0%} apart"
    if text is not None:
        return f"{said}; the prediction is for {one_line(str(text))}, the measurement for what the target said instead"
    return (
        said if abs(gap) <= _AGREES else f"{said}: the machine was not quiet, or the answers differ; trust the measured"
    )


_AGREES = 0.10
