"""Attention residuals: each sublayer reads a softmax mixture of all outputs before it, in the place of their sum.

    h_l = Σ_{i<l} α_i v_i,   α = softmax_i(w_l · RMSNorm(v_i))      v_0 the embedding, v_i the output of sublayer i
    block = S:  the v_i are v_0, the sums of finished blocks of S sublayers, and the sum so far of the block at work

The axis of tokens is depth here: query l - 1 is the pseudo-query w_l, one learned vector for all tokens and zero at the
start; keys and values are both v_0 .. v_{l-1}; the positions of a text stand in the batch. So causal_self is what
sublayers do one after the other, and its state is what a token carries up. Keys are divided by their root mean square,
values are not: a large output does not win by its size, and what is read keeps it. Right after a block has ended there
is no sum so far. With S = 1 every output stands for itself.

Worked by hand: sources 1, 2, 6. Queries of zero take means: 1, 3/2, 3; in blocks of two the last one reads 1 and 2 + 6,
so 9/2. Sources 4 and -4 have keys 1 and -1: a query of log(3)/2 weighs them 3 to 1 and reads 2.

>>> v, zero = torch.tensor([1.0, 2.0, 6.0]).view(1, 1, 3, 1), torch.zeros(1, 1, 3, 1)
>>> [reference(zero, v, v, Config(block=s), Call())[0].flatten().tolist() for s in (1, 2)]
[[1.0, 1.5, 3.0], [1.0, 1.5, 4.5]]
>>> v, w = torch.tensor([4.0, -4.0]).view(1, 1, 2, 1), torch.full((1, 1, 1, 1), 3.0).log() / 2
>>> round(reference(w, v, v, Config(), Call())[0].item(), 3)
2.0
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core import Card, K, Out, Q, V, require
from regard.core.call import Call
from regard.kinds.mechanism import Mechanism
from regard.ops import (
    at_least_float32,
    exact,
    explicit,
    heads_of,
    lower_right,
    per_query_head,
    quotient,
    recurrence,
    rounded,
    shown,
)

ONE_WAY = "the axis is depth: a sublayer reads outputs of sublayers before it, and there are no others to ask"


@dataclass(frozen=True)
class Config:
    block: int = 1  # sublayers whose outputs are summed; 1: none are (full attention residuals)
    eps: float = 1e-5  # added to the mean square of a key, in its norm

    def __post_init__(self) -> None:
        require(self.block >= 1, "block >= 1", block=self.block)
        require(self.eps > 0, "eps > 0", eps=self.eps)


def entries(n: int, cfg: Config) -> int:
    """What is read after n sources: the first one, and a sum for every block that has begun."""
    return min(n, 1) + -(-max(n - 1, 0) // cfg.block)


def reference(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, tuple]:
    b, heads, n, m = len(q), q.shape[1], q.shape[2], k.shape[2]
    q_h, k_h, v_h = exact(q, heads_of(k, heads), heads_of(v, heads))
    there = torch.ones(b, heads, m, dtype=torch.bool, device=q.device)
    there = there if call.key_mask is None else there & call.key_mask
    count = torch.zeros(b, heads, dtype=torch.long, device=q.device)
    sums = [k_h.new_zeros(b, heads, 0, k.shape[3]), v_h.new_zeros(b, heads, 0, v.shape[3])]
    if call.initial_state is not None:
        *sums, before = call.initial_state
        count, there = before.sum(-1), torch.cat([before, there], -1)
    room = entries(there.shape[2], cfg)
    sums = [torch.cat([x.double(), x.new_zeros(b, heads, room - x.shape[2], x.shape[3])], 2) for x in sums]

    def write(state: tuple, t: int) -> tuple:
        k_sums, v_sums, count = state
        here = newest(count + 1, room, cfg)[..., None].double()
        return k_sums + here * k_h[:, :, t, None], v_sums + here * v_h[:, :, t, None], count + 1

    def read(state: tuple, i: int) -> Tensor:
        k_sums, v_sums, count = state
        keys = k_sums / (k_sums.square().mean(-1, keepdim=True) + cfg.eps).sqrt()
        s = torch.einsum("bhd,bhsd->bhs", q_h[:, :, i], keys)
        begun = newest(count, room, cfg).flip(-1).cumsum(-1).flip(-1).bool() & (count > 0)[..., None]
        s = s.masked_fill(~begun, -torch.inf)
        # cancels; keeps the exponentials below 1
        top = s.amax(-1, keepdim=True).detach()
        e = (s - top.masked_fill(top == -torch.inf, 0)).exp()
        return quotient(torch.einsum("bhs,bhse->bhe", e, v_sums), e.sum(-1, keepdim=True))

    out, (k_sums, v_sums, _) = recurrence((*sums, count), write, read, n, m, call)
    out, sums = rounded(out, (k_sums, v_sums), v)
    return out, (*sums, there)


def newest(count: Tensor, room: int, cfg: Config) -> Tensor:
    """[B, H, room] bool: the entry that the last of `count` sources belongs to; the first source is one by itself."""
    at = torch.where(count < 2, 0, 1 + (count - 2) // cfg.block)
    return torch.arange(room, device=count.device) == at[..., None]


def fast(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, tuple]:
    heads, n, m, size, state = q.shape[1], q.shape[2], k.shape[2], cfg.block, call.initial_state
    there = torch.ones(len(q), heads, m, dtype=torch.bool, device=q.device)
    there = there if call.key_mask is None else there & call.key_mask
    there = there if state is None else torch.cat([state[2], there], -1)
    count = there.cumsum(-1)[..., -m:]
    at = ((count + (size - 2)) // size).clamp(min=0)  # [B, H, M], the entry of each source
    asked, room = at[:, :, m - n :, None], (there.shape[2] + 2 * size - 2) // size
    # whether an entry takes more after a query has read it
    grows = size > 1 and n > 1

    def summed(t: Tensor, old: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(entries [B, H, room, D], what each query's own one holds when it asks [B, H, N, D] where they grow)"""
        new = shown(at_least_float32(per_query_head(t, heads)).expand(-1, heads, -1, -1), call.key_mask)
        was = new.new_zeros(*new.shape[:2], room, new.shape[3])
        if old is not None:
            was = torch.cat([old.to(new.dtype), was[:, :, old.shape[2] :]], 2)
        total = was.scatter_add(2, at[..., None].expand_as(new), new)
        if not grows:
            return total, None
        along = (asked == at[:, :, None]) & lower_right(n, m, q.device)
        return total, was.gather(2, asked.expand(-1, -1, -1, new.shape[3])) + along.to(new.dtype) @ new

    one = k is v and (state is None or state[0] is state[1])
    keys, key = summed(k, None if state is None else state[0])
    values, value = (keys, key) if one else summed(v, None if state is None else state[1])
    wide, place = q.to(keys.dtype), torch.arange(room, device=q.device)
    s = (wide @ keys.mT) * inverse_rms(keys, cfg.eps).mT
    s = s.masked_fill(place >= asked if grows else place > asked, -torch.inf)
    if key is not None:
        s = torch.cat([s, (wide * key).sum(-1, keepdim=True) * inverse_rms(key, cfg.eps)], -1)
    weights = s.softmax(-1)
    out = weights[..., :room] @ values
    out = out if value is None else out + weights[..., room:] * value
    return out.masked_fill(count[:, :, m - n :, None] == 0, 0).to(v.dtype), (keys, values, there)


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """[..., 1]"""
    return (x.square().mean(-1, keepdim=True) + eps).rsqrt()


def full(q: Q, k: K, v: V, call: Call) -> Out:
    """Softmax attention of scale 1 over keys of root mean square 1: what is left where no outputs are summed."""
    keys = k / (k.square().mean(-1, keepdim=True) + Config.eps).sqrt()
    return explicit(q, keys, v, scale=1.0, mask=lower_right(q.shape[2], k.shape[2]))


METHOD = Mechanism(
    config=Config,
    reference=reference,
    fast=fast,
    patterns=("causal_self",),
    unsupported={"self": ONE_WAY, "cross": ONE_WAY, "causal_cross": ONE_WAY},
    test_settings=({"block": 2}, {"block": 3}, {"block": 8}),
    order_aware=True,
    neutral_base=full,
    card=Card(
        title="Attention residuals",
        paper="Attention Residuals (arXiv:2603.15031)",
        year=2026,
        idea="a learned query per sublayer mixes the outputs of all sublayers before it by a softmax over depth",
        cost="O(L²·D) time for L sublayers, O(L·(L/S)·D) in blocks of S",
        state="L + 1 outputs of D numbers for a token at work, 1 + L/S in blocks of S; nothing between tokens",
        needs=("decoder-lm",),
        lineage=("softmax",),
        neutral={"block": 1},
        caveat=(
            "the released pseudocode counts a block in layers, so one sublayer alone cannot be one; it closes a block "
            "after the read before attention, which reads the same. Here blocks are counted in sublayers, as in the "
            "paper's equations. Its norm of the keys has a weight at each read, which a query takes in (w times the "
            "weight). regard.nn puts it into a model by residual='attention', with a last read before the output's "
            "norm. The state holds sums, so a mask is of the new sources only"
        ),
    ),
)
