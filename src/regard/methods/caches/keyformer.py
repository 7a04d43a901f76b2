"""Keyformer: heavy hitters by scores with Gumbel noise, under a temperature that rises as the text goes on.

    F_j = Σ_t softmax((q_t K / √D + ζ_t) / τ_t)_j        summed over the steps while j was stored, by cache head
    τ_t = τ_init in a prompt, then τ_init + (τ_end - τ_init) · i/T in step i of decoding, at most τ_end
    keep the recent part of the budget, and of the others those with the largest F

where each ζ_tj is drawn from the standard Gumbel distribution. Once tokens are gone, a softmax over the rest is more
uneven than it was over all, and tokens that looked weak so far never come back; noise and temperature even the scores
out, the more the more tokens are gone. A draw follows from seed, layer, query head and the places of both tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core import Card, require
from regard.kinds.cache import CachePage
from regard.ops import Budget, View, at_least_float32

BITS, STEP = 0xFFFFFFFF, 2.0**-23


@dataclass(frozen=True)
class Config:
    budget: Budget | int | float | str | None = None  # recent and key tokens together; None: 0.6
    recent: float = 0.3  # share of the budget for the most recent tokens
    tau_init: float = 1.0  # τ_init, of a prompt; larger evens the weights out
    tau_end: float = 2.0  # τ_end, reached after `steps` steps of decoding, and kept
    steps: int = 100  # T, of decoding, over which the temperature rises
    seed: int = 0  # of the noise

    def __post_init__(self) -> None:
        require(0 <= self.recent < 1, "0 <= recent < 1", recent=self.recent)
        ordered = 0 < self.tau_init <= self.tau_end
        require(ordered, "0 < tau_init <= tau_end", tau_init=self.tau_init, tau_end=self.tau_end)
        require(self.steps >= 1, "steps >= 1", steps=self.steps)
        require(self.seed >= 0, "seed >= 0", seed=self.seed)


def mixed(x: Tensor, salt: int | Tensor) -> Tensor:
    """32 bits of each number of x and the salt, as good as at random."""
    x = (x + salt * 0x9E3779B1) & BITS
    x = ((x ^ (x >> 16)) * 0x045D9F3B) & BITS
    x = ((x ^ (x >> 16)) * 0x045D9F3B) & BITS
    return x ^ (x >> 16)


def drawn(view: View, rows: slice, last: int, cfg: Config) -> Tensor:
    """[1|B, H, rows, last] draws, even between 0 and 1, for these queries and the tokens in the first slots."""
    own = torch.arange(view.seen - view.new, view.seen, device=view.q.device)[None]
    own = (own if view.order is None else view.order[:, -view.new :])[:, None, rows]  # [1|B, 1, rows]
    share = view.q.shape[1] // view.groups
    heads = own.new_tensor([g * share + i for g in view.heads or range(view.groups) for i in range(share)])
    salt = mixed(mixed(heads, view.layer + 1), cfg.seed)[:, None]
    query, key = (x.to(torch.int32) for x in (mixed(own, salt), mixed(view.rank()[..., :last] + 1, 0)))
    key = key if key.shape[1] == 1 else key.repeat_interleave(share, 1)
    # both are 32 good bits; a product parts what is left in common between pairs, and its highest bits are the best
    draws = (query[..., None] ^ key[:, :, None]).mul_(0x045D9F3B).bitwise_right_shift_(9)
    # whole numbers from -2^22 on: half a step above each and one half more is exact, above 0 and below 1
    return draws.to(at_least_float32(view.q).dtype).mul_(STEP).add_(0.5 + STEP / 2)


def noisy(view: View, rows: slice, tau: Tensor, cfg: Config) -> Tensor:
    """[B, H, rows, n] weights with noise and temperature."""
    noise = drawn(view, rows, view.stored, cfg).log_().neg_().log_().neg_()
    return view.normalise((noise + view.scores(rows)) / tau, rows)


def reweighed(view: View, weights: Tensor, rows: slice, cfg: Config) -> Tensor:
    """The same where τ is 1, from the weights without noise: exp ζ = -1 / log u, and a row's sum is 1 again."""
    logs = drawn(view, rows, weights.shape[-1], cfg).log_()
    weights = torch.div(weights, logs, out=logs if len(logs) == len(weights) else None)
    total = weights.sum(-1, keepdim=True).clamp(max=-torch.finfo(weights.dtype).tiny)
    return weights.div_(total)


def received(view: View, tau: Tensor, cfg: Config) -> Tensor:
    """[B, G, n] what each stored token is given by this step's queries, with noise and temperature."""
    if view.sinks is None and bool((tau == 1).all()):
        return view.received(through=lambda weights, rows: reweighed(view, weights, rows, cfg))
    return view.received(through=lambda weights, rows: noisy(view.upto(weights.shape[-1]), rows, tau, cfg))


def observe(view: View, cfg: Config) -> None:
    fresh = view.fresh().expand(len(view.q))
    before = view.memory.get("steps", torch.full_like(fresh, -1))
    steps = view.memory["steps"] = torch.where(
        fresh > 1, 0, before + fresh
    )  # [B] of decoding, since the prompt
    part = (steps.clamp(min=0) / cfg.steps).clamp(max=1)[:, None, None, None]
    tau = cfg.tau_init + (cfg.tau_end - cfg.tau_init) * part
    view.notes("received").add_(received(view, tau, cfg))


def score(view: View, cfg: Config) -> Tensor:
    return view.notes("received")


def always(view: View, cfg: Config) -> Tensor:
    return view.age() < (view.budget.double() * cfg.recent - 1e-9).ceil().clamp(min=1)[:, None, None]


METHOD = CachePage(
    config=Config,
    observe=observe,
    score=score,
    always=always,
    budget=lambda cfg: 0.6,
    patterns=("causal_self",),
    test_settings=({"budget": 8, "steps": 4},),
    card=Card(
        title="Keyformer",
        paper="Keyformer: KV Cache Reduction through Key Tokens Selection for Efficient Generative Inference "
        "(MLSys 2024)",
        year=2024,
        idea="accumulated Gumbel softmax scores under a rising temperature choose the key tokens beside the recent",
        cost="explicit weights and as many draws at every step, in blocks of rows",
        state="budget tokens per head, and one number each",
        needs=("decoder-lm",),
        lineage=("h2o",),
        neutral={"budget": 1.0},
        caveat="T is the length of the answer in the paper, which nobody knows beforehand: released code raises τ by "
        "0.01 a step without an end. Its budget is a share of the prompt and stays so; a share here is one of the text "
        "so far. It adds up the rows of a batch and draws anew at every run; grouped heads, which its models do not "
        "have, are summed here",
    ),
)
