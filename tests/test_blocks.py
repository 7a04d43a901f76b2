"""The laws of blocks on a block that is right, and on blocks with a planted fault."""

from dataclasses import dataclass, replace

import pytest
import torch

from regard import catalog
from regard.core import Card
from regard.kinds.block import BlockPage
from regard.testing.block import CHECKS, BlockCase, check_block, examine_block
from regard.testing.laws import GRID_CHECKS
from regard.testing.mechanism import law_of, verdict

EXEMPT = [name for name, page in catalog.every() if isinstance(page, BlockPage) and page.exempt]


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


def without_the_last_token(x, cfg, call):
    out, state = running(x, cfg, call)
    return out[:, :-1] if x.shape[1] > 5 else out, state


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
        (without_residual, "residual"),
        (without_the_last_token, "shape"),
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


def test_an_exemption_is_from_a_law():
    report = examine_block(replace(GOOD, exempt={"residua": "misspelled"}))
    assert report["exempt"] == "broken: exempt from laws that do not exist: ['residua']"


@pytest.mark.parametrize("name", EXEMPT)
def test_a_block_needs_its_exemptions(name):
    """Under some of its settings the law does not hold."""
    page = catalog.get(name)
    configs = [page.configure(**settings) for settings in ({}, *page.test_settings)]
    bare, pattern = replace(page, exempt={}), "causal_self" if page.grid is None else "self"
    for law in page.exempt:
        check = next(check for check in (*CHECKS, *GRID_CHECKS) if law_of(check) == law)
        found = [verdict(check, BlockCase(bare, cfg, pattern)) for cfg in configs]
        assert any(said.startswith("broken") for said in found), f"{name} keeps the law of {law}"


def test_a_sound_block_passes():
    assert set(check_block(GOOD).values()) == {"held"}
    with pytest.raises(AssertionError, match=r"running mean\n(.*\n)*  causality: broken"):
        check_block(replace(GOOD, reference=ahead, fast=ahead))
