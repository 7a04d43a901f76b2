"""MoA's claim, on the shipped language model: is the influence of masking foretold, and do spans by head lose less?

Prompts of the recall task; the loss is that of the answer. Influence is measured on some prompts, spans are chosen by
it at two lengths under a budget of mean density, and the losses are those of other prompts, at the longer of the two
lengths and at one and a half of it.
"""

import copy
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.attaching.attachment import attach
from regard.attaching.converted import Converted
from regard.claims import shipped_lm
from regard.claims.lab import generator, mean
from regard.core import Edit, Method, Site
from regard.core.claim import Claim, Measured
from regard.methods.masks import moa_spans as page

LENGTHS, LONGER = (256, 512), 768
BLOCK, SINKS, DENSITY = 16, 16, 0.5
SHARES = (
    0.0625,
    0.125,
    0.1875,
    0.25,
    0.375,
    0.5,
    0.625,
    0.75,
    0.875,
    1.0,
)  # of the length: what a span may be
ENTRIES, SHORT, PROFILED, JUDGED = 200, 128, 24, 64


def tokens_of(length: int, count: int, seed: int) -> tuple[Tensor, int]:
    """([count, length + answer] ids, tokens of the answer) of recall prompts."""
    samples = shipped_lm.samples("recall", length, count, seed)
    ids = torch.tensor([s.prompt + s.answer for s in samples])
    return ids, len(samples[0].answer)


def answer_loss(model: Any, ids: Tensor, answer: int, **options: Any) -> tuple[Tensor, Any]:
    out = model(ids[:, :-1], use_cache=False, **options)
    logits = out.logits[:, -answer:]
    return F.cross_entropy(logits.flatten(0, 1).double(), ids[:, -answer:].flatten()), out


def influence(model: Any, ids: Tensor, answer: int) -> list[Tensor]:
    """[H, N, N] for each layer: the predicted change of the loss when one entry of attention is masked, summed up.

    -A_j (G_j - Σ_k G_k A_k) / (1 - A_j) with G the gradient of the loss by A; a query that sees one key keeps it.
    """
    with torch.enable_grad():
        loss, out = answer_loss(model, ids, answer, output_attentions=True)
        grads = torch.autograd.grad(loss, out.attentions)
    found = []
    for a, g in zip(out.attentions, grads, strict=True):
        a, g = a.detach().double(), g.double()
        change = -a * (g - (g * a).sum(-1, keepdim=True)) / (1 - a).clamp(min=1e-9)
        found.append(change.masked_fill(a > 1 - 1e-9, 0.0).sum(0))
    return found


def foretold(model: Any) -> float:
    """Spearman's correlation of predicted and true changes of the loss, over entries drawn by their weight."""
    ids, answer = tokens_of(SHORT, 1, seed=5)
    predicted = torch.stack(influence(model, ids, answer))  # [L, H, N, N]
    layers, heads, n, _ = predicted.shape
    draw, changes = generator(), []
    at = [torch.randint(size, (4 * ENTRIES,), generator=draw) for size in (layers, heads, n, n)]
    entries = [e for e in zip(*(x.tolist() for x in at), strict=True) if 0 < e[3] <= e[2]][:ENTRIES]
    with torch.no_grad():
        base = answer_loss(model, ids, answer)[0].item()
        for layer, head, i, j in entries:
            edit = Edit(Site("scores", layers=layer, heads=head, rows=i, keys=j), "block")
            with attach(model, edit):
                changes.append(answer_loss(model, ids, answer)[0].item() - base)
    both = torch.stack([torch.tensor([predicted[e].item() for e in entries]), torch.tensor(changes)])
    return torch.corrcoef(both.argsort(-1).argsort(-1).double())[0, 1].item()


def seen(share: float, n: int) -> Tensor:
    """[n, n] bool: the page's mask for one head whose span is this share of the length."""
    return page.build(page.Config(alpha=(0.0,), beta=(share,), length=n, sinks=SINKS, block=BLOCK)).dense(n)[
        0, 0
    ]


def density(share: float, n: int) -> float:
    return seen(share, n).sum().item() / (n * (n + 1) / 2)


def profile(model: Any) -> Tensor:
    """[L, H, shares] the predicted rise of the loss, the mean over the lengths."""
    parts = []
    for n in LENGTHS:
        ids, answer = tokens_of(n, PROFILED, seed=7)
        change = torch.stack(influence(model, ids, answer)) / PROFILED
        m = change.shape[-1]
        hidden = [torch.ones(m, m, dtype=torch.bool).tril() & ~seen(share, m) for share in SHARES]
        parts.append(torch.stack([(change * h).sum((-1, -2)) for h in hidden], -1))
    return torch.stack(parts).mean(0)


def chosen(costs: Tensor, budget: float) -> Tensor:
    """[L, H] which share each head has: from the shortest on, always the step that saves most for its density."""
    dense = torch.tensor([mean(density(share, n) for n in LENGTHS) for share in SHARES])
    at = torch.zeros(costs.shape[:2], dtype=torch.long)
    while True:
        steps = []
        for layer, head in product(*map(range, at.shape)):
            now = int(at[layer, head])
            for up in range(now + 1, len(SHARES)):
                saved = float(costs[layer, head, now] - costs[layer, head, up])
                more = float(dense[up] - dense[now])
                if float(dense[at].mean()) + more / at.numel() <= budget:
                    steps.append((saved / more, layer, head, up))
        if not steps or max(steps)[0] <= 0:
            return at
        _, layer, head, up = max(steps)
        at[layer, head] = up


def converted(shares: Tensor, n: int) -> Converted:
    """The mask page with spans of each layer and head [L, H], shares of the length."""

    def settings(row: Tensor) -> dict[str, Any]:
        beta = tuple(row.tolist())
        return {"alpha": (0.0,) * len(beta), "beta": beta}

    cfg = page.Config(**settings(shares[0]), length=n, sinks=SINKS, block=BLOCK)
    by_layer = {layer: settings(row) for layer, row in enumerate(shares)}
    return Converted(Method("moa_spans", page.METHOD, cfg), by_layer=by_layer)


def loss_under(model: Any, shares: Tensor | None, n: int) -> float:
    ids, answer = tokens_of(n, JUDGED, seed=23)
    with torch.no_grad():
        if shares is None:
            return answer_loss(model, ids, answer)[0].item()
        with attach(model, converted(shares, n)):
            return answer_loss(model, ids, answer)[0].item()


def measure() -> Measured:
    model = shipped_lm.shipped().model
    exact = copy.deepcopy(model).double().eval()
    exact.config._attn_implementation = "eager"
    rank = foretold(exact)
    slow = copy.deepcopy(model).eval()
    slow.config._attn_implementation = "eager"
    costs = profile(slow)
    uniform = max(s / 256 for s in range(8, 257) if mean(density(s / 256, n) for n in LENGTHS) <= DENSITY)
    same = torch.full(costs.shape[:2], uniform)
    budget = mean(density(uniform, n) for n in LENGTHS)
    picked = torch.tensor(SHARES)[chosen(costs, budget)]
    numbers: dict[str, Any] = {
        "spearman": rank,
        "uniform_share": uniform,
        "shares_by_layer_and_head": picked.tolist(),
    }
    for n in (LENGTHS[-1], LONGER):
        ours = mean(density(s, n) for s in picked.flatten().tolist())
        numbers[f"density_{n}"] = {"moa": ours, "uniform": density(uniform, n)}
        sides = {"full": None, "uniform": same, "moa": picked}
        numbers[f"loss_{n}"] = {name: loss_under(model, shares, n) for name, shares in sides.items()}
    lower = [numbers[f"loss_{n}"]["moa"] < numbers[f"loss_{n}"]["uniform"] for n in (LENGTHS[-1], LONGER)]
    return Measured.by({"ranks": rank >= 0.8, "loss": lower[0], "longer": lower[1]}, numbers)


CLAIM = Claim(
    name="moa_spans",
    statement=(
        "the influence formula predicts the true loss change of masking single attention entries; at equal mean "
        "density, optimised spans by head give lower loss than a uniform window on the shipped language model"
    ),
    bound=(
        "Spearman(predicted, true) >= 0.8 on 200 entries; loss(MoA) < loss(uniform) at 50 % density at the profiled "
        "and a 1.5x length"
    ),
    measure=measure,
)
