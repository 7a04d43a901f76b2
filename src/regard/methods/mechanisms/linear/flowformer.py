"""Flow attention: attention as a flow from sources (keys) to sinks (queries) that is conserved, so that keys compete.

    I_i = φ(q_i)·Σ_j φ(k_j)               what flows into sink i           O_j = φ(k_j)·Σ_i φ(q_i)   out of source j
    Î_i = φ(q_i)·Σ_j φ(k_j) / O_j         the same, each source giving 1   Ô_j = φ(k_j)·Σ_i φ(q_i) / I_i
    o_i = σ(Î_i·n_q/n_k) · φ(q_i)/I_i · Σ_j φ(k_j)ᵀ n_k softmax_j(Ô_j) v_j

where φ = sigmoid, Ô is clamped to ±clamp, and eps is added to both factors of I, O, Î, Ô. With a fixed outflow a
source that gains attention takes it from the others: softmax's competition, in linear time. O and Ô are sums over the
queries, so queries speak to each other; in `self` a hidden token neither answers nor asks.

causal_self is the paper's own form: a sum over tokens becomes the sum up to t, in I, O, Î, Ô the mean up to t, and what
a source gives is settled at its own place t: n_k softmax_j(Ô_j) becomes t e^{Ô_t} / Σ_{s<=t} e^{Ô_s}. A key of another
text has no place among the queries, so there is no causal_cross.

Worked by hand: one query and two keys of 0 have φ = 1/2; I = 1/2, O = 1/4, Î = 2 and Ô = 1/2 each, so each source
competes for 1, and values 4 and 8 give σ(2·1/2) · (1/2)/(1/2) · (1/2·4 + 1/2·8) = 6 σ(1) = 4.386.

>>> import torch
>>> q, k, v = (torch.tensor(x, dtype=torch.float64).view(1, 1, -1, 1) for x in ([0.0], [0.0, 0.0], [4.0, 8.0]))
>>> round(reference(q, k, v, Config(), Call("cross"))[0].item(), 3)
4.386
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core import Card, K, Out, Q, V, require
from regard.core.call import Call
from regard.kinds.mechanism import Mechanism
from regard.ops import at_least_float32, exact, heads_of, linear, per_query_head, recurrence, rounded, shown

REFUSED = "each prefix of the queries gives a source another outflow, so another softmax over all keys"
OWN_TEXT = "own text: as many queries as keys"


@dataclass(frozen=True)
class Config:
    eps: float = 1e-6  # added to both factors of I, O, Î, Ô, so that no flow is zero
    clamp: float | None = 1.0  # of Ô; None: not clamped
    chunk: int = 64  # changes the speed, never the result

    def __post_init__(self) -> None:
        require(self.eps > 0 and self.chunk >= 1, "eps > 0 and chunk >= 1", eps=self.eps, chunk=self.chunk)


def reference(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, tuple | None]:
    require(call.cross or q.shape[2] == k.shape[2], OWN_TEXT, q=q, k=k)
    q_h, k_h, v_h = exact(q, heads_of(k, q.shape[1]), heads_of(v, q.shape[1]))
    form = settled if call.pattern == "causal_self" else conserved
    out, state = form(q_h.sigmoid(), k_h.sigmoid(), v_h, cfg, call)
    return rounded(out, state, v)


def flow(a: Tensor, b: Tensor, eps: float) -> Tensor:
    return ((a + eps) * (b + eps)).sum(-1, keepdim=True)


def conserved(phi_q: Tensor, phi_k: Tensor, v: Tensor, cfg: Config, call: Call) -> tuple[Tensor, None]:
    """All sinks and sources at once, through the weight of every pair."""
    seen = (
        torch.ones_like(phi_k[..., :1], dtype=torch.bool)
        if call.key_mask is None
        else call.key_mask[..., None]
    )
    phi_k, v = torch.where(seen, phi_k, 0.0), torch.where(seen, v, 0.0)
    asks = torch.ones_like(phi_q[..., :1], dtype=torch.bool) if call.cross else seen
    inflow = flow(phi_q, phi_k.sum(2, keepdim=True), cfg.eps)
    outflow = flow(phi_k, torch.where(asks, phi_q, 0.0).sum(2, keepdim=True), cfg.eps)
    kept_in = flow(phi_q, (phi_k / outflow).sum(2, keepdim=True), cfg.eps)
    kept_out = flow(phi_k, torch.where(asks, phi_q / inflow, 0.0).sum(2, keepdim=True), cfg.eps)
    kept_out = kept_out if cfg.clamp is None else kept_out.clamp(-cfg.clamp, cfg.clamp)
    n_k = seen.double().sum(2, keepdim=True)
    share = n_k * kept_out.masked_fill(~seen, -1e30).softmax(2) * seen
    weights = torch.einsum("bhnd,bhmd->bhnm", phi_q / inflow, phi_k) * share.mT
    # n_q / n_k, which is 1 where a text asks itself
    ratio = phi_q.shape[2] / n_k.clamp(min=1) if call.cross else 1
    return (kept_in * ratio).sigmoid() * (weights @ v), None


def settled(phi_q: Tensor, phi_k: Tensor, v: Tensor, cfg: Config, call: Call) -> tuple[Tensor, tuple]:
    """Token by token, sums as means up to it: Σφ(k), Σφ(q), Σφ(k)/O, Σφ(q)/I, Σe^Ô, t, Σφ(k)ᵀv'."""

    def write(state: tuple, i: int) -> tuple:
        k_sum, q_sum, k_kept, q_kept, e_sum, t, s = state
        query, key, t = phi_q[:, :, i], phi_k[:, :, i], t + 1
        k_sum, q_sum = k_sum + key, q_sum + query
        k_kept = k_kept + key / (flow(key, q_sum, cfg.eps) / t)
        q_kept = q_kept + query / (flow(query, k_sum, cfg.eps) / t)
        kept_out = flow(key, q_kept, cfg.eps) / t
        e = (kept_out if cfg.clamp is None else kept_out.clamp(-cfg.clamp, cfg.clamp)).exp()
        e_sum = e_sum + e
        s = s + key[..., None] * (v[:, :, i] * t * e / e_sum)[..., None, :]
        return k_sum, q_sum, k_kept, q_kept, e_sum, t, s

    def read(state: tuple, i: int) -> Tensor:
        k_sum, _, k_kept, _, _, t, s = state
        query, gate = phi_q[:, :, i], (flow(phi_q[:, :, i], k_kept, cfg.eps) / t.clamp(min=1)).sigmoid()
        return gate * torch.einsum("bhd,bhde->bhe", query / flow(query, k_sum, cfg.eps), s)

    start = beginning(phi_k, v) if call.initial_state is None else exact(*call.initial_state)
    return recurrence(start, write, read, phi_q.shape[2], phi_k.shape[2], call)


def beginning(k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """A state of zeros: four [B, H, D], two [B, H, 1] and [B, H, D, E]."""
    zeros = k.new_zeros(*k.shape[:2], k.shape[3], v.shape[3])
    return (*4 * (zeros[..., 0],), *2 * (zeros[..., 0, :1],), zeros)


def fast(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, tuple | None]:
    """All four flows from sums over the tokens, in causal_self up to each; then linear attention."""
    require(call.cross or q.shape[2] == k.shape[2], OWN_TEXT, q=q, k=k)
    phi_q, phi_k, values, seen = features(q, k, v, call)
    causal = call.pattern == "causal_self"
    before = call.initial_state or beginning(phi_k, values)

    def up_to(t: Tensor, start: Tensor) -> Tensor:
        return t.cumsum(2) + start[:, :, None] if causal else t.sum(2, keepdim=True)

    count = up_to(seen, before[5])
    n_k = count.clamp(min=1)
    n = n_k if causal else 1.0
    k_sum, q_sum = up_to(phi_k, before[0]), up_to(asking(phi_q, call), before[1])
    into, out_of = met(phi_q, k_sum, cfg.eps) / n, met(phi_k, q_sum, cfg.eps) / n
    k_kept, q_kept = up_to(phi_k / out_of, before[2]), up_to(asking(phi_q / into, call), before[3])
    kept_in, kept_out = met(phi_q, k_kept, cfg.eps) / n, met(phi_k, q_kept, cfg.eps) / n
    e = (kept_out if cfg.clamp is None else kept_out.clamp(-cfg.clamp, cfg.clamp)).exp() * seen
    e_sum = up_to(e, before[4])
    values = values * (n_k * e / e_sum.clamp(min=cfg.eps))
    settings = {"state": before[6] if causal else None, "chunk": cfg.chunk, "backend": call.backend}
    out, s = linear(phi_q, phi_k, values, pattern=call.pattern, **settings)
    out = out * (kept_in * (q.shape[2] / n_k if call.cross else 1)).sigmoid() / (into * n)
    sums = (t[:, :, -1] for t in (k_sum, q_sum, k_kept, q_kept, e_sum, count))
    return out.to(v.dtype), (*sums, s) if causal else None


def features(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, ...]:
    """φ(q), φ(k), v [B, H, N|M, D|E] with hidden keys zeroed, who is there [.., M, 1]."""
    heads, key_mask = q.shape[1], call.key_mask
    k, v = (at_least_float32(per_query_head(t, heads).expand(-1, heads, -1, -1)) for t in (k, v))
    phi_q, seen = at_least_float32(q).sigmoid(), shown(torch.ones_like(k[..., :1]), key_mask)
    return phi_q, shown(k.sigmoid(), key_mask), shown(v, key_mask), seen


def asking(t: Tensor, call: Call) -> Tensor:
    """t of the queries, zeros for hidden ones where a text asks itself."""
    return t if call.cross else shown(t, call.key_mask)


def met(a: Tensor, total: Tensor, eps: float) -> Tensor:
    """a·total, eps added to both, [B, H, N, 1]: a total for each token, or one for all [B, H, 1, D]."""
    total = total + eps
    if total.shape[2] == 1:
        return a @ total.mT + eps * total.sum(-1, keepdim=True)
    return ((a + eps) * total).sum(-1, keepdim=True)


METHOD = Mechanism(
    config=Config,
    reference=reference,
    fast=fast,
    patterns=("self", "causal_self", "cross"),
    unsupported={"causal_cross": REFUSED},
    speed_settings=("chunk",),
    test_settings=({"clamp": None},),
    state_size=lambda cfg, dims, n: dims["heads"] * (dims["key"] * (dims["value"] + 4) + 2),
    exempt={
        "neutral": "no setting turns it into softmax attention",
        "queries": "every source's outflow is a sum over the queries, so a query moves the outputs of others",
        "prefix": "the causal form settles a source's outflow and competition at its own place, self with all queries",
    },
    card=Card(
        title="Flow attention (Flowformer)",
        paper="Flowformer: Linearizing Transformers with Conservation Flows, arXiv:2202.06258",
        year=2022,
        idea="incoming flow of queries and outgoing flow of keys are conserved, so keys compete without a softmax",
        cost="O((N + M)·D·E) time",
        state="D·(E + 4) + 2 numbers per head, whatever the length",
        needs=("qkv",),
        lineage=("softmax", "linear_attention"),
        caveat="in self the mean of Ô over the keys is 1 by conservation, so the clamp at ±1 of the released core file "
        "flattens every source above the mean; its file for language clamps at 5, that for control at 10, those "
        "for time series and long range not at all (clamp=None)",
    ),
)
