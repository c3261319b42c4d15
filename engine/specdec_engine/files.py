"""Files that people name: read with one kind of error, replaced whole or not at all. No torch."""

from __future__ import annotations

import json
import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any


def parse_json(text: str | bytes) -> Any:
    """The value. Raises ValueError for whatever is none, in words for one line; for one that is nested too deeply as well,
    where Python's own parser raises RecursionError."""
    try:
        return json.loads(text)
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 from byte {error.start} on") from error
    except json.JSONDecodeError as error:
        at = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise ValueError(f"it is not JSON from {at} on ({error.msg})") from error
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(file: Path) -> dict[str, Any]:
    """The object in a file. Raises OSError, and ValueError for what is no JSON object."""
    found = parse_json(file.read_bytes())
    if not isinstance(found, dict):
        raise ValueError("it is not a JSON object")
    return found


def replace_file(path: Path, data: bytes) -> None:
    """Write it whole: until the last byte is on the disk the old content stays. Raises OSError.

    A link is followed, what belongs to the file stays so (its mode), and what is no regular file, such as a pipe or a
    device, is written to in place: renaming would put a file where it was.
    """
    place = path.resolve()
    with suppress(FileNotFoundError):
        if not stat.S_ISREG(place.stat().st_mode):
            with place.open("wb") as there:
                there.write(data)
            return
    handle, scratch = tempfile.mkstemp(dir=place.parent, prefix=f".{place.name[:32]}-", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # some file systems tell of a full disk only here
        Path(scratch).chmod(_mode(place))
        Path(scratch).replace(place)
    except BaseException:  # an interrupt, too, must not leave the scratch file behind
        with suppress(OSError):
            Path(scratch).unlink()
        raise


def _mode(place: Path) -> int:
    """The permissions that the file has; a new one gets what the user's mask leaves, mkstemp's are the owner's alone."""
    with suppress(FileNotFoundError):
        return stat.S_IMODE(place.stat().st_mode)
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask
