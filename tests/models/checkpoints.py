"""A tiny checkpoint of every kind that transformers makes text with, and of those that people hand in by mistake: random
weights, nothing is downloaded. `python -m tests.models.checkpoints` writes docs/models.md.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from specdec_engine.errors import PairIncompatible, SpecdecError
from specdec_engine.models.compatibility import check
from specdec_engine.models.options import LoadOptions
from specdec_engine.pair import load_pair
from specdec_engine.record.events import Cycle
from specdec_engine.runtime.transformers_cache import rollback_of
from tests.fakes import byte_tokenizer

OPTIONS = LoadOptions(device="cpu", dtype="float32", threads=1)
PROMPT = [5, 9, 7, 9, 5, 9]
TOKENS = 8

_KINDS = json.loads(Path(__file__).with_name("kinds.json").read_text("utf-8"))
COMMON = _KINDS["common"]
"""Tried for all: each field where a config, or a part of it that is named below, has it."""
CAUSAL, MISTAKES, SKIPPED = _KINDS["causal"], _KINDS["mistakes"], _KINDS["skipped"]
"""What a kind is given beyond that; a class and what it is given; why a kind cannot be built or run here."""


def _fields(kind: Any, given: dict[str, Any]) -> dict[str, Any]:
    """COMMON where a config has the field, then what is given; a part of a config in the same way."""
    known = set(kind.__dataclass_fields__) | set(kind.attribute_map)
    result = {name: value for name, value in COMMON.items() if name in known}
    for name, value in given.items():
        part = kind.sub_configs.get(name)
        if isinstance(value, dict) and part is not None:
            if part is transformers.AutoConfig:
                named = value.get("model_type") or kind.sub_configs_defaults[name].model_type
                value = {**_fields(CONFIG_MAPPING[named], value), "model_type": named}
            else:
                value = _fields(part, value)
        if value is None:
            result.pop(name, None)
        else:
            result[name] = value
    return result


def _causal(model_type: str) -> Any:
    kind = CONFIG_MAPPING[model_type]
    config = kind(**_fields(kind, CAUSAL.get(model_type, {})))
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def _mistake(name: str) -> Any:
    made, given = MISTAKES[name]
    kind = getattr(transformers, made)
    return kind(kind.config_class(**_fields(kind.config_class, given)))


def build(name: str) -> Any:
    """The model of that kind, in evaluation mode."""
    torch.manual_seed(0)
    return (_mistake(name) if name in MISTAKES else _causal(name)).eval()


def kinds() -> list[str]:
    """All that this transformers can build, by model type, and the mistakes after them."""
    return [*(name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in SKIPPED), *MISTAKES]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a checkpoint."""

    runtime: str
    """Empty for one that was refused."""
    why: str
    """Why it, or its use with a draft, was refused."""
    tokens: tuple[int, ...] | None = None


def checked(folder: Path) -> Outcome:
    """By `specdec check`."""
    try:
        fit = check(str(folder), "ngram", OPTIONS)
    except SpecdecError as error:
        return Outcome("", _words(error, folder))
    (said,) = [finding.said for finding in fit.findings if finding.about == "runtime"]
    refused = [finding.said.split("; choose")[0] for finding in fit.findings if finding.level == "bad"]
    why = f"PairIncompatible: {refused[0]}".replace(str(folder), "it") if refused else ""
    return Outcome(said.removeprefix(f"{folder}: ").split(",")[0], why)


def generated(folder: Path) -> Outcome:
    """By the engine, greedily, with drafts; without one where drafts are refused."""
    why = ""
    try:
        try:
            pair = load_pair(str(folder), "ngram", OPTIONS)
        except PairIncompatible as error:
            why = _words(error, folder)
            pair = load_pair(str(folder), "none", OPTIONS)
        events = list(pair.decode(PROMPT, k=2, max_tokens=TOKENS))
    except SpecdecError as error:
        return Outcome("", _words(error, folder))
    tokens = [token for event in events if isinstance(event, Cycle) for token in event.emitted]
    return Outcome(pair.target.runtime.name, why, tuple(tokens))


def _words(error: SpecdecError, folder: Path) -> str:
    return f"{type(error).__name__}: {error.message}".replace(str(folder), "it")


def save(name: str, folder: Path) -> Any:
    """The model, saved there with a tokenizer."""
    model = build(name)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return model


def table() -> Iterator[str]:
    """docs/models.md, line by line."""
    yield from _HEAD.splitlines()
    for name in kinds():
        with tempfile.TemporaryDirectory() as scratch:
            yield row(name, save(name, Path(scratch)), checked(Path(scratch)))


def row(name: str, model: Any, found: Outcome) -> str:
    """One line of the table."""
    kind = model.config.model_type if name in MISTAKES else name
    why = found.why.split(": ", 1)[-1].replace("|", " ").split(" cannot test drafts: ")[-1]
    if not found.runtime:
        return f"| {kind} | {type(model).__name__} | refused: {why} | | |"
    back = "cut" if found.runtime == "lean" else _WORDS[rollback_of(model.config, model, name).how]
    drafts = f"none: {why}" if why else "all" if found.runtime == "lean" else "all but heads and `self:N`"
    return f"| {kind} | {type(model).__name__} | {found.runtime} | {back} | {drafts} |"


_WORDS = {"crop": "cut", "checkpoint": "checkpoint", "reread": "read anew"}
_HEAD = """\
# Which models run

Every kind of model that transformers makes text with, and below them what people hand in by mistake: tiny checkpoints with
random weights, each given to `specdec check` and to `specdec generate`, which end alike. Greedy text with drafts is that of
transformers' own forward, for all that run. The table is written by `python -m tests.models.checkpoints`, and held true by
`tests/models/test_checkpoints.py`.

**Runtime**: `lean` is our own forward; `generic` is transformers', slower. **After a rejection**, the model has to forget the
rejected tokens:

- *cut*: keys and values of the tokens are cut off, which costs nothing.
- *checkpoint*: a recurrent state is one sum over all tokens, and cannot be cut. Its checkpoint from before the pass is
  restored, and the accepted tokens are fed again together with the next pass. A rejection costs rows of a pass, and never a
  pass more than one in a few cycles; `specdec bench` shows what a pass costs with a draft and without.
- *read anew*: the model keeps its state in a way of its own, and the whole text is read at each pass. That is slow for long
  texts, and exact.

**Drafts**: of what there is for a target ([drafts](drafts.md)), and `mtp` where the checkpoint has a module for it.
`specdec distill` makes drafts for all that run on our own forward; on a GPU for Llama, Mistral, Qwen 2 and Qwen 3 only.

MiMo-7B, of which transformers has no class, is read as the Qwen 2 that it is, without the code that it brings.

Of Nemotron-H and Zamba 2, transformers puts a floor under the time steps of several tokens, and none under those of one:
logits of spread 1.6 differ by 0.005 between a pass over several tokens and passes over one, in its own `generate` too.

| model type | class | runtime | after a rejection | drafts |
|---|---|---|---|---|"""


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    Path("docs/models.md").write_text("\n".join(table()) + "\n", "utf-8")
