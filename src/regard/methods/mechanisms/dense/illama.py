"""iLLaMA's soft mask: attention over all tokens whose weights on later ones are turned down, from one to zero.

    w_ij = softmax_j(q_i·k_j / √D)             over all keys that i may see, later ones too
    S    = α·1 + (1 - α)·C                     C_ij = 1 where j ≤ i, else 0
    o_i  = Σ_j S_ij w_ij v_j                   not divided by what is left: below α = 1 rows sum to less than one

A decoder's causal mask on image patches fails if it is there from the first step; α goes from 1 (an encoder) to 0 in
the first part of training, and the class token stands last, where it sees every patch. The mask acts after the
softmax: at α = 0 too the sum under w_ij runs over all keys, so a later key that fits well makes an earlier row small.

Worked by hand: two equal keys with values 1 and 3. Each weight is 1/2, so at α = 1/2 the first row is 1/2 · 1 + 1/4 · 3
and the second 1/2 · 1 + 1/2 · 3.

>>> import torch
>>> q, v = torch.zeros(1, 1, 2, 1), torch.tensor([1.0, 3.0]).view(1, 1, 2, 1)
>>> reference(q, q, v, Config(alpha=0.5), Call("self"))[0].flatten()
tensor([1.2500, 2.0000])
>>> schedule(0, 100), schedule(25, 100), schedule(80, 100), schedule(30, 100, shape="constant")
(1.0, 0.5, 0.0, 1.0)
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core import Card, K, Out, Q, V, require
from regard.core.call import Call
from regard.kinds.mechanism import Mechanism
from regard.ops import carried, exact, heads_of, masked_softmax, mix, quotient, row_blocks, scores, visible
from regard.ops.softmax import fused

DENOMINATOR = (
    "later keys stay in the sum under the softmax at every α; without them it is softmax under a causal mask"
)
TWO_TEXTS = "the keys of another text are not before or after a query"


@dataclass(frozen=True)
class Config:
    alpha: float = 0.0  # what is left of the weights on later keys; the paper's value at the end of training

    def __post_init__(self) -> None:
        require(0 <= self.alpha <= 1, "0 <= alpha <= 1", alpha=self.alpha)


def schedule(step: int, steps: int, cutoff: float = 0.5, shape: str = "linear") -> float:
    """α at a step: from 1 to 0 in a straight line over this share of the steps, or 1 until then and 0 from there on."""
    done = step / (cutoff * steps)
    return max(0.0, 1.0 - done) if shape == "linear" else float(done < 1)


def reference(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, None]:
    k, v, _ = carried(k, v, call)
    q_h, k_h, v_h = exact(q, heads_of(k, q.shape[1]), heads_of(v, q.shape[1]))
    s = torch.einsum("bhnd,bhmd->bhnm", q_h, k_h) * q.shape[3] ** -0.5
    for mask in (call.pair_mask, None if call.key_mask is None else call.key_mask[:, :, None]):
        s = s if mask is None else s.masked_fill(~mask, -torch.inf)
    # cancels; keeps the exponentials below 1
    top = s.amax(-1, keepdim=True).detach()
    e = (s - top.masked_fill(top == -torch.inf, 0)).exp()
    soft = cfg.alpha + (1 - cfg.alpha) * torch.ones_like(s[0, 0]).tril()
    return (soft * quotient(e, e.sum(-1, keepdim=True)) @ v_h).to(v.dtype), None


def fast(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, None]:
    """Blocks of rows; at α = 1 torch's own attention."""
    k, v, _ = carried(k, v, call)
    n, scale = q.shape[2], q.shape[3] ** -0.5
    mask = visible(call, n, n, q.device)
    if cfg.alpha == 1:
        return fused(q, k, v, scale=scale, mask=mask).to(v.dtype), None
    parts, place = [], torch.arange(n, device=q.device)
    for rows in row_blocks(n, q.shape[0] * q.shape[1] * n):
        seen = mask if mask is None or mask.shape[2] == 1 else mask[:, :, rows]
        weights = masked_softmax(scores(q[:, :, rows], k, scale), seen)
        later = place > place[rows, None]
        parts.append(mix(turned_down(weights, later, cfg.alpha), v))
    return torch.cat(parts, dim=2), None


def turned_down(weights: Tensor, later: Tensor, alpha: float) -> Tensor:
    return weights.masked_fill(later, 0) if alpha == 0 else torch.where(later, alpha * weights, weights)


METHOD = Mechanism(
    config=Config,
    reference=reference,
    fast=fast,
    patterns=("self",),
    unsupported={"causal_self": DENOMINATOR, "cross": TWO_TEXTS, "causal_cross": TWO_TEXTS},
    pair_masks=True,
    test_settings=({"alpha": 0.3}, {"alpha": 1.0}),
    card=Card(
        title="Soft causal mask (iLLaMA)",
        paper="Adapting LLaMA Decoder to Vision Transformer, arXiv:2404.06773",
        year=2024,
        idea="weights on later patches are multiplied by α, which training takes from 1 to 0",
        cost="O(N²·(D + E)) time, with weights written out in blocks of rows where α < 1",
        state="none: it is no causal form",
        needs=("qkv",),
        lineage=("softmax", "causal"),
        neutral={"alpha": 1.0},
        caveat=(
            "a mechanism and not a mask page: a mask says who sees whom before the softmax, this one multiplies "
            "afterwards and leaves the sum, in the paper and its code alike. Its hard limit as a mask is softmax with "
            "the page causal; α = 0 here is not that, since later keys are in the sum, so that no cache decodes it "
            "and a class token that stands first still hears, through the sum, of the patches that it does not see. "
            "The class token last is a matter of the model; so are RMSNorm, SwiGLU, and positions that are both "
            "learned and rotary. The released schedules are linear or constant over the first 25 or 50 epochs"
        ),
    ),
)
