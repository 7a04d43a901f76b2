"""ViTGaze's claim: rows of attention that start on an arrow say where it points, features of the patches say less.

    scenes    4 x 4 patches of 4 x 4 pixels: an arrow in one of four directions, and four things, each of one of six
              patterns. One of them, the target, lies where the arrow points, near or far; no other does, and
              others lie behind the arrow and beside. Noise on all pixels
    tower     a vision transformer of two layers with four heads, 32 wide. It is trained to say which pattern the
              arrow points at, from the guided feature of the arrow's own patch, and never told where anything is;
              then it stays as it is
    maps      the guided rows of its eight heads, the logarithm of each
    features  its normed output at each patch, 32 numbers
    decoder   two linear maps of each patch with a ReLU between, which give a score; the softmax over patches is the
              answer. The middle is as wide as makes both decoders equally large, within 2 %. New scenes in every step,
              the same for both; the target's patch is asked of 2,000 others

A patch by itself does not say who asks, and finds little more than that a thing is there: most of the gain is that the
rows are those of the arrow. `and_guide` is the fairer side, without a bound: the features, the arrow's own beside them
at every patch, and a decoder twice as large. It finds far more than the features alone, and fewer than the maps.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.claims.lab import count_parameters, generator, mean, seeded, threads
from regard.core.claim import Claim, Measured
from regard.methods.tracing.vitgaze import guided_features
from regard.methods.tracing.vitgaze import measure as guided
from regard.nn.vision import VisionBackbone
from regard.train.loop import fit, one_cycle

SIDE, PATCH, THINGS, PATTERNS, NOISE = 4, 4, 4, 6, 0.1
WIDTH, HEADS, LAYERS = 32, 4, 2
STEPS, BATCH, RATE = 600, 64, 4e-3
DECODER_STEPS, DECODER_RATE, SEEDS, JUDGED = 300, 1e-2, range(3), 2000
# middle of the decoder
MIDDLES = {"maps": 54, "features": 16, "and_guide": 16}
INPUTS = {"maps": LAYERS * HEADS, "features": WIDTH, "and_guide": 2 * WIDTH}
DOWN_RIGHT = torch.tensor([[-1, 0], [0, 1], [1, 0], [0, -1]])
Scene = tuple[Tensor, Tensor, Tensor, Tensor]


def patterns() -> tuple[Tensor, Tensor]:
    """Arrows [4, 4, 4] by direction, and things [6, 4, 4], the same in every process."""
    up = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1], [0, 1, 1, 0], [0, 1, 1, 0]]).float()
    things = (torch.rand(PATTERNS, PATCH, PATCH, generator=generator(5)) < 0.5).float()
    return torch.stack([up.rot90(-i) for i in range(4)]), things


def scenes(count: int, g: torch.Generator) -> Scene:
    """(images [n, 1, 16, 16], where the arrow is [n], which thing it points at [n], where that is [n])."""
    arrows, things = patterns()
    n, every = SIDE * SIDE, torch.arange(SIDE * SIDE)
    yx = torch.stack([every // SIDE, every % SIDE], -1)
    away = yx - yx[:, None]  # [from, to, 2]
    ahead = torch.stack([(away.sign() == d).all(-1) for d in DOWN_RIGHT])  # [direction, from, to]
    points = ahead.any(-1).float().flatten()  # arrows that point at a patch or more
    chosen = points.expand(count, -1).multinomial(1, generator=g)[:, 0]
    direction, arrow = chosen // n, chosen % n
    seen = ahead[direction, arrow]  # [n, N]
    target = seen.float().multinomial(1, generator=g)[:, 0]
    free = ~seen & (every != arrow[:, None])
    others = free.float().multinomial(THINGS - 1, generator=g)
    at, thing = (
        torch.cat([target[:, None], others], 1),
        torch.randint(PATTERNS, (count, THINGS), generator=g),
    )
    patches = torch.zeros(count, n, PATCH, PATCH)
    patches[torch.arange(count), arrow] = arrows[direction]
    patches[torch.arange(count)[:, None], at] = things[thing]
    images = patches.view(count, SIDE, SIDE, PATCH, PATCH).transpose(2, 3).flatten(3).flatten(1, 2)[:, None]
    return images + NOISE * torch.randn(images.shape, generator=g), arrow, thing[:, 0], target


def inside(arrow: Tensor) -> Tensor:
    """[n, N] bool: the patch of the arrow."""
    return F.one_hot(arrow, SIDE * SIDE).bool()


def tower(seed: int) -> VisionBackbone:
    with seeded(seed):
        return VisionBackbone(
            mechanism="softmax", image_size=SIDE * PATCH, patch_size=PATCH, num_channels=1, hidden_sizes=WIDTH,
            depths=LAYERS, num_attention_heads=HEADS, mlp_ratio=2.0, num_labels=PATTERNS, initializer_range=0.1,
        )  # fmt: skip


def states(model: VisionBackbone, images: Tensor) -> Tensor:
    """[n, N, C] its normed output."""
    return model(images, output_hidden_states=True).hidden_states[-1]


def answers(model: VisionBackbone, images: Tensor, arrow: Tensor) -> Tensor:
    """Logits [n, 6] of what the arrow points at, from its own place."""
    return model.classifier(guided_features(states(model, images), inside(arrow).float()))


def weights(model: VisionBackbone, images: Tensor) -> tuple[list[Tensor], Tensor]:
    """(attention [n, H, N, N] of each layer, normed output [n, N, C])."""
    found: list[Tensor] = []

    def read(attention: nn.Module, args: tuple) -> None:
        q, k, _, _ = attention.project(args[0], args[0], None, None)  # type: ignore[operator]
        found.append((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1))

    layers = list(model.stages[0])  # type: ignore[call-overload]
    hooks = [layer.attention.register_forward_pre_hook(read) for layer in layers]
    try:
        return found, states(model, images)
    finally:
        for hook in hooks:
            hook.remove()


def trained_tower(seed: int, steps: int = STEPS, rate: float = RATE) -> VisionBackbone:
    model, g = tower(seed), generator(seed)

    def loss_at(step: int) -> Tensor:
        images, arrow, thing, _ = scenes(BATCH, g)
        return F.cross_entropy(answers(model, images, arrow), thing)

    fit(torch.optim.AdamW(model.parameters(), rate, weight_decay=0.01), loss_at, steps, schedule=one_cycle())
    return model.eval().requires_grad_(False)


@torch.no_grad()
def inputs(model: VisionBackbone, images: Tensor, arrow: Tensor) -> dict[str, Tensor]:
    """What each decoder is given, [n, N, channels]."""
    layers, x = weights(model, images)
    found = guided(layers, inside(arrow))
    own = guided_features(x, found.guide)[:, None].expand_as(x)
    maps = found.maps.clamp(min=1e-6).log()
    return {"maps": maps.mT, "features": x, "and_guide": torch.cat([x, own], -1)}


def decoder(side: str, seed: int) -> nn.Sequential:
    """A score for each patch."""
    with seeded(seed):
        middle = MIDDLES[side]
        return nn.Sequential(nn.Linear(INPUTS[side], middle), nn.ReLU(), nn.Linear(middle, 1), nn.Flatten())


def decoded(model: VisionBackbone, seed: int) -> dict[str, float]:
    """Percent of targets that are found, by side."""
    decoders, g = nn.ModuleDict({side: decoder(side, seed) for side in INPUTS}), generator(seed + 50)

    def loss_at(step: int) -> Tensor:
        images, arrow, _, target = scenes(BATCH, g)
        given = inputs(model, images, arrow)
        return torch.stack([F.cross_entropy(decoders[side](x), target) for side, x in given.items()]).sum()

    optimizer = torch.optim.AdamW(decoders.parameters(), DECODER_RATE, weight_decay=0.01)
    fit(optimizer, loss_at, DECODER_STEPS, schedule=one_cycle(), clip=None)
    images, arrow, _, target = scenes(JUDGED, generator(seed + 1000))
    with torch.no_grad():
        given = inputs(model, images, arrow)
        return {side: percent(decoders[side](x), target) for side, x in given.items()}


def percent(logits: Tensor, labels: Tensor) -> float:
    return 100 * (logits.argmax(1) == labels).double().mean().item()


def of_seed(seed: int) -> dict[str, float]:
    model = trained_tower(seed)
    images, arrow, thing, _ = scenes(JUDGED, generator(seed + 1000))
    with torch.no_grad():
        named = percent(answers(model, images, arrow), thing)
    return {"named": named, **decoded(model, seed)}


def measure() -> Measured:
    with threads(1):
        by_seed = [of_seed(seed) for seed in SEEDS]
    found = {name: [numbers[name] for numbers in by_seed] for name in by_seed[0]}
    sizes = {side: count_parameters(decoder(side, 0)) for side in INPUTS}
    gain = mean(found["maps"]) - mean(found["features"])
    numbers = {
        "gain_points": gain,
        **{f"{name}_percent": mean(values) for name, values in found.items()},
        **{f"parameters_{side}": size for side, size in sizes.items()},
        **{f"{name}_percent_by_seed": values for name, values in found.items()},
    }
    parts = {
        "the tower has learned": mean(found["named"]) >= 80,
        "gain": gain >= 5,
        "as many parameters": abs(sizes["maps"] / sizes["features"] - 1) <= 0.02,
    }
    return Measured.by(parts, numbers)


CLAIM = Claim(
    name="vitgaze",
    statement=(
        "in scenes where an arrow points at a target, guided rows of the attention of a small trained vision "
        "transformer decode the target's place better than its final patch features with a decoder of equal size"
    ),
    bound=(
        "the place is found in at least 5 points more of new scenes, mean of 3 seeds; decoders equally large within "
        "2 %; the transformer names what is pointed at in 80 % or more"
    ),
    measure=measure,
)
