"""Training tasks of images for a VisionBackbone: what a digit is, and where one stands among what only looks like one.

Rates are chosen on images that are neither trained on nor judged: `test` gives those, `judged` what the best model is
asked at the end, once. A task draws the batch of a step from the seed and the step's number.
"""

from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.nn.vision import VisionBackbone
from regard.train.digits import digits, shifted
from regard.train.suits import IMAGES

CANVAS, PATCH, DECOYS = 32, 4, 5


class Images:
    """What tasks of images have in common."""

    score = "accuracy"
    better = max
    defaults = IMAGES
    backbone: ClassVar[dict[str, Any]] = {}

    @classmethod
    def model(cls, plan: Any) -> VisionBackbone:
        """As many stages as mechanisms; each next one is twice as wide and has a quarter of the tokens."""
        stages = len(plan.mechanisms)
        return VisionBackbone(
            mechanism=list(plan.mechanisms), settings=plan.settings,
            hidden_sizes=[plan.width << i for i in range(stages)], initializer_range=plan.width**-0.5 / 2,
            depths=[plan.layers // stages] * stages, num_attention_heads=plan.heads, mlp_ratio=plan.mlp / plan.width,
            num_channels=1, stem="overlap", **cls.backbone,
        )  # fmt: skip

    @staticmethod
    def source(plan: Any) -> dict[str, str]:
        return {}

    @staticmethod
    def logits(model: VisionBackbone, images: Tensor) -> Tensor:
        return model(images).logits

    @staticmethod
    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), labels)

    @staticmethod
    def measure(logits: Tensor, labels: Tensor) -> tuple[float, int]:
        """(sum of right answers, number of questions)"""
        return (logits.argmax(-1) == labels).sum().item(), len(labels)

    @staticmethod
    def load(folder: Any) -> VisionBackbone:
        return VisionBackbone.from_pretrained(folder)

    @staticmethod
    def amount(plan: Any) -> dict[str, int]:
        return {"images": plan.steps * plan.batch}

    @classmethod
    def facts(cls, plan: Any, folder: Any) -> dict[str, Any]:
        """What the best model answers on images that nothing was chosen on."""
        images, labels = cls.judged(plan)
        model = cls.load(folder).eval()
        with torch.no_grad():
            answers = torch.cat([model(x).logits.argmax(-1) for x in images.split(plan.batch)])
        share = (answers == labels).double().mean().item()
        return {"judged": share, "judged on": len(labels), "confusion": cls.confusion(plan, answers, labels)}

    @classmethod
    def judged(cls, plan: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    @staticmethod
    def confusion(plan: Any, answers: Tensor, labels: Tensor) -> dict[str, Any]:
        raise NotImplementedError


class Digits(Images):
    """Which of ten digits an image of 8 x 8 pixels is; in training they are moved by a pixel at most."""

    backbone: ClassVar[dict[str, Any]] = dict(image_size=8, patch_size=1, num_labels=10)

    @staticmethod
    def batch(plan: Any, step: int) -> tuple[Tensor, Tensor]:
        g, data = generator_of(plan, step), digits()["train"]
        rows = torch.randint(len(data.labels), (plan.batch,), generator=g)
        return shifted(data.images[rows], torch.randint(-1, 2, (plan.batch, 2), generator=g)), data.labels[
            rows
        ]

    @staticmethod
    def test(plan: Any) -> tuple[Tensor, Tensor]:
        return digits()["choice"].images, digits()["choice"].labels

    @classmethod
    def judged(cls, plan: Any) -> tuple[Tensor, Tensor]:
        return digits()["test"].images, digits()["test"].labels

    @staticmethod
    def confusion(plan: Any, answers: Tensor, labels: Tensor) -> dict[str, Any]:
        counts = torch.zeros(10, 10, dtype=torch.long)
        counts.index_put_((labels, answers), torch.ones_like(labels), accumulate=True)
        names = [str(d) for d in range(10)]
        return {
            "rows": names,
            "columns": names,
            "counts": counts.tolist(),
            "row": "digit",
            "column": "answer",
        }


class Find(Images):
    """Where the one digit is among decoys, digits whose pixels changed places: the place of the last stage, a patch of
    4 x 4 pixels or 2 x 2 of them with every further stage, in which its middle lies."""

    backbone: ClassVar[dict[str, Any]] = dict(image_size=CANVAS, patch_size=PATCH, pooling="places")

    @staticmethod
    def batch(plan: Any, step: int) -> tuple[Tensor, Tensor]:
        return scenes("train", plan.batch, generator_of(plan, step), patch_of(plan))

    @staticmethod
    def test(plan: Any) -> tuple[Tensor, Tensor]:
        return held_scenes("choice", plan.tested, plan.seed, patch_of(plan))

    @classmethod
    def judged(cls, plan: Any) -> tuple[Tensor, Tensor]:
        return held_scenes("test", plan.tested, plan.seed, patch_of(plan))

    @staticmethod
    def confusion(plan: Any, answers: Tensor, labels: Tensor) -> dict[str, Any]:
        """How far from it the place is that was named, in places."""
        side = CANVAS // patch_of(plan)
        most = side - 1
        down, right = answers // side - labels // side, answers % side - labels % side
        counts = torch.zeros(2 * most + 1, 2 * most + 1, dtype=torch.long)
        counts.index_put_((down + most, right + most), torch.ones_like(labels), accumulate=True)
        names = [str(d) for d in range(-most, most + 1)]
        return {"rows": names, "columns": names, "counts": counts.tolist(), "row": "places too far down",
                "column": "places too far right"}  # fmt: skip


def generator_of(plan: Any, step: int) -> torch.Generator:
    return torch.Generator().manual_seed(1_000_003 * (plan.seed + 1) + step)


def patch_of(plan: Any) -> int:
    """Pixels of a side of a place of the last stage."""
    return PATCH << (len(plan.mechanisms) - 1)


@cache
def held_scenes(part: str, count: int, seed: int, patch: int) -> tuple[Tensor, Tensor]:
    return scenes(part, count, torch.Generator().manual_seed(seed), patch)


def scenes(part: str, count: int, g: torch.Generator, patch: int = PATCH) -> tuple[Tensor, Tensor]:
    """Images [count, 1, 32, 32] of one digit and decoys in a grid of free cells, each moved in its cell; and places."""
    data, side = digits()[part].images, CANVAS // 8
    cells = torch.rand(count, side * side, generator=g).argsort(1)[:, : DECOYS + 1]
    chosen = data[torch.randint(len(data), (count, DECOYS + 1), generator=g)][:, :, 0].flatten(2)
    mixed = torch.rand(count, DECOYS + 1, 64, generator=g).argsort(2)
    mixed[:, 0] = torch.arange(64)
    drawn = chosen.gather(2, mixed).view(count, DECOYS + 1, 8, 8)
    # a margin of 8 takes what is moved out of a cell at the border
    canvas = torch.zeros(count, CANVAS + 8, CANVAS + 8)
    at = 8 * torch.stack([cells // side, cells % side], -1) + torch.randint(
        0, 5, (count, DECOYS + 1, 2), generator=g
    )
    pixel = torch.arange(8)
    for i in range(DECOYS, -1, -1):
        y, x = at[:, i, 0, None, None] + pixel[:, None], at[:, i, 1, None, None] + pixel
        canvas[torch.arange(count)[:, None, None], y, x] = drawn[:, i]
    middle = (at[:, 0] + 4 - 2) // patch
    canvas = canvas[:, 2 : CANVAS + 2, 2 : CANVAS + 2] + 0.1 * torch.rand(count, CANVAS, CANVAS, generator=g)
    return canvas[:, None], middle.clamp(0, CANVAS // patch - 1) @ torch.tensor([CANVAS // patch, 1])
