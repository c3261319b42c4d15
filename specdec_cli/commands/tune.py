"""`specdec tune`: which draft and which k for these prompts, on this machine?"""

from __future__ import annotations

import json as jsonlib
import math
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specdec_cli import options as opt
from specdec_cli import output, profiles
from specdec_cli.startup import interruptible, quieten
from specdec_cli.tables import threads
from specdec_engine.bench.figures import FEWEST
from specdec_engine.bench.plan import builtin_questions, chosen
from specdec_engine.core.cycle_types import Sampling
from specdec_engine.errors import SpecdecError, UsageError, reason
from specdec_engine.record.files import RECODE, decode
from specdec_engine.record.prompt_files import Question, read_questions
from specdec_engine.tune.answers import ROOM, Answer, cut, evenly, recorded
from specdec_engine.tune.servers import Launch, Wanted, launches, served
from specdec_engine.tune.whatif import best_of

if TYPE_CHECKING:
    from specdec_engine.models.options import LoadOptions
    from specdec_engine.pair import Pair
    from specdec_engine.tune.run import Tuned
    from specdec_engine.tune.whatif import Setting

_TEXT_PROMPT = 64
"""Tokens of a text's piece that are taken for its prompt."""
_MOST_ANSWERS = 24
"""Of a text or of traces, where --limit says no number."""

_What = "What is looked at"

Drafts = Annotated[
    list[str] | None,
    typer.Option(
        "--draft",
        "-d",
        rich_help_panel=_What,
        help="A draft to consider; repeatable. Lookups always are, alone and before each other; of a cascade each member is.",
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
    typer.Option(
        "--trace",
        rich_help_panel=_What,
        help="Take the answers of recorded runs instead; repeatable, three runs or more.",
    ),
]
Text = Annotated[
    Path | None,
    typer.Option(
        "--text",
        rich_help_panel=_What,
        help="Take pieces of a text file instead, as if the target had written them; predicted only.",
    ),
]
Limit = Annotated[
    int | None, typer.Option(rich_help_panel=_What, help="At most so many prompts, evenly spread.", min=1)
]
Temperature = Annotated[float, typer.Option(rich_help_panel=_What, help="Of your runs; 0 is greedy.")]
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
    """Find draft and k for your prompts: predicted from one plain answer to each, then confirmed by a short paired run.

    About a minute for the built-in pair. A profile is a few lines in your config file.

    specdec tune

    specdec tune -t org/target -d org/draft --prompts mine.jsonl --save
    """
    sampling = Sampling(temperature)
    if sum(source is not None for source in (prompts, trace or None, text)) > 1:
        raise UsageError("--prompts, --trace and --text exclude each other", "give one of them")
    if missing := [path for path in trace or () if not path.is_file()]:
        raise UsageError(f"--trace {missing[0]} is no file", "give a file that --trace wrote")
    if save:
        profiles.profiles()  # a damaged config file is found before anything is measured
    sources = _Sources(
        questions=chosen(builtin_questions() if prompts is None else read_questions(prompts), (), limit),
        recorded=[answer for path in trace or () for answer in recorded(path, target, sampling)],
        text=None if text is None else _text(text),
        limit=limit,
    )
    quieten(where.offline, where.debug)
    with interruptible(), output.narrated() as report:
        from specdec_engine.tune.run import tuned

        loaded = _loaded(target, draft, where.loading(sources.longest(max_tokens), report))
    try:
        with output.working() as say:
            answers = sources.answers(loaded["ngram"], sampling, max_tokens, seed, say)
            if save and (text is not None or len(answers) < FEWEST):
                raise UsageError(
                    f"--save with {'a text' if text is not None else f'{len(answers)} answers'} has nothing to confirm",
                    f"give at least {FEWEST} prompts, or leave out --save",
                )
            leave_out = _leave_out if draft is None else None
            found = tuned(target, loaded, answers, temperature, max_tokens, seed, say, text is None, leave_out)
    except KeyboardInterrupt:
        output.note("interrupted; nothing is recommended, and nothing is saved")
        raise
    profile = _profile(target, found, sampling, where)
    record = _record(target, found, loaded, sampling, profile)
    try:
        if json:
            typer.echo(jsonlib.dumps(record, indent=1))
        else:
            for line in _lines(found, record, profile, bool(trace)):
                output.say(line)
    except BrokenPipeError:  # the reader has had enough, and that is no failure
        output.silence_stdout()
    if save and profile is not None:
        output.note(f"written to {profiles.save(profile)}: {profile.said}")


def _text(path: Path) -> str:
    """Raises UsageError for what is no text."""
    try:
        found = decode(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(f"--text {path} cannot be read: {reason(error)}", RECODE) from error
    if not found.strip():
        raise UsageError(f"--text {path} is empty", "give a text of some hundred words")
    return found


def _loaded(target: str, drafts: Sequence[str] | None, options: LoadOptions) -> dict[str, Pair]:
    """Pairs of every draft that is considered; of those that nobody named, one that cannot be had is left out."""
    from specdec_engine.pair import Loader
    from specdec_engine.tune.run import candidates, with_cascades

    if drafts is not None and set(",".join(drafts).split(",")) <= {"none", ""}:
        raise UsageError(f"--draft {','.join(drafts)} is nothing to tune", "leave it out, or name a draft")
    loader = Loader(target, options)
    found: dict[str, Pair] = {}
    for name in with_cascades(candidates(_fitting(target) if drafts is None else drafts)):
        try:
            found[name] = loader.pair(name)
        except SpecdecError as error:
            if drafts is not None:
                raise
            if "," not in name:
                _leave_out(name, error)
    for sentence in dict.fromkeys(note for pair in found.values() for note in pair.notes):
        output.note(sentence)
    return found


def _leave_out(name: str, error: SpecdecError) -> None:
    """Of a draft that nobody named."""
    output.note(f"{name} is left out: {error.message}")


_MOST_FITTING = 2
"""Cached models that are tried unnamed, the smallest first."""


def _fitting(target: str) -> list[str]:
    """Drafts that need not be named: those that other packages add, the one made for the built-in target, and cached models
    with the target's tokens."""
    from specdec_engine.core.registry import foreign

    added = [entry.name for entry in foreign()]
    if target == "builtin":
        return ["builtin", *added]
    from specdec_engine.models.hub_cache import cached_models, drafts_for

    models = cached_models()
    fitting = [draft.name for model in models if model.name == target for draft in drafts_for(model, models)]
    return [*fitting[:_MOST_FITTING], *added]


@dataclass(frozen=True, slots=True)
class _Sources:
    """Where answers come from."""

    questions: Sequence[Question]
    recorded: Sequence[Answer]
    text: str | None
    limit: int | None

    def longest(self, max_tokens: int) -> int:
        """Tokens of context to make room for."""
        asked = max(sum(map(len, q.turns)) // 3 for q in self.questions)
        return max(asked, *(a.begin for a in self.recorded), _TEXT_PROMPT) + max(max_tokens, ROOM)

    def answers(
        self, pair: Pair, sampling: Sampling, max_tokens: int, seed: int, say: Callable[[str], None]
    ) -> list[Answer]:
        """At most `max_tokens` each, and `limit` of them. Raises UsageError for a text that is too short."""
        from specdec_engine.tune.passes import written

        room = pair.target.limit or math.inf
        if self.recorded or self.text is not None:
            found = [a.first(max_tokens) for a in self.recorded]
            if self.text is not None:
                ids = pair.encode(self.text, chat=False)
                found = cut(ids, _TEXT_PROMPT, max_tokens)
                if not found:
                    raise UsageError(f"the text has {len(ids)} tokens", f"give more than {_TEXT_PROMPT + 1}")
            spread = evenly(found, self.limit or _MOST_ANSWERS)
            if len(spread) < len(found):
                output.note(f"{len(spread)} of {len(found)} pieces of {max_tokens} tokens are looked at (--limit)")
            return [answer for answer in spread if len(answer.context) <= room]
        if any(len(q.turns) > 1 for q in self.questions):
            output.note("of conversations the first turn is asked")
        found, prompts = (
            [],
            (pair.encode(question.turns[0], system=question.system or None) for question in self.questions),
        )
        for answer in written(pair, prompts, sampling, max_tokens, seed):
            found.append(answer)
            say(f"writing answers, {len(found)} of {len(self.questions)}")
        if lost := len(self.questions) - len(found):
            output.note(f"left out, since they fill the context: {lost} of {len(self.questions)} prompts")
        return found


def _profile(target: str, found: Tuned, sampling: Sampling, where: opt.Placement) -> profiles.Profile | None:
    """None where nothing could be confirmed."""
    draft, k = found.setting
    known = found.advice.decided
    return profiles.Profile(target, draft, k, not sampling.greedy, profiles.placement_of(where)) if known else None


def _record(
    target: str, found: Tuned, pairs: Mapping[str, Pair], sampling: Sampling, profile: profiles.Profile | None
) -> dict[str, Any]:
    draft, k = found.setting
    drafts = {name: part for pair in pairs.values() for name, part in pair.environment["drafts"].items()}
    return {
        "schema": "specdec.tune/1",
        "environment": {**next(iter(pairs.values())).environment, "drafts": drafts},
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
        "command": shlex.join(_command(target, draft, k, sampling)),
        "profile": None if profile is None else profile.block(),
        "launches": [
            {"server": launch.server, "line": launch.line, "needs": list(launch.needs)}
            for launch in _launches(target, draft, found, sampling)
        ],
    }


def _launches(target: str, draft: str, found: Tuned, sampling: Sampling) -> list[Launch]:
    """Servers run one draft: of a cascade one member, with the k that is best for it alone."""
    member, left_out = served(draft)
    if member is None:
        return []
    k = best_of(found.curves[member]).k
    return launches(Wanted(target, member, k, not sampling.greedy, _gguf(target), left_out))


def _command(target: str, draft: str, k: object, sampling: Sampling) -> list[str]:
    sampled = [] if sampling.greedy else ["--temperature", f"{sampling.temperature:g}"]
    return ["specdec", "generate", "-t", target, "-d", draft, "-k", str(k), *sampled, "PROMPT"]


def _gguf(target: str) -> str | None:
    """The target's file, for llama.cpp."""
    if target == "builtin":
        from specdec_engine.models.builtin import builtin_gguf

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


def _lines(found: Tuned, record: dict[str, Any], profile: profiles.Profile | None, given: bool) -> Iterator[str]:
    """For people: what was looked at, the best of each draft, the best one's curve, and what to type."""
    made, costs = record["environment"], found.members[0].costs
    yield (
        f"{record['target']}, {made['weights']} on {made['device']}, {threads(made)} · "
        f"{len(found.answers)} answers, {found.tokens} tokens, temperature {record['temperature']:g}"
    )
    steps = " · ".join(f"{n} {1e3 * cost * costs.plain_s:.1f}" for n, cost in costs.passes.items() if n <= _SHOWN)
    yield f"a pass over n tokens, in ms: {steps}"
    yield ""
    width = max(len(name) for name in found.curves)
    yield f"{'draft':<{width}}   k  tok/cycle  predicted speedup"
    for curve in found.curves.values():
        best = best_of(curve)
        yield f"{best.draft:<{width}}  {best.k:>2}  {best.emitted:>9.2f}  {best.speedup}"
    yield ""
    yield f"{found.best.draft} by k:"
    yield f"  k  tok/cycle  {'predicted speedup':>{_BAR + 6}}"
    curve = found.curves[found.best.draft]
    top = max(setting.speedup.mean for setting in curve)
    for setting in curve[: max(_SHOWN, found.best.k + 2)]:
        bar = "█" * round(_BAR * setting.speedup.mean / top)
        mark = " ←" if setting is found.best else " slower" if setting.speedup.mean < 1 else ""
        yield f"{setting.k:>3}  {setting.emitted:>9.2f}  {bar:<{_BAR}} {setting.speedup.mean:.2f}×{mark}"
    for launch in record["launches"]:
        yield ""
        yield f"# {'; '.join(launch['needs'])}"
        yield launch["line"]
    if not record["launches"] and found.setting[1]:
        yield ""
        yield f"# no server loads {found.setting[0]}"
    if profile is not None:
        yield ""
        yield f"# a profile for {profiles.path()}: --save writes it, and generate and watch take it up"
        yield from profile.lines()
    yield ""
    yield from (f"confirmed with k {arm.arm.k}: {arm.speedup}" for arm in found.confirmed)
    if found.gap is not None:
        yield _agreement(found.gap, given)
    yield f"→ {record['recommendation']['reason']}"
    yield record["command"]


_BAR = 40
_SHOWN = 8


def _agreement(gap: float, given: bool) -> str:
    said = f"measured and predicted are {abs(gap):.0%} apart"
    if given:
        return f"{said}; predicted for the recorded texts, measured on what the target says to their prompts now"
    return said if abs(gap) <= _AGREES else f"{said}: the machine was not quiet; trust the measured, or run again"


_AGREES = 0.10
