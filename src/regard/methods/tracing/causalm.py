"""CausaLM: what a concept does to a classifier, read off a copy of its encoder that has forgotten the concept.

    φ^C        φ trained on:   L_mlm + L_control + L_treated,   gradients of L_treated reversed where they enter φ^C
    TReATE     1/n Σ_i ‖f(φ(x_i)) - f^C(φ^C(x_i))‖₁                       n texts, no counterfactual among them
    ATE        1/n Σ_i ‖f(φ(x_i with C)) - f(φ(x_i without C))‖₁          pairs that differ in the concept alone
    CONEXP     ‖mean f(φ(x)) of texts with C - mean f(φ(x)) of texts without C‖₁

where f and f^C give class probabilities and f^C is fitted anew on φ^C. L_treated is the loss of a head that tells the
concept from the pooled text; reversed, it makes φ^C the encoder on which that head fails. L_control is the same for
concepts that go along with the treated one and must survive, without reversal. CONEXP is what correlation sees: it
counts a confounder's effect as the concept's, TReATE does not. Pairs exist for templates only; TReATE needs none.

Where the concept is there in a share π of the texts and moves a probability by Δ at equal other concepts, ATE is 2Δ for
two classes, but f^C answers the mean over both, so that a perfect φ^C gives TReATE = 2π(1-π)·ATE: half, at best.

>>> import torch
>>> told, forgot = torch.tensor([[0.9, 0.1], [0.4, 0.6]]), torch.tensor([[0.6, 0.4], [0.6, 0.4]])
>>> pairs = torch.tensor([[[0.9, 0.1], [0.7, 0.3]], [[0.8, 0.2], [0.4, 0.6]]])
>>> effects = measure(told, forgot, pairs, torch.tensor([True, False]))
>>> {name: round(x.item(), 4) for name, x in effects.items()}  # (.2 + .6) / 2, .5 + .5, (.6 + .4) / 2
{'ate': 0.4, 'conexp': 1.0, 'treate': 0.5}
>>> x = torch.ones(2, requires_grad=True)
>>> reverse(x, 0.5).sum().backward()
>>> x.grad
tensor([-0.5000, -0.5000])
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.core import Card, require
from regard.kinds.tracing import TracingPage


@dataclass(frozen=True)
class Config:
    reversal: float = 1.0  # what gradients of the treated concept's head are multiplied by, and turned round
    treated: float = 1.0  # weights of the losses
    control: float = 1.0  # weight of L_control; 0: nothing asks the other concepts to survive

    def __post_init__(self) -> None:
        least = min(self.reversal, self.treated, self.control)
        require(least >= 0, "reversal and weights are not negative", reversal=self.reversal, treated=self.treated,
                control=self.control)  # fmt: skip


class Reverse(torch.autograd.Function):
    """The identity, whose gradient comes back turned round and scaled."""

    @staticmethod
    def forward(x: Tensor, factor: float) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return -ctx.factor * grad, None


def reverse(x: Tensor, factor: float = 1.0) -> Tensor:
    """x [...] as it is; its gradient is -factor times what arrives: a head behind it learns, what it reads unlearns."""
    return Reverse.apply(x, factor)


def objective(mlm: Tensor, treated: Tensor, control: Tensor, cfg: Config) -> Tensor:
    """The loss of φ^C; `treated` is that of a head on reverse(states, cfg.reversal), `control` a sum over concepts."""
    return mlm + cfg.treated * treated + cfg.control * control


def measure(factual: Tensor, forgetful: Tensor, pairs: Tensor, concept: Tensor) -> dict[str, Tensor]:
    """{"ate", "conexp", "treate"} of class probabilities.

    factual [n, K] f(φ(x)); forgetful [n, K] f^C(φ^C(x)); pairs [2, m, K] f(φ(x)) with and without; concept [n] bool.
    """
    check(factual, forgetful, pairs, concept)
    there = concept.bool()
    gap = factual[there].mean(0) - factual[~there].mean(0)
    return {
        "ate": torch.linalg.vector_norm(pairs[0] - pairs[1], ord=1, dim=-1).mean(),
        "conexp": gap.abs().sum(),
        "treate": torch.linalg.vector_norm(factual - forgetful, ord=1, dim=-1).mean(),
    }


def check(factual: Tensor, forgetful: Tensor, pairs: Tensor, concept: Tensor) -> None:
    fits = factual.ndim == 2 and factual.shape == forgetful.shape and pairs.ndim == 3 and len(pairs) == 2
    require(fits and pairs.shape[2] == factual.shape[1] and concept.shape == factual.shape[:1],
            "factual and forgetful [n, K], pairs [2, m, K], concept [n]", factual=factual, forgetful=forgetful,
            pairs=pairs, concept=concept)  # fmt: skip
    for name, p in (("factual", factual), ("forgetful", forgetful), ("pairs", pairs)):
        require(bool((p >= 0).all() and ((p.sum(-1) - 1).abs() < 1e-3).all()),
                f"{name} are class probabilities: not negative, of sum one", sums=p.sum(-1).tolist())  # fmt: skip
    share = concept.double().mean().item()
    require(0 < share < 1, "texts with the concept and texts without it", share=share)


def reference(factual: Tensor, forgetful: Tensor, pairs: Tensor, concept: Tensor) -> dict[str, float]:
    """The three sums, number by number."""

    def distance(p: list[float], q: list[float]) -> float:
        return sum(abs(a - b) for a, b in zip(p, q, strict=True))

    def mean_of(rows: list[list[float]]) -> list[float]:
        return [sum(row[k] for row in rows) / len(rows) for k in range(len(rows[0]))]

    told, forgot, (present, absent) = (x.double().tolist() for x in (factual, forgetful, pairs))
    groups = [
        [row for row, c in zip(told, concept.tolist(), strict=True) if bool(c) is c_is]
        for c_is in (True, False)
    ]
    return {
        "ate": sum(distance(p, q) for p, q in zip(present, absent, strict=True)) / len(present),
        "conexp": distance(mean_of(groups[0]), mean_of(groups[1])),
        "treate": sum(distance(p, q) for p, q in zip(told, forgot, strict=True)) / len(told),
    }


def cases(seed: int) -> Iterable[tuple]:
    """Two texts and many, two classes and five, a rare concept, nothing forgotten and no effect, all turned round."""
    g = torch.Generator().manual_seed(seed)

    def chances(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).mul(2).softmax(-1)

    for n, m, classes in ((2, 1, 2), (9, 4, 3), (40, 25, 5)):
        concept = torch.randint(2, (n,), generator=g)
        concept[:2] = torch.tensor([1, 0])
        yield chances(n, classes), chances(n, classes), chances(2, m, classes), concept
    told, pairs = chances(6, 2), chances(2, 3, 2)
    rare = torch.arange(6) == seed
    yield told, told.clone(), torch.stack([pairs[0], pairs[0]]), rare  # nothing forgotten, no effect
    yield told, told.flip(1), torch.stack([pairs[0], pairs[0].flip(-1)]), rare
    yield chances(7, 4).float(), chances(7, 4).float(), chances(2, 3, 4).float(), torch.arange(7) % 2


METHOD = TracingPage(
    config=Config,
    measure=measure,
    reference=reference,
    cases=cases,
    card=Card(
        title="CausaLM",
        paper="CausaLM: Causal Model Explanation Through Counterfactual Language Models",
        year=2021,
        idea="an encoder trained on to lose one concept and keep its companions; how answers change is the effect",
        cost="further MLM training of the encoder with two heads, and a task head fitted anew",
        needs=("encoder",),
        lineage=("gradient reversal", "masked language modelling"),
        neutral={"reversal": 0.0, "control": 0.0},
        caveat="the paper's effects are norms and so have no sign. In the released code all losses weigh one and the "
        "reversal is one, heads are one linear layer on the last layer (pooled over tokens, or on the masked tokens "
        "for adjectives), gradients reach all layers, and the task head (attention pooling over a frozen encoder) is "
        "fitted afterwards; TReATE and CONEXP are not computed in it, and are here by the paper's definitions, TReATE "
        "as a mean of the texts' own norms. What is forgotten is what such a head can read, no more",
    ),
)
