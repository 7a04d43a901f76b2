"""Grids and trees of questions as numbers, for a model that is trained from nothing."""

from dataclasses import dataclass
from typing import Any

from regard.tasks.grid_questions import COLOURS, OPERATORS, SHAPES, Answer, Grid, If, Tree


@dataclass(frozen=True)
class Codes:
    """Where the ids of a configuration begin; 0 is nothing, 1 is if."""

    cfg: Any  # with side, colours, shapes
    operator: int = 2

    @property
    def colour(self) -> int:
        return self.operator + len(OPERATORS)

    @property
    def shape(self) -> int:
        return self.colour + self.cfg.colours

    @property
    def truth(self) -> int:
        return self.shape + self.cfg.shapes

    @property
    def place(self) -> int:
        return self.truth + 2

    @property
    def object(self) -> int:
        return self.place + self.cfg.side**2

    @property
    def size(self) -> int:
        return self.object + self.cfg.colours * self.cfg.shapes

    def question(self, tree: Tree) -> list[int]:
        """Three ids for each node, its condition before its branches: operator, colour, shape."""
        if isinstance(tree, If):
            return [
                1,
                0,
                0,
                *(i for part in (tree.condition, tree.then, tree.other) for i in self.question(part)),
            ]
        colour = 0 if tree.colour is None else self.colour + tree.colour
        shape = 0 if tree.shape is None else self.shape + tree.shape
        return [self.operator + OPERATORS.index(tree.operator), colour, shape]

    def cells(self, grid: Grid) -> list[int]:
        """An id for each cell, row by row."""
        ids = [0] * self.cfg.side**2
        for (row, column), (colour, shape) in grid.items():
            ids[row * self.cfg.side + column] = self.object + colour * self.cfg.shapes + shape
        return ids

    def answer(self, answer: Answer) -> int:
        if isinstance(answer, tuple):
            return self.place + answer[0] * self.cfg.side + answer[1]
        if isinstance(answer, str):
            return (
                self.colour + COLOURS.index(answer)
                if answer in COLOURS
                else self.shape + SHAPES.index(answer)
            )
        return self.truth + answer
