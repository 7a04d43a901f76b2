"""Softmax attention over blocks that are gathered: each block of queries reads the key blocks of its list, no others.

    o_i = Σ_j w_ij v_j,  w_ij = e^{s_ij - lse_i},  s_ij = scale · q_i·k_j  over the keys j of the blocks that i reads

Rows of work that are alike (schedule.py) go together: forward through torch's fused kernel, or two products where
these are faster, backward through products. Memory beyond the inputs is a few megabytes of gathered keys, whatever the
length. The sums lse come out too and are differentiable, so that what a list leaves out can be added: partial results
are merged by them.
"""

import itertools

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.ops.blocks.layout import Blocks
from regard.ops.blocks.schedule import Plan, Work, pieces, schedule
from regard.ops.machine import product_dtype
from regard.ops.precision import as_written
from regard.ops.softmax import at_least_float32
from regard.ops.transforms import transformed

# numbers of keys gathered at a time, and of scores between two products; change the speed, never the result
GATHERED, SCORED = 1 << 20, 1 << 20


def block_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, *, scale: float, causal: bool = False,
    start: Tensor | int = 0, length: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out [B, H, N, E] in v's dtype, lse [B, H, N] in float32 at least) of q [B, H, N, D], k and v [B, G, M, ...].

    causal   query i, at place start + i, sees keys up to that place      start   [B] or a number
    length   [B] keys that are there, the first ones; None: all           a query that sees nothing: 0 and -inf
    """
    if transformed(q, k, v):
        raise NotImplementedError(
            "block attention under torch.func, or a forward-mode derivative of it: ask for gradients"
        )
    batch, width = len(q), max(q.shape[-1], v.shape[-1])
    start = torch.as_tensor(start, device=q.device).long().expand(batch)
    length = start.new_full((batch,), k.shape[2]) if length is None else length.long().expand(batch)
    wide = [F.pad(t, (0, width - t.shape[-1])) if t.shape[-1] < width else t for t in (q, k, v)]
    out, lse = gathered(*wide, blocks.index, blocks.tile, blocks.tiles, start, length, blocks.block_q, blocks.block_k,
                        causal, scale)  # fmt: skip
    return out[..., : v.shape[-1]], lse


class Layout:
    """The tensors of a call, cut into blocks, as the kernel and its gradient read them."""

    def __init__(
        self, q: Tensor, k: Tensor, blocks: Blocks, start: Tensor, length: Tensor, causal: bool
    ) -> None:
        self.blocks, self.shape = blocks, q.shape
        self.rows, self.columns = blocks.index.shape[2], -(-k.shape[2] // blocks.block_k)
        plan = Plan(len(q), q.shape[1], k.shape[1], self.columns, start, length, causal)
        self.works = schedule(blocks, plan)

    def queries(self, x: Tensor) -> Tensor:
        """[B·H·I, block_q, D] of [B, H, N, D]."""
        x = filled_up(x, self.rows * self.blocks.block_q)
        return x.reshape(-1, self.blocks.block_q, x.shape[-1])

    def stored(self, x: Tensor) -> Tensor:
        """[B·G·J, block_k·D] of [B, G, M, D]."""
        x = filled_up(x, self.columns * self.blocks.block_k)
        return x.reshape(-1, self.blocks.block_k * x.shape[-1])

    def text(self, x: Tensor) -> Tensor:
        """[B, H, N, ...] of [B·H·I, block_q, ...]."""
        whole = x.view(*self.shape[:2], -1, *x.shape[2:])
        return whole[:, :, : self.shape[2]]

    def most_rows(self, work: Work, width: int, scored: bool) -> int:
        """Rows of work at a time; `scored`: their scores are there, and are to stay in cache."""
        keys = work.blocks.shape[1] * self.blocks.block_k
        return SCORED // (keys * self.blocks.block_q) if scored else GATHERED // (keys * width)

    def whole(self) -> bool:
        """Whether every row of work reads something."""
        return sum(len(work.rows) for work in self.works) == self.shape[0] * self.shape[1] * self.rows


def filled_up(x: Tensor, tokens: int) -> Tensor:
    """x [B, H, N, D] with zeros behind it, up to so many tokens."""
    return F.pad(x, (0, 0, 0, tokens - x.shape[2])) if x.shape[2] < tokens else x


def gather(x: Tensor, work: Work, width: int) -> Tensor:
    """[1, n, r·block_k, D] of stored x: where it lies, or a copy."""
    if work.step is not None and x.is_contiguous():
        (n, r), block = work.blocks.shape, x.shape[1]
        shape, stride = (1, n, r * block // width, width), (0, work.step * block, width, 1)
        return x.as_strided(shape, stride, x.storage_offset() + int(work.blocks[0, 0]) * block)
    return x.index_select(0, work.blocks.reshape(-1)).view(1, len(work.rows), -1, width)


def blind_rows(work: Work) -> Tensor | None:
    """[block_q] bool: the queries that see nothing; None: there are none."""
    if work.mask is None:
        return None
    sees = work.mask.any(-1)
    return None if bool(sees.all()) else ~sees


def bias_of(work: Work, like: Tensor) -> Tensor | None:
    """[block_q, r·block_k] 0 or -inf, one mask for all rows; 0 for queries that see nothing."""
    if work.mask is None:
        return None
    hidden = ~work.mask & work.mask.any(-1, keepdim=True)
    return torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill_(hidden, -torch.inf)


@torch.library.custom_op("regard::gathered", mutates_args=())
@as_written
def gathered(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, tile: Tensor | None, tiles: Tensor | None, start: Tensor,
    length: Tensor, block_q: int, block_k: int, causal: bool, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Block attention of tensors of one width."""
    lay = Layout(q, k, Blocks(index, block_q, block_k, tile, tiles), start, length, causal)
    width, qs, ks, vs = q.shape[-1], lay.queries(q), lay.stored(k), lay.stored(v)
    out, lse = torch.empty_like(qs), at_least_float32(qs[:0]).new_empty(qs.shape[:2])
    if not lay.whole():
        out.zero_(), lse.fill_(-torch.inf)
    for work in lay.works:
        blind, bias = blind_rows(work), bias_of(work, q)
        for piece in pieces(work, lay.most_rows(work, width, scored=not fused(q))):
            at = piece.at
            mixed, sums = attend(
                qs[at][None], gather(ks, piece, width), gather(vs, piece, width), bias, scale
            )
            if blind is not None:
                mixed, sums = mixed.masked_fill(blind[:, None], 0), sums.masked_fill(blind, -torch.inf)
            out[at], lse[at] = mixed[0], sums[0]
    return lay.text(out).contiguous(), lay.text(lse).contiguous()


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """(out, lse) of dense attention [1, n, rows, D] under one bias, in which every query sees something."""
    if fused(q):
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        wide = None if bias is None else bias.expand(1, q.shape[1], -1, -1)
        return kernel(q, k, v, 0.0, False, attn_mask=wide, scale=scale)
    s = at_least_float32(q[0] @ k[0].mT).mul_(scale)
    s = s if bias is None else s.add_(bias)
    p = s.softmax(-1)
    # of the largest score, whose weight is e^{s - lse}
    lse = s.amax(-1) - p.amax(-1).log_()
    return (p.to(v.dtype) @ v[0])[None], lse[None]


def fused(q: Tensor) -> bool:
    """Whether the fused kernel is the fastest way for these queries."""
    # where the CPU has products of bfloat16, two of them beat the kernel (docs/log.md)
    return q.device.type == "cpu" and product_dtype(q) != torch.bfloat16


@gathered.register_fake
def _(q, k, v, index, tile, tiles, start, length, block_q, block_k, causal, scale):
    return torch.empty_like(q, memory_format=torch.contiguous_format), at_least_float32(q).new_empty(
        q.shape[:3]
    )


@torch.library.custom_op("regard::gathered_back", mutates_args=())
@as_written
def gathered_back(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, tile: Tensor | None, tiles: Tensor | None, start: Tensor,
    length: Tensor, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor, block_q: int, block_k: int, causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v."""
    lay = Layout(q, k, Blocks(index, block_q, block_k, tile, tiles), start, length, causal)
    width, qs, ks, vs = q.shape[-1], lay.queries(q), lay.stored(k), lay.stored(v)
    outs, douts = lay.queries(out), lay.queries(dout)
    sums, dsums = (lay.queries(t.unsqueeze(-1)).squeeze(-1) for t in (lse, dlse))
    dq = at_least_float32(torch.zeros_like(qs))
    dk, dv = (at_least_float32(torch.zeros_like(t)) for t in (ks, vs))
    parts_of = (pieces(work, lay.most_rows(work, width, scored=False)) for work in lay.works)
    for work in itertools.chain.from_iterable(parts_of):
        rows, at = work.rows, work.blocks.reshape(-1)
        parts = [t[rows][None] for t in (qs, outs, douts, sums, dsums)]
        parts += [gather(ks, work, width), gather(vs, work, width)]
        one = attend_back(parts, work.mask, scale)
        dq[rows] = one[0].to(dq.dtype)
        dk.index_add_(0, at, one[1].reshape(len(at), -1).to(dk.dtype))
        dv.index_add_(0, at, one[2].reshape(len(at), -1).to(dv.dtype))
    b, g, m, _ = k.shape
    dk, dv = (t.view(b, g, -1, width)[:, :, :m].to(k.dtype).contiguous() for t in (dk, dv))
    return lay.text(dq).to(q.dtype).contiguous(), dk, dv


def attend_back(parts: list[Tensor], mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v: with p = e^{s - lse}, ds = p (dout·v - dout·out + dlse).

    parts are q, out, dout [1, n, rows, D], lse, dlse [1, n, rows], k and v [1, n, keys, D].
    """
    q, out, dout, lse, dlse, k, v = (at_least_float32(t) for t in parts)
    s = (q @ k.mT) * scale
    if mask is not None:
        s = s.masked_fill(~mask, -torch.inf)
    p = (s - lse.nan_to_num(neginf=0.0)[..., None]).exp()  # a blind row is e^{-inf} = 0
    inner = dlse - (dout * out).sum(-1)
    ds = p * (dout @ v.mT + inner[..., None]) * scale
    return ds @ k, ds.mT @ q, p.mT @ dout


@gathered_back.register_fake
def _(q, k, v, index, tile, tiles, start, length, out, lse, dout, dlse, block_q, block_k, causal, scale):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))


def setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.block_q, ctx.block_k, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def backward(ctx, dout, dlse):
    """Gradients of the arguments of `gathered`, in their order."""
    grads = gathered_back(*ctx.saved_tensors, dout, dlse, ctx.block_q, ctx.block_k, ctx.causal, ctx.scale)
    return *grads, *(None,) * 9


gathered.register_autograd(backward, setup_context=setup_context)
