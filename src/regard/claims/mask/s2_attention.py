"""S2-Attention's claim, on blocks: what do the heads read, each and together?"""

import torch

from regard.core.claim import Claim, Measured
from regard.methods.masks import s2_attention

BLOCKS, BLOCK, LOCAL = 64, 4, 4
SHAPES = ((4, 4, 4), (8, 8, 8), (16, 16, 8), (32, 8, 8), (12, 12, 8))  # query heads, KV heads, stride


def read_blocks(heads: int, kv_heads: int, stride: int) -> torch.Tensor:
    """Booleans [H, I, J]: head h reads some of key block J for query block I."""
    cfg = s2_attention.Config(heads=heads, kv_heads=kv_heads, stride=stride, local=LOCAL, block=BLOCK)
    return s2_attention.build(cfg).blocks(BLOCKS * BLOCK, block=BLOCK).kind[0] > 0


def measure() -> Measured:
    causal = torch.ones(BLOCKS, BLOCKS).tril().bool()
    union, alone, most, bound, future = [], [], [], [], 0
    for heads, kv_heads, stride in SHAPES:
        read = read_blocks(heads, kv_heads, stride)
        union.append((read.any(0) & causal).sum().item() / causal.sum().item())
        # this head's pattern for all heads
        alone.append(max(float(head[causal].double().mean()) for head in read))
        most.append(int(read.sum(-1).max()))
        bound.append(BLOCKS / stride + LOCAL + 1)
        future += int((read & ~causal).sum())
    numbers = {
        "heads_kv_heads_stride": [list(shape) for shape in SHAPES],
        "union_coverage": union,
        "homogeneous_coverage": alone,
        "most_blocks_per_row_and_head": most,
        "bound_on_blocks": bound,
        "future_blocks": future,
    }
    parts = {
        "heads cover all": all(u == 1 for u in union),
        "one pattern does not": all(a < 1 for a in alone),
        "blocks of a row": all(m <= b for m, b in zip(most, bound, strict=True)),
        "nothing of the future": future == 0,
    }
    return Measured.by(parts, numbers)


CLAIM = Claim(
    name="s2_attention",
    statement=(
        "the heads together cover every causal block while each reads about 1 / stride of them and the local "
        "window; one pattern for all heads leaves holes"
    ),
    bound=(
        "union coverage = 100 % for heads >= stride; blocks per query row and head <= N_blocks / stride + "
        "local + 1; coverage of one pattern for all heads < 100 %"
    ),
    measure=measure,
)
