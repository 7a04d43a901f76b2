"""Interchange interventions: maps that are undone, what is taken from where, and the algorithm's labels."""

import torch

from regard.claims.findings.nonlinear_das import (
    WIDTH,
    Identity,
    Network,
    Orthogonal,
    RevNet,
    interchanged,
    interchanges,
)
from regard.claims.lab import generator, seeded


def maps() -> dict[str, torch.nn.Module]:
    with seeded(0):
        found = {"revnet": RevNet(WIDTH), "orthogonal": Orthogonal(WIDTH).double(), "identity": Identity()}
    for p in found["revnet"].parameters():
        p.data *= 2  # far from the identity
    return {name: phi.double() for name, phi in found.items()}


@torch.no_grad()
def test_maps_are_undone_exactly_and_the_free_one_bends():
    x, y = torch.randn(2, 200, WIDTH, generator=generator(), dtype=torch.float64)
    for name, phi in maps().items():
        allowed = 1e-5 if name == "orthogonal" else 1e-10  # a matrix made orthogonal in float32
        assert (phi.inverse(phi(x)) - x).abs().max() < allowed
        assert (phi(phi.inverse(x)) - x).abs().max() < allowed
        bend = (phi(x + y) - phi(x) - phi(y) + phi(0 * x)).abs().max()
        assert (bend > 1) == (name == "revnet")


@torch.no_grad()
def test_a_variable_is_taken_from_its_own_source():
    network = Network(WIDTH, 0).double()
    x = interchanges(6, generator())[0].double()
    left, right, both, none = (torch.tensor([t]).expand(6, 2) for t in ([1, 0], [0, 1], [1, 1], [0, 0]))
    for phi in maps().values():
        z = phi(network.first(x))
        half = WIDTH // 2
        for taken, wanted in (
            (none, z[0]),
            (left, torch.cat([z[1, :, :half], z[0, :, half:]], 1)),
            (right, torch.cat([z[0, :, :half], z[2, :, half:]], 1)),
            (both, torch.cat([z[1, :, :half], z[2, :, half:]], 1)),
        ):
            found = interchanged(network, phi, x, taken.bool())
            assert torch.allclose(found, network.rest(phi.inverse(wanted)), atol=1e-9)
        assert torch.allclose(interchanged(network, phi, x, none.bool()), network(x[0]), atol=1e-4)


@torch.no_grad()
def test_an_orthogonal_interchange_is_a_subspace_patch():
    network, phi = Network(WIDTH, 0).double(), maps()["orthogonal"]
    x = interchanges(6, generator())[0].double()
    h = network.first(x)
    v = phi.turn.weight[: WIDTH // 2].T  # [D, r]
    taken = torch.tensor([[True, False]]).expand(6, 2)
    wanted = network.rest(h[0] + (h[1] - h[0]) @ v @ v.T)
    assert torch.allclose(interchanged(network, phi, x, taken), wanted, atol=1e-5)


def test_labels_are_those_of_the_algorithm():
    x, taken, labels = interchanges(2000, generator())
    pairs = x.unflatten(-1, (2, 2, -1))
    equal = (pairs[..., 0, :] == pairs[..., 1, :]).all(-1)  # [3, B, 2]
    for i in range(len(labels)):
        left = equal[1 if taken[i, 0] else 0, i, 0]
        right = equal[2 if taken[i, 1] else 0, i, 1]
        assert labels[i] == (left == right)
    assert 0.45 < labels.double().mean() < 0.55 and 0.45 < equal.double().mean() < 0.55
    assert taken.any(1).all() and {(1, 0), (0, 1), (1, 1)} == {tuple(row) for row in taken.int().tolist()}
