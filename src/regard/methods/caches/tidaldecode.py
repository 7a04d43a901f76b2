"""TidalDecode: one layer finds the keys that matter, the layers above read only those.

    layers 0 … f-1      full attention
    selecting layers    full attention; I_h = top-k_j (q_h · k_j), by query head, all over again
    every other layer   softmax attention over I_h alone

where the positions that one token attends to hardly change from layer to layer (Yang et al., 2024), so one search
serves many layers. The search is repeated for every generated token; a second selecting layer corrects the drift.
"""

from dataclasses import dataclass

from torch import Tensor

from regard.core import Card, require
from regard.kinds.cache import CachePage
from regard.ops import Budget, View, top_slots


@dataclass(frozen=True)
class Config:
    budget: Budget | int | float | str | None = None  # keys per head that sparse layers read; None: k
    k: int = 256  # keys per query head that sparse layers read
    full: int = 2  # layers before the first selecting one
    select: tuple[int, ...] = (2, 13)  # selecting layers; those beyond the model's depth do nothing

    def __post_init__(self) -> None:
        require(self.k >= 1 and self.full >= 0, "k >= 1 and full >= 0", k=self.k, full=self.full)
        require(self.select, "at least one selecting layer", select=self.select)
        require(
            min(self.select) >= self.full, "selecting layers come after the full ones", select=self.select
        )


def select(view: View, cfg: Config) -> Tensor | None:
    if view.phase != "decode" or view.fits():
        return None
    if view.window is not None:
        return search(view) if view.layer >= cfg.full else None
    if view.layer in cfg.select or (view.layer > min(cfg.select) and "tidal" not in view.shared):
        view.shared["tidal"] = search(view)
        return None
    return view.shared.get("tidal") if view.layer >= cfg.full else None


def search(view: View) -> Tensor:
    """[B, H, k] slots of the best keys of each query head."""
    return top_slots(view.visible_scores()[:, :, 0], view.budget[:, None])


METHOD = CachePage(
    config=Config,
    select=select,
    budget=lambda cfg: cfg.k,
    patterns=("causal_self",),
    test_settings=({"budget": 8, "full": 1, "select": (1,)},),
    card=Card(
        title="TidalDecode",
        paper="TidalDecode: Fast and Accurate LLM Decoding with Position Persistent Sparse Attention (ICLR 2025)",
        year=2024,
        idea="top-k positions of one selecting layer are reused by all layers above it",
        cost="full reads in the first and the selecting layers, k keys per head in all others",
        state="the whole cache; memory does not shrink",
        needs=("decoder-lm",),
        neutral={"budget": 1.0},
        caveat="a sliding layer does not see what the others read: it searches its own window, and the next full "
        "layer is searched in its place. The paper's periodic correction of the cache is left out: cached keys of "
        "sparse steps stay as they are",
    ),
)
