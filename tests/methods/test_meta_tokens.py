"""Meta-attention: who reads whom, zeros of all others, rows with unlike numbers of meta tokens, texts without any."""

import pytest
import torch

import regard
from regard.core import Unsupported
from regard.core.call import Call
from regard.core.roles import Roles
from regard.methods.mechanisms.sparse import meta_tokens as page
from regard.nn import Attention
from regard.ops import explicit, lower_right
from regard.testing.case import Case, moved

N = 11
ROWS = Roles(meta=[[0, 1, 0, 0, 1, 1, 0, 0, 0, 1, 0], [0] * 9 + [2, 0]])


def qkv(n=N, batch=2, heads=2):
    g = torch.Generator().manual_seed(0)
    return (torch.randn(batch, heads, n, d, dtype=torch.float64, generator=g) for d in (4, 4, 6))


def paths():
    return [page.METHOD.reference, page.METHOD.fast]


@pytest.mark.parametrize("path", paths())
@pytest.mark.parametrize("roles", [ROWS, Roles(meta=ROWS["meta"][0]), Roles(meta=ROWS["meta"][:1])], ids=str)
def test_meta_tokens_read_earlier_ones_and_all_others_are_exactly_zero(path, roles):
    q, k, v = qkv()
    out, _ = path(q, k, v, page.Config(), Call(roles=roles))
    meta = (roles["meta"] > 0).expand(2, N)
    for b in range(2):
        among = meta[b].nonzero()[:, 0]
        cut = (t[b : b + 1, :, among] for t in (q, k, v))
        wanted = explicit(*cut, scale=0.5, mask=lower_right(len(among), len(among)))[0]
        torch.testing.assert_close(out[b][:, among], wanted)
        assert bool((out[b][:, ~meta[b]] == 0).all()) and bool(out[b][:, meta[b]].all())


@pytest.mark.parametrize("path", paths())
def test_a_text_without_meta_tokens_is_zero_and_one_of_them_alone_is_softmax_attention(path):
    q, k, v = qkv()
    none, _ = path(q, k, v, page.Config(), Call(roles=Roles(meta=[0] * N)))
    assert none.shape == v.shape and not none.any()
    every, _ = path(q, k, v, page.Config(), Call(roles=Roles(meta=[1] * N)))
    torch.testing.assert_close(every, explicit(q, k, v, scale=0.5, mask=lower_right(N, N)))


@pytest.mark.parametrize("path", ["reference", "fast"])
def test_what_moves_what(path):
    """Roles of a case are 0, 1, 2, 0, 1, 2, ...: only tokens of 1 and 2 are moved, and move."""
    case = Case(page.METHOD, page.Config(), "causal_self")
    inputs, asked = case.inputs(9), getattr(page.METHOD, path)
    meta = [i for i in range(9) if i % 3]
    for j in range(9):
        later = [i for i in meta if i >= j]
        assert moved(case, asked, inputs, "v", j) == (later if j in meta else [])
        assert moved(case, asked, inputs, "q", j) == ([j] if j in meta[1:] else [])


@pytest.mark.parametrize("path", paths())
def test_the_last_queries_are_those_of_the_whole(path):
    q, k, v = qkv()
    whole, _ = path(q, k, v, page.Config(), Call(roles=ROWS))
    for n in (1, 2, 3):
        few, _ = path(q[:, :, -n:], k, v, page.Config(), Call(roles=ROWS))
        torch.testing.assert_close(few, whole[:, :, -n:])


def test_masks_of_keys_by_row_and_head_beside_roles_of_rows():
    q, k, v = qkv()
    mask = torch.rand(2, 2, N, generator=torch.Generator().manual_seed(1)) < 0.7
    for key_mask in (mask, mask[:1], mask[:, :1], mask[:1, :1]):
        for roles in (ROWS, Roles(meta=ROWS["meta"][0])):
            call = Call(roles=roles, key_mask=key_mask)
            wanted, out = (path(q, k, v, page.Config(), call)[0] for path in paths())
            torch.testing.assert_close(out, wanted)


def test_in_a_layer_others_go_by_and_the_state_carries_on():
    torch.manual_seed(0)
    layer, x, state, rows = Attention(8, 2, "meta_tokens").double(), torch.randn(2, N, 8).double(), None, []
    out, _ = layer(x, roles=ROWS)
    assert bool((out[(ROWS["meta"] == 0)] == 0).all())
    for i in range(N):
        row, state = layer(x[:, i : i + 1], roles=ROWS.gather(range(i + 1)), initial_state=state)
        rows.append(row)
    torch.testing.assert_close(torch.cat(rows, 1), out)


def test_wrong_questions_are_errors():
    q, k, v = qkv()
    with pytest.raises(ValueError, match="the role meta says which keys are meta tokens"):
        regard.attend(q, k, v, "meta_tokens")
    with pytest.raises(ValueError, match="roles label all keys"):
        regard.attend(q, k, v, "meta_tokens", roles=Roles(meta=[1, 0]))
    with pytest.raises(KeyError, match="the role 'meta' is missing; near names: metta"):
        regard.attend(q, k, v, "meta_tokens", roles=Roles(metta=[0] * N))
    with pytest.raises(Unsupported, match="put into one text"):
        regard.attend(q, k, v, "meta_tokens", pattern="self", roles=ROWS)
