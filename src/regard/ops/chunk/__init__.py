"""The causal scan of linear attention, S_t = e^{g_t} S_{t-1} + k_tᵀ v_t and o_t = q_t S_t, in tiles that stay in cache.

A tile is many chunks of C tokens, of one head where the text is long. Per tile there are five matrix products, each of
all its chunks at once, and little else: what is slow on a CPU is a small operation, not arithmetic.

    A = (q kᵀ) ⊙ W              what a chunk sees of itself: W_ts = e^{G_t - G_s} for s <= t, G sums g from its start
    N = (k ⊙ e^{G_C - G})ᵀ v    what it adds to the state
    P = T [S, N_1, N_2, ..]     the states before its chunks and after the last: T is W of the chunks' totals
    o = A v + (q ⊙ e^G) P

Backward goes through the tiles from the last to the first with the same products and Tᵀ. It keeps the inputs and the
state at the start of every tile. The gradient of a gate is what passes its token: S dS at the chunk's start, and
Σ (k dk - q dq) from there to the token before it. Counted from the start, not from the end, every term is behind a
gate, and none behind more gates than the sum: nothing small is a difference of large numbers.

Exponents are differences that are <= 0. With gates per channel no W multiplies q kᵀ: tokens of one sub-block meet at a
reference in its middle if its gates keep above e^-60 together, others at the border between two sub-blocks. How fine
these are the gates of a tile decide, and sums of log decay are in float64 where they are large, so strong gates cost
time, never digits. Products are in the inputs' dtype (float16, and bfloat16 where the CPU does not multiply it, in
float32), states and sums in float32 at least.

    tiles         which rows and tokens a tile holds; the scratch in which its products are made
    products      the few batched products that both directions use
    decay         the decays of a tile: W, T, from a chunk's start to a query, from a key to its end
    channels      A where gates are per channel
    forward       outputs and states, tile by tile
    backward      gradients, tile by tile
    operators     both as operators of torch.library, since torch.compile would unroll their loops
    composed      the same out of torch's own operations, for derivatives that tiles do not have, and for torch.func
    large_pages   what makes a large output cheaper to touch
"""

from regard.ops.chunk.decay import LOWEST
from regard.ops.chunk.operators import chunked

__all__ = ["LOWEST", "chunked"]
