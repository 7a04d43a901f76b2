"""AttnAttrib's claim: one head, found by mediation, names the sentence that an answer was taken from.

Pages of 512 tokens of running text in which eight facts stand, whose keys share words, and a question about one of them
(the task "recall"). Sentences end with a full stop or before a line. For the mediation the code of the asked fact is
changed, digit by digit, so that two prompts differ in nothing else:

    clean    The code of quiet river is 482.       corrupted    The code of quiet river is 826.
    m        logit of the clean code's first digit less that of the other's, where it is predicted
    effect   of a head: its output there from clean put into corrupted, share of the way of the mean m

The head of the largest effect is taken, on prompts of one seed. On those of another seed answers are generated, and
accuracy is the share of the generated digits, right or wrong, at which the head's top token of the context lies in the
sentence of the asked fact. The space before the digits, which every fact has alike, is reported apart. The same is
asked of the mean of all heads of all layers, and of every head, to say how many others would have done.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from regard.attaching.attachment import attach
from regard.claims.lab import threads
from regard.claims.shipped_lm import samples, shipped
from regard.core import Observer, Site
from regard.core.claim import Claim, Measured
from regard.explain.tracing import answer, answer_span, read_all
from regard.methods.tracing.attnattrib import Config, Spans, measure, mediated, observer, transplant
from regard.tasks import Sample

LENGTH, CHOSEN_ON, TESTED = 512, 24, 64


def digits() -> list[int]:
    """Ids of 1 to 9, a token each."""
    return shipped().tokenizer.convert_tokens_to_ids(list("123456789"))


def other(ids: Sequence[int]) -> list[int]:
    """The same tokens with another digit in the place of each digit."""
    known = digits()
    return [known[(known.index(i) + 4) % 9] if i in known else i for i in ids]


def corrupted(sample: Sample) -> list[int]:
    """The prompt with another code in the asked fact."""
    first, past = answer_span(sample)
    return sample.prompt[:first] + other(sample.prompt[first:past]) + sample.prompt[past:]


@torch.no_grad()
def effects(chosen: Sequence[Sample]) -> Tensor:
    """[layers, heads] mediated effects at the space after which the first digit is predicted."""
    model, space = shipped().model, [s.answer[:1] for s in chosen]
    clean, changed = (
        torch.tensor([p + s for p, s in zip(prompts, space, strict=True)])
        for prompts in ([s.prompt for s in chosen], [corrupted(s) for s in chosen])
    )
    right, wrong = (
        torch.tensor(x) for x in zip(*((s.answer[1], other(s.answer)[1]) for s in chosen), strict=True)
    )

    def margin(ids: Tensor, *methods: Any) -> tuple[Tensor, dict]:
        with attach(model, list(methods)) as attached:
            last = model(ids, logits_to_keep=1).logits[:, 0]
        m = last.gather(1, right[:, None]) - last.gather(1, wrong[:, None])
        return m.mean(), attached.records

    top, records = margin(clean, Observer("z", Site(rows=-1)))
    bottom, _ = margin(changed)
    found = [
        [
            mediated(top, bottom, margin(changed, transplant(layer, h, z[:, h : h + 1]))[0])
            for h in range(z.shape[1])
        ]
        for layer, _, z in sorted(records["z"], key=lambda record: record[0])
    ]
    return torch.tensor(found)


def sentences(sample: Sample) -> list[tuple[int, int]]:
    """Those of the context: all before the line of the question, the first token of the text left out."""
    texts = shipped().tokenizer.convert_ids_to_tokens(sample.prompt)
    lines = [i for i, text in enumerate(texts) if "Ċ" in text]
    stops = [i + 1 for i, text in enumerate(texts) if text.endswith(".")]
    ends = sorted(i for i in {1, *lines, *stops} if 1 <= i <= lines[-1])
    return list(pairwise(ends))


def source(sample: Sample, spans: Spans) -> int:
    """The number of the sentence in which the answer stands."""
    first = answer_span(sample)[0]
    return next(i for i, (start, past) in enumerate(spans) if start <= first < past)


def looked(chosen: list[Sample]) -> tuple[Tensor, Tensor]:
    """(weights [layers, heads, B, T, n] on the prompt at each generated token, the tokens [B, T])."""
    model, groups, weights, tokens = shipped().model, [chosen], [], []
    for text in read_all(model, groups):
        emitted, records = answer(model, text, [observer()])
        steps: dict[int, list[Tensor]] = {}
        for layer, _, row in records["attribution"]:
            steps.setdefault(layer, []).append(row[..., :LENGTH])
        weights.append(torch.stack([torch.stack(steps[layer], 2) for layer in sorted(steps)]).transpose(1, 2))
        tokens.append(emitted)
    return torch.cat(weights, 2), torch.cat(tokens)


def found(weights: Tensor, chosen: Sequence[Sample]) -> tuple[float, float]:
    """(share of digits, of all generated tokens) whose source [B, T, n] names is the fact's sentence."""
    spans = [sentences(s) for s in chosen]
    wanted = torch.tensor([source(s, of) for s, of in zip(chosen, spans, strict=True)])
    hit = (measure(weights, spans, Config()) == wanted[:, None]).float()
    return hit[:, 1:].mean().item(), hit.mean().item()


def measure_claim() -> Measured:
    with threads(1):
        effect = effects(samples("recall", LENGTH, CHOSEN_ON, seed=0))
        test = samples("recall", LENGTH, TESTED, seed=1)
        weights, emitted = looked(test)
    layer, head = divmod(int(effect.argmax()), effect.shape[1])
    by_head = [[found(w, test)[0] for w in of_layer] for of_layer in weights]
    average = found(weights.mean((0, 1)), test)
    ranked = effect.flatten().argsort(descending=True).tolist()
    numbers: dict[str, Any] = {
        "right_answers": (emitted == torch.tensor([s.answer for s in test])).all(-1).float().mean().item(),
        "sentences": sum(len(sentences(s)) for s in test) / len(test),
        "head": [layer, head],
        "effect": effect.max().item(),
        "accuracy": by_head[layer][head],
        "accuracy_with_space": found(weights[layer, head], test)[1],
        "accuracy_head_average": average[0],
        "accuracy_head_average_with_space": average[1],
        "points_above": 100 * (by_head[layer][head] - average[0]),
        "accuracy_mean_of_heads": sum(map(sum, by_head)) / effect.numel(),
        "heads_at_0.9": sum(a >= 0.9 for row in by_head for a in row),
        "ranked_effects": [effect.flatten()[i].item() for i in ranked],
        "ranked_accuracies": [by_head[i // effect.shape[1]][i % effect.shape[1]] for i in ranked],
    }
    return Measured(numbers["accuracy"] >= 0.9 and numbers["points_above"] >= 10, numbers)


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
)
