"""A-shape: every block of queries reads the first blocks of the text and the blocks just before it, whatever they hold.

    I reads J  if  J·block < sinks  or  ⌊(end_I - J·block) / block⌋ < local blocks,   end_I the last query of I

The pattern that needs no estimate: what a sparse prefill has to beat. With `dense_last` it is the tri-shape, in which
the last rows, the question, read everything.

Worked by hand, blocks of one token, one sink and a local window of one: query 3 reads keys 0 and 3.

>>> import torch
>>> k = torch.tensor([0.0, 5.0, 5.0, 0.0]).view(1, 1, 4, 1)
>>> v = torch.tensor([2.0, 9.0, 9.0, 4.0]).view(1, 1, 4, 1)
>>> out, _ = reference(torch.ones(1, 1, 4, 1), k, v, Config(sinks=1, local=1, block_q=1, block_k=1), Call())
>>> out[0, 0, 3].item()
3.0
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core import Card, K, Out, Q, V, require
from regard.core.call import Call
from regard.kinds.mechanism import Mechanism
from regard.ops.blocks import BlockSettings, Placed, both_ends, slow_attention


@dataclass(frozen=True)
class Config(BlockSettings):
    sinks: int = 128  # tokens, rounded up to blocks
    local: int = 3968  # tokens up to the last query of a block, rounded up to blocks

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.sinks >= 0 and self.local >= 1, "sinks >= 0, local >= 1", sinks=self.sinks, local=self.local
        )
        require(self.local >= self.block_q, "local >= block_q: a block of queries reads its own keys", local=self.local,
                block_q=self.block_q)  # fmt: skip


def sees(q: Tensor, k: Tensor, start: int, cfg: Config) -> Tensor:
    seen = torch.zeros(len(q), q.shape[1], k.shape[1], dtype=torch.bool)
    for i in range(q.shape[1]):
        end = (start + i) // cfg.block_q * cfg.block_q + cfg.block_q - 1
        for j in range(k.shape[1]):
            first = j // cfg.block_k * cfg.block_k  # of its block
            seen[:, i, j] = first < cfg.sinks or end - (first + cfg.block_k - 1) < cfg.local
    return seen


def reference(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, tuple | None]:
    return slow_attention(sees, q, k, v, cfg, call)


def choose(at: Placed, cfg: Config, call: Call) -> Tensor:
    return both_ends(at, cfg.sinks, cfg.local, cfg.block_q, cfg.block_k)


METHOD = Mechanism(
    config=Config,
    reference=reference,
    choose=choose,
    patterns=("causal_self",),
    unsupported={
        "self": "its window lies before a query",
        "cross": "its window lies before a query",
        "causal_cross": "its window lies before a query",
    },
    test_settings=(
        {"sinks": 2, "local": 5, "block_q": 4, "block_k": 2},
        {"sinks": 0, "local": 9, "block_q": 4, "block_k": 4},
    ),
    knob=("local", (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 2**40)),
    state_size=lambda cfg, dims, n: dims["kv_heads"] * n * (dims["key"] + dims["value"]),
    card=Card(
        title="A-shape",
        paper=(
            "MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse Attention (2024), "
            "the A-shape pattern; SCBench's tri-shape with dense_last"
        ),
        year=2024,
        idea="the first tokens and the latest, in blocks: no estimate at all",
        cost="N · (sinks + local) products",
        state="every key and value so far; those between sinks and window are never read",
        needs=("qkv",),
        neutral={"local": 2**40},
        caveat=(
            "in whole blocks, so up to block_k - 1 tokens more than asked on either side; the mask page `sinks` "
            "is the same shape token by token, and goes beside other masks"
        ),
    ),
)
