"""`--attach`: a running server's run in place of our own."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from specdec_cli import options as opt
from specdec_engine.decoding.stopping import Stop
from specdec_engine.errors import UsageError

if TYPE_CHECKING:
    from specdec_engine.attach.asked import Asked
    from specdec_engine.attach.attached import Run


def refuse_unsteerable(target: str, draft: str | None, how: opt.Decoding, where: opt.Placement) -> None:
    """Raises UsageError for an option that only our own engine has: a server keeps what it was started with."""
    given = {
        "--target": target != "builtin",
        "--draft": draft is not None,
        "-k": how.k is not None,
        "--rule": how.rule != "token",
        "--coupling": how.coupling != "independent",
        "--draft-temperature": how.draft_temperature is not None,
        "the options of where models run": replace(where, offline=False, debug=False) != opt.Placement(),
    }
    if named := [name for name, is_given in given.items() if is_given]:
        raise UsageError(
            f"--attach cannot be told {named[0]}: a server keeps what it was started with",
            "leave it out, or start the server with it: specdec tune prints the lines",
        )


def asked_of(text: str, how: opt.Decoding) -> Asked:
    """Raises UsageError for values that no run has."""
    from specdec_engine.attach.asked import Asked

    stops = Stop(how.max_tokens, strings=tuple(how.stop or ())).strings
    return Asked(text, how.sampling, how.max_tokens, stops, how.seed, how.chat, how.system)


def begun(url: str, text: str, how: opt.Decoding) -> Run:
    """Recognise the server, and have it make tokens of the prompt."""
    from specdec_engine.attach.attached import attach

    asked = asked_of(text, how)
    return attach(url).begin(asked)


def state_at(run: Run) -> str:
    """Who ran it, with what, and how far what is shown was seen."""
    about = run.engine.about
    version = f" {about.version}" if about.version else ""
    speculation = "no speculation there" if about.draft == "none" else f"draft {about.draft}"
    return f"{run.engine.name}{version} at {run.url}: {about.target}, {speculation}"
