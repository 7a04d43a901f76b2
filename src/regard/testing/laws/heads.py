"""Heads: query head h reads KV head h // (H / G), with the parameters of that head, and nothing of any other head."""

from dataclasses import replace

import torch
from torch import Tensor

from regard.ops.blocks import BlockSettings
from regard.testing.case import Case, E, H, Inputs, NotApplicable, hold, random_mask, sizes

FEW, BLOCKS = (7, 9), (41, 43)


def check_groups(case: Case) -> None:
    """Query heads that share a KV head give what they give with a copy of it, and of its parameters, each."""
    for groups in (1, H):
        # a page that chooses blocks is asked where it has some to choose from
        few = grouped(case, groups, *(BLOCKS if isinstance(case.cfg, BlockSettings) else FEW))
        case.able(few)
        copied = (t.repeat_interleave(2 * H // groups, dim=1) for t in (few.k, few.v))
        params = copies(case, few, groups)
        many = replace(few, params=params, **dict(zip("kv", copied, strict=True)))
        hidden = random_mask(1, few.k.shape[2], 2 * H)
        takes_mask = case.takes(few, hidden)
        for label, path in case.paths.items():
            law = f"{label}: {2 * H} heads on {groups} KV heads = a copy for each"
            case.same(law, case.run(path, few)[0], case.run(path, many)[0])
            if takes_mask:
                law = f"{law}, keys hidden by head"
                case.same(law, case.run(path, few, hidden)[0], case.run(path, many, hidden)[0])


def check_heads_alone(case: Case) -> None:
    """A head, with its part of the parameters and of a mask, gives what it gives without the other heads."""
    whole = case.inputs(7, 9)
    hidden = random_mask(1, whole.k.shape[2], H)
    masks = [None, hidden] if case.takes(whole, hidden) else [None]
    case.able(whole)
    for label, path in case.paths.items():
        for mask in masks:
            out = case.run(path, whole, mask)[0]
            for h in range(H):
                own = None if mask is None else mask[:, h : h + 1]
                law = f"{label}: head {h} of {H} = that head alone{'' if mask is None else ', keys hidden by head'}"
                case.same(law, out[:, h : h + 1], case.run(path, alone(case, whole, h), own)[0])


def grouped(case: Case, groups: int, n: int = 7, m: int = 9) -> Inputs:
    """Inputs of twice as many query heads as usual, on so many KV heads."""
    few = case.inputs(n, m, groups=groups)
    q = torch.cat([few.q, few.q.flip(1) + 1], dim=1)
    return replace(few, q=q, params=case.at(few.q.shape[2]).params(2 * H, groups, few.v.shape[-1]))


def alone(case: Case, whole: Inputs, h: int) -> Inputs:
    """Head h of queries, keys and values, and its part of the parameters."""
    one, params = case.at(whole.q.shape[2]).params(1, 1, whole.v.shape[-1]), {}
    for name, t in whole.params.items():
        for axis, (many, single) in enumerate(zip(t.shape, one[name].shape, strict=True)):
            if many != single:
                hold(many == H * single, f"params[{name!r}] grows with heads", all=many, alone=single)
                t = t.chunk(H, axis)[h]
        params[name] = t
    return replace(whole, q=whole.q[:, h, None], k=whole.k[:, h, None], v=whole.v[:, h, None], params=params)


def copies(case: Case, few: Inputs, groups: int) -> dict[str, Tensor]:
    """The parameters for as many KV heads as query heads: those of a KV head for each query head that shares it."""
    wide = case.at(few.q.shape[2]).params(2 * H, 2 * H, few.v.shape[-1])
    result = {}
    for name, t in few.params.items():
        for axis, (a, b) in enumerate(zip(t.shape, wide[name].shape, strict=True)):
            if a != b:
                hold(a * 2 * H == b * groups, f"params[{name!r}] grows with KV heads", few=a, many=b)
                share = 2 * H // groups
                t = t.unflatten(axis, (groups, -1)).repeat_interleave(share, axis).flatten(axis, axis + 1)
        result[name] = t
    return result


def check_drawn(case: Case) -> None:
    """What init draws at random it draws for every head: no two heads begin with the same numbers."""
    if not case.params(H, H, E):
        raise NotApplicable("it has no parameters")
    wide, first, again = (drawn(case, heads, seed) for heads, seed in ((2 * H, 0), (H, 0), (H, 1)))
    for name, t in first.items():
        axes = [axis for axis, size in enumerate(t.shape) if size != wide[name].shape[axis]]
        # what fewer heads have, such as those that are routed, is no part of each
        if axes and t.shape[axes[0]] % H == 0 and not torch.equal(t, again[name]):
            alike = torch.equal(*t.chunk(H, axes[0]))
            hold(not alike, f"init draws params[{name!r}] once, and gives all heads the same", of=name)


def drawn(case: Case, heads: int, seed: int) -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return case.page.init(case.cfg, sizes(heads, heads, E))
