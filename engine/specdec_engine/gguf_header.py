"""A GGUF's header in one pass, and transformers reading that instead of the file.

gguf.GGUFReader makes two numpy views of every string, 25 µs a token, and transformers has it read the file for the config and
again for the tokenizer: 48 s for a vocabulary of 262,144 tokens. This is the one file that knows how the two libraries, and
transformers' versions, read a header.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np

Count = Callable[[int, int], None]
"""Is told how many tokens of the vocabulary are read, and how many there are."""
_EACH = 20_000
"""Tokens between two such reports: about 20 ms."""


def _uncounted(done: int, total: int) -> None:
    """Report nothing."""


class Header(gguf.GGUFReader):
    """gguf's own reader, but for arrays, which are read as a whole.

    Its internals are overridden: where another version of gguf has others, it reads as slowly as before.
    """

    def __init__(self, file: Path, count: Count) -> None:
        """Raises ValueError, and whatever else gguf and struct raise, for a file that is damaged."""
        self._count = count
        super().__init__(file)

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        """Size in bytes, parts, which parts are the values, and types: an array's values are views of a string's bytes or
        of one number each."""
        if raw_type != gguf.GGUFValueType.ARRAY or self.byte_order == "S":
            return super()._get_field_parts(orig_offs, raw_type)
        kind, length = self._get(orig_offs, "<u4"), self._get(orig_offs + 4, "<u8")
        item, start = gguf.GGUFValueType(int(kind[0])), orig_offs + 12
        if item == gguf.GGUFValueType.STRING:
            key_ends = orig_offs - 4  # before the value's type
            count = self._count if bytes(self.data[key_ends - 7 : key_ends]) == b".tokens" else _uncounted
            end, values = self._strings(start, int(length[0]), count)
        elif item in self.gguf_scalar_to_np:
            end, values = self._numbers(start, int(length[0]), self.gguf_scalar_to_np[item])
        else:  # arrays of arrays
            return super()._get_field_parts(orig_offs, raw_type)
        types = [gguf.GGUFValueType.ARRAY, item] if values else [gguf.GGUFValueType.ARRAY]
        return end - orig_offs, [kind, length, *values], list(range(2, 2 + len(values))), types

    def _strings(self, at: int, n: int, count: Count) -> tuple[int, list[Any]]:
        data, strings = self.data.data, list[Any]()
        for i in range(n):
            if i % _EACH == 0:
                count(i, n)
            (size,) = struct.unpack_from("<Q", data, at)
            at += 8 + size
            strings.append(data[at - size : at])
        if at > len(data):
            raise ValueError(f"a string ends at byte {at}, the file at {len(data)}")
        count(n, n)
        return at, strings

    def _numbers(self, at: int, n: int, dtype: Any) -> tuple[int, list[Any]]:
        numbers = self._get(at, dtype, n)
        if len(numbers) < n:
            raise ValueError(f"an array has {len(numbers)} of its {n} numbers")
        view = np.array(numbers).data  # a copy: views of a mapped array take ten times as long to make
        return at + numbers.nbytes, [view[i : i + 1] for i in range(n)]


@contextmanager
def given_to_transformers(header: Header, file: Path) -> Iterator[None]:
    """Until the block ends, what reads this file by gguf.GGUFReader gets what is read already."""
    usual: Any = gguf.GGUFReader

    def reader(path: Any, *more: Any) -> Any:
        return header if Path(path).samefile(file) else usual(path, *more)

    gguf.GGUFReader = reader  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        gguf.GGUFReader = usual  # type: ignore[misc]
