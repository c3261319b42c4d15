"""A run for programs that do many things in one thread: `async for` over its events. No torch."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor

from specdec_engine.record.events import Event


async def awaited(events: Iterator[Event]) -> AsyncIterator[Event]:
    """The events of a run, decoded in a thread of its own while the event loop goes on.

    Who stops asking, or is cancelled, ends the run: the cycle that runs comes to its end first, so that the pair is ready
    for the next run when this returns. A pair decodes one run at a time.
    """
    # One thread for all cycles: torch's own threads belong to the one that calls it.
    with ThreadPoolExecutor(1, "specdec") as thread:
        loop, step = asyncio.get_running_loop(), None
        try:
            while True:
                step = loop.run_in_executor(thread, next, events, None)
                if (event := await asyncio.shield(step)) is None:
                    return
                yield event
        finally:
            if step is not None and not step.done():
                await asyncio.wait([step])
            if (close := getattr(events, "close", None)) is not None:
                await loop.run_in_executor(thread, close)
