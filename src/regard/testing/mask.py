"""Checks that every mask page must pass; yours too: `check_mask(METHOD)`.

A mask has one meaning and five lowerings. The checks hold each lowering to the predicate asked at single
places, and the page to what its settings promise: a window of exactly `window` keys, a neutral setting that
changes nothing.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask

from regard import catalog
from regard.core.mask import Coordinates, Mask, causal
from regard.core.roles import Roles
from regard.kinds.mask import MaskPage
from regard.kinds.position import PositionPage
from regard.ops.blocks import blocks_of
from regard.testing.labels import example_roles
from regard.testing.pages import same_after_pickling

LENGTHS = (1, 7, 40)
Settings = Mapping[str, Any]


def odd_settings(page: MaskPage | PositionPage) -> Iterator[Settings]:
    """Small settings that the Config accepts: 2, 3, 5, ... over its numbers, both ways, and all equal."""
    default = page.config()
    numbers = [f.name for f in fields(default) if type(getattr(default, f.name)) is int]
    primes = [2, 3, 5, 7, 11, 13, 17, 19][: len(numbers)]
    for values, zeros in itertools.product((primes, primes[::-1], [3] * len(numbers)), (0, 1)):
        settings = {
            name: value if getattr(default, name) else zeros
            for name, value in zip(numbers, values, strict=True)
        }
        try:
            page.config(**settings)
        except ValueError:
            continue
        yield settings


def check_mask(page: MaskPage | PositionPage, *, settings: Iterable[Settings] = ()) -> dict[str, int]:
    """Every check on the page's default, neutral and odd settings, and on those given.

    Returns how many of the queries see nothing, by mask: allowed, but to be known. Raises AssertionError with
    the law, the mask and the first counterexample.
    """
    odd = list(odd_settings(page))
    assert odd, (
        f"{page.card.title}: no small settings are accepted; give some: check_mask(page, settings=[...])"
    )
    configs = dict.fromkeys(page.config(**s) for s in ({}, page.card.neutral, *odd, *settings))
    blind = hold_laws(page, configs)
    check_neutral(page)
    return blind


def hold_laws(
    page: MaskPage | PositionPage, configs: Iterable[Any], lengths: Iterable[int] = LENGTHS
) -> dict[str, int]:
    """Every law but that of neutral settings on these ones; what check_mask returns."""
    blind = {}
    for cfg in configs:
        mask = page.build(cfg)
        assert isinstance(mask, Mask), f"{page.card.title}: build gives a Mask, not {type(mask).__name__}"
        assert page.build(cfg) == mask, f"{mask}: built twice it is the same mask"
        for n in lengths:
            roles = example_roles(mask.needs, n, cfg)
            for check in LAWS:
                check(mask, n, roles)
        blind[repr(mask)] = len(mask.blind(LENGTHS[-1], roles=example_roles(mask.needs, LENGTHS[-1], cfg)))
        for composed in (mask, mask & ~causal(), ~mask | causal()):
            same_after_pickling(repr(composed), composed)
        check_window_width(page, cfg)
        check_looks_ahead(page, cfg)
        check_kv_heads(page, cfg)
    return blind


def same(law: str, mask: Mask, actual: Tensor, wanted: Tensor) -> None:
    """Both [B, H, N, M], 1 where rows or heads do not differ."""
    actual, wanted = torch.broadcast_tensors(actual.bool(), wanted.bool())
    wrong = (actual != wanted).nonzero()
    if len(wrong):
        b, h, q, k = (int(x) for x in wrong[0])
        where, values = (
            f"query {q}, key {k}, row {b}, head {h}",
            (bool(actual[b, h, q, k]), bool(wanted[b, h, q, k])),
        )
        raise AssertionError(
            f"{law}: {mask!r} at {where}: {values[0]}, not {values[1]} (first of {len(wrong)})"
        )


def truth(mask: Mask, at: Coordinates) -> bool:
    """The mask at one place, its expression read with Python's own not, and, or."""
    if mask.name == "~":
        return not truth(mask.parts[0], at)
    if mask.parts:
        return (all if mask.name == "&" else any)(truth(part, at) for part in mask.parts)
    return bool(mask(at))


def check_definition(mask: Mask, n: int, roles: Roles | None) -> None:
    dense = mask.dense(n, roles=roles)
    b_, h_, _, _ = dense.shape
    g = torch.Generator().manual_seed(n)
    for _ in range(60):
        spot = [torch.randint(size, (), generator=g) for size in (b_, h_, n, n)]
        b, h, q, k = (int(x) for x in spot)
        wanted = truth(mask, Coordinates(*spot, sides=(roles, roles)))
        actual = bool(dense[b, h, q, k])
        where = f"query {q}, key {k}, row {b}, head {h}: {actual}, not {wanted}"
        assert actual == wanted, f"dense = the predicate: {mask!r} at {where}"


def check_at(mask: Mask, n: int, roles: Roles | None) -> None:
    dense = mask.dense(n, roles=roles)
    everyone = torch.arange(n)
    same("at = dense", mask, mask.at(everyone, everyone, roles=roles), dense)
    g = torch.Generator().manual_seed(n)
    rows, heads = max(2, dense.shape[0]), mask.heads or 4
    wide = dense.expand(rows, heads, n, n)
    for groups in divisors(heads):
        kept = torch.randint(-1, n, (rows, groups, n + 3), generator=g)  # repeats and empty slots among them
        queries = torch.randint(0, n, (rows, 5), generator=g)
        index = kept.repeat_interleave(heads // groups, dim=1)[:, :, None].expand(-1, -1, 5, -1)
        picked = wide.gather(2, queries[:, None, :, None].expand(-1, heads, -1, n)).gather(
            3, index.clamp(min=0)
        )
        asked = heads if 1 < groups < heads else None
        actual = mask.at(queries, kept, roles=roles, heads=asked)
        same("at evicted slots = dense, gathered", mask, actual, picked & (index >= 0))
        actual = (~mask).at(queries, kept, roles=roles, heads=asked)
        same("an empty slot is seen by nobody", mask, actual, ~picked & (index >= 0))


def divisors(heads: int) -> list[int]:
    """In how many KV heads so many query heads may lie: one, all, and those between."""
    return [groups for groups in range(1, heads + 1) if heads % groups == 0]


def check_flex(mask: Mask, n: int, roles: Roles | None) -> None:
    dense = mask.dense(n, roles=roles)
    b, h = dense.shape[:2]
    lowered = create_mask(mask.flex(roles=roles), b, h, n, n, device="cpu")
    same("flex = dense", mask, lowered, dense)
    last = create_mask(mask.flex(roles=roles, offset=n - 1), b, h, 1, n, device="cpu")
    same("flex with an offset = the last row of dense", mask, last, dense[:, :, -1:])
    heads = mask.heads or 4
    for groups in divisors(heads):
        kept = torch.stack([torch.arange(n).flip(0).roll(-g) for g in range(groups)])[None]
        kept = torch.where(kept % 3 == 1, -1, kept)
        stored = create_mask(mask.flex(roles=roles, k_index=kept, heads=heads), b, heads, n, n, device="cpu")
        wanted = mask.at(torch.arange(n), kept, roles=roles, heads=heads)
        same(f"flex over keys stored in {groups} KV heads = at", mask, stored, wanted)


def check_blocks(mask: Mask, n: int, roles: Roles | None) -> None:
    dense = mask.dense(n, roles=roles)
    for block in (3, 16):
        blocks = mask.blocks(n, block=block, roles=roles)
        wide = blocks.kind.repeat_interleave(block, 2).repeat_interleave(block, 3)[:, :, :n, :n]
        same("full and empty blocks = dense", mask, torch.where(wide == 1, dense, wide == 2), dense)
        for b, h, i, j in blocks.partial.tolist():
            tile = dense[b, h, i * block : (i + 1) * block, j * block : (j + 1) * block]
            assert tile.any() and not tile.all(), (
                f"a partial block is neither: {mask!r}, block {i, j}, head {h}"
            )
    compiled = mask.block_mask(n, roles=roles, block=16).to_dense()
    kind = mask.blocks(n, block=16, roles=roles).kind
    same("FlexAttention's blocks = the blocks that are not empty", mask, compiled, kind > 0)


def check_tiles(mask: Mask, n: int, roles: Roles | None) -> None:
    """The list of blocks, with the masks inside them, is the mask: for all queries, and for the last three alone."""
    dense = mask.dense(n, roles=roles)
    for block, rows in itertools.product((3, 16), {n, min(3, n)}):
        blocks = blocks_of(mask, rows, n, roles=roles, offset=n - rows, block=block, most=2.0)
        assert blocks is not None, f"{mask!r}: every share of the tiles may be read, and no list was made"
        actual = torch.zeros(*blocks.index.shape[:3], blocks.block_q, -(-n // block), block, dtype=torch.bool)
        for b, h, i, r in (blocks.index >= 0).nonzero().tolist():
            table = -1 if blocks.tile is None else int(blocks.tile[b, h, i, r])
            whole = torch.ones(blocks.block_q, block, dtype=torch.bool)
            tile = whole if table < 0 or blocks.tiles is None else blocks.tiles[table]
            actual[b, h, i, :, int(blocks.index[b, h, i, r])] = tile
        wide = actual.flatten(4).flatten(2, 3)[:, :, :rows, :n]
        same(f"blocks of {block}, {rows} queries = dense", mask, wide, dense[:, :, n - rows :])


def check_row(mask: Mask, n: int, roles: Roles | None) -> None:
    dense = mask.dense(n, roles=roles)
    for t in {0, n // 2, n - 1}:
        keys = mask.row(t, n, roles=roles)
        actual = torch.zeros(*dense.shape[:2], n + 1, dtype=torch.bool)
        actual.scatter_(2, torch.where(keys < 0, n, keys), True)
        same("row = the row of dense", mask, actual[:, :, None, :n], dense[:, :, t : t + 1])


def check_offset(mask: Mask, n: int, roles: Roles | None) -> None:
    dense = mask.dense(n, roles=roles)
    last = (n + 1) // 2
    same(
        "fewer queries than keys are the last ones",
        mask,
        mask.dense(last, n, roles=roles),
        dense[:, :, -last:],
    )
    if not mask.needs:
        more = mask.dense(n + 3, n)
        same("more queries than keys: the last query is that of the last key", mask, more[:, :, 3:], dense)
    one = mask.dense(1, n, offset=n // 2, roles=roles)
    same("offset is the true index of query 0", mask, one, dense[:, :, n // 2 : n // 2 + 1])


def check_algebra(mask: Mask, n: int, roles: Roles | None) -> None:
    dense, other = mask.dense(n, roles=roles), causal().dense(n)
    for law, actual, wanted in (
        ("~a", ~mask, ~dense),
        ("~~a = a", ~~mask, dense),
        ("a & b", mask & causal(), dense & other),
        ("a | b", mask | causal(), dense | other),
        ("~(a & b) = ~a | ~b", ~(mask & causal()), (~mask | ~causal()).dense(n, roles=roles)),
        ("~(a | b) = ~a & ~b", ~(mask | causal()), (~mask & ~causal()).dense(n, roles=roles)),
        ("a & ~a = nothing", mask & ~mask, torch.zeros_like(dense)),
    ):
        same(law, actual, actual.dense(n, roles=roles), wanted)


LAWS = (
    check_definition,
    check_at,
    check_flex,
    check_blocks,
    check_tiles,
    check_row,
    check_offset,
    check_algebra,
)


def check_window_width(page: MaskPage | PositionPage, cfg: Any) -> None:
    """`window=w` shows w keys, the token itself included: all of them, and one more than w - 1 shows."""
    if not hasattr(cfg, "window"):
        return
    n, t, ahead = 40, 25, getattr(cfg, "ahead", 0)
    for w in (2, 3, 8):
        if not ahead < w - 1:
            continue
        narrow, wide = (page.build(replace(cfg, window=x)) for x in (w - 1, w))
        roles = example_roles(wide.needs, n, cfg)
        less, more = (mask.dense(n, roles=roles)[:, :, t : t + 1] for mask in (narrow, wide))
        shown = torch.arange(n)[None, None, None]
        shown = (t + ahead - w < shown) & (shown <= t + ahead)
        same(f"window={w} shows the token and {w - 1} more", wide, more & shown, shown)
        oldest = torch.arange(n)[None, None, None] == t + ahead - w + 1
        same(f"window={w} shows one key more than {w - 1}", wide, (more & ~less) | oldest, oldest)


def check_looks_ahead(page: MaskPage | PositionPage, cfg: Any) -> None:
    """A page that is only for causal_self lets tokens see later ones just where it says that it does."""
    if page.patterns != ("causal_self",):
        return
    mask, n = page.build(cfg), LENGTHS[-1]
    seen = mask.dense(n, roles=example_roles(mask.needs, n, cfg))
    ahead = bool((seen & ~causal().dense(n)).any())
    says = page.looks_ahead(cfg) if callable(page.looks_ahead) else page.looks_ahead
    assert says or not ahead, f"{page.card.title}: {mask!r} shows later tokens, and looks_ahead is not set"


def check_kv_heads(page: MaskPage | PositionPage, cfg: Any) -> None:
    """Query heads that share a KV head read the same keys: those of a layer with its KV heads alone, each repeated."""
    names = {f.name for f in fields(cfg)}
    if not {"heads", "kv_heads"} <= names:
        return
    mask, n, share = page.build(cfg), LENGTHS[-1], cfg.heads // cfg.kv_heads
    roles = example_roles(mask.needs, n, cfg)
    alone = page.build(replace(cfg, heads=cfg.kv_heads)).dense(n, roles=roles)
    law = f"{cfg.heads} heads on {cfg.kv_heads} KV heads = the heads of the KV heads, repeated"
    same(law, mask, mask.dense(n, roles=roles), alone.repeat_interleave(share, 1))


def check_neutral(page: MaskPage | PositionPage) -> None:
    """The neutral settings give the causal mask, or everything where the page is not for causal_self."""
    if not page.card.neutral:
        assert not fields(page.config), f"{page.card.title}: a page with settings states its neutral ones"
        return
    cfg = page.configure(**page.card.neutral)
    mask = page.build(cfg)
    for n in LENGTHS:
        roles = example_roles(mask.needs, n, cfg)
        plain = (
            causal().dense(n) if "causal_self" in page.patterns else torch.ones(1, 1, n, n, dtype=torch.bool)
        )
        same("neutral = identity", mask, mask.dense(n, roles=roles), plain)


def check_mask_page(name: str) -> dict[str, int]:
    """The laws of its kind on a page of the catalogue."""
    page = catalog.get(name)
    return check_mask(page, settings=page.test_settings)
