"""When attention sinks emerge: in trained softmax models, not before training, and not with sigmoid attention.

    α_k     mean over queries i >= k of the weight A_ik                   of one head in one text of T = 64 tokens
    Sink_k  share of layers and heads whose α_k exceeds 0.3, then its mean over texts

The threshold comes before the means, so a head counts in the texts where it has a sink. Weights are those of the pages,
asked for with the identity as values. Sigmoid weights do not sum to one: a row is divided by its sum for the metric, as
in the paper. The learned key of `key_bias_attention` is no token; what it takes is counted by itself.

The models are two layers of four heads with rotary positions, trained on sources of Python's standard library in the
tokens of the shipped model, of which all but the 510 most frequent are one. 70% of the training texts repeat a passage
of 12 to 39 tokens until they are full: that is what makes heads which look for an earlier occurrence within so few
steps, and such a head has nothing to look for in a text without repeats. Every text begins with the same token, so that
one layer can tell the first place. Sinks are counted on texts without repeats: the held-out text, and random tokens,
which have nothing in common with it but their first place.

The setting was chosen on softmax models alone, by whether they have a sink at all. There is none after 2,500 steps of
AdamW or 900 of Muon without repeated texts, though losses fall; with them α_1 of one or two heads of the last layer
grows slowly and passes 0.3 after 1,200 to 1,500 steps. So Sink_1 here is that of one head of eight, from one seed. The
learned key has no α above 0.3 in any head either: that the first token is free is measured, where its weight goes is
not.
"""

import sysconfig
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW

from regard import catalog
from regard.claims.lab import generator, mean, mean_loss, seeded, threads, token_loss
from regard.core.call import Call
from regard.core.claim import Claim, Measured
from regard.models.shipped import load_shipped
from regard.ops.rotary import rotate
from regard.tasks.corpus import encode, held_out
from regard.train.loop import by_rate, fit

T, SINK = 64, 0.3
WIDTH, HEADS, LAYERS, INNER = 64, 4, 2, 192
WORDS, READ, PIECE = 512, 3_000_000, 1000  # of the sources: characters read, characters encoded at a time
OTHER, FIRST = WORDS - 2, WORDS - 1
STEPS, BATCH, RATE, REPEATED, SHORTEST, LONGEST = 2400, 12, 3e-2, 0.7, 12, 39
TESTED, SEED = 100, 0
SIDES: dict[str, dict[str, Any]] = {
    "softmax": {},
    "sigmoid_attention": {"bias": 0.0},
    "key_bias_attention": {},
}
Batch = tuple[Tensor, Tensor]


# texts


@cache
def texts() -> tuple[Tensor, Tensor]:
    """(tokens of the sources, of the held-out text), numbered from the most frequent one of the sources."""
    tokenizer = load_shipped("lm")[1]
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    sources = "\n".join(path.read_text("utf8", errors="ignore") for path in paths)[:READ]
    train, held = (
        torch.tensor(
            [i for at in range(0, len(text), PIECE) for i in encode(tokenizer, text[at : at + PIECE])]
        )
        for text in (sources, held_out().text)
    )
    number = torch.full((tokenizer.vocab_size,), OTHER)
    number[train.bincount(minlength=len(number)).argsort(descending=True)[:OTHER]] = torch.arange(OTHER)
    return number[train], number[held]


def drawn(ids: Tensor, count: int, g: torch.Generator, repeated: float = 0.0) -> Batch:
    """Inputs and labels [count, T]; a share of the texts repeats what it begins with."""
    start, place = torch.randint(len(ids) - T, (count, 1), generator=g), torch.arange(T)
    period = torch.randint(SHORTEST, LONGEST + 1, (count, 1), generator=g)
    again = torch.rand(count, 1, generator=g) < repeated
    labels = ids[start + torch.where(again, place % period, place)]
    return F.pad(labels[:, :-1], (1, 0), value=FIRST), labels


def natural() -> Batch:
    return drawn(texts()[1], TESTED, generator(7))


def random() -> Tensor:
    """[TESTED, T]"""
    return F.pad(torch.randint(OTHER, (TESTED, T - 1), generator=generator(8)), (1, 0), value=FIRST)


# models


class Layer(nn.Module):
    """x + out(attend(norm x)), then y + down(silu(gate) · up) of its norm."""

    def __init__(self, name: str) -> None:
        super().__init__()
        page: Any = catalog.get(name)
        self.page = page
        self.cfg = page.configure(**SIDES[name])
        dims = {
            "heads": HEADS,
            "kv_heads": HEADS,
            "key": WIDTH // HEADS,
            "value": WIDTH // HEADS,
            "width": WIDTH,
        }
        learned = page.init(self.cfg, dims) if page.init is not None else {}
        self.learned = nn.ParameterDict(learned)
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(2))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 2 * INNER, bias=False), nn.Linear(INNER, WIDTH, bias=False)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (
            t.unflatten(2, (HEADS, -1)).transpose(1, 2) for t in self.qkv(self.norms[0](x)).chunk(3, -1)
        )
        place = torch.arange(x.shape[1]).expand(len(x), -1)
        return rotate(q, place, 1e4), rotate(k, place, 1e4), v

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.page.fast(q, k, v, self.cfg, Call(params=dict(self.learned)))[0]

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.out(self.attend(*self.heads(x)).transpose(1, 2).flatten(2))
        gate, up = self.up(self.norms[1](x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)

    def weights(self, x: Tensor) -> Tensor:
        """[B, H, N, N], the mechanism's own."""
        q, k, _ = self.heads(x)
        return self.attend(q, k, torch.eye(x.shape[1]).expand(len(x), HEADS, -1, -1))


def model_of(name: str, seed: int) -> nn.Sequential:
    """Embedding, layers, norm, logits; matrices as the paper's code draws them."""
    with seeded(seed):
        head = [nn.RMSNorm(WIDTH), nn.Linear(WIDTH, WORDS, bias=False)]
        model = nn.Sequential(nn.Embedding(WORDS, WIDTH), *(Layer(name) for _ in range(LAYERS)), *head)
        for module in model.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=(0.4 / WIDTH) ** 0.5)
        nn.init.normal_(model[0].weight, std=0.02)
    return model


def trained(model: nn.Sequential, seed: int) -> nn.Sequential:
    """Muon for the layers' matrices and AdamW for the rest, their rates up in 5% of the steps, then down."""
    # torch has it from 2.9 on
    from torch.optim import Muon

    matrices = [m.weight for m in model[1:-2].modules() if isinstance(m, nn.Linear)]
    rest = [p for p in model.parameters() if all(p is not m for m in matrices)]
    muon = Muon(matrices, RATE, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adam = AdamW(rest, RATE / 2, betas=(0.9, 0.95), weight_decay=0.1)
    set_rates, g = plateau(adam, STEPS), generator(seed)

    def step_rest(step: int, loss: float) -> None:
        set_rates(step)
        adam.step()
        adam.zero_grad()

    def loss_at(step: int) -> Tensor:
        return token_loss(model, *drawn(texts()[0], BATCH, g, REPEATED))

    fit(muon, loss_at, STEPS, schedule=plateau, after_step=step_rest)
    return model


def rate_at(peak: float, step: int, steps: int) -> float:
    done = step / steps
    return peak * min(1, done / 0.05, max(0.05, (1 - done) / 0.4))


plateau = by_rate(rate_at)


# sinks


@torch.no_grad()
def weights(model: nn.Sequential, inputs: Tensor) -> Tensor:
    """[B, layers, H, T, T]"""
    x, each = model[0](inputs), []
    layers: list[Any] = list(model)[1:-2]
    for layer in layers:
        each.append(layer.weights(x))
        x = layer(x)
    return torch.stack(each, dim=1)


def sinks(a: Tensor, normalise: bool) -> list[float]:
    """Sink_1, Sink_2, ... in % of weights [B, layers, H, T, T]."""
    a = a / a.sum(-1, keepdim=True) if normalise else a
    alpha = a.sum(-2) / torch.arange(T, 0, -1)
    return [100 * share for share in (alpha > SINK).double().mean((0, 1, 2)).tolist()]


def findings(name: str, model: nn.Sequential) -> dict[str, float]:
    """Sink_1 as the mean over natural and random texts, the most that any later place has, the loss."""
    normalise, both = name == "sigmoid_attention", [weights(model, x) for x in (natural()[0], random())]
    by_text = [sinks(a, normalise) for a in both]
    found = {
        "sink_1": mean(share[0] for share in by_text),
        "sink_1_natural": by_text[0][0],
        "sink_1_random": by_text[1][0],
        "sink_most_elsewhere": max(max(share[1:8]) for share in by_text),
        "alpha_1_most": (sums(both[0], normalise)).max().item(),
        "loss": mean_loss(model, [natural()]),
    }
    if name == "key_bias_attention":
        spent = 1 - torch.cat(both).sum(-1)  # [B, layers, H, T] on the learned key
        found["sink_on_the_key"] = 100 * (spent.mean(-1) > SINK).double().mean().item()
        found["share_on_the_key_most"] = spent.mean((0, 3)).max().item()
    return found


def sums(a: Tensor, normalise: bool) -> Tensor:
    """α_1 of each head, its mean over texts [layers, H]."""
    a = a / a.sum(-1, keepdim=True) if normalise else a
    return a[..., 0].mean((0, 3))


def measure() -> Measured:
    numbers: dict[str, Any] = {}
    with threads(1):
        for name in SIDES:
            model = model_of(name, SEED)
            before = findings(name, model)
            after = findings(name, trained(model, SEED))
            numbers[f"{name}_sink_1_at_start"] = before["sink_1"]
            numbers |= {f"{name}_{key}": value for key, value in after.items()}
    softmax, sigmoid, key = (numbers[f"{name}_sink_1"] for name in SIDES)
    start = numbers["softmax_sink_1_at_start"]
    parts = {
        "a sink with softmax": softmax > 0,
        "not with sigmoid attention": softmax >= 3 * sigmoid,
        "not before training": softmax >= 3 * start,
        "less beside a key": key <= 0.5 * softmax,
    }
    return Measured.by(parts, numbers)


CLAIM = Claim(
    name="attention_sink_emergence",
    statement=(
        "in tiny language models trained on text of the standard library the first token is a sink far more often than "
        "before training with softmax, almost never with sigmoid attention without normalisation, and at most half as "
        "often where a learned key with a value of zero stands beside the tokens"
    ),
    bound=(
        "Sink_1 (T = 64, threshold 0.3, mean over natural and random text) of softmax > 0, >= 3 times that of sigmoid "
        "attention and >= 3 times that before training; with a key bias <= 0.5 times that of softmax"
    ),
    measure=measure,
)
