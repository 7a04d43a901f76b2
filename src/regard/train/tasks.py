"""What is trained on: texts here, images in `pictures`. A task draws the batch of a step from the plan's seed and the
number of the step, and scores a model on data that is not trained on.
"""

import hashlib
from functools import cache
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from regard.nn.backbones import RegardConfig, RegardForCausalLM
from regard.tasks import Source
from regard.tasks.zoology_mqar import mqar
from regard.train.pictures import Digits, Find
from regard.train.suits import HELD_OUT, TEXTS


class Tokens:
    """What tasks of token ids have in common: a decoder, and labels under its tokens."""

    defaults = TEXTS

    @classmethod
    def model(cls, plan: Any) -> RegardForCausalLM:
        names = plan.mechanisms * (plan.layers if len(plan.mechanisms) == 1 else 1)
        config = RegardConfig(
            vocab_size=cls.vocab(plan), hidden_size=plan.width, num_hidden_layers=plan.layers,
            num_attention_heads=plan.heads, intermediate_size=plan.mlp, mechanisms=list(names), settings=plan.settings,
            conv=plan.conv, rope_theta=plan.rope_theta, tie_word_embeddings=False,
            initializer_range=plan.width**-0.5 / 2,
        )  # fmt: skip
        return RegardForCausalLM(config)

    @staticmethod
    def vocab(plan: Any) -> int:
        raise NotImplementedError

    @staticmethod
    def logits(model: RegardForCausalLM, ids: Tensor) -> Tensor:
        return model(ids, use_cache=False).logits

    @staticmethod
    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())

    @staticmethod
    def amount(plan: Any) -> dict[str, int]:
        return {"tokens": plan.steps * plan.batch * plan.length}

    @staticmethod
    def facts(plan: Any, folder: Any) -> dict[str, Any]:
        """All that is known of the best model beside its score: nothing."""
        return {}


class Mqar(Tokens):
    """Multi-query associative recall: the score is the share of queries answered right."""

    score = "accuracy"
    better = max

    @staticmethod
    def vocab(plan: Any) -> int:
        return plan.vocab

    @staticmethod
    def source(plan: Any) -> dict[str, str]:
        return {}

    @staticmethod
    def batch(plan: Any, step: int) -> tuple[Tensor, Tensor]:
        return mqar(plan.vocab, plan.length, plan.pairs, plan.batch, seed=1_000_003 * (plan.seed + 1) + step)

    @staticmethod
    def test(plan: Any) -> tuple[Tensor, Tensor]:
        return mqar(plan.vocab, plan.length, plan.pairs, plan.tested, seed=plan.seed)

    @staticmethod
    def measure(logits: Tensor, labels: Tensor) -> tuple[float, int]:
        """(sum of right answers, number of questions)"""
        scored = labels >= 0
        return (logits.argmax(-1) == labels)[scored].sum().item(), int(scored.sum())


class Text(Tokens):
    """The plan's text as bytes: the score is bits per byte of its last tenth, lower is better."""

    score = "bits per byte"
    better = min

    @staticmethod
    def vocab(plan: Any) -> int:
        return 256

    @staticmethod
    def source(plan: Any) -> dict[str, str]:
        return {"text_sha256": hashlib.sha256(Text.all(plan).numpy().tobytes()).hexdigest()}

    @staticmethod
    def all(plan: Any) -> Tensor:
        return as_bytes(plan.source)

    @staticmethod
    def cut(text: Tensor, starts: Tensor, length: int) -> tuple[Tensor, Tensor]:
        rows = text[starts[:, None] + torch.arange(length + 1)].long()
        return rows[:, :-1], rows[:, 1:]

    @staticmethod
    def batch(plan: Any, step: int) -> tuple[Tensor, Tensor]:
        text = Text.all(plan)[: int((1 - HELD_OUT) * len(Text.all(plan)))]
        g = torch.Generator().manual_seed(1_000_003 * (plan.seed + 1) + step)
        return Text.cut(
            text, torch.randint(len(text) - plan.length - 1, (plan.batch,), generator=g), plan.length
        )

    @staticmethod
    def test(plan: Any) -> tuple[Tensor, Tensor]:
        text = Text.all(plan)[int((1 - HELD_OUT) * len(Text.all(plan))) :]
        starts = torch.arange(0, len(text) - plan.length - 1, plan.length)[: plan.tested]
        return Text.cut(text, starts, plan.length)

    @staticmethod
    def measure(logits: Tensor, labels: Tensor) -> tuple[float, int]:
        bits = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        return bits.item() / 0.6931471805599453, labels.numel()


@cache
def as_bytes(source: Source | None) -> Tensor:
    """[n] the bytes of a text; None: Python's documentation."""
    text = "\n\n".join(topics[name] for name in sorted(topics)) if source is None else source.text
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


TASKS: dict[str, Any] = {"mqar": Mqar, "text": Text, "digits": Digits, "find": Find}


def model_of(plan: Any) -> PreTrainedModel:
    """The model of a plan at its start, the same whenever it is made."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        return TASKS[plan.task].model(plan)
