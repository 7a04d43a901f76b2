"""Multi-query associative recall: key-value pairs, then the keys again; the label of a key is its value.

    inputs  k_1 v_1 k_2 v_2 ... k_D v_D  ·  ·  k_2  ·  k_1  ·  ·  ·  k_D  ·
    labels   -   -   -   -  ...  -   -   -  -  v_2  -  v_1  -  -  -  v_D  -        - is -100: not scored

    k_i    different tokens out of 1 .. V/2 - 1
    v_i    different tokens out of V/2 .. V - 1, so that no key is a value
    k_i    stands again at 2D + 2 s_i, the s_i different, p(s) ∝ (s + 1)^(power - 1), s = 0 .. (N - 2D)/2 - 1
    ·      filler: random tokens that are no key of this example, or 0 (`filler=False`)

where V is the vocabulary, N the length, D the pairs. With power = 0.01 a query mostly comes soon after the
pairs; power = 1 spreads them evenly. Attention solves it at a width that does not grow with N or D; a mixer
of fixed state or fixed filters needs a width that does.

In the published generator the filler comes from torch's global random numbers, so that a seed does not fix
the inputs, and may repeat a key of the example; here it is drawn from the seed and never does.

>>> inputs, labels = mqar(vocab=16, length=12, pairs=2, count=1, seed=0, filler=False)
>>> inputs
tensor([[ 3, 13,  4, 14,  3,  0,  0,  0,  4,  0,  0,  0]])
>>> labels
tensor([[-100, -100, -100, -100,   13, -100, -100, -100,   14, -100, -100, -100]])
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.core import Card, require
from regard.kinds.task import TaskPage
from regard.tasks.base import Sample, first_token


@dataclass(frozen=True)
class Config:
    vocab: int = 8192  # V; a language model is asked in ordinary tokens of its own
    length: int = 128  # N, tokens of an example; of a language model's prompt the caller says it
    pairs: int = 16  # D, keys with a value each
    power: float = 0.01  # larger: queries come later after the pairs; a language model has one, at the end
    filler: bool = True  # False: 0 between the queries; a language model always has random tokens there

    def __post_init__(self) -> None:
        check_sizes(self.vocab, self.length, self.pairs, self.power)


ROWS = 512  # examples made at once; the examples depend on it, the memory too


def check_sizes(vocab: int, length: int, pairs: int, power: float) -> None:
    require(1 <= pairs < vocab // 2, "1 <= pairs < vocab // 2", pairs=pairs, vocab=vocab)
    require(length % 2 == 0, "length is even", length=length)
    require(4 * pairs <= length, "4 * pairs <= length", pairs=pairs, length=length)
    require(power > 0, "power > 0", power=power)


def mqar(
    vocab: int, length: int, pairs: int, count: int, seed: int, power: float = 0.01, *, filler: bool = True
) -> tuple[Tensor, Tensor]:
    """Inputs and labels, both [count, length] int64; exactly `pairs` labels of a row are not -100."""
    check_sizes(vocab, length, pairs, power)
    require(count >= 1, "count >= 1", count=count)
    g = torch.Generator().manual_seed(seed)
    batches = [
        _rows(vocab, length, pairs, min(ROWS, count - i), power, filler, g) for i in range(0, count, ROWS)
    ]
    return torch.cat([inputs for inputs, _ in batches]), torch.cat([labels for _, labels in batches])


def _rows(
    vocab: int, length: int, pairs: int, rows: int, power: float, filler: bool, g: torch.Generator
) -> tuple[Tensor, Tensor]:
    half = vocab // 2
    order = torch.rand(rows, half - 1, generator=g).argsort(1) + 1
    keys, others = order[:, :pairs], order[:, pairs:]
    values = torch.rand(rows, vocab - half, generator=g).argsort(1)[:, :pairs] + half
    at = 2 * pairs + 2 * _slots((length - 2 * pairs) // 2, pairs, rows, power, g)
    inputs = torch.zeros(rows, length, dtype=torch.long)
    if filler:
        inputs = _filler(others, half, vocab, length, g)
    inputs[:, : 2 * pairs] = torch.stack([keys, values], 2).flatten(1)
    inputs.scatter_(1, at, keys)
    return inputs, torch.full_like(inputs, -100).scatter_(1, at, values)


def _slots(slots: int, pairs: int, rows: int, power: float, g: torch.Generator) -> Tensor:
    """[rows, pairs] different slots: the largest of log p plus Gumbel noise are drawn without replacement."""
    log_p = (power - 1) * torch.arange(1, slots + 1, dtype=torch.float64).log()
    noise = -torch.empty(rows, slots, dtype=torch.float64).exponential_(generator=g).log()
    return (log_p + noise).topk(pairs, dim=1).indices


def _filler(others: Tensor, half: int, vocab: int, length: int, g: torch.Generator) -> Tensor:
    """Tokens drawn evenly from the values and from the keys that this row does not use."""
    rows, unused = others.shape
    drawn = torch.randint(vocab - half + unused, (rows, length), generator=g)
    if unused == 0:
        return drawn + half
    key = others.gather(1, drawn.clamp(max=unused - 1))
    return torch.where(drawn < unused, key, drawn - unused + half)


def samples(
    cfg: Config, tokenizer: Any, length: int, count: int, seed: int, source: Any = None, *, chat: bool = False
) -> list[Sample]:
    """Questions for a language model: pairs of its own tokens, filler, and one of the keys as the last token.

    `length` and the tokens come from the call; `source` and `chat` make no difference, as nothing here is text.
    """
    vocab, head = sorted(ordinary(tokenizer)), first_token(tokenizer)
    require(
        len(head) + 2 * cfg.pairs + 1 <= length,
        "length > first tokens + 2 * pairs",
        length=length,
        pairs=cfg.pairs,
    )
    g, result = torch.Generator().manual_seed(seed), []
    for i in range(count):
        order = torch.randperm(len(vocab), generator=g).tolist()
        drawn = [vocab[j] for j in order[: 2 * cfg.pairs]]
        filler = [vocab[j] for j in order[2 * cfg.pairs :]]
        index = round(i / max(1, count - 1) * (cfg.pairs - 1))
        first = len(head) + 2 * index
        room = length - len(head) - 2 * cfg.pairs - 1
        body = [filler[j] for j in torch.randint(len(filler), (room,), generator=g).tolist()]
        prompt = [*head, *drawn, *body, drawn[2 * index]]
        answer, chance = [drawn[2 * index + 1]], 1 / cfg.pairs
        result.append(Sample(prompt, answer, (first, first + 2), depth=first / length, chance=chance))
    return result


def ordinary(tokenizer: Any) -> set[int]:
    """Ids of the vocabulary that are no special tokens."""
    return set(range(len(tokenizer))) - set(getattr(tokenizer, "all_special_ids", ()))


def generate(cfg: Config, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Inputs and labels [count, length] of a configuration."""
    return mqar(cfg.vocab, cfg.length, cfg.pairs, count, seed, cfg.power, filler=cfg.filler)


METHOD = TaskPage(
    config=Config,
    samples=samples,
    generate=generate,
    patterns=("causal_self",),
    card=Card(
        title="Multi-query associative recall (MQAR)",
        paper="Zoology: Measuring and Improving Recall in Efficient Language Models (ICLR 2024)",
        year=2023,
        idea="key-value pairs, then the keys again at power-law distances; the label of a key is its value",
        cost="none",
        state="2 pairs of tokens to remember",
        caveat="released code draws the filler from global random numbers and lets it repeat a key; here it is seeded "
        "and never does. Asked of a language model, keys and values are tokens of its vocabulary and the one key that "
        "is asked again stands at the end",
    ),
)
