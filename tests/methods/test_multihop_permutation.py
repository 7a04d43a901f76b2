"""The texts, orders and masks of multihop_permutation, and what its model can see."""

import torch

from regard.claims.findings import multihop_permutation as claim


def g(seed=0):
    return torch.Generator().manual_seed(seed)


def test_answers_follow_from_the_facts():
    for hops in (None, 1, 2):
        t, two = claim.texts(200, 1 if hops else 5, g(), hops), []
        for facts, questions, answers in zip(t.facts, t.questions, t.answers, strict=True):
            said = {(h, r): v for h, r, v in facts.tolist()}
            assert len(said) == claim.FACTS
            for (who, r), answer in zip(questions.tolist(), answers.tolist(), strict=True):
                two.append((who, r) not in said)
                told = said[who, 0] if two[-1] else who
                assert said[told, r] == 2 * claim.NAMES + answer
        low, high = {None: (0.4, 0.6), 1: (0, 0), 2: (1, 1)}[hops]
        assert low <= sum(two) / len(two) <= high


def test_nobody_lives_in_some_towns():
    t = claim.texts(50, 1, g(), 2)
    inhabited, told = t.facts[:, : claim.CHAINS, 2], t.facts[:, -claim.EMPTY * claim.RELATIONS :, 0]
    assert (told >= claim.NAMES).all() and (told < 2 * claim.NAMES).all()
    assert not (told[:, :, None] == inhabited[:, None]).any()


def test_the_bound():
    def rows(gap, forward=95.0, one_hop=99.0):
        return [{"gap": gap, "forward": forward, "one_hop": one_hop}]

    def holds(causal, prefix):
        return all(claim.bounds(causal, prefix).values())

    assert holds(rows(10.0), rows(5.0)) and holds(rows(10.0), rows(-5.0))
    assert not holds(rows(9.9), rows(0.0)) and not holds(rows(10.0), rows(-5.1))
    assert not holds(rows(30.0), rows(0.0, forward=89.0)) and not holds(rows(30.0, one_hop=94.0), rows(0.0))
    assert not holds(rows(30.0) + rows(5.0), rows(0.0) + rows(0.0))


def test_the_facts_of_the_chain_are_those_of_the_question():
    t = claim.texts(200, 1, g(), 2)
    rows = torch.arange(200)
    first, second = t.facts[rows, t.first[:, 0]], t.facts[rows, t.second[:, 0]]
    assert torch.equal(first[:, 0], t.questions[:, 0, 0]) and (first[:, 1] == 0).all()
    assert torch.equal(first[:, 2], second[:, 0]) and torch.equal(second[:, 1], t.questions[:, 0, 1])
    assert torch.equal(second[:, 2], 2 * claim.NAMES + t.answers[:, 0])


def test_only_the_two_facts_change_places():
    t, order = claim.texts(100, 1, g(), hops=2), claim.shuffled(100, g(1))
    first, second = t.first[:, 0], t.second[:, 0]
    ways = [claim.chained(order, first, second, forward) for forward in (True, False)]
    for way, after in zip(ways, (True, False), strict=True):
        place = way.argsort(1)
        later = place.gather(1, second[:, None]) > place.gather(1, first[:, None])
        assert (later == after).all()
        assert torch.equal(way.sort(1).values, torch.arange(claim.FACTS).expand(100, -1))
        moved = (way != order).sum(1)
        assert ((moved == 0) | (moved == 2)).all()
    assert ((ways[0] != ways[1]).sum(1) == 2).all()


def test_what_each_mask_shows():
    n = claim.FACTS
    causal, prefix = claim.visible("causal", 2), claim.visible("prefix", 2)
    assert torch.equal(causal[:n, :n], torch.ones(n, n, dtype=torch.bool).tril())
    assert prefix[:n, :n].all()
    assert torch.equal(causal[n:], prefix[n:]) and not prefix[:n, n:].any()
    own = torch.ones(3, 3, dtype=torch.bool).tril()
    assert torch.equal(causal[n:, n:], torch.block_diag(own, own).bool())
    assert causal[n:, :n].all()


@torch.no_grad()
def test_facts_look_back_with_a_causal_mask_only():
    t = claim.texts(4, 1, g())
    other = t.facts.clone()
    other[:, -1, 2] = 2 * claim.NAMES + (other[:, -1, 2] - 2 * claim.NAMES + 1) % claim.VALUES
    for mask, same in (("causal", True), ("prefix", False)):
        with claim.seeded(0):
            model = claim.Decoder(mask, 2)
        states = []
        for facts in (t.facts, other):
            x, seen = model.embedded(facts, t.questions), claim.visible(mask, 1)
            for layer in model.layers:
                x, weights = layer(x, seen)
            torch.testing.assert_close(weights.sum(-1), torch.ones(4, claim.FACTS + 3))
            states.append(x[:, : claim.FACTS - 1])
        assert torch.allclose(*states) == same


@torch.no_grad()
def test_questions_beside_each_other_are_answered_as_alone():
    t = claim.texts(4, 6, g())
    with claim.seeded(0):
        model = claim.Decoder("prefix", 2)
    together, spent = model(t.facts, t.questions)
    alone = [model(t.facts, t.questions[:, [i]]) for i in range(6)]
    torch.testing.assert_close(together, torch.cat([logits for logits, _ in alone], 1))
    torch.testing.assert_close(spent, torch.cat([s for _, s in alone], 1))


def test_the_peak_chooses_the_order():
    """A model that is right where it looks at a fact the most."""

    def model(facts, questions):
        here = facts[:, 0, 1] == 0  # where somebody lives comes first
        wanted = answers + (~here).long()[:, None]
        logits = torch.nn.functional.one_hot(wanted % claim.VALUES, claim.VALUES).double()
        spent = torch.zeros(len(facts), 1, claim.FACTS)
        spent[here, 0, 3] = 0.9
        return logits, spent

    t = claim.texts(claim.TESTED, 1, g(), hops=2)
    answers = t.answers
    found = claim.peaks(model, t, g(1))
    share = claim.CHAINS / claim.FACTS
    assert abs(found["any_order"] / 100 - share) < 0.03
    assert abs(found["peak_order"] / 100 - (1 - (1 - share) ** claim.ORDERS)) < 0.04
    assert found["peak_where_right"] > 0.89 > 0.01 > found["peak_where_wrong"]
