"""Layers as PyTorch's tools take them: compiled, exported, pickled, packed, masked, without tokens."""

import copy
import io
import pickle
from itertools import pairwise

import pytest
import torch

from regard import catalog
from regard.core import Unsupported
from regard.core.mask import causal, window
from regard.core.trees import tree_leaves, tree_map
from regard.kinds.mechanism import Mechanism
from regard.nn import Attention

# without those that read roles, are for one number of tokens or for cross alone, whose own tests have layers
EVERY = {
    name: page
    for name, page in catalog.every()
    if isinstance(page, Mechanism)
    and not page.roles
    and page.for_tokens is None
    and {"self", "causal_self"} & {*page.patterns}
}
# gradients at a second length, whose graph is of symbols and takes seconds: those that pad, and one of each family
TWICE = ("arflow", "delta_rule", "gla", "softmax")
# of each family the first; check_compiles traces every page at two lengths by itself
FIRST = {catalog.family_of(name): name for name in reversed(EVERY)}
SAMPLE = [name for name in EVERY if name in {*TWICE, *FIRST.values()}]
PATTERNS = [(name, pattern) for name, page in EVERY.items() for pattern in page.patterns]


def layer(name="softmax", pattern=None, **options):
    torch.manual_seed(0)
    pattern = pattern or ("causal_self" if "causal_self" in EVERY[name].patterns else EVERY[name].patterns[0])
    return Attention(16, 2, name, pattern, **options).double()


def x(n=9, seed=0, batch=2):
    return torch.randn(batch, n, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def first_hidden(n, hidden=3):
    mask = torch.ones(2, n, dtype=torch.bool)
    mask[0, :hidden] = False
    return mask


def gradients(attention, ask, text, mask):
    text = text.clone().requires_grad_()
    attention.zero_grad()
    out = ask(text, mask=mask)[0]
    out.square().sum().backward()
    learned = {n: p.grad.clone() for n, p in attention.named_parameters() if p.grad is not None}
    return {"out": out.detach(), "x": text.grad, **learned}


@pytest.mark.parametrize("name", SAMPLE)
def test_one_graph_at_two_lengths(name):
    """The second length is one that the first graph was not made for."""
    attention = layer(name)
    torch._dynamo.reset()
    compiled = torch.compile(attention, backend="eager", fullgraph=True)
    with torch.no_grad():
        for n in (9, 21):
            mask = first_hidden(n)
            torch.testing.assert_close(compiled(x(n), mask=mask)[0], attention(x(n), mask=mask)[0])
    torch._dynamo.reset()


@pytest.mark.parametrize(("name", "lengths"), [(n, (9, 21)[: 1 + (n in TWICE)]) for n in EVERY])
def test_one_graph_with_its_gradients(name, lengths):
    attention = layer(name)
    torch._dynamo.reset()
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    for n in lengths:
        text, mask = x(n), first_hidden(n)
        torch.testing.assert_close(
            gradients(attention, compiled, text, mask), gradients(attention, attention, text, mask)
        )
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["softmax", "gla"])
def test_a_compiled_layer_takes_its_state(name):
    attention, states = layer(name), [None, None]
    torch._dynamo.reset()
    compiled = torch.compile(attention, backend="eager", fullgraph=True)
    with torch.no_grad():
        for i, n in enumerate((5, 1, 1, 3)):
            found, states[0] = compiled(x(n, seed=i), initial_state=states[0])
            wanted, states[1] = attention(x(n, seed=i), initial_state=states[1])
            torch.testing.assert_close(found, wanted)
    torch._dynamo.reset()


class Output(torch.nn.Module):
    """A layer without its state, as torch.export takes it."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, text):
        return self.attention(text)[0]


@pytest.mark.parametrize("name", EVERY)
def test_exported_is_the_layer(name):
    attention = Output(layer(name)).eval()
    exported = torch.export.export(attention, (x(),)).module()
    torch.testing.assert_close(exported(x(seed=1)), attention(x(seed=1)))


def test_exported_for_any_length_where_the_sum_is_of_one_shape():
    attention = Output(layer("softmax")).eval()
    sizes = {"text": {1: torch.export.Dim("n", min=2, max=4096)}}
    exported = torch.export.export(attention, (x(),), dynamic_shapes=sizes).module()
    for n in (9, 70):
        torch.testing.assert_close(exported(x(n)), attention(x(n)))


@pytest.mark.parametrize("name", EVERY)
def test_pickled_saved_and_copied(name):
    attention = layer(name)
    file = io.BytesIO()
    torch.save(attention, file)
    file.seek(0)
    for back in (
        pickle.loads(pickle.dumps(attention)),
        torch.load(file, weights_only=False),
        copy.deepcopy(attention),
    ):
        assert back.method == attention.method
        torch.testing.assert_close(back(x())[0], attention(x())[0], rtol=0, atol=0)


def test_a_mask_and_positions_are_pickled_with_their_layer():
    attention = layer(mask=causal() & ~window(2, ahead=1))
    back = pickle.loads(pickle.dumps(attention))
    assert back.mask == attention.mask
    torch.testing.assert_close(back(x())[0], attention(x())[0], rtol=0, atol=0)
    placed = layer(pattern="self", positions="cca_concentric")
    assert pickle.loads(pickle.dumps(placed)).mask == placed.mask
    _, state = attention(x())
    for kept, wanted in zip(tree_leaves(pickle.loads(pickle.dumps(state))), tree_leaves(state), strict=True):
        assert torch.equal(kept, wanted)


# packed texts

SIZES, MEMORIES = (3, 1, 0, 5, 3), (4, 2, 4, 0, 4)


def spans(sizes):
    return list(pairwise(torch.tensor([0, *sizes]).cumsum(0).tolist()))


def borders(sizes):
    return torch.tensor([0, *sizes]).cumsum(0)


@pytest.mark.parametrize(("name", "pattern"), PATTERNS)
def test_a_packed_text_is_as_if_alone(name, pattern):
    cross = "cross" in pattern
    attention = layer(name, pattern, conv=0 if cross else 3)
    text, memory = x(sum(SIZES), batch=1), x(sum(MEMORIES), seed=1, batch=1) if cross else None
    more = {"cu_seqlens_k": borders(MEMORIES)} if cross else {}
    out, states = attention(text, memory, cu_seqlens=borders(SIZES), **more)
    for i, ((a, b), (c, d)) in enumerate(zip(spans(SIZES), spans(MEMORIES), strict=True)):
        wanted, end = attention(text[:, a:b], memory[:, c:d] if cross else None)
        torch.testing.assert_close(out[:, a:b], wanted)
        mine = states[i] if isinstance(states, list) else tree_map(lambda t, i=i: t[i : i + 1], states)
        for found, right in zip(tree_leaves(mine), tree_leaves(end), strict=True):
            torch.testing.assert_close(found, right)


@pytest.mark.parametrize("name", ["softmax", "gla"])
def test_packed_texts_go_on(name):
    attention, text = layer(name, conv=3), x(12, batch=1)
    _, states = attention(text, cu_seqlens=borders(SIZES))
    more = x(5, seed=1, batch=1)
    out, _ = attention(more, initial_state=states, cu_seqlens=torch.arange(6))
    for i, (a, b) in enumerate(spans(SIZES)):
        whole = attention(torch.cat([text[:, a:b], more[:, i : i + 1]], 1))[0]
        torch.testing.assert_close(out[:, i], whole[:, -1])


def test_what_packed_texts_cannot_take_is_refused():
    text = x(6, batch=1)
    with pytest.raises(Unsupported, match="beside cu_seqlens"):
        layer()(text, mask=first_hidden(6)[:1], cu_seqlens=[0, 6])
    with pytest.raises(ValueError, match="one row"):
        layer()(x(6), cu_seqlens=[0, 6])
    with pytest.raises(ValueError, match="cu_seqlens_k are the borders of the keys' texts in cross patterns"):
        layer()(text, cu_seqlens=[0, 6], cu_seqlens_k=[0, 6])
    with pytest.raises(ValueError, match="ends at the number of tokens"):
        layer()(text, cu_seqlens=[0, 5])


# masks


@pytest.mark.parametrize(
    ("mask", "rule"),
    [
        (torch.zeros(2, 1, 1, 9), r"mask == 0 \(mask=float32\[2, 1, 1, 9\]\)"),
        (torch.zeros(2, 9), r"mask == 0 \(mask=float32\[2, 9\]\)"),
        (
            torch.ones(2, 1, 9, dtype=torch.bool),
            r"\[B, M\] says which tokens are there.* \(mask=bool\[2, 1, 9\]\)",
        ),
        (torch.ones(2, 1, 9, 9, dtype=torch.long), r"bool, True = attend.* \(mask=int64\[2, 1, 9, 9\]\)"),
        (torch.full((2, 9), 2), r"1 for a token and 0 for padding"),
        (torch.ones(2, 8, dtype=torch.bool), r"a mask of tokens is \[B, M\] \(mask=bool\[2, 8\], B=2, M=9\)"),
        (torch.ones(3, 9, dtype=torch.bool), r"a mask of tokens is \[B, M\]"),
        ([True] * 9, "bool, True = attend"),
    ],
)
def test_a_mask_that_would_be_misread_is_refused(mask, rule):
    with pytest.raises(ValueError, match=rule):
        layer()(x(), mask=mask)


def test_masks_of_tokens_are_bool_or_what_tokenizers_give():
    attention, mask = layer(), first_hidden(9)
    wanted = attention(x(), mask=mask)[0]
    torch.testing.assert_close(attention(x(), mask=mask.long())[0], wanted, rtol=0, atol=0)
    torch.testing.assert_close(attention(x(), mask=mask[:1])[0][0], wanted[0])


@pytest.mark.parametrize(
    "mask", [window(3), causal() & ~window(1), "window", catalog.method("window", window=2)], ids=str
)
def test_a_core_mask_and_a_mask_page_are_their_pairs(mask):
    attention = layer(rope_theta=0)
    seen = catalog.as_mask(mask, "causal_self").dense(9)
    torch.testing.assert_close(attention(x(), mask=mask)[0], attention(x(), mask=seen)[0])
    # beside the layer's own
    both = layer(rope_theta=0, mask=window(4))
    pairs = seen & window(4).dense(9)
    torch.testing.assert_close(both(x(), mask=mask)[0], attention(x(), mask=pairs)[0])


def test_pairs_after_a_padded_text_do_not_show_its_padding():
    attention, text = layer(), x(9)
    _, state = attention(text[:, :6], mask=first_hidden(6))
    out, end = attention(text[:, 6:], mask=torch.ones(1, 1, 3, 9, dtype=torch.bool), initial_state=state)
    torch.testing.assert_close(out[0], attention(text[:1, 3:])[0][0, 3:])
    last, _ = attention(x(1, seed=1), initial_state=end)
    whole = attention(torch.cat([text[:1, 3:], x(1, seed=1)[:1]], 1))[0]
    torch.testing.assert_close(last[0], whole[0, -1:])


# sizes


@pytest.mark.parametrize(("name", "pattern"), PATTERNS)
def test_no_tokens_give_none_and_a_batch_of_none_is_empty(name, pattern):
    cross = "cross" in pattern
    attention, memory = (
        layer(name, pattern, conv=0 if cross else 3),
        x(7, seed=1) if "cross" in pattern else None,
    )
    out, state = attention(x(0), memory)
    assert out.shape == (2, 0, 16) and state is None
    out, _ = attention(x(5)[:0], None if memory is None else memory[:0])
    assert out.shape == (0, 5, 16)
    if pattern == "causal_self":
        _, state = attention(x(5))
        out, after = attention(x(0), initial_state=state)
        assert out.shape == (2, 0, 16) and after is state


def test_values_may_be_of_another_width():
    attention = layer(v_head_dim=5, conv=3, kv_heads=1)
    assert attention.v_proj.weight.shape == (5, 16) and attention.o_proj.weight.shape == (16, 10)
    state, rows = None, []
    for i in range(9):
        row, state = attention(x()[:, i : i + 1], initial_state=state)
        rows.append(row)
    torch.testing.assert_close(torch.cat(rows, 1), attention(x())[0])
    plain = layer()
    assert plain.v_proj.weight.shape == plain.k_proj.weight.shape


def test_dropout_drops_its_share_while_training_only():
    dropping, plain = layer(dropout=0.25), layer()
    dropping.load_state_dict(plain.state_dict())
    out, wanted = dropping(x(400))[0], plain(x(400))[0]
    dropped = out == 0
    assert abs(dropped.double().mean() - 0.25) < 0.02
    torch.testing.assert_close(out[~dropped], (wanted / 0.75)[~dropped])
    torch.testing.assert_close(dropping.eval()(x(400))[0], wanted, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"0 <= dropout < 1 \(dropout=1\)"):
        layer(dropout=1)


def test_rotary_positions_in_cross_count_each_text_by_itself():
    """Queries stand at their own places, keys at theirs, padding of the memory left out."""
    attention = layer(pattern="cross", rope_theta=1e4)
    text, memory = x(4), x(7, seed=1)
    padded = torch.cat([x(2, seed=2), memory], 1)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[:, :2] = False
    torch.testing.assert_close(attention(text, padded, mask=mask)[0], attention(text, memory)[0])
    assert not torch.allclose(attention(text, memory)[0], layer(pattern="cross")(text, memory)[0])
