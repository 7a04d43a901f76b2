"""Checks that every block page must pass; yours too: `check_block(METHOD)`.

A block is a whole layer, x -> (out, state), causal, or for the pattern self, where all tokens may see all. It is asked
the laws of mechanisms (testing/laws) as one whose queries, keys and values are all the layer's input, and two laws of
its own. A law that a block cannot be asked (no fast path, no state) is "not applicable", with the reason; one that it
breaks raises AssertionError with the block, the settings, the law and a small counterexample.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from regard import catalog
from regard.core import Unsupported
from regard.core.roles import Roles
from regard.kinds.block import BlockPage, make_call
from regard.testing import laws
from regard.testing.case import GARBAGE, B, Case, H, Inputs, NotApplicable, same
from regard.testing.mechanism import law_of, verdict

WIDTH = 8
DEPTHS = ((0, 1), (0, 3), (2, 3))  # (layer, layers)


@dataclass(frozen=True)
class BlockCase(Case):
    """A block page and one of its configurations. Inputs hold x as q, k and v, [B, 1, N, C]."""

    pattern: str = "causal_self"

    def inputs(self, n: int, m: int | None = None, *, seed: int = 0, batch: int = B, **_: int) -> Inputs:
        n = self.count(n)
        g = torch.Generator().manual_seed(1000 * seed + n)
        x = torch.randn(batch, 1, n, WIDTH, generator=g, dtype=torch.float64)
        return Inputs(x, x, x, self.at(n).params(H, H, WIDTH), roles=self.labels(n))

    def dims(self, inputs: Inputs) -> dict[str, int]:
        return {"width": WIDTH, "heads": H}

    def labels(self, m: int) -> Roles | None:
        """The grid of a block for images; others read no roles."""
        return None if self.page.grid is None else Roles.grid(*self.sides(m))

    def params(self, heads: int, groups: int, width: int, key: int = 0) -> dict[str, Tensor]:
        return self.off_special_values({"width": width, "heads": heads})

    def run(
        self, path: Callable, inputs: Inputs, mask: Any = None, state: Any = None, **settings: Any
    ) -> tuple:
        """(out [B, 1, N, C], zero where a token is padding, state)."""
        cfg = self.at(inputs.q.shape[2], **settings).cfg
        if mask is not None and max(mask.shape[1:3]) > 1:
            raise Unsupported("a block is told which tokens are padding, no more")
        key_mask = None if mask is None else mask[:, :, 0]
        x, page = inputs.q[:, 0], self.page
        call = make_call(
            page, cfg, x, inputs.params, key_mask=key_mask, initial_state=state, roles=inputs.roles
        )
        out, end, *_ = path(x, cfg, call)
        out = out[:, None]
        return (out if key_mask is None else out.masked_fill(~key_mask[..., None], 0)), end


def check_shape(case: BlockCase) -> None:
    """Out has the shape of x, and the residual: with all weights at zero the block changes nothing."""
    inputs = case.inputs(5)
    silent = replace(inputs, params={n: torch.zeros_like(p) for n, p in inputs.params.items()})
    for label, path in case.paths.items():
        same(f"{label}: weights of zero leave x as it is", case.run(path, silent)[0], inputs.q)


def check_holes(case: BlockCase) -> None:
    """A hidden token in the middle of a text is as if it were not there."""
    inputs, token_mask = case.inputs(9), torch.ones(B, 1, 1, 9, dtype=torch.bool)
    token_mask[..., 3:5] = False
    kept = [0, 1, 2, 5, 6, 7, 8]
    if case.page.grid is not None:
        raise NotApplicable("a grid has no holes")
    case.able(inputs, token_mask)
    filled = replace(inputs, q=inputs.q.masked_fill(~token_mask.mT, GARBAGE))
    for label, path in case.paths.items():
        out = case.run(path, filled, token_mask)[0][:, :, kept]
        same(
            f"{label}: tokens 3 and 4 hidden = left out",
            out,
            case.run(path, replace(inputs, q=inputs.q[:, :, kept]))[0],
        )


CHECKS = (
    check_shape, laws.check_fast_equals_reference, laws.check_gradients, laws.check_causality, laws.check_segments,
    laws.check_decode, laws.check_padding_right, laws.check_padding_left, laws.check_padding_nan, check_holes,
    laws.check_padded_state, laws.check_state_rows, laws.check_batch, laws.check_blind_rows, laws.check_extremes,
    laws.check_precision, laws.check_autocast, laws.check_speed_settings, laws.check_compiles, laws.check_state_size,
    laws.check_pure,
)  # fmt: skip


def check_block_page(name: str) -> dict[str, str]:
    """The laws of its kind on a page of the catalogue."""
    return check_block(catalog.get(name))


def check_block(page: BlockPage, *, settings: Iterable[Mapping[str, Any]] = ()) -> dict[str, str]:
    """Every law on the page's default settings, its test settings, and those given, as the first and the last layer.

    Returns "held" or "not applicable: reason" for each law. Raises AssertionError with the block, the settings, the law
    and a small counterexample.
    """
    report = examine_block(page, settings=settings)
    broken = [f"{law}: {verdict}" for law, verdict in report.items() if verdict.startswith("broken")]
    if broken:
        raise AssertionError(f"{page.card.title}\n  " + "\n  ".join(broken))
    return report


def examine_block(page: BlockPage, *, settings: Iterable[Mapping[str, Any]] = ()) -> dict[str, str]:
    """As check_block, but a law that is broken is a row of the report: "broken: (settings) counterexample"."""
    report: dict[str, str] = {}
    options = [
        {**depth, **chosen} for chosen in ({}, *page.test_settings, *settings) for depth in depths(page)
    ]
    for cfg in dict.fromkeys(page.configure(**chosen) for chosen in options):
        for check in (*CHECKS, *(laws.GRID_CHECKS if page.grid else ())):
            law = law_of(check)
            once = check is laws.check_compiles and cfg != page.config()
            if once or report.get(law, "").startswith("broken"):
                continue
            result = verdict(check, BlockCase(page, cfg, page.pattern))
            if report.get(law) != "held" or result.startswith("broken"):
                report[law] = result
    return report


def depths(page: BlockPage) -> list[dict[str, int]]:
    """Where in a model it is asked, for pages that differ by depth."""
    differs = {"layer", "layers"} <= {f.name for f in fields(page.config)}
    return [{"layer": layer, "layers": layers} for layer, layers in DEPTHS] if differs else [{}]
