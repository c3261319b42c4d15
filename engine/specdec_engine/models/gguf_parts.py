"""A GGUF in several files, as llama-gguf-split cuts large ones: NAME-00001-of-00003.gguf and so on."""

from __future__ import annotations

import re
from pathlib import Path

from specdec_engine.errors import ModelUnavailable

_PART = re.compile(r"(.+)-\d{5}-of-(\d{5})(\.gguf)", re.IGNORECASE)


def parts_of(file: Path) -> tuple[Path, ...]:
    """The files of the GGUF that this one is of, in order, by its name; the file alone where that names no others. They may
    not be there."""
    if (named := _PART.fullmatch(file.name)) is None:
        return (file,)
    stem, count, suffix = named.groups()
    return tuple(file.with_name(f"{stem}-{i:05}-of-{count}{suffix}") for i in range(1, int(count) + 1))


def check_parts(file: Path, count: int) -> tuple[Path, ...]:
    """The files of a GGUF whose header says that there are so many. Raises ModelUnavailable for one that is not there."""
    parts = parts_of(file)
    if len(parts) != count:
        raise ModelUnavailable(
            f"{file} is one of {count} files of a GGUF, and its name does not say so",
            f"name them as they were made: {file.stem}-00001-of-{count:05}.gguf and so on",
        )
    if missing := [part for part in parts if not part.is_file()]:
        raise ModelUnavailable(
            f"{file} is one of {count} files of a GGUF, of which {missing[0].name} is not beside it",
            "fetch all of them into one folder",
        )
    return parts
