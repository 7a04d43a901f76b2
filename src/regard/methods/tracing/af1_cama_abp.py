"""All-for-One: wait, let the last token look at all others in a few layers, and let it compute by itself.

    layers < wait              h_t ← E[h_t | token t],  over prompts that have the same token at t       (CAMA)
    wait ≤ layer < wait + T    the last token sees all; every other sees itself and the first            (ABP)
    wait + T ≤ layer           every token sees itself and the first                                     (ABP)

h_t is the residual after layer wait - 1: it keeps what is due to the token and its place, and nothing that a prompt
has put together. If the model still answers, all that depends on several tokens is computed at the last one, from
what T layers brought there. In Llama-3-8B about half the layers can wait and two transfer.

>>> import torch
>>> ids = torch.tensor([[0, 5, 9], [0, 5, 9], [0, 7, 9]])
>>> acts = torch.tensor([[[1.0], [2.0], [3.0]], [[1.0], [4.0], [6.0]], [[1.0], [9.0], [6.0]]])  # [P, N, width]
>>> measure(acts, ids, torch.tensor([[0, 5, 9]]))[0].flatten()  # BOS as it is; (2 + 4) / 2; (3 + 6 + 6) / 3
tensor([1., 3., 5.])
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.core import Card, Edit, Site, require
from regard.kinds.tracing import TracingPage


@dataclass(frozen=True)
class Config:
    wait: int = 15  # layers 0 to wait - 1 know single tokens only
    transfer: int = 2  # layers in which the last token sees all others

    def __post_init__(self) -> None:
        require(self.wait >= 0, "wait >= 0", wait=self.wait)
        require(self.transfer >= 0, "transfer >= 0", transfer=self.transfer)


def measure(acts: Tensor, ids: Tensor, given: Tensor, mask: Tensor | None = None) -> Tensor:
    """[B, N, width] the context-aware means of prompts `given` [B, N], from acts [P, N, width] of prompts ids [P, N].

    mask [P, N]: 0 at padding, which counts for no mean. Every token of `given` is seen at its place.
    """
    mask = torch.ones_like(ids) if mask is None else mask
    require(
        acts.shape[:2] == ids.shape == mask.shape and given.shape[1:] == ids.shape[1:],
        "activations, ids and mask of the same prompts, and prompts as long",
        shapes=[tuple(x.shape) for x in (acts, ids, mask, given)],
    )
    same = (given[:, None] == ids[None]) & mask.bool()[None]  # [B, P, N]
    count = same.sum(1)
    unseen = (count == 0).nonzero().tolist()
    require(not unseen, "each token was seen at its place", missing=unseen[:4])
    return torch.einsum("bpn,pnw->bnw", same.to(acts.dtype), acts) / count[..., None]


def cama(values: Tensor, cfg: Config, phase: str = "prefill") -> tuple[Edit, ...]:
    """What puts means [B, N, width] after the last waiting layer, at every token but the first; none where wait = 0."""
    if cfg.wait == 0:
        return ()
    rows = tuple(range(1, values.shape[1]))
    site = Site("resid_post", layers=cfg.wait - 1, rows=rows, phase=phase, tower="text")
    return (Edit(site, "replace", values[:, 1:]),)


def abp(tokens: int, layers: int, cfg: Config, phase: str = "prefill") -> tuple[Edit, ...]:
    """What hides all but themselves and the first from tokens, but from the last one while it takes over."""
    require(tokens >= 2, "a first and a last token", tokens=tokens)
    require(cfg.wait + cfg.transfer <= layers, "wait + transfer <= layers", cfg=cfg, layers=layers)
    found = []
    for row in range(2, tokens):  # token 1 has none between the first and itself
        begin = cfg.wait + (cfg.transfer if row == tokens - 1 else 0)
        if begin < layers:
            where: dict[str, Any] = dict(
                layers=tuple(range(begin, layers)), rows=row, keys=tuple(range(1, row))
            )
            found.append(Edit(Site("scores", **where, phase=phase, tower="text"), "block"))
    return tuple(found)


def reference(acts: Tensor, ids: Tensor, given: Tensor, mask: Tensor | None = None) -> Tensor:
    """A sum and a count for every (place, token), filled prompt by prompt."""
    sums: dict[tuple[int, int], list[float]] = {}
    counts: dict[tuple[int, int], int] = {}
    for p, row in enumerate(ids.tolist()):
        for t, token in enumerate(row):
            if mask is None or mask[p, t]:
                old = sums.get((t, token), [0.0] * acts.shape[-1])
                sums[t, token] = [a + b for a, b in zip(old, acts[p, t].tolist(), strict=True)]
                counts[t, token] = counts.get((t, token), 0) + 1
    rows = [
        [[x / counts[t, token] for x in sums[t, token]] for t, token in enumerate(row)]
        for row in given.tolist()
    ]
    return torch.tensor(rows, dtype=torch.float64)


def cases(seed: int) -> Iterable[tuple]:
    """Many tokens and few, a prompt alone, tokens that padding would change, the same token at several places."""
    g = torch.Generator().manual_seed(seed)
    for prompts, n, width, kinds in ((1, 1, 1, 1), (9, 4, 3, 2), (40, 7, 5, 4), (3, 5, 2, 9)):
        ids = torch.randint(kinds, (prompts, n), generator=g)
        acts = torch.randn(prompts, n, width, generator=g, dtype=torch.float64)
        yield acts, ids, ids.flip(0)
        mask = torch.ones_like(ids)
        mask[1:, : n // 2] = torch.rand(prompts - 1, n // 2, generator=g) > 0.5
        yield acts.float(), ids, ids[:1], mask


METHOD = TracingPage(
    config=Config,
    measure=measure,
    reference=reference,
    cases=cases,
    card=Card(
        title="All-for-One subgraph (CAMA and ABP)",
        paper="All for One: LLMs Solve Mental Math at the Last Token With Information Transferred From Other Tokens",
        year=2025,
        idea="replace early activations by their mean given the token, and let the last token see others in few layers",
        cost="a forward over the prompts that are averaged, then one for each window that is tried",
        needs=("decoder-lm", "prompts of one form", "scores"),
        lineage=("mean ablation", "attention knockout"),
        neutral={"wait": 0},
        caveat="the authors' demo replaces the last token too, by a mean over prompts of its operator, as here (its "
        "token is always the same; were only the others replaced, it could look at all of them while it waits). The "
        "demo keys op and b by the value of b, and leaves the first operand as it is; its waiting layers count from "
        "0 to 14. The code that averages was not found. Means are over prompts of the same length; padding counts for "
        "none, and the first token is left as it is",
    ),
)
