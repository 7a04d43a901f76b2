"""DyVTE: after each layer a small router reads the text, and once it says so no later layer sees an image token.

    f_l = [mean of the question's states ; state of the last token]      after layer l, the mean without the last token
    r_l = W2 gelu(W1 f_l)                                                 W1 [hidden, 2d], W2 [2, hidden], no biases
    all visual tokens leave after the first layer with r_l[1] > r_l[0]

Routers learn from answers without the image tokens of later layers: the label is 1 where nearly all answer tokens are
those of the whole model and the loss is below 1.03 of its (`label`, `trained`). `exit` forces a layer instead.

>>> import torch
>>> states = torch.tensor([[9.0, 9.0], [1.0, 0.0], [3.0, 2.0], [0.0, 4.0]])  # an image token, three of the question
>>> router = Router(torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]]), torch.eye(2))  # f = [2, 1, 0, 4]
>>> found = measure(states, torch.tensor([False, True, True, True]), router)  # gelu(2), gelu(4)
>>> [round(x, 4) for x in found.logits.tolist()], found.leaves
([1.9545, 3.9999], True)
>>> label(torch.tensor([1.0, 1.0, 0.5]), torch.tensor([1.02, 1.04, 0.1]), torch.ones(3))
tensor([1, 0, 0])
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, gelu

from regard.core import Card, require
from regard.kinds.tokens import TokensPage
from regard.ops.images import LayerView


@dataclass(frozen=True, eq=False)
class Router:
    inner: Tensor  # W1 [hidden, 2d]
    outer: Tensor  # W2 [2, hidden]

    def __call__(self, pair: Tensor) -> Tensor:
        """[..., 2] of [..., 2d]."""
        inner, outer = (w.to(pair) for w in (self.inner, self.outer))
        return gelu(pair @ inner.mT) @ outer.mT


@dataclass(frozen=True)
class Config:
    routers: tuple[Router | None, ...] | str | None = (
        None  # one a layer, None where none; or a file (`write`)
    )
    exit: int | None = None  # layer after which all leave, whatever routers say

    def __post_init__(self) -> None:
        require(self.exit is None or self.exit >= 0, "exit is a layer", exit=self.exit)


@dataclass(frozen=True)
class Decision:
    logits: Tensor  # [2]: stay, leave
    leaves: bool


def pair_of(states: Tensor, question: Tensor) -> Tensor:
    """[2d] of states [N, d] and which of them are the question's, [N] bool; one token is its own mean."""
    wide = states if states.dtype == torch.float64 else states.float()
    asked = wide[question][:-1]
    return torch.cat([asked.mean(0) if len(asked) else wide[-1], wide[-1]])


def measure(states: Tensor, question: Tensor, router: Router) -> Decision:
    logits = router(pair_of(states, question))
    return Decision(logits, bool(logits[1] > logits[0]))


def after(view: LayerView, cfg: Config) -> Tensor | None:
    if cfg.exit is not None:
        return view.alive[:0] if view.layer == cfg.exit else None
    routers = read(cfg.routers) if isinstance(cfg.routers, str) else cfg.routers
    require(routers is not None, "DyVTE decides by trained routers, or is given exit=", routers=routers)
    assert routers is not None
    require(len(routers) <= view.layers, "a router for each layer", routers=len(routers), layers=view.layers)
    router = routers[view.layer] if view.layer < len(routers) else None
    if router is None or not len(view.alive):
        return None
    return view.alive[:0] if measure(view.states, view.question, router).leaves else None


def label(same: Tensor, without: Tensor, whole: Tensor) -> Tensor:
    """[n] 1: they may leave. same: share of answer tokens alike; losses without image tokens and of the whole model."""
    return ((same > 0.99) & (without < 1.03 * whole)).long()


def trained(
    pairs: Tensor, labels: Tensor, *, hidden: int = 2048, epochs: int = 1, rate: float = 6e-5, batch: int = 128,
    seed: int = 0,
) -> Router:  # fmt: skip
    """A layer's router after `epochs` over pairs [n, 2d] and labels [n]: AdamW, its rate down a cosine."""
    g, pairs = torch.Generator().manual_seed(seed), pairs.detach().float()
    bound, n = pairs.shape[1] ** -0.5, len(pairs)
    inner = ((2 * torch.rand(hidden, pairs.shape[1], generator=g) - 1) * bound).requires_grad_()
    outer = ((2 * torch.rand(2, hidden, generator=g) - 1) * hidden**-0.5).requires_grad_()
    optimizer = torch.optim.AdamW([inner, outer], rate, weight_decay=0.0)
    steps = epochs * math.ceil(n / batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for rows in torch.randperm(n, generator=g).split(batch):
            optimizer.zero_grad()
            cross_entropy(Router(inner, outer)(pairs[rows]), labels[rows]).backward()
            optimizer.step()
            schedule.step()
    return Router(inner.detach(), outer.detach())


def write(routers: tuple[Router | None, ...], path: str) -> None:
    torch.save([None if r is None else (r.inner, r.outer) for r in routers], path)


@cache
def read(path: str) -> tuple[Router | None, ...]:
    return tuple(None if r is None else Router(*r) for r in torch.load(path, weights_only=True))


def reference(states: Tensor, question: Tensor, router: Router) -> Decision:
    """By the definition: means, products and the error function number by number."""
    rows, asked = states.double().tolist(), [i for i, q in enumerate(question.tolist()) if q][:-1]
    means = [
        math.fsum(rows[i][c] for i in asked) / len(asked) if asked else x for c, x in enumerate(rows[-1])
    ]
    bent = []
    for line in router.inner.double().tolist():
        x = math.fsum(w * v for w, v in zip(line, means + rows[-1], strict=True))
        bent.append(x * (1 + math.erf(x / math.sqrt(2))) / 2)
    stay, leave = (
        math.fsum(w * v for w, v in zip(line, bent, strict=True)) for line in router.outer.tolist()
    )
    return Decision(torch.tensor([stay, leave], dtype=torch.float64), leave > stay)


def cases(seed: int) -> Iterable[tuple]:
    """A question of many tokens, of two, of one, of none; routers that say each; a tie, where they stay; float32."""
    g = torch.Generator().manual_seed(seed)

    def drawn(n: int, asked: int, d: int, dtype: torch.dtype = torch.float64) -> list:
        states, inner = (torch.randn(*s, generator=g, dtype=dtype) for s in ((n, d), (7, 2 * d)))
        return [
            states,
            torch.arange(n) >= n - asked,
            Router(inner, torch.randn(2, 7, generator=g, dtype=dtype)),
        ]

    yield tuple(drawn(9, 4, 5))
    yield tuple(drawn(6, 2, 3))
    yield tuple(drawn(5, 1, 4))
    yield tuple(drawn(3, 0, 2))
    yield tuple(drawn(12, 6, 8, torch.float32))
    states, question, router = drawn(8, 3, 4)
    yield states, question, Router(router.inner, router.outer.flip(0))
    yield states, question, Router(router.inner, router.outer[[0, 0]])


METHOD = TokensPage(
    config=Config,
    after=after,
    measure=measure,
    reference=reference,
    cases=cases,
    test_settings=({"exit": 0},),
    standard=False,
    card=Card(
        title="DyVTE",
        paper="Accelerating Multimodal Large Language Models via Dynamic Visual-Token Exit and the Empirical Findings",
        year=2024,
        idea="a router on the text's states says after which layer the image has been read, and it leaves",
        cost="a product of 2d · hidden a layer until the exit, once a prompt; later layers hold no image token",
        needs=("vlm", "trained routers"),
        lineage=("early exit",),
        neutral={"routers": (), "exit": None},
        caveat="routers are trained for one model: without them, and without a forced exit, the page refuses. The "
        "released code finds image and question at fixed offsets (35 and 576 tokens) of one text; its mean leaves the "
        "question's last token out, as here; its routers declare a dropout of 0.1 and do not use it. Rate 6e-5, one "
        "epoch and 2048 hidden units are its, for 1 % of LLaVA's instructions; a small model needs more steps",
    ),
)
