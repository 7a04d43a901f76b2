"""CausalMM: decoding away from what the model says when its attention is made counterfactual.

    ℓ' = (1 + 2γ) ℓ - γ ℓ_vision - γ ℓ_language        (1 + γ) ℓ - γ ℓ_one  where there is one of the two
    only tokens with ℓ >= max ℓ + log ε stay

ℓ_vision is of a pass in which every attention map of the vision tower is replaced, ℓ_language of one in which those of
the decoder are; the rest of each pass runs as usual on what comes of it. A map A becomes, over what a query sees,

    random    u, uniform on [0, 1)        uniform   1        reversed  max A - A        shuffled  A in another order

and each row is scaled to its old sum. What a pass without a causal path from the image to the answer still says, the
model says by its priors.

>>> import torch
>>> A, seen = torch.tensor([[[[0.5, 0.3, 0.2, 0.0]]]]), torch.tensor([[[[True, True, True, False]]]])
>>> counterfactual(A, seen, "reversed", torch.zeros(1, 1, 1, 4))  # 0, 0.2, 0.3 have the sum 0.5
tensor([[[[0.0000, 0.4000, 0.6000, 0.0000]]]])
>>> given = {"main": torch.tensor([[2.0, 1.0, -4.0]]), VISION: torch.tensor([[2.0, 0.0, 0.0]])}
>>> logits(None, given | {LANGUAGE: torch.tensor([[1.0, 1.0, 1.0]])}, Config())  # 4 - 1 - 0.5;  2 - 0 - 0.5
tensor([[2.5000, 1.5000,   -inf]])
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from regard.core import Card, require
from regard.kinds.steering import SteeringPage
from regard.ops import at_least_float32
from regard.ops.steered import Steered, Stream, contrasted, plainly_contrasted

KINDS = ("random", "uniform", "reversed", "shuffled")
VISION, LANGUAGE = "cf_vision", "cf_language"
TOWERS = {VISION: "vision", LANGUAGE: "text"}


@dataclass(frozen=True)
class Config:
    vision: str = "shuffled"  # what becomes of the tower's maps; "" leaves this pass out
    language: str = "random"  # what becomes of the decoder's; "" leaves this pass out
    strength: float = 0.5  # γ
    cut: float = 0.1  # ε; 0 keeps every token
    seed: int = 0  # of what is drawn

    def __post_init__(self) -> None:
        for name in (self.vision, self.language):
            require(name in ("", *KINDS), f"a map becomes one of {KINDS}, or '' for no such pass", kind=name)
        require(self.vision or self.language, "a counterfactual pass or two")
        require(self.strength >= 0, "strength >= 0", strength=self.strength)
        require(0 <= self.cut <= 1, "0 <= cut <= 1", cut=self.cut)


def streams(cfg: Config) -> tuple[Stream, ...]:
    kinds = {VISION: cfg.vision, LANGUAGE: cfg.language}
    return tuple(Stream(name, steered=True) for name, kind in kinds.items() if kind and cfg.strength)


def acts(at: Steered, cfg: Config) -> bool:
    return TOWERS.get(at.stream) == at.tower


def scrambled(x: Tensor) -> Tensor:
    """Whole numbers, each made another one of 32 bits."""
    for _ in range(2):
        x = (((x & 0xFFFFFFFF) ^ (x >> 16 & 0xFFFF)) * 0x45D9F3B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def draws(at: Steered, heads: int, visible: Tensor) -> Tensor:
    """[B, H, R, n] in [0, 1): what a query draws for each key that it sees, whatever the padding and the cache.

    A hash of seed, layer, head, the query's number and the key's among those that it sees.
    """
    rows = torch.arange(visible.shape[2])[None] if at.rows is None else at.rows
    head = torch.arange(heads, device=visible.device)[:, None, None]
    x = scrambled(scrambled(torch.tensor(at.seed + 1)) + at.layer + 1).to(visible.device)
    for part in (head, rows.to(visible.device)[:, None, :, None] + 1, visible.long().cumsum(-1)):
        x = scrambled(x + part)
    return x.double() / 2**32


def counterfactual(w: Tensor, visible: Tensor, kind: str, drawn: Tensor) -> Tensor:
    """[B, H, R, n] what weights become over what each query sees; one that sees nothing keeps its own."""
    if kind == "shuffled":
        shuffled = permuted(w.masked_fill(~visible, 0), visible, drawn)
        return torch.where(visible.any(-1, keepdim=True), shuffled, w)
    wide = at_least_float32(w).masked_fill(~visible, 0)
    made = {
        "random": lambda: drawn.to(wide),
        "uniform": lambda: torch.ones_like(wide),
        "reversed": lambda: wide.amax(-1, keepdim=True) - wide,
    }[kind]().masked_fill(~visible, 0)
    # reversed, equal weights are all zero and stay equal
    made = torch.where(made.sum(-1, keepdim=True) > 0, made, visible.to(made))
    scale = wide.sum(-1, keepdim=True) / made.sum(-1, keepdim=True).clamp(min=torch.finfo(made.dtype).tiny)
    return torch.where(visible.any(-1, keepdim=True), (made * scale).to(w.dtype), w)


def permuted(w: Tensor, visible: Tensor, drawn: Tensor) -> Tensor:
    """Weights of the keys that a query sees, in the order of what it drew."""
    visible = visible.expand_as(w)
    there = (~visible).long().argsort(dim=-1, stable=True)  # those that it sees come first
    taken = drawn.expand_as(w).masked_fill(~visible, torch.inf).argsort(dim=-1, stable=True)
    return torch.zeros_like(w).scatter(-1, there, w.gather(-1, taken))


def weights(at: Steered, w: Tensor, cfg: Config) -> Tensor:
    visible = torch.ones_like(w[:, :1], dtype=torch.bool) if at.visible is None else at.visible
    kind = cfg.vision if at.tower == "vision" else cfg.language
    return counterfactual(w, visible, kind, draws(at, w.shape[1], visible))


def logits(at: Any, logits: Mapping[str, Tensor], cfg: Config) -> Tensor:
    others = [logits[stream.name] for stream in streams(cfg)]
    other = torch.stack(others).mean(0) if others else logits["main"]
    return contrasted(logits["main"], other, cfg.strength * len(others), cfg.cut)


def measure(w: Tensor, visible: Tensor, drawn: Tensor, said: Mapping[str, Tensor], cfg: Config) -> dict:
    """The decoder's and the tower's maps made counterfactual, and the probabilities of the next token."""
    kinds = {"language": cfg.language, "vision": cfg.vision}
    maps = {name: counterfactual(w, visible, kind, drawn) for name, kind in kinds.items() if kind}
    return maps | {"next": logits(None, said, cfg).softmax(-1)}


def reference(w: Tensor, visible: Tensor, drawn: Tensor, said: Mapping[str, Tensor], cfg: Config) -> dict:
    """Row by row and token by token, in plain numbers."""
    kinds = {"language": cfg.language, "vision": cfg.vision}
    result = {name: plain_map(w, visible, drawn, kind) for name, kind in kinds.items() if kind}
    passes = [said[f"cf_{name}"].tolist() for name, kind in kinds.items() if kind]
    rows = [
        plainly_contrasted(row, [other[b] for other in passes], cfg.strength, cfg.cut)
        for b, row in enumerate(said["main"].tolist())
    ]
    return result | {"next": torch.tensor(rows, dtype=torch.float64)}


def plain_map(w: Tensor, visible: Tensor, drawn: Tensor, kind: str) -> Tensor:
    made = w.double().clone()
    for b, h, r in product(*(range(size) for size in w.shape[:3])):
        seen = visible[b, min(h, visible.shape[1] - 1), r].nonzero().flatten().tolist()
        if seen:
            new = plain_row(w[b, h, r, seen].tolist(), drawn[b, h, r, seen].tolist(), kind)
            made[b, h, r] = 0
            made[b, h, r, seen] = torch.tensor(new, dtype=torch.float64)
    return made


def plain_row(row: list[float], drawn: list[float], kind: str) -> list[float]:
    if kind == "shuffled":
        return [row[i] for i in sorted(range(len(row)), key=lambda i: drawn[i])]
    highest = max(row)
    new = {"random": drawn, "uniform": [1.0] * len(row), "reversed": [highest - x for x in row]}[kind]
    if not any(new):
        new = [1.0] * len(row)
    return [x * math.fsum(row) / math.fsum(new) for x in new]


def cases(seed: int) -> Iterable[tuple]:
    """Every kind; one branch; padded rows and columns; one token; equal weights; float32; no cut; no strength."""
    g = torch.Generator().manual_seed(seed)

    def drawn(b: int, h: int, n: int, dtype: torch.dtype = torch.float64, pad: int = 0) -> tuple:
        seen = torch.ones(b, 1, n, n, dtype=torch.bool).tril()
        seen[0, :, :, :pad] = False
        scores = torch.randn(b, h, n, n, generator=g, dtype=dtype).masked_fill(~seen, -1e9)
        said = {name: 3 * torch.randn(b, 7, generator=g, dtype=dtype) for name in ("main", VISION, LANGUAGE)}
        return scores.softmax(-1), seen, torch.rand(b, h, n, n, generator=g, dtype=torch.float64), said

    for kind, other in zip(KINDS, reversed(KINDS)):
        yield *drawn(2, 3, 5, pad=2), Config(vision=kind, language=other)
    yield *drawn(2, 2, 6, torch.float32), Config(strength=1.0, cut=0.6)
    yield *drawn(1, 1, 1), Config(language="reversed", vision="")
    yield *drawn(2, 2, 4), Config(language="", vision="random", cut=0.0)
    yield *drawn(2, 2, 4), Config(strength=0.0)
    w, *rest = drawn(1, 2, 4)
    yield rest[0].double() / rest[0].sum(-1, keepdim=True) + 0 * w, *rest, Config(language="reversed")


METHOD = SteeringPage(
    config=Config,
    tower="both",
    acts=acts,
    weights=weights,
    streams=streams,
    logits=logits,
    measure=measure,
    reference=reference,
    cases=cases,
    needs_image=True,
    test_settings=({"strength": 1.0},),
    card=Card(
        title="CausalMM",
        paper="Mitigating Modality Prior-Induced Hallucinations in Multimodal Large Language Models via Deciphering "
        "Attention Causality",
        year=2025,
        idea="decode away from passes whose attention in the tower or in the decoder is made counterfactual",
        cost="one pass more for each of the two branches, at every step, each with its own cache",
        needs=("a vision tower with attention", "decoder-lm"),
        lineage=("vcd",),
        neutral={"strength": 0.0, "cut": 0.0},
        caveat="the released vision branch edits no attention: it multiplies the patch features by the edited map of "
        "one layer, resized and averaged over heads, and its counterfactual pass reads the factual cache, so that "
        "only the first token is steered; here, as in the paper, all maps of the tower are replaced and each pass has "
        "its own cache. The released decoder maps 'uniform' and 'reverse' do not sum to 1 over what a query sees, and "
        "its vision maps are reversed and shuffled over the whole matrix; here each row is, and keeps its sum. The "
        "code's default for the tower is shuffled, for the decoder it names none. γ = 0.5 and ε = 0.1 are the code's "
        "defaults, its script for POPE takes 1 and 0.6; the paper then samples, which is generate's own setting. "
        "Draws are a hash of places, the same for every image and with or without a cache",
    ),
)
