"""`convert(model, tokenizer, "hedgehog")`: a trained softmax model becomes one whose state does not grow.

Two steps. Transfer: the model runs as it is, and in every attention module the mechanism's own parameters learn to do
what softmax does there: its weights (cross-entropy, Hedgehog) or its output (squared error, LAWCAT and others). Then a
fine-tune of the language-model loss through the converted model mends what is left: low-rank changes of the attention's
projections, or all weights.

The model itself is left as it was. What was learned is a `Converted`: `with regard.attach(model, converted):` puts it
to work, `converted.save(folder, model, tokenizer)` and `load_converted(folder)` keep it.
"""

import math
import pydoc_data.topics
import re
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from regard import catalog
from regard.attaching.actors import AttentionCall
from regard.attaching.attachment import attach
from regard.attaching.converted import Converted
from regard.attaching.function import native
from regard.attaching.ledger import LedgerLayer
from regard.attaching.replacement import Replacement
from regard.core import Method, Unsupported, require
from regard.kinds.mechanism import TRANSFERS, run
from regard.ops import lower_right, masked_softmax, scores
from regard.train.loop import already_there, cosine_to, fit, only_parameters

FINETUNES = ("lora", "full", None)
TINY = 1e-9  # a weight counts as at least this in the cross-entropy

Progress = Callable[[str, int, int, float], None]


class Teacher(Replacement):
    """Softmax as it is, and beside it a pupil in every attention module: each call is a step's loss for one layer."""

    layer = LedgerLayer

    def __init__(self, method: Method, target: str, seed: int) -> None:
        super().__init__()
        self.name = method.name
        self.method, self.target, self.seed = method, target, seed
        self.params: dict[str, dict[str, Tensor]] = {}
        self.losses: dict[str, float] = {}
        self.teaching = False

    def compute(self, call: AttentionCall) -> Tensor:
        out = native(call)[0].transpose(1, 2)
        if call.name not in self.params:
            self.params[call.name] = self.start(call)
        if self.teaching:
            with torch.enable_grad():
                loss = self.loss(call, out)
                # of this layer's parameters only
                loss.backward()
            self.losses[call.name] = loss.item()
        return out

    def start(self, call: AttentionCall) -> dict[str, Tensor]:
        q, k, v = call.q, call.k, call.v
        dims = {"heads": q.shape[1], "kv_heads": k.shape[1], "key": q.shape[3], "value": v.shape[3]}
        dims["width"] = layer_input(call).shape[-1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            params = self.method.page.init(self.method.config, dims)
        return {n: p.to(q.device).requires_grad_(p.is_floating_point()) for n, p in params.items()}

    def loss(self, call: AttentionCall, out: Tensor) -> Tensor:
        there = call.token_mask(False)
        rows = None if there is None else there.transpose(2, 3)  # [B, 1, N, 1]
        v = call.v
        # the weights of a mechanism are its outputs for the unit vectors
        if self.target == "weights":
            n = v.shape[2]
            v = torch.eye(n, device=v.device).expand(*v.shape[:2], n, n)
        x = layer_input(call).float() if self.method.page.reads_x(self.method.config) else None
        q, k, v = call.scaled().float(), call.k.float(), v.float()
        result = run(self.method, q, k, v, mask=there, params=self.params[call.name], x=x)[0]
        if self.target == "output":
            error, size = (result - out.float()).square(), out.float().square()
            if rows is not None:
                error, size = error * rows, size * rows
            return error.sum() / size.sum().clamp(min=TINY)
        sees = lower_right(result.shape[2], result.shape[3], q.device)[None, None]
        sees = sees if there is None else sees & there
        wanted = masked_softmax(
            scores(call.q.float(), k, call.options.get("scaling") or q.shape[-1] ** -0.5), sees
        )
        each = -(wanted * result.clamp(min=TINY).log()).sum(-1, keepdim=True)
        return each.mean() if rows is None else (each * rows).sum() / (rows.sum() * each.shape[1])


def layer_input(call: AttentionCall) -> Tensor:
    if call.x is None:
        raise Unsupported(f"{call.where} hands over no layer input, which a conversion reads")
    return call.x


def convert(
    model: nn.Module,
    tokenizer: Any = None,
    mechanism: str | Method | Converted = "hedgehog",
    *,
    texts: str | Sequence[str] | None = None,
    ids: Tensor | None = None,
    weights: Tensor | None = None,
    length: int = 256,
    batch: int = 8,
    steps: int = 200,
    rate: float = 1e-2,
    finetune: str | None = "lora",
    finetune_steps: int = 200,
    finetune_rate: float = 5e-4,
    soft: bool = False,
    rank: int = 8,
    target: str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    **config: Any,
) -> Converted:
    """Learn a mechanism's parts for every attention module of a causal language model.

    mechanism  a name with its settings, a method, or what an earlier call gave without fine-tuning, to go on from there
    texts      what is learned from, a text or several; or ids [tokens], or [rows, N] one row a sequence, with
               `weights` [rows, N] of its tokens in the language-model loss. None: the help pages that come with Python
    length     tokens in a window of running text
    steps      of transfer; finetune_steps of fine-tuning with "lora" (of this rank, on the attention's projections),
               "full" (all weights) or None
    soft       fine-tune on the model's own next-token probabilities instead of the text's tokens: less to overfit to
    target     "weights" or "output": what the transfer matches; None: as its page says, and so its paper does
    progress   called with (stage, step, steps, loss)
    """
    method, earlier = starting_point(mechanism, config)
    check(method, finetune, target)
    draw = drawer(model, tokenizer, texts, ids, weights, length, batch, seed)
    progress = progress or (lambda *_: None)
    began = perf_counter()
    target = target or method.page.transfer
    if earlier is not None:
        params, losses = earlier.params, list(earlier.report["transfer_loss"])
    else:
        params, losses = transfer(model, method, target, draw, steps, rate, seed, progress)
    halfway = perf_counter()
    changed: dict[str, Tensor] = {}
    curve: list[float] = []
    if finetune is not None and finetune_steps:
        params, changed, curve = tune(model, method, params, draw, finetune, finetune_steps, finetune_rate, rank,
                                      steps, seed, soft, progress)  # fmt: skip
    report = {
        "transfer_loss": losses, "transfer_seconds": halfway - began, "finetune_loss": curve,
        "finetune_seconds": perf_counter() - halfway, "target": target, "finetune": finetune, "steps": steps,
        "finetune_steps": finetune_steps if finetune else 0, "batch": batch, "length": length, "seed": seed,
    }  # fmt: skip
    return Converted(method, params, changed, report)


def starting_point(
    mechanism: str | Method | Converted, config: dict[str, Any]
) -> tuple[Method, Converted | None]:
    """(the method, the transfer that the conversion goes on from or None)."""
    if isinstance(mechanism, Converted):
        rule = "a conversion goes on from a transfer, before any fine-tuning"
        require(not mechanism.weights, rule, weights=True)
        require(not config, "the settings of a conversion are those it was made with", **config)
        return mechanism.method, mechanism
    method = catalog.from_spec(mechanism)
    return (method.with_settings(**config) if config else method), None


def check(method: Method, finetune: str | None, target: str | None) -> None:
    if method.page.kind != "mechanism":
        raise Unsupported(f"{method.name} is a {method.page.kind} page; convert takes mechanisms")
    if method.page.init is None:
        raise Unsupported(f"{method.name} has nothing to learn: regard.attach(model, {method.name!r}) is all")
    require(finetune in FINETUNES, f"finetune is one of {FINETUNES}", finetune=finetune)
    require(
        target in (*TRANSFERS, None),
        f"target is one of {TRANSFERS}, or None: as the page says",
        target=target,
    )
    normalized = target != "weights" or not method.page.needs_norm
    require(normalized, "weights are matched where they sum to one", target=target)


# the sequences


def drawer(
    model: nn.Module, tokenizer: Any, texts: Any, ids: Tensor | None, weights: Tensor | None, length: int, batch: int,
    seed: int,
) -> Callable[[int], tuple[Tensor, Tensor | None]]:  # fmt: skip
    """step -> (ids [B, N], weights [B, N] or None), the same for the same seed."""
    if ids is None:
        require(tokenizer is not None, "a tokenizer, where texts are given or none", tokenizer=tokenizer)
        texts = [texts] if isinstance(texts, str) else texts or help_pages()
        # by paragraphs, so that no tokenizer warns of the length
        parts = [part for text in texts for part in re.findall(r"(?s).+?(?:\n\n|\Z)", text)]
        ids = torch.tensor(
            [i for part in parts for i in tokenizer.encode(part, add_special_tokens=False, verbose=False)]
        )
    require(ids.dim() in (1, 2), "ids are [tokens] or [rows, N]", ids=ids)
    require(weights is None or weights.shape == ids.shape, "a weight for each id", ids=ids, weights=weights)
    first = getattr(tokenizer, "bos_token_id", None)
    room = length - (first is not None)
    enough = ids.dim() == 2 or len(ids) > room
    require(enough, "more tokens of text than a window holds", tokens=len(ids), length=length)

    def draw(step: int) -> tuple[Tensor, Tensor | None]:
        g = torch.Generator().manual_seed(1_000_003 * seed + step)
        if ids.dim() == 2:
            rows = torch.randint(len(ids), (batch,), generator=g)
            return ids[rows].to(model.device), None if weights is None else weights[rows].to(model.device)
        starts = torch.randint(len(ids) - room, (batch,), generator=g).tolist()
        windows = torch.stack([ids[s : s + room] for s in starts])
        if first is not None:
            windows = torch.cat([torch.full((batch, 1), first), windows], 1)
        return windows.to(model.device), None

    return draw


def help_pages() -> list[str]:
    """Running text that is on every machine: the topics of Python's help."""
    return [pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)]


# the two steps


def transfer(
    model: nn.Module,
    method: Method,
    target: str,
    draw: Callable,
    steps: int,
    rate: float,
    seed: int,
    progress: Progress,
) -> tuple[dict[str, dict[str, Tensor]], list[float]]:
    """(params by attention module, mean loss over the layers by step)."""
    teacher = Teacher(method, target, seed)
    with evaluating(model), torch.no_grad(), attach(model, teacher):
        model(draw(0)[0][:1], use_cache=False)  # every module makes its parameters
        require(teacher.params, "attention modules that were reached", modules=0)
        learned = [p for parts in teacher.params.values() for p in parts.values() if p.requires_grad]
        teacher.teaching = True

        def loss_at(step: int) -> Tensor:
            model(draw(step)[0], use_cache=False)
            return torch.tensor(sum(teacher.losses.values()) / len(teacher.losses), dtype=torch.float64)

        curve = fit(
            torch.optim.Adam(learned, rate), loss_at, steps, schedule=cosine_to(0.05, max(1, steps // 20)), clip=None,
            gradients=already_there, after_step=lambda step, loss: progress("transfer", step + 1, steps, loss),
        )  # fmt: skip
    return {name: {n: p.detach() for n, p in parts.items()} for name, parts in teacher.params.items()}, curve


def tune(
    model: nn.Module, method: Method, params: dict, draw: Callable, how: str, steps: int, rate: float, rank: int,
    start: int, seed: int, soft: bool, progress: Progress,
) -> tuple[dict, dict[str, Tensor], list[float]]:  # fmt: skip
    """(params, changed weights, loss by step): the language-model loss through the converted model."""
    learned = {
        name: {n: p.float().clone().requires_grad_() for n, p in parts.items()}
        for name, parts in params.items()
    }
    leaves, merged = changes(model, params, how, rank, seed)
    groups = [{"params": list(leaves)}, {"params": [p for parts in learned.values() for p in parts.values()]}]

    def loss_at(step: int) -> Tensor:
        ids, weights = draw(start + step)
        wanted = next_token_probabilities(model, ids) if soft else None
        with torch.enable_grad(), attach(model, Converted(method, learned)):
            logits = functional_call(model, merged(), kwargs=dict(input_ids=ids, use_cache=False)).logits
            return language_loss(logits, ids, weights, wanted)

    with evaluating(model):
        curve = fit(
            torch.optim.AdamW(groups, rate, weight_decay=0.0), loss_at, steps,
            schedule=cosine_to(0.05, max(1, steps // 20)), gradients=only_parameters,
            after_step=lambda step, loss: progress("finetune", step + 1, steps, loss),
        )  # fmt: skip
    with torch.no_grad():
        changed = {name: t.detach().clone() for name, t in merged().items()}
    return (
        {name: {n: p.detach() for n, p in parts.items()} for name, parts in learned.items()},
        changed,
        curve,
    )


def changes(model: nn.Module, params: dict, how: str, rank: int, seed: int) -> tuple[list[Tensor], Callable]:
    """(what is learned, a function that gives the changed weights by name)."""
    named = dict(model.named_parameters())
    if how == "full":
        copies = {n: p.detach().float().clone().requires_grad_() for n, p in named.items()}
        return list(copies.values()), lambda: {n: c.to(named[n].dtype) for n, c in copies.items()}
    sites = tuple(f"{name}." for name in params)
    chosen = {n: p.detach() for n, p in named.items() if n.startswith(sites) and p.dim() == 2}
    require(chosen, "attention modules with projections of their own, for low-rank changes", modules=sites)
    g = torch.Generator().manual_seed(seed)
    low = {}
    for n, p in chosen.items():
        down = (torch.randn(rank, p.shape[1], generator=g) / math.sqrt(p.shape[1])).to(p.device)
        low[n] = (torch.zeros(p.shape[0], rank, device=p.device).requires_grad_(), down.requires_grad_())
    leaves = [t for pair in low.values() for t in pair]
    return leaves, lambda: {n: p + (low[n][0] @ low[n][1]).to(p.dtype) for n, p in chosen.items()}


@torch.no_grad()
def next_token_probabilities(model: nn.Module, ids: Tensor) -> Tensor:
    """The next-token probabilities of the model as it is."""
    return model(ids, use_cache=False).logits[:, :-1].float().softmax(-1)


def language_loss(
    logits: Tensor, ids: Tensor, weights: Tensor | None = None, wanted: Tensor | None = None
) -> Tensor:
    """The weighted mean cross-entropy of the next tokens, or of the probabilities wanted for them."""
    targets = ids[:, 1:].flatten() if wanted is None else wanted.flatten(0, 1)
    each = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), targets, reduction="none")
    if weights is None:
        return each.mean()
    weights = weights[:, 1:].flatten()
    return (each * weights).sum() / weights.sum().clamp(min=TINY)


class evaluating:
    """The model in eval mode for a while."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.training = model, model.training

    def __enter__(self) -> None:
        self.model.eval()

    def __exit__(self, *_: Any) -> None:
        self.model.train(self.training)
