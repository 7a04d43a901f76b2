"""TokenSelect: all heads vote together for the tokens that this step reads.

    read {first n_init} ∪ {last n_local} ∪ top-k_j  Σ_h softmax_j(q_h · k_j)      over the tokens in between

where the softmax inside each head's vote keeps a head with large raw scores from deciding alone, and one shared
set lets whole rows be gathered. While the query stays similar, cos(q_t, q_s) ≥ reuse, the set of step s is read
again and no scores are computed (the paper's Selection Cache); a rotated q_s is first carried to today's position,
since its rotation alone is no change of the query. A chunk of a prompt selects by its mean query.

>>> split(2688, Config())
(128, 512, 2048)
>>> split(100, Config())
(5, 19, 76)
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.core import Card, require
from regard.kinds.cache import CachePage
from regard.ops import Budget, View, slots_of, top_slots


@dataclass(frozen=True)
class Config:
    # init + local + k together, in their proportion; None: as they are
    budget: Budget | int | float | str | None = None
    init: int = 128
    local: int = 512
    k: int = 2048
    reuse: float | None = 0.9  # None: select at every step
    vote: str = "soft"  # or "raw": sum the scores of the heads as they are

    def __post_init__(self) -> None:
        require(
            self.local >= 1 and self.init >= 0 and self.k >= 1,
            "init >= 0, local >= 1, k >= 1",
            local=self.local,
        )
        require(self.vote in ("soft", "raw"), 'vote is "soft" or "raw"', vote=self.vote)


def split(budget: int, cfg: Config) -> tuple[int, int, int]:
    """(init, local, k) of a budget, in the proportions of the configuration."""
    whole = cfg.init + cfg.local + cfg.k
    init, local = round(budget * cfg.init / whole), max(1, round(budget * cfg.local / whole))
    return init, local, max(0, budget - init - local)


def votes(view: View, cfg: Config) -> Tensor:
    """[B, 1, n] votes of all query heads for every stored token, from the mean query of the step."""
    if view.new > 1:
        view = replace(view, q=view.q.mean(2, keepdim=True), visible=lambda rows: None)
    s = view.scores()[:, :, 0]
    s = s.masked_fill(~view.hold(), -torch.inf) if view.real is not None else s
    return (s.softmax(-1) if cfg.vote == "soft" else s).sum(1, keepdim=True)


def similar(view: View, cfg: Config) -> Tensor:
    """[B] bool: rows whose query is close to the one that chose last, rotated on to today's position in the text."""
    q, old = view.q[:, :, -1:], view.memory.get("query")  # [B, H, 1, D]
    if cfg.reuse is None or old is None or old.shape != q.shape:
        return torch.zeros(len(q), dtype=torch.bool, device=q.device)
    seen = view.memory["seen"]
    if view.rotate is not None:
        old = view.rotate(old, (view.seen - seen)[:, None, None])
    near = F.cosine_similarity(q.flatten(1).float(), old.flatten(1).float()) >= cfg.reuse
    return near & (seen >= 0)


def select(view: View, cfg: Config) -> Tensor | None:
    new, held = view.tokens, view.hold()
    if view.fits(new - 1) or (view.phase == "prefill" and new == view.seen):
        return None
    rows = view.budget if view.real is not None else view.budget[:1]
    shares = view.budget.new_tensor([split(b, cfg) for b in rows.tolist()])
    init, local, k = shares[:, None, None].unbind(-1)  # [1|B, 1, 1]
    ends = held & ((view.rank() < init) | (view.age() < local + new - 1))
    return torch.cat(
        [slots_of(ends).expand(len(view.q), -1, -1), middle(view, cfg, held & ~ends, k[..., 0])], -1
    )


def middle(view: View, cfg: Config, between: Tensor, k: Tensor) -> Tensor:
    """[B, 1, k] slots of those in `between` by vote; a row whose query hardly changed reads its last choice again."""
    memory = view.memory
    # [B] rows in which there is nothing to choose
    fits = view.budget + view.tokens - 1 >= view.hold().sum(-1).amax(-1)
    reuse = similar(view, cfg) & ~fits
    if bool(reuse.all()):
        return memory["middle"]
    chosen = top_slots(votes(view, cfg).masked_fill(~between, -torch.inf), k.expand(len(reuse), 1))
    seen = torch.full_like(reuse, view.seen, dtype=torch.long)
    new = {"middle": chosen, "query": view.q[:, :, -1:], "seen": seen}
    old = {name: memory.get(name, new[name]) for name in new}
    if "seen" not in memory:
        old["seen"] = torch.full_like(seen, -1)
    wide = max(old["middle"].shape[-1], chosen.shape[-1])
    for choice in (old, new):
        choice["middle"] = F.pad(choice["middle"], (0, wide - choice["middle"].shape[-1]), value=-1)
    memory.update({name: by_row(reuse | fits, old[name], new[name]) for name in new})
    return by_row(reuse, old["middle"], new["middle"])


def by_row(first: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """Rows of the batch from `one` where `first`, else from `other`."""
    return torch.where(first.view(-1, *[1] * (one.dim() - 1)), one, other)


METHOD = CachePage(
    config=Config,
    select=select,
    rotates=True,
    budget=lambda cfg: cfg.init + cfg.local + cfg.k,
    patterns=("causal_self",),
    card=Card(
        title="TokenSelect",
        paper="TokenSelect: Efficient Long-Context Inference and Length Extrapolation for LLMs via Dynamic "
        "Token-Level KV Cache Selection",
        year=2024,
        idea="a soft vote of all heads picks one shared set of tokens per step, reused while the query hardly changes",
        cost="reads all keys to vote, then init + local + k rows; with reuse only the latter",
        state="the whole cache; memory does not shrink",
        needs=("qkv", "decoder-lm"),
        neutral={"budget": 1.0},
        caveat="a prompt fed in one piece is attended in full; fed in chunks, each later chunk selects by its mean "
        "query. Positions stay those of the text; released kernels re-number the gathered set to extrapolate, rotate "
        "only q when voting, without 1/sqrt(D), and ship with the reuse switched off",
    ),
)
