"""DHSA's claim, on noise: does the choice of chunks know how long they are?"""

import torch

from regard.claims.lab import difference, generator, random_qkv
from regard.core.call import Call
from regard.core.claim import Claim, Measured
from regard.methods.mechanisms.sparse import dhsa as page

DRAWS, CHUNKS, TAKEN, WIDTH, LONGEST = 300, 64, 16, 32, 64


def correlation(pool: str) -> float:
    """Of a chunk's length with whether it is among the best, over all chunks of all draws."""
    lengths, taken = [], []
    for seed in range(DRAWS):
        g = generator(seed)
        length = torch.randint(1, LONGEST + 1, (CHUNKS,), generator=g)
        end = length.cumsum(0)
        k = torch.randn(1, 1, int(end[-1]), WIDTH, generator=g)
        q = torch.randn(1, 1, 1, WIDTH, generator=g)
        score = (q @ page.chunk_keys(k, end - length, end, pool).mT)[0, 0, 0]
        chosen = torch.zeros(CHUNKS).index_fill(0, score.topk(TAKEN).indices, 1.0)
        lengths.append(length.float())
        taken.append(chosen)
    both = torch.stack([torch.cat(lengths), torch.cat(taken)])
    return torch.corrcoef(both)[0, 1].item()


def full_budget() -> float:
    q, k, v = random_qkv(generator(), 4, 200, 16)
    cfg = page.Config(budget=200, block_q=16, chunk=7)
    return difference(
        page.METHOD.fast(q, k, v, cfg, Call())[0],
        torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True),
    )


def measure() -> Measured:
    found = {pool: correlation(pool) for pool in page.POOLS}
    dense = full_budget()
    parts = {
        "roots are blind to length": abs(found["sqrt"]) < 0.05,
        "means favour short": found["mean"] < -0.1,
        "sums favour long": found["sum"] > 0.1,
        "full budget": dense < 1e-5,
    }
    numbers = {f"correlation_{pool}": r for pool, r in found.items()}
    return Measured.by(parts, {**numbers, "full_budget_difference": dense, "draws": DRAWS, "chunks": CHUNKS})


CLAIM = Claim(
    name="dhsa",
    statement=(
        "on iid noise keys, sqrt-length scaling makes chunk selection independent of chunk length, whereas mean "
        "pooling favours short and sum pooling long chunks; full budget reproduces dense attention"
    ),
    bound=(
        "corr(length, selected) over chunks: |r| < 0.05 (sqrt), < -0.1 (mean), > 0.1 (sum), 300 draws; full-budget "
        "diff < 1e-5"
    ),
    measure=measure,
)
