"""The Non-Linear Representation Dilemma: an alignment map that is free enough finds any algorithm in any network.

    h' = φ⁻¹(φ(h) with some coordinates taken from φ(h of a source))         the rest of the network reads h'
    IIA = share of interchanges after which it answers as the algorithm does with that variable taken from the source

Hierarchical equality: four objects, the label says whether (x1 = x2) = (x3 = x4). The algorithm has two variables, the
equalities; each is given half of φ(h). An interchange takes the first, the second or both from sources of their own.
φ is learned on the counterfactual labels, the network is frozen, drawn at random and never trained. Two maps:

    orthogonal   φ(h) = R h, RᵀR = 1: distributed alignment search, a subspace of h for each variable
    RevNet       blocks of u ← u + F(v), v ← v + G(u) on the halves of h, undone exactly by subtraction

So RevNet's score says nothing of the network. Objects, task, three blocks with ReLU, the hook behind the first ReLU and
the maps are those of the released code. Different are

    width     64 for 16 inputs. At 16, as there, the first ReLU loses half of the input, and the theorem wants layers to
              be injective: the released results are 0.67 on average and 0.82 at best (both variables, halves, 10
              blocks, 50 passes); `iia_revnet_width_16` is what our 1,000 steps come to at that width
    weights   by He's rule; torch's own leave the logits of an untrained network nearly constant, and 750 steps at 0.51
    training  4 blocks for 10, and 512,000 pairs that are all different for 50 passes over 1,280,000

Rates and steps were chosen on network 0 and pairs of its own, which are not judged; the orthogonal map ends there
between 0.51 and 0.52 at all rates from 0.001 to 0.03.

Controls: no map and RevNet before its training, on the judged networks; and the orthogonal map on a network that has
learned the task, where the same search succeeds.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import orthogonal

from regard.claims.lab import generator, mean, seeded, threads
from regard.core.claim import Claim, Measured
from regard.train.loop import fit, one_cycle

OBJECT, WIDTH, NARROW = 4, 64, 16  # numbers of an object; units of a layer, and as in the released code
BLOCKS = 4
NETWORKS = (1, 2, 3)
BATCH, STEPS, TESTED = 512, 1000, 10_000
RATES = {"revnet": 3e-3, "orthogonal": 1e-2}
TASK_RATE = 3e-3
TAKEN = torch.tensor([[True, False], [False, True], [True, True]])  # which variables an interchange takes


# the task


def objects(equal: Tensor, g: torch.Generator) -> Tensor:
    """[..., 16] four objects, numbers of -1/2 to 1/2: the first and second are equal, and the others, where it says so.

    equal [..., 2]
    """
    drawn = torch.rand(*equal.shape, 2, OBJECT, generator=g) - 0.5  # [..., pair, object of the pair, 4]
    second = torch.where(equal[..., None], drawn[..., 0, :], drawn[..., 1, :])
    return torch.stack([drawn[..., 0, :], second], -2).flatten(-3)


def interchanges(count: int, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs [3, B, 16] (base, source of either variable), what is taken [B, 2], labels [B] of the algorithm."""
    equal = torch.rand(3, count, 2, generator=g) < 0.5
    taken = TAKEN[torch.randint(3, (count,), generator=g)]
    sources = torch.stack([equal[1, :, 0], equal[2, :, 1]], -1)
    left, right = torch.where(taken, sources, equal[0]).unbind(-1)
    return objects(equal, g), taken, (left == right).long()


# the network, and maps of its first layer


class Network(nn.Module):
    """Three blocks of a linear map and ReLU, and two logits."""

    def __init__(self, width: int, seed: int):
        super().__init__()
        sizes = (4 * OBJECT, width, width, width, 2)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        g = generator(seed)
        for layer in self.layers:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=g)
            nn.init.zeros_(layer.bias)

    def first(self, x: Tensor) -> Tensor:
        """[..., width]"""
        return self.layers[0](x).relu()

    def rest(self, h: Tensor) -> Tensor:
        """[..., 2]"""
        for layer in self.layers[1:-1]:
            h = layer(h).relu()
        return self.layers[-1](h)

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.first(x))


class Identity(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return h

    def inverse(self, z: Tensor) -> Tensor:
        return z


class Orthogonal(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.turn = orthogonal(nn.Linear(width, width, bias=False))

    def forward(self, h: Tensor) -> Tensor:
        return self.turn(h)

    def inverse(self, z: Tensor) -> Tensor:
        return z @ cast(Tensor, self.turn.weight)


class Coupling(nn.Module):
    """u ← u + F(v), v ← v + G(u): exactly invertible, whatever F and G are."""

    def __init__(self, width: int):
        super().__init__()
        self.f, self.g = (
            nn.Sequential(nn.Linear(width // 2, width), nn.ReLU(), nn.Linear(width, width // 2)) for _ in "fg"
        )

    def forward(self, h: Tensor) -> Tensor:
        u, v = h.chunk(2, -1)
        u = u + self.f(v)
        return torch.cat([u, v + self.g(u)], -1)

    def inverse(self, z: Tensor) -> Tensor:
        u, v = z.chunk(2, -1)
        v = v - self.g(u)
        return torch.cat([u - self.f(v), v], -1)


class RevNet(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.blocks = nn.ModuleList(Coupling(width) for _ in range(BLOCKS))

    def forward(self, h: Tensor) -> Tensor:
        for block in self.blocks:
            h = block(h)
        return h

    def inverse(self, z: Tensor) -> Tensor:
        for block in reversed(self.blocks):
            z = cast(Coupling, block).inverse(z)
        return z


Map = Identity | Orthogonal | RevNet
MAPS: dict[str, Callable[[int], Map]] = {"revnet": RevNet, "orthogonal": Orthogonal}


# interchange, and what is learned


def interchanged(network: Network, phi: Map, x: Tensor, taken: Tensor) -> Tensor:
    """Logits [B, 2] on bases x[0], with the variables in taken [B, 2] from sources x[1] and x[2]."""
    base, first, second = phi(network.first(x)).unflatten(-1, (2, -1))  # [B, variable, width / 2] each
    sources = torch.stack([first[:, 0], second[:, 1]], 1)
    return network.rest(phi.inverse(torch.where(taken[..., None], sources, base).flatten(1)))


def learned(kind: str, network: Network, seed: int, rate: float, steps: int) -> Map:
    """A map of the frozen network's first layer."""
    with seeded(seed):
        phi = MAPS[kind](network.layers[0].out_features)
    g = generator(1000 + seed)

    def loss_at(step: int) -> Tensor:
        x, taken, labels = interchanges(BATCH, g)
        return F.cross_entropy(interchanged(network, phi, x, taken), labels)

    fit(torch.optim.Adam(phi.parameters(), rate), loss_at, steps, schedule=one_cycle())
    return phi


@torch.no_grad()
def iia(network: Network, phi: Map, seed: int) -> float:
    """On pairs that no map was learned from."""
    x, taken, labels = interchanges(TESTED, generator(2000 + seed))
    return (interchanged(network, phi, x, taken).argmax(-1) == labels).double().mean().item()


@torch.no_grad()
def task_accuracy(network: Network) -> float:
    g = generator(3000)
    equal = torch.rand(TESTED, 2, generator=g) < 0.5
    return (network(objects(equal, g)).argmax(-1) == (equal[:, 0] == equal[:, 1])).double().mean().item()


def solved(seed: int) -> Network:
    """A network that has learned the task."""
    network, g = Network(WIDTH, seed), generator(4000 + seed)

    def loss_at(step: int) -> Tensor:
        equal = torch.rand(BATCH, 2, generator=g) < 0.5
        return F.cross_entropy(network(objects(equal, g)), (equal[:, 0] == equal[:, 1]).long())

    fit(torch.optim.Adam(network.parameters(), TASK_RATE), loss_at, STEPS, schedule=one_cycle())
    return network.requires_grad_(False)


@torch.no_grad()
def inverse_error(network: Network, phi: Map) -> float:
    """Largest |φ⁻¹(φ(h)) - h| over the largest |h|, in float64; a matrix learned in float32 is orthogonal as far."""
    h = network.first(interchanges(TESTED, generator(2000))[0]).double()
    exact = phi.double()
    error = (exact.inverse(exact(h)) - h).abs().max() / h.abs().max()
    phi.float()
    return error.item()


def at_random(seed: int) -> dict[str, float]:
    """All that is asked of one network that was not trained."""
    network = Network(WIDTH, seed).requires_grad_(False)
    found = {"task_accuracy": task_accuracy(network), "iia_identity": iia(network, Identity(), seed)}
    with seeded(seed):
        found["iia_revnet_untrained"] = iia(network, RevNet(WIDTH), seed)
    for kind, rate in RATES.items():
        phi = learned(kind, network, seed, rate, STEPS)
        found |= {
            f"iia_{kind}": iia(network, phi, seed),
            f"inverse_error_{kind}": inverse_error(network, phi),
        }
    return found


def beside(seed: int) -> tuple[float, float, float]:
    """(IIA of RevNet at width 16, of the orthogonal map on a network that knows the task, what that one knows)"""
    narrow, knows = Network(NARROW, seed).requires_grad_(False), solved(seed)
    in_narrow = iia(narrow, learned("revnet", narrow, seed, RATES["revnet"], STEPS), seed)
    in_solved = iia(knows, learned("orthogonal", knows, seed, RATES["orthogonal"], STEPS), seed)
    return in_narrow, in_solved, task_accuracy(knows)


def measure() -> Measured:
    with threads(1):
        found = [at_random(seed) for seed in NETWORKS]
        in_narrow, in_solved, knows = beside(NETWORKS[0])
    numbers: dict = {name: mean(one[name] for one in found) for name in found[0]}
    for name in ("iia_revnet", "iia_orthogonal", "task_accuracy"):
        numbers[f"{name}_by_network"] = [one[name] for one in found]
    numbers |= {"iia_revnet_width_16": in_narrow, "iia_orthogonal_solved": in_solved}
    numbers["task_accuracy_solved"] = knows
    parts = {
        "RevNet finds it": all(one["iia_revnet"] >= 0.9 for one in found),
        "the orthogonal map less": all(one["iia_revnet"] >= one["iia_orthogonal"] + 0.15 for one in found),
        "the network cannot": all(one["task_accuracy"] <= 0.6 for one in found),
        "RevNet inverts": all(one["inverse_error_revnet"] < 1e-9 for one in found),
    }
    return Measured.by(parts, numbers)


CLAIM = Claim(
    name="nonlinear_das",
    statement=(
        "on hierarchical equality a RevNet alignment map of a frozen MLP with random weights reaches a high "
        "interchange-intervention accuracy, although the MLP cannot do the task; an orthogonal map does not"
    ),
    bound=(
        "on each of three random networks: held-out IIA of RevNet >= 0.9 and >= that of the orthogonal map + 0.15, "
        "accuracy of the network on the task <= 0.6; the trained RevNet inverts to 1e-9 in float64"
    ),
    measure=measure,
)
