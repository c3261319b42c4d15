"""The counters that a server keeps for all its requests, as Prometheus' text (https://prometheus.io/docs/instrumenting)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from specdec_engine.errors import ServerUnavailable
from specdec_engine.record.events import Counters

_NAMES = {
    "cycles": ("vllm:spec_decode_num_drafts", "llamacpp:spec_decode_num_drafts", "sglang:spec_verify_calls"),
    "drafted": ("vllm:spec_decode_num_draft_tokens", "llamacpp:spec_decode_num_draft_tokens"),
    "accepted": ("vllm:spec_decode_num_accepted_tokens", "llamacpp:spec_decode_num_accepted_tokens"),
    "emitted": ("vllm:generation_tokens", "llamacpp:tokens_predicted", "sglang:generation_tokens"),
    "running": ("vllm:num_requests_running", "llamacpp:requests_processing", "sglang:num_running_reqs"),
}
"""By what they count; a counter's name in the text ends in _total."""
_POSITIONS = ("vllm:spec_decode_num_accepted_tokens_per_pos", "llamacpp:spec_decode_num_accepted_tokens_per_pos")
_ENGINES = {"vllm:": "vLLM", "llamacpp:": "llama.cpp", "sglang:": "SGLang"}


@dataclass(frozen=True, slots=True)
class Reading:
    """One look at a server's counters, of one of its engines."""

    server: str
    """vLLM, llama.cpp or SGLang."""
    engine: str
    """Its number or name among several; empty where there is one."""
    counters: Counters
    running: int | None
    """Requests that are decoded at this moment."""


_MOST_ENGINES = 256
_PLACE = re.compile(r"[0-9]{1,4}")


@dataclass(frozen=True, slots=True)
class _Sample:
    name: str
    labels: dict[str, str]
    value: float


def _samples(text: str) -> list[_Sample]:
    """Raises ServerUnavailable for what is not of this format."""
    from prometheus_client.parser import text_string_to_metric_families

    try:
        return [
            _Sample(sample.name, sample.labels, sample.value)
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        ]
    except (ValueError, IndexError, KeyError) as error:
        raise ServerUnavailable(
            f"its /metrics are not Prometheus' text: {error}", "is this an inference server?"
        ) from None


def positions_of(text: str) -> int:
    """How many positions of a draft are counted: the most tokens that it has. 0 where none are."""
    found = {sample.labels.get("position") for sample in _samples(text) if _plain(sample.name) in _POSITIONS}
    return len(found)


def always_drafts(text: str) -> bool:
    """Whether hardly a step went by without a draft, or there was none yet: every step but those that read a prompt emits
    what it accepted and one token more."""
    samples = _samples(text)
    found = [reading.counters for reading in read_counters(text, 0.0)]
    cycles, plain = sum(c.cycles for c in found), sum(c.emitted - c.accepted - c.cycles for c in found)
    requests = sum(sample.value for sample in samples if _plain(sample.name) == "vllm:request_success")
    return not cycles or plain - requests <= 0.1 * cycles


def read_counters(text: str, at_s: float) -> list[Reading]:
    """One for each engine. Raises ServerUnavailable for counters of no server that is known."""
    samples = [sample for sample in _samples(text) if not sample.name.endswith("_created")]
    server = next((name for mark, name in _ENGINES.items() for s in samples if s.name.startswith(mark)), None)
    if server is None:
        raise ServerUnavailable(
            "its /metrics name none of vLLM, SGLang and llama.cpp", "llama-server and SGLang count with --metrics, "
            "--enable-metrics"
        )  # fmt: skip
    by_engine = dict[str, list[_Sample]]()
    for sample in filter(_counts, samples):
        by_engine.setdefault(sample.labels.get("engine", ""), []).append(sample)
    if not by_engine or len(by_engine) > _MOST_ENGINES:
        raise ServerUnavailable(
            f"its /metrics count the tokens of {len(by_engine)} engines", "is this a server of models?"
        )
    return [_reading(server, engine, by_engine[engine], at_s) for engine in sorted(by_engine)]


def _counts(sample: _Sample) -> bool:
    name = _plain(sample.name)
    sound = 0 <= sample.value < 2**53
    return sound and (name in _POSITIONS or any(name in names for names in _NAMES.values()))


def _reading(server: str, engine: str, samples: Iterable[_Sample], at_s: float) -> Reading:
    found, kept = dict[str, float](), dict[int, float]()
    for sample in samples:
        name = _plain(sample.name)
        for what, names in _NAMES.items():
            if name in names:
                found[what] = found.get(what, 0.0) + sample.value
        if name in _POSITIONS and _PLACE.fullmatch(sample.labels.get("position", "")):
            place = int(sample.labels["position"])
            kept[place] = kept.get(place, 0.0) + sample.value
    counts = {what: int(value) for what, value in found.items()}
    at = tuple(int(kept[place]) for place in sorted(kept))
    told = {"cycles", "drafted", "accepted"} <= counts.keys()  # SGLang tells its passes, and not what they drafted
    cycles, drafted, accepted = (counts[what] if told else 0 for what in ("cycles", "drafted", "accepted"))
    return Reading(
        server,
        engine,
        Counters(at_s, cycles, drafted, accepted, counts.get("emitted", 0), at),
        counts.get("running"),
    )


def _plain(name: str) -> str:
    return name.removesuffix("_total")
