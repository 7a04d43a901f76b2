"""Power-law rehearsal: a network that meets old tasks ever more rarely forgets little, without any regulariser.

Ten tasks are scikit-learn's digits with their 64 pixels in ten fixed random orders, learned one after the other by an
MLP of one hidden layer and one output layer for all tasks, with plain SGD. A phase is `LEARN` steps on the new task,
then `REHEARSE` steps whose every image is of an old task, drawn anew:

    p(task s in phase t) ∝ d^-α      d = t - s >= 1, the lag: how many phases ago the task was learned
    power      α = 1                 uniform    α = 0, all old tasks alike
    none       no rehearsal          longer     no rehearsal, as many steps more on the new task
    reversed   α = -1, the oldest most: a control

Power and uniform rehearse equally many images in every phase; the old tasks' share of these is all that differs, and
`longer` has as many steps as they have. The first phase has nothing to rehearse. What counts is the mean accuracy on
test images of all ten tasks after the last phase, the mean over three seeds; a seed gives the orders of pixels, the
weights and the images drawn. `learned` is the accuracy on a task right after its `LEARN` steps. The rate of each arm
is the best of four on seed 10 and the images of "choice", which judge nothing; α = 1 was set beforehand (neither
exponent nor schedule of the paper is known to us), and α = 2 is reported beside it.

That the shares follow a power law of the lag is not what helps: the reversed shares do as well, steeper ones worse,
and what counts is that old tasks come back at all. A phase ends with rehearsal, so that the last task, which has not
been rehearsed yet, is the one that all arms with rehearsal know least.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.claims.digits import digits
from regard.claims.lab import generator, mean, seeded, sweep, threads
from regard.core import require
from regard.core.claim import Claim, Measured
from regard.train.loop import fit

TASKS, HIDDEN, BATCH = 10, 128, 32
LEARN, REHEARSE = 300, 150
RATES, SEEDS, TUNED_ON = (0.03, 0.1, 0.3, 0.6), (0, 1, 2), 10


class Arm(NamedTuple):
    alpha: float | None  # None: nothing is rehearsed
    more: int = 0  # steps on the new task, beside LEARN


ARMS: Mapping[str, Arm] = {
    "power": Arm(1.0),
    "uniform": Arm(0.0),
    "none": Arm(None),
    "longer": Arm(None, REHEARSE),
    "reversed": Arm(-1.0),
    "power_2": Arm(2.0),
}


def shares(phase: int, alpha: float) -> Tensor:
    """[phase] the probability of each old task, 0 the first, in the phase of this number.

    >>> shares(3, 1.0)  # lags 3, 2, 1: 1/3, 1/2, 1 over their sum 11/6
    tensor([0.1818, 0.2727, 0.5455])
    """
    require(phase >= 1, "the first phase has no old task", phase=phase)
    share = torch.arange(phase, 0, -1).float() ** -alpha
    return share / share.sum()


class Run(NamedTuple):
    """After the last phase: accuracy by task; that right after it was learned; how often each was rehearsed."""

    final: list[float]
    learned: list[float]
    rehearsed: list[int]


class Learner:
    """A network, the orders of pixels, and what is drawn."""

    def __init__(self, seed: int, rate: float) -> None:
        self.g = generator(seed)
        self.orders = torch.stack([torch.randperm(64, generator=self.g) for _ in range(TASKS)])
        self.images, self.labels = digits()["train"]
        with seeded(seed):
            self.model = nn.Sequential(nn.Linear(64, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 10))
        self.optimizer = torch.optim.SGD(self.model.parameters(), rate)
        self.rehearsed = torch.zeros(TASKS, dtype=torch.long)

    def loss(self, tasks: Tensor) -> Tensor:
        """Of one image of each of these tasks [B]."""
        rows = torch.randint(len(self.images), (len(tasks),), generator=self.g)
        pixels = self.images[rows].flatten(1).gather(1, self.orders[tasks])
        return F.cross_entropy(self.model(pixels), self.labels[rows])

    def learn(self, task: int, steps: int) -> None:
        fit(self.optimizer, lambda step: self.loss(torch.full((BATCH,), task)), steps, clip=None)

    def rehearse(self, share: Tensor) -> None:
        def loss_at(step: int) -> Tensor:
            tasks = share.multinomial(BATCH, replacement=True, generator=self.g)
            self.rehearsed += tasks.bincount(minlength=TASKS)
            return self.loss(tasks)

        fit(self.optimizer, loss_at, REHEARSE, clip=None)

    @torch.no_grad()
    def accuracy(self, task: int, part: str) -> float:
        """Percent."""
        images, labels = digits()[part]
        answers = self.model(images.flatten(1)[:, self.orders[task]]).argmax(1)
        return 100 * (answers == labels).double().mean().item()


def run(arm: Arm, seed: int, rate: float, part: str) -> Run:
    learner, learned = Learner(seed, rate), []
    for task in range(TASKS):
        learner.learn(task, LEARN + (arm.more if task else 0))
        learned.append(learner.accuracy(task, part))
        if task and arm.alpha is not None:
            learner.rehearse(shares(task, arm.alpha))
    final = [learner.accuracy(task, part) for task in range(TASKS)]
    return Run(final, learned, learner.rehearsed.tolist())


def side(arm: Arm) -> dict[str, Any]:
    """At the rate that is best on seed 10: means over the seeds, by task where it is a list."""
    tried = sweep(RATES, lambda rate: mean(run(arm, TUNED_ON, rate, "choice").final))
    rate = max(tried, key=tried.__getitem__)
    runs = [run(arm, seed, rate, "test") for seed in SEEDS]
    return {
        "accuracy": mean(mean(r.final) for r in runs),
        "by_seed": [mean(r.final) for r in runs],
        "by_task": [mean(task) for task in zip(*(r.final for r in runs), strict=True)],
        "learned": mean(mean(r.learned) for r in runs),
        "rehearsed": [mean(task) for task in zip(*(r.rehearsed for r in runs), strict=True)],
        "rate": rate,
    }


def measure() -> Measured:
    with threads(1):
        sides = {name: side(arm) for name, arm in ARMS.items()}
    numbers = {f"{key}_{name}": value for name, found in sides.items() for key, value in found.items()}
    best_without = max(numbers["accuracy_none"], numbers["accuracy_longer"])
    gain, margin = (
        numbers["accuracy_power"] - best_without,
        numbers["accuracy_power"] - numbers["accuracy_uniform"],
    )
    budget = {sum(sides[name]["rehearsed"]) for name in ("power", "uniform")}
    numbers |= {"over_none": gain, "over_uniform": margin, "budgets": sorted(budget)}
    learned = min(numbers["learned_power"], numbers["learned_uniform"]) >= 90
    parts = {
        "tasks are learned": learned,
        "one budget": len(budget) == 1,
        "over none": gain >= 20,
        "near uniform": margin >= -2,
    }
    return Measured.by(parts, numbers)


CLAIM = Claim(
    name="power_law_rehearsal",
    statement=(
        "on permuted digits, rehearsal by a power law of the lag keeps mean accuracy far above no rehearsal and within "
        "a small margin of uniform rehearsal at an equal budget"
    ),
    bound=(
        "final mean accuracy over ten tasks, three seeds: power law >= none + 20 points, whether none has the steps of "
        "rehearsal or not, and >= uniform - 2 points; with rehearsal tasks are learned to >= 90 % in their phase"
    ),
    measure=measure,
)
