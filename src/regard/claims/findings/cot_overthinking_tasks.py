"""Mind Your Step's claim, by proxy: a network tells strings of a hidden grammar better than five rules in words do.

The paper's effect needs large chat models. What is measured is a condition of it: the task resists short rules that can
be said. Five random automata of seven states give strings of 5 to 10 letters; half of them have one letter changed so
that no path gives them (tasks/deliberation.py). Both sides learn from the same 300 labelled strings and judge 400
others.

    direct    a GRU reads the letters one by one and answers
    rules     a decision tree of five questions at most, each in words: how often a letter comes, whether a pair of
              letters stands side by side, the first letter, the last two, the length

The tree is the best of its kind (scikit-learn's; number of questions and size of leaves by five-fold validation on the
300). Reported beside: trees of 10 and 20 questions and without a bound, the sum of all features (logistic regression),
and a GRU on labels that were shuffled. Steps and rate of the GRU were looked at on another grammar, of seed 99.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.claims.lab import generator, mean, seeded, threads
from regard.core.claim import Claim, Measured
from regard.tasks.deliberation import LETTERS, Grammar, random_grammar
from regard.train.loop import fit, one_cycle

GRAMMARS, STATES, LEAST, MOST = 5, 7, 5, 10
TRAINED, TESTED = 300, 400
WIDTH, STEPS, RATE = 64, 400, 5e-3
RULES, MORE = 5, (10, 20)  # questions of a tree


@dataclass(frozen=True)
class Judged:
    """Strings and whether each follows the grammar."""

    strings: list[str]
    follows: list[bool]


def draw(seed: int) -> tuple[Judged, Judged]:
    """Strings to learn from and others to judge, half of either spoiled; all different."""
    rng = random.Random(f"overthinking {seed}")
    grammar = random_grammar(rng, STATES, TRAINED + TESTED, LEAST, MOST)
    whole = rng.sample(grammar.strings(LEAST, MOST), TRAINED + TESTED)
    half = len(whole) // 2
    wrong = spoiled(grammar, whole[half:], half, rng)
    pairs = [(s, True) for s in whole[:half]] + [(s, False) for s in wrong]
    rng.shuffle(pairs)
    return Judged(*map(list, zip(*pairs[:TRAINED], strict=True))), Judged(
        *map(list, zip(*pairs[TRAINED:], strict=True))
    )


def spoiled(grammar: Grammar, strings: Sequence[str], count: int, rng: random.Random) -> list[str]:
    """So many different strings with one wrong letter, from these in turn."""
    found: dict[str, None] = {}
    while len(found) < count:
        for text in strings:
            change = grammar.spoiled(text, rng)
            if change is not None and len(found) < count:
                found[change] = None
    return list(found)


# the network


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(len(LETTERS) + 1, WIDTH, padding_idx=0)
        self.gru, self.read = nn.GRU(WIDTH, WIDTH, batch_first=True), nn.Linear(WIDTH, 1)

    def forward(self, letters: Tensor) -> Tensor:
        """[B, n] ids, 0 before each string -> [B] log-odds that it follows the grammar."""
        return self.read(self.gru(self.embed(letters))[0][:, -1])[:, 0]


def ids(strings: Sequence[str]) -> Tensor:
    return torch.tensor([[1 + LETTERS.index(c) if c != " " else 0 for c in s.rjust(MOST)] for s in strings])


def network(learn: Judged, seed: int = 0) -> Reader:
    with seeded(seed):
        model, g = Reader(), generator(seed)
        letters, follows = ids(learn.strings), torch.tensor(learn.follows).float()

        def loss_at(step: int) -> Tensor:
            rows = torch.randint(len(letters), (100,), generator=g)
            return F.binary_cross_entropy_with_logits(model(letters[rows]), follows[rows])

        optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.1)
        fit(optimizer, loss_at, STEPS, schedule=one_cycle())
    return model


@torch.no_grad()
def accuracy(model: Reader, judge: Judged) -> float:
    return ((model(ids(judge.strings)) > 0) == torch.tensor(judge.follows)).float().mean().item()


# the rules


def said(text: str) -> list[int]:
    """What can be asked about a string in a few words, as numbers.

    >>> sum(said("MT")), len(said("MT"))  # an M and a T, the pair MT, begins with M, ends with T, with MT, two letters
    (8, 66)
    """
    pairs = ["".join(pair) for pair in product(LETTERS, LETTERS)]
    ends = [text.startswith(a) for a in LETTERS] + [text.endswith(a) for a in [*LETTERS, *pairs]]
    return [*(text.count(a) for a in LETTERS), *(pair in text for pair in pairs), *map(int, ends), len(text)]


def table(judge: Judged) -> tuple[np.ndarray, np.ndarray]:
    return np.array([said(text) for text in judge.strings], dtype=float), np.array(judge.follows)


def rules(learn: Judged, judge: Judged, questions: int | None) -> tuple[float, int]:
    """(accuracy, questions used) of the tree of at most so many questions that validates best."""
    from sklearn.model_selection import GridSearchCV
    from sklearn.tree import DecisionTreeClassifier

    leaves = [None] if questions is None else range(2, questions + 2)
    choices = {"max_leaf_nodes": [*leaves], "min_samples_leaf": [1, 5]}
    search = GridSearchCV(DecisionTreeClassifier(random_state=0), choices, cv=5).fit(*table(learn))
    return float(search.score(*table(judge))), int(search.best_estimator_.get_n_leaves()) - 1


def summed(learn: Judged, judge: Judged) -> float:
    from sklearn.linear_model import LogisticRegression

    return float(LogisticRegression(max_iter=5000).fit(*table(learn)).score(*table(judge)))


def one(seed: int) -> dict[str, float]:
    learn, judge = draw(seed)
    shuffled = Judged(learn.strings, random.Random(seed).sample(learn.follows, TRAINED))
    best, used = rules(learn, judge, RULES)
    model = network(learn)
    return {
        "direct": accuracy(model, judge),
        "rules": best,
        "questions": used,
        "trained on": accuracy(model, learn),
        **{f"rules of {n}": rules(learn, judge, n)[0] for n in MORE},
        "rules without a bound": rules(learn, judge, None)[0],
        "questions without a bound": rules(learn, judge, None)[1],
        "all features summed": summed(learn, judge),
        "shuffled labels": accuracy(network(shuffled), judge),
    }


def measure() -> Measured:
    with threads(1):
        found = [one(seed) for seed in range(GRAMMARS)]
    numbers: dict[str, Any] = {name: [row[name] for row in found] for name in found[0]}
    gains = [100 * (row["direct"] - row["rules"]) for row in found]
    numbers |= {"gain": mean(gains), "gains": gains, "least gain": min(gains)}
    return Measured.by({"gain": min(gains) >= 10}, numbers)


CLAIM = Claim(
    name="cot_overthinking_tasks",
    statement=(
        "on finite-state-grammar strings a small sequence model that judges directly beats the same information "
        "squeezed through a short list of explicit verbal rules (a condition of the paper's effect, which itself needs "
        "large chat models)"
    ),
    bound="direct accuracy >= rule-list accuracy + 10 points on unseen strings, for each of 5 grammars",
    measure=measure,
)
