"""TidalDecode on the shipped model: exact at full budget, and positions that persist over layers."""

import torch

from regard import catalog
from regard.claims._lm import runs, samples, watch
from regard.core import Claim, Measured
from regard.ops import View, top_slots

LENGTH = 1024
BUDGET = 0.1
FIRST, SECOND = 1, 2  # selecting layer, re-selecting layer of the four


def measure() -> Measured:
    mass: dict[str, list[float]] = {}
    kept: dict[int, torch.Tensor] = {}

    def look(view: View) -> None:
        count = int(BUDGET * view.stored)
        weights = view.weights()[:, :, 0]  # [B, H, n]
        kept[view.layer] = top_slots(weights, count)
        for name, source in (("reused", FIRST), ("reselected", SECOND)):
            if source < view.layer:
                found = weights.gather(-1, kept[source]).sum(-1).mean()
                mass.setdefault(f"{name}_{view.layer}", []).append(float(found))
        if view.layer > FIRST:
            mass.setdefault(f"recent_{view.layer}", []).append(float(weights[..., -count:].sum(-1).mean()))

    watch(look, LENGTH, steps=24)
    mean = {name: sum(values) / len(values) for name, values in sorted(mass.items())}
    later = sorted({int(name.split("_")[1]) for name in mean if name.startswith("reused")})
    wins = sum(mean[f"reused_{i}"] > mean[f"recent_{i}"] for i in later) / len(later)
    raises = all(mean[f"reselected_{i}"] > mean[f"reused_{i}"] for i in later if i > SECOND)
    chosen = samples("recall", LENGTH, 4)
    method = catalog.method("tidaldecode", budget=1.0, full=FIRST, select=(FIRST,))
    near = max(
        float((a.logits - b.logits).abs().max()) for a, b in zip(runs(chosen, method), runs(chosen, None))
    )
    numbers = {"logit_diff_at_N": near, "later_layers_won": wins, "reselection_raises": str(raises), **mean}
    return Measured(near < 1e-5 and wins >= 0.75 and raises, numbers)


CLAIM = Claim(
    name="tidaldecode",
    statement="k >= context reproduces full decoding exactly; at a 10 % budget positions selected once and reused by "
    "later layers recover more attention mass than equally many recent tokens.",
    bound="logit diff < 1e-5 at k = N; recovered mass reused > recent in >= 75 % of later layers; "
    "re-selection raises it",
    measure=measure,
)
