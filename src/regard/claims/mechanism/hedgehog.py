"""Hedgehog's claim: trained on softmax's weights, a linear attention's feature map is as spiky and monotone as they.

The shipped model runs on text that it was not trained on. In every head the causal softmax weights p are compared with
those of feature maps on the same queries and keys, w_ij = φ(q_i)·φ(k_j) / Σ_j φ(q_i)·φ(k_j):

    KL        Σ_j p_ij log(p_ij / w_ij), a weight counted as at least 1e-9 (ReLU gives zeros)
    entropy   the mean of |H(w_i) - H(p_i)|
    Spearman  rank correlation of w_ij with q_i·k_j over the keys that query i sees

all three as means over the queries from the 16th on, heads and layers. Hedgehog's maps are trained on other text (the
help pages of Python), with the cross-entropy of the paper, 128 tokens at a time; the others have nothing to learn:
elu + 1, ReLU, and positive random features of the softmax kernel, as many as Hedgehog has.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from regard import catalog
from regard.attaching.actors import AttentionCall
from regard.attaching.attachment import attach
from regard.attaching.converted import Converted
from regard.attaching.function import native
from regard.attaching.ledger import LedgerLayer
from regard.attaching.replacement import Replacement
from regard.claims.lab import generator
from regard.claims.shipped_lm import shipped, stream
from regard.core.call import Call
from regard.core.claim import Claim, Measured
from regard.ops import elu_plus_one, lower_right, per_query_head
from regard.ops.ranks import ranks
from regard.train.convert import convert

LENGTH, ROWS, FIRST, FLOOR = 256, 8, 16, 1e-9
TRANSFER = dict(steps=300, batch=8, length=128, rate=1e-2)


class Record(Replacement):
    """The model's own attention; queries and keys of every layer are kept."""

    name, layer = "record", LedgerLayer

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, tuple[Tensor, Tensor]] = {}

    def compute(self, call: AttentionCall) -> Tensor:
        self.seen[call.name] = (call.q, per_query_head(call.k, call.q.shape[1]))
        return native(call)[0].transpose(1, 2)


def random_features(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Positive features whose product is e^{q·k/√D} on average (Performer), orthogonal within blocks."""
    d, g = q.shape[-1], generator()
    blocks = [torch.linalg.qr(torch.randn(d, d, generator=g))[0] for _ in range(2)]
    directions = torch.cat(blocks) * torch.randn(2 * d, d, generator=g).norm(dim=1, keepdim=True)
    mapped = []
    # a factor of a query cancels, of the keys one that all share
    for x, over in ((q, -1), (k, (-2, -1))):
        x = x * d**-0.25
        y = x @ directions.T.to(x.dtype) - x.square().sum(-1, keepdim=True) / 2
        mapped.append((y - y.amax(over, keepdim=True)).exp() + 1e-12)
    return mapped[0], mapped[1]


def of_map(features: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], q: Tensor, k: Tensor) -> Tensor:
    phi_q, phi_k = features(q.double(), k.double())
    w = (phi_q @ phi_k.mT).masked_fill(~sees(q), 0)
    return (w / w.sum(-1, keepdim=True).clamp(min=1e-300)).float()


def sees(q: Tensor) -> Tensor:
    return lower_right(q.shape[2], q.shape[2])


def of_hedgehog(converted: Converted, site: str, q: Tensor, k: Tensor) -> Tensor:
    """The page's own weights: its outputs for the unit vectors as values."""
    n, method, params = k.shape[2], converted.method, converted.params[site]
    share = q.shape[1] // params["w_k"].shape[0]
    unit = torch.eye(n).expand(k.shape[0], k.shape[1] // share, n, n)
    return method.page.fast(q, k[:, ::share], unit, method.config, Call(params=params))[0]


def spearman(w: Tensor, s: Tensor) -> Tensor:
    """[..., N]: over the keys that each query sees."""
    seen, far = sees(w), torch.finfo(w.dtype).max
    a, b = (ranks(t.masked_fill(~seen, far)) for t in (w, s))
    count = seen.sum(-1, keepdim=True)
    a, b = (
        ((t - t.masked_fill(~seen, 0).sum(-1, keepdim=True) / count).masked_fill(~seen, 0)) for t in (a, b)
    )
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1)).clamp(min=1e-9)


def entropy(w: Tensor) -> Tensor:
    return -(w * w.clamp(min=FLOOR).log()).sum(-1)


@cache
def compared() -> dict[str, dict[str, float]]:
    model = shipped().model
    converted = convert(model, shipped().tokenizer, "hedgehog", finetune=None, seed=0, **TRANSFER)
    record, ids = Record(), stream(ROWS * LENGTH).view(ROWS, LENGTH)
    ids = torch.cat([torch.full((ROWS, 1), shipped().tokenizer.bos_token_id), ids[:, 1:]], 1)
    with torch.inference_mode(), attach(model, record):
        model(ids, use_cache=False)
    untrained = catalog.get("hedgehog")
    maps = {
        "hedgehog": lambda site, q, k: of_hedgehog(converted, site, q, k),
        "hedgehog_untrained": lambda site, q, k: of_hedgehog(fresh(converted, untrained), site, q, k),
        "elu_plus_one": lambda _, q, k: of_map(lambda a, b: (elu_plus_one(a), elu_plus_one(b)), q, k),
        "relu": lambda _, q, k: of_map(lambda a, b: (F.relu(a), F.relu(b)), q, k),
        "random_features": lambda _, q, k: of_map(random_features, q, k),
    }
    sums = {name: {"kl": 0.0, "entropy_gap": 0.0, "spearman": 0.0} for name in maps}
    with torch.inference_mode():
        for site, (q, k) in record.seen.items():
            scores = q @ k.mT
            p = (scores * q.shape[-1] ** -0.5).masked_fill(~sees(q), -torch.inf).softmax(-1)
            for name, weigh in maps.items():
                w = weigh(site, q, k)
                kl = (p * (p.clamp(min=FLOOR).log() - w.clamp(min=FLOOR).log())).sum(-1)
                each = (kl, (entropy(w) - entropy(p)).abs(), spearman(w, scores))
                for kind, t in zip(sums[name], each, strict=True):
                    sums[name][kind] += t[..., FIRST:].mean().item() / len(record.seen)
    return sums


def fresh(converted: Converted, page) -> Converted:
    """The same with maps as they begin."""
    eye = {
        n: {m: torch.eye(*w.shape[1:]).expand_as(w) for m, w in maps.items()}
        for n, maps in converted.params.items()
    }
    return Converted(converted.method, eye)


def measure() -> Measured:
    results = compared()
    hedgehog, elu = results["hedgehog"], results["elu_plus_one"]
    numbers = {f"{kind}_{name}": value for name, kinds in results.items() for kind, value in kinds.items()}
    numbers["kl_ratio"] = hedgehog["kl"] / elu["kl"]
    numbers["entropy_gap_ratio"] = hedgehog["entropy_gap"] / elu["entropy_gap"]
    parts = {
        "closer": numbers["kl_ratio"] <= 0.5,
        "spikier": numbers["entropy_gap_ratio"] <= 0.5,
        "monotone": hedgehog["spearman"] >= 0.9,
    }
    return Measured.by(parts, numbers)


CLAIM = Claim(
    name="hedgehog",
    statement=(
        "after weight distillation from the shipped language model, Hedgehog's weights are closer to softmax's and "
        "spikier than those of elu + 1, ReLU or random features, and monotone in q·k"
    ),
    bound="mean KL(softmax || φ) <= 0.5x that of elu + 1; entropy gap <= 0.5x; Spearman(weight, q·k) >= 0.9",
    measure=measure,
    fails=("monotone",),
    contradicted=(
        "KL (0.48x) and entropy gap (0.47x) are within the bound, the rank correlation is not: 0.75 over the keys of a "
        "query, against 0.58 (elu + 1), 0.64 (ReLU), 0.40 (random features). Identity maps have 0.80: training buys "
        "spikes with the order of the small weights, which the cross-entropy hardly sees (maps near zero would order "
        "perfectly, and be flat). Tried, 0.81 at best: 150 to 800 steps, rates 3e-3 to 3e-2, maps begun at 0.4 to 2 "
        "times the identity, 64 and 128 features (0.78, 0.81), the form without the softmax's sum (0.57 to 0.65, and a "
        "KL of 0.7 to 0.8x), a softmax for each half (0.73). The ratios need training: 0.49 and 0.50 after 150 steps. "
        "Spikier than random features it is not: entropy gaps of 0.91 and 0.84"
    ),
)
