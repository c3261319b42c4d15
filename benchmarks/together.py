"""How many tokens a second do several prompts at once bring, against one after the other?

    python benchmarks/together.py PROMPTS.jsonl [--batches 1,4,8,16] [--k 0,auto] [--target builtin] [--draft ngram,builtin]
        [--tokens 64] [--limit 32] [--rounds 3]

An arm is BATCH@K. All arms answer all prompts, in turns, in shuffled order. A rate is all tokens over the seconds of the
whole run, prefill and all; "decoding" leaves out what a run of one token each takes. Prints one JSON object: the median
rate of each arm, its ratio to one at a time by the best k, and how many texts are those of batch 1 without a draft.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from specdec_engine import Cycle, LoadOptions, Pair, load_pair
from specdec_engine.record.events import known_ids
from specdec_engine.record.prompt_files import read_questions
from specdec_engine.system.machine import cpu_name, instructions


def main() -> None:
    options = parsed()
    load = LoadOptions(threads=options.threads, quantize=options.quantize, dtype=options.dtype, offline=True)
    pair = load_pair(options.target, options.draft, load)
    questions = read_questions(options.prompts)[: options.limit]
    prompts = [pair.encode(question.turns[0], system=question.system or None) for question in questions]
    arms = [f"{batch}@{k}" for batch, k in product(options.batches.split(","), options.k.split(","))]
    rates: dict[str, list[float]] = {arm: [] for arm in arms}
    decoding: dict[str, list[float]] = {arm: [] for arm in arms}
    texts: dict[str, list[list[int]]] = {}
    for arm in arms:
        answered(pair, prompts[:8], arm, 16)
    for number in range(options.rounds):
        for arm in random.Random(number).sample(arms, len(arms)):
            _, reading = answered(pair, prompts, arm, 1)
            found, seconds = answered(pair, prompts, arm, options.tokens)
            texts[arm] = found
            tokens = sum(map(len, found))
            rates[arm].append(tokens / seconds)
            decoding[arm].append((tokens - len(found)) / max(seconds - reading, 1e-3))
            print(f"round {number + 1}, {arm}: {rates[arm][-1]:.1f} tok/s", file=sys.stderr)
    middle, behind = ({arm: median(found) for arm, found in of.items()} for of in (rates, decoding))
    alone = max(rate for arm, rate in middle.items() if arm.startswith("1@"))
    plain = texts.get("1@0", [])
    report = {
        "schema": "specdec.together/1",
        "environment": dict(pair.environment),
        "conditions": {
            "processor": cpu_name(),
            "instructions": instructions(),
            **{key: str(value) for key, value in vars(options).items() if key != "prompts"},
        },
        "arms": {
            arm: {
                "tokens_per_second": middle[arm],
                "ratio_to_one_at_a_time": middle[arm] / alone,
                "ratio_to_plain_one_at_a_time": middle[arm] / middle["1@0"] if "1@0" in middle else None,
                "rates": rates[arm],
                "decoding": behind[arm],
                "decoding_ratio_to_plain_one_at_a_time": behind[arm] / behind["1@0"] if "1@0" in behind else None,
                "identical": sum(a == b for a, b in zip(texts[arm], plain, strict=False)),
                "compared": len(plain),
            }
            for arm in arms
        },
    }
    json.dump(report, sys.stdout, indent=1)


def answered(pair: Pair, prompts: list[list[int]], arm: str, tokens: int) -> tuple[list[list[int]], float]:
    """The texts, and the seconds of all."""
    batch, _, k = arm.partition("@")
    texts: list[list[int]] = [[] for _ in prompts]
    pair.forget()
    how: dict[str, Any] = {"k": k if k == "auto" else int(k), "max_tokens": tokens}
    began = perf_counter()
    if batch == "1":  # as `generate` does it, with the controller that learns from cycle to cycle
        for number, prompt in enumerate(prompts):
            pair.forget()
            for event in pair.decode(prompt, seed=number, **how):
                if isinstance(event, Cycle):
                    texts[number] += known_ids(event.emitted)
        return texts, perf_counter() - began
    given: list[Any] = [partial(list, prompt) for prompt in prompts]
    for number, event in pair.decode_together(given, int(batch), seeds=range(len(prompts)), **how):
        if isinstance(event, Cycle):
            texts[number] += known_ids(event.emitted)
    return texts, perf_counter() - began


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--batches", default="1,4,8,16")
    parser.add_argument("--k", default="0,auto")
    parser.add_argument("--target", default="builtin")
    parser.add_argument("--draft", default="ngram,builtin")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--limit", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quantize", default="auto")
    parser.add_argument("--dtype", default="auto")
    return parser.parse_args()


if __name__ == "__main__":
    main()
