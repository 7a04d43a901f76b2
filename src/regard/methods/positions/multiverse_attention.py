"""Multiverse Attention: paths of one parallel block do not see each other, and all start at one position.

    <Parallel> <Goal> .. </Goal> <Path> .. </Path> <Path> .. </Path> <Conclusion> .. </Conclusion> </Parallel>

    i sees j    if  j ≤ i, and no block has i in one of its paths and j in another
    position_i  =   1 + the largest position of the tokens before it that i sees,  0 if there are none

So a path is written as if its siblings were not there, and what follows the block reads all of them and counts on from
the end of the longest. Paths can be generated side by side, each on a copy of the stored prefix; their keys are then
put together as they are, for a key's position does not depend on the siblings. Blocks may stand within paths.

Two paths of two and one tokens, and a conclusion; 1 and 2 open and close a block, 3 and 4 a path:

>>> roles = read_roles(torch.tensor([9, 1, 3, 9, 4, 3, 4, 9, 2]), parallel=(1, 2), path=(3, 4))
>>> build(Config()).dense(9, roles=roles).int()[0, 0, 4:8]
tensor([[1, 1, 1, 1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 1, 0, 0, 0],
        [1, 1, 0, 0, 0, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 1, 1, 1, 0]], dtype=torch.int32)
>>> positions(roles, Config())
tensor([0, 1, 2, 3, 4, 2, 3, 5, 6])
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core import Card
from regard.core.errors import require
from regard.core.mask import Coordinates, Mask, causal, predicate
from regard.core.roles import Roles
from regard.kinds.position import PositionPage

BITS = 15  # of a label for each level of nesting, the outermost lowest: 32,767 blocks and as many paths in a text


@dataclass(frozen=True)
class Config:
    depth: int = 4  # levels of nesting that are read; 0: none

    def __post_init__(self) -> None:
        require(0 <= self.depth <= 4, "0 <= depth <= 4, what a label of 64 bits holds", depth=self.depth)


def read_roles(ids: Tensor, parallel: tuple[int, int], path: tuple[int, int]) -> Roles:
    """The roles of texts [N] or [B, N] in which these ids open and close blocks and paths, tags included.

    `parallel` and `path` number the blocks, and the paths in them, around a token: 0 where it is in no path.
    """
    rows = torch.tensor([labels(row, parallel, path) for row in ids.reshape(-1, ids.shape[-1]).tolist()])
    blocks, paths = (label.reshape(ids.shape).to(ids.device) for label in rows.unbind(-1))
    return Roles(parallel=blocks, path=paths)


def labels(ids: list[int], parallel: tuple[int, int], path: tuple[int, int]) -> list[tuple[int, int]]:
    """(parallel, path) of every token. Blocks and paths may be open at the end: a text that is being generated."""
    opened: list[tuple[str, int]] = []  # from the outermost on
    count, rows = {"block": 0, "path": 0}, []
    for place, token in enumerate(ids):
        if token in (parallel[0], path[0]):
            kind = "block" if token == parallel[0] else "path"
            inside = opened[-1][0] if opened else None
            require(
                kind == "block" or inside == "block", "a path opens in a block", place=place, inside=inside
            )
            count[kind] += 1
            opened.append((kind, count[kind]))
        in_paths = [at for at, (kind, _) in enumerate(opened) if kind == "path"]
        blocks, paths = ([opened[at - back][1] for at in in_paths] for back in (1, 0))
        rows.append((packed(blocks), packed(paths)))
        if token in (parallel[1], path[1]):
            kind = "block" if token == parallel[1] else "path"
            require(
                bool(opened) and opened[-1][0] == kind,
                "what was opened last closes first",
                place=place,
                closes=kind,
            )
            opened.pop()
    return rows


def packed(numbers: list[int]) -> int:
    require(len(numbers) <= 4, "paths are nested 4 deep at most", deep=len(numbers))
    most = max(numbers, default=0)
    require(most < 2**BITS, f"fewer than {2**BITS} blocks and paths", number=most)
    return sum(number << (BITS * level) for level, number in enumerate(numbers))


def apart(block_q: Tensor, path_q: Tensor, block_k: Tensor, path_k: Tensor, depth: int) -> Tensor:
    """Whether some block has the one in one of its paths and the other in another; -1 is in none."""
    found = torch.zeros_like(block_q == block_k)
    for level in range(depth):
        b_q, p_q, b_k, p_k = (
            (label.clamp(min=0) >> (BITS * level)) & (2**BITS - 1)
            for label in (block_q, path_q, block_k, path_k)
        )
        found = found | ((b_q == b_k) & (b_k > 0) & (p_q != p_k))
    return found


@predicate("parallel", "path")
def siblings(at: Coordinates, depth: int) -> Tensor:
    return apart(at.q_role("parallel"), at.q_role("path"), at.k_role("parallel"), at.k_role("path"), depth)


def build(cfg: Config) -> Mask:
    return causal() & ~siblings(cfg.depth)


def positions(roles: Roles, cfg: Config) -> Tensor:
    """Positions of the roles' shape; padding is not counted."""
    real = roles["padding"] == 0 if "padding" in roles else torch.ones_like(roles["path"])
    marks = torch.broadcast_tensors(roles["parallel"], roles["path"], real.long())
    block, path, real = (torch.atleast_2d(mark) for mark in marks)
    # runs of tokens with the same labels, which stand one after the other
    new = (block.diff(dim=-1) != 0) | (path.diff(dim=-1) != 0)
    run = torch.nn.functional.pad(new.long().cumsum(-1), (1, 0))  # [B, N]
    size = real.new_zeros(len(run), int(run.max()) + 1).scatter_add(1, run, real)  # [B, R] tokens
    block, path = (torch.zeros_like(size).scatter(1, run, label) for label in (block, path))
    hidden = apart(block[:, :, None], path[:, :, None], block[:, None], path[:, None], cfg.depth)  # [B, R, R]
    # where a run begins and ends; -1 for those to come and those of padding alone
    start, end = torch.zeros_like(size), torch.full_like(size, -1)
    for r in range(size.shape[1]):
        start[:, r] = 1 + end.masked_fill(hidden[:, r], -1).amax(-1)
        end[:, r] = torch.where(size[:, r] > 0, start[:, r] + size[:, r] - 1, -1)
    tokens, before = real.cumsum(-1) - real, size.cumsum(-1) - size
    return (tokens + (start - before).gather(1, run)).view_as(marks[0])


METHOD = PositionPage(
    config=Config,
    positions=positions,
    build=build,
    patterns=("causal_self",),
    test_settings=({"depth": 1},),
    card=Card(
        title="Multiverse Attention",
        paper="Multiverse: Your Language Models Secretly Decide How to Parallelize and Merge Generation, "
        "arXiv:2506.09991",
        year=2025,
        idea="paths written in parallel, hidden from each other and at the same positions, then read together",
        cost="as causal attention, without the pairs between paths of one block",
        state="all keys; paths of a block share those of the text before it",
        needs=("parallel", "path"),
        lineage=("causal",),
        neutral={"depth": 0},
        caveat=(
            "what stands between two paths, in neither, sees the earlier and is seen by the later, as in the authors' "
            "mask: such a token breaks the symmetry, so write none. Their positions begin every path right after the "
            "end of the Goal and the Conclusion right after the longest path, whatever stands between; without such "
            "tokens they are the same numbers. They refuse a text whose blocks are not closed, and take a path right "
            "within a path; here it is the other way round. Four levels of nesting at most. Given positions that "
            "start anew and no mask, a Hugging Face model takes a row for packed texts: give an attention_mask of ones "
            "beside them"
        ),
    ),
)
