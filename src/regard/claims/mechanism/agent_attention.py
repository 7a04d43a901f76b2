"""Agent attention's claim: it is linear attention whose feature maps are softmaxes, and costs as such."""

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.claims.lab import difference, generator, median_times, random_qkv, seeded, threads
from regard.core.call import Call
from regard.core.claim import Claim, Measured
from regard.methods.mechanisms.linear import agent_attention as page

HEADS, WIDTH, SHORT, LONG = 2, 32, 4_096, 16_384
DIMS = {"heads": HEADS, "kv_heads": HEADS, "key": WIDTH, "value": WIDTH, "width": HEADS * WIDTH}


def drawn(n: int) -> tuple[Tensor, ...]:
    return random_qkv(generator(), HEADS, n, WIDTH)


def generalised_linear(q: Tensor, k: Tensor, v: Tensor, cfg, params: dict[str, Tensor]) -> Tensor:
    """φ_q(Q) (φ_k(K)ᵀ V) with torch's own pooling and interpolation, in float64."""
    q, k, v = q.double(), k.double(), v.double()
    bias_1, bias_2 = (
        F.interpolate(params[name].double(), q.shape[2], mode="linear", align_corners=False)
        for name in ("bias_1", "bias_2")
    )
    agents = F.adaptive_avg_pool1d(q[0].mT, cfg.agents).mT[None]
    phi_q = (q @ agents.mT * WIDTH**-0.5 + bias_2.mT).softmax(-1)  # [.., N, n], a softmax over the agents
    phi_k = (k @ agents.mT * WIDTH**-0.5 + bias_1.mT).softmax(-2)  # [.., N, n], a softmax over the keys
    return phi_q @ (phi_k.mT @ v)


def measure() -> Measured:
    cfg, mixing = page.Config(), page.Config(conv=0)
    with seeded(0):
        params = page.init(cfg, DIMS)
    q, k, v = drawn(600)
    result = page.METHOD.fast(q, k, v, mixing, Call("self", params=params))[0]
    apart = difference(result, generalised_linear(q, k, v, mixing, params))
    sides = {
        "agents": lambda q, k, v: page.METHOD.fast(q, k, v, cfg, Call("self", params=params)),
        "softmax": F.scaled_dot_product_attention,
    }
    with threads(1), torch.no_grad():
        inputs = {n: drawn(n) for n in (SHORT, LONG)}
        timed = {(name, n): partial(sides[name], *inputs[n]) for n in inputs for name in sides}
        middle = median_times(timed, rounds=8)
    grown = {name: middle[name, LONG] / middle[name, SHORT] for name in sides}
    parts = {
        "linear attention": apart < 1e-5,
        "time": grown["agents"] <= 5,
        "time of softmax": grown["softmax"] >= 10,
    }
    numbers = {"difference": apart} | {f"time_ratio_16k_4k_{name}": ratio for name, ratio in grown.items()}
    return Measured.by(parts, numbers | {f"ms_16k_{name}": 1e3 * middle[name, LONG] for name in sides})


CLAIM = Claim(
    name="agent_attention",
    statement="it equals φ_q(Q) (φ_k(K)ᵀ V) with softmax maps through the agents, and its time is linear in N",
    bound="difference < 1e-5; time(16k) / time(4k) <= 5, that of softmax attention >= 10",
    measure=measure,
)
