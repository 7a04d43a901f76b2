"""Zoology's claim, on associative recall: two layers of attention look a key up; two gated long convolutions lag.

Both models are the same but for the one line that mixes tokens: embedding, then twice x + out(mix(conv(qkv(norm x)))),
then logits; no MLP, no positions, a causal short convolution over three tokens on q, k and v, which is what lets a
value stand beside its key.

    attention            softmax(q kᵀ / √C) v                          causal, one head
    gated convolution    q ⊙ (h ∗ (k ⊙ v)),  h [C, N] learned          Hyena's operator of order two, explicit filters

Attention compares tokens by content, so its width does not depend on N; the filters h are the same for every text, so
the convolution has to keep all pairs apart in its channels. The learning rate is swept for each of the two, or the gap
would be an artefact. Nor is it one of stopping early: run once for 1,200 steps at the same three rates, the convolution
reaches 0.08; it does learn, 0.35 of 4 pairs in 64 tokens after 1,500 steps at 1e-2 (chance is 0.03).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.claims.lab import count_parameters, right_answers, seeded, sweep, threads, trained
from regard.core.claim import Claim, Measured
from regard.tasks.zoology_mqar import mqar

VOCAB, LENGTH, PAIRS = 64, 128, 16
WIDTH, LAYERS = 64, 2
STEPS, BATCH, TESTED = 200, 32, 512
RATES = (3e-3, 1e-2, 3e-2)


class Attention(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], is_causal=True)[:, 0]


class GatedConvolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        age = torch.arange(LENGTH) / LENGTH
        # channels remember from long to short
        decay = torch.exp(-torch.logspace(-1, 2, WIDTH)[:, None] * age)
        self.filter = nn.Parameter(torch.randn(WIDTH, LENGTH) * decay * LENGTH**-0.5)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n = 2 * LENGTH  # room for the tail, so that nothing wraps round to earlier tokens
        spectrum = torch.fft.rfft((k * v).mT, n) * torch.fft.rfft(self.filter, n)
        return q * torch.fft.irfft(spectrum, n)[..., : q.shape[1]].mT


class Layer(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(WIDTH), kind()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.short = nn.Conv1d(3 * WIDTH, 3 * WIDTH, 3, padding=2, groups=3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(x))  # [B, N, 3C]
        qkv = qkv + self.short(qkv.mT)[..., : x.shape[1]].mT
        return x + self.out(self.mix(*qkv.chunk(3, dim=-1)))


def train(kind: type[nn.Module], rate: float, steps: int = STEPS) -> float:
    """Accuracy over the queries of unseen examples, after `steps` steps of AdamW on fresh examples."""
    with seeded(0):
        body = [Layer(kind) for _ in range(LAYERS)]
        model = nn.Sequential(nn.Embedding(VOCAB, WIDTH), *body, nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCAB))
    inputs, labels = mqar(VOCAB, LENGTH, PAIRS, BATCH * steps, seed=0)
    trained(model, list(zip(inputs.split(BATCH), labels.split(BATCH), strict=True)), rate)
    inputs, labels = mqar(VOCAB, LENGTH, PAIRS, TESTED, seed=1)
    return right_answers(model, inputs, labels, BATCH)[labels >= 0].float().mean().item()


def measure() -> Measured:
    # the matrices are small: two threads that share two busy cores are many times slower
    with threads(1):
        by_rate = {
            kind: list(sweep(RATES, lambda rate, kind=kind: train(kind, rate)).values())
            for kind in (Attention, GatedConvolution)
        }
    attention, convolution = (max(accuracies) for accuracies in by_rate.values())
    numbers = {
        "attention": attention,
        "gated_convolution": convolution,
        "gap_points": 100 * (attention - convolution),
        "attention_by_rate": by_rate[Attention],
        "gated_convolution_by_rate": by_rate[GatedConvolution],
        "parameters": [count_parameters(Layer(kind)) for kind in by_rate],
    }
    parts = {"attention": attention >= 0.95, "gap": attention - convolution >= 0.20}
    return Measured.by(parts, numbers)


CLAIM = Claim(
    name="zoology_mqar",
    statement=(
        "at width 64 and equal steps two layers of attention solve associative recall (128 tokens, 16 pairs, 64 "
        "words) while two layers of gated long convolution lag clearly"
    ),
    bound="accuracy of attention >= 0.95 and at least 20 points above gated convolution, each the best of 3 rates",
    measure=measure,
)
