"""Grids: what is cut out of an image, what changes places in it."""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from regard.core.errors import present
from regard.core.roles import Roles
from regard.testing.case import Case, Inputs
from regard.testing.grids import NotApplicable, grid_for


def check_crop(case: Case) -> None:
    """Away from the borders the output of a crop is the crop of the output, as far as the page says it reads."""
    on = present(case.page.grid, "a page of grids")
    near = on.local(case.cfg)
    if near is None:
        raise NotApplicable("outputs depend on places far away")
    reach, step = near
    axes = 2 if 2 in on.axes else on.axes[0]
    small = grid_for(on, case.cfg, (2 * reach + step + 1) ** axes)
    side = -(-max(small) // step) * step
    whole = on_grid(case, (side + 2 * step,) * axes)
    cut, inside = slice(step, step + side), slice(reach, side - reach)
    part = cropped(whole, cut)
    for label, path in case.paths.items():
        out = crop(crop(case.run(path, whole)[0], sides_in(whole), cut), sides_in(part), inside)
        own = crop(case.run(path, part)[0], sides_in(part), inside)
        case.same(f"{label}: inside a crop of {side} of {sides_in(whole)}", own, out)


def check_permutation(case: Case, n: int = 12) -> None:
    """Tokens that change places change the places of the outputs, and nothing else; in cross, keys change nothing."""
    if not present(case.page.grid, "a page of grids").permutes(case.cfg):
        raise NotApplicable("it knows the places of tokens")
    inputs = case.inputs(n)
    draw = torch.Generator().manual_seed(0)
    order = at_keys = torch.randperm(inputs.q.shape[2], generator=draw)
    if "cross" in case.pattern:
        at_keys = torch.randperm(inputs.k.shape[2], generator=draw)
    x, y = (None if t is None else t[:, at] for t, at in ((inputs.x, order), (inputs.y, at_keys)))
    k, v = inputs.k[:, :, at_keys], inputs.v[:, :, at_keys]
    other = replace(inputs, q=inputs.q[:, :, order], k=k, v=v, x=x, y=y)
    for label, path in case.paths.items():
        out = case.run(path, inputs)[0]
        case.same(f"{label}: tokens in another order", case.run(path, other)[0], out[:, :, order])


def on_grid(case: Case, sides: tuple[int, ...], n: int | None = None) -> Inputs:
    """Inputs on this very grid; in cross n queries, or as many as it has places."""
    exact, places = replace(case, page=replace_grid(case.page, sides)), math.prod(sides)
    n = places if n is None or "cross" not in case.pattern else n
    return replace(exact.inputs(n, places), roles=Roles.grid(*sides))


def replace_grid(page: Any, sides: tuple[int, ...]) -> Any:
    """The page, for grids of these sides alone."""
    fits = page.grid.fits

    def only(cfg: Any, asked: tuple[int, ...]) -> None:
        if asked != sides:
            raise ValueError(asked)
        fits(cfg, asked)

    return replace(page, grid=replace(page.grid, fits=only))


def sides_in(inputs: Inputs) -> tuple[int, ...]:
    return present(present(inputs.roles, "roles of a grid").sides, "a grid")


def crop(t: Tensor, sides: tuple[int, ...], cut: slice) -> Tensor:
    """[..., n, E] of tokens [..., N, E] of a grid: this part of every axis."""
    t = t.unflatten(-2, sides)
    for axis in range(len(sides)):
        t = t[(slice(None),) * (t.dim() - 1 - len(sides) + axis) + (cut,)]
    return t.flatten(-1 - len(sides), -2)


def cropped(inputs: Inputs, cut: slice) -> Inputs:
    sides = sides_in(inputs)
    x = None if inputs.x is None else crop(inputs.x, sides, cut)
    q, k, v = (crop(t, sides, cut) for t in (inputs.q, inputs.k, inputs.v))
    return replace(inputs, q=q, k=k, v=v, x=x, roles=Roles.grid(*(cut.stop - cut.start,) * len(sides)))
