"""Distributed alignment search: the subspace of a site in which one text's answer can be swapped for another's.

    h' = h_base + V Vᵀ (h_source - h_base)       V [width, r], orthonormal, learned so that m(h') is the source's

    IIA = share of pairs whose answer is the source's after the interchange

A high IIA proves little alone: a network that cannot do the task may reach it with enough freedom, and a subspace may
work through directions that it otherwise leaves dormant. So `interchange` is measured on pairs that were not trained
on, beside a random subspace of the same width, one that was trained on shuffled answers, and the whole state.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from regard.core import Edit, Site, require
from regard.core.edit import HEADED
from regard.core.errors import present
from regard.explaining.batches import in_groups, texts_at_once
from regard.explaining.pairs import Pairs
from regard.explaining.runs import capture, forward, frozen
from regard.train.loop import fit


@dataclass(frozen=True)
class Subspace:
    """Orthonormal columns [width, r] at a site: quantity, layer, row, head of a quantity that has heads."""

    basis: Tensor
    quantity: str
    layer: int
    row: int
    head: int | None = None

    def edit(self, source: Tensor) -> Edit:
        """The interchange with a source [texts, width]."""
        site = Site(self.quantity, layers=self.layer, rows=self.row, heads=self.head, tower="text")
        value = source[:, None, None] if self.quantity in HEADED else source[:, None]
        return Edit(site, "project", self.basis, source=value)


@torch.no_grad()
def sources(model: PreTrainedModel, pairs: Pairs, at: Subspace) -> Tensor:
    """[pairs, width] what the clean prompts, the sources, have at the site."""
    _, values = capture(model, pairs.clean, [at.quantity], [at.layer])
    return values[at.quantity][at.layer][:, at.head or 0, at.row]


@torch.no_grad()
def interchange(model: PreTrainedModel, pairs: Pairs, at: Subspace, batch: int | None = None) -> float:
    """IIA: the share of corrupted prompts, the bases, that answer target rather than foil once they are swapped."""
    require(pairs.foil is not None, "an interchange asks target or foil")
    right = []
    for group in in_groups(len(pairs), texts_at_once(pairs, batch)):
        part = pairs.at(group).to(model.device)
        logits, _ = forward(model, part.corrupt, [at.edit(sources(model, part, at))])
        right.append(part.score(logits) > 0)
    return torch.cat(right).double().mean().item()


def fit_das(
    model: PreTrainedModel, pairs: Pairs, quantity: str, layer: int, row: int = -1, *, head: int | None = None,
    rank: int = 1, steps: int = 100, rate: float = 1e-2, batch: int = 16, seed: int = 0,
) -> Subspace:  # fmt: skip
    """The subspace of `rank` dimensions that gives corrupted prompts the clean prompts' answers, by Adam."""
    require(pairs.foil is not None, "an interchange asks target or foil")
    g = torch.Generator().manual_seed(seed)
    start = Subspace(torch.empty(0), quantity, layer, row, head)
    pairs = pairs.to(model.device)
    given = torch.cat([sources(model, pairs.at(c), start) for c in in_groups(len(pairs), batch)])
    require(1 <= rank <= given.shape[1], "a subspace of the site", rank=rank, width=given.shape[1])
    free = torch.randn(given.shape[1], rank, generator=g).to(given).requires_grad_()
    optimizer = torch.optim.Adam([free], rate)

    def loss_at(step: int) -> Tensor:
        chosen = torch.randint(len(pairs), (min(batch, len(pairs)),), generator=g).tolist()
        part, at = pairs.at(chosen), replace(start, basis=torch.linalg.qr(free)[0])
        logits, _ = forward(model, part.corrupt, [at.edit(given[chosen])])
        return torch.nn.functional.softplus(-part.score(logits)).mean()

    with torch.enable_grad(), frozen(model):
        fit(optimizer, loss_at, steps)
    return replace(start, basis=torch.linalg.qr(free.detach())[0])


def random_subspace(at: Subspace, seed: int = 0) -> Subspace:
    """One of the same width in a random direction."""
    g = torch.Generator().manual_seed(seed)
    return replace(at, basis=torch.linalg.qr(torch.randn(at.basis.shape, generator=g).to(at.basis))[0])


def shuffled(pairs: Pairs, seed: int = 0) -> Pairs:
    """Half of the pairs ask for the other answer, whatever their source: an interchange has nothing to learn."""
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed)).to(pairs.target.device)
    other, foil = order < len(pairs) // 2, present(pairs.foil, "an interchange asks target or foil")
    return replace(
        pairs, target=torch.where(other, foil, pairs.target), foil=torch.where(other, pairs.target, foil)
    )


def audited(
    model: PreTrainedModel, train: Pairs, test: Pairs, quantity: str, layer: int, **how: object
) -> dict[str, float]:
    """IIA on held-out pairs of a learned subspace and its placebos: {"das", "random", "whole", "shuffled"}.

    "shuffled" is trained on answers that nothing decides, and asked for such: about a half, or the test is too small.
    """
    learned = fit_das(model, train, quantity, layer, **how)  # type: ignore[arg-type]
    placebo = fit_das(model, shuffled(train), quantity, layer, **how)  # type: ignore[arg-type]
    whole = replace(learned, basis=torch.eye(len(learned.basis)).to(learned.basis))
    sides = {"das": learned, "random": random_subspace(learned), "whole": whole}
    found = {name: interchange(model, test, at) for name, at in sides.items()}
    return {**found, "shuffled": interchange(model, shuffled(test, seed=1), placebo)}
