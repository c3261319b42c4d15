"""`generate --prompts`: a file of prompts, a line an answer as it ends; what was answered before is not asked again."""

from __future__ import annotations

import json
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import IO, TYPE_CHECKING, Annotated, Any, Literal

import typer

from specdec_cli import options as opt
from specdec_cli import output, shaping
from specdec_cli.exits import ExitCode
from specdec_cli.templates import Template
from specdec_engine.bench.plan import digest_of
from specdec_engine.errors import UsageError, reason
from specdec_engine.record.events import Cycle, Event, Failed, Finished, Started, TokenLogprobs, known_ids
from specdec_engine.record.files import decode, lock, parse_record, replace_file
from specdec_engine.record.prompt_files import Question, read_questions
from specdec_engine.record.stats import Summary
from specdec_engine.record.text import TextStream, TokenText, counted

if TYPE_CHECKING:
    from specdec_engine.constrain.wanted import Grammar
    from specdec_engine.pair import Pair

SCHEMA = "specdec.answers/1"
_MANY = "Many prompts"


@dataclass(frozen=True, slots=True)
class Many:
    """A file of prompts in the place of one."""

    prompts: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=_MANY, metavar="FILE", help="Answer each prompt of a file: JSONL, or a prompt a line."
        ),
    ] = None
    batch: Annotated[int, typer.Option(rich_help_panel=_MANY, min=1, help="So many of them at once, at most.")] = 1
    out: Annotated[
        Path | None,
        typer.Option(rich_help_panel=_MANY, metavar="FILE", help="Where answers go, a line each as it ends."),
    ] = None
    resume: Annotated[
        bool, typer.Option("--resume", rich_help_panel=_MANY, help="Go on where --out was interrupted.")
    ] = False
    samples: Annotated[
        int,
        typer.Option(
            rich_help_panel=_MANY, min=1, metavar="N", help="So many answers to each prompt, which is read once."
        ),
    ] = 1

    def refuse_at_server(self) -> None:
        """Raises UsageError for a file of prompts, and for several answers."""
        if self.prompts is not None:
            raise UsageError("--prompts is for our own engine", "specdec bench --attach URL asks a server many prompts")
        if self.samples > 1:
            raise UsageError("--samples is for our own engine", "ask the server again for another answer")

    def check_samples(self, greedy: bool) -> None:
        """Raises UsageError for several answers that would all be the same."""
        if self.samples > 1 and greedy:
            raise UsageError("at temperature 0 all samples are the same answer", "add for example --temperature 0.8")

    def wanted(self, others: Mapping[str, object]) -> bool:
        """others: options of one prompt alone, by name. Raises UsageError for what does not go together."""
        given = {"--batch": self.batch != 1, "--out": self.out is not None, "--resume": self.resume}
        if self.prompts is None:
            if named := [name for name, is_given in given.items() if is_given]:
                raise UsageError(f"{named[0]} needs --prompts", "give a file of prompts")
            return False
        if named := [name for name, is_given in others.items() if is_given]:
            raise UsageError(f"{named[0]} is of one prompt, and --prompts gives many", "leave one of them out")
        if self.resume and self.out is None:
            raise UsageError("--resume needs --out", "name the file that was begun")
        return True


@dataclass(frozen=True, slots=True)
class Asking:
    """What is asked, and how."""

    many: Many
    questions: Sequence[Question]
    settings: Mapping[str, Any]
    """On which the answers depend."""
    how: opt.Decoding
    template: Mapping[str, Any]
    k: int | Literal["auto"]
    grammar: Grammar | None
    logprobs: int | None

    @property
    def answers(self) -> int:
        """How many there will be: those to one prompt have numbers in a row."""
        return len(self.questions) * self.many.samples

    def question(self, number: int) -> Question:
        """The one that this answer is to."""
        return self.questions[number // self.many.samples]


def asking(
    many: Many,
    target: str,
    draft: str | None,
    k: str,
    how: opt.Decoding,
    template: Template,
    penalties: shaping.Penalties,
    structured: shaping.Structured,
    logprobs: int | None = None,
) -> Asking:
    """Raises UsageError for prompts that cannot be read, and for values that no run has."""
    assert many.prompts is not None
    questions, grammar = read_questions(many.prompts), structured.wanted
    if any(len(question.turns) > 1 for question in questions):
        output.note("of conversations the first turn is asked")
    settings = {"target": target, "draft": draft, **asdict(how), "k": k, "stop": list(how.stop or ())}
    settings |= {**asdict(penalties), "logit_bias": {str(i): value for i, value in penalties.bias.items()}}
    settings |= {
        "template": template.told,
        "grammar": None if grammar is None else grammar.named(),
        "samples": many.samples,
        "logprobs": logprobs,
    }
    del settings["seed"]
    return Asking(many, questions, settings, how, template.told, opt.k_of(k), grammar, logprobs)


def answer_all(pair: Pair, asked: Asking) -> None:
    """Every prompt that is not answered yet. Ends with exit code 1 where one failed, and with 130 where it was interrupted.
    Raises UsageError for a file that cannot be gone on with."""
    computed = {name: pair.environment.get(name) for name in _COMPUTED}
    with _Answers.begun(replace(asked, settings={**asked.settings, **computed})) as answers:
        todo = [number for number in range(asked.answers) if number not in answers.done]
        if answers.done:
            what = counted(asked.answers, "prompt" if asked.many.samples == 1 else "answer")
            output.note(
                f"{len(answers.done)} of {what} are {'answered' if asked.many.samples == 1 else 'there'} already"
            )
        whole, began = True, perf_counter()
        try:
            with _told(len(todo)) as tell:
                for number, event in _events(pair, asked, todo, answers.seed):
                    if (ended := answers.take(todo[number], event, pair)) is not None:
                        tell(ended)
        except KeyboardInterrupt:
            whole = False
        answers.say(perf_counter() - began, whole)
    if not whole:
        raise typer.Exit(ExitCode.INTERRUPTED)
    if answers.failed:
        raise typer.Exit(ExitCode.FAILED)


def _events(pair: Pair, asked: Asking, todo: Sequence[int], seed: int) -> Iterator[tuple[int, Event]]:
    how = asked.how

    def ids(number: int) -> Sequence[int]:
        question = asked.question(number)
        system = question.system or how.system
        return question.ids or pair.encode(question.turns[0], chat=how.chat, system=system, template=asked.template)

    return pair.decode_together(
        [partial(ids, number) for number in todo],
        min(asked.many.batch, max(1, len(todo))),
        k=asked.k,
        sampling=replace(how.sampling, logprobs=asked.logprobs),
        rule=how.rule,
        max_tokens=how.max_tokens,
        stop=how.stop or (),
        seeds=[(seed + number) % 2**64 for number in todo],
        grammar=asked.grammar,
    )


@dataclass(slots=True)
class _Answer:
    """One that is being written."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    summary: Summary = field(default_factory=Summary)


class _Answers:
    """Lines, in a file or on stdout."""

    def __init__(self, asked: Asking, file: IO[str] | None, seed: int, done: set[int]) -> None:
        self._asked, self._file, self.seed, self.done = asked, file, seed, done
        self._open = dict[int, _Answer]()
        self.answered = self.failed = self.tokens = 0

    @classmethod
    @contextmanager
    def begun(cls, asked: Asking) -> Iterator[_Answers]:
        """Raises UsageError for a file of other prompts or settings, or that another run writes."""
        seed = secrets.randbits(31) if asked.how.seed is None else asked.how.seed
        if asked.many.out is None:
            yield cls(asked, None, seed, set())
            return
        path = asked.many.out
        head, lines = _before(path) if path.exists() else (None, [])
        if head is not None or lines:
            if not asked.many.resume:
                raise UsageError(f"{path} is there already", "add --resume to go on with it, or choose another --out")
            seed = _same(path, head, asked)
        head = {"schema": SCHEMA, "prompts": digest_of(asked.questions), "seed": seed, "settings": asked.settings}
        kept = [line for line in lines if "error" not in line]  # one that failed is tried again
        with _ours(path, [head, *kept]) as file:
            yield cls(asked, file, seed, {line["index"] * asked.many.samples + line.get("sample", 0) for line in kept})

    def take(self, number: int, event: Event, pair: Pair) -> int | None:
        """The tokens of an answer that ends here; None where none does. Writes its line then."""
        answer = self._open.setdefault(number, _Answer())
        answer.summary = answer.summary.plus(event)
        match event:
            case Started():
                self._open[number] = _Answer(summary=answer.summary)
            case Cycle():
                answer.ids += known_ids(event.emitted)
                answer.logprobs += event.logprobs or ()
            case Finished():
                stream = TextStream(pair.tokenizer, self._asked.how.stop or ())
                text = "".join(map(stream.feed, answer.ids)) + stream.flush()
                figures = {name: value for name, value in answer.summary.figures().items() if name in _FIGURES}
                said = {"text": text, "token_ids": answer.ids, **figures}
                if self._asked.logprobs is not None:
                    said["logprobs"] = output.told_logprobs(answer.logprobs, TokenText(pair.tokenizer))
                self._write(number, said)
                self.answered, self.tokens = self.answered + 1, self.tokens + len(answer.ids)
                return len(self._open.pop(number).ids)
            case Failed():
                self._write(number, {"error": event.error, "message": event.message, "hint": event.hint})
                self.failed += 1
                del self._open[number]
                return 0
        return None

    def _write(self, number: int, said: Mapping[str, Any]) -> None:
        """Raises UsageError for a disk that is full: what was written stays, and --resume goes on."""
        index, sample = divmod(number, self._asked.many.samples)
        place = {"sample": sample} if self._asked.many.samples > 1 else {}
        line = {"index": index, **place, "id": self._asked.question(number).id or None, **said}
        if self._file is None:
            output.record(line)
            return
        try:
            self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise UsageError(
                f"{self._asked.many.out} cannot be written: {reason(error)}", "--resume goes on"
            ) from error

    def say(self, seconds: float, whole: bool) -> None:
        rate = f", {self.tokens / seconds:.1f} tok/s together" if self.tokens else ""
        failed = f", {counted(self.failed, 'prompt')} failed" if self.failed else ""
        ended = "" if whole else "interrupted; " + ("--resume goes on: " if self._file is not None else "")
        output.note(
            f"{ended}{counted(self.answered, 'answer')}, {self.tokens:,} tokens in {seconds:.1f} s{rate}{failed}"
        )


_FIGURES = {"finish_reason", "prompt_tokens", "emitted", "cycles", "drafted", "accepted", "forced", "seed"}


def _before(path: Path) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """A file's first line and the others, without one that a killed run cut short. Raises UsageError for another file."""
    hint = "choose another --out"
    try:
        text = decode(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {reason(error)}", hint) from error
    found = list[dict[str, Any]]()
    lines = text.split("\n")
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                found.append(parse_record(line))
            except ValueError as error:
                if number == len(lines):  # without its end: it was cut
                    continue
                raise UsageError(f"{path}, line {number}: {error}", hint) from error
    if not found:
        return None, []
    head, *rest = found
    if head.get("schema") != SCHEMA or not all(isinstance(line.get("index"), int) for line in rest):
        raise UsageError(f"{path} holds something else than answers", hint)
    return head, rest


_BEFORE = {"samples": 1, "template": {}}
"""Of files from before there was such a setting."""
_COMPUTED = ("dtype", "weights", "runtime")
"""Settings in which the target is computed: near-ties fall otherwise in another. Older files do not say it."""


def _same(path: Path, head: Mapping[str, Any] | None, asked: Asking) -> int:
    """The seed of a file that can be gone on with. Raises UsageError for another one."""
    assert head is not None
    now = json.loads(json.dumps(asked.settings))
    before: Mapping[str, Any] = _BEFORE | {name: now[name] for name in _COMPUTED}
    other = [name for name in now if head["settings"].get(name, before.get(name)) != now[name]]
    if head["prompts"] != digest_of(asked.questions):
        raise UsageError(f"{path} is of other prompts", "give the same file, or another --out")
    if other:
        then = head["settings"].get(other[0])
        raise UsageError(
            f"{path} was begun with {other[0]} {then}, not {now[other[0]]}", "give the same, or another --out"
        )
    if asked.how.seed is not None and asked.how.seed != head["seed"]:
        raise UsageError(f"{path} was begun with the seed {head['seed']}", "leave out --seed, or choose another --out")
    return int(head["seed"])


@contextmanager
def _ours(path: Path, lines: Sequence[Mapping[str, Any]]) -> Iterator[IO[str]]:
    """The file with these lines, to write on. Raises UsageError where it cannot be written, or another run does."""
    whole = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
    try:
        with ExitStack() as open_files:
            file = open_files.enter_context(_locked(path))
            if path.read_bytes() != whole:  # whole or not at all: a run that is killed here loses nothing
                replace_file(path, whole)
                file = open_files.enter_context(_locked(path))
            yield file
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {reason(error)}", "choose another --out") from error


def _locked(path: Path) -> IO[str]:
    """Raises UsageError where another run has it."""
    file = path.open("a", encoding="utf-8")
    if not lock(file):
        file.close()
        raise UsageError(f"another run writes to {path}", "wait for it, or choose another --out")
    return file


@contextmanager
def _told(total: int) -> Iterator[Callable[[int], None]]:
    """On a terminal a bar: how many, how long still; told the tokens of each answer."""
    if not sys.stderr.isatty():
        yield lambda tokens: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
               TextColumn("{task.description}", markup=False))  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task, emitted, began = bar.add_task("", total=total), 0, perf_counter()

        def tell(tokens: int) -> None:
            nonlocal emitted
            emitted += tokens
            bar.update(task, advance=1, description=f"{emitted / (perf_counter() - began):.0f} tok/s together")

        yield tell
