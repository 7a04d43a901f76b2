"""FCCT's claim, on the shipped model: attention carries a code's digit to the last token, more than the FFN does.

A pair is a prompt that states a code and asks for it, read up to the digit that is to come, and the same prompt with
every digit of the stated code one higher. p is the probability of the clean code's digit. Into the corrupted run goes
what the clean one had: of a layer's output at all tokens (1 by definition: nothing else is left to differ), and at the
last token of what attention adds after its projection ("out"), of what the FFN adds ("mlp"), and of the layer's output.
The layer where attention's recovery is highest decides, at the code's first digit; its second is reported too.

Control: at the same site, attention's output of another pair's clean run, whose digit differs; it should bring back
that digit and not this one.

IRI is run as `edits` with these rates and the paper's λ, on prompts of 512 tokens. It is
reported and decides nothing: of four layers the best source is the last one, after which nothing follows.

Everything was written and looked at on prompts of seed 0.
"""

from typing import Any

import torch
from torch import Tensor

from regard.claims.lab import threads
from regard.claims.shipped_lm import samples, shipped
from regard.core.claim import Claim, Measured
from regard.explaining.effects import Effects
from regard.explaining.pairs import Pairs, batch_of, prob
from regard.explaining.patching import patch
from regard.explaining.runs import at_site, capture, forward
from regard.methods.tracing import fcct_iri as page

COUNT, LENGTH, SEED = 48, 96, 3
LONG, TEXTS = 512, 16
STRENGTH = {"out": 0.26, "mlp": 0.16}


def digit_pairs(digit: int, length: int = LENGTH, count: int = COUNT) -> Pairs:
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


def measure() -> Measured:
    with threads(1):
        pairs = digit_pairs(0)
        found = scans(pairs)
        numbers = peaks(pairs, found)
        second = digit_pairs(1)
        others = {f"second_digit_{key}": value for key, value in peaks(second, scans(second)).items()}
        holds = (
            numbers["mean_span"] > 0.5
            and numbers["farthest_from_1_of_all_tokens"] < 1e-4
            and numbers["peak_over_ffn"] >= 0.1
        )
        return Measured(holds, numbers | others | iri(found))


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
)
