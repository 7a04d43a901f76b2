"""What a training run is: its settings, its model, its data. All of it is data, so that a run can go on later."""

import hashlib
from dataclasses import asdict, dataclass, field
from functools import cache
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from regard import catalog
from regard.core import require, unknown
from regard.core.deprecation import warn
from regard.nn.backbones import RegardConfig, RegardForCausalLM
from regard.tasks.zoology_mqar import mqar
from regard.train.pictures import Digits, Find, Images
from regard.train.suits import TEXTS

OF_TEXTS = ("conv", "rope_theta", "length", "pairs", "vocab")  # settings that mean nothing for images
HELD_OUT = 0.1  # the last part of the text, which is not trained on


@dataclass(frozen=True)
class Plan:
    """The settings of a run. `mechanisms` is one name for all layers, or one for each; of images, for each stage.

    `Plan.of(task, ...)` has the settings that suit the task where none are given.

    Batches are drawn from the seed and the number of the step, so a run that was stopped goes on as if it had not.
    `rates` are tried one after the other, each from the same start; the best on held-out data is kept.
    """

    task: str = "mqar"
    mechanisms: tuple[str, ...] = ("softmax",)
    settings: dict[str, dict] = field(default_factory=dict)
    rates: tuple[float, ...] = TEXTS["rates"]
    steps: int = TEXTS["steps"]
    batch: int = TEXTS["batch"]
    layers: int = TEXTS["layers"]
    width: int = TEXTS["width"]
    heads: int = TEXTS["heads"]
    mlp: int = TEXTS["mlp"]
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
        every = (1, self.layers) if not self.of_images else range(1, self.layers + 1)
        require(len(self.mechanisms) in every, "one mechanism, or one for every layer, of images for every stage",
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

    @classmethod
    def of(cls, task: str, **given: Any) -> "Plan":
        """The settings that suit a task, but for those that are given."""
        if task not in TASKS:
            raise unknown("training task", task, TASKS)
        return cls(task=task, **{**TASKS[task].defaults, **given})

    @property
    def of_images(self) -> bool:
        return issubclass(TASKS[self.task], Images)

    def model(self) -> PreTrainedModel:
        """The model at its start: the same for every rate."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return TASKS[self.task].model(self)

    def to_dict(self) -> dict[str, Any]:
        """The settings as they stand in the run's header; what the task's data and pages of one's own hold as well."""
        known = {name: catalog.revision_of(name) for name in self.mechanisms}
        pages = {name: held for name, held in known.items() if held is not None}
        own = {
            name: value for name, value in asdict(self).items() if not (self.of_images and name in OF_TEXTS)
        }
        return {**own, **TASKS[self.task].source(), **({"pages": pages} if pages else {})}

    def told(self) -> dict[str, Any]:
        warn("Plan.told()", "Plan.to_dict()")
        return self.to_dict()


class Tokens:
    """What tasks of token ids have in common: a decoder, and labels under its tokens."""

    defaults = TEXTS

    @classmethod
    def model(cls, plan: Plan) -> RegardForCausalLM:
        names = plan.mechanisms * (plan.layers if len(plan.mechanisms) == 1 else 1)
        config = RegardConfig(
            vocab_size=cls.vocab(plan), hidden_size=plan.width, num_hidden_layers=plan.layers,
            num_attention_heads=plan.heads, intermediate_size=plan.mlp, mechanisms=list(names), settings=plan.settings,
            conv=plan.conv, rope_theta=plan.rope_theta, tie_word_embeddings=False,
            initializer_range=plan.width**-0.5 / 2,
        )  # fmt: skip
        return RegardForCausalLM(config)

    @staticmethod
    def vocab(plan: Plan) -> int:
        raise NotImplementedError

    @staticmethod
    def logits(model: RegardForCausalLM, ids: Tensor) -> Tensor:
        return model(ids, use_cache=False).logits

    @staticmethod
    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())

    @staticmethod
    def amount(plan: Plan) -> dict[str, int]:
        return {"tokens": plan.steps * plan.batch * plan.length}

    @staticmethod
    def facts(plan: Plan, folder: Any) -> dict[str, Any]:
        """All that is known of the best model beside its score: nothing."""
        return {}


class Mqar(Tokens):
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


class Text(Tokens):
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


TASKS: dict[str, Any] = {"mqar": Mqar, "text": Text, "digits": Digits, "find": Find}
