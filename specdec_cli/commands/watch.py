"""`specdec watch`: a run live, cycle by cycle."""

from __future__ import annotations

import math
import os
import sys
from typing import TYPE_CHECKING, Annotated

import typer
from platformdirs import user_log_path

from specdec_cli import options as opt
from specdec_cli import output
from specdec_cli.commands.generate import quieten
from specdec_cli.commands.replay import replay
from specdec_cli.exits import ExitCode
from specdec_cli.prompts import read_prompt
from specdec_engine.control import Controls
from specdec_engine.errors import UsageError
from specdec_engine.stopping import Stop
from specdec_engine.types import Sampling
from specdec_tui.live import LiveSource, Request

if TYPE_CHECKING:
    from specdec_engine.pair import Pair
    from specdec_engine.progress import Report


def watch(
    prompt: opt.Prompt = None,
    file: opt.PromptFile = None,
    target: opt.Target = "builtin",
    draft: opt.Draft = None,
    k: opt.K = "auto",
    temperature: opt.Temperature = 0.0,
    top_k: opt.TopK = 0,
    top_p: opt.TopP = 1.0,
    min_p: opt.MinP = 0.0,
    draft_temperature: opt.DraftTemperature = None,
    rule: opt.Rule = "token",
    coupling: opt.Coupling = "independent",
    seed: opt.Seed = None,
    max_tokens: opt.MaxTokens = 256,
    stop: opt.StopText = None,
    chat: opt.Chat = None,
    system: opt.System = None,
    device: opt.Device = "auto",
    device_map: opt.DeviceMap = None,
    dtype: opt.Dtype = "auto",
    runtime: opt.Runtime = "auto",
    quantize: opt.Quantize = "auto",
    draft_quantize: opt.DraftQuantize = "auto",
    threads: opt.Threads = None,
    offline: opt.Offline = False,
    trust_remote_code: opt.TrustRemoteCode = False,
    debug: opt.Debug = False,
    demo: Annotated[bool, typer.Option("--demo", help="A recorded run of the built-in pair; loads no model.")] = False,
) -> None:
    """Watch a run live: each draft, what was kept, what was not and why.

    specdec watch "Explain how a lighthouse works."

    specdec watch --demo
    """
    if not sys.stdout.isatty():
        raise UsageError("watch needs a terminal", "use specdec generate, or specdec replay --plain on a trace")
    if demo:
        from specdec_tui.source import DEMO

        replay(DEMO)
        return
    drafted, sampling = opt.k_of(k), Sampling(temperature, top_k, top_p, min_p, coupling)
    Controls(3 if drafted == "auto" else drafted, sampling, draft_temperature)
    stops = Stop(max_tokens, strings=tuple(stop or ())).strings
    text = read_prompt(prompt, file)
    _keys_from_the_terminal()
    quieten(offline, debug)

    def load(report: Report) -> Pair:
        # In the engine's thread, while the first frame is on screen: torch and transformers take 3 s.
        from specdec_engine.loading import LoadOptions
        from specdec_engine.machine import usable_cores
        from specdec_engine.pair import load_pair

        options = LoadOptions(
            device=device,
            dtype=dtype,
            device_map=device_map,
            runtime=runtime,
            quantize=quantize,
            draft_quantize=draft_quantize,
            threads=threads or usable_cores(),
            offline=offline,
            trust_remote_code=trust_remote_code,
            tokens=len(text) // 3 + max_tokens,
            report=report,
        )
        return load_pair(target, draft, options)

    from specdec_tui.app import SpecdecApp  # Textual takes 0.3 s

    request = Request(text, drafted, sampling, draft_temperature, rule, max_tokens, stops, seed, chat, system)
    source = LiveSource(load, request, user_log_path("specdec") / "watch.log")
    SpecdecApp(source, speed=math.inf).run()
    _left(source)


def _left(source: LiveSource) -> None:
    """The terminal is whole again: say what went wrong, and do not wait for a pass or a download that goes on."""
    stage = source.stage
    if source.error is None and stage is not None and stage.failed:
        output.error(stage.text, stage.hint)
        raise typer.Exit(ExitCode.FAILED)
    if not source.closed:
        sys.stdout.flush()
        os._exit(ExitCode.OK)
    if source.error is not None:
        raise source.error


def _keys_from_the_terminal() -> None:
    """A prompt that was piped in has used up stdin."""
    if not sys.stdin.isatty():
        try:
            os.dup2(os.open("/dev/tty", os.O_RDONLY), sys.stdin.fileno())
        except OSError as error:
            raise UsageError("watch needs a terminal for its keys", "give the prompt as an argument") from error
