"""Runs at replayed servers, and what those say of them."""

from __future__ import annotations

import json

from specdec_engine.attach.asked import Asked
from specdec_engine.attach.attached import attach
from specdec_engine.record.events import Cycle
from tests.servers.record import REPEAT


def ran(state, **more):
    """The events of a run, and its text."""
    run = attach(state.url).begin(Asked(REPEAT, **{"max_tokens": 64, "seed": 1, **more}))
    events, text = list(run.events()), ""
    for event in events:
        if isinstance(event, Cycle):
            text += "".join(run.texts.feed(token) for token in event.emitted)
    return events, text + run.texts.flush()


def said_by(recorded, tag):
    """Text, tokens, drafted and accepted, by the server's own last words."""
    lines = [json.loads(line[6:]) for line in recorded[tag]["lines"] if line.startswith("data: {")]
    if "timings" in lines[0]:
        totals = lines[-1]["timings"]
        counts = (totals["predicted_n"], totals.get("draft_n", 0), totals.get("draft_n_accepted", 0))
        return "".join(line["content"] for line in lines), counts
    usage = lines[-1]
    found = (usage.get("metrics") or {}).get("speculative_decoding")
    text = "".join(choice["text"] for line in lines for choice in line["choices"])
    drafted = (found["num_draft_tokens"], found["num_accepted_draft_tokens"]) if found else (None, None)
    return text, (usage["usage"]["completion_tokens"], *drafted)
