"""How close to the hardware do we decode on a GPU, and how far ahead of transformers? On pairs with random weights.

    python benchmarks/gpu.py [--pair 8b+1b] [--acceptance 0.8] [--k 4] [--tokens 256] [--device cuda] [--dtype bfloat16]
                             [--out gpu.json]

The shapes are those of Llama 3 (8b, 1b) and Qwen 2.5 (1.5b, 0.5b). Weights are random but for one thing: each token's most
likely successor is fixed by embedding and head, and the draft has the target's successor for a share of the tokens,
`--acceptance`. So every engine can run the same pair, and at temperature 0 a drafted token is right with that probability.

One JSON object, printed at the end and written to a file as it grows: copy bandwidth, plain decoding against the bound it
sets, c (draft step / plain step) against the ratio of bytes, speculation, and transformers plain, compiled and assisted on
the same weights. What fails is noted there, and the rest goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from specdec_engine import Cycle, Sampling
from specdec_engine.core.randomness import KeyedRandomness
from specdec_engine.decoding.control import Controls
from specdec_engine.decoding.loop import decode
from specdec_engine.decoding.stopping import Stop
from specdec_engine.drafters.base import DraftSetup, LoadedDraft
from specdec_engine.drafters.none import NoDrafter
from specdec_engine.drafters.on_runtime import RuntimeDrafter
from specdec_engine.record.events import known_ids
from specdec_engine.runtime.decoder import Decoder
from specdec_engine.runtime.graphs import CudaRecorder, GraphRuntime
from specdec_engine.runtime.lean import LeanRuntime
from specdec_engine.runtime.shape import shape_of
from specdec_engine.runtime.target import ModelTarget
from specdec_engine.verify.rules import TokenRule
from specdec_engine.verify.verifier import Verifier, verifier_for

Size = tuple[int, int, int, int, int, int]
SHAPES: dict[str, Size] = {  # hidden, mlp, layers, heads, key-value heads, vocabulary
    "8b": (4096, 14336, 32, 32, 8, 128256),
    "1b": (2048, 8192, 16, 32, 8, 128256),
    "1.5b": (1536, 8960, 28, 12, 2, 151936),
    "0.5b": (896, 4864, 24, 14, 2, 151936),
    "tiny": (256, 512, 4, 4, 2, 512),
    "tinier": (128, 256, 2, 4, 2, 512),
}


class Report:
    """The figures so far, written with each new one: an arm that ends the process then loses only itself."""

    def __init__(self, file: Path, about: dict[str, Any]) -> None:
        self._file = file
        self.found: dict[str, Any] = {**about, "failed": {}}

    def add(self, name: str, value: Any) -> None:
        self.found[name] = value
        print(f"{name}: {value}", file=sys.stderr)
        self._write()

    def attempt(self, name: str, work: Callable[[], Any]) -> Any:
        """Run the work and return its result; None where it fails, with a note of that."""
        try:
            return work()
        except Exception as error:
            traceback.print_exc()
            self.found["failed"][name] = f"{type(error).__name__}: {error}"[:500]
            self._write()
            return None

    def _write(self) -> None:
        self._file.write_text(json.dumps(self.found, indent=1), encoding="utf-8")


def main() -> None:
    options = parsed()
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    names = options.pair.split("+")
    about = {
        "schema": "specdec.gpu/1",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "pair": options.pair,
        "dtype": options.dtype,
        "k": options.k,
        "acceptance asked for": options.acceptance,
    }
    report = Report(options.out, about)
    bandwidth = report.attempt("copy bandwidth", lambda: copy_bandwidth(device))
    if bandwidth is not None:
        report.add("copy bandwidth GB/s", round(bandwidth / 1e9, 1))
    vocab = SHAPES[names[0]][5]
    successors, agreeing = successor_tables(vocab, options.acceptance)
    target_model, draft_model = (
        synthetic(SHAPES[name], table, device, dtype) for name, table in zip(names, (successors, agreeing), strict=True)
    )
    began = time.perf_counter()
    target, draft = runtime(target_model, "target"), runtime(draft_model, "draft")
    prompt = torch.randint(vocab, (64,), generator=torch.Generator().manual_seed(2)).tolist()
    recorder = target.recorder.another() if isinstance(target, GraphRuntime) else None
    verifier = verifier_for(TokenRule(), device, recorder)

    def weight_rows(ids: Tensor) -> Tensor:
        rows: Tensor = target_model.get_output_embeddings().weight[ids]
        return rows

    def ours(k: int) -> Callable[[], list[int]]:
        setup = DraftSetup("target", None, vocab, device, lambda name: LoadedDraft(draft), lambda: target, weight_rows)
        drafter = RuntimeDrafter(draft, setup, "draft") if k else NoDrafter(setup)
        return lambda: run(ModelTarget(target, "target"), drafter, verifier, prompt, k, options.tokens)

    for k in (0, options.k):
        report.attempt(f"the first run with k {k}", ours(k))
    report.add("warm-up and capture seconds", round(time.perf_counter() - began, 2))
    steps = [report.attempt("a step", partial(step_seconds, model, prompt)) for model in (target, draft)]
    # An embedding's rows are looked up, not read through.
    read = [
        sum(p.nbytes for p in model.parameters()) - model.get_input_embeddings().weight.nbytes
        for model in (target_model, draft_model)
    ]
    report.add("ratio of bytes", round(read[1] / read[0], 3))
    if None not in steps:
        report.add("plain step ms", round(1e3 * steps[0], 3))
        report.add("c", round(steps[1] / steps[0], 3))
        if bandwidth is not None:
            report.add("share of the bandwidth bound", round(read[0] / bandwidth / steps[0], 3))
    arms: dict[str, Callable[[], list[int]]] = {
        PLAIN: ours(0),
        f"specdec k {options.k}": ours(options.k),
        "transformers plain": theirs(target_model, prompt, options.tokens),
        "transformers assisted": theirs(target_model, prompt, options.tokens, assistant_model=draft_model),
    }
    if device.type == "cuda":  # compiles itself; the first call is the warm-up
        arms["transformers compiled"] = theirs(target_model, prompt, options.tokens, cache_implementation="static")
    measure(arms, options.rounds, report)
    print(json.dumps(report.found, indent=1))


PLAIN = "specdec plain"


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", default="8b+1b", help=f"two of {', '.join(SHAPES)}, joined by +")
    parser.add_argument("--acceptance", type=float, default=0.8)
    parser.add_argument("--k", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="written anew with every figure")
    return parser.parse_args()


def successor_tables(vocab: int, acceptance: float) -> tuple[Tensor, Tensor]:
    """Two permutations of the vocabulary that agree at about this share of its tokens; the first is one long cycle."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(vocab, generator=generator)
    successors = torch.empty_like(order)
    successors[order] = order.roll(-1)
    wrong = torch.nonzero(torch.rand(vocab, generator=generator) >= acceptance)[:, 0]
    agreeing = successors.clone()
    agreeing[wrong] = successors[wrong.roll(1)]
    return successors, agreeing


def synthetic(size: Size, successors: Tensor, device: torch.device, dtype: torch.dtype) -> Any:
    """A Llama of this size that follows the table: the head's row of a token's successor is the token's own embedding.

    The blocks' weights are so small that what they add does not change which token is the most likely.
    """
    hidden, mlp, layers, heads, kv_heads, vocab = size
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocab,
        max_position_embeddings=8192,
        initializer_range=0.002,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        dtype=dtype,
    )
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding.normal_(generator=torch.Generator(device).manual_seed(1))
        model.get_output_embeddings().weight[successors.to(device)] = embedding
    return model.requires_grad_(False)


class InMemory:
    """A model's own tensors as a checkpoint."""

    def __init__(self, model: Any) -> None:
        self._state = dict(model.state_dict())

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._state)

    def size(self, name: str) -> tuple[int, ...]:
        return tuple(self._state[name].shape)

    def dense(self, name: str) -> Tensor:
        tensor: Tensor = self._state[name]
        return tensor

    stored = dense


def runtime(model: Any, label: str) -> Any:
    decoder = Decoder(shape_of(model.config), InMemory(model), model.dtype, model.device, "none")
    if model.device.type == "cuda":
        return GraphRuntime(decoder, label, None, 2048, CudaRecorder(model.device))
    return LeanRuntime(decoder, label, None, 2048)


def run(target: Any, drafter: Any, verifier: Verifier, prompt: Sequence[int], k: int, tokens: int) -> list[int]:
    events = decode(
        target,
        drafter,
        prompt,
        controls=Controls(k, Sampling()),
        stop=Stop(tokens),
        random=KeyedRandomness(0),
        verifier=verifier,
    )
    return [token for event in events if isinstance(event, Cycle) for token in known_ids(event.emitted)]


def theirs(model: Any, prompt: Sequence[int], tokens: int, **how: Any) -> Callable[[], list[int]]:
    ids = torch.tensor([prompt], device=model.device)

    def generate() -> list[int]:
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens, pad_token_id=0, **how
        )
        found: list[int] = made[0, len(prompt) :].tolist()
        return found

    return generate


def measure(arms: dict[str, Callable[[], list[int]]], rounds: int, report: Report) -> None:
    """Tokens a second, prefill included, the arms in turns; one call of each before, as warm-up. An arm that fails is out."""
    samples: dict[str, list[float]] = {name: [] for name in arms}
    said = dict[str, list[int]]()
    for turn in range(rounds + 1):
        for name in list(samples):
            began = time.perf_counter()
            tokens = report.attempt(name, arms[name])
            if tokens is None:
                del samples[name]
                continue
            said[name] = tokens
            if turn:
                samples[name].append(round(len(tokens) / (time.perf_counter() - began), 2))
        report.add("samples", samples)
        report.add("tokens per second", {name: round(median(found), 2) for name, found in samples.items() if found})
        report.add("identical", {name: tokens == said.get(PLAIN) for name, tokens in said.items()})


def step_seconds(runtime: Any, prompt: Sequence[int]) -> float:
    """One plain pass after the prompt; many of them between two looks at the clock."""
    device = runtime.device
    runtime.rollback(0)
    runtime.forward(torch.tensor(prompt, device=device), 1)
    token = torch.tensor(prompt[:1], device=device)

    def passes(n: int) -> float:
        synchronize(device)
        began = time.perf_counter()
        for _ in range(n):
            runtime.forward(token, 1)
            runtime.rollback(len(prompt))
        synchronize(device)
        return (time.perf_counter() - began) / n

    passes(3)
    return median(passes(20) for _ in range(5))


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second read and written by a large copy."""
    size = 1 << (30 if device.type == "cuda" else 26)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    sink = torch.empty_like(source)
    seconds = []
    for _ in range(8):
        synchronize(device)
        began = time.perf_counter()
        sink.copy_(source)
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    return 2 * size / median(seconds)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
