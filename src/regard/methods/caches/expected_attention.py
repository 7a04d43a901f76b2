"""Expected Attention: a token stays for the attention that queries yet to come are expected to pay it, times its value.

    q ~ N(μ, Σ)                                    mean and covariance of the prompt's queries, not rotated
    μ' = R μ,  Σ' = R Σ Rᵀ                         R the mean of the rotations to the next T positions
    z_j = exp( k_j·μ'/√D + k_jᵀ Σ' k_j / 2D )      = E exp(q·k_j/√D) of a Gaussian query
    s_j = (z_j / Σ_i z_i + ε) |v_j|_2              averaged over the query heads that share a key, before ε

    keep the first tokens and, by head, the budget's best s, after the prompt

where future queries cannot be asked but resemble those of the past, which are nearly normal by head: the expectation
has a closed form, and no attention weight is computed.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core import Card, require
from regard.kinds.cache import CachePage
from regard.ops import Budget, View, at_least_float32


@dataclass(frozen=True)
class Config:
    budget: Budget | int | float | str | None = None  # None: half of the text
    future: int = 512  # T, positions that come next
    sinks: int = 4  # first tokens, which stay, and whose queries and keys are left out
    epsilon: float = 0.01  # added to every token's share of attention

    def __post_init__(self) -> None:
        require(self.future >= 1, "future >= 1", future=self.future)
        require(
            self.sinks >= 0 and self.epsilon >= 0,
            "sinks >= 0, epsilon >= 0",
            sinks=self.sinks,
            epsilon=self.epsilon,
        )


def statistics(view: View, sinks: int) -> tuple[Tensor, Tensor]:
    """(mean [B, H, 1, D], covariance [B, H, D, D]) of this turn's queries, those of the first tokens left out."""
    q = at_least_float32(view.unrotated_queries())
    place = torch.arange(view.seen - view.new, view.seen, device=q.device)[None]
    place = place if view.order is None else view.order[:, -view.new :]
    asking = view.asking()
    counted = (place >= sinks) if asking is None else (place >= sinks) & asking
    counted = counted[:, None, :, None].to(q.dtype)
    count = counted.sum(2, keepdim=True).clamp(min=1)
    mean = (q * counted).sum(2, keepdim=True) / count
    apart = (q - mean) * counted
    return mean, apart.mT @ apart / count


def future(view: View, positions: int, like: Tensor) -> Tensor:
    """[B, 1, D, D] what becomes of each basis vector, on average, when it is rotated to the next positions."""
    eye = torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)[None, None]
    if view.rotate is None:
        return eye
    # Σ R(t) over 0 ... m-1, doubled: the second half is the first one, rotated m further
    by = torch.ones(1, 1, eye.shape[-1], dtype=torch.long, device=like.device)
    total, m = eye, 1
    for bit in bin(positions)[3:]:
        total, m = total + view.rotate(total, by * m), 2 * m
        if bit == "1":
            total, m = eye + view.rotate(total, by), m + 1
    following = view.position_at(view.length()[:, None] - 1) + 1  # [1|B, 1]
    return view.rotate((total / positions).expand(len(following), -1, -1, -1), by * following[..., None])


def score(view: View, cfg: Config) -> Tensor:
    """[B, G, n]: expected share of attention times the length of the value."""
    mean, covariance = statistics(view, cfg.sinks)
    rotation = future(view, cfg.future, mean)
    mean, covariance = mean @ rotation, rotation.mT @ covariance @ rotation
    k = at_least_float32(view.k).repeat_interleave(mean.shape[1] // view.groups, 1)
    spread = ((k @ covariance) * k).sum(-1)
    exponent = (k @ mean.mT)[..., 0] * view.scale + spread * view.scale**2 / 2  # [B, H, n]
    counted = view.hold() & (view.rank() >= cfg.sinks)
    counted = counted.repeat_interleave(exponent.shape[1] // counted.shape[1], 1)
    share = exponent.masked_fill(~counted, -torch.inf).softmax(-1).nan_to_num(0.0)
    share = view.by_cache_head(share) * view.groups / view.q.shape[1]
    return (share + cfg.epsilon) * at_least_float32(view.v).norm(dim=-1)


def always(view: View, cfg: Config) -> Tensor:
    """The newest token, and as many of the first ones as the budget has room for."""
    first = (view.budget - 1).clamp(max=cfg.sinks)[:, None, None]
    return (view.age() < 1) | (view.rank() < first)


METHOD = CachePage(
    config=Config,
    score=score,
    always=always,
    rotates=True,
    phase="prefill",
    budget=lambda cfg: 0.5,
    patterns=("causal_self",),
    card=Card(
        title="Expected Attention",
        paper="Expected Attention: KV Cache Compression by Estimating Attention from Future Queries Distribution "
        "(arXiv:2510.00636)",
        year=2025,
        idea="past queries give a normal distribution of future ones, under which the attention to come has a formula",
        cost="one D x D product for each stored key and query head, after the prompt; no weights",
        state="budget tokens per head of the prompt, and all that is generated",
        needs=("qkv", "decoder-lm"),
        lineage=("snapkv",),
        neutral={"budget": 1.0},
        caveat="epsilon is that of kvpress's evaluation; its class has 0. Statistics are those of the latest turn's "
        "queries alone, so a short question has few. The newest token stays in any case. Generated tokens all stay; "
        "the paper compresses them too, some hundreds at a time. Softcaps and biases of scores are left out",
    ),
)
