"""The laws of blocks on a block that is right, and on blocks with a planted fault."""

from dataclasses import dataclass, replace

import pytest
import torch

from regard.core import Card
from regard.kinds.block import BlockPage
from regard.testing.block import check_block, examine_block


@dataclass(frozen=True)
class Config:
    chunk: int = 64


def init(cfg, dims):
    return {"mix": torch.randn(dims["width"], dims["width"])}


def running(x, cfg, call):
    """x plus a map of the running mean of the tokens so far: a block that is small enough to be wrong on purpose."""
    full = x if x.dtype == torch.float64 else x.float()
    token_mask = torch.ones_like(full[..., :1])
    if call.key_mask is not None:
        token_mask = call.key_mask[:, 0, :, None].to(full.dtype).expand_as(token_mask)
    total, count = full.masked_fill(token_mask == 0, 0).cumsum(1), token_mask.cumsum(1)
    if call.initial_state is not None:
        total, count = total + call.initial_state[..., None, :-1], count + call.initial_state[..., None, -1:]
    mean = total / count.clamp(min=1)
    out = (full + mean @ call.params["mix"].to(full.dtype)).to(x.dtype)
    return out, torch.cat([total, count], dim=-1)[:, -1]


GOOD = BlockPage(
    config=Config,
    card=Card(title="running mean", paper="none", year=2026, idea="a block for the checks"),
    reference=running,
    fast=running,
    init=init,
    speed_settings=("chunk",),
    state_size=lambda cfg, dims, n: dims["width"] + 1,
)


def ahead(x, cfg, call):
    out, state = running(x, cfg, call)
    return out + 1e-3 * x.roll(-1, 1), state


def forgetful(x, cfg, call):
    return running(x, cfg, replace(call, initial_state=None))


def blind_to_padding(x, cfg, call):
    return running(x, cfg, replace(call, key_mask=None))


def times_zero(x, cfg, call):
    out, state = running(x, cfg, call)
    return out, state + (x * 0).sum((1, 2))[:, None]


def across_the_batch(x, cfg, call):
    out, state = running(x, cfg, call)
    return out + 1e-3 * x.mean(0), state


def cut_gradient(x, cfg, call):
    return running(x, cfg, replace(call, params={n: p.detach() for n, p in call.params.items()}))


def without_residual(x, cfg, call):
    out, state = running(x, cfg, call)
    return out - x, state


def counts_hidden(x, cfg, call):
    out, end = running(x, cfg, call)
    end = end.clone()
    end[:, -1] = x.shape[1] + (0 if call.initial_state is None else call.initial_state[:, -1])
    return out, end


def imprecise(x, cfg, call):
    out, state = running(x, cfg, call)
    return out * 1.05 if x.dtype == torch.bfloat16 else out, state


def slow_is_another(x, cfg, call):
    out, state = running(x, cfg, call)
    return out * (1 + 1e-3 * (cfg.chunk == 3)), state


@pytest.mark.parametrize(
    ("fault", "law"),
    [
        (ahead, "causality"),
        (forgetful, "segments"),
        (forgetful, "decode"),
        (blind_to_padding, "padding_left"),
        (blind_to_padding, "holes"),
        (times_zero, "padding_nan"),
        (across_the_batch, "batch"),
        (cut_gradient, "gradients"),
        (without_residual, "shape"),
        (counts_hidden, "padded_state"),
        (imprecise, "precision"),
        (slow_is_another, "speed_settings"),
    ],
)
def test_a_planted_fault_is_found(fault, law):
    report = examine_block(replace(GOOD, reference=fault, fast=fault))
    assert report[law].startswith("broken"), report


def test_a_fault_in_one_path_is_found():
    for fault in (ahead, forgetful, cut_gradient):
        assert examine_block(replace(GOOD, fast=fault))["fast_equals_reference"].startswith("broken")
    assert examine_block(replace(GOOD, state_size=lambda cfg, dims, n: n))["state_size"].startswith("broken")


def test_a_sound_block_passes():
    assert set(check_block(GOOD).values()) == {"held"}
    with pytest.raises(AssertionError, match=r"running mean\n(.*\n)*  causality: broken"):
        check_block(replace(GOOD, reference=ahead, fast=ahead))
