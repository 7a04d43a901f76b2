"""RazorAttention: heads that retrieve keep everything, all others a short window and one token for what was dropped.

    retrieval heads   the best by induction and echo score, by KV head: the full cache
    other heads       s sinks, the last max(w, N/5) tokens, and one compensation token
    k̂ = mean of dropped k,  v̂ = mean of dropped v,  entering the softmax as  N_d exp(q·k̂) v̂

where only few heads look far back, and those show it on random repeated tokens. With identical dropped tokens the
compensation is exact: N_d equal terms are one term times N_d. A budget is an average over all heads: as many
retrieval heads as it pays for, the rest shared by the others.

>>> share(Config(budget=0.25), budget=256, real=1024, total=12)   # 3 heads' worth: 2 full, 1 over 10 heads
(2, 102)
"""

from dataclasses import dataclass

from torch import Tensor

from regard.core import Card, require
from regard.kinds.cache import CachePage
from regard.ops import Budget, Kept, View, at_least_float32, slots_of

SPARE = 16  # a cut goes at most so far below the share


@dataclass(frozen=True)
class Config:
    # (layer, KV head), best first; None: measured when attached
    heads: tuple[tuple[int, int], ...] | None = None
    budget: Budget | int | float | str | None = None  # mean tokens per head; None: the paper's rule
    sinks: int = 4  # s, first tokens that every head holds
    # w, last tokens that other heads hold, or N/5 where that is more; with a budget, what it leaves them
    window: int = 4000
    retrieval: float = 0.15  # share of KV heads that keep everything
    compensate: bool = True  # whether one token, the mean of those dropped, stands in their place

    def __post_init__(self) -> None:
        require(0 <= self.retrieval <= 1, "0 <= retrieval <= 1", retrieval=self.retrieval)
        require(
            self.sinks >= 0 and self.window >= 1,
            "sinks >= 0, window >= 1",
            sinks=self.sinks,
            window=self.window,
        )


def share(cfg: Config, budget: int, real: int, total: int) -> tuple[int, int]:
    """(heads with the full cache, tokens in each of the others) of `total` KV heads in the model."""
    full = round(cfg.retrieval * total)
    if cfg.budget is None:
        return full, cfg.sinks + max(cfg.window, real // 5) + cfg.compensate
    full = min(full, budget * total // real)
    rest = (budget * total - full * real) // max(1, total - full)
    return full, max(rest, cfg.sinks + 1 + cfg.compensate)


def cuts(view: View, cfg: Config) -> tuple[Tensor, Tensor]:
    """(heads that are cut [1|B, G, 1], tokens that each of them may hold [1|B])."""
    real = view.length().expand(len(view.budget))
    real = real if view.window is None else real.clamp(max=view.window)
    shares = [share(cfg, b, r, view.total_heads) for b, r in zip(view.budget.tolist(), real.tolist())]
    full, tokens = view.budget.new_tensor(shares).unbind(-1)
    # heads that this model does not have take no rank
    there = (h for h in cfg.heads or () if h[0] < view.layers and h[1] < view.total_heads // view.layers)
    ranks = {head: i for i, head in enumerate(there)}
    rank = view.budget.new_tensor([ranks.get((view.layer, h), view.total_heads) for h in view.heads])
    return ((rank >= full[:, None]) & (tokens < real)[:, None])[..., None], tokens


def keep(view: View, cfg: Config) -> Kept | None:
    """Heads of one layer (or of one group of it) part here, once; afterwards each group decides alone.

    A head that is over its share is cut a few tokens below it, so that not every step has to cut again.
    """
    held, (razed, tokens) = view.hold(), cuts(view, cfg)
    crowded = razed & (held.sum(-1) > tokens[:, None])[..., None]
    if not bool(crowded.any()):
        return None
    window = tokens - cfg.sinks - int(cfg.compensate)
    window = (window - (window // 8).clamp(max=SPARE))[:, None, None]
    recent = (view.age() < window) | (view.rank() < cfg.sinks)
    if view.count is not None:
        recent = recent & (view.count <= 1)
    stays = held & (recent | ~crowded)
    return Kept(slots_of(stays), compensation(view, held & ~stays) if cfg.compensate else None)


def compensation(view: View, gone: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(k̂ [B, G, 1, D], v̂ [B, G, 1, E], N_d [B, G, 1]): means of what goes, earlier compensation by its weight."""
    weight = gone.expand(*view.k.shape[:3]).to(at_least_float32(view.k).dtype)
    weight = weight if view.count is None else weight * view.count
    count = weight.sum(-1, keepdim=True)  # [B, G, 1]
    mean = [
        (weight[:, :, None] @ at_least_float32(x)) / count.clamp(min=1)[..., None] for x in (view.k, view.v)
    ]
    return mean[0], mean[1], count


TEST_HEADS = tuple((layer, head) for head in range(4) for layer in (1, 0, 2))

METHOD = CachePage(
    config=Config,
    keep=keep,
    calibrate="induction",
    budget=lambda cfg: 1.0,
    patterns=("causal_self",),
    test_settings=({"budget": 8, "sinks": 1, "window": 3, "heads": TEST_HEADS},),
    card=Card(
        title="RazorAttention",
        paper="RazorAttention: Efficient KV Cache Compression Through Retrieval Heads",
        year=2024,
        idea="full cache for retrieval heads only; the rest keep sinks, a window and one weighted mean token",
        cost="N keys in 15 % of the heads, sinks + window + 1 in the others",
        state="the same, freed for real: heads of one layer are stored at different lengths",
        needs=("decoder-lm", "head scores"),
        lineage=("streaming_llm", "retrieval_heads"),
        neutral={"retrieval": 1.0},
        caveat="no official code was seen; the percentages (14 % induction, 1 % echo) are merged into one share, and "
        "heads are chosen by KV group. ALiBi models, which the paper scores analytically, are not reached",
    ),
)
