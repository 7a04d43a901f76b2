"""Uni-Encoder's claim, on a random encoder: scores follow the candidates, and one pass does for sixteen.

The encoder has layers of this package's own attention with the page's mask and rotary positions; a candidate's score is
a linear map of the mean of its last states. The cross-encoder has the same weights and reads the context with each
candidate, all sixteen in one batch, which is its fast way. Time is the median of the rounds' own ratios.
"""

import torch
from torch import Tensor, nn

from regard.claims.lab import difference, generator, paired_ratios, seeded, threads
from regard.core.claim import Claim, Measured
from regard.core.roles import Roles
from regard.nn.attention import Attention
from regard.nn.layers import RMSNorm, SwiGLU

CONTEXT, CANDIDATES, LENGTH = 256, 16, 16
WIDTH, HEADS, LAYERS, VOCAB, ROUNDS = 128, 4, 4, 1000, 15


class Encoder(nn.Module):
    """Scores [B, C] of the candidates in rows of a context and C candidates."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.score = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, 1)
        self.attention = nn.ModuleList(
            Attention(WIDTH, HEADS, pattern="self", positions="uni_encoder") for _ in range(LAYERS)
        )
        self.mlp = nn.ModuleList(SwiGLU(WIDTH, 4 * WIDTH) for _ in range(LAYERS))
        self.norms = nn.ModuleList(RMSNorm(WIDTH) for _ in range(2 * LAYERS + 1))

    def forward(self, context: Tensor, candidates: Tensor) -> Tensor:
        """context [B, N], candidates [B, C, n]."""
        count, length = candidates.shape[1:]
        text = torch.full(context.shape[1:], -1)
        roles = Roles(candidate=torch.cat([text, torch.arange(count).repeat_interleave(length)]))
        x = self.embed(torch.cat([context, candidates.flatten(1)], dim=1))
        for i in range(LAYERS):
            x = x + self.attention[i](self.norms[2 * i](x), roles=roles)[0]
            x = x + self.mlp[i](self.norms[2 * i + 1](x))
        last = self.norms[-1](x)[:, context.shape[1] :].unflatten(1, (count, length))
        return self.score(last.mean(2))[..., 0]


@torch.inference_mode()
def measure() -> Measured:
    g = generator()
    with seeded(0):
        encoder = Encoder().eval()
    context = torch.randint(VOCAB, (1, CONTEXT), generator=g)
    candidates = torch.randint(VOCAB, (1, CANDIDATES, LENGTH), generator=g)
    scores = encoder(context, candidates)
    moved = []
    for _ in range(8):
        order = torch.randperm(CANDIDATES, generator=g)
        moved.append(difference(encoder(context, candidates[:, order]), scores[:, order]))
    fewer = difference(encoder(context, candidates[:, :8]), scores[:, :8])

    def crossed() -> Tensor:
        return encoder(context.expand(CANDIDATES, -1), candidates.transpose(0, 1))

    with threads(1):
        ratios = paired_ratios(lambda: encoder(context, candidates), crossed, ROUNDS)
    numbers = {
        "largest_change_of_a_score_by_permutation": max(moved),
        "spread_of_the_scores": scores.std().item(),
        "change_of_a_score_with_half_of_the_candidates": fewer,
        "speed_up": ratios.median,
        "speed_up_quartiles": list(ratios.spread),
        "seconds_uni_and_cross": list(ratios.medians),
    }
    return Measured.by({"scores permute": max(moved) < 1e-5, "time": ratios.median >= 3}, numbers)


CLAIM = Claim(
    name="uni_encoder",
    statement=(
        "permuting the candidates permutes their scores exactly, and one pass over a context and 16 candidates costs "
        "far less than 16 passes of a cross-encoder"
    ),
    bound=(
        "largest difference of a score after permutation < 1e-5; speed-up >= 3 with a context of 256 tokens and 16 "
        "candidates of 16"
    ),
    measure=measure,
)
