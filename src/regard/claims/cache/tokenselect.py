"""TokenSelect on the shipped model: exact at full budget, and the soft vote against raw sums.

A budget that covers the context leaves nothing to choose, and the page then reads the cache as it is. Here it is told
that there is something to choose: all tokens are chosen, by its vote and in its order, at every step of every layer.
That is another order of the same sums, so the model runs in float64.
"""

from typing import Any
from unittest import mock

import torch
from torch import Tensor

from regard import catalog
from regard.claims.lab import difference, mean
from regard.claims.shipped_lm import in_float64, runs, samples, watch
from regard.core import Claim, Measured
from regard.methods.caches import tokenselect as page
from regard.methods.caches.tokenselect import Config, split, votes
from regard.ops import View, top_slots

LENGTH = 1024
BUDGET = 0.06


def choosing_all() -> tuple[float, int]:
    """Largest |difference| of logits from full attention where the vote chooses all tokens, and how often it did."""
    chosen, method = samples("recall", LENGTH, 4), catalog.method("tokenselect", budget=1.0, reuse=None)

    def something(view: View) -> Tensor:
        return torch.zeros_like(view.budget, dtype=torch.bool)

    with (
        mock.patch.object(page, "fitting", something),
        mock.patch.object(page, "votes", wraps=page.votes) as voted,
    ):
        ours = runs(chosen, method, in_float64())
    full = runs(chosen, None, in_float64())
    return max(difference(a.logits, b.logits) for a, b in zip(ours, full)), voted.call_count


def measure() -> Measured:
    mass: dict[tuple[int, str], list[float]] = {}

    def record(view: View) -> None:
        n = view.stored
        init, local, k = split(int(BUDGET * n), Config())
        weights = view.weights()[:, :, 0]  # [B, H, n]
        ends = weights[..., :init].sum(-1) + weights[..., n - local :].sum(-1)
        at = torch.arange(n)[None, None]
        between = (at >= init) & (at < n - local)
        for vote in ("soft", "raw"):
            voted = votes(view, Config(vote=vote), between)[..., init : n - local]
            chosen = (top_slots(voted, k) + init).expand(-1, weights.shape[1], -1)
            recovered = ends + weights.gather(-1, chosen).sum(-1)
            mass.setdefault((view.layer, vote), []).append(float(recovered.mean()))

    watch(record, LENGTH, steps=24)
    means = {key: mean(values) for key, values in mass.items()}
    layers = sorted({layer for layer, _ in means})
    wins = sum(means[i, "soft"] > means[i, "raw"] for i in layers) / len(layers)
    near, voted = choosing_all()
    numbers: dict[str, Any] = {"diff_at_N": near, "votes_at_N": voted, "layers_soft_wins": wins}
    numbers |= {f"mass_{vote}_{layer}": value for (layer, vote), value in sorted(means.items())}
    parts = {"full attention at k = N": near < 1e-5 and voted > 0, "soft over raw": wins >= 0.7}
    return Measured.by(parts, numbers)


CLAIM = Claim(
    name="tokenselect",
    statement="k >= context equals full attention exactly; at a 6 % budget the soft-voted shared set recovers more "
    "true attention mass than summing raw logits over heads.",
    bound="max diff < 1e-5 at k = N; recovered mass soft > raw in >= 70 % of layers of the shipped LM",
    measure=measure,
)
