"""Mixture-of-head attention's claim: neutral, it is multi-head attention; with 3/4 of the heads on, as good a model.

A language model of two layers (width 64, eight heads of 8, rotary positions, SwiGLU) reads Python's help topics byte
by byte, 128 at a time; the last tenth of the topics is for validation. On one side all eight heads answer every byte,
on the other the page with its own settings: four heads shared, two of the other four chosen. Both sides have the same
weights to begin with, the same batches, and the better of two learning rates, by the mean over the seeds. The loss
of the second is trained with 0.01 of the balance beside it; the losses compared are the text's alone.
"""

import pydoc_data.topics
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.claims.lab import difference, generator, mean, random_qkv, seeded, threads
from regard.core.call import Call
from regard.core.claim import Claim, Measured
from regard.methods.mechanisms.dense.moh import METHOD as page
from regard.methods.mechanisms.dense.moh import Config
from regard.nn.layers import RMSNorm, SwiGLU
from regard.ops import softmax_attention
from regard.ops.rotary import rotate
from regard.train.loop import fit, one_cycle

WIDTH, HEADS, LAYERS, LENGTH, BATCH, STEPS = 64, 8, 2, 128, 8, 400
RATES, SEEDS, BALANCE, TESTED = (4e-3, 8e-3), (0, 1, 2), 0.01, 96
ALL, SOME = Config(active=1.0, router="norms"), Config()


@cache
def text() -> tuple[Tensor, Tensor]:
    """Bytes to train on, and to validate on."""
    topics = pydoc_data.topics.topics
    joined = "\n\n".join(topics[name] for name in sorted(topics)).encode()
    ids = torch.tensor(list(joined))
    cut = len(ids) * 9 // 10
    return ids[:cut], ids[cut:]


def batch(ids: Tensor, rows: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Inputs and labels [rows, LENGTH] from random places."""
    start = torch.randint(len(ids) - LENGTH, (rows, 1), generator=g)
    spans = ids[start + torch.arange(LENGTH + 1)]
    return spans[:, :-1], spans[:, 1:]


class Layer(nn.Module):
    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg, self.norm, self.mlp_norm = cfg, RMSNorm(WIDTH), RMSNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.mlp = SwiGLU(WIDTH, 2 * WIDTH)
        # drawn last, so that both sides begin with the same weights
        self.params = nn.ParameterDict()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.norm(x)
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(h).chunk(3, -1))
        at = torch.arange(x.shape[1])[None]
        q, k = rotate(q, at, 1e4), rotate(k, at, 1e4)
        call = Call(params=dict(self.params), x=h if page.reads_x(self.cfg) else None)
        out, _, aux = page.fast(q, k, v, self.cfg, call)
        x = x + self.out(out.transpose(1, 2).flatten(2))
        return x + self.mlp(self.mlp_norm(x)), aux.get("balance", x.new_zeros(()))


class Model(nn.Module):
    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.embed, self.layers = nn.Embedding(256, WIDTH), nn.ModuleList(Layer(cfg) for _ in range(LAYERS))
        self.norm, self.head = RMSNorm(WIDTH), nn.Linear(WIDTH, 256, bias=False)
        for layer in self.layers:
            layer.params = nn.ParameterDict(page.init(cfg, {"heads": HEADS, "width": WIDTH}))

    def losses(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The text's, and the mean balance of the layers."""
        x, balances = self.embed(inputs), []
        for layer in self.layers:
            x, balance = layer(x)
            balances.append(balance)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten()), torch.stack(balances).mean()


def learned(cfg: Config, rate: float, seed: int) -> tuple[float, float]:
    """(validation loss, its balance) after training."""
    with seeded(seed):
        model = Model(cfg)
    train, held_out = text()
    g = generator(seed)

    def loss_at(step: int) -> Tensor:
        loss, balance = model.losses(*batch(train, BATCH, g))
        return loss + BALANCE * balance

    fit(torch.optim.AdamW(model.parameters(), rate, weight_decay=0.1), loss_at, STEPS, schedule=one_cycle())
    with torch.no_grad():
        loss, balance = model.losses(*batch(held_out, TESTED, generator(10**6)))
    return loss.item(), balance.item()


def side(cfg: Config) -> dict[str, Any]:
    """The better rate: its losses by seed, and the last balance."""
    runs = {rate: [learned(cfg, rate, seed) for seed in SEEDS] for rate in RATES}
    rate = min(runs, key=lambda r: mean(loss for loss, _ in runs[r]))
    losses = [round(loss, 4) for loss, _ in runs[rate]]
    return {"rate": rate, "losses": losses, "loss": mean(losses), "balance": runs[rate][-1][1]}


def from_all_heads() -> float:
    """Largest |difference| of all heads on, with routers of zero, from multi-head attention, in float32."""
    q, k, v = random_qkv(generator(), HEADS, 200, 16)
    cfg, x = Config(active=1.0), torch.randn(1, 200, WIDTH, generator=generator(1))
    params = {
        name: torch.zeros_like(p) for name, p in page.init(cfg, {"heads": HEADS, "width": WIDTH}).items()
    }
    out = page.fast(q, k, v, cfg, Call(params=params, x=x))[0]
    return difference(out, softmax_attention(q, k, v, scale=16**-0.5, causal=True))


def measure() -> Measured:
    with threads(1):  # the matrices are small
        apart, every, some = from_all_heads(), side(ALL), side(SOME)
    ratio = some["loss"] / every["loss"]
    numbers: dict[str, Any] = {"difference": apart, "ratio": ratio}
    numbers |= {f"all_{name}": value for name, value in every.items() if name != "balance"}
    numbers |= {f"moh_{name}": value for name, value in some.items()}
    return Measured.by({"neutral is multi-head": apart < 1e-5, "as good a loss": ratio <= 1.01}, numbers)


CLAIM = Claim(
    name="moh",
    statement=(
        "with all heads on and routers of zero it is multi-head attention; a small language model with 75 % of its "
        "heads on reaches the validation loss of one with all of them"
    ),
    bound="difference < 1e-5; validation loss on Python's help topics <= 1.01 x that of all heads, mean of 3 seeds",
    measure=measure,
    fails=("as good a loss",),
    contradicted=(
        "with routers of zero it is multi-head attention (difference 0), but trained for these 400 steps its loss "
        "is 1.045 times that of all heads (1.029 to 1.062 by seed). Both sides have the same best rate; at 1.6e-2 "
        "both are worse. Tried at seed 0, where it is 1.029: 1,200 steps, 1.022 times (1.367 against 1.338); "
        "without the balance loss, 1.017; all eight heads on, behind the same learned gates, 1.016; width 96 and "
        "twice the batch at 4e-3, 1.023. So gates and balance cost more here than the heads that are left out, and "
        "longer training makes up for a part only; the paper's models see far more text"
    ),
)
