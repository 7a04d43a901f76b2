"""VHR's claim, on the shipped language model: a span of context plays the image.

The context states a token that the model's weights speak against (`claims/contradicted_text.py`). Gain is how much the
log-odds of the stated token against the weights' own rise at the next token. Louder, by the paper's factor of 2, are
the half of the heads with the highest VHD, or as many of each layer drawn at random, anew for each text, 20 times.

The paper takes the second and the last 14 layers of 32: of four, the second and the last two. Controls: the other half
of the heads, all of them, all four layers, and heads chosen without zeroing outliers. A first look was at seed 0.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from regard.claims.contradicted_text import Contradicted, contradicted, next_logp
from regard.claims.lab import generator, threads
from regard.core import Method
from regard.core.claim import Claim, Measured
from regard.methods.steering import vhd_vhr as page
from regard.ops.steered import Steered

TEXTS, SEED, DRAWS = 160, 11, 20
SETTINGS: dict[str, Any] = dict(last=2, hides="context")


def method(**settings: Any) -> Method:
    return Method("vhd_vhr", page.METHOD, page.Config(**{**SETTINGS, **settings}))


def instead(z: Any) -> Method:
    """Heads made louder in another way, in the same layers."""
    return replace(method(), page=replace(page.METHOD, z=z, streams=None, prepare=None))


def randomly(draw: int) -> Method:
    def steer(at: Steered, z: Tensor, cfg: page.Config) -> Tensor:
        drawn = torch.rand(z.shape[:2], generator=generator(1000 * draw + at.layer))
        return page.louder(z, page.factors(drawn, cfg.strength))

    return instead(steer)


def everyone() -> Method:
    return instead(lambda at, z, cfg: page.louder(z, torch.tensor(cfg.strength)))


def others() -> Method:
    """The heads that VHR leaves as they are, instead of those that it takes."""

    def steer(at: Steered, z: Tensor, cfg: page.Config) -> Tensor:
        factor = page.factors(page.divergence(z[:, :, -1], at.memory[:, at.layer]), cfg.strength)
        return page.louder(z, 1 + cfg.strength - factor)

    return replace(method(), page=replace(page.METHOD, z=steer))


def error(x: Tensor) -> float:
    return (x.std() / len(x) ** 0.5).item()


def gains(texts: Contradicted) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-odds of the model as it is [P], and the gain of each method; of "random" [draws, P]."""
    base = texts.log_odds(next_logp(None, texts.ids))

    def gain(chosen: Method) -> Tensor:
        return texts.log_odds(next_logp(chosen, texts.ids, texts.roles)) - base

    named = {
        "top": method(), "others": others(), "all_heads": everyone(), "all_layers": method(last=4),
        "with_outliers": method(outliers=False),
    }  # fmt: skip
    found = {name: gain(chosen) for name, chosen in named.items()}
    return base, {**found, "random": torch.stack([gain(randomly(draw)) for draw in range(DRAWS)])}


def measure() -> Measured:
    with threads(1):
        texts = contradicted(TEXTS, SEED)
        base, found = gains(texts)
        plain, neutral = (next_logp(m, texts.ids, texts.roles) for m in (None, method(strength=1.0)))
        without = texts.log_odds(next_logp(None, texts.alone))
        top, random = found["top"], found["random"]
        apart = top - random.mean(0)
        draws = random.mean(1)
        lead, over_draws, over_texts = apart.mean().item(), error(draws), error(apart)
        identical = torch.equal(plain, neutral)
        numbers = {
            "log_odds_without_context": without.mean().item(),
            "log_odds": base.mean().item(),
            **{f"gain_{name}": x.mean().item() for name, x in found.items()},
            "gain_random_most": draws.max().item(),
            "lead": lead,
            "lead_interval_over_texts": [lead - 1.96 * over_texts, lead + 1.96 * over_texts],
            "standard_error_over_draws": over_draws,
            "standard_error_over_texts": over_texts,
            "texts_where_top_leads": (apart > 0).double().mean().item(),
            "stated_preferred": [(base + x > 0).double().mean().item() for x in (0 * base, top, random)],
            "identical_at_1": int(identical),
        }
    parts = {"draws": lead >= 2 * over_draws, "texts": lead >= 2 * over_texts, "identity": identical}
    return Measured.by(parts, numbers)


CLAIM = Claim(
    name="vhd_vhr",
    statement="where a context contradicts what a language model has learnt, making the half of its heads louder whose "
    "output depends most on the context raises the log-odds of what the context states more than random halves do",
    bound="mean gain of the half with the highest VHD - mean gain of 20 random halves >= 2 standard errors, over the "
    "draws and over the texts; a factor of 1 leaves logits as they are, to the bit",
    measure=measure,
)
