"""AKI's claim on a toy: does an image know the question, and does a two-layer model answer better for it?

The toy (claims/toy_vlm.py, trained from scratch) has 16 patches of a colour, a shape and a value, and a question of a
colour and a shape. Its heads score with 2 numbers each, as the heads of a real model score with fewer numbers than
there are things to ask for: a causal head has too few to match colour and shape at once. Under modality-mutual
attention a patch reads the question in layer 1, its own feed-forward layer finds whether both match, and in layer 2 the
question reads the patch that says so. With heads of 16 numbers a causal model matches both by itself: what the two come
to then is measured beside it, and the bound is not applied to it.
"""

import torch
from torch import Tensor

from regard.claims.lab import difference, generator, mean, sweep
from regard.claims.toy_vlm import ToyVLM, accuracy, learn, lookup, one_turn
from regard.core.claim import Claim, Measured
from regard.core.mask import Mask, causal
from regard.methods.masks import aki_mma as page

KINDS, PATCHES, VALUES, SEEDS = 5, 16, 4, (0, 1, 2)
STEPS, RATES, NARROW, WIDE = 700, (3e-3, 6e-3), 2, 16
SIDES = {"causal": causal(), "mutual": page.build(page.Config())}
draw = lookup(KINDS, PATCHES, VALUES)


def toy(mask: Mask, seed: int, rate: float, score: int = NARROW) -> tuple[float, ToyVLM]:
    """(accuracy, the trained toy)"""
    roles = one_turn(1, PATCHES, question=2)
    seen = mask.dense(roles.length, roles=roles)
    # words: colours, shapes, and the values that an answer may say
    model = ToyVLM([KINDS, KINDS, VALUES], 2 * KINDS + VALUES, seen, seed=seed, score=score, rope_theta=0)
    learn(model, draw, STEPS, seed, rate)
    return accuracy(model, draw), model


@torch.no_grad()
def changes(model: ToyVLM, mask: Mask) -> tuple[float, float]:
    """Largest change of the image's states, in any layer, when the question changes, and when an answer does."""
    scene = draw(256, generator(7))
    roles = one_turn(1, PATCHES, question=2, after=1)
    seen = mask.dense(roles.length, roles=roles)

    def image(question: Tensor, answer: int) -> Tensor:
        words = torch.nn.functional.pad(question, (0, 1), value=2 * KINDS + answer)
        return model.states(scene._replace(words=words), seen)[:, :, :PATCHES]

    plain = image(scene.words, 0)
    asked, answered = image(scene.words.roll(1, 0), 0), image(scene.words, 1)
    return difference(asked, plain), difference(answered, plain)


def measure() -> Measured:
    right, by_question, by_answer, best = {}, {}, {}, {}
    for name, mask in SIDES.items():
        tried = sweep(RATES, lambda rate, mask=mask: toy(mask, SEEDS[0], rate))
        best[name] = max(tried, key=lambda rate: tried[rate][0])
        runs = [tried[best[name]], *(toy(mask, seed, best[name]) for seed in SEEDS[1:])]
        right[name] = [score for score, _ in runs]
        by_question[name], by_answer[name] = zip(*(changes(model, mask) for _, model in runs))
    gain = mean(right["mutual"]) - mean(right["causal"])
    numbers = {f"accuracy_{name}": values for name, values in right.items()} | {"points_gained": gain}
    numbers |= {f"best_rate_{name}": rate for name, rate in best.items()}
    numbers |= {f"image_change_by_question_{name}": list(values) for name, values in by_question.items()}
    numbers |= {f"image_change_by_answer_{name}": list(values) for name, values in by_answer.items()}
    numbers |= {f"accuracy_wide_heads_{n}": toy(mask, 0, best[n], WIDE)[0] for n, mask in SIDES.items()}
    still = max(*by_question["causal"], *by_answer["causal"], *by_answer["mutual"])
    parts = {
        "still where it is to be": still == 0,
        "moved by the question": min(by_question["mutual"]) > 1e-3,
        "more right": gain >= 5,
    }
    return Measured.by(parts, numbers)


CLAIM = Claim(
    name="aki_mma",
    statement=(
        "with the image before the question the image's states depend on the question under modality-mutual attention "
        "and not at all under a causal mask, on an answer under neither; a two-layer toy VLM of narrow heads answers "
        "question-conditioned lookups better"
    ),
    bound=(
        "change of image states on a question swap == 0 causal, > 1e-3 mutual; on an answer swap == 0 in both; toy "
        "accuracy >= causal + 5 points, mean of three seeds"
    ),
    measure=measure,
)
