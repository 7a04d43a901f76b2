"""PINE's claim: in whatever order four documents stand, the next token's logits and a greedy answer are the same.

A document is a statement of a fact between words of running text; the question asks for one of the facts. Both the
model as it is and the model under PINE read all 24 orders. Reported beside the bound: how often the model as it is
answers two orders alike (swap agreement), how many answers are right by the place of the document that holds it, and
the largest difference of a logit under PINE over the first four tokens.
"""

import random
from itertools import permutations
from typing import Any

import torch
from torch import Tensor

from regard.attaching.attachment import attach
from regard.catalog import method
from regard.claims.lab import mean, threads
from regard.claims.shipped_lm import shipped
from regard.core.claim import Claim, Measured
from regard.tasks import held_out
from regard.tasks.base import encode
from regard.tasks.recall import Fact, near_keys

PROMPTS, WORDS, STEPS, SEED = 4, 12, 4, 11


def documents_of(tokenizer: Any, rng: random.Random) -> tuple[list[list[int]], list[int], list[int]]:
    """Four documents, the question of the first, its answer."""
    facts = [Fact(key, f" {rng.randint(100, 99999)}") for key in near_keys(rng, 4)]
    text = held_out()
    made = [
        [*text.take(tokenizer, WORDS, rng), *fact.statement(tokenizer), *text.take(tokenizer, WORDS - i, rng)]
        for i, fact in enumerate(facts)
    ]
    return made, facts[0].question(tokenizer), facts[0].answer(tokenizer)


def prompt(
    bench: Any, documents: list[list[int]], order: tuple[int, ...], question: list[int]
) -> tuple[Tensor, Tensor]:
    """ids [1, N], and the number of each token's document, in the order in which they stand."""
    head = [bench.tokenizer.bos_token_id, *encode(bench.tokenizer, "Facts:")]
    ids, labels = list(head), [-1] * len(head)
    for place, d in enumerate(order):
        ids += documents[d]
        labels += [place] * len(documents[d])
    return torch.tensor([[*ids, *question]]), torch.tensor([[*labels, *[-1] * len(question)]])


@torch.no_grad()
def answered(bench: Any, ids: Tensor, labels: Tensor, pine: bool) -> tuple[Tensor, list[int]]:
    """([STEPS, V] logits, greedy tokens)."""
    rule = lambda x: labels if x.shape == labels.shape else torch.full_like(x, -1)  # noqa: E731
    attached = attach(bench.model, [method("pine")] if pine else None, roles={"document": rule})
    with attached:
        out = bench.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False,
            output_logits=True, return_dict_in_generate=True, pad_token_id=0,
        )  # fmt: skip
    return torch.cat(out.logits), out.sequences[0, ids.shape[1] :].tolist()


def of_prompt(bench: Any, seed: int) -> dict[str, Any]:
    documents, question, answer = documents_of(bench.tokenizer, random.Random(f"pine {seed}"))
    found: dict[bool, list] = {True: [], False: []}
    orders = list(permutations(range(4)))
    for order in orders:
        ids, labels = prompt(bench, documents, order, question)
        for pine, results in found.items():
            results.append(answered(bench, ids, labels, pine))
    first = {pine: torch.stack([logits[0] for logits, _ in results]) for pine, results in found.items()}
    said = {pine: [tokens for _, tokens in results] for pine, results in found.items()}
    right = [[tokens[: len(answer)] == answer[:STEPS] for tokens in said[pine]] for pine in (True, False)]
    return {
        "moved_pine": spread(first[True]), "moved_plain": spread(first[False]),
        "moved_pine_all": spread(torch.stack([logits for logits, _ in found[True]])),
        "same_pine": share_alike(said[True]), "same_plain": share_alike(said[False]),
        "right_pine": mean(right[0]), "right_plain_by_place": [
            mean(r for r, order in zip(right[1], orders) if order.index(0) == place) for place in range(4)
        ],
    }  # fmt: skip


def spread(x: Tensor) -> float:
    """Largest difference of a logit between any two orders."""
    return (x.amax(0) - x.amin(0)).max().item()


def share_alike(said: list[list[int]]) -> float:
    """Share of pairs of orders with the same greedy tokens."""
    pairs = [(a, b) for i, a in enumerate(said) for b in said[:i]]
    return mean(a == b for a, b in pairs)


def measure(model: str) -> Measured:
    bench = shipped(model)
    with threads(2):
        found = [of_prompt(bench, SEED + i) for i in range(PROMPTS if model == "lm" else 1)]
    worst, least = max(f["moved_pine"] for f in found), min(f["moved_plain"] for f in found)
    same = min(f["same_pine"] for f in found)
    numbers = {
        "prompts": len(found), "orders": 24, "largest_difference_pine": worst, "least_difference_plain": least,
        "largest_difference_pine_4_tokens": max(f["moved_pine_all"] for f in found), "same_greedy_pine": same,
        "swap_agreement_plain": mean(f["same_plain"] for f in found),
        "right_pine": mean(f["right_pine"] for f in found),
        "right_plain_by_place": [mean(f["right_plain_by_place"][i] for f in found) for i in range(4)],
    }  # fmt: skip
    parts = {"under PINE": worst < 1e-4, "as it is": least > 1e-2, "greedy": same == 1.0}
    return Measured.by(parts, numbers)


CLAIM = Claim(
    name="pine",
    statement=(
        "permuting the segments leaves next-token logits and greedy output identical; the unmodified causal model's "
        "logits move"
    ),
    bound=(
        "over all orders of 4 segments max |Δlogit| < 1e-4 in float32 with PINE, > 1e-2 without; greedy tokens "
        "identical in 100 % of orders"
    ),
    measure=measure,
    models=("lm", "smollm2"),
)
