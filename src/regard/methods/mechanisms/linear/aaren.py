"""Aaren: attention with a query that is learned, not computed, is a recurrent network whose prefixes a scan finds.

    s_t = scale · q_h·k_t                      q_h learned per head; the token's own query is not used
    m_t = max(m_{t-1}, s_t)                    state (m, c, a): 2 + E numbers per head
    c_t = c_{t-1} e^{m_{t-1} - m_t} + e^{s_t - m_t}
    a_t = a_{t-1} e^{m_{t-1} - m_t} + e^{s_t - m_t} v_t
    o_t = a_t / c_t                            = Σ_{j<=t} softmax_j(s_j) v_j

where scale is 1/√D unless it is given. Two spans (m, c, a) join as two tokens do, whatever their lengths, and that is
associative: `fast` joins the tokens of a chunk in one product, then the chunks, the chunks of chunks, and hands each
chunk what came before it. Without causality every token reads the pool over all keys, in cross that of the other text.

Worked by hand: scale and query 1, keys 0, log 3, log 4 and values 4, 8, 2: the weights 1, 3 and 4 give the prefixes
4, (4 + 24) / 4 = 7 and (4 + 24 + 8) / 8 = 4.5.

>>> import torch
>>> k, v = (torch.tensor(x, dtype=torch.float64).view(1, 1, -1, 1) for x in ([1.0, 3.0, 4.0], [4.0, 8.0, 2.0]))
>>> call = Call(params={"query": torch.ones(1, 1)})
>>> out, _ = reference(0 * k, k.log(), v, Config(scale=1.0), call)
>>> [round(o, 4) for o in out.flatten().tolist()]
[4.0, 7.0, 4.5]
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from regard.core import PATTERNS, Card, K, Out, Q, V, require
from regard.core.call import Call
from regard.kinds.mechanism import Mechanism
from regard.ops import at_least_float32, exact, heads_of, per_query_head, quotient, recurrence, rounded, shown

# the score of a key that is not there; finite, so that no -inf - (-inf) arises
NOTHING = -1e30


@dataclass(frozen=True)
class Config:
    scale: float | None = None  # None: D ** -0.5
    chunk: int = 64  # changes the speed, never the result

    def __post_init__(self) -> None:
        require(self.chunk >= 1, "chunk >= 1", chunk=self.chunk)


def init(cfg: Config, dims: dict) -> dict[str, Tensor]:
    return {"query": torch.randn(dims["heads"], dims["key"])}


def reference(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, tuple | None]:
    n, m, heads = q.shape[2], k.shape[2], q.shape[1]
    query, k_h, v_h = exact(call.params["query"], heads_of(k, heads), heads_of(v, heads))
    scale = k.shape[3] ** -0.5 if cfg.scale is None else cfg.scale
    s = scale * torch.einsum("hd,bhmd->bhm", query, k_h)

    def write(state: tuple, t: int) -> tuple:
        m_old, c, a = state
        m_t = torch.maximum(m_old, s[:, :, t])
        kept, new = (m_old - m_t).exp(), (s[:, :, t] - m_t).exp()
        return m_t, c * kept + new, a * kept[..., None] + new[..., None] * v_h[:, :, t]

    def read(state: tuple, i: int) -> Tensor:
        return quotient(state[2], state[1][..., None])

    zero = s.new_zeros(len(q), heads)
    begin = (zero + NOTHING, zero, s.new_zeros(len(q), heads, v.shape[3]))
    if call.initial_state is not None:
        begin = exact(*call.initial_state)
    return rounded(*recurrence(begin, write, read, n, m, call), v)


def fast(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, tuple | None]:
    n, heads = q.shape[2], q.shape[1]
    k, values = (at_least_float32(per_query_head(t, heads).expand(-1, heads, -1, -1)) for t in (k, v))
    scale = k.shape[3] ** -0.5 if cfg.scale is None else cfg.scale
    s = (k @ at_least_float32(call.params["query"])[:, :, None])[..., 0] * scale  # [B, H, M]
    s = s if call.key_mask is None else s.masked_fill(~call.key_mask, NOTHING)
    values = shown(pad(values, (0, 1), value=1.0), call.key_mask)  # [B, H, M, E + 1]
    if call.pattern != "causal_self":
        weights = (s - s.amax(-1, keepdim=True)).exp()
        return pooled(weights[:, :, None] @ values, v.dtype).expand(-1, -1, n, -1), None
    begin = (torch.full_like(s[:, :, 0], NOTHING), torch.zeros_like(values[:, :, 0]))
    if call.initial_state is not None:
        m, c, a = call.initial_state
        begin = (m, torch.cat([a, c[..., None]], dim=-1))
    m, joined = prefixes(s, values, begin, cfg.chunk)
    state = (m[:, :, -1], joined[:, :, -1, -1], joined[:, :, -1, :-1])
    return pooled(joined[:, :, -n:], v.dtype), state


def pooled(joined: Tensor, dtype: torch.dtype) -> Tensor:
    """a / c from [..., E + 1], zero where nothing was seen."""
    a, c = joined[..., :-1], joined[..., -1:]
    return (a / c.masked_fill(c == 0, 1)).to(dtype)


def prefixes(m: Tensor, joined: Tensor, begin: tuple[Tensor, Tensor], chunk: int) -> tuple[Tensor, Tensor]:
    """All prefixes of spans (m [B, H, n], joined [B, H, n, E + 1]), tokens or chunks of them, that go on from begin."""
    n, size = m.shape[2], max(2, chunk)
    missing, size = (-n % size, size) if n > size else (0, n)
    if missing:
        m, joined = pad(m, (0, missing), value=NOTHING), pad(joined, (0, 0, 0, missing))
    # [B, H, chunks, C], [B, H, chunks, C, E + 1]
    m, joined = one_chunk(m.unflatten(2, (-1, size)), joined.unflatten(2, (-1, size)))
    before, carried = (t[:, :, None] for t in begin)
    if n > size:
        ends = prefixes(m[..., -1], joined[..., -1, :], begin, chunk)
        before, carried = (torch.cat([t, end[:, :, :-1]], dim=2) for t, end in zip((before, carried), ends))
    top = torch.maximum(before[..., None], m)
    joined = (m - top).exp()[..., None] * joined
    joined = torch.addcmul(joined, (before[..., None] - top).exp()[..., None], carried[..., None, :])
    return top.flatten(2, 3)[:, :, :n], joined.flatten(2, 3)[:, :, :n]


def one_chunk(m: Tensor, joined: Tensor) -> tuple[Tensor, Tensor]:
    past = torch.ones(m.shape[-1], m.shape[-1], dtype=torch.bool, device=m.device).tril()
    top = m.cummax(-1).values
    weights = (m[..., None, :] - top[..., None]).masked_fill(~past, -torch.inf).exp()
    return top, weights @ joined


METHOD = Mechanism(
    config=Config,
    reference=reference,
    fast=fast,
    init=init,
    patterns=PATTERNS,
    speed_settings=("chunk",),
    test_settings=({"chunk": 4, "scale": 1.0},),
    state_size=lambda cfg, dims, n: dims["heads"] * (dims["value"] + 2),
    exempt={
        "neutral": "the learned query stands in the place of the token's: no setting is softmax attention of q",
        "queries": "the token's query is not used, so it moves nothing",
    },
    card=Card(
        title="Aaren (attention as an RNN)",
        paper="Attention as an RNN, arXiv:2405.13956",
        year=2024,
        idea="softmax attention with one learned query is a recurrence of 2 + E numbers, and a scan gives all prefixes",
        cost="O((N + M)·(C + D + E)) time with chunks of C tokens",
        state="E + 2 numbers per head, whatever the length",
        needs=("qkv",),
        lineage=("softmax",),
        caveat=(
            "the query ignores the token, so it cannot stand in for attention in a trained model. The paper learns a "
            "query token for each layer and projects it; here the projected query of each head is learned itself"
        ),
    ),
)
