"""CrossViT's claim, on digits: two scales that exchange class tokens beat either scale alone.

scikit-learn's digits in two branches of width 32 (four heads, MLP of twice the width, positions learned), as in the
paper each of a size that its patches divide:

    a   8 x 8 pixels in patches of 2 x 2: 16 patches
    b   9 x 9 pixels, resized, in patches of 3 x 3: 9 patches

Three stages, in each a layer in both branches and the page between them; logits of two heads are averaged. A branch
alone is the same three layers with its own head. All sides see the same batches in the same order, the same number of
steps; as two branches and their fusions are more work than one, each branch also learns for as many steps more as its
multiply-adds are fewer (`a_long`, `b_long`), on further batches.

`apart` is no side of the bound: both branches without the fusion, their logits averaged. It tells what the average of
two scales brings from what the exchange does.

The fusion itself is asked on what its three pages read in the trained model, on test images: how far patches are from
those that came in, and how many scores a head computes.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.claims.digits import digits
from regard.claims.lab import difference, generator, mean, seeded, threads
from regard.core.call import Call
from regard.core.claim import Claim, Measured
from regard.methods.blocks import crossvit as page
from regard.train.loop import fit, one_cycle

WIDTH, HEADS, STAGES = 32, 4, 3
SIZES, PATCHES = {"a": 8, "b": 9}, {"a": 2, "b": 3}
COUNTS = {name: (SIZES[name] // PATCHES[name]) ** 2 for name in SIZES}  # 16 and 9
BATCH, STEPS = 64, 900
# the best of 1.5e-3, 3e-3 and 6e-3 for each side on the images to choose on, at seed 1 (crossvit 98.0 %, a 96.0,
# b 96.3, a_long 97.3, b_long 97.0), of equal ones the lower; `apart` has that of `crossvit`
RATES = {"crossvit": 1.5e-3, "apart": 1.5e-3, "a": 1.5e-3, "b": 3e-3, "a_long": 3e-3, "b_long": 1.5e-3}
SEEDS = (4, 5, 6)
CFG = page.Config(patches=(COUNTS["a"], COUNTS["b"]))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.mlp_norm(x))


class Branch(nn.Module):
    """One scale: images [B, 1, 8, 8] -> logits [B, 10]."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.size, patch, tokens = SIZES[name], PATCHES[name], 1 + COUNTS[name]
        self.embed, self.cls = (
            nn.Conv2d(1, WIDTH, patch, patch),
            nn.Parameter(0.02 * torch.randn(1, 1, WIDTH)),
        )
        self.place = nn.Parameter(0.02 * torch.randn(1, tokens, WIDTH))
        self.layers = nn.ModuleList(Layer() for _ in range(STAGES))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)

    def tokens(self, images: Tensor) -> Tensor:
        if images.shape[2] != self.size:
            images = F.interpolate(images, size=(self.size, self.size), mode="bicubic")
        patches = self.embed(images).flatten(2).mT
        return torch.cat([self.cls.expand(len(images), -1, -1), patches], dim=1) + self.place

    def answer(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x[:, 0]))

    def forward(self, images: Tensor) -> Tensor:
        x = self.tokens(images)
        for layer in self.layers:
            x = layer(x)
        return self.answer(x)


class CrossViT(nn.Module):
    """Both scales; `exchange`: with the page after each of their layers."""

    def __init__(self, exchange: bool) -> None:
        super().__init__()
        self.a, self.b, dims = Branch("a"), Branch("b"), {"width": WIDTH, "heads": HEADS}
        self.fusions: Any = nn.ModuleList(
            nn.ParameterDict(page.init(CFG, dims)) for _ in range(STAGES if exchange else 0)
        )

    def fused(self, x: Tensor, stage: int) -> tuple[Tensor, dict]:
        """What comes out of the page, and its aux."""
        out, _, aux = page.METHOD.fast(x, CFG, Call("self", params=dict(self.fusions[stage].items())))
        return out, aux

    def forward(self, images: Tensor, keep: Callable[[Tensor], None] = lambda x: None) -> Tensor:
        """`keep` is called with what each page reads."""
        a, b = self.a.tokens(images), self.b.tokens(images)
        for stage in range(STAGES):
            a, b = self.a.layers[stage](a), self.b.layers[stage](b)
            if self.fusions:
                both = torch.cat([a, b], dim=1)
                keep(both)
                a, b = self.fused(both, stage)[0].split([a.shape[1], b.shape[1]], dim=1)
        return (self.a.answer(a) + self.b.answer(b)) / 2


MODELS: dict[str, Callable[[], nn.Module]] = {
    "crossvit": lambda: CrossViT(exchange=True),
    "apart": lambda: CrossViT(exchange=False),
    "a": lambda: Branch("a"),
    "b": lambda: Branch("b"),
}


def work(name: str) -> int:
    """Multiply-adds for one image: of layers and fusions, which are nearly all."""

    def layers(tokens: int) -> int:
        return STAGES * tokens * (8 * WIDTH**2 + 2 * tokens * WIDTH)

    def fusion(patches: int) -> int:
        return STAGES * (4 * WIDTH**2 + 2 * (1 + patches) * WIDTH**2 + 2 * (1 + patches) * WIDTH)

    of = {side: layers(1 + count) for side, count in COUNTS.items()}
    of["apart"] = of["a"] + of["b"]
    return of["apart"] + sum(fusion(n) for n in COUNTS.values()) if name == "crossvit" else of[name]


def steps_of(name: str) -> int:
    """STEPS, or for a side that learns for longer as many as come to the work of both branches and their fusion."""
    side, _, long = name.partition("_")
    return round(STEPS * work("crossvit") / work(side)) if long else STEPS


def trained(name: str, seed: int) -> nn.Module:
    with seeded(seed):
        model = MODELS[name.partition("_")[0]]()
    data, g = digits()["train"], generator(seed)

    def loss_at(step: int) -> Tensor:
        rows = torch.randint(len(data.images), (BATCH,), generator=g)
        return F.cross_entropy(model(data.images[rows]), data.labels[rows])

    optimizer = torch.optim.AdamW(model.parameters(), RATES[name], weight_decay=0.05)
    fit(optimizer, loss_at, steps_of(name), schedule=one_cycle())
    return model


@torch.no_grad()
def accuracy(model: nn.Module, part: str) -> float:
    images, labels = digits()[part]
    return 100 * (model(images).argmax(1) == labels).double().mean().item()


@torch.no_grad()
def exchange(model: CrossViT, part: str) -> dict[str, float | list]:
    """What the pages do in the trained model: patches, the class tokens beside them, scores of a head and an image."""
    read: list[Tensor] = []
    model(digits()[part].images, read.append)
    patches = [i for i in range(2 + sum(CFG.patches)) if i not in (0, 1 + COUNTS["a"])]
    apart, moved, entries = [], [], []
    for stage, x in enumerate(read):
        out, aux = model.fused(x, stage)
        apart.append(difference(out[:, patches], x[:, patches]))
        moved.append(min(difference(out[:, i], x[:, i]) for i in (0, 1 + COUNTS["a"])))
        entries += [w.numel() // (len(x) * HEADS) for w in aux["weights"]]
    return {"patches_apart": max(apart), "class_tokens_apart": min(moved), "score_entries": entries}


def one_seed(seed: int, part: str) -> dict:
    models = {name: trained(name, seed) for name in RATES}
    found = exchange(models["crossvit"], part)
    return found | {f"accuracy_{name}": accuracy(model, part) for name, model in models.items()}


def measure() -> Measured:
    with threads(1):  # the matrices are small
        runs = [one_seed(seed, "test") for seed in SEEDS]
    by_seed = {f"accuracy_{name}_by_seed": [run[f"accuracy_{name}"] for run in runs] for name in RATES}
    numbers = {f"accuracy_{name}": mean(by_seed[f"accuracy_{name}_by_seed"]) for name in RATES}
    apart, wanted = max(run["patches_apart"] for run in runs), [1 + COUNTS["b"], 1 + COUNTS["a"]] * STAGES
    parts = {
        "patches": apart == 0 and all(run["class_tokens_apart"] > 0 for run in runs),
        "entries": all(run["score_entries"] == wanted for run in runs),
        "steps": numbers["accuracy_crossvit"] > max(numbers["accuracy_a"], numbers["accuracy_b"]),
        "work": numbers["accuracy_crossvit"] > max(numbers["accuracy_a_long"], numbers["accuracy_b_long"]),
    }
    steps = {f"steps_{name}": steps_of(name) for name in RATES}
    said = {"patches_apart": apart, "score_entries": runs[0]["score_entries"], "patches": list(CFG.patches)}
    return Measured.by(parts, numbers | by_seed | said | steps | {"seeds": list(SEEDS)})


CLAIM = Claim(
    name="crossvit",
    statement=(
        "fusion by class tokens computes scores linear in the tokens, leaves patches as they are, and on digits two "
        "scales with it beat each scale alone of equal training budget"
    ),
    bound=(
        "patches differ by exactly 0 and class tokens do not; a head computes as many scores as the other branch has "
        "patches, and one; accuracy on digits, mean of three seeds, above that of either branch, both after as many "
        "steps and after as many multiply-adds of training"
    ),
    measure=measure,
    contradicted=(
        "patches and scores are as said. After 900 steps, mean of three seeds, two scales with the fusion are at "
        "96.5 %, a alone at 97.1, b alone at 97.7, both without the fusion, logits averaged, at 97.9; after as many "
        "multiply-adds a is at 97.6 and b at 97.7. So the average of two scales brings something here, and the "
        "exchange costs it again. After 300 steps, at rates chosen for them and other seeds: 95.0, 94.2, 96.0, 96.5, "
        "96.7 and 97.6. "
        "Matrices of the fusion begun at 0.58 of their size gave 92.3 after 300 steps, not 96.0"
    ),
    fails=("steps", "work"),
)
