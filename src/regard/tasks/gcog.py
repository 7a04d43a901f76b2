"""gCOG: a grid of coloured shapes, and a tree of questions about it of which one is to be answered.

    Objects, each with its row and column:             Question: if (is there any red star)
    red star at 3 5                                     then (what colour is the heart)
    blue heart at 0 7  ...                              else (where is the blue cube)?     -> blue

An operator asks one thing of one object: does it exist; its colour, of a shape; its shape, of a colour; its place; is
the sum, or the product, of its row and column even, or odd. A tree of depth 3 asks one of two operators, by the answer
of a third; one of depth 5 does so with trees of depth 3. What is asked about is never ambiguous.

    split         what a model is trained on                        what it is asked
    distractor    depth 1, 1 to `distractors` other objects         depth 1, `crowd` other objects
    systematic    depth 1, four fifths of operators x operands      depth 1, the other fifth
    productive    depth 3                                           depth 5

A fourth of the answers each are true or false, a colour, a shape and a place, whatever the operators: a guess of the
right sort is right once in 2, `colours`, `shapes` or `side`² times.

>>> question, _, answer = draw(Config(split="productive", trained=True), random.Random(261), 1)
>>> tell(question), words_of(answer)
('if (is there any black star) then (what colour is the arrow) else (what colour is the cube)', 'white')
"""

import random
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from regard.core import Card, require
from regard.kinds.task import TaskPage
from regard.tasks.base import Frame, Sample, check_writes, continuation, encode, even
from regard.tasks.corpus import Source, held_out
from regard.tasks.grid_codes import Codes
from regard.tasks.grid_questions import (
    COLOURS,
    OPERATORS,
    SHAPES,
    SORTS,
    Answer,
    Ask,
    Cell,
    Draft,
    Grid,
    Tree,
    solve,
    tell,
    words_of,
)

SPLITS = ("distractor", "systematic", "productive")
FIFTH = 5  # one in so many pairs of operator and operand is not trained on
INTRO = "\nObjects, each with its row and column:"
BEGINS = "The answer is"


@dataclass(frozen=True)
class Config:
    # what is asked is new: more objects, or new pairs ("systematic"), or deeper trees ("productive")
    split: str = "distractor"
    trained: bool = False  # ask what the split trains on
    distractors: int = 5  # the most objects that nothing asks for
    crowd: int = 10  # how many they are in the test of `distractor`; the paper has up to 40
    side: int = 10  # cells of the grid, each way
    colours: int = 10  # from how many an object's is drawn
    shapes: int = 10  # from how many an object's is drawn

    def __post_init__(self) -> None:
        require(self.split in SPLITS, f"split is one of {', '.join(SPLITS)}", split=self.split)
        for name in ("colours", "shapes"):
            require(5 <= getattr(self, name) <= 10, f"5 <= {name} <= 10", **{name: getattr(self, name)})
        require(3 <= self.side <= 10, "3 <= side <= 10", side=self.side)
        require(1 <= self.distractors <= self.crowd, "1 <= distractors <= crowd", crowd=self.crowd)
        objects = self.needed + self.others[1]
        require(objects <= self.side**2, "a cell for each object", side=self.side, objects=objects)
        # all of a tree may be products that are odd, and each has a colour and a shape of its own
        most = min((self.side // 2) ** 2, self.colours, self.shapes)
        require(self.needed <= most, "side, colours and shapes suffice for the operators", depth=self.depth)

    @property
    def depth(self) -> int:
        return (3 if self.trained else 5) if self.split == "productive" else 1

    @property
    def needed(self) -> int:
        """Operators of a tree, each of which asks for an object."""
        return 2 ** (self.depth // 2 + 1) - 1

    @property
    def others(self) -> Cell:
        """The least and the most objects that nothing asks for."""
        crowded = self.split == "distractor" and not self.trained
        return (self.crowd, self.crowd) if crowded else (1, self.distractors)

    def allows(self, ask: Ask) -> bool:
        """Whether the tree may have this operator with this operand: of `systematic`, what is of its side."""
        number = OPERATORS.index(ask.operator) + (ask.colour or 0) + 2 * (ask.shape or 0)
        return self.split != "systematic" or (number % FIFTH == 0) != self.trained


def draw(cfg: Config, rng: random.Random, number: int) -> tuple[Tree, Grid, Answer]:
    """The question of this number, its grid and its answer; sorts of answers take turns, true and false within one."""
    draft, sort = Draft(rng, cfg.side, cfg.colours, cfg.shapes, cfg.allows), SORTS[number % len(SORTS)]
    tree = draft.tree(cfg.depth, sort, number // len(SORTS) % 2 == 0)
    draft.distract(rng.randint(*cfg.others))
    return tree, draft.grid, solve(tree, draft.grid)


# as text


def lines(grid: Grid, rng: random.Random) -> str:
    """A line for each object, in any order."""
    told = [f"\n{COLOURS[c]} {SHAPES[s]} at {row} {column}" for (row, column), (c, s) in grid.items()]
    return INTRO + "".join(rng.sample(told, len(told)))


def chance_of(cfg: Config, answer: Answer) -> float:
    """How often a guess of the right sort is right."""
    if isinstance(answer, str):
        return 1 / (cfg.colours if answer in COLOURS else cfg.shapes)
    return 1 / cfg.side**2 if isinstance(answer, tuple) else 0.5


def samples(
    cfg: Config,
    tokenizer: Any,
    length: int,
    count: int,
    seed: int,
    source: Source | None = None,
    *,
    chat: bool = False,
) -> list[Sample]:
    """`count` prompts of exactly `length` tokens: running text, the objects, the question."""
    source, drawn = source or held_out(), []
    for i in range(count):
        rng = random.Random(f"gcog {seed} {i}")
        tree, grid, answer = draw(cfg, rng, i)
        asks = f'\nQuestion: {tell(tree)}? Say true or false, a colour, a shape, or "row R, column C".'
        frame, ids = Frame.freely(tokenizer, asks, BEGINS, chat), encode(tokenizer, lines(grid, rng))
        filler = source.take(tokenizer, frame.room(length, len(ids)), rng)
        chance = chance_of(cfg, answer)
        drawn.append(
            Sample(frame.around(filler + ids), [0], (0, 0), chance=chance, wanted=(words_of(answer),))
        )
    right = answer_ids(cfg, tokenizer)
    return even([replace(sample, answer=right) for sample in drawn])


def answer_ids(cfg: Config, tokenizer: Any) -> list[int]:
    """The longest of all answers: so many tokens are generated."""
    answers: list[Answer] = [True, False, *COLOURS[: cfg.colours], *SHAPES[: cfg.shapes]]
    answers += [(i, i) for i in range(cfg.side)]
    for answer in answers:
        check_writes(tokenizer, words_of(answer))
    return max((continuation(tokenizer, BEGINS, f" {words_of(a)}.") for a in answers), key=len)


# as numbers, for a model that is trained from nothing


def generate(cfg: Config, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Ids of the question and then of the cells; the label stands at the last."""
    codes, rows, right = Codes(cfg), [], []
    for i in range(count):
        tree, grid, answer = draw(cfg, random.Random(f"gcog {seed} {i}"), i)
        rows.append(codes.question(tree) + codes.cells(grid))
        right.append(codes.answer(answer))
    inputs = torch.tensor(rows)
    labels = torch.full_like(inputs, -100)
    labels[:, -1] = torch.tensor(right)
    return inputs, labels


METHOD = TaskPage(
    config=Config,
    samples=samples,
    generate=generate,
    metric="recall",
    patterns=("causal_self",),
    test_settings=(
        {"trained": True},
        {"split": "systematic"},
        {"split": "systematic", "trained": True},
        {"split": "productive", "distractors": 2},
    ),
    card=Card(
        title="gCOG",
        paper="On the generalization capacity of neural networks during generic multimodal reasoning (ICLR 2024)",
        year=2024,
        idea="a grid of coloured shapes and a tree of questions; splits with more objects, new pairs, deeper trees",
        cost="none",
        state="the objects",
        caveat="the grid is told as text, a line for each object; shapes are words, where the paper has letters. Sums "
        "and products are of one object; the released code also takes two. Operators are its eight and the switch: "
        "a comparison of objects is in none of its splits. Its systematic split of depth 1 is here, that of "
        "recombined trees is not. Answers are balanced by their sort, there by operator",
    ),
)
