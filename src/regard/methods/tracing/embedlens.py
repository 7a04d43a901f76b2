"""EmbedLens: what projected visual tokens say in the words of the decoder's own table, and which say nothing.

    cos_pv = x_p · e_v / (|x_p| |e_v|),   N_p the `top` words nearest to token p
    R      = words that are in N_p of `tokens` of an image's tokens or more, in `images` of all images or more
    alive: N_p ∩ R = ∅        sink: N_p ∩ R ≠ ∅ and |x_p| > `sink` · median |x|        dead: the rest

x are an image's tokens after the projector, e the table of embeddings. A word that some tokens of every image are near
to, whatever is on it, says nothing about this one: R is found on other images than those whose tokens are told apart.
Of the tokens near such a word sinks are those of extreme norm.

>>> import torch
>>> table = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
>>> others = torch.tensor([[[3.0, 0.1], [0.0, 2.0]], [[2.0, 0.1], [-1.0, 0.0]]])  # word 0 is in both, 1 and 2 in one
>>> found = measure(torch.tensor([[[1.0, 0.2], [0.1, 2.0], [40.0, 0.0]]]), table, others, Config(top=1))
>>> found.nearest[0, :, 0].tolist(), found.recurring.tolist(), [NAMES[i] for i in found.kind[0].tolist()]
([0, 1, 0], [True, False, False], ['dead', 'alive', 'sink'])
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from regard.core import Card, Edit, Site, require
from regard.kinds.tracing import TracingPage
from regard.ops import at_least_float32

NAMES = ("alive", "dead", "sink")


@dataclass(frozen=True)
class Config:
    top: int = 3  # nearest words that are read
    images: float = 0.95  # share of images in which a word that recurs is read
    tokens: float = 0.02  # share of an image's tokens from which it is, at least
    sink: float = 3.0  # times the median norm of the image's tokens

    def __post_init__(self) -> None:
        require(self.top >= 1, "a nearest word or more", top=self.top)
        require(0 < self.images <= 1, "0 < images <= 1", images=self.images)
        require(0 <= self.tokens <= 1, "0 <= tokens <= 1", tokens=self.tokens)
        require(self.sink >= 1, "sink >= 1", sink=self.sink)


@dataclass(frozen=True)
class Lens:
    """nearest [I, P, top] words, the nearest first; recurring [V] bool; kind [I, P], numbers of NAMES."""

    nearest: Tensor
    recurring: Tensor
    kind: Tensor

    def share(self, name: str) -> float:
        """Of all tokens."""
        return (self.kind == NAMES.index(name)).double().mean().item()


def read(tokens: Tensor, table: Tensor, top: int) -> Tensor:
    """[I, P, top] words of table [V, d] nearest to tokens [I, P, d], of equal ones the first; none of length 0."""
    require(top <= len(table), "no more nearest words than there are", top=top, words=len(table))
    x, e = (torch.nn.functional.normalize(at_least_float32(a), dim=-1, eps=1e-30) for a in (tokens, table))
    cos = (x @ e.to(x.dtype).T).masked_fill(e.norm(dim=-1) == 0, -torch.inf)
    return cos.argsort(dim=-1, descending=True, stable=True)[..., :top]


def recurring(nearest: Tensor, words: int, cfg: Config) -> Tensor:
    """[V] bool from the nearest words [J, P, top] of several images."""
    images, tokens, top = nearest.shape
    ones = torch.ones(images, tokens * top, dtype=torch.float64, device=nearest.device)
    seen = ones.new_zeros(images, words).scatter_add_(1, nearest.flatten(1), ones)
    return (seen >= max(1, cfg.tokens * tokens)).double().mean(0) >= cfg.images


def measure(tokens: Tensor, table: Tensor, others: Tensor, cfg: Config | None = None) -> Lens:
    """Kinds of tokens [I, P, d] in a table [V, d]; words that recur are those of other images' tokens [J, P', d]."""
    cfg = cfg or Config()
    ok = tokens.dim() == others.dim() == 3 and tokens.shape[-1] == others.shape[-1] == table.shape[-1]
    shapes = {"tokens": tuple(tokens.shape), "table": tuple(table.shape), "others": tuple(others.shape)}
    require(ok and tokens.numel() and others.numel(), "tokens [I, P, d], as wide as the words", **shapes)
    nearest = read(tokens, table, cfg.top)
    known = recurring(read(others, table, cfg.top), len(table), cfg)
    norm = at_least_float32(tokens).norm(dim=-1)
    large = norm > cfg.sink * norm.quantile(0.5, dim=-1, keepdim=True)
    void = known[nearest].any(-1)
    return Lens(nearest, known, torch.where(void, torch.where(large, 2, 1), 0))


def hiding(drop: Tensor, visual: Sequence[int]) -> list[Edit]:
    """What takes tokens out of each text of a batch: drop [B, P] bool, visual the P positions of its visual tokens.

    No token sees them and the others keep their positions, which is as if they were not there.
    """
    chosen = [[at for at, gone in zip(visual, row, strict=True) if gone] for row in drop.tolist()]
    return [
        Edit(Site("scores", keys=tuple(keys), texts=i, tower="text"), "block")
        for i, keys in enumerate(chosen)
        if keys
    ]


def entering(layer: int, visual: Sequence[int]) -> list[Edit]:
    """What lets visual tokens enter at this layer: before it they are neither changed nor seen."""
    before, rows = tuple(range(layer)), tuple(visual)
    if not before:
        return []
    added = [
        Edit(Site(x, layers=before, rows=rows, phase="prefill", tower="text"), "zero") for x in ("out", "mlp")
    ]
    return [*added, Edit(Site("scores", layers=before, keys=rows, tower="text"), "block")]


def reference(tokens: Tensor, table: Tensor, others: Tensor, cfg: Config | None = None) -> Lens:
    """By the definition, word by word and token by token."""
    cfg, words = cfg or Config(), table.tolist()

    def cosine(x: list[float], e: list[float]) -> float:
        size = math.hypot(*e)
        return (
            math.fsum(a * b for a, b in zip(x, e, strict=True)) / (math.hypot(*x) or 1) / size
            if size
            else -9.0
        )

    def nearest(x: list[float]) -> list[int]:
        return sorted(range(len(words)), key=lambda v: (-cosine(x, words[v]), v))[: cfg.top]

    def recurs(v: int) -> bool:
        counts = [sum(v in near for near in image) / len(image) for image in seen]
        return sum(c > 0 and c >= cfg.tokens for c in counts) >= cfg.images * len(seen)

    def kind(x: list[float], image: list) -> int:
        if not any(known[v] for v in nearest(x)):
            return 0
        return 2 if math.hypot(*x) > cfg.sink * median(math.hypot(*y) for y in image) else 1

    seen = [[nearest(x) for x in image] for image in others.tolist()]
    known = [recurs(v) for v in range(len(words))]
    near = [[nearest(x) for x in image] for image in tokens.tolist()]
    kinds = [[kind(x, image) for x in image] for image in tokens.tolist()]
    return Lens(torch.tensor(near), torch.tensor(known), torch.tensor(kinds))


def cases(seed: int) -> Iterable[tuple]:
    """Tokens near a common word and far from it, all alive, all dead, one token, float32, words of no length, ties."""
    g = torch.Generator().manual_seed(seed)

    def drawn(images: int, tokens: int, width: int, words: int, common: float) -> list[Tensor]:
        """Half of the tokens lean towards word 0, and some of all are ten times as long."""
        table = torch.randn(words, width, generator=g, dtype=torch.float64)
        made = []
        for count in (images, 5):
            x = torch.randn(count, tokens, width, generator=g, dtype=torch.float64)
            x[:, ::2] += common * table[0]
            made.append(x * (1 + 9 * (torch.rand(count, tokens, 1, generator=g) < 0.2)))
        return [made[0], table, made[1]]

    yield *drawn(3, 8, 6, 20, 3.0), Config(top=2)
    yield *(x.float() for x in drawn(2, 10, 8, 30, 2.0)), Config(top=1, images=0.6, tokens=0.3)
    yield *drawn(2, 7, 4, 40, 0.0), Config(top=1, images=1.0, tokens=0.5)  # nothing recurs
    yield *drawn(2, 3, 4, 5, 1.0), Config(top=5)  # every word does
    yield tuple(drawn(1, 1, 3, 9, 5.0))
    tokens, table, others = drawn(2, 6, 3, 8, 2.0)
    table[3] = 0
    tokens[0, 1] = 0
    yield tokens, table, others, Config(top=2, sink=1.0, images=0.8)
    grid = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    axes = torch.tensor([[[1.0, 0.0], [0.0, -2.0], [-1.0, 0.0]]], dtype=torch.float64)
    yield axes, grid, axes, Config(top=1, tokens=1 / 3)


METHOD = TracingPage(
    config=Config,
    measure=measure,
    reference=reference,
    cases=cases,
    card=Card(
        title="EmbedLens",
        paper="What Do Visual Tokens Really Encode? Uncovering Sparsity and Redundancy in Multimodal Large Language "
        "Models",
        year=2026,
        idea="read visual tokens in the table of word embeddings: words that are near in every image say nothing",
        cost="one product of an image's tokens with the table",
        needs=("decoder-vlm", "images beside those that are read, to find the words that recur"),
        lineage=("logit lens",),
        caveat="the released code names three words of LLaVA-1.5 by number, one each for the tower's sinks, the "
        "decoder's and dead tokens, and a token belongs to a class if the word is among its 3 nearest; how they were "
        "found is not in it. The page finds them by what they are said to be: near in every image. The shares of "
        "images and tokens and the norm of a sink are ours, and both kinds of sinks are one. With few words in the "
        "table, nearly all of them are near to some token of every image: take `top` = 1 there",
    ),
)
