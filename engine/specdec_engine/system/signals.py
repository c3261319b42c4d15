"""The end by SIGTERM, which `timeout`, job schedulers and service managers send."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def terminated_by(error: type[BaseException]) -> Iterator[None]:
    """Raise this at SIGTERM, until the block ends: with KeyboardInterrupt it ends as Ctrl-C does, and keeps what there is;
    also where Ctrl-C is ignored, as in a script's background."""

    def leave(number: int, frame: object) -> None:
        raise error(128 + number)

    usual = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, usual)
