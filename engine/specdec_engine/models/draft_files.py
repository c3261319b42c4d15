"""Folders of drafts made for one target: what `specdec distill` writes, what others publish, what `--draft` finds.

In ours config.json has a section `specdec_draft`; `draft_vocab.safetensors` maps the draft's ids to the target's. A draft of
the kind `model` is an ordinary transformers checkpoint beside that, with a smaller vocabulary.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from specdec_engine.errors import ModelUnavailable
from specdec_engine.models.assistant_files import assistant_folder
from specdec_engine.models.draft_folder import DraftFolder, TargetLayers
from specdec_engine.models.eagle_files import eagle_folder, eagle_weights, refuse_others
from specdec_engine.models.options import LoadOptions
from specdec_engine.models.sources import raw_config, resolve
from specdec_engine.runtime.head import HeadForm

SECTION = "specdec_draft"
VOCABULARY = "draft_vocab.safetensors"


def read_draft(path: Path) -> DraftFolder | None:
    """The draft in this folder; None if there is none. Raises ModelUnavailable for a damaged one, and for one of a kind that
    is known and not run here."""
    config_file = path / "config.json"
    if not config_file.is_file():
        return None
    try:
        config = json.loads(config_file.read_text("utf-8"))
        if not isinstance(config, dict):
            return None
        if SECTION not in config:
            return assistant_folder(path, config) or eagle_folder(path, config)
        about = config[SECTION]
        ids = load_file(path / VOCABULARY)["target_ids"].long()
        layers = TargetLayers(tuple(about["taps"]))
        form = HeadForm(output_normed=bool(config.get("norm_output")))
        draft = DraftFolder(path, about["kind"], config, layers, about["tokenizer_sha256"], ids, form, ours=True)
        _check(draft)
        return draft
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ModelUnavailable(
            f"the draft in {path} is damaged: {error}", "fetch or distill it again, or choose another"
        ) from error


def _check(draft: DraftFolder) -> None:
    """Raises ValueError. An id that came twice would be drawn with another probability than is reported for it."""
    if draft.kind not in ("head", "model"):
        raise ValueError(f"its kind is {draft.kind!r}")
    taps = draft.layers.numbers
    if list(taps) != sorted({int(tap) for tap in taps if tap >= 0}) or (draft.kind == "head" and not taps):
        raise ValueError(f"its taps are {taps}")
    ids = draft.ids
    if ids.dim() != 1 or len(ids) == 0 or int(ids[0]) < 0 or not bool((ids[1:] > ids[:-1]).all()):
        raise ValueError("its ids are not in rising order")
    if len(ids) != draft.config["vocab_size"]:
        raise ValueError(f"it has {len(ids)} ids where its config says {draft.config['vocab_size']}")


def inverse(ids: Tensor, vocab: int, lacking: int) -> Tensor:
    """[V'] -> [V]: the draft's id of each of the target's; `lacking` where it has none."""
    return torch.full((vocab,), lacking).index_put_((ids,), torch.arange(len(ids)))


def head_weights(draft: DraftFolder) -> dict[str, Tensor]:
    """A head's tensors by our names. Raises ModelUnavailable for damaged ones."""
    try:
        return load_file(draft.path / "model.safetensors") if SECTION in draft.config else eagle_weights(draft)
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise ModelUnavailable(f"the draft in {draft.path} is damaged: {error}", "fetch or distill it again") from error


def builtin_draft() -> Path:
    """The folder of the draft that comes with the package, made for the built-in target."""
    return Path(__file__).parent / "builtin_draft"


def found_draft(name: str, options: LoadOptions) -> Path:
    """A draft's files, fetched if need be. Raises ModelUnavailable, and names a folder of a kind that is not run here,
    whatever it lacks."""
    if name == "builtin":
        return builtin_draft()
    if (Path(name) / "config.json").is_file():
        refuse_others(Path(name), raw_config(Path(name)))
    trusted = options.trust_remote_code
    return resolve(name, offline=options.offline, trust_remote_code=trusted, report=options.report)
