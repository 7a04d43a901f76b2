"""Triton kernels of the causal scan with decay, forward and backward; ops/triton_linear.py launches them.

    S_t = e^{g_t} S_{t-1} + k_tᵀ v_t,   o_t = q_t S_t            g: none, [H], [B, H, N] or [B, H, N, D], all <= 0

Checked in Triton's interpreter, and compiled for NVIDIA's sm_80 and sm_90; not yet run or timed on a GPU.

Two passes over chunks of C tokens. Pass 1 (`borders_kernel`) walks the chunks and writes the state at each border: as
many programs as batch x heads x blocks of D x blocks of E. Pass 2 (`outputs_kernel`) takes all chunks at once: a chunk
sees what came before through the state at its border, and itself through a [C, C] matrix of weights. Backward, the same
two kernels give the gradients at the borders and of v with q and k, v and o changing places and time running back;
`gradients_kernel` then gives those of q, k and g.

G is the sum of g from the chunk's start, its token included. Only differences that are <= 0 are exponentiated:
G_t - G_s for s <= t where the decay is one number per token. With a decay per key channel these would be a cube
[C, C, D]; it is made for 16 tokens at a time, and pairs further apart meet at a token r between them, e^{G_t - G_r} on
the query and e^{G_r - G_s} on the key. G has float32's digits: in a chunk full of gates near -60 a difference of two
is off by up to 1e-3.

Products: bfloat16 inputs on bfloat16 tensor cores; float16 in TF32, of as many digits but with float32's range; float32
as it is, without tensor cores. Sums, decays and states are float32.
"""

import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

# tokens whose decays per channel are compared in pairs; the least that tl.dot takes
SUB = tl.constexpr(16)
# the kinds of decay
NONE, SCALAR, CHANNEL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def load_tile(base, rows, cols, ROWS, WIDTH):
    """[rows, cols] of a row-major matrix [ROWS, WIDTH], zeros beyond it."""
    inside = (rows[:, None] < ROWS) & (cols[None, :] < WIDTH)
    return tl.load(base + rows[:, None] * WIDTH + cols[None, :], mask=inside, other=0.0)


INTERPRETED = tl.constexpr(not isinstance(load_tile, JITFunction))
CONFIGS = [triton.Config({}, num_warps=w, num_stages=s) for w, s in ((4, 2), (8, 2), (8, 3))]
tuned = (lambda kernel: kernel) if INTERPRETED else triton.autotune(CONFIGS, key=["D", "E", "C", "KIND"])


@triton.jit
def store_tile(base, rows, cols, ROWS, WIDTH, values):
    """[rows, cols] of a row-major matrix [ROWS, WIDTH] written; what lies beyond it is left out."""
    inside = (rows[:, None] < ROWS) & (cols[None, :] < WIDTH)
    tl.store(base + rows[:, None] * WIDTH + cols[None, :], values, mask=inside)


@triton.jit
def sums(gates, rows, d, D, KIND: tl.constexpr):
    """G at `rows`: [rows, 1], or [rows, d] with a decay per channel. Its rows are padded to whole chunks."""
    if KIND == SCALAR:
        return tl.load(gates + rows)[:, None]
    else:
        return tl.load(gates + rows[:, None] * D + d[None, :], mask=d[None, :] < D, other=0.0)


@triton.jit
def product(a, b, LOW: tl.constexpr, PRECISION: tl.constexpr):
    """a b in the dtype LOW, summed in float32."""
    a, b = a.to(LOW), b.to(LOW)
    # the interpreter holds bfloat16 as integers, and multiplies those
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@tuned
@triton.jit
def borders_kernel(
    x, z, gates, start, borders, N, NC, D: tl.constexpr, E: tl.constexpr, C: tl.constexpr, BD: tl.constexpr,
    BE: tl.constexpr, KIND: tl.constexpr, BACKWARD: tl.constexpr, LOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """borders [B·H, NC + 1, D, E]: the states, of x = k and z = v; backward their gradients, of x = q and z = do."""
    bh = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    e = tl.program_id(2) * BE + tl.arange(0, BE)
    x += bh * N * D
    z += bh * N * E
    gates += bh * NC * C * (D if KIND == CHANNEL else 1)
    borders += bh * (NC + 1) * D * E
    state = load_tile(start + bh * D * E, d, e, D, E)
    for i in range(0, NC):
        c = (NC - 1 - i) if BACKWARD else i
        store_tile(borders + (c + BACKWARD).to(tl.int64) * D * E, d, e, D, E, state)
        rows = c * C + tl.arange(0, C)
        x_c = load_tile(x, rows, d, N, D).to(tl.float32)
        if KIND != NONE:
            total = sums(gates, rows, d, D, KIND)
            end = sums(gates, (c + 1) * C - 1 + tl.arange(0, 1), d, D, KIND)
            x_c = x_c * tl.exp(total if BACKWARD else end - total)
            state = state * tl.trans(tl.exp(end))
        state += product(tl.trans(x_c), load_tile(z, rows, e, N, E), LOW, PRECISION)
    store_tile(borders + (0 if BACKWARD else NC) * D * E, d, e, D, E, state)


@tuned
@triton.jit
def weights_kernel(
    q, k, gates, weights, N, NC, D: tl.constexpr, E: tl.constexpr, C: tl.constexpr, BD: tl.constexpr,
    KIND: tl.constexpr, LOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """weights [B·H, NC, C, C] with a decay per channel, SUB queries at a time: Σ_d q_t k_s e^{G_t - G_s}, s <= t."""
    bh, c = tl.program_id(0).to(tl.int64) // NC, tl.program_id(0) % NC
    first = tl.program_id(1) * SUB
    # positions within the chunk
    near, all_ = first + tl.arange(0, SUB), tl.arange(0, C)
    q += bh * N * D
    k += bh * N * D
    gates += bh * NC * C * D
    far = tl.zeros([SUB, C], tl.float32)
    within = tl.zeros([SUB, SUB], tl.float32)
    for block in range(0, D, BD):
        d = block + tl.arange(0, BD)
        q_i = load_tile(q, c * C + near, d, N, D).to(tl.float32)
        k_i = load_tile(k, c * C + near, d, N, D).to(tl.float32)
        total, totals = sums(gates, c * C + near, d, D, KIND), sums(gates, c * C + all_, d, D, KIND)
        meet = sums(gates, c * C + first + tl.arange(0, 1), d, D, KIND)
        k_c = load_tile(k, c * C + all_, d, N, D) * tl.exp(tl.minimum(meet - totals, 0.0))
        far += product(q_i * tl.exp(total - meet), tl.trans(k_c), LOW, PRECISION)
        between = tl.exp(tl.minimum(total[:, None, :] - total[None, :, :], 0.0))
        within += tl.sum(between * q_i[:, None, :] * k_i[None, :, :], 2)
    weights += (bh * NC + c) * C * C
    far = tl.where(all_[None, :] < first, far, 0.0)
    elsewhere = (all_[None, :] < first) | (all_[None, :] >= first + SUB)
    tl.store(weights + near[:, None] * C + all_[None, :], far, mask=elsewhere)
    within = tl.where(near[:, None] >= near[None, :], within, 0.0)
    tl.store(weights + near[:, None] * C + near[None, :], within)


@tuned
@triton.jit
def outputs_kernel(
    x, y, z, gates, borders, weights, out, N, NC, D: tl.constexpr, E: tl.constexpr, C: tl.constexpr,
    BD: tl.constexpr, BE: tl.constexpr, KIND: tl.constexpr, BACKWARD: tl.constexpr, LOW: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out [B·H, N, E] of x, y, z = q, k, v and the states; backward dv of k, q, do and the states' gradients."""
    bh, c = tl.program_id(0).to(tl.int64) // NC, tl.program_id(0) % NC
    e, t = tl.program_id(1) * BE + tl.arange(0, BE), tl.arange(0, C)
    rows = c * C + t
    x += bh * N * D
    y += bh * N * D
    gates += bh * NC * C * (D if KIND == CHANNEL else 1)
    borders += (bh * (NC + 1) + c + BACKWARD) * D * E
    seen = tl.zeros([C, BE], tl.float32)
    w = tl.zeros([C, C], tl.float32)
    for block in range(0, D, BD):
        d = block + tl.arange(0, BD)
        x_c = load_tile(x, rows, d, N, D)
        if KIND != CHANNEL:
            w += product(x_c, tl.trans(load_tile(y, rows, d, N, D)), LOW, PRECISION)
        if KIND != NONE:
            total = sums(gates, rows, d, D, KIND)
            end = sums(gates, (c + 1) * C - 1 + tl.arange(0, 1), d, D, KIND)
            x_c = x_c * tl.exp(end - total if BACKWARD else total)
        seen += product(x_c, load_tile(borders, d, e, D, E), LOW, PRECISION)
    if KIND == CHANNEL:
        weights += (bh * NC + c) * C * C
        if BACKWARD:
            w = tl.load(weights + t[None, :] * C + t[:, None])
        else:
            w = tl.load(weights + t[:, None] * C + t[None, :])
    else:
        past = (t[:, None] <= t[None, :]) if BACKWARD else (t[:, None] >= t[None, :])
        if KIND == SCALAR:
            total = tl.load(gates + rows)
            between = total[:, None] - total[None, :]
            w = w * tl.exp(tl.where(past, -between if BACKWARD else between, float("-inf")))
        else:
            w = tl.where(past, w, 0.0)
    seen += product(w, load_tile(z + bh * N * E, rows, e, N, E), LOW, PRECISION)
    store_tile(out + bh * N * E, rows, e, N, E, seen)


@tuned
@triton.jit
def inside_kernel(
    q, k, v, do, gates, dq, dk, N, NC, D: tl.constexpr, E: tl.constexpr, C: tl.constexpr, BD: tl.constexpr,
    BE: tl.constexpr, KIND: tl.constexpr, LOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq and dk (float32) through the weights within a chunk, a token's own left out; with a decay per channel."""
    bh, c = tl.program_id(0).to(tl.int64) // NC, tl.program_id(0) % NC
    first, d = tl.program_id(1) * SUB, tl.program_id(2) * BD + tl.arange(0, BD)
    near, all_ = first + tl.arange(0, SUB), tl.arange(0, C)
    rows, chunk = c * C + near, c * C + all_
    # dw [t, s] of these queries, and dw [s, t] of these keys
    past = tl.zeros([SUB, C], tl.float32)
    later = tl.zeros([SUB, C], tl.float32)
    within = tl.zeros([SUB, SUB], tl.float32)
    for block in range(0, E, BE):
        e = block + tl.arange(0, BE)
        v_i, do_i = load_tile(v + bh * N * E, rows, e, N, E), load_tile(do + bh * N * E, rows, e, N, E)
        past += product(do_i, tl.trans(load_tile(v + bh * N * E, chunk, e, N, E)), LOW, PRECISION)
        later += product(v_i, tl.trans(load_tile(do + bh * N * E, chunk, e, N, E)), LOW, PRECISION)
        within += product(do_i, tl.trans(v_i), LOW, PRECISION)
    past = tl.where(all_[None, :] < first, past, 0.0)
    later = tl.where(all_[None, :] >= first + SUB, later, 0.0)
    within = tl.where(near[:, None] > near[None, :], within, 0.0)
    gates += bh * NC * C * D
    total, totals = sums(gates, rows, d, D, KIND), sums(gates, chunk, d, D, KIND)
    meet = sums(gates, c * C + first + tl.arange(0, 1), d, D, KIND)
    k_c = load_tile(k + bh * N * D, chunk, d, N, D) * tl.exp(tl.minimum(meet - totals, 0.0))
    dq_i = tl.exp(total - meet) * product(past, k_c, LOW, PRECISION)
    meet = sums(gates, c * C + first + SUB - 1 + tl.arange(0, 1), d, D, KIND)
    q_c = load_tile(q + bh * N * D, chunk, d, N, D) * tl.exp(tl.minimum(totals - meet, 0.0))
    dk_i = tl.exp(meet - total) * product(later, q_c, LOW, PRECISION)
    between = within[:, :, None] * tl.exp(tl.minimum(total[:, None, :] - total[None, :, :], 0.0))
    dq_i += tl.sum(between * load_tile(k + bh * N * D, rows, d, N, D)[None, :, :], 1)
    dk_i += tl.sum(between * load_tile(q + bh * N * D, rows, d, N, D)[:, None, :], 0)
    store_tile(dq + bh * N * D, rows, d, N, D, dq_i)
    store_tile(dk + bh * N * D, rows, d, N, D, dk_i)


@tuned
@triton.jit
def gradients_kernel(
    q, k, v, do, gates, borders, dborders, dq_inside, dk_inside, dq, dk, dg, N, NC, D: tl.constexpr,
    E: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, KIND: tl.constexpr, LOW: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, dk, and dg: [B·H, N, D], or [blocks of D, B·H, N] with a decay per token.

    g_t scales all that passes from before token t to token t and later, so its gradient is the sum over four ways: from
    the chunk's tokens to its tokens, from the state to tokens, from tokens to the next border, from state to border.
    Telescoped to q dq - k dk over the whole sequence, as it is often written, a strong decay leaves a small difference
    of large sums; here a token's own part is in neither sum and each way shrinks with its decay.
    """
    bh, c = tl.program_id(0).to(tl.int64) // NC, tl.program_id(0) % NC
    d, t = tl.program_id(1) * BD + tl.arange(0, BD), tl.arange(0, C)
    rows = c * C + t
    from_state = tl.zeros([C, BD], tl.float32)
    to_border = tl.zeros([C, BD], tl.float32)
    through = tl.zeros([BD], tl.float32)
    dw = tl.zeros([C, C], tl.float32)
    within = tl.zeros([C], tl.float32)
    for block in range(0, E, BE):
        e = block + tl.arange(0, BE)
        v_c, do_c = load_tile(v + bh * N * E, rows, e, N, E), load_tile(do + bh * N * E, rows, e, N, E)
        state = load_tile(borders + (bh * (NC + 1) + c) * D * E, d, e, D, E)
        dstate = load_tile(dborders + (bh * (NC + 1) + c + 1) * D * E, d, e, D, E)
        from_state += product(do_c, tl.trans(state), LOW, PRECISION)
        to_border += product(v_c, tl.trans(dstate), LOW, PRECISION)
        through += tl.sum(state * dstate, 1)
        within += tl.sum(do_c.to(tl.float32) * v_c.to(tl.float32), 1)
        if KIND != CHANNEL:
            dw += product(do_c, tl.trans(v_c), LOW, PRECISION)
    q_c = load_tile(q + bh * N * D, rows, d, N, D).to(tl.float32)
    k_c = load_tile(k + bh * N * D, rows, d, N, D).to(tl.float32)
    if KIND == CHANNEL:
        dq_c = load_tile(dq_inside + bh * N * D, rows, d, N, D)
        dk_c = load_tile(dk_inside + bh * N * D, rows, d, N, D)
    else:
        past = t[:, None] > t[None, :]
        if KIND == SCALAR:
            total = tl.load(gates + bh * NC * C + rows)
            dw = dw * tl.exp(tl.where(past, total[:, None] - total[None, :], float("-inf")))
        else:
            dw = tl.where(past, dw, 0.0)
        dq_c, dk_c = product(dw, k_c, LOW, PRECISION), product(tl.trans(dw), q_c, LOW, PRECISION)
    if KIND != NONE:
        gates += bh * NC * C * (D if KIND == CHANNEL else 1)
        total = sums(gates, rows, d, D, KIND)
        end = sums(gates, (c + 1) * C - 1 + tl.arange(0, 1), d, D, KIND)
        from_state = from_state * tl.exp(total)
        to_border = to_border * tl.exp(end - total)
        at_query, at_key = q_c * (dq_c + from_state) - k_c * dk_c, k_c * to_border
        if KIND == SCALAR:
            at_query, at_key = tl.sum(at_query, 1)[:, None], tl.sum(at_key, 1)[:, None]
            passing = tl.sum(through) * tl.exp(end)
        else:
            passing = through[None, :] * tl.exp(end)
        dg_c = tl.cumsum(at_query, 0, reverse=True) + (tl.cumsum(at_key, 0) - at_key) + passing
        if KIND == SCALAR:
            heads = tl.num_programs(0).to(tl.int64) // NC
            store_tile(dg + (tl.program_id(1) * heads + bh) * N, rows, tl.arange(0, 1), N, 1, dg_c)
        else:
            store_tile(dg + bh * N * D, rows, d, N, D, dg_c)
    store_tile(dq + bh * N * D, rows, d, N, D, dq_c + from_state + within[:, None] * k_c)
    store_tile(dk + bh * N * D, rows, d, N, D, dk_c + to_border + within[:, None] * q_c)
