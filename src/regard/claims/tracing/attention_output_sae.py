"""Attention-output SAEs' claim, on the shipped language model: exact splits, few features, induction by source.

What is trained. Of the model's four layers the one with the highest induction score (mass on the token after an earlier
copy, on random tokens that repeat) of any head gets a dictionary of 4 features for each of its 192 dimensions, on head
outputs of running text (half of the held-out text, which the model has not seen either), recall, needles and random
tokens that repeat, in about the shares that the model was trained on. λ, the rate, the number of steps and the rule
for induction features (by how many features it gives) were chosen on the validation split; all that is judged comes
from the test split: another part of the text, other seeds (the filler between facts is drawn from all of the text).

What is judged.
sum      |by_source summed over tokens and heads + b_dec and b_enc - pre-activation| in float32, where attention and
         values come from one forward and z from an observer in another; the same by head, for all features.
L0       Features above zero at a token, the mean over text, recall and needles. CE recovered is the cross-entropy with
         z = 0 less that with z = ẑ, over that with z = 0 less the model's; the least of the three kinds of text counts.
sources  Random tokens of which none occurs twice, and at the end of the row the last p of them again, p from 32 to 127.
         A feature fires strongly where it has at least half of its largest activation. It is one of induction if it
         does so in the copy at least five times as often as before it and as in running text, and five times at
         least, on validation rows. On test rows: the share of its firings in the copy, weak ones included, in which the
         token with the largest attribution, all heads summed, is the one after the earlier occurrence. Of all firings
         together and as the mean over features; both must meet the bound.

Controls. As many principal components as L0 in place of the dictionary. Sources for directions drawn at random instead
of the induction features' encoders, and for as many other features, those most active in the copy: in this layer most
of what heads write there comes from the induction token, so that other features have it as their top source often too.
What it costs in the copy, in nats, to set the induction features to zero while all else of z stays, and the others.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.attaching.attachment import attach
from regard.attaching.calibrate import retrieval_scores
from regard.claims.lab import generator, mean, threads
from regard.claims.shipped_lm import samples, shipped
from regard.core import Edit
from regard.core.claim import Claim, Measured
from regard.explaining.sae import SAE, Splice, attribute, fit_sae, head_outputs, recovered, site
from regard.methods.tracing.attention_output_sae import Config, Dictionary, pre_activations
from regard.tasks import held_out

# tokens of a row; parts of the held-out text
LENGTH, PARTS = 256, {"train": (0.0, 0.5), "validation": (0.5, 0.75), "test": (0.75, 1.0)}
SEEDS = {"train": 0, "validation": 1, "test": 2}
KINDS = ("text", "recall", "needle")
BATCH, SHORTEST, LONGEST = 16, 32, 127
# found on the validation split
SETTINGS, STEPS = Config(l1=2.0, expansion=4, rate=1e-2, batch=512), 1500
# what makes a feature one of induction: from which share of its largest activation it fires strongly, how many times
# as often in the copy as elsewhere, and how often there at least
STRONG, MORE, LEAST = 0.5, 5, 5


def ordinary(kind: str, split: str, count: int) -> Tensor:
    """[count, LENGTH] ids of running text, or of questions with their answers."""
    tokenizer, seed = shipped().tokenizer, SEEDS[split]
    if kind != "text":
        size = len(samples(kind, LENGTH, 1)[0].answer)
        chosen = samples(kind, LENGTH - size, count, seed=seed)
        return torch.tensor([sample.prompt + sample.answer for sample in chosen])
    ids = torch.tensor(held_out().ids(tokenizer))
    first, last = (int(share * len(ids)) for share in PARTS[split])
    rows = ids[first:last].unfold(0, LENGTH - 1, LENGTH - 1)[:count]
    return F.pad(rows, (1, 0), value=tokenizer.bos_token_id)


def repeats(split: str, count: int) -> tuple[Tensor, Tensor]:
    """[count, LENGTH] ids of random tokens whose last p occur twice, no other one does; p [count]."""
    g, tokenizer = generator(SEEDS[split]), shipped().tokenizer
    periods, rows = torch.randint(SHORTEST, LONGEST + 1, (count,), generator=g), []
    for p in periods.tolist():
        drawn = 3 + torch.randperm(len(tokenizer) - 3, generator=g)[: LENGTH - 1 - p]
        rows.append(torch.cat([torch.tensor([tokenizer.bos_token_id]), drawn, drawn[-p:]]))
    return torch.stack(rows), periods


def in_copy(periods: Tensor) -> Tensor:
    """[rows, LENGTH] bool: tokens that stood earlier in the row."""
    return torch.arange(LENGTH) >= LENGTH - periods[:, None]


def best_layer() -> tuple[int, list[float]]:
    """The layer with the head that looks most at the token after an earlier copy, and this score of each layer."""
    scores = retrieval_scores(shipped().model, length=128, repeats=2, seed=0)["induction"].amax(-1)
    return int(scores.argmax()), scores.tolist()


def learned(layer: int, settings: Config = SETTINGS, steps: int = STEPS) -> SAE:
    rows = [ordinary("text", "train", 200), *(ordinary(kind, "train", 64) for kind in KINDS[1:])]
    batches = [part for ids in [*rows, repeats("train", 64)[0]] for part in ids.split(BATCH)]
    return fit_sae(shipped().model, layer, batches, settings, steps=steps)


def activations(sae: SAE, ids: Tensor) -> Tensor:
    """[rows, LENGTH, F] features."""
    z = head_outputs(shipped().model, sae.layer, ids.split(BATCH))  # [tokens, H, E]
    return sae.encode(z.view(*ids.shape, *z.shape[1:]).transpose(1, 2))


# how well it reconstructs


def fidelity(sae: SAE, split: str) -> dict[str, Any]:
    """L0 and CE recovered, by kind of text, and what as many principal components recover."""
    model, numbers, fired = shipped().model, {}, []
    for kind in KINDS:
        ids = ordinary(kind, split, 32)
        fired.append((activations(sae, ids) > 0).sum(-1).float().mean().item())
        found = recovered(model, sae, ids.split(BATCH))
        numbers |= {f"{kind}_{name}": x for name, x in found.items()}
    l0 = mean(fired)
    components = principal(sae, round(l0))
    numbers |= {
        f"{kind}_recovered_by_components": recovered(
            model, components, ordinary(kind, split, 32).split(BATCH)
        )["recovered"]
        for kind in KINDS
    }
    count = len(sae.dictionary.b_enc)
    return {"l0": l0, "l0_share": l0 / count, "l0_by_kind": fired, **numbers}


def principal(sae: SAE, count: int) -> SAE:
    """The first principal components of the training text's head outputs: each is two features, one of each sign."""
    z = head_outputs(shipped().model, sae.layer, ordinary("text", "train", 200).split(BATCH)).flatten(1)
    directions = torch.linalg.eigh((z - z.mean(0)).T.cov()).eigenvectors[:, -count:].T
    both = torch.cat([directions, -directions])
    return replace(sae, dictionary=Dictionary(both, both.new_zeros(2 * count), both, z.mean(0)))


def sum_errors(sae: SAE, features: Sequence[int], split: str) -> dict[str, float]:
    """How far the parts are from summing to the pre-activation, and how large this is."""
    model, ids = shipped().model, ordinary("text", split, 4)
    z = head_outputs(model, sae.layer, [ids]).flatten(1).view(*ids.shape, -1)
    wanted = pre_activations(sae.dictionary, z)
    every = attribute(model, sae, ids, range(len(sae.dictionary.b_enc)), rows=[-1])
    by_head = every["by_head"].sum(-1) + every["b_dec"] + every["b_enc"]
    worst, chosen = 0.0, list(features)
    for row, whole in zip(ids, wanted, strict=True):
        parts = attribute(model, sae, row[None], chosen)
        found = parts["by_source"].sum((-1, -2)) + parts["b_dec"] + parts["b_enc"]
        worst = max(worst, (found[0] - whole[:, chosen]).abs().max().item())
    return {
        "sum_error_by_source": worst,
        "sum_error_by_head": (by_head[:, 0] - wanted[:, -1]).abs().max().item(),
        "largest_pre_activation": wanted.abs().max().item(),
    }


# induction


def induction_features(sae: SAE, split: str) -> dict[str, Any]:
    """Features that fire strongly in the copy; their mean activations there, before it, and in running text."""
    ids, periods = repeats(split, 64)
    found, copy = activations(sae, ids), in_copy(periods)
    text = activations(sae, ordinary("text", split, 64)).flatten(0, 1)
    parts = {"copy": found[copy], "before": found[~copy], "text": text}
    strong = STRONG * torch.stack([x.amax(0) for x in parts.values()]).amax(0)
    rates = {name: ((x >= strong) & (x > 0)).float().mean(0) for name, x in parts.items()}
    chosen = rates["copy"] >= MORE * torch.maximum(rates["before"], rates["text"])
    chosen &= rates["copy"] * len(parts["copy"]) >= LEAST - 0.5
    means = {f"activation_{name}": x[:, chosen].mean().item() for name, x in parts.items()}
    return {"features": chosen.nonzero().flatten().tolist(), **means}


def top_sources(sae: SAE, features: Sequence[int], split: str, count: int = 24) -> dict[str, Any]:
    """Of the firings of these features within the copy: where the token with the largest attribution lies.

    hits: after the earlier occurrence, of all firings; of_features: the mean over features; echo: at the earlier
    occurrence itself; by_length: hits of the rows with the shorter and the longer periods.
    """
    ids, periods = repeats(split, count)
    fired, hit, echo = (torch.zeros(count, len(features)) for _ in "123")
    for b, (row, p) in enumerate(zip(ids, periods.tolist(), strict=True)):
        rows = torch.arange(LENGTH - p, LENGTH)
        parts = attribute(shipped().model, sae, row[None], features, rows.tolist())
        by_source = parts["by_source"][0].sum(2)  # [p, K, M], all heads
        fires = by_source.sum(-1) + parts["b_dec"] + parts["b_enc"] > 0
        away = by_source.argmax(-1) - (rows - p)[:, None]
        fired[b] = fires.sum(0)
        hit[b], echo[b] = ((fires & (away == step)).sum(0) for step in (1, 0))
    seen, short = fired.sum(0) > 0, periods <= periods.median()
    return {
        "firings": int(fired.sum()),
        "hits": (hit.sum() / fired.sum()).item(),
        "of_features": (hit.sum(0) / fired.sum(0))[seen].mean().item(),
        "echo": (echo.sum() / fired.sum()).item(),
        "by_length": [(hit[part].sum() / fired[part].sum()).item() for part in (short, ~short)],
    }


def with_random_directions(sae: SAE, features: Sequence[int]) -> SAE:
    """The encoders of these features turned to where a generator says, at their length; their biases stay."""
    w_enc = sae.dictionary.w_enc.clone()
    drawn = torch.randn(len(features), w_enc.shape[1], generator=generator(0))
    w_enc[list(features)] = F.normalize(drawn, dim=-1) * w_enc[list(features)].norm(dim=-1, keepdim=True)
    return replace(sae, dictionary=sae.dictionary._replace(w_enc=w_enc))


def others(sae: SAE, features: Sequence[int], split: str) -> list[int]:
    """As many features that are none of these, the most active ones at the copy."""
    ids, periods = repeats(split, 64)
    active = activations(sae, ids)[in_copy(periods)].sum(0)
    active[list(features)] = -1
    return active.argsort(descending=True)[: len(features)].tolist()


@torch.no_grad()
def loss_at_copy(split: str, *methods: Splice | Edit) -> float:
    """Nats a token of the copy, its first left out, which nothing foretells."""
    ids, periods = repeats(split, 32)
    wanted = ids.masked_fill(~in_copy(periods - 1), -100)
    with attach(shipped().model, methods or None):
        logits = shipped().model(ids).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), wanted[:, 1:].flatten()).item()


def without(sae: SAE, features: Sequence[int]) -> Splice:
    return Splice(sae, dict.fromkeys(features, 0.0))


def judged(sae: SAE, choosing: str, judging: str) -> dict[str, Any]:
    """Everything that is measured: induction features come from one split, the rest from the other."""
    found = induction_features(sae, choosing)
    features = found.pop("features")
    if not features:
        return fidelity(sae, judging) | {"induction_features": 0} | sum_errors(sae, range(16), judging)
    rest = others(sae, features, choosing)
    sources = top_sources(sae, features, judging)
    numbers = found | {f"sources_{n}": x for n, x in sources.items()}
    control = top_sources(with_random_directions(sae, features), features, judging)
    numbers |= {"induction_features": len(features), "hits_random_directions": control["hits"]}
    numbers |= {"hits_other_features": top_sources(sae, rest, judging)["hits"]}
    numbers |= {
        "copy_loss": loss_at_copy(judging),
        "copy_loss_without_induction": loss_at_copy(judging, without(sae, features)),
        "copy_loss_without_others": loss_at_copy(judging, without(sae, rest)),
        "copy_loss_zero": loss_at_copy(judging, Edit(site(sae.layer), "replace", 0.0)),
    }
    return fidelity(sae, judging) | numbers | sum_errors(sae, [*features[:16], *rest[:16]], judging)


def measure() -> Measured:
    with threads(1):
        layer, scores = best_layer()
        sae = learned(layer)
        numbers = judged(sae, "validation", "test")
    trained = {f"training_{name}": x for name, x in sae.report.items()}
    numbers = {"layer": layer, "induction_by_layer": scores, **trained, **numbers}
    hits = min(numbers.get("sources_hits", 0.0), numbers.get("sources_of_features", 0.0))
    parts = {
        "parts sum exactly": max(numbers["sum_error_by_source"], numbers["sum_error_by_head"]) < 1e-4,
        "sparse": numbers["l0_share"] <= 0.1,
        "cross-entropy recovered": min(numbers[f"{kind}_recovered"] for kind in KINDS) >= 0.8,
        "top source": hits >= 0.7,
    }
    return Measured.by(parts, numbers)


CLAIM = Claim(
    name="attention_output_sae",
    statement=(
        "attributions over heads and source tokens sum to a feature's pre-activation exactly; an SAE of the layer with "
        "induction heads is sparse and yet recovers most of the loss, and the top source of its induction features is "
        "the induction token"
    ),
    bound=(
        "sum error < 1e-4; L0 <= 10 % of the features with >= 80 % of the cross-entropy recovered against zero "
        "ablation, on each of running text, recall and needles; top source is the induction token in >= 70 % of the "
        "firings of induction features, all together and as the mean over features"
    ),
    measure=measure,
)
