"""CX-ToM's fault-line: the fewest concepts to delete or add so that an image is taken for another class.

    a(d, u)    = a · (1 - d) + u · max(t - a, 0)        d, u in [0, 1]: how far each concept is deleted, added
    lead(a)    = g_alt(a) - max_{c ≠ alt} g_c(a)        over the strongest other class; above 0: the class has changed
    fault-line = the fewest concepts, each deleted (d = 1) or added (u = 1) whole, with lead > 0

where a are an image's activations of concepts, t those that a concept of class alt takes when it is added, and g the
logits of the rest of the network. The search is sparse: proximal steps on ½ max(τ - lead, 0)² + β (|d|₁ + |u|₁) while
β falls, until the concepts that are not zero, moved whole, change the class; then those that are not needed leave
one by one. For a lead that is linear in a, or grows with something that is, concepts enter in the order of their
gain, so that the set is the smallest there is; in general it is a set that changes the class and of which none can
be spared.

The paper asks people how far they trust a network after a dialogue of such fault-lines; that is not here.

>>> import torch
>>> weights = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 2.5]])  # of two classes
>>> a, t = torch.tensor([[1.0, 1.0, 0.0]]), torch.tensor([[0.0, 0.0, 1.0]])
>>> measure(lambda x: x @ weights.T, a, t, torch.tensor([1]))  # behind by 3: -2 by the first, +2.5 by the third
FaultLine(moves=tensor([[-1.,  0.,  1.]]), lead=tensor([1.5000]))
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from regard.core import Card, require
from regard.kinds.tracing import TracingPage

Head = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Config:
    tau: float = 1.0  # the lead that proximal steps aim at; moved whole, any lead above 0 is enough
    path: int = 60  # weights β of the penalty, from the smallest that moves nothing
    ratio: float = 0.8  # of one weight to the one before
    steps: int = 10  # proximal steps at each weight

    def __post_init__(self) -> None:
        require(self.tau >= 0, "tau >= 0", tau=self.tau)
        require(self.path > 0 and self.steps > 0, "path, steps > 0", path=self.path, steps=self.steps)
        require(0 < self.ratio < 1, "0 < ratio < 1", ratio=self.ratio)


@dataclass(frozen=True)
class FaultLine:
    """moves [B, K]: -1 deleted, 1 added, 0 left; lead [B] after them. Where no set was found, none moves."""

    moves: Tensor
    lead: Tensor


def moved(activations: Tensor, typical: Tensor, drop: Tensor, add: Tensor) -> Tensor:
    """[B, K] activations with this much of each concept deleted and added, all [B, K]."""
    return activations * (1 - drop) + add * (typical - activations).relu()


def lead(head: Head, activations: Tensor, alt: Tensor) -> Tensor:
    """[B] the logit of class alt [B] over the largest other one."""
    logits = head(activations)  # [B, C]
    chosen = torch.nn.functional.one_hot(alt, logits.shape[1]).bool()
    return logits[chosen] - logits.masked_fill(chosen, -torch.inf).amax(1)


def whole(moves: Tensor) -> tuple[Tensor, Tensor]:
    """(drop, add) [B, K] of moves in {-1, 0, 1}."""
    return (-moves).relu(), moves.relu()


def measure(
    head: Head, activations: Tensor, typical: Tensor, alt: Tensor, cfg: Config | None = None
) -> FaultLine:  # fmt: skip
    """The fault-line of each row. head: [B, K] -> [B, C], row by row; activations, typical [B, K] >= 0; alt [B]."""
    require(activations.shape == typical.shape, "a typical activation for each", typical=typical)
    require(bool((activations >= 0).all()), "activations are not negative", activations=activations)
    cfg = cfg or Config()

    def after(moves: Tensor) -> Tensor:
        return lead(head, moved(activations, typical, *whole(moves)), alt)

    with torch.no_grad():
        moves = pruned(after, sparse(head, activations, typical, alt, after, cfg))
        return FaultLine(moves, after(moves))


def pull(
    head: Head, activations: Tensor, typical: Tensor, alt: Tensor, x: Tensor, tau: float
) -> tuple[Tensor, Tensor]:
    """(what the lead misses of tau [B, 1], its gradient [2, B, K]) at x: how far concepts are deleted and added."""
    with torch.enable_grad():
        x = x.clone().requires_grad_()
        ahead = lead(head, moved(activations, typical, *x), alt)
        (gain,) = torch.autograd.grad(ahead.sum(), x)
    return (tau - ahead.detach()).relu()[:, None], gain


def sparse(
    head: Head, activations: Tensor, typical: Tensor, alt: Tensor, after: Callable[[Tensor], Tensor], cfg: Config
) -> Tensor:  # fmt: skip
    """[B, K] the first moves on the path of weights that change the class."""
    given, x = (head, activations, typical, alt), activations.new_zeros(2, *activations.shape)
    missing, gain = pull(*given, x, cfg.tau)
    most = missing * gain.amax((0, 2))[:, None].relu()
    found, moves = after(x[0]) > 0, torch.zeros_like(activations)
    for n in range(cfg.path):
        for _ in range(cfg.steps):
            missing, gain = pull(*given, x, cfg.tau)
            # 1 / the curvature of ½ missing² where the lead is linear
            rate = 1 / gain.square().sum((0, 2)).clamp(min=1e-12)[:, None]
            x = (x + rate * (missing * gain - most * cfg.ratio**n)).clamp(0, 1)
        hard = ((x[1] > x[0]).int() - ((x[0] > 0) & (x[0] >= x[1])).int()).to(x.dtype)
        now = ~found & (after(hard) > 0)
        moves, found = torch.where(now[:, None], hard, moves), found | now
    return moves


def pruned(after: Callable[[Tensor], Tensor], moves: Tensor) -> Tensor:
    """[B, K] without the moves that the others can spare, that which costs the least lead first."""
    for _ in range(moves.shape[1]):
        without = []
        for k in range(moves.shape[1]):
            kept = moves.index_fill(1, torch.tensor([k], device=moves.device), 0)
            without.append(after(kept).masked_fill(moves[:, k] == 0, -torch.inf))
        best, k = torch.stack(without, 1).max(1)
        spared = (best > 0)[:, None] & torch.nn.functional.one_hot(k, moves.shape[1]).bool()
        if not spared.any():
            break
        moves = moves.masked_fill(spared, 0)
    return moves


def reference(
    head: Head, activations: Tensor, typical: Tensor, alt: Tensor, cfg: Config | None = None
) -> FaultLine:  # fmt: skip
    """The smallest set by trying all of them; of several that with the largest lead, of equal ones the later."""
    a, t = activations.double(), typical.double()
    moves, size = torch.zeros_like(a), [a.shape[1] + 1] * len(a)
    best = [ahead_of(row, int(c)) for row, c in zip(head(a).tolist(), alt, strict=True)]
    for tried in sorted(
        product((0, -1, 1), repeat=a.shape[1]), key=lambda m: (sum(map(abs, m)), [*map(abs, m)])
    ):
        columns = [
            {0: x, -1: 0 * x, 1: torch.maximum(x, y)}[s] for s, x, y in zip(tried, a.T, t.T, strict=True)
        ]
        count = sum(map(abs, tried))
        for b, row in enumerate(head(torch.stack(columns, 1)).tolist()):
            ahead = ahead_of(row, int(alt[b]))
            if ahead > 0 and (count < size[b] or (count == size[b] and ahead > best[b])):
                size[b], best[b], moves[b] = count, ahead, torch.tensor(tried, dtype=torch.float64)
    return FaultLine(moves, torch.tensor(best, dtype=torch.float64))


def ahead_of(logits: list[float], alt: int) -> float:
    """The logit of class alt over the largest other one, for one row."""
    return logits[alt] - max(logit for c, logit in enumerate(logits) if c != alt)


def cases(seed: int) -> Iterable[tuple]:
    """Leads that are linear, or grow with what is: one concept, ties in whole numbers, rows that nothing changes."""
    g = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=g, dtype=torch.float64)

    for batch, concepts, curved in ((1, 1, False), (6, 3, False), (4, 4, True), (8, 5, False)):
        weights, alt = 2 * random(concepts, 2) - 1, torch.randint(2, (batch,), generator=g)

        def head(x: Tensor, weights: Tensor = weights, curved: bool = curved) -> Tensor:
            z = x @ weights
            ahead = z[:, 1] - z[:, 0]
            return torch.stack([torch.zeros_like(ahead), ahead + ahead**3 if curved else ahead], 1)

        yield head, random(batch, concepts), random(batch, concepts), alt
    alt = torch.tensor([0, 2, 3])
    gains = torch.tensor([[1.0, 2.0, 2.0, 1.0]] * 3, dtype=torch.float64)
    behind = torch.tensor([1.5, 2.5, 9.0], dtype=torch.float64)
    others = torch.nn.functional.one_hot(alt, 4).to(torch.float64)

    def four(x: Tensor) -> Tensor:
        return others * ((x * gains).sum(1) - behind)[:, None]

    yield four, torch.zeros(3, 4, dtype=torch.float64), torch.ones(3, 4, dtype=torch.float64), alt


METHOD = TracingPage(
    config=Config,
    measure=measure,
    reference=reference,
    cases=cases,
    card=Card(
        title="CX-ToM fault-lines",
        paper="CX-ToM: Counterfactual Explanations with Theory-of-Mind for Enhancing Human Trust in Image "
        "Recognition Models",
        year=2021,
        idea="the fewest concepts to delete or add so that a network takes an image for another class",
        cost="path · steps gradients of the head, and up to K² forwards of it",
        needs=("activations of concepts", "the rest of the network as a function of them"),
        lineage=("contrastive explanations",),
        caveat="the dialogue and the model of a user's beliefs are not here: their results are of studies with people. "
        "The search is for any class ahead of all others; concepts are the caller's (the claim: NMF). The released "
        "code of the sibling CoCoX has concept vectors and their directional derivatives, and no search for a "
        "fault-line; of the paper, its abstract was read. The squared hinge, the bounds, the path of weights, one "
        "weight for both kinds of move and the last pruning are ours. A curved lead need not give the smallest set",
    ),
)
