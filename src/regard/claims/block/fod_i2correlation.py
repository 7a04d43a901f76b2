"""FOD's claim: places of a digit that were corrupted are found better by discrepancies beside the error.

Features are those of the first step of a small CNN. A transformer learns to rebuild those of one digit; an image that
is asked has a block of another digit in it, and places are ranked by how strange they are. Sides: a plain transformer
and its error; the page, whose branches also learn their targets, and its error and the discrepancy of the inter
branch, each in its own spread over normal images, added. Each side has the learning rate that is best on the digits
0 and 8, on which the weight of the targets and the sum were chosen too: of eight ways to join error and discrepancy,
among them the released one, error times (max S - S), whose number is measured beside. Judged are the digits 1 to 5.
"""

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.catalog import method
from regard.claims.digits import digits, network
from regard.claims.lab import auroc, generator, mean, seeded, threads
from regard.core.call import Call
from regard.core.claim import Claim, Measured
from regard.methods.blocks.fod_i2correlation import Pairs, anomaly, correlations, discrepancy, learning
from regard.ops.grid import as_tokens
from regard.train.loop import fit, one_cycle

SIDES, WIDTH, HEADS, LAYERS = (8, 8), 32, 4, 2
STEPS, BATCH, DRAWS, BLOCK, CHANGED = 300, 16, 4, 3, 0.25
RATES, WEIGHT = (3e-3, 1e-2, 3e-2, 1e-1), 0.1
CHOOSE, JUDGED = (0, 8), (1, 2, 3, 4, 5)  # normal digits; the place of one in its row is its seed
NAMES, BOUND = {"error": "intra", "sum": "both"}, 0.03  # scores that are compared, and of which side


def features(images: Tensor) -> Tensor:
    """[B, 64, 16] of images: the first step of a small CNN that learned all digits."""
    step = network(0)[0]
    with torch.no_grad():
        return as_tokens(step(images))


@cache
def of_class(label: int, name: str) -> Tensor:
    images, labels = digits()[name]
    return images[labels == label]


class Rebuilt(nn.Module):
    """Layers of the page between two linear maps; `both` or `intra`, which is a plain transformer."""

    centre: Tensor
    spread: Tensor
    normal: Tensor

    def __init__(self, branches: str, label: int, seed: int) -> None:
        super().__init__()
        page = method("fod_i2correlation").page
        self.cfg = page.configure(branches=branches, tokens=64)
        plain = features(of_class(label, "train"))
        self.register_buffer("centre", plain.mean((0, 1)))
        self.register_buffer("spread", plain.std((0, 1)) + 1e-3)
        self.register_buffer("normal", self.scaled(plain).mean(0))
        with seeded(seed):
            self.embed, self.embed_normal = nn.Linear(16, WIDTH), nn.Linear(16, WIDTH)
            self.back, self.norm = nn.Linear(WIDTH, 16), nn.LayerNorm(WIDTH)
            self.position = nn.Parameter(0.5 * torch.randn(64, WIDTH))
            drawn = [page.init(self.cfg, {"width": WIDTH, "heads": HEADS}) for _ in range(LAYERS)]
        self.layers = nn.ModuleList(
            nn.ParameterDict({n: p for n, p in one.items() if n != "normal"}) for one in drawn
        )

    def scaled(self, x: Tensor) -> Tensor:
        return (x - self.centre) / self.spread

    def forward(self, x: Tensor) -> tuple[Tensor, list[Pairs]]:
        """(error of each place [B, 64], correlations of each layer) of features [B, 64, 16]."""
        wanted = self.scaled(x)
        x, found = self.embed(wanted) + self.position, []
        normal = self.embed_normal(self.normal) + self.position
        for layer in self.layers:
            call = Call("self", params={**dict(layer.named_parameters()), "normal": normal}, grid=SIDES)
            x, pairs = correlations(x, self.cfg, call)
            found.append(pairs)
        rebuilt = self.back(self.norm(x))
        error = (rebuilt - wanted).square().mean(-1) + 1 - F.cosine_similarity(rebuilt, wanted, dim=-1)
        return error, found


def trained(branches: str, label: int, seed: int, rate: float) -> Rebuilt:
    model, g, plain = Rebuilt(branches, label, seed), generator(seed), features(of_class(label, "train"))

    def loss_at(step: int) -> Tensor:
        error, found = model(plain[torch.randint(len(plain), (BATCH,), generator=g)])
        return error.mean() if branches == "intra" else 2 * error.mean() + learning(found, WEIGHT, WEIGHT)

    fit(torch.optim.Adam(model.parameters(), rate), loss_at, STEPS, schedule=one_cycle())
    return model.eval()


def corrupted(label: int, name: str) -> tuple[Tensor, Tensor]:
    """(images, mask [B, 64] of corrupted places): in each a block of another digit, from another place, is pasted."""
    images, g = of_class(label, name).repeat(DRAWS, 1, 1, 1), generator(100 + label)
    others = digits()[name].images
    out = images.clone()
    for image in out:
        y, x, v, u = torch.randint(8 - BLOCK + 1, (4,), generator=g).tolist()
        other = others[torch.randint(len(others), (), generator=g)]
        image[:, y : y + BLOCK, x : x + BLOCK] = other[:, v : v + BLOCK, u : u + BLOCK]
    return out, ((out - images).abs() > CHANGED).flatten(1)


@torch.no_grad()
def scores(model: Rebuilt, label: int, images: Tensor) -> dict[str, Tensor]:
    """How strange each place is [B, 64], by the error alone and, where there are normal features, with them."""
    error, found = model(features(images))
    if "inter" not in found[0]:
        return {"error": error}
    e, d = of_normal(model, label)
    apart = apart_of(found)
    return {"own_error": error, "sum": error / e.std() + apart / d.std(), "released": anomaly(error, found)}


def of_normal(model: Rebuilt, label: int) -> tuple[Tensor, Tensor]:
    """Errors and discrepancies on images that were learned from."""
    error, found = model(features(of_class(label, "train")))
    return error, apart_of(found)


def apart_of(layers: list[Pairs]) -> Tensor:
    return torch.stack([discrepancy(*pairs["inter"]) for pairs in layers]).mean(0)


def found_by(branches: str, labels: tuple[int, ...], rate: float, name: str) -> dict[str, list[float]]:
    """AUROC of each score, by normal digit."""
    aurocs: dict[str, list[float]] = {}
    for seed, label in enumerate(labels):
        images, mask = corrupted(label, name)
        model = trained(branches, label, seed, rate)
        for how, score in scores(model, label, images).items():
            aurocs.setdefault(how, []).append(auroc(score, mask))
    return aurocs


def measure() -> Measured:
    with threads(1):
        rates = {
            how: max(RATES, key=lambda rate, how=how: mean(found_by(NAMES[how], CHOOSE, rate, "choice")[how]))
            for how in NAMES
        }
        aurocs = {
            how: values
            for side in NAMES
            for how, values in found_by(NAMES[side], JUDGED, rates[side], "test").items()
        }
    gain = mean(aurocs["sum"]) - mean(aurocs["error"])
    numbers = {f"auroc_{how}": mean(values) for how, values in aurocs.items()} | {
        "gain": gain,
        "gain_over_its_own_error": mean(aurocs["sum"]) - mean(aurocs["own_error"]),
        **{f"rate_{NAMES[how]}": rate for how, rate in rates.items()},
        **{f"auroc_{how}_by_digit": values for how, values in aurocs.items()},
    }
    return Measured.by({"gain": gain >= BOUND}, numbers)


CLAIM = Claim(
    name="fod_i2correlation",
    statement="of a transformer that rebuilds features of one digit, discrepancy beside the error raises the AUROC by "
    "which corrupted places are found",
    bound="AUROC of places at least 0.03 above that of a transformer that learned to rebuild alone, mean of 5 seeds, "
    "each with a normal digit of its own",
    measure=measure,
    contradicted="by a little: with discrepancy 0.887, a transformer that learned to rebuild alone 0.865, +0.021 where "
    "0.03 is asked, more for each of the five digits (0.011 to 0.039), at rates inside the sweep (1e-2 and 3e-2 of "
    "3e-3 to 1e-1). Over the error of the same network, which also learned targets, it is +0.049: what learning them "
    "costs the reconstruction is most of what the discrepancy "
    "gives back. The released score gains 0.001 over that error. "
    "Images are of 64 places, where the paper's have many more",
    fails=("gain",),
)
