"""OPERA: beam search that distrusts tokens which lean on a few summary tokens, and goes back where it leaned too long.

    φ_c = max_j Π_{i=j..t} σ A_ij              A: last layer, max over heads, rows of sum 1; i, j tokens of the answer
    p(c) = softmax_c(logit_c - α u φ_c)        c: the likeliest tokens of each beam, each fed as token t to see its row

where a column j to which every later token attends with more than 1/σ grows with each of them: knowledge was gathered
in token j, and what follows is told from it and not from the image. If one column is that of the maximum in more than
`patience` steps, the search returns to just behind it and takes other tokens there.

>>> columnar = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.1, 0.0], [0.5, 0.1, 0.1]]).double()
>>> value, column = measure(columnar, sigma=4.0)  # column 0: 4 · 2 · 2
>>> round(value.item(), 6), column.item()
(16.0, 0)
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from regard.core import Card, require
from regard.kinds.steering import SteeringPage


@dataclass(frozen=True)
class Config:
    beams: int = 5  # answers that are kept at each step; larger: a wider search, and slower
    candidates: int = 5  # tokens of each beam that are looked at
    sigma: float = 50.0  # σ
    alpha: float = 1.0  # α
    unit: float = 1e-7  # u
    patience: int = 15  # steps that one column may be that of the maximum; after more the search goes back
    rollbacks: int = 5  # 0: it never goes back

    def __post_init__(self) -> None:
        require(self.beams >= 1 and self.candidates >= 1, "a beam and a candidate or more",
                beams=self.beams, candidates=self.candidates)  # fmt: skip
        require(self.sigma > 0 and self.unit >= 0, "sigma > 0, unit >= 0", sigma=self.sigma, unit=self.unit)
        require(self.alpha >= 0, "alpha >= 0", alpha=self.alpha)
        require(self.patience >= 1 and self.rollbacks >= 0, "patience >= 1, rollbacks >= 0",
                patience=self.patience, rollbacks=self.rollbacks)  # fmt: skip


def measure(attention: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """(φ [...], its column [...]) of lower triangular attention [..., T, T]; in logs, so that nothing overflows."""
    size = attention.shape[-1]
    below = torch.ones(size, size, dtype=torch.bool, device=attention.device).tril()
    logs = (sigma * attention).clamp(min=1e-30).log().masked_fill(~below, 0.0)
    best, column = logs.sum(-2).max(-1)
    return best.clamp(max=80.0).exp(), column


def reference(attention: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """By the definition: products down each column, the first largest."""
    flat = attention.double().flatten(0, -3) if attention.dim() > 2 else attention.double()[None]
    values, columns = [], []
    for matrix in flat.tolist():
        products = []
        for j in range(len(matrix)):
            product = 1.0
            for i in range(j, len(matrix)):
                product *= sigma * matrix[i][j]
            products.append(product)
        columns.append(products.index(max(products)))
        values.append(max(products))
    lead = attention.shape[:-2]
    return torch.tensor(values, dtype=torch.float64).view(lead), torch.tensor(columns).view(lead)


def cases(seed: int) -> Iterable[tuple]:
    """One token; a column that is leaned on; many candidates."""
    g = torch.Generator().manual_seed(seed)
    for lead, size, sigma in (((), 1, 50.0), ((3,), 4, 10.0), ((2, 5), 7, 50.0)):
        rows = torch.rand(*lead, size, size, generator=g, dtype=torch.float64).tril() + 1e-3
        yield (rows / rows.sum(-1, keepdim=True)).tril(), sigma


@dataclass
class Beams:
    """Beams of one text: ids [beams, t], sums of log p less penalties, what has ended as (score, ids)."""

    ids: Tensor
    sums: Tensor
    ended: list[tuple[float, list[int]]] = field(default_factory=list)


def choose(beams: Beams, scores: Tensor, ends: tuple[int, ...], count: int) -> tuple[Tensor, Tensor] | None:
    """(beam, token) of the next step, and what ends noted; None once nothing can get better. scores [beams, V]."""
    total = beams.sums[:, None] + scores
    best, flat = total.flatten().topk(min(2 * count, total.numel()))
    length, kept = beams.ids.shape[1] + 1, []
    for rank, (value, at) in enumerate(zip(best.tolist(), flat.tolist(), strict=True)):
        beam, token = divmod(at, scores.shape[1])
        if token in ends:
            if rank < count and value > -1e30:
                beams.ended.append((value / length, [*beams.ids[beam].tolist(), token]))
        elif len(kept) < count:
            kept.append((beam, token, value))
    beams.ended = sorted(beams.ended, key=lambda e: -e[0])[:count]
    if len(beams.ended) == count and best[0].item() / length <= beams.ended[-1][0]:
        return None
    parents, tokens = (torch.tensor([k[i] for k in kept]) for i in (0, 1))
    beams.sums = torch.tensor([k[2] for k in kept])
    beams.ids = torch.cat([beams.ids[parents], tokens[:, None]], 1)
    return parents, tokens


def distrusted(run: Any, logs: Tensor, cfg: Config) -> tuple[Tensor, int]:
    """(scores [beams, V], -inf beside the candidates; the column on which the likeliest lean) after some tokens."""
    chosen = logs.topk(min(cfg.candidates, logs.shape[1])).indices
    rows = run.look(chosen)  # [beams, c, T + 1]
    past = torch.nn.functional.pad(run.attention, (0, 1))[:, None].expand(-1, chosen.shape[1], -1, -1)
    value, column = measure(torch.cat([past, rows[:, :, None]], 2), cfg.sigma)
    scores = torch.full_like(logs, -torch.inf)
    found = logs.gather(1, chosen) - cfg.alpha * cfg.unit * value.to(logs)
    return scores.scatter(1, chosen, found.log_softmax(-1)), int(column.flatten().mode().values)


def search(run: Any, cfg: Config) -> Tensor:
    """[1, T] ids that follow the prompt of one text."""
    logits = run.begin(cfg.beams)
    beams = Beams(
        run.prompt.new_zeros(cfg.beams, 0),
        torch.full((cfg.beams,), -1e30).index_fill(0, torch.tensor(0), 0.0),
    )
    states: list[tuple[Beams, Tensor]] = []
    columns: list[int] = []
    banned: dict[int, set[int]] = {}
    left = cfg.rollbacks
    while beams.ids.shape[1] < run.tokens:
        step, scores = beams.ids.shape[1], logits.log_softmax(-1)
        states = [*states[:step], (Beams(beams.ids, beams.sums, list(beams.ended)), logits)]
        scores[:, sorted(banned.get(step, ()))] = -torch.inf
        if cfg.alpha and step:
            scores, column = distrusted(run, scores, cfg)
            columns = [*columns[: step - 1], column]
        back = summary(columns, cfg)
        if left and back is not None and back + 1 < step:
            left, step = left - 1, back + 1
            banned.setdefault(step, set()).update(beams.ids[:, step].tolist())
            beams, logits = restored(run, states[step])
            states, columns = states[:step], columns[: max(step - 1, 0)]
            continue
        picked = choose(beams, scores, run.ends, cfg.beams)
        if picked is None:
            break
        run.reorder(picked[0])
        logits = run.feed(picked[1])
    return best_of(beams, run)


def summary(columns: list[int], cfg: Config) -> int | None:
    """The column on which more than `patience` of the steps lean."""
    often = max(columns, key=columns.count, default=0)
    return often if columns.count(often) > cfg.patience else None


def restored(run: Any, state: tuple[Beams, Tensor]) -> tuple[Beams, Tensor]:
    """The beams as they were: the cache is cut to the prompt and their tokens are read again."""
    beams, logits = state
    run.take_back(run.fed)
    for token in beams.ids.T:
        run.feed(token)
    return Beams(beams.ids, beams.sums, list(beams.ended)), logits


def best_of(beams: Beams, run: Any) -> Tensor:
    length = max(beams.ids.shape[1], 1)
    found = [
        *beams.ended,
        *((s / length, ids) for s, ids in zip(beams.sums.tolist(), beams.ids.tolist(), strict=True)),
    ]
    return run.prompt.new_tensor([max(found, key=lambda e: e[0])[1]])


METHOD = SteeringPage(
    config=Config,
    search=search,
    measure=measure,
    reference=reference,
    cases=cases,
    test_settings=({"beams": 2, "candidates": 3, "unit": 1.0, "sigma": 4.0, "patience": 2, "rollbacks": 1},),
    card=Card(
        title="OPERA",
        paper="OPERA: Alleviating Hallucination in Multi-Modal Large Language Models via Over-Trust Penalty and "
        "Retrospection-Allocation",
        year=2024,
        idea="beam search with a penalty on tokens that lean on a summary token, and a way back to it",
        cost="a forward of all candidates of all beams for each token, beside that of the beams",
        needs=("decoder-lm",),
        lineage=("beam search",),
        neutral={"alpha": 0.0},
        caveat="the factor u = 1e-7 is the released code's: without it φ, a product of numbers above 1, outgrows every "
        "score. For the first 10 tokens the code rewards attention to the image instead, and it does not go back to "
        "them; the page, as the paper, does. As in the paper and the code p is normalised over the candidates of a "
        "beam: what all of them lose is lost by none. Tokens that are taken back are banned in all beams, and there "
        "are `rollbacks` for a text; the code bans them behind their own beams, five times for a place. At α = 0 it "
        "is plain beam search over all tokens with `beams` beams. Texts of a batch are searched one by one",
    ),
)
