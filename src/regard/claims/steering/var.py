"""VAR's claim, on the shipped vision-language model: sinks of the image can go, though they hold more attention.

Sinks are looked for at each layer's input with the paper's threshold, scaled to the width, and D is what is massive
there in first tokens of `DISCOVER` texts. Those of the layer that has most are removed: no other token sees them, in
any layer. Against them stand as many visual tokens of the same image at random, no sinks, drawn several times. A
model without massive activations has no sinks: that is reported, and does not count as holding.
"""

from typing import Any

import torch
from torch import Tensor

from regard.attaching.attachment import attach
from regard.claims.lab import generator, mean, threads
from regard.claims.shipped_vlm import Asked, asked, inputs_of, next_logits, shipped
from regard.core import Card, Claim, Measured, Method, Observer, Site
from regard.kinds.steering import SteeringPage
from regard.methods.steering import var as page

NAME, SEED, DISCOVER, COUNT, BATCH, DRAWS = "var", 31, 32, 192, 32, 3
KINDS = ("exists", "count", "digit")
ROWS = (-3, -2, -1)  # of the question, where attention is looked at


def questions(count: int, seed: int) -> list[Asked]:
    return [q for kind in KINDS for q in asked(kind, count // len(KINDS), seed)]


def inputs(given: list[Asked]) -> dict:
    return inputs_of([q.scene for q in given], [q.question.text for q in given])


@torch.no_grad()
def looked(
    given: list[Asked], method: Method | None = None
) -> tuple[dict[int, Tensor], dict[int, Tensor], dict]:
    """({layer: inputs [B, n, d]}, {layer: weights [B, H, rows, n]}, the inputs) of one batch."""
    states = Observer("value", Site("resid_pre", tower="text"), name="states")
    weights = Observer("value", Site("weights", rows=ROWS, tower="text"), name="weights")
    given_to, acting = inputs(given), [] if method is None else [method]
    with attach(shipped().model, [*acting, states, weights]) as seen:
        shipped().model(**given_to, logits_to_keep=1)
    first, second = ({layer: x for layer, _, x in records} for records in seen.records.values())
    return first, second, given_to


def first_columns(given: dict) -> Tensor:
    return given["attention_mask"].int().argmax(1)


def dimensions() -> dict[int, tuple[int, ...]]:
    """D of each layer, by first tokens."""
    states, _, given = looked(questions(DISCOVER, SEED))
    at = torch.arange(len(given["input_ids"])), first_columns(given)
    return {layer: page.sink_dimensions(x[at]) for layer, x in states.items()}


def sinks_at(layer: int, D: tuple[int, ...], given: list[Asked]) -> tuple[Tensor, Tensor, Tensor]:
    """Visual sinks, visual tokens [B, n] bool, and the weight on each key [B, n], mean over heads, rows and layers."""
    states, weights, inputs_ = looked(given)
    image = inputs_["input_ids"] == shipped().model.config.image_token_id
    cfg = page.Config(dims=D)
    sinks = page.sinks_of(states[layer], page.own_dimensions(states[layer], first_columns(inputs_), cfg), cfg)
    return sinks & image, image, torch.stack([*weights.values()]).mean((0, 2, 3))


def as_many(sinks: Tensor, image: Tensor, g: torch.Generator) -> Tensor:
    """[B, n] bool: of each text as many visual tokens that are no sinks."""
    drawn = torch.rand(sinks.shape, generator=g).masked_fill(~image | sinks, 2.0)
    return drawn.argsort(1).argsort(1) < sinks.sum(1, keepdim=True)


def without(hidden: Tensor) -> Method:
    """No token but themselves sees the keys hidden [B, n]: in a forward of the prompt alone."""

    def scores(at: Any, s: Tensor, cfg: Any) -> Tensor:
        own = torch.eye(s.shape[-1], dtype=torch.bool, device=s.device)[-s.shape[2] :]
        return s.masked_fill(hidden[:, None, None] & ~own, -torch.inf)

    card = Card(title="without", paper="none", year=2026, idea="some keys are hidden")
    removal = SteeringPage(config=page.Config, card=card, scores=scores)
    return Method("without", removal, page.Config())


def answers(given: list[Asked], hidden: Tensor | None = None) -> Tensor:
    method = None if hidden is None or not hidden.any() else without(hidden)
    return next_logits(method, given, batch=len(given)).argmax(-1)


def batch_of(layer: int, D: tuple[int, ...], given: list[Asked], g: torch.Generator) -> dict[str, float]:
    """Of the texts that have a visual sink: how many, answers that flip, attention."""
    sinks, image, weight = sinks_at(layer, D, given)
    having, plain = sinks.any(1), answers(given)
    flips = ((answers(given, sinks) != plain) & having).sum().item()
    random = mean(
        ((answers(given, as_many(sinks, image, g)) != plain) & having).sum().item() for _ in range(DRAWS)
    )
    held = [weight[keys & having[:, None]].sum().item() for keys in (sinks, image)]
    counts = [(keys & having[:, None]).sum().item() for keys in (sinks, image)]
    return {"texts": having.sum().item(), "flips": flips, "random": random, "on_sinks": held[0], "on_image": held[1],
            "sinks": counts[0], "visual": counts[1]}  # fmt: skip


def row_error(given: list[Asked], D: tuple[int, ...]) -> float:
    """How far rows are from 1 under the method, at thresholds under which it acts on every head."""
    cfg = page.Config(dims=D, tau=20.0 if D else 5.0, mass=0.0, rho=1.0, first=0, spared=0)
    _, weights, _ = looked(given, Method(NAME, page.METHOD, cfg))
    return max((w.double().sum(-1) - 1).abs().max().item() for w in weights.values())


def measure() -> Measured:
    with threads(1):
        found, test = dimensions(), questions(COUNT, SEED + 1)
        batches = [test[i : i + BATCH] for i in range(0, len(test), BATCH)]
        numbers: dict[str, Any] = {"dimensions": [len(D) for D in found.values()]}
        numbers["row_sum_error"] = row_error(batches[0], max(found.values(), key=len))
        most = {layer: sinks_at(layer, D, batches[0])[0].sum().item() for layer, D in found.items() if D}
        if not any(most.values()):
            return Measured(False, numbers | {"sinks": "no sinks"})
        layer, g = max(most, key=most.__getitem__), generator(SEED)
        parts = [batch_of(layer, found[layer], given, g) for given in batches]
    total = {key: sum(part[key] for part in parts) for key in parts[0]}
    ratio = total["on_sinks"] / total["sinks"] / (total["on_image"] / total["visual"])
    numbers |= {"layer": layer, "attention_over_mean_visual": ratio} | total
    fewer = total["random"] > 0 and total["flips"] <= 0.5 * total["random"]
    return Measured(fewer and ratio >= 2 and numbers["row_sum_error"] < 1e-6, numbers)


CLAIM = Claim(
    name=NAME,
    statement=(
        "removing visual sink tokens changes answers less than removing as many random visual tokens, although sinks "
        "hold more attention; redistribution keeps rows summing to 1"
    ),
    bound=(
        "answers that flip without sinks <= 0.5 × without random ones; attention of sinks >= 2 × mean visual token; "
        "row-sum error < 1e-6"
    ),
    measure=measure,
)
