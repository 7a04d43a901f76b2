"""TransNeXt's claim: scores scaled by log N keep more of what a model learned on small images when it reads large ones.

A network of two of the paper's blocks (aggregated attention, ConvGLU) learns scikit-learn's digits of 8 x 8 pixels, a
token each, and is then asked the same digits stretched to 24 x 24, where a place reads 153 keys instead of 25. Beside
it stands the same network whose scores are scaled by the logarithm of 25 on any image: a temperature that is learned,
and then fixed. Both begin alike, see the same batches, and have the best of the learning rates, chosen at 8 x 8 on
images that neither learns from nor is judged by. Steps to averages are counted as at training, as the paper's are.

As in the paper's recipe they learn from random crops, resized to 8 x 8. Without them both sides are right as often as
chance has it at 24 x 24, whatever the scale of their scores (7 % and 11 %): nothing near looks as it did.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard import catalog
from regard.claims.digits import digits
from regard.claims.lab import generator, mean, seeded, sweep, threads
from regard.core import Method
from regard.core.claim import Claim, Measured
from regard.core.roles import Roles
from regard.kinds.mechanism import run
from regard.nn.layers import Learned
from regard.train.loop import fit, one_cycle

WIDTH, HEADS, DEPTH, SMALL, LARGE = 32, 2, 2, 8, 24
HIDDEN = int(2 / 3 * 4 * WIDTH)  # of ConvGLU
RATES, SEEDS, STEPS, BATCH, ZOOM = (5e-3, 1e-2, 2e-2), (0, 1, 2), 300, 32, 2.5
KEYS = 9.0 + (SMALL // 2) ** 2  # that a place inside a small image reads
SIDES = {"log_n": None, "fixed": KEYS}
DIMS = {"heads": HEADS, "kv_heads": HEADS, "key": WIDTH // HEADS, "value": WIDTH // HEADS, "width": WIDTH}


class Block(nn.Module):
    """x + attention(norm x), x + ConvGLU(norm x)."""

    def __init__(self, length: float | None) -> None:
        super().__init__()
        self.method = catalog.method("transnext", trained=SMALL, length=length, hidden=64)
        self.params = Learned(self.method, DIMS)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.near = nn.Conv2d(HIDDEN, HIDDEN, 3, padding=1, groups=HIDDEN)

    def forward(self, x: Tensor, side: int) -> Tensor:
        y = self.norms[0](x)
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(y).chunk(3, -1))
        mixed = attended(self.method, q, k, v, y, side, self.params.tensors())
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        gate, value = self.up(self.norms[1](x)).chunk(2, -1)
        gate = self.near(gate.mT.unflatten(2, (side, side))).flatten(2).mT
        return x + self.down(F.gelu(gate) * value)


class Network(nn.Module):
    """Pixels [B, 1, y, x] to the logits of ten digits."""

    def __init__(self, length: float | None) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, WIDTH, 3, padding=1)
        self.blocks = nn.ModuleList(Block(length) for _ in range(DEPTH))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images).flatten(2).mT
        for block in self.blocks:
            x = block(x, images.shape[-1])
        return self.head(self.norm(x).mean(1))


def attended(
    method: Method, q: Tensor, k: Tensor, v: Tensor, x: Tensor, side: int, params: dict[str, Tensor]
) -> Tensor:
    return run(method, q, k, v, pattern="self", x=x, roles=Roles.grid(side, side), params=params)[0]


def crops(images: Tensor, g: torch.Generator) -> Tensor:
    """A part of each image, of a random side and place, stretched to the whole."""
    part = 1 / (1 + (ZOOM - 1) * torch.rand(len(images), 1, generator=g))
    corner = (2 * torch.rand(len(images), 2, generator=g) - 1) * (1 - part)
    theta = torch.cat([part[..., None] * torch.eye(2), corner[..., None]], dim=-1)
    places = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, places, padding_mode="border", align_corners=False)


def learnt(length: float | None, rate: float, seed: int) -> Network:
    with seeded(seed):
        network = Network(length)
    data, g = digits()["train"], generator(seed)

    def loss_at(step: int) -> Tensor:
        rows = torch.randint(len(data.images), (BATCH,), generator=g)
        return F.cross_entropy(network(crops(data.images[rows], g)), data.labels[rows])

    fit(
        torch.optim.AdamW(network.parameters(), rate, weight_decay=0.05), loss_at, STEPS, schedule=one_cycle()
    )
    return network.eval()


@torch.no_grad()
def accuracy(network: Network, part: str, side: int) -> float:
    """Percent of right answers on a part, its images stretched to this side."""
    images, labels = digits()[part]
    images = images if side == SMALL else F.interpolate(images, (side, side), mode="bilinear")
    answers = torch.cat([network(rows).argmax(1) for rows in images.split(50)])
    return 100 * (answers == labels).double().mean().item()


def held(network: Network) -> Network:
    """The network with the N of small images from here on."""
    for block in network.modules():
        if isinstance(block, Block):
            block.method = block.method.with_settings(length=KEYS)
    return network


def compared(length: float | None) -> dict[str, list]:
    """Of each seed: accuracies at both sizes, and at the large one with the N of the small one."""
    first = sweep(RATES, lambda rate: learnt(length, rate, SEEDS[0]))
    best = max(RATES, key=lambda rate: accuracy(first[rate], "choice", SMALL))
    networks = [first[best], *(learnt(length, best, seed) for seed in SEEDS[1:])]
    found = {"rate": [best]} | {
        f"at_{side}": [accuracy(n, "test", side) for n in networks] for side in (SMALL, LARGE)
    }
    return found | (
        {"at_24_held": [accuracy(held(n), "test", LARGE) for n in networks]} if length is None else {}
    )


def sums() -> float:
    """|Σ weights - 1| of one softmax over near places and averages: values of 1 come out as 1, at both sizes."""
    method, off = catalog.method("transnext"), []
    with seeded(0):
        params = method.page.init(method.config, DIMS)
    params |= {name: torch.zeros_like(params[name]) for name in ("tokens", "token_bias", "pool_v")}
    params["pool_v_bias"] = torch.ones_like(params["pool_v_bias"])
    for side in (SMALL, LARGE):
        q, k, x = (torch.randn(1, 2, side * side, 16, generator=generator(i)) for i in range(3))
        out = attended(method, q, k, torch.ones_like(k), x.transpose(1, 2).flatten(2), side, params)
        off.append((out - 1).abs().max().item())
    return max(off)


def measure() -> Measured:
    with threads(1):
        sides = {name: compared(length) for name, length in SIDES.items()}
    drops = {name: mean(found["at_8"]) - mean(found["at_24"]) for name, found in sides.items()}
    off, ratio = sums(), drops["log_n"] / drops["fixed"]
    parts = {
        "both learn": min(mean(found["at_8"]) for found in sides.values()) >= 80,
        "one softmax": off < 1e-5,
        "log N loses less": drops["fixed"] > 0 and ratio <= 0.7,
    }
    numbers = {"off_one": off, "ratio": ratio} | {f"drop_{name}": drop for name, drop in drops.items()}
    numbers |= {f"{name}_{key}": value for name, found in sides.items() for key, value in found.items()}
    return Measured.by(parts, numbers)


CLAIM = Claim(
    name="transnext",
    statement=(
        "trained on 8 x 8 digits, aggregated attention with scores scaled by log N loses less accuracy on digits "
        "stretched to 24 x 24 than the same network with a fixed temperature"
    ),
    bound=(
        "drop of accuracy with log N <= 0.7 times that with a fixed temperature, mean of 3 seeds, both at least 80 % "
        "at 8 x 8; weights of near places and averages sum to 1 within 1e-5"
    ),
    measure=measure,
    fails=("log N loses less",),
    contradicted=(
        "with log N digits stretched to 24 x 24 cost 45.2 points, with a fixed temperature 49.5: 0.91 times as many. "
        "log N does help the network that learned with it: with the N of small images it answers 33.1 % instead of "
        "36.4 % at 24 x 24. But that is 3 points of 45, since most of the loss is not of the softmax: windows and "
        "depthwise convolutions see strokes three times as wide. Without random crops in training both sides are at "
        "chance at 24 x 24"
    ),
)
