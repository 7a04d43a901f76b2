"""The right mediator: two ways to search heads for what mediates, and what direct and indirect effects add up to.

    total      m(x) - m(x')                          x clean, x' corrupted
    indirect   m(x', head as on x) - m(x')           what the head carries
    direct     m(x, head as on x') - m(x')           what goes past it

A survey has nothing of its own to run: it orders explanations by mediator, by search and by effect. Measured here:

search    Every head's indirect effect on the shipped model, exactly (one run a head) and from one gradient. The prompts
          are needles; the corrupted one has another code, and m is logit(first digit) - logit(first digit of the
          other code). Heads are ranked by their mean effects over pairs that the model answers on both sides, and the
          ranks compared by Spearman. p is the share of 20,000 permutations of the heads that do as well; an untrained
          model of the same shape tells how much of it is the form alone. The estimate decides as it is, without
          integrated gradients, which are measured too.

effects   In a linear network of three layers of four heads, for each of the twelve: total = direct + indirect. With
          tanh between the layers, and on the shipped model, it is not so: how far off is reported, not bounded.

Nothing was chosen by what was measured: prompts of 96 tokens are those that hold one statement and some text.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from regard.claims.lab import generator, seeded, threads
from regard.claims.shipped_lm import samples, shipped
from regard.core.claim import Claim, Measured
from regard.explaining.attribution import attribute
from regard.explaining.effects import Effects
from regard.explaining.pairs import Batch, Pairs, batch_of
from regard.explaining.patching import patch
from regard.explaining.runs import forward
from regard.ops.ranks import rank_correlation

LENGTH, COUNT, SEED = 96, 64, 1
PERMUTATIONS, TOP = 20_000, 3
LAYERS, HEADS, WIDTH, EXACT = 3, 4, 16, 1e-10


# search


def needle_pairs() -> Pairs:
    """Needles and the same with the code of another one, of which the first digit differs; asked for that digit."""
    chosen = samples("needle", LENGTH, COUNT, SEED)
    others = [
        next(o for o in [*chosen[i + 1 :], *chosen] if o.answer[1] != s.answer[1])
        for i, s in enumerate(chosen)
    ]
    clean = [s.prompt + s.answer[:1] for s in chosen]  # the answer begins with a space
    corrupt = [with_code(s.prompt, s.answer, o.answer) + s.answer[:1] for s, o in zip(chosen, others)]
    target, foil = (torch.tensor([s.answer[1] for s in side]) for side in (chosen, others))
    return Pairs(batch_of(clean), batch_of(corrupt), target, foil)


def with_code(prompt: list[int], code: list[int], other: list[int]) -> list[int]:
    """The prompt with another code in the place of its own."""
    at = next(i for i in range(len(prompt)) if prompt[i : i + len(code)] == code)
    return prompt[:at] + other + prompt[at + len(code) :]


@torch.no_grad()
def answered(model: PreTrainedModel, pairs: Pairs) -> list[int]:
    """The pairs whose digit the model gives on both sides."""
    says: Callable[[Batch], Tensor] = lambda batch: forward(model, batch)[0].argmax(-1)  # noqa: E731
    right = (says(pairs.clean) == pairs.target) & (says(pairs.corrupt) == pairs.foil)
    return right.nonzero()[:, 0].tolist()


def chance(a: Tensor, b: Tensor) -> float:
    """The share of permutations of the sites whose rank correlation is as high, this one among them."""
    x, y = (t.flatten().argsort().argsort().double() for t in (a, b))
    x, y = x - x.mean(), y - y.mean()
    order = torch.rand(PERMUTATIONS, len(x), generator=generator()).argsort(1)
    return (1 + int(((y[order] @ x) >= x @ y - 1e-9).sum())) / (1 + PERMUTATIONS)


def agreement(a: Tensor, b: Tensor) -> float:
    """Spearman's over all heads of [layers, heads]."""
    return rank_correlation(a.flatten(), b.flatten()).item()


def by_pair(a: Effects, b: Effects) -> float:
    """The mean over pairs of the rank correlation of their own effects."""
    found = [agreement(x, y) for x, y in zip(a.values, b.values, strict=True)]
    return sum(found) / len(found)


def untrained(model: PreTrainedModel) -> PreTrainedModel:
    with seeded(SEED):
        return type(model)(model.config).eval()  # type: ignore[call-arg]


def search() -> dict[str, Any]:
    """The ranks of both searches against each other, and what a head's effects add up to on this model."""
    model, pairs = shipped().model, needle_pairs()
    right = answered(model, pairs)
    pairs = pairs.at(right)
    exact, noise = (patch(model, pairs, direction=side) for side in ("denoise", "noise"))
    quick, path = (attribute(model, pairs, ["z"], steps=n)["z"] for n in (0, 8))
    back = attribute(model, pairs, ["z"], direction="noise")["z"]
    blank = untrained(model)
    raw = patch(blank, pairs).mean, attribute(blank, pairs, ["z"])["z"].mean
    both = {*exact.top(TOP)} & {*quick.top(TOP)}
    return {
        "pairs": len(right),
        "answered_on_both_sides": len(right) / COUNT,
        "heads": exact.mean.numel(),
        "spearman": agreement(quick.mean, exact.mean),
        "p": chance(quick.mean, exact.mean),
        "spearman_by_pair": by_pair(quick, exact),
        "spearman_integrated_gradients": agreement(path.mean, exact.mean),
        "spearman_noise": agreement(back.mean, noise.mean),
        "spearman_untrained": agreement(*raw),
        f"top_{TOP}_in_common": len(both),
        "largest_effect": exact.mean.max().item(),
        "largest_effect_estimated": quick.mean.max().item(),
        # total - direct = what is lost without the head
        "most_off_lm": (noise.mean - exact.mean).abs().max().item(),
    }


# effects

Head = tuple[int, int]


def network(seed: int = 0) -> tuple[Tensor, Tensor]:
    """(matrices [layers, heads, width, width] of what each head adds, weights [width] of the output)."""
    g = generator(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    return draw(LAYERS, HEADS, WIDTH, WIDTH) / WIDTH**0.5, draw(WIDTH)


def run(
    net: tuple[Tensor, Tensor], x: Tensor, bend: Callable[[Tensor], Tensor], given: dict[Head, Tensor]
) -> tuple[Tensor, dict[Head, Tensor]]:
    """(output [B], what each head added [B, width]) of inputs [B, width]; heads that are given are not computed."""
    added = {}
    for layer, heads in enumerate(net[0]):
        seen = bend(x)
        for head, matrix in enumerate(heads):
            at = (layer, head)
            added[at] = given.get(at, seen @ matrix)
            x = x + added[at]
    return x @ net[1], added


def effects(bend: Callable[[Tensor], Tensor], inputs: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """Total [B], direct and indirect [heads, B] effects of every head of the network."""
    net, g = network(), generator(1)
    clean, corrupt = (torch.randn(inputs, WIDTH, generator=g, dtype=torch.float64) for _ in range(2))
    (m_clean, on_clean), (m_corrupt, on_corrupt) = (run(net, x, bend, {}) for x in (clean, corrupt))
    pick: Callable[[Tensor, dict], Sequence[Tensor]] = lambda x, from_: [  # noqa: E731
        run(net, x, bend, {at: value})[0] - m_corrupt for at, value in from_.items()
    ]
    return m_clean - m_corrupt, torch.stack(pick(clean, on_corrupt)), torch.stack(pick(corrupt, on_clean))


def most_off(bend: Callable[[Tensor], Tensor]) -> float:
    """Largest |total - direct - indirect| over the mean size of a total effect."""
    total, direct, indirect = effects(bend)
    return ((total - direct - indirect).abs().max() / total.abs().mean()).item()


def measure() -> Measured:
    with threads(1):
        numbers = search()
    straight = most_off(lambda x: x)
    sizes = effects(lambda x: x)
    numbers |= {
        "most_off_linear": straight,
        "most_off_tanh": most_off(torch.tanh),
        "indirect_over_total_linear": (sizes[2].abs().mean() / sizes[0].abs().mean()).item(),
    }
    return Measured.by({"ranks": numbers["spearman"] >= 0.7, "sum of effects": straight <= EXACT}, numbers)


CLAIM = Claim(
    name="right_mediator",
    statement=(
        "patching approximated by gradients ranks the heads of a small trained language model as exact patching does; "
        "on a linear network the total effect is the sum of the direct and the indirect one, for every head"
    ),
    bound=(
        "Spearman between attribution patching and exact patching of the 24 heads >= 0.7; |total - direct - indirect| "
        "<= 1e-10 of the total effect on a linear network"
    ),
    measure=measure,
)
