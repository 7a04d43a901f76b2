"""Duo-causal attention: the rule by a loop over slots in any order, decode steps, and a layer that reads it."""

import torch

import regard
from regard.core.mask import causal
from regard.core.roles import Roles
from regard.methods.positions import tah_duo_causal as page

SLOTS = [(0, 0), (1, 0), (1, 1), (2, 0), (3, 0), (3, 1), (3, 2), (4, 0)]  # token, iteration; by token


def roles_of(slots):
    return Roles(token=[p for p, _ in slots], iteration=[i for _, i in slots])


def test_the_rule_in_the_order_of_tokens_and_of_iterations():
    for slots in (SLOTS, sorted(SLOTS, key=lambda slot: slot[1])):
        wanted = [[p2 <= p and i2 <= i for p2, i2 in slots] for p, i in slots]
        seen = page.build(page.Config()).dense(len(slots), roles=roles_of(slots))
        assert seen.tolist() == [[wanted]]
        assert not bool((seen & ~causal().dense(len(slots))).any())


def test_one_iteration_is_causal_attention():
    roles = roles_of([(p, 0) for p in range(6)])
    assert torch.equal(page.build(page.Config()).dense(6, roles=roles), causal().dense(6))
    assert page.positions(roles, page.Config()).tolist() == [*range(6)]


def test_a_layer_reads_slots_in_either_order():
    """The same slots by token and by iteration give the same rows: positions are those of the tokens."""
    torch.manual_seed(0)
    layer = regard.nn.Attention(16, 2, positions="tah_duo_causal").double()
    x = torch.randn(1, len(SLOTS), 16).double()
    order = sorted(range(len(SLOTS)), key=lambda n: SLOTS[n][1])
    by_token = layer(x, roles=roles_of(SLOTS))[0]
    by_iteration = layer(x[:, order], roles=roles_of([SLOTS[n] for n in order]))[0]
    torch.testing.assert_close(by_iteration, by_token[:, order])
    # the first iterations are those of a text in which nobody iterates again
    once = [n for n, (_, i) in enumerate(SLOTS) if i == 0]
    alone = layer(x[:, once], roles=roles_of([SLOTS[n] for n in once]))[0]
    torch.testing.assert_close(by_token[:, once], alone)
