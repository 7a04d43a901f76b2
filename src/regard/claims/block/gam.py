"""GAM's claim: a layer without attention costs linear time, wins at long N, and loses little on text.

    time     a training step (forward and backward) of one layer of width 192, 512 slots, against a layer of the same
             width with causal SDPA in three heads and the same FFN; medians of alternating runs, one thread. The
             process keeps freed memory meanwhile, as in `vssd`
    loss     characters of the documentation text that is shipped, contexts of 256, a tenth held out. Both models are
             token and position embeddings, three layers, a norm and the tied head; a bank of twice the width makes a
             GAM layer as large as a transformer's, 12 C² and a little. The transformer has rotary positions as well:
             with learned ones alone, as in the paper, it is still at 2.5 nats after 1,000 steps. Same batches, the
             best of two learning rates each
    recall   the same GAM on associative recall (128 tokens, 16 pairs): nothing but its convolution moves between
             tokens, so three layers reach six tokens back, and what is asked for lies further away

The loss says that text of this kind asks for a context of few characters before it asks for more, and that the
convolution sees them at once where attention must learn to: 150 steps favour it. After 1,000 steps at 3e-3 the two
stood at 1.39 and 1.45 nats. What it cannot learn shows in `recall`.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.catalog import method
from regard.claims.lab import (
    count_parameters,
    generator,
    keep_freed_memory,
    mean_loss,
    median_times,
    right_answers,
    seeded,
    sweep,
    threads,
    trained,
)
from regard.core.call import Call
from regard.core.claim import Claim, Measured
from regard.tasks import held_out
from regard.tasks.zoology_mqar import mqar

TIMED_WIDTH, SHORT, LONG, RUNS = 192, 2048, 8192, 7
WIDTH, LAYERS, CONTEXT = 96, 3, 256
STEPS, BATCH, RATES = 150, 8, (3e-3, 6e-3)
VOCAB, LENGTH, PAIRS, RECALL_STEPS = 64, 128, 16, 100


class Gam(nn.Module):
    def __init__(self, width: int, slots: int) -> None:
        super().__init__()
        self.page = method("gam").page
        self.cfg = self.page.config(slots=slots)
        self.learned = nn.ParameterDict(self.page.init(self.cfg, {"width": width, "heads": 1}))

    def forward(self, x: Tensor) -> Tensor:
        return self.page.fast(x, self.cfg, Call(params=dict(self.learned.items())))[0]


def rotated(x: Tensor) -> Tensor:
    """Rotary positions of queries or keys [..., N, D]."""
    n, d = x.shape[-2:]
    angle = torch.arange(n)[:, None] * 10_000.0 ** (-torch.arange(0, d, 2) / d)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], dim=-1)


class Attention(nn.Module):
    def __init__(self, width: int, head: int, rotary: bool) -> None:
        super().__init__()
        self.head, self.rotary = head, rotary
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.ffn = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.ln_1(x)).unflatten(-1, (3, -1, self.head)).permute(2, 0, 3, 1, 4)
        q, k = (rotated(q), rotated(k)) if self.rotary else (q, k)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.ffn(self.ln_2(x))


class Decoder(nn.Module):
    def __init__(self, layer: Callable[[], nn.Module], vocab: int, length: int) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(vocab, WIDTH), nn.Embedding(length, WIDTH)
        for table in (self.token, self.position):
            nn.init.normal_(table.weight, std=0.06)
        self.layers = nn.Sequential(*(layer() for _ in range(LAYERS)), nn.LayerNorm(WIDTH))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token(ids) + self.position.weight[: ids.shape[1]]
        return self.layers(x) @ self.token.weight.mT


MAKERS = {"gam": lambda: Gam(WIDTH, 2 * WIDTH), "transformer": lambda: Attention(WIDTH, 32, rotary=True)}


def new_decoder(name: str, vocab: int, length: int) -> Decoder:
    with seeded(0):
        return Decoder(MAKERS[name], vocab, length)


def texts() -> tuple[int, Tensor, Tensor]:
    """(how many characters there are, ids to train on, ids held out), the last tenth of every ten thousand."""
    text = held_out().text
    known = {c: i for i, c in enumerate(sorted(set(text)))}
    ids = torch.tensor([known[c] for c in text])[: len(text) // 10_000 * 10_000].view(-1, 10_000)
    return len(known), ids[:, :9000].flatten(), ids[:, 9000:].flatten()


def windows(ids: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    cut = ids[starts[:, None] + torch.arange(CONTEXT + 1)]
    return cut[:, :-1], cut[:, 1:]


def losses(name: str) -> list[float]:
    """Loss on the held-out text in nats per character, for each learning rate."""
    vocab, ids, held = texts()
    g = generator()
    batches = [
        windows(ids, torch.randint(len(ids) - CONTEXT - 1, (BATCH,), generator=g)) for _ in range(STEPS)
    ]
    x, y = windows(held, torch.arange(0, len(held) - CONTEXT - 1, CONTEXT))

    def loss(rate: float) -> float:
        model = trained(new_decoder(name, vocab, CONTEXT), batches, rate)
        return mean_loss(model, zip(x.split(8), y.split(8), strict=True))

    return list(sweep(RATES, loss).values())


def recall() -> float:
    """GAM's accuracy on associative recall; one of 32 values by chance."""
    x, y = mqar(VOCAB, LENGTH, PAIRS, 32 * RECALL_STEPS, seed=0)
    model = trained(new_decoder("gam", VOCAB, LENGTH), list(zip(x.split(32), y.split(32))), RATES[0])
    x, y = mqar(VOCAB, LENGTH, PAIRS, 256, seed=1)
    return right_answers(model, x, y, batch=32)[y >= 0].float().mean().item()


def step_times() -> dict[str, float]:
    with seeded(0):
        layers = {"gam": Gam(TIMED_WIDTH, 512), "sdpa": Attention(TIMED_WIDTH, 64, rotary=False)}

    def arguments(side: tuple[str, int]) -> tuple[nn.Module, Tensor]:
        name, n = side
        return layers[name], torch.randn(1, n, TIMED_WIDTH, generator=generator(), requires_grad=True)

    def step(layer: nn.Module, x: Tensor) -> None:
        layer(x).square().mean().backward()

    keep_freed_memory()
    sides = dict.fromkeys((("gam", SHORT), ("gam", LONG), ("sdpa", LONG)), step)
    return {
        f"{name}_{n}_ms": 1000 * t for (name, n), t in median_times(sides, RUNS, arguments=arguments).items()
    }


def measure() -> Measured:
    with threads(1):
        times, by_rate, recalled = step_times(), {name: losses(name) for name in MAKERS}, recall()
    gam, transformer = (min(by_rate[name]) for name in MAKERS)
    growth, against = (
        times[f"gam_{LONG}_ms"] / times[f"gam_{SHORT}_ms"],
        times[f"gam_{LONG}_ms"] / times[f"sdpa_{LONG}_ms"],
    )
    numbers = {
        **times,
        "time_8k_over_2k": growth,
        "time_over_sdpa_at_8k": against,
        "loss_gam": gam,
        "loss_transformer": transformer,
        "loss_ratio": gam / transformer,
        "loss_gam_by_rate": by_rate["gam"],
        "loss_transformer_by_rate": by_rate["transformer"],
        "parameters_of_a_layer": [count_parameters(MAKERS[name]()) for name in MAKERS],
        "recall_gam": recalled,
    }
    parts = {
        "time grows linearly": growth <= 4.6,
        "time below softmax": against < 1,
        "near the transformer": gam <= 1.03 * transformer,
    }
    return Measured.by(parts, numbers)


CLAIM = Claim(
    name="gam",
    statement=(
        "a GAM layer's step time grows linearly in N and beats a softmax layer's at 8,192 tokens, and its loss on text "
        "stays within reach of a transformer of the same size"
    ),
    bound=(
        "time(8k) / time(2k) <= 4.6, and below the SDPA layer's at 8k; loss on held-out text at N = 256 at most 3 % "
        "above the transformer's, each the best of two learning rates"
    ),
    measure=measure,
)
