"""What `distill` leaves: a draft folder, each of whose files is complete at any time."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from specdec_engine.distill.head import Head
from specdec_engine.models.draft_files import SECTION, VOCABULARY
from specdec_engine.models.draft_folder import fingerprint


def save_head(
    folder: Path, head: Head, ids: Tensor, taps: tuple[int, ...], tokenizer: Any, made: Mapping[str, Any]
) -> None:
    """made: how, for the record (target, tokens, minutes, estimates)."""
    shape = head.shape
    config = {
        "model_type": "specdec_head",
        "vocab_size": len(ids),
        "hidden_size": shape.hidden,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_size,
        "intermediate_size": shape.intermediate,
        "rms_norm_eps": shape.eps,
        "rope_theta": shape.theta,
        "norm_output": shape.output_normed,
        "torch_dtype": "bfloat16",
        SECTION: {"kind": "head", "taps": list(taps), "tokenizer_sha256": fingerprint(tokenizer), **made},
    }
    tensors = {name: tensor.detach().cpu().to(torch.bfloat16) for name, tensor in head.state_dict().items()}
    with _whole(folder) as written:
        (written / "config.json").write_text(json.dumps(config, indent=1) + "\n", "utf-8")
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, written / "model.safetensors")
        save_file({"target_ids": ids.to(torch.int32)}, written / VOCABULARY)


def save_model(folder: Path, model: Any, ids: Tensor, tokenizer: Any, made: Mapping[str, Any]) -> None:
    """An ordinary transformers checkpoint over the draft's ids, and the target's tokenizer beside it."""
    with _whole(folder) as written:
        deepcopy(model).to(torch.bfloat16).save_pretrained(written)  # the model itself is still learning
        config = json.loads((written / "config.json").read_text("utf-8"))
        config[SECTION] = {"kind": "model", "taps": [], "tokenizer_sha256": fingerprint(tokenizer), **made}
        (written / "config.json").write_text(json.dumps(config, indent=1) + "\n", "utf-8")
        tokenizer.save_pretrained(written)
        save_file({"target_ids": ids.to(torch.int32)}, written / VOCABULARY)


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """A folder to write into, whose files then take the place of those of an earlier run; others stay."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as scratch:
        yield Path(scratch)
        for file in Path(scratch).iterdir():
            file.chmod(0o644)
            file.replace(folder / file.name)
