"""Agent attention: a few agents read the keys for everybody, and every query asks the agents.

    A   = the queries, averaged in n cells             [n, D]; the cells of adaptive average pooling
    V_A = softmax(A Kᵀ/√D + B_1) V                     [n, E], what the agents gathered
    o   = softmax(Q Aᵀ/√D + B_2) V_A + DWC(V)          DWC: each channel convolved with its own learned kernel

Both maps have n columns, so the cost is N·n, and o = φ_q(Q) (φ_k(K)ᵀ V): linear attention whose features are two
softmaxes. Its map has rank n at most; the convolution tells neighbours apart again, in `self` only, as in cross values
do not stand among the queries. B_1 and B_2 are tables of `table` cells (a side, on a grid) stretched to the tokens; a
grid adds a table for its rows and its columns.

Tokens stand in a line, or on the grid (height, width) row by row. In `self` a hidden token is in no average and gets
zero; in a line the others close up, except for the convolution, where its place stays empty, as it does on the grid.
As agents average the queries, queries speak to each other.

Worked by hand: one agent, queries 0 and 2, so A = 1; keys 0 and log 3 then weigh 1/4 and 3/4, values 4 and 8 give
V_A = 7, which is what every query gets; a kernel of (0, 1, 0) adds the token's own value: 11 and 15.

>>> import math, torch
>>> q, k, v = (torch.tensor(x).view(1, 1, -1, 1) for x in ([0.0, 2.0], [0.0, math.log(3)], [4.0, 8.0]))
>>> kernel = {"conv": torch.tensor([[[0.0, 1.0, 0.0]]])}
>>> out, _ = reference(q, k, v, Config(agents=1, table=0), Call("self", params=kernel))
>>> [round(o, 4) for o in out.flatten().tolist()]
[11.0, 15.0]
"""

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.core import Card, K, Out, Q, Unsupported, V, require
from regard.core.call import Call
from regard.kinds.mechanism import Mechanism
from regard.ops import at_least_float32, exact, heads_of, per_query_head, quotient, shown

REFUSED = "agents average all queries; with those so far, each query would have to read all keys anew"


@dataclass(frozen=True)
class Config:
    agents: int = 49  # n, a square number on a grid
    grid: tuple[int, int] | None = None  # (height, width); None: a line
    table: int = 7  # cells of a bias table, per side on a grid; 0: no biases
    conv: int = 3  # taps of the convolution of the values, per side on a grid; 0: none
    scale: float | None = None  # None: D ** -0.5

    def __post_init__(self) -> None:
        require(self.agents >= 1 and self.table >= 0, "agents >= 1 and table >= 0", cfg=self)
        require(
            self.conv == 0 or (self.conv > 0 and self.conv % 2 == 1),
            "an odd number of taps, or 0",
            conv=self.conv,
        )
        square = math.isqrt(self.agents) ** 2 == self.agents
        sides = self.grid is None or (len(self.grid) == 2 and min(self.grid) >= 1)
        require(sides, "grid is (height, width), both >= 1, or None", grid=self.grid)
        require(self.grid is None or square, "on a grid, a square number of agents", cfg=self)


def init(cfg: Config, dims: dict) -> dict[str, Tensor]:
    heads, sides = dims["heads"], 1 if cfg.grid is None else 2
    shape = heads, cfg.agents, cfg.table if cfg.grid is None else cfg.table**2 + sum(cfg.grid)
    params = {name: 0.02 * torch.randn(shape) for name in ("bias_1", "bias_2") if cfg.table}
    if cfg.conv:
        params["conv"] = torch.randn(heads, dims["value"], *sides * (cfg.conv,)) * cfg.conv**-sides
    return params


def check_grid(n: int, cfg: Config, call: Call) -> None:
    if cfg.grid is not None and call.cross:
        raise Unsupported("a grid is that of a text that asks itself; in cross, tokens stand in a line")
    require(cfg.grid is None or n == math.prod(cfg.grid), "a token for each place", grid=cfg.grid, tokens=n)


def reference(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, None]:
    """Every head of every row by itself, with torch's own pooling, interpolation and convolution of images."""
    check_grid(q.shape[2], cfg, call)
    rows, heads, n = q.shape[:3]
    key_mask = torch.ones_like(k[:, :1, :, 0], dtype=torch.bool) if call.key_mask is None else call.key_mask
    query_mask = key_mask.new_ones(1, 1, n) if call.cross else key_mask
    query_mask, key_mask = (t.expand(rows, heads, -1) for t in (query_mask, key_mask))
    tensors = *exact(q, heads_of(k, heads), heads_of(v, heads)), query_mask, key_mask
    out = q.new_zeros(rows, heads, n, v.shape[3], dtype=torch.float64)
    for b, h in key_mask.any(-1).nonzero().tolist():
        out[b, h] = one_head(*(t[b, h] for t in tensors), h=h, cfg=cfg, call=call)
    return out.to(v.dtype), None


def one_head(q, k, v, query_mask: Tensor, key_mask: Tensor, h: int, cfg: Config, call: Call) -> Tensor:
    """[N, E] of q [N, D], k [M, D] and v [M, E]: agents gather from the keys, queries ask the agents."""
    q, k, v = (
        t.masked_fill(~mask[:, None], 0) for t, mask in ((q, query_mask), (k, key_mask), (v, key_mask))
    )
    params = {name: p[h].double() for name, p in call.params.items()}
    agents, alive = averages(q, query_mask, cfg)
    scale = q.shape[1] ** -0.5 if cfg.scale is None else cfg.scale
    gather, ask = scale * agents @ k.T, scale * q @ agents.T  # [n, M], [N, n]
    if cfg.table:
        gather = gather + stretched(params["bias_1"], key_mask, cfg)
        ask = ask + stretched(params["bias_2"], query_mask, cfg).T
    gathered = gather.masked_fill(~key_mask, -torch.inf).softmax(-1) @ v
    out = ask.masked_fill(~alive, -torch.inf).softmax(-1) @ gathered
    if cfg.conv and not call.cross:
        convolve, image = (F.conv1d, v.T) if cfg.grid is None else (F.conv2d, v.T.unflatten(1, cfg.grid))
        out = out + convolve(image, params["conv"][:, None], padding="same", groups=len(image)).flatten(1).T
    return out.masked_fill(~query_mask[:, None], 0)


def averages(q: Tensor, query_mask: Tensor, cfg: Config) -> tuple[Tensor, Tensor]:
    """The agents [n, D], and which of them [n] average anything."""
    if cfg.grid is None:
        return F.adaptive_avg_pool1d(q[query_mask].T, cfg.agents).T, query_mask.new_ones(cfg.agents)
    images = torch.cat([q, query_mask[:, None]], dim=1).T.unflatten(1, cfg.grid)
    pooled = F.adaptive_avg_pool2d(images, math.isqrt(cfg.agents)).flatten(1).T
    return quotient(pooled[:, :-1], pooled[:, -1:]), pooled[:, -1] > 0


def stretched(table: Tensor, key_mask: Tensor, cfg: Config) -> Tensor:
    """A table [n, cells] as biases [n, tokens]; those of hidden tokens are any number."""
    if cfg.grid is None:
        return F.interpolate(table[None], int(key_mask.sum()), mode="linear")[0][:, key_mask.cumsum(0) - 1]
    block, rows, columns = table.split([cfg.table**2, *cfg.grid], dim=1)
    block = F.interpolate(block.unflatten(1, 2 * (cfg.table,))[None], cfg.grid, mode="bilinear")[0]
    return (block + rows[:, :, None] + columns[:, None]).flatten(1)


def fast(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, None]:
    """All heads and rows at once: averages and biases are products with matrices over the tokens."""
    check_grid(q.shape[2], cfg, call)
    heads, key_mask, query_mask = q.shape[1], call.key_mask, None if call.cross else call.key_mask
    q_h, k_h, v_h = (at_least_float32(per_query_head(t, heads).expand(-1, heads, -1, -1)) for t in (q, k, v))
    q_h, k_h, v_h = shown(q_h, query_mask), shown(k_h, key_mask), shown(v_h, key_mask)
    average, shares = matrices(q_h, query_mask, cfg)
    sources = matrices(k_h, key_mask, cfg)[1] if call.cross else shares
    tables = [at_least_float32(call.params[name]) for name in ("bias_1", "bias_2") if cfg.table]
    bias_1, bias_2 = (tables[0] @ sources, shares.mT @ tables[1].mT) if tables else 2 * (q_h.new_zeros(1, 1),)
    agents, alive = average @ q_h, None if query_mask is None else average.any(-1)
    out = read(q_h, agents, read(agents, k_h, v_h, bias_1, key_mask, cfg), bias_2, alive, cfg)
    if cfg.conv and not call.cross:
        out = out + near(v_h, at_least_float32(call.params["conv"]), cfg)
    return shown(out, query_mask).to(v.dtype), None


def near(v: Tensor, kernel: Tensor, cfg: Config) -> Tensor:
    """The convolution of v [B, H, N, E] by the kernel of every channel, tap by tap; a line is an image of one row."""
    image = v.unflatten(2, cfg.grid or (1, -1))
    kernel, out = kernel.reshape(*kernel.shape[:2], -1, cfg.conv), torch.zeros_like(image)
    for i, j in itertools.product(range(kernel.shape[2]), range(cfg.conv)):
        (y, from_y), (x, from_x) = overlap(i - kernel.shape[2] // 2), overlap(j - cfg.conv // 2)
        out[:, :, y, x].addcmul_(kernel[:, None, None, :, i, j], image[:, :, from_y, from_x])
    return out.flatten(2, 3)


def overlap(shift: int) -> tuple[slice, slice]:
    """Places that have a neighbour `shift` further on, and these neighbours."""
    here, there = (
        slice(max(0, -shift), -shift if shift > 0 else None),
        slice(max(0, shift), shift if shift < 0 else None),
    )
    return here, there


def matrices(t: Tensor, mask: Tensor | None, cfg: Config) -> tuple[Tensor, Tensor]:
    """For tokens t [B, H, N, D]: averages over cells [B, H, n, N], shares of the tables' cells [B, H, cells, N]."""
    mask = t.new_ones(1, 1, t.shape[2], dtype=torch.bool) if mask is None else mask
    if cfg.grid is None:
        inside, shares = on_side(mask.cumsum(-1)[..., None, :] - 1, mask.sum(-1)[..., None, None], cfg)
    else:
        (y, by_y), (x, by_x) = (on_side(torch.arange(side, device=t.device), side, cfg) for side in cfg.grid)
        row, column = (torch.eye(side, device=t.device) for side in cfg.grid)
        row, column = row.repeat_interleave(cfg.grid[1], 1), column.repeat(1, cfg.grid[0])
        inside, shares = torch.kron(y, x), torch.cat([torch.kron(by_y, by_x), row, column])
    inside, shares = ((share * mask[..., None, :]).to(t.dtype) for share in (inside, shares))
    return inside / inside.sum(-1, keepdim=True).clamp(min=1), shares


def on_side(rank: Tensor, count: Tensor | int, cfg: Config) -> tuple[Tensor, Tensor]:
    """For tokens of this rank among so many: in which cells they are [.., n, N], what they read of a table's cells."""
    agents, table = cfg.agents if cfg.grid is None else math.isqrt(cfg.agents), cfg.table
    cell, mark = (torch.arange(size, device=rank.device)[:, None] for size in (agents, table))
    inside = (rank * agents < (cell + 1) * count) & ((rank + 1) * agents > cell * count)
    position = ((rank.double() + 0.5) * table / count - 0.5).clamp(0, max(0, table - 1))
    return inside, (1 - (position - mark).abs()).clamp(min=0)


def read(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, key_mask: Tensor | None, cfg: Config) -> Tensor:
    """Softmax attention with a bias; who sees nothing reads values that are all zero."""
    bias = bias if key_mask is None else bias.masked_fill(~key_mask[:, :, None], -1e30)
    # scale=None is 1/√D to torch too
    return F.scaled_dot_product_attention(q, k, v, bias.expand(*q.shape[:3], k.shape[2]), scale=cfg.scale)


METHOD = Mechanism(
    config=Config,
    reference=reference,
    fast=fast,
    init=init,
    patterns=("self", "cross"),
    unsupported={"causal_self": REFUSED, "causal_cross": REFUSED},
    test_settings=({"agents": 3, "table": 2, "conv": 5}, {"agents": 4, "table": 0, "conv": 0, "scale": 1.0}),
    exempt={"neutral": "two softmaxes are not one", "queries": "a query is in an agent that others ask"},
    card=Card(
        title="Agent attention",
        paper="Agent Attention: On the Integration of Softmax and Linear Attention, arXiv:2312.08874",
        year=2023,
        idea="n pooled queries gather from all keys and answer all queries: two small softmaxes, not one large",
        cost="O((N + M)·n·(D + E)) time",
        state="none: it is not causal",
        needs=("qkv",),
        lineage=("softmax", "linear_attention"),
        caveat="the released code takes images on a square grid and leaves a class token out of pooling and "
        "convolution; the line is ours, the same in one dimension. The convolution's bias is left out: that of the "
        "output projection holds it. The variant for diffusion without training is not on this page",
    ),
)
