"""`--attach` and `--engine`: a server's run in place of our own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from platformdirs import user_log_path

from specdec_cli import options as opt
from specdec_cli import output
from specdec_engine.decoding.stopping import Stop
from specdec_engine.errors import UsageError

if TYPE_CHECKING:
    from specdec_engine.attach.asked import Asked
    from specdec_engine.attach.attached import Run
    from specdec_engine.tune.engines import Starting


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """A server that runs, or an engine whose server is to be started."""

    attach: opt.Attach = None
    engine: opt.Engine = None
    engine_python: opt.EnginePython = None

    @property
    def wanted(self) -> bool:
        """Raises UsageError for options that exclude each other."""
        if self.attach is not None and self.engine is not None:
            raise UsageError("--attach and --engine exclude each other", "--attach takes a server that runs already")
        if self.engine is None and (self.engine_python is not None or SERVER_FLAGS):
            what = "--engine-python needs" if self.engine_python is not None else "flags of a server, after --, need"
            raise UsageError(f"{what} --engine", "vllm, sglang or llama.cpp")
        return self.attach is not None or self.engine is not None


SERVER_FLAGS: list[str] = []
"""What stood after `--` on a command line with --engine (`take_server_flags`)."""


def take_server_flags(argv: list[str]) -> list[str]:
    """The command line without what stands after `--`, where an engine is named; that is kept for its server."""
    named = any(word == "--engine" or word.startswith("--engine=") for word in argv)
    if named and "--" in argv:
        at = argv.index("--")
        SERVER_FLAGS[:] = argv[at + 1 :]
        return argv[:at]
    return argv


def short(name: str) -> str:
    """A path's last part: the rest would fill a screen."""
    return Path(name).name if Path(name).is_absolute() else name


@dataclass(frozen=True, slots=True)
class At:
    """A server that answers."""

    url: str
    draft: str | None = None
    """What it drafts with, where we started it."""
    k: int | None = None


@contextmanager
def server_at(
    options: ServerOptions, target: str, draft: str | None, how: opt.Decoding, where: opt.Placement
) -> Iterator[At]:
    """One that was started is stopped at the end. Raises UsageError for what it cannot be told."""
    if options.attach is not None:
        _refuse_unsteerable("--attach", how, where, {"--target": target != "builtin", "--draft": draft, "-k": how.k})
        yield At(options.attach)
        return
    assert options.engine is not None
    _refuse_unsteerable(f"--engine {options.engine}", how, where, {})
    from specdec_engine.tune.engines import drafted_with

    wanted = starting(options, target, draft, how.k, not how.sampling.greedy)
    with started(wanted, where.offline) as url:
        yield At(url, short(drafted_with(wanted)), wanted.k or None)


def _refuse_unsteerable(by: str, how: opt.Decoding, where: opt.Placement, more: Mapping[str, object]) -> None:
    """Raises UsageError for an option that only our own engine has."""
    given = {
        **more,
        "--rule": how.rule != "token",
        "--coupling": how.coupling != "independent",
        "--draft-temperature": how.draft_temperature is not None,
        "the options of where models run": replace(where, offline=False, debug=False) != opt.Placement(),
    }
    if named := [name for name, is_given in given.items() if is_given not in (None, False)]:
        raise UsageError(
            f"{by} cannot be told {named[0]}: a server keeps what it was started with",
            "leave it out, or give the server its own flag, after --"
            if by.startswith("--engine")
            else "leave it out, or start the server with it: specdec tune prints the lines",
        )


def starting(options: ServerOptions, target: str, draft: str | None, k: str | None, sampled: bool) -> Starting:
    """How the server is to be started; says what is not as it was typed. Raises UsageError for k auto."""
    from specdec_cli.tune_report import gguf_of
    from specdec_engine.tune.engines import DEFAULT_K, Starting, drafted_with, left_out

    assert options.engine is not None
    drafts = draft or ("ngram,builtin" if target == "builtin" else "ngram")
    if k is not None and not k.isdecimal():
        raise UsageError(f"-k {k} is not for --engine {options.engine}: a server keeps one k", "give one number")
    count = DEFAULT_K if k is None else int(k)
    if target.endswith(".gguf") and not Path(target).is_file():
        raise UsageError(f"{target} is no file", "check the path")
    if count < 1:
        drafts = "none"
    gguf = gguf_of(target) if options.engine == "llama.cpp" else None
    made = Starting(options.engine, target, drafts, count, sampled, gguf, options.engine_python, tuple(SERVER_FLAGS))
    if others := left_out(made):
        output.note(f"{options.engine} drafts one way at a time: {drafted_with(made)}, and not {', '.join(others)}")
    return made


@contextmanager
def started(wanted: Starting, offline: bool) -> Iterator[str]:
    """The address of the server, started with its log kept."""
    from specdec_engine.attach.launch import free_port, launched
    from specdec_engine.tune.engines import command_of

    port = free_port()
    command = command_of(wanted, port)
    log = user_log_path("specdec") / f"{wanted.engine}.log"
    environment = {"HF_HUB_OFFLINE": "1"} if offline else {}
    with ExitStack() as leaving:
        with output.working() as say:
            url = leaving.enter_context(launched(command, port, environment, log, say))
        yield url


def asked_of(text: str, how: opt.Decoding) -> Asked:
    """Raises UsageError for values that no run has."""
    from specdec_engine.attach.asked import Asked

    stops = Stop(how.max_tokens, strings=tuple(how.stop or ())).strings
    return Asked(text, how.sampling, how.max_tokens, stops, how.seed, how.chat, how.system)


def begun(at: At, text: str, how: opt.Decoding) -> Run:
    """Recognise the server, and have it make tokens of the prompt."""
    from specdec_engine.attach.attached import attach

    asked = asked_of(text, how)
    return attach(at.url, at.draft, at.k).begin(asked)


def state_at(run: Run) -> str:
    """Who ran it, and with what."""
    about = run.engine.about
    version = f" {about.version}" if about.version else ""
    speculation = "no speculation there" if about.draft == "none" else f"draft {about.draft}"
    return f"{run.engine.name}{version} at {run.url}: {about.target}, {speculation}"
