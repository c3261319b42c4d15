"""Is greedy speculation token for token what transformers' own `generate` says? Over a file of prompts, in float32.

    python benchmarks/greedy_equality.py PROMPTS.jsonl [--tokens 64] [--target builtin] [--draft perturbed] [--limit N]
                                         [--runtime auto]

Prompt i runs with k = 1 + i mod 8, for the lookup and for a model draft. `perturbed` is the target itself with noise on
its weights: often right, often wrong. Prints one JSON object; exits 6 if any ids differ.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from specdec_engine import Cycle, LoadOptions, Pair, Summary, load_pair
from specdec_engine.record.events import known_ids

NOISE = 0.04


def main() -> None:
    options = parsed()
    prompts = read_prompts(options.prompts)[: options.limit]
    load = LoadOptions(dtype="float32", runtime=options.runtime)
    reference = theirs(options.target)
    with TemporaryDirectory() as scratch:
        draft = perturbed(options.target, Path(scratch)) if options.draft == "perturbed" else options.draft
        pairs = [load_pair(options.target, spec, load) for spec in ("ngram", draft)]
        rows = [
            row
            for i, prompt in enumerate(prompts)
            for row in compare(reference, pairs, prompt, 1 + i % 8, options.tokens)
        ]
    differing = [row for row in rows if not row["identical"]]
    report = {
        "schema": "specdec.greedy_equality/1",
        "prompts": len(prompts),
        "tokens": options.tokens,
        "draft": options.draft,
        "environment": dict(pairs[0].environment),
        "runs": len(rows),
        "identical": len(rows) - len(differing),
        "compared_tokens": sum(row["tokens"] for row in rows),
        "arms": [arm(rows, name) for name in ("ngram", "model")],
        "differing": differing,
    }
    json.dump(report, sys.stdout, indent=1)
    sys.exit(6 if differing else 0)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--target", default="builtin")
    parser.add_argument("--draft", default="perturbed")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--runtime", default="auto")
    return parser.parse_args()


def read_prompts(path: Path) -> list[str]:
    records = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]
    return [record.get("prompt") or record["turns"][0] for record in records]


def theirs(target: str) -> Any:
    """transformers' own model, which `generate` is a method of."""
    pair = load_pair(target, "none", LoadOptions(dtype="float32", runtime="generic"))
    return pair.target.runtime.model  # type: ignore[attr-defined]


def perturbed(target: str, folder: Path) -> str:
    """The target with noise on its weights, saved as an ordinary checkpoint."""
    model, pair = theirs(target), load_pair(target, "none", LoadOptions(dtype="float32"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight += NOISE * weight.std() * torch.randn(weight.shape, generator=generator)
    model.save_pretrained(folder)
    pair.tokenizer.save_pretrained(folder)
    return str(folder)


def compare(reference: Any, pairs: list[Pair], prompt: str, k: int, tokens: int) -> Iterator[dict[str, Any]]:
    ids = pairs[0].encode(prompt)
    batch = torch.tensor([ids])
    made = reference.generate(batch, attention_mask=torch.ones_like(batch), do_sample=False, max_new_tokens=tokens)
    expected = made[0, len(ids) :].tolist()
    for name, pair in zip(("ngram", "model"), pairs, strict=True):
        found, summary = list[int](), Summary()
        for event in pair.decode(ids, k=k, max_tokens=tokens):
            summary = summary.plus(event)
            found += known_ids(event.emitted) if isinstance(event, Cycle) else ()
        at = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), None)
        identical = found == expected
        print(f"{name} k {k} {'same' if identical else f'differs at {at}'}: {prompt[:50]!r}", file=sys.stderr)
        yield {
            "draft": name,
            "k": k,
            "prompt": prompt[:80],
            "identical": identical,
            "first_divergence": at,
            "tokens": len(expected),
            "drafted": summary.drafted,
            "accepted": summary.accepted,
        }


def arm(rows: list[dict[str, Any]], name: str) -> dict[str, Any]:
    mine = [row for row in rows if row["draft"] == name]
    total = {key: sum(row[key] for row in mine) for key in ("tokens", "drafted", "accepted")}
    return {"draft": name, "runs": len(mine), "identical": sum(row["identical"] for row in mine), **total}


if __name__ == "__main__":
    main()
