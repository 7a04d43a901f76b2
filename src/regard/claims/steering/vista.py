"""VISTA's claim, on the shipped language model: a span of context plays the image.

The context states a token that the model's weights speak against and that stands nowhere else
(`claims/contradicted_text.py`): p < 0.001 without the context. Gain is how much its log probability rises at the next
token when the last token is steered at every layer, by λ of the paper's; logits are not augmented where λ is judged.

Controls: random vectors, and those of another text, as long as the text's own at every layer. Beside it: augmentation
alone, both together, and steering at every token of the prompt, as the released code does.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from regard.claims.contradicted_text import Contradicted, contradicted, next_logp
from regard.claims.lab import difference, generator, threads
from regard.core import Method
from regard.core.claim import Claim, Measured
from regard.methods.steering import vista as page
from regard.ops.steered import Steered

TEXTS, SEED, DRAWS = 160, 12, 5
STRENGTHS = (0.05, 0.1, 0.17)


def method(strength: float, mix: float = 0.0, prompt: bool = False) -> Method:
    cfg = page.Config(strength=strength, mix=mix, prompt=prompt, hides="context")
    return Method("vista", page.METHOD, cfg)


def along(strength: float, directions: Any) -> Method:
    """Steered along directions(v), as long as v, [B, layers, d]."""

    def prepare(runs: Any, at: Steered, cfg: page.Config) -> Tensor:
        v = page.prepare(runs, at, cfg)
        other = directions(v)
        return other * (v.norm(dim=-1, keepdim=True) / other.norm(dim=-1, keepdim=True))

    return replace(method(strength), page=replace(page.METHOD, prepare=prepare))


def randomly(strength: float, draw: int) -> Method:
    return along(
        strength,
        lambda v: torch.randn(v.transpose(0, 1).shape, generator=generator(draw)).transpose(0, 1),
    )


def swapped(strength: float) -> Method:
    return along(strength, lambda v: v.roll(1, 0))


def norm_change(texts: Contradicted, strength: float) -> float:
    """The largest relative change of a state's length that steering makes, over layers and texts."""
    changes = []

    def steer(at: Steered, x: Tensor, cfg: page.Config) -> Tensor:
        changed = page.steer(at, x, cfg)
        changes.append((changed.norm(dim=-1) / x.norm(dim=-1) - 1).abs().max().item())
        return changed

    watched = replace(page.METHOD, layer_edits={"resid_post": steer})
    next_logp(replace(method(strength), page=watched), texts.ids, texts.roles)
    return max(changes)


def error(x: Tensor) -> float:
    return (x.std() / len(x) ** 0.5).item()


def measure() -> Measured:
    with threads(1):
        texts = contradicted(TEXTS, SEED)
        plain = next_logp(None, texts.ids)
        base = texts.said(plain)

        def gain(chosen: Method) -> Tensor:
            return texts.said(next_logp(chosen, texts.ids, texts.roles)) - base

        own = [gain(method(s)) for s in STRENGTHS]
        random = [torch.stack([gain(randomly(s, draw)) for draw in range(DRAWS)]).mean(0) for s in STRENGTHS]
        most = STRENGTHS[-1]
        identity = difference(plain, next_logp(method(0.0), texts.ids, texts.roles))
        changed = max(norm_change(texts, s) for s in STRENGTHS)
        apart = [a - b for a, b in zip(own, random, strict=True)]
        means = [x.mean().item() for x in own]
        numbers = {
            "log_p_without_context": texts.said(next_logp(None, texts.alone)).mean().item(),
            "log_p": base.mean().item(),
            "strengths": list(STRENGTHS),
            "gains": means,
            "gains_of_random": [x.mean().item() for x in random],
            "apart": [x.mean().item() for x in apart],
            "apart_standard_errors": [error(x) for x in apart],
            "texts_that_gain": [(x > 0).double().mean().item() for x in own],
            "gain_of_another_texts": gain(swapped(most)).mean().item(),
            "gain_at_every_token": gain(method(most, prompt=True)).mean().item(),
            "gain_of_augmentation": gain(method(0.0, 0.3)).mean().item(),
            "gain_of_both": gain(method(most, 0.3)).mean().item(),
            "norm_change": changed,
            "identity_difference": identity,
        }
    rises = 0 < means[0] < means[1] < means[2]
    beats = all(x.mean().item() > 2 * error(x) for x in apart)
    parts = {"rises": rises, "beats": beats, "norms": changed < 1e-4, "identity": identity < 1e-5}
    return Measured.by(parts, numbers)


CLAIM = Claim(
    name="vista",
    statement="turning the residual towards what a context added to it raises the log probability of a token that the "
    "context alone states, the more the stronger, and a random vector of the same length does not; lengths stay",
    bound="mean gains > 0 and growing over λ of 0.05, 0.1 and 0.17; each above that of random vectors by 2 standard "
    "errors over texts; lengths of states change by less than 1e-4; logits at λ = γ = 0 differ by less than 1e-5",
    measure=measure,
)
