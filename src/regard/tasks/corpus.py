"""Running text for the tasks: the held-out text that is shipped, or the user's own file.

The held-out text is documentation of Python and of scientific packages that the shipped language model has
not been trained on (`scripts/lm_corpus.py` chooses it; `data/corpus.json` names the versions).
"""

import hashlib
import random
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from weakref import WeakKeyDictionary

from regard.core import require

SHORTEST = 200  # characters


@dataclass(frozen=True)
class Source:
    """A text, and where it came from. Slices of it are drawn by a seeded generator."""

    name: str
    text: str

    @classmethod
    def from_path(cls, path: str | Path) -> "Source":
        """The text of a file, or of all `.txt` and `.md` files of a directory in the order of their names."""
        path = Path(path)
        require(path.exists(), "the text file exists", path=str(path))
        files = [path]
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".md"))
            require(bool(files), "a directory of texts holds .txt or .md files", path=str(path))
        text = "\n\n".join(read_text(file) for file in files)
        size = len(text.strip())
        require(size >= SHORTEST, f"at least {SHORTEST} characters of text", path=str(path), got=size)
        return cls(str(path), text)

    @property
    def revision(self) -> str:
        """The text itself, in 12 characters."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:12]

    def ids(self, tokenizer) -> list[int]:
        return _ids(tokenizer, self.text)

    def take(self, tokenizer, count: int, rng: random.Random) -> list[int]:
        """`count` tokens in a row, from a place that the generator draws."""
        ids = self.ids(tokenizer)
        rule = "the text has as many tokens as asked"
        require(len(ids) >= count, rule, text=self.name, tokens=len(ids), count=count)
        start = rng.randint(0, len(ids) - count)
        return ids[start : start + count]


def encode(tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


@cache
def held_out() -> Source:
    return Source("held-out text", read_text(Path(__file__).parent / "data" / "heldout.txt"))


def read_text(path: Path) -> str:
    """The text of a file; ValueError where it is not UTF-8 or holds zero bytes."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"a text file is UTF-8: {path} is not, at byte {error.start} ({error.object[error.start]:#04x}); where it "
            f"is text in another encoding, write it anew, e.g. iconv -f LATIN1 -t UTF-8 {path} > text.txt"
        ) from None
    require("\0" not in text, "a text file holds text, no zero bytes", path=str(path), at=text.find("\0"))
    return text


_kept: WeakKeyDictionary = WeakKeyDictionary()  # tokenizer -> text -> ids; a text is encoded once


def _ids(tokenizer, text: str) -> list[int]:
    known = _kept.setdefault(tokenizer, {})
    if text not in known:
        # paragraph by paragraph: a tokenizer warns of texts longer than its model's context
        known[text] = [i for part in re.findall(r"(?s).+?(?:\n\n|\Z)", text) for i in encode(tokenizer, part)]
    return known[text]
