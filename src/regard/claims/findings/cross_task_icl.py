"""Cross-task in-context learning's claim: examples of a related task help with a new one, in a tiny language model.

A task is a definition of two tokens and a function of strings of three letters out of six: an order of the places,
then a shift of the letters, y_i = x_{p(i)} + s mod 6. Of 36 tasks 12 are held out; every order and every shift is
trained in others. A text for training has two tasks, each with or without an example before its question; as
neighbours in a corpus are alike, the second shares its order or its shift with the first in half of the texts, and is
any in the rest.

    zero-shot    definition of the held-out task, x ->
    related      definition and an example of a trained task that shares its order or its shift, then the same
    unrelated    the same of a trained task that shares neither
    in-task      an example of the held-out task itself; reported

As in the paper the example is the one of eight that is nearest to the question (here: most letters in the same place),
one example is the released code's default, and an answer is right as a whole. Three models; accuracy is over 2000
questions each. The number of letters, the spread of the first weights and the steps were chosen by the training loss of
a fourth model.
"""

from dataclasses import dataclass
from itertools import permutations, product

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from regard.claims.lab import generator, mean, seeded, threads
from regard.core.claim import Claim, Measured
from regard.train.loop import fit, one_cycle

LETTERS, PLACES = 6, 3
ORDERS = torch.tensor([*permutations(range(PLACES))])  # [6, 3]
GIVES, ENDS = LETTERS, LETTERS + 1  # the signs between x and y, and after y
FIRST = LETTERS + 2  # of the tokens of definitions: orders, then shifts
SIZE = FIRST + len(ORDERS) + LETTERS
EXAMPLES, NEAREST_OF = 1, 8
SEEDS, ASKED = 3, 2000
WIDTH, LAYERS, HEADS = 64, 2, 4
BATCH, STEPS, RATE = 32, 1200, 3e-3

Tasks = Tensor  # [B, 2] order and shift


def held_out() -> Tasks:
    """[12, 2]: two shifts of each order, so that each shift is held out twice."""
    return torch.tensor([(p, (2 * p + i) % LETTERS) for p, i in product(range(len(ORDERS)), range(2))])


def known() -> Tasks:
    held = {*map(tuple, held_out().tolist())}
    return torch.tensor([t for t in product(range(len(ORDERS)), range(LETTERS)) if t not in held])


def answers(tasks: Tasks, x: Tensor) -> Tensor:
    """y [B, k, 3] of x [B, k, 3]."""
    order, shift = ORDERS[tasks[:, 0]], tasks[:, 1]
    return (x.gather(2, order[:, None].expand_as(x)) + shift[:, None, None]) % LETTERS


def section(tasks: Tasks, x: Tensor) -> tuple[Tensor, Tensor]:
    """Definition and examples as ids [B, 2 + 8 k], and where letters of answers stand."""
    signs = torch.ones(*x.shape[:2], 1, dtype=torch.long)
    rows = torch.cat([x, GIVES * signs, answers(tasks, x), ENDS * signs], 2)
    ids = torch.cat([FIRST + tasks + torch.tensor([0, len(ORDERS)]), rows.flatten(1)], 1)
    place = (torch.arange(ids.shape[1]) - 2) % (2 * PLACES + 2)
    scored = (place > PLACES) & (place < 2 * PLACES + 1) & (torch.arange(ids.shape[1]) >= 2)
    return ids, scored


def letters(count: int, k: int, g: torch.Generator) -> Tensor:
    return torch.randint(LETTERS, (count, k, PLACES), generator=g)


def related(tasks: Tasks, among: Tasks, g: torch.Generator, alike: bool = True) -> Tasks:
    """For each a task of `among` that shares one part with it, or none."""
    shared = (tasks[:, None] == among).sum(-1)
    return among[torch.multinomial((shared == int(alike)).double(), 1, generator=g)[:, 0]]


def texts(g: torch.Generator) -> tuple[Tensor, Tensor]:
    """A batch for training: ids [B, n], and where answers stand [n]."""
    pool = known()
    first = pool[torch.randint(len(pool), (BATCH,), generator=g)]
    any_other = pool[torch.randint(len(pool), (BATCH,), generator=g)]
    alike = torch.rand(BATCH, 1, generator=g) < 0.5
    second = torch.where(alike, related(first, pool, g), any_other)
    counts = torch.randint(1, EXAMPLES + 2, (2,), generator=g).tolist()
    parts = [section(t, letters(BATCH, k, g)) for t, k in zip((first, second), counts, strict=True)]
    return torch.cat([ids for ids, _ in parts], 1), torch.cat([scored for _, scored in parts])


def trained(seed: int) -> tuple[LlamaForCausalLM, float]:
    """The model, and its last losses."""
    shape = dict(
        hidden_size=WIDTH, intermediate_size=3 * WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS
    )
    with seeded(seed):
        model = LlamaForCausalLM(
            LlamaConfig(vocab_size=SIZE, initializer_range=0.1, max_position_embeddings=128, **shape)
        )
    g, losses = generator(seed), []

    def loss_at(step: int) -> Tensor:
        ids, scored = texts(g)
        logits = model(ids[:, :-1]).logits[:, scored[1:]]
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, scored].flatten())
        losses.append(loss.item())
        return loss

    fit(torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.1), loss_at, STEPS, schedule=one_cycle())
    return model.eval(), mean(losses[-50:])


@dataclass(frozen=True)
class Questions:
    tasks: Tasks
    x: Tensor  # [B, 1, 3]

    @classmethod
    def of(cls, pool: Tasks, g: torch.Generator) -> "Questions":
        return cls(pool[torch.randint(len(pool), (ASKED,), generator=g)], letters(ASKED, 1, g))

    def nearest(self, g: torch.Generator) -> Tensor:
        """[B, k, 3] the nearest of eight strings to each question, none of them the question itself where drawn."""
        drawn = letters(len(self.x), NEAREST_OF, g)
        same = (drawn == self.x).sum(-1)
        best = same.masked_fill(same == PLACES, -1).argsort(dim=1, descending=True, stable=True)[:, :EXAMPLES]
        return drawn.gather(1, best[..., None].expand(-1, -1, PLACES))


@torch.no_grad()
def accuracy(model: LlamaForCausalLM, questions: Questions, before: Tensor) -> float:
    """Share of answers right in all letters, as greedy generation gives them, after texts `before` [B, n]."""
    ids = torch.cat([before, section(questions.tasks, questions.x)[0]], 1)
    right = []
    for part in ids.split(500):
        guesses = model(part[:, :-1]).logits[:, -PLACES - 1 : -1].argmax(-1)
        right.append((guesses == part[:, -PLACES - 1 : -1]).all(1))
    return torch.cat(right).double().mean().item()


def one(seed: int) -> dict[str, float]:
    model, loss = trained(seed)
    g = generator(100 + seed)
    asked, seen = Questions.of(held_out(), g), Questions.of(known(), g)
    none = torch.empty(ASKED, 0, dtype=torch.long)
    near, far = (related(asked.tasks, known(), g, alike) for alike in (True, False))
    examples = asked.nearest(g)
    source = {
        name: accuracy(model, asked, section(t, examples)[0])
        for name, t in (("related", near), ("unrelated", far))
    }
    own = torch.cat([section(asked.tasks, examples)[0]], 1)
    return {
        "loss": loss,
        "trained tasks zero-shot": accuracy(model, seen, none),
        "zero-shot": accuracy(model, asked, none),
        **source,
        "in-task": in_task(model, asked, own),
    }


@torch.no_grad()
def in_task(model: LlamaForCausalLM, asked: Questions, own: Tensor) -> float:
    """After examples of the task itself, under one definition."""
    question = section(asked.tasks, asked.x)[0][:, 2:]
    ids = torch.cat([own, question], 1)
    guesses = model(ids[:, :-1]).logits[:, -PLACES - 1 : -1].argmax(-1)
    return (guesses == ids[:, -PLACES - 1 : -1]).all(1).double().mean().item()


def measure() -> Measured:
    with threads(1):
        found = [one(seed) for seed in range(SEEDS)]
    numbers = {name: [row[name] for row in found] for name in found[0]}
    over_none = [100 * (row["related"] - row["zero-shot"]) for row in found]
    over_far = [100 * (row["related"] - row["unrelated"]) for row in found]
    numbers |= {"related - zero-shot": over_none, "related - unrelated": over_far}
    learned = min(numbers["trained tasks zero-shot"]) >= 0.9
    return Measured(learned and min(over_none) >= 5 and min(over_far) >= 2, numbers)


CLAIM = Claim(
    name="cross_task_icl",
    statement=(
        "in a tiny language model meta-trained on many symbolic tasks, examples of a related source task raise "
        "accuracy on a held-out task above zero-shot and above examples of an unrelated task"
    ),
    bound=(
        "accuracy with related examples >= zero-shot + 5 points and >= unrelated + 2 points, on each of 3 seeds; "
        "trained tasks are answered zero-shot (>= 0.9)"
    ),
    measure=measure,
    contradicted=(
        "examples of a related task did not help, they cost: -9, -5 and -2 points against zero-shot, and "
        "were within 1.4 points of unrelated ones (0.8, 1.4, 0.4). Two of the three models answer a held-"
        "out task from its definition alone (0.96 and 0.99), so they leave no room for the paper's gain; "
        "the third learned its trained tasks to 0.81 only. Examples of the held-out task itself cost as "
        "much (in-task), so these models use no examples at all. A task that its definition does not "
        "determine would be a better test"
    ),
)
