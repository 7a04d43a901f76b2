"""DuoAttention: retrieval heads hold all, streaming heads a few first and the most recent tokens.

    retrieval heads   the best share of the KV heads by how they look back: the full cache
    streaming heads   s sinks and the last w tokens, w rolling on with every step

where most heads of a language model look at the beginning and nearby and lose little by holding no more, while a few
find what was said far back. Which is which belongs to the model, not to the text. A budget is an average over all
heads: as many retrieval heads as it pays for, and the rest of it for the streaming heads.

>>> parts(Config(budget=0.25), budget=256, real=1024, total=12)   # 3 heads' worth: 2 whole, 102 tokens for each other
(2, 102)
"""

from dataclasses import dataclass

from torch import Tensor

from regard.core import Card, require
from regard.kinds.cache import CachePage
from regard.ops import Budget, Kept, View, slots_of


@dataclass(frozen=True)
class Config:
    # (layer, KV head), best first; None: measured when attached
    heads: tuple[tuple[int, int], ...] | None = None
    # mean tokens per head; None: retrieval heads all, streaming heads sinks + window
    budget: Budget | int | float | str | None = None
    sinks: int = 64  # s, first tokens that a streaming head holds
    # w, last tokens of a streaming head; with a budget, what it leaves them beside the sinks
    window: int = 256
    retrieval: float = 0.5  # share of KV heads that hold all

    def __post_init__(self) -> None:
        require(0 <= self.retrieval <= 1, "0 <= retrieval <= 1", retrieval=self.retrieval)
        require(self.sinks >= 0 and self.window >= 1, "sinks >= 0, window >= 1", sinks=self.sinks)


def parts(cfg: Config, budget: int, real: int, total: int) -> tuple[int, int]:
    """(heads that hold all, tokens of each other head) of `total` KV heads in the model."""
    whole = round(cfg.retrieval * total)
    if cfg.budget is None:
        return whole, cfg.sinks + cfg.window
    paid, spare = budget * total, max(1, min(budget, cfg.sinks + 1))  # what a streaming head has at least
    if real > spare:
        whole = min(whole, (paid - spare * total) // (real - spare))
    return whole, (paid - whole * real) // max(1, total - whole)


def streaming(view: View, cfg: Config) -> tuple[Tensor, Tensor]:
    """(which heads of this view stream [1|B, G, 1], tokens [B, 1, 1] that each of them may hold)."""
    real = view.length().expand(len(view.budget))
    real = real if view.window is None else real.clamp(max=view.window)
    rows = zip(view.budget.tolist(), real.tolist(), strict=True)
    found = [parts(cfg, budget, length, view.total_heads) for budget, length in rows]
    whole, tokens = view.budget.new_tensor(found).unbind(-1)
    # heads that this model does not have take no place
    there = [h for h in cfg.heads or () if h[0] < view.layers and h[1] < view.total_heads // view.layers]
    place = {head: i for i, head in enumerate(there)}
    own = view.budget.new_tensor([place.get((view.layer, g), view.total_heads) for g in view.heads])
    return (own >= whole[:, None])[..., None], tokens[:, None, None]


def keep(view: View, cfg: Config) -> Kept | None:
    """Heads of one layer part here, once; afterwards those that hold equally many decide together."""
    hold, (streams, tokens) = view.hold(), streaming(view, cfg)
    full = streams & (hold.sum(-1, keepdim=True) > tokens)
    if not bool(full.any()):
        return None
    sinks = (tokens - 1).clamp(max=cfg.sinks)
    near = (view.rank() < sinks) | (view.age() < tokens - sinks)
    return Kept(slots_of(hold & (near | ~full)))


TEST_HEADS = tuple((layer, head) for head in range(4) for layer in (1, 0, 2))

METHOD = CachePage(
    config=Config,
    keep=keep,
    calibrate="induction",
    budget=lambda cfg: 1.0,
    patterns=("causal_self",),
    test_settings=({"budget": 8, "sinks": 1, "window": 3, "heads": TEST_HEADS},),
    card=Card(
        title="DuoAttention",
        paper="DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads (ICLR 2025)",
        year=2024,
        idea="heads that retrieve hold all, all others sinks and a rolling window",
        cost="N keys in half of the heads, sinks + window in the others",
        state="the same, freed for real: heads of one layer are stored at different lengths",
        needs=("decoder-lm", "head scores"),
        lineage=("streaming_llm", "razor_attention"),
        neutral={"retrieval": 1.0},
        caveat="the paper learns a gate for each KV head on texts with hidden passkeys, and takes the best by a "
        "quantile; here heads are ranked by induction scores on random tokens that repeat, or given, best first, for "
        "example by the gates that it has published. Its streaming heads see sinks and window within the prompt too; "
        "here the prompt is read whole. kvpress masks what goes and does not free it",
    ),
)
