"""What a command does before it imports torch and transformers."""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from specdec_cli import output
from specdec_cli.exits import ExitCode


def served() -> bool:
    """Say whether this process draws its screen for a browser (`browser.serve`): stdin and stdout are the server's then."""
    return bool(os.environ.get("TEXTUAL_DRIVER"))


def has_screen() -> bool:
    """Say whether there is a terminal with a reader and keys, or a browser."""
    return served() or (sys.stdin.isatty() and sys.stdout.isatty())


@contextmanager
def interruptible() -> Iterator[None]:
    """Until the block ends Ctrl-C and SIGTERM leave at once: there is nothing to keep yet.

    Not by KeyboardInterrupt: in the middle of torch's import that aborts the process (exit 134) or is swallowed.
    """

    def leave(number: int, frame: object) -> None:
        output.interrupted()
        os._exit(ExitCode.INTERRUPTED)

    usual = {number: signal.signal(number, leave) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


def quieten(offline: bool, debug: bool) -> None:
    """Before transformers is imported: its own bars and warnings would tear our lines apart."""
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = os.environ["TQDM_DISABLE"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    if not debug:
        logging.getLogger("accelerate").setLevel(logging.ERROR)
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        warnings.simplefilter("ignore")


@contextmanager
def uncollected() -> Iterator[None]:
    """While libraries are imported and models loaded nothing is searched for garbage, and what they made is never searched
    again: the one takes 0.5 s of a start of 5, the other 0.1 s every few hundred tokens.

    What an import makes is no garbage: 0.3 s to look through torch and transformers, so the libraries are imported here.
    """
    gc.disable()
    try:
        import specdec_engine.pair  # noqa: F401 - takes 3 s

        gc.freeze()
        yield
        gc.collect()
        gc.freeze()
    finally:
        gc.enable()
