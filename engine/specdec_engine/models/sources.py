"""From a model's name to its files on this machine: the one file that talks to the hub.

A name is `builtin`, a `.gguf` file, a folder, or a hub id, and becomes a GGUF or a folder with safetensors weights; pickle
files are refused. With `offline` nothing leaves the machine.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

from specdec_engine.core.registry import words
from specdec_engine.errors import ModelUnavailable, first_line, reason
from specdec_engine.models.builtin import builtin_gguf
from specdec_engine.models.gguf_parts import parts_of
from specdec_engine.models.progress import Progress, Report, silent
from specdec_engine.record.files import read_json

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_WANTED = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]


def resolve(name: str, *, offline: bool = False, trust_remote_code: bool = False, report: Report = silent) -> Path:
    """The folder or .gguf file that holds the model, fetched if need be. Raises ModelUnavailable."""
    if not name.strip():
        raise ModelUnavailable("the model's name is empty", "give a hub id, a folder, a .gguf file, or builtin")
    try:
        path = Path(name).expanduser()
    except RuntimeError as error:
        raise ModelUnavailable(f"no model at {name!r}: there is no such user", "give the whole path") from error
    if name == "builtin":
        return builtin_gguf(offline, report)
    if path.is_dir():
        return _checked_folder(path)
    if path.is_file() and (_is_gguf(path) or path.suffix.lower() == ".gguf"):
        return _checked_gguf(path)
    if path.suffix.lower() == ".gguf":
        raise ModelUnavailable(f"no file {str(path)!r}", "give the path of a .gguf file")
    begin = name.partition(":")[0]
    meant = difflib.get_close_matches(begin.lower(), words(), cutoff=0.75)
    if begin in words() and not _cached(name):
        raise ModelUnavailable(f"no model {name!r}: it is a way of drafting", f"give it to --draft: -d {name}")
    if meant and not _cached(name):
        typed = {"self": "self:N"}.get(meant[0], meant[0])
        raise ModelUnavailable(f"no model {name!r}", f"did you mean {typed}? A hub id is org/name")
    if not _HUB_ID.fullmatch(name) or path.exists():
        raise ModelUnavailable(
            f"no model at {name!r}: it is no folder and no GGUF file",
            "give a folder with config.json and *.safetensors, a .gguf file, a hub id such as org/name, or builtin",
        )
    return _checked_folder(_fetch(name, offline, trust_remote_code, report))


def _cached(name: str) -> bool:
    """Whether the hub's cache has a model of this name, which then is none that was mistyped."""
    import huggingface_hub as hub

    return bool(_HUB_ID.fullmatch(name)) and isinstance(hub.try_to_load_from_cache(name, "config.json"), str)


def _is_gguf(path: Path) -> bool:
    """By its first bytes, whatever its name: ollama's blobs have none."""
    return _begins(path) == b"GGUF"


def _begins(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(4)
    except OSError as error:
        raise ModelUnavailable(f"{path} cannot be read: {reason(error)}", "check its permissions") from error


def _checked_gguf(path: Path) -> Path:
    if not _is_gguf(path):
        raise ModelUnavailable(
            f"{path} is not a GGUF file: it begins with {_begins(path)!r}",
            "a file of text there is an error page or a Git LFS pointer: fetch the file itself",
        )
    first = parts_of(path)[0]
    return first if first.is_file() else path


def _checked_folder(folder: Path) -> Path:
    """A checkpoint in safetensors, whole, or the one GGUF in it, which may be in parts."""
    if not (folder / "config.json").is_file():
        ggufs = sorted(file for file in folder.iterdir() if file.suffix.lower() == ".gguf")
        if len({parts_of(file)[0] for file in ggufs}) == 1:
            return _checked_gguf(ggufs[0])
        if ggufs:
            raise ModelUnavailable(
                f"{folder} has {len(ggufs)} GGUF files", f"name one of them, such as {folder / ggufs[0].name}"
            )
        adapter = (folder / "adapter_config.json").is_file()
        raise ModelUnavailable(
            f"{folder} has no config.json" + (": it is an adapter, and no model" if adapter else ""),
            "merge it into its model (merge_and_unload) and give that"
            if adapter
            else "give the folder that save_pretrained wrote",
        )
    if (folder / "adapter_config.json").is_file():
        raise ModelUnavailable(
            f"{folder} has an adapter beside its weights, which is not applied",
            "merge it (merge_and_unload) and save the whole, or move adapter_config.json away",
        )
    if missing := [file for file in weight_files(folder) if not file.is_file()]:
        raise _no_weights(folder, missing[0])
    return folder


def _no_weights(folder: Path, missing: Path) -> ModelUnavailable:
    pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.pkl") for p in folder.glob(pattern))
    if others := sorted(file.name for file in folder.glob("*.safetensors")):
        return ModelUnavailable(
            f"{folder} lacks the weights file {missing.name}; it has {others[0]}",
            "give a folder as save_pretrained writes it; a file that was not fetched is fetched by `hf download`",
        )
    if pickled:
        head = "draft_vocab_size" in raw_config(folder)
        mend = (
            "load them once with torch.load(weights_only=True) and save them with safetensors.torch.save_file as "
            "model.safetensors, or choose another head of that target: those of RedHatAI and of SpecForge are in safetensors"
            if head
            else "load them once with transformers and save them again with save_pretrained, which writes safetensors"
        )
        return ModelUnavailable(
            f"{folder} has no safetensors weights, only pickled ones ({pickled[0]})",
            f"pickled weights can run code when read, and are not; where you trust them, {mend}",
        )
    return ModelUnavailable(
        f"{folder} has no safetensors weights", "give a folder with model.safetensors, as save_pretrained writes it"
    )


def weight_files(path: Path) -> list[Path]:
    """The files that transformers reads, of which it takes the first kind that is there: what the config names as
    `transformers_weights`, model.safetensors, the shards of an index. Raises ModelUnavailable for one that cannot be
    read."""
    if path.is_file():
        return [part for part in parts_of(path) if part.is_file()]
    named = raw_config(path).get("transformers_weights")
    if named is not None and not (_is_beside(named, ".safetensors") or _is_beside(named, ".index.json")):
        raise ModelUnavailable(
            f"{path / 'config.json'} names its weights {named!r}", "it must be a safetensors file of the folder"
        )
    first = path / (named or "model.safetensors")
    index = first if first.name.endswith(".index.json") else path / "model.safetensors.index.json"
    if first != index and (first.is_file() or not index.is_file()):
        return [first]
    try:
        shards = read_json(index)["weight_map"].values()
        if wrong := [name for name in shards if not _is_beside(name, ".safetensors")]:
            raise ValueError(f"it names {wrong[0]!r}, which is no safetensors file of the folder")
        if not shards:
            raise ValueError("its weight_map is empty")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        said = "it has no weight_map" if isinstance(error, KeyError | AttributeError) else reason(error)
        raise ModelUnavailable(f"{index} cannot be read: {said}", "get that one file again: it is small") from error
    return sorted(path / name for name in set(shards))


def _is_beside(name: Any, ending: str) -> bool:
    """Whether it names a file of this kind in the same folder: never a pickle, nothing elsewhere."""
    return isinstance(name, str) and Path(name).name == name and name.endswith(ending)


def raw_config(folder: Path) -> dict[str, Any]:
    """config.json as it is. Raises ModelUnavailable for one that is no JSON object."""
    file = folder / "config.json"
    try:
        return read_json(file)
    except (OSError, ValueError) as error:
        raise ModelUnavailable(
            f"{file} cannot be read: {reason(error)}", "get that one file again: it is small"
        ) from error


def _fetch(name: str, offline: bool, trust_remote_code: bool, report: Report) -> Path:
    """A hub model's files in the hub's own cache."""
    from huggingface_hub import errors as hub
    from huggingface_hub import snapshot_download

    wanted = [*_WANTED, "*.py"] if trust_remote_code else _WANTED
    try:
        return Path(
            snapshot_download(
                name,
                allow_patterns=wanted,
                ignore_patterns=["*/*", "consolidated*"],  # the same weights in other formats
                local_files_only=offline,
                tqdm_class=_reporting_tqdm(name, report),
            )
        )
    except hub.GatedRepoError as error:
        raise ModelUnavailable(
            f"{name} is gated: its owner wants you to accept terms first",
            f"accept them at the model's page, then run `hf auth login` ({_status(error)})",
        ) from error
    except hub.RepositoryNotFoundError as error:
        raise ModelUnavailable(
            f"the hub has no model {name!r}, or it is private",
            f"check the spelling, or run `hf auth login` for a private one ({_status(error)})",
        ) from error
    except hub.HFValidationError as error:
        raise ModelUnavailable(f"{name!r} is no hub id: {first_line(error)}", "a hub id is org/name") from error
    except (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled) as error:
        if offline or isinstance(error, hub.OfflineModeIsEnabled):
            raise ModelUnavailable(
                f"{name} is not in the local cache, and offline mode forbids fetching it",
                f"run `hf download {name}` while online, or leave out --offline",
            ) from error
        raise ModelUnavailable(
            f"{name} is neither a local folder nor in the cache, and the hub cannot be reached",
            "check the spelling and the network; builtin, local folders and drafts such as ngram or self:8 need no hub",
        ) from error
    except hub.HfHubHTTPError as error:
        raise ModelUnavailable(f"{name} could not be fetched: {_status(error)}", "try again later") from error
    except Exception as error:  # a full disk, or whatever the client's transport says when a connection dies
        raise ModelUnavailable(
            f"{name} could not be fetched: {getattr(error, 'strerror', None) or first_line(error)}",
            "free some space or check the network, and try again: what was fetched is kept",
        ) from error


def _status(error: Any) -> str:
    response = getattr(error, "response", None)
    return f"HTTP {response.status_code}" if response is not None else str(error).splitlines()[0]


def _reporting_tqdm(name: str, report: Report) -> type[Any]:
    """huggingface_hub draws its progress with the tqdm class it is given: ours reports the bytes and draws nothing."""
    from tqdm.auto import tqdm

    class Reporting(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            self._counts_bytes = kwargs.get("unit") == "B"
            super().__init__(*args, **{**kwargs, "disable": True})
            self._seen = 0

        def update(self, n: float | None = 1) -> None:
            self._seen += int(n or 0)
            if self._counts_bytes:
                report(Progress("download", name, self._seen, int(self.total) if self.total else None))

    return Reporting
