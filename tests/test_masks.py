"""Masks: every page, the algebra, roles; and the checks themselves, by planted faults."""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard import catalog
from regard.claims.mask import power_attention, s2_attention
from regard.claims.position import cca_concentric
from regard.core import Card
from regard.core.mask import Mask, causal, first, predicate, window
from regard.core.roles import Roles
from regard.kinds.mask import MaskPage
from regard.methods.masks import s2_attention as s2
from regard.methods.positions import cca_concentric as cca
from regard.testing.mask import check_mask, check_mask_page

MASKS = [name for name, page in catalog.every() if getattr(page, "build", None) is not None]


@pytest.mark.parametrize("name", MASKS)
def test_every_query_has_a_key(name):
    blind = check_mask_page(name)
    assert blind
    assert not any(blind.values()), "with left padding in one row and no causal mask, every query has a key"


@pytest.mark.parametrize(
    "claim", [power_attention.CLAIM, s2_attention.CLAIM, cca_concentric.CLAIM], ids=lambda c: c.name
)
def test_claim(claim):
    measured = claim.measure()
    assert claim.verdict(measured) == "holds", measured.numbers


# -- faults planted: each must be found, by the law named


@dataclass(frozen=True)
class Config:
    window: int = 4


class OtherFlex(Mask):
    """Its flex form shows the future."""

    def flex(self, **kwargs):
        return (self | ~causal()).flex(**kwargs)


class OtherBlocks(Mask):
    """Its blocks take what is partial as full."""

    def blocks(self, *args, **kwargs):
        blocks = super().blocks(*args, **kwargs)
        return replace(blocks, kind=torch.where(blocks.kind > 0, 2, 0))


class SlotsNotIndices(Mask):
    """Its `at` reads slots as if they were true indices."""

    def at(self, q_index, k_index, **kwargs):
        slots = torch.arange(k_index.shape[-1]).expand(k_index.shape)
        return super().at(q_index, torch.where(k_index < 0, -1, slots), **kwargs)


def disguised(kind):
    plain = causal() & window(4)
    return kind(plain.rule, plain.name, parts=plain.parts)


@predicate()
def reads_the_size(at):
    return at.k < at.q.max() - 1


FAULTS = {
    "one key too many": (lambda c: causal() & window(c.window + 1), "window=2 shows one key more than 1"),
    "one key too few": (lambda c: causal() & window(c.window - 1) if c.window > 2 else causal(), "window="),
    "not causal": (lambda c: window(c.window, 1 if c.window > 1 else 0), "window=|neutral"),
    "no identity": (lambda c: causal() & window(c.window) & ~(first(1) & ~window(1)), "window=|neutral"),
    "another flex form": (lambda c: disguised(OtherFlex), "flex = dense"),
    "partial taken for full": (lambda c: disguised(OtherBlocks), "blocks"),
    "slots for indices": (lambda c: disguised(SlotsNotIndices), "at evicted slots"),
    "depends on the batch of queries": (lambda c: reads_the_size(), "dense = the predicate"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_found(fault):
    build, law = FAULTS[fault]
    card = Card("planted", "none", 2000, "a fault", neutral={"window": 2**40})
    page = MaskPage(config=Config, card=card, build=build, patterns=("causal_self",))
    with pytest.raises(AssertionError, match=law):
        check_mask(page)


def test_right_page_of_the_same_kind_passes():
    card = Card("right", "none", 2000, "no fault", neutral={"window": 2**40})
    page = MaskPage(
        config=Config, card=card, build=lambda c: causal() & window(c.window), patterns=("causal_self",)
    )
    assert set(check_mask(page).values()) == {0}


# -- the algebra


@predicate("document")
def same_document(at):
    return at.q_role("document") == at.k_role("document")


leaves = st.one_of(
    st.just(causal()),
    st.just(same_document()),
    st.builds(window, st.integers(1, 5), st.integers(-1, 2)),
    st.builds(first, st.integers(0, 4)),
)
masks = st.recursive(
    leaves,
    lambda m: st.one_of(
        m.map(lambda a: ~a), st.builds(lambda a, b: a & b, m, m), st.builds(lambda a, b: a | b, m, m)
    ),
    max_leaves=5,
)
ROLES = Roles(document=[0, 0, 0, 1, 1, 2, 2, 2, 2])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(masks, masks)
def test_laws_of_sets(a, b):
    def dense(m):
        return m.dense(9, roles=ROLES)

    assert torch.equal(dense(~(a & b)), dense(~a | ~b))
    assert torch.equal(dense(a & b), dense(b & a))
    assert torch.equal(dense(a | (a & b)).expand(1, 1, 9, 9), dense(a).expand(1, 1, 9, 9))
    assert torch.equal(dense(a), a.at(torch.arange(9), torch.arange(9), roles=ROLES))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(masks)
def test_repr_is_the_expression(a):
    names = {"causal": causal, "window": window, "first": first, "same_document": same_document}
    assert eval(repr(a), names) == a
    assert hash(eval(repr(a), names)) == hash(a)


def test_errors_name_the_rule():
    with pytest.raises(
        KeyError, match=r"same_document\(\) needs the role 'document' of the queries; no roles"
    ):
        same_document().dense(3)
    with pytest.raises(KeyError, match=r"'document'.*given: padding"):
        (causal() & same_document()).row(2, roles=Roles(padding=[0, 0, 0]))
    with pytest.raises(ValueError, match="index < labelled"):
        same_document().dense(4, roles=Roles(document=[0, 0, 0]))
    with pytest.raises(ValueError, match="heads of the layer"):
        s2.METHOD.build(s2.Config()).dense(4, heads=16)
    with pytest.raises(ValueError, match="same heads"):
        s2.METHOD.build(s2.Config()) & s2.METHOD.build(s2.Config(heads=16))
    with pytest.raises(ValueError, match="kv_heads >= stride"):
        s2.Config(heads=8, kv_heads=4, stride=8)
    with pytest.raises(ValueError, match="offset >= 0"):
        causal().dense(4, 2, offset=-2)
    with pytest.raises(TypeError, match="no truth value"):
        causal() and window(2)


def test_cross_masks_have_roles_on_both_sides():
    queries, keys = Roles(document=[0, 1]), Roles(document=[[1, 0, 1], [1, 1, 1]])
    dense = same_document().dense(2, 3, roles=(queries, keys))
    assert dense.int().tolist() == [[[[0, 1, 0], [1, 0, 1]]], [[[0, 0, 0], [1, 1, 1]]]]
    assert same_document().blind(2, 3, roles=(queries, keys)).tolist() == [[1, 0, 0]]


def test_flex_attention_with_the_mask_is_masked_attention():
    from torch.nn.attention.flex_attention import flex_attention

    mask = s2.METHOD.build(s2.Config(heads=4, kv_heads=2, stride=2, local=1, block=4))
    q, k, v = (torch.randn(1, 4, 40, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask.dense(40))
    with pytest.warns(UserWarning, match="torch.compile"):
        out = flex_attention(q, k, v, block_mask=mask.block_mask(40, block=16))
    torch.testing.assert_close(out, want)


# -- roles


def test_roles_grow_gather_and_reorder():
    roles = Roles(padding=[[1, 0, 0], [0, 0, 1]], image=[0, 1, 0])
    grown = roles.grow(2, image=[2, 2])
    assert grown["padding"].tolist() == [[1, 0, 0, 0, 0], [0, 0, 1, 0, 0]]
    assert grown["image"].tolist() == [0, 1, 0, 2, 2]
    assert grown.gather([[4, 0], [2, -1]])["padding"].tolist() == [[0, 1], [1, -1]]
    assert grown.gather([[4, 0], [2, -1]])["image"].tolist() == [[2, 0], [0, -1]]
    assert roles.reorder([1, 1, 0])["padding"][:, 0].tolist() == [0, 0, 1]
    assert roles.grow(image=torch.tensor([[5], [6]]))["image"].tolist() == [[0, 1, 0, 5], [0, 1, 0, 6]]
    with pytest.raises(KeyError, match="'padd' is missing; near names: padding"):
        roles["padd"]
    with pytest.raises(KeyError, match="'frame' is missing"):
        roles.grow(frame=1)
    with pytest.raises(AttributeError, match="immutable"):
        roles.image = 1
    with pytest.raises(ValueError, match="same tokens"):
        Roles(a=[0], b=[0, 1])


def test_masks_of_a_grown_and_of_a_gathered_text_agree():
    roles = Roles(document=[[0, 0, 1, 1], [0, 1, 1, 2]]).grow(2)
    whole = same_document().dense(6, roles=roles)
    kept = torch.tensor([[0, 2, 5], [1, 3, 5]])
    pruned = same_document().dense(3, roles=roles.gather(kept))
    for row in range(2):
        assert torch.equal(pruned[row, 0], whole[row, 0][kept[row]][:, kept[row]])


# -- concentric positions


def test_concentric_positions_of_several_images_padding_and_odd_sides():
    cfg = cca.Config(3, 5)  # two rings
    one = cca.image_roles(3, 5, before=2, after=1)
    two = Roles(**{name: torch.cat([one[name], one[name]]) for name in one})
    two = two.with_(image=torch.cat([one["image"], one["image"] * 2]))
    positions = cca.positions(two, cfg)
    assert positions[:2].tolist() == [0, 1]
    assert positions[2:17].view(3, 5).tolist() == [[2] * 5, [2, 3, 3, 3, 2], [2] * 5]
    assert positions[17:20].tolist() == [4, 5, 6]
    assert positions[20:35].unique().tolist() == [7, 8]
    assert positions[-1] == 9 and cca.next_position(36, cfg, images=2) == 10
    left = Roles(**{name: torch.cat([torch.tensor([-1, -1]), x]) for name, x in one.labels.items()})
    left = left.with_(image=left["image"].clamp(min=0), padding=[1, 1] + [0] * one.length)
    assert cca.positions(left, cfg)[2:].tolist() == cca.positions(one, cfg).tolist()


def test_concentric_positions_of_a_grown_text_are_the_decode_rule():
    roles, cfg = cca.image_roles(4, 6, before=3, after=2), cca.Config(4, 6)
    for step in range(3):
        grown = roles.grow(step + 1)
        assert cca.positions(grown, cfg)[-1] == cca.next_position(roles.length + step, cfg)


def test_concentric_neutral_positions_are_the_order_of_the_text():
    roles = cca.image_roles(1, 1, before=2, after=3)
    assert cca.positions(roles, cca.Config(**cca.METHOD.card.neutral)).tolist() == list(range(6))


def test_a_mask_with_roles_and_heads_compiles_without_a_break():
    mask = s2.METHOD.build(s2.Config(heads=4, kv_heads=2, stride=2, local=1, block=4)) & same_document()
    index = torch.arange(9)
    compiled = torch.compile(lambda q, k: mask.at(q, k, roles=ROLES), backend="eager", fullgraph=True)
    assert torch.equal(compiled(index, index), mask.at(index, index, roles=ROLES))


def test_a_head_of_s2_attention_reads_the_blocks_before_its_own_shard():
    """Blocks J with (J + h + offset) divisible by the stride, and its own: a stride of three tells + from -."""
    mask = s2.build(s2.Config(heads=3, kv_heads=3, stride=3, local=1, block=1))
    seen = mask.dense(7)[0, :, 6]
    assert [row.nonzero()[:, 0].tolist() for row in seen] == [[0, 3, 6], [2, 5, 6], [1, 4, 6]]
    moved = s2.build(s2.Config(heads=3, kv_heads=3, stride=3, local=1, block=1, offset=1)).dense(7)[0, 0, 6]
    assert moved.nonzero()[:, 0].tolist() == [2, 5, 6]


def test_a_list_of_tiles_is_made_whatever_is_read_unless_a_share_is_named():
    whole = causal() | ~causal()
    assert whole.tiled(8, 8, 4, 4) is not None
    assert whole.tiled(8, 8, 4, 4, most=0.5) is None


@pytest.mark.parametrize("mask", [~causal(), ~(causal() & window(3)), ~causal() | window(2)], ids=repr)
def test_tiles_of_what_is_not_seen(mask):
    n, block = 12, 3
    tiles = mask.dense(n)[0, 0].unflatten(0, (-1, block)).unflatten(2, (-1, block)).transpose(1, 2).flatten(2)
    wanted = tiles.any(-1).int() + tiles.all(-1).int()
    assert {*wanted.flatten().tolist()} >= {1, 2}
    assert torch.equal(mask.blocks(n, block=block).kind[0, 0].int(), wanted)
