"""Laws of where a task's facts stand, and of what it reads of a text: everywhere, by the seed, never the same."""

from itertools import product

from regard.core import Method
from regard.kinds.task import ask
from regard.tasks import Sample, Source
from regard.testing.tokenizers import WordTokenizer, samples

LENGTH, COUNT = 1024, 24
FAIR = COUNT // 12  # samples whose fact stands in a quarter, at least: a third of an even share
LEAST = 16  # tokens of running text without which nothing is said of windows


def check_places(method: Method) -> str | None:
    """What is asked stands in every quarter of what may hold it, in each turn, and `depth` says where.

    A page that reads no text lays its facts out by itself: there the asked one differs from sample to sample.
    """
    drawn = samples(method, LENGTH, COUNT, 1)
    if not drawn[0].needed:
        return "its answers stand nowhere in the prompt"
    for sample in drawn:
        place = sample.evidence[0] / len(sample.prompt)
        assert abs(sample.depth - place) < 0.06, (
            f"{method.label}: depth {sample.depth:.2f}, it is at {place:.2f}"
        )
    if not windows(method, 1, COUNT)[0]:
        stands = {sample.evidence for sample in drawn}
        assert len(stands) >= COUNT // 3, (
            f"{method.label}: {len(stands)} places of the asked fact in {COUNT} samples"
        )
        return None
    each = [asked_places(sample) for sample in drawn]
    turns: list[list[float]] = [[place for places in each for place in places]]
    if drawn[0].turns:
        turns = [list(places) for places in zip(*each, strict=True)]
    for i, places in enumerate(turns, 1):
        counts = [sum(q / 4 <= place < (q + 1) / 4 for place in places) for q in range(4)]
        assert min(counts) >= FAIR, f"{method.label}: facts of turn {i} in the quarters of the text: {counts}"
    return None


def asked_places(sample: Sample) -> list[float]:
    """Where the needed facts begin, between 0 and 1 of the part of the prompt that may hold them."""
    first = sample.context if sample.written else 0
    past = sample.context + sample.written if sample.context else len(sample.prompt)
    return [(start - first) / (past - first) for start, _ in sample.needed]


def numbered(words: int = 12_000) -> Source:
    """A text of different words in letters that no task writes."""
    letters = "αβγδεζηθικλμ"
    return Source("numbered", " ".join(map("".join, list(product(letters, repeat=4))[:words])))


def windows(method: Method, seed: int, count: int) -> list[list[int]]:
    """Which tokens of a text each sample reads, by their place in it; none where any text gives the same."""
    tokenizer, source = WordTokenizer(), numbered()
    backwards = Source("backwards", " ".join(source.text.split()[::-1]))
    place = {token: i for i, token in enumerate(source.ids(tokenizer))}
    backwards.ids(tokenizer)
    drawn, few = (
        ask(method).samples(tokenizer, LENGTH, n, seed, source=text)
        for text, n in ((source, count), (backwards, 2))
    )
    if few == ask(method).samples(tokenizer, LENGTH, 2, seed, source=source):
        return [[] for _ in drawn]
    return [[place[token] for token in sample.prompt if token in place] for sample in drawn]


def check_windows(method: Method, count: int = 16) -> str | None:
    """Each sample reads a stretch of the text as it stands, another than the others and than with another seed.

    Both halves of the text are read.
    """
    first, other = (windows(method, seed, count) for seed in (0, 1))
    if min(map(len, first)) < LEAST:
        return "it reads next to nothing of a text"
    for window in first:
        assert window == list(range(window[0], window[0] + len(window))), (
            f"{method.label}: the text is not in order"
        )
    starts = [window[0] for window in first]
    assert len({*starts}) > count - 3, f"{method.label}: samples read the same of the text: {sorted(starts)}"
    middle = (len(numbered().text.split()) - max(map(len, first))) / 2
    assert min(starts) < middle < max(starts), (
        f"{method.label}: half of the text is never read: {sorted(starts)}"
    )
    same = sum(a == b[0] for a, b in zip(starts, other, strict=True))
    assert same < 3, f"{method.label}: another seed reads the same of the text"
    return None
