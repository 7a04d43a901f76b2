"""A grid of coloured shapes, and trees of questions about it: drawn together, solved, told in words.

An operator asks one thing of one object. A tree is an operator, or a condition with two trees, one of which is asked.

>>> asks = If(Ask("exist", 0, 3), Ask("colour", None, 4), Ask("place", 2, 8))
>>> tell(asks)
'if (is there any red star) then (what colour is the heart) else (where is the blue cube)'
>>> grid = {(3, 5): (0, 3), (0, 7): (2, 4)}
>>> solve(asks, grid), solve(Ask("sum_even", 0, 3), grid), solve(Ask("product_even", 0, 3), grid)
('blue', True, False)
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "white", "pink", "black", "brown")
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "arrow", "moon", "cube", "spiral")
EXIST, COLOUR, SHAPE, PLACE = "exist", "colour", "shape", "place"
PARITIES = ("sum_even", "sum_odd", "product_even", "product_odd")
TRUTHS = (EXIST, *PARITIES)  # operators of a condition: they answer true or false
OPERATORS = (*TRUTHS, COLOUR, SHAPE, PLACE)
SORTS = ("truth", COLOUR, SHAPE, PLACE)  # of answers, evenly

Cell = tuple[int, int]
Grid = dict[Cell, tuple[int, int]]  # place -> (colour, shape), as numbers
Answer = bool | Cell | str


@dataclass(frozen=True)
class Ask:
    """An operator and its operand; what is asked for is None: the shape of `shape`, the colour of `colour`."""

    operator: str
    colour: int | None
    shape: int | None


@dataclass(frozen=True)
class If:
    condition: Ask
    then: "Tree"
    other: "Tree"


Tree = Ask | If


# questions with their grids


class Draft:
    """A grid that is filled while a tree is drawn, so that each operator answers what it is meant to answer.

    `allowed` says of each operator and operand whether the tree may have it.
    """

    def __init__(
        self, rng: random.Random, side: int, colours: int, shapes: int, allowed: Callable[[Ask], bool]
    ) -> None:
        self.rng, self.allowed = rng, allowed
        self.grid: Grid = {}
        self.cells = rng.sample(list(product(range(side), repeat=2)), side**2)
        self.pairs = list(product(range(colours), range(shapes)))
        self.colours = rng.sample(range(colours), colours)
        self.shapes = rng.sample(range(shapes), shapes)
        self.asked: list[Ask] = []

    def tree(self, depth: int, sort: str, truth: bool) -> Tree:
        """One whose answer is of this sort, and `truth` where it is true or false."""
        if depth == 1:
            return self.ask(self.rng.choice(TRUTHS) if sort == "truth" else sort, truth)
        holds = self.rng.random() < 0.5
        condition = self.ask(self.rng.choice(TRUTHS), holds)
        taken = self.tree(depth - 2, sort, truth)
        left = self.tree(depth - 2, self.rng.choice(SORTS), self.rng.random() < 0.5)
        return If(condition, taken, left) if holds else If(condition, left, taken)

    def ask(self, operator: str, truth: bool) -> Ask:
        colour, shape, ask = self.operand(operator)
        self.colours.remove(colour)
        self.shapes.remove(shape)
        if operator in PARITIES:
            self.put(next(cell for cell in self.cells if parity(operator, cell) == truth), colour, shape)
        elif truth or operator != EXIST:
            self.put(self.cells[0], colour, shape)
        self.asked.append(ask)
        return ask

    def operand(self, operator: str) -> tuple[int, int, Ask]:
        """A colour and a shape that no operator has yet, and the question about them."""
        for colour, shape in product(self.colours, self.shapes):
            ask = Ask(operator, None if operator == COLOUR else colour, None if operator == SHAPE else shape)
            if self.allowed(ask):
                return colour, shape, ask
        raise ValueError(f"no operand is left that {operator} may have")

    def put(self, cell: Cell, colour: int, shape: int) -> None:
        self.cells.remove(cell)
        self.grid[cell] = colour, shape

    def distract(self, count: int) -> None:
        """So many objects beside these that change no answer: none is what an operator asks for."""
        kept = [kind for kind in self.pairs if not any(is_meant(ask, kind) for ask in self.asked)]
        for _ in range(count):
            self.put(self.cells[0], *self.rng.choice(kept))


def is_meant(ask: Ask, kind: tuple[int, int]) -> bool:
    """Whether an operator asks for an object of this colour and shape."""
    return ask.colour in (None, kind[0]) and ask.shape in (None, kind[1])


def parity(operator: str, cell: Cell) -> bool:
    row, column = cell
    of, which = operator.split("_")
    value = row + column if of == "sum" else row * column
    return value % 2 == (which == "odd")


def solve(tree: Tree, grid: Grid) -> Answer:
    """What the tree comes to; an object that is asked for is the only one of its kind."""
    if isinstance(tree, If):
        return solve(tree.then if solve(tree.condition, grid) else tree.other, grid)
    found = [(cell, *kind) for cell, kind in grid.items() if is_meant(tree, kind)]
    if tree.operator == EXIST:
        return bool(found)
    [(cell, colour, shape)] = found
    if tree.operator in PARITIES:
        return parity(tree.operator, cell)
    if tree.operator == PLACE:
        return cell
    return COLOURS[colour] if tree.operator == COLOUR else SHAPES[shape]


def tell(tree: Tree) -> str:
    if isinstance(tree, If):
        return f"if ({tell(tree.condition)}) then ({tell(tree.then)}) else ({tell(tree.other)})"
    thing = " ".join(words[i] for words, i in ((COLOURS, tree.colour), (SHAPES, tree.shape)) if i is not None)
    if tree.operator in PARITIES:
        of, which = tree.operator.split("_")
        return f"is the {of} of the row and column of the {thing} {which}"
    asks = {
        EXIST: "is there any {}", COLOUR: "what colour is the {}", SHAPE: "what shape is the {} object",
        PLACE: "where is the {}",
    }  # fmt: skip
    return asks[tree.operator].format(thing)


def words_of(answer: Answer) -> str:
    if isinstance(answer, tuple):
        return "row {}, column {}".format(*answer)
    return answer if isinstance(answer, str) else str(answer).lower()
