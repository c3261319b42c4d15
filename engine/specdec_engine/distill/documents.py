"""What people ask about texts that they have: to summarise, translate, extract, rewrite and answer from.

Left to itself a target asks about the world, and an answer has few words in common with its prompt. Where a document
stands in the prompt, most of a good answer's words stand in the document, and a draft must learn to find them there.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from specdec_engine.errors import UsageError, reason
from specdec_engine.record.files import decode
from specdec_engine.record.text import counted

_WRITTEN: dict[str, list[str]] = json.loads((Path(__file__).parent / "requests.json").read_text("utf-8"))
OPENINGS, FOLLOW_UPS = tuple(_WRITTEN["openings"]), tuple(_WRITTEN["follow_ups"])
"""What most prompts begin with, and later turns, for the target to go on from: left to itself it writes small talk. A head
that had learnt from that alone, and agreed with its target 45 times in 100 on such text, agreed 30 times on other people's
questions."""
_ABOUT_TEXTS = tuple(_WRITTEN["about_texts"])
"""{text} is a passage and {sentence} one or two of its sentences; where "..." stands at the end the target goes on."""
_FEWEST, _MOST = 30, 200
"""Words of a passage."""
_SENTENCE_ENDS = re.compile(r"(?<=[.!?])\s+")


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt, or how one begins."""

    text: str
    goes_on: bool = False
    """The target writes the rest of it."""
    about_text: bool = False


@dataclass(frozen=True, slots=True)
class Documents:
    """Passages to ask about."""

    passages: Sequence[str]
    note: str = ""
    """A sentence about what was left out; empty for nothing."""

    def request(self, seed: float, share: float = 1.0) -> Request:
        """One about a passage, or about two; share: so much of each passage's words. The same seed asks the same of the
        same."""
        dice = random.Random(seed)
        form = dice.choice(_ABOUT_TEXTS)
        asked = re.sub(r"\{(text|sentence)\}", lambda found: _shortened(self._part(found[1], dice), share), form)
        return Request(asked.removesuffix("..."), form.endswith("..."), about_text=True)

    def _part(self, what: str, dice: random.Random) -> str:
        passage = dice.choice(self.passages)
        if what == "text":
            return passage
        sentences = _SENTENCE_ENDS.split(passage)
        first = dice.randrange(len(sentences))
        return " ".join(sentences[first : first + dice.choice((1, 1, 2))])


def _shortened(text: str, share: float) -> str:
    words = text.split()
    return text if share == 1.0 else " ".join(words[: max(1, int(share * len(words)))])


def read_documents(path: Path) -> Documents:
    """Passages of a text file, or of all in a folder: paragraphs with blank lines between, cut where they are long. Raises
    UsageError where there is none."""
    if not path.exists():
        raise UsageError(f"{path} does not exist", "--documents names a text file, or a folder of them")
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    passages, left_out = list[str](), 0
    for file in files:
        try:
            passages += _passages(decode(file.read_bytes()))
        except OSError as error:
            raise UsageError(f"{file} cannot be read: {reason(error)}", "check its permissions") from error
        except ValueError:  # no text
            left_out += 1
    if not passages:
        raise UsageError(
            f"{path} holds no paragraph of {_FEWEST} words", "give text files, with blank lines between paragraphs"
        )
    note = f"{counted(left_out, 'file')} of {len(files)} in {path} hold no text, and are left out" if left_out else ""
    return Documents(passages, note)


def _passages(text: str) -> Iterator[str]:
    for paragraph in re.split(r"\n\s*\n", text):
        words = list[str]()
        for sentence in _SENTENCE_ENDS.split(" ".join(paragraph.split())):
            own = sentence.split()
            if len(words) + len(own) > _MOST:
                yield from _long_enough(words)
                words = own[:_MOST]
            else:
                words += own
        yield from _long_enough(words)


def _long_enough(words: Sequence[str]) -> Iterator[str]:
    if len(words) >= _FEWEST:
        yield " ".join(words)
