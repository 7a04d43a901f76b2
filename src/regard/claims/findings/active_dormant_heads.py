"""Active and dormant: a head that rests on the first token of a text until a trigger token calls it.

Bigram-Backcopy. A text starts with <s>, then a token that is no trigger; after it

    x_{t+1} = x_{t-1}          where x_t is a trigger (one of the three most frequent tokens)
    x_{t+1} ~ P(x_t, ·)        elsewhere: the character that follows a random occurrence of x_t in the held-out text

so a trigger never follows a trigger. One layer with one head and an MLP learns it: the MLP knows P, the head copies.
Softmax must spend its whole mass on every query; where there is nothing to copy it goes to <s>, whose value is small.
ReLU attention, relu(q·k/√D) / i with i visible keys, may spend nothing. Its share of <s> is of the row's own sum, and
rows that spend nothing have none: `relu_share_non_trigger` is the mean over the others, the larger of two readings,
and `relu_silent_non_trigger` says how many spend nothing.

The mass on <s> is A[i, <s>], a mean over queries i >= 1 of unseen texts; values are those of the head, |v_<s>| against
the median over all tokens of these texts. That the copy was learned is measured at the triggers: their loss would be
0 if it were perfect, and the loss elsewhere exceeds the entropy of P by `excess_non_trigger`. Text length, width and
batch are smaller than in the released code (64 for 256, 64 for 256, 64 for 512) and the rate is larger (3e-4 there, and
3e-3 in ten times the steps for ReLU). Rates and steps were chosen on seed 9 by the loss: with 1e-2 it is lower than
with 3e-3 for both. Measured are seeds 0 and 1. The sink grows while the copy is learned, not before (`moments`).

Where SmolLM2 is installed its heads are counted as well, without a bound: the paper's thresholds are of a toy. A head
rests in a text where it gives the first token at least 0.7 on average over queries (from the 16th on), is dormant where
it rests in most texts, drained where |v_first| is at most half the median, and active at a query where it gives at most
0.3. The texts are documentation, sources of Python and random tokens that repeat.
"""

import sysconfig
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW

from regard.attaching.attachment import attach
from regard.claims.characters import characters
from regard.claims.lab import generator, seeded, threads
from regard.core.claim import Claim, Measured
from regard.core.edit import Observer
from regard.core.errors import NotInstalled
from regard.models.shipped import load_shipped, pretrained
from regard.tasks.corpus import encode, held_out
from regard.train.loop import cosine, fit

KNOWN, FIRST, TRIGGERS = 63, 63, 3  # characters that are told apart, the number of <s>
T, WIDTH, BATCH, STEPS = 64, 64, 64, 500
RATES = {"softmax": 1e-2, "relu": 1e-2}
SEEDS, TESTED = (0, 1), 256
CHOICES = 4096  # successors of a character that are drawn from
MOMENTS = (0, 25, 50, 100, 200)  # steps after which the head of the first seed is looked at, before the end
Inside = dict[str, Tensor]

REAL = "smollm2"
PIECES, LENGTH, SETTLED = 4, 160, 16  # texts of a kind, their tokens, the first query that counts
SOURCES, READ = ("argparse.py", "ast.py"), 60_000  # files of the standard library, characters that are read


# texts


@cache
def successors() -> Tensor:
    """[KNOWN, CHOICES]: what follows a random occurrence of each character; the most frequent one is 0."""
    _, train, held = characters()
    ids = torch.cat([train, held])
    order = ids.bincount().argsort(descending=True)
    number = torch.full((len(order),), KNOWN).scatter(0, order[:KNOWN], torch.arange(KNOWN))
    ids = number[ids]
    ids = ids[ids < KNOWN]
    g = generator(5)
    follows = [ids[1:][ids[:-1] == c] for c in range(KNOWN)]
    return torch.stack([f[torch.randint(len(f), (CHOICES,), generator=g)] for f in follows])


@cache
def bigram() -> Tensor:
    """P [KNOWN, KNOWN]."""
    return F.one_hot(successors(), KNOWN).double().mean(1)


def texts(count: int, g: torch.Generator) -> Tensor:
    """[count, T + 1]"""
    x = torch.full((count, T + 1), FIRST)
    x[:, 1] = torch.randint(TRIGGERS, KNOWN, (count,), generator=g)
    for t in range(1, T):
        drawn = successors()[x[:, t], torch.randint(CHOICES, (count,), generator=g)]
        x[:, t + 1] = torch.where(x[:, t] < TRIGGERS, x[:, t - 1], drawn)
    return x


# the model


class OneLayer(nn.Module):
    """x + attend(norm x), then y + MLP(norm y), norm, logits; one head, positions learned."""

    def __init__(self, relu: bool) -> None:
        super().__init__()
        self.relu = relu
        self.token, self.place = nn.Embedding(KNOWN + 1, WIDTH), nn.Embedding(T, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)
        self.logits = nn.Linear(WIDTH, KNOWN + 1, bias=False)

    def inside(self, x: Tensor) -> tuple[Tensor, Inside]:
        """Logits [B, N, V]; weights [B, N, N] and values [B, N, D] of the head."""
        h = self.token(x) + self.place.weight[: x.shape[1]]
        q, k, v = self.qkv(self.norms[0](h)).chunk(3, -1)
        weights = attention(q @ k.mT / WIDTH**0.5, self.relu)
        h = h + self.out(weights @ v)
        h = h + self.down(self.up(self.norms[1](h)).relu())
        return self.logits(self.norms[2](h)), {"weights": weights, "values": v}

    def forward(self, x: Tensor) -> Tensor:
        return self.inside(x)[0]


def attention(scores: Tensor, relu: bool) -> Tensor:
    """Weights [B, N, N] that look back: softmax, or relu over the number of visible keys.

    >>> attention(torch.tensor([[[1.0, 9.0], [-1.0, 3.0]]]), relu=True)
    tensor([[[1.0000, 0.0000],
             [0.0000, 1.5000]]])
    """
    n = scores.shape[-1]
    hidden = torch.ones(n, n, dtype=torch.bool).triu(1)
    if relu:
        return scores.relu().masked_fill(hidden, 0.0) / torch.arange(1, n + 1)[:, None]
    return scores.masked_fill(hidden, float("-inf")).softmax(-1)


def model_of(side: str, seed: int) -> OneLayer:
    with seeded(seed):
        return OneLayer(side == "relu")


def trained(side: str, seed: int) -> tuple[OneLayer, dict[str, list[float]]]:
    """The model, and what its head did at MOMENTS: the loss at triggers, the share of <s>, the ratio of its value."""
    model, g = model_of(side, seed), generator(100 + seed)
    looked: dict[str, list[float]] = {
        name: [] for name in ("loss_trigger", "share_non_trigger", "value_ratio")
    }
    optimizer = AdamW(model.parameters(), RATES[side], betas=(0.9, 0.99), weight_decay=1e-4)

    def loss_at(step: int) -> Tensor:
        if step in MOMENTS:
            found = findings(model, seed)
            for name, values in looked.items():
                values.append(found[name])
        x = texts(BATCH, g)
        return F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())

    fit(optimizer, loss_at, STEPS, schedule=cosine())
    return model, looked


# what the head does


def shares(weights: Tensor) -> tuple[Tensor, Tensor]:
    """(share of <s> in each row's own sum, whether the row spends anything), both [B, N]."""
    spent = weights.sum(-1)
    return weights[..., 0] / spent.clamp(min=1e-30), spent > 0


@torch.no_grad()
def findings(model: OneLayer, seed: int) -> dict[str, float]:
    x = texts(TESTED, generator(200 + seed))
    seen, wanted = x[:, :-1], x[:, 1:]
    logits, inside = model.inside(seen)
    loss = F.cross_entropy(logits.mT, wanted, reduction="none")
    right = logits.argmax(-1) == wanted
    share, spends = shares(inside["weights"])
    trigger = seen < TRIGGERS
    other = ~trigger & (seen != FIRST)
    best = -bigram()[seen[other], wanted[other]].log()
    norms = inside["values"].norm(dim=-1)
    return {
        "share_non_trigger": share[other & spends].mean().item(),
        "share_trigger": share[trigger & spends].mean().item(),
        "silent_non_trigger": (~spends)[other].double().mean().item(),
        "silent_trigger": (~spends)[trigger].double().mean().item(),
        "value_ratio": (norms[:, 0].mean() / norms[:, 1:].median()).item(),
        "loss_trigger": loss[trigger].mean().item(),
        "right_trigger": right[trigger].double().mean().item(),
        "excess_non_trigger": (loss[other].double() - best).mean().item(),
    }


# a real model


def real_texts(tokenizer: Any) -> dict[str, Tensor]:
    """Kind -> [PIECES, LENGTH] token ids, each text after the tokenizer's first token."""
    g = generator(3)
    source = "\n".join((Path(sysconfig.get_paths()["stdlib"]) / f).read_text("utf8") for f in SOURCES)
    ids = {"documentation": held_out().text, "source": source}
    kinds = {kind: spread(torch.tensor(encode(tokenizer, text[:READ]))) for kind, text in ids.items()}
    period = torch.randint(len(tokenizer), (PIECES, LENGTH // 4), generator=g)
    kinds["repeated"] = period.repeat(1, 4)[:, : LENGTH - 1]
    return {kind: F.pad(x, (1, 0), value=tokenizer.bos_token_id) for kind, x in kinds.items()}


def spread(ids: Tensor) -> Tensor:
    """[PIECES, LENGTH - 1] from places that lie evenly in a text."""
    starts = torch.linspace(0, len(ids) - LENGTH, PIECES).long()
    return ids[starts[:, None] + torch.arange(LENGTH - 1)]


@torch.no_grad()
def on_first(model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Weight on the first token [B, layers, H, N]; |v_first| over the median of the others [B, layers, G]."""
    observer = Observer("mass_at", keys_of=lambda rows: rows * 0, name="first")
    with attach(model, [observer]) as attached:
        cache = model(ids, use_cache=True).past_key_values
    mass = torch.stack([seen for _, _, seen in sorted(attached.records["first"], key=lambda r: r[0])], 1)
    norms = torch.stack([layer.values.norm(dim=-1) for layer in cache.layers], 1)  # [B, layers, G, N]
    return mass, norms[..., 0] / norms[..., 1:].median(-1).values


def real_heads() -> dict[str, Any]:
    """How many heads of SmolLM2 rest on the first token in most texts, drained, and leave it somewhere."""
    model, tokenizer = load_shipped(REAL)
    by_kind = {kind: on_first(model, ids) for kind, ids in real_texts(tokenizer).items()}
    mass = torch.cat([m for m, _ in by_kind.values()])[..., SETTLED:]  # [texts, layers, H, queries]
    ratio = torch.cat([r for _, r in by_kind.values()]).median(0).values  # [layers, G]
    drained = ratio.repeat_interleave(mass.shape[2] // ratio.shape[1], 1) <= 0.5
    by_text = mass.mean(-1)
    dormant = (by_text >= 0.7).double().mean(0) > 0.5
    rests = dormant & drained
    leaves = (mass <= 0.3).double().mean((0, 3))  # share of queries
    wakes = (by_text <= 0.3).any(0)
    kinds = {kind: m[..., SETTLED:].mean().item() for kind, (m, _) in by_kind.items()}
    return {
        "heads": rests.numel(),
        "dormant": int(dormant.sum()),
        "dormant_and_drained": int(rests.sum()),
        "of_these_active_at_a_query": int((rests & (leaves > 0)).sum()),
        "of_these_active_at_1_percent_of_queries": int((rests & (leaves >= 0.01)).sum()),
        "of_these_active_in_a_whole_text": int((rests & wakes).sum()),
        "value_ratio_of_dormant": ratio_of(ratio, dormant),
        "value_ratio_of_others": ratio_of(ratio, ~dormant),
        **{f"share_{kind}": share for kind, share in kinds.items()},
    }


def ratio_of(ratio: Tensor, heads: Tensor) -> float:
    return ratio.repeat_interleave(heads.shape[1] // ratio.shape[1], 1)[heads].median().item()


def real_numbers() -> dict[str, Any]:
    try:
        pretrained(REAL)
    except NotInstalled as error:
        return {REAL: f"not measured: {error}"}
    return {f"{REAL}_{name}": value for name, value in real_heads().items()}


# the claim


def measure() -> Measured:
    found: dict[str, list[dict[str, float]]] = {side: [] for side in RATES}
    numbers: dict[str, Any] = {
        "untrained_share_non_trigger": findings(model_of("softmax", 0), 0)["share_non_trigger"]
    }
    with threads(1):
        for side, seed in product(RATES, SEEDS):
            model, looked = trained(side, seed)
            found[side].append(findings(model, seed))
            if (side, seed) == ("softmax", SEEDS[0]):
                numbers |= {"moments": list(MOMENTS)} | {
                    f"moments_{name}": row for name, row in looked.items()
                }
        real = real_numbers()
    for side, rows in found.items():
        numbers |= {f"{side}_{name}": [row[name] for row in rows] for name in rows[0]}
    return Measured.by(bounds(found), numbers | real)


def bounds(found: dict[str, list[dict[str, float]]]) -> dict[str, bool]:
    """Of every seed; and both kinds of attention have learned to copy."""
    softmax, relu = found["softmax"], found["relu"]
    by_seed = zip(relu, softmax, strict=True)
    return {
        "copies": all(row["right_trigger"] >= 0.95 for row in softmax + relu),
        "dormant": all(row["share_non_trigger"] >= 0.7 for row in softmax),
        "values": all(row["value_ratio"] <= 0.5 for row in softmax),
        "active": all(row["share_trigger"] <= 0.3 for row in softmax),
        "relu": all(r["share_non_trigger"] <= 0.5 * s["share_non_trigger"] for r, s in by_seed),
    }


CLAIM = Claim(
    name="active_dormant_heads",
    statement=(
        "one layer trained by Adam to copy after trigger tokens and to follow a bigram table elsewhere sends its "
        "attention to <s>, whose value is small, where there is nothing to copy, and takes it away from there at the "
        "triggers; with ReLU attention there is no such sink"
    ),
    bound=(
        "on every seed attention to <s> >= 0.7 (non-trigger queries) and <= 0.3 (trigger queries), |v_<s>| <= 0.5 of "
        "the median |v|, the share with ReLU at most half; at least 95 % of the copies right on both sides; heads of "
        "SmolLM2 are counted where it is installed"
    ),
    measure=measure,
)
