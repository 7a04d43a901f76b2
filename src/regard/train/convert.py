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
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from regard import catalog
from regard.attaching.attachment import attach
from regard.attaching.converted import Converted
from regard.core import Method, require
from regard.models.revision import of_loaded
from regard.train.checkpoints import Checkpoints
from regard.train.convertible import check
from regard.train.loop import Schedule, already_there, cosine_to, only_parameters
from regard.train.routes import SPARSE, Routes, learn_routes
from regard.train.teachers import TINY, GateTeacher, Teacher

RATES = {"weights": 1e-2, "output": 1e-2, "blocks": 1e-2, "routes": 1e-3}

Progress = Callable[[str, int, int, float], None]


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
    rate: float | None = None,
    finetune: str | None = "auto",
    finetune_steps: int = 200,
    finetune_rate: float = 5e-4,
    soft: bool = False,
    rank: int = 8,
    target: str | None = None,
    routes: Routes | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    checkpoints: str | Path | None = None,
    every: int = 50,
    **config: Any,
) -> Converted:
    """Learn a mechanism's parts for every attention module of a causal language model.

    mechanism  a name with its settings, a method, or what an earlier call gave without fine-tuning, to go on from there
    texts      what is learned from, a text or several; or ids [tokens], or [rows, N] one row a sequence, with
               `weights` [rows, N] of its tokens in the language-model loss. None: the help pages that come with Python
    length     tokens in a window of running text
    steps      of transfer, at `rate`; None: 1e-3 for routers, else 1e-2
    finetune   "lora" (of this rank, on the attention's projections), "full" (all weights) or None, for finetune_steps.
               "auto": none for pages that choose what softmax attention reads, whose model stays as it is; else "lora"
    soft       learn from the model's own next-token probabilities instead of the text's tokens: less to overfit to
    target     "weights" or "output": what the transfer matches; None: as its page says, and so its paper does
    routes     for pages with routers: the prompt of each row of ids, and its share of sparse layers. None: a text is
               its prompt, and 45 % of the layers are to be sparse
    progress   called with (stage, step, steps, loss)
    checkpoints  a folder for what either step has come to, written every `every` updates; the same call goes on from
               it. Its files stay there, and those of another call are refused
    """
    method, earlier = starting_point(mechanism, config)
    check(method, finetune, target)
    draw = drawer(model, tokenizer, texts, ids, weights, length, batch, seed)
    progress = progress or (lambda *_: None)
    target = target or method.page.transfer
    if finetune == "auto":
        finetune = None if target in ("blocks", "routes") else "lora"
    rate, more = RATES[target] if rate is None else rate, {}
    kept = Checkpoints()
    if checkpoints is not None:
        first = sha256(draw(0)[0].cpu().numpy().tobytes()).hexdigest()[:12]
        kept = Checkpoints(Path(checkpoints), every, dict(
            mechanism=method.label, target=target, model=of_loaded(model, tokenizer), texts=first, steps=steps,
            rate=rate, batch=batch, length=length, finetune=finetune, finetune_steps=finetune_steps,
            finetune_rate=finetune_rate, rank=rank, soft=soft, seed=seed,
        ))  # fmt: skip
    seconds = {"transfer": 0.0, "finetune": 0.0}
    if earlier is not None:
        params, losses = earlier.params, list(earlier.report["transfer_loss"])
    elif target == "routes":
        asked = asked_routes(routes, ids, length, batch, seed)
        with evaluating(model):
            params, losses, more, seconds["transfer"] = learn_routes(
                model, method, draw, asked, loss_of(model, soft), steps, rate, seed, progress, kept
            )
    else:
        params, losses, seconds["transfer"] = transfer(
            model, method, target, draw, steps, rate, seed, progress, kept
        )
    changed: dict[str, Tensor] = {}
    curve: list[float] = []
    if finetune is not None and finetune_steps:
        params, changed, curve, seconds["finetune"] = tune(
            model, method, params, draw, finetune, finetune_steps, finetune_rate, rank, steps, seed, soft, progress,
            kept,
        )  # fmt: skip
    report = {
        "transfer_loss": losses, "transfer_seconds": seconds["transfer"], "finetune_loss": curve,
        "finetune_seconds": seconds["finetune"], "target": target, "finetune": finetune, "steps": steps,
        "finetune_steps": finetune_steps if finetune else 0, "batch": batch, "length": length, "seed": seed,
        **more,
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


def asked_routes(
    routes: Routes | None, ids: Tensor | None, length: int, batch: int, seed: int
) -> Callable[[int], Routes]:
    """step -> what is asked of the rows that are drawn in it."""
    if routes is None:
        same = Routes(torch.full((batch,), length), torch.full((batch,), SPARSE))
        return lambda step: same
    rows = ids is not None and ids.dim() == 2 and len(ids) == len(routes.prompts)
    require(rows, "routes stand beside ids [rows, N]", ids=ids, routes=routes.prompts)

    def at(step: int) -> Routes:
        g = torch.Generator().manual_seed(1_000_003 * seed + step)
        return routes.of(torch.randint(len(routes.prompts), (batch,), generator=g))

    return at


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
    kept: Checkpoints,
) -> tuple[dict[str, dict[str, Tensor]], list[float], float]:
    """(params by attention module, mean loss over the layers by step, seconds)."""
    teacher = GateTeacher(method, seed) if target == "blocks" else Teacher(method, target, seed)
    with evaluating(model), torch.no_grad(), attach(model, teacher):
        model(draw(0)[0][:1], use_cache=False)  # every module makes its parameters
        require(teacher.params, "attention modules that were reached", modules=0)
        learned = [p for parts in teacher.params.values() for p in parts.values() if p.requires_grad]
        teacher.teaching = True

        def loss_at(step: int) -> Tensor:
            model(draw(step)[0], use_cache=False)
            return torch.tensor(sum(teacher.losses.values()) / len(teacher.losses), dtype=torch.float64)

        curve, seconds = kept.fit(
            "transfer", named_parts(teacher.params), torch.optim.Adam(learned, rate), loss_at, steps,
            lambda step, loss: progress("transfer", step + 1, steps, loss), clip=None,
            schedule=warmed(steps), gradients=already_there,
        )  # fmt: skip
    return detached(teacher.params), curve, seconds


def warmed(steps: int) -> Schedule:
    """A warm-up over a twentieth of the steps, and half a cosine down to a twentieth of the rate."""
    return cosine_to(0.05, max(1, steps // 20))


def named_parts(params: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """The parts of all attention modules in one mapping."""
    return {f"{name}/{n}": p for name, parts in params.items() for n, p in parts.items()}


def detached(params: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    return {name: {n: p.detach() for n, p in parts.items()} for name, parts in params.items()}


def tune(
    model: nn.Module, method: Method, params: dict, draw: Callable, how: str, steps: int, rate: float, rank: int,
    start: int, seed: int, soft: bool, progress: Progress, kept: Checkpoints,
) -> tuple[dict, dict[str, Tensor], list[float], float]:  # fmt: skip
    """(params, changed weights, loss by step, seconds): the language-model loss through the converted model."""
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

    trained = {**{f"weights/{i}": t for i, t in enumerate(leaves)}, **named_parts(learned)}
    with evaluating(model):
        curve, seconds = kept.fit(
            "finetune", trained, torch.optim.AdamW(groups, rate, weight_decay=0.0), loss_at, steps,
            lambda step, loss: progress("finetune", step + 1, steps, loss),
            schedule=warmed(steps), gradients=only_parameters,
        )  # fmt: skip
    with torch.no_grad():
        changed = {name: t.detach().clone() for name, t in merged().items()}
    return detached(learned), changed, curve, seconds


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


def loss_of(model: nn.Module, soft: bool) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """(logits, ids, weights) -> the language-model loss, of the model's own probabilities where it is soft."""
    return lambda logits, ids, weights: language_loss(
        logits, ids, weights, next_token_probabilities(model, ids) if soft else None
    )


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
