"""AIM: similar visual tokens are merged before the decoder, and the least central ones leave it layer by layer.

    merging     a round: even tokens a_i find the odd token b_j of highest cosine; the r most similar go into theirs,
                b_j <- mean(b_j, all a_i that chose it)          rounds of r <= n/2 until the target is reached
    importance  p <- p M, T times, from p = 1/N                  M = softmax(S / τ) by rows, S [H, N, N] masked scores
                s_i = sqrt(mean_h p[h, i]²)
    schedule    after layer i of L there stay floor(P · ρ) of P visual tokens, the most important;  text always stays
                ρ = 1 - clamp((i + 1 - l₁) / (l₂ - l₁), 0, 1)     l₁, l₂ = 14, 22 of L = 28 layers

p M is PageRank without damping over attention as a graph: who is attended to by those who are attended to. From the
attention weights A that the scores S gave, M = A^(1/τ) with rows of sum 1.

>>> import torch
>>> x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 2.0]])
>>> merged(x, 2)  # 0 goes into 1 and 2 into 3
(tensor([1, 3]), tensor([[1.0000, 0.0000],
        [0.0000, 1.5000]]))
>>> causal = torch.tensor([[[1.0, 0.0], [0.5, 0.5]]])
>>> importance(causal, Config(temperature=1.0, iterations=1))  # (0.5, 0.5) M
tensor([0.7500, 0.2500])
>>> [share(layer, 28, Config()) for layer in (13, 14, 20, 21)]
[1.0, 0.875, 0.125, 0.0]
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.core import Card, require
from regard.kinds.tokens import TokensPage
from regard.ops import at_least_float32
from regard.ops.images import Images, LayerView, Reduced, count_of, highest


@dataclass(frozen=True)
class Config:
    merge: float | int = 0.25  # of an image's tokens before the decoder, a share or a number
    start: float = 14 / 28  # l₁ and l₂ as shares of the decoder's layers
    end: float = 22 / 28  # l₂ as a share of the decoder's layers; after so many no visual token stays
    temperature: float = 0.1  # τ; smaller: each token passes its importance on to fewer tokens
    iterations: int = 5  # T, steps of p
    damping: float = 0.0  # of p that is drawn anew at every step

    def __post_init__(self) -> None:
        require(self.merge > 0, "merge > 0", merge=self.merge)
        ok = 0 <= self.start <= self.end and self.end > 0
        require(ok, "0 <= start <= end, and end > 0", start=self.start, end=self.end)
        require(self.temperature > 0, "temperature > 0", temperature=self.temperature)
        require(self.iterations >= 1, "a step or more", iterations=self.iterations)
        require(0 <= self.damping <= 1, "damping is a share", damping=self.damping)


def merged(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Numbers [count], ascending, of the tokens of x [P, d] that stay, and their features, others merged into them."""
    keep, wide = torch.arange(len(x), device=x.device), at_least_float32(x)
    while len(wide) > count:
        a, b = wide[::2], wide[1::2]
        cosines = F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T
        order = cosines.amax(-1).argsort(descending=True, stable=True)
        gone = order[: min(len(wide) - count, len(wide) // 2)]
        into = cosines.argmax(-1)[gone]
        sizes = torch.ones_like(b[:, 0]).index_add(0, into, torch.ones_like(a[gone, 0]))
        wide, stays = wide.clone(), torch.ones_like(keep, dtype=torch.bool)
        wide[1::2] = b.index_add(0, into, a[gone]) / sizes[:, None]
        stays[2 * gone] = False
        wide, keep = wide[stays], keep[stays]
    return keep, wide.to(x.dtype)


def importance(weights: Tensor, cfg: Config) -> Tensor:
    """[N] from attention weights [H, N, N], zero where a token does not see another."""
    m = (at_least_float32(weights).log() / cfg.temperature).softmax(-1)
    tokens = m.shape[-1]
    p = m.new_full((len(m), 1, tokens), 1 / tokens)
    for _ in range(cfg.iterations):
        p = (1 - cfg.damping) * (p @ m) + cfg.damping / tokens
    return p[:, 0].square().mean(0).sqrt()


def share(layer: int, layers: int, cfg: Config) -> float:
    """ρ after a layer: of the visual tokens that entered the decoder, how many later layers see."""
    first, last, passed = cfg.start * layers, cfg.end * layers, layer + 1
    if passed <= first:
        return 1.0
    return 0.0 if passed >= last else 1 - (passed - first) / (last - first)


def count_after(layer: int, layers: int, tokens: int, cfg: Config) -> int:
    return math.floor(share(layer, layers, cfg) * tokens + 1e-9)


def before(images: Images, cfg: Config) -> list[Reduced]:
    found = []
    for image in images:
        count = count_of(cfg.merge, image.tokens)
        keep, features = merged(image.features, count)
        found.append(Reduced(keep, None if count == image.tokens else features))
    return found


def after(view: LayerView, cfg: Config) -> Tensor | None:
    entered = view.memory.setdefault("entered", len(view.alive))  # of the text, into the first layer
    count = count_after(view.layer, view.layers, entered, cfg)
    if count in (0, len(view.alive)):
        return view.alive[:count]
    return view.alive[highest(importance(view.whole(), cfg)[view.visual], count)]


def measure(x: Tensor, weights: Tensor, layers: int, cfg: Config) -> dict[str, Tensor]:
    """Merging of x [P, d], importance of all tokens of weights [H, N, N], and the counts after each of `layers`."""
    keep, features = merged(x, count_of(cfg.merge, len(x)))
    counts = [count_after(layer, layers, len(keep), cfg) for layer in range(layers)]
    rank = importance(weights, cfg)
    return {"keep": keep, "features": features, "importance": rank, "counts": torch.tensor(counts)}


def reference(x: Tensor, weights: Tensor, layers: int, cfg: Config) -> dict[str, Tensor]:
    """By the definition, vector by vector and number by number; the schedule by counting down in equal steps."""
    target = math.ceil(cfg.merge * len(x)) if isinstance(cfg.merge, float) else cfg.merge
    tokens = [(i, v) for i, v in enumerate(x.double().tolist())]
    while len(tokens) > target:
        tokens = round_of(tokens, min(len(tokens) - target, len(tokens) // 2))
    first, last = cfg.start * layers, cfg.end * layers
    counts = []
    for passed in range(1, layers + 1):
        rest = max(0.0, last - max(passed, first)) / (last - first) if last > first else float(passed < last)
        counts.append(int(len(tokens) * (1.0 if passed <= first else rest) + 1e-9))
    heads = [centrality(head, cfg) for head in weights.double().tolist()]
    rank = [math.sqrt(math.fsum(p * p for p in ps) / len(heads)) for ps in zip(*heads, strict=True)]
    keep, vectors = zip(*tokens, strict=True)
    found = {"keep": keep, "features": vectors, "importance": rank, "counts": counts}
    return {name: torch.tensor(numbers, dtype=torch.float64) for name, numbers in found.items()}


def cosine(a: list[float], b: list[float]) -> float:
    sizes = math.hypot(*a) * math.hypot(*b)
    return math.fsum(x * y for x, y in zip(a, b, strict=True)) / sizes if sizes else 0.0


def round_of(tokens: list[tuple[int, list[float]]], gone: int) -> list[tuple[int, list[float]]]:
    edges = []
    for source in range(0, len(tokens), 2):
        near = [(cosine(tokens[source][1], tokens[j][1]), -j) for j in range(1, len(tokens), 2)]
        edges += [(-max(near)[0], source, -max(near)[1])]
    chosen = sorted(edges)[:gone]
    result = []
    for n, (i, vector) in enumerate(tokens):
        group = [vector] + [tokens[source][1] for _, source, into in chosen if into == n]
        if n not in {source for _, source, _ in chosen}:
            result.append((i, [math.fsum(column) / len(group) for column in zip(*group, strict=True)]))
    return result


def centrality(head: list[list[float]], cfg: Config) -> list[float]:
    n = len(head)
    sharp = [[w ** (1 / cfg.temperature) for w in row] for row in head]
    p = [1 / n] * n
    for _ in range(cfg.iterations):
        flow = [math.fsum(p[i] * sharp[i][j] / math.fsum(sharp[i]) for i in range(n)) for j in range(n)]
        p = [(1 - cfg.damping) * f + cfg.damping / n for f in flow]
    return p


def cases(seed: int) -> Iterable[tuple]:
    """Rounds that halve and do not; equal tokens and a zero one; one token; no merging; damping; float32."""
    g = torch.Generator().manual_seed(seed)

    def drawn(tokens: int, width: int, heads: int, text: int, dtype: torch.dtype = torch.float64) -> list:
        scores = torch.randn(heads, text, text, generator=g, dtype=dtype)
        hidden = torch.ones(text, text, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        return [torch.randn(tokens, width, generator=g, dtype=dtype), weights]

    yield *drawn(16, 5, 3, 7), 28, Config()
    yield *drawn(13, 4, 2, 6), 6, Config(merge=0.375, temperature=0.5, damping=0.15)
    yield *drawn(9, 3, 1, 5, torch.float32), 7, Config(merge=2, start=0.0, end=1.0)
    yield *drawn(1, 2, 2, 1), 1, Config()
    yield *drawn(6, 2, 2, 4), 4, Config(merge=1.0, start=1.0, end=1.0)
    weights = drawn(8, 4, 2, 4)[1]
    same = torch.eye(4, dtype=torch.float64)[[0, 0, 1, 0, 0, 1, 2, 3]]
    same[7] = 0
    yield same, weights, 4, Config(merge=5, start=0.5, end=0.5)


METHOD = TokensPage(
    config=Config,
    before=before,
    after=after,
    measure=measure,
    reference=reference,
    cases=cases,
    test_settings=({"merge": 0.5, "start": 0.0, "end": 1.0},),
    card=Card(
        title="AIM",
        paper="AIM: Adaptive Inference of Multi-Modal LLMs via Token Merging and Pruning",
        year=2024,
        idea="merge visual tokens that look alike before the decoder; prune those that attention's PageRank ranks last",
        cost="cosines of half the tokens of an image with the other half; attention of all tokens at every "
        "layer that prunes, which a fused kernel does not give",
        needs=("vision-language model",),
        lineage=("ToMe", "FastV", "PageRank"),
        neutral={"merge": 1.0, "start": 1.0, "end": 1.0},
        caveat="the two layers are shares of the model's, since the paper's 14 and 22 are of 28. Temperature, steps, "
        "damping and the root mean square over heads are the released code's. Merging ignores how many tokens a token "
        "already stands for, as there. Tokens that stay keep their order and their positions; the code puts those that "
        "were not merged in a round before the others, which shows at targets other than 1/2, 1/4, ... Dropped tokens "
        "are out of the graph; in the code they are masked as keys and go on as queries",
    ),
)
