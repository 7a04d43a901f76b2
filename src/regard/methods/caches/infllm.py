"""InfLLM: the far text lies in blocks, each known by a few representative tokens; a step reads the best of them.

    r_m = Σ_{i=1..l} q_{m+i} · k_m                     what token m was asked by the l local queries after it
    R_b = the tokens of block b with the largest r     by query head
    s_b = Σ_h Σ_i Σ_{m in R_b} q_i · k_m               over the queries i of the step and all heads
    read the first tokens, the best blocks by s, and all from the last block on that lies before the local window

where a token that the text around it needed tells what its block is about, and blocks are read as wholes, so that
nothing of a passage is missing. A layer's heads read the same blocks. Mistral-7B reads 16 blocks of 128 tokens and
4096 local ones.

>>> split(6399, Config()), split(640, Config(block=16))
((128, 4096), (18, 583))
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.core import Card, require
from regard.kinds.cache import CachePage
from regard.ops import (
    Budget,
    View,
    at_least_float32,
    gather_rows,
    per_query_head,
    scores,
    slots_of,
    top_slots,
)
from regard.ops.labels import labels, report_reading
from regard.ops.paged import block_slots, by_block, oldest


@dataclass(frozen=True)
class Config:
    # all that is read, in the proportions below; None: as they are. One that has no room for a block reads none
    budget: Budget | int | float | str | None = None
    init: int = 128  # first tokens
    local: int = 4096  # l, latest tokens, all read; so many queries after a token tell what it was asked
    block: int = 128  # tokens of a block
    blocks: int = 16  # that are read
    representatives: int = 4  # tokens that stand for a block

    def __post_init__(self) -> None:
        enough = min(self.init, self.local - 1, self.block - 1, self.blocks - 1, self.representatives - 1)
        require(enough >= 0, "init >= 0, all others >= 1", cfg=self)


def total(cfg: Config) -> int:
    """Tokens that are read at most; of the block that the local window reaches into, all."""
    return cfg.init + cfg.local + (cfg.blocks + 1) * cfg.block - 1


def split(budget: int, cfg: Config) -> tuple[int, int]:
    """(first, local) tokens of a budget; the rest is for blocks."""
    return round(budget * cfg.init / total(cfg)), max(1, round(budget * cfg.local / total(cfg)))


def asked(view: View, cfg: Config) -> Tensor:
    """[B, H, n] r of every stored token, from the queries so far."""
    blank = lambda k: at_least_float32(k.new_zeros(len(k), view.q.shape[1], k.shape[2], 1))  # noqa: E731
    r, place = labels(view, blank)[..., 0], view.rank()[:, :1]
    late = (place >= (view.length() - view.fresh() - cfg.local)[:, None, None]).flatten(0, 1).any(0)
    first = int(late.to(torch.uint8).argmax())
    r[:, :, first:] += answers(view, place[..., first:], cfg.local, first)
    return r


@torch.no_grad()
def answers(view: View, place: Tensor, local: int, first: int) -> Tensor:
    """[B, H, m] Σ q_i · k_j over this step's queries i that follow token j, `local` at most; slots from `first` on."""
    q, k, asks = at_least_float32(view.q), at_least_float32(view.k[:, :, first:]), view.asking()
    at = torch.arange(view.seen - view.new, view.seen, device=q.device)[None]
    at = at if view.order is None else view.order[:, -view.new :].contiguous()
    q = q if asks is None else q * asks[:, None, :, None]
    if view.new == 1:
        near = (place < at[:, None]) & (place >= at[:, None] - local)
        return scores(q, k, 1.0)[:, :, 0] * near
    # sums of queries from the first of the step on, of which each token takes a difference
    sums = F.pad(q.cumsum(2), (0, 0, 1, 0))
    start, stop = (torch.searchsorted(at, (place + n)[:, 0].contiguous(), right=True) for n in (0, local))
    following = gather_rows(sums, stop[:, None]) - gather_rows(sums, start[:, None])
    return (following * per_query_head(k, q.shape[1])).sum(-1)


def keys(view: View, cfg: Config, r: Tensor, slots: Tensor) -> Tensor:
    """[B, H, p, D] sum of the representatives' keys, of blocks of slots [b, 1, p · block]."""
    batch, heads = r.shape[:2]
    slots = slots.expand(batch, heads, -1)
    r = r.gather(-1, slots.clamp(min=0)).masked_fill(slots < 0, -torch.inf).unflatten(-1, (-1, cfg.block))
    best = r.topk(min(cfg.representatives, cfg.block), dim=-1)
    chosen = slots.unflatten(-1, (-1, cfg.block)).gather(-1, best.indices)  # [B, H, p, r]
    k = at_least_float32(gather_rows(view.k, chosen.flatten(2))).unflatten(2, chosen.shape[2:])
    return k.masked_fill((chosen < 0)[..., None], 0).sum(3)


def select(view: View, cfg: Config) -> Tensor | None:
    rows = view.budget if view.order is not None else view.budget[:1]
    init, local = view.budget.new_tensor([split(b, cfg) for b in rows.tolist()]).unbind(-1)  # [1|B]
    r = asked(view, cfg)
    table, gone = by_block(view, cfg.block, partial(keys, view, cfg, r), init, cfg.local)
    fresh, length, hold = view.fresh(), view.length(), view.hold()[:, :1]
    whole = (rows + fresh - 1 >= hold.sum(-1)[:, 0]) | (fresh == 0)
    if bool(whole.all()) or (view.phase == "prefill" and view.tokens_fed == view.seen):
        return None
    # blocks that lie before the windows of all queries of this step
    far = ((length - fresh - local + 1 - init) // cfg.block).clamp(min=0)
    room = rows + fresh - 1 - init
    start = torch.maximum(init + far * cfg.block, length - room).masked_fill(whole, 0)
    count = ((room - length + start) // cfg.block).clamp(min=0).masked_fill(whole, 0)
    near = slots_of(
        hold & ((view.rank()[:, :1] < init[:, None, None]) | (view.rank()[:, :1] >= start[:, None, None]))
    )
    s = relevance(view, table, gone, far, (oldest(view) - init) // cfg.block)
    blocks = top_slots(s, count.expand(len(s))[:, None])  # [B, 1, m]
    slots = block_slots(view, torch.where(blocks < 0, -1, blocks + gone), cfg.block, init)
    slots = torch.cat([near.expand(len(slots), -1, -1), slots], -1)
    report_reading(view, slots, table)
    return slots


def relevance(view: View, table: Tensor, gone: int, far: Tensor, first: Tensor) -> Tensor:
    """[B, 1, P] s of the blocks from number `first` [1|B] up to `far`, by all heads and queries of the step."""
    q, asks = at_least_float32(view.q), view.asking()
    q = q.sum(2) if asks is None else (q * asks[:, None, :, None]).sum(2)
    s = torch.einsum("bhd,bhpd->bp", q, table)
    number = gone + torch.arange(s.shape[-1], device=s.device)
    return s.masked_fill((number >= far[:, None]) | (number < first[:, None]), -torch.inf)[:, None]


METHOD = CachePage(
    config=Config,
    select=select,
    budget=total,
    patterns=("causal_self",),
    test_settings=({"budget": 12, "init": 1, "local": 3, "block": 2, "blocks": 3, "representatives": 1},),
    card=Card(
        title="InfLLM",
        paper="InfLLM: Training-Free Long-Context Extrapolation for LLMs with an Efficient Context Memory "
        "(NeurIPS 2024, arXiv:2402.04617)",
        year=2024,
        idea="far text is kept in blocks that a few tokens stand for; a step reads the blocks whose tokens it asks for",
        cost="N/block keys per query head to choose, then init + local + blocks · block rows",
        state="the whole cache, a number per token and a key per block, by query head; memory does not shrink",
        needs=("qkv", "decoder-lm"),
        lineage=("streaming_llm",),
        neutral={"budget": 1.0},
        caveat="a prompt fed in one piece is attended in full; of later chunks each chooses as one. Positions stay "
        "those of the text, in scores of blocks too: released code gives all far tokens one distance, so that a model "
        "reads beyond its trained length. It sums attention weights where the paper, and r here, sum products, and "
        "chooses in pieces of 512 queries",
    ),
)
