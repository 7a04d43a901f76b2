"""Dual cross-attention: an image attends to another one beside itself, and its most telling places to all of it.

    PWCA   o_i = softmax_j(q_i·k_j / √D) v_j       j over the keys of image b and those of image b + partner
    GLCA   o_i = the same over image b alone       i over the few places that the class token relies on most
    S      = Π_l (Ā_l + 1)/2                       attention rollout: Ā_l the mean of heads, the last layer on the left

Pair-wise cross-attention is a regulariser: weights are shared with self-attention, the label stays that of image b, and
a second image puts keys and values in the way, so that a query has to find its own. The two images are rows of one
batch, and with partner = 0 a row is its own second image: every key stands there twice, which changes nothing, so
that is self-attention, the form for inference. Global-local cross-attention asks for few queries only: `local_places`
names them from a rollout, and the caller gives their queries beside the keys of all places (cross, partner = 0).

Worked by hand: two images of one token each, all scores 0, values 2 and 6. Each of them attends half to itself and half
to the other: 4 and 4. In a batch of three, values 2, 6 and 20, the second image of a row is the next one: 4, 13, 11.

>>> import torch
>>> q, v = torch.zeros(3, 1, 1, 1), torch.tensor([2.0, 6.0, 20.0]).view(3, 1, 1, 1)
>>> reference(q, q, v, Config(), Call("self"))[0].flatten().tolist()
[4.0, 13.0, 11.0]
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core import Card, K, Out, Q, V, require
from regard.core.call import Call
from regard.kinds.mechanism import Mechanism
from regard.ops import best, carried, exact, heads_of, quotient, softmax_attention


@dataclass(frozen=True)
class Config:
    partner: int = 1  # how many rows further in the batch the second image stands; 0: none, as at inference
    scale: float | None = None  # None: D ** -0.5


def reference(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, None]:
    """Image by image."""
    images, heads, _, width = q.shape
    q_h, k_h, v_h = exact(q, heads_of(k, heads), heads_of(v, heads))
    there = torch.ones_like(k_h[..., 0], dtype=torch.bool)
    there = there if call.key_mask is None else there & call.key_mask
    out = []
    for b in range(images):
        pair = [b, (b + cfg.partner) % images]
        # an image of which nothing is there has no other one beside it
        seen = torch.cat([there[b], there[pair[1]] & there[b].any(-1, keepdim=True)], -1)  # [H, 2M]
        keys, values = (
            torch.cat([torch.where(there[i, ..., None], t[i], 0.0) for i in pair], 1) for t in (k_h, v_h)
        )
        s = torch.einsum("hnd,hmd->hnm", q_h[b], keys) * (width**-0.5 if cfg.scale is None else cfg.scale)
        s = s.masked_fill(~seen[:, None], -torch.inf)
        # cancels; keeps the exponentials below 1
        top = s.amax(-1, keepdim=True).detach()
        e = (s - top.masked_fill(top == -torch.inf, 0)).exp()
        out.append(quotient(e @ values, e.sum(-1, keepdim=True)))
    return torch.stack(out).to(v.dtype), None


def fast(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, None]:
    scale = q.shape[3] ** -0.5 if cfg.scale is None else cfg.scale
    k, v, _ = carried(k, v, call)
    seen, shift = call.key_mask, -(cfg.partner % q.shape[0])
    if shift:
        k, v = (torch.cat([t, t.roll(shift, 0)], 2) for t in (k, v))
    if shift and seen is not None:
        seen = seen.expand(q.shape[0], -1, -1)
        seen = torch.cat([seen, seen.roll(shift, 0) & seen.any(-1, keepdim=True)], 2)
    mask = None if seen is None else seen[:, :, None]
    return softmax_attention(q, k, v, scale=scale, mask=mask).to(v.dtype), None


def rollout(attentions: Sequence[Tensor]) -> Tensor:
    """S [B, N, N], how much of each place of the input reaches a place; of weights [B, H, N, N], the first layer first.

    >>> rollout([torch.tensor([[[[0.0, 1.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]]]])])
    tensor([[[0.7500, 0.2500],
             [0.0000, 1.0000]]])
    """
    require(len(attentions) >= 1, "one layer or more", layers=len(attentions))
    first = attentions[0]
    own = torch.eye(first.shape[-1], dtype=first.dtype, device=first.device)
    sums = own.expand(len(first), -1, -1)
    for a in attentions:
        sums = (a.mean(1) + own) / 2 @ sums
    return sums


def local_places(sums: Tensor, share: float = 0.1) -> Tensor:
    """[B, 1 + R] places that ask in GLCA: the class token, at 0, and those that reach it most, in order of place.

    R is a share of the places beside it, rounded up; ties go to the lower place. `sums` are of `rollout`.

    >>> local_places(torch.tensor([[[0.4, 0.1, 0.3, 0.2]] * 4]), 0.5)
    tensor([[0, 2, 3]])
    """
    require(0 < share <= 1, "0 < share <= 1", share=share)
    reached = sums[:, 0, 1:]
    chosen = best(reached, -int(-share * reached.shape[1] // 1))
    return torch.nn.functional.pad(chosen.nonzero()[:, 1].view(len(sums), -1) + 1, (1, 0))


def joined(losses: Tensor, weights: Tensor) -> Tensor:
    """The loss of branches [n] under learned log variances [n]: Σ (e^{-w} L + w) / 2.

    >>> joined(torch.tensor([2.0, 4.0]), torch.zeros(2))
    tensor(3.)
    """
    return ((-weights).exp() * losses + weights).sum() / 2


ORDER = "a second image has no place in the order of the first"
METHOD = Mechanism(
    config=Config,
    reference=reference,
    fast=fast,
    patterns=("self", "cross"),
    unsupported=dict.fromkeys(("causal_self", "causal_cross"), ORDER),
    test_settings=({"partner": 0, "scale": 0.4}, {"partner": -2}),
    mixes_rows=True,
    exempt={"batch": "the second image of a row is another row of its batch"},
    card=Card(
        title="Dual cross-attention (DCAL)",
        paper=(
            "Dual Cross-Attention Learning for Fine-Grained Visual Categorization and Object Re-Identification "
            "(2022), arXiv:2205.02151"
        ),
        year=2022,
        idea="while training, queries see the keys and values of a second image too; telling places ask once more",
        cost="O(2·N·M·(D + E)) time with a second image, O(N·M·(D + E)) without",
        state="none: whole images at once",
        needs=("qkv", "vit"),
        lineage=("softmax", "attention rollout"),
        neutral={"partner": 0},
        caveat=(
            "a page has one batch: the second image of row b is row b + partner, around the end, where the paper draws "
            "pairs; shuffle the batch. With one row, as each of packed texts, it is self-attention; evaluate with "
            "partner=0, where rows do not touch. Hidden keys are hidden in both roles; an image of which nothing is "
            "there gives zeros. No code was released. GLCA is this page with partner=0 in cross, its queries those of "
            "`local_places` (share 0.1 for fine-grained recognition, 0.3 for re-identification), with projections of "
            "its own in the paper; that the class token asks too is read from its classifying both branches. `joined` "
            "is the paper's loss of the three branches"
        ),
    ),
)
