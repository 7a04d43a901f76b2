"""Landmark attention's claim: fetching all blocks changes nothing, and a trained model finds its block by two of them.

The task is a passkey in noise: sixteen blocks of seven tokens, a landmark after each; somewhere in one block a mark and
the key after it, and at the end the question. Two layers with a short convolution on q, k and v are trained with all
blocks, and then asked with the two best blocks of every query and head, and with two drawn at random, in both layers.

    w w w w w w w L   w w MARK key w w w L   ...   w w w w w w w L   ?  -> key
"""

from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor, nn

from regard.claims.lab import difference, generator, random_qkv, right_answers, seeded, threads, trained
from regard.core.call import Call
from regard.core.claim import Claim, Measured
from regard.methods.mechanisms.sparse import landmark_attention as page

BLOCKS, BLOCK, WORDS, KEYS = 16, 7, 24, 16
MARK, LANDMARK, ASK = (WORDS + KEYS + i for i in range(3))
WIDTH, HEADS, STEPS, BATCH, TESTED, RATE, SEEDS = 64, 2, 250, 32, 1024, 4e-3, (0, 1, 2)


def texts(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Texts [count, 129] and labels, -100 but at the question: the key, as a number below KEYS."""
    g = generator(seed)
    blocks = torch.randint(WORDS, (count, BLOCKS, BLOCK), generator=g)
    row, block = torch.arange(count), torch.randint(BLOCKS, (count,), generator=g)
    place, key = (torch.randint(most, (count,), generator=g) for most in (BLOCK - 1, KEYS))
    blocks[row, block, place], blocks[row, block, place + 1] = MARK, WORDS + key
    blocks = torch.cat([blocks, torch.full((count, BLOCKS, 1), LANDMARK)], dim=2)
    inputs = torch.cat([blocks.flatten(1), torch.full((count, 1), ASK)], dim=1)
    labels = torch.full_like(inputs, -100)
    labels[:, -1] = key
    return inputs, labels


class Layer(nn.Module):
    """x + out(mix(conv(qkv(norm x))))."""

    def __init__(self) -> None:
        super().__init__()
        self.cfg = page.Config(block=BLOCK)
        self.norm, self.qkv = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.short = nn.Conv1d(3 * WIDTH, 3 * WIDTH, 2, padding=1, groups=3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.qkv(self.norm(x))
        y = y + self.short(y.mT)[..., : x.shape[1]].mT
        q, k, v = (t.unflatten(2, (HEADS, -1)).transpose(1, 2) for t in y.chunk(3, dim=-1))
        mixed = page.METHOD.fast(q, k, v, self.cfg, Call())[0]
        return x + self.out(mixed.transpose(1, 2).flatten(2))


def learned(seed: int) -> nn.Module:
    with seeded(seed):
        body = [nn.Embedding(ASK + 1, WIDTH), Layer(), Layer()]
        model = nn.Sequential(*body, nn.LayerNorm(WIDTH), nn.Linear(WIDTH, KEYS))
    inputs, labels = texts(BATCH * STEPS, seed)
    return trained(model, list(zip(inputs.split(BATCH), labels.split(BATCH), strict=True)), RATE)


def at_random(seed: int) -> Callable:
    """In place of the choice by score: the same number of those that may be chosen, at random."""
    g, highest = generator(seed), page.highest

    def drawn(score: Tensor, count: int) -> Tensor:
        luck = torch.rand(score.shape, generator=g)
        return highest(luck.masked_fill(score == -torch.inf, -torch.inf), count)

    return drawn


def accuracies(model: nn.Module, seed: int) -> dict[str, float]:
    inputs, labels = texts(TESTED, 10**6 + seed)

    def accuracy(top_k: int | None) -> float:
        for layer in (m for m in model.modules() if isinstance(m, Layer)):
            layer.cfg = page.Config(block=BLOCK, top_k=top_k)
        return right_answers(model, inputs, labels, batch=128)[:, -1].double().mean().item()

    found = {"full": accuracy(None), "top_2": accuracy(2)}
    with mock.patch.object(page, "highest", at_random(seed)):
        return found | {"random_2": accuracy(2)}


def all_fetched(n: int = 500) -> float:
    """The largest difference of all blocks fetched, by copies and where they lie, from the grouped softmax of all."""
    qkv, most = random_qkv(generator(), 2, n, 32), 0.0
    full = page.METHOD.fast(*qkv, page.Config(block=BLOCK), Call())[0]
    for fetch in (0, page.FETCH):
        with mock.patch.object(page, "FETCH", fetch):
            cfg = page.Config(block=BLOCK, top_k=-(-n // BLOCK))
            most = max(most, difference(page.METHOD.fast(*qkv, cfg, Call())[0], full))
    return most


def measure() -> Measured:
    with threads(1):
        same = all_fetched()
        runs = [accuracies(learned(seed), seed) for seed in SEEDS]
    parts = {
        "all fetched": same < 1e-5,
        "top two": all(run["top_2"] >= 0.95 * run["full"] for run in runs),
        "random two": all(run["random_2"] <= 0.5 * run["full"] for run in runs),
    }
    numbers = {f"accuracy_{name}": [run[name] for run in runs] for name in runs[0]}
    return Measured.by(parts, {"difference_of_all_fetched": same, **numbers})


CLAIM = Claim(
    name="landmark_attention",
    statement=(
        "fetching all blocks is full grouped-softmax attention; in a tiny model trained with landmarks the two best of "
        "sixteen blocks keep the accuracy on a passkey, two random ones do not"
    ),
    bound="difference < 1e-5 at k = all; top-2 accuracy >= 0.95 of full; random-2 <= 0.5 of full",
    measure=measure,
)
