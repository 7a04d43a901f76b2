"""What a larger setting of a mechanism does to the keys that queries read and to what they answer."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from regard import catalog
from regard.core import Unsupported
from regard.testing.case import Case, Inputs, NotApplicable
from regard.testing.directions.way import Row, less, more
from regard.testing.laws.grids import on_grid

N, SIDES, SEEN = 40, (12, 12), 1e-12
ROWS = (0.2, 0.55, 1.0)  # queries that are asked what they read, by their place
WIDTH = "a width of what is learned: wider is not more of anything at random weights"
TAPS = "taps of a convolution beside an attention that reads all keys"
TOGETHER = "queries that choose their keys together"
ONE = "has one value only"
GUESS = "of the guess by which keys are chosen: which, not how many"

MECHANISMS: dict[str, Row] = {
    # what a query reads
    "budget": more("reach", 4, 12),
    "top_k": more("reach", 1, 3),
    "window": more("reach", 3, 5),
    "prefix": more("reach", 2, 20),
    "sinks": more("first", 1, 6),
    "vertical_slash.sinks": more("first", 0, 6, vertical=8),
    "local": more("newest", 5, 13),
    "vertical_slash.local": more("newest", 1, 8, slash=8, block_q=1, block_k=1, vertical=1),
    "core_context_aware.local": less("error", 2, 30),
    "kernel": more("reach", 3, 5),
    "halo": more("reach", 1, 2),
    "ahead": more("reach", 0, 2),
    "back": more("reach", 0.5, 2.0),
    "window_index": more("reach", 0, 3),
    "search_power": less("reach", 0.3, 0.8, window_index=2),
    "span_power": more("reach", 0.3, 0.8),
    "tokens_per_image": more("reach", 1, 4),
    "regions": less("reach", 2, 4),
    "lce": more("reach", 0, 5),
    "block_k": more("reach", 2, 4),
    "block": more("reach", 2, 4),
    "dense": more("reach", 0, 10),
    "dense_last": more("reach", 0, 8),
    "dense_below": more("reach", 0, 60),
    "keep": more("reach", 0.25, 0.75),
    "near": more("reach", 0, 2),
    "share": more("reach", 0.2, 0.7),
    "gamma": more("reach", 0.3, 0.9),
    "min_budget": more("reach", 0, 24, gamma=0.1),
    "exact_below": more("reach", 2, 60),
    "vertical": more("reach", 1, 6),
    "slash": more("reach", 1, 6),
    "members": more("reach", 4, 12),
    "clusters": less("reach", 2, 4),
    "active": more("reach", 0.5, 1.0),
    "threshold": less("reach", 0.0, 0.6),
    "flux_attention.threshold": less("reach", 0.0, 1.0),
    "xattention.threshold": more("reach", 0.3, 0.9),
    # how evenly, and how far back
    "scale": less("entropy", 0.3, 1.5),
    "relu_attention.scale": more("size", 0.3, 1.5),
    "softcap": less("entropy", 0.5, 8.0),
    "temperature": more("entropy", 0.1, 1.0),
    "power": less("entropy", 1, 2),
    "least": less("entropy", 0.3, 2.0),
    "more": less("entropy", 0.3, 2.0),
    "start": less("entropy", 0.01, 0.5),
    "slash_slots.eps": more("entropy", 1e-6, 1.0),
    "clamp": less("entropy", 0.1, 1.0),
    "attention_residuals.block": less("levels", 2, 8),
    "ratio": more("given", 1, 3),
    "transnext.pool": less("given", 2, 4),
    "transnext.length": less("entropy", 5.0, 500.0),
    "dilation": more("distance", 1, 2),
    "layer": more("distance", 0, 1, layers=2),
    "tau": more("distance", 1.0, 16.0),
    "length": more("distance", 4, 16, floor=0.0),
    "normalizer": more("distance", 1.0, 16.0),
    "slowness": more("distance", 1.0, 16.0),
    "lawcat.bias": more("distance", -2.0, 5.0),
    "floor": more("distance", 0.0, 0.5),
    "dt_min": less("distance", 0.001, 0.09),
    "dt_max": less("distance", 0.1, 1.0),
    "a_min": less("distance", 1.0, 15.0),
    "a_max": less("distance", 4.0, 64.0),
    "slowest": more("far", 3.0, 1000.0, turns=True),
    "illama.alpha": more("future", 0.1, 0.8),
    # how large, and how near to softmax attention
    "eps": less("size", 1e-6, 1.0),
    "norm_eps": less("size", 1e-6, 1.0),
    "graph_aware_isomorphic_attention.eps": more("own", 0.1, 2.0),
    "relu_attention.alpha": less("size", 0.5, 1.0),
    "sigmoid_attention.bias": more("size", -3.0, 0.0),
    "vssd.dt_min": more("size", 0.001, 0.09),
    "vssd.dt_max": more("size", 0.1, 1.0),
    "vssd.a_min": more("size", 1.0, 15.0),
    "vssd.a_max": more("size", 4.0, 64.0),
    "features": less("error", 4, 256),
    "jrt.features": WIDTH,
    "sample": less("error", 2, 32),
    "agents": less("error", 4, 36),
    "combiner.block": less("error", 3, 40),
    # no direction
    "width": WIDTH,
    "hidden": WIDTH,
    "rank": WIDTH,
    "expand": WIDTH,
    "degree": WIDTH,
    "bands": WIDTH,
    "layers": WIDTH,
    "iterations": WIDTH,
    "dense_layers": "acts by the number of a layer, which a page alone is not told",
    "davit.layer": "by turns: even layers read windows, odd ones channels",
    "davit.layers": "bounds `layer`, changes nothing else",
    "lightning_attention_2.layers": "a layer's decay follows from its place among them",
    "block_q": TOGETHER,
    "dhsa.block_k": ONE,
    "superlinear_attention.block_k": ONE,
    "flexprefill.block_k": "is block_q, and moves with it",
    "rectified_spaattn.block_k": "is block_q, and moves with it",
    "flexprefill.tau": "by which of two patterns a head reads, not how much",
    "shared": "which of the heads that answer answer every token, not how many do",
    "partner": "which image is the other one",
    "seed": "another one is another draw",
    "table": "cells of learned biases",
    "conv": TAPS,
    "rcmha.kernel": TAPS,
    "lawcat.kernel": TAPS,
    "slash_slots.kernel": TAPS,
    "chunk": GUESS,
    "pool": GUESS,
    "stride": GUESS,
    "rows": GUESS,
    "group": "tokens of a core: all of them are read, however many share one",
    "quest.block_k": "pages of a budget in tokens: fewer where they are larger",
    "n_down": GUESS,
    "basis": GUESS,
    "coefficient": GUESS,
    "coefficients": GUESS,
    "projections": GUESS,
    "rope_theta": GUESS,
    "fused_neighborhood_attention.stride": TOGETHER,
    "transnext.trained": "the side of which the steps of a learned table are",
    "limit": "a bound, so that sums stay finite",
    "routing_transformer.decay": "of the centroids while a model is trained; a forward moves none",
}


def asked(name: str, pattern: str, settings: Mapping[str, Any], seed: int) -> tuple[Case, Inputs]:
    """A page under these settings beside its first test settings, and inputs, of a grid of one size."""
    page: Any = catalog.get(name)
    base = page.test_settings[0] if page.test_settings else {}
    case = Case(page, page.configure(**{**base, **settings}), pattern)
    inputs = case.inputs(N, N + 2, seed=seed) if page.grid is None else on_grid(case, SIDES, N)
    return case, inputs


def answered(
    name: str, pattern: str, settings: Mapping[str, Any], seed: int = 0, flat: bool = False
) -> tuple[Inputs, Tensor]:
    case, inputs = asked(name, pattern, settings, seed)
    if flat:  # all queries and keys are one: what is left is what places do
        inputs = replace(inputs, q=torch.ones_like(inputs.q), k=torch.ones_like(inputs.k))
    inputs = replace(
        inputs, v=inputs.v.requires_grad_(), x=None if inputs.x is None else inputs.x.requires_grad_()
    )
    return inputs, case.run(case.page.fast or case.page.reference, inputs)[0]


def weights(inputs: Inputs, out: Tensor, of: str = "v") -> Tensor:
    """[B, rows, H, M] how much the value of each key moves what the asked queries answer; of x: [B, rows, N]."""
    found, n = [], out.shape[2]
    toward = torch.randn(out.shape[-1], generator=torch.Generator().manual_seed(0), dtype=out.dtype)
    for place in ROWS:
        at = min(n - 1, int(place * n))
        (slope,) = torch.autograd.grad((out[:, :, at] @ toward).sum(), getattr(inputs, of), retain_graph=True)
        found.append(slope.norm(dim=-1))
    return torch.stack(found, 1)


def measure(name: str, quantity: str, settings: Mapping[str, Any]) -> dict[str, float]:
    """A quantity of a page with these settings, by pattern."""
    found = {}
    for pattern in catalog.get(name).patterns:
        try:
            found[f" ({pattern})"] = float(QUANTITIES[quantity](name, pattern, settings))
        except (Unsupported, NotApplicable):
            continue
    return found


def of_weights(of: Any, flat: bool = False, causal: bool = False) -> Any:
    """A quantity of the weights that queries give to keys: of (weights [B, rows, H, M], places of the queries)."""

    def quantity(name: str, pattern: str, settings: Mapping[str, Any]) -> float:
        if causal and pattern != "causal_self" and "causal_self" in catalog.get(name).patterns:
            raise NotApplicable("asked in causal_self")
        inputs, out = answered(name, pattern, settings, flat=flat)
        n = out.shape[2]
        at = torch.tensor([min(n - 1, int(place * n)) for place in ROWS])[:, None, None]
        return float(of(weights(inputs, out), at).mean())

    return quantity


def shares(w: Tensor) -> Tensor:
    return w / w.sum(-1, keepdim=True).clamp(min=1e-30)


def levels(w: Tensor, at: Tensor) -> Tensor:
    """[B, rows, H] how many different weights there are, in six digits."""
    each = (shares(w) * 1e6).round().sort(-1).values
    return 1.0 + (each.diff(dim=-1) > 0).sum(-1)


def in_a_row(w: Tensor) -> Tensor:
    return (w > SEEN).long().cumprod(-1).sum(-1).double()


def newest(w: Tensor, at: Tensor) -> Tensor:
    """[B, rows, H] keys in a row that are read, backwards from the query's own."""
    ends = [in_a_row(w[:, i, :, : int(end) + 1].flip(-1)) for i, end in enumerate(at.flatten())]
    return torch.stack(ends, 1)


def distance(w: Tensor, at: Tensor) -> Tensor:
    return (shares(w) * (torch.arange(w.shape[-1]) - at).abs()).sum(-1)


def entropy(w: Tensor, at: Tensor) -> Tensor:
    return torch.special.entr(shares(w)).sum(-1)


def error(name: str, pattern: str, settings: Mapping[str, Any]) -> float:
    """How far the answers are from those of softmax attention, mean over draws."""
    gaps = []
    for seed in range(4):
        inputs, out = answered(name, pattern, settings, seed)
        exact = Case(catalog.get("softmax"), catalog.get("softmax").config(), pattern)
        gaps.append(
            (out - exact.run(exact.page.fast, replace(inputs, params={}, x=None, y=None))[0]).abs().mean()
        )
    return float(torch.stack(gaps).mean().detach())


def reach(name: str, pattern: str, settings: Mapping[str, Any]) -> float:
    """How many keys the answer of a query depends on, by their values or by the layer's input."""
    inputs, out = answered(name, pattern, settings)
    read = weights(inputs, out) > SEEN
    if inputs.x is not None and inputs.y is None and inputs.x.shape[1] == read.shape[-1]:
        read = read | (weights(inputs, out, "x") > SEEN)[:, :, None]
    return float(read.sum(-1).double().mean())


QUANTITIES = {
    "reach": reach,
    "first": of_weights(lambda w, at: in_a_row(w)),
    "newest": of_weights(newest, causal=True),
    "levels": of_weights(levels),
    "given": of_weights(lambda w, at: w.sum(-1)),
    "own": of_weights(lambda w, at: (shares(w) * (torch.arange(w.shape[-1]) == at)).sum(-1)),
    "distance": of_weights(distance, causal=True),
    "far": of_weights(distance, flat=True, causal=True),
    "entropy": of_weights(entropy),
    "future": of_weights(lambda w, at: (shares(w) * (torch.arange(w.shape[-1]) > at)).sum(-1)),
    "size": lambda name, pattern, settings: float(answered(name, pattern, settings)[1].detach().abs().mean()),
    "error": error,
}
