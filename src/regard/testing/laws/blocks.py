"""Pages that choose blocks of keys: what they read is what they say, and nobody chooses by what comes later."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from regard.core import Method
from regard.kinds.mechanism import run
from regard.ops import explicit, lower_right
from regard.ops.blocks import Blocks, BlockSettings, kept_share
from regard.testing.case import Case, Inputs, NotApplicable, hold, same

LENGTHS = (1, 7, 63, 64, 65)
SAME = 1e-9


def check_blocks_all(case: Case) -> None:
    """Under the neutral settings, in small blocks, it is dense softmax at ragged lengths, and below dense_below."""
    only_blocks(case)
    if case.page.neutral_base is not None:
        raise NotApplicable("its neutral settings are not dense softmax")
    neutral = replace(case.cfg, **case.page.card.neutral)
    for cfg, law in ((neutral, "all blocks"), (replace(case.cfg, dense_below=2**40), "dense_below")):
        for n in LENGTHS:
            inputs = case.inputs(n)
            for path in case.paths:
                same(
                    f"{path}: {law} = dense softmax at {n} tokens",
                    ask(case, inputs, cfg, path)[0],
                    dense(case, inputs),
                )


def check_blocks_last(case: Case, n: int = 65) -> None:
    """The last `dense_last` queries read all that they may see, in whole blocks of queries; no other row changes."""
    only_blocks(case)
    if case.cfg.dense_last or "blocks_last" in case.page.exempt:
        raise NotApplicable("its settings leave the last queries dense")
    inputs, last = case.inputs(n), 5
    # where queries choose in blocks, the whole of a block is dense
    rows = n - (n - last) // case.cfg.block_q * case.cfg.block_q
    for path in case.paths:
        out = ask(case, inputs, replace(case.cfg, dense_last=last), path)[0]
        same(
            f"{path}: the last {rows} rows = dense softmax",
            out[:, :, n - rows :],
            dense(case, inputs)[:, :, n - rows :],
        )
        before = ask(case, inputs, case.cfg, path)[0]
        same(f"{path}: dense_last leaves the others", out[:, :, : n - rows], before[:, :, : n - rows])


def check_blocks_said(case: Case, n: int = 65) -> None:
    """aux["blocks"] are in order, none beyond what the queries may see; the output is softmax over just these."""
    only_blocks(case)
    blocks, inputs = listed(case, n)
    index, bq, bk = blocks.index, blocks.block_q, blocks.block_k
    there = index >= 0
    rising = (index[..., 1:] > index[..., :-1]) | ~there[..., 1:]
    hold(rising.all(), "aux: blocks ascend, and none is named twice", blocks=index.tolist())
    if case.pattern == "causal_self":
        end = (torch.arange(index.shape[2]) + 1)[:, None] * bq
        ahead = ((index * bk >= end) & there).nonzero()
        hold(
            not len(ahead),
            "aux: a block is read that begins after the last of its queries",
            at=ahead[:1].tolist(),
        )
    hold((index * bk < n).all(), "aux: a block is read that lies beyond the text", blocks=index.tolist())
    if case.page.choose is None:
        return
    whole = blocks.map(-(-n // bk)).repeat_interleave(bq, 2).repeat_interleave(bk, 3)[:, :, :n, :n]
    whole = whole if case.pattern != "causal_self" else whole & lower_right(n, n)
    wanted = explicit(inputs.q, inputs.k, inputs.v, scale=inputs.q.shape[-1] ** -0.5, mask=whole)
    same("out = softmax over the blocks that aux names", ask(case, inputs, case.cfg, "fast")[0], wanted)


def check_blocks_causal(case: Case, n: int = 65) -> None:
    """Tokens after the last query of a block change none of the blocks that it reads."""
    only_blocks(case)
    if case.pattern != "causal_self":
        raise NotApplicable(f"{case.pattern} is not causal")
    case.choosing()
    before, inputs = listed(case, n)
    cut = before.index.shape[2] // 2
    later = slice(cut * before.block_q, None)
    moved = {}
    for name in "qkv":
        moved[name] = getattr(inputs, name).clone()
        moved[name][:, :, later] = moved[name][:, :, later].flip(2) * -3
    after = ask(case, replace(inputs, **moved), case.cfg, "fast")[2]["blocks"]
    columns = -(-n // before.block_k)
    early = [b.map(columns)[:, :, :cut] for b in (before, after)]
    hold(torch.equal(*early), f"blocks of queries before {cut * before.block_q} are chosen by later tokens")


def check_blocks_heads(case: Case, n: int = 40) -> None:
    """Heads in another order choose and read what they did: no head reads by the list of another."""
    only_blocks(case)
    inputs = case.inputs(n, groups=2)
    if inputs.params:
        raise NotApplicable("its parameters belong to heads")
    q = torch.cat([inputs.q, inputs.q.flip(-1) * 1.3], 1)
    few = replace(inputs, q=q)
    order = torch.tensor([3, 2, 0, 1])  # no cyclic one, which lists shifted by a head would follow
    other = replace(few, q=q[:, order], k=few.k.flip(1), v=few.v.flip(1))
    for path in case.paths:
        outs = [ask(case, x, case.cfg, path)[0] for x in (few, other)]
        same(f"{path}: heads in another order", outs[1], outs[0][:, order])


def check_blocks_knob(case: Case, n: int = 65) -> None:
    """Every value of the knob is accepted, each reads no fewer keys than the one before, the last reads all.

    Other settings stand as in the neutral ones of the card: a bound on the blocks would hold them back.
    """
    only_blocks(case)
    if case.page.knob is None:
        raise NotApplicable("the page names no knob")
    name, values = case.page.knob
    inputs, before, cfg = case.inputs(n), -1.0, replace(case.cfg, **case.page.card.neutral)
    for value in values:
        out, _, aux = ask(case, inputs, replace(cfg, **{name: value}), "fast")
        blocks = aux["blocks"]
        kept = kept_share(blocks, n, n, causal=case.pattern == "causal_self").mean().item()
        hold(
            kept >= before - SAME,
            f"{name}={value} reads {kept:.3f} of the keys, fewer than {before:.3f} before it",
        )
        before = kept
    hold(before > 1 - SAME, f"{name}={values[-1]} reads {before:.3f} of the keys, not all")
    same(f"{name}={values[-1]} = dense softmax", out, dense(case, inputs))


def only_blocks(case: Case) -> None:
    if not isinstance(case.cfg, BlockSettings):
        raise NotApplicable("it chooses no blocks of keys")


def ask(case: Case, inputs: Inputs, cfg: Any, path: str) -> tuple[Tensor, Any, dict]:
    """(out, state, aux)"""
    x = inputs.x if inputs.y is None else (inputs.x, inputs.y)
    method = Method(case.page.card.title, case.page, cfg)
    options = dict(pattern=case.pattern, params=inputs.params, x=x, roles=inputs.roles)
    return run(method, inputs.q, inputs.k, inputs.v, impl=path, **options)


def dense(case: Case, inputs: Inputs) -> Tensor:
    mask = lower_right(inputs.q.shape[2], inputs.k.shape[2]) if case.pattern == "causal_self" else None
    return explicit(inputs.q, inputs.k, inputs.v, scale=inputs.q.shape[-1] ** -0.5, mask=mask)


def listed(case: Case, n: int) -> tuple[Blocks, Inputs]:
    inputs = case.inputs(n, n)
    blocks = ask(case, inputs, case.cfg, "fast")[2].get("blocks")
    if not isinstance(blocks, Blocks):
        raise NotApplicable("its aux names no blocks")
    return blocks, inputs
