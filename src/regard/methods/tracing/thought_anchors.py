"""Thought Anchors: the sentences of a reasoning trace that later ones attend to, and that change them when hidden.

    A[t, s]    mean attention of the tokens of sentence t to those of sentence s, one head
    v_s        = mean of A[t, s] over t >= s + 4                       vertical score; the last 4 sentences have none
    κ          = m_4 / m_2² - 3 of the v_s                             Fisher's kurtosis, biased moments
    receivers  the 20 heads of the largest κ, mean over texts;         anchor_s: mean of their v_s
    E[t, s]    = mean over the tokens of t of log((KL(p ‖ p̃) + ε) / ε)   p, p̃: softmax(logits / 0.6), ε = 1e-9

where p̃ is predicted by one forward in which no query of any layer sees sentence s, hidden before the softmax. A
receiver head looks at few sentences from everywhere later, so its v_s has a heavy tail. Both say which sentences a
trace hangs on: in R1-Distill-Qwen-14B these are more often plans and second thoughts than computations.

>>> import torch
>>> A = torch.zeros(6, 6); A[4, 0], A[5, 0], A[5, 1] = 0.4, 0.2, 0.1
>>> vertical_scores(A, Config())  # sentence 0 is seen by 4 and 5, sentence 1 by 5 alone
tensor([0.3000, 0.1000])
>>> kurtosis(torch.tensor([0.0, 0.0, 0.0, 4.0]))  # deviations -1, -1, -1, 3: m_4 = 84 / 4, m_2 = 12 / 4
tensor(-0.6667)
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from regard.core import Card, Edit, Observer, Site, require
from regard.kinds.tracing import TracingPage

Spans = Sequence[tuple[int, int]]  # sentences: first and past-the-last token


@dataclass(frozen=True)
class Config:
    proximity: int = 4  # sentences so near do not count
    receivers: int = 20  # heads
    # of the softmax of p and p̃; larger: flatter, so that unlikely tokens count more
    temperature: float = 0.6
    floor: float = 1e-9  # ε

    def __post_init__(self) -> None:
        require(self.proximity >= 0, "proximity >= 0", proximity=self.proximity)
        require(self.receivers >= 1, "receivers >= 1", receivers=self.receivers)
        require(self.temperature > 0, "temperature > 0", temperature=self.temperature)
        require(self.floor > 0, "floor > 0", floor=self.floor)


def check_sentences(sentences: Spans, tokens: int) -> None:
    """ValueError unless they are in order, apart, not empty and within so many tokens."""
    ends = [0, *(end for span in sentences for end in span)]
    ordered = all(a <= b for a, b in pairwise(ends)) and ends[-1] <= tokens
    require(
        bool(sentences) and ordered and all(first < past for first, past in sentences),
        "sentences are spans of one token or more, in order and apart, within the text",
        sentences=list(sentences),
        tokens=tokens,
    )


def sentence_mass(sentences: Spans) -> Observer:
    """The weights of every token, summed over the tokens of each sentence: [B, H, N, S] a layer."""
    return Observer("spans", Site(tower="text"), name="sentences", spans=tuple(sentences))


def suppress(span: tuple[int, int], tokens: int | None = None) -> Edit:
    """No head of any layer sees these tokens any more: hidden before the softmax, the rest is renormalised.

    tokens   of the text, read in one forward: the edit leaves alone the queries before the span, which cannot see it,
             so that they stay the same to the last bit; None: every query of every forward
    """
    rows = None if tokens is None else tuple(range(span[0], tokens))
    return Edit(Site("scores", rows=rows, keys=tuple(range(*span)), tower="text"), "block")


def sentence_means(mass: Tensor, sentences: Spans) -> Tensor:
    """A [..., S, S] of the weights [..., N, S] that each token gives to each sentence."""
    rows = [mass[..., first:past, :].mean(-2) for first, past in sentences]
    return torch.stack(rows, -2) / torch.tensor(
        [past - first for first, past in sentences], device=mass.device
    )


def vertical_scores(means: Tensor, cfg: Config) -> Tensor:
    """v [..., S - proximity] of A [..., S, S]."""
    n = means.shape[-1] - cfg.proximity
    require(n >= 1, "more sentences than are near", sentences=means.shape[-1], proximity=cfg.proximity)
    s = torch.arange(n, device=means.device)
    later = torch.arange(means.shape[-1], device=means.device)[:, None] >= s + cfg.proximity  # [S, n]
    return (means[..., :n] * later).sum(-2) / later.sum(0)


def kurtosis(v: Tensor) -> Tensor:
    """κ [...] of v [..., n]; NaN where all n are the same number, as far as its digits go."""
    off = v - v.mean(-1, keepdim=True)
    m2, m4 = off.square().mean(-1), off.pow(4).mean(-1)
    constant = m2 <= (torch.finfo(v.dtype).resolution * v.mean(-1)).square()
    return torch.where(constant, torch.nan, m4 / m2.square() - 3)


def receivers(kurtoses: Tensor, cfg: Config) -> list[tuple[int, int]]:
    """(layer, head) of the largest mean over texts of κ [texts, L, H], the largest first; NaN in any: none."""
    mean = kurtoses.mean(0)
    order = mean.nan_to_num(-torch.inf).flatten().argsort(descending=True, stable=True)
    known = order[: int((~mean.isnan()).sum())][: cfg.receivers].tolist()
    return [divmod(i, mean.shape[1]) for i in known]


def effects(base: Tensor, hidden: Tensor, sentences: Spans, cfg: Config) -> Tensor:
    """E [S] in float64 of the logits [N, V] of a text, and of those without one of its sentences."""
    result = []
    for first, past in sentences:
        p, q = ((x[first:past].double() / cfg.temperature).log_softmax(-1) for x in (base, hidden))
        kl = (p.exp() * (p - q)).sum(-1).clamp(min=0)
        result.append((kl / cfg.floor).log1p().mean())
    return torch.stack(result)


def measure(mass: Tensor, base: Tensor, hidden: Tensor, sentences: Spans, cfg: Config) -> dict[str, Tensor]:
    """All of it on one text.

    mass [L, H, N, S] weights that each token gives to each sentence; base [N, V] logits; hidden [S, N, V] those
    without each sentence -> vertical [L, H, S - proximity], receivers [k, 2], anchors [S - proximity], effects [S, S].
    """
    check_sentences(sentences, mass.shape[-2])
    v = vertical_scores(sentence_means(mass, sentences), cfg)
    heads = torch.tensor(receivers(kurtosis(v)[None], cfg), dtype=torch.long).view(-1, 2)
    anchors = v[heads[:, 0], heads[:, 1]].sum(0) / max(1, len(heads))
    columns = [effects(base, without, sentences, cfg) for without in hidden]
    return {"vertical": v, "receivers": heads, "anchors": anchors, "effects": torch.stack(columns, 1)}


def reference(mass: Tensor, base: Tensor, hidden: Tensor, sentences: Spans, cfg: Config) -> dict[str, Tensor]:
    """The same by the definitions, number by number."""
    layers, heads, count = *mass.shape[:2], len(sentences)
    n = count - cfg.proximity
    vertical, ranked = torch.zeros(layers, heads, n, dtype=torch.float64), []
    for h in range(layers * heads):
        of_head = mass[h // heads, h % heads].tolist()
        for s in range(n):
            width, seen = sentences[s][1] - sentences[s][0], []
            for first, past in sentences[s + cfg.proximity :]:
                seen.append(sum(of_head[i][s] / width for i in range(first, past)) / (past - first))
            vertical[h // heads, h % heads, s] = sum(seen) / len(seen)
        v = vertical[h // heads, h % heads].tolist()
        spread = [x - sum(v) / n for x in v]
        if max(spread) - min(spread) > 1e-12:
            ranked.append((n * sum(x**4 for x in spread) / sum(x**2 for x in spread) ** 2, -h))
    chosen = [-h for _, h in sorted(ranked, reverse=True)[: cfg.receivers]]
    anchors = [sum(vertical.view(-1, n)[h, s].item() for h in chosen) / max(1, len(chosen)) for s in range(n)]
    effect = torch.zeros(count, count, dtype=torch.float64)
    for t, s in ((t, s) for t in range(count) for s in range(count)):
        tokens = range(*sentences[t])
        logs = [math.log(divergence(base[i], hidden[s, i], cfg) / cfg.floor + 1) for i in tokens]
        effect[t, s] = sum(logs) / len(tokens)
    return {
        "vertical": vertical,
        "receivers": torch.tensor([divmod(h, heads) for h in chosen], dtype=torch.long).view(-1, 2),
        "anchors": torch.tensor(anchors, dtype=torch.float64),
        "effects": effect,
    }


def divergence(base: Tensor, hidden: Tensor, cfg: Config) -> float:
    """KL of two rows of logits [V], as sums over the vocabulary."""
    a, b = ([math.exp(x / cfg.temperature) for x in row.tolist()] for row in (base, hidden))
    return sum(x / sum(a) * math.log(x * sum(b) / (sum(a) * y)) for x, y in zip(a, b, strict=True))


def cases(seed: int) -> Iterable[tuple]:
    """Gaps between sentences, one token each, one scored sentence, flat heads and twins, no proximity.

    Four scored sentences, or one: the kurtosis of any three numbers is the same.
    """
    g = torch.Generator().manual_seed(seed)
    for sentences, cfg in (
        ([(1, 3), (3, 4), (6, 9), (9, 11), (11, 12), (12, 15), (16, 18), (18, 19)], Config(receivers=3)),
        ([(i, i + 1) for i in range(8)], Config(receivers=20, temperature=1.0)),
        ([(2 * i, 2 * i + 2) for i in range(5)], Config()),
        ([(0, 2), (2, 5), (5, 6), (6, 7)], Config(proximity=0, receivers=1, floor=1e-3)),
    ):
        tokens, count = sentences[-1][1] + 1, len(sentences)
        mass = torch.rand(2, 3, tokens, count, generator=g, dtype=torch.float64)
        mass[0, 1], mass[1, 2] = 0.25, mass[1, 1]
        base = torch.randn(tokens, 7, generator=g, dtype=torch.float64)
        hidden = base + torch.randn(count, tokens, 7, generator=g, dtype=torch.float64)
        for s, (first, _) in enumerate(sentences):
            hidden[s, :first] = base[:first]
        yield mass, base, hidden, sentences, cfg


METHOD = TracingPage(
    config=Config,
    measure=measure,
    reference=reference,
    cases=cases,
    patterns=("causal_self",),
    card=Card(
        title="Thought anchors",
        paper="Thought Anchors: Which LLM Reasoning Steps Matter? (arXiv:2506.19143)",
        year=2025,
        idea="sentences that receiver heads look back at, and whose hiding changes what later sentences predict",
        cost="one forward, and one more for each sentence that is hidden",
        state="a number per token, head and sentence; with the runner one per pair of sentences and head",
        needs=("decoder-lm", "scores"),
        lineage=("retrieval_heads",),
        caveat="of the paper's three measures these are the two that read the model; resampling sentences is not here. "
        "Effects count from ε, which moves all by log ε: no effect is 0. A token's logits are those after it, so "
        "the first token of a sentence is predicted in the one before, as in the released code. That code compares "
        "logits cut to a nucleus of 0.9999 instead of all of them, and hides keys by the smallest finite number: a "
        "query without any other key attends to nothing here, to all alike there. A head whose vertical scores "
        "are one number has no kurtosis and is no receiver. Scores favour early sentences, where there is less to see "
        "(the code can rank each row of A instead; its runs do not)",
    ),
)
