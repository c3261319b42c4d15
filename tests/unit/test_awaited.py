"""Runs from programs that do many things in one thread, and the endpoint that the documentation shows."""

from __future__ import annotations

import asyncio
import json
import re
import time
from pathlib import Path

import pytest

from specdec_engine.decoding.awaited import awaited
from specdec_engine.drafters import build_drafter
from specdec_engine.models.options import LoadOptions
from specdec_engine.pair import load_pair
from specdec_engine.record.events import Cycle
from specdec_engine.runtime.target import ModelTarget
from tests.contracts.cases import TARGET
from tests.fakes import events, host, lean, run

DOCS = (Path(__file__).parents[2] / "docs" / "library.md").read_text("utf-8")


def parts():
    return ModelTarget(lean(TARGET), "tiny"), build_drafter("ngram", host())


def test_the_events_are_those_of_a_run_and_the_loop_goes_on():
    ticks = []

    async def tick():
        while True:
            ticks.append(time.monotonic())
            await asyncio.sleep(0)

    async def main():
        other = asyncio.create_task(tick())
        found = [event async for event in awaited(events(*parts(), [5, 6, 7], k=3, max_tokens=30))]
        other.cancel()
        return found

    found, (target, drafter) = asyncio.run(main()), parts()
    alone = run(target, drafter, [5, 6, 7], k=3, max_tokens=30)
    assert [c.emitted for c in found if isinstance(c, Cycle)] == [c.emitted for c in alone if isinstance(c, Cycle)]
    assert found[-1].reason == "length"
    assert len(ticks) > len(found)


@pytest.mark.parametrize("how", ["cancelled", "left"])
def test_a_run_that_nobody_wants_any_more_ends_and_the_next_one_is_sound(how):
    target, drafter = parts()

    async def some():
        async for event in (asked := awaited(events(target, drafter, [5, 6, 7], k=3, max_tokens=900))):
            if isinstance(event, Cycle) and event.index == 3:
                if how == "left":
                    await asked.aclose()
                    return
                await asyncio.sleep(0)

    async def main():
        task = asyncio.create_task(some())
        if how == "cancelled":
            await asyncio.sleep(0.05)
            task.cancel()
        await asyncio.wait([task], timeout=30)
        assert task.done()

    asyncio.run(main())
    again = run(target, drafter, [5, 6, 7], k=3, max_tokens=20)
    target, drafter = parts()
    alone = run(target, drafter, [5, 6, 7], k=3, max_tokens=20)
    assert [c.emitted for c in again if isinstance(c, Cycle)] == [c.emitted for c in alone if isinstance(c, Cycle)]


def test_an_error_comes_to_whoever_asks():
    async def main():
        async for _ in awaited(events(*parts(), [], k=3)):
            pass

    with pytest.raises(Exception, match="the prompt is empty"):
        asyncio.run(main())


def test_the_endpoint_of_the_documentation_streams_an_answer(checkpoint, monkeypatch):
    code = re.search(r"<!-- tested: endpoint -->\s*```python\n(.*?)```", DOCS, re.DOTALL).group(1)
    assert len(code.splitlines()) <= 30
    small = load_pair(str(checkpoint), "ngram", LoadOptions(dtype="float32"))
    monkeypatch.setattr("specdec_engine.pair.load_pair", lambda *args: small)
    monkeypatch.setattr("specdec_engine.load_pair", lambda *args: small, raising=False)
    made: dict[str, object] = {}
    exec(code, made)
    sent = []

    async def receive():
        return {"type": "http.request", "body": json.dumps({"prompt": "the light"}).encode(), "more_body": False}

    async def send(message):
        sent.append(message)

    async def both():
        await asyncio.gather(*(made["app"]({"type": "http"}, receive, send) for _ in range(2)))

    asyncio.run(both())
    body = b"".join(message.get("body", b"") for message in sent).decode()
    pieces = [json.loads(line[6:]) for line in body.split("\n\n") if line.startswith("data: ") and "[DONE]" not in line]
    alone = [
        t for e in small.decode(small.encode("the light"), max_tokens=256) if isinstance(e, Cycle) for t in e.emitted
    ]
    assert body.count("data: [DONE]") == 2
    assert "".join(pieces) == 2 * small.tokenizer.decode(alone, skip_special_tokens=True)
