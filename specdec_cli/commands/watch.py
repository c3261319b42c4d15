"""`specdec watch`: a run live, cycle by cycle."""

from __future__ import annotations

import math
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from platformdirs import user_log_path

from specdec_cli import options as opt
from specdec_cli import output, profiles, shaping
from specdec_cli.commands.replay import teach
from specdec_cli.exits import ExitCode
from specdec_cli.prompts import read_prompt, stdin_is_piped
from specdec_cli.servers.attached import At, ServerOptions, asked_of, server_at
from specdec_cli.servers.metrics import Counters, show_counters
from specdec_cli.startup import has_screen, quieten, served, uncollected
from specdec_cli.templates import Template
from specdec_engine.decoding.stopping import Stop
from specdec_engine.errors import UsageError
from specdec_tui.live import LiveStream, Request

if TYPE_CHECKING:
    from specdec_engine.constrain.wanted import Grammar
    from specdec_engine.models.progress import Report
    from specdec_engine.pair import Pair
    from specdec_tui.served import ServerStream
    from specdec_tui.start import Choice


@opt.records
def watch(
    *,
    prompt: opt.Prompt = None,
    file: opt.PromptFile = None,
    target: opt.Target = "builtin",
    draft: opt.Draft = None,
    server: ServerOptions,
    how: opt.Decoding,
    template: Template,
    structured: shaping.Structured,
    where: opt.Placement,
    counters: Counters,
    demo: Annotated[bool, typer.Option("--demo", help="A recorded run of the built-in pair; loads no model.")] = False,
    lesson: Annotated[
        bool,
        typer.Option(
            "--lesson", help="Fourteen pages on a recorded run: what happens, why nothing is lost, when it pays."
        ),
    ] = False,
    theme: opt.Theme = "auto",
    browser: Annotated[
        bool, typer.Option("--browser", help="Show the screen in a browser on this machine, in place of the terminal.")
    ] = False,
) -> None:
    """Watch a run live: each draft, what was kept, what was not and why.

    specdec watch "Explain how a lighthouse works."

    specdec watch --demo

    specdec watch --lesson

    specdec watch --attach http://localhost:8000 "Explain how a lighthouse works."

    specdec watch --attach http://localhost:8000 --metrics
    """
    if counters.wanted(server.attach, prompt is not None or file is not None):
        show_counters(server.attach or "", counters)
        return
    if demo or lesson:
        _check_alone(demo and lesson, prompt is not None or file is not None, server.wanted)
    if browser:
        _in_browser(prompt, file, how)
    from specdec_tui.theme import want  # Textual takes 0.3 s

    want("dark" if theme == "auto" and served() else theme)
    if demo or lesson:
        _show_recorded(lesson)
        return
    _check_terminal()
    if server.wanted:
        structured.refuse_at_server()
        template.refuse_at_server()
        text = read_prompt(prompt, file)
        asked_of(text, how)
        with server_at(server, target, draft, how, where) as at:
            _watch_server(at, text, how)
    _watch_pair(prompt, file, target, draft, how, template, structured.wanted, where)


def _check_alone(both: bool, prompted: bool, served: bool) -> None:
    """Raises UsageError for what does not go with a recorded run."""
    if both or prompted:
        raise UsageError("--demo and --lesson show a recorded run of their own", "leave out the prompt, or the other")
    if served:
        raise UsageError("--demo and --lesson show a recorded run, and no server", "leave one of them out")


def _in_browser(prompt: str | None, file: Path | None, how: opt.Decoding) -> NoReturn:
    """Serve this command's own words. Raises UsageError for a prompt that can be read but once, and for what each visit
    would be refused for."""
    if prompt == "-" or stdin_is_piped():
        raise UsageError("--browser begins a run at each visit", "give the prompt as an argument, or with -f")
    if prompt is not None or file is not None:
        read_prompt(prompt, file)
    _checked(how)
    from specdec_cli.browser import serve

    serve([word for word in sys.argv[1:] if word != "--browser"])


def _show_recorded(lesson: bool) -> None:
    if lesson:
        _teach()
        return
    _check_terminal()
    _demonstrate()


def _check_terminal() -> None:
    """Raises UsageError without one."""
    if not sys.stdout.isatty() and not served():
        raise UsageError("watch needs a terminal", "use specdec generate, or specdec replay --plain on a trace")


def _checked(how: opt.Decoding) -> tuple[str, ...]:
    """The strings that end the text. Raises UsageError for settings that no run can have."""
    from specdec_engine.decoding.control import Controls

    typed = opt.k_of(how.k or "auto")
    Controls(3 if typed == "auto" else typed, how.sampling, how.draft_temperature)
    return Stop(how.max_tokens, strings=tuple(how.stop or ())).strings


def _watch_pair(
    prompt: str | None,
    file: Path | None,
    target: str,
    draft: str | None,
    how: opt.Decoding,
    template: Template,
    grammar: Grammar | None,
    where: opt.Placement,
) -> None:
    """On our own engine."""
    sampling, stops = how.sampling, _checked(how)
    told = template.told
    if prompt is None and file is None and (sys.stdin.isatty() or served()):
        chosen = _start(target, draft)
        if chosen.entry.kind != "run":
            (_teach if chosen.entry.kind == "lesson" else _demonstrate)()
            return
        prompt, target, draft = chosen.prompt, chosen.entry.target, chosen.entry.draft
    text = read_prompt(prompt, file)
    setting = profiles.chosen(target, draft, how.k, not sampling.greedy, where)
    drafted = opt.k_of(setting.k)
    if setting.said:
        output.note(setting.said)
    _keys_from_the_terminal()
    quieten(where.offline, where.debug)

    def load(report: Report) -> Pair:
        # In the engine's thread, while the first frame is on screen: torch and transformers take 3 s.
        with uncollected():
            from specdec_engine.pair import Loader

            tokens = len(text + (how.system or "")) // 3 + how.max_tokens
            loader = Loader(target, where.loading(tokens, report))
            template.check(loader.found, raw=how.chat is False)
            return loader.pair(setting.draft)

    request = Request(
        text,
        drafted,
        replace(sampling, raw=True),
        how.draft_temperature,
        how.rule,
        how.max_tokens,
        stops,
        how.seed,
        how.chat,
        how.system,
        grammar,
        told,
    )
    _shown(LiveStream(load, request, user_log_path("specdec") / "watch.log"))


def _watch_server(at: At, text: str, how: opt.Decoding) -> NoReturn:
    asked = asked_of(text, how)
    _keys_from_the_terminal()
    from specdec_tui.served import ServerStream

    request = Request(
        text,
        sampling=asked.sampling,
        max_tokens=asked.max_tokens,
        stop=asked.stop,
        seed=asked.seed,
        chat=asked.chat,
        system=asked.system,
    )
    _shown(ServerStream(at.url, request, user_log_path("specdec") / "watch.log", at.draft, at.k))


def _shown(stream: LiveStream | ServerStream) -> NoReturn:
    from specdec_tui.app import SpecdecApp  # Textual takes 0.3 s
    from specdec_tui.leaving import show

    try:
        show(SpecdecApp(stream, speed=math.inf))
    except SystemExit as ended:
        _left(stream, int(ended.code or 0))
    _left(stream)


def _start(target: str, draft: str | None) -> Choice:
    """Ask what to run. Leaves where the user does."""
    from specdec_engine.models.hub_cache import cached_models, drafts_for
    from specdec_tui.leaving import show
    from specdec_tui.start import Entry, StartApp

    entries = [
        Entry("the built-in pair", "SmolLM2-135M-Instruct with a lookup and a draft made for it; 98 MB, fetched once"),
        Entry("a recorded run", "of the built-in pair, step by step; loads no model", "demo"),
        Entry("the lesson", "fourteen pages with questions: what happens, why nothing is lost, when it pays", "lesson"),
    ]
    if target != "builtin" or draft is not None:
        entries.insert(0, Entry("what you named", f"{target}, draft {draft or 'ngram'}", "run", target, draft))
    models = cached_models()
    for model in models:
        drafts = drafts_for(model, models)
        names = f"ngram,{drafts[0].name}" if drafts else "ngram"
        fits = f"draft {drafts[0].name}: same tokenizer" if drafts else "no cached model fits as its draft; by lookup"
        entries.append(
            Entry(model.name, f"{model.model_type}, {model.size / 1e9:.1f} GB · {fits}", "run", model.name, names)
        )
    if (choice := show(StartApp(entries))) is None:
        raise typer.Exit
    return choice


def _demonstrate() -> None:
    """The run waits for a key. Raises UsageError where there is no terminal to press one."""
    if not has_screen():
        raise UsageError("the demo needs a terminal", "specdec watch --lesson says what happens in sentences")
    from specdec_tui.app import SpecdecApp
    from specdec_tui.leaving import show
    from specdec_tui.player import REPLAY_SPEED
    from specdec_tui.screens.watch import Guide
    from specdec_tui.streams import DEMO, ReplayStream

    guide = Guide(
        "A recorded run: a lookup (ngram) and a small head (builtin) draft for SmolLM2-135M. Space plays it, "
        "→ shows the next cycle, . a single step, ? all keys.",
        'Next: specdec watch --lesson says why nothing is lost; specdec watch "your prompt" runs it here.',
    )
    show(SpecdecApp(ReplayStream(DEMO), speed=REPLAY_SPEED, guide=guide))


def _teach() -> None:
    from specdec_tui.streams import DEMO

    teach(DEMO)


def _left(stream: LiveStream | ServerStream, code: int = ExitCode.OK) -> NoReturn:
    """The terminal is whole again: say what went wrong, and do not wait for a pass or a download that goes on."""
    stage = stream.stage
    for sentence in stream.notes:  # on the screen they were seen for a moment
        output.note(sentence)
    if stream.error is None and stage is not None and stage.failed:
        output.error(stage.text, stage.hint)
        raise typer.Exit(ExitCode.FAILED)
    if not stream.closed and isinstance(
        stream, LiveStream
    ):  # a server's waits for nothing, and may have been started here
        sys.stdout.flush()
        os._exit(code)
    if stream.error is not None:
        raise stream.error
    raise typer.Exit(code)


def _keys_from_the_terminal() -> None:
    """A prompt that was piped in has used up stdin."""
    if not sys.stdin.isatty() and not served():
        try:
            os.dup2(os.open("/dev/tty", os.O_RDONLY), sys.stdin.fileno())
        except OSError as error:
            raise UsageError("watch needs a terminal for its keys", "give the prompt as an argument") from error
