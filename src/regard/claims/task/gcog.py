"""gCOG's claim on a small grid: cross-attention bears more distractors than a GRU, and neither bears deeper trees.

Both read the same tokens, each a sum of embeddings: a node of the question is its operator, colour, shape and place in
the tree, a cell of the grid its colour, shape and place.

    GRU      over the nodes, then the cells; a hidden layer on the last state
    cross    a layer of self-attention over the nodes, whose rows then attend to the cells and to one learned row, where
             nothing is found; a hidden layer, a second layer of self-attention, the answer from the first node

distractor   4 x 4 cells, 5 colours, 5 shapes, depth 1. Trained with 1 to 3 other objects until 85 % of 500 fresh
             questions of the same kind are right (looked at every 100 steps, at most 3,000), so that both are
             compared at the same accuracy; asked with 12.
productive   6 x 6 cells, 7 colours, 7 shapes, 1 to 3 other objects: 300 steps on depth 1, then 700 on depth 3 with
             depth 1 in every fourth; asked at depth 5. Nobody has learned depth 3 to the end after so few steps: the
             numbers of depth 1 and 3 stand beside those of depth 5.

Chance is that of a guess of the right sort, the mean over the four sorts of answers, which are equally many.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.claims.lab import count_parameters, generator, mean, seeded, threads
from regard.core.claim import Claim, Measured
from regard.tasks.gcog import Codes, Config, generate
from regard.train.loop import fit

WIDTH, HIDDEN, HEADS, NODES = 64, 96, 4, 10  # NODES of a tree of depth 5: seven operators, three ifs
POOL, BATCH, RATE = 20_000, 64, 3e-3
LEVEL, LOOK, MOST, ASKED = 0.85, 100, 3000, 500
FIRST, STEPS, BESIDE = 300, 1000, 4  # steps on depth 1 alone, all of them, then every fourth is of depth 1
CROWDED = {"side": 4, "colours": 5, "shapes": 5, "distractors": 3, "crowd": 12}
DEEP = {"side": 6, "colours": 7, "shapes": 7, "distractors": 3}

Questions = tuple[Tensor, Tensor]  # inputs, and the ids of the answers


class Tokens(nn.Module):
    """Ids as `generate` gives them -> nodes [B, T, WIDTH], cells [B, side², WIDTH]."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg, self.codes = cfg, Codes(cfg)
        sizes = {
            "word": self.codes.truth,
            "node": NODES,
            "colour": cfg.colours + 1,
            "shape": cfg.shapes + 1,
            "cell": cfg.side**2,
        }
        self.tables = nn.ModuleDict({name: nn.Embedding(size, WIDTH) for name, size in sizes.items()})
        for table in self.tables.values():
            nn.init.normal_(table.weight, std=0.5)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        question, grid = inputs[:, : -(self.cfg.side**2)], inputs[:, -(self.cfg.side**2) :]
        nodes = self.tables["word"](question.unflatten(1, (-1, 3))).sum(2)
        nodes = nodes + self.tables["node"].weight[: nodes.shape[1]]  # type: ignore[index]
        kind = grid - self.codes.object
        colour = torch.where(grid > 0, 1 + kind.div(self.cfg.shapes, rounding_mode="floor"), 0)
        shape = torch.where(grid > 0, 1 + kind % self.cfg.shapes, 0)
        cells = self.tables["colour"](colour) + self.tables["shape"](shape) + self.tables["cell"].weight
        return nodes, cells


class Recurrent(nn.Module):
    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.tokens, self.gru = Tokens(cfg), nn.GRU(WIDTH, HIDDEN, batch_first=True)
        self.out = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, Codes(cfg).size))

    def forward(self, inputs: Tensor) -> Tensor:
        states, _ = self.gru(torch.cat(self.tokens(inputs), 1))
        return self.out(states[:, -1])


class Cross(nn.Module):
    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.tokens = Tokens(cfg)
        self.before, self.after = (
            nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, 0.0, batch_first=True, norm_first=True)
            for _ in range(2)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.nothing = nn.Parameter(torch.randn(1, 1, WIDTH) / 2)
        self.cross = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.hidden = mlp(4 * WIDTH, WIDTH)
        self.out = mlp(2 * WIDTH, Codes(cfg).size)

    def forward(self, inputs: Tensor) -> Tensor:
        nodes, cells = self.tokens(inputs)
        nodes = self.before(nodes)
        keys = self.norms[1](torch.cat([self.nothing.expand(len(cells), -1, -1), cells], 1))
        nodes = nodes + self.cross(self.norms[0](nodes), keys, keys, need_weights=False)[0]
        nodes = self.after(nodes + self.hidden(nodes))
        return self.out(nodes[:, 0])


def mlp(hidden: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, hidden), nn.ReLU(), nn.Linear(hidden, out))


MODELS = {"cross": Cross, "gru": Recurrent}


def questions(cfg: Config, count: int, seed: int) -> Questions:
    inputs, labels = generate(cfg, count, seed)
    return inputs, labels[:, -1]


@torch.no_grad()
def accuracy(model: nn.Module, asked: Questions) -> float:
    """Percent."""
    return 100 * (model(asked[0]).argmax(-1) == asked[1]).double().mean().item()


def chance(cfg: Config) -> float:
    """Percent, of a guess of the right sort."""
    return 100 * mean((1 / 2, 1 / cfg.colours, 1 / cfg.shapes, 1 / cfg.side**2))


class Learner:
    """A model, its optimizer, and what it draws its batches from."""

    def __init__(self, kind: type[nn.Module], cfg: Config) -> None:
        with seeded(0):
            self.model = kind(cfg)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), RATE, weight_decay=0.01)
        self.g, self.steps = generator(0), 0

    def learn(self, pools: list[Questions]) -> None:
        """A step on each of these."""

        def loss_at(step: int) -> Tensor:
            inputs, right = pools[step - start]
            rows = torch.randint(len(right), (BATCH,), generator=self.g)
            return F.cross_entropy(self.model(inputs[rows]), right[rows])

        start = self.steps
        self.steps += len(pools)
        fit(self.optimizer, loss_at, self.steps, start=start)


def crowded(kind: type[nn.Module]) -> dict[str, float]:
    trained, asked = (Config("distractor", told, **CROWDED) for told in (True, False))
    pool, look = questions(trained, POOL, 0), questions(trained, ASKED, 1)
    learner = Learner(kind, trained)
    while learner.steps < MOST and accuracy(learner.model, look) < 100 * LEVEL:
        learner.learn([pool] * LOOK)
    return {
        "few": accuracy(learner.model, questions(trained, 2 * ASKED, 2)),
        "crowd": accuracy(learner.model, questions(asked, 2 * ASKED, 2)),
        "steps": learner.steps,
        "parameters": count_parameters(learner.model),
    }


def deep(kind: type[nn.Module]) -> dict[str, float]:
    one = Config("distractor", True, **DEEP)
    three, five = (Config("productive", told, **DEEP) for told in (True, False))
    easy, hard = (questions(cfg, POOL, 0) for cfg in (one, three))
    learner = Learner(kind, three)
    learner.learn([easy if i < FIRST or i % BESIDE == 0 else hard for i in range(STEPS)])
    depths = {"depth_1": one, "depth_3": three, "depth_5": five}
    return {name: accuracy(learner.model, questions(cfg, 2 * ASKED, 2)) for name, cfg in depths.items()}


def measure() -> Measured:
    numbers: dict[str, Any] = {"chance_depth_5": chance(Config("productive", **DEEP))}
    with threads(1):
        for name, kind in MODELS.items():
            numbers |= {f"{name}_{key}": value for key, value in (crowded(kind) | deep(kind)).items()}
    numbers["gap"] = numbers["cross_crowd"] - numbers["gru_crowd"]
    parts = {
        "alike in training": min(numbers[f"{name}_few"] for name in MODELS) >= 80,
        "distractors": numbers["gap"] >= 10,
        "deeper trees": max(numbers[f"{name}_depth_5"] for name in MODELS) <= numbers["chance_depth_5"] + 15,
    }
    return Measured.by(parts, numbers)


CLAIM = Claim(
    name="gcog",
    statement=(
        "on a reduced gCOG a model with cross-attention between question and grid bears more distractors than it was "
        "trained with better than a GRU of the same accuracy in training, and neither answers deeper trees"
    ),
    bound=(
        "with 12 other objects instead of 1 to 3 cross-attention >= GRU + 10 points, both >= 80 % on 1 to 3; at depth "
        "5 both <= chance + 15 points"
    ),
    measure=measure,
)
