"""The training text of the shipped language model: prose and code that come with pinned packages.

Prose is the help topics of Python and the docstrings of the standard library and of the packages in
`PACKAGES`, cut into paragraphs, without doctests, each paragraph once. Code is the standard library's own
source. Nothing is downloaded. `assemble()` gives the same bytes wherever the same versions are installed;
the manifest `corpus.json` holds their hash.

    python scripts/lm_corpus.py --write     # renew heldout.txt, words.txt and corpus.json
"""

import argparse
import ast
import hashlib
import json
import platform
import pydoc_data.topics
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

PACKAGES = {
    "numpy": "numpy",
    "scipy": "scipy",
    "sklearn": "scikit-learn",
    "statsmodels": "statsmodels",
    "networkx": "networkx",
    "pandas": "pandas",
    "torch": "torch",
}
SKIP = {
    "site-packages",
    "test",
    "tests",
    "testing",
    "_vendor",
    "lib2to3",
    "idlelib",
    "turtledemo",
    "__pycache__",
}
DATA = Path(__file__).parents[1] / "src" / "regard" / "tasks" / "data"
HELD_OUT_BYTES, LONG_DOCUMENT, CODE_BYTES, WORDS = 320_000, 5_000, 9_000_000, 1200


@dataclass(frozen=True)
class Corpus:
    prose: str
    code: str
    held_out: str
    words: list[str]

    @property
    def fingerprint(self) -> str:
        whole = "\0".join([self.prose, self.code, self.held_out, *self.words])
        return hashlib.sha256(whole.encode()).hexdigest()


def assemble() -> Corpus:
    root = Path(sysconfig.get_paths()["stdlib"])
    documents = [pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)]
    documents += list(_docstrings(root))
    for name in PACKAGES:
        documents += list(_docstrings(Path(sysconfig.get_paths()["purelib"]) / name))
    documents = list(_without_repeats(documents))
    held = _choose_held_out(documents)
    prose = "\n\n".join(d for d in documents if d not in held)
    held_out = "\n\n".join(d for d in documents if d in held) + "\n"
    code = "\n\n".join(source for _, source in _sources(root))[:CODE_BYTES]
    return Corpus(prose, code, held_out, _common_words(prose))


def _sources(root: Path) -> Iterator[tuple[Path, str]]:
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        if SKIP.isdisjoint(path.relative_to(root).parts):
            try:
                yield path, path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue


def _docstrings(root: Path) -> Iterator[str]:
    documented = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module)
    for _, source in _sources(root):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                tree = ast.parse(source)
            except SyntaxError:
                continue
        yield from (ast.get_docstring(n) or "" for n in ast.walk(tree) if isinstance(n, documented))


def _without_repeats(documents: list[str]) -> Iterator[str]:
    seen: set[str] = set()
    for document in documents:
        kept = []
        for paragraph in re.split(r"\n\s*\n", document.strip("\n")):
            key = re.sub(r"[\W\d]+", " ", paragraph.lower())
            if key not in seen and _is_prose(paragraph):
                seen.add(key)
                kept.append("\n".join(line.rstrip() for line in paragraph.splitlines()))
        if sum(map(len, kept)) >= 120:
            yield "\n\n".join(kept)


def _is_prose(paragraph: str) -> bool:
    if ">>>" in paragraph or len(paragraph) < 12 or not paragraph.isascii():
        return False
    letters = sum(c.isalpha() or c == " " for c in paragraph)
    return letters >= 0.8 * len(paragraph)


def _choose_held_out(documents: list[str]) -> set[str]:
    """Long documents in the order of their hashes, until there is enough."""
    held: set[str] = set()
    size = 0
    for document in sorted(documents, key=lambda d: hashlib.sha256(d.encode()).digest()):
        if LONG_DOCUMENT <= len(document) <= 8 * LONG_DOCUMENT and size < HELD_OUT_BYTES:
            held.add(document)
            size += len(document)
    return held


def _common_words(prose: str) -> list[str]:
    counts = Counter(re.findall(r"(?<![\w.`_])[a-z]{4,7}(?![\w`_(])", prose))
    return sorted(word for word, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:WORDS])


def manifest(corpus: Corpus) -> dict:
    packages = {"python": platform.python_version()} | {p: version(p) for p in PACKAGES.values()}
    sizes = {name: len(getattr(corpus, name).encode()) for name in ("prose", "code", "held_out")}
    return {"sha256": corpus.fingerprint, "bytes": sizes, "words": len(corpus.words), "versions": packages}


def check(corpus: Corpus, path: Path = DATA / "corpus.json") -> None:
    """Refuse a corpus that is not the one that the manifest names."""
    wanted = json.loads(path.read_text())
    here = manifest(corpus)
    if here["sha256"] != wanted["sha256"]:
        changed = {k: (v, here["versions"].get(k)) for k, v in wanted["versions"].items()}
        changed = {k: v for k, v in changed.items() if v[0] != v[1]}
        raise SystemExit(
            f"the corpus assembled here has sha256 {here['sha256']}, {path.name} names {wanted['sha256']}; "
            f"versions that differ (wanted, here): {changed or 'none'}. "
            "--any-corpus trains on it all the same."
        )


def write(corpus: Corpus) -> None:
    DATA.mkdir(parents=True, exist_ok=True)
    (DATA / "heldout.txt").write_text(corpus.held_out, encoding="utf-8")
    (DATA / "words.txt").write_text("\n".join(corpus.words) + "\n", encoding="utf-8")
    (DATA / "corpus.json").write_text(json.dumps(manifest(corpus), indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--write", action="store_true", help="write the held-out text, the words and the manifest"
    )
    text = assemble()
    if parser.parse_args().write:
        write(text)
    print(json.dumps(manifest(text), indent=2))
