"""What a larger setting of a block, of a mask and of a page of positions does: what is reached, shown, and where."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from regard import catalog
from regard.testing.block import BlockCase
from regard.testing.case import tracked
from regard.testing.directions.mechanisms import ROWS, SEEN, WIDTH, distance, entropy
from regard.testing.directions.way import Row, less, more
from regard.testing.labels import example_roles
from regard.testing.laws.grids import on_grid

N, SIDES = 41, (12, 12)
TOKENS = "how many tokens there are: it goes with the input"

BLOCKS: dict[str, Row] = {
    "kernel": more("reach", 3, 5),
    "local_layers": more("reach", 0, 1, global_layers=0),
    "global_layers": more("reach", 0, 1),
    "group": more("reach", 3, 8, global_layers=0),
    "gtsp.tokens": more("reach", 0.3, 0.9),
    "gtsp.heads": more("used", 0.3, 1.0),
    "weights": more("used", 0.3, 0.9),
    "temperature": more("entropy", 0.2, 2.0, hard=False),
    "medusa.levels": more("reach", 1, 2),
    "layer": more("distance", 0, 1, layers=2),
    "keep": more("touched", 0.2, 0.8),
    "focus_detr.layer": less("touched", 0, 5, layers=6),
    "focus_detr.layers": more("touched", 2, 6, layer=1),
    "eps": less("added", 1e-6, 10.0),
    "focus_detr.eps": less("size", 1e-6, 10.0),
    "ela.eps": "of a norm before a sigmoid: it evens the gate out, to a half of everything",
    "ela.kernel": "taps on strips that are means over whole rows: all is reached",
    "branches": "pools at more distances: attention reads all",
    "lightning_attention_tnl.layers": "a layer's decay follows from its place among them",
    "objects": "how many tokens ask a second time, of those that are touched",
    "lanes": TOKENS,
    "selectors": TOKENS,
    "prompts": TOKENS,
    **dict.fromkeys(
        ("expand", "squeeze", "channels", "hidden", "maps", "classes", "slots", "latents", "rounds", "groups",
         "norm_groups", "units", "levels"), WIDTH,
    ),
}  # fmt: skip
MASKS: dict[str, Row] = {
    "window": more("shown", 3, 9),
    "sinks": more("shown", 1, 4),
    "sinks.sinks": more("shown", 1, 4, window=5),
    "prefix": more("shown", 2, 9),
    "local": more("shown", 1, 3),
    "power_attention.local": more("shown", 2, 8, block=2),
    "power_attention.sinks": more("shown", 1, 4, block=2),
    "stride": less("shown", 2, 5, heads=8, kv_heads=8),
    "block": more("shown", 2, 5),
    "longlive.block": more("shown", 1, 4),
    "moa_spans.block": "spans are rounded up to blocks, and begin where a block does",
    "frame": more("shown", 1, 3),
    "latest": more("shown", 2, 5),
    "length": more("shown", 10, 40, beta=(0.2, 0.4)),
    "group": more("shown", 3, 9),
    "radius": more("shown", 1, 2),
    "ahead": more("after", 0, 3, window=5),
    "heads": "how many heads there are, and which of them are alike",
    "kv_heads": "how many heads there are, and which of them are alike",
    "offset": "where shards begin: as much is shown",
    "returned": "which heads have shifted groups: as much is shown",
}
POSITIONS: dict[str, Row] = {
    "depth": (less("last", 0, 2), less("shown", 0, 2)),
    "block": TOKENS,
    "blocks": TOKENS,
    "height": TOKENS,
    "width": TOKENS,
}


def case_of(name: str, settings: Mapping[str, Any]) -> BlockCase:
    page: Any = catalog.get(name)
    base = page.test_settings[0] if page.test_settings else {}
    return BlockCase(page, page.configure(**{**base, **settings}), page.pattern)


def answered(name: str, settings: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """(x, out), both [B, 1, N, C]."""
    case = case_of(name, settings)
    inputs = case.inputs(N) if case.page.grid is None else on_grid(case, SIDES)
    x = inputs.q.requires_grad_()
    out = case.run(case.page.fast or case.page.reference, replace(inputs, q=x))[0]
    return x, out


def weights(name: str, settings: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """([B, rows, 1, N] how much each token moves what the asked ones become, their places)."""
    x, out = answered(name, settings)
    at = torch.tensor([min(out.shape[2] - 1, int(place * out.shape[2])) for place in ROWS])
    toward = torch.randn(out.shape[-1], generator=torch.Generator().manual_seed(0), dtype=out.dtype)
    each = [
        torch.autograd.grad((out[:, 0, i] @ toward).sum(), x, retain_graph=True)[0].norm(dim=-1) for i in at
    ]
    return torch.stack(each, 1), at[:, None, None]


def evenness(name: str, settings: Mapping[str, Any]) -> Tensor:
    """How evenly the asked tokens read all others; beside them the residual would count as reading oneself."""
    w, at = weights(name, settings)
    return entropy(w.masked_fill(torch.arange(w.shape[-1]) == at, 0), at)


def added(name: str, settings: Mapping[str, Any]) -> Tensor:
    """[B, N] how much a token changes."""
    x, out = answered(name, settings)
    return (out - x).detach().abs().mean((1, 3))


def used(name: str, settings: Mapping[str, Any]) -> Tensor:
    """How many of the learned numbers the output depends on."""
    case = case_of(name, settings)
    inputs = case.inputs(N).map(tracked)
    out = case.run(case.page.fast or case.page.reference, inputs)[0]
    learned = [p for p in inputs.params.values() if p.requires_grad]
    slopes = torch.autograd.grad(out.cos().sum(), learned, allow_unused=True)
    return torch.tensor(float(sum(int((slope != 0).sum()) for slope in slopes if slope is not None)))


BLOCK_QUANTITIES: dict[str, Callable[[str, Mapping[str, Any]], Tensor]] = {
    "reach": lambda name, settings: (weights(name, settings)[0] > SEEN).sum(-1).double(),
    "distance": lambda name, settings: distance(*weights(name, settings)),
    "added": added,
    "entropy": evenness,
    "size": lambda name, settings: answered(name, settings)[1].detach().abs(),
    "used": used,
    "touched": lambda name, settings: (added(name, settings) > SEEN).double(),
}


def measure_block(name: str, quantity: str, settings: Mapping[str, Any]) -> dict[str, float]:
    return {"": float(BLOCK_QUANTITIES[quantity](name, settings).mean())}


def measure_place(name: str, quantity: str, settings: Mapping[str, Any]) -> dict[str, float]:
    """How many pairs a mask shows, how many of them to a later key, and the last position of a text."""
    page: Any = catalog.get(name)
    cfg = page.configure(**{**(page.test_settings[0] if page.test_settings else {}), **settings})
    if quantity == "last":
        return {
            "": float(
                page.positions(example_roles({*page.card.needs, "padding"}, N, cfg), cfg).double().mean()
            )
        }
    mask = page.build(cfg)
    shown = mask.dense(N, roles=example_roles(mask.needs, N, cfg) if mask.needs else None)
    return {"": float((shown.triu(1) if quantity == "after" else shown).double().mean())}
