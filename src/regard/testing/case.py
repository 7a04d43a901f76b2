"""What a law asks of a mechanism: small random inputs, a page with its settings and pattern, and how to compare."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from regard.core import Method, Unsupported
from regard.core.roles import Roles
from regard.core.trees import tree_leaves, tree_map
from regard.kinds.mechanism import Mechanism, make_call, stores_keys
from regard.ops.blocks import WHOLE
from regard.testing.counted import for_tokens, next_number
from regard.testing.grids import NotApplicable, grid_for

B, H, D, E, C = 2, 2, 4, 6, 5  # E becomes D, where a page takes values of the keys' width only
GARBAGE, EXACT = 1e3, 1e-9
WIDTHS: dict[tuple, tuple[int, Any]] = {}  # of values, by page, settings and pattern: see value_width
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Broken(AssertionError):
    """A law that does not hold: the message says how, `numbers` say it as data (token, moved, at, found, wanted)."""

    def __init__(self, message: str, **numbers: Any) -> None:
        super().__init__(message)
        self.numbers = numbers


def hold(condition: Any, message: str, **numbers: Any) -> None:
    if not condition:
        raise Broken(message, **numbers)


@dataclass(frozen=True)
class Inputs:
    """What a call takes beside its configuration, by name, so that a check can change one thing."""

    q: Tensor
    k: Tensor
    v: Tensor
    params: dict[str, Tensor]
    x: Tensor | None = None
    roles: Roles | None = None
    y: Tensor | None = None  # in cross, the input at the keys

    def tensors(self) -> dict[str, Tensor]:
        named = {"q": self.q, "k": self.k, "v": self.v, "x": self.x, "y": self.y} | self.params
        return {name: t for name, t in named.items() if t is not None}

    def map(self, change: Callable[[Tensor], Tensor]) -> "Inputs":
        """Every tensor changed, params too."""
        x, y = (None if t is None else change(t) for t in (self.x, self.y))
        params = {n: change(p) for n, p in self.params.items()}
        return Inputs(change(self.q), change(self.k), change(self.v), params, x, self.roles, y)

    def to(self, dtype: torch.dtype) -> "Inputs":
        return self.map(lambda t: t.to(dtype) if t.is_floating_point() else t)

    def rows(self, rows: slice | list[int]) -> "Inputs":
        x, y = (None if t is None else t[rows] for t in (self.x, self.y))
        return replace(self, q=self.q[rows], k=self.k[rows], v=self.v[rows], x=x, y=y)

    def span(self, cut: slice) -> "Inputs":
        """These tokens of a text that asks itself; roles stay those of all tokens up to the last of them."""
        x = None if self.x is None else self.x[:, cut]
        roles = (
            None
            if self.roles is None
            else self.roles.gather(range(*slice(cut.stop).indices(self.k.shape[2])))
        )
        return Inputs(self.q[:, :, cut], self.k[:, :, cut], self.v[:, :, cut], self.params, x, roles)


@dataclass(frozen=True)
class Case:
    """A page, one of its configurations, and one of its patterns; how near its numbers come, and in what dtypes."""

    page: Mechanism
    cfg: Any
    pattern: str
    tol: float = EXACT
    dtypes: tuple[torch.dtype, ...] = DTYPES

    @property
    def paths(self) -> dict[str, Callable]:
        both = {"reference": self.page.reference, "fast": self.page.fast}
        return {name: path for name, path in both.items() if path is not None}

    @property
    def keeps_rows_apart(self) -> bool:
        """Whether many questions may be the rows of one batch; that rows are apart is a law of its own."""
        return not getattr(self.page, "mixes_rows", False)

    def choosing(self) -> None:
        """NotApplicable where the last queries of a call choose for all before them."""
        if self.together >= WHOLE:
            raise NotApplicable("the last queries of a call choose for all of it: parts choose otherwise")

    @property
    def together(self) -> int:
        """How many queries choose their keys together, from multiples of it on."""
        together = getattr(self.page, "together", None)  # a block page has none
        return 1 if together is None else together(self.cfg)

    def inputs(
        self,
        n: int,
        m: int | None = None,
        *,
        seed: int = 0,
        batch: int = B,
        groups: int = H,
        width: int = 0,
        key: int = D,
    ) -> Inputs:
        """Random float64 inputs of n queries and m keys; m is n where a text asks itself.

        A page of grids is asked the smallest grid of n places or more that its settings go with; in cross the keys
        fill it, m or more.
        """
        n, m = self.counts(n, m)
        g = torch.Generator().manual_seed(1000 * seed + n)
        heads, width = max(H, groups), width or value_width(self)
        draw = [
            (batch, heads, n, key),
            (batch, groups, m, key),
            (batch, groups, m, width),
            (batch, n, C),
            (batch, m, C),
        ]
        q, k, v, x, y = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in draw)
        x = x if self.page.reads_x(self.cfg) else None
        y = y if x is not None and "cross" in self.pattern else None
        return Inputs(q, k, v, self.at(n).params(heads, groups, width, key), x, self.labels(m), y)

    def count(self, n: int) -> int:
        """How many tokens are asked where a law wants n: n, or the next number that the page can be asked."""
        return next_number(self, n) if self.page.grid is None else math.prod(self.sides(n))

    def counts(self, n: int, m: int | None) -> tuple[int, int]:
        """How many queries and keys are asked: see `inputs`."""
        if "cross" not in self.pattern:
            return self.count(n), self.count(n)
        on_grid = self.page.grid is not None
        n = n if on_grid else self.count(n)
        m = n if m is None else m
        return n, self.count(m) if on_grid else m

    def at(self, n: int, **settings: Any) -> Self:
        """The case with these settings, and with those for n tokens, where settings fix their number."""
        return for_tokens(self, n, settings)

    def params(self, heads: int, groups: int, width: int, key: int = D) -> dict[str, Tensor]:
        """What init gives for these sizes."""
        return self.off_special_values(sizes(heads, groups, width, key))

    def off_special_values(self, dims: dict[str, int]) -> dict[str, Tensor]:
        """What init gives, moved a little (zeros hide faults), in float64."""
        if self.page.init is None:
            return {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            params = self.page.init(self.cfg, dims)
            params = {
                n: p + 0.1 * torch.randn_like(p) if p.is_floating_point() else p for n, p in params.items()
            }
        return {n: p.detach().double() if p.is_floating_point() else p for n, p in params.items()}

    def dims(self, inputs: Inputs) -> dict[str, int]:
        """The sizes of these inputs, as init and state_size take them."""
        return sizes(inputs.q.shape[1], inputs.k.shape[1], inputs.v.shape[-1], inputs.k.shape[-1])

    def labels(self, m: int) -> Roles | None:
        """A grid as square as m allows, and documents of five tokens, for the pages that read them."""
        if self.page.grid is not None:
            return Roles.grid(*self.sides(m))
        side = max(1, math.isqrt(m))
        i = torch.arange(m)
        known = {"y": i // side, "x": i % side, "document": i // 5, "padding": i * 0}
        return Roles(**{n: known.get(n, i % 3) for n in self.page.roles}) if self.page.roles else None

    def sides(self, n: int) -> tuple[int, ...]:
        """Of the smallest grid of n places or more, the squarest of two axes, with which the settings go."""
        return grid_for(self.page.grid, self.cfg, n)

    def run(
        self, path: Callable, inputs: Inputs, mask: Any = None, state: Any = None, **settings: Any
    ) -> tuple:
        """(out, state)."""
        cfg = self.at(inputs.q.shape[2], **settings).cfg
        x = inputs.x if inputs.y is None else (inputs.x, inputs.y)
        call = make_call(
            Method(self.page.card.title, self.page, cfg), inputs.q, inputs.k, inputs.v, pattern=self.pattern, mask=mask,
            initial_state=state, params=inputs.params, x=x, roles=inputs.roles,
        )  # fmt: skip
        return path(inputs.q, inputs.k, inputs.v, cfg, call)[:2]

    def same(self, label: str, actual: Tensor, wanted: Tensor) -> None:
        same(label, actual, wanted, self.tol)

    def same_states(self, label: str, actual: Any, wanted: Any) -> None:
        same_states(label, actual, wanted, self.tol)

    def able(self, inputs: Inputs, mask: Any = None, state: Any = None, **settings: Any) -> None:
        """NotApplicable where the reference refuses to be asked this."""
        with refusals():
            self.run(self.page.reference, inputs, mask, state, **settings)

    def takes(self, inputs: Inputs, mask: Any) -> bool:
        """Whether the reference takes this mask."""
        try:
            self.able(inputs, mask)
        except NotApplicable:
            return False
        return True


@contextmanager
def refusals() -> Iterator[None]:
    try:
        yield
    except Unsupported as refusal:
        raise NotApplicable(str(refusal)) from refusal


def sizes(heads: int, groups: int, width: int, key: int = D) -> dict[str, int]:
    return {"heads": heads, "kv_heads": groups, "key": key, "value": width, "width": C}


def value_width(case: Case) -> int:
    """E, or D for a page whose values are as wide as its keys; every case of a page is asked once."""
    key = id(case.page), case.cfg, case.pattern
    if key not in WIDTHS:
        try:
            case.run(case.page.reference, case.inputs(2, width=E))
            width = E
        except (Unsupported, NotImplementedError):
            width = D
        WIDTHS[key] = width, case.page  # which is held, so that no other has its id
    return WIDTHS[key][0]


def stores(case: Case) -> bool:
    """Whether the state grows with the text, as stored keys do."""
    return stores_keys(case.page, case.cfg)


def same(label: str, actual: Tensor, wanted: Tensor, tol: float = EXACT) -> None:
    """Both equal up to tol (relative to the largest wanted number, or absolute below 1), or the first place."""
    shapes = {"found": list(actual.shape), "wanted": list(wanted.shape)}
    hold(actual.shape == wanted.shape, f"{label}: shape {shapes['found']}, not {shapes['wanted']}", **shapes)
    bar = tol * max(1.0, wanted.abs().max().item() if wanted.numel() else 0.0)
    wrong = (~((actual - wanted).abs() <= bar)).nonzero()  # written so that NaN is wrong
    if len(wrong):
        at = wrong[0].tolist()
        one, other = actual[tuple(at)].item(), wanted[tuple(at)].item()
        message = f"{label}: {one:.6g}, not {other:.6g} at {at} (first of {len(wrong)} of {wanted.numel()})"
        raise Broken(message, at=at, found=one, wanted=other, wrong=len(wrong))


def same_states(label: str, actual: Any, wanted: Any, tol: float = EXACT) -> None:
    a, b = tree_leaves(actual), tree_leaves(wanted)
    hold(len(a) == len(b), f"{label}: a state of {len(a)} tensors, not {len(b)}")
    for i, (one, other) in enumerate(zip(a, b, strict=True)):
        if one.is_floating_point():
            same(f"{label}, state tensor {i}", one, other, tol)
        else:
            hold(torch.equal(one, other), f"{label}, state tensor {i}: {one}, not {other}")


def random_mask(n: int, m: int, heads: int, seed: int = 0) -> Tensor:
    """[B, heads, n, m], two thirds True, every query sees the first key, but the last query of head 0 sees nothing."""
    mask = torch.rand(B, heads, n, m, generator=torch.Generator().manual_seed(seed)) < 0.66
    mask[..., 0] = True
    mask[:, 0, -1] = False
    return mask


def moves(
    case: Case, path: Callable, inputs: Inputs, names: str, tokens: Iterable[int]
) -> list[dict[int, float]]:
    """For each token, which queries' output changes by how much when its vectors change; `names` of q, k, v, x, y."""
    asked = [inputs, *(nudged(inputs, names, token) for token in tokens)]
    base, *outs = outputs(case, path, asked)
    bar = case.tol / 10 * max(1.0, base.abs().max().item())
    far = [(out - base).abs().amax((0, 1, 3)).tolist() for out in outs]
    return [{i: by for i, by in enumerate(of) if not by <= bar} for of in far]


def moved(case: Case, path: Callable, inputs: Inputs, names: str, token: int) -> list[int]:
    """Queries whose output changes when one token's vectors change."""
    return list(moves(case, path, inputs, names, [token])[0])


def nudged(inputs: Inputs, names: str, token: int) -> Inputs:
    """The inputs with these vectors of one token changed."""
    changed = {}
    for name in names:
        t = getattr(inputs, name)
        if t is not None:
            t = t.clone()
            t.select(-2, token).add_(1.0 + torch.arange(t.shape[-1], dtype=t.dtype) % 3)
            changed[name] = t
    return replace(inputs, **changed)


def outputs(case: Case, path: Callable, asked: list[Inputs]) -> list[Tensor]:
    """The output of each of these inputs, which differ in their tokens alone: rows of one batch where that may be."""
    if not case.keeps_rows_apart:
        return [case.run(path, inputs)[0] for inputs in asked]
    fields = {name: [getattr(inputs, name) for inputs in asked] for name in "qkvxy"}
    stacked = {name: torch.cat(parts) for name, parts in fields.items() if parts[0] is not None}
    return list(case.run(path, replace(asked[0], **stacked))[0].chunk(len(asked)))


def gradients(
    case: Case, path: Callable, inputs: Inputs, mask: Any = None, state: Any = None, learn: bool = True,
    around: Callable = nullcontext,
) -> tuple:  # fmt: skip
    """(out, state, gradient of a sum over both, by the name of what it is a gradient of); params too if they learn.

    The path, not its derivative, runs inside the context that `around` gives.
    """
    inputs = replace(inputs.map(tracked), **({} if learn else {"params": inputs.params}))
    state = tree_map(tracked, state)
    with around():
        out, end = case.run(path, inputs, mask, state)
    total = out.cos().sum() + sum(leaf.sin().sum() for leaf in tree_leaves(end) if leaf.requires_grad)
    leaves = inputs.tensors() | {f"state tensor {i}": leaf for i, leaf in enumerate(tree_leaves(state))}
    leaves = {name: t for name, t in leaves.items() if t.requires_grad}
    computed: Iterable[Tensor | None] = [None] * len(leaves)
    if total.requires_grad:
        computed = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    none = {name: torch.zeros_like(t) for name, t in leaves.items()}
    grads = {name: none[name] if g is None else g for name, g in zip(leaves, computed, strict=True)}
    return out.detach(), tree_map(Tensor.detach, end), grads


def tracked(t: Tensor) -> Tensor:
    return t.detach().clone().requires_grad_(t.is_floating_point())


def first_bad(out: Tensor) -> int:
    """The first query of [B, H, N, E] with a number that is not finite."""
    return int((~out.isfinite()).nonzero()[0][2])
