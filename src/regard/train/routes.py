"""Routers that decide layer by layer, learned while the model stays as it is.

Every attention module computes both ways and mixes them by z, 1 for full:

    g      = Gumbel's noise for each of a router's two logits
    soft   = softmax((logits + g) / tau)_1,   z = 1 where it is the larger, with the gradient of soft
    out    = z · full + (1 - z) · sparse
    s      = 1 - mean of z over the layers, of each text;  s* the share of sparse layers that is asked of its kind
    loss   = that of the texts + mean of l_1 |s - s*| + l_2 (s - s*)²,   l_1 and l_2 of each kind rise with the price

tau falls from 1.5 to 1 over the first 60 % of the steps. A router reads the prompt of a text, not what follows it.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from regard.attaching.actors import AttentionCall
from regard.attaching.attachment import attach
from regard.attaching.function import native
from regard.attaching.replacement import has_own_mask
from regard.attaching.unrotated import unrotated
from regard.core import Method, require
from regard.core.errors import present
from regard.kinds.mechanism import run
from regard.train.checkpoints import Checkpoints
from regard.train.loop import cosine_to, only_parameters
from regard.train.teachers import Teacher

WARM, COLD, COOLS = 1.5, 1.0, 0.6  # tau at first, at last, and the share of the steps in which it falls
SPARSE = 0.45  # share of sparse layers, where nothing else is asked
PRICE = 10.0  # how much faster the multipliers learn than the routers

Draw = Callable[[int], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Routes:
    """What routers are asked of each row of ids: [rows] tokens of its prompt, and its share of sparse layers."""

    prompts: Tensor
    sparse: Tensor

    def __post_init__(self) -> None:
        alike = self.prompts.dim() == 1 and self.prompts.shape == self.sparse.shape
        require(alike, "prompts and sparse are [rows]", prompts=self.prompts, sparse=self.sparse)
        require(bool((self.prompts >= 1).all()), "a prompt has tokens", prompts=self.prompts)
        inside = bool(((self.sparse >= 0) & (self.sparse <= 1)).all())
        require(inside, "0 <= sparse <= 1, a share of the layers", sparse=self.sparse)

    def of(self, rows: Tensor) -> "Routes":
        return Routes(self.prompts[rows], self.sparse[rows])


class Mixing(Teacher):
    """Both ways in every layer, mixed by what its router draws."""

    def __init__(self, method: Method, seed: int) -> None:
        super().__init__(method, "routes", seed)
        self.needs_rotary = method.page.needs_unrotated
        self.noise = torch.Generator().manual_seed(seed)
        self.prompts: Tensor | None = None
        self.tau = WARM
        self.drawn: list[Tensor] = []  # [B] z of each layer of a forward

    def check_call(self, call: AttentionCall) -> None:
        if not has_own_mask(call):
            super().check_call(call)

    def compute(self, call: AttentionCall) -> Tensor:
        full = native(call)[0].transpose(1, 2)
        if has_own_mask(call):
            return full
        if call.name not in self.params:
            self.params[call.name] = self.start(call)
        if self.prompts is None:
            return full
        z = self.z_of(call)
        self.drawn.append(z)
        z = z.to(full.dtype)[:, None, None, None]
        return z * full + (1 - z) * self.sparse(call)

    def z_of(self, call: AttentionCall) -> Tensor:
        """[B] 0 or 1, with the gradient of the soft decision."""
        q, _ = unrotated(self.name, call, call.k)
        prompts = present(self.prompts, "a forward knows its prompts").to(q.device)
        real = torch.arange(q.shape[2], device=q.device) < prompts[:, None]
        logits = self.method.page.router(q.float(), real, self.method.config, self.params[call.name])
        noise = torch.rand(logits.shape, generator=self.noise).clamp(min=1e-8)
        soft = ((logits - (-noise.log()).log().to(q.device)) / self.tau).softmax(-1)[:, 1]
        return (soft > 0.5).to(soft.dtype) + soft - soft.detach()

    def sparse(self, call: AttentionCall) -> Tensor:
        """[B, H, N, E] as a text that was decided to be sparse goes on, from its first token."""
        nothing = tuple(x[:, :, :0] for x in (call.k, call.v))
        decided = torch.zeros(len(call.q), dtype=torch.bool, device=call.q.device)
        params = {n: p.detach() for n, p in self.params[call.name].items()}
        options = dict(params=params, initial_state=(*nothing, decided), mask=call.token_mask(True))
        return run(self.method, call.scaled(), call.k, call.v, **options)[0]


def learn_routes(
    model: nn.Module, method: Method, draw: Draw, asked: Callable[[int], Routes], loss_of: Callable[..., Tensor],
    steps: int, rate: float, seed: int, progress: Callable[[str, int, int, float], Any], kept: Checkpoints,
) -> tuple[dict[str, dict[str, Tensor]], list[float], dict[str, Any], float]:  # fmt: skip
    """(params by attention module, loss by step, what the routers came to, seconds); the model is in eval mode.

    loss_of(logits, ids, weights) is the loss of a batch of texts
    """
    mixing = Mixing(method, seed)
    with torch.no_grad(), attach(model, mixing):
        model(draw(0)[0][:1], use_cache=False)  # every module makes its parameters
    require(mixing.params, "attention modules that were reached, without a mask of their own", modules=0)
    learned = [p for parts in mixing.params.values() for p in parts.values()]
    kinds: dict[float, Tensor] = {}
    start = torch.Generator().manual_seed(seed)
    price = lambda: (0.5 * torch.rand(2, generator=start)).requires_grad_()  # noqa: E731
    for share in sorted({round(float(s), 6) for step in range(steps) for s in asked(step).sparse}):
        kinds[share] = price()
    before = kept.facts("transfer")
    shares: list[tuple[float, float]] = [(kind, share) for kind, share in before.get("shares", ())]
    if "noise" in before:
        mixing.noise.set_state(torch.tensor(before["noise"], dtype=torch.uint8))

    def loss_at(step: int) -> Tensor:
        (ids, weights), routes = draw(step), asked(step)
        cooled = min(1.0, step / max(1.0, COOLS * steps))
        mixing.tau = COLD + 0.5 * (WARM - COLD) * (1 + math.cos(math.pi * cooled))
        mixing.prompts, mixing.drawn = routes.prompts, []
        with torch.enable_grad(), attach(model, mixing):
            logits = model(ids, use_cache=False).logits
            sparse = 1 - torch.stack(mixing.drawn).mean(0)
            apart = sparse - routes.sparse.to(sparse)
            prices = torch.stack([kinds[round(float(s), 6)] for s in routes.sparse]).to(sparse)
            paid = prices[:, 0] * apart.abs() + prices[:, 1] * apart.square()
            shares.extend(zip(routes.sparse.tolist(), sparse.tolist()))
            return loss_of(logits, ids, weights) + paid.mean()

    groups = [
        {"params": learned, "lr": rate},
        {"params": list(kinds.values()), "lr": PRICE * rate, "maximize": True},
    ]
    trained = {f"{name}/{n}": p for name, parts in mixing.params.items() for n, p in parts.items()}
    trained |= {f"price/{share}": both for share, both in kinds.items()}
    curve, seconds = kept.fit(
        "transfer", trained, torch.optim.AdamW(groups, rate, weight_decay=0.0), loss_at, steps,
        lambda step, loss: progress("transfer", step + 1, steps, loss),
        lambda: {"shares": shares, "noise": mixing.noise.get_state().tolist()},
        gradients=only_parameters, schedule=cosine_to(0.1, max(1, steps // 10)),
    )  # fmt: skip
    params = {name: {n: p.detach() for n, p in parts.items()} for name, parts in mixing.params.items()}
    return params, curve, {"sparse_layers": came_to(shares, kinds)}, seconds


def came_to(shares: Sequence[tuple[float, float]], kinds: Iterable[float]) -> dict[str, float | None]:
    """Of each kind the share of layers that were sparse, mean of the last fifth of the texts; None: there was none.

    >>> came_to([(0.5, 0.0)] * 8 + [(0.5, 0.25), (1.0, 1.0)], (0.5, 1.0, 0.0))
    {'0.5': 0.25, '1': 1.0, '0': None}
    """
    late = shares[-max(1, len(shares) // 5) :]
    found = {f"{kind:g}": [share for of, share in late if round(of, 6) == kind] for kind in kinds}
    return {kind: fmean(each) if each else None for kind, each in found.items()}
