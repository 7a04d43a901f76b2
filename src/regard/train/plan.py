"""What a training run is: its settings, its model, its data. All of it is data, so that a run can go on later."""

import hashlib
from dataclasses import asdict, dataclass, field
from functools import cache
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor

from regard import catalog
from regard.core import require, unknown
from regard.core.deprecation import warn
from regard.nn.backbones import RegardConfig, RegardForCausalLM
from regard.tasks.zoology_mqar import mqar

HELD_OUT = 0.1  # the last part of the text, which is not trained on


@dataclass(frozen=True)
class Plan:
    """The settings of a run. `mechanisms` is one name for all layers, or one for each.

    Batches are drawn from the seed and the number of the step, so a run that was stopped goes on as if it had not.
    `rates` are tried one after the other, each from the same start; the best on held-out data is kept.
    """

    task: str = "mqar"
    mechanisms: tuple[str, ...] = ("softmax",)
    settings: dict[str, dict] = field(default_factory=dict)
    rates: tuple[float, ...] = (3e-3, 1e-2)
    steps: int = 400
    batch: int = 32
    layers: int = 2
    width: int = 64
    heads: int = 1
    mlp: int = 0
    conv: int = 3
    rope_theta: float | None = None
    length: int = 128
    pairs: int = 16
    vocab: int = 64
    seed: int = 0
    every: int = 50
    tested: int = 512

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise unknown("training task", self.task, TASKS)
        for name in self.mechanisms:
            catalog.get(name)
        require(len(self.mechanisms) in (1, self.layers), "one mechanism, or one for every layer",
                mechanisms=self.mechanisms, layers=self.layers)  # fmt: skip
        for name in ("steps", "batch", "layers", "width", "heads", "length", "every", "tested"):
            require(getattr(self, name) >= 1, f"{name} >= 1", **{name: getattr(self, name)})
        require(
            len(self.rates) >= 1 and all(r > 0 for r in self.rates), "learning rates > 0", rates=self.rates
        )
        require(len(set(self.rates)) == len(self.rates), "every learning rate once", rates=self.rates)

    @property
    def label(self) -> str:
        return " + ".join(dict.fromkeys(self.mechanisms))

    def model(self) -> RegardForCausalLM:
        """The model at its start: the same for every rate."""
        names = self.mechanisms * (self.layers if len(self.mechanisms) == 1 else 1)
        config = RegardConfig(
            vocab_size=TASKS[self.task].vocab(self), hidden_size=self.width, num_hidden_layers=self.layers,
            num_attention_heads=self.heads, intermediate_size=self.mlp, mechanisms=list(names), settings=self.settings,
            conv=self.conv, rope_theta=self.rope_theta, tie_word_embeddings=False,
            initializer_range=self.width**-0.5 / 2,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return RegardForCausalLM(config)

    def to_dict(self) -> dict[str, Any]:
        """The settings as they stand in the run's header; what the task's data and pages of one's own hold as well."""
        known = {name: catalog.revision_of(name) for name in self.mechanisms}
        pages = {name: held for name, held in known.items() if held is not None}
        return {**asdict(self), **TASKS[self.task].source(), **({"pages": pages} if pages else {})}

    def told(self) -> dict[str, Any]:
        warn("Plan.told()", "Plan.to_dict()")
        return self.to_dict()


class Mqar:
    """Multi-query associative recall: the score is the share of queries answered right."""

    score = "accuracy"
    better = max

    @staticmethod
    def vocab(plan: Plan) -> int:
        return plan.vocab

    @staticmethod
    def source() -> dict[str, str]:
        return {}

    @staticmethod
    def batch(plan: Plan, step: int) -> tuple[Tensor, Tensor]:
        return mqar(plan.vocab, plan.length, plan.pairs, plan.batch, seed=1_000_003 * (plan.seed + 1) + step)

    @staticmethod
    def test(plan: Plan) -> tuple[Tensor, Tensor]:
        return mqar(plan.vocab, plan.length, plan.pairs, plan.tested, seed=plan.seed)

    @staticmethod
    def measure(logits: Tensor, labels: Tensor) -> tuple[float, int]:
        """(sum of right answers, number of questions)"""
        scored = labels >= 0
        return (logits.argmax(-1) == labels)[scored].sum().item(), int(scored.sum())


class Text:
    """Python's documentation as bytes: the score is bits per byte of its last tenth, lower is better."""

    score = "bits per byte"
    better = min

    @staticmethod
    def vocab(plan: Plan) -> int:
        return 256

    @staticmethod
    def source() -> dict[str, str]:
        return {"text_sha256": hashlib.sha256(Text.all().numpy().tobytes()).hexdigest()}

    @staticmethod
    @cache
    def all() -> Tensor:
        joined = "\n\n".join(topics[name] for name in sorted(topics))
        return torch.frombuffer(bytearray(joined.encode()), dtype=torch.uint8)

    @staticmethod
    def cut(text: Tensor, starts: Tensor, length: int) -> tuple[Tensor, Tensor]:
        rows = text[starts[:, None] + torch.arange(length + 1)].long()
        return rows[:, :-1], rows[:, 1:]

    @staticmethod
    def batch(plan: Plan, step: int) -> tuple[Tensor, Tensor]:
        text = Text.all()[: int((1 - HELD_OUT) * len(Text.all()))]
        g = torch.Generator().manual_seed(1_000_003 * (plan.seed + 1) + step)
        return Text.cut(
            text, torch.randint(len(text) - plan.length - 1, (plan.batch,), generator=g), plan.length
        )

    @staticmethod
    def test(plan: Plan) -> tuple[Tensor, Tensor]:
        text = Text.all()[int((1 - HELD_OUT) * len(Text.all())) :]
        starts = torch.arange(0, len(text) - plan.length - 1, plan.length)[: plan.tested]
        return Text.cut(text, starts, plan.length)

    @staticmethod
    def measure(logits: Tensor, labels: Tensor) -> tuple[float, int]:
        bits = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        return bits.item() / 0.6931471805599453, labels.numel()


TASKS: dict[str, Any] = {"mqar": Mqar, "text": Text}
