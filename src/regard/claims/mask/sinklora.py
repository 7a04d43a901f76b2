"""SinkLoRA's claim, on a small model of bytes: what is lost by fine-tuning to 4 times the context within groups.

A decoder of three layers is trained on texts of 64 bytes behind a first token. Then it is tuned at 256 bytes, positions
scaled by a quarter as LongLoRA does, under three masks: full attention, S²-Attn (groups of 64, half of the heads
shifted) and SF-Attn (half of the shifted heads returned, four sinks). All are tested with full attention at 256, on
text of its own. Each side has the best of three learning rates on other held-out text, then three orders of the texts.
S²-Attn is that of the page, without the cyclic group of the first and last tokens. All weights are tuned, where the
paper has low-rank changes, norms and embeddings. The texts are Python's help topics and the shipped held-out text.

Tried once beside it, with the first order: rates between and beyond give more loss (S²-Attn 1.599 at 1.2e-3 and 1.596
at 1.7e-3, SF-Attn 1.586 and full attention 1.540 at 2.8e-3). It is the sinks that close the gap: alone they give 1.571,
returned heads alone 1.589, where S²-Attn has 1.590 and SF-Attn 1.569.
"""

from pydoc_data.topics import topics

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.claims.lab import generator, mean, seeded, threads
from regard.core.claim import Claim, Measured
from regard.core.mask import causal
from regard.methods.masks import sinklora as page
from regard.nn.layers import RMSNorm, SwiGLU
from regard.ops.rotary import rotate
from regard.tasks import held_out
from regard.train.loop import cosine, fit

SHORT, LONG, VOCAB, BEGIN = 64, 256, 128, 0
WIDTH, HEADS, LAYERS = 96, 4, 3
BASE_STEPS, BASE_ROWS, BASE_RATE = 400, 64, 3e-3
STEPS, ROWS, RATES, SEEDS = 100, 8, (1e-3, 1.4e-3, 2e-3), (0, 1, 2)
GROUPS = dict(heads=HEADS, group=LONG // 4)
SIDES = {
    "full": causal(),
    "s2": page.build(page.Config(**GROUPS, returned=0.0, sinks=0)),
    "sf": page.build(page.Config(**GROUPS)),
}


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp_norm, self.mlp = RMSNorm(WIDTH), RMSNorm(WIDTH), SwiGLU(WIDTH, 256)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor, at: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        q, k = rotate(q, at, 1e4), rotate(k, at, 1e4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.mlp_norm(x))


class Decoder(nn.Module):
    """ids [B, N], mask [1, 1 or H, N, N] -> logits [B, N, VOCAB]; positions in steps of `scale`."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(VOCAB, WIDTH), RMSNorm(WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        nn.init.normal_(self.embed.weight, std=0.02)

    def forward(self, ids: Tensor, mask: Tensor, scale: float) -> Tensor:
        x, at = self.embed(ids) * WIDTH**0.5, torch.arange(ids.shape[1])[None] * scale
        for layer in self.layers:
            x = layer(x, at, mask)
        return self.norm(x) @ self.embed.weight.T

    def loss(self, ids: Tensor, mask: Tensor, scale: float) -> Tensor:
        return F.cross_entropy(self(ids[:, :-1], mask, scale).flatten(0, 1), ids[:, 1:].flatten())


def texts() -> tuple[Tensor, Tensor, Tensor]:
    """Bytes to train on, to choose rates by, to test on: of twenty pieces of 4,096 eighteen, one and one."""
    text = held_out().text + "".join(topics[name] for name in sorted(topics))
    pieces = torch.tensor(list(text.encode("ascii", "replace"))).unfold(0, 4096, 4096)
    of = torch.arange(len(pieces)) % 20
    train = (of != 9) & (of != 19)
    return pieces[train].flatten(), pieces[of == 9].flatten(), pieces[of == 19].flatten()


def behind_the_first(ids: Tensor) -> Tensor:
    return F.pad(ids, (1, 0), value=BEGIN)


def batch(text: Tensor, rows: int, length: int, g: torch.Generator) -> Tensor:
    start = torch.randint(len(text) - length, (rows, 1), generator=g)
    return behind_the_first(text[start + torch.arange(length)])


def trained() -> Decoder:
    """The model of the short context."""
    text, g, mask = texts()[0], generator(), causal().dense(SHORT)
    with seeded(0):
        model = Decoder()
    optimizer = torch.optim.AdamW(model.parameters(), BASE_RATE, weight_decay=0.1)

    def loss_at(step: int) -> Tensor:
        return model.loss(batch(text, BASE_ROWS, SHORT, g), mask, 1.0)

    fit(optimizer, loss_at, BASE_STEPS, schedule=cosine())
    return model


def tuned(base: Decoder, side: str, rate: float, seed: int) -> Decoder:
    """The model of the long context, tuned under the mask of a side."""
    text, g, mask, model = texts()[0], generator(100 + seed), SIDES[side].dense(LONG), Decoder()
    model.load_state_dict(base.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.0)

    def loss_at(step: int) -> Tensor:
        return model.loss(batch(text, ROWS, LONG, g), mask, SHORT / LONG)

    fit(optimizer, loss_at, STEPS, schedule=cosine())
    return model


@torch.no_grad()
def full_loss(model: Decoder, text: Tensor, length: int = LONG) -> float:
    """Nats per byte with full attention."""
    ids, mask = behind_the_first(text.unfold(0, length, length)), causal().dense(length)
    return mean(model.loss(rows, mask, SHORT / length).item() for rows in ids.split(8))


@torch.no_grad()
def leaks(model: Decoder) -> tuple[int, float]:
    """(later tokens in the SF mask, change of the logits before the last token by that token)."""
    mask = SIDES["sf"].dense(LONG)
    ids = behind_the_first(texts()[2][: LONG - 1])[None]
    other = ids.clone()
    other[:, -1] = (ids[:, -1] + 1) % VOCAB
    one, two = (model(x, mask, SHORT / LONG)[:, :-1] for x in (ids, other))
    return int((mask & ~causal().dense(LONG)).sum()), (one - two).abs().max().item()


def measure() -> Measured:
    _, choose, test = texts()
    losses: dict[str, list[float]] = {}
    best: dict[str, float] = {}
    with threads(1):
        base = trained()
        for side in SIDES:
            models = {rate: tuned(base, side, rate, SEEDS[0]) for rate in RATES}
            best[side] = min(models, key=lambda rate: full_loss(models[rate], choose))
            again = [tuned(base, side, best[side], seed) for seed in SEEDS[1:]]
            losses[side] = [full_loss(model, test) for model in (models[best[side]], *again)]
        seen, changed = leaks(again[-1])
        before = [full_loss(base, test, SHORT), full_loss(base, test)]
    full, s2, sf = (mean(losses[side]) for side in SIDES)
    closed = (s2 - sf) / (s2 - full)
    numbers = {
        "share_of_the_gap_closed": closed,
        "share_by_seed": [(b - c) / (b - a) for a, b, c in zip(*losses.values(), strict=True)],
        **{f"loss_{side}": values for side, values in losses.items()},
        **{f"rate_{side}": rate for side, rate in best.items()},
        "loss_before_at_64_and_256": before,
        "later_tokens_in_the_mask": seen,
        "change_of_earlier_logits": changed,
    }
    parts = {
        "S²-Attn leaves a gap": s2 > full,
        "a part of it is closed": closed >= 0.3,
        "no later token in the mask": seen == 0,
        "none moves the logits": changed == 0,
    }
    return Measured.by(parts, numbers)


CLAIM = Claim(
    name="sinklora",
    statement=(
        "after fine-tuning to 4 times the context, shifted groups with returned heads and sinks close a part of the "
        "loss gap that S²-Attn leaves to full attention, and see no later token"
    ),
    bound=(
        "(loss_S2 - loss_SF) / (loss_S2 - loss_full) >= 0.3 on held-out text, loss_S2 > loss_full; later tokens seen "
        "under the SF mask = 0"
    ),
    measure=measure,
)
