"""Focus-DETR's claim: learned scores keep tokens of objects that norms of the same features lose.

    scenes    32 x 32 pixels, 16 x 16 tokens, in four quarters of one large thing or of four small ones. Objects are
              handwritten digits, one large or one to four small; all else are decoys, digits whose pixels changed
              places. An object's tokens are those of its box, a quarter of all at most, a fifth in the mean
    features  a convolutional network and the page, which keeps 30 %, trained to say at the middle of an object which
              digit it is and nothing elsewhere, as a detector that has one query for each object. The loss of the
              scores ends at the features: norms have those of a detector that nobody told what is foreground
    learned   the page's scores, by the focal loss on all four levels; a coarse token is an object's where one of its
              tokens is. What the page keeps is read off its output: what changed
    norms     the largest L1, L2 or maximum norms of the same features, or the smallest: which of the six, is chosen
              for each seed on scenes of other digits
    judged    scenes of digits that no training saw: the share of all tokens of objects that are kept, of as many on
              both sides. The change of what is not kept is that of fast, and on some scenes of the reference

Rates were chosen on other digits and another seed: that of the detector, of four, by its own loss, that of the scores,
of two, by recall. What norms lose hangs on the experiment. On these other digits they were 17 and 19 points below the
scores here; 5 to 12 on scenes of small digits alone, among eight or twelve decoys, at three settings. And they were
none to 2 points below where the loss of the scores reaches the features, as in the paper's training: norms learn what
scores learn. The recalls of one seed trained so stand beside the others, and are not judged. Features that a map reads
classes off at every token of an object had it in their norms, too.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.claims.digits import digits
from regard.claims.lab import generator, mean, seeded, threads
from regard.core.call import Call
from regard.core.claim import Claim, Measured
from regard.methods.blocks.focus_detr import METHOD, best_places, categories, foreground, kept
from regard.ops.grid import as_tokens
from regard.train.loop import fit, one_cycle

SIDES, WIDTH, HEADS, NOISE, SCENES = (16, 16), 32, 4, 0.2, 300
BATCH, STEPS, RATES, SEEDS = 16, 400, (2.5e-3, 5e-3), range(3)
SCORING = tuple(f"params.{name}" for name in ("score", "memory", "level", "alpha"))
NORMS = tuple((sign, p) for sign in (1, -1) for p in (1.0, 2.0, float("inf")))
CFG = METHOD.configure(keep=0.3, cascade=(1.0,), layers=1, classes=10)


def tiled(parts: Tensor) -> Tensor:
    """[..., 2 side, 2 side] of four quarters [..., 4, side, side]."""
    *rows, _, side, _ = parts.shape
    return parts.view(*rows, 2, 2, side, side).transpose(-3, -2).reshape(*rows, 2 * side, 2 * side)


def things(large: Tensor, g: torch.Generator) -> Tensor:
    """Which of 4 large and 16 small things [n, 20] of a scene are objects, its quarters being large [n, 4]."""
    n = len(large)
    places = torch.cat([large, ~large.repeat_interleave(4, 1)], dim=1)
    one = (torch.rand(n, 1, generator=g) < 0.5) & large.any(1, keepdim=True) | large.all(1, keepdim=True)
    asked = torch.where(one, torch.arange(20) < 4, torch.arange(20) >= 4) & places
    few = torch.where(one, 1, torch.randint(1, 5, (n, 1), generator=g))
    drawn = torch.where(asked, torch.rand(n, 20, generator=g), -1.0)
    return asked & (drawn.argsort(1, descending=True).argsort(1) < few)


def scenes(part: str, n: int, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """(images [n, 1, 32, 32]; of each token [n, 256] whether it is an object's, and which digit's middle, or -1)."""
    images, labels = digits()[part]
    rows = torch.randint(len(labels), (n, 20), generator=g)
    large = torch.rand(n, 4, generator=g) < 0.5
    objects = things(large, g)
    ink = images[rows].view(n, 20, 64)
    decoys = ink.gather(2, torch.rand(ink.shape, generator=g).argsort(2))
    drawn = torch.where(objects[..., None], ink, decoys).view(n, 20, 8, 8)
    shown = torch.where(objects, labels[rows], -1)[..., None, None]
    image = scene(drawn.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :4], drawn[:, 4:], large)
    places = shown[:, :4].expand(-1, -1, 8, 8), shown[:, 4:].expand(-1, -1, 4, 4)
    middles = torch.full_like(places[0], -1), torch.full_like(places[1], -1)
    for middle, t, at in zip(middles, places, (4, 2), strict=True):
        middle[..., at, at] = t[..., at, at]
    noise = NOISE * torch.rand(n, 1, 32, 32, generator=g)
    shows, middle = (scene(of_large, of_small, large).flatten(1) for of_large, of_small in (places, middles))
    return image[:, None] + noise, shows >= 0, middle


def scene(large: Tensor, small: Tensor, which: Tensor) -> Tensor:
    """Quarters [n, 4, 2 side, 2 side] or, where they are not large, four small things [n, 16, side, side] each."""
    small = tiled(small.reshape(len(small), 4, 4, *small.shape[2:]))
    return tiled(torch.where(which[..., None, None], large, small))


class Detector(nn.Module):
    """A convolutional network, a map to the page's width with a norm over groups, as in DETR's necks, and the page."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with seeded(seed):
            steps: list[nn.Module] = [nn.Conv2d(1, WIDTH, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
            for _ in range(3):
                steps += [nn.Conv2d(WIDTH, WIDTH, 5, padding=2), nn.ReLU()]
            self.features = nn.Sequential(*steps, nn.Conv2d(WIDTH, WIDTH, 1), nn.GroupNorm(8, WIDTH))
            self.params = nn.ParameterDict(METHOD.init(CFG, {"width": WIDTH, "heads": HEADS}))

    @property
    def call(self) -> Call:
        return Call("self", params=dict(self.params.items()), grid=SIDES)


def focal(logits: Tensor, wanted: Tensor) -> Tensor:
    """The focal loss with a power of 2, positive ones weighing a quarter, over the number of positive ones."""
    right = torch.where(wanted, logits, -logits)
    weight = torch.where(wanted, 0.25, 0.75) * (-right).sigmoid().square()
    return -(weight * F.logsigmoid(right)).sum() / wanted.sum().clamp(min=1)


def levels_of(objects: Tensor) -> list[Tensor]:
    """Labels [B, places] of each level of labels [B, 256]."""
    image = objects.float().unflatten(1, SIDES)[:, None]
    return [F.max_pool2d(image, 2**level).flatten(1) > 0 for level in range(CFG.levels)]


def trained(seed: int, rates: tuple[float, float] = RATES, joint: bool = False) -> Detector:
    """Rates of the detector and of the scores; joint: the loss of the scores reaches the features, too."""
    model, g = Detector(seed), generator(seed)

    def loss_at(step: int) -> Tensor:
        images, objects, middle = scenes("train", BATCH, g)
        x = as_tokens(model.features(images))
        logits = categories(METHOD.fast(x, CFG, model.call)[0], model.call)
        levels = foreground(x if joint else x.detach(), CFG, model.call)
        scores = [focal(s, wanted) for s, wanted in zip(levels, levels_of(objects), strict=True)]
        return torch.stack(scores).mean() + focal(logits, middle[..., None] == torch.arange(10))

    parts: list[list[Tensor]] = [[], []]
    for name, p in model.named_parameters():
        parts[name.startswith(SCORING)].append(p)
    groups = [{"params": part, "lr": rate} for part, rate in zip(parts, rates, strict=True)]
    fit(torch.optim.AdamW(groups, weight_decay=0.01), loss_at, STEPS, schedule=one_cycle())
    return model.requires_grad_(False).eval()


def recall(objects: Tensor, places: Tensor) -> float:
    """Percent of the tokens of objects [B, 256] that are at places [B, K]."""
    return 100 * objects.gather(1, places).sum().item() / objects.sum().item()


def by_norm(x: Tensor, sign: int, p: float) -> Tensor:
    return best_places(sign * x.norm(p=p, dim=2), kept(CFG, x.shape[1]))


def best_norm(model: Detector) -> tuple[int, float]:
    """Of scenes that do not judge."""
    images, objects, _ = scenes("choice", SCENES, generator(100))
    x = as_tokens(model.features(images))
    return max(NORMS, key=lambda norm: recall(objects, by_norm(x, *norm)))


def judged(seed: int, joint: bool = False) -> tuple[float, float, float]:
    """(percent that the page keeps, percent that norms keep, largest change of what is not kept)."""
    model = trained(seed, joint=joint)
    images, objects, _ = scenes("test", SCENES, generator(101))
    x = as_tokens(model.features(images)).contiguous()
    changed = (METHOD.fast(x, CFG, model.call)[0] != x).any(2)
    count = kept(CFG, x.shape[1])
    if not bool((changed.sum(1) == count).all()):
        raise RuntimeError(
            f"the page keeps {count} tokens of each scene, not {changed.sum(1).unique().tolist()}"
        )
    left = torch.ones_like(objects).scatter(1, best_places(foreground(x, CFG, model.call)[0], count), False)
    change = max(
        (path(x[:rows], CFG, model.call)[0] - x[:rows])[left[:rows]].abs().max().item()
        for path, rows in ((METHOD.fast, SCENES), (METHOD.reference, 4))
    )
    places = changed.nonzero()[:, 1].view(-1, count)
    return recall(objects, places), recall(objects, by_norm(x, *best_norm(model))), change


def measure() -> Measured:
    with threads(1):
        learned, norms, changes = zip(*(judged(seed) for seed in SEEDS), strict=True)
        together = judged(SEEDS[0], joint=True)
    numbers = {
        "recall_learned": mean(learned),
        "recall_norms": mean(norms),
        "points_above_norms": mean(learned) - mean(norms),
        "largest_change_of_others": max(*changes, together[2]),
        "share_kept": kept(CFG, 256) / 256,
        "recall_learned_trained_together": together[0],
        "recall_norms_trained_together": together[1],
        "recall_learned_by_seed": [*learned],
        "recall_norms_by_seed": [*norms],
    }
    parts = {
        "recall": mean(learned) >= 95,
        "above norms": mean(learned) - mean(norms) >= 10,
        "others as they came": max(*changes, together[2]) == 0,
    }
    return Measured.by(parts, numbers)


CLAIM = Claim(
    name="focus_detr",
    statement=(
        "with 30 % of tokens kept, learned foreground scores retain more tokens of objects than norms of the same "
        "features, and tokens that are not kept pass through unchanged"
    ),
    bound=(
        "share of the tokens of objects that is kept, mean of 3 seeds, at least 95 % and at least 10 points above that "
        "by norms; change of tokens that are not kept 0"
    ),
    measure=measure,
)
