"""FCCT's claim, on the shipped models: attention carries what was read to the last token, more than the FFN does.

    lm     a code that the prompt states: its digits are one higher where it is corrupted
    vlm    whether a coloured shape is there, and it is: the picture under Gaussian noise is the corrupted one

p is the probability of the clean prompt's answer. Into the corrupted run goes what the clean one had: of a layer's
output at all tokens (1 by definition: nothing else is left to differ), and at the last token of what attention adds
after its projection ("out"), of what the FFN adds ("mlp"), and of the layer's output. The layer where attention's
recovery is highest decides.

On lm it is the code's first digit that decides; its second is reported too. Control there: at the same site,
attention's output of another pair's clean run, whose digit differs; it should bring back that digit and not this one.

On vlm the paper's groups of tokens are scanned as well: visual tokens before the object's own, those, and the ones
after; the question's words before the object's name, and it. Between the name and the last token these questions have
none. Control: as many visual tokens elsewhere as the object has.

IRI is run as `edits` with these rates and the paper's λ, on lm on prompts of 512 tokens. It is reported and decides
nothing: with so few layers the best source is a late one, after which little follows.

Everything was written and looked at on prompts of seed 0, on vlm on scenes of another seed than the ones reported.
"""

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from regard.claims import shipped_vlm as seeing
from regard.claims.lab import generator, threads
from regard.claims.shipped_lm import samples, shipped
from regard.core.claim import Claim, Measured
from regard.explaining.effects import Effects
from regard.explaining.pairs import Batch, Pairs, batch_of, prob
from regard.explaining.patching import patch
from regard.explaining.runs import at_site, capture, forward
from regard.methods.tracing import fcct_iri as page
from regard.tasks.scenes import GRID

COUNT, LENGTH, SEED = 48, 96, 3
LONG, TEXTS = 512, 16
STRENGTH = {"out": 0.26, "mlp": 0.16}
SCENES, NOISE, INJECTED = 32, 5.0, 24  # NOISE beside pixels of standard deviation 1
COMPONENTS = ("out", "mlp", "resid_post")


def digit_pairs(digit: int, length: int, count: int) -> Pairs:
    """Prompts read up to this digit of the code, which is the target; corrupted, every digit is one higher."""
    zero, nine = shipped().tokenizer.convert_tokens_to_ids(["0", "9"])
    clean, corrupt, target, foil = [], [], [], []
    for sample in samples("needle", length, count, SEED):
        code, (first, last) = sample.answer, sample.evidence
        at = next(i for i in range(first, last) if sample.prompt[i : i + len(code)] == code)
        other = [i + 1 if zero <= i < nine else zero if i == nine else i for i in code]
        wrong = [*sample.prompt[:at], *other, *sample.prompt[at + len(code) :]]
        places = [n for n, i in enumerate(code) if zero <= i <= nine]
        known = code[: places[digit]]
        clean.append([*sample.prompt, *known])
        corrupt.append([*wrong, *known])
        target.append(code[places[digit]])
        foil.append(other[places[digit]])
    return Pairs(batch_of(clean), batch_of(corrupt), torch.tensor(target), torch.tensor(foil), metric=prob)


def scans(pairs: Pairs) -> dict[str, Effects]:
    model = shipped().model
    last = {name: patch(model, pairs, name, rows=-1) for name in ("out", "mlp", "resid_post")}
    return {"all": patch(model, pairs, "resid_post"), **last}


def peaks(pairs: Pairs, found: dict[str, Effects]) -> dict[str, Any]:
    """What the bound looks at, and beside it."""
    attention, ffn = found["out"].mean, found["mlp"].mean
    peak = int(attention.argmax())
    low, high = found["out"].interval()
    return {
        "mean_span": found["out"].span.mean().item(),
        "farthest_from_1_of_all_tokens": (found["all"].mean - 1).abs().max().item(),
        "farthest_from_1_of_a_pair": (found["all"].values / found["all"].span[:, None] - 1)
        .abs()
        .max()
        .item(),
        "recovery_attention": attention.tolist(),
        "recovery_ffn": ffn.tolist(),
        "recovery_of_the_last_token": found["resid_post"].mean.tolist(),
        "peak_layer": peak,
        "peak_interval": [low[peak].item(), high[peak].item()],
        "peak_over_ffn": (attention[peak] - ffn[peak]).item(),
    } | anothers(pairs, peak)


@torch.no_grad()
def anothers(pairs: Pairs, layer: int) -> dict[str, float]:
    """Probabilities of this pair's digit and of the other's, with attention's output of the other at the last token."""
    model = shipped().model
    values = capture(model, pairs.clean, ["out"], [layer])[1]["out"][layer][:, 0, -1:]
    turn = torch.arange(len(pairs)).roll(1)
    chosen = (pairs.target != pairs.target[turn]).nonzero().flatten()
    edit = at_site("out", layer, None, values[turn][chosen], rows=-1)
    logits, _ = forward(model, pairs.corrupt.at(chosen.tolist()), [edit])
    own, other = (prob(logits, target[chosen]).mean().item() for target in (pairs.target, pairs.target[turn]))
    return {"others_output_own_digit": own, "others_output_others_digit": other}


def rates(found: Effects) -> tuple[Tensor, Tensor, Tensor]:
    """clean, corrupt [P] and patched [P, L]: the page asks for differences alone, so corrupt counts as zero."""
    return found.span, torch.zeros_like(found.span), found.values


@torch.no_grad()
def iri(found: dict[str, Effects]) -> dict[str, float]:
    """Mean probability of the code's first digit as the prompt is, and with IRI of attention and of the FFN."""
    model, pairs = shipped().model, digit_pairs(0, LONG, TEXTS)
    plain, values = capture(model, pairs.clean, [*STRENGTH])
    numbers = {"iri_without": pairs.score(plain).mean().item()}
    for name, strength in STRENGTH.items():
        outputs = torch.stack([x[:, 0, -1] for _, x in sorted(values[name].items())])
        injection = page.measure(*rates(found[name]), outputs, page.Config(strength=strength))
        logits, _ = forward(model, pairs.clean, page.edits(injection, name))
        numbers[f"iri_{name}"] = pairs.score(logits).mean().item()
    return numbers


def on_text() -> Measured:
    pairs = digit_pairs(0, LENGTH, COUNT)
    found = scans(pairs)
    numbers = peaks(pairs, found)
    second = digit_pairs(1, LENGTH, COUNT)
    others = {f"second_digit_{key}": value for key, value in peaks(second, scans(second)).items()}
    return Measured.by(within(numbers), numbers | others | iri(found))


def within(numbers: dict[str, Any]) -> dict[str, bool]:
    return {
        "runs differ": numbers["mean_span"] > 0.5,
        "all tokens restore": numbers["farthest_from_1_of_all_tokens"] < 1e-4,
        "attention over the FFN": numbers["peak_over_ffn"] >= 0.1,
    }


# pictures


def seen_pairs(seed: int | str, count: int, noise: float = NOISE) -> list[tuple[seeing.Asked, Pairs]]:
    """Questions for what is there, whose answer the model knows, each with its picture and that under noise."""
    model, g, found = seeing.shipped().model, generator(7), []
    yes = seeing.shipped().processor.tokenizer.convert_tokens_to_ids("yes")
    for one in seeing.asked("exists", 6 * count, seed):
        if one.question.answer != "yes" or not seeing.correct(None, [one])[0]:
            continue
        inputs = seeing.inputs_of([one.scene], [one.question.text])
        ids, pixels = inputs["input_ids"], inputs["pixel_values"]
        noised = pixels + noise * torch.randn(pixels.shape, generator=g)
        clean, corrupt = (Batch(ids, torch.ones_like(ids), {"pixel_values": x}) for x in (pixels, noised))
        found.append((one, Pairs(clean, corrupt, torch.tensor([yes]), metric=prob)))
        if len(found) == count:
            break
    assert len(found) == count, f"{len(found)} questions of {count} are answered"
    assert model.config.image_seq_length == 4 * GRID**2
    return found


def patches(cell: int) -> list[int]:
    """Positions in the prompt of a cell's four visual tokens, after the first token."""
    side, (row, column) = 2 * GRID, divmod(cell, GRID)
    return [1 + (2 * row + i) * side + 2 * column + j for i in range(2) for j in range(2)]


def groups(one: seeing.Asked) -> dict[str, list[int]]:
    """Positions of the paper's groups; visual tokens between the object's rows count as after it."""
    words = one.question.text.split()  # is there a COLOUR SHAPE ?
    text = 1 + 4 * GRID**2
    thing = next(t for t in one.scene.of("shape") if [t.colour, t.name] == words[3:5])
    own = patches(thing.cell)
    taken = {t.cell + i for t in one.scene.things for i in range(len(t.name) if t.kind == "word" else 1)}
    free = random.Random(one.scene.noise).choice([c for c in range(GRID**2) if c not in taken])
    return {
        "visual_before": [*range(1, own[0])],
        "visual_object": own,
        "visual_after": [n for n in range(own[0], text) if n not in own],
        "visual_elsewhere": patches(free),
        "text_before": [text, text + 1, text + 2],
        "text_object": [text + 3, text + 4],
        "last": [text + 5],
    }


def role_scan(chosen: Sequence[tuple[seeing.Asked, Pairs]]) -> dict[str, dict[str, Effects]]:
    """group -> component -> effects [pairs, layer]; a group without tokens restores nothing."""
    names = [*groups(chosen[0][0]), "all"]
    found: dict[str, Any] = {name: {c: [] for c in COMPONENTS} for name in names}
    spans = []
    for one, pair in chosen:
        rows = {**groups(one), "all": [*range(pair.clean.ids.shape[1])]}
        for component in COMPONENTS:
            span, change = restored(pair, component, [rows[name] for name in names])
            for name, values in zip(names, change, strict=True):
                found[name][component].append(values)
        spans.append(span)
    return {name: {c: effects(parts, spans) for c, parts in by.items()} for name, by in found.items()}


@torch.no_grad()
def restored(pair: Pairs, component: str, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """(p(clean) - p(corrupt), [groups, layers] p(patched) - p(corrupt)) of one pair, all in one forward."""
    model = seeing.shipped().model
    logits, values = capture(model, pair.clean, [component])
    base = pair.score(forward(model, pair.corrupt)[0])
    layers = sorted(values[component])
    sites = [(n, own) for own in rows for n in layers]
    edits = [
        at_site(component, n, None, values[component][n][:, 0, list(own)], rows=tuple(own), texts=i)
        for i, (n, own) in enumerate(sites)
        if own
    ]
    patched = pair.score(forward(model, pair.corrupt.repeated(len(sites)), edits)[0])
    return pair.score(logits) - base, (patched - base).view(len(rows), len(layers))


def effects(parts: Sequence[Tensor], spans: Sequence[Tensor]) -> Effects:
    values = torch.stack([*parts]).double()
    coords = {"layer": [*range(values.shape[1])]}
    return Effects(
        values, ("layer",), coords, torch.cat([*spans]).double(), torch.ones(values.shape[1]).bool()
    )


@torch.no_grad()
def seen_iri(rates_of: dict[str, Effects], chosen: Sequence[tuple[seeing.Asked, Pairs]]) -> dict[str, float]:
    """Mean probability of "yes", picture under noise, without IRI and with IRI of attention and of the FFN."""
    model = seeing.shipped().model
    said: dict[str, list[float]] = {name: [] for name in ("without", *STRENGTH)}
    for _, pair in chosen:
        plain, values = capture(model, pair.corrupt, [*STRENGTH])
        said["without"].append(pair.score(plain).item())
        for name, strength in STRENGTH.items():
            outputs = torch.stack([x[:, 0, -1] for _, x in sorted(values[name].items())])
            injection = page.measure(*rates(rates_of[name]), outputs, page.Config(strength=strength))
            logits, _ = forward(model, pair.corrupt, page.edits(injection, name))
            said[name].append(pair.score(logits).item())
    return {f"iri_{name}": sum(x) / len(x) for name, x in said.items()}


def on_pictures() -> Measured:
    chosen = seen_pairs("fcct", SCENES)
    found = role_scan(chosen)
    last = found.pop("last")
    attention, ffn = last["out"].mean, last["mlp"].mean
    peak = int(attention.argmax())
    low, high = last["out"].interval()
    whole, layers = found.pop("all")["resid_post"], len(attention)
    middle = range(layers // 4, layers - layers // 4)
    best = max(middle, key=lambda n: float(attention[n]))
    numbers: dict[str, Any] = {
        "mean_span": last["out"].span.mean().item(),
        "farthest_from_1_of_all_tokens": (whole.mean - 1).abs().max().item(),
        "recovery_attention": attention.tolist(),
        "recovery_ffn": ffn.tolist(),
        "recovery_of_the_last_token": last["resid_post"].mean.tolist(),
        "peak_layer": peak,
        "peak_interval": [low[peak].item(), high[peak].item()],
        "peak_over_ffn": (attention[peak] - ffn[peak]).item(),
        "peak_layer_of_the_middle": best,
        "peak_of_the_middle_over_ffn": (attention[best] - ffn[best]).item(),
    }
    others = {f"{name}_{c}": e.mean.tolist() for name, by in found.items() for c, e in by.items()}
    parts = within(numbers)
    return Measured.by(parts, numbers | others | seen_iri(last, seen_pairs("fcct iri", INJECTED)))


def measure(model: str) -> Measured:
    with threads(1):
        return {"lm": on_text, "vlm": on_pictures}[model]()


CLAIM = Claim(
    name="fcct_iri",
    statement=(
        "the hidden states of all tokens of any layer restore the answer of a corrupted run, and at the last token the "
        "attention of the layer where it restores most restores more than that layer's FFN"
    ),
    bound=(
        "|recovery - 1| < 1e-4 at every layer, all tokens patched; peak last-token recovery of attention's output >= "
        "that of the FFN of the same layer + 0.1 (clean and corrupted runs differ by > 0.5 in probability)"
    ),
    measure=measure,
    models=("lm", "vlm"),
    fails={"vlm": ("attention over the FFN",)},
    contradicted={
        "vlm": (
            "all tokens restore the answer exactly, and in the middle of the decoder (layer 3 of 0 to 5) the last "
            "token's attention restores 0.35 where its FFN restores 0.09, as the paper has it; but over all layers its "
            "attention restores most in the last one, 0.40 (0.31 to 0.50), and there the FFN restores 0.85. What is "
            "seen comes from the object's own tokens (0.75 of it before layer 0, 0.05 from as many elsewhere), is read "
            "by attention at them and at the name in the question, and reaches the last token in layers 2 and 3; the "
            "FFNs of layers 4 and 5 turn it into the word. The bound was written for a model whose last layer reads"
        )
    },
)
