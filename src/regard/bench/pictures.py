"""One cell of a comparison on images: a method's answers beside the model's own, beside controls, and its cost.

    base      the model as it is, on the same questions, in pairs
    control   what bias alone would do. For yes and no: a constant added to the base's margin until it says yes as
              often as the method; for captions: the base's, cut to as many mentions as the method makes
    neutral   the method at its neutral setting: the largest difference of a logit to the base's
    shuffled  a steering method whose image role lies on the prompt's other tokens; not of a page that makes another
              picture: it reads places of the picture, and other tokens have none

"works" asks that the paired 95 % interval over images excludes the control.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regard import catalog
from regard.attaching.attachment import attach
from regard.attaching.reduction import Reduction
from regard.attaching.towers import image_token
from regard.bench.picture_scores import chair_facts, said_facts, yes_no_facts
from regard.core import Method, require
from regard.tasks.pictures import PictureQuestion, opened

FULL, BATCH, ROUNDS = "full", 16, 2
TOKENS = {"yes_no": 4, "said": 12, "chair": 64}  # that are generated at most
YES, NO = ("yes", "Yes", " yes", " Yes"), ("no", "No", " no", " No")


@dataclass
class Answers:
    """What was said to some questions: texts, the margin log P(yes) - log P(no) of the first token, cost."""

    said: list[str] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    first: list[Tensor] = field(default_factory=list)  # [B, V] logits of the first token
    seconds: float = 0.0
    tokens: int = 0
    passes: int = 0
    kept: list[float] = field(
        default_factory=list
    )  # share of the visual tokens x layers that were read, by text


def picture_row(cell: Any, bench: Any) -> dict:
    """The row of one cell."""
    start = time.perf_counter()
    task = catalog.picture_task(cell.task)
    questions, base = shared(cell, bench, task)
    method = None if cell.method == FULL else catalog.method(cell.method, **cell.settings)
    reader = Reader(bench.model, bench.tokenizer, task.metric)
    ours = base if method is None else reader.answer(questions, method)
    facts = SCORES[task.metric](questions, ours, base)
    if method is not None:
        facts |= controls(reader, questions, method, ours, base, task.metric)
    facts |= cost(reader, questions, method)
    facts["kept"] = float(np.mean(ours.kept)) if ours.kept else 1.0
    facts["passes"] = ours.passes / max(base.passes, 1) * max(base.tokens, 1) / max(ours.tokens, 1)
    return cell.row(**facts, kind_of_method=None if method is None else method.page.kind,
                    seconds=time.perf_counter() - start)  # fmt: skip


SCORES: dict[str, Callable] = {"yes_no": yes_no_facts, "chair": chair_facts, "said": said_facts}


def shared(cell: Any, bench: Any, task: Any) -> tuple[list[PictureQuestion], Answers]:
    """Questions and the model's own answers, made once for all methods."""
    key = (cell.task, cell.seed, cell.samples, cell.text)
    if key not in bench.memo:
        questions = task.pictures(cell.samples, cell.seed, cell.text)
        require(bool(questions), "a task asks a question or more", task=cell.task)
        bench.memo = {
            key: (questions, Reader(bench.model, bench.tokenizer, task.metric).answer(questions, None))
        }
    return bench.memo[key]


@dataclass
class Reader:
    """A vision-language model that is asked questions."""

    model: Any
    processor: Any
    metric: str

    def answer(
        self, questions: Sequence[PictureQuestion], method: Any, tokens: int | None = None, **roles: Any
    ) -> Answers:
        answers = Answers()
        for start in range(0, len(questions), BATCH):
            self.batch(questions[start : start + BATCH], method, answers, tokens, roles)
        return answers

    def inputs(self, questions: Sequence[PictureQuestion]) -> dict[str, Any]:
        """What the processor makes of pictures and texts, padded on the left."""
        texts = [self.prompt(q.text) for q in questions]
        pictures = [[opened(q.picture)] for q in questions]
        side = getattr(self.processor.tokenizer, "padding_side", "left")
        self.processor.tokenizer.padding_side = "left"
        try:
            made = self.processor(text=texts, images=pictures, return_tensors="pt", padding=True)
        finally:
            self.processor.tokenizer.padding_side = side
        return {k: v.to(self.model.device) if isinstance(v, Tensor) else v for k, v in made.items()}

    def prompt(self, text: str) -> str:
        if getattr(self.processor, "chat_template", None):
            content = [{"type": "image"}, {"type": "text", "text": text}]
            message = [{"role": "user", "content": content}]
            return self.processor.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        return f"{self.processor.image_token} {text}"

    @torch.no_grad()
    def batch(
        self,
        questions: Sequence[PictureQuestion],
        method: Any,
        answers: Answers,
        tokens: int | None,
        roles: dict,
    ) -> None:
        inputs = self.inputs(questions)
        reduction = Reduction(method) if isinstance(method, Method) and method.page.kind == "tokens" else None
        attached = method if reduction is None else reduction
        counted = self.model.register_forward_pre_hook(
            lambda *_: answers.__setattr__("passes", answers.passes + 1)
        )
        start = time.perf_counter()
        try:
            own = {"tokenizer": self.processor.tokenizer, **roles}
            with nullcontext() if method is None else attach(self.model, attached, **own):
                out = self.model.generate(
                    **inputs, max_new_tokens=tokens or TOKENS[self.metric], do_sample=False, output_logits=True,
                    return_dict_in_generate=True, pad_token_id=self.pad(),
                )  # fmt: skip
        finally:
            counted.remove()
        answers.seconds += time.perf_counter() - start
        self.note(answers, out, inputs["input_ids"].shape[1])
        if reduction is not None:
            whole = [(ids == image_token(self.model)).sum().item() for ids in inputs["input_ids"]]
            answers.kept += [float(np.mean(k)) / n for k, n in zip(reduction.kept, whole, strict=True)]

    def note(self, answers: Answers, out: Any, before: int) -> None:
        new, first = out.sequences[:, before:], out.logits[0].float()
        answers.tokens += new.shape[1]
        answers.said += [t.strip() for t in self.processor.batch_decode(new, skip_special_tokens=True)]
        answers.first.append(first)
        logs = first.log_softmax(-1)
        yes, no = (torch.logsumexp(logs[:, ids], -1) for ids in self.yes_and_no())
        answers.margins += torch.nan_to_num(yes - no, nan=0.0, posinf=1e4, neginf=-1e4).tolist()

    def yes_and_no(self) -> tuple[list[int], list[int]]:
        """First tokens of yes and of no; one that begins both (a space) says neither."""
        yes, no = self.ids(YES), self.ids(NO)
        return [i for i in yes if i not in no], [i for i in no if i not in yes]

    def ids(self, words: Sequence[str]) -> list[int]:
        """The first tokens of these words."""
        tokenizer = self.processor.tokenizer
        found = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
        return sorted({ids[0] for ids in found if ids and ids[0] != tokenizer.unk_token_id})

    def pad(self) -> int:
        tokenizer = self.processor.tokenizer
        return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def controls(
    reader: Reader,
    questions: Sequence[PictureQuestion],
    method: Method,
    ours: Answers,
    base: Answers,
    metric: str,
) -> dict[str, Any]:
    """At its neutral setting it is the base; with its image role on other tokens a steering method loses its gain."""
    facts: dict[str, Any] = {}
    if method.page.card.neutral:
        neutral = reader.answer(questions[:BATCH], method.with_settings(**method.page.card.neutral), tokens=1)
        facts["neutral"] = (neutral.first[0] - base.first[0]).abs().max().item()
    if method.page.kind == "steering" and method.page.needs_image and method.page.images is None:
        image = image_token(reader.model)
        roles = {"image": lambda ids: role_astray(ids, image, reader.pad())}
        astray = reader.answer(questions, method, roles=roles)
        facts["shuffled"] = SCORES[metric](questions, astray, base)["quality"]
    return facts


def role_astray(ids: Tensor, image: int, pad: int) -> Tensor:
    """[B, N] bool: the role of the image on all tokens of a prompt that are not the image's."""
    return (ids != image) & (ids != pad) & (ids.shape[1] > 1)


def cost(reader: Reader, questions: Sequence[PictureQuestion], method: Any) -> dict[str, float]:
    """Seconds of a batch over the base's, in turns; the ratio with its spread."""
    some = questions[:BATCH]
    ratios = []
    for _ in range(ROUNDS):
        base, ours = reader.answer(some, None), reader.answer(some, method)
        ratios.append((ours.seconds / ours.tokens) / (base.seconds / base.tokens))
    return {
        "time_ratio": float(np.exp(np.log(ratios).mean())),
        "time_spread": float((max(ratios) - min(ratios)) / 2),
    }
