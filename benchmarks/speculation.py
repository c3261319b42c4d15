"""How much faster is a draft than plain decoding, task by task, both on our own runtime?

    python benchmarks/speculation.py PROMPTS.jsonl [--arms "builtin@auto;ngram,builtin@auto;ngram@3"] [--temperature 0]
        [--rule block] [--quantize auto|none] [--tokens 128] [--limit N]

An arm is DRAFT@K, optionally DRAFT@K@RULE. Answers end where the target ends them, or after --tokens; prefill is apart. Plain
decoding and the arms take turns prompt by prompt, in shuffled order. Speedup is the ratio of decoding seconds a token for the
same prompt, its geometric mean over prompts, with a bootstrap interval over prompts, and by task. The speedup predicted is
tokens a cycle over what its draft and its passes cost, in plain passes: E / (k·c + v). Every arm keeps what it has learned
from prompt to prompt, as one process does. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

from specdec_engine import Cycle, LoadOptions, Pair, Sampling, Summary, load_pair
from specdec_engine.record.events import known_ids, known_phases
from specdec_engine.system.machine import cpu_name, usable_cores


@dataclass
class Arm:
    """One way of decoding, and what it did on each prompt."""

    name: str
    pair: Pair
    k: Any
    rule: str
    runs: list[dict[str, Any]] = field(default_factory=list)


def main() -> None:
    options = parsed()
    torch.set_num_threads(options.threads)
    load = LoadOptions(threads=options.threads, quantize=options.quantize, dtype=options.dtype, offline=True)
    arms = [Arm("plain", load_pair(options.target, "none", load), 0, "token")]
    for text in options.arms.split(";"):
        draft, k, *rule = text.split("@")
        pair = load_pair(options.target, draft, load)
        arms.append(Arm(text, pair, k if k == "auto" else int(k), rule[0] if rule else options.rule))
    prompts = list(questions(options.prompts, options.limit))
    order = random.Random(0)
    sampling = Sampling(options.temperature)
    for arm in arms:  # warm-up: kernels set themselves up, and pages come in
        run(arm, prompts[0]["turns"][0], sampling, 16, 0)
        arm.runs.clear()
    for number, question in enumerate(prompts):
        for arm in order.sample(arms, len(arms)):
            run(arm, question["turns"][0], sampling, options.tokens, number)
        now = ", ".join(f"{arm.name} {geometric(ratios(arm, arms[0])):.2f}" for arm in arms[1:])
        print(f"{number + 1} of {len(prompts)}: {now}", file=sys.stderr)
    report = {
        "schema": "specdec.speculation/1",
        "environment": dict(arms[0].pair.environment),
        "conditions": {
            "processor": cpu_name(),
            **{key: str(value) for key, value in vars(options).items() if key != "prompts"},
        },
        "plain": figures(arms[0], arms[0], prompts),
        "arms": {arm.name: figures(arm, arms[0], prompts) for arm in arms[1:]},
    }
    json.dump(report, sys.stdout, indent=1)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--arms", default="ngram,builtin@auto;builtin@auto;ngram@auto", help="joined by ;")
    parser.add_argument("--target", default="builtin")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--rule", default="token")
    parser.add_argument("--quantize", default="auto", help="auto is packed, none is bfloat16")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--limit", type=int, default=60, help="this many prompts, evenly spread over the file")
    parser.add_argument("--threads", type=int, default=usable_cores())
    return parser.parse_args()


def questions(file: Path, limit: int) -> Iterable[dict[str, Any]]:
    lines = file.read_text("utf-8").splitlines()
    return (json.loads(line) for line in islice(lines, 0, None, max(1, len(lines) // limit)))


def run(arm: Arm, prompt: str, sampling: Sampling, tokens: int, seed: int) -> None:
    summary, reached, tested, verify = Summary(), [0] * 16, [0] * 16, dict[int, list[float]]()
    ids = list[int]()
    for event in arm.pair.decode(
        arm.pair.encode(prompt), k=arm.k, sampling=sampling, rule=arm.rule, max_tokens=tokens, seed=seed
    ):
        summary = summary.plus(event)
        if isinstance(event, Cycle):
            ids += known_ids(event.emitted)
            verify.setdefault(len(event.drafted) + 1, []).append(known_phases(event).verify_s)
            for i in range(min(event.tested, 16)):
                tested[i] += 1
                reached[i] += i < event.accepted
    assert summary.decode_s is not None
    record = {"token_s": summary.decode_s / summary.emitted, "summary": summary, "ids": ids}
    arm.runs.append({**record, "reached": reached, "tested": tested, "verify": verify})


def ratios(arm: Arm, plain: Arm) -> list[float]:
    return [p["token_s"] / a["token_s"] for a, p in zip(arm.runs, plain.runs, strict=True)]


def geometric(values: Sequence[float]) -> float:
    return math.exp(fmean(math.log(value) for value in values))


def figures(arm: Arm, plain: Arm, prompts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    each = ratios(arm, plain)
    low, high = bootstrap(each)
    tasks = sorted({task(p) for p in prompts})
    total = {name: sum(getattr(r["summary"], name) for r in arm.runs) for name in _COUNTERS}
    plain_s = median(s for r in plain.runs for s in r["verify"].get(1, []))
    widths = sorted({w for r in arm.runs for w in r["verify"]})
    passes = {w: [s for r in arm.runs for s in r["verify"].get(w, [])] for w in widths}
    v = {w: median(passes[w]) / plain_s for w in widths}
    c = total["draft_s"] / total["drafted"] / plain_s if total["drafted"] else None
    verify = sum(v[w] * len(passes[w]) for w in widths) / total["cycles"]
    draft = (c or 0.0) * total["drafted"] / total["cycles"]
    emitted = total["emitted"] / total["cycles"]
    return {
        "drafts": arm.pair.environment.get("drafts", {}),
        "tokens_per_second": total["emitted"] / sum(r["summary"].decode_s for r in arm.runs),
        "speedup": geometric(each),
        "speedup_low": low,
        "speedup_high": high,
        "predicted_speedup": emitted / (draft + verify),
        "plain_passes_a_cycle": {
            "draft": draft,
            "verify": verify,
            "other": total["other_s"] / total["cycles"] / plain_s,
        },
        "slower": sum(value < 1 for value in each),
        "by_task": {t: geometric([v for v, p in zip(each, prompts, strict=True) if task(p) == t]) for t in tasks},
        "mean_emitted_per_cycle": emitted,
        "drafted_per_cycle": total["drafted"] / total["cycles"],
        "acceptance_by_position": [
            round(sum(r["reached"][i] for r in arm.runs) / n, 3)
            for i in range(8)
            if (n := sum(r["tested"][i] for r in arm.runs))
        ],
        "c": c,
        "v": {w: round(value, 3) for w, value in v.items()},
        "shares": {name: total[name] / sum(total[n] for n in _TIMES) for name in _TIMES},
        "identical": sum(a["ids"] == p["ids"] for a, p in zip(arm.runs, plain.runs, strict=True)),
        "prompts": len(prompts),
        "samples": [round(value, 3) for value in each],
    }


_TIMES = ("draft_s", "verify_s", "other_s")
_COUNTERS = ("emitted", "cycles", "drafted", "accepted", *_TIMES)
_TASKS = ("translation", "summarization", "qa", "math_reasoning", "rag")


def task(question: dict[str, Any]) -> str:
    """Spec-Bench's six tasks: all categories but five are MT-Bench's, multi-turn conversation."""
    return question["category"] if question["category"] in _TASKS else "conversation"


def bootstrap(values: Sequence[float], rounds: int = 2000) -> tuple[float, float]:
    """95 % interval of the geometric mean, over prompts."""
    source = random.Random(0)
    means = sorted(geometric(source.choices(values, k=len(values))) for _ in range(rounds))
    return means[rounds // 40], means[-rounds // 40]


if __name__ == "__main__":
    main()
