"""Settings that every page shares which chooses blocks, and that papers tend to hide in their code."""

from dataclasses import dataclass

from regard.core import require

WHOLE = 1 << 40  # queries that choose together, where the last ones of a call choose for all


@dataclass(frozen=True, kw_only=True)
class BlockSettings:
    """Blocks of queries and of keys, and what is left dense.

    block_q        queries that choose together
    block_k        keys that are chosen together; it divides block_q, else a block would be judged by keys that come
                   after the queries
    dense_last     the last so many queries of a call read all blocks: they are the question
    dense_below    a text of fewer keys reads all blocks: choosing takes longer than it saves
    dense_layers   attached to a model, the first so many layers keep the model's own attention
    """

    block_q: int = 64
    block_k: int = 64
    dense_last: int = 0
    dense_below: int = 0
    dense_layers: int = 0

    def __post_init__(self) -> None:
        require(self.block_q >= 1 and self.block_k >= 1, "block_q, block_k >= 1", block_q=self.block_q,
                block_k=self.block_k)  # fmt: skip
        require(self.block_q % self.block_k == 0, "block_k divides block_q", block_q=self.block_q,
                block_k=self.block_k)  # fmt: skip
        for name in ("dense_last", "dense_below", "dense_layers"):
            require(getattr(self, name) >= 0, f"{name} >= 0", **{name: getattr(self, name)})
