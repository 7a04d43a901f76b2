"""Third-order tensor attention: a query weighs pairs of keys, and a polynomial in place of e^s makes that linear.

    s_i,jl = Σ_c q_ic k_jc k'_lc / D                              a triple product, scale 1/D
    o_i = Σ_jl w_i,jl (v_j ∘ v'_l) / Σ_jl w_i,jl                  w = Σ_{r<=p} s^r / r!, e^s as p grows

where k' = x W_k' and v' = x W_v' are a second key and value of each token, learned from the layer's input. Softmax
attention cannot ask for two tokens that fit together; this can, at O(N·M²). As s^r is a sum of monomials,

    w_i,jl = Σ_α q_i^α k_j^α k'_l^α / (α! D^|α|)                  over exponents |α| <= p, F = C(D + p, p) of them
    o_i = φ(q_i) [(φ(K)ᵀV) ∘ (φ(K')ᵀV')] / the same with V = V' = 1

so the sum over pairs is the product of two sums over tokens. The coefficient is in φ(q) and in no other. An even p
keeps weights positive. In causal_self both tokens of a pair are at or before the query.

Worked by hand: D = 1, p = 2, q = 1, keys 0 and 1 with k' = k: the pair (1, 1) has s = 1 and weighs 1 + 1 + 1/2 = 2.5,
the other three weigh 1; with values v = v' of 0 and 1 only that pair counts: 2.5 / 5.5 = 0.4545.

>>> import torch
>>> q, k = (torch.tensor(x).double().view(1, 1, -1, 1) for x in ([1.0], [0.0, 1.0]))
>>> eye = torch.eye(1).double()
>>> call = Call("cross", params={"key": eye, "value": eye}, x=(q[0], k[0]))
>>> round(reference(q, k, k, Config(degree=2), call)[0].item(), 4)
0.4545
"""

import math
from collections import Counter
from dataclasses import dataclass
from itertools import combinations_with_replacement

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from regard.core import PATTERNS, Card, K, Out, Q, V, require
from regard.core.call import Call
from regard.kinds.mechanism import Mechanism
from regard.ops import at_least_float32, exact, heads_of, per_query_head, quotient, rounded, shown

# features of one token
MOST = 20_000
# tokens at a time where no query needs a sum of its own: changes the speed, never the result
WHOLE = 1024


@dataclass(frozen=True)
class Config:
    degree: int = 4  # p
    chunk: int = 16  # tokens of causal_self at a time: changes the speed, never the result

    def __post_init__(self) -> None:
        require(self.degree >= 2 and self.degree % 2 == 0, "an even degree >= 2", degree=self.degree)
        require(self.chunk >= 1, "chunk >= 1", chunk=self.chunk)


def init(cfg: Config, dims: dict) -> dict[str, Tensor]:
    heads, width = dims["kv_heads"], dims["width"]
    return {p: torch.randn(heads * dims[p], width) * width**-0.5 for p in ("key", "value")}


def check_count(width: int, degree: int) -> None:
    count = math.comb(width + degree, degree)
    rule = f"C(D + p, p) <= {MOST} features: narrower heads or a lower degree"
    require(count <= MOST, rule, features=count)


def reference(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, tuple | None]:
    """Pair by pair. Only what an earlier call has left is read by monomials, in which a state holds it."""
    n, m, width, degree, causal = q.shape[2], *k.shape[2:], cfg.degree, call.pattern == "causal_self"
    check_count(width, degree)
    q_h, k_h, v_h, k_2, v_2 = by_itself(q, k, v, call)
    exponents = [a for r in range(degree + 1) for a in combinations_with_replacement(range(width), r)]
    share = [1 / (width ** len(a) * math.prod(map(math.factorial, Counter(a).values()))) for a in exponents]
    f, f_2, f_q = (torch.stack([t[..., a].prod(-1) for a in exponents], dim=-1) for t in (k_h, k_2, q_h))
    old = old_2 = v_h.new_zeros(*v_h.shape[:2], len(share), v_h.shape[3])
    if call.initial_state is not None:
        old, old_2 = exact(*call.initial_state)
    rows = []
    for i in range(n):
        upto = slice(m - n + i + 1 if causal else m)
        s = torch.einsum("bhc,bhjc,bhlc->bhjl", q_h[:, :, i], k_h[:, :, upto], k_2[:, :, upto]) / width
        w = sum(s**r / math.factorial(r) for r in range(degree + 1))
        sums = torch.einsum("bhjl,bhje,bhle->bhe", w, v_h[:, :, upto], v_2[:, :, upto])
        new, new_2 = f[:, :, upto].mT @ v_h[:, :, upto], f_2[:, :, upto].mT @ v_2[:, :, upto]
        # pairs of which one token or both are in the state
        met = old * old_2 + old * new_2 + new * old_2
        rows.append(sums + torch.einsum("bhf,f,bhfe->bhe", f_q[:, :, i], v_h.new_tensor(share), met))
    sums, state = torch.stack(rows, dim=2), (old + new, old_2 + new_2) if causal else None
    return rounded(quotient(sums[..., :-1], sums[..., -1:]), state, v)


def by_itself(q: Q, k: K, v: V, call: Call) -> tuple[Tensor, ...]:
    """q, k, v, k' and v' per query head in float64, a one after each value and zeros where a key is hidden; of the
    reference only."""
    x, *maps = exact(call.x_of_keys, call.params["key"], call.params["value"])
    k_2, v_2 = ((x @ w.mT).unflatten(2, (k.shape[1], -1)).transpose(1, 2) for w in maps)
    q, k, v, k_2, v_2 = exact(q, *(heads_of(t, q.shape[1]) for t in (k, v, k_2, v_2)))
    tokens = [k, pad(v, (0, 1), value=1.0), k_2, pad(v_2, (0, 1), value=1.0)]
    if call.key_mask is not None:
        tokens = [torch.where(call.key_mask[..., None], t, 0.0) for t in tokens]
    return q, *tokens


def fast(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, tuple | None]:
    n, m, dtype = q.shape[2], k.shape[2], v.dtype
    plan, shares = monomials(q.shape[3], cfg.degree)
    q, *tokens = tensors(q, k, v, call)
    s = s_2 = q.new_zeros(*q.shape[:2], len(shares), tokens[2].shape[3])
    if call.initial_state is not None:
        s, s_2 = call.initial_state
    weights, rows = q.new_tensor(shares), []
    if call.pattern != "causal_self":
        for k_c, k_2, v_c, v_2 in zip(*(t.split(WHOLE, dim=2) for t in tokens)):
            s, s_2 = s + features(k_c, plan).mT @ v_c, s_2 + features(k_2, plan).mT @ v_2
        rows = [(features(q_c, plan) * weights) @ (s * s_2) for q_c in q.split(WHOLE, dim=2)]
        return divided(torch.cat(rows, dim=2), dtype), None
    # the last query is that of the last key
    q = pad(q, (0, 0, m - n, 0))
    for q_c, k_c, k_2, v_c, v_2 in zip(*(t.split(cfg.chunk, dim=2) for t in (q, *tokens))):
        # [B, H, C, F, E + 1]
        sums = s[:, :, None] + (features(k_c, plan)[..., None] * v_c[..., None, :]).cumsum(2)
        sums_2 = s_2[:, :, None] + (features(k_2, plan)[..., None] * v_2[..., None, :]).cumsum(2)
        s, s_2 = sums[:, :, -1], sums_2[:, :, -1]
        query = (features(q_c, plan) * weights)[..., None, :]
        rows.append((query @ (sums * sums_2))[..., 0, :])
    return divided(torch.cat(rows, dim=2)[:, :, m - n :], dtype), (s, s_2)


def tensors(q: Q, k: K, v: V, call: Call) -> tuple[Tensor, ...]:
    """q, k, k', v and v' per query head, values with a one appended, and zeros where a key is hidden."""
    heads, inputs = q.shape[1], at_least_float32(call.x_of_keys)
    k_2, v_2 = (
        linear(inputs, call.params[p].to(inputs.dtype)).unflatten(-1, (k.shape[1], -1)).transpose(1, 2)
        for p in ("key", "value")
    )
    k, k_2, v, v_2 = (
        per_query_head(at_least_float32(t), heads).expand(-1, heads, -1, -1) for t in (k, k_2, v, v_2)
    )
    v, v_2 = (pad(t, (0, 1), value=1.0) for t in (v, v_2))
    return at_least_float32(q), *(shown(t, call.key_mask) for t in (k, k_2, v, v_2))


Plan = list[tuple[list[int], list[int]]]


def monomials(width: int, degree: int) -> tuple[Plan, list[float]]:
    """For each degree: which monomial of the one before is extended, by which channel; 1/(α! D^|α|) of all [F]."""
    check_count(width, degree)
    # last channel, its exponent, weight
    plan, weights, shorter = [], [1.0], [(0, 0, 1.0)]
    for _ in range(degree):
        extended, channels, longer = [], [], []
        for i, (last, exponent, weight) in enumerate(shorter):
            for c in range(last, width):
                power = exponent + 1 if c == last else 1
                longer.append((c, power, weight / (power * width)))
                extended.append(i)
                channels.append(c)
        plan.append((extended, channels))
        shorter = longer
        weights += [weight for _, _, weight in longer]
    return plan, weights


def features(t: Tensor, plan: Plan) -> Tensor:
    """[..., F]: all monomials of t's channels."""
    parts = [torch.ones_like(t[..., :1])]
    for extended, channels in plan:
        parts.append(parts[-1][..., extended] * t[..., channels])
    return torch.cat(parts, dim=-1)


def divided(sums: Tensor, dtype: torch.dtype) -> Tensor:
    total = sums[..., -1:]
    return (sums[..., :-1] / total.masked_fill(total == 0, 1)).to(dtype)


def state_size(cfg: Config, dims: dict, n: int) -> int:
    return 2 * dims["heads"] * math.comb(dims["key"] + cfg.degree, cfg.degree) * (dims["value"] + 1)


METHOD = Mechanism(
    config=Config,
    reference=reference,
    fast=fast,
    init=init,
    patterns=PATTERNS,
    needs_x=True,
    speed_settings=("chunk",),
    test_settings=({"degree": 2},),
    state_size=state_size,
    exempt={
        "neutral": "it weighs pairs of keys: no setting turns it into softmax attention, which weighs single ones"
    },
    card=Card(
        title="Third-order tensor attention",
        paper=(
            "How to Capture Higher-order Correlations? Generalizing Matrix Softmax Attention to Kronecker "
            "Computation, arXiv:2310.04064"
        ),
        year=2023,
        idea="attention over pairs of tokens; polynomial features make the sum over pairs a product of two sums",
        cost="O((N + M)·F·E) time with F = C(D + p, p) features: D = 8 and p = 4 have 495",
        state="2·F·(E + 1) numbers per head, whatever the length",
        needs=("qkv", "x"),
        lineage=("softmax",),
        caveat=(
            "the page is the degree-p polynomial, the paper's algorithm; e^s itself, its definition, is near only "
            "while entries are small. The second key and value are projections of x learned here, so what a model "
            "does to its own keys (rotary positions, norms) reaches the first alone. The paper gives no causal form: "
            "causal_self takes the pairs at or before the query. The accurate but huge features limit heads to "
            "about 24 channels at p = 4"
        ),
    ),
)
