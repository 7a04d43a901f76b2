"""Edges, circuits, controls and alignment search, against path patching, loops by hand and what must hold."""

import pytest
import torch
from tests.test_explain_scans import FAMILIES, MORE, forwarded, linear_model, random_pairs, texts, tiny

from regard.attaching.attachment import attach
from regard.core import Edit, Site
from regard.explaining.attribution import attribute
from regard.explaining.circuit import area, faithfulness, nodes_of, random_directions, random_heads, together
from regard.explaining.das import Subspace, audited, interchange, random_subspace
from regard.explaining.edges import EMBEDDINGS, edge_receivers, edges, top_edges
from regard.explaining.knockout import knockout
from regard.explaining.pairs import Pairs, batch_of
from regard.explaining.patching import patch
from regard.explaining.paths import LOGITS, Node, path_patch
from regard.explaining.runs import capture


@pytest.mark.parametrize("receiver", [Node("v", 2, 0), Node("mlp", 1), Node("mlp", 2), LOGITS], ids=str)
def test_edges_are_exact_paths_on_a_linear_model(receiver):
    model, pairs = linear_model(), random_pairs(lengths=(9, 6, 8))
    found, exact = edges(model, pairs), path_patch(model, pairs, [receiver])
    for sender in exact.coords["sender"]:
        gap = found.at((sender, str(receiver))) - exact.at((sender,))
        assert float(gap.abs().max()) <= 1e-10
    assert float(exact.values.abs().max()) > 1e-4


def test_edges_into_the_logits_are_the_whole_difference():
    model, pairs = linear_model(), random_pairs(3, 9)
    into = edges(model, pairs).values[:, :, -1].sum(1)
    wanted = pairs.score(forwarded(model, pairs.clean.ids, ())) - pairs.score(
        forwarded(model, pairs.corrupt.ids, ())
    )
    torch.testing.assert_close(into, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("family", [*FAMILIES, *MORE])
def test_edges_into_a_receiver_add_up_to_its_attribution(family, steps):
    """All that comes into q, k or v of a head, by the chain rule, is near what a change of q, k, v itself does.

    Where the norm before it is linearised at the corrupted prompt the two agree for small differences alone, so the two
    prompts differ here by little: the embedding of one token is moved slightly.
    """
    model, pairs = tiny(family), random_pairs(2, 7)
    table = model.get_input_embeddings().weight
    with torch.no_grad():
        old, new = pairs.corrupt.ids[:, 3], pairs.clean.ids[:, 3]
        table[new] = table[old] + 2e-3 * (table[new] - table[old])
    try:
        found = edges(model, pairs, steps=steps)
    except ValueError as error:  # a model with tied embeddings moves the answer too
        pytest.fail(str(error))
    for q in ("q", "v", "mlp"):
        node = Node(q, 1, None if q == "mlp" else 1)
        into = found.values[:, :, list(found.coords["receiver"]).index(str(node))].nansum(1)
        whole = attribute(model, pairs, [q], steps=steps)[q].at((1,) if q == "mlp" else (1, 1))
        if q == "mlp":
            continue  # its input, not its output: compared in the linear model
        assert float((into - whole).abs().max()) <= 0.05 * float(whole.abs().max()) + 1e-7


def test_edges_that_are_not_there_are_no_numbers():
    model, pairs = tiny("neox"), random_pairs(2, 7)
    found = edges(model, pairs)
    assert bool(found.at(("layer 1 z head 0", "layer 1 mlp")).isnan().all())
    assert bool(edges(tiny("llama"), pairs).at(("layer 1 z head 0", "layer 1 mlp")).isfinite().all())
    assert bool(found.at((str(EMBEDDINGS), "layer 0 q head 0")).isfinite().all())
    assert len(edge_receivers(tiny("qwen3"))) == 3 * (4 + 2 + 2) + 3 + 1
    names = top_edges(found, 3)
    assert len(names) == 3 and abs(names[0][2]) >= abs(names[2][2])


@pytest.mark.parametrize("ablation", ["resample", "zero", "mean"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "neox"])
def test_a_curve_is_its_definition(family, ablation):
    """Each share of each pair alone, by edits of single nodes; all of them is the model, none of them is nothing."""
    model, pairs = tiny(family), random_pairs(3, 9)
    ranking = nodes_of(attribute(model, pairs))
    shares = (0.0, 0.3, 0.6, 1.0)
    curve = faithfulness(model, pairs, ranking, shares=shares, ablation=ablation)
    order = [n for n, _ in sorted(ranking, key=lambda x: -x[1])]
    given = pairs.corrupt if ablation == "resample" else pairs.clean
    _, values = capture(model, given, ["z", "mlp"])

    def run(i, kept):
        edits = []
        for node in order:
            if node in kept:
                continue
            x = values[node.quantity][node.layer]
            if ablation == "mean":
                x = x.mean((0, 2), keepdim=True).expand_as(x)
            x = (torch.zeros_like(x) if ablation == "zero" else x)[i : i + 1]
            site = Site(node.quantity, layers=node.layer, heads=node.head)
            edits.append(
                Edit(site, "replace", x[:, node.head or 0][:, None] if node.quantity == "z" else x[:, 0])
            )
        logits = forwarded(model, torch.tensor([texts(pairs.clean)[i]]), edits)[0]
        return float(logits[pairs.target[i]] - logits[pairs.foil[i]])

    for i in range(3):
        none = run(i, set())
        for j, share in enumerate(shares):
            kept = set(order[: round(share * len(order))])
            assert float(curve.change[i, j]) == pytest.approx(run(i, kept) - none, abs=3e-5)
            assert float(curve.rest[i, j]) == pytest.approx(run(i, set(order) - kept) - none, abs=3e-5)
    assert float(curve.faithfulness[0]) == 0 and float(curve.faithfulness[-1]) == pytest.approx(1, abs=1e-6)
    assert curve.cpr + curve.cmd >= 1 - 1e-6
    row = curve.to_dict()
    assert (row["ablation"], row["signed"], row["nodes"]) == (ablation, True, 15)


def test_areas():
    assert area((0, 0.5, 1), torch.tensor([0.0, 1.0, 1.0])) == pytest.approx(0.75)
    model, pairs = tiny("llama"), random_pairs(3, 9)
    ranking = nodes_of(attribute(model, pairs))
    with pytest.raises(ValueError, match="a ranking has a node"):
        faithfulness(model, pairs, [])
    with pytest.raises(ValueError, match="shares ascend"):
        faithfulness(model, pairs, ranking, shares=(0.5, 1.0))
    with pytest.raises(ValueError, match="ablation is"):
        faithfulness(model, pairs, ranking, ablation="noise")


def test_heads_together_and_their_controls():
    model, pairs = tiny("llama"), random_pairs(4, 9)
    target = [(1, 0), (1, 2), (2, 3)]
    both = together(model, pairs, [target, [(1, 0)]])
    single = patch(model, pairs, "z").at((1, 0))
    torch.testing.assert_close(both.at((1,)), single, rtol=0, atol=1e-6)
    _, clean = capture(model, pairs.clean, ["z"])
    edits = [Edit(Site("z", layers=n, heads=h), "replace", clean["z"][n][:, h][:, None]) for n, h in target]
    wanted = pairs.score(forwarded(model, pairs.corrupt.ids, edits)) - pairs.score(
        forwarded(model, pairs.corrupt.ids, ())
    )
    torch.testing.assert_close(both.at((0,)), wanted.double(), rtol=0, atol=1e-6)
    drawn = random_heads(model, target, draws=30)
    assert len({tuple(map(tuple, d)) for d in drawn}) > 1
    for heads in drawn:
        assert not {*heads} & {*target}
        assert sorted(n for n, _ in heads) == [1, 1, 2]
    with pytest.raises(ValueError, match="from which a control is drawn"):
        random_heads(model, [(1, h) for h in range(4)])
    placebo = random_directions(model, pairs, target, draws=3)
    assert placebo.values.shape == (4, 3)
    assert not torch.allclose(placebo.values[:, 0], placebo.values[:, 1])


def test_an_interchange_by_hand():
    model, pairs = tiny("llama"), random_pairs(6, 9)
    whole = Subspace(torch.eye(32), "resid_post", 2, -1)
    answers = pairs.score(forwarded(model, pairs.clean.ids, ())) > 0
    assert interchange(model, pairs, whole) == pytest.approx(float(answers.double().mean()))
    none = Subspace(torch.eye(32)[:, :1] * 1.0, "z", 0, 0, head=1)
    with pytest.raises(ValueError, match="orthonormal"):
        interchange(model, pairs, Subspace(torch.ones(32, 2), "resid_post", 2, -1))
    with pytest.raises(ValueError, match="takes orthonormal columns"):
        interchange(model, pairs, none)
    basis = random_subspace(whole).basis
    torch.testing.assert_close(basis.mT @ basis, torch.eye(32), rtol=0, atol=1e-5)


def test_alignment_search_finds_a_planted_direction():
    """The answer depends on one direction of a layer: search finds it, random and shuffled ones do not."""
    model = tiny("llama")
    g = torch.Generator().manual_seed(11)
    with torch.no_grad():
        direction = torch.nn.functional.normalize(torch.randn(32, generator=g), dim=0)
        table = model.get_input_embeddings().weight
        signs = (torch.arange(128) % 2) * 2.0 - 1
        table.sub_((table @ direction)[:, None] * direction).add_(3 * signs[:, None] * direction)
        for layer in model.model.layers:
            for p in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
                p.mul_(0.3)
        model.lm_head.weight[7] = 4 * direction
        model.lm_head.weight[9] = -4 * direction
    odd, even = (
        torch.randint(1, 55, (48, 6), generator=g) * 2 + 1,
        torch.randint(2, 55, (48, 6), generator=g) * 2,
    )
    # half of the sources answer 7, half 9
    side = torch.arange(48) % 2 == 0
    clean, corrupt = (torch.where(side[:, None], a, b).tolist() for a, b in ((odd, even), (even, odd)))
    target, foil = torch.where(side, 7, 9), torch.where(side, 9, 7)
    pairs = Pairs(batch_of(clean), batch_of(corrupt), target, foil)
    found = audited(model, pairs.at(range(24)), pairs.at(range(24, 48)), "resid_post", 1, steps=60, rate=3e-2)
    assert found["whole"] == 1 and found["das"] >= 0.9
    assert found["random"] <= 0.2 and found["shuffled"] <= 0.7


def test_das_leaves_the_model_as_it_was():
    model, pairs = tiny("gemma2"), random_pairs(4, 7)
    before = [p.clone() for p in model.parameters()]
    flags = [p.requires_grad for p in model.parameters()]
    audited(model, pairs, pairs, "z", 1, head=1, steps=2)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    assert flags == [p.requires_grad for p in model.parameters()]
    assert all(p.grad is None for p in model.parameters())
    with torch.no_grad(), attach(model):
        model(input_ids=pairs.clean.ids)


@pytest.mark.parametrize("family", ["llama", "gemma2", "neox"])
def test_a_knockout_by_hand(family):
    """Each window and span of each prompt alone, padding before the prompts or not."""
    model, pairs = tiny(family), random_pairs(lengths=(9, 7))
    spans = [(0, 2), (3, 4)]
    found = knockout(model, pairs, spans, window=2)
    assert found.dims == ("layer", "span") and found.values.shape == (2, 2, 2)
    for i, ids in enumerate(texts(pairs.clean)):
        base = pairs.at([i]).score(forwarded(model, torch.tensor([ids]), ()))
        for layer in (0, 1):
            for j, (a, b) in enumerate(spans):
                site = Site("scores", layers=(layer, layer + 1), rows=-1, keys=tuple(range(a, b)))
                edit = Edit(site, "block", required=False)
                after = pairs.at([i]).score(forwarded(model, torch.tensor([ids]), [edit]))
                assert float(found.values[i, layer, j]) == pytest.approx(float(base - after), abs=2e-5)
    assert float(found.values.abs().max()) > 1e-3
    with pytest.raises(ValueError, match="spans are of tokens"):
        knockout(model, pairs, [(5, 9)])
    with pytest.raises(ValueError, match="a window of the model's layers"):
        knockout(model, pairs, spans, window=4)
