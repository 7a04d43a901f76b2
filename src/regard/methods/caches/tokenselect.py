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
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.core import Card, require
from regard.kinds.cache import CachePage
from regard.ops import Budget, View, by_row, slots_of, top_slots


@dataclass(frozen=True)
class Config:
    # init + local + k together, in their proportion; None: as they are
    budget: Budget | int | float | str | None = None
    init: int = 128  # n_init, first tokens, always read
    local: int = 512  # n_local, last tokens, always read
    k: int = 2048  # tokens in between that the vote chooses, the same for all heads
    reuse: float | None = 0.9  # None: select at every step
    vote: Literal["soft", "raw"] = "soft"  # or "raw": sum the scores of the heads as they are

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


def votes(view: View, cfg: Config, between: Tensor) -> Tensor:
    """[B, 1, n] votes of all query heads, from the mean query of the step: each head has one for those in `between`.

    What a head gives to the first and the last tokens, which are read in any case, takes nothing from its vote.
    """
    if view.new > 1:
        view = replace(view, q=mean_query(view), visible=lambda rows: None, order=None)
    s = view.scores()[:, :, 0].masked_fill(~between, -torch.inf)
    voted = (s.softmax(-1) if cfg.vote == "soft" else s).sum(1, keepdim=True)
    return voted.masked_fill(~between, -torch.inf)


def mean_query(view: View) -> Tensor:
    """[B, H, 1, D] over the step's tokens that are not padding."""
    asking = view.asking()
    if asking is None:
        return view.q.mean(2, keepdim=True)
    share = asking / asking.sum(-1, keepdim=True).clamp(min=1)  # [B, N]
    return (share[:, None, None].to(view.q.dtype) @ view.q).to(view.q.dtype)


def newest_position(view: View) -> Tensor:
    """[B] where the newest token stands."""
    return view.position_at((view.length() - 1)[:, None])[:, 0].expand(len(view.q))


def similar(view: View, cfg: Config) -> Tensor:
    """[B] bool: rows whose query is close to the one that chose last, rotated on to today's position in the text."""
    q, old, at = view.newest_query(), view.memory.get("query"), view.memory.get("at")  # [B, H, 1, D]
    if cfg.reuse is None or old is None or at is None or old.shape != q.shape:
        return torch.zeros(len(q), dtype=torch.bool, device=q.device)
    if view.rotate is not None:
        old = view.rotate(old, (newest_position(view) - at)[:, None, None])
    near = F.cosine_similarity(q.flatten(1).float(), old.flatten(1).float()) >= cfg.reuse
    return near & view.memory["chose"]


def select(view: View, cfg: Config) -> Tensor | None:
    held, fits = view.hold(), fitting(view)
    if bool(fits.all()) or (view.phase == "prefill" and view.tokens_fed == view.seen):
        return None
    rows = view.budget if view.real is not None else view.budget[:1]
    shares = view.budget.new_tensor([split(b, cfg) for b in rows.tolist()])
    init, local, k = shares[:, None, None].unbind(-1)  # [1|B, 1, 1]
    recent = view.age() < local + view.fresh()[:, None, None] - 1
    ends = held & ((view.rank() < init) | recent)
    between = held & ~ends
    chosen = middle(view, cfg, between, k[..., 0], fits)
    # what was chosen before may be among the first tokens by now, where the budget grows with the text
    still = between.expand(len(chosen), 1, -1).gather(-1, chosen.clamp(min=0))
    chosen = chosen.masked_fill(~still, -1)
    return torch.cat([slots_of(ends).expand(len(view.q), -1, -1), chosen], -1)


def fitting(view: View) -> Tensor:
    """[B] rows in which there is nothing to choose: the budget covers what they hold, or nothing asks."""
    fresh = view.fresh()
    return (view.budget + fresh - 1 >= view.hold().sum(-1).amax(-1)) | (fresh == 0)


def middle(view: View, cfg: Config, between: Tensor, k: Tensor, fits: Tensor) -> Tensor:
    """[B, 1, k] slots of those in `between` by vote; a row whose query hardly changed reads its last choice again."""
    memory, reuse = view.memory, similar(view, cfg) & ~fits
    if bool(reuse.all()):
        return view.slots(memory["middle"])
    chosen = view.tokens(top_slots(votes(view, cfg, between), k.expand(len(reuse), 1)))
    new = {"middle": chosen, "query": view.newest_query(), "at": newest_position(view), "chose": ~fits}
    old = {name: memory.get(name, new[name]) for name in new}
    wide = max(old["middle"].shape[-1], chosen.shape[-1])
    for choice in (old, new):
        choice["middle"] = F.pad(choice["middle"], (0, wide - choice["middle"].shape[-1]), value=-1)
    memory.update({name: by_row(reuse | fits, old[name], new[name]) for name in new})
    return view.slots(by_row(reuse, old["middle"], new["middle"]))


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
        "only q when voting, without 1/sqrt(D), and ship with the reuse switched off. Their voting "
        "kernel pairs query head h with KV head h mod G, their attention with h // (H / G); here both are the latter",
    ),
)
