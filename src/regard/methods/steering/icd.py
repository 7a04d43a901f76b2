"""ICD, instruction contrastive decoding: decoding away from what the model says after a disturbing instruction.

    ℓ' = (1 + α) ℓ(prompt) - α ℓ(disturbance, prompt)        only tokens with ℓ >= max ℓ + log β stay

A disturbance such as "you are a confused object detector" makes a model hallucinate more, and what it adds is taken
away. Its ids depend on the tokenizer, so there is no default: `prefix` stands after the prompt's first token.

>>> import torch
>>> given = {"main": torch.tensor([[2.0, 1.5, -3.0]]), DISTURBED: torch.tensor([[3.0, 1.0, 0.0]])}
>>> logits(None, given, Config(prefix=(5, 6)))  # 2·2 - 3, 2·1.5 - 1; -3 < 2 + log 0.1 = -0.303
tensor([[1., 2., -inf]])
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.core import Card, require
from regard.kinds.steering import SteeringPage
from regard.ops.steered import Stream, contrasted

DISTURBED = "disturbed"


@dataclass(frozen=True)
class Config:
    strength: float = 1.0  # α
    cut: float = 0.1  # β; 0 keeps every token
    prefix: tuple[int, ...] = ()  # ids of the disturbance, after the prompt's first token

    def __post_init__(self) -> None:
        require(self.strength >= 0, "strength >= 0", strength=self.strength)
        require(0 <= self.cut <= 1, "0 <= cut <= 1", cut=self.cut)
        require(all(i >= 0 for i in self.prefix), "ids >= 0", prefix=self.prefix)


def streams(cfg: Config) -> tuple[Stream, ...]:
    if not cfg.strength:
        return ()
    rule = "a disturbance: prefix=ids of a misleading instruction in the model's own tokenizer"
    require(len(cfg.prefix) > 0, rule, prefix=cfg.prefix)
    return (Stream(DISTURBED, prefix=tuple(cfg.prefix)),)


def logits(at: Any, logits: Mapping[str, Tensor], cfg: Config) -> Tensor:
    return contrasted(logits["main"], logits.get(DISTURBED, logits["main"]), cfg.strength, cfg.cut)


def measure(said: Tensor, disturbed: Tensor, cfg: Config) -> Tensor:
    """[B, V] probabilities of the next token from what both passes say [B, V]."""
    return logits(None, {"main": said, DISTURBED: disturbed}, cfg).softmax(-1)


def reference(said: Tensor, disturbed: Tensor, cfg: Config) -> Tensor:
    """Token by token."""
    rows = []
    for row, other in zip(said.tolist(), disturbed.tolist()):
        bar = max(row) + math.log(cfg.cut) if cfg.cut else -math.inf
        says = {t: x + cfg.strength * (x - y) for t, (x, y) in enumerate(zip(row, other)) if x >= bar}
        top = max(says.values())
        total = math.fsum(math.exp(x - top) for x in says.values())
        rows.append([math.exp(says[t] - top) / total if t in says else 0.0 for t in range(len(row))])
    return torch.tensor(rows, dtype=torch.float64)


def cases(seed: int) -> Iterable[tuple]:
    """Defaults; one word; float32; no cut; no strength; equal logits at the cut."""
    g = torch.Generator().manual_seed(seed)

    def drawn(batch: int, words: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        return [2 * torch.randn(batch, words, generator=g, dtype=dtype) for _ in range(2)]

    yield *drawn(3, 9), Config(prefix=(7,))
    yield *drawn(1, 1), Config()
    yield *drawn(2, 5, torch.float32), Config(strength=0.5)
    yield *drawn(2, 5), Config(cut=0.0, strength=2.0)
    yield *drawn(2, 5), Config(strength=0.0)
    said, other = drawn(2, 6)
    yield said.round(), other, Config(cut=1.0)


METHOD = SteeringPage(
    config=Config,
    streams=streams,
    logits=logits,
    measure=measure,
    reference=reference,
    cases=cases,
    test_settings=({"prefix": (5, 7, 11)},),
    standard=False,
    card=Card(
        title="ICD",
        paper="Mitigating Hallucinations in Large Vision-Language Models with Instruction Contrastive Decoding",
        year=2024,
        idea="decode away from what the model says when a disturbing instruction stands before the prompt",
        cost="a second pass at every step, with its own cache",
        needs=("decoder-lm", "ids of a disturbing instruction"),
        lineage=("vcd", "contrastive decoding"),
        neutral={"strength": 0.0, "cut": 0.0},
        caveat="the mixture, α = 1 and β = 0.1 are the released code's; a public reimplementation takes "
        "ℓ - λ ℓ_disturbed with λ = 1, which no finite α gives (λ = α / (1 + α), at a temperature). In InstructBLIP "
        "the released disturbance goes to the Q-Former alone, in LLaVA it takes the system prompt's place; here it "
        "stands after the first token. An empty prefix is refused unless strength is 0",
    ),
)
