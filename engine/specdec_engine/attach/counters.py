"""The counters that a server keeps for all its requests, as Prometheus' text (https://prometheus.io/docs/instrumenting)."""

from __future__ import annotations

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
    speculates: bool
    """Whether there are counters of speculation, and any has begun."""


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
    engines = sorted({sample.labels.get("engine", "") for sample in samples if _counts(sample)})
    return [
        _reading(server, engine, [s for s in samples if s.labels.get("engine", "") == engine], at_s)
        for engine in engines
    ]


def _counts(sample: _Sample) -> bool:
    return any(_plain(sample.name) in names for names in _NAMES.values())


def _reading(server: str, engine: str, samples: Iterable[_Sample], at_s: float) -> Reading:
    found, kept = dict[str, float](), dict[int, float]()
    for sample in samples:
        name = _plain(sample.name)
        for what, names in _NAMES.items():
            if name in names:
                found[what] = found.get(what, 0.0) + sample.value
        if name in _POSITIONS and sample.labels.get("position", "").isdigit():
            place = int(sample.labels["position"])
            kept[place] = kept.get(place, 0.0) + sample.value
    counts = {what: max(0, int(value)) for what, value in found.items() if abs(value) < 2**63}
    at = tuple(int(kept[place]) for place in sorted(kept))
    cycles, drafted, accepted = (counts.get(what, 0) for what in ("cycles", "drafted", "accepted"))
    return Reading(
        server,
        engine,
        Counters(at_s, cycles, drafted, accepted, counts.get("emitted", 0), at),
        counts.get("running"),
        cycles > 0,
    )


def _plain(name: str) -> str:
    return name.removesuffix("_total")
