"""`specdec tune`: which draft and which k for these prompts, on this machine?"""

from __future__ import annotations

import json as jsonlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from specdec_cli import options as opt
from specdec_cli import output, profiles, tune_report
from specdec_cli.servers.tune import Questioned, TunedServer, tune_server
from specdec_cli.startup import interruptible, quieten
from specdec_engine.bench.figures import FEWEST
from specdec_engine.bench.plan import builtin_questions, chosen
from specdec_engine.core.cycle_types import Sampling
from specdec_engine.errors import SpecdecError, UsageError, reason
from specdec_engine.record.files import RECODE, decode
from specdec_engine.record.prompt_files import Question, read_questions
from specdec_engine.tune.answers import ROOM, Answer, cut, evenly, recorded

if TYPE_CHECKING:
    from specdec_engine.models.options import LoadOptions
    from specdec_engine.pair import Pair
    from specdec_engine.tune.run import Tuned

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
    server: TunedServer,
    where: opt.Placement,
    save: Save = False,
    json: opt.Json = False,
) -> None:
    """Find draft and k for your prompts: predicted from one plain answer to each, then confirmed by a short paired run.

    About a minute for the built-in pair. A profile is a few lines in your config file. Of a running server it is estimated
    which k it should be started with.

    specdec tune

    specdec tune -t org/target -d org/draft --prompts mine.jsonl --save

    specdec tune --attach http://a:8000 --plain http://b:8000 --prompts mine.jsonl
    """
    sampling = Sampling(temperature)
    if server.wanted:
        elsewhere = replace(where, offline=False, debug=False) != opt.Placement()
        given = {"--target": target != "builtin", "--draft": draft, "--trace": trace, "--text": text, "--save": save,
                 "the options of where models run": elsewhere}  # fmt: skip
        questions = chosen(builtin_questions() if prompts is None else read_questions(prompts), (), limit)
        tune_server(server, Questioned(questions, sampling, max_tokens, seed), given, json)
        return
    _check_sources(prompts, trace, text)
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
    record = tune_report.record(target, found, loaded, sampling, profile)
    try:
        if json:
            typer.echo(jsonlib.dumps(record, indent=1))
        else:
            for line in tune_report.lines(found, record, profile, bool(trace), save):
                output.say(line)
    except BrokenPipeError:  # the reader has had enough, and that is no failure
        output.silence_stdout()
    if save and profile is not None:
        output.note(f"written to {profiles.save(profile)}: {profile.said}")


def _check_sources(prompts: Path | None, trace: Sequence[Path] | None, text: Path | None) -> None:
    """Raises UsageError for several of them, and for a trace that is not there."""
    if sum(source is not None for source in (prompts, trace or None, text)) > 1:
        raise UsageError("--prompts, --trace and --text exclude each other", "give one of them")
    if missing := [path for path in trace or () if not path.is_file()]:
        raise UsageError(f"--trace {missing[0]} is no file", "give a file that --trace wrote")


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
    loader.check_drafts()
    found: dict[str, Pair] = {}
    for name in with_cascades(candidates(_fitting(target, options) if drafts is None else drafts)):
        try:
            found[name] = loader.pair(name)
        except SpecdecError as error:
            if drafts is not None:
                raise
            if "," not in name and "+" not in name:
                _leave_out(name, error)
    for sentence in dict.fromkeys(note for pair in found.values() for note in pair.notes):
        output.note(sentence)
    return found


def _leave_out(name: str, error: SpecdecError) -> None:
    """Of a draft that nobody named."""
    output.note(f"{name} is left out: {error.message}")


_MOST_FITTING = 2
"""Cached models that are tried unnamed, the smallest first."""
_WORTH_GUESSING = 0.1
"""A draft step's cost in target passes from which on a lookup is tried that guesses for the draft model: with less, a pass of
the draft over several guesses saves nothing that a cycle would notice."""


def _fitting(target: str, options: LoadOptions) -> list[str]:
    """Drafts that need not be named: those that other packages add, heads made for the target, and cached models, with its
    own tokens where there are such; without any of these, the target's own first layers."""
    from specdec_engine.core.registry import foreign
    from specdec_engine.models.offers import Offer, offers

    by_kind = dict[str, list[Offer]]()
    for offer in offers(target, options):
        by_kind.setdefault(offer.kind, []).append(offer)
    models = (by_kind.get("ids") or by_kind.get("text", [])[:1])[:_MOST_FITTING]
    made = [*by_kind.get("head", []), *models] or by_kind.get("layers", [])
    guessed = [f"ngram+{m.draft}" for m in models if m.kind == "ids" and m.c is not None and m.c[1] >= _WORTH_GUESSING]
    return [*(offer.draft for offer in made), *guessed, *(entry.name for entry in foreign())]


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
