"""AttnAttrib's claim: one head, found by mediation, names the sentence that an answer was taken from.

Pages of running text with facts in it, and a question about one of them: for our model 512 tokens with eight facts
whose keys share words (the task "recall"), for SmolLM2, which answers three in five of these at half the length, 256
tokens with one fact ("needle"). Sentences end with a full stop or before a line; there are some 30 to 50. For the
mediation the code of the asked fact is changed, digit by digit, so that two prompts differ in nothing else:

    clean    The code of quiet river is 482.       corrupted    The code of quiet river is 826.
    m        logit of the clean code's first digit less that of the other's, where it is predicted
    effect   of a head: its output there from clean put into corrupted, share of the way of the mean m

The head of the largest effect is taken, on prompts of one seed. On those of another seed answers are generated, and
accuracy is the share of the generated digits, right or wrong, at which the head's top token of the context lies in the
sentence of the asked fact. The space before the digits, which every fact has alike, is reported apart. The same is
asked of the mean of all heads of all layers, and of every head, to say how many others would have done.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from regard.attaching.attachment import attach
from regard.claims.lab import threads
from regard.claims.shipped_lm import samples, shipped
from regard.core import Observer, Site
from regard.core.claim import Claim, Measured
from regard.explaining.tracing import ReadPrompts, answer, answer_span, read, read_all
from regard.methods.tracing.attnattrib import Config, Spans, measure, mediated, observer, transplant
from regard.tasks import Sample

# task, tokens of a prompt, prompts on which a head is chosen, prompts on which it is judged
ASKED = {"lm": ("recall", 512, 24, 64), "smollm2": ("needle", 256, 6, 20)}


def other(on: str, ids: Sequence[int]) -> list[int]:
    """The same tokens with another digit in the place of each digit, a token each."""
    known = shipped(on).tokenizer.convert_tokens_to_ids(list("123456789"))
    return [known[(known.index(i) + 4) % 9] if i in known else i for i in ids]


def corrupted(on: str, sample: Sample) -> list[int]:
    """The prompt with another code in the asked fact."""
    first, past = answer_span(sample)
    return sample.prompt[:first] + other(on, sample.prompt[first:past]) + sample.prompt[past:]


@torch.no_grad()
def effects(on: str, chosen: Sequence[Sample]) -> Tensor:
    """[layers, heads] mediated effects at the space after which the first digit is predicted."""
    model = shipped(on).model
    clean, changed = (
        read(
            model,
            [replace(s, prompt=prompt + s.answer[:1]) for s, prompt in zip(chosen, prompts, strict=True)],
        )
        for prompts in ([s.prompt for s in chosen], [corrupted(on, s) for s in chosen])
    )
    right = torch.tensor([[s.answer[1]] for s in chosen])
    wrong = torch.tensor([[other(on, s.answer)[1]] for s in chosen])

    def margin(text: ReadPrompts, *methods: Any) -> tuple[Tensor, dict]:
        with attach(model, list(methods) or None) as attached:
            last = model(text.ids[:, -1:], past_key_values=deepcopy(text.cache), use_cache=True).logits[:, -1]
        return (last.gather(1, right) - last.gather(1, wrong)).mean(), attached.records

    top, records = margin(clean, Observer("z", Site(rows=-1)))
    bottom, _ = margin(changed)
    by_layer = [(layer, z) for layer, _, z in sorted(records["z"], key=lambda record: record[0])]
    found = [
        [margin(changed, transplant(layer, h, z[:, h : h + 1]))[0] for h in range(z.shape[1])]
        for layer, z in by_layer
    ]
    return mediated(top, bottom, torch.tensor(found))


def sentences(on: str, sample: Sample) -> list[tuple[int, int]]:
    """Those of the context: all before the line of the question, the first token of the text left out."""
    texts = shipped(on).tokenizer.convert_ids_to_tokens(sample.prompt)
    lines = [i for i, text in enumerate(texts) if "Ċ" in text]
    stops = [i + 1 for i, text in enumerate(texts) if text.endswith(".")]
    ends = sorted(i for i in {1, *lines, *stops} if 1 <= i <= lines[-1])
    return list(pairwise(ends))


def source(sample: Sample, spans: Spans) -> int:
    """The number of the sentence in which the answer stands."""
    first = answer_span(sample)[0]
    return next(i for i, (start, past) in enumerate(spans) if start <= first < past)


def looked(on: str, chosen: list[Sample]) -> tuple[Tensor, Tensor]:
    """(weights [layers, heads, B, T, n] on the prompt at each generated token, the tokens [B, T])."""
    model, groups, weights, tokens = shipped(on).model, [chosen], [], []
    for text in read_all(model, groups):
        emitted, records = answer(model, text, [observer()])
        steps: dict[int, list[Tensor]] = {}
        for layer, _, row in records["attribution"]:
            steps.setdefault(layer, []).append(row[..., : text.ids.shape[1]])
        weights.append(torch.stack([torch.stack(steps[layer], 2) for layer in sorted(steps)]).transpose(1, 2))
        tokens.append(emitted)
    return torch.cat(weights, 2), torch.cat(tokens)


def found(on: str, weights: Tensor, chosen: Sequence[Sample]) -> tuple[float, float]:
    """(share of digits, of all generated tokens) whose source by weights [B, T, n] is the fact's sentence."""
    spans = [sentences(on, s) for s in chosen]
    wanted = torch.tensor([source(s, of) for s, of in zip(chosen, spans, strict=True)])
    hit = (measure(weights, spans, Config()) == wanted[:, None]).float()
    return hit[:, 1:].mean().item(), hit.mean().item()


def measure_claim(on: str) -> Measured:
    task, length, choosing, tested = ASKED[on]
    with threads(1):
        effect = effects(on, samples(task, length, choosing, seed=0, model=on))
        test = samples(task, length, tested, seed=1, model=on)
        weights, emitted = looked(on, test)
    layer, head = divmod(int(effect.argmax()), effect.shape[1])
    by_head = torch.tensor([[found(on, w, test)[0] for w in of_layer] for of_layer in weights])
    accuracy, with_space = found(on, weights[layer, head], test)
    average, average_with_space = found(on, weights.mean((0, 1)), test)
    ranked = effect.flatten().argsort(descending=True)[:8]
    numbers: dict[str, Any] = {
        "right_answers": (emitted == torch.tensor([s.answer for s in test])).all(-1).float().mean().item(),
        "sentences": sum(len(sentences(on, s)) for s in test) / len(test),
        "head": [layer, head],
        "effect": effect.max().item(),
        "accuracy": accuracy,
        "accuracy_with_space": with_space,
        "accuracy_head_average": average,
        "accuracy_head_average_with_space": average_with_space,
        "points_above": 100 * (accuracy - average),
        "accuracy_of_any_head": by_head.mean().item(),
        "heads": effect.numel(),
        "heads_at_0.9": int((by_head >= 0.9).sum()),
        "highest_effects": effect.flatten()[ranked].tolist(),
        "their_accuracies": by_head.flatten()[ranked].tolist(),
    }
    parts = {"the right sentence": accuracy >= 0.9, "over the head average": numbers["points_above"] >= 10}
    return Measured.by(parts, numbers)


CLAIM = Claim(
    name="attnattrib",
    statement=(
        "in a small language model that answers from its context, one head selected by mediation names the sentence of "
        "the answer in a single forward pass, better than head-averaged attention"
    ),
    bound=(
        "share of generated digits attributed to the right sentence >= 0.9 and >= head average + 10 points, on prompts "
        "of another seed than those on which the head was chosen"
    ),
    measure=measure_claim,
    models=("lm", "smollm2"),
    fails={"lm": ("over the head average",)},
    contradicted={
        "lm": (
            "the chosen head names the sentence, and the mean of all heads does as well or better: a model of 24 heads "
            "has few that could draw the mean elsewhere than those that read the answer (heads_at_0.9); the 270 of "
            "SmolLM2 do"
        ),
    },
)
