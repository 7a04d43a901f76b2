"""The training of an attention-output SAE: its own loss on stored head outputs, unit directions, dead features anew."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.core import require
from regard.core.errors import present
from regard.methods.tracing.attention_output_sae import Config, Dictionary, decode, encode, loss
from regard.train.loop import Schedule, backward, fit

CHUNK = 8192  # tokens that are encoded at once; changes the memory, never the result


def train(
    z: Tensor, config: Config, steps: int, resamples: int, schedule: Schedule, seed: int
) -> tuple[Dictionary, dict[str, Any]]:
    """A dictionary of z [tokens, D] and the report of its training."""
    size = z.square().sum(-1).mean().div(z.shape[1]).sqrt()
    require(size > 0, "head outputs that are not all zero", size=float(size))
    learner = Learner(z / size, config, steps, resamples, seed)
    losses = fit(learner.optimizer, learner.loss_at, steps, schedule=schedule, clip=None,
                 gradients=learner.gradients, after_step=learner.after_step)  # fmt: skip
    w_enc, b_enc, w_dec, b_dec = (p.detach() for p in learner.dictionary)
    # ReLU commutes with a positive factor: features, b_enc and b_dec take it, directions keep their length
    dictionary = Dictionary(w_enc, b_enc * size, w_dec, b_dec * size)
    last = losses[-max(1, steps // 10) :]
    facts = {"tokens": len(z), "steps": steps, "loss": sum(last) / len(last), "resampled": learner.resampled}
    return dictionary, facts | quality(dictionary, z)


@torch.no_grad()
def quality(sae: Dictionary, z: Tensor) -> dict[str, float]:
    """Of z [tokens, D]: features that fire at a token, variance that is explained, features that never fire."""
    fired, missed = torch.zeros_like(sae.b_enc), 0.0
    for part in z.split(CHUNK):
        features = encode(sae, part)
        fired += (features > 0).sum(0)
        missed += (decode(sae, features) - part).square().sum().item()
    variance = (z - z.mean(0)).square().sum().item()
    return {
        "features": len(fired),
        "l0": fired.sum().item() / len(z),
        "explained": 1 - missed / variance,
        "dead": (fired == 0).float().mean().item(),
    }


class Learner:
    """What a training holds: the dictionary, its optimizer, and which features fired."""

    def __init__(self, z: Tensor, config: Config, steps: int, resamples: int, seed: int) -> None:
        self.z, self.config, self.draw = z, config, torch.Generator().manual_seed(seed)
        count, width = config.expansion * z.shape[1], z.shape[1]
        direction = F.normalize(torch.randn(count, width, generator=self.draw), dim=-1).to(z)
        parts = direction.clone(), z.new_zeros(count), direction, z.mean(0)
        self.dictionary = Dictionary(*(torch.nn.Parameter(p) for p in parts))
        self.optimizer = torch.optim.Adam(self.dictionary, config.rate, config.betas)
        self.fired, self.resampled = z.new_zeros(count, dtype=torch.bool), []
        self.when = {steps * (i + 1) // (2 * resamples) for i in range(resamples)}

    def some(self) -> Tensor:
        """[batch, D] tokens."""
        return self.z[torch.randint(len(self.z), (self.config.batch,), generator=self.draw).to(self.z.device)]

    def loss_at(self, step: int) -> Tensor:
        z = self.some()
        features = encode(self.dictionary, z)
        self.fired |= (features.detach() > 0).any(0)
        return loss(self.dictionary, z, features, self.config.l1)

    def gradients(self, value: Tensor, parameters: list[Tensor]) -> None:
        """Without the part that would only lengthen a direction."""
        backward(value, parameters)
        w, gradient = self.dictionary.w_dec.detach(), present(self.dictionary.w_dec.grad, "a gradient")
        gradient -= (gradient * w).sum(-1, keepdim=True) * w

    @torch.no_grad()
    def after_step(self, step: int, value: float) -> None:
        if step + 1 in self.when:
            self.resample()
        self.dictionary.w_dec.copy_(F.normalize(self.dictionary.w_dec, dim=-1))

    def resample(self) -> None:
        """Features that never fired begin anew at tokens with large errors, drawn by the error squared.

        As in the released trainer: their direction is the token's, the encoder's a fifth as long as those that fire.
        """
        dead, alive = (~self.fired).nonzero().flatten(), self.fired
        self.resampled.append(len(dead))
        z = self.some()
        error = (decode(self.dictionary, encode(self.dictionary, z)) - z).square().sum(-1)
        if len(dead) and error.max() > 0:
            at = torch.multinomial(error.square().cpu(), len(dead), replacement=True, generator=self.draw)
            direction = F.normalize(z[at.to(z.device)] - self.dictionary.b_dec, dim=-1)
            length = self.dictionary.w_enc[alive].norm(dim=-1).mean() if alive.any() else 1.0
            fresh = Dictionary(
                0.2 * length * direction, torch.zeros_like(self.dictionary.b_enc[dead]), direction, None
            )
            for p, new in zip(self.dictionary[:3], fresh, strict=False):
                p[dead] = new
                for moment in ("exp_avg", "exp_avg_sq"):
                    self.optimizer.state[p][moment][dead] = 0
        self.fired.zero_()
