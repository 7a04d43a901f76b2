"""VAR: what attention sinks hold goes to the rest of the image, in heads that look at it.

    x_t = h_t / sqrt(mean h_t²)                        h the layer's input
    S = {t : max over d in D of |x_t,d| > τ}           sinks; D the dimensions that are massive in the first token
    m = Σ A_j over the image,  r = Σ A_j over sinks of the image / m
    where m >= 0.2 and r <= ρ:  A_j <- p A_j for all sinks,  A_j (1 + (1 - p) Σ_S A_s / Σ_rest A_i) for the image's rest

A is after the softmax, of queries that stand after the image. No |x_d| is above sqrt(d): τ is meant for states of
`width` dimensions and scales with the root. D is the model's own (`sink_dimensions`); unless it is given, it is what is
massive in each text's first token.

>>> import torch
>>> states = torch.tensor([[[8.0, 0, 0, 0], [1, 1, 1, 1], [4, 0, 0, 0], [1, 1, 1, 1]]])  # |x_0| = 2 in tokens 0 and 2
>>> A = torch.tensor([[[[0.2, 0.3, 0.2, 0.3]]]])
>>> cfg = Config(tau=1.5, width=4)
>>> sink_dimensions(states[:, 0], cfg)
(0,)
>>> changed, sinks = measure(A, states, torch.tensor([0]), torch.tensor([[False, True, True, False]]), cfg)
>>> sinks
tensor([[ True, False,  True, False]])
>>> changed  # 0.6 · 0.2 of both sinks; token 1 gets 0.4 · 0.4
tensor([[[[0.1200, 0.4600, 0.1200, 0.3000]]]])
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core import Card, require
from regard.core.errors import present
from regard.kinds.steering import SteeringPage
from regard.ops import at_least_float32
from regard.ops.steered import Steered

EPS = 1e-6  # of the norm


@dataclass(frozen=True)
class Config:
    dims: tuple[int, ...] = ()  # D; 1415 and 2533 of LLaMA-2-7B, 2100 and 4743 of 13B; (): the first token's
    tau: float = 20.0  # above which a dimension is massive
    width: int = 4096  # of the states that tau is meant for
    mass: float = 0.2  # weight on the image from which on a head is of the image
    rho: float = 0.5  # share of it that sinks may hold there
    p: float = 0.6  # share that sinks keep
    first: int = 2  # layers before this one are left as they are
    spared: int = 1  # and so many of the last

    def __post_init__(self) -> None:
        require(all(d >= 0 for d in self.dims), "dimensions >= 0", dims=self.dims)
        require(0 < self.tau**2 < self.width, "0 < tau < sqrt(width)", tau=self.tau, width=self.width)
        for name in ("mass", "rho", "p"):
            require(0 <= getattr(self, name) <= 1, f"0 <= {name} <= 1", **{name: getattr(self, name)})
        require(self.first >= 0 and self.spared >= 0, "layers >= 0", first=self.first, spared=self.spared)


def massive(states: Tensor, cfg: Config) -> Tensor:
    """[..., d] bool: which dimensions of states [..., d] are above τ after a norm without weights."""
    h = at_least_float32(states)
    x = h * (h.square().mean(-1, keepdim=True) + EPS).rsqrt()
    return x.abs() > cfg.tau * (h.shape[-1] / cfg.width) ** 0.5


def sink_dimensions(states: Tensor, cfg: Config | None = None) -> tuple[int, ...]:
    """Dimensions massive in any of these states [..., d] (a layer's inputs at first tokens), ascending. (): none."""
    found = massive(states, cfg or Config()).reshape(-1, states.shape[-1]).any(0)
    return tuple(found.nonzero().flatten().tolist())


def own_dimensions(states: Tensor, first: Tensor, cfg: Config) -> Tensor:
    """[B, d] bool: D of each text, by its states [B, n, d] and the column [B] of its first token."""
    if cfg.dims:
        fixed = torch.zeros(states.shape[-1], dtype=torch.bool, device=states.device)
        fixed[list(cfg.dims)] = True
        return fixed.expand(len(states), -1)
    return massive(states[torch.arange(len(states), device=states.device), first], cfg)


def sinks_of(states: Tensor, D: Tensor, cfg: Config) -> Tensor:
    """[B, R] bool: which states [B, R, d] are massive in a dimension of D [B, d]."""
    return (massive(states, cfg) & D[:, None]).any(-1)


def redistributed(w: Tensor, sinks: Tensor, image: Tensor, after: Tensor, cfg: Config) -> Tensor:
    """w [B, H, R, n] of the rows after [B, R], by sinks and image [B, n]."""

    def total(keys: Tensor) -> Tensor:  # [B, H, R, 1]
        return w.masked_fill(~keys[:, None, None], 0).sum(-1, keepdim=True)

    plain, mass, rest = image & ~sinks, total(image), total(image & ~sinks)
    chosen = (mass >= cfg.mass) & (total(image & sinks) <= cfg.rho * mass) & (rest > 0)
    grown = 1 + (1 - cfg.p) * total(sinks) / rest.where(rest > 0, 1)
    factor = torch.where(sinks[:, None, None], cfg.p, torch.where(plain[:, None, None], grown, 1.0))
    return torch.where(chosen & after[:, None, :, None], w * factor, w)


def after_image(image: Tensor, keys: Tensor, columns: Tensor) -> Tensor:
    """[B, R] bool: which columns [B, R] stand after the last image token: image [B, n] bool, keys [B, n] columns."""
    return columns > keys.masked_fill(~image, -1).amax(1, keepdim=True)


def measure(
    w: Tensor, states: Tensor, first: Tensor, image: Tensor, cfg: Config | None = None
) -> tuple[Tensor, Tensor]:
    """Weights [B, H, R, n] of the newest R tokens, redistributed, and the sinks [B, n] among all n.

    states [B, n, d]; first [B] the column of each text's first token, before which is padding; image [B, n] bool.
    """
    cfg, keys = cfg or Config(), torch.arange(w.shape[-1], device=w.device).expand(len(w), -1)
    sinks = sinks_of(states, own_dimensions(states, first, cfg), cfg)
    after = after_image(image, keys, keys[:, -w.shape[2] :])
    return redistributed(at_least_float32(w), sinks, image, after, cfg).to(w.dtype), sinks


def acts(at: Steered, cfg: Config) -> bool:
    return cfg.p != 1 and cfg.first <= at.layer < at.layers - cfg.spared


def weights(at: Steered, w: Tensor, cfg: Config) -> Tensor:
    """States are of new tokens alone, so D and the sinks so far, by column, stand in notes."""
    notes, image, states = at.notes, at.role("image"), present(at.states, "the layer's input")
    old = int(at.keys.max()) + 1 - states.shape[1]
    if "first" not in notes:
        require(old == 0, "this cache began with the method attached", tokens_before=old)
        notes["first"] = (at.received() > 0).any(1).int().argmax(-1)  # padding receives nothing
        notes["D"] = own_dimensions(states, notes["first"], cfg)
        notes["sinks"] = image[:, :0]
    notes["sinks"] = torch.cat([notes["sinks"][:, :old], sinks_of(states, notes["D"], cfg)], 1)
    sinks = notes["sinks"].gather(1, at.keys.clamp(min=0)) & (at.keys >= 0)
    after = after_image(image, at.keys, at.rows + notes["first"][:, None])
    return redistributed(at_least_float32(w), sinks, image, after, cfg).to(w.dtype)


def reference(
    w: Tensor, states: Tensor, first: Tensor, image: Tensor, cfg: Config | None = None
) -> tuple[Tensor, Tensor]:
    """By the definition, row by row and number by number."""
    cfg, (B, H, R, n) = cfg or Config(), w.shape
    changed, sinks = w.double().clone(), torch.zeros(B, n, dtype=torch.bool)
    for b in range(B):
        big = [large(h, cfg) for h in states[b].double().tolist()]
        D = {*cfg.dims} if cfg.dims else big[int(first[b])]
        S = [t for t in range(n) if big[t] & D]
        sinks[b, S] = True
        picture = [t for t in range(n) if image[b, t]]
        for h, i in ((h, i) for h in range(H) for i in range(R) if n - R + i > max(picture, default=-1)):
            A = w[b, h, i].double().tolist()
            m, held = (math.fsum(A[j] for j in picture if j in some) for some in (range(n), S))
            freed, others = math.fsum((1 - cfg.p) * A[s] for s in S), [j for j in picture if j not in S]
            rest = math.fsum(A[j] for j in others)
            if m < cfg.mass or held > cfg.rho * m or rest == 0:
                continue
            for j in range(n):
                part = A[j] * freed / rest if j in others else 0.0
                changed[b, h, i, j] = cfg.p * A[j] if j in S else A[j] + part
    return changed, sinks


def large(h: list[float], cfg: Config) -> set[int]:
    size = math.sqrt(math.fsum(x * x for x in h) / len(h) + EPS)
    return {d for d, x in enumerate(h) if abs(x) / size * math.sqrt(cfg.width / len(h)) > cfg.tau}


def cases(seed: int) -> Iterable[tuple]:
    """Left padding; a decode row, dimensions given; float32, no sinks; one token; sinks alone; p 1; no image."""
    g = torch.Generator().manual_seed(seed)

    def drawn(B: int, R: int, n: int, sinks: list[int], dtype: torch.dtype = torch.float64) -> list[Tensor]:
        w = (2 * torch.randn(B, 3, R, n, generator=g, dtype=dtype)).softmax(-1)
        states = torch.randn(B, n, 64, generator=g, dtype=dtype)
        states[:, sinks, 5] = 40.0
        states[:, 1 % n, 9] = -50.0  # massive where the first token is not
        image = torch.zeros(B, n, dtype=torch.bool)
        image[:, n // 4 : 3 * n // 4] = True
        return [w, states, torch.zeros(B, dtype=torch.long), image]

    w, states, _, image = drawn(2, 12, 12, [0, 2, 4, 5])
    yield w, states, torch.tensor([0, 2]), image
    yield *drawn(2, 1, 12, [0, 4]), Config(dims=(9, 5), rho=1.0, p=0.0)
    yield tuple(drawn(1, 4, 8, [], torch.float32))
    w, states, first, _ = drawn(1, 1, 1, [0])
    yield w, states, first, torch.ones(1, 1, dtype=torch.bool)
    yield *drawn(1, 3, 8, [0, 2, 3, 4, 5]), Config(rho=1.0, mass=0.0)
    yield *drawn(2, 12, 12, [0, 4]), Config(p=1.0)
    yield *drawn(1, 3, 8, [0, 3])[:3], torch.zeros(1, 8, dtype=torch.bool), Config(mass=0.0)


METHOD = SteeringPage(
    config=Config,
    measure=measure,
    reference=reference,
    cases=cases,
    acts=acts,
    weights=weights,
    needs_image=True,
    test_settings=({"first": 0, "spared": 0, "tau": 12.0, "mass": 0.0, "rho": 1.0},),
    card=Card(
        title="VAR",
        paper="See What You Are Told: Visual Attention Sink in Large Multimodal Models",
        year=2025,
        idea="tokens of massive activations give part of their weight to the rest of the image, in heads that look "
        "at it",
        cost="a norm of each new token's state and four sums of the weights, at each layer",
        needs=("vlm", "massive activations"),
        lineage=("massive activations", "act_attention_calibration"),
        neutral={"p": 1.0},
        caveat="the paper's dimensions are fixed for a language model, here they are what is massive in each text's "
        "first token unless `dims` names them; its threshold is 20 at 4,096 and at 5,120 dimensions, here it "
        "scales with the root of the width, so that 13B needs width=5120. Where the image has no sink the "
        "code changes no head, the equations and this page do. The code's flag for the last layer has no "
        "effect, so it changes that layer too; it finds sinks in the prompt alone, here generated tokens may "
        "be sinks. A model without massive activations, as small ones are, has no sinks and is left as it is; "
        "below some hundred dimensions the scaled threshold is within what ordinary states reach",
    ),
)
