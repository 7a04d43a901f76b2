"""ANCAT's claim, on streams of which a few frames need the future: look-ahead is learned for these alone.

A frame is a symbol out of 16 and a mark. Unmarked, it is labelled by the symbol of the frame before it; marked A (one
in sixteen), by that two frames ahead; marked B (one in sixteen), by that five frames ahead. Two layers (width 64,
rotary positions) may look eight frames ahead each:

    adaptive    the page with hard gates, when asked and in training too; their gradients are those of soft gates.
                A penalty on the composed look-ahead sets in after a third of the training, and in the last fifth the
                gates stand still
    full        all eight frames ahead in both layers
    causal      none

Trained with soft gates as they stand, and made hard at the end, the model learns nothing that lasts: scores make up
for gates that the penalty closes (a gate of 0.1 is a score of -2.3), and the hard ones are all shut (three settings
tried). What trains well was looked for at seed 0, in eight settings: with gates as here and a penalty of 0.03 and 0.01
the accuracy was 95.9 and 97.9 %, so the penalty was lowered once more. The seeds here are fresh.

What counts as look-ahead is what an output waits for after both layers (`reach` of the hard gates): a layer that reads
a past frame waits for what that frame waited for in the layer below.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.claims.lab import generator, mean, seeded, threads
from regard.core.call import Call
from regard.core.claim import Claim, Measured
from regard.methods.mechanisms.dense import ancat as page
from regard.nn.layers import RMSNorm, SwiGLU
from regard.ops import softmax_attention
from regard.ops.rotary import rotate
from regard.train.loop import fit, one_cycle

SYMBOLS, AHEAD, NEEDED, SHARE = 16, 8, (2, 5), 1 / 16
LENGTH, WIDTH, HEADS, LAYERS, THETA = 32, 64, 4, 2, 100.0
STEPS, LEARNED, BATCH, RATE, TESTED, SEEDS = 600, 0.8, 32, 5e-3, 256, (1, 2, 3)
PENALTY, RAMP = 0.003, (0.3, 0.7)  # of a frame of look-ahead; from none to all of it, as shares of the steps
SHORTER = 4.0  # queries, where gates get their gradients


def streams(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Symbols [count, LENGTH], marks (0, or 1 for A and 2 for B), labels."""
    g = generator(seed)
    symbols = torch.randint(SYMBOLS, (count, LENGTH), generator=g)
    drawn = torch.rand(count, LENGTH, generator=g)
    marks = (drawn < 2 * SHARE).long() + (drawn < SHARE).long()
    offsets = torch.tensor([-1, *NEEDED])[marks]
    at = (torch.arange(LENGTH) + offsets).clamp(0, LENGTH - 1)
    return symbols, marks, symbols.gather(1, at)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp_norm, self.mlp = RMSNorm(WIDTH), RMSNorm(WIDTH), SwiGLU(WIDTH, 2 * WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)
        self.params = nn.ParameterDict(page.init(page.Config(ahead=AHEAD), {"width": WIDTH}))

    def forward(self, x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
        h, n = self.norm(x), x.shape[1]
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(h).chunk(3, -1))
        q, k = (rotate(t, torch.arange(n)[None], THETA) for t in (q, k))
        if kind in ("hard", "through"):
            out, gates = self.gated(q, k, v, h, kind)
        else:
            gates = x.new_full((len(x), n, AHEAD), float(kind == "full"))
            seen = torch.ones(n, n).tril(AHEAD if kind == "full" else 0).bool()
            out = softmax_attention(q, k, v, scale=q.shape[3] ** -0.5, mask=seen[None, None])
        x = x + self.out(out.transpose(1, 2).flatten(2))
        return x + self.mlp(self.mlp_norm(x)), gates

    def gated(self, q: Tensor, k: Tensor, v: Tensor, h: Tensor, kind: str) -> tuple[Tensor, Tensor]:
        """Output and gates. "through": the numbers of hard gates, whose gradients are those of soft ones on queries
        that are shorter, since a sharp softmax hardly feels a gate."""
        call = Call("self", params=dict(self.params), x=h)
        out, _, aux = page.METHOD.fast(q, k, v, page.Config(ahead=AHEAD, hard=True), call)
        if kind == "hard":
            return out, aux["gates"]
        tokens = q.detach() / SHORTER, k.detach(), v.detach()
        near, _, felt = page.METHOD.fast(*tokens, page.Config(ahead=AHEAD), call)
        gates = felt["gates"]
        return out + near - near.detach(), gates + (aux["gates"] - gates).detach()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.symbol, self.mark = nn.Embedding(SYMBOLS, WIDTH), nn.Embedding(3, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm, self.head = RMSNorm(WIDTH), nn.Linear(WIDTH, SYMBOLS)

    def forward(self, symbols: Tensor, marks: Tensor, kind: str) -> tuple[Tensor, Tensor]:
        """Logits [B, N, symbols], and how far each output looks ahead [B, N]."""
        x, gates = self.symbol(symbols) + self.mark(marks), []
        for layer in self.layers:
            x, opened = layer(x, kind)
            gates.append(opened)
        return self.head(self.norm(x)), page.reach(gates)


def learned(side: str, seed: int) -> dict[str, float]:
    with seeded(seed):
        model = Model()
    data = [t.split(BATCH) for t in streams(BATCH * STEPS, seed)]

    def loss_at(step: int) -> Tensor:
        symbols, marks, labels = (t[step] for t in data)
        kind = side if side != "adaptive" else "through" if step < LEARNED * STEPS else "hard"
        logits, waits = model(symbols, marks, kind)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        ramp = min(max(step / STEPS - RAMP[0], 0.0) / (RAMP[1] - RAMP[0]), 1.0)
        return loss + ramp * PENALTY * waits.mean() if kind == "through" else loss

    fit(torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.01), loss_at, STEPS, schedule=one_cycle())
    return results(model, "hard" if side == "adaptive" else side, 10**6 + seed)


@torch.no_grad()
def results(model: Model, kind: str, seed: int) -> dict[str, float]:
    """Accuracy in points, of all frames and of marked ones; mean look-ahead of all, marked and other frames."""
    symbols, marks, labels = streams(TESTED, seed)
    logits, waits = model(symbols, marks, kind)
    right, waits = (t[:, : LENGTH - AHEAD].double() for t in (logits.argmax(-1) == labels, waits))
    marked = marks[:, : LENGTH - AHEAD] > 0
    return {
        "accuracy": 100 * right.mean().item(),
        "accuracy_marked": 100 * right[marked].mean().item(),
        "ahead": waits.mean().item(),
        "ahead_marked": waits[marked].mean().item(),
        "ahead_unmarked": waits[~marked].mean().item(),
    }


def measure() -> Measured:
    with threads(1):  # the matrices are small
        runs = {side: [learned(side, seed) for seed in SEEDS] for side in ("full", "adaptive")}
        runs["causal"] = [learned("causal", SEEDS[0])]
    numbers: dict[str, Any] = {
        f"{name}_{side}": mean(r[name] for r in found)
        for side, found in runs.items()
        for name in found[0]
        if side == "adaptive" or name.startswith("accuracy")
    }
    # a mean of zero is counted as a hundredth of a frame
    ratio = numbers["ahead_marked_adaptive"] / max(numbers["ahead_unmarked_adaptive"], 0.01)
    share = numbers["ahead_adaptive"] / AHEAD
    lost = numbers["accuracy_full"] - numbers["accuracy_adaptive"]
    numbers |= {"marked_over_unmarked": ratio, "share_of_window": share, "points_lost": lost}
    parts = {
        "marked frames look ahead": ratio >= 5,
        "as accurate": lost <= 2,
        "at a fraction": numbers["ahead_adaptive"] <= 0.4 * AHEAD,
    }
    return Measured.by(parts, numbers)


CLAIM = Claim(
    name="ancat",
    statement=(
        "on streams where only marked frames need a later one, learned look-ahead concentrates there and is as "
        "accurate as a full window at a fraction of its look-ahead, over both layers"
    ),
    bound=(
        "mean look-ahead of marked over unmarked frames >= 5; accuracy within 2 points of the full window; mean "
        "look-ahead <= 40 % of the window (of one layer)"
    ),
    measure=measure,
)
