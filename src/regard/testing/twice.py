"""Mathematics that a page gives twice: `measure` against `reference`, on the page's own cases."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor


def check_twice(name: str, page: Any) -> str:
    """measure = reference on three cases or more of the page's own, to 1e-9 where both are in float64."""
    for part in ("measure", "reference", "cases"):
        assert callable(getattr(page, part)), f"{name}: a {page.kind} page gives {part}"
    given = [case for seed in range(2) for case in page.cases(seed)]
    assert len(given) >= 3, f"{name}: three cases or more, not {len(given)}"
    worst, seen = 0.0, []
    for i, case in enumerate(given):
        found, wanted = (leaves(part(*case)) for part in (page.measure, page.reference))
        assert len(found) == len(wanted), (
            f"{name}, case {i}: {len(found)} results, the reference {len(wanted)}"
        )
        for x, y in zip(found, wanted, strict=True):
            assert x.shape == y.shape, f"{name}, case {i}: {tuple(x.shape)}, the reference {tuple(y.shape)}"
            allowed = 1e-9 if x.dtype == torch.float64 else 1e-5
            gap = (x.double() - y.double()).abs().max().item() if x.numel() else 0.0
            size = max(1.0, y.double().abs().max().item() if y.numel() else 0.0)
            assert gap <= allowed * size, f"{name}, case {i}: measure is {gap:.1e} off its reference"
            worst = max(worst, gap)
            seen.append(y.double().flatten())
    assert torch.cat(seen).unique().numel() > 1, (
        f"{name}: all cases give one number, so they tell nothing apart"
    )
    return f"{len(given)} cases, at most {worst:.1e} apart"


def leaves(result: Any) -> list[Tensor]:
    """The numbers of a result, tensor by tensor: tensors, numbers, and what holds them."""
    if isinstance(result, Tensor):
        return [result.detach()]
    if isinstance(result, bool | int | float):
        return [torch.tensor(result, dtype=torch.float64)]
    if isinstance(result, Mapping):
        return [leaf for key in sorted(result) for leaf in leaves(result[key])]
    if is_dataclass(result):
        return leaves({f.name: getattr(result, f.name) for f in fields(result)})
    return [leaf for part in result for leaf in leaves(part)]
