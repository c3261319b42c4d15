"""`specdec generate`: text from a pair, streamed as it is verified."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

from specdec_cli import options as opt
from specdec_cli import output, profiles, shaping
from specdec_cli.answers import Many, answer_all, asking
from specdec_cli.exits import ExitCode
from specdec_cli.prompts import read_prompt
from specdec_cli.recorder import Recorder
from specdec_cli.servers.attached import ServerOptions, asked_of, begun, server_at, state_at
from specdec_cli.startup import interruptible, quieten, uncollected
from specdec_cli.tables import threads
from specdec_cli.templates import Template
from specdec_engine.decoding.stopping import Stop
from specdec_engine.errors import SpecdecError, UsageError
from specdec_engine.record.events import Event, Finished
from specdec_engine.record.stats import Summary
from specdec_engine.record.text import TextStream, TokenText

if TYPE_CHECKING:
    from specdec_engine.attach.attached import Run as ServedRun
    from specdec_engine.constrain.wanted import Grammar
    from specdec_engine.decoding.control import Controls
    from specdec_engine.pair import Pair


@opt.records
def generate(
    *,
    prompt: opt.Prompt = None,
    file: opt.PromptFile = None,
    target: opt.Target = "builtin",
    draft: opt.Draft = None,
    server: ServerOptions,
    how: opt.Decoding,
    template: Template,
    penalties: shaping.Penalties,
    structured: shaping.Structured,
    many: Many,
    where: opt.Placement,
    told: opt.Told,
) -> None:
    """Generate text from a draft/target pair, losslessly.

    specdec generate "Explain how a lighthouse works."

    specdec generate -t org/target -d org/draft -k 6 --temperature 0.7 -f question.txt

    specdec generate --prompts questions.jsonl --batch 8 --out answers.jsonl

    specdec generate --attach http://localhost:8000 "Explain how a lighthouse works."
    """
    # All that can be wrong without a model is found out before one is loaded.
    told.check(many.prompts is not None)
    _ = template.told  # raises
    if server.wanted:
        template.refuse_at_server()
        structured.refuse_at_server()
        penalties.refuse_at_server()
        many.refuse_at_server()
        if told.logprobs is not None:
            raise UsageError("--logprobs is for our own engine", "leave out --attach or --engine")
        _ask_server(server, target, draft, how, where, told, read_prompt(prompt, file))
        return
    many.check_samples(how.sampling.greedy)
    if many.wanted({"PROMPT": prompt is not None, "--file": file, **told.of_one_prompt}):
        _answer_many(many, target, draft, how, template, penalties, structured, where, told.logprobs)
    else:
        _answer_one(prompt, file, target, draft, how, template, penalties, structured, where, told, many.samples)


def _ask_server(
    server: ServerOptions,
    target: str,
    draft: str | None,
    how: opt.Decoding,
    where: opt.Placement,
    told: opt.Told,
    text: str,
) -> None:
    recorder = Recorder(told.trace)
    with _begun_at(server, target, draft, how, where, text) as run, closing(recorder):
        sink = _sink(told, run.texts, run.name)
        recorder.describe(run.name)
        summary = _run(run.events(), sink, recorder, len(run.prompt.ids))
    _say(summary, sink, told.stats, _ending(summary, how.max_tokens, run.asked.stop), state_at(run))
    _leave(summary, recorder)


def _answer_one(
    prompt: str | None,
    file: Path | None,
    target: str,
    draft: str | None,
    how: opt.Decoding,
    template: Template,
    penalties: shaping.Penalties,
    structured: shaping.Structured,
    where: opt.Placement,
    told: opt.Told,
    samples: int,
) -> None:
    sampling = how.sampling
    setting = profiles.chosen(target, draft, how.k, not sampling.greedy, where)
    drafted = opt.k_of(setting.k)
    from specdec_engine.decoding.control import Controls

    Controls(3 if drafted == "auto" else drafted, sampling, how.draft_temperature)
    stops = Stop(how.max_tokens, strings=tuple(how.stop or ())).strings
    grammar = structured.wanted
    _check_penalties(penalties, grammar)
    text = read_prompt(prompt, file)
    recorder = Recorder(told.trace)

    if setting.said:  # before its draft is looked for: who has not typed it must know where the name is from
        output.note(setting.said)
    quieten(where.offline, where.debug)
    with interruptible(), output.narrated() as report, uncollected():
        # Deferred: torch and transformers take 3 s, and `--help` and usage errors must not pay them.
        from specdec_engine.pair import Loader

        tokens = len(text + (how.system or "")) // 3 + how.max_tokens
        loader = Loader(target, where.loading(tokens, report, follow=True))
        template.check(loader.found, raw=how.chat is False)
        pair = penalties.of(loader.pair(setting.draft))
    ids = pair.encode(text, chat=how.chat, system=how.system, template=template.told)
    _tell(pair, text, how, grammar, told.verbose)

    text_of = TokenText(pair.tokenizer)
    recorder.describe(text_of)
    telling = replace(sampling, raw=told.trace is not None or told.jsonl, logprobs=told.logprobs)
    seed = secrets.randbits(32) if how.seed is None else how.seed

    def answer(number: int, give: Callable[[Mapping[str, Any]], None]) -> Summary:
        sink = _sink(told, TextStream(pair.tokenizer, stops), text_of, give)
        if number and isinstance(sink, output.TextOutput):
            output.between(sink)
        controls = pair.controls(drafted, telling, how.draft_temperature)
        events = pair.decode(
            ids,
            controls=controls,
            rule=how.rule,
            max_tokens=how.max_tokens,
            stop=stops,
            seed=(seed + number) % 2**64,
            grammar=grammar,
        )
        summary = _run(events, sink, recorder, len(ids) if number == 0 else 0, lambda: pair.target.cached)
        state = _state(pair, summary, drafted, controls, named=setting.draft is not None)
        _say(summary, sink, told.stats, _ending(summary, how.max_tokens, stops), state)
        if grammar is not None and summary.finish_reason == "length":
            output.note(f"cut, and so not whole by its {grammar.word}: give more --max-tokens")
        return summary

    with closing(recorder):
        summary = _each_sample(answer, samples, told.json)
    if (misfit := _misfit(pair, summary)) is not None:
        output.note(misfit)
    _leave(summary, recorder)


def _each_sample(
    answer: Callable[[int, Callable[[Mapping[str, Any]], None]], Summary], samples: int, json: bool
) -> Summary:
    """The last answer's summary; an interrupt ends all. Several objects are given as one."""
    given, summary = list[Mapping[str, Any]](), Summary()
    try:
        for number in range(samples):
            summary = answer(number, output.record if samples == 1 else given.append)
            if summary.finish_reason == "cancelled":
                break
    finally:
        if json and samples > 1 and given:
            output.record({"schema": "specdec.samples/1", "samples": given})
    return summary


def _sink(
    told: opt.Told,
    stream: output.TextSource,
    text_of: Callable[[int], str],
    give: Callable[[Mapping[str, Any]], None] = output.record,
) -> output.Output:
    """What the user asked stdout to be."""
    if told.jsonl:
        return output.JsonLinesOutput(text_of)
    return output.JsonOutput(stream, text_of, give) if told.json else output.TextOutput(stream, told.color, told.marks)


def _notes(pair: Pair, how: opt.Decoding, grammar: Grammar | None) -> list[str]:
    from specdec_engine.conditions import tree_note

    return [*pair.notes, tree_note(pair.drafter.name, pair.target, how.rule, grammar is not None, pair.asked)]


def _check_penalties(penalties: shaping.Penalties, grammar: Grammar | None) -> None:
    """Before a model is loaded. Raises UsageError."""
    _ = penalties.bias  # raises
    if grammar is not None and (penalties.ignore_eos or penalties.min_tokens):
        raise UsageError("a grammar says itself when a text ends", "leave out --ignore-eos and --min-tokens")


def _tell(pair: Pair, text: str, how: opt.Decoding, grammar: Grammar | None, verbose: bool) -> None:
    """What there is to know before the text begins."""
    said = [] if grammar is None else [f"not followed, of the {grammar.word}: {one}" for one in grammar.warnings]
    said += [*_notes(pair, how, grammar), pair.marks_in(text, how.chat)]
    for sentence in (*said, *(pair.remarks if verbose else ())):
        if sentence:
            output.note(sentence)


@contextmanager
def _begun_at(
    server: ServerOptions, target: str, draft: str | None, how: opt.Decoding, where: opt.Placement, text: str
) -> Iterator[ServedRun]:
    """A run at a server, which is stopped at the end where it was started. Raises UsageError for what it cannot be told."""
    asked_of(text, how)
    with server_at(server, target, draft, how, where) as at:
        yield begun(at, text, how)


def _answer_many(
    many: Many,
    target: str,
    draft: str | None,
    how: opt.Decoding,
    template: Template,
    penalties: shaping.Penalties,
    structured: shaping.Structured,
    where: opt.Placement,
    logprobs: int | None,
) -> None:
    setting = profiles.chosen(target, draft, how.k, not how.sampling.greedy, where)
    asked = asking(many, target, setting.draft, setting.k, how, template, penalties, structured, logprobs)
    if setting.said:
        output.note(setting.said)
    quieten(where.offline, where.debug)
    with interruptible(), output.narrated() as report, uncollected():
        from specdec_engine.pair import Loader

        longest = max(sum(map(len, question.turns)) for question in asked.questions)
        loader = Loader(target, where.loading(longest // 3 + how.max_tokens, report, follow=True))
        template.check(loader.found, raw=how.chat is False)
        pair = loader.pair(setting.draft)
    pair = penalties.of(pair)
    for sentence in filter(None, _notes(pair, how, asked.grammar)):
        output.note(sentence)
    answer_all(pair, asked)


def _run(
    events: Iterator[Event],
    sink: output.Output,
    recorder: Recorder,
    prompt_tokens: int,
    read: Callable[[], int] | None = None,
) -> Summary:
    try:
        return _consume(output.reading(events, prompt_tokens, read), sink, recorder)
    except BrokenPipeError:
        # Here and not in main: Typer would turn it into exit code 1. The reader has had enough, and that is no failure.
        output.silence_stdout()
        raise typer.Exit(ExitCode.OK) from None


def _say(summary: Summary, sink: output.Output, stats: bool, ending: str, state: str) -> None:
    if not stats:
        return
    if isinstance(sink, output.TextOutput):
        sink.separate()
        output.legend(sink)
    output.note(output.summary_line(summary, ending, state))


def _leave(summary: Summary, recorder: Recorder) -> None:
    """Raises the trace's error, and exits with 130 where the run was cancelled."""
    recorder.check()
    if summary.finish_reason == "cancelled":
        raise typer.Exit(ExitCode.INTERRUPTED)


def _consume(events: Iterable[Event], sink: output.Output, recorder: Recorder) -> Summary:
    """Every event to the trace, to stdout and into the summary, until the run or the user ends it."""
    summary = Summary()

    def take(event: Event) -> None:
        nonlocal summary
        summary = summary.plus(event)
        recorder.write(event)
        sink.show(event)

    try:
        for event in events:
            take(event)
    except KeyboardInterrupt:
        take(Finished("cancelled", summary.emitted, summary.cycles, None))
    except BrokenPipeError:
        recorder.write(Finished("cancelled", summary.emitted, summary.cycles, None))
        raise
    except SpecdecError:
        if summary.seed is not None or summary.cycles:  # it had started, and what was emitted until then is valid
            sink.end(summary)
            if isinstance(sink, output.TextOutput):
                sink.separate()
        raise
    sink.end(summary)
    return summary


_FEW, _ENOUGH = 0.15, 50
"""Of a head's first tokens, tested in so many cycles: of one published head 0.59 were accepted, and 0.01 where its layers
were read wrongly (vLLM's pull request 50170)."""


def _misfit(pair: Pair, summary: Summary) -> str | None:
    """What a user of somebody's head or module should know if next to nothing of it is accepted: no error ever says it."""
    kinds = {draft["model_type"] for draft in pair.environment["drafts"].values()}
    first = next(iter(summary.positions), None)
    if kinds not in ({"eagle3"}, {"mtp"}) or "," in pair.drafter.name or first is None or first.tested < _ENOUGH:
        return None
    if first.rate is None or first.rate >= _FEW:
        return None
    what = "the module was not trained with these weights (a target that was trained further often keeps its old one)"
    if kinds != {"mtp"}:
        what = (
            "the head does not fit this target, or is read wrongly (which layers? which target was it trained on? with which "
            "chat template?)"
        )
    return f"{first.rate:.0%} of the first tokens of {first.tested} drafts were accepted: {what}"


def _ending(summary: Summary, max_tokens: int, stops: tuple[str, ...]) -> str:
    match summary.finish_reason:
        case "stop":
            return "stopped" if stops else "ended by itself"
        case "length":
            return "token budget spent" if summary.emitted == max_tokens else "context full"
        case _:
            return "interrupted"


def _state(pair: Pair, summary: Summary, k: int | Literal["auto"], controls: Controls, named: bool) -> str:
    """Whether speculation ran, with what, and why not if it did not."""
    made = pair.environment
    changed = "" if pair.target.followed is None else pair.target.followed.told
    few = changed or (threads(made) if made["device"] == "cpu" and made["threads"] < made["cores"] else "")
    crowded = few and f", {few}"
    where = f"{pair.target.name}, {made['weights']} on {made['device']}{crowded}, {made['runtime']} runtime"
    if k == 0:
        return f"speculation off because k is 0 · {where}"
    if set(pair.drafter.name.split(",")) == {"none"}:
        return f"speculation off because the draft is none · {where}"
    if controls.auto is not None and controls.auto.off:
        return f"speculation off at the end: {controls.reason} · {where}"
    found = "" if summary.drafted else ", which proposed nothing"
    chosen = "" if named else " as none was named"
    return f"speculation on: {pair.drafter.name}{chosen}, k {k}{found} · {where}"
