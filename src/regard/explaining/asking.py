"""The pairs of a question on a certain model: its own answer where none is given, images, a corruption that tells."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from regard.core import require
from regard.explaining.effects import bootstrap
from regard.explaining.pairs import Pairs
from regard.explaining.questions import Asked, Question, asked
from regard.explaining.runs import forward


@torch.no_grad()
def answered(model: PreTrainedModel, tokenizer: Any, q: Question, chat: bool, images: Any) -> Question:
    """The question with the model's own answer where no target is given."""
    if q.target is not None:
        return q
    alone = asked(
        tokenizer, [Question(q.prompt, tokenizer.decode([0]), None, q.prompt)], variations=1, chat=chat
    )
    logits, _ = forward(model, with_images(alone, images).pairs.clean.to(model.device))
    return replace(q, target=tokenizer.decode([int(logits[0].argmax())]))


def with_images(question: Asked, images: tuple[Mapping[str, Tensor], Mapping[str, Tensor]] | None) -> Asked:
    """The pairs with what a processor made of the images of each side."""
    if images is None:
        return question
    clean, corrupt = (replace(side, image=dict(image)) for side, image in
                      zip((question.pairs.clean, question.pairs.corrupt), images, strict=True))  # fmt: skip
    shapes = [{n: tuple(x.shape) for n, x in side.image.items()} for side in (clean, corrupt)]
    rule = "both images have the same grid of tokens"
    require(shapes[0] == shapes[1], rule, clean=shapes[0], corrupt=shapes[1])
    return replace(question, pairs=replace(question.pairs, clean=clean, corrupt=corrupt))


def corrupted_enough(
    model: PreTrainedModel, tokenizer: Any, questions: Sequence[Question], images: Any, how: dict[str, Any]
) -> tuple[Asked, list[str]]:
    """The pairs, and what has to be said of them: where a foil in the target's place changes nothing, others."""
    first = with_images(asked(tokenizer, questions, **how), images)
    made = any(q.corrupt is None and q.foil is not None for q in questions) and not how["by_image"]
    if not made or lowers(model, first.pairs):
        return first, []
    second = with_images(asked(tokenizer, questions, **how, swap=False), images)
    if second.corruption == first.corruption or not lowers(model, second.pairs):
        return first, []
    return second, [
        f"{first.corruption.split(';')[0]}: that left the answer as it was, so another corruption is asked"
    ]


@torch.no_grad()
def lowers(model: PreTrainedModel, pairs: Pairs) -> bool:
    """Whether the corrupted prompts lower the metric, by their interval or, for one pair, by a tenth."""
    pairs = pairs.to(model.device)
    clean, corrupt = (
        pairs.score(forward(model, side)[0]).double().cpu() for side in (pairs.clean, pairs.corrupt)
    )
    span = clean - corrupt
    low = (
        bootstrap(span[:, None], torch.ones(len(span)))[0][0]
        if len(span) > 1
        else span.mean() - 0.1 * clean.abs().mean()
    )
    return float(low) > 0 and float(span.mean()) > 0.1 * float(clean.abs().mean())
