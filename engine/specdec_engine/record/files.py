"""Files that people name: read with one kind of error, replaced whole or not at all. No torch."""

from __future__ import annotations

import codecs
import errno
import json
import math
import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, TypeVar

T = TypeVar("T")


def decode(data: bytes) -> str:
    """Text in UTF-8, with its mark or without, or in UTF-16 or UTF-32 with theirs, as Windows' shell writes it. Raises
    ValueError for anything else, and for zero characters: they are no text, but UTF-16 without its mark."""
    mark = next((mark for mark in _MARKS if data.startswith(mark)), b"")
    try:
        text = data.decode(_MARKS.get(mark, "utf-8"))
    except UnicodeDecodeError as error:
        if mark or b"\0" in data:
            raise ValueError("it is no text in UTF-8, nor in UTF-16 or UTF-32 with their marks") from error
        raise ValueError(f"it is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}") from error
    if "\0" in text:
        raise ValueError("it has zero characters: it is no text, or UTF-16 without its mark")
    return text


_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16, whose mark begins it
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
RECODE = "save it as UTF-8; iconv -f latin1 -t utf-8 converts what older programs write"


def parse_json(text: str | bytes, finite: bool = False) -> Any:
    """The value. Raises ValueError for whatever is none, in words for one line; for one that is nested too deeply as well,
    where Python's own parser raises RecursionError. finite: for NaN and infinities, which are no JSON, too."""
    try:
        return json.loads(text, parse_constant=_refuse, parse_float=_finite) if finite else json.loads(text)
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 from byte {error.start} on") from error
    except json.JSONDecodeError as error:
        at = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise ValueError(f"it is not JSON from {at} on ({error.msg})") from error
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError as error:
        if "integer string conversion" in str(error):
            raise ValueError("it has a number of thousands of digits") from None
        raise


def _refuse(word: str) -> float:
    raise ValueError(f"{word} is no number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse(text)


def read_json(file: Path) -> dict[str, Any]:
    """The object in a file. Raises OSError, and ValueError for what is no JSON object."""
    found = parse_json(file.read_bytes())
    if not isinstance(found, dict):
        raise ValueError("it is not a JSON object")
    return found


def parse_record(text: str | bytes) -> dict[str, Any]:
    """The object in a line or file of our own, whose numbers are all finite. Raises ValueError for what is none."""
    found = parse_json(text, finite=True)
    if not isinstance(found, dict):
        raise ValueError("it is not a JSON object")
    return found


def typed(record: Any, kind: type[T]) -> T:
    """JSON values as a dataclass, or as whatever else annotations can say; keys that it does not know are left out. Raises
    ValueError, with the place, for a value of another type."""
    import msgspec  # 20 ms that a run without files does without

    try:
        return msgspec.convert(record, kind, str_keys=True)
    except msgspec.ValidationError as error:
        said, _, where = str(error).replace("`", "").partition(" - at ")
        where = where.replace("$.", "").replace(" in $", "").replace("$", "")
        raise ValueError(": ".join(filter(None, [where, said[0].lower() + said[1:]]))) from error


def lock(file: IO[Any]) -> bool:
    """Whether it is ours alone until it is closed. What is no regular file, and what cannot be locked, is everybody's."""
    try:
        import fcntl  # not on Windows
    except ImportError:
        return True
    try:
        if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def replace_file(path: Path, data: bytes) -> None:
    """Write it whole: until the last byte is on the disk the old content stays. Raises OSError.

    A link is followed, what belongs to the file stays so (its mode), and what is no regular file, such as a pipe or a
    device, is written to in place: renaming would put a file where it was.
    """
    with suppress(FileNotFoundError):
        if not stat.S_ISREG(path.stat().st_mode):  # asked before it is resolved: a pipe has no name of its own
            with path.open("wb") as there:
                there.write(data)
            return
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    place = path.resolve()
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
